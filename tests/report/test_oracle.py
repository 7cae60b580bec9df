"""What a report says of the oracle of each round, in figures and on the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_groupmates.report import oracle, page_influence, plots
from megatron_groupmates.report.figures import summarise
from megatron_groupmates.report.read import read_runs
from tests.common.report_runs import full_provenance, oracle_facts, write_run

SECTIONS = (
    page_influence.oracle_section,
    page_influence.budget_section,
    page_influence.noise_section,
    page_influence.throughput_section,
)
FELL_BACK = {"estimator": "exact", "validation": {"rollouts": 20, "spearman": 0.123, "floor": 0.5, "fell_back": True}}


def built(root: Path, *facts: dict[str, Any] | None, **stages: Any) -> tuple[dict[str, Any], str]:
    """Summary and the page's sections on the oracle, of one run with a round for each of ``facts``.

    None is a round of before they were kept.
    """
    rounds = []
    for number, given in enumerate(facts, start=1):
        provenance = {**full_provenance("group", 100 * number), "oracle": given}
        if given is None:
            del provenance["oracle"]
        rounds.append({**provenance, "stages": {**provenance["stages"], **stages}})
    summary = summarise(read_runs([write_run(root / "run", "group", provenances=rounds)]))
    return summary, "".join(section(summary) for section in SECTIONS)


def test_each_round_says_how_it_measured_and_how_well(tmp_path: Path) -> None:
    summary, text = built(tmp_path, oracle_facts())
    assert summary["arms"]["group"]["generations"][0]["oracle"] == oracle_facts()
    cells = ["group", "1", "first_order", "first_order", "0.0003", "384", "256", "20", "0.871", "0.500"]
    assert row_of(cells, 4) in text
    assert '<p class="loud">' not in text and summary["notes"] == []


def row_of(cells: list[str], text_columns: int) -> str:
    tags = ['<td class="text">' if number < text_columns else "<td>" for number in range(len(cells))]
    return "<tr>" + "".join(f"{tag}{cell}</td>" for tag, cell in zip(tags, cells, strict=True)) + "</tr>"


def test_a_round_that_fell_back_is_loud_in_the_notes_and_in_its_section(tmp_path: Path) -> None:
    summary, text = built(tmp_path, oracle_facts(**FELL_BACK))
    sentence = (
        "group, generation 1: the round FELL BACK to exact. Its estimator, first_order, agreed with exact increments to a rank "
        "correlation of 0.123, below the floor of 0.500."
    )
    assert summary["notes"] == [sentence]
    assert f'<p class="loud">{sentence}</p>' in text
    assert '<td class="text">exact (fell back)</td><td class="text">first_order</td>' in text


def test_a_fallback_for_want_of_any_correlation_has_no_number(tmp_path: Path) -> None:
    validation = {"rollouts": 20, "spearman": math.nan, "floor": 0.5, "fell_back": True}
    assert "rank correlation of -, below" in built(tmp_path, oracle_facts(estimator="exact", validation=validation))[1]


def test_an_exact_round_has_nothing_to_check(tmp_path: Path) -> None:
    facts = oracle_facts(estimator="exact", requested="exact", validation=None, noise=None)
    _, text = built(tmp_path, {**facts, "budget": {"kind": "fixed", "maximum": 384, "curve": [], "stopped": "fixed"}})
    assert row_of(["group", "1", "exact", "exact", "0.0003", "384", "256", "-", "-", "-"], 4) in text
    assert "<h2>Adaptive budget" not in text and "<h2>Noise" not in text


def test_rounds_of_before_it_was_kept_show_nothing(tmp_path: Path) -> None:
    summary, text = built(tmp_path, None, oracle_facts())
    first, second = summary["arms"]["group"]["generations"]
    assert "oracle" not in first and "oracle" in second
    assert (
        '<td class="text">1</td><td class="text">first_order' not in text and '<td class="text">2</td><td class="text">first_order' in text
    )
    _, text = built(tmp_path / "older", None)
    assert "Left out: no generation says what its influences were measured with." in text
    assert "<h2>Adaptive budget" not in text and "<h2>Noise" not in text


def test_the_budgets_curves_are_one_plot_with_a_line_for_each_round(tmp_path: Path) -> None:
    other = oracle_facts(budget={"kind": "adaptive", "maximum": 9, "curve": [{"rollouts": 9, "spearman": math.nan}], "stopped": "maximum"})
    summary, text = built(tmp_path, oracle_facts(), oracle_facts(), other)
    figure = plots.budget_plot(summary)
    assert figure is not None
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["group, generation 1", "group, generation 2"]
    assert list(lines[0].get_xdata()) == [128, 256, 384] and list(lines[0].get_ydata()) == [0.31, 0.442, 0.44]
    assert row_of(["group", "1", "patience", "384", "2,000", "0.442"], 3) in text
    assert row_of(["group", "3", "maximum", "384", "9", "-"], 3) in text
    assert plots.budget_plot({"arms": {}}) is None


def test_noise_has_a_row_for_each_learning_rate_and_says_how_to_read_it(tmp_path: Path) -> None:
    _, text = built(tmp_path, oracle_facts(), oracle_facts(noise={"skipped": "the reference set is <too> small"}))
    assert row_of(["group", "1", "0.0003", "32", "0.913"], 2) in text and row_of(["group", "1", "3e-05", "32", "0.962"], 2) in text
    assert "against two disjoint reference sets. At 1 the choice of reference examples does not matter" in text
    assert "group, generation 2: not measured, the reference set is &lt;too&gt; small." in text


def test_throughput_by_hand() -> None:
    stages = {
        "load": {"seconds": 1.0, "flops": 0.0},
        "oracle_random.batch-000000": {"seconds": 1.0, "rollouts_per_second": 2.0, "share": {"step": 0.5, "evaluation": 0.5}},
        "oracle_random.batch-000001": {
            "seconds": 3.0,
            "rollouts_per_second": 6.0,
            "tokens_per_second": 7.0,
            "share": {"step": 0.9, "evaluation": 0.1},
        },
        "embed": {"seconds": 0.0, "tokens_per_second": 3.0, "share": None},
    }
    nothing = dict.fromkeys(("step", "evaluation", "restore"))
    assert oracle.throughput(stages) == {
        "oracle_random": {"rollouts_per_second": 5.0, "tokens_per_second": 7.0, **nothing, "step": 0.8, "evaluation": pytest.approx(0.2)},
        "embed": {"rollouts_per_second": None, "tokens_per_second": 3.0, **nothing},
    }
    assert oracle.throughput({}) == {}


def test_throughput_is_shown_and_batches_cost_as_one_stage(tmp_path: Path) -> None:
    batches = {f"oracle_random.batch-{number:06d}": {"seconds": 2.0, "flops": 10.0, "tokens_per_second": 1250.0} for number in range(3)}
    summary, text = built(tmp_path, oracle_facts(), **batches)
    assert summary["arms"]["group"]["stages"]["oracle_random"] == {"seconds": 6.0, "flops": 30.0}
    assert row_of(["group", "1", "random_rollouts", "4.1", "52k", "60%", "35%", "5%"], 3) in text
    assert row_of(["group", "1", "oracle_random", "-", "1.25k", "-", "-", "-"], 3) in text
    assert page_influence.throughput_section({"arms": {}}) == ""


def test_runs_that_measured_differently_are_told_apart(tmp_path: Path) -> None:
    exact = oracle_facts(estimator="exact", requested="exact", validation=None)
    rounds = [{**full_provenance(method, 100), "oracle": facts} for method, facts in (("group", oracle_facts()), ("individual", exact))]
    runs = [write_run(tmp_path / item["method"], item["method"], provenances=[item]) for item in rounds]
    runs.append(write_run(tmp_path / "random", "random"))
    assert summarise(read_runs(runs))["notes"] == [
        "The runs measured influences by different estimators (group: first_order; individual: exact): they differ in more than the "
        "method of selection."
    ]
    assert summarise(read_runs([runs[0], runs[2]]))["notes"] == []
