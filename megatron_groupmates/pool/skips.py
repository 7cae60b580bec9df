"""The record of samples that training left out because they could not be read: ``skipped.jsonl`` of a run.

One JSON object per line, ``{"sample", "shard", "row", "error"}``: in global sample ``sample`` the tokens of that row stand
replaced by end-of-text tokens without loss. The record is part of what a global sample is: it holds for every later reading,
also when the shard has been restored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Set
from pathlib import Path

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.dataset import ReadContexts
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import append_line, read_lines, sha256_json


@dataclasses.dataclass(frozen=True, order=True)
class Skip:
    """One line of the record.

    Attributes:
        sample: global sample number.
        shard: name of the shard.
        row: in that shard.
        error: why it could not be read.
    """

    sample: int
    shard: str
    row: int
    error: str = dataclasses.field(compare=False)


def read_skips(path: Path | str) -> list[Skip]:
    """The record, in the order it was written; empty where the file is absent.

    Raises:
        UserError: a complete line is not such a record.
    """
    try:
        return [Skip(**record) for record in read_lines(Path(path))]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it from a copy") from error


def skips_digest(skips: Set[Skip], stop: int) -> str:
    """Hex SHA-256 of what is left out of the global samples below ``stop``; empty where nothing is."""
    facts = [[skip.sample, skip.shard, skip.row] for skip in sorted(skips) if skip.sample < stop]
    return sha256_json(facts) if facts else ""


def append_skip(path: Path | str, skip: Skip) -> None:
    """Commit ``skip``: on return it is on disk. Global rank 0 only, before any rank uses it."""
    append_line(Path(path), json.dumps(dataclasses.asdict(skip)))


def blank_skipped(index: PoolIndex, read: ReadContexts, skips: Set[Skip]) -> tuple[torch.Tensor | None, list[Skip]]:
    """Replace what ``skips`` say by end-of-text tokens, in place.

    Returns:
        bool ``[n, length]``, True for the tokens replaced, None where there are none; and for what could not be read and is
        not in ``skips``, the record it would need, in order.
    """
    contexts = read.contexts
    if not read.damage and not (skips and np.isin(contexts.samples, [skip.sample for skip in skips]).any()):
        return None, []
    shards, rows_in_shard = index.locate(contexts.rows)
    sample_of_piece = np.repeat(contexts.samples, np.diff(contexts.first_piece))
    ends = np.cumsum(contexts.num_tokens)
    blank = torch.zeros_like(read.tokens, dtype=torch.bool)
    unsettled = []
    for piece, row in enumerate(contexts.rows.tolist()):
        shard = index.shard_names[shards[piece]]
        skip = Skip(int(sample_of_piece[piece]), shard, int(rows_in_shard[piece]), read.damage.get(row, ""))
        if skip in skips:
            blank.view(-1)[ends[piece] - contexts.num_tokens[piece] : ends[piece]] = True
        elif row in read.damage:
            unsettled.append(skip)
    if not blank.any():
        return None, unsettled
    read.tokens[blank] = index.eot_id
    return blank, unsettled
