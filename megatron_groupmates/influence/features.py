"""Where the features of numbered samples come from during a fit: a table, or an encoder that is trained with the model."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from megatron_groupmates.config.errors import UserError

_ENCODED_TOGETHER = 256


class FeatureSource(Protocol):
    """Features of samples by number. Equal numbers give equal features, whatever company they are in: no dropout.

    A source with parameters bounds its own memory, with gradient too, and encodes each distinct sample of a call once.
    """

    feature_dim: int

    def __call__(self, numbers: Tensor) -> Tensor:
        """Features float32 ``[..., feature_dim]`` of the samples ``numbers`` int64 ``[...]``, with gradient where trainable.

        ``numbers`` may lie on any device; the features lie on the device that the fit is to run on.
        """
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What the fit trains beside the model, float32, always in the same order; empty: the features are frozen."""
        ...


class FrozenFeatures:
    """Features that do not change: a table float32 ``[N, F]``, row n those of sample n."""

    def __init__(self, table: Tensor | np.ndarray) -> None:
        self.table = torch.as_tensor(table, dtype=torch.float32)
        if self.table.dim() != 2:
            raise UserError(f"features have shape {list(self.table.shape)}; give [samples, feature_dim]")
        self.feature_dim = self.table.shape[1]

    def __call__(self, numbers: Tensor) -> Tensor:
        """See :class:`FeatureSource`."""
        return self.table[numbers.to(self.table.device)]

    def parameters(self) -> list[nn.Parameter]:
        """None: a table is not trained."""
        return []


def as_source(source: FeatureSource | Tensor | np.ndarray) -> FeatureSource:
    """``source`` itself, or a table float32 ``[N, F]`` as one."""
    return FrozenFeatures(source) if isinstance(source, Tensor | np.ndarray) else source


def source_device(source: FeatureSource) -> torch.device:
    """Where the features lie."""
    parameters = source.parameters()
    return parameters[0].device if parameters else source(torch.zeros(1, dtype=torch.int64)).device


@torch.no_grad()
def encode_all(source: FeatureSource, numbers: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """Features float32 ``[n, F]`` of ``numbers`` int64 ``[n]`` without gradient, in batches of bounded size.

    The ranks of ``group`` share the work of a trained source and all get the whole, bit for bit the same. Collective over ``group``.
    """
    if not source.parameters():
        return source(numbers)
    rank = 0 if group is None else torch.distributed.get_rank(group)
    size = 1 if group is None else torch.distributed.get_world_size(group)
    found = torch.zeros(len(numbers), source.feature_dim, device=source_device(source))
    for mine in torch.arange(len(numbers))[rank::size].split(_ENCODED_TOGETHER):
        found[mine] = source(numbers[mine])
    if group is not None:
        torch.distributed.all_reduce(found, group=group)
    return found


def copy_weights(source: FeatureSource) -> list[Tensor]:
    """Copies of the source's parameters in host memory; empty for a frozen one."""
    return [value.detach().to("cpu", copy=True) for value in source.parameters()]


@torch.no_grad()
def set_weights(source: FeatureSource, weights: list[Tensor]) -> None:
    """Inverse of :func:`copy_weights`."""
    for value, kept in zip(source.parameters(), weights, strict=True):
        value.copy_(kept)
