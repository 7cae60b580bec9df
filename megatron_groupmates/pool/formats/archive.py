"""Walking the members of a tar in one pass, and WebDataset's way of making samples of them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_ADLER_MODULUS = 65521
_MAX_BYTES = 1 << 50
_READ_BYTES = 1 << 24
_REGULAR = (b"0", b"\0", b"7")
# WebDataset takes everything up to the first dot of the file name for the key, the rest for the suffix.
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar.

    Attributes:
        name: its path in the archive.
        offset: of its data, in bytes.
        num_bytes: size of its data.
        content: the data; empty where headers alone are read.
        start: of its first header (long names have several), in bytes.
        extended: whether the name is in an extension header.
    """

    name: str
    offset: int
    num_bytes: int
    content: bytes
    start: int
    extended: bool


class HashingFile:
    """Reads a file from its beginning to its end and keeps the SHA-256 and number of all bytes read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; fewer only at the end of the file."""
        content = self._file.read(size)
        self._digest.update(content)
        self.num_bytes += len(content)
        return content

    def finish(self) -> str:
        """Read the rest; the file's hex digest."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """A member's key and suffix, as WebDataset and Energon split its name; None for what they pass over."""
    match = _KEY_AND_SUFFIX.fullmatch(name)
    return None if match is None or _META.match(name) else (match.group(1), match.group(2))


def walk_tar(file: BinaryIO | HashingFile, headers_only: bool = False) -> Iterator[Member]:
    """Regular members of an uncompressed tar (v7, ustar, GNU or pax), in order, reading each byte at most once.

    Args:
        file: at its beginning. A buffered file, or for ``headers_only`` an unbuffered seekable one.
        headers_only: seek over the data of members.

    Raises:
        ValueError: the archive is damaged, ends early, or holds a sparse file.
    """
    position = start = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        if len(header) < _BLOCK:
            raise ValueError(f"the archive is damaged or ends early, at byte {position}")
        name, kind, num_bytes = _parse_header(header, position)
        position += _BLOCK
        extension = kind in (b"L", b"K", b"x", b"g")
        if not extension:
            num_bytes = int(pax.get("size", num_bytes))
        if not 0 <= num_bytes <= _MAX_BYTES:
            raise ValueError(f"the archive is damaged: member {name!r} at byte {position} has {num_bytes} bytes")
        content = b""
        padded = -(-num_bytes // _BLOCK) * _BLOCK
        if headers_only and not extension:
            file.seek(padded, 1)
        else:
            content = _read(file, padded)
            if len(content) < num_bytes:
                raise ValueError(
                    f"unexpected end of data: member {name!r} at byte {position} has {num_bytes} bytes, {len(content)} are there"
                )
            content = content[:num_bytes]
        if kind == b"L":
            long_name = content.rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == b"x":
            pax = _parse_pax(content, position)
        elif kind == b"S" or any(field.startswith("GNU.sparse") for field in pax):
            raise ValueError(f"member {name!r} at byte {position} is a sparse file; write the archive without --sparse")
        extended_name = pax.get("path", long_name)
        name = extended_name or name
        if kind in _REGULAR and not name.endswith("/"):
            yield Member(name, position, num_bytes, content, start, extended_name is not None)
        position += padded
        if not extension:
            long_name, pax, start = None, {}, position


@dataclasses.dataclass(frozen=True)
class TarKeys:
    """The samples of a shard as WebDataset sees them: runs of members with one key.

    Attributes:
        keys: of the samples, in order.
        sample_at: (number of the sample, suffix) by offset of the data of each member.
        starts: byte at which each sample begins, and at which the last one ends.
        longest_name: bytes of the longest name of a member.
        num_extended: members whose name is in an extension header, where simple readers do not look.
    """

    keys: list[str]
    sample_at: dict[int, tuple[int, str]]
    starts: list[int]
    longest_name: int
    num_extended: int


def read_keys(file: BinaryIO) -> TarKeys:
    """Keys of a shard, from its headers alone.

    Args:
        file: seekable, best unbuffered, at its beginning.

    Raises:
        ValueError: as :func:`walk_tar`.
    """
    keys: list[str] = []
    sample_at: dict[int, tuple[int, str]] = {}
    starts: list[int] = []
    end = longest = num_extended = 0
    for member in walk_tar(file, headers_only=True):
        end = member.offset + -(-member.num_bytes // _BLOCK) * _BLOCK
        parts = key_and_suffix(member.name)
        if parts is None:
            continue
        if not keys or keys[-1] != parts[0]:
            keys.append(parts[0])
            starts.append(member.start)
        sample_at[member.offset] = (len(keys) - 1, parts[1])
        longest = max(longest, len(member.name.encode(errors="surrogateescape")))
        num_extended += member.extended
    return TarKeys(keys, sample_at, [*starts, end], longest, num_extended)


def _read(file: BinaryIO | HashingFile, num_bytes: int) -> bytes:
    """As ``file.read``, which would make room for all the bytes that a damaged header asks for."""
    if num_bytes <= _READ_BYTES:
        return file.read(num_bytes)
    blocks = []
    while num_bytes and (block := file.read(min(num_bytes, _READ_BYTES))):
        blocks.append(block)
        num_bytes -= len(block)
    return b"".join(blocks)


def _parse_header(header: bytes, position: int) -> tuple[str, bytes, int]:
    """(name, type, size of the data) of a header block."""
    try:
        checksum = int(header[148:156].rstrip(b" \0") or b"0", 8)
        size_field = header[124:136]
        if size_field[0] & 0x80:  # GNU's binary numbers, of 8 GiB and more
            num_bytes = int.from_bytes(size_field[1:], "big")
        else:
            num_bytes = int(size_field.rstrip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ValueError(f"the archive is damaged: no tar header at byte {position}") from error
    # The sum counts its own field as spaces. The lower half of Adler's checksum is one more than the sum of the bytes,
    # modulo a number near 2**16, in a fraction of the time that Python's ``sum`` takes.
    total = (zlib.adler32(b"%b        %b" % (header[:148], header[156:])) & 0xFFFF) - 1
    if (total - checksum) % _ADLER_MODULUS:
        raise ValueError(f"the archive is damaged: the header at byte {position} does not match its checksum")
    name = header[:100].split(b"\0", 1)[0]
    kind = header[156:157]
    if header[257:263] == b"ustar\0" and kind not in (b"L", b"K"):
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    has_data = kind in _REGULAR or kind in (b"L", b"K", b"x", b"g", b"S")
    return name.decode(errors="surrogateescape"), kind, num_bytes if has_data else 0


def _parse_pax(content: bytes, position: int) -> dict[str, str]:
    """Fields of a pax header: records of ``length name=value``."""
    fields = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise ValueError(f"the archive is damaged: the pax header at byte {position} cannot be read")
        name, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name.decode(errors="replace")] = value.decode(errors="surrogateescape")
        content = content[int(length) :]
    return fields
