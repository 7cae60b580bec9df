"""The report as one HTML page without any outside reference."""

from __future__ import annotations

import html
from typing import Any

from megatron_groupmates.report import page_influence, page_selection, plots
from megatron_groupmates.report.blocks import CSS, count, drawn, number, section, table


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
        "Training since the branch, and each stage of selection over all rounds; the plot puts the smallest together.",
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
        page_influence.fit_section(summary),
        page_selection.kinds_section(summary),
        page_selection.influence_section(summary),
        page_selection.clusters_section(summary),
        page_selection.overlap_section(summary),
        page_selection.examples_section(summary),
        page_influence.oracle_section(summary),
        page_influence.coverage_section(summary),
        page_influence.budget_section(summary),
        page_influence.noise_section(summary),
        cost_section(summary),
        page_influence.throughput_section(summary),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Group-level data selection: {arms}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Group-level data selection</h1>\n<p class="soft">Arms: {arms}</p>\n{"".join(parts)}'
        "</main>\n</body>\n</html>\n"
    )
