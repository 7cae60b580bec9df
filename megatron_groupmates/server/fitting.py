"""The fits of a round: candidates as the fits see them, where a fit begins, what is kept of it. All are collective: every rank calls."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates.influence.encoder import Encoder
from megatron_groupmates.influence.features import FeatureSource, FrozenFeatures, copy_weights, set_weights
from megatron_groupmates.influence.fit import FitReport, FitResult, WarmStart, fit_relational
from megatron_groupmates.influence.labels import influence_labels
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder, TrainedFeatures
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.embedding import encode
from megatron_groupmates.server.encoders import trained_encoder
from megatron_groupmates.utils.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The samples that a round's rollouts are drawn from.

    Attributes:
        rows: pool rows int64 ``[N]``; a sample's number is its place here.
        encoder: the one that the fits begin with.
        source: features of the samples by number. One that is trained has its first weights again after every fit.
        warm_start: the model that the fits begin at, if any.
    """

    rows: np.ndarray
    encoder: Encoder
    source: FeatureSource
    warm_start: WarmStart | None

    def features(self, context: RoundContext, model: RelationalModel) -> np.ndarray:
        """Features float32 ``[N, F]`` as ``model`` reads them. Collective."""
        if isinstance(self.source, FrozenFeatures):
            return self.source.table.cpu().numpy()
        return encode(context, trained_encoder(context, self.encoder, model), context.pool, self.rows, "candidates")


def open_candidates(context: RoundContext, encoder: Encoder, rows: np.ndarray) -> Candidates:
    """Encode pool ``rows``, or make the encoder ready to be trained with the fits. Collective."""
    warm_start = None
    if context.config.relational.warm_start and (earlier := last_good_model(context)) is not None:
        warm_start = WarmStart(model=earlier[0], number=earlier[1])
    if context.recipe.finetune_encoder:
        begin = encoder if warm_start is None else trained_encoder(context, encoder, warm_start.model)
        assert isinstance(begin, HuggingFaceEncoder)
        source: FeatureSource = TrainedFeatures(begin.copy(), lambda numbers: context.read_samples(rows[numbers]))
    else:
        # On the groups' device: NCCL sums no gradients that lie in host memory.
        source = FrozenFeatures(torch.from_numpy(encode(context, encoder, context.pool, rows, "candidates")).to(context.groups.device))
    return Candidates(rows=rows, encoder=encoder, source=source, warm_start=warm_start)


def fit_model(
    context: RoundContext, name: str, candidates: Candidates, rollouts: np.ndarray, losses: np.ndarray, dense: np.ndarray | None
) -> tuple[RelationalModel | None, FitReport]:
    """Fit on ``rollouts`` with ``losses``; None when every fit came out with the wrong sign. Kept as ``<name>/``. Collective.

    ``dense`` labels of all candidates, ``[num_candidates]``, enter as rollouts of length one.
    """
    directory = context.directory / name
    if not context.groups.broadcast_object((directory / "report.json").exists()):
        source = candidates.source
        with context.bookkeeping(name, fit_flops(context, candidates, rollouts)):
            labels = influence_labels(losses, context.recipe.labels, context.config.optimizer.beta1)
            # A seed of its own: a final fit on the rollouts of a refused first one must not repeat it.
            seed, weights = context.seed(f"{name} fit"), copy_weights(source)
            result: FitResult = fit_relational(
                source,
                rollouts,
                labels,
                context.recipe.fit,
                seed,
                dist.group.WORLD,
                individual=dense,
                warm_start=candidates.warm_start,
            )
            context.on_main(lambda: _keep(directory, result, source))
            set_weights(source, weights)
    report = read_json(directory / "report.json")
    return (context.together(lambda: RelationalModel.load(directory)) if report["accepted"] else None), report


def fit_flops(context: RoundContext, candidates: Candidates, rollouts: np.ndarray) -> float:
    """Of one fit to ``rollouts``, as many epochs as there are at most."""
    settings, source = context.recipe.fit, candidates.source
    sample = 6.0 * source.feature_dim * (settings.embedding_dim or 1)
    if weights := sum(value.numel() for value in source.parameters()):
        # About as many of the encoder's tokens as of the pool's.
        tokens = np.minimum(context.pool.lengths[candidates.rows], context.config.relational.encoder_max_tokens).mean()
        sample += 6.0 * weights * float(tokens)
    return rollouts.size * settings.epochs * sample


def _keep(directory: Path, result: FitResult, source: FeatureSource) -> None:
    """Write a fit, its report last: without one, what lies there is left of a killed run."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if result.model is not None:
        result.model.save(directory, source.encoder.save if isinstance(source, TrainedFeatures) else None)
    write_json(directory / "report.json", result.report)


def last_good_model(context: RoundContext) -> tuple[RelationalModel, int] | None:
    """The newest accepted ``final`` model of an earlier round of this run, and the round's number. Collective."""

    def accepted(number: int) -> bool:
        report = context.paths.round(number) / "final" / "report.json"
        return report.exists() and read_json(report)["accepted"]

    # As the main rank finds it: another host may see the files of a shared directory later.
    numbers = range(context.input.number - 1, 0, -1) if context.groups.is_main else ()
    number = context.groups.broadcast_object(next(filter(accepted, numbers), None))
    if number is None:
        return None
    return context.together(lambda: RelationalModel.load(context.paths.round(number) / "final")), number
