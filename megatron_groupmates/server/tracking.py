"""What W&B gets of a round: cost of its stages, quality of its fits, bootstrap coverage, overlap. Pure."""

from __future__ import annotations

from typing import Any

from megatron_groupmates.server.stage_names import stage_family

_FITS = ("init", "final")
_MODELS = ("relational", "individual", "constant")
_COVERAGE = ("rollouts", "distinct_samples", "distinct_sets", "max_uses")


def round_values(number: int, provenance: dict[str, Any]) -> dict[str, float]:
    """The numbers of one round by flat names, from the provenance of generation ``number``; absent parts are absent.

    ``generation``; ``stage/<stage>/seconds`` and ``/flops``, those of one family summed; ``fit/<init or final>/<model>/<measure>``
    on held-out rollouts; ``bootstrap/<measure>`` of coverage; ``overlap/<method>``, the part of the selection that the
    other method selects too.
    """
    values: dict[str, float] = {"generation": number}
    for stage, cost in provenance.get("stages", {}).items():
        for unit in ("seconds", "flops"):
            name = f"stage/{stage_family(stage)}/{unit}"
            values[name] = values.get(name, 0.0) + cost.get(unit, 0.0)
    fit = provenance.get("fit") or {}
    for name in _FITS:
        for model in _MODELS:
            measures = fit.get(name, {}).get(model, {})
            values |= {f"fit/{name}/{model}/{measure}": value for measure, value in measures.items()}
    coverage = (provenance.get("oracle") or {}).get("bootstrap") or {}
    values |= {f"bootstrap/{name}": coverage[name] for name in _COVERAGE if name in coverage}
    method = provenance.get("method")
    shares = provenance.get("overlap", {}).get("share", {}).get(method, {})
    return values | {f"overlap/{other}": share for other, share in shares.items() if other != method}
