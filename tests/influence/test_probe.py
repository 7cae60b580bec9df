"""A probe takes exactly the trainer's steps, goes back exactly, and its losses and gradients are those of plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, UserError, learning_rate
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.batch import DocumentRules, document_inputs
from megatron_groupmates.model.losses import next_token_batch
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import (
    BATCH,
    SEQUENCE_LENGTH,
    VOCABULARY,
    TrainedRun,
    batch_of_step,
    one_rank,
    open_groups,
    snapshot,
    tiny_config,
    trained_run,
)

STEP = 3
KINDS = ("param", "exp_avg", "exp_avg_sq")


def reference_set() -> ReferenceSet:
    """Seven examples, some with few scored tokens, one with none."""
    samples = torch.randint(VOCABULARY, (7, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(8))
    tokens, labels = next_token_batch(samples)
    labels[0, 2:] = -100
    labels[3] = -100
    labels[5, ::2] = -100
    return ReferenceSet(tokens=tokens, labels=labels)


def build_probe(config: Config, groups: Any, batch_size: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.gpt import build_gpt

    return Probe(build_gpt(config, groups, groups.tensor_size, dtype), config, groups, reference_set(), batch_size, DocumentRules(eot_id=0))


def state_of(probe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of masters and moments, kind -> name -> this rank's slice."""
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for flat in probe._flat:
        for kind, values in zip(KINDS, (flat.master, flat.average, flat.square), strict=True):
            parts = values.detach().clone().split([p.numel() for p in flat.parameters])
            found[kind] |= {name: part.view(p.shape) for name, part, p in zip(flat.names, parts, flat.parameters, strict=True)}
    return found


def saved_state(checkpoint: ZeroCheckpoint, groups: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {name: checkpoint.read_slice(name, kind, groups.tensor_rank, groups.tensor_size) for name in checkpoint.names}
        for kind in KINDS
    }


