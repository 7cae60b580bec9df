"""What the oracle measures with where the config leaves it open; pure."""

from __future__ import annotations

from megatron_groupmates.config.schedule import learning_rate
from megatron_groupmates.config.sections import Config

GRADIENT_LEARNING_RATE = 3e-4
"""Up to which the gradient at the checkpoint tells what a step does; far above it exact increments go their own ways
(``tools/bench/bench_estimators.py``: rank correlation .94 at 3e-4, .39 at 3e-3)."""


def oracle_estimator(config: Config) -> str:
    """``exact``, ``first_order`` or ``directional``: the one asked for.

    ``auto`` is ``exact`` in the paper recipe. Elsewhere it is ``first_order``, which fits best for its FLOPs.
    """
    chosen = config.oracle.estimator
    if chosen != "auto":
        return chosen
    return "exact" if config.selection.recipe == "paper" else "first_order"


def oracle_learning_rate(config: Config, step: int, scheduled: float | None = None) -> float:
    """Learning rate of the oracle's steps from the checkpoint of ``step`` optimizer steps.

    The oracle's own where it has one, else the trainer's at its next step, for estimators that go by the gradient at the
    checkpoint no higher than :data:`GRADIENT_LEARNING_RATE`.

    Args:
        config: the run.
        step: of the checkpoint.
        scheduled: the trainer's at its next step where the checkpoint says it; None to follow the config's schedule.
    """
    own = config.oracle.learning_rate
    if own is not None:
        return own
    if scheduled is None:
        scheduled = learning_rate(config, step + 1)
    return scheduled if oracle_estimator(config) == "exact" else min(scheduled, GRADIENT_LEARNING_RATE)
