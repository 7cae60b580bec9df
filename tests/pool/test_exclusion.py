"""Exclusions: the file, and that no order ever serves an excluded row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.exclusion import Exclusion, load_exclusion, open_exclusion, write_exclusion
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.rowset import pack_rows
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool

ROWS = [11, 0, 4, 5, 12]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool")
    digest = write_exclusion(tmp_path / "exclude.json", index, np.array([*ROWS, 4]), {"tool": "test"})
    exclusion = open_exclusion(tiny_config(data={"exclude": str(tmp_path / "exclude.json")}), index)
    assert np.flatnonzero(exclusion.mask).tolist() == sorted(ROWS)
    assert exclusion.provenance == {"exclusion": {"digest": digest, "num_samples": 5}}
    shards = json.loads((tmp_path / "exclude.json").read_text())["shards"]
    assert shards == [["shard_00000000", [0, 4]], ["shard_00000001", [0, 6, 7]]]


def test_nothing_is_excluded_by_default_or_by_an_empty_file(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool")
    assert open_exclusion(tiny_config(), index) == Exclusion() and Exclusion().provenance == {}
    write_exclusion(tmp_path / "exclude.json", index, np.empty(0, dtype=np.int64), {})
    assert not load_exclusion(tmp_path / "exclude.json", index).mask.any()


def change(facts: dict[str, Any]) -> str:
    return json.dumps({**facts, "num_samples": 7})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda facts: "{", r"exclude.json is damaged: .*; make it again"),
        (lambda facts: "[]", r"exclude.json is not an exclusion file of version 1"),
        (lambda facts: json.dumps({**facts, "version": 2}), r"exclude.json is not an exclusion file of version 1"),
        (change, r"exclude.json is damaged: its content has digest [0-9a-f]+, it says [0-9a-f]+"),
        (None, r"data.exclude: there is no exclusion file .*exclude.json; make one with tools/check_contamination.py"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    index = make_pool(tmp_path / "pool")
    path = tmp_path / "exclude.json"
    write_exclusion(path, index, np.array(ROWS), {})
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match=message):
        open_exclusion(tiny_config(data={"exclude": str(path)}), index)


def test_other_pools_and_whole_pools_are_refused(tmp_path: Path) -> None:
    index, other = make_pool(tmp_path / "pool"), make_pool(tmp_path / "other", seed=1)
    path = tmp_path / "exclude.json"
    write_exclusion(path, index, np.array(ROWS), {})
    with pytest.raises(
        UserError, match=rf"was made for another pool: its fingerprint is {index.fingerprint}, that of .* is {other.fingerprint}"
    ):
        load_exclusion(path, other)
    write_exclusion(path, index, np.arange(16), {})
    with pytest.raises(UserError, match=r"excludes all 16 samples of .*; none is left to train on"):
        load_exclusion(path, index)


@st.composite
def excluded_runs(draw: st.DrawFn) -> tuple[SampleOrder, SampleOrder, np.ndarray, np.ndarray]:
    """The order of a run with an exclusion, that of the same run on a pool that never had those rows, the excluded rows and
    the rows of the smaller pool; adoptions at random samples, epochs whenever rows run out."""
    num_rows = draw(st.integers(2, 40))
    excluded = np.array(draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
    excluded[draw(st.integers(0, num_rows - 1))] = False
    left = np.flatnonzero(~excluded)
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    masks = {0: np.ones(num_rows, dtype=bool)}
    order = SampleOrder(num_rows, 3, [LogEntry(0, 0, 0, "")], masks, excluded=excluded)
    smaller = SampleOrder(len(left), 3, [LogEntry(0, 0, 0, "")], {0: np.ones(len(left), dtype=bool)})
    for number in range(1, draw(st.integers(1, 5))):
        masks[number] = generator.random(num_rows) < 0.6
        masks[number][generator.choice(left)] = True
        for _ in range(draw(st.integers(0, 3))):
            entry = next_epoch_entry(order)
            assert entry == next_epoch_entry(smaller)
            order, smaller = order.extended(entry, masks[entry.generation]), smaller.extended(entry, masks[entry.generation][left])
        last = order.entries[-1]
        at = draw(st.integers(last.effective_sample, order.exhausted_at()))
        entry = LogEntry(number, at, last.epoch, "")
        order, smaller = order.extended(entry, masks[number]), smaller.extended(entry, masks[number][left])
    return order, smaller, excluded, left


@settings(deadline=None, max_examples=200)
@given(run=excluded_runs())
def test_an_order_is_that_of_a_pool_without_the_excluded_rows(run: tuple[SampleOrder, SampleOrder, np.ndarray, np.ndarray]) -> None:
    order, smaller, excluded, left = run
    assert order.exhausted_at() == smaller.exhausted_at()
    rows, generations = order.rows(0, order.exhausted_at())
    fewer, same = smaller.rows(0, order.exhausted_at())
    assert not excluded[rows].any()
    assert rows.tolist() == left[fewer].tolist() and generations.tolist() == same.tolist()
    consumed = order.consumed(order.exhausted_at())
    assert consumed[excluded].all() and consumed[left].tolist() == smaller.consumed(order.exhausted_at()).tolist()


def test_a_generation_of_excluded_rows_alone_is_refused() -> None:
    masks = {0: np.ones(4, dtype=bool), 1: np.array([True, False, False, True])}
    excluded = masks[1]
    order = SampleOrder(4, 0, [LogEntry(0, 0, 0, "")], masks, excluded=excluded)
    allows = [order.preparation(0).allows(pack_rows(mask), np.ones(4)) for mask in masks.values()]
    assert allows == [True, False]
    with pytest.raises(UserError, match=r"generation 1 selects only samples that data.exclude forbids; select others"):
        order.extended(LogEntry(1, 1, 0, ""), masks[1])


def test_excluding_nothing_changes_nothing() -> None:
    masks = {0: np.ones(20, dtype=bool)}
    plain = SampleOrder(20, 0, [LogEntry(0, 0, 0, "")], masks)
    empty = SampleOrder(20, 0, [LogEntry(0, 0, 0, "")], masks, excluded=np.zeros(20, dtype=bool))
    assert plain.rows(0, 20)[0].tolist() == empty.rows(0, 20)[0].tolist()
