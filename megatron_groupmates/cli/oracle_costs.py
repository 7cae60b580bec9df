"""What the oracle of a round costs by each estimator, and what the authors' way of measuring costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from megatron_groupmates.config import Config, RunPaths, UserError, config_differences, oracle_estimator
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.examples import ScoredTokens
from megatron_groupmates.server.stage_names import stage_family
from megatron_groupmates.utils.files import read_json
from megatron_groupmates.utils.run_directory import open_run

ESTIMATORS = ("exact", "first_order", "directional")
AUTHORS = "authors"
# The paper's budget: random and bootstrap rollouts, steps of each, reference examples padded to the sequence length.
AUTHORS_ROLLOUTS, AUTHORS_STEPS, AUTHORS_REFERENCE = 20_000 + 20_000, 10, 128
# Instruction data, where the reference set itself is not at hand: lengths log-normal around this median, cut at the sequence length.
ASSUMED_MEDIAN, ASSUMED_SIGMA = 180, 1.0


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of one packed evaluation of the reference set.

    Attributes:
        examples: that the oracle uses.
        tokens: of all of them, each up to its last scored token.
        measured: whether the reference set was read; else the lengths are assumed.
    """

    examples: int
    tokens: float
    measured: bool

    def __str__(self) -> str:
        if self.measured:
            return f"{self.examples} examples, {self.tokens:,.0f} tokens"
        return (
            f"{self.examples} examples, about {self.tokens:,.0f} tokens (not read; assumed: log-normal lengths, median {ASSUMED_MEDIAN}, "
            f"sigma {ASSUMED_SIGMA:g}, cut at the sequence length)"
        )


@dataclass(frozen=True)
class Rates:
    """What the server of a run measured in a finished round.

    Attributes:
        run: its directory.
        steps_per_second: by how rollouts were measured, ``exact`` or ``first_order``.
        labels_per_second: directional labels; None where there were none.
    """

    run: Path
    steps_per_second: dict[str, float]
    labels_per_second: float | None


def reference_tokens(config: Config, pool: PoolIndex | None) -> ReferenceTokens:
    """Of the oracle's examples in the reference set ``pool``; an estimate where it is None.

    Raises:
        UserError: which tokens are scored cannot be read.
    """
    wanted = config.oracle.reference_samples
    if pool is None:
        return ReferenceTokens(wanted, wanted * assumed_mean_length(config.model.sequence_length), measured=False)
    scored = ScoredTokens(pool)
    examples = min(wanted, pool.num_samples)
    # The model reads the tokens before the last scored one: as many as its place. An example with none is left out.
    tokens = sum(int(np.flatnonzero(scored.read(row)).max(initial=0)) for row in range(examples))
    return ReferenceTokens(examples, float(tokens), measured=True)


def assumed_mean_length(longest: int) -> float:
    """Mean of ``min(X, longest)`` for X log-normal around ``ASSUMED_MEDIAN``."""
    normal, sigma = NormalDist(), ASSUMED_SIGMA
    distance = math.log(longest / ASSUMED_MEDIAN) / sigma
    below = ASSUMED_MEDIAN * math.exp(sigma**2 / 2) * normal.cdf(distance - sigma)
    return below + longest * (1 - normal.cdf(distance))


def oracle_tokens(config: Config, estimator: str, sample_tokens: float, reference: float) -> dict[str, float]:
    """Forward passes, in tokens, of each oracle stage of a round; a backward pass counts as two.

    Args:
        config: the run.
        estimator: to cost, in place of the config's.
        sample_tokens: that the model reads of one sample, on average.
        reference: tokens of one evaluation of the reference set.
    """
    oracle, steps = config.oracle, config.oracle.rollout_length
    step, evaluated_step = 3 * sample_tokens, 3 * sample_tokens + reference
    rollout_step = step if estimator == "first_order" else evaluated_step
    stages = {
        "oracle_random": oracle.num_random_rollouts * steps * rollout_step,
        "oracle_bootstrap": oracle.num_bootstrap_rollouts * steps * rollout_step,
    }
    if estimator == "first_order":
        stages["oracle_validation"] = oracle.validation_rollouts(oracle.num_random_rollouts) * steps * evaluated_step
    if estimator == "directional":
        # Two forward passes over each candidate; the gradient of the reference loss once.
        stages["oracle_directional"] = 2 * oracle.num_candidates * sample_tokens + 3 * reference
    if oracle.noise_rollouts:
        # Two reference sets at two learning rates.
        stages["oracle_noise"] = 4 * noise_rollouts(config) * steps * evaluated_step
    return stages


def noise_rollouts(config: Config) -> int:
    """Rollouts that are measured against a second reference set."""
    return min(config.oracle.noise_rollouts, config.oracle.num_random_rollouts)


def authors_tokens(config: Config) -> float:
    """Forward passes, in tokens, of the authors' oracle: a sequence per step, the padded reference set after every step."""
    return AUTHORS_ROLLOUTS * AUTHORS_STEPS * float(3 + AUTHORS_REFERENCE) * config.model.sequence_length


