"""What a report says of one selection: coverage of the bootstrap, clusters, minimum shares. Pure: no files, no plots, no HTML."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_GROUPS = 200
_SEPARATE_USES = 12


def coverage_figures(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """How many samples the bootstrap rollouts measure, with the histogram of their uses cut short enough to draw.

    Args:
        bootstrap: ``rollouts``, ``distinct_samples``, ``distinct_sets``, ``max_uses`` and ``uses``: how many samples are
            in 1, 2, 3 ... rollouts.

    Returns:
        All but ``uses``; ``places``, samples of all rollouts counted as often as they occur; and ``histogram``,
        ``[first, last, samples]``: so many samples are in ``first`` to ``last`` rollouts.
    """
    uses = bootstrap["uses"]
    return {
        **{name: bootstrap[name] for name in ("rollouts", "distinct_samples", "distinct_sets", "max_uses")},
        "places": sum(number * samples for number, samples in enumerate(uses, start=1)),
        "histogram": [[first, last, sum(uses[first - 1 : last])] for first, last in use_bins(len(uses))],
    }


def use_bins(max_uses: int) -> list[tuple[int, int]]:
    """Ranges of numbers of uses from 1 to ``max_uses``: one each where they are few, else doubling in width."""
    if max_uses <= _SEPARATE_USES:
        return [(number, number) for number in range(1, max_uses + 1)]
    return [(1 << power, min((2 << power) - 1, max_uses)) for power in range(max_uses.bit_length())]


def cluster_figures(sizes: Sequence[int], selected: Sequence[int]) -> dict[str, Any]:
    """Sizes of the clusters and what was chosen of each, as short for 10,000 clusters as for 16.

    Args:
        sizes: candidates in each cluster, at least one in all.
        selected: chosen ones in each.

    Returns:
        ``clusters`` that hold candidates and ``empty`` ones; ``smallest``, ``median`` and ``largest`` size; ``share``
        chosen of all candidates; the clusters of which nothing (``untouched``) and everything (``whole``) was chosen;
        and ``groups``, ``[samples, chosen]`` in falling order of the share chosen: single clusters, or neighbours in
        that order put together where there are many.
    """
    sizes_array, chosen = np.asarray(sizes, np.int64), np.asarray(selected, np.int64)
    filled = sizes_array > 0
    num_empty = int((~filled).sum())
    sizes_array, chosen = sizes_array[filled], chosen[filled]
    order = np.lexsort((-sizes_array, -chosen / sizes_array))
    sizes_array, chosen = sizes_array[order], chosen[order]
    total = int(sizes_array.sum())
    group = (np.cumsum(sizes_array) - sizes_array) * _MAX_GROUPS // total if len(order) > _MAX_GROUPS else np.arange(len(order))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return {
        "clusters": len(order),
        "empty": num_empty,
        "smallest": int(sizes_array.min()),
        "median": float(np.median(sizes_array)),
        "largest": int(sizes_array.max()),
        "share": int(chosen.sum()) / total,
        "untouched": int((chosen == 0).sum()),
        "whole": int((chosen == sizes_array).sum()),
        "groups": [
            list(pair) for pair in zip(*(np.add.reduceat(values, starts).tolist() for values in (sizes_array, chosen)), strict=True)
        ],
    }


def source_shares(counts: dict[str, Any], by_kind: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """``{kind: {"minimum", "selected", "candidates", "reserved"}}`` of the kinds that a least share was set for.

    The least share is of the budget's tokens, that of the selected of the tokens selected, that of the candidates of
    samples; ``reserved`` says whether the kind got its share only because it was set.

    Args:
        counts: of the selection, with ``minimum_source_share``.
        by_kind: samples ``selected`` and ``candidates`` of each kind.
    """
    candidates = sum(kind["candidates"] for kind in by_kind.values())
    return {
        fact["kind"]: {
            "minimum": fact["minimum_tokens"] / counts["budget_tokens"],
            "selected": fact["selected_tokens"] / max(1, counts["selected_tokens"]),
            "candidates": by_kind.get(fact["kind"], {}).get("candidates", 0) / candidates if candidates else None,
            "reserved": fact["reserved"],
        }
        for fact in counts["minimum_source_share"]
    }


def selection_figures(provenance: dict[str, Any]) -> dict[str, Any]:
    """``coverage``, ``clusters``, ``source_shares`` and ``examples`` of a round, those it has."""
    oracle, counts = provenance.get("oracle") or {}, provenance.get("counts") or {}
    figures: dict[str, Any] = {}
    if bootstrap := oracle.get("bootstrap"):
        figures["coverage"] = coverage_figures(bootstrap)
    if sum(counts.get("cluster_sizes") or []):
        figures["clusters"] = cluster_figures(counts["cluster_sizes"], counts["cluster_selected"])
    if counts.get("minimum_source_share"):
        figures["source_shares"] = source_shares(counts, provenance.get("selected_by_kind", {}))
    examples = provenance.get("examples") or {}
    if any(itertools.chain.from_iterable(examples.values())):
        figures["examples"] = examples
    return figures


def overlap_by_chance(counts: dict[str, Any]) -> float | None:
    """The share of one selection that is also in another where both draw at random; None where the counts are not known."""
    candidates, selected = counts.get("candidates"), counts.get("selected")
    return selected / candidates if candidates and selected is not None else None
