"""Every tensor read from a checkpoint of a real DeepSpeed engine equals, bit for bit, the one the engine held."""

from __future__ import annotations

import pytest
import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config.errors import UserError
from tests.checkpoint.conftest import EXTRA_RECIPES, LAYOUTS, RECIPES, REFUSED_RECIPES
from tests.common.zero_checkpoints import CLIENT_STATE, VOCABULARY, Recipe, full_shapes, slice_by_hand

KINDS = ("param", "exp_avg", "exp_avg_sq")
STAGE_1 = Recipe(1, "fp32").tag


def check_against_engine(checkpoint: ZeroCheckpoint, held: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    size = len(held)
    for rank, state in enumerate(held):
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                assert torch.equal(checkpoint.read_slice(name, kind, rank, size), tensor), (rank, kind, name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.tag)
@pytest.mark.parametrize(("tensor_size", "data_size"), LAYOUTS)
def test_every_tensor_is_the_one_the_engine_held(saved, tensor_size, data_size, recipe):
    written = saved(tensor_size, data_size)
    checkpoint = ZeroCheckpoint(written.directory / recipe.tag)
    check_against_engine(checkpoint, [held[recipe.tag] for held in written.held])
    assert checkpoint.names == list(full_shapes())
    assert (checkpoint.tensor_model_parallel_size, checkpoint.data_parallel_size) == (tensor_size, data_size)
    assert (checkpoint.zero_stage, checkpoint.step) == (recipe.stage, recipe.steps)
    assert checkpoint.client_state == CLIENT_STATE


@pytest.mark.parametrize("recipe", EXTRA_RECIPES, ids=lambda recipe: recipe.tag)
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_less_usual_engines(saved, tensor_size, recipe):
    written = saved(tensor_size, 2)
    checkpoint = ZeroCheckpoint(written.directory / recipe.tag)
    check_against_engine(checkpoint, [held[recipe.tag] for held in written.held])
    assert checkpoint.names == list(full_shapes())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.precision == "fp32"], ids=lambda recipe: recipe.tag)
def test_a_whole_tensor_does_not_depend_on_the_tensor_parallel_size_it_was_trained_at(saved, recipe):
    # The training loss is a sum over elements, so an engine without tensor parallelism holds the very same values.
    alone = saved(1, 2).held[0][recipe.tag]
    checkpoint = ZeroCheckpoint(saved(2, 2).directory / recipe.tag)
    for name, (shape, _) in full_shapes().items():
        assert checkpoint.shape(name) == shape
        for kind in KINDS:
            assert torch.equal(checkpoint.read(name, kind), alone[kind][name]), (name, kind)


