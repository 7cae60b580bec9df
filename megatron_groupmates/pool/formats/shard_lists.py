"""Finding existing token shards: DCLM's manifest, a wids index, an Energon dataset, or a plain directory of tars."""

from __future__ import annotations

import dataclasses
import os
import posixpath
from pathlib import Path
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import MANIFEST_FILE
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import parse_json

ENERGON_INFO = ".nv-meta/.info.json"


@dataclasses.dataclass(frozen=True)
class ShardList:
    """The shards of a data set.

    Attributes:
        directory: absolute path or URL; the shards are ``<directory>/<name>.tar``.
        counts: number of samples by shard name where it is said, else None.
        said_by: the file that lists the shards; None where all tars below ``directory`` were taken.
        repeated: names listed more than once.
        extra: tars below ``directory`` that are not listed.
    """

    directory: str
    counts: dict[str, int | None]
    said_by: str | None
    repeated: list[str]
    extra: list[str]

    def path(self, name: str) -> str:
        """Path or URL of a shard."""
        return storage.join(self.directory, f"{name}.tar")


def list_shards(source: Path | str) -> ShardList:
    """The shards that ``source`` stands for.

    Args:
        source: a directory or URL of one, with ``manifest.jsonl`` (with or without a final newline), or an Energon
            data set (``.nv-meta``), or tars alone; or a wids index (``*.json``).

    Raises:
        UserError: there is nothing there, the list cannot be read, lists nothing, or shards on it are missing.
        OSError: it cannot be read.
    """
    source = str(source) if storage.is_remote(source) else os.path.abspath(source)
    if source.endswith(".json"):
        directory, entries = _read_wids(source)
        found = _ShardsPresent(directory)
        said_by: str | None = source
    else:
        if not storage.is_remote(source) and not Path(source).is_dir():
            raise UserError(f"there is no directory {source}; check the path")
        directory, found = source, _ShardsPresent(source)
        said_by, entries = _read_list(source)
        if said_by is None:
            entries = [(name, None) for name in found.names]
    counts: dict[str, int | None] = {}
    repeated = []
    for name, count in entries:
        if name in counts:
            repeated.append(name)
        counts[name] = count
    if not counts:
        raise UserError(
            f"{directory} has no token shards: no *.tar files, and no {MANIFEST_FILE} or {ENERGON_INFO} that lists any"
            if said_by is None
            else f"{said_by} lists no token shards; directory {directory} has no token shards then"
        )
    missing = [name for name in sorted(counts) if not found.has(name)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(counts)} shards of {said_by} are missing: {enumerate_names(missing)}; "
            "fetch them, or take their lines out of the manifest"
        )
    return ShardList(directory, counts, said_by, repeated, sorted(set(found.names) - set(counts)))


def enumerate_names(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


class _ShardsPresent:
    """The tars below a directory, listed once: an object store is slow to ask for each."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._remote = storage.is_remote(directory)
        if self._remote:
            paths = [file.path for file in storage.find_files(directory)]
            prefix = directory.rstrip("/") + "/"
            names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
        else:
            names = [path.relative_to(directory).as_posix() for path in Path(directory).rglob("*.tar") if path.is_file()]
        self.names = sorted(name.removesuffix(".tar") for name in names if name.endswith(".tar"))
        self._known = set(self.names)

    def has(self, name: str) -> bool:
        """Whether ``<name>.tar`` is there; ``name`` may lead out of the directory."""
        return name in self._known or storage.file_size(storage.join(self._directory, f"{name}.tar")) is not None


def _read_list(directory: str) -> tuple[str | None, list[tuple[str, int | None]]]:
    """(the file that lists the directory's shards, their names and counts)."""
    for name, parse in ((MANIFEST_FILE, _parse_manifest), (ENERGON_INFO, _parse_energon)):
        path = storage.join(directory, name)
        if storage.file_size(path) is not None:
            return path, parse(path, storage.read_all(path).decode(errors="replace"))
    return None, []


def _parse_manifest(path: str, text: str) -> list[tuple[str, int | None]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = parse_json(line)
            entries.append((str(entry["shard"]), entry.get("num_sequences", entry.get("num_chunks"))))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number} is not an object with "shard": {line[:80]!r}') from error
    return entries


def _parse_energon(path: str, text: str) -> list[tuple[str, int | None]]:
    try:
        counts = {name: int(count) for name, count in parse_json(text)["shard_counts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not an Energon data set: it should have "shard_counts"; run energon prepare again') from error
    return [(_shard_name(path, name), count) for name, count in counts.items()]


def _read_wids(path: str) -> tuple[str, list[tuple[str, int | None]]]:
    """(directory that holds all shards of a wids index, their names and counts)."""
    if storage.file_size(path) is None:
        raise UserError(f"there is no wids index {path}; check the path")
    try:
        index = parse_json(storage.read_all(path))
        parts = [index, *index.get("datasets", [])]
        if any("source_url" in part for part in parts):
            raise UserError(f"wids index {path} refers to other indices by source_url; give these one by one, or an index of shards")
        entries = [
            (_absolute(str(shard["url"]), part.get("base", index.get("base")), path), int(shard["nsamples"]))
            for part in parts
            for shard in part.get("shardlist", [])
        ]
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f'{path} is not a wids index: it should have a "shardlist" of {{"url", "nsamples"}}; make it again') from error
    if not entries:
        return posixpath.dirname(path), []
    protocols = {url.split("://", 1)[0] if "://" in url else "" for url, _ in entries}
    directory = posixpath.commonpath([posixpath.dirname(url) for url, _ in entries]) if len(protocols) == 1 else ""
    if len(protocols) > 1 or directory.endswith(":"):
        raise UserError(f"the shards of wids index {path} lie in several stores or buckets; a pool has one place: copy them together")
    # Taking the common path apart makes one slash of a URL's two.
    protocol = protocols.pop()
    if protocol:
        directory = directory.replace(f"{protocol}:/", f"{protocol}://", 1)
    return directory, [(_shard_name(path, url[len(directory) :].lstrip("/")), count) for url, count in entries]


def _absolute(url: str, base: str | None, index_path: str) -> str:
    if url.startswith("pipe:"):
        raise UserError(f"wids index {index_path} reads {url!r} through a command; name the shards by path or URL")
    if "://" in url or url.startswith("/"):
        return url.removeprefix("file://")
    directory = posixpath.dirname(index_path) if base is None else base
    if "://" not in directory and not directory.startswith("/"):
        directory = storage.join(posixpath.dirname(index_path), directory)
    joined = storage.join(directory, url)
    return joined if "://" in joined else posixpath.normpath(joined)


def _shard_name(path: str, name: str) -> str:
    if not name.endswith(".tar"):
        raise UserError(f"{path} lists {name!r}, which is not a .tar; shards of a pool are uncompressed tars")
    return name.removesuffix(".tar")
