"""One split of the rollouts into those that are fitted and those that are held out."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.dense import DenseTargets, dense_targets
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.influence.labels import Standardiser

Split = tuple[np.ndarray, np.ndarray]
"""Sorted int64 indices of the training and of the held-out rollouts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitData:
    """Sample numbers and standardised targets of both parts.

    Attributes:
        rollouts: int64 ``[n, T]`` to train on, with targets float32 ``[n, T]``.
        targets: see there.
        held_out: int64 ``[h, T]``.
        held_out_targets: float32 ``[h, T]``.
        held_out_per_position: float64 ``[h, T]``, held-out labels standardised per position over all rollouts, whatever
            the targets' standardisation: what remains tells samples apart, not positions.
        standardiser: of the targets; its statistics are those of the training rollouts alone.
        dense: dense labels, if any.
    """

    rollouts: Tensor
    targets: Tensor
    held_out: Tensor
    held_out_targets: np.ndarray
    held_out_per_position: np.ndarray
    standardiser: Standardiser
    dense: DenseTargets | None


def split_rollouts(num_rollouts: int, settings: FitSettings, seed: int) -> Split:
    """Sorted int64 indices of the training and of the held-out rollouts; at least two of each.

    Raises:
        UserError: fewer than four rollouts.
    """
    if num_rollouts < 4:
        raise UserError(f"{num_rollouts} rollouts cannot be split into training and held-out ones; collect at least 4")
    num_held_out = min(max(2, round(settings.held_out_fraction * num_rollouts)), settings.max_held_out, num_rollouts - 2)
    order = np.random.default_rng(seed).permutation(num_rollouts)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def fit_data(rollouts: np.ndarray, labels: np.ndarray, standardisation: str, split: Split, individual: np.ndarray | None) -> FitData:
    """Data of a fit on the first part of ``split``, judged on the second; arguments as of ``fit_relational``."""
    train, held_out = split
    standardiser = Standardiser.fit(labels[train], standardisation)
    targets = standardiser.apply(labels).astype(np.float32)
    dense = None
    if individual is not None:
        dense = dense_targets(individual, rollouts[train], labels[train], rollouts[held_out], standardiser)
    return FitData(
        rollouts=torch.from_numpy(rollouts[train]),
        targets=torch.from_numpy(targets[train]),
        held_out=torch.from_numpy(rollouts[held_out]),
        held_out_targets=targets[held_out],
        held_out_per_position=Standardiser.fit(labels, "per_position").apply(labels[held_out]),
        standardiser=standardiser,
        dense=dense,
    )


def checked(rollouts: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts as int64 and labels as float64, both ``[R, T]``.

    Raises:
        UserError: shapes that do not belong together.
    """
    rollouts, labels = np.asarray(rollouts), np.asarray(labels, np.float64)
    if rollouts.ndim != 2 or rollouts.shape != labels.shape or not np.issubdtype(rollouts.dtype, np.integer):
        raise UserError(
            f"rollouts have shape {list(rollouts.shape)} ({rollouts.dtype}) and labels {list(labels.shape)}; "
            "give sample numbers [rollouts, steps] with labels [rollouts, steps]"
        )
    return rollouts.astype(np.int64), labels
