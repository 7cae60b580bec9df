"""Where time goes: seconds by kind of work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up the seconds spent on each kind of work.

    Nothing waits for a GPU here: work that a block only queues is booked on whatever reads a value back next. A step and an
    evaluation each end in such a read; the copies of a restore, short beside them, are booked partly on the step behind it.

    Attributes:
        seconds: by kind, since the start or the last :meth:`reset`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Add the seconds of the block to ``kind``, those of one that raises too. Do not nest: both would count the inner block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started

    def reset(self) -> None:
        """Start anew."""
        self.seconds = {}
