"""Plots of a report as SVG text that takes its text and line colour from the page (light or dark)."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_groupmates.report.figures import RANDOM, generations_with

INK = "#123456"  # stands for the page's text colour until the SVG is written
_ARM_COLOURS = {"random": "#8c8c8c", "group": "#2f6fdb", "individual": "#e08a1e", "similarity": "#2a9d74", "no selection": "#b07aa1"}
COLOURS = ("#c8553d", "#7a5ccf", "#3ba7c9", "#b8a12f", "#d1619c", "#5f7d3b", "#8d6e63")
POOL_COLOUR, SELECTED_COLOUR = "#9aa4b2", "#2f6fdb"
_OTHER, _OTHER_COLOUR = "other stages", "#c9ced6"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextlib.contextmanager
def style(name: str) -> Iterator[None]:
    """The settings of every plot; ``name`` keeps ids distinct between the plots of a page, and output repeatable."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def svg(figure: Figure, description: str) -> str:
    """A figure as an ``<svg>`` element: no declarations, metadata or addresses; ink in the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"|font-family: [^;"]*;?', "", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = f'role="img" aria-label="{description}"'
    return re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', rf'\1 {label} style="max-width:\2pt"', text, count=1)


def arm_colours(summary: dict[str, Any]) -> dict[str, str]:
    """A colour for each run; the first run of a method has the method's own."""
    colours: dict[str, str] = {}
    spare = iter(COLOURS * len(summary["arms"]))
    for label, arm in summary["arms"].items():
        own = _ARM_COLOURS.get(arm["arm"])
        colours[label] = own if own and own not in colours.values() else next(spare)
    return colours


def evaluation_plot(summary: dict[str, Any]) -> Figure:
    """Evaluation loss against training tokens, a line for each run, a mark where a generation came into force.

    With a random run there is a second panel: each run's loss less the first random run's at the same tokens.
    """
    colours = arm_colours(summary)
    arms = {label: arm for label, arm in summary["arms"].items() if arm["evaluations"]}
    curves = {label: np.array(arm["evaluations"], dtype=np.float64).T for label, arm in arms.items()}
    baseline = next((curves[label] for label, arm in arms.items() if arm["arm"] == RANDOM), None)
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    panels = figure.subplots(1, 1 if baseline is None else 2, squeeze=False)[0]
    for label, arm in arms.items():
        tokens, losses = curves[label]
        adopted = [at for at in adoptions(arm) if tokens[0] <= at <= tokens[-1]]
        _curve(panels[0], tokens, losses, adopted, colours[label], f"{label} ({losses[-1]:.3f})")
        if baseline is not None:
            # Before random's first evaluation, where it branched off, there is nothing to compare with.
            shared = tokens >= baseline[0, 0]
            difference = losses[shared] - np.interp(tokens[shared], *baseline)
            _curve(panels[1], tokens[shared], difference, [at for at in adopted if at >= baseline[0, 0]], colours[label], label)
    if any(adoptions(arm) for arm in arms.values()):
        panels[0].plot([], [], "v", color=INK, markersize=7, label="new generation in force")
    for axes, name in zip(panels, ("evaluation loss (nats per token)", "difference from random"), strict=False):
        for at in sorted({arm["branch_tokens"] for arm in arms.values() if arm["branch_tokens"]}):
            axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (2, 3)), alpha=0.6)
        axes.set(xlabel="training tokens (dotted: the arms branch)", ylabel=name)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].legend(loc="upper right", fontsize=9)
    return figure


def adoptions(arm: dict[str, Any]) -> list[int]:
    """Training tokens at which the generations of a run came into force."""
    tokens = (generation["effective_tokens"] for generation in arm["generations"])
    return [at for at in tokens if at is not None]


