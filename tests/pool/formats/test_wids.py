"""Exports for wids, read by wids itself."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from wids import ShardListDataset

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.materialize import materialize
from megatron_groupmates.pool.formats.wids import export_wids, token_transform
from tests.pool.formats.helpers import MASK, MASKS, ROWS_PER_SHARD, SHARD_MASKS, foreign_pool, selected_tokens, subset, whole
from tests.pool.helpers import make_pool


def read(output: Path, by_itself: bool = False) -> list[list[int]]:
    """With our transformation, or as wids decodes by itself."""
    transformations = "PIL" if by_itself else [token_transform(output)]
    cache = output.parent / "cache"
    cache.mkdir(exist_ok=True)
    data = ShardListDataset(str(output / "index.json"), cache_dir=str(cache), transformations=transformations)
    return [list(map(int, data[number][".json.gz" if by_itself else "tokens"])) for number in range(len(data))]


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
@given(mask=SHARD_MASKS)
@settings(deadline=None, max_examples=5)
def test_exactly_the_selected_shards(tmp_path_factory: pytest.TempPathFactory, member_format: str, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD, member_format=member_format), mask)
    export_wids(chosen, root / "out")
    assert read(root / "out") == selected_tokens(chosen)
    if member_format == "json.gz":
        assert read(root / "out", by_itself=True) == selected_tokens(chosen)


@given(mask=MASKS)
@settings(deadline=None, max_examples=8)
def test_any_selection_materialised(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD), mask)
    export_wids(whole(materialize(chosen, root / "out", "json.gz", rows_per_shard=4)), root / "out")
    moved = (root / "out").rename(root / "moved")  # shards beside the index are found wherever both go
    assert read(moved, by_itself=True) == selected_tokens(chosen)


def test_a_selection_within_shards_is_refused(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    message = (
        r"3 shards are selected in part \(shard_00000000, .*\), and wids serves every sample of a shard: .*not selected;.*--materialize"
    )
    with pytest.raises(UserError, match=message):
        export_wids(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "tar_format", "message"),
    [
        ([["0.json.gz", "extra.json"]], tarfile.GNU_FORMAT, r"0\.tar has 1 samples that the pool has not, which wids would serve"),
        ([["0.json.gz", "1.json.gz", "0.json.gz"]], tarfile.GNU_FORMAT, r"0\.tar has the key '0' twice, of which wids sees one"),
        ([["k" * 92 + ".json.gz"]], tarfile.GNU_FORMAT, r"0\.tar has member names of 100 bytes or more, which wids cannot"),
        ([["k" * 120 + ".json.gz"]], tarfile.GNU_FORMAT, r"0\.tar has member names of 100 bytes or more"),
        ([["ä.json.gz"]], tarfile.PAX_FORMAT, r"0\.tar has member names of 100 bytes or more"),
    ],
)
def test_shards_that_wids_sees_otherwise_are_refused(tmp_path: Path, names: list[list[str]], tar_format: int, message: str) -> None:
    index = foreign_pool(tmp_path / "pool", names, tar_format=tar_format)
    with pytest.raises(UserError, match=message + ".*--materialize"):
        export_wids(whole(index), tmp_path / "out")


def test_names_of_99_bytes_are_served(tmp_path: Path) -> None:
    chosen = whole(foreign_pool(tmp_path / "pool", [["k" * 91 + ".json.gz"]]))
    export_wids(chosen, tmp_path / "out")
    assert read(tmp_path / "out") == selected_tokens(chosen)


def test_shards_with_one_file_name_are_refused(tmp_path: Path) -> None:
    make_pool(tmp_path / "pool" / "a", (2,))
    make_pool(tmp_path / "pool" / "b", (2,), seed=1)
    index = foreign_pool(tmp_path / "pool", [])
    with pytest.raises(UserError, match=r"a/shard_00000000.tar and .*b/shard_00000000.tar have one file name, by which wids keeps"):
        export_wids(whole(index), tmp_path / "out")
