"""Rounds of the server under ``data.exclude``, and with a reference set of examples of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.pool.exclusion import write_exclusion
from megatron_groupmates.pool.generation import Generation, load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.examples import held_out_fingerprint
from megatron_groupmates.server import watch
from megatron_groupmates.utils.files import read_json
from tests.common.gpt_runs import REFRESHES, SEQUENCE_LENGTH, VOCABULARY, TrainedRun
from tests.pool.helpers import make_reference_set

STEP = REFRESHES[0]
EXCLUDED = np.arange(0, 144, 2)


def serve(trained: TrainedRun, groups: Any, root: Path, **changes: Any) -> Generation:
    config = trained.copy(root, STEP, **changes)
    assert watch.serve(config, groups, once=True)
    return load_generation(root / "run" / "selection", 1, PoolIndex.open(config.data.pool))


@pytest.fixture
def exclude(trained: TrainedRun, tmp_path: Path) -> str:
    path = tmp_path / "exclude.json"
    write_exclusion(path, PoolIndex.open(trained.root / "pool"), EXCLUDED, {})
    return str(path)


def test_a_random_selection_never_takes_an_excluded_row(trained: TrainedRun, groups: Any, tmp_path: Path, exclude: str) -> None:
    generation = serve(trained, groups, tmp_path, data__exclude=exclude, selection__method="random", selection__ratio=1.0)
    assert generation.num_samples > 40 and not generation.mask[EXCLUDED].any()
    assert generation.provenance["exclusion"] == {"digest": read_json(exclude)["digest"], "num_samples": 72}
    assert generation.provenance["counts"]["candidates"] == generation.num_samples


def test_candidates_and_embeddings_are_drawn_from_the_rest(trained: TrainedRun, groups: Any, tmp_path: Path, exclude: str) -> None:
    """The whole round, with a reference set whose examples differ in length."""
    generator = np.random.default_rng(0)
    lengths = (5, SEQUENCE_LENGTH + 1, 9, 2)
    masks = [np.arange(length) >= length // 2 for length in lengths]
    samples = [generator.integers(0, VOCABULARY, length) for length in lengths]
    reference = make_reference_set(tmp_path / "set", samples, masks, VOCABULARY)
    changes = {"data__exclude": exclude, "data__reference": str(tmp_path / "set")}
    for method in ("group", "similarity"):
        generation = serve(trained, groups, tmp_path / method, selection__method=method, **changes)
        assert generation.num_samples > 10 and not generation.mask[EXCLUDED].any()
        facts = read_json(tmp_path / method / "run" / "selection" / "rounds" / "round-000001" / "round.json")
        assert facts["reference_fingerprint"] == held_out_fingerprint(reference) != reference.fingerprint


def test_without_exclusion_provenance_says_nothing_of_it(trained: TrainedRun, groups: Any, tmp_path: Path) -> None:
    generation = serve(trained, groups, tmp_path, selection__method="random", selection__ratio=1.0)
    assert "exclusion" not in generation.provenance and generation.mask[EXCLUDED].any()
