"""Clusters of the pool and the choice within them, shared by all ranks and kept as it goes. All are collective: every rank calls."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.selection.assignment import Assigner
from megatron_groupmates.selection.clustering import assign_range, train_centroids, without_empty
from megatron_groupmates.selection.merge import RAGGED, GroupSelection
from megatron_groupmates.selection.offers import offering
from megatron_groupmates.selection.store import ClusterStore, Store, sort_by_cluster
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext

SORTED = "sorted"
"""Stage, and directory, of the embeddings by cluster."""

_ASSIGN_ROWS = 1 << 17
_MOST_CLUSTERS_AT_ONCE = 256
_PROCESSES_FROM_ROWS = 50_000  # fewer are selected among before another process has started


def cluster_pool(context: RoundContext, store: Store) -> ClusterStore:
    """The rows of ``store`` by cluster: stages ``centroids``, ``clusters`` (labels of all rows) and ``sorted`` (written by cluster)."""
    recipe = context.recipe.selection

    def train() -> Arrays:
        iterations = recipe.kmeans_iterations
        seed, cores = context.seed("selection"), len(os.sched_getaffinity(0))
        return {"centroids": train_centroids(store, recipe.num_clusters, seed=seed, num_iterations=iterations, num_threads=cores)}

    if context.groups.device.type == "cuda":
        torch.cuda.empty_cache()  # what the embedding used of every GPU, which faiss trains on
    context.stage("centroids", train)
    centroids = context.arrays("centroids")["centroids"]
    chunks = Chunks(context, "clusters", store.num_rows, _chunk_size(store.num_rows, context.groups.data_size, _ASSIGN_ROWS))

    def work() -> None:
        assigner = Assigner(centroids, context.groups.device)
        chunks.work(once(context, lambda first, stop, done: {"labels": assign_range(store, first, stop, assigner, done)}), "sample")

    def collect() -> Arrays:
        found = without_empty(chunks.collect()["labels"], centroids)
        return {"labels": found.labels, "centroids": found.centroids}

    context.stage("clusters", collect, work, flops=2.0 * store.num_rows * centroids.size)
    directory = context.directory / SORTED

    def sort() -> Arrays:
        return {"offsets": sort_by_cluster(store, context.arrays("clusters")["labels"], directory).offsets}

    context.stage(SORTED, sort)
    return context.together(lambda: ClusterStore.open(directory))


@contextlib.contextmanager
def group_selection(context: RoundContext, store: ClusterStore, lengths: np.ndarray, relation: Relation) -> Iterator[GroupSelection]:
    """Yield the choice within the clusters of ``store``, which lies in the round's ``sorted``, for rows of ``lengths`` int ``[n]``.

    Ranks share the clusters by chunks, and each rank its chunk among as many processes as it has cores.
    """

    def run(name: str, total: int, compute: Callable[[int, int, Callable[[int], object]], Arrays]) -> Arrays:
        chunks = Chunks(context, name, total, _chunk_size(total, context.groups.data_size, _MOST_CLUSTERS_AT_ONCE), RAGGED)
        context.stage(name, chunks.collect, lambda: chunks.work(once(context, compute), "cluster"))
        return context.arrays(name)

    num_processes = _cores(context.groups) if len(store.rows) >= _PROCESSES_FROM_ROWS else 1
    with offering(store, relation, context.directory / SORTED, num_processes) as offer:
        yield GroupSelection(store, lengths, context.recipe.selection.share_per_cluster, offer, relation, run)


def once(
    context: RoundContext, compute: Callable[[int, int, Callable[[int], object]], Arrays]
) -> Callable[[int, int, Callable[[int], object]], Arrays]:
    """``compute`` for :class:`Chunks` where no model is at work: on the one rank of a tensor-parallel group whose result is kept.

    Its UserError is raised on the others of the group too, which would else wait for the next chunk for ever.
    """
    groups = context.groups

    def compute_once(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        arrays: Arrays = {}
        problem: UserError | None = None
        if groups.tensor_rank == 0:
            try:
                arrays = compute(first, stop, done)
            except UserError as error:
                problem = error
        message = [None if problem is None else str(problem)]
        if groups.tensor_size > 1:
            dist.broadcast_object_list(message, src=groups.get_tensor_model_parallel_src_rank(), group=groups.tensor_group)
        if message[0] is not None:
            raise UserError(message[0]) from problem
        return arrays

    return compute_once


def _cores(groups: ParallelGroups) -> int:
    """This worker's share of the cores of its host. Collective."""
    host = socket.gethostname()
    workers: list[str | None] = [None] * groups.world_size
    dist.all_gather_object(workers, host if groups.tensor_rank == 0 else None)
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers.count(host)))


def _chunk_size(total: int, num_workers: int, largest: int) -> int:
    """Items of a chunk: some chunks for each worker, so that none waits long for the last."""
    return int(np.clip(total // (4 * num_workers), 1, largest))
