"""A whole round from a ZeRO-3 checkpoint is the round from one of the same weights and moments that ZeRO-1 saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, RunPaths
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server import watch
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import REFRESHES
from tests.training.layouts import Hop, hop

STEP = REFRESHES[0]


def serve(config: Config, groups) -> dict[str, np.ndarray]:
    """One round; its selection and, by stage and name, what its stages kept."""
    assert watch.serve(config, groups, once=True)
    paths = RunPaths.of(config)
    kept = {"mask": load_generation(paths.selection, 1, PoolIndex.open(config.data.pool)).mask}
    for path in sorted(paths.round(1).glob("*.npz")):
        with np.load(path) as content:
            kept |= {f"{path.stem}/{key}": value for key, value in content.items()}
    return kept


def test_a_round_from_a_zero_3_checkpoint_of_two_ranks(trained, groups, tmp_path: Path):
    one = trained.copy(tmp_path / "one", STEP)
    # Two data-parallel ranks; the batch of four is two micro-batches of two.
    three = trained.copy(tmp_path / "three", STEP, optimizer__zero_stage=3, training__micro_batch_size=2)
    tag, original = (RunPaths.of(config).checkpoints / f"global_step{STEP}" for config in (three, one))
    shutil.rmtree(tag)
    run_ranks(hop, 2, [Hop(config=three, source=original, target=tag)], tmp_path=tmp_path)
    saved = ZeroCheckpoint(tag)
    assert (saved.zero_stage, saved.data_parallel_size, saved.names) == (3, 2, ZeroCheckpoint(original).names)
    expected, found = serve(one, groups), serve(three, groups)
    assert expected.keys() == found.keys() and {"mask", "oracle_random/losses", "oracle_bootstrap/losses"} <= expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
