"""The numbers of a report, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.report import figures
from megatron_groupmates.report.read import Generation, Run


def make_run(arm: str, evaluations: list[tuple[int, float]], **changes: Any) -> Run:
    values: dict[str, Any] = {
        "label": arm,
        "name": arm,
        "arm": arm,
        "seed": 1,
        "state": "finished",
        "seconds": 10.0,
        "flops": 5000.0,
        "consumed_tokens": 1000,
        "branch_tokens": 200,
        "tokens_per_step": 10,
        "evaluations": tuple(evaluations),
    }
    return Run(**{**values, **changes})


def make_generation(number: int, checkpoint_step: int, **stages: float) -> Generation:
    costs = {stage: {"seconds": 1.0, "flops": flops} for stage, flops in stages.items()}
    provenance = {"checkpoint_step": checkpoint_step, "stages": costs}
    return Generation(number=number, provenance=provenance, effective_tokens=None)


RANDOM = make_run("random", [(200, 7.0), (600, 6.0), (1000, 5.0)])
GROUP = make_run(
    "group",
    [(200, 7.0), (400, 5.5), (600, 4.5), (1000, 4.0)],
    generations=(make_generation(1, 20, oracle=800.0, fit=200.0), make_generation(2, 60, oracle=4000.0)),
)


def test_tokens_to_reach_interpolates_between_two_evaluations() -> None:
    assert figures.tokens_to_reach([(0, 4.0), (100, 2.0)], 3.5) == 25.0
    assert figures.tokens_to_reach([(0, 4.0), (100, 2.0)], 2.0) == 100.0
    assert figures.tokens_to_reach([(0, 4.0), (100, 2.0)], 1.9) is None
    assert figures.tokens_to_reach([], 1.9) is None


def test_tokens_to_reach_takes_the_first_crossing_after_the_start() -> None:
    curve = [(0, 1.0), (100, 4.0), (200, 2.0), (300, 5.0), (400, 1.0)]
    assert figures.tokens_to_reach(curve, 3.0, start=100) == 150.0
    assert figures.tokens_to_reach(curve, 3.0) == 0.0


@settings(deadline=None)
@given(losses=st.lists(st.floats(0.5, 9.0), min_size=2, max_size=12), share=st.floats(0, 1))
def test_tokens_to_reach_agrees_with_a_fine_search(losses: list[float], share: float) -> None:
    curve = [(100 * number, loss) for number, loss in enumerate(losses)]
    target = min(losses) + share * (max(losses) - min(losses))
    found = figures.tokens_to_reach(curve, target)
    assert found is not None

    def loss_at(tokens: float) -> float:
        left = min(int(tokens // 100), len(losses) - 2)
        return losses[left] + (losses[left + 1] - losses[left]) * (tokens / 100 - left)

    assert loss_at(found) <= target + 1e-9
    assert all(loss_at(tokens) > target - 1e-9 for tokens in range(0, math.ceil(found)))


def test_token_ratio_with_and_without_the_cost_of_selection() -> None:
    target = figures.random_target([RANDOM, GROUP])
    assert target == (5.0, 800.0)
    # 5.0 lies halfway between (400, 5.5) and (600, 4.5). By token 500 only the round of step 20 (token 200) had begun;
    # it cost 1,000 FLOPs, which at 5 FLOPs per token is 200 tokens.
    assert figures.token_ratio(GROUP, target) == {"tokens": 300.0, "ratio": 300 / 800, "ratio_with_selection": 500 / 800}
    assert figures.token_ratio(RANDOM, target) == {"tokens": 800.0, "ratio": 1.0, "ratio_with_selection": 1.0}


def test_token_ratio_is_absent_where_it_is_not_known() -> None:
    nothing = {"tokens": None, "ratio": None, "ratio_with_selection": None}
    assert figures.token_ratio(make_run("group", [(200, 7.0), (1000, 5.1)]), (5.0, 800.0)) == nothing
    assert figures.token_ratio(GROUP, None) == nothing
    no_flops = figures.token_ratio(make_run("group", [(200, 7.0), (1000, 5.0)], flops=0.0), (5.0, 800.0))
    assert no_flops == {"tokens": 800.0, "ratio": 1.0, "ratio_with_selection": None}


def test_random_target_is_the_mean_over_seeds() -> None:
    other = make_run("random", [(200, 7.0), (1000, 5.2)], branch_tokens=100)
    assert figures.random_target([RANDOM, other]) == pytest.approx((5.1, 850.0))
    assert figures.random_target([GROUP]) is None


def test_stage_table_counts_training_since_the_branch_and_all_rounds() -> None:
    assert figures.stage_table(GROUP) == {
        "training": {"seconds": 10.0, "flops": 4000.0},
        "oracle": {"seconds": 2.0, "flops": 4800.0},
        "fit": {"seconds": 1.0, "flops": 200.0},
    }
    assert figures.selection_cost(GROUP.generations) == {"seconds": 3.0, "flops": 5000.0}


def test_overlap_matrix_has_a_row_for_each_selection() -> None:
    names, matrix = figures.overlap_matrix({"b": {"b": 1.0, "a": 0.5}, "a": {"a": 1.0, "b": 0.25}})
    assert names == ["a", "b"]
    assert matrix == [[1.0, 0.25], [0.5, 1.0]]


def test_refused_fits_are_noted() -> None:
    generation = Generation(
        number=2,
        effective_tokens=None,
        provenance={"fit": {"init": {"accepted": True}, "final": {"accepted": False}, "fell_back_on": "rounds/round-000001/final"}},
    )
    assert figures.notes([make_run("group", [], generations=(generation,))]) == [
        "group, generation 2: the final fit was refused, its sign was wrong.",
        "group, generation 2: selected with an earlier model, rounds/round-000001/final.",
    ]


def test_standard_error_by_hand() -> None:
    assert figures.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_comparisons_claim_no_more_than_their_seeds_support() -> None:
    assert figures.compare("group", [5.0], "random", [5.11]) == "group ended 0.110 below random (5.000 against 5.110)."
    assert figures.compare("group", [5.01], "similarity", [5.0]) == (
        "group and similarity differ by 0.010 (5.010 against 5.000), which one seed cannot separate."
    )
    assert figures.compare("a", [5.0, 5.02], "b", [5.1, 5.12]) == (
        "a ended 0.100 below b (5.010 against 5.110), more than twice the standard error of the difference (0.014)."
    )
    assert figures.compare("a", [5.0, 5.2], "b", [5.1, 5.3]) == (
        "a ended 0.100 below b (5.100 against 5.200), no more than twice the standard error of the difference (0.141)."
    )


def test_conclusions_compare_with_random_first_then_the_best_with_the_rest() -> None:
    similarity = make_run("similarity", [(200, 7.0), (1000, 4.01)])
    assert figures.conclusions([RANDOM, similarity, GROUP]) == [
        "With one seed per arm, chance is not measured: differences below 0.04 are not told apart.",
        "group ended 1.000 below random (4.000 against 5.000).",
        "similarity ended 0.990 below random (4.010 against 5.000).",
        "group and similarity differ by 0.010 (4.000 against 4.010), which one seed cannot separate.",
        "similarity reached random's final loss with 0.67 of its tokens, 0.67 when the cost of selection is counted.",
        "group reached random's final loss with 0.38 of its tokens, 0.62 when the cost of selection is counted.",
    ]


def test_a_worse_arm_is_said_to_be_worse() -> None:
    worse = make_run("group", [(200, 7.0), (1000, 5.5)])
    assert figures.conclusions([RANDOM, worse])[1:] == [
        "group ended 0.500 above random (5.500 against 5.000).",
        "group did not reach random's final loss.",
    ]


def test_conclusions_refuse_to_compare_what_is_not_comparable() -> None:
    assert figures.conclusions([RANDOM]) == ["There are fewer than two arms with an evaluation: nothing can be compared."]
    longer = make_run("group", [(200, 7.0), (2000, 4.0)])
    assert figures.conclusions([RANDOM, longer]) == [
        "The arms ended at different numbers of tokens (1,000, 2,000): their final losses are not compared."
    ]
    similarity = make_run("similarity", [(1000, 4.5)])
    assert "There is no random arm to compare with." in figures.conclusions([GROUP, similarity])


def test_one_arm_with_several_seeds_is_named_in_the_reservation() -> None:
    sentences = figures.conclusions([RANDOM, make_run("random", [(1000, 5.1)], seed=2), GROUP])
    assert sentences[0] == "With one seed of group, chance is not measured: differences below 0.04 are not told apart."


def test_notes_name_unfinished_runs_and_lost_evaluations() -> None:
    assert figures.notes([RANDOM, make_run("group", [], state="running", num_not_finite=2)]) == [
        "group: training is not finished (state: running).",
        "group: 2 evaluations are left out, their loss is not finite.",
    ]


def test_summary_has_no_number_that_json_cannot_hold() -> None:
    generation = Generation(
        number=1,
        effective_tokens=300,
        provenance={"fit": {"final": {"relational": {"spearman": float("nan"), "pearson": 0.5, "mse": float("inf")}}}},
    )
    summary = figures.summarise([RANDOM, make_run("group", [(1000, 4.0)], generations=(generation,))])
    assert summary["arms"]["group"]["generations"] == [
        {
            "generation": 1,
            "effective_tokens": 300,
            "fit": {"final": {"relational": {"spearman": None, "pearson": 0.5, "mse": None, "mae": None}}},
        }
    ]
    assert figures.generations_with(summary, "fit")[0][0] == "group"
    assert figures.generations_with(summary, "overlap") == []
