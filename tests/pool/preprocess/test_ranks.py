"""How ranks meet in a directory and wait for each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess import ranks
from megatron_groupmates.pool.preprocess.ranks import Launch, meet


def meet_all(directory: Path, world_size: int, late: int = 0) -> list[Launch]:
    """Threads in the part of processes; rank ``late`` comes after the others."""

    def one(rank: int) -> Launch:
        time.sleep(0.3 if rank == late else 0)
        return meet(directory, rank, world_size, timeout=120)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def test_all_ranks_meet_in_every_launch(tmp_path: Path) -> None:
    """What earlier launches have left, of more or fewer ranks, is not taken for a rank of this one."""
    names = []
    for world_size, late in ((3, 0), (3, 2), (2, 1), (4, 0)):
        launches = meet_all(tmp_path, world_size, late)
        assert [launch.rank for launch in launches] == list(range(world_size))
        assert len({launch.name for launch in launches}) == 1
        names.append(launches[0].name)
    assert len(set(names)) == 4


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    meet_all(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"rank 0 of 3 has waited 0 s in .* for ranks 1, 2; all ranks must share this directory.*--work-dir"
    ):
        meet(tmp_path, 0, 3, timeout=0.2)
    with pytest.raises(UserError, match=r"rank 2 of 3 has waited 0 s in .* for rank 0;"):
        meet(tmp_path, 2, 3, timeout=0.2)


def test_a_single_rank_meets_nobody(tmp_path: Path) -> None:
    assert meet(tmp_path, 0, 1).world_size == 1
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_condition_or_a_failure(tmp_path: Path) -> None:
    first, second = (Launch(rank, 2, tmp_path, "now") for rank in range(2))
    due = time.monotonic() + 0.2
    first.wait(lambda: time.monotonic() > due)
    first.check()
    with pytest.raises(ValueError, match="broken"), second.telling_failure():
        raise ValueError("broken")
    with pytest.raises(UserError, match=r"rank 1 of 2 failed: ValueError\('broken'\); repeat the same command"):
        first.wait(lambda: False)
    Launch(0, 2, tmp_path, "later").check()


def test_the_first_rank_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_LONGEST_PAUSE", 0.05)
    launches = [Launch(rank, 3, tmp_path, "now") for rank in range(3)]
    launches[1].say_finished()
    waiting = threading.Thread(target=launches[0].wait_for_finished)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    launches[2].say_finished()
    waiting.join(timeout=120)
    assert not waiting.is_alive()
