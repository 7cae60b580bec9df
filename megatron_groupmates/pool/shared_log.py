"""The generation log in memory that a trainer shares with the processes of its data loader.

A loader's process holds a copy of the dataset from the time it was started. It hears of later log entries through this
memory and nothing else: looking at files would tell it of an entry at another time than other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.utils.files import sha256_bytes

_CAPACITY = 16384  # entries; a megabyte
_DIGEST_WORDS = 4
_WIDTH = 3 + _DIGEST_WORDS + 1  # generation, effective_sample, epoch, digest, check word
_WRITING_SECONDS = 60.0  # far longer than a writer that was interrupted takes to go on


class SharedLog:
    """Log entries, and below which global sample nothing can change any more.

    One process writes; processes that were forked from it, or that got the object through ``torch.multiprocessing``,
    read. Every row carries a check word made from its content: a row that is being written is never taken for a whole one.

    Args:
        entries: the log so far.
        settled: global samples below it are what ``entries`` say, whatever entries follow.
    """

    def __init__(self, entries: Sequence[LogEntry], settled: int) -> None:
        self._memory = torch.zeros((1 + _CAPACITY, _WIDTH), dtype=torch.int64).share_memory_()
        self.publish(entries, settled)

    def publish(self, entries: Sequence[LogEntry], settled: int) -> None:
        """Make ``entries``, the former and more, and ``settled``, which never falls, known. The writer alone calls.

        Raises:
            UserError: more entries than fit.
        """
        if len(entries) > _CAPACITY:
            raise UserError(
                f"the generation log has {len(entries)} entries, the data loader follows at most {_CAPACITY}: "
                "the selection is so small that its samples run out all the time; select more"
            )
        rows, known = self._memory.numpy(), int(self._memory[0, 0])
        for number in range(known, len(entries)):
            rows[1 + number] = _sealed(_packed(entries[number]))
        # Last: a reader looks for no entry that this row does not count.
        rows[0] = _sealed(np.array([len(entries), settled, *[0] * (_WIDTH - 3)], dtype=np.int64))

    def settled(self) -> int:
        """Global samples below this number are final."""
        return self._head()[1]

    def entries_from(self, number: int) -> list[LogEntry]:
        """The log from entry ``number`` on."""
        return [_unpacked(self._row(1 + place)) for place in range(number, self._head()[0])]

    def _head(self) -> tuple[int, int]:
        row = self._row(0)
        return int(row[0]), int(row[1])

    def _row(self, number: int) -> np.ndarray:
        deadline = time.monotonic() + _WRITING_SECONDS
        while True:
            row = self._memory[number].numpy().copy()
            if row[-1] == _check_word(row[:-1]):
                return row
            if time.monotonic() > deadline:
                raise RuntimeError(f"row {number} of the shared generation log stays half written: its writer is gone")
            time.sleep(0.001)


def _check_word(words: np.ndarray) -> int:
    return int(sha256_bytes(words.tobytes())[:15], 16) + 1  # never that of memory nobody has written


def _sealed(words: np.ndarray) -> np.ndarray:
    return np.append(words, _check_word(words))


def _packed(entry: LogEntry) -> np.ndarray:
    digest = np.frombuffer(bytes.fromhex(entry.digest), dtype=np.int64)
    assert len(digest) == _DIGEST_WORDS, "a log entry of a run that selects has its generation's digest"
    return np.concatenate([np.array([entry.generation, entry.effective_sample, entry.epoch], dtype=np.int64), digest])


def _unpacked(row: np.ndarray) -> LogEntry:
    generation, effective_sample, epoch = row[:3].tolist()
    return LogEntry(generation, effective_sample, epoch, row[3 : 3 + _DIGEST_WORDS].tobytes().hex())
