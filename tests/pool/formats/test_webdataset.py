"""Exports for plain webdataset, read by webdataset itself."""

from __future__ import annotations

import itertools
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.subset import Subset
from megatron_groupmates.pool.formats.webdataset import WebDatasetExport, export_webdataset, open_export, selected
from megatron_groupmates.pool.formats.wids import export_wids
from tests.pool.formats.helpers import MASK, MASKS, ROWS_PER_SHARD, foreign_pool, selected_tokens, snapshot, subset, whole
from tests.pool.helpers import make_pool


def export(chosen: Subset, output: Path) -> WebDatasetExport:
    export_webdataset(chosen, output)
    return open_export(output)


def read(opened: WebDatasetExport, **options: object) -> list[list[int]]:
    data = webdataset.WebDataset(opened.urls, select_files=opened.select_files, **{"shardshuffle": False, **options})
    return [sample["tokens"].tolist() for sample in data.map(opened.put_tokens)]


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
@given(mask=MASKS)
@settings(deadline=None, max_examples=15)
def test_exactly_the_selected_samples(tmp_path_factory: pytest.TempPathFactory, member_format: str, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD, member_format=member_format), mask)
    before = snapshot(root / "pool")
    opened = export(chosen, root / "out")
    assert read(opened) == selected_tokens(chosen)
    assert opened.num_samples == mask.sum()
    assert snapshot(root / "pool") == before


def test_shuffled_shards_workers_and_nodes(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", (5, 8, 3, 6)), np.arange(22) % 3 == 1)
    opened = export(chosen, tmp_path / "out")
    expected = sorted(selected_tokens(chosen))
    assert sorted(read(opened, shardshuffle=10, detshuffle=True, seed=3)) == expected
    by_node = [read(opened, nodesplitter=lambda urls, node=node: itertools.islice(urls, node, None, 2)) for node in range(2)]
    assert all(by_node) and sorted(itertools.chain(*by_node)) == expected
    data = webdataset.WebDataset(opened.urls, select_files=selected(tmp_path / "out"), shardshuffle=4).map(opened.put_tokens)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert sorted(sample["tokens"].tolist() for sample in loader) == expected


def test_the_callback_can_be_pickled_and_is_not_large(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", (100,)), np.arange(100) % 2 == 0)
    opened = export(chosen, tmp_path / "out")
    content = pickle.dumps(opened.select_files)
    assert len(content) < 400
    again = pickle.loads(content)
    names = [f"00000000_{row:08d}.bin" for row in range(100)]
    assert [again(name) for name in names] == [opened.select_files(name) for name in names] == [row % 2 == 0 for row in range(100)]
    assert not again("nodot") and not again("00000000_00000100.bin") and not again("__meta__/00000000_00000000.bin")


def test_shards_of_another_tool_with_metadata_members(tmp_path: Path) -> None:
    names = [
        [f"{shard}/{row}{ending}" for row in range(4) for ending in (".json", ".json.gz")] + [f"{shard}/lonely.json"] for shard in range(2)
    ]
    index = foreign_pool(tmp_path / "pool", names, tar_format=tarfile.PAX_FORMAT)
    chosen = subset(index, np.array([True, False, False, True, False, True, False, False]))
    opened = export(chosen, tmp_path / "out")
    data = webdataset.WebDataset(opened.urls, select_files=opened.select_files, shardshuffle=False).map(opened.put_tokens)
    samples = list(data)
    assert [sample["tokens"].tolist() for sample in samples] == selected_tokens(chosen)
    assert [sample["__key__"] for sample in samples] == ["0/0", "0/3", "1/1"] and all("json" in sample for sample in samples)


def test_shards_without_a_selected_sample_are_not_opened(tmp_path: Path) -> None:
    opened = export(subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), np.arange(16) == 7), tmp_path / "out")
    assert opened.urls == [str(tmp_path / "pool" / "shard_00000001.tar")]


def test_keys_that_do_not_tell_samples_apart_are_refused(tmp_path: Path) -> None:
    index = foreign_pool(tmp_path / "pool", [["0.json.gz", "1.json.gz"]] * 2)
    with pytest.raises(UserError, match=r"1 keys, '1' for one, belong to a selected sample and to one that is not.*--materialize"):
        export_webdataset(subset(index, np.array([True, True, True, False])), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Where both are selected there is nothing to tell apart.
    chosen = subset(index, np.array([True, False, True, False]))
    assert read(export(chosen, tmp_path / "out")) == selected_tokens(chosen)


def test_a_key_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    index = foreign_pool(tmp_path / "pool", [["0.json.gz", "1.json.gz", "0.json.gz"]])
    with pytest.raises(UserError, match=r"0.tar has the key '0' twice: once others .*--materialize"):
        export_webdataset(subset(index, np.array([True, False, True])), tmp_path / "out")
    index = foreign_pool(tmp_path / "adjacent", [["0.json.gz", "0.json.gz"]])
    with pytest.raises(UserError, match=r"0.tar, rows 0 and 1: both have the key '0', which makes one sample.*--materialize"):
        export_webdataset(subset(index, np.array([True, False])), tmp_path / "out")


def test_a_damaged_or_other_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none is not an export: it has no export.json"):
        open_export(tmp_path / "none")
    export(subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK), tmp_path / "out")
    keys, facts = tmp_path / "out" / "selected_keys.bin", tmp_path / "out" / "export.json"
    keys.write_bytes(keys.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"selected_keys.bin is not the one of this export \(SHA-256 .*, not .*\)"):
        open_export(tmp_path / "out")
    content = facts.read_text()
    for old, new, message in (
        ('"webdataset"', '"wids"', "export.json is damaged: its content has digest .*, it says"),
        ('"version": 1', '"version": 2', "is not an export of version 1"),
        ("{", "", "export.json is damaged"),
    ):
        facts.write_text(content.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            open_export(tmp_path / "out")


def test_an_export_for_another_reader_is_refused(tmp_path: Path) -> None:
    export_wids(whole(make_pool(tmp_path / "pool", ROWS_PER_SHARD)), tmp_path / "out")
    with pytest.raises(UserError, match="is an export for wids, not for webdataset"):
        open_export(tmp_path / "out")


def test_a_shard_that_is_not_the_pool_s_is_refused(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", (2,))
    path = tmp_path / "pool" / "shard_00000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"shard_00000000.tar cannot be read: the archive is damaged.*; restore it"):
        export_webdataset(subset(index, np.array([True, False])), tmp_path / "out")
