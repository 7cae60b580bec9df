"""A checkpoint of any parallel layout into an engine of another: weights, float32 masters, Adam's moments and step counts.

DeepSpeed loads a ZeRO checkpoint only where as many ranks share the optimizer's state as did when it was saved. Here each
rank reads what it holds, parameter by parameter, through :class:`~megatron_groupmates.checkpoint.zero.ZeroCheckpoint`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import deepspeed
import torch

from megatron_groupmates.checkpoint.layout import split_dimension
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import UserError
from megatron_groupmates.parallel import ParallelGroups

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint is divided into files: what must agree for DeepSpeed to load it by itself."""

    tensor_model_parallel_size: int
    data_parallel_size: int
    zero_stage: int

    def __str__(self) -> str:
        return (
            f"tensor-parallel size {self.tensor_model_parallel_size}, data-parallel size {self.data_parallel_size}, "
            f"ZeRO stage {self.zero_stage}"
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: ZeroCheckpoint) -> Layout:
        """The layout it was saved with."""
        return cls(checkpoint.tensor_model_parallel_size, checkpoint.data_parallel_size, checkpoint.zero_stage)

    @classmethod
    def of_engine(cls, engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> Layout:
        """The layout it saves with."""
        return cls(groups.tensor_size, groups.data_size, engine.zero_optimization_stage())


def check_same_model(checkpoint: ZeroCheckpoint, engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> None:
    """Compare the parameters of a checkpoint with those of the model, by name and whole shape.

    Raises:
        UserError: naming the first parameter that differs, and both shapes.
    """
    model = {name: _whole_shape(name, parameter, groups.tensor_size) for name, parameter in engine.module.named_parameters()}
    saved = set(checkpoint.names)
    for name in (*model, *checkpoint.names):
        found, wanted = checkpoint.shape(name) if name in saved else None, model.get(name)
        if found != wanted:
            raise UserError(
                f"checkpoint {checkpoint.path} is of another model: parameter {name} is {_shape_text(found)} in it and "
                f"{_shape_text(wanted)} by this run's config; give the model settings it was trained with, or start a new run"
            )


def load_resharded(engine: deepspeed.DeepSpeedEngine, checkpoint: ZeroCheckpoint, groups: ParallelGroups) -> None:
    """Put the engine into the state that the checkpoint holds, bit for bit. Collective: every rank must call.

    Needs memory for the rank's slice of one parameter at a time. Call before the engine's first step.

    Args:
        engine: around the checkpoint's model, see :func:`check_same_model`.
        checkpoint: of any layout; each rank has its own reader.
        groups: this rank's groups.

    Raises:
        UserError: a damaged checkpoint.
    """
    write = _writer(engine, groups)
    if checkpoint.adam_step:
        write.make_moments(checkpoint.adam_step)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            for kind in ("param", *_MOMENTS) if checkpoint.adam_step else ("param",):
                if kind == "param" or write.holds(parameter):
                    value = checkpoint.read_slice(name, kind, groups.tensor_rank, groups.tensor_size)
                    write.set(parameter, kind, value.to(groups.device).flatten())
        write.finish()
    engine.global_steps = checkpoint.step
    engine.global_samples = checkpoint.step * engine.train_batch_size()


def _writer(engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> _Replicated | _Partitioned | _PartitionedParameters:
    if engine.zero_optimization_stage() == 3:
        return _PartitionedParameters(engine, groups)
    # Some versions of DeepSpeed partition the optimizer's state of a 16-bit model without ZeRO too.
    if hasattr(next(engine.module.parameters()), "_hp_mapping"):
        return _Partitioned(engine)
    return _Replicated(engine)


class _Replicated:
    """Without ZeRO: every rank holds all of its slice, in float32 besides where the model is 16-bit."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        wrapper = engine.optimizer
        self._state = _base_optimizer(wrapper).state
        low = getattr(wrapper, "fp16_groups", None)
        groups_of = low if low is not None else [group["params"] for group in wrapper.param_groups]
        masters_of = wrapper.fp32_groups if low is not None else groups_of
        self._masters = {
            id(parameter): master
            for parameters, masters in zip(groups_of, masters_of, strict=True)
            for parameter, master in zip(parameters, masters, strict=True)
        }

    def make_moments(self, step: int) -> None:
        for master in self._masters.values():
            self._state[master] = _empty_moments(master, step)

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        return True

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        master = self._masters[id(parameter)]
        target = master if kind == "param" else self._state[master][kind]
        target.view(-1).copy_(value)
        if kind == "param":
            parameter.view(-1).copy_(value)

    def finish(self) -> None:
        pass


class _Partitioned:
    """ZeRO-1 and 2: parameters whole, and of each group's flat float32 copy and moments a part per rank."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._optimizer = _base_optimizer(engine.optimizer)

    def make_moments(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            (flat,) = group["params"]
            self._optimizer.state[flat] = _empty_moments(flat, step)

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        return parameter._hp_mapping is not None

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if kind == "param":
            parameter.view(-1).copy_(value)
        if (held := parameter._hp_mapping) is None:
            return
        (flat,) = self._optimizer.param_groups[held.param_group_index]["params"]
        target = flat if kind == "param" else self._optimizer.state[flat][kind]
        inside, of_parameter = held.hp_fragment_address, held.lp_fragment_address
        target.narrow(0, inside.start, inside.numel).copy_(value.narrow(0, of_parameter.start, of_parameter.numel))

    def finish(self) -> None:
        pass


class _PartitionedParameters:
    """ZeRO-3: a part of every parameter, of its float32 copy and of its moments per rank, all equally long, the last padded."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> None:
        self._wrapper, self._rank = engine.optimizer, groups.data_rank

    def make_moments(self, step: int) -> None:
        for flat in self._wrapper.fp32_partitioned_groups_flat:
            self._wrapper.optimizer.state[flat] = _empty_moments(flat, step)

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        return self._rank * parameter.ds_tensor.numel() < parameter.ds_numel

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        length = parameter.ds_tensor.numel()
        part = value.new_zeros(length)
        own = value[self._rank * length : (self._rank + 1) * length]
        part[: len(own)] = own
        if kind == "param":
            deepspeed.utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)

    def finish(self) -> None:
        """Small parameters, which every rank keeps whole, are gathered again. Collective over the data-parallel group."""
        if persistent := self._wrapper.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _base_optimizer(wrapper: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's, which without ZeRO and in float32 is none."""
    return getattr(wrapper, "optimizer", wrapper)


def _empty_moments(values: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """State of torch's AdamW after ``step`` steps, its moments zero."""
    return {"step": torch.tensor(float(step)), **{kind: torch.zeros_like(values) for kind in _MOMENTS}}


def _whole_shape(name: str, parameter: torch.nn.Parameter, tensor_size: int) -> tuple[int, ...]:
    shape = list(getattr(parameter, "ds_shape", parameter.shape))  # what ZeRO-3 leaves on a rank has another
    if tensor_size > 1 and (dim := split_dimension(name)) is not None:
        shape[dim] *= tensor_size
    return tuple(shape)


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"
