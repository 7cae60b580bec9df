"""Checkpoints written by real DeepSpeed engines around a small tensor-parallel model with megatron-core's names."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_groupmates.parallel.device import skip_inference_operators

HIDDEN, FFN, VOCABULARY, QUERY_ROWS = 8, 12, 20, 24
NUM_LAYERS = 3
CLIENT_STATE = {"consumed_train_samples": 24, "log_digest": "abc", "gated_linear_unit": True}


def full_shapes() -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Name -> (full shape, dimension split over tensor-parallel ranks or None), in megatron-core's order."""
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {}
    shapes["embedding.word_embeddings.weight"] = ((VOCABULARY, HIDDEN), 0)
    for layer in range(NUM_LAYERS):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": ((HIDDEN,), None),
            prefix + "self_attention.linear_proj.weight": ((HIDDEN, HIDDEN), 1),
            prefix + "self_attention.linear_qkv.weight": ((QUERY_ROWS, HIDDEN), 0),
            prefix + "self_attention.q_layernorm.weight": ((3,), None),
            prefix + "pre_mlp_layernorm.weight": ((HIDDEN,), None),
            prefix + "mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 0),
            prefix + "mlp.linear_fc2.weight": ((HIDDEN, FFN), 1),
        }
    return shapes | {"decoder.final_layernorm.weight": ((HIDDEN,), None), "output_layer.weight": ((VOCABULARY, HIDDEN), 0)}


def slice_by_hand(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What tensor-parallel rank ``rank`` of ``size`` holds of ``full``, by explicit indexing."""
    dim = full_shapes()[name][1]
    if dim is None:
        return full
    if name.endswith("linear_fc1.weight"):
        width = FFN // size
        gate, up = full[:FFN], full[FFN:]
        return torch.cat([gate[rank * width : (rank + 1) * width], up[rank * width : (rank + 1) * width]])
    width = full.shape[dim] // size
    return full[rank * width : (rank + 1) * width] if dim == 0 else full[:, rank * width : (rank + 1) * width]


class Leaf(torch.nn.Module):
    """One weight w with its target t; the loss of a sample with scale a is ``sum a (w - t)^2 / 2``."""

    def __init__(self, weight: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.target = target

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() - self.target).square().sum() * scale.float().sum() / 2


class TinyModel(torch.nn.Module):
    """Weights only. The loss is a sum over elements, so that training does not depend on how they are split."""

    def __init__(self, rank: int, size: int, *, tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, (shape, _) in full_shapes().items():
            weight, target = (slice_by_hand(name, torch.randn(shape, generator=generator), rank, size) for _ in range(2))
            *path, leaf = name.removesuffix(".weight").split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.add_module(leaf, Leaf(weight, target))
            # DeepSpeed counts replicated weights on the first tensor-parallel rank only.
            module._modules[leaf].weight.tensor_model_parallel = full_shapes()[name][1] is not None
        if tied:
            self.output_layer.weight = self.embedding.word_embeddings.weight
        self.register_buffer("rotary", torch.arange(3.0))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        losses = [module(scale) for module in self.modules() if isinstance(module, Leaf)]
        return torch.stack(losses).sum()


class Mpu:
    """What DeepSpeed asks of an mpu: consecutive ranks share the model. Collective to construct."""

    def __init__(self, rank: int, world_size: int, tensor_size: int) -> None:
        self.tensor_size, self.data_size = tensor_size, world_size // tensor_size
        self.tensor_rank, self.data_rank = rank % tensor_size, rank // tensor_size
        for start in range(0, world_size, tensor_size):
            ranks = range(start, start + tensor_size)
            group = dist.new_group(list(ranks))
            if rank in ranks:
                self.tensor_group = group
        for first in range(tensor_size):
            ranks = range(first, world_size, tensor_size)
            group = dist.new_group(list(ranks))
            if rank in ranks:
                self.data_group = group

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        return self.data_size


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One engine: ``layout`` names DeepSpeed's optimizer wrapper where it has two for a precision.

    ``bf16`` is ZeRO's own optimizer; ``bf16-fp32-accumulation`` makes DeepSpeed use ``BF16_Optimizer`` at stage 1.
    """

    stage: int
    precision: str
    tied: bool = False
    steps: int = 3
    zero_options: tuple[tuple[str, Any], ...] = ()

    @property
    def tag(self) -> str:
        """Directory name that tells recipes apart and ends in the step."""
        words = [f"stage{self.stage}", self.precision, *(["tied"] if self.tied else []), *dict(self.zero_options)]
        return "-".join([*words, f"global_step{self.steps}"])


def write_checkpoints(
    rank: int,
    world_size: int,
    tensor_size: int,
    recipes: list[Recipe],
    directory: str,
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Train and save one engine per recipe under ``directory``; for ``run_ranks``.

    Returns:
        tag -> kind -> name -> this tensor-parallel rank's float32 tensor as the engine held it.
    """
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # fp16 computes on a CPU as well; DeepSpeed only refuses to start there.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    mpu = Mpu(rank, world_size, tensor_size)
    held = {}
    for recipe in recipes:
        with contextlib.redirect_stdout(io.StringIO()):
            engine = build_engine(mpu, recipe, deepspeed)
            train(engine, mpu, recipe.steps)
            engine.save_checkpoint(directory, tag=recipe.tag, client_state=CLIENT_STATE)
        held[recipe.tag] = state_held(engine, ("exp_avg", "exp_avg_sq") if recipe.steps else ())
        engine.destroy()
    return held


def build_engine(mpu: Mpu, recipe: Recipe, deepspeed: Any) -> Any:
    """An engine with AdamW in two groups, decayed and not."""
    model = TinyModel(mpu.tensor_rank, mpu.tensor_size, tied=recipe.tied)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed clips by default, and a norm over tensor-parallel ranks is rounded otherwise than one over one rank.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": recipe.stage, **dict(recipe.zero_options)},
    }
    if recipe.precision.startswith("bf16"):
        settings["bf16"] = {"enabled": True}
    if recipe.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 4}
    if recipe.precision == "bf16-fp32-accumulation":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    skip_inference_operators()
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False)[0]


def train(engine: Any, mpu: Mpu, steps: int) -> None:
    """Steps whose gradients differ by step and data-parallel rank. Collective."""
    for step in range(steps):
        loss = engine(torch.full((1,), 0.5 + 0.25 * mpu.data_rank + 0.125 * step))
        engine.backward(loss)
        engine.step()


def state_held(engine: Any, moments: Sequence[str] = ("exp_avg", "exp_avg_sq")) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters (float32 master copies) and moments the engine holds, by DeepSpeed's own accessors. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    held: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("param", *moments)}
    if engine.zero_optimization():
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            # DeepSpeed links moments to parameters after the first group's first step, when other groups have none yet.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in engine.module.named_parameters():
            held["param"][name] = safe_get_full_fp32_param(parameter).clone()
            for kind in moments:
                held[kind][name] = safe_get_full_optimizer_state(parameter, kind).clone()
        return held
    wrapper = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    masters = getattr(wrapper, "fp32_groups", None) or [group["params"] for group in wrapper.param_groups]
    models = getattr(wrapper, "fp16_groups", None) or masters
    state = getattr(wrapper, "optimizer", wrapper).state
    for master, parameter in zip(itertools.chain(*masters), itertools.chain(*models), strict=True):
        name = names[id(parameter)]
        held["param"][name] = master.detach().float().clone()
        for kind in moments:
            held[kind][name] = state[master][kind].clone()
    return held
