"""What every host of a job must have, looked at before the job starts: one message names each host that lacks something."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_groupmates
from megatron_groupmates.config import Config, RunPaths, UserError, config_to_dict
from megatron_groupmates.parallel.launch import LaunchEnvironment
from megatron_groupmates.parallel.meeting import Meeting
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.training.data import open_pool
from megatron_groupmates.training.metrics import read_training_state
from megatron_groupmates.utils.run_directory import check_run_directory, find_checkpoint

_DISTRIBUTIONS = ("torch", "deepspeed", "megatron-core")
# A network file system shows a host what another has written when its attribute cache expires, unless asked to look again.
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05
# The pools that each command reads.
POOLS = {"train": ("pool", "evaluation"), "serve": ("pool", "reference")}


class HostsRefused(UserError):
    """Rank 0 has found, and says, that a host lacks something: the other ranks end without a word."""


@dataclasses.dataclass(frozen=True)
class HostReport:
    """What the first rank of a host found there.

    Attributes:
        host: its name.
        rank: global rank that looked.
        facts: name of a fact to its value; equal on all hosts of a job that can run.
        problems: what keeps this host from running the job.
    """

    host: str
    rank: int
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: Sequence[str] = ()


def check_hosts(meeting: Meeting, command: str, read: Callable[[], Config]) -> tuple[Config, str]:
    """Read the config and compare what every host has. Every rank of the job calls, whatever it lacks.

    Args:
        meeting: of the job's ranks.
        command: ``train`` or ``serve``.
        read: reads the config, raises ``UserError``.

    Returns:
        The config, and the name of this host.

    Raises:
        UserError: on rank 0, naming each host and what it lacks.
        HostsRefused: on the others, of the same text.
    """
    environment, host = meeting.environment, socket.gethostname()
    config, report = look_around(environment, host, command, read)
    meeting.tell(f"report/{environment.rank}", dataclasses.asdict(report))
    if environment.rank == 0:
        try:
            problem = _judge(meeting, config)
        except UserError as error:  # a rank that never came
            problem = str(error)
        meeting.tell("verdict", problem)
        if problem:
            raise UserError(problem)
    else:
        if environment.local_rank == 0:
            meeting.tell(f"signed/{environment.rank}", sign_directories(meeting.hear("directories"), environment.rank))
        problem = meeting.hear("verdict")
        if problem:
            raise HostsRefused(problem)
    assert config is not None, "a host without a config is a problem"
    return config, host


def check_host(command: str, read: Callable[[], Config]) -> Config:
    """The config of a job of one rank, after the same look at its host.

    Raises:
        UserError: what the host lacks.
    """
    config, report = look_around(LaunchEnvironment(0, 0, 1, 1, "127.0.0.1", 0), socket.gethostname(), command, read)
    if report.problems:
        raise UserError("\n".join(report.problems))
    assert config is not None
    return config


def look_around(environment: LaunchEnvironment, host: str, command: str, read: Callable[[], Config]) -> tuple[Config | None, HostReport]:
    """The config where it can be read, and what this host has. Only the first rank of a host looks at more than the config."""
    facts: dict[str, str] = {}
    problems: list[str] = []
    config = _attempt(problems, read)
    if environment.local_rank == 0:
        facts |= versions()
        if config is not None:
            settings = config_to_dict(config)
            facts |= {f"{section}.{key}": repr(value) for section in settings for key, value in settings[section].items()}
            if not (command == "train" and is_finished(config)):
                facts |= _data_facts(config, command, problems)
            _attempt(problems, lambda: check_run_directory(config))
    return config, HostReport(host, environment.rank, facts, problems)


def is_finished(config: Config) -> bool:
    """Whether the run has been trained to ``training.train_iters``, so that a trainer has nothing to do and needs no data."""
    state = read_training_state(RunPaths.of(config))
    return state.get("state") == "finished" and state["step"] >= config.training.train_iters


def versions() -> dict[str, str]:
    """Versions of Python and of what the ranks of a job must have alike, and a digest of this package's code."""
    code = hashlib.sha256()
    root = Path(megatron_groupmates.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    own = f"{megatron_groupmates.__version__} (code {code.hexdigest()[:12]})"
    return {"the version of python": platform.python_version(), "the version of megatron_groupmates": own} | {
        f"the version of {name}": _version(name) for name in _DISTRIBUTIONS
    }


def compare_reports(reports: Sequence[HostReport]) -> str:
    """What keeps the job from running, '' for nothing; rank 0's report comes first.

    What all hosts lack is said once, without naming them; what some lack, or have otherwise than rank 0's host, with their names.
    """
    first = reports[0]
    hosts_of: dict[str, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            hosts_of.setdefault(problem, []).append(report.host)
    for report in reports[1:]:
        for name in sorted(first.facts.keys() & report.facts.keys()):
            if report.facts[name] != first.facts[name]:
                difference = f"{name} is {report.facts[name]}, on host {first.host} it is {first.facts[name]}"
                hosts_of.setdefault(difference, []).append(report.host)
    common = [problem for problem, hosts in hosts_of.items() if len(hosts) == len(reports)]
    lines = [
        f"  host{'s' if len(hosts) > 1 else ''} {', '.join(hosts)}: {problem}"
        for problem, hosts in hosts_of.items()
        if problem not in common
    ]
    if lines:
        lines.insert(0, f"not every one of the {len(reports)} hosts has what this job needs:")
    return "\n".join(common + lines)


def shared_directories(config: Config) -> dict[str, str]:
    """Setting to directory of what all hosts must share; those inside of another are left out."""
    paths = RunPaths.of(config)
    named = {"run.output_dir": paths.root, "checkpoint.directory": paths.checkpoints, "run.selection_dir": paths.selection}
    return {setting: str(path) for setting, path in named.items() if path == paths.root or paths.root not in path.parents}


def sign_directories(directories: Mapping[str, str], rank: int, patience_seconds: float = _PATIENCE_SECONDS) -> list[str]:
    """Write a file named ``rank`` into each of the directories that rank 0 made; what is wrong with those that are not here."""
    problems = []
    for setting, directory in directories.items():
        path = Path(directory)
        try:
            if not _appears(path, patience_seconds):
                problems.append(
                    f"{setting}: {path.parent} is not the directory that rank 0 writes to; give one on a file system that all hosts share"
                )
                continue
            (path / str(rank)).touch()
        except OSError as error:
            problems.append(f"{setting}: {path.parent} cannot be written to: {error.strerror}")
    return problems


def _judge(meeting: Meeting, config: Config | None) -> str:
    """Rank 0: every host's report, the shared directories, and what all of it comes to."""
    told = meeting.gather("report", range(meeting.environment.world_size))
    first_ranks = _first_ranks(told)
    reports = {rank: HostReport(**told[rank]) for rank in first_ranks}
    directories: dict[str, str] = {}
    problems: dict[int, list[str]] = {rank: [] for rank in first_ranks}
    if config is not None and len(first_ranks) > 1:
        directories = _make_directories(config, problems[0])
    meeting.tell("directories", directories)
    others = first_ranks[1:]
    try:
        for rank, found in meeting.gather("signed", others, {rank: report.host for rank, report in reports.items()}).items():
            problems[rank] += found
        for setting, directory in directories.items():
            for rank in others:
                if not problems[rank] and not _appears(Path(directory) / str(rank), _PATIENCE_SECONDS):
                    problems[rank].append(f"{setting}: what this host writes to {Path(directory).parent} does not reach rank 0")
    finally:
        for directory in directories.values():
            shutil.rmtree(directory, ignore_errors=True)
    return compare_reports([dataclasses.replace(report, problems=[*report.problems, *problems[rank]]) for rank, report in reports.items()])


def _first_ranks(told: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Ranks that looked around on their host, in order; they alone have facts."""
    return sorted(rank for rank, report in told.items() if report["facts"])


def _make_directories(config: Config, problems: list[str]) -> dict[str, str]:
    made = {}
    for setting, directory in shared_directories(config).items():
        path = Path(directory) / f".hosts-{secrets.token_hex(8)}"
        try:
            path.mkdir(parents=True)
            made[setting] = str(path.absolute())
        except OSError as error:
            problems.append(f"{setting}: {directory} cannot be written to: {error.strerror}")
    return made


def _appears(path: Path, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
        # Opening the directories makes a network file system ask its server what is in them.
        for parent in (path.parent, path.parent.parent):
            if parent.is_dir():
                os.listdir(parent)
    return True


def _data_facts(config: Config, command: str, problems: list[str]) -> dict[str, str]:
    facts = {}
    for name in POOLS[command]:
        path = getattr(config.data, name)
        if path is None:
            continue
        pool = _attempt(problems, lambda path=path, name=name: open_pool(config, path, f"data.{name}"))
        if pool is None:
            continue
        facts[f"the fingerprint of data.{name}"] = pool.fingerprint[:16]
        if name == "pool" and config.data.exclude is not None:
            exclusion = _attempt(problems, lambda pool=pool: open_exclusion(config, pool))
            if exclusion is not None:
                facts["the digest of data.exclude"] = exclusion.digest[:16]
    _attempt(problems, lambda: find_checkpoint(config))
    return facts


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _attempt(problems: list[str], act: Callable[[], Any]) -> Any:
    """What ``act`` returns; None and a note where it raises ``UserError`` or cannot read something."""
    try:
        return act()
    except (UserError, OSError) as error:  # OSError: a path that this host may not read, a stale mount
        problems.append(str(error))
        return None
