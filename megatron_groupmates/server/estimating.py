"""What a round measures influences with: the estimator asked for, its check against exact increments, and its fallback."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_groupmates.config import oracle_estimator
from megatron_groupmates.influence.directional import directional_labels
from megatron_groupmates.influence.labels import Standardiser, influence_labels
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext, num_inputs
from megatron_groupmates.server.stages import measure_oracles

logger = logging.getLogger(__name__)

_DENSE_CHUNK_SAMPLES = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
    """How the rollouts of a round are measured and what is known beside them.

    Attributes:
        estimator: ``exact``, ``first_order`` or ``directional``: the one in use.
        fell_back: whether it is ``exact`` because the one asked for was not good enough.
        dense: with ``directional``, the individual influence of each candidate, float64 ``[num_candidates]``.
        exact_kept: of a fallback, whether the rollouts measured before it were exact already.
    """

    estimator: str
    fell_back: bool = False
    dense: np.ndarray | None = None
    exact_kept: bool = False

    @property
    def rollout_estimator(self) -> str:
        """The estimator of rollouts."""
        return "first_order" if self.estimator == "first_order" else "exact"

    def rollout_stage(self, name: str) -> str:
        """Name of a stage that measures rollouts: with a fallback's own artefacts apart from those of another estimator."""
        return f"{name}.exact" if self.fell_back and not self.exact_kept else name

    def fit_stage(self, name: str) -> str:
        """Name of a stage that fits to rollouts and dense labels: a fallback's own."""
        return f"{name}.exact" if self.fell_back else name

    def fall_back(self) -> Oracle:
        """The exact oracle in place of this one."""
        return Oracle(estimator="exact", fell_back=True, exact_kept=self.rollout_estimator == "exact")


def open_oracle(context: RoundContext, probe: Probe, candidates: np.ndarray) -> Oracle:
    """The oracle that the config asks for, with its dense labels where it has any. Collective."""
    estimator = oracle_estimator(context.config)
    dense = label_candidates(context, probe, candidates) if estimator == "directional" else None
    return Oracle(estimator=estimator, dense=dense)


def label_candidates(context: RoundContext, probe: Probe, candidates: np.ndarray) -> np.ndarray:
    """Stage ``oracle_directional``: individual influence float64 ``[num_candidates]`` of each candidate. Collective."""
    rate, batch_size = context.oracle_learning_rate, context.config.oracle.reference_batch_size

    def label(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        return {"labels": directional_labels(probe, candidates[first:stop], context.read_samples, rate, batch_size, done)}

    chunks = Chunks(context, "oracle_directional", len(candidates), _DENSE_CHUNK_SAMPLES)
    tokens = num_inputs(context, context.pool, candidates)
    context.stage(
        "oracle_directional",
        lambda: {**chunks.collect(), "estimator": np.array("directional")},
        lambda: chunks.work(label, "sample", 2 * tokens / len(candidates)),
        # Two forward passes over each candidate, one forward and backward over the reference set.
        flops=context.size.forward_flops_per_token * (2.0 * tokens + 3.0 * probe.num_reference_tokens),
    )
    return context.arrays("oracle_directional")["labels"]


def validate(
    context: RoundContext, probe: Probe, candidates: np.ndarray, rollouts: np.ndarray, losses: np.ndarray, oracle: Oracle
) -> dict[str, Any] | None:
    """Rank correlation of the estimator in use with exact momentum-corrected increments: ``validation`` of ``oracle.json``.

    ``first_order``: the first of the random rollouts, ``oracle.validation_share`` of them and at least 4, are measured exactly
    too. ``directional``: the dense labels of the random rollouts' samples against all of those rollouts, which are exact.
    Collective. None where the estimator is ``exact``.
    """
    if oracle.estimator == "exact":
        return None
    settings = context.config.oracle
    if oracle.dense is not None:
        estimated, exact = oracle.dense[rollouts], corrected_labels(context, losses)
    else:
        count = settings.validation_rollouts(len(rollouts))
        measured = measure_oracles(context, "oracle_validation", probe, candidates, rollouts[:count], "exact")
        estimated, exact = corrected_labels(context, losses[:count]), corrected_labels(context, measured)
    value = agreement(estimated, exact)
    # So that a correlation that is not a number is below the floor too.
    fell_back = not value >= settings.estimator_floor
    if fell_back:
        logger.warning(
            "round %d: oracle.estimator %s agrees with exact increments to a rank correlation of %.3f only, below "
            "oracle.estimator_floor %g; the round falls back to exact",
            context.input.number,
            oracle.estimator,
            value,
            settings.estimator_floor,
        )
    return {"rollouts": len(exact), "spearman": value, "floor": settings.estimator_floor, "fell_back": fell_back}


def agreement(estimated: np.ndarray, exact: np.ndarray) -> float:
    """Spearman of two sets of labels ``[R, T]``, each standardised per position.

    The trend of labels over positions is the same for every rollout: left in, it would be taken for agreement.
    """
    return spearman(*(Standardiser.fit(labels, "per_position").apply(labels) for labels in (estimated, exact)))


def corrected_labels(context: RoundContext, losses: np.ndarray) -> np.ndarray:
    """Momentum-corrected increments ``[R, T]`` of losses ``[R, T + 1]``."""
    return influence_labels(losses, "momentum_corrected", context.config.optimizer.beta1)
