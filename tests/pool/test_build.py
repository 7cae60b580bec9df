"""From raw documents to a pool: packing, shuffle, counts, errors."""

from __future__ import annotations

import errno
import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import collect as collect_module
from megatron_groupmates.pool import encode as encode_module
from megatron_groupmates.pool.build import BuildOptions, build_pool
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.packing import Packer, one_per_document
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.sources import read_sources
from tests.pool.helpers import documents, tiny_tokenizer, write_raw


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


def raw(directory: Path) -> Path:
    write_raw(directory / "web.jsonl.zst", documents(120, 1, kinds=["web"]))
    write_raw(directory / "sub" / "book.jsonl.gz", documents(80, 2, kinds=["book", "essay"]))
    write_raw(directory / "none.jsonl", [{"text": "no kind here"}, b"{", b'{"text": ""}'])
    return directory


def plain_streams(directory: Path) -> dict[str, list[int]]:
    """Ids of each input file, document after document, each followed by the end-of-text token."""
    tokenizer = tiny_tokenizer()
    generated = {"web.jsonl.zst": documents(120, 1), "sub/book.jsonl.gz": documents(80, 2), "none.jsonl": [{"text": "no kind here"}]}
    return {
        name: [token for record in records for token in [*tokenizer.encode_batch([record["text"]])[0].tolist(), tokenizer.eot_id]]
        for name, records in generated.items()
    }


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_packed_pool_holds_every_context_once(tmp_path: Path) -> None:
    options = BuildOptions(pack=33, samples_per_shard=50)
    summary, built = build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), options)
    assert built
    index = PoolIndex.open(tmp_path / "pool")
    streams = plain_streams(tmp_path)
    expected = [tuple(stream[first : first + 33]) for stream in streams.values() for first in range(0, len(stream) - 32, 33)]
    found = [tuple(tokens.tolist()) for tokens in PoolReader(index).read_many(range(index.num_samples))]
    assert sorted(found) == sorted(expected)
    assert found != [context for name in sorted(streams) for context in expected if context in streams[name]]
    assert index.rows_per_shard[:-1].tolist() == [50] * (index.num_shards - 1)
    assert set(index.lengths.tolist()) == {33}

    assert summary["documents_read"] == 203 == summary["documents_accepted"] + summary["documents_rejected"]
    assert summary["rejects_by_kind"] == {"broken_json": 1, "empty_text": 1}
    assert summary["tokens_encoded"] == sum(map(len, streams.values()))
    assert summary["tokens_dropped_in_tails"] == sum(len(stream) % 33 for stream in streams.values())
    assert summary["tokens_in_pool"] == summary["tokens_encoded"] - summary["tokens_dropped_in_tails"]
    assert summary["tokens_in_pool"] == index.num_tokens
    rejects = [json.loads(line) for line in (tmp_path / "pool" / "rejects.jsonl").read_text().splitlines()]
    assert [(item["file"], item["line"], item["kind"]) for item in rejects] == [
        ("none.jsonl", 2, "broken_json"),
        ("none.jsonl", 3, "empty_text"),
    ]
    assert not (tmp_path / "pool" / "tokens.spool").exists()


def test_sources_lead_back_to_the_documents(tmp_path: Path) -> None:
    options = BuildOptions(pack=33, samples_per_shard=50)
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), options)
    index = PoolIndex.open(tmp_path / "pool")
    tokenizer, reader = tiny_tokenizer(), PoolReader(index)
    generated = {"web.jsonl.zst": documents(120, 1), "sub/book.jsonl.gz": documents(80, 2)}
    row = 0
    for name in index.shard_names:
        for source in read_sources(index, name):
            parts = []
            for part in source["documents"]:
                record = generated[part["file"]][part["line"] - 1]
                ids = [*tokenizer.encode_batch([record["text"]])[0].tolist(), tokenizer.eot_id]
                parts += ids[part["first_token"] : part["first_token"] + part["num_tokens"]]
                assert part["url"] == record["url"]
            assert parts == reader.read(row).tolist()
            assert source["kind"] == index.kinds[index.kind_of[row]]
            row += 1
    assert row == index.num_samples
    assert set(index.kinds) >= {"web", "book", "essay"}


