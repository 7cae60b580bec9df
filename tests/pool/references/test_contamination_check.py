"""The check of a whole pool: what it writes, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.exclusion import load_exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references import contamination_check
from megatron_groupmates.pool.references.contamination_check import check_contamination, read_shard
from megatron_groupmates.utils.files import sha256_bytes
from tests.pool.helpers import change_facts, make_pool

NGRAM = 8
ROWS = (6, 9, 5)


def make_all(root: Path, member_format: str = "raw", vocab_size: int = 300) -> list[str]:
    """``root/pool``, in which rows 2, 11 and 12 hold passages of ``root/one`` and row 17 one of ``root/two``."""
    generator = np.random.default_rng(0)
    samples = list(generator.integers(0, vocab_size, (sum(ROWS), 40)))
    samples[5] = samples[5][:4]
    one, two = generator.integers(0, vocab_size, (4, 30)), generator.integers(0, vocab_size, (3, 30))
    for row in (2, 11, 12):
        samples[row][3:13] = one[1][10:20]
    samples[12][20:30] = one[3][:10]
    samples[17][-9:] = two[2][-9:]
    make_pool(root / "pool", ROWS, samples=samples, member_format=member_format, vocab_size=vocab_size)
    make_pool(root / "one", (4,), samples=[*one[:3], one[3]], vocab_size=vocab_size)
    make_pool(root / "two", (3,), samples=[two[0][:5], *two[1:]], vocab_size=vocab_size)
    return [str(root / "one"), str(root / "two")]


def overlaps(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "overlaps.jsonl").read_text().splitlines()]


def rows_of(output: Path) -> list[tuple[str, int, int]]:
    return [(line["shard"][-1], line["row"], line["overlapping"]) for line in overlaps(output)]


@pytest.mark.parametrize(("member_format", "vocab_size"), [("raw", 300), ("raw", 100_000), ("json.gz", 300)])
def test_overlapping_samples_are_listed_and_excluded(tmp_path: Path, member_format: str, vocab_size: int) -> None:
    references = make_all(tmp_path, member_format, vocab_size)
    summary = check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)
    assert rows_of(tmp_path / "out") == [("0", 2, 3), ("1", 5, 3), ("1", 6, 6), ("2", 2, 2)]
    both = overlaps(tmp_path / "out")[2]
    assert both["examples"] == [[references[0], "shard_00000000", row] for row in (1, 3)]
    assert (both["ngrams"], both["fraction"]) == (33, round(6 / 33, 6))
    assert (summary["overlapping_samples"], summary["overlapping_ngrams"], summary["samples"]) == (4, 14, 20)
    touched = [(facts["examples"], facts["examples_touched"], facts["examples_too_short"]) for facts in summary["references"].values()]
    assert touched == [(4, 2, 0), (3, 1, 1)]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    exclusion = load_exclusion(tmp_path / "out" / "exclude.json", PoolIndex.open(tmp_path / "pool"))
    assert np.flatnonzero(exclusion.mask).tolist() == [2, 11, 12, 17] and exclusion.digest == summary["exclusion_digest"]


def test_nothing_shared_excludes_nothing(tmp_path: Path) -> None:
    references = make_all(tmp_path)
    summary = check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=20)
    assert summary["overlapping_samples"] == 0 and overlaps(tmp_path / "out") == []
    assert load_exclusion(tmp_path / "out" / "exclude.json", PoolIndex.open(tmp_path / "pool")).num_samples == 0


def test_common_ngrams_are_left_out_without_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = make_all(tmp_path)
    check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)
    monkeypatch.setattr(contamination_check, "_search", lambda *_: pytest.fail("searched again"))
    summary = check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM, max_pool_count=2)
    assert rows_of(tmp_path / "out") == [("1", 6, 3), ("2", 2, 2)]
    assert (summary["common_ngrams"], summary["max_pool_count"]) == (3, 2)
    assert summary["references"][references[0]]["examples_touched"] == 1


def test_a_killed_check_searches_only_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = make_all(tmp_path)
    check_contamination(tmp_path / "pool", references, tmp_path / "whole", ngram=NGRAM)
    search, searched = contamination_check._search, []

    def die_at_the_second(index: PoolIndex, ngrams: Any, directory: Path, shard: int) -> int:
        searched.append(shard)
        if searched == [0, 1]:
            raise KeyboardInterrupt
        return search(index, ngrams, directory, shard)

    monkeypatch.setattr(contamination_check, "_search", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)
    check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)
    assert searched == [0, 1, 1, 2]
    for name in ("overlaps.jsonl", "summary.json", "exclude.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    references = make_all(tmp_path)
    one = check_contamination(tmp_path / "pool", references, tmp_path / "one-process", ngram=NGRAM)
    two = check_contamination(tmp_path / "pool", references, tmp_path / "two-processes", ngram=NGRAM, num_workers=2)
    assert one == two and rows_of(tmp_path / "one-process") == rows_of(tmp_path / "two-processes")


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
@pytest.mark.parametrize("lengths", [[9] * 16, list(range(1, 17))])
def test_a_shard_is_read_as_the_reader_reads_it(tmp_path: Path, member_format: str, lengths: list[int]) -> None:
    samples = [np.random.default_rng(length).integers(0, 300, length) for length in lengths]
    index = make_pool(tmp_path, (5, 8, 3), samples=samples, member_format=member_format)
    for shard in range(3):
        tokens, found = read_shard(index, shard)
        rows = range(index.first_row[shard], index.first_row[shard + 1])
        assert tokens.dtype == np.uint16 and found.tolist() == [lengths[row] for row in rows]
        assert np.array_equal(tokens, np.concatenate(PoolReader(index).read_many(rows)))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    references = make_all(tmp_path)
    index = PoolIndex.open(tmp_path / "pool")
    path = Path(index.shard_path(1))
    content = path.read_bytes()
    path.write_bytes(content[: int(index.offsets[index.first_row[2] - 1])])
    with pytest.raises(UserError, match=r"shard_00000001.tar is damaged: \d+ bytes expected, found \d+; restore it or make the pool again"):
        read_shard(index, 1)
    offset = int(index.offsets[index.first_row[1]])
    path.write_bytes(content[:offset] + b"\xff\xff" + content[offset + 2 :])
    with pytest.raises(UserError, match=r"shard_00000001.tar is damaged: token ids from \d+ to 65535, the vocabulary has 300"):
        check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)


def test_other_checks_and_other_tokenizers_are_refused(tmp_path: Path) -> None:
    references = make_all(tmp_path)
    check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=NGRAM)
    with pytest.raises(UserError, match=r"holds another check \(ngram was 8, is 9\); choose another --output or remove it"):
        check_contamination(tmp_path / "pool", references, tmp_path / "out", ngram=9)
    with pytest.raises(UserError, match="is not empty and holds no check; choose another --output"):
        check_contamination(tmp_path / "pool", references, tmp_path / "pool", ngram=NGRAM)
    tokenizer = (tmp_path / "two" / "tokenizer.json").read_bytes() + b" "
    (tmp_path / "two" / "tokenizer.json").write_bytes(tokenizer)
    change_facts(tmp_path / "two", tokenizer={"name": "tiny", "fingerprint": sha256_bytes(tokenizer)})
    with pytest.raises(UserError, match=r"two was tokenised with .*, the pool .* with .*; token n-grams can only be compared under one"):
        check_contamination(tmp_path / "pool", references, tmp_path / "new", ngram=NGRAM)
