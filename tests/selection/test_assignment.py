"""Fast assignment against the float64 argmax, in both precisions, for rows that are far from, near to and on a border."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.selection import assignment
from megatron_groupmates.selection.assignment import Assigner


def exact_labels(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The definition; argmax takes the lowest of equals."""
    rows, centroids = rows.astype(np.float32).astype(np.float64), centroids.astype(np.float64)
    return np.stack([np.vecdot(rows, centroid) for centroid in centroids], axis=1).argmax(axis=1)


def make_case(seed: int, kind: str, num_rows: int, num_clusters: int, dim: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((num_clusters, dim))
    if kind == "common direction":
        centroids = 0.05 * centroids + rng.standard_normal(dim)
    if kind == "copies":
        centroids = centroids[rng.integers(0, -(-num_clusters // 3), num_clusters)]
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-9)
    rows = rng.standard_normal((num_rows, dim))
    if kind == "borders":
        one, other = rng.integers(0, num_clusters, (2, num_rows))
        rows = centroids[one] + centroids[other] + 1e-7 * rows
    if kind == "zeros":
        rows[::2] = 0
    if kind == "lengths":
        rows *= 10.0 ** rng.uniform(-4, 4, (num_rows, 1))
    return rows.astype(dtype), centroids.astype(np.float32)


KINDS = ["random", "common direction", "copies", "borders", "zeros", "lengths"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    num_rows=st.integers(0, 60),
    num_clusters=st.integers(1, 40),
    dim=st.sampled_from([1, 3, 16, 65]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_equals_the_float64_argmax(precision: str, seed: int, kind: str, num_rows: int, num_clusters: int, dim: int, dtype: str) -> None:
    if kind == "lengths" and dtype == "float16":
        dtype = "float32"
    rows, centroids = make_case(seed, kind, num_rows, num_clusters, dim, dtype)
    labels = Assigner(centroids, precision=precision)(rows)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, exact_labels(rows, centroids))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fast_scores_alone_would_err(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recheck is what makes it exact: by the fast scores alone, some rows get another cluster."""
    rows, centroids = make_case(0, "borders", 2000, 30, 65, "float32")
    expected = exact_labels(rows, centroids)
    np.testing.assert_array_equal(Assigner(centroids, precision=precision)(rows), expected)
    monkeypatch.setattr(assignment, "_contenders", lambda scores, errors: (np.arange(len(scores)), scores.argmax(dim=1).numpy()))
    assert (Assigner(centroids, precision=precision)(rows) != expected).any()


def test_blocks_and_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centroids = make_case(1, "borders", 700, 20, 33, "float32")
    whole = Assigner(centroids)(rows)
    counts: list[int] = []
    monkeypatch.setattr(assignment, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(assignment, "_EXACT_PAIRS", 10)
    np.testing.assert_array_equal(Assigner(centroids)(rows, counts.append), whole)
    assert sum(counts) == 700 and max(counts) == 64
    np.testing.assert_array_equal(np.concatenate([Assigner(centroids)(rows[:123]), Assigner(centroids)(rows[123:])]), whole)


def test_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids = np.eye(3, dtype=np.float32)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(assignment, "has_fast_bfloat16", lambda fast=fast: fast)
        assert Assigner(centroids)._dtype == dtype
    assert Assigner(centroids, "meta")._dtype == torch.float32