def test_one_sample_per_document_pool(tmp_path: Path) -> None:
    summary, _ = build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    index = PoolIndex.open(tmp_path / "pool")
    assert summary["samples"] == index.num_samples == summary["documents_accepted"] == 201
    assert summary["tokens_dropped_in_tails"] == 0
    tokens = PoolReader(index).read_many(range(index.num_samples))
    assert all(ids[-1] == index.eot_id and index.eot_id not in ids[:-1] for ids in tokens)
    expected = [record["text"] for record in documents(120, 1) + documents(80, 2)] + ["no kind here"]
    assert sorted(map(tiny_tokenizer().decode, tokens)) == sorted(expected)
    assert (index.kind_of == -1).sum() == 1


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
def test_same_arguments_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member_format: str) -> None:
    """Whatever the number of workers, the batches, where the data lies and in which order it is named."""
    options = BuildOptions(pack=17, samples_per_shard=60, seed=4, member_format=member_format)
    build_pool([raw(tmp_path / "raw")], tmp_path / "a", tiny_tokenizer(), options)
    moved = tmp_path / "elsewhere" / "raw"
    raw(moved)
    monkeypatch.setattr(encode_module, "_BATCH_CHARACTERS", 300)
    inputs = [moved / "web.jsonl.zst", str(moved / "*.jsonl"), moved / "sub"]
    build_pool(inputs, tmp_path / "b", tiny_tokenizer(), options, num_workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_seed_changes_the_order_only(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        build_pool([raw(tmp_path / "raw")], tmp_path / str(seed), tiny_tokenizer(), BuildOptions(pack=17, seed=seed))
        index = PoolIndex.open(tmp_path / str(seed))
        found.append([tuple(ids.tolist()) for ids in PoolReader(index).read_many(range(index.num_samples))])
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1])


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    arguments = [raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer()
    first, _ = build_pool(*arguments, BuildOptions(pack=17))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()}
    again, built = build_pool(*arguments, BuildOptions(pack=17), num_workers=2)
    assert (again, built) == (first, False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()} == before
    with pytest.raises(UserError, match=r"made with other arguments \(pack was 17, is 18; seed was 0, is 2\)"):
        build_pool(*arguments, BuildOptions(pack=18, seed=2))
    write_raw(tmp_path / "raw" / "more.jsonl", documents(1))
    with pytest.raises(UserError, match="inputs was"):
        build_pool(*arguments, BuildOptions(pack=17))


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    with pytest.raises(UserError, match="raw is not empty and not a pool"):
        build_pool([tmp_path / "raw"], tmp_path / "raw", tiny_tokenizer(), BuildOptions())
    with pytest.raises(UserError, match=r"none.jsonl is not empty and not a pool"):
        build_pool([tmp_path / "raw"], tmp_path / "raw" / "none.jsonl", tiny_tokenizer(), BuildOptions())


def test_too_many_rejects_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 lines rejected so far, --max-rejects is 1; .*pool.rejects.jsonl lists"):
        build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=1)
    assert len((tmp_path / "pool.rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "pool").exists()
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=2)


def test_no_sample_at_all(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "a.jsonl", [{"text": "short"}, {"content": "x"}])
    message = r"no sample comes of the 1 input files: 1 documents with \d tokens, 1 lines rejected \(1 missing_text\)"
    with pytest.raises(UserError, match=message):
        build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(pack=100))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": 1}, "at least 2 tokens, not 1; change --pack"),
        ({"samples_per_shard": 0}, "at least 1 sample, not 0; change --samples-per-shard"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**options)


def test_too_many_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "_MAX_KINDS", 2)
    with pytest.raises(UserError, match=r"more than 2 different values of 'metadata.kind'; .* with --kind-field"):
        build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())


@pytest.mark.parametrize(
    "target",
    [
        "megatron_groupmates.pool.build.write_shard",
        "megatron_groupmates.pool.build.write_sources",
        "megatron_groupmates.pool.index.write_json",
        "megatron_groupmates.utils.files.os.fsync",
    ],
)
def test_a_full_disk_leaves_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(OSError, match="No space left"):
        build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions(pack=17))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_killed_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(encode_module, "_in_order", broken)
    with pytest.raises(UserError, match="probably for want of memory; use fewer than 2 --workers"):
        build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), num_workers=2)
