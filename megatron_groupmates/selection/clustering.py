"""Spherical k-means of the pool's embeddings by faiss (paper section 3.4)."""

from __future__ import annotations

import dataclasses
import types

import numpy as np

from megatron_groupmates.config.errors import UserError

SAMPLES_PER_CLUSTER = 2948
"""The paper's density: 29,478,616 samples in 10,000 clusters."""


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
    embeddings: np.ndarray, num_clusters: int | None = None, *, seed: int, num_iterations: int = 100, train_samples_per_cluster: int = 256
) -> Clustering:
    """Spherical k-means, trained on a sample of the rows, then all rows assigned; deterministic for a seed on a CPU.

    Args:
        embeddings: float ``[n, d]``; clustered by direction, so their length does not matter.
        num_clusters: clusters to make, at most n; by ``default_num_clusters`` when None. Clusters that end empty are
            dropped and the others renumbered, so there may be fewer.
        seed: decides the training sample and the first centroids.
        num_iterations: of k-means.
        train_samples_per_cluster: rows used for training, for each cluster.

    Raises:
        UserError: faiss is not installed, no samples, or no clusters asked for.
    """
    num_samples = len(embeddings)
    wanted = default_num_clusters(num_samples) if num_clusters is None else num_clusters
    if num_samples == 0 or wanted < 1:
        raise UserError(f"cannot make {wanted} clusters of {num_samples} samples; both must be at least 1")
    unit = _normalised(embeddings)
    wanted = min(wanted, num_samples)
    if wanted == 1:
        return Clustering(labels=np.zeros(num_samples, np.int32), centroids=_normalised(unit.mean(axis=0)[None]))
    faiss = _import_faiss()
    kmeans = faiss.Kmeans(
        unit.shape[1],
        wanted,
        niter=num_iterations,
        spherical=True,
        seed=seed,
        verbose=False,
        min_points_per_centroid=1,
        max_points_per_centroid=train_samples_per_cluster,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    kmeans.train(unit)
    _, nearest = kmeans.index.search(unit, 1)
    used, labels = np.unique(nearest[:, 0], return_inverse=True)
    return Clustering(labels=labels.reshape(-1).astype(np.int32), centroids=kmeans.centroids[used].copy())


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
