"""Decoding the members of token shards. Exact: content that is not what it should be is an error, never other ids."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Sequence

import numpy as np
from isal import igzip, isal_zlib

_TEXTS_AT_ONCE = 16  # more than these would leave the processor's cache
_PADDING = b"0" * 8
# Join neighbouring digits to pairs, pairs to fours, fours to eights: what counts, factor, bits to drop.
_JOINS = tuple(
    tuple(map(np.uint64, join))
    for join in (
        (0x0F0F0F0F0F0F0F0F, (10 << 8) + 1, 8),
        (0x00FF00FF00FF00FF, (100 << 16) + 1, 16),
        (0x0000FFFF0000FFFF, (10_000 << 32) + 1, 32),
    )
)


def decode_json_member(content: bytes) -> np.ndarray:
    """Ids of a DCLM member, int64[length].

    Raises:
        ValueError: ``content`` is not the gzip of a JSON list of whole numbers.
    """
    text = _decompress(content)
    tokens = parse_id_list(text)
    return _load_id_list(text) if tokens is None else tokens


def decode_json_members(contents: Sequence[bytes]) -> tuple[np.ndarray, list[int]]:
    """Ids of several DCLM members, one after the other int64[sum of lengths], and their lengths.

    Raises:
        ValueError: as :func:`decode_json_member`.
    """
    found: list[np.ndarray] = []
    lengths: list[int] = []
    for first in range(0, len(contents), _TEXTS_AT_ONCE):
        texts = [_decompress(content) for content in contents[first : first + _TEXTS_AT_ONCE]]
        inner = [text[1:-1] for text in texts]
        # One long list parses faster than many short ones. It has the form asked for just when each of them has.
        parsed = None
        if all(text[:1] == b"[" and text[-1:] == b"]" for text in texts):
            parsed = _parse_id_list(b"[" + b", ".join(inner) + b"]")
        if parsed is None:
            members = [_load_id_list(text) for text in texts]
            found += members
            lengths += map(len, members)
        else:
            tokens, before = parsed
            ends = before.searchsorted([*itertools.accumulate(len(text) + 2 for text in inner)]).tolist()
            found.append(tokens)
            lengths += [stop - start for start, stop in itertools.pairwise([0, *ends])]
    return found[0] if len(found) == 1 else np.concatenate(found), lengths


def parse_id_list(text: bytes) -> np.ndarray | None:
    """What ``json.loads`` makes of ``[1, 22, 333]``, int64[length]; None for any text that is not of this very form.

    The form is that of ``json.dumps``: numbers of one to eight digits without leading zeros, not negative, one comma and
    one space between them.
    """
    parsed = _parse_id_list(text)
    return None if parsed is None else parsed[0]


def _parse_id_list(text: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """As :func:`parse_id_list`, and the place in ``text`` before each number's first digit (its space or bracket), int64[length].

    All numbers are read at once: the eight bytes that begin with a number, one 64-bit word each.
    """
    size = len(text)
    characters = np.frombuffer(text, np.uint8)
    is_comma, is_space = characters == ord(","), characters == ord(" ")
    is_digit = characters - np.uint8(ord("0")) < 10
    commas = is_comma.nonzero()[0]
    # The bytes before each number's first; the last entry closes the last number as a comma would.
    before = np.empty(len(commas) + 2, np.int64)
    before[0], before[-1] = 0, size
    np.add(commas, 1, out=before[1:-1])
    shifts = before[1:] - before[:-1]  # digits + 2
    shifts *= -8
    shifts += 80
    if (
        text[:1] != b"["
        or text[-1:] != b"]"
        # A space after each comma and nowhere else, and every other byte a digit.
        or is_space[1:].tobytes() != is_comma[:-1].tobytes()
        or np.count_nonzero(is_digit) + 2 * len(commas) + 2 != size
        # One to eight digits: more, or none, is a number beyond 56 when its sign bit counts as a bit.
        or shifts.view(np.uint64).max() > 56
        or (text[1:2] == b"0" and text[2:3].isdigit())
        or ((characters[1:-1] == ord("0")) & is_digit[2:] & is_space[:-2]).any()
    ):
        return None
    # The digits move to the end of the word; zeros come before them, what followed them drops out.
    words = np.ndarray((size,), "<u8", text + _PADDING, 1, (1,)).take(before[:-1])
    words <<= shifts.view(np.uint64)
    for mask, factor, bits in _JOINS:
        words &= mask
        words *= factor
        words >>= bits
    return words.view("<i8"), before[:-1]


def _decompress(content: bytes) -> bytes:
    try:
        return igzip.decompress(content)
    except (OSError, EOFError, zlib.error, isal_zlib.error) as error:
        raise ValueError(f"not a gzip file: {error}") from error


def _load_id_list(text: bytes) -> np.ndarray:
    """The ids of any JSON list of whole numbers, int64[length]."""
    try:
        values = json.loads(text)
        if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
            raise ValueError("not a JSON list of token ids")
        return np.array(values, dtype=np.int64)
    except (RecursionError, OverflowError) as error:  # nested a thousand lists deep; beyond 64 bits
        raise ValueError(f"not a JSON list of token ids: {error}") from error


def decode_members(
    content: bytes,
    starts: Sequence[int],
    sizes: Sequence[int],
    lengths: Sequence[int],
    member_format: str,
    token_dtype: str,
    vocab_size: int,
) -> np.ndarray | list[np.ndarray]:
    """Ids of several members.

    Args:
        content: holds the members.
        starts: where each begins in ``content``.
        sizes: bytes of each.
        lengths: tokens of each.
        member_format: ``raw`` or ``json.gz``.
        token_dtype: of raw members.
        vocab_size: ids must be smaller.

    Returns:
        ``[n, length]`` where all have one length, else an array for each; ``token_dtype`` of raw members, else int64.

    Raises:
        ValueError: a member is damaged.
    """
    if member_format == "raw":
        members = _raw_members(content, starts, sizes, lengths, np.dtype(token_dtype).newbyteorder("<"))
        for tokens in (members,) if isinstance(members, np.ndarray) else members:
            _check_ids(tokens, vocab_size)
        return members
    tokens, found = decode_json_members([content[start : start + size] for start, size in zip(starts, sizes, strict=True)])
    for expected, length in zip(lengths, found, strict=True):
        if length != expected:
            raise ValueError(f"{expected} tokens expected, found {length}")
    _check_ids(tokens, vocab_size)
    if lengths.count(lengths[0]) == len(lengths):
        return tokens.reshape(len(lengths), -1)
    return np.split(tokens, [*itertools.accumulate(lengths[:-1])])


def _check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    # The view shows ids below 0 as the largest: one pass over the ids checks both ends.
    if tokens.view(f"<u{tokens.itemsize}").max() >= vocab_size:
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()}, the vocabulary has {vocab_size}")


def _raw_members(
    content: bytes, starts: Sequence[int], sizes: Sequence[int], lengths: Sequence[int], dtype: np.dtype
) -> np.ndarray | list[np.ndarray]:
    for size, length in zip(sizes, lengths, strict=True):
        if size != length * dtype.itemsize:
            raise ValueError(f"{length} tokens expected, found {size / dtype.itemsize:g}")
    size = sizes[0]
    if sizes.count(size) < len(sizes):
        return [np.frombuffer(content, dtype, length, start) for start, length in zip(starts, lengths, strict=True)]
    if len(content) == size * len(sizes):  # nothing between them
        return np.frombuffer(content, dtype).reshape(len(sizes), -1)
    windows = np.ndarray((len(content) - size + 1,), f"V{size}", content, strides=(1,))
    return windows[np.array(starts)].view(dtype).reshape(len(sizes), -1)
