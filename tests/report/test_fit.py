"""What a report says of the fits: do relations help, the sign checks, the warm starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_groupmates.report import fit
from megatron_groupmates.report.figures import summarise
from megatron_groupmates.report.page_influence import fit_section
from megatron_groupmates.report.read import read_runs
from tests.common.report_runs import fit_reports, full_provenance, write_run


def report(relational: float, individual: float, held_out: int) -> dict[str, Any]:
    return {"relational": {"spearman": relational}, "individual": {"spearman": individual}, "held_out_rollouts": held_out}


def shown(root: Path, *rounds: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Summary, and section of the page, of one run with these rounds."""
    summary = summarise(read_runs([write_run(root / "run", "group", provenances=list(rounds))]))
    return summary, fit_section(summary)


def test_fit_quality_keeps_the_measures_and_nothing_else() -> None:
    measures = {"spearman": 0.5, "pearson": 0.4, "mse": 0.3, "mae": 0.2}
    given = {"init": {"relational": measures, "accepted": True, "seed": 4}, "fell_back_on": "x"}
    assert fit.fit_quality(given) == {"init": {"relational": measures}}
    assert fit.fit_quality({}) == {}


def test_the_effect_of_relations_by_hand() -> None:
    effects = fit.relation_effects({"init": report(0.6, 0.5, 101), "final": report(0.2, 0.6, 17)})
    assert effects == {
        "init": {
            "relational": 0.6,
            "individual": 0.5,
            "difference": pytest.approx(0.1),
            "held_out_rollouts": 101,
            "standard_error": pytest.approx(0.075),
        },
        "final": {
            "relational": 0.2,
            "individual": 0.6,
            "difference": pytest.approx(-0.4),
            "held_out_rollouts": 17,
            "standard_error": pytest.approx(0.24),
        },
    }


def test_a_fit_that_does_not_say_has_no_effect() -> None:
    missing = [{}, {"final": {"relational": {"spearman": 0.5}, "held_out_rollouts": 9}}, {"final": report(0.5, 0.4, 0)}]
    assert [fit.relation_effects(given) for given in missing] == [{}, {}, {}]
    assert fit.relation_effects({"final": report(math.nan, 0.4, 9)}) == {}
    assert fit.relation_effects({"final": report(0.5, 0.4, 1)})["final"]["standard_error"] is None


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [
        (0.03, 0.01, "yes"),
        (-0.03, 0.01, "no, they hurt"),
        (0.02, 0.01, "not told apart"),
        (-0.02, 0.01, "not told apart"),
        (0.9, None, "not told apart"),
    ],
)
def test_a_verdict_needs_twice_the_standard_error(difference: float, error: float | None, expected: str) -> None:
    assert fit.verdict(difference, error) == expected


def test_sentences_say_no_more_than_the_rollouts_support() -> None:
    effects = [fit.relation_effects({"final": report(*values)})["final"] for values in ((0.8, 0.6, 101), (0.8, 0.6, 65), (0.58, 0.57, 81))]
    assert fit.relations_sentence("group", effects[:1]) == (
        "group: relations help the prediction. Spearman is 0.800 with the relation term and 0.600 without "
        "(difference +0.200, on 101 held-out rollouts; standard error at most 0.064)."
    )
    # sqrt(0.064^2 + 0.08^2) / 2
    assert fit.relations_sentence("group", effects[:2]) == (
        "group: relations help the prediction. Spearman is 0.800 with the relation term and 0.600 without "
        "(difference +0.200, means of 2 rounds on 65 to 101 held-out rollouts each; standard error at most 0.051)."
    )
    assert fit.relations_sentence("a", effects[2:]).startswith("a: it is not shown that relations help or hurt the prediction. ")
    worse = fit.relation_effects({"final": report(0.1, 0.8, 65)})["final"]
    assert fit.relations_sentence("a", [worse]).startswith("a: relations hurt the prediction. Spearman is 0.100 with ")
    single = fit.relation_effects({"final": report(0.9, 0.1, 1)})["final"]
    assert fit.relations_sentence("a", [single]).endswith("(difference +0.800, on 1 held-out rollouts).")


def test_sign_checks_say_on_what_evidence_and_how_often_a_fit_was_refused() -> None:
    assert fit.sign_checks(fit_reports()) == {
        "init": {"correlation": 0.702, "samples": 160, "evidence": "individual labels kept out of the fit", "refused": 0},
        "final": {"correlation": 0.613, "samples": 80, "evidence": "first samples of held-out rollouts", "refused": 1},
    }
    check = {"correlation": -0.1, "samples": 3, "kind": "another"}
    refused = {"init": {"accepted": False, "attempts": [{}, {}], "sign_check": check}, "final": {"accepted": True}}
    assert fit.sign_checks(refused) == {"init": {"correlation": -0.1, "samples": 3, "evidence": "another", "refused": 2}}


def test_warm_starts_are_those_that_happened() -> None:
    assert fit.warm_starts(fit_reports()) == {"final": fit_reports()["final"]["warm_start"]}
    assert fit.warm_starts({}) == {}


def test_the_page_answers_whether_relations_help(tmp_path: Path) -> None:
    summary, text = shown(tmp_path, full_provenance("group", 100), full_provenance("group", 300))
    (answer,) = summary["relations"]
    assert "(difference +0.010, means of 2 rounds on 80 held-out rollouts each; standard error at most 0.054)." in answer
    assert "<li><strong>group: it is not shown that relations help or hurt the prediction.</strong> Spearman is 0.580" in text
    effect = summary["arms"]["group"]["generations"][0]["relations"]
    assert list(effect) == ["final"] and effect["final"]["difference"] == pytest.approx(0.01)
    cells = ["not told apart", "0.580", "0.570", "+0.010", "80", "0.076"]
    assert "<td>".join(f"{cell}</td>" for cell in cells) in text
    assert "individual labels kept out of the fit</td><td>160</td><td>0.702</td><td>0</td>" in text
    assert "<td>1</td><td>0.440</td><td>0.580</td><td>0.561</td><td>+0.019</td>" in text


def test_a_round_of_before_these_were_kept_is_shown_without(tmp_path: Path) -> None:
    old = full_provenance("group", 100)
    old["fit"] = {"final": {name: fit_reports()["final"][name] for name in ("relational", "individual", "constant")}}
    summary, text = shown(tmp_path, old)
    assert summary["relations"] == [] and not {"relations", "sign_check", "warm_start"} & set(summary["arms"]["group"]["generations"][0])
    assert "0.580" in text and not any(part in text for part in ("Sign check", "Warm start", "std. error", 'class="answers"'))


def test_a_warm_start_without_a_comparison_has_no_gain(tmp_path: Path) -> None:
    round_ = full_provenance("group", 100)
    round_["fit"]["final"]["warm_start"] |= {"spearman_from_scratch": None}
    assert "<td>0.440</td><td>0.580</td><td>-</td><td>-</td>" in shown(tmp_path, round_)[1]
