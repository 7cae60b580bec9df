"""The preprocessing tool on several ranks, from and to object stores, killed and continued: always the same pool."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_groupmates.pool.preprocess.ranks import meet
from tests.common.s3 import s3_options  # noqa: F401
from tests.pool.helpers import documents, tokenizer_json, write_raw

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_dclm.py"
ARGUMENTS = ("--input", "raw", "--tokenizer", "tokenizer.json", "--pack", "17", "--samples-per-shard", "100", "--cell-bytes", "1500")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with raw files, a tokenizer, and the pool that an undisturbed run makes of them."""
    directory = tmp_path_factory.mktemp("preprocess")
    for number, name in enumerate(("a.jsonl", "b.jsonl.zst", "sub/c.jsonl.gz", "sub/d.jsonl.zstd", "e.jsonl")):
        write_raw(directory / "raw" / name, [*documents(40, number), b"{"])
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    ((code, _, error),) = finish([start(directory, "expected", "--workers", "0")])
    assert code == 0, error
    return directory


def start(directory: Path, output: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
    command = [sys.executable, str(TOOL), *ARGUMENTS, "--output", output, *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        command,
        cwd=directory,
        env={**inherited, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def as_rank(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}


def start_ranks(directory: Path, output: str, world_size: int, *arguments: str) -> list[subprocess.Popen]:
    """One process per rank, as torchrun would start them, the first rank last."""
    return [start(directory, output, *arguments, environment=as_rank(rank, world_size)) for rank in reversed(range(world_size))]


def wait_until(reached: Callable[[], object], process: subprocess.Popen) -> None:
    """Return when ``reached``; a process that ended before fails the test."""
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    results = []
    try:
        for process in processes:
            out, error = process.communicate()
            results.append((process.returncode, out, error))
    finally:
        for process in processes[len(results) :]:
            os.killpg(process.pid, signal.SIGKILL)
    return results


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("world_size", "workers"), [(2, "0"), (3, "1")])
def test_any_number_of_ranks(workplace: Path, world_size: int, workers: str) -> None:
    output = f"ranks-{world_size}"
    results = finish(start_ranks(workplace, output, world_size, "--workers", workers))
    assert [code for code, *_ in results] == [0] * world_size, results
    assert [out for _, out, _ in results[:-1]] == [""] * (world_size - 1), "only the first rank reports"
    assert f"wrote {output}" in results[-1][1]
    assert content(workplace / output) == content(workplace / "expected")
    assert not (workplace / f"{output}.work").exists()
    again = finish(start_ranks(workplace, output, world_size, "--workers", workers))
    assert [code for code, *_ in again] == [0] * world_size and "nothing to do" in again[-1][1]


def test_slurm_and_deepspeed_name_ranks_too(workplace: Path) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    deepspeed = {"RANK": "1", "WORLD_SIZE": "2"}
    processes = [
        start(workplace, "mixed", "--workers", "0", environment=slurm),
        start(workplace, "mixed", "--workers", "0", "--local_rank=1", environment=deepspeed),
    ]
    assert [code for code, *_ in finish(processes)] == [0, 0]
    assert content(workplace / "mixed") == content(workplace / "expected")


def test_a_failing_rank_ends_the_others(workplace: Path) -> None:
    results = finish(start_ranks(workplace, "failing", 2, "--workers", "0", "--max-rejects", "1"))
    assert [code for code, *_ in results] == [1, 1]
    texts = "".join(error for *_, error in results)
    assert "documents rejected so far, --max-rejects is 1; failing.work/rejects.jsonl lists them" in texts
    assert finish([start(workplace, "failing", "--workers", "0")])[0][0] == 0
    assert content(workplace / "failing") == content(workplace / "expected")


def test_one_run_at_a_time(workplace: Path) -> None:
    # The second rank of this launch never comes: the first waits for it, within its lock.
    first = start(workplace, "locked", "--workers", "0", environment=as_rank(0, 2))
    try:
        wait_until((workplace / "locked.work" / "plan.json").exists, first)
        ((code, _, error),) = finish([start(workplace, "locked", "--workers", "0")])
        assert code == 1 and "another run is at work in locked.work" in error
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_interrupted_from_the_keyboard(workplace: Path) -> None:
    work = workplace / "interrupted.work"

    def obey_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in the background lets them ignore it

    # This test is the second rank of the launch and does none of its work: the first cannot come to an end by itself.
    process = start(workplace, "interrupted", "--workers", "1", environment=as_rank(0, 2), preexec_fn=obey_interrupts)
    meet(work / "ranks", 1, 2)
    wait_until(lambda: list(work.glob("files/*.spool*")), process)
    os.killpg(process.pid, signal.SIGINT)
    ((code, _, error),) = finish([process])
    assert code == 130 and "interrupted. Finished work is kept: repeat the same command to continue" in error
    ((code, _, error),) = finish([start(workplace, "interrupted", "--workers", "0")])
    assert code == 0, error
    assert content(workplace / "interrupted") == content(workplace / "expected")


def test_from_and_to_an_object_store(workplace: Path, s3_options: dict[str, dict[str, Any]]) -> None:  # noqa: F811
    store = fsspec.filesystem("s3", **s3_options["s3"])
    store.put(str(workplace / "raw"), "data/raw", recursive=True)
    arguments = ("--input", "s3://data/raw", "--storage-options", json.dumps(s3_options), "--work-directory", "s3.work", "--workers", "2")
    process = start(workplace, "s3://data/pool", *arguments)
    ((code, out, error),) = finish([process])
    assert code == 0, error
    store.get("data/pool", str(workplace / "fetched"), recursive=True)
    assert content(workplace / "fetched") == content(workplace / "expected")
    assert not (workplace / "s3.work").exists()
    ((code, out, error),) = finish([start(workplace, "s3://data/pool", *arguments)])
    assert code == 0 and "nothing to do" in out, error
    ((code, _, error),) = finish([start(workplace, "s3://data/raw", *arguments)])
    assert code == 1 and "error: s3://data/raw is not empty and not a pool" in error


def test_no_space_left_in_a_worker(workplace: Path) -> None:
    """A limit on the size of files in the part of a full disk: writing fails in the worker process."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    ((code, _, error),) = finish([start(workplace, "full", "--workers", "1", preexec_fn=limit)])
    assert code == 1 and "Traceback" not in error
    assert "error: cannot make full: [Errno 27] File too large" in error
    assert "Finished work is kept: repeat the same command to continue" in error
    assert list((workplace / "full.work").rglob("*.tmp-*")) == []
    ((code, _, error),) = finish([start(workplace, "full", "--workers", "1")])
    assert code == 0, error
    assert content(workplace / "full") == content(workplace / "expected")


def finished(work: Path) -> tuple[int, int]:
    """Input files and shards that are done."""
    return len(list(work.glob("files/*.json"))), len(list(work.glob("shards/*.record")))


@pytest.mark.slow
def test_fifty_kills_at_random_times(workplace: Path) -> None:
    """Every process of the run dies at once, wherever it stands; the run after the last kill makes the same pool."""
    work, output = workplace / "killed.work", workplace / "killed"
    generator = np.random.default_rng(0)
    durations = {}
    for workers in ("0", "1"):
        begin = time.monotonic()
        assert finish([start(workplace, f"timed-{workers}", "--workers", workers)])[0][0] == 0
        durations[workers] = time.monotonic() - begin
    stages = set()
    for number in range(50):
        workers = "1" if number % 5 == 0 else "0"  # with workers it takes longer, for their start
        process = start(workplace, "killed", "--workers", workers)
        if number % 2:
            # By progress, so that all stages are met on a machine of any speed.
            wanted = sum(finished(work)) + generator.integers(1, 4)
            while sum(finished(work)) < wanted and process.poll() is None:
                time.sleep(0.001)
        else:
            time.sleep(generator.uniform(0, 1.1 * durations[workers]))
        with contextlib.suppress(ProcessLookupError):  # the run may have come to its end by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        complete = (output / "pool.json").exists()
        stages.add((*finished(work), complete))
        if complete:
            assert content(output) == content(workplace / "expected")
            if not work.exists():
                shutil.rmtree(output)
    ((code, _, error),) = finish([start(workplace, "killed", "--workers", "1")])
    assert code == 0, error
    assert content(output) == content(workplace / "expected")
    assert not work.exists()
    assert len(stages) > 5, f"kills met {stages} only"
