"""Reading one existing shard in one pass: where its samples lie, how long they are, and its digest."""

from __future__ import annotations

import collections
import dataclasses
from typing import BinaryIO

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.archive import HashingFile, key_and_suffix, walk_tar
from megatron_groupmates.pool.index import ShardRecord
from megatron_groupmates.pool.members import decode_json_member, decode_json_members
from megatron_groupmates.utils import storage

# Endings of members that hold ids, and the pool's name for their format.
FORMAT_OF_ENDING = {"json.gz": "json.gz", "bin": "raw"}
_MEMBERS_AT_ONCE = 64  # decoding many is faster


@dataclasses.dataclass(frozen=True)
class ScannedShard:
    """What one pass over a shard finds.

    Attributes:
        record: for the index; it has no rows where the shard has no sample.
        suffix: of the members that hold the ids, such as ``json.gz`` or ``tokens.bin``; empty where there are none.
        ignored: number of other members, by suffix.
    """

    record: ShardRecord
    suffix: str
    ignored: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """How to read shards.

    Attributes:
        vocab_size: ids must be below it.
        token_dtype: of raw members.
        suffix: of the members that hold the ids; None to take the one there is that ends in ``json.gz`` or ``bin``.
    """

    vocab_size: int
    token_dtype: str
    suffix: str | None = None


def member_format(suffix: str) -> str | None:
    """The pool's name for the format of members with this suffix; None for one that is not known to hold ids."""
    for ending, name in FORMAT_OF_ENDING.items():
        if suffix == ending or suffix.endswith(f".{ending}"):
            return name
    return None


def scan_shard(path: str, name: str, options: ScanOptions) -> ScannedShard:
    """Read the shard at ``path`` (local or URL), each byte once.

    Raises:
        UserError: it is not a tar, is damaged, has an id outside the vocabulary, or it is not clear which members hold
            the ids; names shard and row.
    """
    try:
        with storage.open_input(path) as file:
            return _scan(file, name, options)
    except (ValueError, OSError) as error:
        raise UserError(f"shard {path} cannot be indexed: {error}") from error


def _scan(file: BinaryIO, name: str, options: ScanOptions) -> ScannedShard:
    hashing = HashingFile(file)
    suffix = options.suffix
    offsets: list[int] = []
    member_bytes: list[int] = []
    lengths: list[int] = []
    contents: list[bytes] = []
    ignored: collections.Counter[str] = collections.Counter()
    for member in walk_tar(hashing):
        here = (key_and_suffix(member.name) or ("", ""))[1]
        if here != suffix:
            if options.suffix is not None or member_format(here) is None:
                ignored[here] += 1
                continue
            if suffix is not None:
                raise ValueError(f"members end in .{suffix} and in .{here}, both of which may hold ids: choose one with --member-suffix")
            suffix = here
        contents.append(member.content)
        if len(contents) == _MEMBERS_AT_ONCE:
            lengths += _check_ids(contents, suffix, len(lengths), options)
            contents = []
        offsets.append(member.offset)
        member_bytes.append(member.num_bytes)
    if contents:
        lengths += _check_ids(contents, suffix or "", len(lengths), options)
    if not offsets and ignored:
        endings = ", ".join(f".{ending}" for ending in sorted(ignored))
        expected = options.suffix or " or .".join(FORMAT_OF_ENDING)
        raise ValueError(f"no member has ids: the names end in {endings}, not in .{expected}; name the ending with --member-suffix")
    digest = hashing.finish()
    record = ShardRecord(
        name,
        np.array(offsets, dtype=np.uint64),
        np.array(member_bytes, dtype=np.uint32),
        np.array(lengths, dtype=np.int32),
        hashing.num_bytes,
        digest,
    )
    return ScannedShard(record, suffix or "", dict(ignored))


def _check_ids(contents: list[bytes], suffix: str, first_row: int, options: ScanOptions) -> list[int]:
    """Numbers of ids in members, all of which are in the vocabulary."""
    if member_format(suffix) == "json.gz":
        try:
            tokens, lengths = decode_json_members(contents)
            if min(lengths) > 0 and tokens.min() >= 0 and tokens.max() < options.vocab_size:
                return lengths
        except ValueError:
            pass  # one of them is damaged: which one?
    return [_check_member(content, suffix, first_row + number, options) for number, content in enumerate(contents)]


def _check_member(content: bytes, suffix: str, row: int, options: ScanOptions) -> int:
    try:
        if member_format(suffix) == "raw":
            tokens = np.frombuffer(content, dtype=np.dtype(options.token_dtype).newbyteorder("<"))
        else:
            tokens = decode_json_member(content)
        if not len(tokens):
            raise ValueError("it has no ids")
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= options.vocab_size:
        raise ValueError(
            f"row {row} has ids from {low} to {high}, but the tokenizer's vocabulary has {options.vocab_size}: "
            "name the one that made the shards with --tokenizer"
        )
    return len(tokens)
