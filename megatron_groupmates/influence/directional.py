"""Directional oracle: dense labels of individual influence without an optimizer step.

A sample x moves the weights, to first order and momentum apart, by ``-lr P g_x``: P is Adam's preconditioner at the
checkpoint. The reference loss moves by ``-lr g_ref . P g_x = -lr g_x . (P g_ref)``: minus the learning rate times the
derivative of the sample's own loss along ``d = P g_ref``, which two forward passes measure. One reference gradient serves
all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_groupmates.influence.oracle import ReadSamples
from megatron_groupmates.influence.probe import Probe

# Weights are displaced twice for so many batches: little beside their forward passes, and the samples still fit in memory.
_BATCHES_PER_DISPLACEMENT = 16


def directional_labels(
    probe: Probe,
    numbers: np.ndarray,
    read_samples: ReadSamples,
    learning_rate: float,
    batch_size: int,
    on_samples: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Each sample's individual influence on the reference loss, to first order; negative is good.

    It estimates the part of the exact increment ``y_1`` that the sample itself causes when the checkpoint's next step is on
    it alone: ``-lr (1 - beta1) / (1 - beta1^k) g_x . d`` with ``d = g_ref / (sqrt(v_hat) + epsilon)``, k the next step
    and v_hat the checkpoint's second moment corrected for k. (``momentum_corrected`` labels are larger by
    ``1 / (1 - beta1)``.) The derivative is a central difference. Left out are the stored momentum and the weight decay,
    which are the same for all samples, and gradient clipping and the sample's own share of Adam's denominator, which
    shorten the step of a sample with a large gradient.

    Every rank of the tensor-parallel group must call with the same arguments.

    Args:
        probe: loaded; left at the checkpoint, bit for bit.
        numbers: int64 ``[n]``, samples of at least two tokens; any order, any lengths.
        read_samples: numbers int64 ``[m]`` -> their tokens on the probe's device.
        learning_rate: of the step.
        batch_size: samples per forward pass; changes the labels by rounding only.
        on_samples: called with the number of samples labelled since the last call.

    Returns:
        float64 ``[n]``, in nats of reference loss.

    Raises:
        UserError: the checkpoint has no second moment: it is of before the first optimizer step.
    """
    direction = probe.precondition(probe.checkpoint_gradient())
    step = probe.difference_step(direction)
    labels = np.empty(len(numbers))
    block = _BATCHES_PER_DISPLACEMENT * batch_size
    for first in range(0, len(numbers), block):
        samples = read_samples(numbers[first : first + block])
        batches = [probe.pack(samples[begin : begin + batch_size]) for begin in range(0, len(samples), batch_size)]
        losses = {}
        for side in (step, -step):
            probe.displace(direction, side)
            losses[side] = torch.cat([probe.sample_losses(*batch) for batch in batches])
        derivatives = (losses[step] - losses[-step]) / (2 * step)
        labels[first : first + block] = -learning_rate * derivatives.cpu().numpy()
        on_samples(len(samples))
    probe.restore()
    return labels
