"""Generations and their pointer."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.generation import (
    generation_path,
    load_generation,
    publish,
    read_pointer,
    write_generation,
)
from megatron_groupmates.pool.index import PoolIndex
from tests.pool.helpers import make_pool

PROVENANCE = {"tag": "global_step40", "seed": 3}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PoolIndex:
    samples = [np.ones(length, dtype=np.int64) for length in range(1, 30)]
    return make_pool(tmp_path_factory.mktemp("pool"), (9, 1, 8, 11), samples=samples)


@given(rows=st.sets(st.integers(0, 28), min_size=1))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(index: PoolIndex, tmp_path_factory: pytest.TempPathFactory, rows: set[int]) -> None:
    directory = tmp_path_factory.mktemp("selection")
    path = write_generation(directory, 3, index, np.array(list(rows)), PROVENANCE)
    assert path == directory / "generation-000003"
    generation = load_generation(directory, 3, index)
    assert set(np.flatnonzero(generation.mask).tolist()) == rows
    assert generation.mask.dtype == bool and generation.mask.shape == (29,)
    assert generation.number == 3
    assert generation.num_samples == len(rows)
    assert generation.num_tokens == sum(row + 1 for row in rows)
    assert generation.provenance == PROVENANCE
    facts = json.loads((path / "generation.json").read_text())
    assert facts["pool_fingerprint"] == index.fingerprint
    assert facts["shards"][1] == ["shard_00000001", 1, int(9 in rows), 10 * (9 in rows)]
    assert facts["digest"] == generation.digest


def test_whole_pool(index: PoolIndex, tmp_path: Path) -> None:
    write_generation(tmp_path, 0, index, None, {})
    generation = load_generation(tmp_path, 0, index)
    assert generation.mask.all() and generation.num_tokens == index.num_tokens


def test_writing_again_is_allowed_with_the_same_content_only(index: PoolIndex, tmp_path: Path) -> None:
    path = write_generation(tmp_path, 1, index, np.array([4, 2]), PROVENANCE)
    content = {file.name: file.read_bytes() for file in path.iterdir()}
    assert write_generation(tmp_path, 1, index, np.array([2, 4]), PROVENANCE) == path
    with pytest.raises(UserError, match=r"generation-000001 exists with other content .* use the next number"):
        write_generation(tmp_path, 1, index, np.array([2, 5]), PROVENANCE)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == content


def test_digest_covers_rows_number_and_provenance(index: PoolIndex, tmp_path: Path) -> None:
    digests = set()
    for number, row, provenance in ((1, 2, {}), (2, 2, {}), (1, 3, {}), (1, 2, {"seed": 1})):
        directory = tmp_path / str(len(digests))
        write_generation(directory, number, index, np.array([row]), provenance)
        digests.add(load_generation(directory, number, index).digest)
    assert len(digests) == 4


def test_nothing_selected_is_refused(index: PoolIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generation 2 selects nothing"):
        write_generation(tmp_path, 2, index, np.array([], dtype=np.int64), {})
    with pytest.raises(IndexError, match="pool rows 3 to 29"):
        write_generation(tmp_path, 2, index, np.array([3, 29]), {})
    with pytest.raises(AssertionError, match="selected twice"):
        write_generation(tmp_path, 2, index, np.array([3, 3]), {})


def test_a_full_disk_leaves_no_generation(index: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_groupmates.utils.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_generation(tmp_path, 1, index, None, {})
    assert list(tmp_path.iterdir()) == []


def test_pointer(index: PoolIndex, tmp_path: Path) -> None:
    assert read_pointer(tmp_path) is None
    for number in (0, 3):
        write_generation(tmp_path, number, index, None, {})
        publish(tmp_path, number)
        assert read_pointer(tmp_path) == number
    assert (tmp_path / "latest").read_text() == "generation-000003\n"
    with pytest.raises(UserError, match=r"cannot publish generation 7: .*generation-000007 is missing"):
        publish(tmp_path, 7)
    assert read_pointer(tmp_path) == 3


@pytest.mark.parametrize("content", ["", "generation-3", "generation-000003\ngeneration-000004\n", "../x"])
def test_a_bad_pointer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest").write_text(content)
    with pytest.raises(UserError, match="should name a generation, such as generation-000003, it says"):
        read_pointer(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "rows.bin").write_bytes(b"\0" * 7), "rows.bin is damaged: SHA-256 .* generation.json says"),
        (lambda path: (path / "rows.bin").unlink(), "rows.bin is damaged"),
        (lambda path: (path / "generation.json").unlink(), "there is no generation 3: .*generation.json is missing"),
        (lambda path: (path / "generation.json").write_text("{"), "generation.json is damaged"),
        (lambda path: (path / "generation.json").write_text("{}"), "is not a generation of version 1"),
        (lambda path: edit(path / "generation.json", "global_step40", "global_step50"), "its content has digest"),
        (lambda path: edit(path / "generation.json", '"num_samples": 2', '"num_samples": 3'), "its content has digest"),
    ],
)
def test_damaged_generations_are_refused(index: PoolIndex, tmp_path: Path, damage, message: str) -> None:
    damage(write_generation(tmp_path, 3, index, np.array([2, 12]), PROVENANCE))
    with pytest.raises(UserError, match=message):
        load_generation(tmp_path, 3, index)


def test_a_renamed_generation_is_refused(index: PoolIndex, tmp_path: Path) -> None:
    write_generation(tmp_path, 3, index, None, {}).rename(generation_path(tmp_path, 4))
    with pytest.raises(UserError, match="is generation 3, not 4"):
        load_generation(tmp_path, 4, index)


def test_a_generation_of_another_pool_is_refused(index: PoolIndex, tmp_path: Path) -> None:
    write_generation(tmp_path, 3, index, None, {})
    other = make_pool(tmp_path / "other", (9, 1, 8, 11), seed=5)
    with pytest.raises(UserError, match=f"made for another pool: its fingerprint is {index.fingerprint}"):
        load_generation(tmp_path, 3, other)
