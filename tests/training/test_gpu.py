"""Trainer and server on a GPU: bf16, NCCL, one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_groupmates.pool.generation import read_pointer
from megatron_groupmates.pool.log import read_log
from tests.training.runs import losses, make_config
from tests.training.test_jobs import SELECTING, SIZES, finish, start_job


@pytest.mark.gpu
def test_a_run_with_a_refresh_on_one_gpu(tmp_path: Path):
    one = ("parallel.tensor_model_parallel_size=1", "selection.mode=inline", "selection.max_staleness_steps=null")
    config = make_config(tmp_path, *SIZES, *SELECTING, *one)
    finish(start_job("train", tmp_path / "run.yaml", ranks=1))
    finish(start_job("serve", tmp_path / "run.yaml", "--once", ranks=1))
    finish(start_job("train", tmp_path / "run.yaml", ranks=1))
    selection = Path(config.run.output_dir) / "selection"
    assert read_pointer(selection) == 1
    assert {entry.generation for entry in read_log(selection / "log.jsonl")} == {0, 1}
    assert len(losses(config)) == 40 and losses(config)[-1] < losses(config)[0]
