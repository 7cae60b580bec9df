"""Fitting the relational model, and the baselines that show whether relations help, on one split of rollouts."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.dense import DenseTargets, dense_targets
from megatron_groupmates.influence.labels import Standardiser
from megatron_groupmates.influence.metrics import fit_metrics, pearson, spearman
from megatron_groupmates.influence.relational import RelationalModel

logger = logging.getLogger(__name__)

Individual = tuple["Tensor | np.ndarray", np.ndarray]
"""Dense labels: the encoder's features float32 ``[N, F]`` of samples, and each one's individual influence ``[N]``."""

FitReport = dict[str, Any]
"""JSON object. ``relational``, ``individual`` and ``constant``: metrics of each model on the same held-out rollouts, in
standardised label units. ``attempts``: one entry per fit of the relational model; ``accepted``: whether the last one
passed the sign check; also the split's sizes, the relation's learned scalars, the seed and the settings, and
``individual_labels``: how many dense labels were used, how many left out, and their scale (null without any)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a relational model is fitted."""

    embedding_dim: int | None = 32
    """Size of the learned projection of the encoder's features; None: the features are the embeddings."""
    relation: str = "product"
    """``product`` or ``additive``."""
    standardisation: str = "per_position"
    """``pooled`` or ``per_position``."""
    learning_rate: float = 3e-3
    """Peak of a linear warm-up followed by a linear decay to zero."""
    weight_decay: float = 0.1
    """AdamW's, on projection and head; the relation's scalars and the bias do not decay."""
    warmup_steps: int = 20
    epochs: int = 30
    batch_rollouts: int = 16
    """Rollouts in one optimizer step, over all ranks together."""
    held_out_fraction: float = 0.2
    """Share of the rollouts that is kept for early stopping and the report."""
    max_held_out: int = 1000
    max_refits: int = 3
    """Further fits, each with another seed, while the correlation at t = 1 is negative."""

    def __post_init__(self) -> None:
        positive = {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "batch_rollouts": self.batch_rollouts,
            "max_held_out": self.max_held_out,
            "embedding_dim": 1 if self.embedding_dim is None else self.embedding_dim,
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name} is {value}; it must be above 0")
        for name, value in {"weight_decay": self.weight_decay, "warmup_steps": self.warmup_steps, "max_refits": self.max_refits}.items():
            if value < 0:
                raise UserError(f"{name} is {value}; it must be at least 0")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(f"held_out_fraction is {self.held_out_fraction}; it must be above 0 and below 1")
        if self.relation not in ("product", "additive"):
            raise UserError(f"relation is {self.relation!r}; choose product or additive")


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
class _Data:
    """One split: features ``[n, T, F]`` and standardised targets ``[n, T]`` float32 of each part, and dense labels if any."""

    train_features: Tensor
    train_targets: Tensor
    held_out_features: Tensor
    held_out_targets: np.ndarray
    standardiser: Standardiser
    dense: DenseTargets | None


