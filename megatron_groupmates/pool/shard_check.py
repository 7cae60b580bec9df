"""Are the shards that an index describes there? One listing, of a local directory or a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.storage import find_files

logger = logging.getLogger(__name__)

_NUM_SHOWN = 10


def check_shards(pool: Path | str, place: Path | str, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Compare the tars below ``place`` with what the index of ``pool`` says; tars it does not know are only mentioned.

    Args:
        pool: path or URL of the pool, for messages.
        place: path or URL of the directory of the shards.
        names: of the shards.
        sizes: of the shards, in bytes.

    Raises:
        UserError: shards are missing or have another size; says how many and names the first few.
        OSError: the place cannot be listed.
    """
    found = _list_tars(place, names)
    missing = [f"{name}.tar" for name in names if name not in found]
    resized = [
        f"{name}.tar has {found[name]} bytes, the index says {size}"
        for name, size in zip(names, sizes, strict=True)
        if found.get(name, size) != size
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(names)} shards are missing in {place}: {_first(missing)}")
    if resized:
        faults.append(f"{len(resized)} shards in {place} have another size: {_first(resized)}")
    if faults:
        raise UserError(f"pool {pool}: {'; '.join(faults)}; restore them or make the pool again")
    extra = [f"{name}.tar" for name in sorted(set(found) - set(names))]
    if extra:
        logger.warning("pool %s: %d tars in %s are not in its index and will not be read: %s", pool, len(extra), place, _first(extra))


def _list_tars(place: Path | str, names: Sequence[str]) -> dict[str, int]:
    """Name without ``.tar`` to size in bytes of every tar in the directories in which the shards ``names`` lie."""
    if isinstance(place, str):
        files = [file for file in find_files(place) if file.path.endswith(".tar")]
        return {file.path.removeprefix(f"{place}/").removesuffix(".tar"): file.num_bytes for file in files}
    found = {}
    for parent in {os.path.dirname(name) for name in names}:
        directory = place / parent
        if directory.is_dir():
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".tar") and entry.is_file():
                        found[os.path.join(parent, entry.name.removesuffix(".tar"))] = entry.stat().st_size
    return found


def _first(items: Sequence[str]) -> str:
    """The first few of ``items``, for a message."""
    shown = ", ".join(items[:_NUM_SHOWN])
    return shown if len(items) <= _NUM_SHOWN else f"{shown} and {len(items) - _NUM_SHOWN} more"
