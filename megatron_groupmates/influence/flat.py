"""Arithmetic over flat buffers as large as a model, a part at a time so that nothing of that size is made."""

from __future__ import annotations

import torch

# Parts that stay in the caches of a CPU; on a GPU, so few that launching kernels costs nothing.
_PART_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}


def inner_product(first: torch.Tensor, second: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """``first . (second - origin)`` of float32 ``[n]``, in float64: a scalar on their device; ``origin`` is 0 when None."""
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    size = _PART_ELEMENTS[first.device.type]
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        values = second[part].double()
        if origin is not None:
            values -= origin[part]
        total += torch.dot(first[part].double(), values)
    return total
