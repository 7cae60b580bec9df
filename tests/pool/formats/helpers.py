"""Selections of tiny pools, as exports get them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from megatron_groupmates.pool.formats.existing import index_existing
from megatron_groupmates.pool.formats.subset import Subset
from megatron_groupmates.pool.generation import publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.sources import DocumentSource, source_line, write_source_lines
from tests.pool.helpers import make_pool, tiny_tokenizer
from tests.pool.tars import json_member, random_samples, write_tar

ROWS_PER_SHARD = (5, 8, 3)
MASKS = st.lists(st.booleans(), min_size=sum(ROWS_PER_SHARD), max_size=sum(ROWS_PER_SHARD)).filter(any).map(np.array)
SHARD_MASKS = st.lists(st.booleans(), min_size=3, max_size=3).filter(any).map(lambda chosen: np.repeat(chosen, ROWS_PER_SHARD))
MASK = np.arange(sum(ROWS_PER_SHARD)) % 3 == 1


def whole(index: PoolIndex) -> Subset:
    """All of a pool."""
    return subset(index, np.ones(index.num_samples, dtype=bool))


def subset(index: PoolIndex, mask: np.ndarray) -> Subset:
    """Some of a pool."""
    return Subset(index, mask, {"pool": "p", "pool_fingerprint": index.fingerprint, "generation": None, "generation_digest": None})


def selected_tokens(chosen: Subset) -> list[list[int]]:
    """What an export must yield, in the pool's order."""
    return [tokens.tolist() for tokens in PoolReader(chosen.index).read_many(np.flatnonzero(chosen.mask))]


def foreign_pool(directory: Path, names: Sequence[Sequence[str]], **options: int) -> PoolIndex:
    """A pool of shards that another tool wrote: for each the names of its members, ``.json.gz`` with ids, others not."""
    samples = iter(random_samples(sum(map(len, names))))
    for number, members in enumerate(names):
        content = [(name, json_member(next(samples)) if name.endswith("json.gz") else b"{}") for name in members]
        write_tar(directory / f"{number}.tar", content, **options)
    index_existing(directory, directory, tiny_tokenizer())
    return PoolIndex.open(directory)


def pool_and_generation(root: Path, mask: np.ndarray = MASK, **options: object) -> tuple[Path, Path]:
    """(pool, selection directory) with generation 2 published."""
    index = make_pool(root / "pool", ROWS_PER_SHARD, **options)
    write_generation(root / "selection", 2, index, np.flatnonzero(mask), {})
    publish(root / "selection", 2)
    return root / "pool", root / "selection"


def add_sources(index: PoolIndex) -> None:
    """Sources of two documents a sample: from ``a.com`` and, its last two tokens, from the row's own domain."""
    assert isinstance(index.directory, Path)
    for shard, name in enumerate(index.shard_names):
        lines = []
        for row in range(int(index.rows_per_shard[shard])):
            length = int(index.lengths[index.first_row[shard] + row])
            one = DocumentSource("f.jsonl", row + 1, "http://www.a.com/x", {"topic": "odd" if row % 2 else "even"}).part(0, length - 2)
            other = DocumentSource("f.jsonl", row + 100, f"http://b{row}.org", {}).part(length - 2, 2)
            lines.append(source_line("web", [one, other]))
        write_source_lines(index.directory, name, lines)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict:
    """A JSON object."""
    return json.loads(path.read_text())
