"""The oracle stage of a round by itself, on a checkpoint of a tiny trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config import Config, RunPaths
from megatron_groupmates.influence.oracle import draw_random_rollouts
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.context import RoundContext, RoundInput
from megatron_groupmates.server.round import load_probe
from megatron_groupmates.server.stages import choose_candidates, measure_oracles
from tests.common.gpt_runs import BATCH, REFRESHES

STEP = REFRESHES[0]


def open_context(config: Config, groups: Any) -> RoundContext:
    """Round 1 of a run on its checkpoint of ``STEP``, which need not exist before the probe is loaded."""
    pool = PoolIndex.open(config.data.pool)
    tag_dir = RunPaths.of(config).checkpoints / f"global_step{STEP}"
    given = RoundInput(number=1, tag_dir=tag_dir, step=STEP, consumed_train_samples=STEP * BATCH)
    context = RoundContext(config, groups, pool, given, open_exclusion(config, pool))
    context.begin(PoolIndex.open(config.data.reference))
    return context


def measure(config: Config, groups: Any) -> np.ndarray:
    """Exact reference losses float64 ``[R, T + 1]`` of the round's random rollouts, as the server measures and keeps them. Collective."""
    context = open_context(config, groups)
    probe, _ = load_probe(context, PoolIndex.open(config.data.reference))
    candidates = choose_candidates(context, np.arange(context.pool.num_samples))
    oracle = config.oracle
    rollouts = draw_random_rollouts(oracle.num_random_rollouts, oracle.rollout_length, len(candidates), context.seed("random rollouts"))
    return measure_oracles(context, "oracle_random", probe, candidates, rollouts, "exact")


def dataset(config: Config) -> Path:
    """The file that keeps them."""
    return RunPaths.of(config).round(1) / "oracle_random.npz"


def chunk_directory(config: Config) -> Path:
    """Where their chunks lie."""
    return dataset(config).with_suffix("")
