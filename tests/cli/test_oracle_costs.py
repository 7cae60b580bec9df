"""What ``plan`` says a round's oracle costs, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.cli import oracle_costs as costs
from megatron_groupmates.cli.main import main
from megatron_groupmates.config import UserError, dump_config, parse_config
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.utils.files import write_json
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool, make_reference_set

EXAMPLE = Path(__file__).parents[2] / "examples" / "dclm" / "400m_4x.yaml"
ORACLE = {
    "num_random_rollouts": 40,
    "num_bootstrap_rollouts": 20,
    "rollout_length": 5,
    "reference_samples": 3,
    "num_candidates": 16,
    "noise_rollouts": 0,
}
# 60 rollouts of 5 steps; a step on 6 tokens, forward and backward; 11 tokens of reference examples.
EXACT = 60 * 5 * (3 * 6 + 11)
REFERENCE = costs.ReferenceTokens(examples=3, tokens=11.0, measured=True)


def write_round(run: Path, number: int, **rates: float) -> None:
    """A round's stage files with ``rollouts_per_second``."""
    directory = run / "selection" / "rounds" / f"round-{number:06d}"
    for stage, rate in rates.items():
        write_json(directory / f"{stage.replace('__', '.')}.stage.json", {"seconds": 2.0, "flops": 1.0, "rollouts_per_second": rate})


