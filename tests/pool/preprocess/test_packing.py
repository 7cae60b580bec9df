"""Documents to samples: packed contexts, or one each."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.preprocess.packing import Packer, one_per_document


@given(lengths=st.lists(st.integers(1, 12), max_size=30), cuts=st.sets(st.integers(0, 30)), length=st.integers(2, 7))
@settings(deadline=None, max_examples=150)
def test_packing_equals_the_plain_way(lengths: list[int], cuts: set[int], length: int) -> None:
    """Any batches give the contexts, parts and main documents of a token-by-token loop."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.empty(0, dtype=np.int64), *map(np.arange, lengths)])
    tokens = (owner * 100 + place).astype(np.uint16)
    packer = Packer(length, "uint16")
    borders = sorted({0, len(lengths), *(cut for cut in cuts if cut < len(lengths))})
    blocks = []
    for first, stop in zip(borders, borders[1:] or borders, strict=False):
        inside = (owner >= first) & (owner < stop)
        blocks.append(packer.add(tokens[inside], np.array(lengths[first:stop], dtype=np.int64), first))
    dropped = packer.drop_tail()

    num_contexts = len(tokens) // length
    assert dropped == len(tokens) - num_contexts * length
    assert np.concatenate([block.tokens for block in blocks]).tolist() == tokens[: num_contexts * length].tolist()
    expected_parts, expected_main, expected_counts = [], [], []
    for context in range(num_contexts):
        here = slice(context * length, (context + 1) * length)
        present = sorted(set(owner[here].tolist()))
        counts = [int((owner[here] == document).sum()) for document in present]
        expected_counts.append(len(present))
        expected_main.append(present[int(np.argmax(counts))])
        expected_parts += [
            (document, int(place[here][owner[here] == document][0]), count) for document, count in zip(present, counts, strict=True)
        ]
    parts = [
        part
        for block in blocks
        for part in zip(block.part_document.tolist(), block.part_first_token.tolist(), block.part_num_tokens.tolist(), strict=True)
    ]
    assert parts == expected_parts
    assert [number for block in blocks for number in block.main_document.tolist()] == expected_main
    assert [number for block in blocks for number in block.parts_per_sample.tolist()] == expected_counts
    assert {number for block in blocks for number in block.lengths.tolist()} <= {length}


def test_one_sample_per_document() -> None:
    block = one_per_document(np.arange(5), np.array([2, 3]), 7)
    assert block.lengths.tolist() == [2, 3] and block.main_document.tolist() == [7, 8]
    assert block.part_num_tokens.tolist() == [2, 3] and block.part_first_token.tolist() == [0, 0]
