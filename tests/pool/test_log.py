"""The generation log on disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.log import LogEntry, append_entry, log_digest, read_log

FIRST = LogEntry(0, 0, 0, "a")
SECOND = LogEntry(3, 40, 0, "b")
THIRD = LogEntry(3, 90, 1, "b")


def write(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def line(generation: object = 0, effective_sample: object = 0, epoch: object = 0, digest: object = "a") -> dict:
    return {"generation": generation, "effective_sample": effective_sample, "epoch": epoch, "digest": digest}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "selection" / "log.jsonl"
    assert read_log(path) == ()
    for entry in (FIRST, SECOND, THIRD):
        append_entry(path, entry)
    assert read_log(path) == (FIRST, SECOND, THIRD)
    assert json.loads(path.read_text().splitlines()[1]) == line(3, 40, 0, "b")


def test_torn_last_line_is_ignored_and_then_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_entry(path, FIRST)
    with open(path, "a") as file:
        file.write('{"generation": 3, "effec')
    assert read_log(path) == (FIRST,)
    append_entry(path, SECOND)
    assert read_log(path) == (FIRST, SECOND)


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append_entry(path, FIRST)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_groupmates.utils.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_entry(path, SECOND)
    monkeypatch.undo()
    assert read_log(path) == (FIRST,)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(1, 5)], "must be in force from sample 0 in epoch 0, .* it is generation 1 from sample 5 in epoch 0"),
        ([line(epoch=1)], "must be in force from sample 0 in epoch 0, .* it is generation 0 from sample 0 in epoch 1"),
        ([line(), line(effective_sample=9), line(effective_sample=8)], "entry 2: effective_sample 8 is below .* 9"),
        ([line(), line(effective_sample=9, epoch=2)], "epoch 2 does not follow 0"),
        ([line(), line(effective_sample=9, epoch=1), line(effective_sample=9)], "epoch 0 does not follow 1"),
        ([line(), line(1, 9, 1, "b")], "epoch 1 begins with generation 1, but the samples that ran out were those of 0"),
        ([line(), line(digest="other")], "generation 0 has digest other, an earlier entry says a"),
        ([line(generation="0")], "line 1: generation, effective_sample and epoch must be whole numbers"),
        ([line(effective_sample=-1)], "line 1: .* must be whole numbers from 0 on"),
        ([line(epoch=True)], "line 1: .* must be whole numbers from 0 on"),
        ([line(digest=4)], "digest a string"),
        ([{"generation": 0}], "line 1: expected an object with digest, effective_sample, epoch, generation"),
    ],
)
def test_damaged_logs_are_refused(tmp_path: Path, lines: list[dict], message: str) -> None:
    path = write(tmp_path / "log.jsonl", *lines)
    with pytest.raises(UserError, match=message) as caught:
        read_log(path)
    assert str(path) in str(caught.value)


def test_a_broken_line_before_the_last_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"generation": 0, \n' + json.dumps(line()) + "\n")
    with pytest.raises(UserError, match=r"log.jsonl is damaged"):
        read_log(path)


def test_an_entry_that_does_not_follow_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_entry(path, FIRST)
    append_entry(path, SECOND)
    content = path.read_bytes()
    with pytest.raises(UserError, match="effective_sample 39 is below the one before it, 40"):
        append_entry(path, LogEntry(4, 39, 0, "c"))
    assert path.read_bytes() == content


def test_digest_names_the_entries() -> None:
    assert log_digest([FIRST, SECOND]) == log_digest((FIRST, SECOND))
    assert len({log_digest(entries) for entries in ([], [FIRST], [FIRST, SECOND], [FIRST, SECOND, THIRD])}) == 4
    assert log_digest([FIRST]) == "342b3f028c5a7b2103c652a699abd7928f99f1c5b3dfbf5c8b51fdb2e948f720"