def differences(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """What is not bitwise equal."""
    assert all(found[kind].keys() == expected[kind].keys() for kind in KINDS)
    return [f"{kind} {name}" for kind in KINDS for name in expected[kind] if not torch.equal(found[kind][name], expected[kind][name])]


def relative_error(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """For each kind the distance over the size of the whole."""
    result = {}
    for kind in KINDS:
        squares = [
            ((found[kind][name].double() - value.double()).square().sum(), value.double().square().sum())
            for name, value in expected[kind].items()
        ]
        result[kind] = math.sqrt(sum(float(error) for error, _ in squares) / sum(float(size) for _, size in squares))
    return result


def follow_trainer(run: TrainedRun, groups: Any, step: int, which: str = "run", **changes: Any) -> dict[str, Any]:
    """Load the checkpoint of ``step``, take the trainer's next step; the state before, after, and what the trainer saved."""
    config = run.config(**changes)
    before, after = ZeroCheckpoint(run.tag(step, which)), ZeroCheckpoint(run.tag(step + 1, which))
    probe = build_probe(config, groups)
    probe.load(before)
    loaded = state_of(probe)
    norm = probe.step(batch_of_step(run, step + 1), learning_rate(config, step + 1))
    return {
        "loaded": loaded,
        "before": saved_state(before, groups),
        "stepped": state_of(probe),
        "after": saved_state(after, groups),
        "norm": norm,
    }


PLAIN = {"model__z_loss": 0.0, "training__gradient_clipping": 0.0, "training__train_iters": 2}


def measure_inner_product(run: TrainedRun, groups: Any) -> list[float]:
    """Reference gradient times change over one step: of the whole model, and of it without each half of the gradient."""
    probe = build_probe(run.config(), groups)
    probe.load(ZeroCheckpoint(run.tag(STEP)))
    gradient = probe.reference_gradient()
    probe.step(batch_of_step(run, 1)[:1], 1e-2)
    only_norms = [torch.zeros_like(gradient[0]), gradient[1]]
    return [probe.change_along(gradient), probe.change_along(only_norms), probe.reference_loss()]


def two_ranks(rank: int, world_size: int, own: TrainedRun, other: TrainedRun) -> dict[str, Any]:
    """One rank's part of all that needs two, in one launch."""
    groups = open_groups(world_size)
    own_probe = build_probe(own.config(), groups)
    own_probe.load(ZeroCheckpoint(own.tag(STEP)))
    gradient = own_probe.reference_gradient()
    sharded = own_probe._flat[0].num_sharded == gradient[0].numel() and own_probe._flat[1].num_sharded == 0
    return {
        "steps": {step: follow_trainer(own, groups, step) for step in (1, STEP, 4)},
        "plain": follow_trainer(own, groups, 1, "plain", **PLAIN),
        "other": follow_trainer(other, groups, STEP),
        "inner": measure_inner_product(other, groups),
        "sharded": sharded,
        "loss": own_probe.reference_loss(),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainedRun]:
    return {size: trained_run(size, tmp_path_factory) for size in (1, 2)}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with one_rank(tmp_path_factory.mktemp("group")) as opened:
        yield opened


@pytest.fixture(scope="module")
def on_two_ranks(runs: dict[int, TrainedRun], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, runs[2], runs[1], tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def models(groups: Any) -> dict[bool, tuple[Config, torch.nn.Module, Any]]:
    """Config, model and groups, by whether positions begin again in each document; weights so large that attention matters."""
    from megatron_groupmates.model.gpt import build_gpt

    configs = {reset: tiny_config("unused", model__init_std=0.3, data__reset_position_ids=reset) for reset in (False, True)}
    return {reset: (config, build_gpt(config, groups, 1, torch.float32), groups) for reset, config in configs.items()}


@pytest.fixture
def loaded(runs: dict[int, TrainedRun], groups: Any) -> Any:
    probe = build_probe(runs[1].config(), groups)
    probe.load(ZeroCheckpoint(runs[1].tag(STEP)))
    return probe


def assert_follows(result: dict[str, Any]) -> None:
    assert differences(result["loaded"], result["before"]) == []
    assert len(differences(result["stepped"], result["before"])) == len(KINDS) * len(result["before"]["param"])
    assert differences(result["stepped"], result["after"]) == []


class TestTheTrainersStep:
    """The trainer's schedule is in its warm-up at step 2 and decays after it."""

    @pytest.mark.parametrize("step", [1, STEP, 4])
    def test_bitwise_on_one_rank(self, runs, groups, step):
        result = follow_trainer(runs[1], groups, step)
        assert result["norm"] > 2 * runs[1].config().training.gradient_clipping
        assert_follows(result)

    def test_bitwise_without_clipping_and_z_loss(self, runs, groups):
        assert_follows(follow_trainer(runs[1], groups, 1, "plain", **PLAIN))

    @pytest.mark.parametrize("step", [1, STEP, 4])
    def test_bitwise_on_two_ranks(self, on_two_ranks, step):
        for rank in on_two_ranks:
            assert_follows(rank["steps"][step])
        assert len({rank["steps"][step]["norm"] for rank in on_two_ranks}) == 1

    def test_bitwise_on_two_ranks_without_clipping_and_z_loss(self, on_two_ranks):
        for rank in on_two_ranks:
            assert_follows(rank["plain"])

    @pytest.mark.parametrize(
        ("changes", "kinds"),
        [
            ({"model__z_loss": 0.0}, {"param", "exp_avg", "exp_avg_sq"}),
            ({"training__gradient_clipping": 0.0}, {"param", "exp_avg", "exp_avg_sq"}),
            ({"optimizer__weight_decay": 0.0}, {"param"}),
            ({"optimizer__learning_rate": 2e-2}, {"param"}),
        ],
    )
    def test_every_setting_matters(self, runs, groups, changes, kinds):
        # Else equality with the trainer would say nothing about it.
        result = follow_trainer(runs[1], groups, STEP, **changes)
        assert {line.split()[0] for line in differences(result["stepped"], result["after"])} == kinds

    def test_norms_are_not_decayed(self, runs, groups):
        result = follow_trainer(runs[1], groups, STEP, optimizer__weight_decay=0.0)
        assert not [line for line in differences(result["stepped"], result["after"]) if "norm" in line]

    def test_a_checkpoint_of_one_rank_on_two(self, on_two_ranks):
        for rank in on_two_ranks:
            assert differences(rank["other"]["loaded"], rank["other"]["before"]) == []
            assert max(relative_error(rank["other"]["stepped"], rank["other"]["after"]).values()) < 1e-6

    def test_a_checkpoint_of_two_ranks_on_one(self, runs, groups):
        result = follow_trainer(runs[2], groups, STEP)
        assert differences(result["loaded"], result["before"]) == []
        assert max(relative_error(result["stepped"], result["after"]).values()) < 1e-6


def test_restore_is_exact_after_many_cycles(loaded, runs):
    before, loss = state_of(loaded), loaded.reference_loss()
    samples = batch_of_step(runs[1], STEP + 1)
    loaded.step(samples[:1], 1e-2)
    first = state_of(loaded)
    for cycle in range(10_000):
        loaded.restore()
        # The optimizer alone changes all there is to restore, for a tenth of the time of a whole step.
        if cycle % 100:
            loaded._optimizer.step()
        else:
            loaded.step(samples[cycle // 100 % BATCH].unsqueeze(0), 1e-2)
    assert len(differences(state_of(loaded), before)) == len(KINDS) * len(before["param"])
    loaded.restore()
    assert differences(state_of(loaded), before) == [] and loaded.reference_loss() == loss
    loaded.step(samples[:1], 1e-2)
    assert differences(state_of(loaded), first) == []


@torch.no_grad()
def slow_reference_loss(model: torch.nn.Module) -> float:
    """One example at a time, float64, every scored token counting the same."""
    from megatron_groupmates.model.gpt import token_logits

    reference, total, count = reference_set(), 0.0, 0
    for tokens, labels in zip(reference.tokens, reference.labels, strict=True):
        logits = token_logits(model, tokens.unsqueeze(0))[0].double()
        chosen = labels != -100
        total -= float(logits.log_softmax(-1)[chosen].gather(-1, labels[chosen, None]).sum())
        count += int(chosen.sum())
    assert count == reference.num_scored_tokens
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_reference_loss_is_one_mean_over_tokens(runs, groups, batch_size):
    probe = build_probe(runs[1].config(), groups, batch_size)
    probe.load(ZeroCheckpoint(runs[1].tag(STEP)))
    assert probe.reference_loss() == pytest.approx(slow_reference_loss(probe.model), rel=1e-6)


@torch.no_grad()
def one_at_a_time(model: torch.nn.Module, reference: ReferenceSet, rules: DocumentRules) -> float:
    """Each example by itself through the model's plain inputs, summed in float64."""
    from megatron_groupmates.model.gpt import token_logits

    total, count = 0.0, 0
    for tokens, labels in zip(reference.tokens, reference.labels, strict=True):
        logits = token_logits(model, tokens.unsqueeze(0), *document_inputs(tokens.unsqueeze(0), rules))[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@st.composite
def reference_sets(draw: st.DrawFn) -> ReferenceSet:
    """Examples of 1 to 16 tokens, padded; any of them may have no scored token, but not all."""
    lengths = draw(st.lists(st.integers(1, SEQUENCE_LENGTH), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (len(lengths), max(lengths))
    # Few ids, so that most examples hold several documents.
    tokens, labels = (torch.randint(5, shape, generator=generator) for _ in range(2))
    scored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    for row, length in enumerate(lengths):
        scored[row, length:] = False
    scored[0, 0] = True
    return ReferenceSet(tokens=tokens, labels=labels.masked_fill(~scored, -100))


@pytest.mark.parametrize("resets", [(False, False), (True, False), (False, True), (True, True)])
@given(reference=reference_sets(), batch_size=st.integers(1, 3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_is_one_at_a_time(models, resets, reference, batch_size):
    from megatron_groupmates.influence.probe import Probe

    config, model, groups = models[resets[1]]
    rules = DocumentRules(0, *resets)
    probe = Probe(model, config, groups, reference, batch_size, rules)
    probe._logit_tokens = 3
    assert probe.reference_loss() == pytest.approx(one_at_a_time(model, reference, rules), rel=1e-6)


def test_packing_makes_fewer_passes(runs, groups):
    probe = build_probe(runs[1].config(), groups, 7)
    assert len(probe._reference) == 1 and len(build_probe(runs[1].config(), groups, 2)._reference) == 3
    # The first example is cut to two tokens, the fourth has none that is scored.
    assert probe._reference[0].segments.lengths == (*[SEQUENCE_LENGTH] * 5, 2)


def test_reference_loss_is_the_same_on_one_and_two_ranks(runs, groups, on_two_ranks):
    probe = build_probe(runs[2].config(), groups)
    probe.load(ZeroCheckpoint(runs[2].tag(STEP)))
    assert on_two_ranks[0]["loss"] == on_two_ranks[1]["loss"]
    assert on_two_ranks[0]["loss"] == pytest.approx(probe.reference_loss(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_reference_gradient_is_that_of_the_mean_loss(runs, groups, batch_size):
    from megatron_groupmates.model.gpt import token_logits

    probe = build_probe(runs[1].config(), groups, batch_size)
    probe.load(ZeroCheckpoint(runs[1].tag(STEP)))
    found = probe.reference_gradient()
    before = state_of(probe)
    reference = reference_set()
    logits = token_logits(probe.model, reference.tokens)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), reference.labels.reshape(-1), ignore_index=-100)
    for flat, gradient in zip(probe._flat, found, strict=True):
        expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, flat.parameters, retain_graph=True)])
        assert gradient.dtype == torch.float32
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert differences(state_of(probe), before) == []


def test_inner_product_counts_replicated_parameters_once(runs, groups, on_two_ranks):
    alone = measure_inner_product(runs[1], groups)
    assert on_two_ranks[0]["inner"] == on_two_ranks[1]["inner"]
    assert on_two_ranks[0]["sharded"]
    assert alone[1] != 0.0
    np.testing.assert_allclose(on_two_ranks[0]["inner"], alone, rtol=1e-4)


def test_inner_product_by_hand(loaded, runs):
    gradient, before = loaded.checkpoint_gradient(), state_of(loaded)["param"]
    assert loaded.change_along(gradient) == 0.0
    loaded.step(batch_of_step(runs[1], 1)[:1], 1e-2)
    after = state_of(loaded)["param"]
    expected = 0.0
    for flat, values in zip(loaded._flat, gradient, strict=True):
        parts = values.double().split([p.numel() for p in flat.parameters])
        for name, part in zip(flat.names, parts, strict=True):
            expected += float((part * (after[name].double() - before[name].double()).reshape(-1)).sum())
    assert expected != 0.0 and loaded.change_along(gradient) == pytest.approx(expected, rel=1e-12)


def test_checkpoint_gradient_is_computed_once_for_a_checkpoint(loaded, runs):
    first = loaded.checkpoint_gradient()
    loaded.step(batch_of_step(runs[1], 1)[:1], 1e-2)
    assert loaded.checkpoint_gradient() is first
    assert differences(state_of(loaded), saved_state(ZeroCheckpoint(runs[1].tag(STEP)), loaded._groups)) == []
    assert all(torch.equal(part, again) for part, again in zip(first, loaded.reference_gradient(), strict=True))
    loaded.load(ZeroCheckpoint(runs[1].tag(STEP + 1)))
    assert not any(torch.equal(part, other) for part, other in zip(first, loaded.checkpoint_gradient(), strict=True))


def test_bfloat16_steps_from_float32_masters_and_restores_exactly(runs, groups):
    config = runs[1].config()
    probe = build_probe(config, groups, dtype=torch.bfloat16)
    checkpoint = ZeroCheckpoint(runs[1].tag(STEP))
    probe.load(checkpoint)
    before, loss = state_of(probe), probe.reference_loss()
    assert before["param"]["output_layer.weight"].dtype == torch.float32
    assert differences(before, saved_state(checkpoint, groups)) == []
    weights = [p.detach().clone() for p in probe.model.parameters()]
    for name, p in probe.model.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, before["param"][name].bfloat16())
    # So small a step that most weights keep their bfloat16 value; the masters must move all the same.
    probe.step(batch_of_step(runs[1], 4), 1e-6)
    stepped = state_of(probe)
    assert len([line for line in differences(stepped, before) if line.startswith("param")]) == len(weights)
    for name, p in probe.model.named_parameters():
        assert torch.equal(p, stepped["param"][name].bfloat16())
    for _ in range(3):
        probe.step(batch_of_step(runs[1], 4), 1e-2)
    assert probe.reference_loss() != loss
    probe.restore()
    assert differences(state_of(probe), before) == [] and probe.reference_loss() == loss
    assert all(torch.equal(p, weight) for p, weight in zip(probe.model.parameters(), weights, strict=True))
    exact = build_probe(config, groups)
    exact.load(checkpoint)
    assert loss == pytest.approx(exact.reference_loss(), rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__ffn_hidden_size": 64},
            r"parameter decoder.layers.0.mlp.linear_fc1.weight: the checkpoint's slice for tensor-parallel "
            r"rank 0 of 1 has shape \(96, 32\), the config's model \(128, 32\): the checkpoint is of another model",
        ),
        (
            {"model__vocab_size": 300},
            r"parameter embedding.word_embeddings.weight: .* has shape \(256, 32\), the config's model \(300, 32\)",
        ),
        ({"model__num_layers": 3}, r"the config's model has parameter decoder.layers.2\S+, the checkpoint has not"),
        ({"model__num_layers": 1}, r"the checkpoint has parameter decoder.layers.1\S+, the config's model has not"),
    ],
)
def test_another_models_checkpoint_is_refused(runs, groups, changes, message):
    probe = build_probe(runs[1].config(**changes), groups)
    with pytest.raises(UserError, match=message):
        probe.load(ZeroCheckpoint(runs[1].tag(STEP)))


def test_a_second_checkpoint_replaces_the_first(loaded, runs, groups):
    checkpoint = ZeroCheckpoint(runs[1].tag(STEP + 1))
    loaded.load(checkpoint)
    loaded.step(batch_of_step(runs[1], 1), 1e-2)
    loaded.restore()
    assert differences(state_of(loaded), saved_state(checkpoint, groups)) == []
    loaded.step(batch_of_step(runs[1], STEP + 2), learning_rate(runs[1].config(), STEP + 2))
    assert differences(state_of(loaded), saved_state(ZeroCheckpoint(runs[1].tag(STEP + 2)), groups)) == []


def test_loading_changes_no_file(runs, groups):
    before = snapshot(runs[1].root)
    build_probe(runs[1].config(), groups).load(ZeroCheckpoint(runs[1].tag(STEP)))
    assert snapshot(runs[1].root) == before
