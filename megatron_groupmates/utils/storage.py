"""Files on local disks and in object stores: any fsspec URL (``s3://``, ``gs://``, ``hf://``, ...) or plain path.

A place is a string (or a local ``Path``): only strings survive, as ``Path("s3://bucket")`` is no longer a URL. Every
function takes both sorts, so that callers need not tell them apart. File systems are looked up on each call and never
kept: fsspec caches them by process, and those of a parent do not work in a forked child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import atomic_file

_options: dict[str, dict[str, Any]] = {}


@dataclasses.dataclass(frozen=True, order=True)
class FileFacts:
    """A file that was found.

    Attributes:
        path: local path or URL.
        num_bytes: its size.
    """

    path: str
    num_bytes: int


def configure_storage(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set arguments of remote file systems, by protocol, for this process: ``{"s3": {"endpoint_url": ...}}``.

    Processes started from here need the same call (:func:`storage_options` gives the argument).

    Raises:
        UserError: not a mapping of protocols to mappings.
    """
    if not all(isinstance(name, str) and isinstance(value, Mapping) for name, value in options.items()):
        raise UserError(f'storage options name arguments by protocol, such as {{"s3": {{"endpoint_url": "..."}}}}, not {dict(options)!r}')
    _options.clear()
    _options.update({name: dict(value) for name, value in options.items()})


def storage_options() -> dict[str, dict[str, Any]]:
    """What :func:`configure_storage` was called with."""
    return _options


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is a URL of something else than the local file system."""
    return "://" in str(path) and not str(path).startswith("file://")


def join(directory: str | Path, *names: str) -> str:
    """Path of a file below ``directory``, local or remote."""
    return posixpath.join(str(directory), *names)


def open_input(path: str | Path) -> BinaryIO:
    """Open a file for reading, buffered and seekable.

    Raises:
        UserError: the URL's protocol is unknown or its package is not installed.
        OSError: it cannot be opened.
    """
    if not is_remote(path):
        return open(_local(path), "rb")
    with _as_os_error(path):
        system, inner = filesystem(path)
        return system.open(inner, "rb")


def read_all(path: str | Path) -> bytes:
    """Content of a whole file; errors as :func:`open_input`."""
    with open_input(path) as file, _as_os_error(path):
        return file.read()


def read_ranges(path_ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes ``start`` to ``stop`` of each (path, start, stop), remote files of one file system fetched concurrently.

    A range that goes beyond the end of its file gives fewer bytes.

    Raises:
        UserError, OSError: as :func:`open_input`; the whole call fails when one range does.
    """
    if not path_ranges:
        return []
    with _as_os_error(path_ranges[0][0]):
        system, _ = filesystem(path_ranges[0][0])
        paths = [system._strip_protocol(path) for path, _, _ in path_ranges]
        return system.cat_ranges(paths, [start for _, start, _ in path_ranges], [stop for _, _, stop in path_ranges], on_error="raise")


def file_size(path: str | Path) -> int | None:
    """Size of a file in bytes; None where there is none.

    Raises:
        UserError, OSError: as :func:`open_input`, for another reason than that it does not exist.
    """
    try:
        if not is_remote(path):
            return _local(path).stat().st_size if _local(path).is_file() else None
        with _as_os_error(path):
            system, inner = filesystem(path)
            facts = system.info(inner)
            return facts["size"] if facts["type"] == "file" else None
    except FileNotFoundError:
        return None


def find_files(path: str | Path) -> list[FileFacts]:
    """Files that ``path`` stands for, sorted: itself, the matches of a glob pattern, or all files below a directory.

    Raises:
        UserError, OSError: as :func:`open_input`; nothing found is an empty list.
    """
    with _as_os_error(path):
        system, inner = filesystem(path)
        if any(character in inner for character in "*?["):
            found = {}
            for name, facts in system.glob(inner, detail=True).items():
                found.update({name: facts} if facts["type"] == "file" else system.find(name, detail=True))
        else:
            found = system.find(inner, detail=True)
        full = (lambda name: system.unstrip_protocol(name)) if is_remote(path) else str
        return sorted(FileFacts(full(name), facts["size"]) for name, facts in found.items())


def upload(source: Path, target: str | Path) -> None:
    """Copy a local file; ``target`` is complete or absent (object stores show an upload when it is complete).

    Raises:
        UserError, OSError: as :func:`open_input`.
    """
    if not is_remote(target):
        with open(source, "rb") as file, atomic_file(_local(target)) as out:
            while block := file.read(1 << 22):
                out.write(block)
        return
    with _as_os_error(target):
        system, inner = filesystem(target)
        system.put_file(str(source), inner)
        system.invalidate_cache()


def filesystem(path: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system of ``path``, the path within it), for this process.

    Raises:
        UserError: the protocol is unknown or needs a package that is not installed.
    """
    protocol = str(path).split("://", 1)[0] if is_remote(path) else "file"
    try:
        return fsspec.core.url_to_fs(str(path), **_options.get(protocol, {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {path}: {error}; for {protocol}:// install its fsspec package (s3fs for s3, gcsfs for gs)") from error


def _local(path: str | Path) -> Path:
    return Path(str(path).removeprefix("file://"))


@contextlib.contextmanager
def _as_os_error(path: str | Path) -> Iterator[None]:
    """Object stores raise exceptions of their own libraries: callers need one sort."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever the store's library raises: no credentials, no connection, ...
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error
