"""Records kept beside unfinished work: as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.formats.kept_records import keep_record, kept_path, load_record
from megatron_groupmates.pool.index import ShardRecord

RECORD = ShardRecord("a/b%.c", np.array([1, 2**40], np.uint64), np.array([3, 4], np.uint32), np.array([5, 6], np.int32), 7, "ab")


def test_as_it_was(tmp_path: Path) -> None:
    assert load_record(tmp_path, "a/b%.c", "stamp") is None
    keep_record(tmp_path, RECORD, "stamp", {"x": [1]})
    kept = load_record(tmp_path, "a/b%.c", "stamp")
    assert kept is not None
    record, more = kept
    assert (record.facts, more) == (RECORD.facts, {"x": [1]})
    for name in ("offsets", "member_bytes", "lengths"):
        found, expected = getattr(record, name), getattr(RECORD, name)
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
    assert load_record(tmp_path, "a/b%.c", "other") is None
    assert kept_path(tmp_path, "a/b") != kept_path(tmp_path, "a%2Fb")


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_truncated_one_is_none(tmp_path_factory, data: st.DataObject) -> None:
    work = tmp_path_factory.mktemp("work")
    keep_record(work, RECORD, "stamp", {})
    path = kept_path(work, RECORD.name)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert load_record(work, RECORD.name, "stamp") is None
