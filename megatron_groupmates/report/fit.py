"""How well the influence models of each round predict, and whether relations help. Pure: no files, no plots, no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

FITS = ("init", "final")
MODELS = ("relational", "individual", "constant")
MEASURES = ("spearman", "pearson", "mse", "mae")
_EVIDENCE = {
    "first_position": "first samples of held-out rollouts",
    "all_positions": "all samples of held-out rollouts",
    "dense": "individual labels kept out of the fit",
}


def fit_quality(fit: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """``{"init" | "final": {model: {measure: value}}}`` on held-out rollouts, from the reports of a round's fits."""
    return {
        name: {model: {measure: fit[name][model].get(measure) for measure in MEASURES} for model in MODELS if model in fit[name]}
        for name in FITS
        if name in fit
    }


def relation_effects(fit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the relation term was worth in each fit of a round that says on how many rollouts it was tested.

    Returns:
        ``{"init" | "final": {"relational", "individual", "difference", "held_out_rollouts", "standard_error"}}``, Spearman
        correlations. The standard error is that of the weaker correlation, (1 - r^2) / sqrt(n - 1), with n the number of
        held-out rollouts: the samples of a rollout are not independent, so each rollout counts once. The difference of two
        models tested on the same rollouts varies less, so that a judgement by it errs on the safe side.
    """
    effects = {}
    for name in FITS:
        report = fit.get(name, {})
        with_relation, without = (_finite(report.get(model, {}).get("spearman")) for model in ("relational", "individual"))
        rollouts = report.get("held_out_rollouts")
        if with_relation is None or without is None or not rollouts:
            continue
        effects[name] = {
            "relational": with_relation,
            "individual": without,
            "difference": with_relation - without,
            "held_out_rollouts": rollouts,
            "standard_error": (1 - min(with_relation**2, without**2)) / math.sqrt(rollouts - 1) if rollouts > 1 else None,
        }
    return effects


def verdict(difference: float, standard_error: float | None) -> str:
    """``yes``, ``no, they hurt`` or ``not told apart``: whether a difference is above twice its standard error."""
    if standard_error is None or abs(difference) <= 2 * standard_error:
        return "not told apart"
    return "yes" if difference > 0 else "no, they hurt"


def relations_sentence(label: str, effects: Sequence[dict[str, Any]]) -> str:
    """Whether relations help in one run, in words.

    Args:
        label: of the run.
        effects: of the fits it selected with, one or more, as :func:`relation_effects` has them.
    """
    count = len(effects)
    means = {name: math.fsum(effect[name] for effect in effects) / count for name in ("relational", "individual", "difference")}
    errors = [effect["standard_error"] for effect in effects]
    error = None if None in errors else math.hypot(*errors) / count
    answer = {
        "yes": "relations help the prediction",
        "no, they hurt": "relations hurt the prediction",
        "not told apart": "it is not shown that relations help or hurt the prediction",
    }[verdict(means["difference"], error)]
    rollouts = sorted({effect["held_out_rollouts"] for effect in effects})
    tested = f"{rollouts[0]:,}" if len(rollouts) == 1 else f"{rollouts[0]:,} to {rollouts[-1]:,}"
    where = f"on {tested} held-out rollouts" if count == 1 else f"means of {count} rounds on {tested} held-out rollouts each"
    chance = "" if error is None else f"; standard error at most {error:.3f}"
    return (
        f"{label}: {answer}. Spearman is {means['relational']:.3f} with the relation term and {means['individual']:.3f} without "
        f"(difference {means['difference']:+.3f}, {where}{chance})."
    )


def sign_checks(fit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"init" | "final": {"correlation", "samples", "evidence", "refused"}}`` of the fits whose sign was checked.

    ``evidence`` says in words what the individual term was correlated with; ``refused`` counts the fits refused.
    """
    return {
        name: {
            "correlation": check["correlation"],
            "samples": check["samples"],
            "evidence": _EVIDENCE.get(check["kind"], check["kind"]),
            "refused": len(fit[name].get("attempts", [])) - (1 if fit[name].get("accepted", True) else 0),
        }
        for name in FITS
        if (check := fit.get(name, {}).get("sign_check"))
    }


def warm_starts(fit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"init" | "final": {"from", "spearman_before", "spearman", "spearman_from_scratch"}}`` of the fits that started warm."""
    return {name: warm for name in FITS if (warm := fit.get(name, {}).get("warm_start"))}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
