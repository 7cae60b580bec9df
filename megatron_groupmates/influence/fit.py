"""Fitting the relational model, and the baselines that show whether relations help, on one split of rollouts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megatron_groupmates.influence.features import FeatureSource, as_source, copy_weights, set_weights
from megatron_groupmates.influence.fit_data import FitData, checked, fit_data, split_rollouts
from megatron_groupmates.influence.fit_loop import Fit, Trained, agree
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.influence.metrics import fit_metrics
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.sign_check import SignCheck, sign_check

logger = logging.getLogger(__name__)

FitReport = dict[str, Any]
"""JSON object. ``relational``, ``individual`` and ``constant``: metrics of each model on the same held-out rollouts, in
standardised label units. ``attempts``: one entry per fit of the relational model; ``accepted``: whether the last one
passed its ``sign_check``; also the split's sizes, the relation's learned scalars, the seed of the first attempt,
the settings and the patience; ``individual_labels``: how many dense labels were used, how many left out, and their scale
(null without any); ``warm_start``: null, or ``from`` which round's model the first attempt began, with the held-out
Spearman before any step, of the fit, and of one from scratch on the same split (null for a trained source)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """A fitted model and how good it is.

    Attributes:
        model: the model at its best epoch, on the features' device; None where every attempt failed the sign check,
            so that the caller keeps the last good one.
        report: see ``FitReport``.
    """

    model: RelationalModel | None
    report: FitReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The model of an earlier round that a fit begins at, on any device, and the round's number."""

    model: RelationalModel
    number: int


def fit_relational(
    source: FeatureSource | Tensor | np.ndarray,
    rollouts: np.ndarray,
    labels: np.ndarray,
    settings: FitSettings,
    seed: int,
    group: torch.distributed.ProcessGroup | None = None,
    progress: Callable[[int], None] | None = None,
    individual: np.ndarray | None = None,
    warm_start: WarmStart | None = None,
) -> FitResult:
    """Fit the relational model and its baselines; deterministic for a seed.

    Args:
        source: features of the samples by number, or a table of them float32 ``[N, F]``. A source with parameters is
            trained with the model, each attempt and baseline from the parameters that it has now; afterwards it has those
            of the returned model, or again those of now where there is none.
        rollouts: int64 ``[R, T]``, sample numbers.
        labels: ``[R, T]``, raw or momentum corrected, not standardised.
        settings: how to fit.
        seed: decides the split, the initial weights and the order of batches.
        group: data-parallel ranks. Collective: every rank of the group must call with the same arguments. Each takes
            its share of every batch and gradients are summed, so the fit equals that of one rank up to rounding.
        progress: called with epochs done: ``settings.epochs`` in all for each attempt, as many for the individual
            baseline, and as many for the fit from scratch that a warm start is compared with.
        individual: dense labels ``[N]`` of all samples, which enter training as rollouts of length one, scaled to
            ``labels`` by least squares; those of samples in held-out rollouts do not.
        warm_start: begin the first attempt here where the shapes and the relation agree. Attempts after a refused one
            begin from scratch.

    Raises:
        UserError: shapes that do not belong together, or fewer than four rollouts.
    """
    rollouts, labels = checked(rollouts, labels)
    runner = _Runner(source=as_source(source), settings=settings, group=group, progress=progress)
    weights = copy_weights(runner.source)
    warm = warm_start if warm_start is not None and _fits(warm_start, runner.source, settings) else None
    attempts: list[dict[str, Any]] = []
    warm_report = None
    for attempt_seed in range(seed, seed + settings.max_refits + 1):
        # Another split too: what the held-out rollouts hold would otherwise fail every attempt alike.
        data = fit_data(rollouts, labels, settings.standardisation, split_rollouts(len(labels), settings, attempt_seed), individual)
        start = warm if attempt_seed == seed else None
        fitted = runner.train(data, settings.relation, attempt_seed, start)
        fitted_weights = copy_weights(runner.source)
        set_weights(runner.source, weights)
        check = _check(fitted, data, group)
        attempts.append({"seed": attempt_seed, "start": "scratch" if start is None else "warm", **fitted.to_json(), "sign_check": check})
        if start is not None:
            warm_report = runner.compare(data, fitted, attempt_seed, start)
        accepted = bool(np.isfinite(fitted.spearman)) and check["correlation"] >= 0
        if accepted:
            break
        logger.warning(
            "relational model refused: its individual term has a correlation of %.3f with %d held-out labels (%s, seed %d)",
            check["correlation"],
            check["samples"],
            check["kind"],
            attempt_seed,
        )
    # From the same start as the relational model: what that one is better by is then the relation's doing.
    baseline = runner.train(data, "none", attempt_seed, start)
    set_weights(runner.source, fitted_weights if accepted else weights)
    report: FitReport = {
        "relational": fit_metrics(fitted.predictions, data.held_out_targets),
        "individual": fit_metrics(baseline.predictions, data.held_out_targets),
        "constant": fit_metrics(np.zeros_like(data.held_out_targets), data.held_out_targets),
        "accepted": accepted,
        "sign_check": check,
        "attempts": attempts,
        "warm_start": warm_report,
        "relation": fitted.model.relation_values().to_json(),
        "train_rollouts": len(data.rollouts),
        "held_out_rollouts": len(data.held_out),
        "individual_labels": None if data.dense is None else data.dense.to_json(),
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "patience": settings.patience,
    }
    return FitResult(model=fitted.model if accepted else None, report=report)


