"""Sections of the page on how influences were measured and learned: fit, oracle, bootstrap, budget, noise, throughput."""

from __future__ import annotations

import html
from typing import Any

from megatron_groupmates.report import plots, plots_selection
from megatron_groupmates.report.blocks import count, drawn, number, section, table
from megatron_groupmates.report.figures import generations_with
from megatron_groupmates.report.fit import MEASURES, verdict
from megatron_groupmates.report.oracle import SHARES, fallback_note, fell_back


def fit_section(summary: dict[str, Any]) -> str:
    """Whether relations help, and how well the influence models predict held-out rollouts."""
    title = "Fit to the oracle: do relations help?"
    rows = [
        [label, str(generation["generation"]), fit, model, *(number(metrics[measure]) for measure in MEASURES)]
        for label, generation in generations_with(summary, "fit")
        for fit, models in generation["fit"].items()
        for model, metrics in models.items()
    ]
    if not rows:
        return section(title, "Left out: no generation was made with an oracle.", "")
    explanation = (
        "relational, individual (without the relation term) and constant (predicts the mean) on the same held-out rollouts. "
        "init: fitted to random rollouts; final: to random and bootstrap rollouts. Relations are said to help or to hurt where the "
        "difference in Spearman is more than twice the standard error of the weaker correlation from as many rollouts, which is wide: "
        "two models tested on the same rollouts differ by chance less than that."
    )
    header = ["arm", "generation", "fit", "model", "Spearman", "Pearson", "MSE", "MAE"]
    answers = "".join(f"<li>{_answer(sentences)}</li>" for sentences in summary["relations"])
    return section(
        title,
        explanation,
        (f'<ul class="answers">{answers}</ul>' if answers else "")
        + _effects_table(summary)
        + "<h3>All measures</h3>"
        + table(header, rows, text_columns=4)
        + _sign_table(summary)
        + _warm_start_table(summary),
    )


def _answer(sentences: str) -> str:
    """The first sentence bold: it answers, the others say why."""
    answer, _, reasons = sentences.partition(". ")
    return f"<strong>{html.escape(answer)}.</strong> {html.escape(reasons)}"


def _effects_table(summary: dict[str, Any]) -> str:
    """Spearman with and without relations of each fit; empty where no fit says on how many rollouts it was tested."""
    rows = [
        [
            label,
            str(generation["generation"]),
            fit,
            verdict(effect["difference"], effect["standard_error"]),
            number(effect["relational"]),
            number(effect["individual"]),
            number(effect["difference"], "+.3f"),
            number(effect["held_out_rollouts"], ","),
            number(effect["standard_error"]),
        ]
        for label, generation in generations_with(summary, "relations")
        for fit, effect in generation["relations"].items()
    ]
    header = ["arm", "generation", "fit", "relations help?", "with", "without", "difference", "held out", "std. error"]
    return table(header, rows, text_columns=4) if rows else ""


def _sign_table(summary: dict[str, Any]) -> str:
    """The sign checks of the fits; empty where there are none."""
    rows = [
        [
            label,
            str(generation["generation"]),
            fit,
            check["evidence"],
            number(check["samples"], ","),
            number(check["correlation"]),
            number(check["refused"], ","),
        ]
        for label, generation in generations_with(summary, "sign_check")
        for fit, check in generation["sign_check"].items()
    ]
    if not rows:
        return ""
    remark = (
        '<p class="soft">Correlation of the predicted individual influence with labels that the fit did not see. A fit below 0 has good '
        "and bad reversed: it is refused and made again.</p>"
    )
    header = ["arm", "generation", "fit", "compared on", "samples", "correlation", "fits refused"]
    return f"<h3>Sign check</h3>{remark}{table(header, rows, text_columns=4)}"


def _warm_start_table(summary: dict[str, Any]) -> str:
    """What starting from an earlier round's model was worth; empty where no fit did."""
    rows = [
        [
            label,
            str(generation["generation"]),
            fit,
            number(warm["from"], ","),
            *(number(warm[name]) for name in ("spearman_before", "spearman", "spearman_from_scratch")),
            number(_gain(warm), "+.3f"),
        ]
        for label, generation in generations_with(summary, "warm_start")
        for fit, warm in generation["warm_start"].items()
    ]
    if not rows:
        return ""
    remark = '<p class="soft">Held-out Spearman of the earlier round\'s model as it was, after the fit, and of a fit from scratch.</p>'
    header = ["arm", "generation", "fit", "from round", "as it was", "after the fit", "from scratch", "gain"]
    return f"<h3>Warm start</h3>{remark}{table(header, rows, text_columns=3)}"


def _gain(warm: dict[str, Any]) -> float | None:
    after, scratch = warm["spearman"], warm["spearman_from_scratch"]
    return None if after is None or scratch is None else after - scratch


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
        "parameter change; directional: each candidate's loss along the reference gradient, beside exact rollouts. Correlation: "
        "Spearman of the requested estimator with exact increments on the rollouts checked; below the floor the round falls "
        "back to exact. An exact round has nothing to check."
    )
    header = ["arm", "generation", "used", "requested", "learning rate", "random", "bootstrap", "checked", "correlation", "floor"]
    remarks = "".join(f'<p class="loud">{html.escape(line)}</p>' for line in loud)
    return section(title, explanation, remarks + table(header, rows, text_columns=4))


def coverage_section(summary: dict[str, Any]) -> str:
    """How many samples the bootstrap rollouts measure; empty where no round says."""
    title, found = "Bootstrap coverage", generations_with(summary, "coverage")
    if not found:
        return ""
    rows = [
        [
            label,
            str(generation["generation"]),
            *(number(coverage[name], ",") for name in ("rollouts", "places", "distinct_samples", "distinct_sets", "max_uses")),
        ]
        for label, generation in found
        for coverage in [generation["coverage"]]
    ]
    explanation = (
        "How much the bootstrap rollouts measure. Places: samples in all of them, repeats counted; distinct sets: rollouts that are more "
        "than another order of the same samples; largest use: rollouts that the most used sample is in. Few distinct samples or sets: "
        "the oracles of many rollouts measured much the same. The plot is of each run's last generation."
    )
    header = ["arm", "generation", "rollouts", "places", "distinct samples", "distinct sets", "largest use"]
    figure = drawn(summary, title, plots_selection.coverage_plot) or ""
    return section(title, explanation, figure + table(header, rows, text_columns=2))


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
