"""Encoding and embedding in a round: of the candidates and the reference, and of the whole pool. All are collective: every rank calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.encoder import Encoder, encode_rows
from megatron_groupmates.influence.oracle import ReadSamples
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.chunk_files import PartFiles
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext, num_inputs, sample_reader

EMBEDDINGS = "embeddings"
"""The stage of the pool's embeddings, and in the round's directory the store that they are kept in."""

# Not by the number of workers: rounding differs a little with the samples beside one, and a round must not with its workers.
_CHUNK_ROWS = 4096


def encode(context: RoundContext, encoder: Encoder, pool: PoolIndex, rows: np.ndarray, name: str) -> np.ndarray:
    """Features float32 ``[n, F]`` of ``rows`` of ``pool`` (the run's or a held-out one), encoded by all workers. Collective."""
    read_samples = sample_reader(pool, context.groups.device, context.config.model.sequence_length)

    def encode_chunk(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        return {"features": _features(context, encoder, pool, rows[first:stop], read_samples, done)}

    chunks = Chunks(context, name, len(rows), _CHUNK_ROWS)
    context.stage(name, chunks.collect, lambda: chunks.work(encode_chunk, "sample"), flops=_encoding_flops(context, pool, rows))
    return context.arrays(name)["features"]


def embed_pool(context: RoundContext, encoder: Encoder, model: RelationalModel | None, rows: np.ndarray) -> None:
    """Embed and score the pool ``rows`` that may be selected, as an ``EmbeddingStore`` in the round's ``embeddings``. Collective.

    The store's row r is the pool's ``rows[r]``. Workers share ranges of rows, which lie together in the shards, and each writes
    a range when it has embedded it: nobody holds more than one, and an interrupted stage goes on from those there are.

    Args:
        context: the round.
        encoder: whose features ``model`` reads.
        model: gives embeddings, kept as float16, and individual influences. Without one (similarity to the reference) the
            embeddings are the encoder's features, float32, and the influences zero.
        rows: int64 ``[n]``, ascending.

    Raises:
        UserError: on every rank, an embedding is not finite or a sample cannot be read.
    """

    def embed(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        features = _features(context, encoder, context.pool, rows[first:stop], context.read_samples, done)
        if model is None:
            embeddings, individual = features, np.zeros(stop - first)
        else:
            embeddings, individual = embed_features(model, features)
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                embeddings = embeddings.astype(np.float16)
        _check_finite(embeddings, individual)
        return {"embeddings": embeddings, "individual": individual}

    files = PartFiles(context.directory / EMBEDDINGS)
    chunks = Chunks(context, EMBEDDINGS, len(rows), _CHUNK_ROWS, files=files)
    context.stage(EMBEDDINGS, chunks.collect, lambda: chunks.work(embed, "sample"), flops=_encoding_flops(context, context.pool, rows))


def embed_reference(context: RoundContext, encoder: Encoder, model: RelationalModel | None, reference_pool: PoolIndex) -> np.ndarray:
    """Embeddings float32 ``[m, d]`` of the reference examples, made as :func:`embed_pool` makes the pool's. Collective."""
    examples = np.arange(min(context.config.oracle.reference_samples, reference_pool.num_samples))
    features = encode(context, encoder, reference_pool, examples, "reference")
    return features if model is None else embed_features(model, features)[0]


def embed_features(model: RelationalModel, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings h float32 ``[n, d]`` and individual influences s float64 ``[n]`` of features ``[n, F]``. Not collective."""
    with torch.no_grad():
        h = model.embed(torch.from_numpy(features))
        return h.numpy(), model.individual(h).double().numpy()


def _features(
    context: RoundContext, encoder: Encoder, pool: PoolIndex, rows: np.ndarray, read_samples: ReadSamples, done: Callable[[int], object]
) -> np.ndarray:
    """Features float32 ``[n, F]`` of ``rows`` of ``pool``, as many tokens at a time as ``embed_batch_size`` whole sequences have."""
    sequence_length = context.config.model.sequence_length
    lengths = np.minimum(pool.lengths[rows], sequence_length + 1)
    batch_tokens = context.config.server.embed_batch_size * (sequence_length + 1)
    return encode_rows(encoder, rows, lengths, read_samples, batch_tokens, done)


def _check_finite(embeddings: np.ndarray, individual: np.ndarray) -> None:
    """Raise a UserError where a number is infinite or none."""
    if not (np.isfinite(embeddings).all() and np.isfinite(individual).all()):
        raise UserError(
            "the embeddings of the pool are not all finite numbers: the checkpoint or the relational model has diverged; "
            "lower optimizer.learning_rate or relational.learning_rate, or select from an earlier checkpoint"
        )


def _encoding_flops(context: RoundContext, pool: PoolIndex, rows: np.ndarray) -> float:
    return float(num_inputs(context, pool, rows) * context.size.forward_flops_per_token)
