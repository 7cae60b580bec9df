"""Clusters that share a budget: sorting what they offer against the heap of next offers, and against the plain definition."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection import merge, offers
from megatron_groupmates.selection.budget import cluster_quotas
from megatron_groupmates.selection.greedy import greedy_sequence
from megatron_groupmates.selection.merge import GroupSelection, Offers, guess_limits, merge_by_heap
from megatron_groupmates.selection.offers import Task, offer, offering
from megatron_groupmates.selection.store import ArrayStore, ClusterStore, sort_by_cluster

RELATIONS = [Relation(alpha=0.9, tau=0.7), Relation(alpha=-1.0, tau=0.5), Relation(kind="additive", gamma=0.6), Relation(kind="none")]


def make_clusters(seed: int, num_rows: int, num_clusters: int, rounded: bool) -> tuple[ClusterStore, np.ndarray]:
    """Clusters with duplicates, of which some are empty and short, and lengths of the rows."""
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((num_rows, 4)).astype(np.float32)
    individual = rng.standard_normal(num_rows)
    if rounded:
        individual = np.round(individual)
        copies = rng.integers(0, -(-num_rows // 3), num_rows)
        embeddings, individual = embeddings[copies], individual[copies]
    labels = rng.integers(0, num_clusters, num_rows).astype(np.int32) * rng.integers(0, 2, num_rows)
    return ClusterStore.from_arrays(embeddings, individual, labels, num_clusters), rng.integers(1, 30, num_rows)


def plain_global(
    store: ClusterStore, lengths: np.ndarray, allowed: np.ndarray | None, budget: int, relation: Relation
) -> list[tuple[int, float]]:
    """The lowest next offer of all clusters, found by looking at all of them, until one does not fit."""
    waiting = []
    for cluster in range(store.num_clusters):
        first, stop = store.offsets[cluster : cluster + 2]
        rows, embeddings = store.rows[first:stop], store.embeddings(cluster)
        inside = np.ones(len(rows), bool) if allowed is None else allowed[rows]
        sequence = greedy_sequence(embeddings[inside], store.individual[first:stop][inside], relation)
        waiting.append([(int(rows[inside][index]), score) for index, score in sequence])
    taken: list[tuple[int, float]] = []
    while any(waiting):
        cluster = min((offers[0][1], number) for number, offers in enumerate(waiting) if offers)[1]
        row, score = waiting[cluster].pop(0)
        budget -= int(lengths[row])
        if budget < 0:
            break
        taken.append((row, score))
    return taken


def make_selection(store: ClusterStore, lengths: np.ndarray, share: str, relation: Relation, **options: Any) -> GroupSelection:
    return GroupSelection(store, lengths, share, lambda tasks: (offer(store, relation, task) for task in tasks), relation, **options)


@pytest.mark.parametrize("way", ["heap", "sorted", "guessed"])
@settings(deadline=None, max_examples=35)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0, 1.1),
    num_clusters=st.integers(1, 40),
    rounded=st.booleans(),
    masked=st.booleans(),
    relation=st.sampled_from(RELATIONS),
)
def test_global_shares_equal_the_plain_loop(
    way: str, seed: int, share: float, num_clusters: int, rounded: bool, masked: bool, relation: Relation
) -> None:
    store, lengths = make_clusters(seed, 120, num_clusters, rounded)
    allowed = np.random.default_rng(seed).random(120) < 0.6 if masked else None
    budget = max(1, int(share * lengths.sum()))
    with pytest.MonkeyPatch.context() as patch:
        if way != "heap":
            patch.setattr(merge, "_HEAP_ROWS", 0)
        if way == "guessed":
            patch.setattr(merge, "_FEW_CLUSTERS", 2)
            patch.setattr(merge, "_SAMPLED", (2, 3))
        rows, scores = make_selection(store, lengths, "global", relation)(allowed, budget)
    expected = plain_global(store, lengths, allowed, budget, relation)
    assert rows.dtype == np.int64 and scores.dtype == np.float64
    assert rows.tolist() == [row for row, _ in expected]
    np.testing.assert_array_equal(scores, [score for _, score in expected])


def test_budgets_from_one_token_to_all() -> None:
    store, lengths = make_clusters(3, 60, 7, rounded=True)
    for budget in range(1, int(lengths.sum()) + 30, 31):
        expected = plain_global(store, lengths, None, budget, RELATIONS[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, "_HEAP_ROWS", 0)
            rows, _ = make_selection(store, lengths, "global", RELATIONS[0])(None, budget)
        assert rows.tolist() == [row for row, _ in expected]


@settings(deadline=None, max_examples=150)
@given(
    sequences=st.lists(st.lists(st.integers(-3, 3), max_size=8), min_size=1, max_size=6),
    budget=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_sorting_by_running_maximum_is_the_heap(sequences: list[list[int]], budget: int, seed: int) -> None:
    starts = np.cumsum([0, *map(len, sequences)])
    lengths = np.random.default_rng(seed).integers(1, 5, starts[-1])
    offered = [zip(itertools.count(int(start)), scores, strict=False) for start, scores in zip(starts[:-1], sequences, strict=True)]
    expected = [sample for _, sample, _ in merge_by_heap([iter(offers) for offers in offered], lengths, budget)]
    scores = np.array([score for sequence in sequences for score in sequence], np.float64)
    counts = np.diff(starts)
    found = Offers.of(np.arange(len(counts)), {"count": counts, "position": np.arange(starts[-1]), "score": scores}).in_order()
    fits = np.searchsorted(np.cumsum(lengths[found.position]), budget, side="right")
    assert found.position[:fits].tolist() == expected


def test_a_limit_that_is_too_low_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    store, lengths = make_clusters(0, 200, 5, rounded=False)
    budget = int(lengths.sum()) // 2
    monkeypatch.setattr(merge, "_HEAP_ROWS", 0)
    monkeypatch.setattr(merge, "_FEW_CLUSTERS", 1)
    monkeypatch.setattr(merge, "_SAMPLED", (2, 2))
    asked: list[str] = []

    def run(name: str, total: int, compute: Callable[..., Any]) -> Any:
        asked.append(name)
        # In two parts, the second first: as several workers would.
        parts = [compute(total // 2, total, lambda count: None), compute(0, total // 2, lambda count: None)][::-1]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    expected, _ = make_selection(store, lengths, "global", RELATIONS[0])(None, budget)
    monkeypatch.setattr(merge, "guess_limits", lambda *arguments: [-np.inf, -0.5, np.inf])
    rows, _ = make_selection(store, lengths, "global", RELATIONS[0], run=run)(None, budget)
    np.testing.assert_array_equal(rows, expected)
    assert asked == ["group_1_sample", "group_1_offers_1", "group_1_offers_2", "group_1_offers_3"]


def test_guessed_limits_are_enough_for_the_budget_and_not_much_more() -> None:
    rng = np.random.default_rng(0)
    num_clusters, size = 400, 50
    scores = np.sort(rng.standard_normal((num_clusters, size)) + 0.3 * rng.standard_normal((num_clusters, 1)))
    sample = np.arange(0, num_clusters, 10)
    arrays = {"count": np.full(len(sample), size), "position": np.arange(len(sample) * size), "score": scores[sample].reshape(-1)}
    limits = guess_limits(
        Offers.of(sample, arrays), np.full(len(sample) * size, 7), sample, np.full(num_clusters, 7 * size), 7 * scores.size // 2
    )
    assert limits == sorted(limits) and limits[-1] == np.inf and len(limits) == 3
    assert 0.5 < (scores <= limits[0]).mean() < (scores <= limits[1]).mean() < 0.7
    nothing = {"count": np.zeros(2, int), "position": np.empty(0, int), "score": np.empty(0)}
    assert guess_limits(Offers.of(np.arange(2), nothing), np.empty(0), np.arange(2), np.array([3, 4]), 1) == [np.inf]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1.1), masked=st.booleans(), relation=st.sampled_from(RELATIONS))
def test_equal_shares_are_prefixes_of_each_cluster(seed: int, share: float, masked: bool, relation: Relation) -> None:
    store, lengths = make_clusters(seed, 80, 6, rounded=True)
    allowed = np.random.default_rng(seed).random(80) < 0.6 if masked else np.ones(80, bool)
    budget = max(1, int(share * lengths.sum()))
    rows, scores = make_selection(store, lengths, "equal", relation)(allowed if masked else None, budget)
    used, most = int(lengths[rows].sum()), int(lengths[allowed].sum())
    assert used <= budget and (used == most or budget - used < lengths.max())
    score_of = dict(zip(rows.tolist(), scores.tolist(), strict=True))
    tokens = []
    for first, stop in itertools.pairwise(store.offsets.tolist()):
        members = store.rows[first:stop]
        tokens.append(int(lengths[members[allowed[members]]].sum()))
    for cluster, quota in enumerate(cluster_quotas(np.array(tokens), budget).tolist()):
        first, stop = store.offsets[cluster : cluster + 2]
        members = store.rows[first:stop]
        inside = allowed[members]
        order = greedy_sequence(store.embeddings(cluster)[inside], store.individual[first:stop][inside], relation)
        whole = [(int(members[inside][index]), score) for index, score in order]
        taken = [row for row in rows.tolist() if row in set(members.tolist())]
        assert whole[: len(taken)] == [(row, score_of[row]) for row in taken]
        assert sum(int(lengths[row]) for row in taken[:-1]) <= quota


def test_processes_give_what_this_one_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    embeddings, individual = rng.standard_normal((300, 8)).astype(np.float16), rng.standard_normal(300)
    labels, lengths = rng.integers(0, 40, 300).astype(np.int32), rng.integers(1, 30, 300)
    store = sort_by_cluster(ArrayStore(embeddings, individual), labels, tmp_path / "sorted")
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_HEAP_ROWS", 0)
        for num_processes in (1, 2):
            with offering(store, RELATIONS[0], tmp_path / "sorted", num_processes) as answer:
                for share in ("equal", "global"):
                    selection = GroupSelection(store, lengths, share, answer, RELATIONS[0])
                    results.append(selection(rng.random(300) < 2, 1500))
    for one, other in zip(results[:2], results[2:], strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_a_process_that_dies_ends_the_selection_with_advice() -> None:
    class Dead:
        def map(self, function: Callable[..., Any], tasks: Any) -> Any:
            raise BrokenProcessPool("a process in the process pool was terminated abruptly")

    with pytest.raises(
        UserError, match="a process that selected within a cluster ended early, most likely for lack of memory; start fewer"
    ):
        list(offers._answers(Dead(), []))


def _hold_pool(directory: str, file: str) -> None:
    """Start a pool, write its processes' numbers, and wait to be killed."""
    with offering(ClusterStore.open(directory), RELATIONS[0], Path(directory), 2) as answer:
        list(answer(Task(cluster=cluster, allowed=None, lengths=np.ones(10, np.int64), limit=np.inf, quota=5) for cluster in (0, 1, 2)))
        Path(file).write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
        time.sleep(3600)


def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 10).astype(np.int32)
    sort_by_cluster(ArrayStore(rng.standard_normal((30, 4)).astype(np.float16), rng.standard_normal(30)), labels, tmp_path / "sorted")
    parent = multiprocessing.get_context("spawn").Process(target=_hold_pool, args=(str(tmp_path / "sorted"), str(tmp_path / "pids")))
    parent.start()
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert parent.is_alive()
        time.sleep(0.05)
    children = [psutil.Process(int(number)) for number in (tmp_path / "pids").read_text().split()]
    assert len(children) >= 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(children, timeout=120)
    for process in alive:
        process.kill()
    assert not alive
