"""Trainer on two hosts, selection server on a third, as the launch scripts start them; a host is lost, another lacks something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_groupmates.config import Config
from megatron_groupmates.pool.log import read_log
from tests.integration.hosts import Hosts, hostfile
from tests.training.runs import evaluations, losses, make_config, rows

ROOT = Path(__file__).parents[2]
SCRIPTS = "examples/multi_host"
SETTINGS = (
    "parallel.tensor_model_parallel_size=2",
    "training.train_iters=30",
    "training.eval_interval=15",
    "checkpoint.save_interval=10",
    "selection.enabled=true",
    "selection.first_refresh_step=10",
    "selection.refresh_interval=100",
    "selection.poll_interval_steps=1",
    "selection.max_staleness_steps=10",
    "selection.num_clusters=2",
    "selection.ratio=0.4",
    "oracle.estimator=first_order",
    "oracle.num_random_rollouts=12",
    "oracle.num_bootstrap_rollouts=4",
    "oracle.num_candidates=40",
    "oracle.rollout_length=4",
    "oracle.chunk_rollouts=4",
    "relational.embedding_dim=8",
    "relational.epochs=3",
    "server.poll_interval_seconds=0.1",
    "server.tensor_model_parallel_size=1",
)
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.timeout(600)


class Started:
    """A command in the repository on a host, its standard error with its standard output in a file."""

    def __init__(self, hosts: Hosts, host: str, log: Path, *command: str, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                hosts.command(host, *command), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def await_that(self, reached: Callable[[], bool], seconds: float = 240) -> None:
        """Until ``reached``, while it runs."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def end(self, seconds: float = 240) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output()) from None

    def finish(self) -> str:
        """What it prints; it must succeed."""
        assert self.end() == 0, self.output()
        return self.output()


def trace(config: Config) -> list[dict[str, object]]:
    last = config.training.train_iters * config.training.global_batch_size
    command = [sys.executable, "-m", "megatron_groupmates", "trace", config.run.output_dir, "--start", "0", "--stop", str(last)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_lost_host_ends_the_job_and_the_same_command_resumes_exactly(hosts: Hosts, tmp_path: Path) -> None:
    config = make_config(tmp_path, *SETTINGS)
    directory = Path(config.run.output_dir)
    command = [
        *("bash", f"{SCRIPTS}/deepspeed.sh", str(tmp_path / "run.yaml")),
        *("--trainers", str(hostfile(tmp_path / "trainers", 2, ["node1", "node2"]))),
        *("--servers", str(hostfile(tmp_path / "servers", 1, ["node3"]))),
    ]
    job = Started(hosts, "node1", tmp_path / "first.log", *command)
    job.await_that(lambda: (directory / "metrics.jsonl").exists() and any(row["step"] >= 24 for row in rows(config)))
    assert {entry.generation for entry in read_log(directory / "selection/log.jsonl")} == {0, 1}, "a selection was adopted before"
    hosts.kill_processes("node2")
    killed = time.monotonic()
    assert job.end() != 0
    output = job.output()
    assert time.monotonic() - killed < 60
    assert "lost ranks 2, 3 on host node2: killed, crashed, or the host is gone; the newest complete checkpoint is" in output, output
    assert f"{directory}/checkpoints/global_step20; the same command goes on from it" in output
    assert "Traceback" not in output

    Started(hosts, "node1", tmp_path / "second.log", *command).finish()

    # The same generations under the same log in one go, started in another way.
    whole = make_config(tmp_path, *SETTINGS, "selection.max_staleness_steps=null", run="whole")
    shutil.copytree(directory / "selection", Path(whole.run.output_dir) / "selection")
    torchrun = [
        *("bash", f"{SCRIPTS}/torchrun.sh", str(tmp_path / "whole.yaml"), "--job", "train"),
        *("--hosts", "2", "--ranks-per-host", "2", "--meet", "node1:29555"),
    ]
    for each in [Started(hosts, host, tmp_path / f"{host}.log", *torchrun) for host in ("node1", "node2")]:
        each.finish()
    assert len(losses(whole)) == 30
    assert losses(config) == losses(whole)
    assert evaluations(config) == evaluations(whole)
    assert trace(config) == trace(whole)


def test_what_a_host_lacks_is_told_by_its_name(hosts: Hosts, tmp_path: Path) -> None:
    config = make_config(tmp_path, "selection.enabled=true", "selection.mode=inline", "selection.first_refresh_step=4")
    only_here = tmp_path / "settings"
    only_here.mkdir()
    (tmp_path / "run.yaml").rename(only_here / "run.yaml")
    run, pool = Path(config.run.output_dir), Path(config.data.pool)
    run.mkdir()
    hidden = [("node2", only_here), ("node3", pool), ("node3", run)]
    for host, directory in hidden:
        hosts.hide(host, directory)
    try:
        trainers = hostfile(tmp_path / "trainers", 1, hosts.names)
        command = ["bash", f"{SCRIPTS}/deepspeed.sh", str(only_here / "run.yaml"), "--trainers", str(trainers)]
        job = Started(hosts, "node1", tmp_path / "job.log", *command)
        assert job.end() != 0
    finally:
        for host, directory in hidden:
            hosts.show(host, directory)
    output = job.output()
    assert output.count("not every one of the 3 hosts has what this job needs") == 1, output
    assert f"host node2: --config: {only_here / 'run.yaml'} does not exist" in output
    assert f"host node3: data.pool: {pool} is not a pool" in output
    assert f"host node3: run.output_dir: {run} is not the directory that rank 0 writes to" in output
    assert "Traceback" not in output
    assert list(run.iterdir()) == [], "a run that cannot start leaves nothing behind"
