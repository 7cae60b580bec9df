"""Plots of what was selected: kinds, influences, clusters, overlap, and how often the bootstrap used its samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from megatron_groupmates.report.figures import generations_with, overlap_matrix
from megatron_groupmates.report.plots import INK, POOL_COLOUR, SELECTED_COLOUR, heat_map

_COLUMNS = 2
_MAX_OUTLINED = 64
_MANY_BINS = 6


def kinds_plot(summary: dict[str, Any]) -> Figure | None:
    """Share of each kind's candidates that each generation selected; by the last generation's share, highest first."""
    found = generations_with(summary, "selected_by_kind")
    if not found:
        return None
    tables = [
        {kind: counts["selected"] / counts["candidates"] for kind, counts in generation["selected_by_kind"].items() if counts["candidates"]}
        for _, generation in found
    ]
    kinds = sorted({kind for table in tables for kind in table}, key=lambda kind: (-tables[-1].get(kind, -1.0), kind))
    values = np.array([[table.get(kind, math.nan) for table in tables] for kind in kinds])
    columns = [f"{label}\n{generation['generation']}" for label, generation in found]
    figure = Figure(figsize=(2.2 + 0.8 * len(columns), 1 + 0.27 * len(kinds)))
    axes = figure.add_subplot()
    heat_map(axes, values, kinds, columns)
    axes.xaxis.tick_top()
    return figure


def influence_plot(summary: dict[str, Any]) -> Figure | None:
    """Predicted individual influence of the pool and of what was selected, a panel for each generation."""
    found = generations_with(summary, "influence_histogram")
    if not found:
        return None
    columns = 2 if len(found) == 4 else min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.4 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in panels[len(found) :]:
        axes.remove()
    for number, (axes, (label, generation)) in enumerate(zip(panels, found, strict=False)):
        histogram = generation["influence_histogram"]
        edges = np.array(histogram["edges"], dtype=np.float64)
        for name, colour, alpha in (("pool", POOL_COLOUR, 0.55), ("selected", SELECTED_COLOUR, 0.75)):
            axes.stairs(histogram[name], edges, fill=True, color=colour, alpha=alpha, label=name)
        if edges[0] < 0 < edges[-1]:
            axes.axvline(0, color=INK, linewidth=0.7, alpha=0.5)
        axes.set_title(f"{label}, generation {generation['generation']}")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if number == 0:
            figure.legend(loc="outside upper center", ncols=2, fontsize=9)
            axes.set_ylabel("samples")
        axes.set_xlabel("individual influence")
    return figure


def overlap_plot(summary: dict[str, Any]) -> Figure | None:
    """Overlap of the methods' selections, a matrix for the last generation of each run that has one."""
    found = list(dict(generations_with(summary, "overlap")).items())
    if not found:
        return None
    figure, panels = _panels(len(found), 4.2, 2.8)
    for axes, (label, generation) in zip(panels, found, strict=True):
        names, matrix = overlap_matrix(generation["overlap"]["share"])
        heat_map(axes, np.array(matrix), names, names)
        axes.set_title(f"{label}, generation {generation['generation']}")
    return figure


def clusters_plot(summary: dict[str, Any]) -> Figure | None:
    """Share chosen of each cluster, most first, as wide as the cluster has samples; a panel for each run's last generation."""
    found = list(dict(generations_with(summary, "clusters")).items())
    if not found:
        return None
    figure, panels = _panels(len(found), 4.6, 2.5)
    for axes, (label, generation) in zip(panels, found, strict=True):
        clusters = generation["clusters"]
        samples, chosen = np.array(clusters["groups"], dtype=np.float64).T
        edges = np.concatenate([[0.0], np.cumsum(samples)]) / samples.sum()
        shares = chosen / samples
        axes.stairs(shares, edges, fill=True, color=SELECTED_COLOUR, alpha=0.75)
        if len(shares) <= _MAX_OUTLINED:
            axes.vlines(edges[1:-1], 0, np.maximum(shares[:-1], shares[1:]), color=INK, linewidth=0.6, alpha=0.6)
        axes.axhline(clusters["share"], color=INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), title=f"{label}, generation {generation['generation']}")
        axes.set_xlabel(f"candidates, by cluster ({clusters['clusters']:,})")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("share chosen")
    return figure


def coverage_plot(summary: dict[str, Any]) -> Figure | None:
    """How many samples the bootstrap used how often, a panel for each run's last generation that has one."""
    found = list(dict(generations_with(summary, "coverage")).items())
    if not found:
        return None
    figure, panels = _panels(len(found), 4.2, 2.4)
    for axes, (label, generation) in zip(panels, found, strict=True):
        histogram = generation["coverage"]["histogram"]
        names = [str(first) if first == last else f"{first}-{last}" for first, last, _ in histogram]
        bars = axes.bar(names, [samples for _, _, samples in histogram], color=SELECTED_COLOUR, alpha=0.75, width=0.8)
        axes.bar_label(bars, labels=[f"{samples:,}" if samples else "" for _, _, samples in histogram], fontsize=8.5, padding=2)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
        axes.tick_params(axis="x", rotation=45 if len(names) > _MANY_BINS and max(map(len, names)) > 3 else 0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set(title=f"{label}, generation {generation['generation']}", xlabel="rollouts a sample is in")
    panels[0].set_ylabel("samples")
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of ``count`` panels of that size in inches, two in a row, and its axes."""
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]