def held_out_spearman(
    source: FeatureSource | Tensor | np.ndarray,
    rollouts: np.ndarray,
    labels: np.ndarray,
    settings: FitSettings,
    seed: int,
    held_out: np.ndarray,
    group: torch.distributed.ProcessGroup | None = None,
    individual: np.ndarray | None = None,
) -> float:
    """Spearman, at its best epoch, of one relational fit on the rollouts whose places are not in ``held_out`` int64 ``[H]``.

    For comparing numbers of rollouts on the same held-out ones; the other arguments are those of :func:`fit_relational`. A
    source with parameters has the same ones afterwards as before. Collective over ``group``.
    """
    rollouts, labels = checked(rollouts, labels)
    runner = _Runner(source=as_source(source), settings=settings, group=group, progress=None)
    weights = copy_weights(runner.source)
    train = np.setdiff1d(np.arange(len(labels)), held_out)
    data = fit_data(rollouts, labels, settings.standardisation, (train, held_out), individual)
    fitted = runner.train(data, settings.relation, seed)
    set_weights(runner.source, weights)
    return fitted.spearman


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Runner:
    """What all fits of one call have in common."""

    source: FeatureSource
    settings: FitSettings
    group: torch.distributed.ProcessGroup | None
    progress: Callable[[int], None] | None

    def train(self, data: FitData, relation: str, seed: int, start: WarmStart | None = None) -> Trained:
        """One fit; leaves the source as its best epoch has it. Collective."""
        model = None if start is None else start.model
        return Fit(self.source, data, self.settings, relation, seed, self.group, model).train(self.progress)

    def compare(self, data: FitData, fitted: Trained, seed: int, start: WarmStart) -> dict[str, Any]:
        """``warm_start`` of the report: what ``start`` was worth. Collective."""
        # With an encoder to train, the comparison would cost as much again as the fit.
        scratch = None if self.source.parameters() else self.train(data, self.settings.relation, seed).spearman
        return {"from": start.number, "spearman_before": fitted.before, "spearman": fitted.spearman, "spearman_from_scratch": scratch}


def _check(fitted: Trained, data: FitData, group: torch.distributed.ProcessGroup | None) -> SignCheck:
    """The sign check, decided alike on all ranks. Collective over ``group``."""
    check = sign_check(fitted.individual, data, fitted.dense_individual)
    return {**check, "correlation": agree(check["correlation"], group)}


def _fits(start: WarmStart, source: FeatureSource, settings: FitSettings) -> bool:
    """Whether the fit can begin at ``start``: its model must be of the same shapes and relation."""
    found = start.model.shape()
    size = settings.embedding_dim
    wanted = {
        "feature_dim": source.feature_dim,
        "embedding_dim": size or source.feature_dim,
        "relation": settings.relation,
        "projection": size is not None,
    }
    if found != wanted:
        logger.warning("round %d's model (%s) is no start for a fit of %s; the fit begins from scratch", start.number, found, wanted)
    return found == wanted
