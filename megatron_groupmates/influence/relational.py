"""The relational data influence model: predicts a sample's influence given the samples before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.labels import Standardiser
from megatron_groupmates.influence.relation import RELATIONS, Relation, relation_scores
from megatron_groupmates.utils.files import read_json, write_bytes, write_json

_WEIGHTS, _CONFIG, _ENCODER = "model.safetensors", "model.json", "encoder"


def mean_preceding_similarity(embeddings: Tensor) -> Tensor:
    """Mean inner product of each sample's embedding with those before it in its rollout; 0 for the first.

    Args:
        embeddings: float ``[..., T, d]``, one rollout for each leading index.

    Returns:
        Float ``[..., T]``. Rollouts never mix, so a batch of B gives the values of B batches of one.
    """
    num_steps = embeddings.shape[-2]
    before = nn.functional.pad(embeddings[..., :-1, :].cumsum(dim=-2), (0, 0, 1, 0))[..., :num_steps, :]
    count = torch.arange(num_steps, device=embeddings.device, dtype=embeddings.dtype).clamp(min=1)
    return (embeddings * before).sum(dim=-1) / count


def rollout_scores(kind: str, embeddings: Tensor, individual: Tensor, **scalars: Any) -> Tensor:
    """Predicted influences f ``[..., T]`` of rollouts under one of ``RELATIONS``.

    f_1 = s_1; the later ones depend on the mean similarity to all samples before them.
    """
    related = relation_scores(kind, individual, mean_preceding_similarity(embeddings), **scalars)
    return torch.cat([individual[..., :1].to(related.dtype), related[..., 1:]], dim=-1)


def relational_scores(embeddings: Any, individual: Any, alpha: Any, tau: Any) -> Tensor:
    """Predicted influences of the samples of a rollout, in order (paper section 3.2).

    f_1 = s_1 and f_t = s_t * alpha * mean over j < t of (1 - h_t . h_j / tau).

    Args:
        embeddings: h, ``[T, d]`` or ``[B, T, d]``: tensor, NumPy array or nested list.
        individual: s, ``[T]`` or ``[B, T]``.
        alpha: learned scale, a number or a tensor of one element.
        tau: learned temperature, a number or a tensor of one element.

    Returns:
        Tensor ``[T]`` or ``[B, T]``, float64 for float64 input, differentiable in every tensor given.

    Raises:
        UserError: the shapes do not belong together.
    """
    embeddings, individual, alpha, tau = (_as_tensor(value) for value in (embeddings, individual, alpha, tau))
    if embeddings.dim() not in (2, 3) or embeddings.shape[:-1] != individual.shape:
        raise UserError(
            f"embeddings have shape {list(embeddings.shape)} and individual {list(individual.shape)}; "
            "give [T, d] with [T], or [B, T, d] with [B, T]"
        )
    if alpha.numel() != 1 or tau.numel() != 1:
        raise UserError(f"alpha has {alpha.numel()} elements and tau {tau.numel()}; give one number each")
    return rollout_scores("product", embeddings, individual, alpha=alpha.reshape(()), tau=tau.reshape(()), gamma=0.0, offset=0.0)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # Copied: an array read from a file may be read-only, which torch warns about.
    return torch.from_numpy(np.array(value))


class RelationalModel(nn.Module):
    """Individual influence s = w . h + b and a relation to the samples before; predicts standardised labels.

    Attributes:
        standardiser: statistics of the labels it was fitted to, saved with it; None before the fit.
        encoder_directory: of a loaded model, where the encoder lies that was trained with it; None: its features are an
            untrained encoder's.
    """

    def __init__(self, feature_dim: int, embedding_dim: int, relation: str = "product", projection: bool = True, seed: int = 0) -> None:
        """Make a model with seeded random weights (no global random state is used or changed).

        Args:
            feature_dim: F, the size of the encoder's features.
            embedding_dim: d, the size of h; F where ``projection`` is False.
            relation: one of ``RELATIONS``.
            projection: h is the L2-normalised projection of the standardised features; False: the features are h.
            seed: decides the initial weights.
        """
        super().__init__()
        if relation not in RELATIONS:
            raise UserError(f"relation is {relation!r}; choose one of {', '.join(RELATIONS)}")
        if not projection and feature_dim != embedding_dim:
            raise UserError(
                f"embedding_dim is {embedding_dim} but the encoder gives {feature_dim}; without a projection they must be equal"
            )
        self.feature_dim, self.embedding_dim, self.relation = feature_dim, embedding_dim, relation
        self.standardiser: Standardiser | None = None
        self.encoder_directory: Path | None = None
        generator = torch.Generator().manual_seed(seed)
        if projection:
            weight = torch.randn(embedding_dim, feature_dim, generator=generator) / feature_dim**0.5
            self.projection = nn.Parameter(weight)
            self.register_buffer("feature_mean", torch.zeros(feature_dim))
            self.register_buffer("feature_std", torch.ones(feature_dim))
        else:
            self.projection = None
        self.head_weight = nn.Parameter(torch.randn(embedding_dim, generator=generator) / embedding_dim**0.5)
        self.head_bias = nn.Parameter(torch.zeros(()))
        for name, start in {"product": {"alpha": 1.0, "tau": 1.0}, "additive": {"gamma": 0.0, "offset": 0.0}, "none": {}}[relation].items():
            self.register_parameter(name, nn.Parameter(torch.tensor(start)))

    def set_feature_statistics(self, features: Tensor) -> None:
        """Take mean and standard deviation of ``features`` [..., F] to standardise the projection's input with."""
        if self.projection is not None:
            flat = features.reshape(-1, self.feature_dim).double()
            std = flat.std(dim=0, correction=0)
            self.feature_mean.copy_(flat.mean(dim=0))
            self.feature_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings h ``[..., d]`` of features ``[..., F]``."""
        if self.projection is None:
            return features
        standardised = (features - self.feature_mean) / self.feature_std
        return nn.functional.normalize(standardised @ self.projection.T, dim=-1)

    def individual(self, embeddings: Tensor) -> Tensor:
        """Individual influences s ``[...]`` of embeddings ``[..., d]``."""
        return embeddings @ self.head_weight + self.head_bias

    def forward(self, features: Tensor) -> Tensor:
        """Predicted influences ``[B, T]`` of rollouts with features ``[B, T, F]``, in standardised label units."""
        embeddings = self.embed(features)
        return rollout_scores(self.relation, embeddings, self.individual(embeddings), **self._scalars())

    def relation_values(self) -> Relation:
        """The relation with its learned scalars, for bootstrap and selection, which need no model."""
        with torch.no_grad():
            return Relation(kind=self.relation, **{name: float(value) for name, value in self._scalars().items()})

    def _scalars(self) -> dict[str, Any]:
        start = {"alpha": 1.0, "tau": 1.0, "gamma": 0.0, "offset": 0.0}
        return {name: getattr(self, name, value) for name, value in start.items()}

    def shape(self) -> dict[str, Any]:
        """What two models must share to exchange weights: the arguments of the constructor but the seed."""
        return {
            "feature_dim": self.feature_dim,
            "embedding_dim": self.embedding_dim,
            "relation": self.relation,
            "projection": self.projection is not None,
        }

    def save(self, directory: Path | str, write_encoder: Callable[[Path], object] | None = None) -> None:
        """Write weights and input statistics (safetensors), then shape and label statistics (JSON, last).

        Args:
            directory: created where it is missing.
            write_encoder: called with a directory to leave the encoder in that was trained with the model, and its tokenizer.
        """
        directory = Path(directory)
        if write_encoder is not None:
            write_encoder(directory / _ENCODER)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_bytes(directory / _WEIGHTS, save(weights))
        write_json(
            directory / _CONFIG,
            {
                **self.shape(),
                "targets": None if self.standardiser is None else self.standardiser.to_json(),
                "encoder": None if write_encoder is None else _ENCODER,
            },
        )

    @classmethod
    def load(cls, directory: Path | str) -> RelationalModel:
        """The model that ``save`` wrote to ``directory``, on the CPU.

        Raises:
            UserError: there is no complete model in ``directory``.
        """
        directory = Path(directory)
        if not (directory / _CONFIG).exists() or not (directory / _WEIGHTS).exists():
            raise UserError(f"no relational model in {directory}: it needs {_CONFIG} and {_WEIGHTS}; fit it again")
        config = read_json(directory / _CONFIG)
        targets, encoder = config.pop("targets"), config.pop("encoder", None)
        model = cls(**config)
        model.encoder_directory = None if encoder is None else directory / encoder
        model.load_state_dict(load_file(directory / _WEIGHTS))
        model.standardiser = None if targets is None else Standardiser.from_json(targets)
        return model
