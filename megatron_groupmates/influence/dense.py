"""Dense individual labels beside rollouts: one label per candidate, brought to the scale of the rollouts' labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.labels import Standardiser


@dataclass(frozen=True, kw_only=True)
class DenseTargets:
    """What the fit takes as rollouts of length one.

    Attributes:
        numbers: int64 ``[n]``, the samples.
        targets: float32 ``[n]``, standardised as labels of the first position.
        slope: label units per unit of the dense labels, by least squares.
        held_out: int64 ``[h]``, samples of held-out rollouts, which are left out.
        held_out_labels: float64 ``[h]``, their dense labels as they were given.
    """

    numbers: np.ndarray
    targets: np.ndarray
    slope: float
    held_out: np.ndarray
    held_out_labels: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Entry of the fit's report."""
        return {"labels": len(self.targets), "left_out": len(self.held_out), "slope": self.slope}


def dense_targets(
    labels: np.ndarray, rollouts: np.ndarray, rollout_labels: np.ndarray, held_out_rollouts: np.ndarray, standardiser: Standardiser
) -> DenseTargets:
    """Scale dense labels to those of the training rollouts, and leave out what would betray the held-out ones.

    A dense label is another measurement than a rollout's, but of the same sample: with it the model would know part of
    what the held-out rollouts ask, and their figures would flatter it.

    Args:
        labels: ``[N]``, of all samples by number, in any unit; lower is better, as of rollouts.
        rollouts: int64 ``[R, T]``, sample numbers of the training rollouts.
        rollout_labels: ``[R, T]``, not standardised.
        held_out_rollouts: int64 ``[H, T]``.
        standardiser: of the training rollouts' labels.

    Raises:
        UserError: not one label per sample, or labels that are not finite.
    """
    labels = np.asarray(labels, np.float64)
    highest = int(max(rollouts.max(), held_out_rollouts.max()))
    if labels.ndim != 1 or len(labels) <= highest:
        raise UserError(f"individual labels have shape {list(labels.shape)}, but rollouts hold sample {highest}; give one label per sample")
    if not np.isfinite(labels).all():
        raise UserError(f"{int((~np.isfinite(labels)).sum())} of {len(labels)} individual labels are not finite")
    slope, mean = _least_squares(labels[rollouts], rollout_labels)
    held_out = np.unique(held_out_rollouts)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    # A rollout of length one has a first position only.
    offset = float(rollout_labels[:, 0].mean()) - standardiser.mean[0]
    targets = (slope * (labels[kept] - mean) + offset) / standardiser.std[0]
    return DenseTargets(numbers=kept, targets=targets.astype(np.float32), slope=slope, held_out=held_out, held_out_labels=labels[held_out])


def _least_squares(dense: np.ndarray, rollout_labels: np.ndarray) -> tuple[float, float]:
    """Slope from dense to rollout labels, both ``[R, T]``, and the mean dense label.

    Each position's mean is taken off the rollout labels first: their trend over positions is not the samples' doing.
    """
    y = (rollout_labels - rollout_labels.mean(axis=0)).ravel()
    mean = float(dense.mean())
    x = (dense - mean).ravel()
    return (float(x @ y / (x @ x)) if (x != 0).any() else 0.0), mean
