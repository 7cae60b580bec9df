"""A few candidates at a time: many greedy steps on their small Gram matrix, then the proof that the steps are right."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from megatron_groupmates.selection.greedy_state import Fence, GreedyState

_SHORTEST_SEGMENT, _LONGEST_SEGMENT = 16, 64
_LARGEST_NORM = 1e18


class End(enum.Enum):
    """Why a block took no further sample."""

    DONE = "as many as asked for, or all there are"
    THRESHOLD = "a sample outside may be better"
    REACH = "the mean went too far for the fence"


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
    These scores are rounded unlike the exact ones. They propose a few steps; then the exact scores of all proposed
    samples are computed at once, and a step stands if no other candidate comes within rounding of its sample (else the
    rivals' exact scores decide) and no sample outside the block can have a lower score.

    Attributes:
        scores: float64 ``[k]``, kept scores times t; infinite for taken samples.
        blur: what rounding of the inner products adds to the error of a kept score with each step.
    """

    def __init__(self, state: GreedyState, candidates: np.ndarray, rows: np.ndarray) -> None:
        """Candidates int64 ``[k]``, available and in ascending order, with their embeddings ``[k, d]`` in the dtype of fast products."""
        self.state, self.candidates = state, candidates
        self.individual = state.individual[candidates]
        self.fixed, self.weight = state.fixed[candidates], state.weight[candidates]
        self.rounding = float(state.rounding[candidates].max())
        largest = float(state.norms[candidates].max())
        if largest > _LARGEST_NORM:
            rows = rows.astype(np.float64)
        unit, terms = np.finfo(rows.dtype), rows.shape[1] + 4
        steepest, heaviest = float(state.slope[candidates].max()), float(np.abs(self.weight).max())
        self.blur = terms * (1.001 * float(unit.eps) * steepest * largest + float(unit.tiny) * heaviest)
        # A step goes from row to row: that of the sample taken, for all candidates.
        self.increments = (rows @ rows.T).astype(np.float64)
        self.increments *= self.weight
        self.increments += self.fixed
        self.own = self.increments.diagonal().copy()
        np.fill_diagonal(self.increments, np.inf)
        self.scores = state.num_taken * self.fixed + self.weight * np.vecdot(rows, state.total)
        self.num_steps = 0
        copies = [state.num_copies(candidate) for candidate in candidates.tolist()] if state.copies else []
        self.copied = [position for position, count in enumerate(copies) if count > 1]
        self.num_available = sum(copies) if copies else len(candidates)

    def run(self, most: int, fence: Fence) -> Steps:
        """Take samples for as long as the fence holds, ``most`` at most."""
        indices, scores, drift = [np.empty(0, np.int64)], [np.empty(0)], 0.0
        most, segment = min(most, self.num_available), _SHORTEST_SEGMENT
        end = End.DONE
        while end is End.DONE and self.num_steps < most:
            positions, found, moved, totals, end = self._segment(min(segment, most - self.num_steps), fence)
            if positions:
                drift = moved
                scores.append(found)
                indices.append(self._accept(positions, totals))
            segment = min(2 * segment, _LONGEST_SEGMENT)
        return Steps(np.concatenate(indices), np.concatenate(scores), drift, end, len(self.candidates))

    def _segment(self, most: int, fence: Fence) -> tuple[list[int], np.ndarray, float, np.ndarray, End]:
        """Positions of the next steps and their exact scores; the last drift, totals before each step, and why it ended."""
        state = self.state
        proposed, history = self._propose(most, fence.threshold)
        rows = state.wide(self.candidates[proposed])
        totals = np.empty((len(proposed) + 1, len(state.total)))
        totals[0] = state.total
        for before, row, after in zip(totals[:-1], rows, totals[1:], strict=True):
            np.add(before, row, out=after)
        counts = np.arange(state.num_taken, state.num_taken + len(proposed))
        means = totals[:-1] / counts[:, None]
        scores = state.exact(rows, self.individual[proposed], means)
        moved = means - fence.mean
        drifts = np.sqrt(np.vecdot(moved, moved)) * (1 + 1e-9)
        valid, end = len(proposed), End.DONE if len(proposed) == most else End.THRESHOLD
        holds = (scores < fence.threshold) & (drifts <= fence.reach)
        if not holds.all():
            valid = int(holds.argmin())
            end = End.THRESHOLD if drifts[valid] <= fence.reach else End.REACH
        # Twice: the rounding of the proposal's scores, and of the exact ones.
        limits = (scores + 2 * self.rounding) * counts + np.arange(self.num_steps, self.num_steps + len(proposed)) * self.blur
        contested = np.count_nonzero(history[:valid] <= limits[:valid, None], axis=1) > 1
        for step in np.flatnonzero(contested).tolist():
            position, score = self._decide(np.flatnonzero(history[step] <= limits[step]), means[step], proposed[:step])
            if position != proposed[step]:
                # The steps proposed after it are void, and proposed anew.
                proposed[step], scores[step] = position, score
                valid, end = step + 1, End.DONE
                break
        if valid:
            self.scores = history[valid - 1]
        return proposed[:valid], scores[:valid], float(drifts[valid - 1]) if valid else 0.0, totals, end

    def _propose(self, most: int, threshold: float) -> tuple[list[int], np.ndarray]:
        """Positions, and the kept scores before each step ``[steps, k]``."""
        state = self.state
        spare = {}
        for position in self.copied:
            spare[position] = state.num_copies(int(self.candidates[position])) * bool(state.available[self.candidates[position]])
            self.increments[position, position] = self.own[position] if spare[position] > 1 else np.inf
        history = np.empty((most + 1, len(self.candidates)))
        history[0] = self.scores
        proposed: list[int] = []
        for step in range(most):
            now = history[step]
            position = int(now.argmin())
            if now[position] > threshold * (state.num_taken + step):
                break
            proposed.append(position)
            np.add(now, self.increments[position], out=history[step + 1])
            if position in spare:
                spare[position] -= 1
                if spare[position] == 1:
                    self.increments[position, position] = np.inf
        return proposed, history[: len(proposed)]

    def _decide(self, rivals: np.ndarray, mean: np.ndarray, before: list[int]) -> tuple[int, float]:
        """Position and exact score of the best of the rivals after the steps ``before``."""
        scores = self.state.exact(self.state.wide(self.candidates[rivals]), self.individual[rivals], mean)
        best = rivals[scores == scores.min()].tolist()
        return min(best, key=lambda position: self._index_of(position, before.count(position))), float(scores.min())

    def _index_of(self, position: int, times: int) -> int:
        """The index taken by taking this candidate once more after having taken it so many times."""
        candidate = int(self.candidates[position])
        copies = self.state.copies.get(candidate)
        return copies[-1 - times] if copies else candidate

    def _accept(self, positions: list[int], totals: np.ndarray) -> np.ndarray:
        """Take the samples at these positions, given the kept scores before the last of them; return their indices."""
        state, last = self.state, positions[-1]
        candidates = self.candidates[positions]
        # The last step may have been decided otherwise than proposed.
        state.total = totals[len(positions) - 1] + state.embeddings[candidates[-1]]
        state.num_taken += len(positions)
        self.num_steps += len(positions)
        if state.copies:
            indices = np.array([state.take(candidate) for candidate in candidates.tolist()], np.int64)
        else:
            state.available[candidates] = False
            indices = candidates
        again = self.scores[last] + self.own[last]
        self.scores = self.scores + self.increments[last]
        self.scores[last] = again if state.available[candidates[-1]] else np.inf
        return indices
