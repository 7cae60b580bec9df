"""The pure functions that divide a build: cells, shards, deals, kinds, scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from megatron_groupmates.pool.preprocess import plan
from megatron_groupmates.pool.preprocess.plan import (
    cell_starts,
    cells_of,
    count_cells,
    count_shards,
    deal,
    duplicates,
    merge_kinds,
    order_in_cell,
    score_at_rank,
    shards_of_cell,
)


def test_number_of_cells_follows_the_size_of_the_ids() -> None:
    assert count_cells([], 2, 100) == count_cells([("a.jsonl", 10)], 2, 100) == 1
    assert count_cells([("a.jsonl", 5000)], 2, 100) == 20
    assert count_cells([("a.jsonl", 5000)], 4, 100) == 40
    assert count_cells([("a.jsonl.zst", 5000), ("b.jsonl.gz", 1000)], 2, 100) == 60
    assert count_cells([("a.jsonl", 1 << 50)], 2, 1) == plan.MAX_CELLS


def test_cells_are_frozen() -> None:
    """A change of these numbers would change every pool."""
    assert cells_of(0, "a.jsonl", 0, 12, 10).tolist() == [8, 6, 9, 0, 7, 6, 9, 6, 9, 7, 7, 8]
    assert order_in_cell(3, 7, np.arange(10), 10).tolist() == [2, 8, 4, 6, 5, 3, 0, 1, 9, 7]


@given(st.integers(0, 2**63), st.integers(0, 10**12), st.integers(0, 50), st.integers(0, 50), st.integers(1, plan.MAX_CELLS))
@settings(deadline=None, max_examples=60)
def test_cells_do_not_depend_on_where_a_batch_ends(seed: int, first: int, count: int, cut: int, num_cells: int) -> None:
    whole = cells_of(seed, "f", first, count + cut, num_cells)
    parts = [cells_of(seed, "f", first, count, num_cells), cells_of(seed, "f", first + count, cut, num_cells)]
    assert whole.tolist() == np.concatenate(parts).tolist()
    assert all(0 <= cell < num_cells for cell in whole.tolist())


def test_cells_are_equally_likely_whatever_file_and_seed() -> None:
    """Chi-squared of 100 cells: mean 99, standard deviation 14."""
    for seed, name in ((0, "a"), (1, "a"), (0, "b/c.jsonl.zst")):
        counts = np.bincount(cells_of(seed, name, 0, 100_000, 100), minlength=100)
        assert 40 < ((counts - 1000) ** 2 / 1000).sum() < 170
    same = cells_of(0, "a", 0, 10_000, 10) == cells_of(1, "a", 0, 10_000, 10)
    assert 800 < same.sum() < 1200


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 40))
@settings(deadline=None)
def test_every_shard_begins_in_one_cell(samples_per_cell: list[int], samples_per_shard: int) -> None:
    starts = cell_starts(np.array(samples_per_cell))
    assert np.diff(starts).tolist() == samples_per_cell
    num_shards = count_shards(int(starts[-1]), samples_per_shard)
    owners = {}
    for cell in range(len(samples_per_cell)):
        for shard in shards_of_cell(starts, cell, samples_per_shard):
            assert starts[cell] <= shard * samples_per_shard < starts[cell + 1]
            assert owners.setdefault(shard, cell) == cell
    assert sorted(owners) == list(range(num_shards))
    assert (num_shards - 1) * samples_per_shard < max(starts[-1], 1) <= max(num_shards, 1) * samples_per_shard


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
@settings(deadline=None)
def test_deals_are_complete_and_fair(sizes: list[int], world_size: int) -> None:
    hands = deal(sizes, world_size)
    assert len(hands) == world_size
    assert sorted(item for hand in hands for item in hand) == list(range(len(sizes)))
    loads = [sum(sizes[item] + 1 for item in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=-1) + 1
    assert all([sizes[item] for item in hand] == sorted((sizes[item] for item in hand), reverse=True) for hand in hands)
    assert deal(sizes, world_size) == hands


def test_duplicates_are_those_of_the_first() -> None:
    assert duplicates(["a", "b", "a", "c", "b", "a"]) == [None, None, 0, None, 1, 0]


@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9)), max_size=6), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_kinds_keep_their_names_by_number_of_samples(files: list[dict[str, int]], limit: int) -> None:
    names, numbers = merge_kinds(files, limit)
    seen = list(dict.fromkeys(kind for kinds in files for kind in kinds))
    totals = {kind: sum(kinds.get(kind, 0) for kinds in files) for kind in seen}
    assert len(names) <= limit
    if len(seen) <= limit:
        assert names == seen
    else:
        kept = sorted(seen, key=lambda kind: (-totals[kind], seen.index(kind)))[: limit - 1]
        assert names == [kind for kind in seen if kind in kept] + ["(other)"]
    for kinds, found in zip(files, numbers, strict=True):
        assert found.dtype == np.int16
        assert [names[number] for number in found] == [kind if kind in names else "(other)" for kind in kinds]


@given(
    st.lists(npst.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=False)), min_size=1, max_size=5), st.data()
)
@settings(deadline=None, max_examples=150)
def test_score_at_rank_equals_sorting(scores: list[np.ndarray], data: st.DataObject) -> None:
    everything = np.sort(np.concatenate(scores))[::-1]
    if len(everything):
        rank = data.draw(st.integers(1, len(everything)))
        assert score_at_rank(scores, rank) == everything[rank - 1]


@pytest.mark.parametrize("rank", [1, 500, 1000])
def test_score_at_rank_of_near_scores(rank: int) -> None:
    scores = (np.random.default_rng(0).random(1000) * 1e-3 + 0.5).astype(np.float32)
    assert score_at_rank(np.array_split(scores, 7), rank) == np.sort(scores)[-rank]