def oracle_costs(
    config: Config, sample_tokens: float, reference: ReferenceTokens, train_flops: float, flops_per_second: float, rates: Rates | None
) -> dict[str, Any]:
    """A round's oracle by every estimator and the authors' way: FLOPs, share of the training FLOPs, seconds.

    Args:
        config: the run; its budget holds for every estimator but the authors'.
        sample_tokens: that the model reads of one sample, on average.
        reference: tokens of one evaluation.
        train_flops: of the whole training.
        flops_per_second: of the selection server.
        rates: of a finished round; then ``measured_seconds`` of the estimators it has rates for is not None.
    """
    per_token = float(model_size(config).forward_flops_per_token)
    stages = {name: oracle_tokens(config, name, sample_tokens, reference.tokens) for name in ESTIMATORS}
    tokens = {name: sum(costs.values()) for name, costs in stages.items()}
    authors = authors_tokens(config)
    return {
        "estimator": oracle_estimator(config),
        "at_most": config.oracle.budget == "adaptive",
        "reference": {"examples": reference.examples, "tokens": reference.tokens, "measured": reference.measured, "text": str(reference)},
        "labels_share_of_training": per_token * stages["directional"]["oracle_directional"] / train_flops,
        "rates": None if rates is None else str(rates.run),
        "round": {
            name: {
                "flops": per_token * count,
                "share_of_training": per_token * count / train_flops,
                "seconds": per_token * count / flops_per_second,
                "times_cheaper_than_authors": authors / count,
                "measured_seconds": None if rates is None or name == AUTHORS else measured_seconds(config, name, rates),
            }
            for name, count in {**tokens, AUTHORS: authors}.items()
        },
    }


def measured_seconds(config: Config, estimator: str, rates: Rates) -> float | None:
    """Of a round's oracle at measured rates; None where a rate it needs was not measured."""
    oracle = config.oracle
    rollouts = oracle.num_random_rollouts + oracle.num_bootstrap_rollouts
    needed = {"exact": 4 * noise_rollouts(config), "first_order": 0}
    needed["first_order" if estimator == "first_order" else "exact"] += rollouts
    if estimator == "first_order":
        needed["exact"] += config.oracle.validation_rollouts(config.oracle.num_random_rollouts)
    seconds = 0.0
    for kind, count in needed.items():
        if count:
            if kind not in rates.steps_per_second:
                return None
            seconds += count * oracle.rollout_length / rates.steps_per_second[kind]
    if estimator == "directional":
        if rates.labels_per_second is None:
            return None
        seconds += oracle.num_candidates / rates.labels_per_second
    return seconds


def find_rates(config: Config) -> Rates | None:
    """Rates of the run's own finished rounds; None where there are none, or they are of another model."""
    paths = RunPaths.of(config)
    if not paths.config.is_file():
        return None
    try:
        return read_rates(paths.root, config)
    except UserError:
        return None


def read_rates(run: Path, config: Config) -> Rates:
    """Rates of the newest rounds of ``run`` that say how fast each sort of rollout was measured.

    Raises:
        UserError: it is no run directory, its model is not that of ``config``, or no round of it has rates.
    """
    other, paths = open_run(run)
    differences = [line for line in config_differences(other, config) if line.startswith("model.")]
    if differences:
        raise UserError(f"--rates {run} is of another model ({'; '.join(differences)}); give a run of the same model")
    steps: dict[str, float] = {}
    labels: float | None = None
    for directory in sorted(paths.selection.glob("rounds/round-??????")):
        for path in sorted(directory.glob("oracle_*.stage.json")):
            rate, stage = read_json(path).get("rollouts_per_second"), path.name.removesuffix(".stage.json")
            # A rollout of the noise stage is measured several times over: its rate is no other stage's.
            if not rate or stage == "oracle_noise":
                continue
            if stage == "oracle_directional":
                labels = float(rate)
            else:
                steps[_measured_by(stage, other)] = float(rate) * other.oracle.rollout_length
    if not steps and labels is None:
        raise UserError(f"--rates {run}: no finished round of it has a rate (rollouts_per_second in a *.stage.json); leave --rates out")
    return Rates(run=run, steps_per_second=steps, labels_per_second=labels)


def _measured_by(stage: str, config: Config) -> str:
    """How the rollouts of a stage were measured: by the config's estimator, or exactly for a check or a fallback."""
    if stage_family(stage) in ("oracle_random", "oracle_bootstrap") and oracle_estimator(config) == "first_order":
        return "first_order"
    return "exact"


def format_oracle_costs(costs: dict[str, Any], time_text: Callable[[float], str]) -> list[str]:
    """Lines of the plan's table; ``time_text`` writes seconds."""
    rates = costs["rates"]
    lines = [
        f"oracle per round  as a share of the training FLOPs; times {'at the rates of ' + rates if rates else 'assume --tflops'}",
        f"  reference set   {costs['reference']['text']}",
    ]
    for name, cost in costs["round"].items():
        label = "the authors' way" if name == AUTHORS else name + (" (configured)" if name == costs["estimator"] else "")
        measured = cost["measured_seconds"]
        time = time_text(cost["seconds"]) + (" at --tflops" if rates else "") if measured is None else time_text(measured) + " measured"
        at_most = "at most " if costs["at_most"] and name != AUTHORS else ""
        labels = f", of it {100 * costs['labels_share_of_training']:.2f} % for the labels" if name == "directional" else ""
        cheaper = "" if name == AUTHORS else f", {cost['times_cheaper_than_authors']:.1f}x cheaper than the authors' way"
        lines.append(f"  {label:<25} {at_most}{100 * cost['share_of_training']:.2f} %{labels}, {cost['flops']:.3g} FLOPs, {time}{cheaper}")
    return lines