def write_run(root: Path, **sections: dict[str, Any]) -> Path:
    """A run directory with nothing but its config."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(dump_config(tiny_config(run={"output_dir": str(root)}, **sections)))
    return root


@pytest.mark.parametrize(
    ("estimator", "settings", "extra"),
    [
        ("exact", {}, {"oracle_random": 40 * 5 * 29, "oracle_bootstrap": 20 * 5 * 29}),
        ("first_order", {}, {"oracle_random": 40 * 5 * 18, "oracle_bootstrap": 20 * 5 * 18, "oracle_validation": 4 * 5 * 29}),
        ("first_order", {"validation_share": 0.26}, {"oracle_random": 3600, "oracle_bootstrap": 1800, "oracle_validation": 11 * 5 * 29}),
        ("directional", {}, {"oracle_random": 5800, "oracle_bootstrap": 2900, "oracle_directional": 2 * 16 * 6 + 3 * 11}),
        ("exact", {"noise_rollouts": 7}, {"oracle_random": 5800, "oracle_bootstrap": 2900, "oracle_noise": 4 * 7 * 5 * 29}),
    ],
)
def test_tokens_by_hand(estimator: str, settings: dict[str, Any], extra: dict[str, float]) -> None:
    assert costs.oracle_tokens(tiny_config(oracle={**ORACLE, **settings}), estimator, 6.0, 11.0) == extra


def test_shares_times_and_ratios_by_hand() -> None:
    config = tiny_config(oracle={**ORACLE, "estimator": "directional"})
    per_token = model_size(config).forward_flops_per_token
    facts = costs.oracle_costs(config, 6.0, REFERENCE, train_flops=1e9, flops_per_second=1e6, rates=None)
    assert (facts["estimator"], facts["at_most"], facts["rates"]) == ("directional", False, None)
    assert list(facts["round"]) == ["exact", "first_order", "directional", "authors"]
    exact, authors = facts["round"]["exact"], facts["round"]["authors"]
    assert exact["flops"] == EXACT * per_token and exact["share_of_training"] == EXACT * per_token / 1e9
    assert exact["seconds"] == EXACT * per_token / 1e6 and exact["measured_seconds"] is None
    # 40,000 rollouts of 10 steps, each on 8 tokens forward and backward, and 128 examples of 8 tokens after it.
    assert authors["flops"] == 400_000 * (3 * 8 + 128 * 8) * per_token
    assert exact["times_cheaper_than_authors"] == pytest.approx(400_000 * 1048 / EXACT)
    assert facts["labels_share_of_training"] == (2 * 16 * 6 + 3 * 11) * per_token / 1e9


def test_the_assumed_mean_is_that_of_a_cut_log_normal() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(math.log(180), 1.0, 1_000_000))
    assert costs.assumed_mean_length(2048) == pytest.approx(np.minimum(lengths, 2048).mean(), rel=0.003)
    assert costs.assumed_mean_length(10**9) == pytest.approx(180 * math.exp(0.5))


def test_the_reference_set_is_counted_up_to_the_last_scored_tokens(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "reference", rows_per_shard=(4,))
    config = tiny_config(oracle={"reference_samples": 3})
    assert costs.reference_tokens(config, pool) == costs.ReferenceTokens(3, 3 * 8.0, measured=True), "contexts are scored throughout"
    masks = [np.isin(np.arange(9), scored) for scored in ((2, 5), (8,), (), (1,))]
    pool = make_reference_set(tmp_path / "scored", [np.arange(9) + 10] * 4, masks)
    assert costs.reference_tokens(config, pool).tokens == 5 + 8 + 0
    assert costs.reference_tokens(tiny_config(oracle={"reference_samples": 99}), pool) == costs.ReferenceTokens(4, 14.0, measured=True)
    assert str(costs.reference_tokens(config, pool)) == "3 examples, 13 tokens"


def test_without_the_reference_set_its_lengths_are_assumed_and_that_is_said() -> None:
    assumed = costs.reference_tokens(tiny_config(model={"sequence_length": 2048}, oracle={"reference_samples": 128}), None)
    assert not assumed.measured and assumed.tokens == 128 * costs.assumed_mean_length(2048)
    assert str(assumed) == (
        "128 examples, about 37,065 tokens (not read; assumed: log-normal lengths, median 180, sigma 1, cut at the sequence length)"
    )


def test_measured_times_by_hand() -> None:
    config = tiny_config(oracle={**ORACLE, "noise_rollouts": 2})
    rates = costs.Rates(run=Path("run"), steps_per_second={"exact": 10.0, "first_order": 50.0}, labels_per_second=4.0)
    assert costs.measured_seconds(config, "exact", rates) == pytest.approx((60 + 8) * 5 / 10)
    assert costs.measured_seconds(config, "first_order", rates) == pytest.approx(60 * 5 / 50 + (4 + 8) * 5 / 10)
    assert costs.measured_seconds(config, "directional", rates) == pytest.approx((60 + 8) * 5 / 10 + 16 / 4)
    exact_only = costs.Rates(run=Path("run"), steps_per_second={"exact": 10.0}, labels_per_second=None)
    assert [costs.measured_seconds(config, name, exact_only) for name in costs.ESTIMATORS] == [pytest.approx(34.0), None, None]


def test_rates_are_those_of_the_newest_round_by_how_it_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", oracle={"estimator": "first_order", "rollout_length": 4})
    write_round(run, 1, oracle_random=1.0, oracle_noise=0.1, oracle_validation=2.0, oracle_directional=9.0)
    write_round(run, 2, **{"oracle_random__batch-000000": 3.0, "oracle_random__exact": 1.5})
    assert costs.read_rates(run, tiny_config()) == costs.Rates(run, {"exact": 6.0, "first_order": 12.0}, 9.0)
    write_round(run, 3, oracle_noise=0.1)
    assert costs.read_rates(run, tiny_config()).steps_per_second["exact"] == 6.0
    plain = write_run(tmp_path / "plain", oracle={"estimator": "directional"})
    write_round(plain, 1, oracle_bootstrap=3.0)
    assert costs.read_rates(plain, tiny_config()).steps_per_second == {"exact": 30.0}


def test_rates_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a run directory: it has no config\.yaml"):
        costs.read_rates(tmp_path / "nowhere", tiny_config())
    run = write_run(tmp_path / "run", model={"num_layers": 3})
    with pytest.raises(UserError, match=r"--rates .*run is of another model \(model\.num_layers: 3 -> 2\); give a run of the same model"):
        costs.read_rates(run, tiny_config())
    empty = write_run(tmp_path / "empty")
    write_json(empty / "selection" / "rounds" / "round-000001" / "oracle_random.stage.json", {"seconds": 1.0, "flops": 2.0})
    with pytest.raises(UserError, match=r"--rates .*empty: no finished round of it has a rate .*leave --rates out"):
        costs.read_rates(empty, tiny_config())


def test_the_runs_own_rates_are_taken_where_it_has_any(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path / "run")})
    assert costs.find_rates(config) is None
    run = write_run(tmp_path / "run", oracle={"estimator": "exact"})
    assert costs.find_rates(config) is None
    write_round(run, 1, oracle_random=2.0)
    rates = costs.find_rates(config)
    assert rates is not None and rates.steps_per_second == {"exact": 20.0}


def test_the_example_costs_a_fraction_of_the_authors_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--no-data", "--config", str(EXAMPLE), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    training = 3 * facts["tokens"]
    step, noise = 3 * 2048, 4 * 16 * 10
    evaluation = 128 * costs.assumed_mean_length(2048)
    shares = {name: cost["share_of_training"] for name, cost in facts["oracle"]["round"].items()}
    assert shares == pytest.approx(
        {
            "exact": (400_000 + noise) * (step + evaluation) / training,
            "first_order": (400_000 * step + (10_000 + noise) * (step + evaluation)) / training,
            "directional": ((400_000 + noise) * (step + evaluation) + 2 * 81_920 * 2048 + 3 * evaluation) / training,
            "authors": 400_000 * (step + 128 * 2048) / training,
        }
    )
    assert main(["plan", "--no-data", "--config", str(EXAMPLE), "--gpus", "8", "--server-gpus", "8"]) == 0
    table = capsys.readouterr().out
    for part in (
        "oracle per round  as a share of the training FLOPs; times assume --tflops\n",
        "  reference set   128 examples, about 37,065 tokens (not read; assumed: ",
        "  exact                     17.52 %, 1.42e+19 FLOPs, 74.0 min, 6.2x cheaper than the authors' way\n",
        "  first_order (configured)  2.95 %, 2.39e+18 FLOPs, 12.5 min, 36.8x cheaper than the authors' way\n",
        "  directional               17.86 %, of it 0.34 % for the labels, 1.45e+19 FLOPs, 75.4 min, 6.1x cheaper than the authors' way\n",
        "  the authors' way          108.63 %, 8.81e+19 FLOPs, 7.6 h\n",
    ):
        assert part in table


def test_the_table_tells_measured_times_from_assumed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", oracle={**ORACLE, "estimator": "exact", "budget": "adaptive"})
    write_round(run, 1, oracle_random=2.0)
    assert main(["plan", "--no-data", "--config", str(run / "config.yaml"), "--rates", str(run)]) == 0
    lines = {line.split("  ")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert ", 30.0 s measured, " in lines["exact (configured)"] and " at most " in lines["exact (configured)"]
    assert " at --tflops, " in lines["first_order"] and "measured" not in lines["first_order"]
    assert lines["the authors' way"].endswith(" at --tflops") and "at most" not in lines["the authors' way"]


def test_a_selection_without_an_oracle_has_no_such_table(capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("selection.method=similarity", "selection.enabled=false"):
        assert main(["plan", "--no-data", "--config", str(EXAMPLE), "--set", setting]) == 0
        assert "oracle per round" not in capsys.readouterr().out


def test_the_example_has_the_authors_budget() -> None:
    config = parse_config(EXAMPLE.read_text(), source=str(EXAMPLE))
    assert config.oracle.reference_samples == costs.AUTHORS_REFERENCE
    assert config.oracle.num_random_rollouts + config.oracle.num_bootstrap_rollouts == costs.AUTHORS_ROLLOUTS
    assert config.oracle.rollout_length == costs.AUTHORS_STEPS
