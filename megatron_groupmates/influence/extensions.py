"""The best next candidates of many rollouts: exact scores of few, bounds for the rest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.parallel.device import has_fast_bfloat16

_GROUPS = 512
_FIRST_COLUMNS = 256
_COLUMNS = 2048
_PAIRS = 1 << 18
_ROWS = 2048
_LONGER = 1 + 1e-9
_EPSILON = float(np.finfo(np.float32).eps)


@dataclasses.dataclass
class _Best:
    """The best extensions found so far of each group: ``[G, num_extensions]``, lowest score first; infinite: none."""

    samples: np.ndarray
    scores: np.ndarray

    def merge(self, groups: np.ndarray, samples: np.ndarray, scores: np.ndarray) -> None:
        """Take in further extensions, given by group number; none may be there already."""
        touched = np.unique(groups)
        width = self.samples.shape[1]
        groups = np.concatenate([touched.repeat(width), groups])
        samples = np.concatenate([self.samples[touched].ravel(), samples])
        scores = np.concatenate([self.scores[touched].ravel(), scores])
        order = np.lexsort((samples, scores, groups))
        firsts = np.searchsorted(groups[order], touched)
        kept = order[firsts[:, None] + np.arange(width)]
        self.samples[touched], self.scores[touched] = samples[kept], scores[kept]


class Extensions:
    """Finds the best next candidates of many rollouts.

    With c the mean embedding, the similarity of candidate x to the mean m of a group's embeddings is
    h.c + (m - c).c + (h - c).(m - c). Only the last term needs a matrix product, in float32; it is bounded by the lengths
    of both sides, and so is its rounding error, which vanishes as embeddings come to lie close to each other. Scores
    are linear in the similarity: ``base + slope * similarity``.
    """

    def __init__(
        self, embeddings: np.ndarray, individual: np.ndarray, relation: Relation, sign: float, num_steps: int, num_extensions: int
    ) -> None:
        self.embeddings, self.individual, self.relation, self.sign = embeddings, individual, relation, sign
        self.num_extensions = min(num_extensions, len(individual))
        num_candidates, dim = embeddings.shape
        self.centre = embeddings.mean(axis=0, dtype=np.float64)
        self.to_centre, norms, self.lengths = np.empty((3, num_candidates))
        fast_dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        self.offsets = torch.empty((num_candidates, dim), dtype=fast_dtype)
        # In units of the largest value, no product overflows in the fast type.
        self.unit = max(float(embeddings.max()), -float(embeddings.min())) or 1.0
        for start in range(0, num_candidates, _ROWS):
            part = slice(start, start + _ROWS)
            rows = embeddings[part].astype(np.float64)
            self.to_centre[part], norms[part] = np.vecdot(rows, self.centre), np.sqrt(np.vecdot(rows, rows))
            rows -= self.centre
            self.lengths[part] = np.sqrt(np.vecdot(rows, rows)) * _LONGER
            self.offsets[part] = torch.from_numpy(rows / self.unit).to(fast_dtype)
        largest = norms * (norms.max() * _LONGER)
        slope = relation.sensitivity(individual)
        at_largest, at_lowest = (sign * relation.scores(individual, extreme) for extreme in (largest, -largest))
        self.slope = np.where(at_largest < at_lowest, -slope, slope)
        self.base = sign * relation.scores(individual, np.zeros(num_candidates))
        sizes = np.abs(self.base) + np.abs(individual) + slope * norms.max() ** 2
        self.score_unit = float(sizes.max()) or 1.0
        # Float64 rounding of a score and of all it is compared with, and float32 underflow, with room to spare.
        self.rounding = 1e-15 * (dim + 16) * sizes + 1e-40 * self.score_unit
        # Sums are float32; bfloat16 has 8 bits, and both factors and the result are rounded to them.
        relative_error = (dim + 16) * _EPSILON + (2.0**-7 if fast_dtype == torch.bfloat16 else 0.0)
        self.product_error = relative_error * slope * self.lengths
        # An infinite score is never the best.
        self.base[self._copies(at_largest == at_lowest, num_steps + self.num_extensions)] = np.inf

    def _copies(self, flat: np.ndarray, enough: int) -> np.ndarray:
        """Candidates that are never chosen, because lower-numbered ones always have the same score; bool ``[N]``.

        Alike are those with the same embedding and individual influence, or with the same score where no group
        changes it (``flat``). ``enough`` are kept of each: as many as a rollout and its extensions can hold.
        """
        score, embedding = np.where(flat, self.base, self.individual), np.where(flat, 0.0, self.to_centre)
        order = np.lexsort((embedding, score, flat))
        differs = [values[order][1:] != values[order][:-1] for values in (embedding, score, flat)]
        edges = np.concatenate([[0], np.flatnonzero(np.logical_or.reduce(differs)) + 1, [len(order)]])
        dropped = np.zeros(len(flat), bool)
        for start, stop in itertools.pairwise(edges):
            if stop - start > enough:
                alike = order[start:stop]
                same = flat[alike] | (self.embeddings[alike] == self.embeddings[alike[0]]).all(axis=1)
                dropped[alike[same][enough:]] = True
        return dropped

    def best(self, beams: np.ndarray, totals: np.ndarray, num_beams: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best extensions of the distinct sets of samples ("groups") among rollouts.

        Args:
            beams: int64 ``[B, k]``, best first.
            totals: float64 ``[B]``, their sums, ascending.
            num_beams: how many sums will be kept: extensions that cannot be among them may be missing.

        Returns:
            int64 samples ``[G, num_extensions]``, float64 scores alike (infinite: there is none), and int64 ``[B]``, the
            group of each rollout.
        """
        groups, first, group_of = np.unique(np.sort(beams, axis=1), axis=0, return_index=True, return_inverse=True)
        group_of = group_of.reshape(-1)
        lowest_total = totals[first]
        shape = (len(groups), self.num_extensions)
        samples, scores = np.zeros(shape, np.int64), np.full(shape, np.inf)
        order = np.argsort(lowest_total, kind="stable")
        worst_sum = np.inf
        for start in range(0, len(order), _GROUPS):
            part = order[start : start + _GROUPS]
            room = worst_sum - lowest_total[part]
            room += 1e-15 * (abs(worst_sum) + np.abs(lowest_total[part])) if np.isfinite(worst_sum) else 0.0
            samples[part], scores[part] = self._best_of_groups(groups[part], room)
            worst_sum = min(worst_sum, lowest_sum(totals[:, None] + scores[group_of], num_beams))
        return samples, scores, group_of

    def _best_of_groups(self, groups: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples and scores ``[G, num_extensions]`` of the best extensions of groups int64 ``[G, k]``; complete up to score ``room``."""
        shape = (len(groups), self.num_extensions)
        best = _Best(np.zeros(shape, np.int64), np.full(shape, np.inf))
        tile, floor = self._tile(groups)
        limit = room.copy()
        for columns in _blocks(floor, limit, max(_FIRST_COLUMNS, 2 * self.num_extensions)):
            rows, places = tile.within(columns, limit, self.num_extensions)
            for start in range(0, len(rows), _PAIRS):
                row, samples = rows[start : start + _PAIRS], columns[places[start : start + _PAIRS]]
                best.merge(row, samples, self._exact(groups[row], samples))
            np.minimum(limit, best.scores[:, -1], out=limit)
        return best.samples, best.scores

    def _tile(self, groups: np.ndarray) -> tuple[_Tile, np.ndarray]:
        """Bounds of scores after each of ``groups``, to be had in blocks, and what the scores of each candidate never fall below."""
        shift = self.embeddings[groups].mean(axis=1, dtype=np.float64) - self.centre
        along, length = shift @ self.centre, float(np.sqrt(np.vecdot(shift, shift)).max()) * _LONGER
        ends = (self.to_centre + along.min() - self.lengths * length, self.to_centre + along.max() + self.lengths * length)
        floor = np.minimum(*(self.base + self.slope * end for end in ends)) - self.rounding
        return _Tile(self, groups, shift, along, floor.min(), self.product_error * length + self.rounding), floor

    def _exact(self, groups: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Signed scores, float64 ``[n]``, of each of ``samples`` after the group int64 ``[n, k]`` beside it."""
        pairs, index = np.unique(groups * len(self.individual) + samples[:, None], return_inverse=True)
        products = np.empty(len(pairs))
        for start in range(0, len(pairs), _ROWS):
            members, others = np.divmod(pairs[start : start + _ROWS], len(self.individual))
            # np.vecdot treats every pair alike wherever it lies, so that equal candidates get bitwise equal scores.
            products[start : start + _ROWS] = np.vecdot(*(self.embeddings[rows].astype(np.float64) for rows in (members, others)))
        similarity = np.sort(products[index.reshape(groups.shape)], axis=1)
        total = similarity[:, 0].copy()
        for position in range(1, groups.shape[1]):
            total += similarity[:, position]
        return self.sign * self.relation.scores(self.individual[samples], total / groups.shape[1])


class _Tile:
    """Float32 lower bounds of the scores of blocks of candidates after each of some groups.

    They are relative to ``origin``, a score near the best, in units of the largest one: rounding is small where scores
    lie close to each other, and nothing overflows.
    """

    def __init__(
        self, search: Extensions, groups: np.ndarray, shift: np.ndarray, along: np.ndarray, origin: float, error: np.ndarray
    ) -> None:
        self.search, self.groups, self.origin, self.error = search, groups, origin, error
        self.reference = float(along.mean())
        self.shift = torch.from_numpy(shift / search.unit).to(search.offsets.dtype)
        self.along = ((along - self.reference) / search.unit**2).astype(np.float32)[:, None]
        self.largest_along = float(np.abs(along - self.reference).max())
        self.position = np.full(len(search.base), -1)

    def within(self, columns: np.ndarray, limit: np.ndarray, num_extensions: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups and places in ``columns`` of all that may score at or below their group's ``limit`` (float64 ``[G]``).

        Members of the group are left out. Lowers ``limit`` where bounds prove that as many as ``num_extensions``
        candidates score lower, if that spares much.
        """
        search = self.search
        bounds = (self.shift @ search.offsets[torch.from_numpy(columns)].T).float().numpy()
        bounds += self.along
        base = search.base[columns] + search.slope[columns] * (search.to_centre[columns] + self.reference) - self.origin
        error = self.error[columns] + 4 * _EPSILON * (np.abs(base) + np.abs(search.slope[columns]) * self.largest_along)
        bounds *= (search.slope[columns] * (search.unit**2 / search.score_unit)).astype(np.float32)
        bounds += ((base - error) / search.score_unit).astype(np.float32)
        self._leave_out_members(bounds, columns)
        rows, places = self._at_most(bounds, limit)
        if len(rows) > 4 * num_extensions * len(limit):
            upper = bounds + (2 * error / search.score_unit).astype(np.float32)
            upper = np.partition(upper, num_extensions - 1, axis=1)[:, num_extensions - 1].astype(np.float64)
            np.minimum(limit, upper * search.score_unit + self.origin, out=limit)
            rows, places = self._at_most(bounds, limit)
        return rows, places

    def _leave_out_members(self, bounds: np.ndarray, columns: np.ndarray) -> None:
        self.position[columns] = np.arange(len(columns))
        places = self.position[self.groups]
        row, member = np.nonzero(places >= 0)
        bounds[row, places[row, member]] = np.inf
        self.position[columns] = -1

    def _at_most(self, bounds: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        relative = (limit - self.origin) / self.search.score_unit
        relative += 4 * _EPSILON * np.abs(relative)
        relative = np.minimum(relative, np.finfo(np.float32).max).astype(np.float32)
        return np.divmod(np.flatnonzero(bounds <= relative[:, None]), bounds.shape[1])


def _blocks(floor: np.ndarray, limit: np.ndarray, num_first: int) -> Iterator[np.ndarray]:
    """Candidates in blocks, the most promising first, as long as ``floor`` is within the largest ``limit``, which falls meanwhile."""
    first = np.argpartition(floor, num_first)[:num_first] if len(floor) > num_first else np.arange(len(floor))
    yield first[(floor[first] <= limit.max()) & np.isfinite(floor[first])]
    rest = (floor <= limit.max()) & np.isfinite(floor)
    rest[first] = False
    columns = np.flatnonzero(rest)
    columns = columns[np.argsort(floor[columns], kind="stable")]
    for start in range(0, len(columns), _COLUMNS):
        if floor[columns[start]] > limit.max():
            return
        yield columns[start : start + _COLUMNS]


def lowest_sum(sums: np.ndarray, count: int) -> float:
    """The ``count``-th lowest of ``sums``; infinite where there are fewer."""
    return float(np.partition(sums.ravel(), count - 1)[count - 1]) if sums.size >= count else np.inf
