"""Oracle data influences: what each sample of a rollout does to the reference loss (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.model.batch import Samples

ReadSamples = Callable[[np.ndarray], Samples]


def draw_random_rollouts(num_rollouts: int, length: int, num_candidates: int, seed: int) -> np.ndarray:
    """int64 ``[num_rollouts, length]`` candidate numbers, uniform, no sample twice in one rollout."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(num_candidates, size=length, replace=False) for _ in range(num_rollouts)]).astype(np.int64)


def measure_rollout(
    probe: Probe,
    samples: Samples,
    learning_rate: float,
    estimator: str,
    gradient: list[torch.Tensor] | None = None,
) -> np.ndarray:
    """Reference losses along one rollout, from the probe's checkpoint.

    Every rank of the tensor-parallel group must call with the same arguments.

    Args:
        probe: loaded; left wherever the rollout ends.
        samples: T samples of at least two tokens, taken one by one in order.
        learning_rate: of every step: the run's at the checkpoint, or the oracle's own.
        estimator: ``exact`` evaluates L(D_ref) after each step; ``first_order`` adds up reference gradient times
            parameter change, so its losses start at 0.
        gradient: the probe's reference gradient at the checkpoint, for ``first_order``.

    Returns:
        float64 ``[T + 1]``: L_0 and the loss after each step.
    """
    probe.restore()
    losses = [probe.reference_loss() if estimator == "exact" else 0.0]
    for sample in samples:
        if estimator == "exact":
            probe.step(sample.unsqueeze(0), learning_rate)
            losses.append(probe.reference_loss())
        else:
            assert gradient is not None
            before = probe.masters()
            probe.step(sample.unsqueeze(0), learning_rate)
            losses.append(losses[-1] + probe.inner_product(gradient, before))
    return np.array(losses)


def measure_rollouts(
    probe: Probe,
    rollouts: np.ndarray,
    read_samples: ReadSamples,
    learning_rate: float,
    estimator: str,
    on_rollout: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Losses float64 ``[R, T + 1]`` of ``rollouts`` int64 ``[R, T]`` (see :func:`measure_rollout`).

    Args:
        probe: loaded; left at the checkpoint, as the encoder may use its model.
        rollouts: samples by number.
        read_samples: numbers int64 ``[T]`` -> their tokens on the probe's device.
        learning_rate: of every step.
        estimator: ``exact`` or ``first_order``.
        on_rollout: called with 1 after each rollout.
    """
    gradient = None
    if estimator == "first_order":
        probe.restore()
        gradient = probe.reference_gradient()
    losses = np.empty((len(rollouts), rollouts.shape[1] + 1))
    for number, rollout in enumerate(rollouts):
        losses[number] = measure_rollout(probe, read_samples(rollout), learning_rate, estimator, gradient)
        on_rollout(1)
    probe.restore()
    return losses
