"""Embeddings on disk: parts written in any order and size, read back by rows, and once more by cluster."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import UserError
from megatron_groupmates.selection import store as store_module
from megatron_groupmates.selection.store import (
    ArrayStore,
    ClusterStore,
    EmbeddingStore,
    part_ranges,
    remove_part,
    sort_by_cluster,
    write_part,
)
from megatron_groupmates.utils.files import read_json, write_json


def make_rows(num_rows: int, dim: int = 5, dtype: Any = np.float16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num_rows, dim)).astype(dtype), generator.normal(size=num_rows)


def write_parts(directory: Path, embeddings: np.ndarray, individual: np.ndarray, bounds: list[int]) -> None:
    """Parts between the ``bounds``, the last first."""
    for first, stop in reversed([*itertools.pairwise(bounds)]):
        write_part(directory, first, embeddings[first:stop], individual[first:stop])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A store of 10 rows in three parts."""
    write_parts(tmp_path / "embeddings", *make_rows(10), [0, 4, 5, 10])
    return tmp_path / "embeddings"


class TestParts:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_are_read_as_they_were_written(self, tmp_path, dtype):
        embeddings, individual = make_rows(10, dtype=dtype)
        write_parts(tmp_path, embeddings, individual, [0, 4, 5, 10])
        store = EmbeddingStore.open(tmp_path, 10)
        assert (store.num_rows, store.dim, store.dtype) == (10, 5, dtype)
        assert store.individual.dtype == np.float64 and np.array_equal(store.individual, individual)
        for first, stop in itertools.combinations_with_replacement(range(11), 2):
            found = store.read(first, stop)
            assert found.dtype == dtype and np.array_equal(found, embeddings[first:stop])
        assert part_ranges(tmp_path) == [(0, 4), (4, 5), (5, 10)]

    @given(st.data(), st.integers(1, 60))
    @settings(deadline=None, max_examples=60)
    def test_any_rows_can_be_taken(self, tmp_path_factory, data: st.DataObject, num_rows: int):
        directory = tmp_path_factory.mktemp("store")
        embeddings, individual = make_rows(num_rows)
        write_parts(directory, embeddings, individual, sorted({0, num_rows, *data.draw(st.lists(st.integers(0, num_rows), max_size=4))}))
        rows = np.array(sorted(data.draw(st.sets(st.integers(0, num_rows - 1)))), np.int64)
        gap, block = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 100))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_module, "_READ_GAP", gap)
            patch.setattr(store_module, "_READ_BYTES", block)
            found = EmbeddingStore.open(directory).take(rows)
        assert found.shape == (len(rows), 5) and np.array_equal(found, embeddings[rows])

    def test_of_a_store_that_travels_to_another_process(self, directory):
        store = pickle.loads(pickle.dumps(EmbeddingStore.open(directory)))
        assert np.array_equal(store.read(3, 9), make_rows(10)[0][3:9])

    def test_an_array_is_a_store(self):
        embeddings, individual = make_rows(10)
        store = ArrayStore(embeddings, individual.astype(np.float32))
        assert (store.num_rows, store.dim, store.dtype, store.individual.dtype) == (10, 5, np.float16, np.float64)
        assert np.array_equal(store.read(2, 7), embeddings[2:7]) and np.array_equal(store.take(np.array([1, 9])), embeddings[[1, 9]])

    def test_a_part_that_is_half_written_is_none(self, directory):
        name = "part-000000000004-000000000005.npy"
        (directory / name).rename(directory / f"{name}.tmp-7")
        assert part_ranges(directory) == [(0, 4), (5, 10)]
        with pytest.raises(UserError, match=r"lacks the embeddings of rows 4 to 4; repeat the stage that writes them"):
            EmbeddingStore.open(directory)


class TestAStoreThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("act", "message"),
        [
            (lambda store: remove_part(store, 0, 4), r"lacks the embeddings of rows 0 to 3; repeat"),
            (lambda store: write_part(store, 3, *make_rows(2)), r"holds the rows 3 to 3 twice; remove the directory"),
            (lambda store: write_part(store, 0, *make_rows(10)), r"holds the rows 0 to 3 twice; remove the directory"),
            (lambda store: write_part(store, 10, *make_rows(2)), r"embeddings of 12 rows where 10 are expected; remove"),
            (lambda store: remove_part(store, 5, 10), r"embeddings of 5 rows where 10 are expected; remove"),
            (
                lambda store: write_part(store, 5, *make_rows(5, 6)),
                r"0+10.npy has rows of 6 numbers of float16, part-0+-0+4.npy of 5 of",
            ),
            (
                lambda store: write_part(store, 5, *make_rows(5, 5, np.float32)),
                r"5 numbers of float32, part-\d+-\d+.npy of 5 of float16",
            ),
        ],
    )
    def test_parts(self, directory, act, message):
        act(directory)
        with pytest.raises(UserError, match=message):
            EmbeddingStore.open(directory, 10)

    @pytest.mark.parametrize("kind", ["part", "individual"])
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), r"cannot be used: .*No such file"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"cannot be used: \d+ bytes where \[4, \d\] numbers of float\d+ take"),
            (lambda path: path.write_bytes(path.read_bytes()[:40]), r"cannot be used: EOF"),
            (lambda path: path.write_bytes(b""), r"cannot be used: EOF"),
            (lambda path: path.write_bytes(b"something else altogether"), r"cannot be used: the magic string is not correct"),
            (lambda path: np.save(path, np.zeros(4)), r"cannot be used: not a matrix in C order: shape \[4\], float64"),
            (lambda path: np.save(path, np.zeros((2, 5))), r"holds 2 rows, its name says 4"),
        ],
    )
    def test_files(self, directory, kind, damage, message):
        path = directory / f"{kind}-000000000000-000000000004.npy"
        damage(path)
        if kind == "part" and not path.exists():
            message = "lacks the embeddings of rows 0 to 3"
        with pytest.raises(UserError, match=message):
            EmbeddingStore.open(directory)

    def test_without_parts(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no embeddings; repeat the stage"):
            EmbeddingStore.open(tmp_path / "nothing")

    def test_cut_short_while_in_use(self, directory):
        store = EmbeddingStore.open(directory)
        path = directory / "part-000000000005-000000000010.npy"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(OSError, match=r"part-0+5-0+10.npy ends before row 5: it was cut short while in use"):
            store.read(4, 10)


def assert_sorted(clusters: ClusterStore, embeddings: np.ndarray, individual: np.ndarray, labels: np.ndarray, num_clusters: int) -> None:
    """Against one mask for each cluster."""
    assert clusters.num_clusters == num_clusters and clusters.offsets.dtype == clusters.rows.dtype == np.int64
    assert clusters.individual.dtype == np.float64
    assert len(clusters.rows) == clusters.offsets[-1] == len(labels)
    for cluster in range(num_clusters):
        rows = np.flatnonzero(labels == cluster)
        place = slice(clusters.offsets[cluster], clusters.offsets[cluster + 1])
        assert np.array_equal(clusters.rows[place], rows)
        assert np.array_equal(clusters.individual[place], individual[rows])
        found = clusters.embeddings(cluster)
        assert found.dtype == embeddings.dtype and np.array_equal(found, embeddings[rows])


class TestByCluster:
    @given(st.data(), st.integers(1, 60), st.integers(1, 6), st.integers(0, 400))
    @settings(deadline=None, max_examples=60)
    def test_holds_each_cluster_in_one_piece(self, tmp_path_factory, data: st.DataObject, num_rows: int, num_clusters: int, memory: int):
        directory = tmp_path_factory.mktemp("store")
        embeddings, individual = make_rows(num_rows)
        labels = np.array(data.draw(st.lists(st.integers(0, num_clusters - 1), min_size=num_rows, max_size=num_rows)), np.int32)
        bounds = sorted({0, num_rows, *data.draw(st.lists(st.integers(0, num_rows), max_size=4))})
        write_parts(directory / "store", embeddings, individual, bounds)
        store = EmbeddingStore.open(directory / "store")
        clusters = sort_by_cluster(store, labels, directory / "clusters", num_clusters, memory_bytes=memory)
        assert_sorted(clusters, embeddings, individual, labels, num_clusters)
        assert_sorted(ClusterStore.open(directory / "clusters"), embeddings, individual, labels, num_clusters)
        assert_sorted(ClusterStore.from_arrays(embeddings, individual, labels, num_clusters), embeddings, individual, labels, num_clusters)

    def test_counts_the_clusters_by_their_labels(self):
        assert ClusterStore.from_arrays(*make_rows(3), np.array([0, 4, 1])).num_clusters == 5

    def test_is_the_same_whatever_the_blocks(self, tmp_path, directory):
        labels = np.array([3, 1, 3, 0, 0, 3, 1, 1, 0, 3], np.int32)
        store = EmbeddingStore.open(directory)
        for memory in (1, 47, 1 << 20):
            sort_by_cluster(store, labels, tmp_path / f"clusters-{memory}", memory_bytes=memory)
        contents = [{path.name: path.read_bytes() for path in (tmp_path / f"clusters-{memory}").iterdir()} for memory in (1, 47, 1 << 20)]
        assert contents[0] == contents[1] == contents[2]
        assert sorted(contents[0]) == ["clusters.json", "embeddings.npy", "individual.npy", "offsets.npy", "rows.npy"]

    def test_a_finished_one_is_used_and_another_replaced(self, tmp_path, directory):
        store, labels, path = EmbeddingStore.open(directory), np.arange(10, dtype=np.int32) % 3, tmp_path / "clusters"
        sort_by_cluster(store, labels, path)
        stamp = (path / "embeddings.npy").stat().st_mtime_ns
        sort_by_cluster(store, labels, path)
        assert (path / "embeddings.npy").stat().st_mtime_ns == stamp
        for others in (
            ArrayStore(make_rows(10)[0], make_rows(10, seed=1)[1]),
            ArrayStore(make_rows(10, seed=1)[0], store.individual),
            ArrayStore(make_rows(10)[0].astype(np.float32), store.individual),
        ):
            sort_by_cluster(others, labels, path)
            assert (path / "embeddings.npy").stat().st_mtime_ns != stamp
            assert_sorted(ClusterStore.open(path), others.read(0, 10), others.individual, labels, 3)
        sort_by_cluster(store, labels[::-1].copy(), path)
        assert_sorted(ClusterStore.open(path), store.read(0, 10), store.individual, labels[::-1], 3)

    def test_a_killed_one_is_begun_anew(self, tmp_path, directory, monkeypatch):
        store, labels, path = EmbeddingStore.open(directory), np.arange(10, dtype=np.int32) % 3, tmp_path / "clusters"
        left = tmp_path / "clusters.tmp-7"
        left.mkdir()
        (left / "embeddings.npy").write_bytes(b"half")
        assert_sorted(sort_by_cluster(store, labels, path), store.read(0, 10), store.individual, labels, 3)
        assert not left.exists()

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda path: (path / "clusters.json").unlink(),
                r"no rows sorted by cluster: it has no clusters.json; remove the directory",
            ),
            (lambda path: write_json(path / "clusters.json", {}), r"is not a description of clusters of version 1; remove"),
            (
                lambda path: write_json(path / "clusters.json", {**read_json(path / "clusters.json"), "num_rows": 9}),
                r"clusters.json is damaged: its content has digest",
            ),
            (lambda path: (path / "rows.npy").unlink(), r"is damaged: .*rows.npy"),
            (lambda path: (path / "embeddings.npy").write_bytes(b"half"), r"is damaged: EOF"),
            (lambda path: np.save(path / "rows.npy", np.arange(9)), r"is damaged: its files hold 9 and 10 rows; remove"),
        ],
    )
    def test_a_damaged_one_is_named(self, tmp_path, directory, damage, message):
        path = tmp_path / "clusters"
        sort_by_cluster(EmbeddingStore.open(directory), np.arange(10, dtype=np.int32), path)
        damage(path)
        with pytest.raises(UserError, match=message):
            ClusterStore.open(path)

    def test_nothing_else_is_overwritten(self, tmp_path, directory):
        (tmp_path / "thesis").mkdir()
        with pytest.raises(UserError, match=r"thesis holds no rows sorted by cluster"):
            sort_by_cluster(EmbeddingStore.open(directory), np.zeros(10, np.int32), tmp_path / "thesis")
        assert (tmp_path / "thesis").is_dir()


_MEASURE = """
import resource, sys
import numpy as np
from megatron_groupmates.selection.store import EmbeddingStore, sort_by_cluster, write_part

directory, rows, dim = sys.argv[1], 8192, 768
for number in range(16):
    write_part(f"{directory}/store", number * rows, np.full((rows, dim), number, np.float16), np.zeros(rows))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = EmbeddingStore.open(f"{directory}/store")
labels = np.random.default_rng(0).integers(50, size=store.num_rows, dtype=np.int32)
clusters = sort_by_cluster(store, labels, f"{directory}/clusters", memory_bytes=16 << 20)
for cluster in range(50):
    clusters.embeddings(cluster)
for first in range(0, store.num_rows, 4096):
    store.read(first, first + 4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
    """192 MiB of embeddings, written, sorted and read through blocks of 16 MiB; 30 MiB on top are arrays by row and the allocator's."""
    found = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 46 << 10
