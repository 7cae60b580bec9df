"""Spools: what goes in by file comes out by cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.preprocess.spool import CellReader, Spool, SpoolWriter

NUM_CELLS = 5


def write_spool(path: Path, samples: list[tuple[list[int], int, int, bytes]], batches: int, block_bytes: int, dtype: str) -> Spool:
    """Samples are (ids, cell, kind, source line)."""
    with open(path, "wb") as file:
        writer = SpoolWriter(file, NUM_CELLS, block_bytes)
        for part in np.array_split(np.arange(len(samples)), batches):
            chosen = [samples[number] for number in part]
            writer.add(
                np.array([token for ids, *_ in chosen for token in ids], dtype=dtype),
                np.array([len(ids) for ids, *_ in chosen], dtype=np.int64),
                np.array([cell for _, cell, _, _ in chosen], dtype=np.int64),
                np.array([kind for _, _, kind, _ in chosen], dtype=np.int32),
                [source for *_, source in chosen],
            )
        return Spool(path, *writer.finish())


SAMPLES = st.tuples(
    st.lists(st.integers(0, 65535), min_size=1, max_size=6), st.integers(0, NUM_CELLS - 1), st.integers(-1, 9), st.binary(max_size=9)
)


@given(
    files=st.lists(st.lists(SAMPLES, max_size=12), max_size=4),
    batches=st.integers(1, 4),
    block_bytes=st.sampled_from([1, 1500, 1 << 20]),
    memory_bytes=st.sampled_from([0, 60, 1 << 20]),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
@settings(deadline=None, max_examples=80)
def test_cells_hold_their_samples_in_order(
    tmp_path_factory: pytest.TempPathFactory, files: list, batches: int, block_bytes: int, memory_bytes: int, dtype: str
) -> None:
    """Whatever the batches, the blocks, and how much of a cell is held in memory."""
    directory = tmp_path_factory.mktemp("spools")
    spools = [write_spool(directory / str(number), samples, batches, block_bytes, dtype) for number, samples in enumerate(files)]
    for spool, samples in zip(spools, files, strict=True):
        assert spool.samples_per_cell(NUM_CELLS).tolist() == [sum(cell == c for _, c, _, _ in samples) for cell in range(NUM_CELLS)]
    for cell in range(NUM_CELLS):
        expected = [(number, *sample) for number, samples in enumerate(files) for sample in samples if sample[1] == cell]
        reader = CellReader(spools, cell, NUM_CELLS, dtype, memory_bytes)
        assert len(reader) == len(expected)
        for sample, (number, ids, _, kind, source) in enumerate(expected):
            tokens, line = reader.read(sample)
            assert (tokens.tolist(), line) == (ids, source) and tokens.dtype == dtype
            assert (reader.spool_of[sample], reader.kinds[sample]) == (number, kind)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_a_spool_cut_short_is_an_error(tmp_path: Path, memory_bytes: int) -> None:
    spool = write_spool(tmp_path / "a", [([1, 2, 3], 0, 0, b"source")], 1, 1 << 20, "uint16")
    content = spool.path.read_bytes()
    spool.path.write_bytes(content[: spool.table_start + 8])
    with pytest.raises(OSError, match=r"ends before byte .* damaged after it was written"):
        CellReader([spool], 0, NUM_CELLS, "uint16", memory_bytes)
