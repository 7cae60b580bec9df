"""All candidates at a time, for when individual influences hardly differ and any candidate may come next."""

from __future__ import annotations

import numpy as np
import torch

from megatron_groupmates.parallel.device import has_fast_bfloat16
from megatron_groupmates.selection.greedy_state import GreedyState, length

_AT_A_TIME = 32
_KEPT_PRODUCTS = 1 << 22
_FEW = 16
_FEWEST_STEPS, _MOST_STEPS, _MOST_RECHECKED = 8, 512, 500
_WORTH_LEAVING_OUT = 0.7
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
        size, dim = len(self.candidates), state.embeddings.shape[1]
        capacity = min(max(_KEPT_PRODUCTS // size, 2 * _AT_A_TIME), size)
        # Of candidates likely to be taken: by how much taking them changes all scores, their embeddings less centre, and
        # what is lost of those.
        self.increments, self.parts = np.empty((capacity, size)), np.empty((capacity, 2, dim))
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
        copies, norms, losses, centred, keys = [], [], [], [], []
        probe = np.random.default_rng(0).standard_normal(dim)
        for start in range(0, len(self.candidates), _CHUNK):
            rows = state.embeddings[self.candidates[start : start + _CHUNK]].astype(state.fast, copy=False)
            exact = torch.from_numpy((rows - self.centre.astype(state.fast)).astype(np.float32))
            rounded = exact.to(self.dtype)
            lost = (exact - rounded.float()).numpy()
            copies.append(rounded)
            norms.append(np.sqrt(np.vecdot(exact.numpy(), exact.numpy()).astype(np.float64)))
            losses.append(np.sqrt(np.vecdot(lost, lost).astype(np.float64)))
            wide = rows.astype(np.float64)
            centred.append(wide @ self.centre)
            keys.append(np.vecdot(wide, probe))
        self.rows = torch.cat(copies)
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
        self.lowering = np.copysign(self.product_rounding, self.weight).astype(np.float32)
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
        rivals = np.flatnonzero(self.scores <= limit + self.error * self.largest_slope)
        if len(rivals) <= 1:
            return leader, score
        if len(rivals) > 2:
            rivals = rivals[self.scores[rivals] - self.error * self.slope[rivals] <= limit]
        exact = self._exact(rivals, mean)
        best = rivals[exact == exact.min()].tolist()
        return min(best, key=lambda position: state.index_of(int(self.candidates[position]))), float(exact.min())

    def _exact(self, positions: np.ndarray, mean: np.ndarray) -> np.ndarray:
        state, candidates = self.state, self.candidates[positions]
        if len(positions) <= _FEW:
            self.rechecked += len(positions)
            return state.exact(state.wide(candidates), state.individual[candidates], mean)
        distinct, inverse = np.unique(self.same[positions], return_inverse=True)
        self.rechecked += len(distinct)
        similarity = np.vecdot(state.wide(self.candidates[distinct]), mean)[inverse]
        return state.relation.scores(state.individual[candidates], similarity)

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
        for name in ("candidates", "weight", "slope", "lowering", "step", "norms", "row_of"):
            setattr(self, name, getattr(self, name)[left])
        self.rows = self.rows[torch.from_numpy(left)]
        increments = np.empty((len(self.increments), len(left)))
        for row in np.flatnonzero(self.candidate_of >= 0).tolist():
            np.take(self.increments[row], left, out=increments[row])
        self.increments = increments
        positions = np.flatnonzero(self.row_of >= 0)
        self.candidate_of[self.row_of[positions]] = positions

    def _move_on(self, position: int, row: int) -> None:
        """Change the scores by the increments of a sample just taken."""
        self.num_taken += 1
        self.steps += 1
        self.sums += self.parts[row]
        self.linear += self.dot_rounding * float(self.norms[position])
        self._bound_error()
        self.scores += self.increments[row]

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
        self._keep(chosen, free)

    def _keep(self, chosen: np.ndarray, free: np.ndarray) -> None:
        """Compute what taking the chosen candidates would change, and keep it in the free rows."""
        copies = self.rows[torch.from_numpy(chosen)]
        rows = self.state.embeddings[self.candidates[chosen]] - self.centre
        self.parts[free, 0] = rows
        self.parts[free, 1] = rows - copies.double().numpy()
        products = (copies @ self.rows.T).float().numpy()
        if self.product_rounding:
            # Rounded the way that makes the score lower; exact, for these have few bits.
            products -= np.abs(products) * self.lowering
        centred = (rows @ self.centre).tolist()
        for row, product, shift in zip(free.tolist(), products, centred, strict=True):
            change = self.increments[row]
            change[:] = product
            change += shift
            change *= self.weight
            change += self.step
