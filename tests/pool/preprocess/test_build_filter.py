"""The quality filter within a build: thresholds, top fractions, counts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.preprocess import passes
from megatron_groupmates.pool.preprocess.build import build_pool
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.quality import QualityFilter
from megatron_groupmates.pool.sources import read_sources
from tests.pool.helpers import tiny_tokenizer, write_raw

SCORES = np.random.default_rng(0).integers(0, 100, (3, 40)) / 100  # of each file's documents, with ties


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts say their own score; the list has all that were scored."""
    seen: list[str] = []

    def score(_: QualityFilter, texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([float(text.split()[-1]) for text in texts])

    monkeypatch.setattr(QualityFilter, "score", score)
    return seen


def raw(directory: Path) -> str:
    for number, scores in enumerate(SCORES):
        write_raw(
            directory / "raw" / f"{number}.jsonl", [{"text": f"cat {number} {line} {score}"} for line, score in enumerate(scores)] + [b"{"]
        )
    (directory / "model.bin").write_bytes(b"any")
    return str(directory / "model.bin")


def kept(directory: Path) -> list[tuple[int, int]]:
    index = PoolIndex.open(directory)
    documents = [source["documents"][0] for name in index.shard_names for source in read_sources(index, name)]
    return sorted((int(document["file"][0]), document["line"] - 1) for document in documents)


def test_a_threshold_leaves_out_what_scores_less(tmp_path: Path, scored: list[str]) -> None:
    options = BuildOptions(fasttext_model=raw(tmp_path), fasttext_threshold=0.6)
    summary, _ = build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options, max_rejects=3)
    assert kept(tmp_path / "pool") == [tuple(place) for place in np.argwhere(SCORES >= 0.6)]
    num_low = int((SCORES < 0.6).sum())
    assert summary["rejects_by_kind"] == {"broken_json": 3, "low_quality": num_low}
    assert (summary["documents_read"], summary["documents_accepted"]) == (123, 120 - num_low)
    rejects = [json.loads(line) for line in (tmp_path / "pool" / "rejects.jsonl").read_text().splitlines()]
    low = [(int(reject["file"][0]), reject["line"] - 1) for reject in rejects if reject["kind"] == "low_quality"]
    assert low == [tuple(place) for place in np.argwhere(SCORES < 0.6)]
    assert all(float(reject["detail"]) < 0.6 for reject in rejects if reject["kind"] == "low_quality")


def test_rejects_of_the_filter_are_no_bad_input(tmp_path: Path, scored: list[str]) -> None:
    options = BuildOptions(fasttext_model=raw(tmp_path), fasttext_threshold=0.6)
    with pytest.raises(UserError, match=r"3 documents rejected so far, --max-rejects is 2"):
        build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options, max_rejects=2)


@pytest.mark.parametrize("fraction", [0.001, 0.25, 1.0])
def test_a_top_fraction_over_all_files(tmp_path: Path, scored: list[str], fraction: float) -> None:
    options = BuildOptions(fasttext_model=raw(tmp_path), fasttext_top_fraction=fraction)
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options)
    lowest = np.sort(SCORES.ravel())[-math.ceil(fraction * SCORES.size)]
    assert kept(tmp_path / "pool") == [tuple(place) for place in np.argwhere(SCORES >= lowest)]
    assert len(scored) == SCORES.size, "each document is scored once"


def test_scoring_continues_too(tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(fasttext_model=raw(tmp_path), fasttext_top_fraction=0.5)
    function = passes.score_file

    def second_fails(context: object, number: int, advance: object) -> None:
        if number == 1:
            raise OSError("unreadable")
        function(context, number, advance)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "score_file", second_fails)
        with pytest.raises(OSError, match="unreadable"):
            build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options)
    assert 0 < len(scored) < SCORES.size
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options)
    assert len(scored) == SCORES.size
    lowest = np.sort(SCORES.ravel())[-SCORES.size // 2]
    assert kept(tmp_path / "pool") == [tuple(place) for place in np.argwhere(SCORES >= lowest)]


def test_the_model_counts_not_its_path(tmp_path: Path, scored: list[str]) -> None:
    arguments = [tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer()
    path = raw(tmp_path)
    build_pool(*arguments, BuildOptions(fasttext_model=path, fasttext_threshold=0.6))
    moved = Path(path).rename(tmp_path / "moved.bin")
    assert build_pool(*arguments, BuildOptions(fasttext_model=str(moved), fasttext_threshold=0.6))[1] is False
    moved.write_bytes(b"another")
    with pytest.raises(UserError, match="made with other arguments \\(fasttext_model was"):
        build_pool(*arguments, BuildOptions(fasttext_model=str(moved), fasttext_threshold=0.6))


def test_no_document_at_all(tmp_path: Path, scored: list[str]) -> None:
    write_raw(tmp_path / "raw" / "a.jsonl", [b"{"])
    (tmp_path / "model.bin").write_bytes(b"any")
    options = BuildOptions(fasttext_model=str(tmp_path / "model.bin"), fasttext_top_fraction=0.5)
    with pytest.raises(UserError, match="no sample comes of the 1 input files"):
        build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options)
