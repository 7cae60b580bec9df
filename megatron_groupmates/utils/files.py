"""Files that are complete or absent: everything is written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_groupmates.config.errors import UserError


def fsync_path(path: Path) -> None:
    """Make a file's content, or the renames and new names inside a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Binary file that appears at ``path`` only when the block ends without an exception.

    Written to ``<path>.tmp-<pid>`` beside it, synced, renamed over whatever was there. On an exception (a full
    disk included) the partial file is removed and the old content of ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Atomically replace ``path`` with ``content``."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path | str, content: str) -> None:
    """Atomically replace ``path`` with UTF-8 ``content``."""
    write_bytes(path, content.encode())


def write_json(path: Path | str, content: Any) -> None:
    """Atomically replace ``path`` with indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The JSON value of ``text``.

    Raises:
        ValueError: it has none, or is nested deeper than the parser can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"not JSON: {error}") from error


def read_json(path: Path | str) -> Any:
    """The JSON value in ``path``; errors as :func:`parse_json`."""
    return parse_json(Path(path).read_text())


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with ``digest``, the SHA-256 of all of it as canonical JSON, for :func:`read_sealed_json`."""
    return {**content, "digest": sha256_json(content)}


def read_sealed_json(path: Path, what: str, file_format: str, version: int, remedy: str) -> dict[str, Any]:
    """The object in ``path``, made by :func:`sealed`, checked for its digest and its ``format`` and ``version``.

    Args:
        path: of the file, which must exist.
        what: the file holds, for messages: ``an export``.
        file_format: expected ``format``.
        version: expected ``version``.
        remedy: what to do where it is no such file.

    Raises:
        UserError: it is damaged, or of another format or version.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != file_format or content.get("version") != version:
        raise UserError(f"{path} is not {what} of version {version}; {remedy}")
    digest = sha256_json({name: value for name, value in content.items() if name != "digest"})
    if digest != content.get("digest"):
        raise UserError(f"{path} is damaged: its content has digest {digest}, it says {content.get('digest')}; {remedy}")
    return content


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty directory that is renamed to ``path`` when the block ends without an exception.

    A leftover of a killed run (``<path>.tmp-*``) is removed first. ``path`` must not exist yet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{path.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for item in (*partial.rglob("*"), partial):
            fsync_path(item)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_path(path.parent)


def append_line(path: Path | str, line: str) -> None:
    """Append one line to ``path`` and sync it; a torn last line left by a crash is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered: what a full disk refuses must not be written by a later close.
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        start = file.seek(0, os.SEEK_END)
        try:
            content = line.encode() + b"\n"
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, start)
            raise


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file; a torn last line (no final newline) is left out. Errors as :func:`parse_json`."""
    path = Path(path)
    if not path.exists():
        return []
    return [parse_json(line) for line in path.read_text().split("\n")[:-1] if line]


def sha256_bytes(*parts: bytes | memoryview) -> str:
    """Hex SHA-256 of the concatenated ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
