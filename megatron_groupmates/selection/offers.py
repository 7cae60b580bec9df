"""The first samples of each cluster in greedy order, cluster by cluster, by this process or by several.

What a cluster offers depends on its own samples alone, so it is the same whoever computes it. Imports nothing slow: each
process of a pool imports this module.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_groupmates.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from megatron_groupmates.influence.relation import Relation
    from megatron_groupmates.selection.store import ClusterStore

Offered = tuple["np.ndarray", "np.ndarray"]
"""Positions int64 in the store and scores float64 of a cluster's first samples, in greedy order."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one cluster is asked for: its samples in greedy order, up to and including the first that ends it.

    Attributes:
        cluster: number in the store.
        allowed: bool ``[k]``, which of the cluster's samples may be taken; all when None.
        lengths: int ``[k]``, tokens of the cluster's samples.
        limit: a score above it ends the cluster.
        quota: tokens; the sample that no longer fits ends the cluster.
    """

    cluster: int
    allowed: np.ndarray | None
    lengths: np.ndarray
    limit: float
    quota: int


def offer(store: ClusterStore, relation: Relation, task: Task) -> Offered:
    """What ``task`` asks for."""
    import numpy as np

    from megatron_groupmates.selection.greedy import greedy_batches

    first, stop = store.offsets[task.cluster : task.cluster + 2].tolist()
    members = np.arange(stop - first) if task.allowed is None else np.flatnonzero(task.allowed)
    if not len(members):
        return members, np.empty(0)
    embeddings, individual = store.embeddings(task.cluster), store.individual[first:stop]
    if task.allowed is not None:
        embeddings, individual = embeddings[members], individual[members]
    lengths, left = task.lengths[members].astype(np.int64), task.quota
    parts: list[Offered] = []
    for indices, scores in greedy_batches(embeddings, individual, relation):
        tokens = np.cumsum(lengths[indices])
        ended = np.flatnonzero((tokens > left) | (scores > task.limit))
        stop_at = int(ended[0]) + 1 if len(ended) else len(indices)
        parts.append((first + members[indices[:stop_at]], scores[:stop_at]))
        if len(ended):
            break
        left -= int(tokens[-1])
    return np.concatenate([positions for positions, _ in parts]), np.concatenate([scores for _, scores in parts])


Offer = Callable[[Iterable[Task]], Iterator[Offered]]
"""Answers tasks, in their order."""


@contextlib.contextmanager
def offering(store: ClusterStore, relation: Relation, directory: Path | None = None, num_processes: int = 1) -> Iterator[Offer]:
    """Yield a function that answers tasks, by ``num_processes`` processes that read ``directory``, or by this one.

    Args:
        store: clusters.
        relation: the fitted relation.
        directory: where the same clusters lie on disk; None where they are in memory, which only this process can use.
        num_processes: 1 for no other process than this one.
    """
    if directory is None or num_processes < 2:
        yield lambda tasks: (offer(store, relation, task) for task in tasks)
        return
    arguments = (str(directory), relation.to_json())
    # Spawned: a fork of a process that has threads or a GPU may hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start, initargs=arguments)
    try:
        yield lambda tasks: _answers(pool, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _answers(pool: concurrent.futures.ProcessPoolExecutor, tasks: Iterable[Task]) -> Iterator[Offered]:
    try:
        yield from pool.map(_answer, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that selected within a cluster ended early, most likely for lack of memory; "
            "start fewer ranks on each host, or raise selection.num_clusters"
        ) from error


_opened: tuple[Any, Any] | None = None


def _start(directory: str, relation: dict[str, Any]) -> None:
    """Open the store in a process of the pool."""
    global _opened
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Before NumPy is imported: as many processes as cores leave each one thread.
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    from megatron_groupmates.influence.relation import Relation
    from megatron_groupmates.selection.store import ClusterStore

    _opened = ClusterStore.open(directory), Relation(**relation)


def _end_with_parent() -> None:
    """A process of the pool whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(task: Task) -> Offered:
    assert _opened is not None
    return offer(*_opened, task)
