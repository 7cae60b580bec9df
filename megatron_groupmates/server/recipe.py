"""From the run's settings to those of each stage: what ``recipe: paper`` and ``recipe: default`` stand for."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_groupmates.config import Config
from megatron_groupmates.influence.fit import FitSettings
from megatron_groupmates.selection.select import SelectionRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The method's choices, resolved; recorded in every generation.

    Attributes:
        labels: ``increments`` or ``momentum_corrected``.
        bootstrap: ``plain`` beam search or ``diverse``.
        fit: settings of both fits.
        selection: settings of the group selection.
    """

    labels: str
    bootstrap: str
    fit: FitSettings
    selection: SelectionRecipe


def resolve_recipe(config: Config) -> Recipe:
    """Fill in what ``auto`` stands for.

    The default recipe corrects labels for momentum and standardises them per position (without either, a fit can come
    out with its sign flipped), draws diverse bootstrap rollouts (a plain beam ends in near-permutations of one set) and
    lets clusters compete for one budget (equal shares force junk clusters in).
    """
    paper = config.selection.recipe == "paper"
    settings = config.relational
    labels = settings.labels if settings.labels != "auto" else "increments" if paper else "momentum_corrected"
    standardisation = settings.standardisation if settings.standardisation != "auto" else "pooled" if paper else "per_position"
    relation = settings.relation if settings.relation != "auto" else "product"
    fit = FitSettings(
        # The paper's embeddings are the encoder's own; the probe's features need the projection to be compared at all.
        embedding_dim=None if paper and settings.encoder != "probe" else settings.embedding_dim,
        relation=relation,
        standardisation=standardisation,
        learning_rate=3e-3 if settings.learning_rate is None else settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        epochs=settings.epochs,
        batch_rollouts=settings.batch_rollouts,
        held_out_fraction=settings.held_out_fraction,
    )
    selection = SelectionRecipe(
        share_per_cluster="equal" if paper else "global",
        num_clusters=config.selection.num_clusters,
        kmeans_iterations=config.selection.kmeans_iterations,
        gumbel_temperature=config.selection.gumbel_temperature,
    )
    return Recipe(labels=labels, bootstrap="plain" if paper else "diverse", fit=fit, selection=selection)
