"""Oracle collection by real workers, killed with SIGKILL again and again: the same dataset, and little lost each time."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import Config
from megatron_groupmates.server import stages
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import TrainedRun, open_groups, snapshot
from tests.server.oracle_rounds import STEP, chunk_directory, dataset, measure

NUM_KILLS, NUM_WORKERS = 20, 2
# Chunks that a worker begins before it waits to be killed: without an end, a stalled test would find the work done.
QUOTA = 3
NUM_CHUNKS, CHUNK_ROLLOUTS = NUM_KILLS * NUM_WORKERS * QUOTA + 10, 2
SETTINGS = {
    "oracle__num_random_rollouts": NUM_CHUNKS * CHUNK_ROLLOUTS,
    "oracle__chunk_rollouts": CHUNK_ROLLOUTS,
    "oracle__rollout_length": 2,
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """What one killed server had begun, and what it left: names of chunks before and after."""

    begun: int
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The kills, chunks that the undisturbed last server began, and chunks there were before it."""

    kills: list[Kill]
    begun_last: int
    kept: dict[str, tuple[int, int]]


def work(rank: int, directory: Path, config: Config, quota: int | None) -> None:
    """Body of one worker: a line in ``directory/begun`` for each chunk it begins."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_WORKERS))
    log = os.open(directory / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    rendezvous = f"file://{directory / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_WORKERS)
    real, begun = stages.measure_rollouts, os.open(directory / "begun", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def measure_rollouts(*arguments: Any) -> np.ndarray:
        nonlocal count
        while count == quota:
            time.sleep(1)
        count += 1
        os.write(begun, f"{rank}\n".encode())
        return real(*arguments)

    stages.measure_rollouts = measure_rollouts
    measure(config, open_groups(1))
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def no_group(directory: Path) -> Iterator[None]:
    """Within the block the process that :func:`run_ranks` started is in no group: processes forked there open their own."""
    torch.distributed.destroy_process_group()
    yield
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'rendezvous'}", rank=0, world_size=1)


@contextlib.contextmanager
def server(directory: Path, config: Config, quota: int | None) -> Iterator[list[BaseProcess]]:
    """The processes of a server; killed at the end of the block if they are still there."""
    directory.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, directory, config, quota)) for rank in range(NUM_WORKERS)]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def num_begun(directory: Path) -> int:
    begun = directory / "begun"
    return begun.read_bytes().count(b"\n") if begun.exists() else 0


def wait_until(reached: Callable[[], bool], directory: Path, workers: list[BaseProcess]) -> None:
    """Return when ``reached``; a worker that ended before fails the test."""
    while not reached():
        output = {path.name: path.read_text() for path in sorted(directory.glob("output-*"))}
        assert all(worker.exitcode in (None, 0) for worker in workers), output
        time.sleep(0.002)


def kill_and_restart(rank: int, world_size: int, root: Path, config: Config, seed: int) -> Outcome:
    """Start servers from this process, which has all libraries loaded, and kill all but the last at random moments."""
    with no_group(root):
        return kill_and_finish(root, config, seed)


def kill_and_finish(root: Path, config: Config, seed: int) -> Outcome:
    generator, kills = random.Random(seed), []
    chunks = chunk_directory(config)
    for number in range(NUM_KILLS):
        directory, before = root / f"killed-{number}", snapshot(chunks)
        with server(directory, config, QUOTA) as workers:
            # Anywhere from before the first chunk to between chunks and amid them.
            target = generator.randrange(NUM_WORKERS * QUOTA)
            wait_until(lambda directory=directory, target=target: num_begun(directory) >= target, directory, workers)
            time.sleep(generator.uniform(0.0, 0.06 if target else 0.3))
        kills.append(Kill(begun=num_begun(directory), before=before, after=snapshot(chunks)))
    directory, kept = root / "last", snapshot(chunks)
    with server(directory, config, None) as workers:
        wait_until(lambda: all(worker.exitcode == 0 for worker in workers), directory, workers)
    return Outcome(kills=kills, begun_last=num_begun(directory), kept=kept)


def chunks_of(files: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Without what a killed worker was writing."""
    return {name: stamp for name, stamp in files.items() if name.endswith(".npz")}


@pytest.mark.slow
def test_twenty_kills_change_nothing_and_lose_a_chunk_per_worker_at_most(trained: TrainedRun, groups: Any, tmp_path: Path):
    undisturbed = trained.copy(tmp_path / "undisturbed", STEP, **SETTINGS)
    measure(undisturbed, groups)
    config = trained.copy(tmp_path / "killed", STEP, **SETTINGS)
    (outcome,) = run_ranks(kill_and_restart, 1, tmp_path, config, 7, tmp_path=tmp_path, timeout_seconds=550)

    assert len(outcome.kills) == NUM_KILLS
    for kill in outcome.kills:
        before, after = chunks_of(kill.before), chunks_of(kill.after)
        assert before.items() <= after.items(), "what was finished stays as it is"
        assert 0 <= kill.begun - (len(after) - len(before)) <= NUM_WORKERS
    assert any(kill.begun > len(chunks_of(kill.after)) - len(chunks_of(kill.before)) for kill in outcome.kills), "some work was lost"
    assert len({kill.begun for kill in outcome.kills}) > 3, "killed at different moments"
    # No chunk that was finished is measured again, and all others are.
    assert outcome.begun_last == NUM_CHUNKS - len(chunks_of(outcome.kept)) > 0
    assert dataset(config).read_bytes() == dataset(undisturbed).read_bytes()
