"""Oracle data influences: what each sample of a rollout does to the reference loss (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.model.batch import Samples

ReadSamples = Callable[[np.ndarray], Samples]


def draw_random_rollouts(num_rollouts: int, length: int, num_candidates: int, seed: int) -> np.ndarray:
    """int64 ``[num_rollouts, length]`` candidate numbers, uniform, no sample twice in one rollout."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(num_candidates, size=length, replace=False) for _ in range(num_rollouts)]).astype(np.int64)


def measure_rollouts(
    probe: Probe,
    rollouts: np.ndarray,
    read_samples: ReadSamples,
    learning_rate: float,
    estimator: str,
    on_rollout: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Reference losses along ``rollouts``, each from the probe's checkpoint and each the same whatever the others are.

    Every rank of the tensor-parallel group must call with the same arguments.

    Args:
        probe: loaded; left at the checkpoint, as the encoder may use its model.
        rollouts: int64 ``[R, T]``, samples by number, of at least two tokens, taken one by one in order.
        read_samples: numbers int64 ``[T]`` -> their tokens on the probe's device.
        learning_rate: of every step: the run's at the checkpoint, or the oracle's own.
        estimator: ``exact`` evaluates L(D_ref) after each step; ``first_order`` multiplies the checkpoint's reference
            gradient with the change of the weights, so its losses start at 0.
        on_rollout: called with 1 after each rollout.

    Returns:
        float64 ``[R, T + 1]``: L_0 and the loss after each step.
    """
    read_loss = _reading(probe, estimator)
    losses = np.empty((len(rollouts), rollouts.shape[1] + 1))
    probe.restore()
    # The checkpoint's own loss, the same for all.
    losses[:, 0] = read_loss()
    for number, rollout in enumerate(rollouts):
        samples = read_samples(rollout)
        probe.restore()
        for position, sample in enumerate(samples, start=1):
            probe.step(sample.unsqueeze(0), learning_rate)
            losses[number, position] = read_loss()
        on_rollout(1)
    probe.restore()
    return losses


def _reading(probe: Probe, estimator: str) -> Callable[[], float]:
    """The function that reads an estimator's loss off the probe wherever it stands."""
    if estimator == "exact":
        return probe.reference_loss
    assert estimator == "first_order", estimator
    gradient = probe.checkpoint_gradient()
    return lambda: probe.change_along(gradient)