def _curve(axes: Axes, tokens: np.ndarray, values: np.ndarray, marks: Sequence[float], colour: str, label: str) -> None:
    """One run's line with triangles at ``marks`` (tokens)."""
    axes.plot(tokens, values, color=colour, linewidth=1.8, label=label, zorder=3)
    axes.plot(
        marks, np.interp(marks, tokens, values), "v", color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.8, zorder=4
    )


def heat_map(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Percentages (0 to 1, NaN for none) on a blue scale, each printed in its cell."""
    largest = max(float(np.nanmax(values)), 1e-9)
    axes.pcolormesh(
        np.arange(len(columns) + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap="Blues",
        vmin=0,
        vmax=1.25 * largest,
        edgecolors="face",
        linewidth=0.3,
    )
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            axes.text(
                column, row, f"{value:.0%}", ha="center", va="center", fontsize=8.5, color="white" if value > 0.75 * largest else "#1c2733"
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def budget_plot(summary: dict[str, Any]) -> Figure | None:
    """Held-out Spearman of the relational model against the rollouts collected, a line for each round with an adaptive budget."""
    curves = {
        f"{label}, generation {generation['generation']}": [
            (point["rollouts"], point["spearman"]) for point in generation["oracle"]["budget"]["curve"] if point["spearman"] is not None
        ]
        for label, generation in generations_with(summary, "oracle")
        if generation["oracle"].get("budget")
    }
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(curves.items()):
        rollouts, spearman = zip(*points, strict=True)
        axes.plot(rollouts, spearman, "o-", color=COLOURS[number % len(COLOURS)], linewidth=1.8, markersize=4, label=label)
    axes.set(xlabel="random rollouts collected", ylabel="held-out Spearman")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(loc="best", fontsize=9)
    return figure


def _with_others(arms: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The tables of stages with the smallest put together, so that each of the others has a colour of its own.

    A stage is as large as its largest share of a run's seconds or FLOPs.
    """
    sizes: dict[str, float] = {}
    for table in arms.values():
        for unit in ("seconds", "flops"):
            total = sum(row[unit] for row in table.values()) or 1.0
            for stage, row in table.items():
                sizes[stage] = max(sizes.get(stage, 0.0), row[unit] / total)
    sizes.pop("training", None)
    small = set(sorted(sizes, key=lambda stage: -sizes[stage])[len(COLOURS) :])
    shown = {label: {stage: row for stage, row in table.items() if stage not in small} for label, table in arms.items()}
    for label, table in arms.items():
        if others := small & set(table):
            shown[label][_OTHER] = {unit: sum(table[stage][unit] for stage in sorted(others)) for unit in ("seconds", "flops")}
    return shown


def cost_plot(summary: dict[str, Any]) -> Figure | None:
    """Time and FLOPs of training and of each selection stage, a bar for each run."""
    arms = _with_others({label: arm["stages"] for label, arm in summary["arms"].items()})
    if not any(row["seconds"] or row["flops"] for table in arms.values() for row in table.values()):
        return None
    stages = list(dict.fromkeys(stage for table in arms.values() for stage in table))
    if _OTHER in stages:
        stages.append(stages.pop(stages.index(_OTHER)))
    figure = Figure(figsize=(9, 1.5 + 0.34 * len(arms)), layout="constrained")
    seconds_axes, flops_axes = figure.subplots(1, 2, sharey=True)
    for axes, unit in ((seconds_axes, "seconds"), (flops_axes, "flops")):
        left = np.zeros(len(arms))
        for number, stage in enumerate(stages):
            widths = np.array([table.get(stage, {}).get(unit, 0.0) for table in arms.values()])
            colour = {"training": POOL_COLOUR, _OTHER: _OTHER_COLOUR}.get(stage, COLOURS[(number - 1) % len(COLOURS)])
            axes.barh(list(arms), widths, left=left, height=0.62, color=colour, label=stage)
            left += widths
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("seconds" if unit == "seconds" else "FLOPs")
    seconds_axes.invert_yaxis()
    handles, labels = seconds_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(stages)), fontsize=9)
    return figure
