"""Ranks of one launch that share nothing but a directory: how they meet and how they wait for each other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import write_json

MEETING_SECONDS = 600.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """The ranks of this launch after they have met.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        directory: they share.
        name: unique to this launch, the same for all ranks.
    """

    rank: int
    world_size: int
    directory: Path
    name: str

    @contextlib.contextmanager
    def telling_failure(self) -> Iterator[None]:
        """When the block ends with an exception, tell the ranks that wait."""
        try:
            yield
        except BaseException as error:
            if self.world_size > 1 and not self._failure().exists():
                with contextlib.suppress(OSError):  # such as a full disk: then the launcher has to end them
                    self._failure().write_text(f"rank {self.rank} of {self.world_size} failed: {error!r}")
            raise

    def say_finished(self) -> None:
        """Tell the first rank that this one needs the directory no more; it must not touch it afterwards."""
        self._finished(self.rank).touch()

    def wait_for_finished(self) -> None:
        """Wait until all other ranks have said so."""
        self.wait(lambda: all(self._finished(rank).exists() for rank in range(1, self.world_size)))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition()`` holds, which other ranks bring about.

        Raises:
            UserError: another rank has failed.
        """
        pause = _SHORTEST_PAUSE
        while not condition():
            self.check()
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def check(self) -> None:
        """Give up if another rank has.

        Raises:
            UserError: another rank has failed.
        """
        if self.world_size > 1 and self._failure().exists():
            raise UserError(f"{self._failure().read_text()}; repeat the same command to continue")

    def _failure(self) -> Path:
        return self.directory / f"failed-{self.name}"

    def _finished(self, rank: int) -> Path:
        return self.directory / f"finished-{self.name}-{rank}"


def meet(directory: Path, rank: int, world_size: int, timeout: float = MEETING_SECONDS) -> Launch:
    """Wait until all ranks of this launch are here: every rank calls it.

    Files of earlier launches in the directory do no harm: the first rank publishes a fresh name of the launch, each rank
    answers it with a fresh name of its own, and goes on when the first rank has repeated that.

    Args:
        directory: on a file system that all ranks share. The first rank has made it.
        rank: of this process.
        world_size: number of ranks.
        timeout: seconds after which a rank that is missing is an error.

    Raises:
        UserError: a rank is missing.
    """
    own = secrets.token_hex(8)
    if world_size == 1:
        return Launch(rank, world_size, directory, own)
    everyone = directory / "everyone.json"
    deadline, answered = time.monotonic() + timeout, None
    if rank == 0:
        write_json(directory / "0.json", {"launch": own})
    while True:
        if rank == 0:
            answers = [_read(directory / f"{other}.json") for other in range(1, world_size)]
            absent = [other for other, answer in enumerate(answers, start=1) if answer.get("launch") != own]
            if not absent:
                write_json(everyone, {"launch": own, "names": [own, *(answer["name"] for answer in answers)]})
                return Launch(rank, world_size, directory, own)
        else:
            absent = [0]
            launch = _read(directory / "0.json").get("launch")
            if launch is not None and launch != answered:
                write_json(directory / f"{rank}.json", {"launch": launch, "name": own})
                answered = launch
            present = _read(everyone)
            if present.get("names", [])[rank : rank + 1] == [own]:
                return Launch(rank, world_size, directory, present["launch"])
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank} of {world_size} has waited {timeout:.0f} s in {directory} for "
                f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent[:8]))}; all ranks must share this directory: "
                "name one on a shared file system with --work-directory (and in a batch script of Slurm start the command with srun)"
            )
        time.sleep(_SHORTEST_PAUSE)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or just being replaced on a network file system
        return {}
