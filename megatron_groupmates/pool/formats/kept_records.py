"""Records of shards already dealt with, kept beside unfinished work so that a killed run continues."""

from __future__ import annotations

import io
import json
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.pool.index import ShardRecord
from megatron_groupmates.utils.files import write_bytes

_COLUMNS = ("offsets", "member_bytes", "lengths")


def kept_path(work: Path, shard_name: str) -> Path:
    """The file in ``work`` that keeps the record of a shard."""
    return work / f"{urllib.parse.quote(shard_name, safe='')}.npz"


def keep_record(work: Path, record: ShardRecord, stamp: str, more: dict[str, Any]) -> None:
    """Keep a record, complete or absent, with a stamp of what it was made from and further JSON values."""
    facts = {"name": record.name, "num_bytes": record.num_bytes, "sha256": record.sha256}
    content = io.BytesIO()
    text = json.dumps({"stamp": stamp, "record": facts, "more": more})
    np.savez(content, facts=text, **{column: getattr(record, column) for column in _COLUMNS})
    write_bytes(kept_path(work, record.name), content.getvalue())


def load_record(work: Path, shard_name: str, stamp: str) -> tuple[ShardRecord, dict[str, Any]] | None:
    """(record, further values) that were kept; None where there is none, it is damaged, or its stamp is another."""
    path = kept_path(work, shard_name)
    if not path.exists():
        return None
    try:
        with np.load(path) as content:
            facts = json.loads(str(content["facts"]))
            columns = {column: content[column] for column in _COLUMNS}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return None
    return (ShardRecord(**facts["record"], **columns), facts["more"]) if facts["stamp"] == stamp else None
