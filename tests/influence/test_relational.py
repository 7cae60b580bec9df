"""The relational model against the published formula written as loops, and against stored reference numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.labels import Standardiser
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.influence.relational import RelationalModel, relational_scores, rollout_scores

DATA = Path(__file__).parent.parent / "data"


def loop_scores(embeddings: np.ndarray, individual: np.ndarray, alpha: float, tau: float) -> list[float]:
    scores = [float(individual[0])]
    for t in range(1, len(individual)):
        relations = [1 - sum(a * b for a, b in zip(embeddings[t], embeddings[j], strict=True)) / tau for j in range(t)]
        scores.append(float(individual[t]) * alpha * sum(relations) / t)
    return scores


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (-0.7, 0.3), (2.0, 2.0)])
def test_scores_equal_the_double_loop(num_steps: int, alpha: float, tau: float) -> None:
    rng = np.random.default_rng(num_steps)
    embeddings, individual = rng.standard_normal((num_steps, 6)), rng.standard_normal(num_steps)
    scores = relational_scores(embeddings, individual, alpha, tau)
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.numpy(), loop_scores(embeddings, individual, alpha, tau), rtol=1e-12, atol=1e-14)


def test_a_batch_equals_its_rollouts_one_by_one() -> None:
    rng = np.random.default_rng(3)
    embeddings, individual = rng.standard_normal((5, 7, 4)), rng.standard_normal((5, 7))
    batch = relational_scores(torch.tensor(embeddings), torch.tensor(individual), torch.tensor([1.5]), 0.8)
    single = torch.stack([relational_scores(h, s, 1.5, 0.8) for h, s in zip(embeddings, individual, strict=True)])
    torch.testing.assert_close(batch, single, rtol=1e-14, atol=1e-14)


def test_additive_scores_equal_the_loop() -> None:
    rng = np.random.default_rng(4)
    embeddings, individual = rng.standard_normal((5, 3)), rng.standard_normal(5)
    expected = [individual[0]] + [
        individual[t] + 0.6 * np.mean([embeddings[t] @ embeddings[j] for j in range(t)]) - 0.2 for t in range(1, 5)
    ]
    scores = rollout_scores("additive", torch.tensor(embeddings), torch.tensor(individual), alpha=1.0, tau=1.0, gamma=0.6, offset=-0.2)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(UserError, match=r"shape \[3, 2\] and individual \[4\]"):
        relational_scores(np.ones((3, 2)), np.ones(4), 1.0, 1.0)
    with pytest.raises(UserError, match="alpha has 2 elements and tau 1"):
        relational_scores(np.ones((3, 2)), np.ones(3), np.ones(2), 1.0)


def test_parity_with_reference_numbers() -> None:
    golden = np.load(DATA / "relational.npz")
    embeddings = golden["windows"].mean(axis=1)
    np.testing.assert_allclose(embeddings, golden["embedding"], atol=1e-6)
    model = RelationalModel(32, 32, projection=False)
    with torch.no_grad():
        model.head_weight.copy_(torch.from_numpy(golden["head_weight"]))
        model.head_bias.copy_(torch.from_numpy(golden["head_bias"])[0])
        model.alpha.fill_(float(golden["alpha"]))
        model.tau.fill_(float(golden["temperature"]))
    scores = model(torch.from_numpy(embeddings)[None])
    loss = (scores[0] - torch.from_numpy(golden["target"])).square().mean()
    loss.backward()
    np.testing.assert_allclose(scores[0].detach(), golden["scores"], atol=1e-5)
    np.testing.assert_allclose(loss.item(), golden["loss"], atol=1e-5)
    np.testing.assert_allclose(model.alpha.grad, golden["grad_alpha"], atol=1e-5)
    np.testing.assert_allclose(model.tau.grad, golden["grad_temperature"], atol=1e-5)
    np.testing.assert_allclose(model.head_weight.grad, golden["grad_head_weight"], atol=1e-5)


@pytest.mark.parametrize("relation", ["product", "additive", "none"])
def test_loss_of_a_batch_equals_mean_over_single_rollouts(relation: str) -> None:
    torch.manual_seed(0)
    model = RelationalModel(6, 4, relation=relation).double()
    features, targets = torch.randn(5, 7, 6).double(), torch.randn(5, 7).double()
    model.set_feature_statistics(features)
    together = (model(features) - targets).square().mean()
    alone = torch.stack([(model(f[None]) - t[None]).square().mean() for f, t in zip(features, targets, strict=True)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-12, atol=1e-14)


def test_projection_standardises_its_input_and_gives_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 5, 6, generator=generator) * 3 + 7
    features[..., 2] = 4.0
    model = RelationalModel(6, 4)
    model.set_feature_statistics(features)
    torch.testing.assert_close(model.embed(features).norm(dim=-1), torch.ones(40, 5))
    changed = RelationalModel(6, 4)
    changed.set_feature_statistics(features * 10 - 3)
    torch.testing.assert_close(changed.embed(features * 10 - 3), model.embed(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("relation", "projection"), [("product", True), ("additive", True), ("product", False)])
def test_save_and_load(tmp_path: Path, relation: str, projection: bool) -> None:
    model = RelationalModel(6, 4 if projection else 6, relation=relation, projection=projection, seed=5)
    model.standardiser = Standardiser(kind="per_position", mean=(1.0, 2.0), std=(0.5, 0.25))
    features = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(2))
    model.set_feature_statistics(features)
    model.save(tmp_path / "model")
    loaded = RelationalModel.load(tmp_path / "model")
    torch.testing.assert_close(loaded(features), model(features), rtol=0, atol=0)
    assert loaded.standardiser == model.standardiser
    assert loaded.relation_values() == model.relation_values()


def test_load_refuses_an_incomplete_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no relational model in"):
        RelationalModel.load(tmp_path)


def test_model_settings_are_checked() -> None:
    with pytest.raises(UserError, match="relation is 'sum'; choose one of product, additive, none"):
        RelationalModel(4, 4, relation="sum")
    with pytest.raises(UserError, match="embedding_dim is 3 but the encoder gives 4"):
        RelationalModel(4, 3, projection=False)


def test_relation_values_are_checked() -> None:
    with pytest.raises(UserError, match="relation is 'sum'"):
        Relation(kind="sum")
    with pytest.raises(UserError, match="tau not zero"):
        Relation(tau=0.0)
    with pytest.raises(UserError, match="must be finite"):
        Relation(alpha=float("nan"))


@pytest.mark.parametrize("kind", ["product", "additive", "none"])
def test_sensitivity_bounds_the_change_of_scores(kind: str) -> None:
    relation = Relation(kind=kind, alpha=-1.5, tau=0.4, gamma=-0.3, offset=0.1)
    individual = np.array([-2.0, 0.0, 3.0])
    change = np.abs(relation.scores(individual, np.full(3, 0.75)) - relation.scores(individual, np.full(3, 0.25)))
    np.testing.assert_allclose(relation.sensitivity(individual) * 0.5, change, rtol=1e-12)
