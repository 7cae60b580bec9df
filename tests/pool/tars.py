"""Tars as other tools write them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def tar_bytes(members: Sequence[tuple[str, bytes | None]], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar with these members, a directory where the content is None."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes | None]], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    """Write :func:`tar_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, tar_format))
    return path


def json_member(tokens: Sequence[int]) -> bytes:
    """A sample as DCLM's tokeniser writes it."""
    return gzip.compress(json.dumps(list(tokens)).encode(), mtime=0)


def raw_member(tokens: Sequence[int]) -> bytes:
    """A sample as this package writes it."""
    return np.array(tokens, dtype="<u2").tobytes()


def random_samples(count: int, length: int = 9, seed: int = 0) -> list[list[int]]:
    """Ids below 300."""
    return np.random.default_rng(seed).integers(0, 300, (count, length)).tolist()
