"""Paired comparisons of arms over seeds: t-intervals of differences, and what they separate. Pure NumPy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t-interval.

    Attributes:
        mean: nan without values.
        half_width: half of the 95 % interval; nan with fewer than two values.
        count: values.
    """

    mean: float
    half_width: float
    count: int

    @property
    def verdict(self) -> str:
        """Whether the interval of a difference leaves 0 out, and on which side."""
        if not self.half_width < abs(self.mean):
            return "not separated"
        return "lower" if self.mean < 0 else "higher"

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """``mean +- half width``, or a dash where there is no value."""
        if not self.count:
            return "-"
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if math.isnan(self.half_width) else f"{mean} +- {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean of ``values``, one from each seed, with its t-interval."""
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if count == 1:
        return Interval(mean, math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, student_quantile(0.5 + LEVEL / 2, count - 1) * error, count)


def paired_interval(values: Mapping[int, float], base: Mapping[int, float]) -> Interval:
    """Interval of ``values - base`` over the seeds that both have: what a seed does to both cancels."""
    return interval([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile, for a probability in [0.5, 1), of Student's t distribution with ``degrees`` >= 1 degrees of freedom.

    With x = sqrt(degrees) tan(a), the density becomes a power of cos(a) on a finite range, which is summed finely.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(2.0 * probability - 1.0, mass / mass[-1], angles)
    return math.sqrt(degrees) * math.tan(angle)
