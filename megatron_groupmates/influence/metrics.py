"""How well predictions fit labels: Spearman and Pearson correlation, mean squared and absolute error."""

from __future__ import annotations

import numpy as np


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64, of a flat array; equal values share the mean of their ranks."""
    values = np.asarray(values).ravel()
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse.reshape(-1)]


def pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Pearson correlation of two arrays of one shape; 0 where either does not vary."""
    predictions = _centred(predictions)
    targets = _centred(targets)
    scale = np.sqrt(predictions @ predictions) * np.sqrt(targets @ targets)
    return float(np.clip(predictions @ targets / scale, -1.0, 1.0)) if scale > 0 else 0.0


def spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Rank correlation of two arrays of one shape, ties by average rank; 0 where either does not vary."""
    return pearson(average_ranks(predictions), average_ranks(targets))


def mean_squared_error(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Mean of squared differences, in squared units of the targets."""
    return float(np.mean((np.asarray(predictions, np.float64) - np.asarray(targets, np.float64)) ** 2))


def mean_absolute_error(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Mean of absolute differences, in units of the targets."""
    return float(np.mean(np.abs(np.asarray(predictions, np.float64) - np.asarray(targets, np.float64))))


def fit_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """``spearman``, ``pearson``, ``mse`` and ``mae`` over all elements."""
    return {
        "spearman": spearman(predictions, targets),
        "pearson": pearson(predictions, targets),
        "mse": mean_squared_error(predictions, targets),
        "mae": mean_absolute_error(predictions, targets),
    }


def _centred(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64).ravel()
    if values.size == 0 or (values == values[0]).all():
        return np.zeros_like(values)
    return values - values.mean()
