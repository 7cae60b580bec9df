"""Whether a selection directory is the one that a checkpoint of the user's trainer was trained with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.exclusion import Exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry

_LOG = "log"


def saved_state(config: Config, pool: PoolIndex, exclusion: Exclusion, packing: str, entries: Sequence[LogEntry]) -> dict[str, Any]:
    """``args.group_mates``: what a checkpoint says of the data it was trained on. Plain values, so that anything can read it."""
    return {
        "pool": pool.fingerprint,
        "seed": config.run.seed,
        "packing": packing,
        "exclusion": exclusion.digest,
        _LOG: [dataclasses.asdict(entry) for entry in entries],
    }


def check_resume(saved: dict[str, Any] | None, current: dict[str, Any], consumed_train_samples: int, directory: str) -> None:
    """Compare what the checkpoint says with what the selection directory has.

    Args:
        saved: ``args.group_mates`` of the checkpoint that training goes on from; None for none.
        current: the same of the selection directory; its log is empty in a new one.
        consumed_train_samples: of the checkpoint, 0 for none.
        directory: the selection directory, for messages.

    Raises:
        UserError: the directory belongs to another run, or lacks what this one was trained with.
    """
    log = current[_LOG]
    if consumed_train_samples == 0:
        return
    if saved is None:
        if log and log[0]["effective_sample"] < consumed_train_samples:
            raise UserError(
                f"--group-mates-selection {directory}: its log says that it served samples from {log[0]['effective_sample']} on, "
                f"but the checkpoint, at sample {consumed_train_samples}, was not trained with it; give a new directory to switch it on"
            )
        return
    if not log:
        raise UserError(
            f"--group-mates-selection {directory} is new, but the checkpoint, at sample {consumed_train_samples}, was trained with "
            "Group-MATES; give the directory of its run, or a copy of that"
        )
    for name, what in (("pool", "pool"), ("seed", "--seed"), ("packing", "data.packing"), ("exclusion", "data.exclude")):
        if saved.get(name) != current[name]:
            raise UserError(
                f"{what}: the checkpoint was trained with {_short(saved.get(name))}, this run has {_short(current[name])}; under it the "
                "sample numbers mean other data; set it back"
            )
    before, now = (_consumed(state[_LOG], consumed_train_samples) for state in (saved, current))
    if before != now:
        pairs = itertools.zip_longest(before, now)
        place = next(number for number, (saved_entry, entry) in enumerate(pairs) if saved_entry != entry)
        raise UserError(
            f"--group-mates-selection {directory}: its log is not the one that the checkpoint at sample {consumed_train_samples} was "
            f"trained with: entry {place} is {_entry(now, place)}, in the checkpoint {_entry(before, place)}; give the directory of its run"
        )


def _consumed(log: list[dict[str, Any]], consumed_train_samples: int) -> list[dict[str, Any]]:
    return [entry for entry in log if entry["effective_sample"] < consumed_train_samples]


def _entry(log: list[dict[str, Any]], place: int) -> str:
    if place >= len(log):
        return "missing"
    entry = log[place]
    return f"generation {entry['generation']} ({entry['digest'][:16]}) from sample {entry['effective_sample']}, epoch {entry['epoch']}"


def _short(value: Any) -> str:
    return value[:16] or "none" if isinstance(value, str) else str(value)
