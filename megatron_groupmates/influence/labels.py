"""Labels of the relational model: from reference losses along rollouts to standardised targets. Pure NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError

LABEL_KINDS = ("increments", "momentum_corrected")
STANDARDISATIONS = ("pooled", "per_position")


def increments(losses: np.ndarray) -> np.ndarray:
    """Oracle data influences y_t = L(D_ref; M_t) - L(D_ref; M_{t-1}) (paper section 3.1); negative is good.

    Args:
        losses: ``[R, T + 1]``, reference loss at the checkpoint and after each of the T steps of R rollouts.

    Returns:
        float64 ``[R, T]``.

    Raises:
        UserError: wrong shape, or a loss that is not finite.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 2 or losses.shape[1] < 2:
        raise UserError(f"rollout losses have shape {list(losses.shape)}; give [rollouts, steps + 1], at least 1 step")
    broken = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if broken.size:
        raise UserError(
            f"{broken.size} of {len(losses)} rollouts have a loss that is not finite (first: rollout "
            f"{broken[0]}); lower the oracle's learning rate"
        )
    return np.diff(losses, axis=1)


def momentum_corrected(influences: np.ndarray, beta1: float) -> np.ndarray:
    """The part of each influence that the step's own sample caused: z_t = (y_t - beta1 y_{t-1}) / (1 - beta1).

    Adam's step t applies m_t = beta1 m_{t-1} + (1 - beta1) g_t, so to first order y_t = beta1 y_{t-1} +
    (1 - beta1) z_t. With y_0 := 0, z_1 keeps a share of the momentum stored in the checkpoint. That share is the same
    number for every rollout, since all start from the same checkpoint, and standardisation per position removes it;
    standardisation over all positions together does not.

    Args:
        influences: ``[R, T]``, as ``increments`` gives them.
        beta1: Adam's first decay rate, at least 0 and below 1.

    Returns:
        float64 ``[R, T]``.
    """
    if not 0 <= beta1 < 1:
        raise UserError(f"beta1 is {beta1}; it must be at least 0 and below 1")
    influences = np.asarray(influences, np.float64)
    previous = np.zeros_like(influences)
    previous[:, 1:] = influences[:, :-1]
    return (influences - beta1 * previous) / (1 - beta1)


def influence_labels(losses: np.ndarray, kind: str, beta1: float) -> np.ndarray:
    """Labels ``[R, T]``, float64, of one of ``LABEL_KINDS`` from losses ``[R, T + 1]``; not yet standardised."""
    if kind not in LABEL_KINDS:
        raise UserError(f"labels is {kind!r}; choose one of {', '.join(LABEL_KINDS)}")
    influences = increments(losses)
    return influences if kind == "increments" else momentum_corrected(influences, beta1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardiser:
    """Maps labels to mean 0 and standard deviation 1, and back. Fit it on the training rollouts only.

    Attributes:
        kind: one of ``STANDARDISATIONS``.
        mean: one per position in the rollout; all equal where ``kind`` is ``pooled``.
        std: likewise; 1 where the labels do not vary.
    """

    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, labels: np.ndarray, kind: str) -> Standardiser:
        """Statistics of labels ``[R, T]`` over all positions together or for each position alone."""
        if kind not in STANDARDISATIONS:
            raise UserError(f"standardisation is {kind!r}; choose one of {', '.join(STANDARDISATIONS)}")
        labels = np.asarray(labels, np.float64)
        axis = 0 if kind == "per_position" else None
        mean = np.broadcast_to(labels.mean(axis=axis), labels.shape[1:])
        std = np.broadcast_to(labels.std(axis=axis), labels.shape[1:])
        # Equal labels may leave a deviation of rounding size, which must not be blown up to 1.
        varies = std > 1e-12 * np.abs(labels).max(initial=0.0)
        return cls(kind=kind, mean=tuple(mean.tolist()), std=tuple(np.where(varies, std, 1.0).tolist()))

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Standardised labels, float64 ``[..., T]``."""
        return (np.asarray(labels, np.float64) - np.array(self.mean)) / np.array(self.std)

    def invert(self, standardised: np.ndarray) -> np.ndarray:
        """Labels in units of reference loss, float64 ``[..., T]``."""
        return np.asarray(standardised, np.float64) * np.array(self.std) + np.array(self.mean)

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return {"kind": self.kind, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Standardiser:
        """Inverse of ``to_json``."""
        return cls(kind=value["kind"], mean=tuple(value["mean"]), std=tuple(value["std"]))
