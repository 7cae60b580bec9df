"""Rollouts with extreme predictions that cover many samples, where a beam search ends in permutations of one set."""

from __future__ import annotations

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.beam import check_candidates
from megatron_groupmates.influence.relation import Relation

_WINDOW = 256
_ROWS = 2048


def most_diverse(num_candidates: int, num_steps: int, max_uses: int = 5) -> int:
    """Rollouts of one direction that :func:`diverse_bootstrap` makes at most of so many candidates."""
    return min(num_candidates, max(0, num_candidates - num_steps) * max_uses // num_steps)


def diverse_bootstrap(
    embeddings: np.ndarray,
    individual: np.ndarray,
    relation: Relation,
    num_steps: int,
    count: int,
    direction: str = "lowest",
    max_uses: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Good (or bad) rollouts, no two of the same set, that have a sample in at most ``max_uses`` of them.

    The better half of the candidates by individual influence is cut into ``count`` equal strata. Each rollout starts
    from a random sample of its stratum; the starts come in random sequence, and each counts as a use from the outset.
    The candidates are ranked by their score after a group like all of them, one whose mean embedding is theirs. In
    turn, each rollout is extended greedily by the best next of the first ``max(256, num_steps + max_uses)`` in this
    ranking that are in fewer than ``max_uses`` rollouts. Where this would repeat an earlier rollout's set, its last
    sample is the next best one. Ties go to the lower sample id. Scores are float64; inner products (``np.vecdot``) with
    the samples of a rollout are added in its sequence.

    So the first rollouts are the most extreme, and the later ones less so, as the best samples are used up. It is quick
    because the samples to choose from change little: inner products among them are kept.

    Args:
        embeddings: float ``[N, d]``.
        individual: float ``[N]``.
        relation: the fitted relation.
        num_steps: T.
        count: rollouts to make.
        direction: ``lowest`` or ``highest``.
        max_uses: rollouts one sample may be in, at least 1.
        seed: decides the starts and which stratum comes first.

    Returns:
        int64 ``[count, T]``, no sample twice in a row, no two rows with the same set.

    Raises:
        UserError: too few candidates for so many rollouts, values that are not finite, or an unknown direction.
    """
    embeddings, individual, sign = check_candidates(embeddings, individual, num_steps, direction)
    num_candidates = len(individual)
    if max_uses < 1:
        raise UserError(f"max_uses is {max_uses}; a sample must be allowed in at least 1 rollout")
    if count > most_diverse(num_candidates, num_steps, max_uses):
        needed = max(count, -(-count * num_steps // max_uses) + num_steps)
        raise UserError(
            f"{count} diverse rollouts of {num_steps} samples, each in at most {max_uses}, need {needed} "
            f"candidates but there are {num_candidates}; give more candidates or fewer rollouts"
        )
    starts = _stratified_starts(np.argsort(sign * individual, kind="stable"), count, np.random.default_rng(seed))
    ranking = np.argsort(sign * relation.scores(individual, _similarity_to_mean(embeddings)), kind="stable")
    window = _Window(embeddings, individual, ranking, np.bincount(starts, minlength=num_candidates), max_uses, num_steps)
    seen: set[frozenset[int]] = set()
    rollouts = np.empty((count, num_steps), np.int64)
    for number, start in enumerate(starts.tolist()):
        rollout = window.extend(start, num_steps, relation, sign, seen)
        if rollout is None:
            raise UserError(
                f"only {number} of {count} diverse rollouts are possible with {num_candidates} "
                f"candidates, each in at most {max_uses}; give more candidates or fewer rollouts"
            )
        seen.add(frozenset(rollout))
        rollouts[number] = rollout
    return rollouts


def _stratified_starts(order: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """A random member of each of ``count`` equal parts of the better half of ``order``, in random sequence, int64."""
    half = max(count, -(-len(order) // 2))
    edges = np.linspace(0, half, count + 1).astype(np.int64)
    return generator.permutation(order[generator.integers(edges[:-1], edges[1:])])


def _similarity_to_mean(embeddings: np.ndarray) -> np.ndarray:
    """Inner product of each embedding with the mean of all, float64 ``[N]``."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    starts = range(0, len(embeddings), _ROWS)
    return np.concatenate([np.vecdot(embeddings[start : start + _ROWS].astype(np.float64), mean) for start in starts])


class _Window:
    """The first samples of a ranking that may still be used, in slots, with all inner products among them."""

    def __init__(
        self, embeddings: np.ndarray, individual: np.ndarray, ranking: np.ndarray, uses: np.ndarray, max_uses: int, num_steps: int
    ) -> None:
        self.embeddings, self.individual = embeddings, individual
        self.uses, self.max_uses = uses, max_uses
        self.waiting = iter(ranking[uses[ranking] < max_uses].tolist())
        size = min(max(_WINDOW, num_steps + max_uses), len(individual))
        self.slot_of: dict[int, int] = {}
        self.samples = np.full(size, -1)
        self.values = np.zeros(size)
        # Infinite: nothing to choose here.
        self.barrier = np.full(size, np.inf)
        self.rows = np.zeros((size, embeddings.shape[1]))
        self.products = np.zeros((size, size))
        for slot in range(size):
            self._fill(slot)

    def _fill(self, slot: int) -> None:
        """Put the next of those waiting into ``slot``, or close it."""
        self.slot_of.pop(int(self.samples[slot]), None)
        sample = next(self.waiting, None)
        if sample is None:
            self.samples[slot], self.barrier[slot] = -1, np.inf
            return
        self.slot_of[sample] = slot
        self.samples[slot], self.values[slot], self.barrier[slot] = sample, self.individual[sample], 0.0
        self.rows[slot] = self.embeddings[sample]
        self.products[slot] = self.products[:, slot] = np.vecdot(self.rows, self.rows[slot])

    def extend(self, start: int, num_steps: int, relation: Relation, sign: float, seen: set[frozenset[int]]) -> list[int] | None:
        """One rollout from ``start``, whose set is not in ``seen``; None where there is none. Takes note of the uses."""
        rollout, slots = [start], []
        barrier = self.barrier.copy()
        if start in self.slot_of:
            barrier[self.slot_of[start]] = np.inf
        similarity = np.vecdot(self.rows, self.embeddings[start].astype(np.float64))
        for step in range(1, num_steps):
            scores = sign * relation.scores(self.values, similarity / step) + barrier
            slot = self._lowest(scores)
            while step == num_steps - 1 and scores[slot] < np.inf and frozenset([*rollout, int(self.samples[slot])]) in seen:
                scores[slot] = np.inf
                slot = self._lowest(scores)
            if scores[slot] == np.inf:
                return None
            rollout.append(int(self.samples[slot]))
            slots.append(slot)
            barrier[slot] = np.inf
            similarity += self.products[slot]
        for sample, slot in zip(rollout[1:], slots, strict=True):
            self.uses[sample] += 1
            if self.uses[sample] == self.max_uses:
                self._fill(slot)
        return rollout

    def _lowest(self, scores: np.ndarray) -> int:
        """The slot with the lowest score; among equals the one with the lowest sample id."""
        tied = np.flatnonzero(scores == scores.min())
        return int(tied[self.samples[tied].argmin()]) if len(tied) > 1 else int(tied[0])
