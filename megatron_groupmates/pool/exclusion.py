"""Exclusions: samples of a pool that no generation may serve, such as those that overlap an evaluation set.

An exclusion is a JSON file: the pool's fingerprint, ``shards`` as ``[[name, [row, ...]], ...]`` in pool order with ascending
rows, the number of samples, ``made_by`` (where it comes from) and ``digest``, the SHA-256 of all the rest.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import read_sealed_json, sealed, write_text

_FORMAT = "megatron_groupmates exclusion"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """An exclusion, read and verified; without arguments the one that excludes nothing.

    Attributes:
        mask: bool[pool's num_samples], True where the sample is excluded; None where none is.
        num_samples: excluded samples; fewer than the pool has.
        digest: hex SHA-256 that identifies it; empty where nothing is excluded.
    """

    mask: np.ndarray | None = None
    num_samples: int = 0
    digest: str = ""

    @property
    def provenance(self) -> dict[str, Any]:
        """What a generation's provenance says of it: nothing where nothing is excluded."""
        return {} if self.mask is None else {"exclusion": {"digest": self.digest, "num_samples": self.num_samples}}


def open_exclusion(config: Config, pool: PoolIndex) -> Exclusion:
    """The exclusion that ``data.exclude`` names.

    Raises:
        UserError: as :func:`load_exclusion`.
    """
    if config.data.exclude is None:
        return Exclusion()
    try:
        return load_exclusion(config.data.exclude, pool)
    except UserError as error:
        raise UserError(f"data.exclude: {error}") from error


def write_exclusion(path: Path | str, index: PoolIndex, rows: np.ndarray, made_by: dict[str, Any]) -> str:
    """Write an exclusion of pool ``rows`` (int64[n], in any order) and return its digest. ``made_by`` are JSON values."""
    rows = np.unique(np.asarray(rows, dtype=np.int64))
    shards, rows_in_shard = index.locate(rows)
    numbers, starts = np.unique(shards, return_index=True)
    parts = np.split(rows_in_shard, starts[1:])
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "pool_fingerprint": index.fingerprint,
        "num_samples": len(rows),
        "shards": [[index.shard_names[number], part.tolist()] for number, part in zip(numbers, parts, strict=False)],
        "made_by": made_by,
    }
    facts = sealed(facts)
    write_text(path, json.dumps(facts) + "\n")
    return facts["digest"]


def load_exclusion(path: Path | str, index: PoolIndex) -> Exclusion:
    """Read an exclusion and verify its digest and that it is of this pool.

    Raises:
        UserError: it is absent or damaged, was made for another pool, or leaves nothing of the pool.
    """
    facts = _read_facts(Path(path))
    if facts["pool_fingerprint"] != index.fingerprint:
        raise UserError(
            f"{path} was made for another pool: its fingerprint is {facts['pool_fingerprint']}, that of {index.directory} is "
            f"{index.fingerprint}; run tools/check_contamination.py on this pool"
        )
    mask = np.zeros(index.num_samples, dtype=bool)
    for name, rows in facts["shards"]:
        mask[index.rows(name, np.array(rows, dtype=np.int64))] = True
    if mask.all():
        raise UserError(f"{path} excludes all {index.num_samples} samples of {index.directory}; none is left to train on")
    return Exclusion(mask, int(mask.sum()), facts["digest"])


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no exclusion file {path}; make one with tools/check_contamination.py")
    return read_sealed_json(path, "an exclusion file", _FORMAT, _VERSION, "make it again with tools/check_contamination.py")
