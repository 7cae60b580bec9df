"""The generation log: which generation serves which global samples.

``selection/log.jsonl`` holds one JSON object per line, ``{"generation", "effective_sample", "epoch", "digest"}``. It is
append-only. An entry is in force from its ``effective_sample`` on, until the next entry's. There are two sorts:

- an *adoption* names a generation and keeps the epoch of the entry before it;
- an *epoch entry* keeps the generation and the digest of the entry before it and raises the epoch by one.

The first entry is in force from sample 0. In a run that switched selection on later it is generation 0 from the sample at
which that was: those before it came from elsewhere, and the log says nothing of them.

What the entries mean for the order of samples is said in :mod:`megatron_groupmates.pool.order`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import append_line, read_lines, sha256_json


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """One line of the generation log.

    Attributes:
        generation: number of the generation in force from here on.
        effective_sample: first global sample number (Megatron's ``consumed_train_samples`` counting) it serves.
        epoch: how often the samples on offer have run out before this entry.
        digest: digest of the generation, so that a log never refers to other content without a word.
    """

    generation: int
    effective_sample: int
    epoch: int
    digest: str


def validate_entries(entries: Sequence[LogEntry]) -> None:
    """Check what can be checked without the pool.

    Raises:
        UserError: the first entry is neither in force from sample 0 nor generation 0, a later one goes back in samples or in epoch, an
            epoch rises by more than one or together with a change of generation, or one generation has two digests.
    """
    digests: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if digests.setdefault(entry.generation, entry.digest) != entry.digest:
            raise UserError(
                f"generation log, entry {number}: generation {entry.generation} has digest {entry.digest}, "
                f"an earlier entry says {digests[entry.generation]}"
            )
        if number == 0:
            if entry.epoch != 0 or (entry.effective_sample != 0 and entry.generation != 0):
                raise UserError(
                    "generation log: the first entry must be in force from sample 0 in epoch 0, or be generation 0 where selection was "
                    f"switched on; it is generation {entry.generation} from sample {entry.effective_sample} in epoch {entry.epoch}"
                )
            continue
        before = entries[number - 1]
        if entry.effective_sample < before.effective_sample:
            raise UserError(
                f"generation log, entry {number}: effective_sample {entry.effective_sample} is below the "
                f"one before it, {before.effective_sample}"
            )
        if entry.epoch not in (before.epoch, before.epoch + 1):
            raise UserError(f"generation log, entry {number}: epoch {entry.epoch} does not follow {before.epoch}")
        if entry.epoch != before.epoch and entry.generation != before.generation:
            raise UserError(
                f"generation log, entry {number}: epoch {entry.epoch} begins with generation "
                f"{entry.generation}, but the samples that ran out were those of {before.generation}"
            )


def _parse(path: Path, number: int, record: Any) -> LogEntry:
    fields = {field.name for field in dataclasses.fields(LogEntry)}
    if not isinstance(record, dict) or set(record) != fields:
        raise UserError(f"{path}, line {number}: expected an object with {', '.join(sorted(fields))}, found {record!r}")
    integers = (record["generation"], record["effective_sample"], record["epoch"])
    if any(type(value) is not int or value < 0 for value in integers) or not isinstance(record["digest"], str):
        raise UserError(
            f"{path}, line {number}: generation, effective_sample and epoch must be whole numbers from 0 "
            f"on and digest a string, found {record!r}"
        )
    return LogEntry(**record)


def read_log(path: Path | str) -> tuple[LogEntry, ...]:
    """The entries of a generation log, oldest first; empty where the file is absent.

    A last line without a newline is what a crash leaves of an entry that was never committed: it is ignored.

    Raises:
        UserError: a complete line is not an entry, or the entries contradict each other (:func:`validate_entries`).
    """
    path = Path(path)
    try:
        records = read_lines(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; restore it from a copy") from error
    entries = tuple(_parse(path, number, record) for number, record in enumerate(records, start=1))
    try:
        validate_entries(entries)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return entries


def append_entry(path: Path | str, entry: LogEntry) -> None:
    """Commit ``entry``: on return it is on disk. Global rank 0 only, before any rank uses the entry.

    Raises:
        UserError: the log is damaged, or ``entry`` does not follow its last entry.
        OSError: it cannot be written; the log is then as it was.
    """
    validate_entries((*read_log(path), entry))
    append_line(path, json.dumps(dataclasses.asdict(entry)))


def log_digest(entries: Sequence[LogEntry]) -> str:
    """Hex SHA-256 of the entries; a checkpoint stores it with their number, a resume compares that many entries."""
    return sha256_json([dataclasses.asdict(entry) for entry in entries])
