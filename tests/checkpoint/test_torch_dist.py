"""Megatron-LM's distributed checkpoints: what megatron-core writes is read back, whole and in slices, and nothing is run."""

from __future__ import annotations

import argparse
import itertools
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import check_complete, latest_tag, tag_of
from megatron_groupmates.checkpoint.distributed_files import DistributedFiles
from megatron_groupmates.checkpoint.opening import open_checkpoint
from megatron_groupmates.checkpoint.torch_dist import TorchDistCheckpoint, load_common_state
from megatron_groupmates.config import UserError
from tests.common.configs import tiny_config
from tests.common.distributed import run_ranks

LAYERS, HIDDEN, FFN, VOCABULARY = 2, 8, 12, 32
SHAPES = {  # key -> shape of a layer, or of the whole where it is not one of the layers'; and the split dimension
    "embedding.word_embeddings.weight": ((VOCABULARY, HIDDEN), 0),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": ((HIDDEN,), None),
    "decoder.layers.self_attention.linear_qkv.weight": ((3 * HIDDEN, HIDDEN), 0),
    "decoder.layers.self_attention.linear_proj.weight": ((HIDDEN, HIDDEN), 1),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": ((HIDDEN,), None),
    "decoder.layers.mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 0),
    "decoder.layers.mlp.linear_fc1.bias": ((2 * FFN,), 0),
    "decoder.layers.mlp.linear_fc2.weight": ((HIDDEN, FFN), 1),
    "decoder.final_layernorm.weight": ((HIDDEN,), None),
}
KINDS = {"param": "", "exp_avg": "optimizer.state.exp_avg.", "exp_avg_sq": "optimizer.state.exp_avg_sq."}


def whole_tensors() -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint under its key, layers stacked."""
    generator, found = torch.Generator().manual_seed(0), {}
    for prefix in KINDS.values():
        for key, (shape, _) in SHAPES.items():
            stacked = (LAYERS, *shape) if key.startswith("decoder.layers.") else shape
            found[prefix + key] = torch.rand(stacked, generator=generator)
    return found


def common_state(**changes: Any) -> dict[str, Any]:
    settings = {"lr": 0.25, "betas": (0.9, 0.95), "eps": 1e-8, "decoupled_weight_decay": True}
    groups = [settings | {"wd_mult": mult, "weight_decay": 0.1 * mult} for mult in (1.0, 0.0)]
    args = argparse.Namespace(swiglu=True, consumed_train_samples=48, exit_signal=signal.SIGTERM, hidden_dropout=0.1)
    optimizer = {"state": {"common_step": torch.tensor(11.0)}, "param_groups": groups}
    return {"args": args, "iteration": 12, "optimizer": optimizer} | changes


def save(rank: int, world_size: int, directory: str) -> None:
    """Each rank saves its tensor-parallel slices, layer by layer, as megatron-core's models do: all of it and two variants."""
    from megatron_groupmates.parallel.device import prepare_cpu_backend

    prepare_cpu_backend()
    torch.cuda.synchronize = lambda: None
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    for variant in ("whole", "half", "without_squares"):
        tensors = whole_tensors()
        if variant == "half":
            tensors |= {f"optimizer.state.fp32_param.{key}": tensors[key] for key in SHAPES}
            tensors |= {key: tensors[key].bfloat16() for key in SHAPES}
        if variant == "without_squares":
            tensors = {key: tensor for key, tensor in tensors.items() if "exp_avg_sq" not in key}
        to = Path(directory) / variant / "iter_0000012"
        if rank == 0:
            to.mkdir(parents=True)
            (to.parent / "latest_checkpointed_iteration.txt").write_text("12")
        torch.distributed.barrier()
        dist_checkpointing.save(common_state() | sharded(tensors, rank, world_size), str(to))
    parallel_state.destroy_model_parallel()


