"""Selected samples written as shards: exact, reproducible, and continued after a kill."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats import materialize as module
from megatron_groupmates.pool.formats.materialize import materialize
from megatron_groupmates.pool.index import MEMBER_FORMATS, PoolIndex
from megatron_groupmates.pool.sources import read_sources
from megatron_groupmates.pool.verification import verify_pool
from tests.pool.formats.helpers import MASK, MASKS, ROWS_PER_SHARD, add_sources, selected_tokens, snapshot, subset, whole
from tests.pool.helpers import make_pool


@given(mask=MASKS, member_format=st.sampled_from(MEMBER_FORMATS), rows_per_shard=st.integers(1, 20))
@settings(deadline=None, max_examples=15)
def test_a_pool_of_exactly_the_selected_samples(
    tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, member_format: str, rows_per_shard: int
) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD), mask)
    index = materialize(chosen, root / "out", member_format, rows_per_shard)
    assert selected_tokens(whole(index)) == selected_tokens(chosen)
    assert index.rows_per_shard.tolist() == [min(rows_per_shard, mask.sum() - first) for first in range(0, mask.sum(), rows_per_shard)]
    assert (index.member_format, index.tokenizer, index.kinds) == (member_format, chosen.index.tokenizer, chosen.index.kinds)
    assert np.array_equal(index.kind_of, chosen.index.kind_of[mask])
    assert verify_pool(index) == []
    before = snapshot(root / "out")
    assert materialize(chosen, root / "out", member_format, rows_per_shard).fingerprint == index.fingerprint
    assert snapshot(root / "out") == before


def test_dclm_s_layout(tmp_path: Path) -> None:
    index = materialize(subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK), tmp_path / "out", "json.gz", 4)
    assert (tmp_path / "out" / "manifest.jsonl").read_text() == (
        '{"num_sequences":4,"shard":"shard_00000000"}\n{"num_sequences":1,"shard":"shard_00000001"}\n'
    )
    with tarfile.open(tmp_path / "out" / "shard_00000000.tar") as tar:
        assert [info.name for info in tar] == [f"00000000_{row:08d}.json.gz" for row in range(4)]
    assert set(snapshot(tmp_path / "out")) == {
        "manifest.jsonl",
        "pool.json",
        "index.bin",
        "tokenizer.json",
        "shard_00000000.tar",
        "shard_00000001.tar",
    }
    assert index.facts["made_by"]["arguments"]["pool_fingerprint"]


def test_the_same_bytes_whatever_the_number_of_workers_and_the_member_format_read(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    for workers in (0, 2):
        materialize(chosen, tmp_path / f"out{workers}", "raw", 2, num_workers=workers)
    assert snapshot(tmp_path / "out0") == snapshot(tmp_path / "out2")
    other = subset(make_pool(tmp_path / "gz", ROWS_PER_SHARD, member_format="json.gz"), MASK)
    materialize(other, tmp_path / "of_gz", "raw", 2)
    tars = {name: content for name, content in snapshot(tmp_path / "out0").items() if name.endswith(".tar")}
    assert tars == {name: content for name, content in snapshot(tmp_path / "of_gz").items() if name.endswith(".tar")}


def test_sources_come_along(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", ROWS_PER_SHARD)
    add_sources(index)
    chosen = materialize(subset(index, MASK), tmp_path / "out", "raw", 2)
    expected = [source for name in index.shard_names for source in read_sources(index, name)]
    found = [source for name in chosen.shard_names for source in read_sources(chosen, name)]
    assert found == [source for source, is_chosen in zip(expected, MASK, strict=True) if is_chosen]
    # A shard of which the pool has no sources leaves those of its neighbours.
    (tmp_path / "pool" / "shard_00000001.meta.jsonl.zst").unlink()
    chosen = materialize(subset(index, MASK), tmp_path / "fewer", "raw", 2)
    assert [len(list(read_sources(chosen, name))) for name in chosen.shard_names] == [2, 0, 1]
    chosen = materialize(subset(index, MASK), tmp_path / "none", "raw", 3)
    assert [len(list(read_sources(chosen, name))) for name in chosen.shard_names] == [0, 0]


def test_a_killed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    materialize(chosen, tmp_path / "straight", "raw", 2)
    write, written = module.write_shard, []

    def dies_at_the_third(directory: Path, number: int, *arguments: object) -> object:
        written.append(number)
        if written == [0, 1, 2]:
            (tmp_path / "out" / "shard_00000002.tar.tmp-1").write_bytes(b"torn")
            raise KeyboardInterrupt
        return write(directory, number, *arguments)

    monkeypatch.setattr(module, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        materialize(chosen, tmp_path / "out", "raw", 2)
    assert not (tmp_path / "out" / "pool.json").exists()
    (tmp_path / "out" / "shard_00000000.tar").unlink()
    written.clear()
    materialize(chosen, tmp_path / "out", "raw", 2)
    assert written == [0, 2]
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_what_another_selection_left_unfinished_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_pool(tmp_path / "pool", ROWS_PER_SHARD)
    monkeypatch.setattr(module, "_write_pool", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        materialize(subset(index, ~MASK), tmp_path / "out", "raw", 2)
    monkeypatch.undo()
    chosen = subset(index, MASK)
    with pytest.raises(UserError, match=r"out holds 6 shards that another export left unfinished; remove them or choose another --output"):
        materialize(chosen, tmp_path / "out", "raw", 2)


def test_a_damaged_sample_ends_the_export(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", ROWS_PER_SHARD, member_format="json.gz")
    path = tmp_path / "pool" / "shard_00000001.tar"
    content = bytearray(path.read_bytes())
    content[int(index.offsets[7]) + 12] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00000001.tar, row 2: cannot read the sample"):
        materialize(subset(index, np.arange(16) == 7), tmp_path / "out", "raw", 2)
    assert not (tmp_path / "out" / "pool.json").exists()


def test_another_pool_in_the_output_is_refused(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    materialize(chosen, tmp_path / "out", "raw", 2)
    with pytest.raises(UserError, match=r"out is a pool already, made otherwise \(rows_per_shard was 2, is 3\); choose another --output"):
        materialize(chosen, tmp_path / "out", "raw", 3)
    assert PoolIndex.open(tmp_path / "out").num_samples == 5
