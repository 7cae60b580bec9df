"""Estimators with their validation and fallback, the adaptive budget and the noise of the labels, in whole rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, RunPaths
from megatron_groupmates.influence.bootstrap import bootstrap_coverage, bootstrap_rollouts
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server import collecting, learning, watch
from megatron_groupmates.server.collecting import stopped_improving
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.estimating import Oracle, agreement
from megatron_groupmates.server.recipe import resolve_recipe
from megatron_groupmates.utils.files import read_json
from tests.common.gpt_runs import REFRESHES, tiny_config

STEP = REFRESHES[0]
RATE = 8e-3
ADAPTIVE = {"oracle__budget": "adaptive", "oracle__budget_batch": 4}


class Killed(Exception):
    """Stands for the death of the server."""


@pytest.fixture
def run_round(trained: Any, groups: Any, tmp_path: Path) -> Callable[..., Config]:
    """Runs a round under changed settings; whatever the estimator, at one learning rate."""

    def run(name: str = "a", **changes: Any) -> Config:
        config = trained.copy(tmp_path / name, STEP, **{"oracle__learning_rate": RATE, **changes})
        assert watch.serve(config, groups, once=True)
        return config

    return run


def directory(config: Config) -> Path:
    return RunPaths.of(config).round(1)


def facts(config: Config) -> dict[str, Any]:
    """``oracle.json``, which the generation's provenance repeats."""
    kept = read_json(directory(config) / "oracle.json")
    selection = RunPaths.of(config).selection
    assert load_generation(selection, 1, PoolIndex.open(config.data.pool)).provenance["oracle"] == kept
    return kept


def arrays(config: Config, stage: str) -> dict[str, np.ndarray]:
    with np.load(directory(config) / f"{stage}.npz") as content:
        return dict(content)


def stages(config: Config) -> set[str]:
    return {path.name.removesuffix(".stage.json") for path in directory(config).glob("oracle*.stage.json")}


