"""Random damage to the content of files, seeded, for tests of readers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_TELLING = b'{}[]",:-+.eE0159\n\r\0 \x80\xff'


def flip(content: bytearray, generator: np.random.Generator) -> bytearray:
    """Some bits are wrong."""
    for place in generator.integers(0, len(content), generator.integers(1, 5)):
        content[place] ^= 1 << int(generator.integers(0, 8))
    return content


def replace(content: bytearray, generator: np.random.Generator) -> bytearray:
    """Some bytes are others, such as mean something to a parser."""
    for place in generator.integers(0, len(content), generator.integers(1, 4)):
        content[place] = _TELLING[generator.integers(0, len(_TELLING))]
    return content


def cut(content: bytearray, generator: np.random.Generator) -> bytearray:
    """The end is missing."""
    return content[: generator.integers(0, len(content))]


def behead(content: bytearray, generator: np.random.Generator) -> bytearray:
    """The beginning is missing."""
    return content[generator.integers(1, len(content) + 1) :]


def remove(content: bytearray, generator: np.random.Generator) -> bytearray:
    """A stretch is missing."""
    start, stop = sorted(generator.integers(0, len(content) + 1, 2).tolist())
    return content[:start] + content[stop:]


def insert(content: bytearray, generator: np.random.Generator) -> bytearray:
    """Something is in it that does not belong there."""
    place = int(generator.integers(0, len(content) + 1))
    return content[:place] + bytearray(generator.bytes(int(generator.integers(1, 600)))) + content[place:]


def repeat(content: bytearray, generator: np.random.Generator) -> bytearray:
    """A stretch comes twice."""
    start, stop = sorted(generator.integers(0, len(content) + 1, 2).tolist())
    return content[:stop] + content[start:]


def nest(content: bytearray, generator: np.random.Generator) -> bytearray:
    """Brackets deeper than a parser can follow."""
    place = int(generator.integers(0, len(content) + 1))
    return content[:place] + bytearray(b"[" * 100_000) + content[place:]


def blank(content: bytearray, generator: np.random.Generator) -> bytearray:
    """A stretch reads as zeros, as after a crash."""
    start, stop = sorted(generator.integers(0, len(content) + 1, 2).tolist())
    content[start:stop] = bytes(stop - start)
    return content


def swap(content: bytearray, generator: np.random.Generator) -> bytearray:
    """Two blocks have changed places."""
    size = int(generator.choice([1, 16, 512, 1024]))
    blocks = [content[first : first + size] for first in range(0, len(content), size)]
    first, second = generator.integers(0, len(blocks), 2)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return bytearray(b"".join(blocks))


KINDS: tuple[Callable[[bytearray, np.random.Generator], bytearray], ...] = (
    flip,
    replace,
    cut,
    behead,
    remove,
    insert,
    repeat,
    nest,
    blank,
    swap,
)


def damaged(content: bytes, generator: np.random.Generator, others: tuple[bytes, ...] = ()) -> bytes:
    """``content`` after one to three mishaps; sometimes one of ``others`` in its place."""
    if others and generator.random() < 0.05:
        return others[generator.integers(0, len(others))]
    result = bytearray(content)
    for _ in range(int(generator.integers(1, 4))):
        if result:
            result = KINDS[generator.integers(0, len(KINDS))](result, generator)
    return bytes(result)
