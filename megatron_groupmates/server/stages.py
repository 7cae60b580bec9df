"""The stages of a round: each computes one artefact from those before it. All are collective: every rank calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_groupmates.influence.bootstrap import bootstrap_rollouts
from megatron_groupmates.influence.oracle import measure_rollouts
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext, num_inputs
from megatron_groupmates.server.embedding import embed_features


def choose_candidates(context: RoundContext, available: np.ndarray) -> np.ndarray:
    """Pool rows int64 ``[num_candidates]`` the rollouts are drawn from: uniform among the ``available`` rows that have a target."""
    available = available[context.pool.lengths[available] > 1]
    generator = np.random.default_rng(context.seed("candidates"))
    count = min(context.config.oracle.num_candidates, len(available))
    return np.sort(generator.choice(available, size=count, replace=False))


def step_tokens(context: RoundContext, candidates: np.ndarray, evaluated: int) -> tuple[float, float]:
    """Tokens of one step of a rollout on a sample of the ``candidates``: what the model reads, and how many forward passes that is worth.

    ``evaluated`` tokens are read after the step; a training step costs three forward passes.
    """
    sample = num_inputs(context, context.pool, candidates) / len(candidates)
    return sample + evaluated, 3 * sample + evaluated


def measure_oracles(
    context: RoundContext, name: str, probe: Probe, candidates: np.ndarray, rollouts: np.ndarray, estimator: str
) -> np.ndarray:
    """Reference losses float64 ``[R, T + 1]`` of ``rollouts`` (candidate numbers int64 ``[R, T]``) by ``exact`` or ``first_order``.

    Oracle workers share the rollouts by chunks and write each when it is done; what an earlier run wrote is not measured
    again. A rollout's numbers do not depend on who measures it.
    """
    oracle = context.config.oracle

    def measure(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        return {
            "losses": measure_rollouts(
                probe,
                rollouts[first:stop],
                lambda numbers: context.read_samples(candidates[numbers]),
                context.oracle_learning_rate,
                estimator,
                done,
            )
        }

    chunks = Chunks(context, name, len(rollouts), oracle.chunk_rollouts)

    def collect() -> Arrays:
        return {**chunks.collect(), "estimator": np.array(estimator)}

    tokens, forward_tokens = step_tokens(context, candidates, probe.num_reference_tokens if estimator == "exact" else 0)
    context.stage(
        name,
        collect,
        lambda: chunks.work(measure, "rollout", rollouts.shape[1] * tokens),
        flops=rollouts.size * context.size.forward_flops_per_token * forward_tokens,
    )
    return context.arrays(name)["losses"]


def draw_bootstrap(context: RoundContext, model: RelationalModel, features: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` rollouts int64 ``[R, T]`` (candidate numbers) that the model predicts best and worst (paper section 3.3)."""

    def collect() -> Arrays:
        embeddings, individual = embed_features(model, features)
        return {
            "rollouts": bootstrap_rollouts(
                embeddings,
                individual,
                model.relation_values(),
                count,
                context.config.oracle.rollout_length,
                context.recipe.bootstrap,
                context.seed("bootstrap"),
            )
        }

    context.stage("bootstrap", collect)
    return context.arrays("bootstrap")["rollouts"]
