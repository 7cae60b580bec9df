"""The nearest centroid of every row, exactly: fast scores of all, and float64 where their rounding leaves a doubt.

Scores of all rows with all centroids come from one matrix product, in float32, or in bfloat16 on a CPU that multiplies that
faster. How far such a score can lie from the true one follows from what rounding took away; centroids within that distance of
a row's best are scored again in float64. So neither precision nor blocks, threads or devices show in the labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_groupmates.parallel.device import has_fast_bfloat16

PRECISIONS = ("auto", "float32", "bfloat16")

_BLOCK_ROWS = 2048
_EXACT_PAIRS = 1024
_ROOM = 1 + 1e-4  # for the rounding of the bounds themselves
_TINY = 1e-30  # above all that underflow can take from a score


class Assigner:
    """Labels rows by their nearest centroid: the largest inner product in float64, the lowest cluster among equals."""

    def __init__(self, centroids: np.ndarray, device: torch.device | str = "cpu", precision: str = "auto") -> None:
        """Of ``centroids`` float32 ``[C, d]``, C > 0.

        Args:
            centroids: of unit length where the nearest is meant by cosine.
            device: for the matrix products.
            precision: of the fast scores, one of ``PRECISIONS``; ``auto`` is bfloat16 on a CPU with :func:`has_fast_bfloat16`.
        """
        assert precision in PRECISIONS and centroids.ndim == 2 and len(centroids)
        self._device = torch.device(device)
        if precision == "auto":
            precision = "bfloat16" if self._device.type == "cpu" and has_fast_bfloat16() else "float32"
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._exact = centroids.astype(np.float64)
        # The same vector taken from all centroids changes no row's best, and what is left is shorter: rounding takes less of it.
        centred = self._exact - self._exact.mean(axis=0)
        kept = torch.from_numpy(centred).to(self._dtype)
        lost = kept.double().numpy() - centred
        self._length = float(np.linalg.norm(centred, axis=1).max())
        self._lost = float(np.linalg.norm(lost, axis=1).max())
        self._columns = kept.T.contiguous().to(self._device)

    def __call__(self, rows: np.ndarray, done: Callable[[int], object] | None = None) -> np.ndarray:
        """Labels int32 ``[k]`` of ``rows`` ``[k, d]``, which are read as float32; ``done`` is told of the rows of each block."""
        labels = np.empty(len(rows), np.int32)
        for first in range(0, len(rows), _BLOCK_ROWS):
            block = np.ascontiguousarray(rows[first : first + _BLOCK_ROWS], np.float32)
            labels[first : first + len(block)] = self._label(block)
            if done is not None:
                done(len(block))
        return labels

    def _label(self, block: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(block).to(self._device)
        kept = given.to(self._dtype)
        row, column = _contenders(kept @ self._columns, self._errors(given, kept))
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        labels = column[starts]
        # A row of zeros is as near to each centroid as to any other: its first is the lowest, and needs no other score.
        contested = np.diff(starts, append=len(row)) > 1
        contested[contested] = block[contested].any(axis=1)
        pairs = np.flatnonzero(contested[row])
        if len(pairs):
            row, column = row[pairs], column[pairs]
            order = np.lexsort((column, -self._score(block, row, column), row))
            best = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
            labels[row[best]] = column[best]
        return labels

    def _errors(self, given: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """By how much a sum of products can differ from the true score, float32 ``[k]``."""
        widened = kept.float()
        length = torch.linalg.vector_norm(widened, dim=1)
        lost = torch.linalg.vector_norm(given - widened, dim=1) if self._dtype != torch.float32 else 0.0
        terms = (given.shape[1] + 4) * torch.finfo(torch.float32).eps
        return _ROOM * (lost * self._length + length * (self._lost + terms * (self._length + self._lost))) + _TINY

    def _score(self, block: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """float64 scores of pairs, each by itself, so that equal rows score bitwise alike."""
        parts = [
            np.vecdot(block[row[first : first + _EXACT_PAIRS]].astype(np.float64), self._exact[column[first : first + _EXACT_PAIRS]])
            for first in range(0, len(row), _EXACT_PAIRS)
        ]
        return np.concatenate(parts)


def _contenders(scores: torch.Tensor, errors: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, column) int64, by row, then column, that may hold the largest true score of their row; each row has one.

    ``scores`` ``[k, C]`` lie within ``errors`` ``[k]`` and their own rounding of the true ones.
    """
    best = scores.amax(dim=1).float()
    unit = torch.finfo(scores.dtype).eps / 2 * _ROOM
    least = best - unit * best.abs() - 2 * errors
    limit = torch.where(least > 0, least / (1 + unit), least / (1 - unit))
    rounded = limit.to(scores.dtype)
    # Rounded up, a limit would shut out what lies on it.
    limit = torch.where(rounded.float() > limit, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)
    if scores.device.type != "cpu":
        row, column = (scores >= limit[:, None]).nonzero(as_tuple=True)
        return row.cpu().numpy(), column.cpu().numpy()
    if scores.dtype == torch.bfloat16:
        # Positive numbers are in the order of their bits, and negative ones below them.
        positive = bool((limit > 0).all())
        scores, limit = (values.view(torch.int16) if positive else values.float() for values in (scores, limit))
    # NumPy finds the few that are set several times faster.
    flat = np.flatnonzero(scores.numpy() >= limit.numpy()[:, None])
    return np.divmod(flat, scores.shape[1])