def split_rollouts(num_rollouts: int, settings: FitSettings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64 indices of the training and of the held-out rollouts; at least two of each.

    Raises:
        UserError: fewer than four rollouts.
    """
    if num_rollouts < 4:
        raise UserError(f"{num_rollouts} rollouts cannot be split into training and held-out ones; collect at least 4")
    num_held_out = min(max(2, round(settings.held_out_fraction * num_rollouts)), settings.max_held_out, num_rollouts - 2)
    order = np.random.default_rng(seed).permutation(num_rollouts)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def fit_relational(
    features: Tensor | np.ndarray,
    labels: np.ndarray,
    settings: FitSettings,
    seed: int,
    group: torch.distributed.ProcessGroup | None = None,
    progress: Callable[[int], None] | None = None,
    individual: Individual | None = None,
) -> FitResult:
    """Fit the relational model and its baselines; deterministic for a seed.

    Args:
        features: float32 ``[R, T, F]``, the encoder's features of the rollouts' samples.
        labels: ``[R, T]``, raw or momentum corrected, not standardised.
        settings: how to fit.
        seed: decides the split, the initial weights and the order of batches.
        group: data-parallel ranks. Collective: every rank of the group must call with the same arguments. Each takes
            its share of every batch and gradients are summed, so the fit equals that of one rank up to rounding.
        progress: called with 1 after each epoch of each fit (``settings.epochs`` for each attempt, and as many for
            the individual baseline).
        individual: dense labels, which enter training as rollouts of length one, scaled to ``labels`` by least squares;
            those of samples in held-out rollouts do not.

    Raises:
        UserError: shapes that do not belong together, or fewer than four rollouts.
    """
    data = _split(features, labels, settings, split_rollouts(len(labels), settings, seed), individual)
    attempts: list[dict[str, Any]] = []
    for attempt in range(settings.max_refits + 1):
        model, outcome = _train(settings.relation, data, settings, seed + attempt, group, progress)
        attempts.append(outcome)
        accepted = outcome["first_position_correlation"] >= 0
        if accepted:
            break
        logger.warning(
            "relational model refused: correlation at t = 1 is %.3f on held-out rollouts (seed %d)",
            outcome["first_position_correlation"],
            seed + attempt,
        )
    baseline, _ = _train("none", data, settings, seed, group, progress)
    report: FitReport = {
        "relational": fit_metrics(_predict(model, data), data.held_out_targets),
        "individual": fit_metrics(_predict(baseline, data), data.held_out_targets),
        "constant": fit_metrics(np.zeros_like(data.held_out_targets), data.held_out_targets),
        "accepted": accepted,
        "attempts": attempts,
        "relation": model.relation_values().to_json(),
        "train_rollouts": len(data.train_features),
        "held_out_rollouts": len(data.held_out_features),
        "individual_labels": None if data.dense is None else data.dense.to_json(),
        "seed": seed,
        "settings": dataclasses.asdict(settings),
    }
    return FitResult(model=model if accepted else None, report=report)


def held_out_spearman(
    features: Tensor | np.ndarray,
    labels: np.ndarray,
    settings: FitSettings,
    seed: int,
    held_out: np.ndarray,
    group: torch.distributed.ProcessGroup | None = None,
    individual: Individual | None = None,
) -> float:
    """Spearman, at its best epoch, of one relational fit on the rollouts whose numbers are not in ``held_out`` int64 ``[H]``.

    For comparing numbers of rollouts on the same held-out ones; the other arguments are those of :func:`fit_relational`.
    Collective over ``group``.
    """
    train = np.setdiff1d(np.arange(len(labels)), held_out)
    data = _split(features, labels, settings, (train, held_out), individual)
    _, outcome = _train(settings.relation, data, settings, seed, group, None)
    return max(outcome["held_out_spearman"])


def _split(
    features: Tensor | np.ndarray,
    labels: np.ndarray,
    settings: FitSettings,
    split: tuple[np.ndarray, np.ndarray],
    individual: Individual | None,
) -> _Data:
    """Data of a fit on the first, and held-out data of the second part of ``split``."""
    features = torch.as_tensor(features, dtype=torch.float32)
    labels = np.asarray(labels, np.float64)
    if features.dim() != 3 or tuple(features.shape[:2]) != labels.shape:
        raise UserError(
            f"features have shape {list(features.shape)} and labels {list(labels.shape)}; "
            "give [rollouts, steps, feature_dim] with [rollouts, steps]"
        )
    train, held_out = split
    standardiser = Standardiser.fit(labels[train], settings.standardisation)
    targets = standardiser.apply(labels).astype(np.float32)
    dense = None
    if individual is not None:
        dense = dense_targets(*individual, (features[train], labels[train]), features[held_out], standardiser)
    return _Data(
        train_features=features[train],
        held_out_features=features[held_out],
        train_targets=torch.from_numpy(targets[train]).to(features.device),
        held_out_targets=targets[held_out],
        standardiser=standardiser,
        dense=dense,
    )


def _train(
    relation: str,
    data: _Data,
    settings: FitSettings,
    seed: int,
    group: torch.distributed.ProcessGroup | None,
    progress: Callable[[int], None] | None,
) -> tuple[RelationalModel, dict[str, Any]]:
    """One fit: the model at the epoch with the best held-out Spearman, and how it went. Collective over ``group``."""
    num_rollouts, _, feature_dim = data.train_features.shape
    model = RelationalModel(
        feature_dim, settings.embedding_dim or feature_dim, relation=relation, projection=settings.embedding_dim is not None, seed=seed
    )
    model.to(data.train_features.device)
    model.set_feature_statistics(data.train_features)
    model.standardiser = data.standardiser
    optimizer = _make_optimizer(model, settings)
    steps_per_epoch = -(-num_rollouts // settings.batch_rollouts)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.warmup_steps, settings.epochs * steps_per_epoch)
    )
    generator = np.random.default_rng(seed)
    best_state, best_spearman, best_epoch, curve = copy.deepcopy(model.state_dict()), -np.inf, 0, []
    for epoch in range(1, settings.epochs + 1):
        order = generator.permutation(num_rollouts)
        # Each epoch takes every dense label once, spread over the steps that the rollouts make.
        dense_order = generator.permutation(0 if data.dense is None else len(data.dense.targets))
        for batch, dense_batch in zip(
            np.array_split(order, range(settings.batch_rollouts, num_rollouts, settings.batch_rollouts)),
            np.array_split(dense_order, steps_per_epoch),
            strict=True,
        ):
            _step(model, optimizer, data, batch, dense_batch, group)
            schedule.step()
        value = _agree(spearman(_predict(model, data), data.held_out_targets), group)
        curve.append(value)
        if value > best_spearman:
            best_state, best_spearman, best_epoch = copy.deepcopy(model.state_dict()), value, epoch
        if progress is not None:
            progress(1)
    model.load_state_dict(best_state)
    first = _agree(pearson(_predict(model, data)[:, 0], data.held_out_targets[:, 0]), group)
    return model, {"seed": seed, "best_epoch": best_epoch, "held_out_spearman": curve, "first_position_correlation": first}


def _make_optimizer(model: RelationalModel, settings: FitSettings) -> torch.optim.Optimizer:
    decayed = [value for name, value in model.named_parameters() if name in ("projection", "head_weight")]
    others = [value for name, value in model.named_parameters() if name not in ("projection", "head_weight")]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}], lr=settings.learning_rate
    )


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at ``step`` from 0: linear warm-up, then linear decay to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def _step(
    model: RelationalModel,
    optimizer: torch.optim.Optimizer,
    data: _Data,
    batch: np.ndarray,
    dense_batch: np.ndarray,
    group: torch.distributed.ProcessGroup | None,
) -> None:
    """One optimizer step on the mean squared error over the whole batch. Collective over ``group``.

    The dense labels' mean squared error counts as much as the rollouts', however many there are: only rollouts show relations.
    """
    rank = 0 if group is None else torch.distributed.get_rank(group)
    size = 1 if group is None else torch.distributed.get_world_size(group)
    mine, dense_mine = torch.from_numpy(batch[rank::size]), torch.from_numpy(dense_batch[rank::size])
    optimizer.zero_grad(set_to_none=False)
    if len(mine):
        error = model(data.train_features[mine]) - data.train_targets[mine]
        # Divided by the whole batch's size, so that the sum over ranks is the batch's mean.
        (error.square().sum() / (len(batch) * error.shape[1])).backward()
    if data.dense is not None and len(dense_mine):
        error = model(data.dense.features[dense_mine].unsqueeze(1)).squeeze(1) - data.dense.targets[dense_mine]
        (error.square().sum() / len(dense_batch)).backward()
    parameters = list(model.parameters())
    if group is not None:
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat, group=group)
        for value, part in zip(parameters, flat.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value).clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _predict(model: RelationalModel, data: _Data) -> np.ndarray:
    """Predictions for the held-out rollouts, float32 ``[n, T]``; what is not finite counts as 0."""
    with torch.no_grad():
        return np.nan_to_num(model(data.held_out_features).cpu().numpy(), posinf=0.0, neginf=0.0)


def _agree(value: float, group: torch.distributed.ProcessGroup | None) -> float:
    """The first rank's ``value`` on every rank, so that all decide alike. Collective over ``group``."""
    if group is None:
        return value
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, src=torch.distributed.get_global_rank(group, 0), group=group)
    return float(shared)
