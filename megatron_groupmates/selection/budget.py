"""Handing out a round's token budget: over clusters, and along an order of samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_groupmates.config.errors import UserError


def cluster_quotas(cluster_tokens: np.ndarray, budget_tokens: int) -> np.ndarray:
    """The same share of each cluster's tokens, rounded by largest remainder so that the sum is the budget.

    Args:
        cluster_tokens: int ``[C]``, tokens in each cluster.
        budget_tokens: tokens to hand out; everything where the clusters hold no more.

    Returns:
        int64 ``[C]``, none above its cluster's tokens; equal remainders go to the lower cluster.
    """
    check_budget(budget_tokens)
    tokens = [int(value) for value in cluster_tokens]
    total = sum(tokens)
    if budget_tokens >= total:
        return np.array(tokens, np.int64)
    # Python integers: the products exceed 64 bits for pools of trillions of tokens.
    shares = [divmod(value * budget_tokens, total) for value in tokens]
    quotas = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(tokens)), key=lambda cluster: (-shares[cluster][1], cluster))
    for cluster in by_remainder[: budget_tokens - sum(quotas)]:
        quotas[cluster] += 1
    return np.array(quotas, np.int64)


def take_equal_shares(offered: Iterable[np.ndarray], quotas: np.ndarray, budget_tokens: int) -> np.ndarray:
    """How many of its samples, in its own order, each cluster gives so that all give the same share of their tokens.

    Each cluster gives samples while they fit its quota. What all quotas together leave over is then offered to the
    clusters by the tokens that each is short of, largest first (ties: lower cluster), one sample each, until one does
    not fit. The total is at most the budget and short of it by less than that sample.

    Args:
        offered: for each cluster the tokens of its samples in order of choice, int, up to the first that does not fit its quota.
        quotas: int64 ``[C]``, from :func:`cluster_quotas`.
        budget_tokens: tokens to take at most.

    Returns:
        int64 ``[C]``.
    """
    counts = np.zeros(len(quotas), np.int64)
    refused: list[tuple[int, int, int]] = []
    remaining = budget_tokens
    for cluster, (lengths, quota) in enumerate(zip(offered, quotas.tolist(), strict=True)):
        tokens = np.cumsum(lengths, dtype=np.int64)
        count = int(np.searchsorted(tokens, quota, side="right"))
        used = int(tokens[count - 1]) if count else 0
        counts[cluster] = count
        remaining -= used
        if count < len(lengths):
            refused.append((used - quota, cluster, int(lengths[count])))
    for _, cluster, length in sorted(refused):
        if length > remaining:
            break
        counts[cluster] += 1
        remaining -= length
    return counts


def take_in_order(order: np.ndarray, lengths: np.ndarray, budget_tokens: int) -> np.ndarray:
    """The first rows of ``order`` whose tokens fit the budget; ends at the first that does not fit.

    Args:
        order: int64 rows in order of choice.
        lengths: int ``[n]``, tokens of each row.
        budget_tokens: tokens to take at most.
    """
    check_budget(budget_tokens)
    tokens = np.cumsum(np.asarray(lengths)[order], dtype=np.int64)
    return order[: np.searchsorted(tokens, budget_tokens, side="right")]


def check_budget(budget_tokens: int) -> None:
    """Raise UserError for a budget that selects nothing."""
    if budget_tokens < 1:
        raise UserError(f"the token budget is {budget_tokens}; it must be at least 1 (raise the selection ratio)")
