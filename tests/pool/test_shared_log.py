"""The generation log in memory shared with a data loader's processes."""

from __future__ import annotations

import hashlib

import pytest
import torch.multiprocessing as multiprocessing

from megatron_groupmates.config import UserError
from megatron_groupmates.pool import shared_log
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.shared_log import SharedLog


def entry(generation: int, effective_sample: int, epoch: int = 0) -> LogEntry:
    return LogEntry(generation, effective_sample, epoch, hashlib.sha256(str(generation).encode()).hexdigest())


ENTRIES = [entry(0, 0), entry(3, 12), entry(3, 2**40, epoch=1)]


def test_what_is_published_is_read_back() -> None:
    shared = SharedLog(ENTRIES[:1], 8)
    assert (shared.settled(), shared.entries_from(0), shared.entries_from(1)) == (8, ENTRIES[:1], [])
    shared.publish(ENTRIES, 2**41)
    assert (shared.settled(), shared.entries_from(0), shared.entries_from(2)) == (2**41, ENTRIES, ENTRIES[2:])


def read_when_told(shared: SharedLog, questions: multiprocessing.Queue, answers: multiprocessing.Queue) -> None:
    while (number := questions.get()) is not None:
        answers.put((shared.settled(), shared.entries_from(number)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_started_before_hears_of_what_comes_after(method: str) -> None:
    context = multiprocessing.get_context(method)
    shared, questions, answers = SharedLog(ENTRIES[:1], 4), context.Queue(), context.Queue()
    process = context.Process(target=read_when_told, args=(shared, questions, answers), daemon=True)
    process.start()
    try:
        questions.put(0)
        assert answers.get(timeout=60) == (4, ENTRIES[:1])
        shared.publish(ENTRIES, 20)
        questions.put(1)
        assert answers.get(timeout=60) == (20, ENTRIES[1:])
    finally:
        questions.put(None)
        process.join(60)
    assert process.exitcode == 0


def test_a_row_that_is_half_written_is_never_taken_for_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_log, "_WRITING_SECONDS", 0.05)
    shared = SharedLog(ENTRIES, 8)
    for number, column in ((0, 1), (2, 0), (2, 4)):
        before = shared._memory[number, column].item()
        shared._memory[number, column] += 1
        with pytest.raises(RuntimeError, match=f"row {number} .* stays half written"):
            shared.settled() if number == 0 else shared.entries_from(0)
        shared._memory[number, column] = before
    assert shared.entries_from(0) == ENTRIES


def test_memory_that_nobody_has_written_is_no_entry() -> None:
    shared = SharedLog([], 0)
    shared._memory[0] = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared_log, "_WRITING_SECONDS", 0.05)
        with pytest.raises(RuntimeError, match="half written"):
            shared.settled()


def test_more_entries_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_log, "_CAPACITY", 2)
    with pytest.raises(UserError, match="has 3 entries, the data loader follows at most 2"):
        SharedLog(ENTRIES, 8)
