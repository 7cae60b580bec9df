"""A few candidates at a time: many greedy steps on their small Gram matrix, then the proof that the steps are right."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from megatron_groupmates.selection.greedy_state import Fence, GreedyState


class End(enum.Enum):
    """Why a block took no further sample."""

    DONE = "as many as asked for, or all there are"
    THRESHOLD = "a sample outside may be better"
    REACH = "the mean went too far for the fence"
    CORRECTED = "the exact scores decided otherwise than proposed"


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps taken by a block of ``size`` candidates.

    Attributes:
        indices: int64, in order of choice.
        scores: float64 of each when it was chosen.
        drift: how far the mean went.
        end: why there are no more.
        size: candidates in the block.
    """

    indices: np.ndarray
    scores: np.ndarray
    drift: float
    end: End
    size: int


class Block:
    """Candidates whose mutual inner products are all known.

    Times the number of taken samples t, a score is ``t * fixed + weight * (h . total)``, and taking a sample p adds
    ``fixed + weight * (h . h(p))`` to it: one row of a matrix. So a step is one addition and one search for the minimum.
    These scores are rounded unlike the exact ones. They propose the steps; then the exact scores of all proposed
    samples are computed at once, and a step stands if no other candidate comes within rounding of its sample (else the
    rivals' exact scores decide) and no sample outside the block can have a lower score.
    """

    def __init__(self, state: GreedyState, candidates: np.ndarray, rows: np.ndarray) -> None:
        """Candidates int64 ``[k]``, available and in ascending order, with their float64 embeddings ``[k, d]``."""
        self.state, self.candidates, self.rows = state, candidates, rows
        self.individual = state.individual[candidates]
        self.fixed, self.weight = state.fixed[candidates], state.weight[candidates]
        self.rounding = float(state.rounding[candidates].max())

    def run(self, most: int, fence: Fence) -> Steps:
        """Take samples for as long as the fence holds, ``most`` at most."""
        state = self.state
        most = min(most, sum(map(state.num_copies, self.candidates.tolist())) if state.copies else len(self.candidates))
        proposed, history, totals = self._propose(most, fence.threshold)
        counts = np.arange(state.num_taken, state.num_taken + len(proposed))
        means = totals[:-1] / counts[:, None]
        scores = state.exact(self.rows[proposed], self.individual[proposed], means)
        moved = means - fence.mean
        drifts = np.sqrt(np.vecdot(moved, moved)) * (1 + 1e-9)
        valid, end = len(proposed), End.DONE if len(proposed) == most else End.THRESHOLD
        holds = (scores < fence.threshold) & (drifts <= fence.reach)
        if not holds.all():
            valid = int(holds.argmin())
            end = End.THRESHOLD if drifts[valid] <= fence.reach else End.REACH
        # Twice: the rounding of the proposal's scores, and of the exact ones.
        limits = (scores + 2 * self.rounding) * counts
        contested = np.count_nonzero(history[:valid] <= limits[:valid, None], axis=1) > 1
        for step in np.flatnonzero(contested).tolist():
            position, score = self._decide(np.flatnonzero(history[step] <= limits[step]), means[step], proposed[:step])
            if position != proposed[step]:
                proposed[step], scores[step] = position, score
                valid, end = step + 1, End.CORRECTED
                break
        return self._accept(proposed[:valid], scores[:valid], totals, float(drifts[valid - 1]) if valid else 0.0, end)

    def _propose(self, most: int, threshold: float) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Positions, candidates' scores times t before each step ``[steps, k]``, totals ``[steps + 1, d]``."""
        state = self.state
        increments = self.rows @ self.rows.T
        increments *= self.weight
        increments += self.fixed
        own = increments.diagonal().copy()
        np.fill_diagonal(increments, np.inf)
        spare = {}
        if state.copies:
            copies = [state.num_copies(candidate) for candidate in self.candidates.tolist()]
            spare = {position: count for position, count in enumerate(copies) if count > 1}
            for position in spare:
                increments[position, position] = own[position]
        history, totals = np.empty((most + 1, len(self.candidates))), np.empty((most + 1, self.rows.shape[1]))
        history[0] = state.num_taken * self.fixed + self.weight * (self.rows @ state.total)
        totals[0] = state.total
        proposed: list[int] = []
        scores, total, added, rows = list(history), list(totals), list(increments), list(self.rows)
        for step in range(most):
            now = scores[step]
            position = int(now.argmin())
            if now[position] > threshold * (state.num_taken + step):
                break
            proposed.append(position)
            np.add(now, added[position], out=scores[step + 1])
            np.add(total[step], rows[position], out=total[step + 1])
            if position in spare:
                spare[position] -= 1
                if spare[position] == 1:
                    increments[position, position] = np.inf
        return proposed, history[: len(proposed)], totals[: len(proposed) + 1]

    def _decide(self, rivals: np.ndarray, mean: np.ndarray, before: list[int]) -> tuple[int, float]:
        """Position and exact score of the best of the rivals after the steps ``before``."""
        scores = self.state.exact(self.rows[rivals], self.individual[rivals], mean)
        best = rivals[scores == scores.min()].tolist()
        return min(best, key=lambda position: self._index_of(position, before.count(position))), float(scores.min())

    def _index_of(self, position: int, times: int) -> int:
        """The index taken by taking this candidate once more after having taken it so many times."""
        candidate = int(self.candidates[position])
        copies = self.state.copies.get(candidate)
        return copies[-1 - times] if copies else candidate

    def _accept(self, positions: list[int], scores: np.ndarray, totals: np.ndarray, drift: float, end: End) -> Steps:
        state = self.state
        if positions:
            # The last step may have been decided otherwise than proposed.
            state.total = totals[len(positions) - 1] + self.rows[positions[-1]]
            state.num_taken += len(positions)
        candidates = self.candidates[positions]
        if state.copies:
            indices = np.array([state.take(candidate) for candidate in candidates.tolist()], np.int64)
        else:
            state.available[candidates] = False
            indices = candidates
        return Steps(indices, scores, drift, end, len(self.candidates))
