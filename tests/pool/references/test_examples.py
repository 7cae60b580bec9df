"""Reference sets: which tokens are scored survives writing, and batches pad without changing anything that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import POOL_FILE, PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references.examples import SCORED_FILE, HeldOutExamples, ScoredTokens, held_out_fingerprint, is_reference_set
from megatron_groupmates.pool.remote import RemoteSettings
from megatron_groupmates.utils.storage import upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.helpers import make_pool, make_reference_set

MASKS = [np.array(mask, dtype=bool) for mask in ([0, 1], [0, 0, 1, 1, 0, 1, 1], [0, 1, 1], [0, 0, 0, 1, 0])]


def make_set(directory: Path) -> PoolIndex:
    return make_reference_set(directory, [np.arange(len(mask)) + 10 for mask in MASKS], MASKS)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_scored_tokens_are_those_written(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    masks = [np.append(False, generator.integers(0, 2, length - 1) > 0) for length in lengths]
    index = make_reference_set(tmp_path_factory.mktemp("set"), [np.arange(length) for length in lengths], masks)
    scored = ScoredTokens(index)
    for row in generator.permutation(len(lengths)):
        assert scored.read(int(row)).tolist() == masks[row].tolist()


def test_a_pool_that_does_not_say_scores_all_but_the_first(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    assert not is_reference_set(index)
    assert ScoredTokens(index).read(3).tolist() == [False] + [True] * 8
    assert held_out_fingerprint(index) == index.fingerprint


def test_which_tokens_are_scored_is_part_of_the_identity(tmp_path: Path) -> None:
    tokens = [np.arange(4)]
    one, other = (
        make_reference_set(tmp_path / name, tokens, [np.array(mask)]) for name, mask in (("a", [0, 1, 1, 1]), ("b", [0, 0, 1, 1]))
    )
    assert one.fingerprint == other.fingerprint and held_out_fingerprint(one) != held_out_fingerprint(other)


def test_batches_pad_at_the_end_and_score_what_is_scored(tmp_path: Path) -> None:
    index = make_set(tmp_path)
    tokens, labels = HeldOutExamples(index, 6).batch([1, 0, 3], -100)
    assert tokens.tolist() == [[10, 11, 12, 13, 14, 15], [10, 0, 0, 0, 0, 0], [10, 11, 12, 13, 0, 0]]
    assert labels.tolist() == [[-100, 12, 13, -100, 15, 16], [11, *[-100] * 5], [-100, -100, 13, -100, -100, -100]]


def test_a_pool_of_contexts_gives_inputs_and_next_tokens(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    tokens, labels = HeldOutExamples(index, 8).batch(range(16), -100)
    samples = np.stack(PoolReader(index).read_many(range(16)))
    assert np.array_equal(tokens, samples[:, :-1]) and np.array_equal(labels, samples[:, 1:])


def test_examples_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    index = make_set(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"sequences of 4 tokens need samples of 2 to 5 tokens, but 1 of the 4 .*make the set again with --max-tokens 5"
    ):
        HeldOutExamples(index, 4)
    with pytest.raises(
        UserError,
        match=r"sequences of 9 tokens need samples of 10 tokens, but 16 of the 16 .* \(the first has 9\); preprocess with --pack 10",
    ):
        HeldOutExamples(make_pool(tmp_path / "pool"), 9)


def test_scored_tokens_that_changed_or_went_are_refused(tmp_path: Path) -> None:
    index = make_set(tmp_path)
    path = tmp_path / SCORED_FILE
    path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    expected = json.loads((tmp_path / POOL_FILE).read_text())["made_by"]["scored_sha256"]
    with pytest.raises(
        UserError, match=rf"scored.bin is damaged: SHA-256 [0-9a-f]+, pool.json says {expected}; make the reference set again"
    ):
        ScoredTokens(index)
    path.unlink()
    with pytest.raises(UserError, match=r"scored.bin is missing, which says which tokens of the reference set are scored"):
        HeldOutExamples(index, 8)


def test_a_remote_set_reads_as_a_local_one(tmp_path: Path, s3_options: dict[str, Any]) -> None:  # noqa: F811
    make_set(tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        upload(path, f"s3://{BUCKET}/set/{path.name}")
    index = PoolIndex.open(f"s3://{BUCKET}/set", remote=RemoteSettings(cache_directory=str(tmp_path / "cache")))
    local = HeldOutExamples(PoolIndex.open(tmp_path / "set"), 8).batch(range(4), -1)
    assert [array.tolist() for array in HeldOutExamples(index, 8).batch(range(4), -1)] == [array.tolist() for array in local]