@pytest.mark.parametrize("saved_size", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_of_any_tensor_parallel_size(saved, saved_size, size):
    checkpoint = ZeroCheckpoint(saved(saved_size, 2).directory / STAGE_1)
    for name in checkpoint.names:
        whole = checkpoint.read(name, "exp_avg")
        for rank in range(size):
            assert torch.equal(checkpoint.read_slice(name, "exp_avg", rank, size), slice_by_hand(name, whole, rank, size)), name


@pytest.mark.parametrize("saved_size", [1, 2])
@pytest.mark.parametrize("rows", [VOCABULARY - 2, VOCABULARY + 4, VOCABULARY * 2 + 2])
def test_vocabulary_padded_otherwise(saved, saved_size, rows):
    checkpoint = ZeroCheckpoint(saved(saved_size, 2).directory / STAGE_1)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"):
        whole = checkpoint.read(name, "param")
        expected = whole
        if "layernorm" not in name:
            expected = torch.zeros(rows, whole.shape[1])
            expected[:VOCABULARY] = whole[:rows] if rows < VOCABULARY else whole
        slices = [checkpoint.read_slice(name, "param", rank, 2, vocabulary_rows=rows) for rank in range(2)]
        assert torch.equal(slices[0] if "layernorm" in name else torch.cat(slices), expected)


@pytest.mark.parametrize("saved_layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_slice_is_written_where_it_is_wanted_and_nowhere_else(saved, saved_layout, size):
    # Through every stage, as each cuts the parameters into other fragments.
    for recipe in (recipe for recipe in RECIPES + EXTRA_RECIPES * (saved_layout[1] == 2) if recipe.steps):
        checkpoint = ZeroCheckpoint(saved(*saved_layout).directory / recipe.tag)
        for name in checkpoint.names:
            expected = slice_by_hand(name, checkpoint.read(name, "param"), size - 1, size)
            buffer = torch.full((expected.numel() + 2,), -7.0)
            checkpoint.read_slice_into(name, "param", buffer[1:-1].view(expected.shape), size - 1, size)
            assert torch.equal(buffer[1:-1].view(expected.shape), expected), (recipe.tag, name)
            assert buffer[0] == buffer[-1] == -7.0


def test_a_slice_overwrites_what_was_there(saved):
    name = "output_layer.weight"
    checkpoint = ZeroCheckpoint(saved(2, 2).directory / Recipe(1, "fp32", steps=0).tag)
    out = torch.full((VOCABULARY + 4, checkpoint.shape(name)[1]), -7.0)
    checkpoint.read_slice_into(name, "param", out, 0, 1, vocabulary_rows=VOCABULARY + 4)
    assert torch.equal(out[:VOCABULARY], checkpoint.read(name, "param")) and not out[VOCABULARY:].any()
    out.fill_(-7.0)
    checkpoint.read_slice_into(name, "exp_avg", out, 0, 1, vocabulary_rows=VOCABULARY + 4)
    assert not out.any()


def test_a_slice_of_another_shape_is_refused(saved):
    checkpoint = ZeroCheckpoint(saved(1, 1).directory / STAGE_1)
    message = r"output_layer.weight: the checkpoint's slice for tensor-parallel rank 1 of 2 has shape \(10, 8\), the config's model \(12,"
    with pytest.raises(UserError, match=message):
        checkpoint.read_slice_into("output_layer.weight", "param", torch.empty(12, 8), 1, 2)
    with pytest.raises(UserError, match="kind 'momentum' is not one of"):
        checkpoint.read_slice_into("output_layer.weight", "momentum", torch.empty(20, 8), 0, 1)


def test_parameter_groups_carry_settings_and_names(saved):
    for recipe in RECIPES:
        groups = ZeroCheckpoint(saved(2, 2).directory / recipe.tag).param_groups
        assert [(group["lr"], group["weight_decay"], group["betas"], group["eps"]) for group in groups] == [
            (1e-2, 0.1, (0.9, 0.95), 1e-8),
            (1e-2, 0.0, (0.9, 0.95), 1e-8),
        ]
        matrices = {name for name, (shape, _) in full_shapes().items() if len(shape) > 1}
        assert set(groups[0]["param_names"]) == matrices
        assert set(groups[1]["param_names"]) == full_shapes().keys() - matrices


def test_adam_step_is_the_optimizers_own(saved):
    directory = saved(2, 2).directory
    assert ZeroCheckpoint(directory / STAGE_1).adam_step == 3
    # DeepSpeed's 16-bit optimizer takes one step with zero gradients when it is built.
    assert ZeroCheckpoint(directory / Recipe(0, "bf16").tag).adam_step == 4


def test_before_the_first_step_moments_are_zero(saved):
    checkpoint = ZeroCheckpoint(saved(2, 2).directory / Recipe(1, "fp32", steps=0).tag)
    assert (checkpoint.step, checkpoint.adam_step) == (0, 0)
    for name in checkpoint.names:
        assert torch.equal(checkpoint.read(name, "exp_avg"), torch.zeros(checkpoint.shape(name)))


def test_shared_weights_are_read_under_both_names(saved):
    for stage in (0, 1):
        checkpoint = ZeroCheckpoint(saved(2, 2).directory / Recipe(stage, "fp32", tied=True).tag)
        assert torch.equal(checkpoint.read("output_layer.weight", "param"), checkpoint.read("embedding.word_embeddings.weight", "param"))


def test_a_read_does_not_alias_the_file(saved):
    checkpoint = ZeroCheckpoint(saved(1, 1).directory / STAGE_1)
    name = checkpoint.names[0]
    first = checkpoint.read(name, "param")
    expected = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.read(name, "param"), expected)


def test_unknown_name_and_kind(saved):
    checkpoint = ZeroCheckpoint(saved(1, 1).directory / STAGE_1)
    with pytest.raises(UserError, match=r"no parameter 'lm_head.weight'; its first is 'embedding.word_embeddings.weight'"):
        checkpoint.read("lm_head.weight", "param")
    with pytest.raises(UserError, match="kind 'momentum' is not one of param, exp_avg, exp_avg_sq"):
        checkpoint.read(checkpoint.names[0], "momentum")


def test_sizes_that_do_not_divide(saved):
    checkpoint = ZeroCheckpoint(saved(1, 1).directory / STAGE_1)
    with pytest.raises(UserError, match="20 rows cannot be divided over 3 tensor-parallel ranks; choose"):
        checkpoint.read_slice("output_layer.weight", "param", 0, 3)
    with pytest.raises(UserError, match="a vocabulary of 22 rows cannot be divided over 4 tensor-parallel ranks"):
        checkpoint.read_slice("output_layer.weight", "param", 0, 4, vocabulary_rows=22)


def test_gated_layout_must_be_stated_only_where_it_matters(saved):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    checkpoint = ZeroCheckpoint(saved(2, 2).directory / STAGE_1)
    gated = checkpoint.read(name, "param")
    checkpoint.client_state["gated_linear_unit"] = False
    assert torch.equal(checkpoint.read(name, "param"), torch.cat([checkpoint.read_slice(name, "param", rank, 2) for rank in range(2)]))
    assert not torch.equal(checkpoint.read(name, "param"), gated)
    del checkpoint.client_state["gated_linear_unit"]
    assert checkpoint.shape(name) == gated.shape
    checkpoint.read_slice(name, "param", 1, 2)
    checkpoint.read("output_layer.weight", "param")
    with pytest.raises(UserError, match=r"the checkpoint does not say which it is; save it with client_state\['gated_linear_unit'\]"):
        checkpoint.read(name, "param")


@pytest.mark.parametrize(
    ("recipe", "message"),
    zip(
        REFUSED_RECIPES,
        [
            "global_step0: the optimizer's parameters cannot be matched to the model's names by shape; give the optimizer named",
            "saved with 'elastic_checkpoint'.*set to false",
        ],
        strict=True,
    ),
)
def test_checkpoints_that_leave_out_what_is_needed_are_refused(saved, recipe, message):
    with pytest.raises(UserError, match=message):
        ZeroCheckpoint(saved(2, 2).directory / recipe.tag)


@pytest.mark.parametrize("recipe", RECIPES[:4], ids=lambda recipe: recipe.tag)
def test_frozen_parameters_are_refused(copy_of, recipe):
    path = copy_of(recipe.tag)
    state = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)
    state["module"]["decoder.frozen.weight"] = torch.ones(2, 9)
    torch.save(state, path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="cannot be matched" if recipe.stage == 0 else r"does not train.*: decoder\.frozen"):
        ZeroCheckpoint(path)


def test_partitions_that_do_not_add_up(copy_of):
    path = copy_of(STAGE_1)
    # The other rank's partition in this rank's place: parameters then miss elements.
    first = path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    first.write_bytes((path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").read_bytes())
    with pytest.raises(UserError, match=r"hold 0 elements of 'embedding.word_embeddings.weight' \(param\).*\(10, 8\) has 80"):
        ZeroCheckpoint(path)
