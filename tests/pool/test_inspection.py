"""A pool in numbers: sums that add up, and shares by kind, domain and field equal to a count by hand."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.inspection import break_down, describe_pool, describe_sample, top_rows
from megatron_groupmates.pool.sources import read_sources
from tests.pool.formats.helpers import MASK, MASKS, ROWS_PER_SHARD, add_sources
from tests.pool.helpers import make_pool, tiny_tokenizer

NAMES = ("samples", "tokens", "selected_samples", "selected_tokens")


def test_counts_and_lengths(tmp_path: Path) -> None:
    lengths = [2, 3, 3, 40, 7]
    index = make_pool(tmp_path, (3, 2), samples=[np.full(length, 5) for length in lengths], member_format="json.gz")
    found = describe_pool(index)
    assert (found["shards"], found["samples"], found["tokens"], found["member_format"]) == (2, 5, 55, "json.gz")
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert {name: found["lengths"][name] for name in ("min", "median", "mean", "max")} == {"min": 2, "median": 3, "mean": 11, "max": 40}
    histogram = found["lengths"]["histogram"]
    assert [sum(first <= length <= last for length in lengths) for first, last, _ in histogram] == [count for *_, count in histogram]
    assert (histogram[0][0], histogram[-1][1], len(histogram)) == (2, 40, 10)
    assert found["tokenizer"]["name"] == "tiny" and found["tokenizer"]["vocab_size"] == 300


@pytest.mark.parametrize(("lengths", "histogram"), [([4, 4], [[4, 4, 2]]), ([4, 6], [[4, 4, 1], [5, 5, 0], [6, 6, 1]])])
def test_few_lengths(tmp_path: Path, lengths: list[int], histogram: list[list[int]]) -> None:
    index = make_pool(tmp_path, (2,), samples=[np.full(length, 5) for length in lengths])
    assert describe_pool(index)["lengths"]["histogram"] == histogram


@pytest.mark.parametrize("by", ["kind", "url.domain", "topic", "file"])
@given(mask=MASKS)
@settings(deadline=None, max_examples=10)
def test_shares_are_those_counted_by_hand(tmp_path_factory: pytest.TempPathFactory, by: str, mask: np.ndarray) -> None:
    index = make_pool(tmp_path_factory.mktemp("pool"), ROWS_PER_SHARD)
    add_sources(index)
    expected: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    row = 0
    for name in index.shard_names:
        for number, _ in enumerate(read_sources(index, name)):
            kind = int(index.kind_of[row])
            parts = {
                "kind": [(index.kinds[kind] if kind >= 0 else "(unknown)", 9)],
                "url.domain": [("a.com", 7), (f"b{number}.org", 2)],
                "topic": [("odd" if number % 2 else "even", 7), ("(unknown)", 2)],
                "file": [("f.jsonl", 9)],
            }[by]
            expected[parts[0][0]].update({"samples": 1, "selected_samples": int(mask[row])})
            for value, tokens in parts:
                expected[value].update({"tokens": tokens, "selected_tokens": tokens * int(mask[row])})
            row += 1
    found = break_down(index, by, mask)
    assert {entry["value"]: {name: entry[name] for name in entry if name != "value"} for entry in found} == {
        value: {name: counts[name] for name in ("samples", "tokens", "selected_samples", "selected_tokens")}
        for value, counts in expected.items()
    }
    assert [entry["tokens"] for entry in found] == sorted((entry["tokens"] for entry in found), reverse=True)
    assert sum(entry["samples"] for entry in found) == 16 and sum(entry["tokens"] for entry in found) == 144
    plain = break_down(index, by, None)
    assert plain == [{name: entry[name] for name in ("value", "samples", "tokens")} for entry in found]


def test_workers_find_the_same(tmp_path: Path) -> None:
    index = make_pool(tmp_path, ROWS_PER_SHARD)
    add_sources(index)
    assert break_down(index, "url.domain", MASK, num_workers=2) == break_down(index, "url.domain", MASK)


def test_the_first_rows_and_the_others_together() -> None:
    rows = [{"value": str(number), "samples": number, "tokens": 10 * number} for number in range(5, 0, -1)]
    assert top_rows(rows, 5) == rows
    assert top_rows(rows, 3) == [*rows[:3], {"value": "other (2)", "samples": 3, "tokens": 30}]


def test_breakdowns_that_cannot_be_made(tmp_path: Path) -> None:
    index = make_pool(tmp_path, ROWS_PER_SHARD)
    with pytest.raises(UserError, match=r"shard shard_00000000 of pool .* has no sources; only --by kind can be said of it"):
        break_down(index, "url.domain", None)
    add_sources(index)
    with pytest.raises(UserError, match=r"no document of pool .* has a field 'language'; say --by kind, url.domain, file, or a field"):
        break_down(index, "language", None)
    (tmp_path / "shard_00000001.meta.jsonl.zst").write_bytes((tmp_path / "shard_00000000.meta.jsonl.zst").read_bytes())
    with pytest.raises(UserError, match=r"shard_00000001.meta.jsonl.zst has 5 lines, shard shard_00000001 has 8 samples"):
        break_down(index, "file", None)


@pytest.mark.parametrize("place", ["shard_00000001:2", "7"])
def test_a_sample(tmp_path: Path, place: str) -> None:
    text = tiny_tokenizer().encode_batch(["the cat sat"])[0]
    samples = [np.arange(1, 5)] * 7 + [text] + [np.arange(1, 5)] * 8
    index = make_pool(tmp_path, ROWS_PER_SHARD, samples=samples)
    assert describe_sample(index, place)["documents"] == []
    add_sources(index)
    found = describe_sample(index, place)
    assert (found["shard"], found["row"], found["pool_row"]) == ("shard_00000001", 2, 7)
    assert (found["text"], found["tokens"], found["num_tokens"]) == ("the cat sat", text.tolist(), len(text))
    assert found["kind"] == "web"
    assert [document["url"] for document in found["documents"]] == ["http://www.a.com/x", "http://b2.org"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("x", r"--sample 'x' should be SHARD:ROW, such as shard_00000000:0, or a row of the whole pool"),
        ("shard_00000001:8", r"--sample shard_00000001:8: rows 8 to 8 are not all in shard shard_00000001, which has 8"),
        ("16", r"--sample 16: pool rows 16 to 16 are not all in range\(16\)"),
        ("nothing:1", r"has no shard 'nothing'"),
        ("-1", r"--sample '-1' should be SHARD:ROW"),
    ],
)
def test_samples_that_are_not_there(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_sample(make_pool(tmp_path, ROWS_PER_SHARD), place)
