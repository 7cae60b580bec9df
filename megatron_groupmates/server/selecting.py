"""The selection stage: which rows, by which method, and what the report shows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.baselines import overlap, similarities
from megatron_groupmates.selection.select import (
    Kinds,
    SelectionResult,
    choose_rows,
    group_report,
    individual_choose,
    random_choose,
    similarity_choose,
)
from megatron_groupmates.selection.shares import Choose
from megatron_groupmates.selection.store import EmbeddingStore
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext
from megatron_groupmates.server.embedding import EMBEDDINGS
from megatron_groupmates.server.examples import NUM_EXAMPLES, example_documents, rejected_first
from megatron_groupmates.server.grouping import cluster_pool, group_selection, once
from megatron_groupmates.utils.files import read_json, write_json

_HISTOGRAM_BINS = 60
_FIRST_KEPT = 1000
_SIMILARITY_CHUNK_ROWS = 1 << 17
_SCORED_ROWS = 1 << 14
_CENTRED_BY = 1 << 17
_CENTRED_ROWS = 1 << 13


def select_generation(
    context: RoundContext, available: np.ndarray, relation: Relation | None, reference_embeddings: np.ndarray | None
) -> dict[str, Any]:
    """Select among the ``available`` rows with the configured method; keeps the rows as stage ``selection``. Collective.

    The stage keeps pool rows: ``rows`` int64 ascending, and in order of choice the first ``first_rows`` int64 with
    ``first_scores`` float64 (not for ``random``).

    Args:
        context: the round, its pool embedded unless the method is ``random``.
        available: int64, pool rows that training has not consumed.
        relation: the fitted relation, for ``group`` and ``individual``.
        reference_embeddings: float32 ``[m, d]``, for ``similarity``: embedded as the pool is.

    Returns:
        What provenance says of the selection: counts, shares by kind, histogram of influences, overlap of the methods, examples.
    """
    report_path = context.directory / "selection.report.json"
    if not context.groups.broadcast_object((context.directory / "selection.npz").exists()):
        selection = _Selection(context, available, relation, reference_embeddings)
        selection.prepare()

        def collect() -> Arrays:
            arrays, report = selection.finish()
            write_json(report_path, report)
            return arrays

        context.stage("selection", collect)
    return read_json(report_path)


class _Selection:
    """One round's selection by the configured method and by those it is compared with, all with the same budget.

    Made by every rank together.
    """

    def __init__(
        self, context: RoundContext, available: np.ndarray, relation: Relation | None, reference_embeddings: np.ndarray | None
    ) -> None:
        self._context, self._available, self._relation, self._reference = context, available, relation, reference_embeddings
        self._method = context.config.selection.method
        self._seed, self._recipe = context.seed("selection"), context.recipe.selection
        self._lengths = context.pool.lengths[available].astype(np.int64)
        self._group: SelectionResult | None = None
        # A random selection is compared with nothing: nothing is embedded for it.
        self._store = None
        if self._method != "random":
            self._store = context.together(lambda: EmbeddingStore.open(context.directory / EMBEDDINGS, len(available)))
        possible = {
            "group": relation is not None,
            "individual": relation is not None,
            "random": True,
            "similarity": reference_embeddings is not None,
        }
        self._others = [name for name, can in possible.items() if can and name != self._method and self._store is not None]

    def prepare(self) -> None:
        """What all ranks do together: the group selection, and the samples' similarity to the reference. Collective."""
        methods = (self._method, *self._others)
        if "group" in methods:
            assert self._store is not None and self._relation is not None
            clusters = cluster_pool(self._context, self._store)
            with group_selection(self._context, clusters, self._lengths, self._relation) as choose:
                found = self._choose("group", choose)
            self._group = dataclasses.replace(found, report={**found.report, **group_report(clusters, self._relation, found.rows)})
        if "similarity" in methods:
            self._score_similarity()

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The arrays to keep and the report. Not collective; after :meth:`prepare`."""
        result = self._select(self._method)
        report: dict[str, Any] = {
            "counts": result.report,
            "selected_by_kind": _by_kind(self._context.pool, self._available, self._available[result.rows]),
        }
        if self._others:
            rows = {self._method: result.rows, **{name: self._select(name).rows for name in self._others}}
            report["overlap"] = overlap(rows)
            self._context.rates = {"overlap": report["overlap"]["share"][self._method]}
        if self._relation is not None:
            report["influence_histogram"] = _histogram(self._store.individual, result.rows)
        report["examples"] = self._examples(result)
        arrays = {"rows": self._available[result.rows], "first_rows": self._available[result.order[:_FIRST_KEPT]]}
        if result.scores is not None:
            arrays["first_scores"] = result.scores[:_FIRST_KEPT]
        return arrays, report

    def _select(self, method: str) -> SelectionResult:
        if method == "group":
            assert self._group is not None
            return self._group
        return self._choose(method, self._orders()[method]())

    def _orders(self) -> dict[str, Callable[[], Choose]]:
        lengths = self._lengths
        return {
            "individual": lambda: individual_choose(self._store.individual, lengths, self._recipe, self._seed),
            "random": lambda: random_choose(lengths, self._seed),
            "similarity": lambda: similarity_choose(self._context.arrays("similarity")["similarity"], lengths),
        }

    def _choose(self, method: str, choose: Choose) -> SelectionResult:
        pool = self._context.pool
        return choose_rows(
            method,
            choose,
            lengths=self._lengths,
            budget_tokens=int(self._context.config.selection.ratio * self._lengths.sum()),
            seed=self._seed,
            recipe=self._recipe,
            kinds=Kinds(kind_of=pool.kind_of[self._available], names=pool.kinds),
        )

    def _score_similarity(self) -> None:
        """Stage ``similarity``: of each available row to the reference. Collective."""
        context, store, reference = self._context, self._store, self._reference
        assert store is not None and reference is not None
        mean, std = context.together(lambda: _centre(store))

        def score(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            parts = []
            for begin in range(first, stop, _SCORED_ROWS):
                end = min(begin + _SCORED_ROWS, stop)
                parts.append(similarities((store.read(begin, end) - mean) / std, (reference - mean) / std))
                done(end - begin)
            return {"similarity": np.concatenate(parts)}

        chunks = Chunks(context, "similarity", store.num_rows, _SIMILARITY_CHUNK_ROWS)
        context.stage("similarity", chunks.collect, lambda: chunks.work(once(context, score), "sample"))

    def _examples(self, result: SelectionResult) -> dict[str, Any]:
        """Documents chosen first, and those that were left and the method's scores of single samples put last."""
        scores: np.ndarray | None = None
        if self._method == "similarity":
            scores = -self._context.arrays("similarity")["similarity"]
        elif self._store is not None:
            scores = self._store.individual
        rejected = rejected_first(np.zeros(len(self._available)) if scores is None else scores, result.rows)
        return example_documents(
            self._context.pool,
            self._available[result.order[:NUM_EXAMPLES]],
            None if result.scores is None else result.scores[:NUM_EXAMPLES],
            self._available[rejected],
            None if scores is None else scores[rejected],
        )


