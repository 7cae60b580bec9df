"""The selection stage: which rows, by which method, and what the report shows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.baselines import overlap
from megatron_groupmates.selection.select import select_rows
from megatron_groupmates.server.context import Arrays, RoundContext
from megatron_groupmates.utils.files import read_json, write_json

_HISTOGRAM_BINS = 60


def select_generation(
    context: RoundContext, available: np.ndarray, relation: Relation | None, reference_features: np.ndarray | None
) -> dict[str, Any]:
    """Select among the ``available`` rows with the configured method; keeps the rows as stage ``selection``. Collective.

    Args:
        context: the round, its pool embedded unless the method is ``random``.
        available: int64, pool rows that training has not consumed.
        relation: the fitted relation, for ``group`` and ``individual``.
        reference_features: float32 ``[m, F]``, for ``similarity``.

    Returns:
        What provenance says of the selection: counts, shares by kind, histogram of influences, overlap of the methods.
    """
    report_path = context.directory / "selection.report.json"

    def collect() -> Arrays:
        rows, report = _select(context, available, relation, reference_features)
        write_json(report_path, report)
        return {"rows": rows}

    context.stage("selection", collect)
    return read_json(report_path)


def _select(
    context: RoundContext, available: np.ndarray, relation: Relation | None, reference_features: np.ndarray | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Selected pool rows int64, ascending, and the report. What is embedded, and selected among, is ``available`` alone."""
    method = context.config.selection.method
    arrays = context.arrays("embeddings") if method != "random" else {}
    lengths = context.pool.lengths[available].astype(np.int64)
    embeddings, reference = arrays.get("embeddings"), reference_features
    if reference is not None:
        embeddings, reference = _centred(embeddings, reference)
    inputs: dict[str, Any] = {
        "lengths": lengths,
        "candidates": np.ones(len(available), dtype=bool),
        "budget_tokens": int(context.config.selection.ratio * lengths.sum()),
        "seed": context.seed("selection"),
        "recipe": context.recipe.selection,
        "embeddings": embeddings,
        "individual": arrays.get("individual"),
        "relation": relation,
        "reference_embeddings": reference,
    }
    result = select_rows(method, **inputs)
    report: dict[str, Any] = {"counts": result.report, "selected_by_kind": _by_kind(context.pool, available, available[result.rows])}
    if relation is not None:
        others = {name: select_rows(name, **inputs).rows for name in ("group", "individual", "random") if name != method}
        report["overlap"] = overlap({method: result.rows, **others})
        report["influence_histogram"] = _histogram(arrays["individual"], result.rows)
    return available[result.rows], report


def _centred(embeddings: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features minus the pool's mean over its deviation: raw hidden states share one large direction that hides all differences."""
    mean, std = embeddings.mean(0), embeddings.std(0)
    std = np.where(std > 0, std, 1.0)
    return (embeddings - mean) / std, (reference - mean) / std


def _by_kind(pool: Any, available: np.ndarray, rows: np.ndarray) -> dict[str, dict[str, int]]:
    names = [*pool.kinds, "unknown"]
    counts = {
        name: np.bincount(pool.kind_of[which] % len(names), minlength=len(names))
        for name, which in (("candidates", available), ("selected", rows))
    }
    return {
        name: {"selected": int(counts["selected"][number]), "candidates": int(counts["candidates"][number])}
        for number, name in enumerate(names)
        if counts["candidates"][number]
    }


def _histogram(individual: np.ndarray, selected: np.ndarray) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(individual, bins=_HISTOGRAM_BINS)
    return {
        "edges": edges.tolist(),
        "pool": np.histogram(individual, edges)[0].tolist(),
        "selected": np.histogram(individual[selected], edges)[0].tolist(),
    }
