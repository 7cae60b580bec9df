"""Greedy group selection (paper section 3.4): each next sample has the lowest score given those already taken."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation

_SHORTLIST_FROM = 512
_LARGEST_SHORTLIST = 1024
_MOST_RECHECKED = 24
_ROUNDING = 1 + 1e-9
_LARGEST_VALUE = 1e90
_TINY = 1e-300


def greedy_select(embeddings: np.ndarray, individual: np.ndarray, num_select: int, alpha: float, tau: float) -> np.ndarray:
    """Samples of one cluster in order of choice, under the product relation.

    First the sample with the lowest s; then, again and again, the one not yet taken with the lowest
    s * alpha * mean over taken g of (1 - h . h(g) / tau). Scores are float64; the lowest index wins ties.

    Args:
        embeddings: float ``[n, d]``, h of the samples.
        individual: float ``[n]``, s of the samples.
        num_select: samples to take, 0 to n.
        alpha: the model's learned scale.
        tau: the model's learned temperature, not zero.

    Returns:
        int64 ``[num_select]``.

    Raises:
        UserError: shapes that do not belong together, values that are not finite, or more samples than there are.
    """
    return greedy_select_related(embeddings, individual, num_select, Relation(alpha=float(alpha), tau=float(tau)))


def greedy_select_related(embeddings: np.ndarray, individual: np.ndarray, num_select: int, relation: Relation) -> np.ndarray:
    """``greedy_select`` under any relation."""
    if not 0 <= num_select <= len(individual):
        raise UserError(f"num_select is {num_select} but there are {len(individual)} samples; choose between 0 and that number")
    sequence = greedy_sequence(embeddings, individual, relation)
    return np.fromiter((index for index, _ in itertools.islice(sequence, num_select)), np.int64, num_select)


def greedy_sequence(embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> Iterator[tuple[int, float]]:
    """All samples in greedy order, one at a time, each with its score at the moment of choice.

    Exact, but most scores are never computed. The relation is linear in the mean m of the taken embeddings, so a score
    known at one mean bounds the score at another: it moves by at most sensitivity * ||h|| * ||change of m||. A sample
    is scored again, in float64, only where that bound leaves it at or below the best.

    Args:
        embeddings: float ``[n, d]``; float16 and float32 are kept as they are and widened a few rows at a time.
        individual: float ``[n]``.
        relation: the relation and its scalars.
    """
    embeddings, individual = np.asarray(embeddings), np.asarray(individual, np.float64)
    if embeddings.ndim != 2 or individual.shape != embeddings.shape[:1]:
        raise UserError(f"embeddings have shape {list(embeddings.shape)} and individual {list(individual.shape)}; give [n, d] with [n]")
    # np.max, unlike max, lets a NaN through.
    largest = np.max([float(extreme) for values in (individual, embeddings) for extreme in (values.max(initial=0), -values.min(initial=0))])
    if not largest < _LARGEST_VALUE:
        raise UserError(
            f"an embedding or an individual influence is {largest}, not a number below {_LARGEST_VALUE:g}; embed and score the pool again"
        )
    return _Greedy(embeddings, individual, relation).run()


def greedy_global(
    embeddings: np.ndarray, individual: np.ndarray, clusters: np.ndarray, lengths: np.ndarray, budget_tokens: int, relation: Relation
) -> np.ndarray:
    """Rows in order of choice where clusters compete for one budget by the score of their next sample.

    Each cluster offers its greedy sequence; the lowest offer is taken, ties go to the lower cluster, then the lower
    row. Ends at the first sample that no longer fits, so the total is within one sample of the budget.

    Args:
        embeddings: float ``[n, d]``.
        individual: float ``[n]``.
        clusters: int ``[n]``, the cluster of each row.
        lengths: int ``[n]``, tokens of each row.
        budget_tokens: tokens to take at most.
        relation: the relation and its scalars.

    Returns:
        int64 rows in order of choice.
    """
    sequences = [(rows, greedy_sequence(embeddings[rows], individual[rows], relation)) for rows in members_of_clusters(clusters)]
    heap: list[tuple[float, int, int]] = []

    def offer(cluster: int) -> None:
        rows, sequence = sequences[cluster]
        following = next(sequence, None)
        if following is not None:
            heapq.heappush(heap, (following[1], cluster, int(rows[following[0]])))

    for cluster in range(len(sequences)):
        offer(cluster)
    taken, remaining = [], budget_tokens
    while heap:
        _, cluster, row = heapq.heappop(heap)
        remaining -= int(lengths[row])
        if remaining < 0:
            break
        taken.append(row)
        offer(cluster)
    return np.array(taken, np.int64)


def members_of_clusters(clusters: np.ndarray) -> list[np.ndarray]:
    """Ascending int64 rows of each cluster that has any, by cluster number."""
    if not len(clusters):
        return []
    order = np.argsort(clusters, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.asarray(clusters)[order])) + 1)


class _Greedy:
    """The state of one greedy sequence.

    A score that decides anything comes from ``_exact``, which treats every row alike, so equal samples tie bitwise.
    Everything else only bounds scores and may be rounded as it likes: each bound includes its rounding error.
    """

    def __init__(self, embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> None:
        self.embeddings = embeddings.astype(np.float32) if embeddings.dtype == np.float16 else embeddings
        self.individual, self.relation = individual, relation
        self.available = np.ones(len(individual), bool)
        # float64 squares of a float32 array, without a float64 copy of it.
        norms = np.sqrt(np.einsum("nd,nd->n", self.embeddings, self.embeddings, dtype=np.float64))
        # How far a score can move per unit of change of the mean.
        self.sensitivity = relation.sensitivity(individual)
        self.slope = self.sensitivity * norms * _ROUNDING
        self.largest_norm = norms.max(initial=0.0)
        self.total = np.zeros(self.embeddings.shape[1])
        self.num_taken = 0
        self.drift_limit = 0.5

    def run(self) -> Iterator[tuple[int, float]]:
        """All samples with their scores, in order of choice."""
        if not len(self.individual):
            return
        first = int(self.individual.argmin())
        yield first, float(self.individual[first])
        self._take(first)
        patience = 0
        while self.num_taken < len(self.individual):
            num_left = len(self.individual) - self.num_taken
            before = self.num_taken
            if num_left > _SHORTLIST_FROM and not patience:
                yield from self._run_shortlist(num_left)
                # A shortlist that served few picks costs more than it saves: do without for a while.
                patience = 0 if self.num_taken - before >= 8 else 32
            if self.num_taken == before:
                index, score = self._next_of_all()
                yield index, score
                self._take(index)
                patience = max(0, patience - 1)

    def _take(self, index: int) -> None:
        self.available[index] = False
        self.total += self.embeddings[index]
        self.num_taken += 1

    def _mean(self) -> np.ndarray:
        return self.total / self.num_taken

    def _exact(self, rows: np.ndarray, individual: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Scores float64 of rows ``[k, d]`` float64."""
        return self.relation.scores(individual, np.vecdot(rows, mean))

    def _floor(self, mean: np.ndarray, drift: float) -> np.ndarray:
        """What no score falls below while the mean is within ``drift`` of ``mean``; infinite for taken samples."""
        dtype = self.embeddings.dtype if self.embeddings.dtype == np.float32 else np.dtype(np.float64)
        unit, terms = np.finfo(dtype), len(mean) + 4
        with np.errstate(over="ignore", invalid="ignore"):
            similarity = (self.embeddings @ mean.astype(dtype)).astype(np.float64)
            floor = self.relation.scores(self.individual, similarity)
        floor -= self.slope * (drift + terms * float(unit.eps) * _length(mean))
        floor -= self.sensitivity * (terms * float(unit.tiny)) + self._rounding(self.individual, self.slope)
        # An overflow in single precision bounds nothing.
        floor[~np.isfinite(floor)] = -np.inf
        floor[~self.available] = np.inf
        return floor

    def _rounding(self, individual: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Bound of the float64 rounding in a score and in its comparison with another, with room to spare."""
        fixed = np.abs(self.relation.scores(individual, 0.0)) + np.abs(individual)
        return 1e-14 * (len(self.total) + 16) * (fixed + slope * self.largest_norm) + _TINY

    def _next_of_all(self) -> tuple[int, float]:
        """The best of all samples not yet taken: bounds of all, then exact scores of those that may be it."""
        mean = self._mean()
        floor = self._floor(mean, 0.0)
        leader = int(floor.argmin())
        best = self._exact_of(np.array([leader]), mean)[0]
        rivals = np.flatnonzero(floor <= best)
        exact = self._exact_of(rivals, mean)
        chosen = int(exact.argmin())
        return int(rivals[chosen]), float(exact[chosen])

    def _exact_of(self, indices: np.ndarray, mean: np.ndarray) -> np.ndarray:
        parts = [
            self._exact(self.embeddings[part].astype(np.float64), self.individual[part], mean)
            for part in np.split(indices, range(4096, len(indices), 4096))
        ]
        return np.concatenate(parts)

    def _run_shortlist(self, num_left: int) -> Iterator[tuple[int, float]]:
        """Take from the most promising samples for as long as none of the others can be better.

        The others' bounds are kept as one number: no other can score below ``threshold`` while the mean stays within
        ``drift_limit`` of where it is now.
        """
        start = self._mean()
        floor = self._floor(start, self.drift_limit)
        size = min(_LARGEST_SHORTLIST, num_left // 4)
        order = np.argpartition(floor, size)
        threshold = float(floor[order[size:]].min())
        shortlist = _Shortlist(self, np.sort(order[:size]))
        drift = 0.0
        for _ in range(size):
            mean = self._mean()
            drift = _length(mean - start)
            if drift > self.drift_limit:
                # Room was left: let the next one reach further.
                self.drift_limit *= 1.5
                return
            position, score = shortlist.best(mean)
            if not score < threshold:
                break
            index = shortlist.take(position)
            yield index, score
            self._take(index)
        self.drift_limit = max(0.7 * drift, 0.1 * self.drift_limit)


class _Shortlist:
    """A few samples whose scores at one mean, the anchor, are known exactly."""

    def __init__(self, greedy: _Greedy, indices: np.ndarray) -> None:
        self.greedy, self.indices = greedy, indices
        self.rows = greedy.embeddings[indices].astype(np.float64)
        self.individual, self.slope = greedy.individual[indices], greedy.slope[indices]
        self.rounding = greedy._rounding(self.individual, self.slope)
        self.taken = ~greedy.available[indices]
        self._anchor_at(greedy._mean())

    def _anchor_at(self, mean: np.ndarray) -> np.ndarray:
        """Score all at ``mean``; float64, infinite for taken ones."""
        exact = self.greedy._exact(self.rows, self.individual, mean)
        exact[self.taken] = np.inf
        self.anchor, self.known = mean, exact - self.rounding
        return exact

    def best(self, mean: np.ndarray) -> tuple[int, float]:
        """Position and score of the lowest at ``mean``; the lowest position (hence index) among equals."""
        floor = self.known - self.slope * _length(mean - self.anchor)
        leader = int(floor.argmin())
        limit = self.greedy._exact(self.rows[leader], self.individual[leader], mean)
        rivals = np.flatnonzero(floor <= limit)
        if len(rivals) > _MOST_RECHECKED:
            exact = self._anchor_at(mean)
            position = int(exact.argmin())
            return position, float(exact[position])
        if len(rivals) == 1:
            return leader, float(limit)
        exact = self.greedy._exact(self.rows[rivals], self.individual[rivals], mean)
        chosen = int(exact.argmin())
        return int(rivals[chosen]), float(exact[chosen])

    def take(self, position: int) -> int:
        """Mark as taken; returns its index among all samples."""
        self.taken[position] = True
        self.known[position] = np.inf
        return int(self.indices[position])


def _length(vector: np.ndarray) -> float:
    """An upper bound of the Euclidean norm that is tight to rounding."""
    return math.sqrt(vector @ vector) * _ROUNDING + _TINY
