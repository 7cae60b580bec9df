"""Greedy group selection (paper section 3.4): each next sample has the lowest score given those already taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.greedy_block import End, Steps
from megatron_groupmates.selection.greedy_pool import Pool
from megatron_groupmates.selection.greedy_state import GreedyState

if TYPE_CHECKING:
    from megatron_groupmates.selection.greedy_crowd import Crowd

_LARGEST_VALUE = 1e90
_CHECKED_ROWS = 1024
_LONGEST_BLOCK = 512
_CROWD_BATCH, _SHORTEST_SPAN, _LARGEST_CROWD = 128, 256, 1 << 27
_COST_OF_BLOCK, _COST_OF_PAIR, _COST_OF_ONE, _COST_OF_PASS, _COST_OF_STEP = 2000.0, 0.1, 1000.0, 2.0, 300.0
_COST_IN_CROWD, _COST_OF_CROWD, _COST_TO_START = 0.15, 8.0, 2e4

Batch = tuple[np.ndarray, np.ndarray]
"""Indices int64 and scores float64, in order of choice."""


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
    batches = [indices for indices, _ in _start(embeddings, individual, relation).run(num_select)]
    return np.concatenate([np.empty(0, np.int64), *batches])


def greedy_batches(embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> Iterator[Batch]:
    """``greedy_sequence`` by parts: indices int64 ``[k]`` and their scores float64 ``[k]``, as many at a time as are found at once."""
    return _start(embeddings, individual, relation).run(len(individual))


def greedy_sequence(embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> Iterator[tuple[int, float]]:
    """All samples in greedy order, one at a time, each with its score at the moment of choice.

    Args:
        embeddings: float ``[n, d]``.
        individual: float ``[n]``.
        relation: the relation and its scalars.

    Raises:
        UserError: as for ``greedy_select``, at the call.
    """
    batches = greedy_batches(embeddings, individual, relation)
    return (pair for indices, scores in batches for pair in zip(indices.tolist(), scores.tolist(), strict=True))


def _start(embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> _Greedy:
    embeddings, individual = np.asarray(embeddings), np.asarray(individual, np.float64)
    if embeddings.ndim != 2 or individual.shape != embeddings.shape[:1]:
        raise UserError(f"embeddings have shape {list(embeddings.shape)} and individual {list(individual.shape)}; give [n, d] with [n]")
    largest = float(np.max([_largest(individual), _largest(embeddings)]))
    if not largest < _LARGEST_VALUE:
        raise UserError(
            f"an embedding or an individual influence is {largest}, not a number below {_LARGEST_VALUE:g}; embed and score the pool again"
        )
    return _Greedy(GreedyState(embeddings, individual, relation))


def _largest(values: np.ndarray) -> float:
    """The largest magnitude; NaN where there is one."""
    largest = 0.0
    for start in range(0, len(values), _CHECKED_ROWS):
        part = values[start : start + _CHECKED_ROWS]
        # NumPy finds the extremes of float16 far more slowly than it widens them.
        part = part.astype(np.float32) if part.dtype == np.float16 else part
        # np.max, unlike max, lets a NaN through.
        largest = float(np.max([largest, part.max(initial=0), -part.min(initial=0)]))
    return largest


class _Greedy:
    """Chooses, step by step, how to find the next samples.

    Most often a block of a few candidates out of the pool of promising ones serves many steps: the others cannot catch
    up while the mean of the taken embeddings stays near where it is. Where it serves few, because individual influences
    hardly differ, it is cheaper to follow the whole crowd of candidates. Costs are counted in inner products.
    """

    def __init__(self, state: GreedyState) -> None:
        self.state, self.pool = state, Pool(state)
        self.crowd: Crowd | None = None
        # What blocks have cost more than the crowd would have, lately; and for how long to follow the crowd before
        # blocks are tried again.
        self.regret, self.span = 0.0, _SHORTEST_SPAN
        # The crowd's scores need a copy of the embeddings in fewer bits.
        self.crowd_suits = state.embeddings.size <= _LARGEST_CROWD

    def run(self, most: int) -> Iterator[Batch]:
        """The first ``most`` samples, in order of choice."""
        state = self.state
        if not most:
            return
        first = int(state.individual.argmin())
        score = float(state.individual[first])
        yield np.array([state.add(first)]), np.array([score])
        while state.num_taken < most:
            wanted = most - state.num_taken
            if self._prefers_crowd():
                assert self.crowd is not None
                for start in range(0, min(wanted, self.span), _CROWD_BATCH):
                    yield self.crowd.run(min(_CROWD_BATCH, min(wanted, self.span) - start))
                self.regret, self.span, self.pool.patience = 0.0, 2 * self.span, 0
                continue
            steps = self.pool.run(min(wanted, _LONGEST_BLOCK))
            self._count(steps)
            if len(steps.indices):
                yield steps.indices, steps.scores
            else:
                yield self._one_of_all()

    def _count(self, steps: Steps) -> None:
        if steps.end is not End.DONE:
            cost = (_COST_OF_BLOCK + _COST_OF_PAIR * steps.size**2 if steps.size else _COST_OF_ONE) - len(steps.indices) * (
                _COST_OF_STEP + _COST_IN_CROWD * self.state.num_left
            )
            if not len(steps.indices):
                cost += _COST_OF_PASS * self.state.num_left
            self.regret = max(0.0, self.regret + cost)
            if not self.regret:
                self.span = _SHORTEST_SPAN

    def _prefers_crowd(self) -> bool:
        """Whether blocks have cost so much too much that starting to follow the crowd would have been worth it."""
        if not self.crowd_suits or self.regret <= (_COST_OF_BLOCK if self.crowd else _COST_TO_START + _COST_OF_CROWD * self.state.num_left):
            return False
        if self.crowd is None:
            # Here, for it loads torch, which takes longer than most selections, and most do without.
            from megatron_groupmates.selection.greedy_crowd import Crowd

            self.crowd = Crowd(self.state)
            self.crowd_suits = self.crowd.usable
        return self.crowd_suits

    def _one_of_all(self) -> Batch:
        """The best of all samples not yet taken: bounds of all, then exact scores of those that may be it."""
        state, mean = self.state, self.state.mean()
        floor = state.floor(mean, 0.0)
        _, score = state.best(floor.argmin(keepdims=True), mean)
        candidate, score = state.best(np.flatnonzero(floor <= score), mean)
        return np.array([state.add(candidate)]), np.array([score])
