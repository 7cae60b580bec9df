"""Spherical k-means of the pool's embeddings (paper section 3.4): trained on a sample by faiss, all rows assigned by blocks."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection.assignment import Assigner
from megatron_groupmates.selection.store import ArrayStore, Store

SAMPLES_PER_CLUSTER = 2948
"""The paper's density: 29,478,616 samples in 10,000 clusters."""

TRAIN_SAMPLES_PER_CLUSTER = 256
_READ_ROWS = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """Clusters by cosine, none of them empty.

    Attributes:
        labels: int32 ``[n]``, the cluster of each sample.
        centroids: float32 ``[C, d]``, unit length.
    """

    labels: np.ndarray
    centroids: np.ndarray


def default_num_clusters(num_samples: int) -> int:
    """Clusters for a pool of ``num_samples`` at the paper's density, at least 1."""
    return max(1, round(num_samples / SAMPLES_PER_CLUSTER))


def cluster(
    embeddings: np.ndarray | Store,
    num_clusters: int | None = None,
    *,
    seed: int,
    num_iterations: int = 100,
    train_samples_per_cluster: int = TRAIN_SAMPLES_PER_CLUSTER,
    device: torch.device | str = "cpu",
) -> Clustering:
    """Spherical k-means, trained on a sample of the rows, then all rows assigned; deterministic for a seed on a CPU.

    Arguments and errors as :func:`train_centroids`; ``embeddings`` may be an array ``[n, d]``.
    """
    store = embeddings if not isinstance(embeddings, np.ndarray) else ArrayStore(embeddings, np.zeros(len(embeddings)))
    centroids = train_centroids(
        store, num_clusters, seed=seed, num_iterations=num_iterations, train_samples_per_cluster=train_samples_per_cluster
    )
    return without_empty(assign_range(store, 0, store.num_rows, Assigner(centroids, device)), centroids)


def train_centroids(
    store: Store,
    num_clusters: int | None = None,
    *,
    seed: int,
    num_iterations: int = 100,
    train_samples_per_cluster: int = TRAIN_SAMPLES_PER_CLUSTER,
    num_threads: int | None = None,
) -> np.ndarray:
    """Centroids float32 ``[C, d]`` of unit length, trained on a sample of the rows of ``store``, on a GPU where faiss finds one.

    Args:
        store: embeddings of any length: they are clustered by direction.
        num_clusters: clusters to make, at most n; by ``default_num_clusters`` when None.
        seed: decides the training sample and the first centroids.
        num_iterations: of k-means.
        train_samples_per_cluster: rows used for training, for each cluster: what is held in memory, as float32.
        num_threads: on a CPU; as many as OpenMP would take when None. The result does not depend on it but for rounding.

    Raises:
        UserError: faiss is not installed, no samples, or no clusters asked for.
    """
    num_samples = store.num_rows
    wanted = default_num_clusters(num_samples) if num_clusters is None else num_clusters
    if num_samples == 0 or wanted < 1:
        raise UserError(f"cannot make {wanted} clusters of {num_samples} samples; both must be at least 1")
    wanted = min(wanted, num_samples)
    sample = _normalised(store.take(_sample(num_samples, wanted * train_samples_per_cluster, seed)))
    if wanted == 1:
        return _normalised(sample.mean(axis=0)[None])
    faiss = _import_faiss()
    kmeans = faiss.Kmeans(
        sample.shape[1],
        wanted,
        niter=num_iterations,
        spherical=True,
        seed=seed,
        verbose=False,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    threads = faiss.omp_get_max_threads()
    # Launchers set one thread for each of a host's processes; the others wait for this one.
    faiss.omp_set_num_threads(num_threads or threads)
    try:
        kmeans.train(sample)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.ascontiguousarray(kmeans.centroids, np.float32)


def assign_range(store: Store, first: int, stop: int, assigner: Assigner, done: Callable[[int], object] | None = None) -> np.ndarray:
    """Labels int32 of the rows ``first .. stop - 1``, read block by block; ``done`` is told of the rows of each block."""
    labels = np.empty(stop - first, np.int32)
    for begin in range(first, stop, _READ_ROWS):
        end = min(begin + _READ_ROWS, stop)
        labels[begin - first : end - first] = assigner(store.read(begin, end), done)
    return labels


def without_empty(labels: np.ndarray, centroids: np.ndarray) -> Clustering:
    """Drop the clusters that no row is in and renumber the others in their order."""
    used = np.bincount(labels, minlength=len(centroids)) > 0
    numbers = np.cumsum(used, dtype=np.int32) - np.int32(1)
    return Clustering(labels=numbers[labels], centroids=centroids[used])


def _sample(num_samples: int, wanted: int, seed: int) -> np.ndarray:
    """Ascending int64 rows, at most ``wanted``, drawn uniformly."""
    if wanted >= num_samples:
        return np.arange(num_samples)
    return np.sort(np.random.default_rng(seed).choice(num_samples, size=wanted, replace=False))


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Contiguous float32 copy with rows of unit length; rows of zeros stay."""
    rows = np.array(rows, np.float32, order="C")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=rows, where=norms > 0)


def _import_faiss() -> types.ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise UserError("clustering needs faiss: pip install faiss-cpu, or faiss-gpu-cu12 on a CUDA machine") from error
    return faiss
