"""How much of the oracle's labels is noise of the reference set: the same rollouts against a second, disjoint set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_groupmates.influence.oracle import measure_rollouts
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.reference import ReferenceSet, load_reference
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext
from megatron_groupmates.server.estimating import agreement, corrected_labels
from megatron_groupmates.server.stages import step_tokens

Noise = list[dict[str, Any]] | dict[str, str] | None


def measure_noise(context: RoundContext, probe: Probe, reference_pool: PoolIndex, candidates: np.ndarray, rollouts: np.ndarray) -> Noise:
    """Rank correlation of exact momentum-corrected increments between two reference sets, at two learning rates. Collective.

    The second set is the ``oracle.reference_samples`` examples of the reference pool behind those the oracle uses, or as many as
    there are. Measured are the first ``oracle.noise_rollouts`` of the random rollouts.

    Returns:
        ``noise`` of ``oracle.json``: one entry per learning rate; why it was left out; None where it is not asked for.
    """
    settings = context.config.oracle
    if not settings.noise_rollouts:
        return None
    if reference_pool.num_samples <= settings.reference_samples:
        return {
            "skipped": f"the reference set has {reference_pool.num_samples} examples and oracle.reference_samples "
            f"({settings.reference_samples}) uses all of them; none is left for a second set"
        }
    rate = context.oracle_learning_rate
    rates = (rate, rate / 10 if settings.noise_learning_rate is None else settings.noise_learning_rate)
    rollouts = rollouts[: settings.noise_rollouts]
    losses = _losses(context, probe, reference_pool, candidates, rollouts, rates)
    return [
        {
            "learning_rate": rate,
            "rollouts": len(rollouts),
            "spearman": agreement(*(corrected_labels(context, losses[:, number, part]) for part in (0, 1))),
        }
        for number, rate in enumerate(rates)
    ]


def _losses(
    context: RoundContext,
    probe: Probe,
    reference_pool: PoolIndex,
    candidates: np.ndarray,
    rollouts: np.ndarray,
    rates: tuple[float, float],
) -> np.ndarray:
    """Stage ``oracle_noise``: reference losses float64 ``[R, rates, sets, T + 1]``."""
    settings = context.config.oracle
    chunks = Chunks(context, "oracle_noise", len(rollouts), settings.chunk_rollouts)

    def measure(second: ReferenceSet, first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        part = rollouts[first:stop]

        def by_rate() -> np.ndarray:
            read = lambda numbers: context.read_samples(candidates[numbers])  # noqa: E731
            return np.stack([measure_rollouts(probe, part, read, rate, "exact") for rate in rates], axis=1)

        own = by_rate()
        with probe.referring_to(second):
            other = by_rate()
        done(len(part))
        return {"losses": np.stack([own, other], axis=2)}

    def work() -> None:
        count, device = settings.reference_samples, context.groups.device
        length = context.config.model.sequence_length
        # Together, so that no rank waits in the chunks for one that could not read the set.
        second = context.together(lambda: load_reference(reference_pool, length, count, device, first=count))
        chunks.work(lambda first, stop, done: measure(second, first, stop, done), "rollout")

    def collect() -> Arrays:
        return {**chunks.collect(), "learning_rates": np.array(rates), "estimator": np.array("exact")}

    # The second set is about as long as the first.
    _, forward_tokens = step_tokens(context, candidates, probe.num_reference_tokens)
    flops = 2 * len(rates) * rollouts.size * context.size.forward_flops_per_token * forward_tokens
    context.stage("oracle_noise", collect, work, flops=flops)
    return context.arrays("oracle_noise")["losses"]
