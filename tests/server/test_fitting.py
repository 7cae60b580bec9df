"""The fits of a round: refused ones and what stands in for them, warm starts, and encoders that are trained with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import Config, RunPaths, UserError
from megatron_groupmates.influence.fit import FitResult, fit_relational
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server import encoders, fitting
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.encoders import trained_encoder
from megatron_groupmates.server.learning import learn_influence
from megatron_groupmates.server.round import load_probe
from megatron_groupmates.server.stages import choose_candidates
from megatron_groupmates.utils.files import read_json
from tests.common.gpt_runs import REFRESHES
from tests.common.text_encoders import detokenise, write_text_encoder
from tests.server.oracle_rounds import open_context

STEP = REFRESHES[0]
CPU = torch.device("cpu")


def learn(config: Config, groups: Any, number: int = 1) -> tuple[RelationalModel, dict[str, Any]]:
    """The oracles and fits of a round on the checkpoint of ``STEP``, nothing selected."""
    first = open_context(config, groups)
    context = RoundContext(config, groups, first.pool, dataclasses.replace(first.input, number=number), first.exclusion)
    reference = PoolIndex.open(config.data.reference)
    context.begin(reference)
    probe, encoder = load_probe(context, reference)
    return learn_influence(context, probe, encoder, reference, np.arange(context.pool.num_samples))


def directory(config: Config, number: int = 1) -> Path:
    return RunPaths.of(config).round(number)


def refuse(*args: Any, **kwargs: Any) -> FitResult:
    return FitResult(model=None, report={"accepted": False, "attempts": []})


class TestRefusedFits:
    def test_final_does_not_repeat_a_refused_first_fit(self, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, STEP)
        calls = []

        def note(source: Any, rollouts: np.ndarray, labels: np.ndarray, settings: Any, seed: int, *args: Any, **kwargs: Any) -> FitResult:
            calls.append((rollouts, seed))
            return refuse()

        monkeypatch.setattr(fitting, "fit_relational", note)
        with pytest.raises(UserError, match="every fit of the relational model has the wrong sign"):
            learn(config, groups)
        (rollouts, seed), (again, other) = calls
        assert np.array_equal(rollouts, again) and seed != other
        assert read_json(directory(config) / "oracle.json")["rollouts"]["bootstrap"] == 0

    def test_a_refused_final_model_is_replaced_by_the_first_of_the_round(self, trained, groups, tmp_path, monkeypatch, caplog):
        config = trained.copy(tmp_path, STEP)
        results = iter([fit_relational, refuse])
        monkeypatch.setattr(fitting, "fit_relational", lambda *args, **kwargs: next(results)(*args, **kwargs))
        model, reports = learn(config, groups)
        assert reports["init"]["accepted"] and not reports["final"]["accepted"]
        assert reports["fell_back_on"] == "selection/rounds/round-000001/init"
        assert model.relation_values() == RelationalModel.load(directory(config) / "init").relation_values()
        assert "the final fit was refused; selecting with the last good model" in caplog.text


class TestWarmStart:
    def test_begins_at_the_newest_accepted_model(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, STEP, relational__warm_start=True)
        _, reports = learn(config, groups)
        assert reports["init"]["warm_start"] is None and reports["final"]["warm_start"] is None
        # Round 2 left nothing.
        _, reports = learn(config, groups, number=3)
        for name in ("init", "final"):
            found = reports[name]["warm_start"]
            assert found["from"] == 1 and found["spearman"] >= found["spearman_before"]
            assert -1 <= found["spearman_from_scratch"] <= 1

    def test_off_by_default(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, STEP)
        learn(config, groups)
        _, reports = learn(config, groups, number=2)
        assert reports["final"]["warm_start"] is None and reports["final"]["attempts"][0]["start"] == "scratch"


class TestTrainedEncoder:
    @pytest.fixture
    def config(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(encoders, "pool_detokeniser", lambda pool: lambda ids: detokenise([number % 8 for number in ids]))
        encoder = write_text_encoder(tmp_path / "encoder")
        return trained.copy(tmp_path, STEP, relational__encoder=str(encoder), relational__encoder_max_tokens=32)

    def test_each_fit_trains_the_encoder_from_its_beginning_and_keeps_it(self, config, groups):
        model, reports = learn(config, groups)
        assert reports["final"]["accepted"] and model.projection is None
        context = open_context(config, groups)
        begin = HuggingFaceEncoder(config.relational.encoder, detokenise, 32, CPU)
        kept = {}
        for name in ("init", "final"):
            fitted = RelationalModel.load(directory(config) / name)
            assert fitted.encoder_directory == directory(config) / name / "encoder"
            kept[name] = trained_encoder(context, begin, fitted)
            assert not all(torch.equal(one, other) for one, other in zip(kept[name].parameters(), begin.parameters(), strict=True))
        # The bootstrap's predictions are those of the first fit's encoder.
        with np.load(directory(config) / "candidates.npz") as content:
            features = content["features"]
        rows = choose_candidates(context, np.arange(context.pool.num_samples))
        np.testing.assert_allclose(kept["init"].encode(context.read_samples(rows)).numpy(), features, rtol=1e-4, atol=1e-5)
        assert not np.allclose(kept["final"].encode(context.read_samples(rows)).numpy(), features, atol=1e-4)

    def test_frozen_on_request(self, trained, groups, tmp_path, config):
        config = dataclasses.replace(config, relational=dataclasses.replace(config.relational, finetune_encoder="no"))
        model, _ = learn(config, groups)
        assert model.encoder_directory is None and model.projection is not None

    def test_goes_on_after_the_first_fit(self, config, groups, monkeypatch, tmp_path, trained):
        whole, _ = learn(config, groups)

        class Killed(Exception):
            pass

        def die(*args: Any, **kwargs: Any) -> None:
            raise Killed

        again = trained.copy(tmp_path / "again", STEP, relational__encoder=config.relational.encoder, relational__encoder_max_tokens=32)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fitting.Candidates, "features", die)
            learn(again, groups)
        resumed, _ = learn(again, groups)
        for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
