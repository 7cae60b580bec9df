"""What W&B gets of a round."""

from __future__ import annotations

from megatron_groupmates.server.tracking import round_values
from megatron_groupmates.utils.tracking import tracked_values
from tests.common.report_runs import full_provenance


def test_a_round_is_a_flat_row_of_numbers() -> None:
    provenance = full_provenance("group", 100)
    provenance["stages"] = {
        "oracle_random.batch-000000": {"seconds": 2.0, "flops": 10.0, "share": {"step": 0.5}},
        "oracle_random.batch-000001": {"seconds": 3.0, "flops": 30.0},
        "clusters": {"seconds": 1.0},
        "group_0_sample": {"seconds": 1.0, "flops": 2.0},
        "group_0_offers_1": {"seconds": 4.0, "flops": 2.0},
    }
    values = round_values(3, provenance)
    assert tracked_values(values) == values
    fits = {
        f"fit/{name}/{model}/{measure}": value
        for name in ("init", "final")
        for model in ("relational", "individual", "constant")
        for measure, value in provenance["fit"][name].get(model, {}).items()
    }
    assert len(fits) == 16 and fits["fit/final/relational/spearman"] == 0.58
    assert values == {
        "generation": 3,
        "stage/oracle_random/seconds": 5.0,
        "stage/oracle_random/flops": 40.0,
        "stage/clusters/seconds": 1.0,
        "stage/clusters/flops": 0.0,
        "stage/group/seconds": 5.0,
        "stage/group/flops": 4.0,
        **fits,
        "bootstrap/rollouts": 40,
        "bootstrap/distinct_samples": 19,
        "bootstrap/distinct_sets": 12,
        "bootstrap/max_uses": 40,
        "overlap/individual": 0.93,
        "overlap/similarity": 0.41,
        "overlap/random": 0.26,
    }


def test_a_round_without_an_oracle_has_its_costs_alone() -> None:
    assert round_values(1, {}) == {"generation": 1}
    provenance = {"method": "random", "stages": {"selection": {"seconds": 0.5, "flops": 0.0}}, "fit": {}, "oracle": None}
    assert round_values(1, provenance) == {"generation": 1, "stage/selection/seconds": 0.5, "stage/selection/flops": 0.0}
