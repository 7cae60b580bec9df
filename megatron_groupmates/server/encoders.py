"""The encoders of a round: the one it begins with, and a text encoder that was trained with the relational model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.influence.encoder import Encoder, ProbeEncoder
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolIndex
from megatron_groupmates.server.context import RoundContext


def build_encoder(config: Config, model: Any, pool: PoolIndex, device: torch.device) -> Encoder:
    """The encoder that ``relational.encoder`` names; ``model`` is the probe's."""
    settings = config.relational
    if settings.encoder == "probe":
        return ProbeEncoder(model, config.model.hidden_size, DocumentRules.of(config, pool.eot_id))
    return HuggingFaceEncoder(settings.encoder, pool_detokeniser(pool), settings.encoder_max_tokens, device, settings.encoder_layout)


def pool_detokeniser(pool: PoolIndex) -> Callable[[list[int]], str]:
    """Token ids -> text by the tokenizer that lies beside the pool."""
    from tokenizers import Tokenizer

    path = Path(pool.file_path(TOKENIZER_FILE))
    if not path.is_file():
        raise UserError(f"relational.encoder: {pool.directory} has no tokenizer.json to turn tokens back into text; copy the pool's there")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(ids)


def trained_encoder(context: RoundContext, encoder: Encoder, model: RelationalModel) -> Encoder:
    """The encoder whose features ``model`` reads: the one that was trained with it, or else ``encoder``. Collective."""
    if model.encoder_directory is None:
        return encoder
    directory = model.encoder_directory
    return context.together(lambda: HuggingFaceEncoder.load(directory, pool_detokeniser(context.pool), context.groups.device))
