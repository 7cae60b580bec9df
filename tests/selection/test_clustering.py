"""Spherical k-means: planted directions, determinism, empty clusters, missing faiss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection import clustering
from megatron_groupmates.selection.clustering import cluster, default_num_clusters, without_empty
from megatron_groupmates.selection.store import ArrayStore, EmbeddingStore, write_part


def planted(num_samples: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Four directions with vectors of very different lengths."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, num_samples)
    rows = np.eye(8)[kinds] + 0.05 * rng.standard_normal((num_samples, 8))
    return (rows * rng.uniform(0.1, 50, (num_samples, 1))).astype(np.float32), kinds


def test_finds_directions_whatever_the_lengths() -> None:
    embeddings, kinds = planted()
    found = cluster(embeddings, 4, seed=1, num_iterations=20)
    assert found.labels.dtype == np.int32 and found.centroids.dtype == np.float32
    assert len({*zip(kinds.tolist(), found.labels.tolist(), strict=True)}) == 4
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal((embeddings @ found.centroids.T).argmax(axis=1), found.labels)


def test_deterministic_and_leaves_its_input_alone(capfd: pytest.CaptureFixture[str]) -> None:
    embeddings, _ = planted()
    before = embeddings.copy()
    one, other = (cluster(embeddings, 9, seed=3, num_iterations=5, train_samples_per_cluster=20) for _ in range(2))
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.centroids, other.centroids)
    np.testing.assert_array_equal(embeddings, before)
    assert capfd.readouterr() == ("", "")


def test_no_cluster_is_empty() -> None:
    embeddings = np.eye(4)[np.arange(40) % 2]
    found = cluster(embeddings, 10, seed=0, num_iterations=5)
    np.testing.assert_array_equal(np.unique(found.labels), np.arange(len(found.centroids)))
    assert 2 <= len(found.centroids) <= 10


def test_empty_clusters_are_dropped_and_the_others_keep_their_order() -> None:
    found = without_empty(np.array([4, 1, 4, 3], np.int32), np.eye(6, dtype=np.float32))
    assert found.labels.tolist() == [2, 0, 2, 1] and found.labels.dtype == np.int32
    np.testing.assert_array_equal(found.centroids, np.eye(6)[[1, 3, 4]])


def test_a_store_on_disk_is_clustered_as_an_array_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = planted()[0].astype(np.float16)
    for first, stop in ((0, 250), (250, 600)):
        write_part(tmp_path, first, embeddings[first:stop], np.zeros(stop - first))
    settings: dict[str, Any] = {"seed": 3, "num_iterations": 4, "train_samples_per_cluster": 20}
    expected = cluster(embeddings, 7, **settings)
    monkeypatch.setattr(clustering, "_READ_ROWS", 64)
    found = cluster(EmbeddingStore.open(tmp_path), 7, **settings)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.centroids, expected.centroids)


def test_training_holds_a_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = planted()
    taken = []

    def take(self: ArrayStore, rows: np.ndarray) -> np.ndarray:
        taken.append(rows)
        return embeddings[rows]

    monkeypatch.setattr(ArrayStore, "take", take)
    cluster(embeddings, 5, seed=0, num_iterations=2, train_samples_per_cluster=30)
    [rows] = taken
    assert len(rows) == 150 and (np.diff(rows) > 0).all() and rows[-1] > 300


def test_number_of_clusters_follows_the_pool() -> None:
    assert default_num_clusters(29_478_616) == 10_000
    assert default_num_clusters(5) == 1
    embeddings, _ = planted()
    found = cluster(embeddings, seed=0)
    assert found.centroids.shape == (1, 8) and not found.labels.any()
    few = cluster(embeddings[:3], 50, seed=0, num_iterations=2)
    assert len(few.labels) == 3 and len(few.centroids) <= 3


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot make 0 clusters of 600 samples"):
        cluster(planted()[0], 0, seed=0)
    with pytest.raises(UserError, match="cannot make 1 clusters of 0 samples"):
        cluster(np.empty((0, 4)), seed=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="clustering needs faiss: pip install faiss-cpu"):
        cluster(planted()[0], 2, seed=0)