class TestEstimators:
    def test_exact(self, run_round):
        config = run_round()
        found = facts(config)
        assert found == {
            "estimator": "exact",
            "requested": "exact",
            "learning_rate": found["learning_rate"],
            "rollouts": {"random": 20, "bootstrap": 6},
            "validation": None,
            "budget": {"kind": "fixed", "maximum": 20, "curve": [], "stopped": "fixed"},
            "noise": None,
            "bootstrap": bootstrap_coverage(arrays(config, "bootstrap")["rollouts"]),
        }
        assert found["bootstrap"]["rollouts"] == 6
        assert found["learning_rate"] == RATE
        assert stages(config) == {"oracle_random", "oracle_bootstrap"}
        assert all(str(arrays(config, name)["estimator"]) == "exact" for name in stages(config))

    def test_first_order_is_validated_on_the_first_random_rollouts(self, run_round):
        config = run_round(oracle__estimator="first_order", oracle__estimator_floor=-1.0, oracle__validation_share=0.25)
        found = facts(config)
        assert (found["estimator"], found["requested"]) == ("first_order", "first_order")
        assert found["validation"].pop("spearman") > 0.3
        assert found["validation"] == {"rollouts": 5, "floor": -1.0, "fell_back": False}
        kinds = {name: str(arrays(config, name)["estimator"]) for name in stages(config)}
        assert kinds == {"oracle_random": "first_order", "oracle_bootstrap": "first_order", "oracle_validation": "exact"}
        exact = run_round("b")
        assert np.array_equal(arrays(config, "oracle_validation")["losses"], arrays(exact, "oracle_random")["losses"][:5])

    def test_at_least_four_rollouts_validate(self, run_round):
        config = run_round(oracle__estimator="first_order", oracle__estimator_floor=-1.0)
        assert facts(config)["validation"]["rollouts"] == 4

    def test_directional_labels_every_candidate(self, run_round):
        config = run_round(oracle__estimator="directional", oracle__estimator_floor=-1.0)
        found = facts(config)
        assert (found["estimator"], found["requested"]) == ("directional", "directional")
        assert found["validation"]["rollouts"] == 20 and found["validation"]["spearman"] > 0.3
        kinds = {name: str(arrays(config, name)["estimator"]) for name in stages(config)}
        assert kinds == {"oracle_random": "exact", "oracle_bootstrap": "exact", "oracle_directional": "directional"}
        assert arrays(config, "oracle_directional")["labels"].shape == (48,)
        report = read_json(directory(config) / "final" / "report.json")["individual_labels"]
        assert report["slope"] > 0 and report["left_out"] > 0 and report["labels"] + report["left_out"] == 48

    @pytest.mark.parametrize("estimator", ["first_order", "directional"])
    @pytest.mark.parametrize("budget", ["fixed", "adaptive"])
    def test_below_the_floor_the_round_is_an_exact_one(self, run_round, caplog, estimator, budget):
        changes = {**ADAPTIVE, "oracle__budget": budget}
        config = run_round(oracle__estimator=estimator, oracle__estimator_floor=1.0, **changes)
        assert f"oracle.estimator {estimator} agrees with exact increments to a rank correlation of" in caplog.text
        assert "below oracle.estimator_floor 1; the round falls back to exact" in caplog.text
        found, exact = facts(config), run_round("b", **changes)
        assert found["validation"].pop("spearman") < 1
        assert found.pop("validation")["fell_back"] and found.pop("requested") == estimator
        assert found == {name: value for name, value in facts(exact).items() if name not in ("validation", "requested")}
        assert read_json(directory(config) / "final" / "report.json") == read_json(directory(exact) / "final" / "report.json")
        own = ".exact" if estimator == "first_order" else ""
        batch = ".batch-000000" if budget == "adaptive" else ""
        assert np.array_equal(arrays(config, f"oracle_random{own}{batch}")["losses"], arrays(exact, f"oracle_random{batch}")["losses"])
        assert np.array_equal(arrays(config, f"oracle_bootstrap{own}")["losses"], arrays(exact, "oracle_bootstrap")["losses"])

    def test_a_common_trend_over_positions_is_no_agreement(self):
        rng = np.random.default_rng(0)
        one, other = rng.standard_normal((2, 200, 3))
        trend = np.array([0.0, 10.0, 20.0])
        assert abs(agreement(one + trend, other + trend)) < 0.15
        assert agreement(one + trend, one * [1.0, 2.0, 3.0]) == pytest.approx(1.0)

    def test_a_fallback_keeps_what_was_exact(self):
        for estimator, stage in (("first_order", "oracle_random.exact"), ("directional", "oracle_random")):
            oracle = Oracle(estimator=estimator).fall_back()
            assert (oracle.rollout_stage("oracle_random"), oracle.fit_stage("budget")) == (stage, "budget.exact")


