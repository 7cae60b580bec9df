"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from megatron_groupmates.config.sections import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step number ``step`` (counted from 1).

    Linear warm-up to the peak, then the peak for ever (constant), or cosine or WSD (stable, then linear over the last
    ``decay_fraction``) down to the minimum at :func:`decay_end` and after it.
    """
    settings = config.optimizer
    peak, low, warmup = settings.learning_rate, settings.min_learning_rate, settings.warmup_iters
    end = decay_end(config)
    if step <= warmup:
        return peak * step / warmup
    if settings.schedule == "constant":
        return peak
    if step >= end:
        return low
    if settings.schedule == "cosine":
        progress = (step - warmup) / (end - warmup)
        return low + 0.5 * (peak - low) * (1.0 + math.cos(math.pi * progress))
    decay_steps = wsd_decay_steps(settings.decay_fraction, end)
    if step <= end - decay_steps:
        return peak
    return low + (peak - low) * (end - step) / decay_steps


def decay_end(config: Config) -> int:
    """Step at which the schedule reaches its minimum."""
    return config.optimizer.decay_iters or config.training.train_iters


def wsd_decay_steps(decay_fraction: float, end: int) -> int:
    """Steps of the linear decay of a WSD schedule that ends at step ``end``."""
    return max(1, round(decay_fraction * end))
