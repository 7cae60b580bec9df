"""What a report says of the oracle of each round: estimator, budget, noise, throughput. Pure: no files, no plots, no HTML."""

from __future__ import annotations

import math
from typing import Any

from megatron_groupmates.server.stage_names import stage_family

SHARES = ("step", "evaluation", "restore")
_RATES = ("rollouts_per_second", "tokens_per_second")


def throughput(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """``{stage: {"rollouts_per_second", "tokens_per_second", "step", "evaluation", "restore"}}`` of the stages that have a rate.

    Batches of one stage are one row, weighted by their seconds. The last three are shares of the time; what was not
    measured is None.
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for stage, cost in stages.items():
        if any(cost.get(name) is not None for name in _RATES):
            families.setdefault(stage_family(stage), []).append(cost)
    return {
        family: {name: _weighted([(cost.get("seconds", 0.0), cost.get(name)) for cost in costs]) for name in _RATES}
        | {name: _weighted([(cost.get("seconds", 0.0), (cost.get("share") or {}).get(name)) for cost in costs]) for name in SHARES}
        for family, costs in families.items()
    }


def _weighted(pairs: list[tuple[float, float | None]]) -> float | None:
    """Mean of the values that are not None by their weights; their plain mean where no weight is above 0."""
    known = [(weight, float(value)) for weight, value in pairs if value is not None]
    if not known:
        return None
    total = sum(weight for weight, _ in known)
    if total <= 0:
        return sum(value for _, value in known) / len(known)
    return sum(weight * value for weight, value in known) / total


def fell_back(oracle: dict[str, Any]) -> bool:
    """Whether the round used ``exact`` in place of the estimator it was asked for."""
    return bool((oracle.get("validation") or {}).get("fell_back"))


def fallback_note(oracle: dict[str, Any]) -> str:
    """Why a round that fell back did so, to follow the round's name and a colon."""
    validation = oracle["validation"]
    return (
        f"the round FELL BACK to exact. Its estimator, {oracle['requested']}, agreed with exact increments to a rank correlation of "
        f"{_three_digits(validation['spearman'])}, below the floor of {_three_digits(validation['floor'])}."
    )


def different_estimators_note(used: dict[str, set[str]]) -> str | None:
    """A sentence where the runs of a report did not measure influences alike.

    Args:
        used: estimators of the rounds of each run that has any.
    """
    if len({frozenset(names) for names in used.values()}) < 2:
        return None
    listed = "; ".join(f"{label}: {', '.join(sorted(names))}" for label, names in used.items())
    return f"The runs measured influences by different estimators ({listed}): they differ in more than the method of selection."


def _three_digits(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
