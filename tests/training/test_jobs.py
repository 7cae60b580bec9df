"""Trainer and server as users start them: real ``deepspeed`` jobs, killed with SIGKILL at any time and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_groupmates.pool.log import read_log
from tests.common.distributed import run_ranks
from tests.common.ports import free_port
from tests.training.runs import Job, evaluations, losses, make_config, rows, train_jobs

ROOT = Path(__file__).parents[2]
SIZES = ("parallel.tensor_model_parallel_size=2", "training.train_iters=40", "training.eval_interval=20", "checkpoint.save_interval=10")
SELECTING = (
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
    "oracle.chunk_rollouts=2",
    "relational.embedding_dim=8",
    "relational.epochs=3",
    "server.poll_interval_seconds=0.1",
)


def start_job(command: str, config_file: Path, *arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    """A ``deepspeed`` job of ``ranks`` ranks in a process group of its own."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*launcher, "--module", "megatron_groupmates", command, "--config", str(config_file), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """:func:`start_job`; what is left of the jobs when the test ends, however it does, is killed."""
    jobs: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        jobs.append(start_job(*arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            _kill(job)


def _kill_when(job: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Kill the job as soon as ``reached``; one that ended before fails the test."""
    while not reached():
        assert job.poll() is None, f"the job ended before it could be killed:\n{job.communicate()[0]}"
        time.sleep(0.02)
    _kill(job)


def _kill(job: subprocess.Popen[str]) -> None:
    """SIGKILL every process of the job."""
    for session in _sessions(job.pid):
        with contextlib.suppress(ProcessLookupError):  # all of a group may have ended since it was listed
            os.killpg(session, signal.SIGKILL)
    job.wait()


def _sessions(leader: int) -> set[int]:
    """Process groups of the launcher and its descendants (the launcher gives its ranks groups of their own)."""
    import psutil

    groups = set()
    for process in (psutil.Process(leader), *psutil.Process(leader).children(recursive=True)):
        with contextlib.suppress(ProcessLookupError):  # a short-lived child, gone since it was listed
            groups.add(os.getpgid(process.pid))
    return groups


def finish(job: subprocess.Popen[str]) -> str:
    """What a job that must succeed prints."""
    output = job.communicate()[0]
    assert job.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it starts two dozen processes, which on a busy machine are slow to begin
def test_jobs_killed_at_any_time_go_on_where_they_stood(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]):
    """One run with trainer and server killed, against one that is never interrupted but follows the same generations."""
    killed = make_config(tmp_path, *SIZES, *SELECTING, run="killed")
    config_file, directory = tmp_path / "killed.yaml", Path(killed.run.output_dir)
    trainer = start("train", config_file)
    _kill_when(trainer, lambda: (directory / "metrics.jsonl").exists() and any(row["step"] >= 14 for row in rows(killed)))

    server = start("serve", config_file)
    chunks = directory / "selection/rounds/round-000001/oracle_random"
    _kill_when(server, lambda: len(list(chunks.glob("chunk-*.npz"))) >= 2)
    kept = {path: path.stat().st_mtime_ns for path in chunks.glob("chunk-*.npz")}
    finish(start("serve", config_file, "--once"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished chunks are not measured again"
    assert (directory / "selection/latest").read_text() == "generation-000001\n"

    trainer = start("train", config_file)
    _kill_when(trainer, lambda: any(row["step"] >= 25 for row in rows(killed) if "loss" in row))
    finish(start("train", config_file))
    assert "nothing to do" in finish(start("train", config_file))

    # The same generations under the same log, in one go.
    whole = make_config(tmp_path, *SIZES, *SELECTING, "selection.max_staleness_steps=null", run="whole")
    selection = Path(whole.run.output_dir) / "selection"
    selection.parent.mkdir()
    shutil.copytree(directory / "selection", selection)
    assert run_ranks(train_jobs, 2, [Job(config=whole)], tmp_path=tmp_path) == [["finished"]] * 2
    assert {entry.generation for entry in read_log(selection / "log.jsonl")} == {0, 1}
    assert len(losses(whole)) == 40
    assert losses(killed) == losses(whole)
    assert evaluations(killed) == evaluations(whole)


@pytest.mark.slow
def test_a_user_error_in_a_job_is_one_message_and_exit_code_1(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]):
    make_config(tmp_path, *SIZES)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace(str(tmp_path / "pool"), str(tmp_path / "nowhere")))
    job = start("train", tmp_path / "wrong.yaml")
    output = job.communicate()[0]
    assert job.returncode == 1
    assert output.count("error: data.pool:") == 1 and "Traceback" not in output, output
