"""The optimisation of one model on one split: data-parallel steps, early stop, the state of the best epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from megatron_groupmates.influence.features import FeatureSource, encode_all, source_device
from megatron_groupmates.influence.fit_data import FitData
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.relational import RelationalModel

_STATISTICS_SAMPLES = 4096
_SUMMED_TOGETHER = 1 << 16
"""Gradients of up to so many elements travel in one message; larger ones each in their own, without a copy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What one fit left.

    Attributes:
        model: at its best epoch, on the features' device; the source's parameters are those of that epoch too.
        best_epoch: from 1; 0: a warm start that no epoch bettered.
        curve: held-out Spearman after each epoch.
        before: held-out Spearman before any step.
        spearman: held-out Spearman of the model; minus infinity where training diverged from the first epoch on.
        stopped: ``epochs``, or ``patience`` where the best of them lay too far back.
        predictions: float32 ``[h, T]`` for the held-out rollouts.
        individual: float32 ``[h, T]``, the individual term of their samples.
        dense_individual: float32 ``[k]``, that of ``data.dense.held_out``; None without dense labels.
    """

    model: RelationalModel
    best_epoch: int
    curve: list[float]
    before: float
    spearman: float
    stopped: str
    predictions: np.ndarray
    individual: np.ndarray
    dense_individual: np.ndarray | None

    def to_json(self) -> dict[str, Any]:
        """How the fit went."""
        return {"best_epoch": self.best_epoch, "held_out_spearman": self.curve, "stopped": self.stopped}


class Fit:
    """One fit under way. Collective over ``group``: every rank makes the same calls with the same arguments."""

    def __init__(
        self,
        source: FeatureSource,
        data: FitData,
        settings: FitSettings,
        relation: str,
        seed: int,
        group: torch.distributed.ProcessGroup | None,
        warm_start: RelationalModel | None = None,
    ) -> None:
        """``warm_start``: begin at this model's weights, as far as a model with ``relation`` has them. Others: see ``train``."""
        self.source, self.data, self.settings, self.group = source, data, settings, group
        device = source_device(source)
        # Everything is where the model computes: a batch is then a look-up.
        self._targets = data.targets.to(device)
        self._distinct, place = torch.unique(data.held_out, return_inverse=True)
        self._place = place.to(device)
        self._held_out_features = None if source.parameters() else encode_all(source, self._distinct, group)
        if data.dense is not None:
            self._dense_numbers = torch.from_numpy(data.dense.numbers)
            self._dense_targets = torch.from_numpy(data.dense.targets).to(device)
        size = settings.embedding_dim
        self.model = RelationalModel(source.feature_dim, size or source.feature_dim, relation, projection=size is not None, seed=seed)
        if warm_start is not None:
            known = self.model.state_dict().keys()
            self.model.load_state_dict({name: value for name, value in warm_start.state_dict().items() if name in known}, strict=False)
        self._warm = warm_start is not None
        self.model.to(device)
        self.model.standardiser = data.standardiser
        self._generator = np.random.default_rng(seed)
        self._set_feature_statistics()

    def _set_feature_statistics(self) -> None:
        """From the training rollouts' samples; of a warm start too, whose checkpoint had features on another scale."""
        if self.model.projection is None:
            return
        # Of evenly spread ones where there are very many: the features of all rollouts would be the largest thing in memory.
        numbers = self.data.rollouts.flatten()
        count = min(len(numbers), _STATISTICS_SAMPLES)
        numbers = numbers[torch.linspace(0, len(numbers) - 1, count, dtype=torch.float64).long()]
        self.model.set_feature_statistics(encode_all(self.source, numbers, self.group))

    def train(self, progress: Callable[[int], None] | None) -> Trained:
        """Optimise until the last epoch or until patience ends; the best epoch by held-out Spearman stays, or a better warm start.

        Args:
            progress: called with the epochs done, in all ``settings.epochs``.
        """
        settings, num_rollouts = self.settings, len(self.data.rollouts)
        optimizer = self._make_optimizer()
        steps = settings.epochs * -(-num_rollouts // settings.batch_rollouts)
        # A fit to few rollouts would else be over before the learning rate is at its peak.
        warmup = min(settings.warmup_steps, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))
        before = self._held_out_spearman()
        best_epoch, best, state = 0, before if self._warm else -np.inf, self._state()
        curve: list[float] = []
        while len(curve) < settings.epochs and len(curve) - best_epoch < settings.patience:
            self._epoch(optimizer, schedule)
            finite = self._is_finite()
            curve.append(self._held_out_spearman() if finite else -1.0)
            if finite and curve[-1] > best:
                best_epoch, best, state = len(curve), curve[-1], self._state()
            if progress is not None:
                progress(1)
        if progress is not None and len(curve) < settings.epochs:
            progress(settings.epochs - len(curve))
        self._restore(state)
        features = self._held_out()
        return Trained(
            model=self.model,
            best_epoch=best_epoch,
            curve=curve,
            before=before,
            spearman=best,
            stopped="epochs" if len(curve) == settings.epochs else "patience",
            predictions=self._predict(features),
            individual=self._individual(features),
            dense_individual=self._dense_individual(),
        )

    def _is_finite(self) -> bool:
        """Whether training has not diverged; the ranks have the same weights, but decide as the first does."""
        return bool(agree(float(all(bool(value.isfinite().all()) for value in self._parameters())), self.group))

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.source.parameters()]

    def _state(self) -> list[Tensor]:
        """Copies of all trained weights, in host memory: a GPU that holds an encoder need not hold it twice."""
        return [value.detach().to("cpu", copy=True) for value in self._parameters()]

    def _restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for value, kept in zip(self._parameters(), state, strict=True):
                value.copy_(kept)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        decayed = [value for value in self._parameters() if value.dim() > 1 or value is self.model.head_weight]
        others = [value for value in self._parameters() if value.dim() <= 1 and value is not self.model.head_weight]
        decay = self.settings.weight_decay
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr=self.settings.learning_rate
        )

    def _epoch(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Every training rollout once, and every dense label once, spread over the steps that the rollouts make."""
        num_rollouts, size = len(self.data.rollouts), self.settings.batch_rollouts
        batches = np.array_split(self._generator.permutation(num_rollouts), range(size, num_rollouts, size))
        dense_order = self._generator.permutation(0 if self.data.dense is None else len(self.data.dense.targets))
        for batch, dense_batch in zip(batches, np.array_split(dense_order, len(batches)), strict=True):
            self._step(optimizer, batch, dense_batch)
            schedule.step()

    def _step(self, optimizer: torch.optim.Optimizer, batch: np.ndarray, dense_batch: np.ndarray) -> None:
        """One optimizer step on the mean squared error over the whole batch.

        The dense labels' mean squared error counts as much as the rollouts', however many there are: only rollouts show relations.
        """
        rank = 0 if self.group is None else torch.distributed.get_rank(self.group)
        size = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        optimizer.zero_grad(set_to_none=False)
        mine, dense_mine = torch.from_numpy(batch[rank::size]), torch.from_numpy(dense_batch[rank::size])
        # Divided by the whole batch's size, so that the sum over ranks is the batch's mean.
        if len(mine):
            error = self.model(self.source(self.data.rollouts[mine])) - self._targets[mine]
            (error.square().sum() / (len(batch) * error.shape[1])).backward()
        if len(dense_mine):
            error = self.model.individual(self.model.embed(self.source(self._dense_numbers[dense_mine]))) - self._dense_targets[dense_mine]
            (error.square().sum() / len(dense_batch)).backward()
        self._sum_gradients()
        torch.nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        optimizer.step()

    def _sum_gradients(self) -> None:
        """Sum gradients over the ranks; a parameter that no sample reached has a gradient of zero."""
        parameters = self._parameters()
        for value in parameters:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        if self.group is None:
            return
        small = [value for value in parameters if value.numel() <= _SUMMED_TOGETHER]
        flat = torch.cat([value.grad.reshape(-1) for value in small])
        torch.distributed.all_reduce(flat, group=self.group)
        for value, part in zip(small, flat.split([value.numel() for value in small]), strict=True):
            value.grad.copy_(part.view_as(value))
        for value in parameters:
            if value.numel() > _SUMMED_TOGETHER:
                torch.distributed.all_reduce(value.grad, group=self.group)

    def _held_out(self) -> Tensor:
        """Features float32 ``[h, T, F]`` of the held-out rollouts."""
        features = self._held_out_features
        return (encode_all(self.source, self._distinct, self.group) if features is None else features)[self._place]

    def _held_out_spearman(self) -> float:
        return agree(spearman(self._predict(self._held_out()), self.data.held_out_targets), self.group)

    @torch.no_grad()
    def _predict(self, features: Tensor) -> np.ndarray:
        """Predictions float32 ``[h, T]``; what is not finite counts as 0."""
        return np.nan_to_num(self.model(features).cpu().numpy(), posinf=0.0, neginf=0.0)

    @torch.no_grad()
    def _individual(self, features: Tensor) -> np.ndarray:
        """Individual terms float32 ``[...]`` of features ``[..., F]``; what is not finite counts as 0."""
        return np.nan_to_num(self.model.individual(self.model.embed(features)).cpu().numpy(), posinf=0.0, neginf=0.0)

    def _dense_individual(self) -> np.ndarray | None:
        if self.data.dense is None:
            return None
        return self._individual(encode_all(self.source, torch.from_numpy(self.data.dense.held_out), self.group))


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at ``step`` from 0: linear warm-up, then linear decay to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def agree(value: float, group: torch.distributed.ProcessGroup | None) -> float:
    """The first rank's ``value`` on every rank, so that all decide alike. Collective over ``group``."""
    if group is None:
        return value
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, src=torch.distributed.get_global_rank(group, 0), group=group)
    return float(shared)
