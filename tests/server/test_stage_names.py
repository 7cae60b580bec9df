"""Names of stages: families, and words for people."""

from __future__ import annotations

import pytest

from megatron_groupmates.server.stage_names import stage_family, stage_text


@pytest.mark.parametrize(
    ("stage", "family", "text"),
    [
        ("embeddings", "embeddings", "embedding the pool"),
        ("selection", "selection", "selection"),
        ("oracle_validation", "oracle_validation", "oracle validation"),
        ("oracle_random.batch-000012", "oracle_random", "oracle random, batch 13"),
        ("oracle_random.exact.batch-000000", "oracle_random.exact", "oracle random, exact, batch 1"),
        ("group_0_sample", "group", "choosing within clusters, sample"),
        ("group_1_offers_2", "group", "choosing within clusters, offers 2"),
        ("group", "group", "choosing within clusters"),
        ("sorted", "sorted", "sorting embeddings by cluster"),
    ],
)
def test_families_and_words(stage: str, family: str, text: str) -> None:
    assert (stage_family(stage), stage_text(stage)) == (family, text)
