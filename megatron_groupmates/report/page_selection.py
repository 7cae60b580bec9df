"""Sections of the page on what was selected: kinds, influences, clusters, overlap, example documents."""

from __future__ import annotations

import html
import re
from typing import Any

from megatron_groupmates.report import plots_selection
from megatron_groupmates.report.blocks import drawn, number, plot_section, section, table
from megatron_groupmates.report.figures import generations_with

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SIDES = {"chosen": "Chosen first", "rejected": "Rejected first"}


def kinds_section(summary: dict[str, Any]) -> str:
    """Share of each kind's candidates that was selected, and the minimum shares where a run sets any."""
    title = "Selected share by kind of source"
    explanation = "Share of each kind's candidates that a generation selected; columns: arm and generation."
    figure = drawn(summary, title, plots_selection.kinds_plot)
    if figure is None:
        return section(title, "Left out: no generation says which kinds it selected.", "")
    rows = [
        [
            label,
            str(generation["generation"]),
            kind,
            "yes" if shares["reserved"] else "no",
            *(number(shares[name], ".1%") for name in ("minimum", "selected", "candidates")),
        ]
        for label, generation in generations_with(summary, "source_shares")
        for kind, shares in generation["source_shares"].items()
    ]
    if not rows:
        return section(title, explanation, figure)
    remark = (
        "<p class=\"soft\">selection.minimum_source_share: the least share of the budget's tokens that was asked for, the kind's share of "
        "the tokens selected and of the candidates. Reserved: without the least share the kind would have got less.</p>"
    )
    header = ["arm", "generation", "kind", "reserved", "minimum", "of the selected", "of the candidates"]
    return section(title, explanation, figure + remark + table(header, rows, text_columns=4))


def influence_section(summary: dict[str, Any]) -> str:
    """Histograms of the predicted individual influence."""
    return plot_section(
        summary,
        "Individual influence",
        "Predicted individual influence of the whole pool and of the selected samples; negative is good: "
        "the sample lowers the reference loss.",
        "no generation was made with an influence model",
        plots_selection.influence_plot,
    )


def clusters_section(summary: dict[str, Any]) -> str:
    """Sizes of the clusters and what was chosen of each."""
    title, found = "Clusters", generations_with(summary, "clusters")
    if not found:
        return section(title, "Left out: no generation was selected by cluster.", "")
    rows = [
        [
            label,
            str(generation["generation"]),
            *(f"{clusters[name]:,}" for name in ("clusters", "empty", "smallest")),
            f"{clusters['median']:,.0f}",
            f"{clusters['largest']:,}",
            number(clusters["share"], ".1%"),
            *(f"{clusters[name]:,}" for name in ("untouched", "whole")),
        ]
        for label, generation in found
        for clusters in [generation["clusters"]]
    ]
    explanation = (
        "Clusters of each run's last generation, most chosen first: a bar is as wide as its cluster has candidates and as high as the "
        "share chosen of them; of many clusters, neighbours are drawn as one. Dashed: the share chosen of all candidates. Below, for "
        "every generation: sizes in samples, and the clusters of which nothing and of which everything was chosen."
    )
    header = ["arm", "generation", "clusters", "empty", "smallest", "median", "largest", "chosen", "none chosen", "all chosen"]
    figure = drawn(summary, title, plots_selection.clusters_plot) or ""
    return section(title, explanation, figure + table(header, rows, text_columns=2))


def overlap_section(summary: dict[str, Any]) -> str:
    """How much the methods' selections share."""
    chances = sorted({f"{generation['overlap_by_chance']:.0%}" for _, generation in generations_with(summary, "overlap_by_chance")})
    by_chance = f" Two random selections of this size share {' or '.join(chances)}." if chances else ""
    return plot_section(
        summary,
        "Overlap of the selections",
        f"Part of the row's selection that is also in the column's, from the same checkpoint and at the same budget.{by_chance}",
        "no generation compares the methods",
        plots_selection.overlap_plot,
    )


def examples_section(summary: dict[str, Any]) -> str:
    """Documents chosen first and rejected first, to read; those of the first run's last generation are open."""
    title, found = "Example documents", generations_with(summary, "examples")
    if not found:
        return section(title, "Left out: no generation kept example documents.", "")
    explanation = (
        "The beginnings of the documents that each selection chose first, and of those it left out that score worst. The score is in "
        "bold, lower is better. Group and individual: the predicted influence on the reference loss; group counts what was chosen "
        "before for the chosen ones, and takes the individual influence for the rejected. Similarity: minus the similarity to the "
        "reference. A random selection has no scores: its documents are any."
    )
    last = max(generation["generation"] for label, generation in found if label == found[0][0])
    parts = []
    for label, generation in found:
        is_open = " open" if label == found[0][0] and generation["generation"] == last else ""
        sides = "".join(
            f"<div><h3>{heading}</h3>\n{''.join(map(_document, generation['examples'].get(side, [])))}</div>\n"
            for side, heading in _SIDES.items()
        )
        name = html.escape(f"{label}, generation {generation['generation']}")
        parts.append(f'<details{is_open}><summary>{name}</summary>\n<div class="sides">{sides}</div></details>\n')
    return section(title, explanation, "".join(parts))


def _document(document: dict[str, Any]) -> str:
    """One document: where it is from and how it scored, and its text, or its token ids where the text could not be made."""
    score = document.get("score")
    facts = [
        *([] if score is None else [f"<strong>{score:+.4f}</strong>"]),
        html.escape(document.get("kind") or "unknown kind"),
        html.escape(f"{document['shard']}:{document['shard_row']}"),
        *([f"{document['num_tokens']:,} tokens"] if "num_tokens" in document else []),
    ]
    if document.get("text") is not None:
        content = document["text"]
    elif document.get("tokens"):
        content = f"The pool has no tokenizer that reads; its first token ids: {' '.join(map(str, document['tokens']))}"
    else:
        content = "The sample could not be read."
    # Control characters have no place in HTML, escaped or not.
    shown = html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", content))
    return f'<article><p class="soft">{" &middot; ".join(facts)}</p>\n<pre dir="auto">{shown}</pre></article>\n'
