"""``plan``: the published sizes of the example configs, costs that add up, and pools that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.cli.main import main
from megatron_groupmates.cli.oracle_costs import ReferenceTokens
from megatron_groupmates.cli.plan import Hardware, format_plan, make_plan, selection_flops
from megatron_groupmates.cli.selection_costs import TEXT_ENCODER_FLOPS_PER_TOKEN
from megatron_groupmates.config import UserError, dump_config
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from tests.common.configs import tiny_config
from tests.pool import helpers
from tests.pool.helpers import change_facts, make_pool

EXAMPLES = Path(__file__).parents[2] / "examples" / "dclm"
# DCLM, as the paper used it: parameters and training tokens.
PUBLISHED = {
    "400m_4x": (411_616_256, 4 * 8_232_325_120),
    "1b_1x": (1_439_795_200, 28_795_904_000),
    "3b_1x": (2_795_932_160, 55_918_643_200),
}


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """``--config`` of a tiny run whose pools are there."""
    make_pool(tmp_path / "pool")
    make_pool(tmp_path / "reference", rows_per_shard=(4,), seed=1)
    path = tmp_path / "config.yaml"
    data = {"pool": str(tmp_path / "pool"), "reference": str(tmp_path / "reference")}
    path.write_text(dump_config(tiny_config(run={"output_dir": str(tmp_path / "run")}, data=data)))
    return ["--config", str(path)]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_examples_have_the_published_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parameters, tokens = PUBLISHED[name]
    facts = run_plan(capsys, "--no-data", "--config", str(EXAMPLES / f"{name}.yaml"), "--gpus", "8")
    assert facts["parameters"] == pytest.approx(parameters, rel=0.005)
    assert facts["tokens"] == pytest.approx(tokens, rel=0.001)
    assert facts["tokens"] == facts["samples"] * 2048
    # Six FLOPs per weight and token, and the attention on top.
    assert 0.9 < facts["training"]["flops"] / (6 * parameters * tokens) < 1.4
    assert facts["pool"] is None
    assert len(facts["refresh_steps"]) >= 3 and 0 < facts["selection_share_of_training"] < 1


def test_packed_documents_are_counted_as_sequences(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    packed = [*run, "--set", "data.packing=documents", "--set", "selection.enabled=false", "--set", "model.sequence_length=11"]
    facts = run_plan(capsys, *packed, "--set", "data.reference=null", "--set", "data.evaluation=null")
    assert facts["pool"] == {"samples": 16, "sequences": 12, "tokens": 144, "shards": 3, "epochs": 80 / 12}
    assert main(["plan", *packed, "--set", "data.reference=null", "--set", "data.evaluation=null"]) == 0
    assert "16 samples, 144 tokens in 3 shards, 12 training sequences; the run reads 6.67 of it" in capsys.readouterr().out


def test_costs_add_up(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_plan(capsys, *run, "--gpus", "2", "--server-gpus", "4", "--tflops", "0.5", "--set", "checkpoint.save_interval=4")
    assert (facts["samples"], facts["tokens"]) == (80, 640)
    assert (facts["data_parallel_size"], facts["micro_batches_per_step"]) == (2, 1)
    assert facts["training"]["seconds"] == pytest.approx(facts["training"]["flops"] / (2 * 0.5e12))
    assert facts["training"]["flops"] == 640 * facts["training_flops_per_token"]
    assert facts["refresh_steps"] == [5, 10, 15]
    assert facts["checkpoints"] == len({4, 8, 12, 16, 20} | {5, 10, 15})
    assert facts["disk_bytes"] == facts["checkpoints"] * facts["checkpoint_bytes"] == 8 * 14 * facts["parameters"]
    assert facts["memory_per_gpu"]["total"] == sum(value for name, value in facts["memory_per_gpu"].items() if name != "total")
    assert facts["pool"] == {"samples": 16, "sequences": 16, "tokens": 144, "shards": 3, "epochs": 5.0}
    stages = facts["selection"]
    assert set(stages) == {"oracle_random", "oracle_validation", "oracle_bootstrap", "oracle_noise", "candidates", "embeddings"}
    assert all(stage["seconds"] == pytest.approx(stage["flops"] / (4 * 0.5e12)) for stage in stages.values())
    total = sum(stage["flops"] for stage in stages.values())
    assert facts["selection_share_of_training"] == pytest.approx(3 * total / facts["training"]["flops"])


def test_recomputation_costs_time_but_no_training_flops(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plain, full = (
        run_plan(capsys, *run, "--gpus", "2", "--tflops", "0.5", "--set", f"training.recompute_granularity={granularity}")
        for granularity in ("none", "full")
    )
    assert full["training"]["flops"] == plain["training"]["flops"]
    again = 640 * (plain["training_flops_per_token"] // 3 - 2 * 320 * 32)
    assert full["training"]["seconds"] == pytest.approx(plain["training"]["seconds"] + again / (2 * 0.5e12))
    assert full["memory_per_gpu"]["activations"] < plain["memory_per_gpu"]["activations"]


def test_a_save_at_the_last_step_is_counted_once(tmp_path: Path) -> None:
    hardware = Hardware(gpus=1, server_gpus=1, flops_per_second=1e12)
    for interval, count in ((5, 4), (7, 3), (20, 1), (100, 1)):
        config = tiny_config(checkpoint={"save_interval": interval}, selection={"enabled": False})
        facts = make_plan(config, hardware, None)
        assert facts["checkpoints"] == count
        assert facts["selection"] == {} and facts["selection_share_of_training"] == 0


def test_each_method_costs_what_it_does() -> None:
    sequence = float(model_size(tiny_config()).forward_flops_per_token) * 8
    oracle = {
        "estimator": "exact",
        "noise_rollouts": 0,
        "num_random_rollouts": 7,
        "num_bootstrap_rollouts": 3,
        "rollout_length": 4,
        "reference_samples": 5,
        "num_candidates": 16,
    }
    lengths = np.full(100, 9)
    reference = ReferenceTokens(examples=5, tokens=5 * 8.0, measured=True)
    exact = selection_flops(tiny_config(oracle=oracle), lengths, reference)
    assert exact == pytest.approx(
        {
            "oracle_random": 7 * 4 * 8 * sequence,
            "oracle_bootstrap": 3 * 4 * 8 * sequence,
            "candidates": 16 * sequence,
            "embeddings": 100 * sequence,
        }
    )
    short = selection_flops(tiny_config(oracle=oracle), np.tile([5, 9 + 100], 50), reference)
    assert short["embeddings"] == 100 * sequence * 6 / 8, "documents of 4 and of 8 inputs, all that the model reads of a longer one"
    assert short["oracle_random"] == pytest.approx(7 * 4 * (3 * 6 / 8 + 5) * sequence)
    cheap = selection_flops(tiny_config(oracle={**oracle, "estimator": "first_order"}), None, reference)
    assert cheap == pytest.approx(
        {
            "oracle_random": 7 * 4 * 3 * sequence,
            "oracle_bootstrap": 3 * 4 * 3 * sequence,
            "oracle_validation": 4 * 4 * 8 * sequence,
            "candidates": 16 * sequence,
        }
    )
    directional = selection_flops(tiny_config(oracle={**oracle, "estimator": "directional"}), lengths, reference)
    # Two passes over the 16 candidates, and forward and backward over 5 reference examples.
    assert directional == pytest.approx({**exact, "oracle_directional": (2 * 16 + 3 * 5) * sequence})
    assert selection_flops(tiny_config(selection={"method": "individual"}, oracle=oracle), lengths, reference) == exact
    assert set(selection_flops(tiny_config(selection={"method": "similarity"}), lengths, reference)) == {"embeddings"}
    assert selection_flops(tiny_config(selection={"method": "random"}), lengths, reference) == {}


def test_a_text_encoder_reads_what_the_model_does_not() -> None:
    lengths, reference = np.full(100, 9), ReferenceTokens(examples=5, tokens=5 * 8.0, measured=True)
    own = selection_flops(tiny_config(), lengths, reference)
    other = selection_flops(tiny_config(relational={"encoder": "some/encoder"}), lengths, reference)
    assert other["embeddings"] == TEXT_ENCODER_FLOPS_PER_TOKEN * 100 * 8 and other["oracle_random"] == own["oracle_random"]
    assert other["candidates"] / other["embeddings"] == own["candidates"] / own["embeddings"]


def test_clusters_of_a_pool_that_is_not_there_yet(capsys: pytest.CaptureFixture[str]) -> None:
    example = ["--config", str(EXAMPLES / "400m_4x.yaml"), "--no-data"]
    assert run_plan(capsys, *example)["clusters"] is None
    found, other = (run_plan(capsys, *example, "--pool-samples", "29500000", "--server-cores", cores)["clusters"] for cores in ("10", "40"))
    assert (found["clusters"], found["dim"], found["cores"]) == (10007, 768, 10)
    for name in ("centroids", "clusters", "group"):
        assert found["stages"][name]["seconds"] == pytest.approx(4 * other["stages"][name]["seconds"])
        assert found["stages"][name]["core_seconds"] == other["stages"][name]["core_seconds"]
    assert found["stages"]["sorted"] == other["stages"]["sorted"], "which waits for one disk"
    assert found["plain_choice"]["core_seconds"] > 5 * found["stages"]["group"]["core_seconds"]
    assert found["bytes"]["embeddings"] == 29_500_000 * 768 * 2
    assert main(["plan", *example, "--pool-samples", "29500000"]) == 0
    table = capsys.readouterr().out
    assert "clusters          10,007 of 768 dimensions; on 16 cores" in table and "84.4 GiB while a round selects" in table
    individual = run_plan(capsys, *example, "--pool-samples", "1000", "--set", "selection.method=individual")
    assert individual["clusters"] is None


def test_a_pool_that_is_there_has_the_samples_it_has(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: --pool-samples: the pool itself says how many samples it has" in refused(capsys, *run, "--pool-samples", "5")
    assert run_plan(capsys, *run)["clusters"]["clusters"] == 1


def test_the_table_says_it_for_people(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *run, "--tflops", "1e-9"]) == 0
    table = capsys.readouterr().out
    for part in (
        f"parameters        {model_size(tiny_config()).parameters:,}\n",
        "training          640 tokens in 80 samples; data parallel 1, 2 micro-batches per step",
        "GiB: 4 checkpoints of",
        "pool              16 samples, 144 tokens in 3 shards; the run reads 5.00 of it\n",
        "selection         3 refreshes, at steps 5 to 15; ",
        "  oracle_random   ",
    ):
        assert part in table
    assert main(["plan", *run, "--set", "selection.enabled=false"]) == 0
    assert "selection" not in capsys.readouterr().out
    assert main(["plan", *run, "--set", "selection.max_refreshes=0"]) == 0
    assert "selection         0 refreshes; 0.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "shown"), [(1.26, "1.3 s"), (600.0, "10.0 min"), (7200.0, "2.0 h")])
def test_times_have_a_fitting_unit(seconds: float, shown: str) -> None:
    config = tiny_config(selection={"enabled": False})
    flops = make_plan(config, Hardware(1, 1, 1.0), None)["training"]["flops"]
    assert f" FLOPs, {shown} on 1 GPUs" in format_plan(make_plan(config, Hardware(1, 1, flops / seconds), None))


def test_a_missing_pool(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("pool", "reference", "evaluation"):
        missing = tmp_path / "nowhere"
        message = refused(capsys, *run, "--set", f"data.{what}={missing}")
        assert message.startswith(f"error: data.{what}: there is no pool at {missing}: no such directory; make one with ")
    assert run_plan(capsys, *run, "--no-data", "--set", f"data.pool={missing}")["pool"] is None


def test_a_directory_that_is_no_pool(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    message = refused(capsys, *run, "--set", f"data.pool={tmp_path / 'folder'}")
    assert message.startswith(f"error: data.pool: {tmp_path / 'folder'} is not a pool: it has no pool.json; make a pool with ")


def test_an_empty_pool(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_facts(tmp_path / "reference", num_samples=0)
    assert refused(capsys, *run) == f"error: data.reference: pool {tmp_path / 'reference'} is empty: it has no sample\n"


@pytest.mark.parametrize("what", ["reference", "evaluation"])
def test_pools_of_different_tokenizers(
    what: str, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    respelt = json.dumps(json.loads(helpers.tokenizer_json()), indent=1).encode()
    monkeypatch.setattr(helpers, "tiny_tokenizer", lambda: PoolTokenizer(respelt, "other"))
    other = make_pool(tmp_path / "other")
    pool = PoolIndex.open(tmp_path / "pool")
    assert other.tokenizer["fingerprint"] != pool.tokenizer["fingerprint"]
    message = refused(capsys, *run, "--set", f"data.{what}={other.directory}")
    assert message == (
        f"error: data.{what}: {other.directory} was tokenised with {other.tokenizer}, the pool {pool.directory} with "
        f"{pool.tokenizer}; preprocess both with the same tokenizer\n"
    )


def test_a_vocabulary_larger_than_the_models(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *run, "--set", "model.vocab_size=299")
    assert message == (
        f"error: data.pool: the tokenizer of {tmp_path / 'pool'} has 300 tokens, model.vocab_size is 299; "
        "raise model.vocab_size to at least 300\n"
    )
    assert run_plan(capsys, *run, "--set", "model.vocab_size=300")["pool"]["samples"] == 16


def test_samples_of_another_length(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *run, "--set", "model.sequence_length=16")
    assert "training sequences of 16 tokens need samples of 17 tokens, but 16 of the 16 samples of " in message
    assert str(tmp_path / "pool") in message and "--pack 17" in message
    make_pool(tmp_path / "long", length=10)
    message = refused(capsys, *run, "--set", f"data.reference={tmp_path / 'long'}")
    assert str(tmp_path / "long") in message and "(the first has 10)" in message


def test_a_batch_that_does_not_divide(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = "training.global_batch_size: 4 is not a multiple of micro_batch_size 2 x data-parallel size 3"
    assert message in refused(capsys, *run, "--gpus", "3")
    with pytest.raises(UserError, match=re.escape(message)):
        make_plan(tiny_config(), Hardware(gpus=3, server_gpus=1, flops_per_second=1e12), None)
    message = refused(capsys, *run, "--gpus", "3", "--set", "parallel.tensor_model_parallel_size=2")
    assert "2 does not divide the 3 started ranks" in message
