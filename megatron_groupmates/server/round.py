"""One selection round: checkpoint -> oracles -> relational model -> embeddings -> clusters -> published generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates import __version__
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, UserError, config_to_dict, server_tensor_parallel_size
from megatron_groupmates.influence.encoder import Encoder, HuggingFaceEncoder, ProbeEncoder
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.model.gpt import build_gpt
from megatron_groupmates.parallel import resolve_precision
from megatron_groupmates.pool.generation import generation_path, load_generation, publish, write_generation
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolIndex
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.learning import ORACLE_FILE, learn_influence
from megatron_groupmates.server.selecting import select_generation
from megatron_groupmates.server.stages import embed_pool, encode
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
        UserError: the checkpoint, the pool or every fit is unusable; nothing is published.
    """
    context.begin(reference_pool)
    if context.groups.broadcast_object(generation_path(context.paths.selection, context.input.number).exists()):
        return _publish(context)
    available = np.flatnonzero(~consumed)
    method = context.config.selection.method
    if method == "random":
        return _finish(context, available, None, {})

    probe, encoder = load_probe(context, reference_pool)
    if method == "similarity":
        embed_pool(context, encoder, None, available)
        examples = np.arange(min(context.config.oracle.reference_samples, reference_pool.num_samples))
        reference = encode(context, encoder, reference_pool, examples, "reference")
        return _finish(context, available, None, {}, reference)

    model, fit = learn_influence(context, probe, encoder, reference_pool, available)
    embed_pool(context, encoder, model, available)
    return _finish(context, available, model, fit)


def load_probe(context: RoundContext, reference_pool: PoolIndex) -> tuple[Probe, Encoder]:
    """The round's checkpoint as a probe, and the encoder. Collective."""
    config, groups = context.config, context.groups

    def load() -> tuple[Probe, Encoder]:
        model = build_gpt(config, groups, server_tensor_parallel_size(config), resolve_precision(config.training.precision))
        reference = load_reference(reference_pool, config.model.sequence_length, config.oracle.reference_samples, groups.device)
        rules = DocumentRules.of(config, context.pool.eot_id)
        probe = Probe(model, config, groups, reference, config.oracle.reference_batch_size, rules, context.stopwatch)
        probe.load(ZeroCheckpoint(context.input.tag_dir))
        return probe, build_encoder(config, model, context.pool, groups.device)

    with context.bookkeeping("load_checkpoint", 0.0):
        return context.together(load)


def build_encoder(config: Config, model: Any, pool: PoolIndex, device: Any) -> Encoder:
    """The encoder that ``relational.encoder`` names."""
    if config.relational.encoder == "probe":
        return ProbeEncoder(model, config.model.hidden_size, DocumentRules.of(config, pool.eot_id))
    return HuggingFaceEncoder(config.relational.encoder, pool_detokeniser(pool), config.relational.encoder_max_tokens, device)


def pool_detokeniser(pool: PoolIndex) -> Callable[[list[int]], str]:
    """Token ids -> text by the tokenizer that lies beside the pool."""
    from tokenizers import Tokenizer

    path = Path(pool.file_path(TOKENIZER_FILE))
    if not path.is_file():
        raise UserError(f"relational.encoder: {pool.directory} has no tokenizer.json to turn tokens back into text; copy the pool's there")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(ids)


def _finish(
    context: RoundContext,
    available: np.ndarray,
    model: RelationalModel | None,
    fit: dict[str, Any],
    reference_features: np.ndarray | None = None,
) -> int:
    """Select, write the generation with its provenance, publish."""
    reports = select_generation(context, available, model.relation_values() if model else None, reference_features)

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
    context.groups.barrier()
    logger.info(
        "round %d: published generation %d (%s samples of %s)",
        number,
        number,
        f"{generation.num_samples:,}",
        f"{context.pool.num_samples:,}",
    )
    return number
