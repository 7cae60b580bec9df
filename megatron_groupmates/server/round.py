"""One selection round: checkpoint -> oracles -> relational model -> embeddings -> clusters -> published generation."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import numpy as np

from megatron_groupmates import __version__
from megatron_groupmates.checkpoint.opening import open_checkpoint
from megatron_groupmates.config import config_to_dict, server_tensor_parallel_size
from megatron_groupmates.influence.encoder import Encoder
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.model.gpt import build_gpt
from megatron_groupmates.parallel import resolve_precision
from megatron_groupmates.pool.generation import generation_path, load_generation, publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.selection.shares import check_source_shares
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.embedding import EMBEDDINGS, embed_pool, embed_reference
from megatron_groupmates.server.encoders import build_encoder, trained_encoder
from megatron_groupmates.server.grouping import SORTED
from megatron_groupmates.server.learning import ORACLE_FILE, learn_influence
from megatron_groupmates.server.selecting import select_generation
from megatron_groupmates.utils.files import read_json

logger = logging.getLogger(__name__)


def run_round(context: RoundContext, reference_pool: PoolIndex, consumed: np.ndarray) -> int:
    """Measure, fit, select, publish; goes on from what an earlier run of this round finished. Collective: every rank calls.

    Args:
        context: the round.
        reference_pool: D_ref.
        consumed: bool ``[num_samples]``, rows that training had consumed at the checkpoint or may never consume.

    Returns:
        Number of the generation now published.

    Raises:
        UserError: the checkpoint, the pool, every fit or a setting is unusable; nothing is published.
    """
    # Before hours of work, not after them.
    check_source_shares(context.recipe.selection.minimum_source_share, context.pool.kinds)
    context.begin(reference_pool)
    if context.groups.broadcast_object(generation_path(context.paths.selection, context.input.number).exists()):
        return _publish(context)
    available = np.flatnonzero(~consumed)
    method = context.config.selection.method
    if method == "random":
        return _finish(context, available, None, {}, None)

    probe, encoder = load_probe(context, reference_pool)
    model, fit = None, {}
    if method != "similarity":
        model, fit = learn_influence(context, probe, encoder, reference_pool, available)
        encoder = trained_encoder(context, encoder, model)
    embed_pool(context, encoder, model, available)
    reference = embed_reference(context, encoder, model, reference_pool)
    return _finish(context, available, model, fit, reference)


def load_probe(context: RoundContext, reference_pool: PoolIndex) -> tuple[Probe, Encoder]:
    """The round's checkpoint as a probe, and the encoder. Collective."""
    config, groups = context.config, context.groups

    def load() -> tuple[Probe, Encoder]:
        model = build_gpt(config, groups, server_tensor_parallel_size(config), resolve_precision(config.training.precision))
        reference = load_reference(reference_pool, config.model.sequence_length, config.oracle.reference_samples, groups.device)
        rules = DocumentRules.of(config, context.pool.eot_id)
        probe = Probe(model, config, groups, reference, config.oracle.reference_batch_size, rules, context.stopwatch)
        probe.load(open_checkpoint(config, context.input.tag_dir))
        return probe, build_encoder(config, model, context.pool, groups.device)

    with context.bookkeeping("load_checkpoint", 0.0):
        return context.together(load)


def _finish(
    context: RoundContext,
    available: np.ndarray,
    model: RelationalModel | None,
    fit: dict[str, Any],
    reference: np.ndarray | None,
) -> int:
    """Select, write the generation with its provenance, publish."""
    reports = select_generation(context, available, model.relation_values() if model else None, reference)

    oracle = context.directory / ORACLE_FILE

    def write() -> None:
        provenance = {
            "method": context.config.selection.method,
            "recipe": context.config.selection.recipe,
            "checkpoint_tag": context.input.tag,
            "checkpoint_step": context.input.step,
            "consumed_train_samples": context.input.consumed_train_samples,
            "pool_fingerprint": context.pool.fingerprint,
            **context.exclusion.provenance,
            "seed": context.config.run.seed,
            "code_version": __version__,
            "config": config_to_dict(context.config),
            "stages": context.stage_costs(),
            "fit": fit,
            "oracle": read_json(oracle) if oracle.exists() else None,
            **reports,
        }
        write_generation(context.paths.selection, context.input.number, context.pool, context.arrays("selection")["rows"], provenance)

    context.on_main(write)
    return _publish(context)


def _publish(context: RoundContext) -> int:
    number = context.input.number
    generation = load_generation(context.paths.selection, number, context.pool)
    if context.groups.is_main:
        publish(context.paths.selection, number)
        _free_disk(context)
    context.groups.barrier()
    logger.info(
        "round %d: published generation %d (%s samples of %s)",
        number,
        number,
        f"{generation.num_samples:,}",
        f"{context.pool.num_samples:,}",
    )
    return number


def _free_disk(context: RoundContext) -> None:
    """Remove what no round reads again: pools sorted by cluster, and the embeddings of all rounds but this one.

    Both are as large as all embeddings, tens of gigabytes for tens of millions of samples. Of rounds that were moved
    aside or killed too, and what a kill left half written.
    """
    for directory in context.directory.parent.glob("round-*"):
        for useless in (SORTED, f"{SORTED}.tmp-*", *([EMBEDDINGS] if directory != context.directory else [])):
            for path in directory.glob(useless):
                shutil.rmtree(path, ignore_errors=True)
