"""Clusters that share one token budget: what each offers in greedy order, merged to one order of choice.

Under ``global`` shares the lowest next offer of all clusters is taken, again and again. A cluster whose next offer is high
holds back what follows it, so an offer's turn comes when the highest score up to it in its own cluster does: sorting all
offers by (that running maximum, cluster, place in the cluster) gives the same order as a heap of next offers. So clusters
need not wait for one another: each runs until its running maximum passes a limit, and where the limit turns out too low for
the budget, a higher one is tried. The limit comes from a sample of clusters and decides the amount of work, never the result.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.budget import cluster_quotas, take_equal_shares
from megatron_groupmates.selection.greedy import greedy_sequence
from megatron_groupmates.selection.offers import Offer, Task
from megatron_groupmates.selection.store import ClusterStore

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

RunItems = Callable[[str, int, Callable[[int, int, Callable[[int], object]], Arrays]], Arrays]
"""(name, number of items, compute) -> what ``compute(first, stop, done)`` gives for all items, joined in their order.

``compute`` may be called for any ranges, by any process; it gives ``count`` int64 ``[stop - first]`` and, for the items of
the range in order, the arrays of ``RAGGED`` with ``count`` rows each, and calls ``done(1)`` for each item.
"""

RAGGED = ("position", "score")

_HEAP_ROWS = 32768  # up to here all clusters are held at once, which does no more work than it must
_FEW_CLUSTERS = 48
_SAMPLED = (32, 256)  # clusters that the limit is guessed from, least and most
_SAMPLED_PART = 20
_LIMITS_TRIED = 256


def run_here(name: str, total: int, compute: Callable[[int, int, Callable[[int], object]], Arrays]) -> Arrays:
    """A :data:`RunItems` that computes everything in one call."""
    return compute(0, total, lambda count: None)


@dataclass(frozen=True)
class Offers:
    """The first samples of clusters in greedy order, cluster after cluster.

    Attributes:
        cluster: int64 ``[k]``, number of each one's cluster.
        position: int64 ``[k]``, in the cluster store.
        score: float64 ``[k]``, at the moment of choice.
        highest: float64 ``[k]``, of the scores up to it in its cluster.
    """

    cluster: np.ndarray
    position: np.ndarray
    score: np.ndarray
    highest: np.ndarray

    @classmethod
    def of(cls, clusters: np.ndarray, arrays: Arrays) -> Offers:
        """Of what :data:`RunItems` gave for ``clusters``."""
        highest = arrays["score"].copy()
        start = 0
        for stop in np.cumsum(arrays["count"]).tolist():
            np.maximum.accumulate(highest[start:stop], out=highest[start:stop])
            start = stop
        return cls(np.repeat(clusters, arrays["count"]), arrays["position"], arrays["score"], highest)

    def where(self, mask: np.ndarray) -> Offers:
        """Those of a bool mask ``[k]``, or of indices in their order."""
        return Offers(self.cluster[mask], self.position[mask], self.score[mask], self.highest[mask])

    def in_order(self) -> Offers:
        """By the order of choice; the sort is stable, so that offers of one cluster keep theirs."""
        return self.where(np.lexsort((self.cluster, self.highest)))


class GroupSelection:
    """Group selection among the rows of a cluster store; its result depends on no process, rank or block."""

    def __init__(
        self, store: ClusterStore, lengths: np.ndarray, share_per_cluster: str, offer: Offer, relation: Relation, run: RunItems = run_here
    ) -> None:
        """Of clusters whose rows have ``lengths`` int ``[n]``, by ``equal`` or ``global`` shares.

        ``offer`` answers tasks on ``store`` under ``relation``, see :func:`~megatron_groupmates.selection.offers.offering`.
        """
        self._store, self._share, self._offer, self._relation, self._run = store, share_per_cluster, offer, relation, run
        self._lengths = np.asarray(lengths, np.int64)[store.rows]
        self._calls = 0

    def __call__(self, allowed: np.ndarray | None, budget_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 in order of choice and their scores float64, within ``budget_tokens``, at least 1.

        Collective where ``run`` is, and then called with the same on every rank. ``allowed`` is bool ``[n]``, by row.
        """
        self._calls += 1
        mask = None if allowed is None else allowed[self._store.rows]
        tokens = self._lengths if mask is None else np.where(mask, self._lengths, 0)
        bounds = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])[self._store.offsets]
        chooser = self._equal if self._share == "equal" else self._global
        chosen = chooser(mask, np.diff(bounds), budget_tokens)
        return self._store.rows[chosen.position], chosen.score

    def _equal(self, mask: np.ndarray | None, cluster_tokens: np.ndarray, budget_tokens: int) -> Offers:
        quotas = cluster_quotas(cluster_tokens, budget_tokens)
        offers = self._ask("offers", np.arange(len(quotas)), mask, np.inf, quotas)
        starts = np.searchsorted(offers.cluster, np.arange(len(quotas)))
        counts = take_equal_shares(np.split(self._lengths[offers.position], starts[1:]), quotas, budget_tokens)
        return offers.where(np.arange(len(offers.cluster)) - starts[offers.cluster] < counts[offers.cluster]).in_order()

    def _global(self, mask: np.ndarray | None, cluster_tokens: np.ndarray, budget_tokens: int) -> Offers:
        if len(self._store.rows) <= _HEAP_ROWS:
            return self._by_heap(mask, budget_tokens)
        clusters = np.arange(self._store.num_clusters)
        quotas = np.full(len(clusters), budget_tokens)
        limits = [np.inf]
        if len(clusters) > _FEW_CLUSTERS and budget_tokens < cluster_tokens.sum():
            sample = _spread(len(clusters), int(np.clip(len(clusters) // _SAMPLED_PART, *_SAMPLED)))
            offers = self._ask("sample", sample, mask, np.inf, cluster_tokens)
            limits = guess_limits(offers, self._lengths[offers.position], sample, cluster_tokens, budget_tokens)
        for number, limit in enumerate(limits, 1):
            offers = self._ask(f"offers_{number}", clusters, mask, limit, quotas)
            # Above the limit a cluster has more offers than it was asked for.
            complete = offers.where(offers.highest <= limit).in_order()
            tokens = np.cumsum(self._lengths[complete.position])
            count = int(np.searchsorted(tokens, budget_tokens, side="right"))
            if count < len(tokens):
                return complete.where(np.arange(count))
            logger.debug("offers up to %g hold %d tokens of %d", limit, tokens[-1] if len(tokens) else 0, budget_tokens)
        return complete

    def _ask(self, name: str, clusters: np.ndarray, mask: np.ndarray | None, limit: float, quotas: np.ndarray) -> Offers:
        """Offers of ``clusters``; ``quotas`` int64 ``[C]`` are of all clusters."""
        offsets = self._store.offsets

        def task(cluster: int) -> Task:
            part = slice(int(offsets[cluster]), int(offsets[cluster + 1]))
            allowed = None if mask is None else mask[part]
            return Task(cluster=cluster, allowed=allowed, lengths=self._lengths[part], limit=limit, quota=int(quotas[cluster]))

        def compute(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            found = []
            for offered in self._offer(task(int(cluster)) for cluster in clusters[first:stop]):
                found.append(offered)
                done(1)
            return {
                "count": np.array([len(position) for position, _ in found], np.int64),
                "position": np.concatenate([np.empty(0, np.int64), *(position for position, _ in found)]),
                "score": np.concatenate([np.empty(0), *(score for _, score in found)]),
            }

        return Offers.of(clusters, self._run(f"group_{self._calls}_{name}", len(clusters), compute))

    def _by_heap(self, mask: np.ndarray | None, budget_tokens: int) -> Offers:
        """With all clusters in memory."""
        sequences = []
        for cluster, (first, stop) in enumerate(itertools.pairwise(self._store.offsets.tolist())):
            embeddings, positions = self._store.embeddings(cluster), np.arange(first, stop)
            if mask is not None:
                embeddings, positions = embeddings[mask[first:stop]], positions[mask[first:stop]]
            sequences.append(_positions_in_order(positions, embeddings, self._store.individual[positions], self._relation))
        taken = [*zip(*merge_by_heap(sequences, self._lengths, budget_tokens), strict=True)] or [(), (), ()]
        cluster, position, score = (np.array(values, dtype) for values, dtype in zip(taken, (np.int64, np.int64, np.float64), strict=True))
        return Offers(cluster, position, score, np.maximum.accumulate(score))


def merge_by_heap(
    sequences: Sequence[Iterator[tuple[int, float]]], lengths: np.ndarray, budget_tokens: int
) -> Iterator[tuple[int, int, float]]:
    """The definition of ``global`` shares: take the lowest next offer of all clusters, ties to the lower, until one does not fit.

    Args:
        sequences: for each cluster its samples in greedy order, each with its score; advanced only as far as needed.
        lengths: int, tokens of each sample.
        budget_tokens: tokens to take at most.

    Yields:
        Cluster, sample and score, in order of choice.
    """
    heap: list[tuple[float, int, int]] = []

    def offer_next(cluster: int) -> None:
        following = next(sequences[cluster], None)
        if following is not None:
            heapq.heappush(heap, (following[1], cluster, following[0]))

    for cluster in range(len(sequences)):
        offer_next(cluster)
    remaining = budget_tokens
    while heap:
        score, cluster, sample = heapq.heappop(heap)
        remaining -= int(lengths[sample])
        if remaining < 0:
            return
        yield cluster, sample, score
        offer_next(cluster)


def guess_limits(sampled: Offers, lengths: np.ndarray, clusters: np.ndarray, cluster_tokens: np.ndarray, budget_tokens: int) -> list[float]:
    """Limits to try, ascending; the last is infinite and always enough.

    The share of a cluster's tokens that its offers up to a limit hold is estimated, with its standard error, from the
    ``sampled`` clusters: the first limit is the lowest whose estimate for all clusters reaches the budget even two errors lower,
    the second four.

    Args:
        sampled: all offers of the sampled clusters.
        lengths: int, tokens of each of these offers.
        clusters: int64 ``[m]``, which clusters were sampled, m > 1.
        cluster_tokens: int64 ``[C]``, tokens of each cluster.
        budget_tokens: to be reached.
    """
    if not len(lengths):
        return [np.inf]
    limits = np.unique(np.quantile(sampled.highest, np.linspace(0, 1, _LIMITS_TRIED), method="higher"))
    count, sizes = len(clusters), cluster_tokens[clusters].astype(np.float64)
    # Tokens that each limit leaves in each cluster: those of the first limit that an offer is not above, and of all before it.
    cell = np.searchsorted(limits, sampled.highest) * count + np.searchsorted(clusters, sampled.cluster)
    held = np.bincount(cell, weights=lengths, minlength=len(limits) * count).reshape(len(limits), count).cumsum(axis=0)
    share = held.sum(axis=1) / sizes.sum()
    unseen = max(0.0, 1 - count / len(cluster_tokens))
    errors = np.sqrt(unseen * count / (count - 1) * np.square(held - share[:, None] * sizes).sum(axis=1)) / sizes.sum()
    guesses = [limits[float(cluster_tokens.sum()) * (share - room * errors) > budget_tokens][:1] for room in (2, 4)]
    return [*np.unique(np.concatenate(guesses)).tolist(), np.inf]


def _spread(num_clusters: int, count: int) -> np.ndarray:
    """``count`` of the clusters, ascending; k-means numbers them in no order that matters, so every so many will do."""
    return np.arange(count) * num_clusters // count


def _positions_in_order(
    positions: np.ndarray, embeddings: np.ndarray, individual: np.ndarray, relation: Relation
) -> Iterator[tuple[int, float]]:
    for index, score in greedy_sequence(embeddings, individual, relation):
        yield int(positions[index]), score
