"""The work directory of a build: finished pieces of work, each complete or absent.

plan.json                 what shapes the content; another build does not touch the directory
lock                      held by the first rank while it runs
ranks/                    how ranks find each other
files/N.spool             samples of input file N, by cell
files/N.rejects.jsonl     its lines that are not used
files/N.json              its counts; present when the file is finished
files/N.scores.npy        quality scores of its documents (only for a top fraction)
threshold.json            the score that follows from all of them
shards/N.record           what the index needs of shard N; present when the shard is at its place
pool/                     what is on its way to a remote output
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.spool import Spool
from megatron_groupmates.utils.files import read_json, write_json

_TEMPORARY = "*.tmp-*"  # what a killed process leaves of a file that was not complete


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Counts of one input file after the first pass; tokens include one end-of-text token per document.

    Attributes:
        name: of the input file.
        num_bytes: of it, as stored.
        sha256: of it, as stored.
        documents: those accepted.
        rejects: number of lines that are not used, by kind.
        tokens: of the accepted documents.
        tokens_dropped: of them, those in the tail that fills no context.
        samples: made of them.
        kinds: samples of each kind, in the order of the kinds' numbers.
        num_blocks: of the spool.
        table_start: of the spool.
    """

    name: str
    num_bytes: int
    sha256: str
    documents: int
    rejects: dict[str, int]
    tokens: int
    tokens_dropped: int
    samples: int
    kinds: dict[str, int]
    num_blocks: int
    table_start: int


class WorkDirectory:
    """Where a build keeps its finished work; layout in the module's docstring. Picklable, no state but the path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plan = directory / "plan.json"
        self.ranks = directory / "ranks"
        self.pool = directory / "pool"
        self.threshold = directory / "threshold.json"
        self.rejects = directory / "rejects.jsonl"
        self._files = directory / "files"
        self._shards = directory / "shards"

    def spool_path(self, number: int) -> Path:
        """Spool of input file ``number``."""
        return self._files / f"{number:08d}.spool"

    def rejects_path(self, number: int) -> Path:
        """Rejects of input file ``number``."""
        return self._files / f"{number:08d}.rejects.jsonl"

    def scores_path(self, number: int) -> Path:
        """Quality scores of input file ``number``."""
        return self._files / f"{number:08d}.scores.npy"

    def record_path(self, shard: int) -> Path:
        """Record of shard ``shard``."""
        return self._shards / f"{shard:08d}.record"

    def write_facts(self, number: int, facts: FileFacts) -> None:
        """Say that input file ``number`` is finished."""
        write_json(self._files / f"{number:08d}.json", dataclasses.asdict(facts))

    def read_facts(self, number: int) -> FileFacts:
        """What :meth:`write_facts` wrote."""
        return FileFacts(**read_json(self._files / f"{number:08d}.json"))

    def open_spool(self, number: int, facts: FileFacts) -> Spool:
        """The spool of a finished input file."""
        return Spool(self.spool_path(number), facts.num_blocks, facts.table_start)

    def finished_files(self) -> set[int]:
        """Numbers of the finished input files."""
        return _numbers(self._files, ".json")

    def scored_files(self) -> set[int]:
        """Numbers of the input files that have their quality scores."""
        return _numbers(self._files, ".scores.npy")

    def finished_shards(self) -> set[int]:
        """Numbers of the finished shards."""
        return _numbers(self._shards, ".record")

    def check_own(self) -> None:
        """Check that the directory is absent, empty or a build's.

        Raises:
            UserError: it holds something else.
        """
        if self.directory.is_dir() and not self.plan.is_file():
            begun = {"lock", "ranks"}
            strange = [path.name for path in self.directory.iterdir() if path.name not in begun and not path.match(_TEMPORARY)]
            if strange:
                found = ", ".join(sorted(strange)[:3])
                raise UserError(f"work directory {self.directory} holds something else ({found}); choose another --work-directory")

    def begin(self, plan: dict[str, Any]) -> None:
        """Make the directory, or continue in it: for the first rank, which holds the lock.

        Raises:
            UserError: it belongs to another build or holds something else.
        """
        self.check_own()
        self.check_plan(plan)
        if not self.plan.is_file():
            write_json(self.plan, plan)
        for directory in (self.ranks, self._files, self._shards, self.pool):
            directory.mkdir(exist_ok=True)
        for directory in (self.directory, self._files, self._shards, self.pool):  # other ranks may write into the fifth
            remove_temporaries(directory)

    def check_plan(self, plan: dict[str, Any]) -> None:
        """Check that a plan that is there is this one.

        Raises:
            UserError: it is another build's; names the differences.
        """
        if not self.plan.is_file():
            return
        present = read_json(self.plan)
        if values := differences(present, plan):
            raise UserError(
                f"work directory {self.directory} is of a build with other arguments ({values}); "
                "repeat that command, choose another --work-directory, or remove it"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out while the block lasts; the lock ends with the process, however it ends.

        Raises:
            UserError: another run has the lock.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another run is at work in {self.directory}; wait for its end, or choose another --work-directory"
                ) from error
            except OSError:  # a file system without locks
                pass
            yield

    def remove(self) -> None:
        """Delete the finished work, and the directory if it holds nothing else."""
        for directory in (self._files, self._shards, self.pool, self.ranks):
            if directory.is_dir():
                shutil.rmtree(directory)
        # The plan goes last: with it, a directory can be continued in or removed.
        for path in (self.threshold, self.rejects, self.directory / "lock", self.plan):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def remove_leftover(self, plan: dict[str, Any]) -> None:
        """Delete what a run that was killed at its very end has left; nothing of another build's."""
        if self.plan.is_file():
            if read_json(self.plan) == plan:
                self.remove()
        else:
            with contextlib.suppress(OSError):  # absent or not empty
                self.directory.rmdir()


def versions_of_compressors(member_format: str) -> dict[str, str]:
    """Versions of the libraries on which bytes of the pool depend beside its content."""
    zstd = ".".join(map(str, zstandard.ZSTD_VERSION))
    return {"zstd": zstd} if member_format == "raw" else {"zstd": zstd, "zlib": zlib.ZLIB_RUNTIME_VERSION}


def differences(present: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The entries in which two plans differ, in words; empty where they are equal."""
    names = sorted(name for name in {*present, *wanted} if present.get(name) != wanted.get(name))
    return "; ".join(f"{name} was {_shorten(present.get(name))}, is {_shorten(wanted.get(name))}" for name in names)


def remove_temporaries(directory: Path) -> None:
    """Remove what killed processes left of incomplete files in ``directory``."""
    for path in directory.glob(_TEMPORARY):
        path.unlink(missing_ok=True)


def _numbers(directory: Path, suffix: str) -> set[int]:
    names = (path.name for path in directory.iterdir() if path.name.endswith(suffix))
    return {int(name.removesuffix(suffix)) for name in names if name.removesuffix(suffix).isdigit()}


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
