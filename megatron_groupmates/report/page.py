"""The report as one HTML page without any outside reference."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from megatron_groupmates.report import plots
from megatron_groupmates.report.figures import MEASURES, generations_with
from megatron_groupmates.report.oracle import SHARES, fallback_note, fell_back

_CSS = """
:root {
  color-scheme: light dark;
  --ink: #1f2933; --soft: #5b6775; --line: #d9dee5; --page: #f6f7f9; --card: #ffffff; --accent: #2f6fdb;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --soft: #96a2b0; --line: #313a45; --page: #14181d; --card: #1b2129; --accent: #7aa7f0; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 980px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; }
h2 { font-size: 1.12rem; margin: 0 0 6px; }
p { margin: 0 0 10px; }
.soft { color: var(--soft); font-size: 0.92rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 18px;
}
section.lead { border-left: 4px solid var(--accent); }
p.loud { border-left: 4px solid #c8553d; padding-left: 10px; font-weight: 600; }
section.lead ul { margin: 0; padding-left: 1.1em; }
figure { margin: 8px 0 0; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: 0 auto; color: var(--ink); font-family: inherit; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; margin-top: 8px;
  font-variant-numeric: tabular-nums; font-size: 0.93rem;
}
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: none; }
"""


def number(value: float | None, form: str = ",.3f", absent: str = "-") -> str:
    """A number for a table cell."""
    return absent if value is None else format(value, form)


def count(value: float | None) -> str:
    """A large count with a unit: 1.25M, 3.4T."""
    if value is None:
        return "-"
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """An HTML table; its first ``text_columns`` columns are text, the others are numbers. Cells are escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        tags = [f'<{tag} class="text">' if column < text_columns else f"<{tag}>" for column in range(len(cells))]
        return "".join(f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(tags, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>'


def section(title: str, explanation: str, content: str) -> str:
    """One card of the page."""
    heading = f'<h2>{html.escape(title)}</h2>\n<p class="soft">{html.escape(explanation)}</p>'
    return f"<section>{heading}\n{content}</section>\n"


def drawn(summary: dict[str, Any], title: str, plot: Callable[[dict[str, Any]], Figure | None]) -> str | None:
    """A plot as an HTML figure; None where there is nothing to draw."""
    with plots.style(title):
        figure = plot(summary)
        return None if figure is None else f"<figure>{plots.svg(figure, html.escape(title))}</figure>"


def evaluation_section(summary: dict[str, Any]) -> str:
    """Loss curves, final losses and token ratios."""
    title = "Evaluation loss"
    if not any(arm["evaluations"] for arm in summary["arms"].values()):
        return section(title, "Left out: no run has an evaluation yet.", "")
    rows = []
    for label, arm in summary["arms"].items():
        reached = arm["to_random_final_loss"]
        rows.append(
            [
                label,
                number(arm["final_evaluation_loss"]),
                count(arm["final_tokens"]),
                count(arm["selection"]["flops"]),
                count(arm["selection"]["equivalent_tokens"]),
                "not reached" if reached["tokens"] is None else count(reached["tokens"]),
                number(reached["ratio"], ".2f"),
                number(reached["ratio_with_selection"], ".2f"),
            ]
        )
    header = ["arm", "final loss", "tokens", "selection FLOPs", "as tokens", "tokens to random's loss", "ratio", "with selection"]
    explanation = (
        "Held-out documents that selection never sees. Tokens to random's loss: training tokens since the "
        "branch until the evaluation loss first reaches random's final one; ratio: as a share of random's; "
        "with selection: the FLOPs of the selection rounds begun by then are counted as training tokens of "
        "equal cost."
    )
    return section(title, explanation, (drawn(summary, title, plots.evaluation_plot) or "") + table(header, rows))


def plot_section(
    summary: dict[str, Any], title: str, explanation: str, absent: str, plot: Callable[[dict[str, Any]], Figure | None]
) -> str:
    """A section that is one plot."""
    figure = drawn(summary, title, plot)
    return section(title, explanation, figure) if figure else section(title, f"Left out: {absent}.", "")


def fit_section(summary: dict[str, Any]) -> str:
    """How well the influence models predict held-out rollouts."""
    title = "Fit to the oracle"
    rows = [
        [label, str(generation["generation"]), fit, model, *(number(metrics[measure]) for measure in MEASURES)]
        for label, generation in generations_with(summary, "fit")
        for fit, models in generation["fit"].items()
        for model, metrics in models.items()
    ]
    if not rows:
        return section(title, "Left out: no generation was made with an oracle.", "")
    explanation = (
        "On held-out rollouts. init: fitted to random rollouts; final: to random and bootstrap rollouts. "
        "individual: without the relation term; constant: predicts the mean."
    )
    header = ["arm", "generation", "fit", "model", "Spearman", "Pearson", "MSE", "MAE"]
    return section(title, explanation, table(header, rows, text_columns=4))


def oracle_section(summary: dict[str, Any]) -> str:
    """Which estimator each round used, and how well it agreed with exact increments."""
    title, found = "Oracle", generations_with(summary, "oracle")
    if not found:
        return section(title, "Left out: no generation says what its influences were measured with.", "")
    rows, loud = [], []
    for label, generation in found:
        oracle = generation["oracle"]
        validation = oracle.get("validation") or {}
        if fell_back(oracle):
            loud.append(f"{label}, generation {generation['generation']}: {fallback_note(oracle)}")
        rows.append(
            [
                label,
                str(generation["generation"]),
                oracle["estimator"] + (" (fell back)" if fell_back(oracle) else ""),
                oracle["requested"],
                number(oracle.get("learning_rate"), ".3g"),
                *(number(oracle["rollouts"][name], ",") for name in ("random", "bootstrap")),
                number(validation.get("rollouts"), ","),
                number(validation.get("spearman")),
                number(validation.get("floor")),
            ]
        )
    explanation = (
        "How the influences were measured. exact: the reference loss after every step; first_order: reference gradient times "
        "parameter change; directional: each candidate's loss along the reference gradient, beside exact rollouts. Rank correlation: "
        "Spearman of the requested estimator with exact increments on the rollouts checked; below the floor the round falls "
        "back to exact. An exact round has nothing to check."
    )
    header = ["arm", "generation", "used", "requested", "learning rate", "random", "bootstrap", "checked", "rank correlation", "floor"]
    remarks = "".join(f'<p class="loud">{html.escape(line)}</p>' for line in loud)
    return section(title, explanation, remarks + table(header, rows, text_columns=4))


def budget_section(summary: dict[str, Any]) -> str:
    """When the rounds with an adaptive budget stopped; empty where no round has one."""
    title = "Adaptive budget"
    rows = [
        [
            label,
            str(generation["generation"]),
            str(budget["stopped"]),
            number(generation["oracle"]["rollouts"]["random"], ","),
            number(budget["maximum"], ","),
            number(max((point["spearman"] for point in budget["curve"] if point["spearman"] is not None), default=None)),
        ]
        for label, generation in generations_with(summary, "oracle")
        if (budget := generation["oracle"].get("budget") or {}).get("kind") == "adaptive"
    ]
    if not rows:
        return ""
    explanation = (
        "Random rollouts are collected in batches until the relational model's Spearman on held-out rollouts stops improving (patience) "
        "or the maximum is reached."
    )
    header = ["arm", "generation", "stopped by", "random rollouts", "maximum", "best Spearman"]
    figure = drawn(summary, title, plots.budget_plot) or ""
    return section(title, explanation, figure + table(header, rows, text_columns=3))


def noise_section(summary: dict[str, Any]) -> str:
    """Agreement of exact increments between two reference sets; empty where no round measured it."""
    rows, skipped = [], []
    for label, generation in generations_with(summary, "oracle"):
        noise = generation["oracle"].get("noise") or []
        if isinstance(noise, dict):
            skipped.append(f"{label}, generation {generation['generation']}: not measured, {noise['skipped']}.")
            continue
        rows += [
            [
                label,
                str(generation["generation"]),
                number(row["learning_rate"], ".3g"),
                number(row["rollouts"], ","),
                number(row["spearman"]),
            ]
            for row in noise
        ]
    if not rows and not skipped:
        return ""
    explanation = (
        "Spearman between the exact increments of the same rollouts against two disjoint reference sets. At 1 the choice of reference "
        "examples does not matter; the nearer to 0, the more of the influence is the luck of that choice, and no model of it can predict "
        "another set's better than this."
    )
    remarks = "".join(f'<p class="soft">{html.escape(line)}</p>' for line in skipped)
    header = ["arm", "generation", "learning rate", "rollouts", "Spearman"]
    return section("Noise of the influences", explanation, remarks + (table(header, rows, text_columns=2) if rows else ""))


def throughput_section(summary: dict[str, Any]) -> str:
    """How fast the stages measured; empty where no round says."""
    rows = [
        [
            label,
            str(generation["generation"]),
            stage,
            count(rates["rollouts_per_second"]),
            count(rates["tokens_per_second"]),
            *(number(rates[share], ".0%") for share in SHARES),
        ]
        for label, generation in generations_with(summary, "throughput")
        for stage, rates in generation["throughput"].items()
    ]
    if not rows:
        return ""
    header = ["arm", "generation", "stage", "rollouts/s", "tokens/s", *SHARES]
    explanation = "Rates of the selection server; on the right, shares of the time in optimizer steps, reference evaluation and restoring."
    return section("Throughput", explanation, table(header, rows, text_columns=3))


def cost_section(summary: dict[str, Any]) -> str:
    """Time and FLOPs by stage."""
    title = "Cost"
    figure = drawn(summary, title, plots.cost_plot)
    if figure is None:
        return section(title, "Left out: no run has recorded time or FLOPs yet.", "")
    rows = [
        [label, stage, number(cost["seconds"], ",.1f"), count(cost["flops"])]
        for label, arm in summary["arms"].items()
        for stage, cost in arm["stages"].items()
    ]
    return section(
        title,
        "Training since the branch, and each stage of selection over all rounds.",
        figure + table(["arm", "stage", "seconds", "FLOPs"], rows, text_columns=2),
    )


def lead_section(summary: dict[str, Any]) -> str:
    """What the arms show, and what to know about the data."""
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in summary["conclusions"])
    remarks = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in summary["notes"])
    return f'<section class="lead"><h2>What the arms show</h2>\n<ul>{lines}</ul>{remarks}</section>\n'


def render_page(summary: dict[str, Any]) -> str:
    """The whole page from the figures of :func:`megatron_groupmates.report.figures.summarise`."""
    arms = html.escape(", ".join(summary["arms"]))
    parts = [
        lead_section(summary),
        evaluation_section(summary),
        plot_section(
            summary,
            "Selected share by kind of source",
            "Share of each kind's candidates that a generation selected; columns: arm and generation.",
            "no generation says which kinds it selected",
            plots.kinds_plot,
        ),
        plot_section(
            summary,
            "Individual influence",
            "Predicted individual influence of the whole pool and of the selected samples; negative is good: "
            "the sample lowers the reference loss.",
            "no generation was made with an influence model",
            plots.influence_plot,
        ),
        plot_section(
            summary,
            "Overlap of the selections",
            "Part of the row's selection that is also in the column's, from the same checkpoint and at the same budget.",
            "no generation compares the methods",
            plots.overlap_plot,
        ),
        oracle_section(summary),
        budget_section(summary),
        noise_section(summary),
        fit_section(summary),
        cost_section(summary),
        throughput_section(summary),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Group-level data selection: {arms}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Group-level data selection</h1>\n<p class="soft">Arms: {arms}</p>\n{"".join(parts)}'
        "</main>\n</body>\n</html>\n"
    )
