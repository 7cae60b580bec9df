"""Plain webdataset: a list of shards and a ``select_files`` callback that lets the selected samples through.

    import webdataset
    from megatron_groupmates.pool.formats.webdataset import open_export

    export = open_export("exported")
    data = webdataset.WebDataset(
        export.urls, select_files=export.select_files, shardshuffle=100, nodesplitter=webdataset.split_by_node
    ).map(export.put_tokens)

Each sample has its ids under ``tokens``, int64[length]. The callback is asked before a member is read from the tar, gives
the same answer in any order of shards and in any worker, and can be pickled.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.archive import key_and_suffix
from megatron_groupmates.pool.formats.subset import Subset, read_export, shard_keys, shard_url, write_export
from megatron_groupmates.pool.formats.tokens import put_tokens
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import sha256_file, write_bytes
from megatron_groupmates.utils.progress import progress_bar

KIND = "webdataset"
_KEYS_FILE = "selected_keys.bin"


class SelectFiles:
    """The callback for ``select_files``: whether a member belongs to a selected sample.

    Webdataset tells it the member's name but not the shard, so the keys of selected and unselected samples must differ,
    which the export has made sure of. They are kept as sorted 64-bit digests, memory-mapped: workers share one copy.

    Args:
        path: of the digests.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests = np.memmap(path, dtype="<u8", mode="r")

    def __call__(self, name: str) -> bool:
        """Whether the member called ``name`` is to be read."""
        parts = key_and_suffix(name)
        if parts is None:
            return False
        digest = np.uint64(_digest(parts[0]))
        place = self._digests.searchsorted(digest)
        return bool(place < len(self._digests) and self._digests[place] == digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return SelectFiles, (self._path,)


class WebDatasetExport:
    """An export opened for reading.

    Attributes:
        urls: shards with at least one selected sample, for ``webdataset.WebDataset``.
        num_samples: selected samples in them.
        select_files: see :class:`SelectFiles`.
        put_tokens: for ``WebDataset.map``, see :func:`megatron_groupmates.pool.formats.tokens.put_tokens`.
    """

    def __init__(self, urls: list[str], num_samples: int, select_files: SelectFiles, put_tokens: Callable[[dict], dict]) -> None:
        """Use :func:`open_export`."""
        self.urls, self.num_samples, self.select_files, self.put_tokens = urls, num_samples, select_files, put_tokens


def open_export(directory: Path | str) -> WebDatasetExport:
    """Open an export in a local directory and verify it.

    Raises:
        UserError: it is absent, damaged, or of another kind.
    """
    directory = Path(directory).absolute()
    facts = read_export(directory, KIND)
    path = directory / _KEYS_FILE
    found = sha256_file(path) if path.is_file() else "missing"
    if found != facts["keys_sha256"]:
        raise UserError(f"{path} is not the one of this export (SHA-256 {found}, not {facts['keys_sha256']}); make the export again")
    urls = [url if storage.is_remote(url) else str(directory / url) for url in facts["urls"]]
    put = functools.partial(put_tokens, suffix=facts["member_suffix"], token_dtype=facts["token_dtype"])
    return WebDatasetExport(urls, facts["num_samples"], SelectFiles(path), put)


def selected(directory: Path | str) -> SelectFiles:
    """The callback for ``select_files`` of the export in ``directory``; errors as :func:`open_export`."""
    return open_export(directory).select_files


def export_webdataset(subset: Subset, output: Path) -> None:
    """Write an export into the directory ``output``; exact for any selection whose keys are distinct.

    Raises:
        UserError: a selected and an unselected sample have one key, so that the callback cannot tell them apart.
        OSError: a shard cannot be read or the export not written.
    """
    index = subset.index
    shards = np.flatnonzero(subset.selected_per_shard)
    chosen: list[np.ndarray] = []
    others: list[np.ndarray] = []
    with progress_bar(len(shards), "read keys", unit="shard") as bar:
        for shard in shards.tolist():
            keys = shard_keys(index, shard)
            if keys.repeated:
                raise UserError(
                    f"shard {index.shard_path(shard)} has the key {keys.repeated[0]!r} twice: once others between are left out, "
                    "webdataset makes one sample of both; export with --materialize, which writes shards with keys of their own"
                )
            digests = np.fromiter(map(_digest, keys.keys), dtype=np.uint64, count=len(keys.keys))
            wanted = (keys.row_of >= 0) & subset.shard_mask(shard)[keys.row_of]
            chosen.append(digests[wanted])
            others.append(digests[~wanted])
            bar.update()
    digests = np.unique(np.concatenate(chosen))
    _refuse_shared_keys(subset, shards, digests, np.concatenate(others))
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / _KEYS_FILE, digests.astype("<u8").tobytes())
    facts = {"urls": [shard_url(index, shard, output) for shard in shards.tolist()], "keys_sha256": sha256_file(output / _KEYS_FILE)}
    write_export(output, KIND, subset, keys.suffix, facts)


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _refuse_shared_keys(subset: Subset, shards: np.ndarray, chosen: np.ndarray, others: np.ndarray) -> None:
    shared = np.intersect1d(chosen, others)
    if not len(shared):
        return
    for shard in shards.tolist():
        for key in shard_keys(subset.index, shard).keys:
            if _digest(key) == shared[0]:
                raise UserError(
                    f"{len(shared)} keys, {key!r} for one, belong to a selected sample and to one that is not: webdataset's select_files "
                    "is not told the shard and would serve both; export with --materialize, which writes the selected samples as shards"
                )
    raise AssertionError("a shared key is in no shard")
