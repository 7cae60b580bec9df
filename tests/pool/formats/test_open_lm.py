"""Exports for open_lm, which is no package: read as its loader does, through webdataset."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.materialize import materialize
from megatron_groupmates.pool.formats.open_lm import export_open_lm
from tests.pool.formats.helpers import (
    MASK,
    MASKS,
    ROWS_PER_SHARD,
    SHARD_MASKS,
    foreign_pool,
    read_json,
    selected_tokens,
    snapshot,
    subset,
    whole,
)
from tests.pool.helpers import make_pool

LENGTH = 9


def read_like_open_lm(manifest: Path) -> list[list[int]]:
    """Its steps: lines up to the last newline, shards beside the manifest in braces, decode, more than seq_len tokens."""
    entries = [json.loads(line) for line in manifest.read_text().split("\n")[:-1]]
    assert all(re.fullmatch(r"shard_\d{8}", entry["shard"]) for entry in entries)
    names = [entry["shard"] for entry in entries]
    url = f"{manifest.parent}/{names[0]}.tar" if len(names) == 1 else f"{manifest.parent}/{{{','.join(names)}}}.tar"
    data = webdataset.DataPipeline(
        webdataset.SimpleShardList(url),
        webdataset.tarfile_to_samples(),
        webdataset.decode(),
        webdataset.rename(json="json.gz"),
        webdataset.to_tuple("json"),
        webdataset.select(lambda sample: len(sample[0]) > LENGTH - 1),
    )
    samples = [sample[0] for sample in data]
    assert len(samples) == sum(entry["num_sequences"] for entry in entries)
    assert all(len(sample) == LENGTH and all(type(token) is int for token in sample) for sample in samples)
    return samples


@given(mask=SHARD_MASKS)
@settings(deadline=None, max_examples=6)
def test_exactly_the_selected_shards(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD, LENGTH, member_format="json.gz"), mask)
    before = snapshot(root / "pool")
    export_open_lm(chosen, root / "out")
    export_open_lm(chosen, root / "out")  # once more changes nothing
    assert read_like_open_lm(root / "out" / "manifest.jsonl") == selected_tokens(chosen)
    assert snapshot(root / "pool") == before
    assert read_json(root / "out" / "export.json")["sequence_length"] == LENGTH - 1


@given(mask=MASKS)
@settings(deadline=None, max_examples=10)
def test_any_selection_materialised(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD, LENGTH), mask)
    export_open_lm(whole(materialize(chosen, root / "out", "json.gz", rows_per_shard=4)), root / "out")
    assert read_like_open_lm(root / "out" / "manifest.jsonl") == selected_tokens(chosen)


def test_shards_of_other_names_get_open_lm_s(tmp_path: Path) -> None:
    chosen = whole(foreign_pool(tmp_path / "pool", [["0.json.gz"], ["1.json.gz"]]))
    export_open_lm(chosen, tmp_path / "out")
    assert os.readlink(tmp_path / "out" / "shard_00000001.tar") == str(tmp_path / "pool" / "1.tar")
    assert read_like_open_lm(tmp_path / "out" / "manifest.jsonl") == selected_tokens(chosen)


def test_what_open_lm_cannot_read_is_refused(tmp_path: Path) -> None:
    raw = make_pool(tmp_path / "raw", ROWS_PER_SHARD)
    with pytest.raises(UserError, match=r"open_lm reads .json.gz members, this pool's are raw; .*--materialize --member-format json.gz"):
        export_open_lm(whole(raw), tmp_path / "out")
    gz = make_pool(tmp_path / "gz", ROWS_PER_SHARD, member_format="json.gz")
    with pytest.raises(UserError, match=r"3 shards are selected in part .*, and open_lm reads every sample of a shard"):
        export_open_lm(subset(gz, MASK), tmp_path / "out")
    uneven = make_pool(tmp_path / "uneven", (2,), samples=[np.arange(1, 4), np.arange(1, 6)], member_format="json.gz")
    with pytest.raises(UserError, match=r"samples of one length, these have 3 to 5 tokens; .*--pack 2049"):
        export_open_lm(whole(uneven), tmp_path / "out")
    extra = foreign_pool(tmp_path / "extra", [["0.json.gz", "more.json"]])
    with pytest.raises(UserError, match=r"0.tar has 1 samples that the pool has not, which open_lm would read"):
        export_open_lm(whole(extra), tmp_path / "out")
    named = foreign_pool(tmp_path / "named", [["0.tokens.json.gz"]])
    with pytest.raises(UserError, match=r"members called .json.gz, this pool's are called .tokens.json.gz; export with --materialize"):
        export_open_lm(whole(named), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_in_the_place_of_a_link_is_refused(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "gz", ROWS_PER_SHARD, member_format="json.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard_00000001.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"shard_00000001.tar is there already and is not a link to .*gz/shard_00000001.tar; choose"):
        export_open_lm(whole(index), tmp_path / "out")
