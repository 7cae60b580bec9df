"""A job that loses a rank says so and ends, whatever its launcher does."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from megatron_groupmates.cli.job_commands import how_to_go_on
from megatron_groupmates.config import RunPaths
from tests.common.configs import tiny_config
from tests.training.runs import make_config, rows
from tests.training.test_jobs import start_job


@pytest.mark.slow
def test_the_others_say_who_was_lost_and_where_to_go_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, "parallel.tensor_model_parallel_size=2", "training.train_iters=100000", "training.eval_interval=100000")
    job = start_job("train", tmp_path / "run.yaml")
    metrics, deadline = Path(config.run.output_dir) / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and any(row["step"] >= 5 for row in rows(config))):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (victim,) = [process for process in psutil.Process(job.pid).children(recursive=True) if "--local_rank=1" in process.cmdline()]
    victim.kill()
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert f"lost rank 1 on host {Path('/proc/sys/kernel/hostname').read_text().strip()}: killed, crashed, or the host is gone;" in output
    assert f"the newest complete checkpoint is {RunPaths.of(config).checkpoints}/global_step" in output
    assert "Traceback" not in output, output


def test_what_can_be_done_after_a_loss(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path)})
    assert how_to_go_on("serve", config) == "what the round has finished is kept; start the same command again"
    assert how_to_go_on("train", config) == "there is no complete checkpoint yet; start the same command again"
    checkpoints = RunPaths.of(config).checkpoints
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("global_step8")
    expected = f"the newest complete checkpoint is {checkpoints}/global_step8; the same command goes on from it, exactly as without the"
    assert how_to_go_on("train", config) == f"{expected} interruption"
