"""What a host lacks is told before the job starts, with the host's name."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_groupmates.cli import host_checks
from megatron_groupmates.cli.host_checks import (
    HostReport,
    HostsRefused,
    check_host,
    check_hosts,
    compare_reports,
    look_around,
    shared_directories,
    sign_directories,
    versions,
)
from megatron_groupmates.config import Config, UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment
from megatron_groupmates.parallel.meeting import Meeting
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool

HOSTS = ("a", "b", "c")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("pool", "reference"):
        make_pool(tmp_path / name)
    data = {"pool": str(tmp_path / "pool"), "reference": str(tmp_path / "reference")}
    return tiny_config(run={"output_dir": str(tmp_path / "run")}, data=data)


def fail(message: str) -> Any:
    raise UserError(message)


def environment(rank: int, local_rank: int = 0, world_size: int = 3, port: int = 0) -> LaunchEnvironment:
    return LaunchEnvironment(rank, local_rank, world_size, 1, "127.0.0.1", port)


def check_on_each(monkeypatch: pytest.MonkeyPatch, reads: list[Callable[[], Config]]) -> list[Any]:
    """What :func:`check_hosts` returns or raises on each host, all at once; host ``i`` reads its config by ``reads[i]``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meetings = [Meeting(environment(rank, world_size=len(reads), port=port), 20.0) for rank in range(len(reads))]
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    monkeypatch.setattr(host_checks, "_PATIENCE_SECONDS", 0.3)
    results: list[Any] = [None] * len(reads)

    def check(rank: int) -> None:
        try:
            results[rank] = check_hosts(meetings[rank], "serve", reads[rank])
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=check, args=(rank,), name=HOSTS[rank]) for rank in range(len(reads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_hosts_that_have_everything_go_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    results = check_on_each(monkeypatch, [lambda: config] * 3)
    assert results == [(config, host) for host in HOSTS]
    assert list(Path(config.run.output_dir).iterdir()) == [], "nothing is left behind"


def test_every_host_that_lacks_something_is_named_in_one_message(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_config(
        run={"output_dir": str(tmp_path / "run"), "seed": 5},
        data={"pool": str(tmp_path / "nowhere"), "reference": str(tmp_path / "reference")},
    )
    results = check_on_each(monkeypatch, [lambda: config, lambda: fail("--config: c.yaml does not exist"), lambda: other])
    assert str(results[0]).splitlines() == [
        "not every one of the 3 hosts has what this job needs:",
        "  host b: --config: c.yaml does not exist",
        f"  host c: data.pool: there is no pool at {tmp_path}/nowhere: no such directory; make one with tools/preprocess_dclm.py",
        f"  host c: data.pool is '{tmp_path}/nowhere', on host a it is '{tmp_path}/pool'",
        f"  host c: run.seed is 5, on host a it is {config.run.seed}",
    ]
    assert not isinstance(results[0], HostsRefused), "rank 0 says it"
    assert [type(each) for each in results[1:]] == [HostsRefused, HostsRefused], "the others are silent"


def test_rank_0_may_be_the_one_that_lacks_its_config(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    results = check_on_each(monkeypatch, [lambda: fail("no config"), lambda: config])
    assert str(results[0]) == "not every one of the 2 hosts has what this job needs:\n  host a: no config"
    assert isinstance(results[1], HostsRefused)


def test_what_all_lack_is_said_once_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    results = check_on_each(monkeypatch, [lambda: fail("no config")] * 3)
    assert str(results[0]) == "no config"


def test_a_run_directory_that_is_not_shared_is_told(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host b looks for the directories of rank 0 and does not find them; what it writes elsewhere does not reach rank 0."""
    monkeypatch.setattr(host_checks, "sign_directories", lambda directories, rank: [])
    results = check_on_each(monkeypatch, [lambda: config] * 2)
    directory = config.run.output_dir
    assert f"host b: run.output_dir: what this host writes to {directory} does not reach rank 0" in str(results[0])


def test_a_directory_of_rank_0_is_awaited(tmp_path: Path) -> None:
    directory = tmp_path / "run" / ".hosts"
    threading.Timer(0.2, lambda: directory.mkdir(parents=True)).start()
    assert sign_directories({"run.output_dir": str(directory)}, 7, patience_seconds=20) == []
    assert [path.name for path in directory.iterdir()] == ["7"]


def test_a_directory_that_does_not_come_is_told(tmp_path: Path) -> None:
    (problem,) = sign_directories({"run.output_dir": str(tmp_path / ".hosts")}, 7, patience_seconds=0.1)
    expected = f"run.output_dir: {tmp_path} is not the directory that rank 0 writes to; give one on a file system that all hosts share"
    assert problem == expected


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".hosts").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    (problem,) = sign_directories({"run.selection_dir": str(tmp_path / ".hosts")}, 7)
    assert problem == f"run.selection_dir: {tmp_path} cannot be written to: Read-only file system"


def test_rank_0_that_cannot_write_says_so(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file")
    results = check_on_each(monkeypatch, [lambda: config] * 2)
    assert f"host a: run.output_dir: {tmp_path / 'run'} cannot be written to: Not a directory" in str(results[0])


def test_directories_inside_of_the_run_are_looked_at_once(tmp_path: Path) -> None:
    run = {"output_dir": str(tmp_path / "run")}
    assert shared_directories(tiny_config(run=run)) == {"run.output_dir": run["output_dir"]}
    apart = tiny_config(
        run={**run, "selection_dir": str(tmp_path / "selection")},
        checkpoint={"format": "megatron_lm", "directory": str(tmp_path / "save")},
    )
    assert shared_directories(apart) == {
        "run.output_dir": run["output_dir"],
        "checkpoint.directory": str(tmp_path / "save"),
        "run.selection_dir": str(tmp_path / "selection"),
    }


def test_only_the_first_rank_of_a_host_looks_around(config: Config) -> None:
    _, first = look_around(environment(2), "b", "serve", lambda: config)
    found, second = look_around(environment(3, local_rank=1), "b", "serve", lambda: config)
    assert found == config and (second.facts, second.problems) == ({}, [])
    assert {"model.num_layers", "the fingerprint of data.pool", "the version of torch"} <= set(first.facts)
    assert "the fingerprint of data.evaluation" not in first.facts, "the trainer reads that"


def test_a_job_of_one_rank_says_all_at_once(config: Config, tmp_path: Path) -> None:
    assert check_host("serve", lambda: config) == config
    data = {"pool": str(tmp_path / "x"), "reference": str(tmp_path / "y")}
    wrong = tiny_config(run={"output_dir": str(tmp_path / "run")}, data=data)
    with pytest.raises(UserError, match=f"data.pool: there is no pool at {tmp_path}/x[^\n]*\ndata.reference: there is no pool at"):
        check_host("serve", lambda: wrong)


def test_a_trainer_of_a_finished_run_needs_no_data(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.json").write_text('{"state": "finished", "step": 20}')
    (tmp_path / "pool").rename(tmp_path / "gone")
    assert check_host("train", lambda: config) == config
    with pytest.raises(UserError, match=r"data\.pool: there is no pool"):
        check_host("serve", lambda: config)


def test_versions() -> None:
    found = versions()
    assert found["the version of python"] == platform.python_version()
    assert found["the version of torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\S+ \(code [0-9a-f]{12}\)", found["the version of megatron_groupmates"])


def test_a_library_that_is_not_there_is_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions()["the version of deepspeed"] == "not installed"


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([HostReport("a", 0, {"x": "1"}), HostReport("b", 1, {"x": "1"})], ""),
        ([HostReport("a", 0, {}, ["p"])], "p"),
        (
            [HostReport("a", 0, {"x": "1"}), HostReport("b", 1, {"x": "2"}), HostReport("c", 2, {"x": "2"})],
            "not every one of the 3 hosts has what this job needs:\n  hosts b, c: x is 2, on host a it is 1",
        ),
        (
            [HostReport("a", 0, {"x": "1"}, ["p"]), HostReport("b", 1, {}, ["p", "q"])],
            "p\nnot every one of the 2 hosts has what this job needs:\n  host b: q",
        ),
    ],
)
def test_reports_compared(reports: list[HostReport], message: str) -> None:
    assert compare_reports(reports) == message


def test_what_a_host_may_not_read_is_told_like_what_it_lacks() -> None:
    def read() -> Config:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/shared/c.yaml")

    found, report = look_around(environment(0), "b", "train", read)
    assert found is None and report.problems == ["[Errno 13] Permission denied: '/shared/c.yaml'"]
