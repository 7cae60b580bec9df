"""What a report says of a selection: bootstrap coverage, clusters, shares, overlap by chance, example documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.report import page_influence, page_selection, selection
from megatron_groupmates.report.figures import summarise
from megatron_groupmates.report.read import read_runs
from tests.common.report_runs import bootstrap_uses, full_provenance, oracle_facts, write_run

EXAMPLES = (page_selection.examples_section,)
Section = Callable[[dict[str, Any]], str]


def built(root: Path, *rounds: dict[str, Any], sections: Sequence[Section] = ()) -> tuple[list[dict[str, Any]], str]:
    """Generations in the summary, and sections of the page, of one run with these rounds."""
    summary = summarise(read_runs([write_run(root / "run", "group", provenances=list(rounds))]))
    return summary["arms"]["group"]["generations"], "".join(make(summary) for make in sections)


def test_few_numbers_of_uses_are_shown_one_by_one_and_many_by_doubling_ranges() -> None:
    assert selection.use_bins(3) == [(1, 1), (2, 2), (3, 3)]
    assert selection.use_bins(20) == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 20)]
    assert selection.use_bins(16)[-1] == (16, 16) and selection.use_bins(0) == []


@settings(deadline=None)
@given(uses=st.lists(st.integers(0, 9), max_size=70))
def test_the_histogram_of_uses_counts_every_sample_once(uses: list[int]) -> None:
    facts = {"rollouts": 1, "distinct_samples": sum(uses), "distinct_sets": 1, "max_uses": len(uses), "uses": uses}
    histogram = selection.coverage_figures(facts)["histogram"]
    assert sum(samples for _, _, samples in histogram) == sum(uses)
    covered = [number for first, last, _ in histogram for number in range(first, last + 1)]
    assert covered == list(range(1, len(uses) + 1))


def test_coverage_by_hand() -> None:
    assert selection.coverage_figures(oracle_facts()["bootstrap"]) == {
        "rollouts": 40,
        "distinct_samples": 19,
        "distinct_sets": 12,
        "max_uses": 40,
        "places": 200,
        "histogram": [[1, 1, 8], [2, 3, 2], [4, 7, 3], [8, 15, 2], [16, 31, 0], [32, 40, 4]],
    }
    assert len(bootstrap_uses()) == 40


def test_clusters_by_hand() -> None:
    assert selection.cluster_figures([900, 600, 400, 300, 150, 0, 50], [450, 0, 200, 150, 0, 0, 50]) == {
        "clusters": 6,
        "empty": 1,
        "smallest": 50,
        "median": 350.0,
        "largest": 900,
        "share": 850 / 2400,
        "untouched": 2,
        "whole": 1,
        "groups": [[50, 50], [900, 450], [400, 200], [300, 150], [600, 0], [150, 0]],
    }


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), count=st.sampled_from([1, 16, 200, 201, 3000]))
def test_groups_of_clusters_keep_every_sample_and_fall_in_share(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 60, count)
    sizes[0] += 1
    chosen = generator.binomial(sizes, generator.random(count))
    groups = np.array(selection.cluster_figures(sizes.tolist(), chosen.tolist())["groups"])
    assert groups.sum(0).tolist() == [sizes.sum(), chosen.sum()]
    assert len(groups) == min(len(groups), 200) and (len(groups) == (sizes > 0).sum() or count > 200)
    assert (np.diff(groups[:, 1] / groups[:, 0]) <= 1e-12).all()


def test_least_shares_are_of_tokens_and_candidates_of_samples() -> None:
    counts = {
        "budget_tokens": 1000,
        "selected_tokens": 900,
        "minimum_source_share": [
            {"kind": "book", "minimum_tokens": 200, "selected_tokens": 225, "reserved": True},
            {"kind": "law", "minimum_tokens": 100, "selected_tokens": 0, "reserved": False},
        ],
    }
    by_kind = {"web": {"selected": 30, "candidates": 50}, "book": {"selected": 10, "candidates": 150}}
    assert selection.source_shares(counts, by_kind) == {
        "book": {"minimum": 0.2, "selected": 0.25, "candidates": 0.75, "reserved": True},
        "law": {"minimum": 0.1, "selected": 0.0, "candidates": 0.0, "reserved": False},
    }
    assert selection.source_shares(counts, {})["book"]["candidates"] is None


def test_a_round_without_any_part_has_no_figures() -> None:
    empty = {"oracle": {"bootstrap": None}, "counts": {"cluster_sizes": [], "minimum_source_share": []}}
    for provenance in ({}, {"oracle": None, "examples": None}, {**empty, "examples": {"chosen": [], "rejected": []}}):
        assert selection.selection_figures(provenance) == {}


def test_overlap_by_chance_is_the_share_selected() -> None:
    assert selection.overlap_by_chance({"candidates": 400, "selected": 100}) == 0.25
    assert selection.overlap_by_chance({}) is None and selection.overlap_by_chance({"candidates": 0, "selected": 0}) is None


def test_the_page_shows_coverage_clusters_shares_and_chance(tmp_path: Path) -> None:
    sections = (
        page_influence.coverage_section,
        page_selection.clusters_section,
        page_selection.kinds_section,
        page_selection.overlap_section,
    )
    (generation,), text = built(tmp_path, full_provenance("group", 100), sections=sections)
    assert generation["coverage"]["places"] == 200 and generation["overlap_by_chance"] == 850 / 2400
    assert "<td>40</td><td>200</td><td>19</td><td>12</td><td>40</td>" in text
    assert "<td>6</td><td>1</td><td>50</td><td>350</td><td>900</td><td>35.4%</td><td>2</td><td>1</td>" in text
    assert '<td class="text">man_page</td><td class="text">yes</td><td>20.0%</td><td>20.2%</td><td>16.7%</td>' in text
    assert "Two random selections of this size share 35%." in text
    assert text.count("<svg") == 4


def test_parts_that_a_round_lacks_are_left_out(tmp_path: Path) -> None:
    old = full_provenance("group", 100)
    del old["examples"], old["oracle"]["bootstrap"]
    old["counts"] = {"candidates": 2400, "selected": 850}
    sections = (page_influence.coverage_section, page_selection.clusters_section, page_selection.examples_section)
    (generation,), text = built(tmp_path, old, sections=sections)
    assert not {"coverage", "clusters", "source_shares", "examples"} & set(generation)
    assert "Left out: no generation was selected by cluster." in text and "Left out: no generation kept example documents." in text
    assert "Bootstrap coverage" not in text and "<svg" not in text


@pytest.mark.parametrize("count", [16, 10_000])
def test_any_number_of_clusters_makes_a_page_of_bounded_size(tmp_path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 5000, count)
    chosen = generator.binomial(sizes, 0.2)
    with_clusters = full_provenance("group", 100)
    with_clusters["counts"] |= {"cluster_sizes": sizes.tolist(), "cluster_selected": chosen.tolist()}
    _, text = built(tmp_path, with_clusters, sections=[page_selection.clusters_section])
    assert f"candidates, by cluster ({count:,})" in text and len(text) < 40_000


def test_documents_are_shown_with_their_scores_and_where_they_lie(tmp_path: Path) -> None:
    (_, last), text = built(tmp_path, full_provenance("group", 100), full_provenance("group", 300), sections=EXAMPLES)
    assert [document["score"] for document in last["examples"]["chosen"]] == pytest.approx([-0.9, -0.8, -0.7])
    assert "<strong>-0.9000</strong> &middot; docstring &middot; shard_00000001:0 &middot; 128 tokens" in text
    assert "The rejected document 2.\nIt goes on" in text
    assert "The pool has no tokenizer that reads; its first token ids: 5 17 3" in text
    assert "unknown kind" in text and "The sample could not be read." in text
    states = re.findall(r"<details( open)?><summary>(.*?)</summary>", text)
    assert states == [("", "group, generation 1"), (" open", "group, generation 2")]


def test_a_document_cannot_break_the_page(tmp_path: Path) -> None:
    hostile = full_provenance("group", 100)
    document = hostile["examples"]["chosen"][0]
    document |= {"text": "</pre><script>alert(1)</script>\x00\x1b[31m & \u202e", "kind": "<i>", "shard": "a<b", "score": None}
    del document["num_tokens"]
    _, text = built(tmp_path, hostile, sections=EXAMPLES)
    assert "<script>" not in text and "<i>" not in text and "\x00" not in text and "\x1b" not in text
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;\ufffd\ufffd[31m &amp; \u202e</pre>" in text
    assert '<p class="soft">&lt;i&gt; &middot; a&lt;b:0</p>' in text
