"""What is taken so far in one greedy selection, and how samples are scored: exactly, or by bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from megatron_groupmates.influence.relation import Relation

_CHUNK = 4096
_LARGEST_COPY = 1 << 26
_SLACK = 1 + 1e-9
_TINY = 1e-300


@dataclasses.dataclass(frozen=True)
class Fence:
    """What is known of the samples that are left out of a computation.

    None of them scores below ``threshold`` while the mean of the taken embeddings is within ``reach`` of ``mean``.
    """

    mean: np.ndarray
    reach: float
    threshold: float


class GreedyState:
    """The samples of one greedy selection.

    Equal samples (the same embedding and the same individual influence) are one candidate, known by its lowest index,
    that can be taken as often as it has copies: they would tie at every step.

    The score at mean m is ``fixed + weight * (h . m)``, but a score that decides anything comes from ``exact``, which
    treats every row alike, so that equal scores tie bitwise. Everything else only bounds scores and may be rounded as
    it likes: each bound includes its rounding error.

    Attributes:
        embeddings: ``[n, d]``, float32 or float64; float16 only if a wider copy would be large.
        available: bool ``[n]``, candidates with a copy not yet taken.
        total: float64 ``[d]``, sum of the taken embeddings in order of choice.
        norms: float64 ``[n]``, upper bounds of ||h||.
        slope: float64 ``[n]``, how far a score can move per unit of change of the mean.
        rounding: float64 ``[n]``, bound of the float64 rounding in a score and in its comparison with another.
        margin: float64 ``[n]``, that and what underflow in a fast product can hide.
    """

    def __init__(self, embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> None:
        if embeddings.dtype == np.float16 and embeddings.size <= _LARGEST_COPY:
            embeddings = embeddings.astype(np.float32)
        self.embeddings, self.individual, self.relation = embeddings, individual, relation
        self.fast = np.dtype(np.float64 if embeddings.dtype == np.float64 else np.float32)
        self.fixed = relation.scores(individual, 0.0)
        self.weight = _weight(individual, relation)
        self.norms = self._norms()
        self.slope = np.abs(self.weight) * self.norms * _SLACK
        dim = embeddings.shape[1]
        scale = np.abs(self.fixed) + np.abs(individual) + self.slope * self.norms.max(initial=0.0)
        # Of the products, and of as many additions as a block or a crowd makes before it starts from exact sums again.
        self.rounding = 2.3e-16 * (dim + 2048) * scale + _TINY
        self.margin = self.rounding + np.abs(self.weight) * ((dim + 4) * float(np.finfo(self.fast).tiny))
        self.copies = _find_copies(embeddings, individual)
        self.available = np.ones(len(individual), bool)
        for copies in self.copies.values():
            self.available[copies[:-1]] = False
        self.total, self.num_taken = np.zeros(dim), 0

    @property
    def num_left(self) -> int:
        """Samples not yet taken."""
        return len(self.individual) - self.num_taken

    def mean(self) -> np.ndarray:
        """Mean of the taken embeddings, float64 ``[d]``; at least one must be taken."""
        return self.total / self.num_taken

    def wide(self, candidates: np.ndarray) -> np.ndarray:
        """Embeddings of candidates, float64 ``[k, d]``."""
        return self.embeddings[candidates].astype(np.float64)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All embeddings by parts, in the dtype of fast products."""
        for start in range(0, len(self.individual), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield part, self.embeddings[part].astype(self.fast, copy=False)

    def exact(self, rows: np.ndarray, individual: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Scores as the definition has them: float64 rows ``[k, d]``, means ``[d]`` or ``[k, d]``."""
        return self.relation.scores(individual, np.vecdot(rows, mean))

    def floor(self, mean: np.ndarray, reach: float) -> np.ndarray:
        """float64 ``[n]``: what no score falls below while the mean is within ``reach`` of ``mean``; infinite for taken samples."""
        floor = np.concatenate([self.floor_of(part, rows, mean, reach) for part, rows in self.chunks()])
        floor[~self.available] = np.inf
        return floor

    def floor_of(self, candidates: np.ndarray | slice, rows: np.ndarray, mean: np.ndarray, reach: float) -> np.ndarray:
        """``floor`` of some candidates, taken or not, with embeddings ``[k, d]`` in the dtype of fast products."""
        unit, terms = np.finfo(self.fast), len(mean) + 4
        with np.errstate(over="ignore", invalid="ignore"):
            floor = (rows @ mean.astype(self.fast)).astype(np.float64)
            floor *= self.weight[candidates]
            floor += self.fixed[candidates]
        floor -= self.slope[candidates] * (reach + terms * float(unit.eps) * length(mean))
        floor -= self.margin[candidates]
        # An overflow in single precision bounds nothing.
        floor[~np.isfinite(floor)] = -np.inf
        return floor

    def best(self, candidates: np.ndarray, mean: np.ndarray) -> tuple[int, float]:
        """The one with the lowest exact score (lowest index among equals) and its score."""
        parts = [candidates[start : start + _CHUNK] for start in range(0, len(candidates), _CHUNK)]
        scores = np.concatenate([self.exact(self.wide(part), self.individual[part], mean) for part in parts])
        equals = candidates[scores == scores.min()]
        return min(equals.tolist(), key=self.index_of), float(scores.min())

    def index_of(self, candidate: int) -> int:
        """The index that taking this candidate would take: that of its first copy not yet taken."""
        return self.copies[candidate][-1] if candidate in self.copies else candidate

    def num_copies(self, candidate: int) -> int:
        """How often an available candidate can be taken."""
        return len(self.copies.get(candidate, (candidate,)))

    def take(self, candidate: int) -> int:
        """Mark one copy as taken and return its index; ``total`` and ``num_taken`` are the caller's to move on."""
        if self.num_copies(candidate) > 1:
            return self.copies[candidate].pop()
        self.available[candidate] = False
        return self.copies.pop(candidate)[0] if candidate in self.copies else candidate

    def add(self, candidate: int) -> int:
        """``take``, and move the mean on."""
        self.total += self.embeddings[candidate]
        self.num_taken += 1
        return self.take(candidate)

    def _norms(self) -> np.ndarray:
        unit, terms = np.finfo(self.fast), self.embeddings.shape[1] + 4
        squares = np.empty(len(self.individual))
        with np.errstate(over="ignore"):
            for part, rows in self.chunks():
                squares[part] = np.vecdot(rows, rows)
                if not np.isfinite(squares[part]).all():
                    wide = rows.astype(np.float64)
                    squares[part] = np.vecdot(wide, wide)
        return np.sqrt(squares * (1 + terms * float(unit.eps)) + terms * float(unit.tiny))


def length(vector: np.ndarray) -> float:
    """An upper bound of the Euclidean norm that is tight to rounding."""
    return math.sqrt(vector @ vector) * _SLACK + _TINY


def _weight(individual: np.ndarray, relation: Relation) -> np.ndarray:
    """Change of the score per unit of mean similarity, with its sign."""
    size = relation.sensitivity(individual)
    return (
        np.copysign(size, -individual * relation.alpha * relation.tau) if relation.kind == "product" else np.copysign(size, relation.gamma)
    )


def _find_copies(embeddings: np.ndarray, individual: np.ndarray) -> dict[int, list[int]]:
    """By lowest index: the indices, in descending order, of samples equal in influence and embedding, if there are two."""
    order = np.argsort(individual, kind="stable")
    equal = np.diff(individual[order]) == 0
    doubtful = np.sort(order[np.append(equal, False) | np.insert(equal, 0, False)]) if equal.any() else order[:0]
    if len(doubtful):
        # Most are told apart by two coordinates or so; whole rows are compared only where a projection is equal too.
        probe = np.random.default_rng(0).standard_normal(embeddings.shape[1])
        parts = np.array_split(doubtful, -(-len(doubtful) // _CHUNK))
        with np.errstate(over="ignore", invalid="ignore"):
            keys = np.concatenate([np.vecdot(embeddings[part].astype(np.float64), probe) for part in parts])
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        doubtful = doubtful[counts[inverse] > 1]
    groups: dict[tuple[float, bytes], list[int]] = {}
    for index in doubtful.tolist():
        groups.setdefault((float(individual[index]), embeddings[index].tobytes()), []).append(index)
    return {group[0]: group[::-1] for group in groups.values() if len(group) > 1}
