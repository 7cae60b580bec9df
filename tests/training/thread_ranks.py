"""Ranks as threads of one process: collectives for tests of what ranks agree on, without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 20.0  # a rank that does not come to a collective fails the test instead of hanging it


class ThreadRanks:
    """Stands for ``torch.distributed`` in one module (with ``monkeypatch``), and gives each rank its groups."""

    ReduceOp = dist.ReduceOp

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size
        self._local = threading.local()

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        """``function(groups)`` on every rank; what each returned, or the first error that is not a lost peer's."""
        with ThreadPoolExecutor(self.size) as executor:
            futures = [executor.submit(self._start, function, rank) for rank in range(self.size)]
            errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def _start(self, function: Callable[[Any], Any], rank: int) -> Any:
        self._local.rank = rank
        groups = SimpleNamespace(
            rank=rank,
            world_size=self.size,
            is_main=rank == 0,
            device=torch.device("cpu"),
            data_rank=rank,
            data_size=self.size,
            broadcast_object=lambda value: self.exchange(value)[0],
            barrier=lambda: self.exchange(None),
        )
        try:
            return function(groups)
        except BaseException:
            self._barrier.abort()
            raise

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        self._values[self._local.rank] = value
        self._barrier.wait(_SECONDS)
        values = list(self._values)
        self._barrier.wait(_SECONDS)
        return values

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp) -> None:
        """As ``torch.distributed``'s, for the smallest value."""
        assert op == dist.ReduceOp.MIN
        tensor.copy_(torch.stack(self.exchange(tensor.clone())).amin(dim=0))

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        """As ``torch.distributed``'s."""
        values[:] = self.exchange(value)
