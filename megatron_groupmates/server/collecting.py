"""How many random rollouts a round measures: a fixed number, or until more of them stop bettering the fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_groupmates.influence.fit import held_out_spearman
from megatron_groupmates.influence.labels import influence_labels
from megatron_groupmates.influence.oracle import draw_random_rollouts
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.server.context import Arrays, RoundContext
from megatron_groupmates.server.estimating import Oracle
from megatron_groupmates.server.fitting import Candidates, fit_flops
from megatron_groupmates.server.stages import measure_oracles


def collect_random(
    context: RoundContext, probe: Probe, candidates: Candidates, oracle: Oracle
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Draw and measure the round's random rollouts. Collective.

    An adaptive budget measures a prefix of what the fixed one would: which rollouts come first does not depend on where it stops.

    Returns:
        Candidate numbers int64 ``[R, T]``, reference losses float64 ``[R, T + 1]``, and ``budget`` of ``oracle.json``.
    """
    settings = context.config.oracle
    maximum = settings.num_random_rollouts
    rollouts = draw_random_rollouts(maximum, settings.rollout_length, len(candidates.rows), context.seed("random rollouts"))
    budget: dict[str, Any] = {"kind": settings.budget, "maximum": maximum, "curve": []}
    name = oracle.rollout_stage("oracle_random")
    if settings.budget == "fixed":
        losses = measure_oracles(context, name, probe, candidates.rows, rollouts, oracle.rollout_estimator)
        return rollouts, losses, {**budget, "stopped": "fixed"}

    parts: list[np.ndarray] = []
    for number, first in enumerate(range(0, maximum, settings.budget_batch)):
        batch = rollouts[first : first + settings.budget_batch]
        parts.append(measure_oracles(context, f"{name}.batch-{number:06d}", probe, candidates.rows, batch, oracle.rollout_estimator))
        collected = rollouts[: first + len(batch)]
        budget["curve"].append(_curve_point(context, number, candidates, collected, np.concatenate(parts), oracle))
        if len(collected) < maximum and stopped_improving([point["spearman"] for point in budget["curve"]], settings.budget_patience):
            return collected, np.concatenate(parts), {**budget, "stopped": "patience"}
    return rollouts, np.concatenate(parts), {**budget, "stopped": "maximum"}


def stopped_improving(values: list[float], patience: int) -> bool:
    """Whether the best of ``values`` lies ``patience`` or more entries before the last; of equal ones the first is the best."""
    return len(values) - 1 - int(np.argmax(values)) >= patience


def _curve_point(
    context: RoundContext, number: int, candidates: Candidates, rollouts: np.ndarray, losses: np.ndarray, oracle: Oracle
) -> dict[str, Any]:
    """Held-out Spearman of a fit to the ``rollouts`` so far; kept, so that a killed round decides alike. Collective.

    Held out is the first half of the first batch, at every point: were it another part each time, the points would differ by
    the luck of the split as much as by the number of rollouts. The fits that the round goes on with make their own split.
    """
    num_held_out = min(context.config.oracle.budget_batch, context.config.oracle.num_random_rollouts) // 2
    point: Arrays = {}

    def fit() -> None:
        labels = influence_labels(losses, context.recipe.labels, context.config.optimizer.beta1)
        value = held_out_spearman(
            candidates.source,
            rollouts,
            labels,
            context.recipe.fit,
            context.seed("fit"),
            np.arange(num_held_out),
            dist.group.WORLD,
            individual=oracle.dense,
        )
        point.update(rollouts=np.array(len(rollouts)), spearman=np.array(value))

    name = f"{oracle.fit_stage('budget')}.batch-{number:06d}"
    context.stage(name, lambda: point, fit, flops=fit_flops(context, candidates, rollouts))
    kept = context.arrays(name)
    return {"rollouts": int(kept["rollouts"]), "spearman": float(kept["spearman"])}
