"""One selection: candidates in, rows out, by any of the methods, all with the same token budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.baselines import individual_order, random_order, similarities, similarity_order
from megatron_groupmates.selection.budget import check_budget, take_in_order
from megatron_groupmates.selection.clustering import cluster
from megatron_groupmates.selection.merge import GroupSelection
from megatron_groupmates.selection.offers import offering
from megatron_groupmates.selection.shares import Choice, Choose, choose_with_shares
from megatron_groupmates.selection.store import ClusterStore

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
    minimum_source_share: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Least share of the budget's tokens by kind of source."""

    def __post_init__(self) -> None:
        if self.share_per_cluster not in SHARES:
            raise UserError(f"share_per_cluster is {self.share_per_cluster!r}; choose one of {', '.join(SHARES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    """Kinds of source.

    Attributes:
        kind_of: int ``[n]``, number of each row's kind; -1 for none.
        names: of the kinds.
    """

    kind_of: np.ndarray
    names: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """What a selection chose.

    Attributes:
        rows: int64, ascending.
        order: int64, the same rows in order of choice; kinds of source that got their least share come last.
        scores: float64, of each row of ``order``, lower is better: ``group`` at the moment of choice, ``individual`` the
            influence, ``similarity`` minus the similarity; None for ``random``.
        report: JSON object: method, counts and tokens, ``minimum_source_share`` where there is one, and for ``group`` size
            and chosen samples of each cluster.
    """

    rows: np.ndarray
    order: np.ndarray
    scores: np.ndarray | None
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
    kinds: Kinds | None = None,
) -> SelectionResult:
    """Select candidates worth ``budget_tokens``, to within one sample; all of them where they hold no more. In memory.

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
        kinds: of all rows of the pool; for the recipe's ``minimum_source_share``.

    Raises:
        UserError: an unknown method, no candidates, no budget, or input the method needs is missing.
    """
    _check_input(
        method, {"embeddings": embeddings, "individual": individual, "relation": relation, "reference_embeddings": reference_embeddings}
    )
    recipe, lengths = recipe or SelectionRecipe(), np.asarray(lengths, np.int64)
    rows = _candidate_rows(candidates, len(lengths))
    if kinds is not None:
        kinds = Kinds(kind_of=kinds.kind_of[rows], names=kinds.names)
    finish = functools.partial(
        choose_rows, method, lengths=lengths[rows], budget_tokens=budget_tokens, seed=seed, recipe=recipe, kinds=kinds
    )
    if method == "group":
        check_budget(budget_tokens)
        inside = embeddings[rows]
        clusters = cluster(inside, recipe.num_clusters, seed=seed, num_iterations=recipe.kmeans_iterations).labels
        store = ClusterStore.from_arrays(inside, np.asarray(individual)[rows], clusters)
        with offering(store, relation) as offer:
            found = finish(GroupSelection(store, lengths[rows], recipe.share_per_cluster, offer, relation))
        found.report.update(group_report(store, relation, found.rows))
    elif method == "individual":
        found = finish(individual_choose(np.asarray(individual)[rows], lengths[rows], recipe, seed))
    elif method == "similarity":
        found = finish(similarity_choose(similarities(embeddings[rows], reference_embeddings), lengths[rows]))
    else:
        found = finish(random_choose(lengths[rows], seed))
    return dataclasses.replace(found, rows=rows[found.rows], order=rows[found.order])


def choose_rows(
    method: str,
    choose: Choose,
    *,
    lengths: np.ndarray,
    budget_tokens: int,
    seed: int,
    recipe: SelectionRecipe,
    kinds: Kinds | None = None,
) -> SelectionResult:
    """Select by ``choose`` among rows that are all candidates, with the recipe's least shares; collective where ``choose`` is.

    Arguments and errors as :func:`select_rows`; the report says nothing of clusters, see :func:`group_report`.
    """
    check_budget(budget_tokens)
    details: dict[str, Any] = {}
    if recipe.minimum_source_share:
        if kinds is None:
            raise UserError("selection.minimum_source_share needs the kinds of source of the pool; give them or leave it out")
        shares = recipe.minimum_source_share
        (order, scores), facts = choose_with_shares(choose, kinds.kind_of, kinds.names, shares, lengths, budget_tokens)
        details["minimum_source_share"] = facts
    else:
        order, scores = choose(None, budget_tokens)
    report = {
        "method": method,
        "seed": seed,
        "recipe": {**dataclasses.asdict(recipe), "minimum_source_share": dict(recipe.minimum_source_share)},
        "budget_tokens": int(budget_tokens),
        "candidates": len(lengths),
        "candidate_tokens": int(lengths.sum()),
        "selected": len(order),
        "selected_tokens": int(lengths[order].sum()),
        **details,
    }
    return SelectionResult(rows=np.sort(order), order=order, scores=None if method == "random" else scores, report=report)


def individual_choose(individual: np.ndarray, lengths: np.ndarray, recipe: SelectionRecipe, seed: int) -> Choose:
    """Lowest ``individual`` influence float ``[n]`` first, with the recipe's Gumbel noise."""
    return _choose_in_order(individual_order(individual, recipe.gumbel_temperature, seed), np.asarray(individual, np.float64), lengths)


def similarity_choose(similarity: np.ndarray, lengths: np.ndarray) -> Choose:
    """Highest ``similarity`` float ``[n]`` first."""
    return _choose_in_order(similarity_order(similarity), -similarity, lengths)


def random_choose(lengths: np.ndarray, seed: int) -> Choose:
    """In a uniformly random order; the scores mean nothing."""
    return _choose_in_order(random_order(len(lengths), seed), np.zeros(len(lengths)), lengths)


def group_report(store: ClusterStore, relation: Relation, rows: np.ndarray) -> dict[str, Any]:
    """What a report says of a group selection that chose ``rows`` of ``store``."""
    chosen = np.zeros(len(store.rows), bool)
    chosen[rows] = True
    counts = np.concatenate([[0], np.cumsum(chosen[store.rows])])[store.offsets]
    return {
        "relation": relation.to_json(),
        "cluster_sizes": np.diff(store.offsets).tolist(),
        "cluster_selected": np.diff(counts).tolist(),
    }


def _choose_in_order(order: np.ndarray, scores: np.ndarray, lengths: np.ndarray) -> Choose:
    def choose(allowed: np.ndarray | None, budget_tokens: int) -> Choice:
        rows = take_in_order(order if allowed is None else order[allowed[order]], lengths, budget_tokens)
        return rows, scores[rows]

    return choose


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
