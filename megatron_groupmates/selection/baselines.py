"""Orders of choice without relations, and the overlap of selections (paper figure 1a)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_groupmates.config.errors import UserError


def random_order(num_samples: int, seed: int) -> np.ndarray:
    """A uniformly random order of ``num_samples`` rows, int64."""
    return np.random.default_rng(seed).permutation(num_samples)


def individual_order(individual: np.ndarray, temperature: float = 0.0, seed: int = 0) -> np.ndarray:
    """Rows by individual influence, lowest first, ties by row; int64 ``[n]``.

    Args:
        individual: float ``[n]``.
        temperature: above 0: Gumbel top-k as in MATES, i.e. a random order whose first k rows are drawn without
            replacement with probabilities proportional to exp(-individual / temperature).
        seed: for the Gumbel noise.
    """
    individual = np.asarray(individual, np.float64)
    if temperature < 0:
        raise UserError(f"the Gumbel temperature is {temperature}; it must be at least 0")
    if temperature > 0:
        individual = individual - temperature * np.random.default_rng(seed).gumbel(size=individual.shape)
    return np.argsort(individual, kind="stable")


def similarity_order(similarity: np.ndarray) -> np.ndarray:
    """Rows by their :func:`similarities` ``[n]``, highest first, ties by row; int64 ``[n]``."""
    return np.argsort(-similarity, kind="stable")


def similarities(embeddings: np.ndarray, reference_embeddings: np.ndarray) -> np.ndarray:
    """Mean cosine of each row to the reference examples, float64 ``[n]``; of a row of zeros, 0.

    Args:
        embeddings: float ``[n, d]``.
        reference_embeddings: float ``[m, d]`` of the same encoder.
    """
    if embeddings.shape[1] != reference_embeddings.shape[1] or not len(reference_embeddings):
        raise UserError(
            f"embeddings have shape {list(embeddings.shape)} and reference embeddings "
            f"{list(reference_embeddings.shape)}; embed at least one reference example by the same encoder"
        )
    direction = _unit(reference_embeddings).mean(axis=0)
    # Row by row and in float64, so that equal samples tie whatever the number of rows.
    parts = [np.vecdot(_unit(embeddings[start : start + 8192]), direction) for start in range(0, len(embeddings), 8192)]
    return np.concatenate([np.empty(0), *parts])


def overlap(selections: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
    """How much selections share: ``[measure][one][other]``.

    ``jaccard`` is the number of common rows over that of rows in either; ``share`` the part of ``one`` that is also in
    ``other``. Two empty selections overlap wholly.
    """
    rows = {name: np.unique(selected) for name, selected in selections.items()}
    common = {one: {other: len(np.intersect1d(rows[one], rows[other], assume_unique=True)) for other in rows} for one in rows}
    union = {one: {other: len(rows[one]) + len(rows[other]) - common[one][other] for other in rows} for one in rows}
    return {
        "jaccard": {one: {other: _ratio(common[one][other], union[one][other]) for other in rows} for one in rows},
        "share": {one: {other: _ratio(common[one][other], len(rows[one])) for other in rows} for one in rows},
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _unit(rows: np.ndarray) -> np.ndarray:
    """float64 copy with rows of unit length; rows of zeros stay."""
    rows = np.array(rows, np.float64, order="C")
    norms = np.sqrt(np.vecdot(rows, rows))[:, None]
    return np.divide(rows, norms, out=rows, where=norms > 0)
