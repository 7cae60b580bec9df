"""The pool's embeddings: the same whoever computes them, in whatever pieces, and whatever an earlier run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.model.batch import Samples
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.selection.store import EmbeddingStore, part_ranges, write_part
from megatron_groupmates.server import embedding
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.embedding import embed_features, embed_pool, embed_reference, encode
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import make_pools, open_groups, snapshot, tiny_config
from tests.server.oracle_rounds import open_context

ROWS = np.arange(3, 140, 2)
NUM_ROWS = len(ROWS)


class Killed(Exception):
    """Stands for the death of the server."""


class Counting:
    """An encoder whose features are a sample's first tokens; it remembers how many samples it saw."""

    feature_dim = 6

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, samples: Samples) -> torch.Tensor:
        """Features of ``samples``."""
        self.batches.append(len(samples))
        return torch.stack([sample[:6] for sample in samples]).float()

    @property
    def seen(self) -> int:
        """Samples encoded so far."""
        return sum(self.batches)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pools")
    make_pools(root)
    return root


@pytest.fixture
def context(pools: Path, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RoundContext:
    monkeypatch.setattr(embedding, "_CHUNK_ROWS", 20)
    return open_context(tiny_config(pools, run__output_dir=str(tmp_path / "run"), server__embed_batch_size=8), groups)


@pytest.fixture
def model() -> RelationalModel:
    model = RelationalModel(6, 4, seed=1)
    model.set_feature_statistics(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 100)
    return model


def expected_features(pools: Path, rows: np.ndarray, name: str = "pool") -> np.ndarray:
    """By one sample after the other."""
    from megatron_groupmates.pool.reader import PoolReader

    reader = PoolReader(PoolIndex.open(str(pools / name)))
    return np.stack([reader.read(int(row))[:6] for row in rows]).astype(np.float32)


def opened(context: RoundContext) -> EmbeddingStore:
    return EmbeddingStore.open(context.directory / "embeddings", NUM_ROWS)


class TestEmbedPool:
    def test_by_the_model(self, context, pools, model):
        encoder = Counting()
        embed_pool(context, encoder, model, ROWS)
        store = opened(context)
        embeddings, individual = embed_features(model, expected_features(pools, ROWS))
        assert (store.num_rows, store.dim, store.dtype) == (NUM_ROWS, 4, np.float16)
        np.testing.assert_allclose(store.read(0, NUM_ROWS), embeddings.astype(np.float16), atol=1e-3)
        np.testing.assert_allclose(store.individual, individual, atol=1e-6)
        assert part_ranges(context.directory / "embeddings") == [(0, 20), (20, 40), (40, 60), (60, NUM_ROWS)]
        assert encoder.batches == [8, 8, 4, 8, 8, 4, 8, 8, 4, 8, 1]
        embed_pool(context, encoder, model, ROWS)
        assert encoder.seen == NUM_ROWS, "a finished stage is not done again"
        kept = context.arrays("embeddings")
        assert {name: int(value) for name, value in kept.items()} == {"num_rows": NUM_ROWS, "dim": 4}, "no copy of the embeddings"

    def test_without_a_model_are_features(self, context, pools):
        embed_pool(context, Counting(), None, ROWS)
        store = opened(context)
        assert store.dtype == np.float32 and not store.individual.any()
        assert np.array_equal(store.read(0, NUM_ROWS), expected_features(pools, ROWS))

    @pytest.mark.parametrize("size", [6, 20, 33, 200])
    def test_a_killed_stage_goes_on_with_chunks_of_another_size(self, context, pools, model, monkeypatch, size):
        class Dying(Counting):
            def encode(self, samples: Samples) -> torch.Tensor:
                if self.seen >= 40:
                    raise Killed
                return super().encode(samples)

        with pytest.raises(Killed):
            embed_pool(context, Dying(), model, ROWS)
        kept = snapshot(context.directory / "embeddings")
        assert part_ranges(context.directory / "embeddings") == [(0, 20), (20, 40)]
        monkeypatch.setattr(embedding, "_CHUNK_ROWS", size)
        encoder = Counting()
        embed_pool(context, encoder, model, ROWS)
        assert encoder.seen == NUM_ROWS - 40
        assert kept.items() <= snapshot(context.directory / "embeddings").items()
        np.testing.assert_allclose(opened(context).individual, embed_features(model, expected_features(pools, ROWS))[1], atol=1e-6)

    @pytest.mark.parametrize(
        ("damage", "message", "again"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be used", 20),
            (lambda path: path.write_bytes(b""), "cannot be used", 20),
            (lambda path: path.with_name(path.name.replace("part", "individual")).unlink(), "cannot be used", 20),
            (lambda path: np.save(path, np.zeros((3, 4), np.float16)), "holds 3 rows, its name says 20", 20),
            (lambda path: write_part(path.parent, 30, np.zeros((20, 4), np.float16), np.zeros(20)), "holds row 30 twice", 0),
            (lambda path: write_part(path.parent, 60, np.zeros((20, 4), np.float16), np.zeros(20)), "a part of rows 60 to 79 of 69", 0),
        ],
    )
    def test_parts_that_cannot_be_used_are_computed_again(self, context, pools, model, caplog, damage, message, again):
        encoder = Counting()
        embed_pool(context, encoder, model, ROWS)
        (context.directory / "embeddings.npz").unlink()
        damage(context.directory / "embeddings" / "part-000000000020-000000000040.npy")
        embed_pool(context, encoder, model, ROWS)
        assert message in caplog.text and "it is computed again" in caplog.text
        assert encoder.seen == NUM_ROWS + again
        np.testing.assert_allclose(opened(context).individual, embed_features(model, expected_features(pools, ROWS))[1], atol=1e-6)

    @pytest.mark.parametrize("which", ["head_bias", "projection"])
    def test_what_is_not_finite_is_refused(self, context, model, which):
        with torch.no_grad():
            getattr(model, which).fill_(float("nan"))
        with pytest.raises(UserError, match=r"not all finite numbers: .* has diverged; lower optimizer.learning_rate or relational"):
            embed_pool(context, Counting(), model, ROWS)
        assert part_ranges(context.directory / "embeddings") == []

    def test_what_half_precision_cannot_hold_is_refused(self, context):
        model = RelationalModel(6, 6, projection=False)
        encoder = Counting()
        encoder.encode = lambda samples: torch.full((len(samples), 6), 1e6)  # type: ignore[method-assign]
        with pytest.raises(UserError, match="not all finite numbers"):
            embed_pool(context, encoder, model, ROWS)


class TestReference:
    def test_is_embedded_as_the_pool_is(self, context, pools, model):
        reference = PoolIndex.open(str(pools / "reference"))
        features = expected_features(pools, np.arange(4), "reference")
        found = embed_reference(context, Counting(), model, reference)
        np.testing.assert_allclose(found, embed_features(model, features)[0], atol=1e-6)
        assert np.array_equal(embed_reference(context, Counting(), None, reference), features)

    def test_features_by_name(self, context, pools):
        features = encode(context, Counting(), context.pool, ROWS, "candidates")
        assert np.array_equal(features, expected_features(pools, ROWS))
        assert np.array_equal(context.arrays("candidates")["features"], features)


def embed_by_the_probe(config: Config, groups: Any) -> None:
    """Embed the pool by the mean hidden states of a model that is not trained."""
    from megatron_groupmates.model.gpt import build_gpt
    from megatron_groupmates.server.encoders import build_encoder

    context = open_context(config, groups)
    encoder = build_encoder(config, build_gpt(config, groups, groups.tensor_size, torch.float32), context.pool, groups.device)
    embed_pool(context, encoder, RelationalModel(64, 4, seed=1), ROWS)


def embed_together(rank: int, world_size: int, config: Config, tensor_size: int) -> int:
    """Embed the pool; chunks that this rank computed."""
    embedding._CHUNK_ROWS = 20
    computed = 0
    real = embedding._features

    def count(*arguments: Any) -> np.ndarray:
        nonlocal computed
        computed += 1
        return real(*arguments)

    embedding._features = count
    embed_by_the_probe(config, open_groups(tensor_size))
    return computed


class TestWorkers:
    @pytest.mark.parametrize(("world_size", "tensor_size"), [(3, 1), (4, 2)])
    def test_share_the_pool(self, pools, groups, tmp_path, monkeypatch, world_size, tensor_size):
        monkeypatch.setattr(embedding, "_CHUNK_ROWS", 20)
        alone, together = (tiny_config(pools, run__output_dir=str(tmp_path / name)) for name in ("alone", "together"))
        embed_by_the_probe(alone, groups)
        computed = run_ranks(embed_together, world_size, together, tensor_size, tmp_path=tmp_path)
        assert sum(computed) == 4 * tensor_size, "each chunk once"
        stores = [EmbeddingStore.open(open_context(config, groups).directory / "embeddings", NUM_ROWS) for config in (alone, together)]
        (one, by_one), (several, by_several) = ((store.read(0, NUM_ROWS), store.individual) for store in stores)
        if tensor_size == 1:
            assert np.array_equal(one, several) and np.array_equal(by_one, by_several)
        np.testing.assert_allclose(one.astype(np.float64), several, atol=2e-3)
        np.testing.assert_allclose(by_one, by_several, atol=1e-5)
