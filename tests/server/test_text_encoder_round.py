"""A whole round with a text encoder that is trained end to end, killed between the fits and the embedding of the pool."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import RunPaths
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder
from megatron_groupmates.pool.generation import load_generation, read_pointer
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.selection.store import EmbeddingStore
from megatron_groupmates.server import fitting, watch
from megatron_groupmates.server import round as round_module
from megatron_groupmates.server.encoders import pool_detokeniser
from megatron_groupmates.utils.files import read_json
from tests.common.gpt_runs import BATCH, REFRESHES, rows_of_samples
from tests.common.text_encoders import write_text_encoder

STEP = REFRESHES[0]


class Killed(Exception):
    """Stands for the death of the server."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


def test_publishes_a_generation_by_the_trained_encoder(trained, groups, tmp_path, monkeypatch):
    begin = write_text_encoder(tmp_path / "encoder", characters=string.printable.strip())
    config = trained.copy(
        tmp_path,
        STEP,
        relational__encoder=str(begin),
        relational__encoder_max_tokens=64,
        relational__learning_rate=3e-3,
        relational__epochs=3,
    )
    paths = RunPaths.of(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(round_module, "embed_pool", die)
        watch.serve(config, groups, once=True)
    assert read_pointer(paths.selection) == 0
    # What was fitted is kept, and neither fitted again nor asked of the encoder it began with.
    monkeypatch.setattr(fitting, "fit_relational", die)
    assert watch.serve(config, groups, once=True)
    assert read_pointer(paths.selection) == 1

    pool = PoolIndex.open(config.data.pool)
    generation = load_generation(paths.selection, 1, pool)
    assert generation.provenance["fit"]["final"]["accepted"] and generation.provenance["config"]["relational"]["encoder"] == str(begin)
    kinds = generation.provenance["selected_by_kind"]
    assert kinds["web"]["selected"] / kinds["web"]["candidates"] > kinds["book"]["selected"] / kinds["book"]["candidates"]

    # The model's directory is all that its embeddings need.
    directory = paths.round(1) / "final"
    assert read_json(directory / "encoder" / "text_encoder.json")["encoder"] == str(begin)
    model = RelationalModel.load(directory)
    assert model.projection is None and model.encoder_directory == directory / "encoder"
    encoder = HuggingFaceEncoder.load(model.encoder_directory, pool_detokeniser(pool), torch.device("cpu"))
    available = np.setdiff1d(np.arange(pool.num_samples), rows_of_samples(trained, 0, STEP * BATCH))
    features = encoder.encode([torch.from_numpy(tokens) for tokens in PoolReader(pool).read_many(available)])
    store = EmbeddingStore.open(paths.round(1) / "embeddings")
    np.testing.assert_allclose(store.read(0, len(available)), features.numpy(), atol=2e-3)
    with torch.no_grad():
        np.testing.assert_allclose(store.individual, model.individual(features).numpy(), rtol=1e-4, atol=1e-5)
    untrained = HuggingFaceEncoder(str(begin), pool_detokeniser(pool), 64, torch.device("cpu"))
    assert (untrained.encode([torch.from_numpy(tokens) for tokens in PoolReader(pool).read_many(available)]) - features).abs().max() > 0.05
