"""All candidates at a time, for when individual influences hardly differ and any candidate may come next."""

from __future__ import annotations

import numpy as np
import torch

from megatron_groupmates.parallel.device import has_fast_bfloat16
from megatron_groupmates.selection.greedy_state import GreedyState, length

_AT_A_TIME = 32
_KEPT_PRODUCTS = 1 << 24
_FEWEST_STEPS, _MOST_STEPS, _MOST_RECHECKED = 8, 512, 500
_WORTH_LEAVING_OUT = 0.8
_CHUNK = 256
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-9, 1e12


class Crowd:
    """The scores of all candidates, kept up to date from step to step by approximate inner products.

    Times the number of taken samples, a score changes by ``fixed + weight * (h . h(p))`` when p is taken. Inner
    products of all candidates with those likely to be taken next come from one matrix product, in bfloat16 where the
    CPU has it. They are those of the embeddings less their common centre, so that what is lost to rounding is small
    against what tells the candidates of a tight cluster apart. The loss is bounded, and the exact scores decide
    between the candidates that the bound leaves.
    """

    def __init__(self, state: GreedyState) -> None:
        self.state = state
        self.candidates = np.flatnonzero(state.available)
        self._copy_rows()
        size = len(self.candidates)
        capacity = min(max(_KEPT_PRODUCTS // size, 2 * _AT_A_TIME), size)
        self.products = torch.empty((capacity, size), dtype=self.dtype)
        self.num_taken, self.steps, self.rechecked = -1, 0, 0
        self.fewest_steps = _FEWEST_STEPS
        self.candidate_of = np.full(capacity, -1)
        self.row_of = np.full(size, -1)

    def _copy_rows(self) -> None:
        """Embeddings less their centre, in a precision that is fast to multiply, and the bounds of what that loses."""
        state, dim = self.state, self.state.embeddings.shape[1]
        self.dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        # The matrix product rounds its result to its own precision.
        self.product_rounding = 2.0**-8 if self.dtype == torch.bfloat16 else 0.0
        self.dot_rounding = (dim + 8) * 2.0**-23
        centre = np.zeros(dim)
        for start in range(0, len(self.candidates), _CHUNK):
            centre += state.embeddings[self.candidates[start : start + _CHUNK]].sum(axis=0, dtype=state.fast)
        self.centre = (centre / len(self.candidates)).astype(state.fast).astype(np.float64)
        parts, norms, losses, centred, keys = [], [], [], [], []
        probe = np.random.default_rng(0).standard_normal(dim)
        for start in range(0, len(self.candidates), _CHUNK):
            rows = state.embeddings[self.candidates[start : start + _CHUNK]].astype(state.fast, copy=False)
            exact = torch.from_numpy((rows - self.centre.astype(state.fast)).astype(np.float32))
            rounded = exact.to(self.dtype)
            lost = (exact - rounded.float()).numpy()
            parts.append(rounded)
            norms.append(np.sqrt(np.vecdot(exact.numpy(), exact.numpy()).astype(np.float64)))
            losses.append(np.sqrt(np.vecdot(lost, lost).astype(np.float64)))
            wide = rows.astype(np.float64)
            centred.append(wide @ self.centre)
            keys.append(np.vecdot(wide, probe))
        self.rows = torch.cat(parts)
        self.same = self._same_embedding(np.concatenate(keys))
        self.norms = np.concatenate(norms) * 1.001
        largest = float(self.norms.max())
        # Products of what is far smaller than the largest may underflow.
        self.norms = np.maximum(self.norms, 1e-3 * largest)
        self.usable = _SMALLEST_SCALE < largest < _LARGEST_SCALE
        self.loss = float((np.concatenate(losses) * 1.001 / self.norms).max()) + 2.0**-21 if self.usable else np.inf
        self.weight = state.weight[self.candidates]
        self.slope = np.abs(self.weight) * self.norms
        self.largest_slope = float(self.slope.max())
        self.step = state.fixed[self.candidates] + self.weight * np.concatenate(centred)
        self.rounding = float(state.rounding[self.candidates].max())

    def _same_embedding(self, keys: np.ndarray) -> np.ndarray:
        """For each position one, the same for equal embeddings (nearly always): so that those need one exact product only."""
        _, firsts, groups = np.unique(keys, return_index=True, return_inverse=True)
        same = firsts[groups]
        embeddings = self.state.embeddings
        for position in np.flatnonzero(same != np.arange(len(same))).tolist():
            if not np.array_equal(embeddings[self.candidates[position]], embeddings[self.candidates[same[position]]]):
                same[position] = position
        return same

    def run(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Take ``most`` samples; indices int64 and scores float64 in order of choice."""
        state = self.state
        indices, scores = np.empty(most, np.int64), np.empty(most)
        for step in range(most):
            # Anew, too, after samples were taken elsewhere.
            if self.num_taken != state.num_taken or self._has_blurred():
                self._anchor()
            position, scores[step] = self._best()
            candidate = int(self.candidates[position])
            if self.row_of[position] < 0:
                self._multiply(position)
            row = int(self.row_of[position])
            indices[step] = state.add(candidate)
            self._move_on(position, row)
            if not state.available[candidate]:
                self.scores[position] = np.inf
                self.row_of[position], self.candidate_of[row] = -1, -1
        return indices, scores

    def _has_blurred(self) -> bool:
        """Whether errors have grown so much that scores are worth finding anew."""
        if self.rechecked > _MOST_RECHECKED and self.steps >= self.fewest_steps:
            # Where that did not help the last time, it is done more rarely.
            self.fewest_steps = 2 * self.steps if self.steps == self.fewest_steps else _FEWEST_STEPS
            return True
        return self.error > 3 * self.error_at_anchor or self.steps == _MOST_STEPS

    def _best(self) -> tuple[int, float]:
        """Position and exact score of the best candidate, the lowest index among equals."""
        state, mean = self.state, self.state.mean()
        leader = int(self.scores.argmin())
        candidate = int(self.candidates[leader])
        row = state.embeddings[candidate].astype(np.float64)
        score = float(state.exact(row, state.individual[candidate], mean))
        limit = (score + 2 * self.rounding) * state.num_taken
        near = self.scores <= limit + self.error * self.largest_slope
        if np.count_nonzero(near) <= 1:
            return leader, score
        rivals = np.flatnonzero(near)
        rivals = rivals[self.scores[rivals] - self.error * self.slope[rivals] <= limit]
        exact = self._exact(rivals, mean)
        best = rivals[exact == exact.min()].tolist()
        return min(best, key=lambda position: state.index_of(int(self.candidates[position]))), float(exact.min())

    def _exact(self, positions: np.ndarray, mean: np.ndarray) -> np.ndarray:
        state, distinct, inverse = self.state, *np.unique(self.same[positions], return_inverse=True)
        self.rechecked += len(distinct)
        similarity = np.vecdot(state.wide(self.candidates[distinct]), mean)[inverse]
        return state.relation.scores(state.individual[self.candidates[positions]], similarity)

    def _anchor(self) -> None:
        """Score all candidates anew, so that errors do not pile up."""
        state = self.state
        self._forget_taken()
        rest = state.total - state.num_taken * self.centre
        # The sum in pieces whose rounding is far below that of the rows.
        pieces, left = [], rest
        for _ in range(3):
            piece = torch.from_numpy(left).to(self.dtype)
            pieces.append(piece)
            left = left - piece.double().numpy()
        products = (self.rows @ torch.stack(pieces, dim=1)).double().numpy()
        self.scores = state.num_taken * self.step + self.weight * (products.sum(axis=1) + self.centre @ rest)
        self.scores -= np.abs(self.weight) * (self.product_rounding * np.abs(products).sum(axis=1))
        self.scores[~state.available[self.candidates]] = np.inf
        # Sums since now of embeddings less centre, and of what is lost of them; the first goes on from the rest.
        self.sums = np.stack([rest, np.zeros_like(rest)])
        self.linear = 2 * self.dot_rounding * length(rest) + length(left)
        self._bound_error()
        self.error_at_anchor, self.num_taken = self.error, state.num_taken
        self.steps, self.rechecked = 0, 0

    def _forget_taken(self) -> None:
        """Free the products with candidates taken elsewhere; where many are taken, leave all of them out from now on."""
        available = self.state.available[self.candidates]
        rows = self.row_of[~available]
        self.candidate_of[rows[rows >= 0]] = -1
        self.row_of[~available] = -1
        left = np.flatnonzero(available)
        if len(left) > _WORTH_LEAVING_OUT * len(available):
            return
        # Equal embeddings are told by the first position of theirs that is left.
        _, firsts, groups = np.unique(self.same[left], return_index=True, return_inverse=True)
        self.same = firsts[groups]
        for name in ("candidates", "weight", "slope", "step", "norms", "row_of"):
            setattr(self, name, getattr(self, name)[left])
        kept = torch.from_numpy(left)
        self.rows, self.products = self.rows[kept], self.products[:, kept]
        positions = np.flatnonzero(self.row_of >= 0)
        self.candidate_of[self.row_of[positions]] = positions

    def _move_on(self, position: int, row: int) -> None:
        """Change the scores by the increments of a sample just taken."""
        self.num_taken += 1
        self.steps += 1
        taken = self.state.embeddings[self.candidates[position]] - self.centre
        self.sums[0] += taken
        self.sums[1] += taken - self.rows[position].double().numpy()
        self.linear += self.dot_rounding * float(self.norms[position])
        self._bound_error()
        change = self.products[row].double().numpy()
        if self.product_rounding:
            # Rounded the way that makes the score lower.
            change -= np.abs(change) * np.copysign(self.product_rounding, self.weight)
        change += taken @ self.centre
        change *= self.weight
        self.scores += change
        self.scores += self.step

    def _bound_error(self) -> None:
        """How far a score may be below the kept one, per unit of slope."""
        rest, lost = np.sqrt(np.vecdot(self.sums, self.sums)).tolist()
        self.error = 1.001 * (self.loss * rest + lost + self.linear)

    def _multiply(self, position: int) -> None:
        """Multiply this candidate, and those likely to be taken soon, with all."""
        waiting = np.where(self.row_of >= 0, np.inf, self.scores)
        waiting[position] = -np.inf
        count = min(_AT_A_TIME, len(waiting))
        chosen = np.argpartition(waiting, count - 1)[:count]
        chosen = chosen[waiting[chosen] < np.inf]
        free = np.flatnonzero(self.candidate_of < 0)
        if len(free) < len(chosen):
            kept = np.flatnonzero(self.candidate_of >= 0)
            worst = kept[np.argsort(self.scores[self.candidate_of[kept]])[::-1][: len(chosen) - len(free)]]
            self.row_of[self.candidate_of[worst]] = -1
            free = np.append(free, worst)
        free = free[: len(chosen)]
        self.row_of[chosen], self.candidate_of[free] = free, chosen
        rows = self.rows[torch.from_numpy(chosen)]
        self.products[torch.from_numpy(free)] = rows @ self.rows.T
