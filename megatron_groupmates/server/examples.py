"""Example documents of a selection, for a person to read: those chosen first and those rejected first."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megatron_groupmates.config import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import DamagedSample, PoolReader
from megatron_groupmates.pool.tokenizer import PoolTokenizer

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 10
MAX_CHARACTERS = 600
# A token is a byte at least and a character four at most: these are enough for that many characters.
_MAX_TOKENS = 4 * MAX_CHARACTERS
_MAX_IDS_SHOWN = 100


def rejected_first(scores: np.ndarray, chosen: np.ndarray, count: int = NUM_EXAMPLES) -> np.ndarray:
    """Positions int64 of the ``count`` highest ``scores`` that are not ``chosen``, highest first, ties by position.

    Args:
        scores: float ``[n]``, of all candidates; lower is better.
        chosen: int, positions that were selected.
    """
    is_rejected = np.ones(len(scores), dtype=bool)
    is_rejected[chosen] = False
    rejected = np.flatnonzero(is_rejected)
    values = np.asarray(scores, np.float64)[rejected]
    if len(values) > count:
        # Everything from the count-th highest on, its ties included: then only these are sorted.
        enough = values >= np.partition(values, len(values) - count)[len(values) - count]
        rejected, values = rejected[enough], values[enough]
    return rejected[np.argsort(-values, kind="stable")[:count]]


def example_documents(
    pool: PoolIndex,
    chosen_rows: np.ndarray,
    chosen_scores: np.ndarray | None,
    rejected_rows: np.ndarray,
    rejected_scores: np.ndarray | None,
    count: int = NUM_EXAMPLES,
) -> dict[str, list[dict[str, Any]]]:
    """Documents for a person to judge a selection by; reads ``2 * count`` of the pool's at most.

    Args:
        pool: the pool.
        chosen_rows: pool rows int64, first chosen first.
        chosen_scores: float, one for each, lower is better; None where the method has none.
        rejected_rows: pool rows int64, first rejected first (see :func:`rejected_first`).
        rejected_scores: likewise.
        count: documents of each to show.

    Returns:
        ``{"chosen": [...], "rejected": [...]}``, each document ``{"row", "shard", "shard_row", "score", "kind", "num_tokens",
        "text"}``: pool row, shard's name and row there, score (None without), kind of source (None where unknown), tokens
        of the whole sample, and at most ``MAX_CHARACTERS`` characters of its text. Where the pool's tokenizer is missing
        or damaged, ``text`` is None and ``tokens`` holds the first ids; where the sample cannot be read, ``text`` is
        None. Examples never fail a round.
    """
    reader, tokenizer = PoolReader(pool), _tokenizer(pool)
    groups = {"chosen": (chosen_rows, chosen_scores), "rejected": (rejected_rows, rejected_scores)}
    try:
        return {
            name: [
                _document(pool, reader, tokenizer, int(row), None if scores is None else float(scores[number]))
                for number, row in enumerate(rows[:count])
            ]
            for name, (rows, scores) in groups.items()
        }
    finally:
        reader.close()


def _tokenizer(pool: PoolIndex) -> PoolTokenizer | None:
    try:
        return PoolTokenizer.of_pool(pool)
    except (OSError, UserError) as error:
        logger.warning("the example documents are shown as token ids: %s", error)
        return None


def _document(pool: PoolIndex, reader: PoolReader, tokenizer: PoolTokenizer | None, row: int, score: float | None) -> dict[str, Any]:
    shards, rows_in_shards = pool.locate(np.array([row]))
    kind = int(pool.kind_of[row])
    facts: dict[str, Any] = {
        "row": row,
        "shard": pool.shard_names[int(shards[0])],
        "shard_row": int(rows_in_shards[0]),
        "score": score,
        "kind": pool.kinds[kind] if kind >= 0 else None,
        "num_tokens": int(pool.lengths[row]),
        "text": None,
    }
    try:
        tokens = reader.read(row)
    except DamagedSample as error:
        logger.warning("an example document is left empty: %s", error)
        return facts
    if tokenizer is None:
        return {**facts, "tokens": tokens[:_MAX_IDS_SHOWN].tolist()}
    return {**facts, "text": tokenizer.decode(tokens[:_MAX_TOKENS])[:MAX_CHARACTERS]}
