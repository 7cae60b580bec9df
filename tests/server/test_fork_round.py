"""A whole round on a checkpoint that a real checkout of Megatron-DeepSpeed left: read, measured, published."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, RunPaths
from megatron_groupmates.pool.generation import load_generation, read_pointer, read_provenance
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server import watch
from megatron_groupmates.utils.files import read_json
from tests.common.distributed import run_ranks
from tests.common.forks import BATCH, DATA, STEP, fork_config
from tests.common.gpt_runs import open_groups, snapshot, tiny_tree
from tests.pool.helpers import make_pool

VARIANT, SAMPLE_TOKENS, VOCABULARY = "gpt-tp2-zero1", 17, 47


def selection_run(root: Path, variant: str = VARIANT, server_size: int = 1, **sections: dict[str, Any]) -> Config:
    """A run as the integration describes it: one directory for all that is ours, the checkout's own for its checkpoints."""
    generator = np.random.default_rng(3)
    for name, rows in (("pool", (40, 56)), ("reference", (6,))):
        samples = list(generator.integers(0, VOCABULARY, (sum(rows), SAMPLE_TOKENS)))
        make_pool(root / name, rows, samples=samples, vocab_size=VOCABULARY)
    shutil.copytree(DATA / variant, root / "saved")
    chosen = tiny_tree(root)
    chosen["selection"] |= {"first_refresh_step": STEP, "refresh_interval": 2}
    ours = {
        "run": {"output_dir": str(root / "selection"), "selection_dir": str(root / "selection"), "seed": 5, "wandb_mode": "disabled"},
        "data": {"pool": str(root / "pool"), "reference": str(root / "reference")},
        "checkpoint": {"directory": str(root / "saved")},
        "server": chosen["server"] | {"tensor_model_parallel_size": server_size},
        **{section: chosen[section] for section in ("selection", "oracle", "relational")},
    }
    for section, settings in sections.items():
        ours[section] = ours[section] | settings
    return fork_config(variant, **ours)


def serve_once(rank: int, world_size: int, config: Config) -> None:
    assert watch.serve(config, open_groups(world_size), once=True)


def losses(config: Config) -> np.ndarray:
    with np.load(RunPaths.of(config).round(1) / "oracle_random.npz") as content:
        return content["losses"]


def test_a_round_publishes_what_its_oracles_chose(groups, tmp_path):
    config = selection_run(tmp_path)
    paths = RunPaths.of(config)
    before = snapshot(paths.checkpoints)
    assert watch.serve(config, groups, once=True)
    assert snapshot(paths.checkpoints) == before, "reading a checkpoint must not change it"
    assert read_pointer(paths.selection) == 1
    provenance = read_provenance(paths.selection, 1)
    assert (provenance["checkpoint_step"], provenance["consumed_train_samples"]) == (STEP, STEP * BATCH)
    # The learning rate of the checkout's next step, whatever its schedule is.
    assert provenance["oracle"]["learning_rate"] == pytest.approx(3.25e-3)
    pool = PoolIndex.open(config.data.pool)
    generation = load_generation(paths.selection, 1, pool)
    assert 0 < generation.num_samples < pool.num_samples
    assert read_json(paths.server_state)["state"] == "finished"


def test_two_ranks_measure_what_one_does(groups, tmp_path):
    alone, shared = (selection_run(tmp_path / name, "llama-tp2-zero2", size) for name, size in (("one", 1), ("two", 2)))
    assert watch.serve(alone, groups, once=True)
    run_ranks(serve_once, 2, shared, tmp_path=tmp_path)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=0.0, atol=2e-5)


def test_the_refreshes_of_a_checkouts_run_are_found(groups, tmp_path):
    config = selection_run(tmp_path, selection={"method": "random", "max_refreshes": 1})
    assert watch.serve(config, groups, once=False)
    assert read_pointer(RunPaths.of(config).selection) == 1


def test_a_checkpoint_of_another_trainer_than_the_config_says_fails_its_round(groups, tmp_path):
    config = selection_run(tmp_path)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, format="megatron_lm"))
    assert not watch.serve(config, groups, once=True)
    paths = RunPaths.of(config)
    assert "is not a checkpoint of --ckpt-format torch_dist" in read_json(paths.round_failure(1))["reason"]
    assert not read_pointer(paths.selection)
