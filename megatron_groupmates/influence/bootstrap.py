"""Bootstrap rollouts: groups that the ``init`` model predicts to be best and worst (paper section 3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.beam import DIRECTIONS, beam_search
from megatron_groupmates.influence.diverse import diverse_bootstrap
from megatron_groupmates.influence.relation import Relation

METHODS = ("plain", "diverse")


def bootstrap_rollouts(
    embeddings: np.ndarray, individual: np.ndarray, relation: Relation, count: int, num_steps: int, method: str, seed: int = 0
) -> np.ndarray:
    """Bootstrap rollouts of one round: the first half lowest (best), the second half highest (worst) predictions.

    Args:
        embeddings: float ``[N, d]`` of the candidates.
        individual: float ``[N]``.
        relation: the ``init`` model's relation.
        count: rollouts in all; an odd one is among the lowest.
        num_steps: T.
        method: ``plain`` (the paper's beam search, 5 extensions) or ``diverse``.
        seed: for ``diverse``.

    Returns:
        int64 ``[count, T]``; fewer where a beam search cannot make as many.

    Raises:
        UserError: an unknown method, or candidates that do not allow it.
    """
    if method not in METHODS:
        raise UserError(f"bootstrap method is {method!r}; choose one of {', '.join(METHODS)}")
    parts = []
    for direction, number in zip(DIRECTIONS, (count - count // 2, count // 2), strict=True):
        if method == "plain":
            part = beam_search(embeddings, individual, relation, num_steps, number, direction=direction)
        else:
            part = diverse_bootstrap(embeddings, individual, relation, num_steps, number, direction, seed=seed)
        parts.append(part)
    return np.concatenate(parts)


def bootstrap_coverage(rollouts: np.ndarray) -> dict[str, Any]:
    """How much of the candidates bootstrap rollouts touch, ready for JSON.

    Args:
        rollouts: int64 ``[R, T]``, sample numbers, none twice in a row.

    Returns:
        ``rollouts`` R, ``distinct_samples``, ``distinct_sets`` (of samples, in any sequence), ``max_uses`` (rollouts of the
        sample that is in most) and ``uses``: how many samples are in exactly 1, 2, 3 ... ``max_uses`` rollouts.
    """
    uses = np.unique(rollouts, return_counts=True)[1]
    return {
        "rollouts": len(rollouts),
        "distinct_samples": len(uses),
        "distinct_sets": len(np.unique(np.sort(rollouts, axis=1), axis=0)),
        "max_uses": int(uses.max(initial=0)),
        "uses": np.bincount(uses)[1:].tolist(),
    }
