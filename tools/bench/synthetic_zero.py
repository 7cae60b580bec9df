"""Checkpoints with the files of DeepSpeed's ZeRO-1 in bf16 that no engine wrote: a model of any size, its values known by name.

They are written one data-parallel partition at a time, so that writing takes a fraction of the memory that training would.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.config.sections import ModelConfig

KINDS = ("param", "exp_avg", "exp_avg_sq")
STEP = 100
# Name -> (full shape, dimension split over tensor-parallel ranks or None), in the model's order.
Shapes = Mapping[str, tuple[tuple[int, ...], int | None]]


def gpt_shapes(model: ModelConfig, ffn_hidden_size: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """The parameters of the package's GPT, without key-value groups."""
    hidden, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    layer = {
        "input_layernorm.weight": ((hidden,), None),
        "self_attention.linear_proj.weight": ((hidden, hidden), 1),
        "self_attention.linear_qkv.weight": ((3 * hidden, hidden), 0),
        "self_attention.q_layernorm.weight": ((head,), None),
        "self_attention.k_layernorm.weight": ((head,), None),
        "pre_mlp_layernorm.weight": ((hidden,), None),
        "mlp.linear_fc1.weight": ((2 * ffn_hidden_size, hidden), 0),
        "mlp.linear_fc2.weight": ((hidden, ffn_hidden_size), 1),
    }
    return {
        "embedding.word_embeddings.weight": ((model.vocab_size, hidden), 0),
        **{f"decoder.layers.{number}.{name}": entry for number in range(model.num_layers) for name, entry in layer.items()},
        "decoder.final_layernorm.weight": ((hidden,), None),
        "output_layer.weight": ((model.vocab_size, hidden), 0),
    }


def value(shapes: Shapes, name: str, kind: str, rank: int, size: int) -> torch.Tensor:
    """What tensor-parallel rank ``rank`` of ``size`` holds: float32 random numbers cut by explicit indexing."""
    shape, dim = shapes[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} of {name}".encode()))
    full = torch.randn(shape, generator=generator)
    if dim is None:
        return full
    if name.endswith("linear_fc1.weight"):
        # Gate and up, each rank with its part of both.
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim)[rank]


def write_checkpoint(
    directory: Path | str,
    shapes: Shapes,
    tensor_size: int,
    data_size: int,
    client_state: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the tag ``global_step100`` and ``latest`` under ``directory``; returns the tag's directory.

    Weight decay divides the parameters in two groups, as in the package's trainer: matrices and the others.

    Args:
        directory: of the checkpoints.
        shapes: of the whole parameters.
        tensor_size: tensor-parallel size of the run that "saved" it.
        data_size: data-parallel size of that run.
        client_state: kept with the model's states; needs ``gated_linear_unit`` where another tensor-parallel size reads it.
        buffers: tensors of the model that are not trained.
    """
    tag = Path(directory) / f"global_step{STEP}"
    tag.mkdir(parents=True)
    groups = [[name for name, (shape, _) in shapes.items() if (len(shape) > 1) == decayed] for decayed in (True, False)]
    for tensor_rank in range(tensor_size):
        local = [{name: _local_shape(*shapes[name], tensor_size) for name in names} for names in groups]
        state = _model_state(shapes, local, tensor_rank, tensor_size, data_size, buffers or {})
        torch.save({**state, **client_state}, tag / f"mp_rank_{tensor_rank:02d}_model_states.pt")
        for data_rank in range(data_size):
            state = _optimizer_state(shapes, local, tensor_rank, tensor_size, data_rank, data_size)
            name = f"bf16_zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": state, "ds_config": _ds_config(), "ds_version": _ds_version()}, tag / name)
    (Path(directory) / "latest").write_text(tag.name)
    return tag


def _local_shape(shape: tuple[int, ...], dim: int | None, size: int) -> torch.Size:
    return torch.Size(length // size if index == dim else length for index, length in enumerate(shape))


def _padded(shapes: Mapping[str, torch.Size], data_size: int) -> int:
    """Length of a flat group: DeepSpeed aligns each partition to two elements."""
    align = 2 * data_size
    return -(-sum(map(math.prod, shapes.values())) // align) * align


def _model_state(
    shapes: Shapes,
    local: list[dict[str, torch.Size]],
    rank: int,
    tensor_size: int,
    data_size: int,
    buffers: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """A model states file: the bf16 weights are views of one flat tensor for each group."""
    module: OrderedDict[str, torch.Tensor] = OrderedDict(buffers)
    flats = [torch.zeros(_padded(group, data_size), dtype=torch.bfloat16) for group in local]
    views = {
        name: part.view(shape)
        for flat, group in zip(flats, local, strict=True)
        for (name, shape), part in zip(
            group.items(), flat.split([*map(math.prod, group.values()), _padding(group, data_size)]), strict=False
        )
    }
    for name in shapes:
        module[name] = views[name].copy_(value(shapes, name, "param", rank, tensor_size))
    return {
        "module": module,
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict(group) for group in local],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": STEP,
        "global_samples": STEP * data_size,
        "dp_world_size": data_size,
        "mp_world_size": tensor_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": tensor_size},
        "ds_config": _ds_config(),
        "ds_version": _ds_version(),
    }


def _padding(group: Mapping[str, torch.Size], data_size: int) -> int:
    return _padded(group, data_size) - sum(map(math.prod, group.values()))


def _fragments(group: Mapping[str, torch.Size], first: int, last: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, start in the parameter, start in the partition, length) of what the elements ``first`` to ``last`` of a group hold."""
    offset = 0
    for name, shape in group.items():
        end = offset + math.prod(shape)
        start, stop = max(offset, first), min(end, last)
        if start < stop:
            yield name, start - offset, start - first, stop - start
        offset = end


def _optimizer_state(
    shapes: Shapes, local: list[dict[str, torch.Size]], tensor_rank: int, tensor_size: int, data_rank: int, data_size: int
) -> dict[str, Any]:
    """What ZeRO's optimizer of one rank saves: its partition of every group."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "weight_decay": decay} for decay in (0.1, 0.0)], lr=1e-2, betas=(0.9, 0.95))
    states, masters, paddings, mappings = {}, [], [], []
    for number, group in enumerate(local):
        part = _padded(group, data_size) // data_size
        fragments = list(_fragments(group, data_rank * part, (data_rank + 1) * part))
        flat = {kind: torch.zeros(part) for kind in KINDS}
        for (name, source, target, length), kind in itertools.product(fragments, KINDS):
            whole = value(shapes, name, kind, tensor_rank, tensor_size).reshape(-1)
            flat[kind][target : target + length] = whole[source : source + length]
        paddings.append(_padding(group, data_size) if data_rank == data_size - 1 else 0)
        masters.append(flat["param"][: part - paddings[-1]])
        states[number] = {"step": torch.tensor(float(STEP)), "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}
        mappings.append(OrderedDict((name, fragment_address(numel=length, start=target)) for name, _, target, length in fragments))
    return {
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 0.0,
        "base_optimizer_state": {"state": states, "param_groups": optimizer.state_dict()["param_groups"]},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": ZeroStageEnum(1),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group) for group in local],
        "partition_count": [data_size] * len(local),
        "ds_version": _ds_version(),
        "param_slice_mappings": mappings,
    }


def _ds_config() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


def _ds_version() -> str:
    import deepspeed

    return deepspeed.__version__