class TestAdaptiveBudget:
    def test_stops_by_patience_on_a_prefix_of_the_fixed_budget(self, run_round, monkeypatch):
        values = iter([0.1, 0.4, 0.3, 0.4])
        monkeypatch.setattr(collecting, "held_out_spearman", lambda *args, **kwargs: next(values))
        config = run_round(**ADAPTIVE, oracle__budget_patience=2, oracle__num_random_rollouts=40, oracle__num_bootstrap_rollouts=80)
        found = facts(config)
        assert found["budget"] == {
            "kind": "adaptive",
            "maximum": 40,
            "curve": [{"rollouts": 4 * n, "spearman": value} for n, value in enumerate((0.1, 0.4, 0.3, 0.4), start=1)],
            "stopped": "patience",
        }
        assert found["rollouts"] == {"random": 16, "bootstrap": 16}
        monkeypatch.undo()
        fixed = run_round("b", oracle__num_bootstrap_rollouts=0)
        assert facts(fixed)["bootstrap"] is None
        measured = [arrays(config, f"oracle_random.batch-{number:06d}")["losses"] for number in range(4)]
        assert np.array_equal(np.concatenate(measured), arrays(fixed, "oracle_random")["losses"][:16])

    def test_stops_at_the_maximum(self, run_round):
        config = run_round(**ADAPTIVE, oracle__budget_patience=100, oracle__num_random_rollouts=18)
        budget = facts(config)["budget"]
        assert budget["stopped"] == "maximum" and [point["rollouts"] for point in budget["curve"]] == [4, 8, 12, 16, 18]
        assert all(-1 <= point["spearman"] <= 1 for point in budget["curve"])

    @pytest.mark.parametrize("victim", ["oracle_random.batch-000001", "budget.batch-000001", "oracle_random.batch-000002"])
    def test_killed_between_batches_decides_alike(self, run_round, trained, groups, tmp_path, monkeypatch, victim):
        whole = run_round(**ADAPTIVE)
        config = trained.copy(tmp_path / "killed", STEP, oracle__learning_rate=RATE, **ADAPTIVE)
        real = RoundContext.bookkeeping

        @contextlib.contextmanager
        def bookkeeping(self: RoundContext, name: str, flops: float) -> Any:
            if name == victim:
                raise Killed
            with real(self, name, flops):
                yield

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(RoundContext, "bookkeeping", bookkeeping)
            watch.serve(config, groups, once=True)
        assert not (directory(config) / "oracle.json").exists()
        assert watch.serve(config, groups, once=True)
        assert facts(config) == facts(whole)
        assert np.array_equal(arrays(config, "selection")["rows"], arrays(whole, "selection")["rows"])

    def test_patience(self):
        assert not stopped_improving([0.1], 1)
        assert not stopped_improving([0.1, 0.2, 0.3], 1)
        assert stopped_improving([0.1, 0.3, 0.2], 1)
        assert not stopped_improving([0.3, 0.1, 0.2], 3)
        # An equal value is no improvement.
        assert stopped_improving([0.3, 0.3, 0.3], 2)


class TestBootstrap:
    @pytest.mark.parametrize(("candidates", "wanted", "found"), [(200, 40, 40), (30, 40, 40), (14, 40, 24), (10, 40, 14)])
    def test_no_more_diverse_rollouts_than_are_possible(self, caplog, candidates, wanted, found):
        config = tiny_config("unused", oracle__num_bootstrap_rollouts=wanted, oracle__rollout_length=4, oracle__num_candidates=16)
        context = SimpleNamespace(config=config, recipe=resolve_recipe(config), input=SimpleNamespace(number=3))
        assert learning._wanted_bootstrap(context, 100, candidates) == found
        assert ("candidates make" in caplog.text) == (found < wanted)
        rng = np.random.default_rng(0)
        embeddings, individual = rng.standard_normal((candidates, 3)), rng.standard_normal(candidates)
        assert bootstrap_rollouts(embeddings, individual, Relation(), found, 4, "diverse").shape == (found, 4)


class TestNoise:
    def test_against_the_following_examples_at_two_learning_rates(self, run_round):
        config = run_round(oracle__noise_rollouts=5)
        found = facts(config)
        rate = found["learning_rate"]
        assert [(entry["learning_rate"], entry["rollouts"]) for entry in found["noise"]] == [(rate, 5), (rate / 10, 5)]
        assert all(0.3 < entry["spearman"] <= 1 for entry in found["noise"]), found["noise"]
        losses = arrays(config, "oracle_noise")["losses"]
        assert losses.shape == (5, 2, 2, 4)
        assert np.array_equal(losses[:, 0, 0], arrays(config, "oracle_random")["losses"][:5])
        assert not np.array_equal(losses[:, 0, 1], losses[:, 0, 0])

    def test_second_learning_rate(self, run_round):
        config = run_round(oracle__noise_rollouts=4, oracle__noise_learning_rate=5e-4)
        assert [entry["learning_rate"] for entry in facts(config)["noise"]][1] == 5e-4

    def test_skipped_where_no_example_is_left(self, run_round):
        config = run_round(oracle__noise_rollouts=4, oracle__reference_samples=1000)
        assert "oracle.reference_samples (1000) uses all of them" in facts(config)["noise"]["skipped"]
        assert "oracle_noise" not in stages(config)
