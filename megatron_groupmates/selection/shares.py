"""Least shares of the budget for kinds of source, whatever the method selects by."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_groupmates.config.checks import check_share_values
from megatron_groupmates.config.errors import UserError

logger = logging.getLogger(__name__)

Choice = tuple[np.ndarray, np.ndarray]
"""Rows int64 in order of choice, and their scores float64."""

Choose = Callable[[np.ndarray | None, int], Choice]
"""(bool ``[n]``: which rows may be taken, all when None; tokens to take at most, at least 1) -> what is taken."""


def check_source_shares(shares: Mapping[str, float], kinds: Sequence[str]) -> None:
    """Raise UserError for a share of a kind that is not among ``kinds``, one below zero, or shares that sum above 1."""
    for kind in shares:
        if kind not in kinds:
            near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds) or 'none'}"
            raise UserError(f"selection.minimum_source_share: the pool has no kind of source {kind!r}; {hint}")
    check_share_values(shares)


def choose_with_shares(
    choose: Choose, kind_of: np.ndarray, kinds: Sequence[str], shares: Mapping[str, float], lengths: np.ndarray, budget_tokens: int
) -> tuple[Choice, list[dict[str, Any]]]:
    """Choose within the budget so that each kind gets its least share of it, or all it has where that is less.

    Without a need nothing changes: all rows compete first. A kind that then falls short of its share is reserved: it gets
    its share, chosen among its rows alone, and the others compete for what is left. That may make another kind fall short.

    Args:
        choose: the method. Called with the same on every rank.
        kind_of: int ``[n]``, number of each row's kind among ``kinds``; -1 for none.
        kinds: names.
        shares: least share of the budget's tokens by kind, as :func:`check_source_shares` wants them.
        lengths: int ``[n]``, tokens of each row.
        budget_tokens: tokens to take at most.

    Returns:
        The choice, what competed first and reserved kinds after it; and for each kind of ``shares`` an object: ``kind``,
        ``minimum_tokens``, ``selected_tokens`` and whether it was ``reserved``.
    """
    check_source_shares(shares, kinds)
    minimum = {kinds.index(kind): int(share * budget_tokens) for kind, share in shares.items()}
    available = {kind: int(lengths[kind_of == kind].sum()) for kind in minimum}
    reserved: dict[int, Choice] = {}
    while True:
        left = budget_tokens - sum(int(lengths[rows].sum()) for rows, _ in reserved.values())
        free = ~np.isin(kind_of, list(reserved)) if reserved else None
        rest = choose(free, left) if left >= 1 and (free is None or free.any()) else _nothing()
        rows = np.concatenate([rest[0], *(rows for rows, _ in reserved.values())])
        got = {kind: int(lengths[rows[kind_of[rows] == kind]].sum()) for kind in minimum}
        short = [kind for kind in minimum if kind not in reserved and got[kind] < min(minimum[kind], available[kind])]
        if not short:
            break
        for kind in short:
            reserved[kind] = choose(kind_of == kind, minimum[kind])
    for kind, tokens in minimum.items():
        if available[kind] < tokens:
            logger.warning(
                "selection.minimum_source_share: %s has %d tokens left where its share is %d; it gets all of them",
                kinds[kind],
                available[kind],
                tokens,
            )
    scores = np.concatenate([rest[1], *(scores for _, scores in reserved.values())])
    facts = [
        {"kind": kinds[kind], "minimum_tokens": tokens, "selected_tokens": got[kind], "reserved": kind in reserved}
        for kind, tokens in minimum.items()
    ]
    return (rows, scores), facts


def _nothing() -> Choice:
    return np.empty(0, np.int64), np.empty(0)
