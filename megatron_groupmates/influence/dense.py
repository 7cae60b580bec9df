"""Dense individual labels beside rollouts: one label per candidate, brought to the scale of the rollouts' labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.labels import Standardiser


@dataclass(frozen=True, kw_only=True)
class DenseTargets:
    """What the fit takes as rollouts of length one.

    Attributes:
        features: float32 ``[n, F]``.
        targets: float32 ``[n]``, standardised as labels of the first position.
        slope: label units per unit of the dense labels, by least squares.
        left_out: samples that occur in held-out rollouts.
    """

    features: Tensor
    targets: Tensor
    slope: float
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """Entry of the fit's report."""
        return {"labels": len(self.targets), "left_out": self.left_out, "slope": self.slope}


def dense_targets(
    features: Tensor | np.ndarray,
    labels: np.ndarray,
    train: tuple[Tensor, np.ndarray],
    held_out_features: Tensor,
    standardiser: Standardiser,
) -> DenseTargets:
    """Scale dense labels to those of the training rollouts, and leave out what would betray the held-out ones.

    A dense label is another measurement than a rollout's, but of the same sample: with it the model would know part of
    what the held-out rollouts ask, and their figures would flatter it. Samples are recognised by their features.

    Args:
        features: float32 ``[N, F]``.
        labels: ``[N]``, in any unit.
        train: features ``[R, T, F]`` and labels ``[R, T]``, not standardised, of the training rollouts.
        held_out_features: ``[H, T, F]``.
        standardiser: of the training rollouts' labels.

    Raises:
        UserError: wrong shapes, labels that are not finite, or none of the training rollouts' samples among ``features``.
    """
    labels = np.asarray(labels, np.float64)
    train_features, train_labels = train
    features = torch.as_tensor(features, dtype=torch.float32, device=train_features.device)
    if features.dim() != 2 or features.shape[1] != train_features.shape[-1] or tuple(labels.shape) != (len(features),):
        raise UserError(
            f"individual features have shape {list(features.shape)} and labels {list(labels.shape)}; "
            f"give [samples, {train_features.shape[-1]}] with [samples]"
        )
    if not np.isfinite(labels).all():
        raise UserError(f"{int((~np.isfinite(labels)).sum())} of {len(labels)} individual labels are not finite")
    keys = _row_keys(features)
    slope, mean = _least_squares(dict(zip(keys, labels.tolist(), strict=True)), _row_keys(train_features), train_labels)
    held_out = set(_row_keys(held_out_features))
    kept = np.flatnonzero([key not in held_out for key in keys])
    # A rollout of length one has a first position only.
    targets = slope * (labels[kept] - mean) / standardiser.std[0]
    return DenseTargets(
        features=features[torch.from_numpy(kept).to(features.device)],
        targets=torch.from_numpy(targets.astype(np.float32)).to(features.device),
        slope=slope,
        left_out=len(keys) - len(kept),
    )


def _least_squares(dense: dict[bytes, float], keys: list[bytes], rollout_labels: np.ndarray) -> tuple[float, float]:
    """Slope from dense to rollout labels, and the mean dense label of the rollouts' samples.

    Each position's mean is taken off the rollout labels first: their trend over positions is not the samples' doing.
    """
    y = (rollout_labels - rollout_labels.mean(axis=0)).ravel()
    known = np.array([key in dense for key in keys])
    if not known.any():
        raise UserError("none of the training rollouts' samples has an individual label; label the candidates they were drawn from")
    x = np.array([dense[key] for key, there in zip(keys, known, strict=True) if there])
    mean = float(x.mean())
    x = x - mean
    return (float(x @ y[known] / (x @ x)) if (x != 0).any() else 0.0), mean


def _row_keys(features: Tensor) -> list[bytes]:
    """A digest of each feature vector ``[..., F]``, flat: the same sample has the same features."""
    rows = np.ascontiguousarray(features.reshape(-1, features.shape[-1]).cpu().numpy())
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
