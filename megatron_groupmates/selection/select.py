"""One selection: candidates in, rows out, by any of the methods, all with the same token budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.baselines import individual_order, random_order, similarity_order
from megatron_groupmates.selection.budget import check_budget, take_equal_shares, take_in_order
from megatron_groupmates.selection.clustering import cluster
from megatron_groupmates.selection.greedy import greedy_global, greedy_sequence, members_of_clusters

METHODS = ("group", "individual", "random", "similarity")
SHARES = ("equal", "global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionRecipe:
    """Choices of a selection beyond its method."""

    share_per_cluster: str = "global"
    """``group``: ``equal`` (paper) takes the same share of each cluster, ``global`` lets clusters compete."""
    num_clusters: int | None = None
    """``group``: clusters of the candidates; by their number when None."""
    kmeans_iterations: int = 100
    gumbel_temperature: float = 0.0
    """``individual``: 0 takes the lowest influences."""

    def __post_init__(self) -> None:
        if self.share_per_cluster not in SHARES:
            raise UserError(f"share_per_cluster is {self.share_per_cluster!r}; choose one of {', '.join(SHARES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """What a selection chose.

    Attributes:
        rows: int64, ascending.
        order: int64, the same rows in order of choice; cluster after cluster where clusters have quotas.
        report: JSON object: method, counts and tokens, and for ``group`` size and chosen samples of each cluster.
    """

    rows: np.ndarray
    order: np.ndarray
    report: dict[str, Any]


def select_rows(
    method: str,
    *,
    lengths: np.ndarray,
    candidates: np.ndarray,
    budget_tokens: int,
    seed: int,
    recipe: SelectionRecipe | None = None,
    embeddings: np.ndarray | None = None,
    individual: np.ndarray | None = None,
    relation: Relation | None = None,
    reference_embeddings: np.ndarray | None = None,
) -> SelectionResult:
    """Select candidates worth ``budget_tokens``, to within one sample; all of them where they hold no more.

    Args:
        method: one of ``METHODS``.
        lengths: int ``[n]``, tokens of each row of the pool.
        candidates: bool ``[n]`` or integer rows: what training has not consumed.
        budget_tokens: tokens to take at most.
        seed: of clustering, random order and Gumbel noise.
        recipe: its defaults when None.
        embeddings: float ``[n, d]`` of the whole pool; for ``group`` and ``similarity``.
        individual: float ``[n]`` of the whole pool; for ``group`` and ``individual``.
        relation: the fitted relation; for ``group``.
        reference_embeddings: float ``[m, d]``; for ``similarity``.

    Raises:
        UserError: an unknown method, no candidates, no budget, or input the method needs is missing.
    """
    _check_input(
        method, {"embeddings": embeddings, "individual": individual, "relation": relation, "reference_embeddings": reference_embeddings}
    )
    check_budget(budget_tokens)
    recipe, lengths = recipe or SelectionRecipe(), np.asarray(lengths, np.int64)
    rows = _candidate_rows(candidates, len(lengths))
    tokens = lengths[rows]
    details: dict[str, Any] = {}
    if method == "group":
        chosen, details = _select_group(embeddings[rows], np.asarray(individual)[rows], tokens, budget_tokens, relation, recipe, seed)
    elif method == "individual":
        order = individual_order(np.asarray(individual)[rows], recipe.gumbel_temperature, seed)
        chosen = take_in_order(order, tokens, budget_tokens)
    elif method == "similarity":
        chosen = take_in_order(similarity_order(embeddings[rows], reference_embeddings), tokens, budget_tokens)
    else:
        chosen = take_in_order(random_order(len(rows), seed), tokens, budget_tokens)
    report = {
        "method": method,
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "budget_tokens": int(budget_tokens),
        "candidates": len(rows),
        "candidate_tokens": int(tokens.sum()),
        "selected": len(chosen),
        "selected_tokens": int(tokens[chosen].sum()),
        **details,
    }
    return SelectionResult(rows=np.sort(rows[chosen]), order=rows[chosen], report=report)


def _select_group(
    embeddings: np.ndarray,
    individual: np.ndarray,
    lengths: np.ndarray,
    budget_tokens: int,
    relation: Relation,
    recipe: SelectionRecipe,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    clusters = cluster(embeddings, recipe.num_clusters, seed=seed, num_iterations=recipe.kmeans_iterations).labels
    if recipe.share_per_cluster == "global":
        chosen = greedy_global(embeddings, individual, clusters, lengths, budget_tokens, relation)
    else:
        members = members_of_clusters(clusters)
        # A generator: a cluster's embeddings are gathered when its turn comes, and let go after it.
        sequences = (_rows_in_order(rows, embeddings, individual, relation) for rows in members)
        cluster_tokens = np.array([lengths[rows].sum() for rows in members])
        taken = take_equal_shares(sequences, lengths, cluster_tokens, budget_tokens)
        chosen = np.array([row for part in taken for row in part], np.int64)
    sizes = np.bincount(clusters)
    return chosen, {
        "relation": relation.to_json(),
        "cluster_sizes": sizes.tolist(),
        "cluster_selected": np.bincount(clusters[chosen], minlength=len(sizes)).tolist(),
    }


def _rows_in_order(rows: np.ndarray, embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> Iterator[int]:
    for index, _ in greedy_sequence(embeddings[rows], individual[rows], relation):
        yield int(rows[index])


def _candidate_rows(candidates: np.ndarray, num_rows: int) -> np.ndarray:
    """Ascending int64 rows of a mask or of integer rows in any order."""
    candidates = np.asarray(candidates)
    if candidates.dtype == bool:
        if candidates.shape != (num_rows,):
            raise UserError(f"the mask of candidates has shape {list(candidates.shape)} but the pool {num_rows} rows")
        rows = np.flatnonzero(candidates)
    else:
        rows = np.unique(candidates).astype(np.int64)
        if len(rows) and not 0 <= rows[0] <= rows[-1] < num_rows:
            raise UserError(f"candidate rows reach from {rows[0]} to {rows[-1]} but the pool has {num_rows} rows")
    if not len(rows):
        raise UserError("there are no candidates: training has consumed the whole pool; start a new epoch or add data")
    return rows


def _check_input(method: str, given: dict[str, Any]) -> None:
    needs = {
        "group": ("embeddings", "individual", "relation"),
        "individual": ("individual",),
        "random": (),
        "similarity": ("embeddings", "reference_embeddings"),
    }
    if method not in needs:
        raise UserError(f"selection method is {method!r}; choose one of {', '.join(METHODS)}")
    missing = [name for name in needs[method] if given[name] is None]
    if missing:
        raise UserError(f"selection method {method} needs {' and '.join(missing)}; give it or choose another method")