def _centre(store: EmbeddingStore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the embeddings' numbers, float32 ``[d]``, of all rows or of evenly spread ones of a large pool.

    Raw hidden states share one large direction that hides all differences: similarities are taken of what is left.
    """
    count = min(store.num_rows, _CENTRED_BY)
    total, squares = np.zeros(store.dim), np.zeros(store.dim)
    for first in range(0, count, _CENTRED_ROWS):
        rows = store.take(np.arange(first, min(first + _CENTRED_ROWS, count)) * store.num_rows // count).astype(np.float64)
        total += rows.sum(axis=0)
        squares += np.square(rows).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # What a column that does not vary deviates by is rounding.
    return mean.astype(np.float32), np.where(std > 1e-6 * np.abs(mean), std, 1.0).astype(np.float32)


def _by_kind(pool: Any, available: np.ndarray, rows: np.ndarray) -> dict[str, dict[str, int]]:
    names = [*pool.kinds, "unknown"]
    counts = {
        name: np.bincount(pool.kind_of[which] % len(names), minlength=len(names))
        for name, which in (("candidates", available), ("selected", rows))
    }
    return {
        name: {"selected": int(counts["selected"][number]), "candidates": int(counts["candidates"][number])}
        for number, name in enumerate(names)
        if counts["candidates"][number]
    }


def _histogram(individual: np.ndarray, selected: np.ndarray) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(individual, bins=_HISTOGRAM_BINS)
    return {
        "edges": edges.tolist(),
        "pool": np.histogram(individual, edges)[0].tolist(),
        "selected": np.histogram(individual[selected], edges)[0].tolist(),
    }
