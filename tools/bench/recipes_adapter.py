"""The experiment's calls into the package's fit, bootstrap and selection, in terms of the method's choices."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from megatron_groupmates.config import Config
from megatron_groupmates.influence.bootstrap import bootstrap_rollouts
from megatron_groupmates.influence.fit import FitResult, fit_relational
from megatron_groupmates.influence.labels import influence_labels
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.selection.select import select_rows
from megatron_groupmates.server.recipe import resolve_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What an arm learns influences by and selects by; names and values are the package's, ``bootstrap`` may also be ``none``."""

    labels: str
    standardisation: str
    relation: str
    share: str
    bootstrap: str
    estimator: str
    learning_rate: float | None
    """Of the oracle's steps; None: the run's at the checkpoint."""


PAPER = Choices(
    labels="increments",
    standardisation="pooled",
    relation="product",
    share="equal",
    bootstrap="plain",
    estimator="exact",
    learning_rate=None,
)
ALTERNATIVES = {
    "labels": ("momentum_corrected", "increments"),
    "standardisation": ("per_position", "pooled"),
    "relation": ("product", "additive"),
    "share": ("global", "equal"),
    "bootstrap": ("diverse", "plain", "none"),
    "estimator": ("first_order", "exact"),
}


def default_choices(config: Config, learning_rate: float) -> Choices:
    """What ``config``'s recipe stands for, with the oracle's ``learning_rate``."""
    recipe = resolve_recipe(config)
    return Choices(
        labels=recipe.labels,
        standardisation=recipe.fit.standardisation,
        relation=recipe.fit.relation,
        share=recipe.selection.share_per_cluster,
        bootstrap=recipe.bootstrap,
        estimator="first_order",
        learning_rate=learning_rate,
    )


def make_arms(default: Choices) -> dict[str, Choices | None]:
    """All arms by name; None where nothing is learned. All but the first four and the last two change one choice of ``default``."""
    arms: dict[str, Choices | None] = {"random": None, "similarity": None, "individual": default, "group": default}
    for field, values in ALTERNATIVES.items():
        for value in values:
            if value != getattr(default, field):
                arms[f"{field}-{value}"] = dataclasses.replace(default, **{field: value})
    cheap = {"estimator": default.estimator, "learning_rate": default.learning_rate}
    return {**arms, f"paper-{default.estimator}": dataclasses.replace(PAPER, **cheap), "paper": PAPER}


def fit(features: np.ndarray, rollouts: np.ndarray, losses: np.ndarray, choices: Choices, config: Config, seed: int) -> FitResult:
    """Fit the relational model to the ``losses`` float64 ``[R, T + 1]`` of ``rollouts`` int64 ``[R, T]`` of samples with ``features``."""
    settings = dataclasses.replace(resolve_recipe(config).fit, standardisation=choices.standardisation, relation=choices.relation)
    labels = influence_labels(losses, choices.labels, config.optimizer.beta1)
    return fit_relational(features, rollouts, labels, settings, seed)


def bootstrap(model: RelationalModel, features: np.ndarray, count: int, length: int, method: str, seed: int) -> np.ndarray:
    """At most ``count`` bootstrap rollouts int64 ``[R, T]`` of samples with ``features``."""
    embeddings, individual = embed(model, features)
    return bootstrap_rollouts(embeddings, individual, model.relation_values(), count, length, method, seed)


def predict(model: RelationalModel, features: np.ndarray, rollouts: np.ndarray, relations: bool) -> np.ndarray:
    """Predicted influences ``[R, T]``; without ``relations`` those of the samples by themselves."""
    if not relations:
        return embed(model, features)[1][rollouts]
    with torch.no_grad():
        return model(torch.from_numpy(features[rollouts])).numpy()


def select(
    method: str,
    choices: Choices | None,
    model: RelationalModel | None,
    features: np.ndarray,
    reference_features: np.ndarray,
    lengths: np.ndarray,
    budget_tokens: int,
    config: Config,
    seed: int,
) -> np.ndarray:
    """Selected samples int64, ascending, of those with ``features`` and ``lengths``."""
    inputs: dict[str, Any] = {"lengths": lengths, "candidates": np.ones(len(lengths), bool), "budget_tokens": budget_tokens, "seed": seed}
    if method == "similarity":
        embeddings, reference = _centred(features, reference_features)
        inputs |= {"embeddings": embeddings, "reference_embeddings": reference}
    elif method != "random":
        assert choices is not None and model is not None
        embeddings, individual = embed(model, features)
        recipe = dataclasses.replace(resolve_recipe(config).selection, share_per_cluster=choices.share)
        inputs |= {"embeddings": embeddings, "individual": individual, "relation": model.relation_values(), "recipe": recipe}
    return select_rows(method, **inputs).rows


def embed(model: RelationalModel, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float32 ``[n, d]`` and individual influences float64 ``[n]``."""
    with torch.no_grad():
        h = model.embed(torch.from_numpy(features))
        return h.numpy(), model.individual(h).double().numpy()


def _centred(features: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features minus the pool's mean over its deviation, as the server compares them."""
    mean, std = features.mean(0), features.std(0)
    std = np.where(std > 0, std, 1.0)
    return (features - mean) / std, (reference - mean) / std