def sharded(tensors: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    found = {}
    for key, tensor in tensors.items():
        name = next(name for name in SHAPES if key.endswith(name))
        dim, stacked = SHAPES[name][1], name.startswith("decoder.layers.")
        for layer in range(LAYERS if stacked else 1):
            part = tensor[layer] if stacked else tensor
            place = [(0, layer, LAYERS)] if stacked else []
            if dim is not None:
                part = part.chunk(world_size, dim)[rank].contiguous()
                place.append((dim + stacked, rank, world_size))
            replica = (0, 0 if dim is not None else rank, 0)
            found[f"{key}.{layer}"] = ShardedTensor.from_rank_offsets(key, part, *place, replica_id=replica, prepend_axis_num=int(stacked))
    return found


@pytest.fixture(scope="module", params=[1, 2])
def variants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by one rank, and by two tensor-parallel ones."""
    directory = tmp_path_factory.mktemp("torch_dist")
    run_ranks(save, request.param, str(directory), tmp_path=directory, timeout_seconds=200)
    return directory


@pytest.fixture
def checkpoint(variants: Path) -> Path:
    return variants / "whole" / "iter_0000012"


def expected(name: str, kind: str) -> torch.Tensor:
    """What the parameter of that name was saved as."""
    key, layer = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_"), None
    key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    if key.startswith("decoder.layers."):
        layer = int(key.split(".")[2])
        key = key.replace(f"layers.{layer}.", "layers.")
    found = whole_tensors()[KINDS[kind] + key]
    return found if layer is None else found[layer]


def test_everything_is_read_whatever_the_size_it_was_saved_at(checkpoint: Path) -> None:
    reader = TorchDistCheckpoint(checkpoint)
    assert (reader.step, reader.adam_step, reader.consumed_train_samples, reader.next_learning_rate) == (12, 11, 48, 0.25)
    assert len(reader.names) == 2 + 7 * LAYERS and "decoder.layers.1.pre_mlp_layernorm.weight" in reader.names
    for name in reader.names:
        for kind in KINDS:
            whole = expected(name, kind)
            assert reader.shape(name) == tuple(whole.shape)
            torch.testing.assert_close(reader.read(name, kind), whole, rtol=0, atol=0)
    decayed, others = (group["param_names"] for group in reader.param_groups)
    assert sorted(decayed + others) == sorted(reader.names)
    assert {name.rpartition(".")[2] for name in others} == {"weight", "bias"} and not [name for name in others if "linear_proj" in name]
    assert reader.left_out_of_oracles == ["--hidden-dropout 0.1: oracles are measured without dropout"]


def test_slices_are_those_of_a_model_of_another_size(checkpoint: Path) -> None:
    reader = TorchDistCheckpoint(checkpoint)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate, up = expected(name, "param").chunk(2)
    for rank in range(4):
        found = reader.read_slice(name, "param", rank, 4)
        torch.testing.assert_close(found, torch.cat([gate.chunk(4)[rank], up.chunk(4)[rank]]), rtol=0, atol=0)
        columns = reader.read_slice("decoder.layers.0.self_attention.linear_proj.weight", "exp_avg", rank, 4)
        assert columns.shape == (HIDDEN, HIDDEN // 4)
    out = torch.empty(HIDDEN)
    reader.read_slice_into("decoder.layers.0.input_layernorm.weight", "exp_avg_sq", out, 1, 2)
    torch.testing.assert_close(out, expected("decoder.layers.0.input_layernorm.weight", "exp_avg_sq"), rtol=0, atol=0)
    padded = reader.read_slice("embedding.word_embeddings.weight", "param", 1, 2, vocabulary_rows=VOCABULARY + 8)
    assert padded.shape == (VOCABULARY // 2 + 4, HIDDEN) and not padded[-8:].any()


def test_what_cannot_be_read_is_named(checkpoint: Path) -> None:
    reader = TorchDistCheckpoint(checkpoint)
    with pytest.raises(UserError, match="has no parameter 'lm_head'"):
        reader.read("lm_head", "param")
    with pytest.raises(UserError, match="kind 'grad' is not one of param, exp_avg"):
        reader.read(reader.names[0], "grad")
    with pytest.raises(UserError, match=r"has shape \(8,\), the config's model \(9,\): the checkpoint is of another model"):
        reader.read_slice_into("decoder.final_layernorm.weight", "param", torch.empty(9), 0, 1)


def test_of_16_bit_weights_the_float32_copy_is_read(variants: Path) -> None:
    reader = TorchDistCheckpoint(variants / "half" / "iter_0000012")
    for name in reader.names:
        torch.testing.assert_close(reader.read(name, "param"), expected(name, "param"), rtol=0, atol=0)


def test_moments_that_are_missing_are_named(variants: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold exp_avg_sq of .*--dist-ckpt-optim-fully-reshardable"):
        TorchDistCheckpoint(variants / "without_squares" / "iter_0000012")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {}}, "holds no settings of the optimizer"),
        ({"optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}}, "does not say how many steps its optimizer has taken"),
        ({"args": {}}, "was not saved by Megatron-LM"),
        ({"args": argparse.Namespace(evil=argparse.ArgumentParser)}, "refused: the file wants to create or call 'argparse.ArgumentParser'"),
    ],
)
def test_common_states_that_are_refused(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    torch.save(common_state(**changes), tmp_path / "copy" / "common.pt")
    with pytest.raises(UserError, match=message):
        TorchDistCheckpoint(tmp_path / "copy")


def test_damaged_files(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    reader = TorchDistCheckpoint(tmp_path / "copy")
    with pytest.raises(UserError, match=r"distcp is cut short|is damaged|is not a zip file"):
        for name, kind in itertools.product(reader.names, KINDS):
            reader.read(name, kind)


def test_other_formats(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint of --ckpt-format torch_dist"):
        load_common_state(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        DistributedFiles(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="is empty: its writer was stopped"):
        DistributedFiles(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"is not what torch.distributed.checkpoint writes"):
        DistributedFiles(tmp_path)


def test_the_server_finds_and_opens_it(checkpoint: Path) -> None:
    assert latest_tag(checkpoint.parent) == "iter_0000012" and tag_of(7, "iter_0000012") == "iter_0000007"
    check_complete(checkpoint)
    assert open_checkpoint(tiny_config(checkpoint={"format": "megatron_lm"}), checkpoint).step == 12
    with pytest.raises(UserError, match="is still being written"):
        check_complete(checkpoint.parent / "iter_0000016")
