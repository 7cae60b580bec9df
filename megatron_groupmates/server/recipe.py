"""From the run's settings to those of each stage: what ``recipe: paper`` and ``recipe: default`` stand for."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_groupmates.config import Config
from megatron_groupmates.config.sections import RelationalConfig
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.selection.select import SelectionRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The method's choices, resolved; recorded in every generation.

    Attributes:
        labels: ``increments`` or ``momentum_corrected``.
        bootstrap: ``plain`` beam search or ``diverse``.
        finetune_encoder: the text encoder is trained with the relational model.
        fit: settings of both fits.
        selection: settings of the group selection.
    """

    labels: str
    bootstrap: str
    finetune_encoder: bool
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
    finetune = _finetunes(settings)
    fit = FitSettings(
        # A trained encoder's features are the embeddings, as in the paper; a frozen one's need the projection to fit the task.
        embedding_dim=None if finetune else settings.embedding_dim,
        relation=relation,
        standardisation=standardisation,
        learning_rate=(5e-5 if finetune else 3e-3) if settings.learning_rate is None else settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        epochs=(5 if paper or finetune else 30) if settings.epochs is None else settings.epochs,
        batch_rollouts=settings.batch_rollouts,
        held_out_fraction=settings.held_out_fraction,
    )
    share = config.selection.share_per_cluster if config.selection.share_per_cluster != "auto" else "equal" if paper else "global"
    selection = SelectionRecipe(
        share_per_cluster=share,
        num_clusters=config.selection.num_clusters,
        kmeans_iterations=config.selection.kmeans_iterations,
        gumbel_temperature=config.selection.gumbel_temperature,
        minimum_source_share=config.selection.minimum_source_share or {},
    )
    return Recipe(
        labels=labels,
        bootstrap=config.oracle.bootstrap if config.oracle.bootstrap != "auto" else "plain" if paper else "diverse",
        finetune_encoder=finetune,
        fit=fit,
        selection=selection,
    )


def _finetunes(settings: RelationalConfig) -> bool:
    """Whether an encoder is trained: a text encoder is unless told otherwise, the probe never."""
    return settings.encoder != "probe" and settings.finetune_encoder != "no"
