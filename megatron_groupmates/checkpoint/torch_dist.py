"""The distributed checkpoints of Megatron-LM (``--ckpt-format torch_dist``), read as data: nothing in them is run.

They hold every parameter whole, whatever the parallel sizes of the run that saved them, the layers of a model stacked
along a first dimension. So do they the optimizer's moments where the optimizer is not distributed, and with
``--dist-ckpt-optim-fully-reshardable`` where it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.checkpoint import layout, partitions
from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.distributed_files import DistributedFiles
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.config.forks import left_out_of_oracles

_COMMON_FILE, _COMMON_KEY = "common.pt", "common_state/shard_0_1"
_STATE = "optimizer.state."
_LAYERS = "decoder.layers."
# The files call a norm by the linear layer behind it, where Transformer Engine fuses it; without that it is a module of its own.
_NORMS = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


class TorchDistCheckpoint:
    """Reader of one checkpoint, such as ``iter_0000100``, with the interface of ``ZeroCheckpoint``.

    Parameters have the names of a model without Transformer Engine. A read takes the whole of a parameter from its file.

    Attributes:
        step: training steps taken.
        adam_step: the step of Adam's bias correction.
        client_state: what all ranks have in common, with the checkout's ``args`` as data.
        names: of the parameters.
        param_groups: one dict per optimizer group: lr, weight_decay, betas, eps and the optimizer's other settings, and
            ``param_names``, the names of its parameters.

    Args:
        directory: of the checkpoint.

    Raises:
        UserError: another format, a damaged file, one that holds anything but data, or a layout of the optimizer's state
            from which the moments of a parameter cannot be told.
    """

    def __init__(self, directory: Path | str) -> None:
        self.path = Path(directory)
        self.client_state = load_common_state(self.path)
        args = self.client_state.get("args")
        if not isinstance(args, Record) or "iteration" not in self.client_state:
            raise UserError(f"checkpoint {self.path} was not saved by Megatron-LM: it holds no arguments of one")
        self._files = DistributedFiles(self.path)
        self.step = int(self.client_state["iteration"])
        self.client_state["gated_linear_unit"] = bool(args.fields.get("swiglu"))
        self.consumed_train_samples = int(args.fields["consumed_train_samples"])
        self._places = {name: place for key, shape in self._files.shapes.items() for name, place in _parameters(key, shape)}
        self.names = list(self._places)
        self._check_optimizer()
        self.adam_step, groups = _optimizer(self.path, self.client_state)
        self.param_groups = [group | {"param_names": self._names_of(group)} for group in groups]

    @property
    def next_learning_rate(self) -> float:
        """Of the step after the checkpoint: the scheduler has run when Megatron-LM saves."""
        return float(max(group["lr"] for group in self.param_groups))

    @property
    def left_out_of_oracles(self) -> list[str]:
        """One line for each thing that this trainer does and an oracle's step does not."""
        return left_out_of_oracles(self.client_state["args"].fields)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter ``name``.

        Raises:
            UserError: for an unknown name.
        """
        key, layer = self._place(name)
        return self._files.shapes[key][0 if layer is None else 1 :]

    def read(self, name: str, kind: str) -> torch.Tensor:
        """The whole parameter or moment, float32; ``kind`` is ``param``, ``exp_avg`` or ``exp_avg_sq``.

        Raises:
            UserError: for an unknown name or kind, or a damaged file.
        """
        if kind not in partitions.KINDS:
            raise UserError(f"kind '{kind}' is not one of {', '.join(partitions.KINDS)}")
        key, layer = self._place(name)
        main = f"{_STATE}fp32_param.{key}"
        if kind != "param":
            key = f"{_STATE}{kind}.{key}"
        elif main in self._files.shapes:  # 16-bit weights have a float32 copy that the optimizer steps
            key = main
        return self._files.read_tensor(key, layer).float()

    def read_slice(
        self, name: str, kind: str, tensor_parallel_rank: int, tensor_parallel_size: int, vocabulary_rows: int | None = None
    ) -> torch.Tensor:
        """What a rank holds in megatron-core's layout, float32: as :meth:`~megatron_groupmates.checkpoint.zero.ZeroCheckpoint.read_slice`.

        Raises:
            UserError: as :meth:`read`, and when the size does not divide the parameter.
        """
        rank, size = tensor_parallel_rank, tensor_parallel_size
        whole = self.read(name, kind)
        rule = layout.layout_of(name, self.client_state["gated_linear_unit"])
        if rule.dim is None or (size == 1 and vocabulary_rows in (None, whole.shape[0])):
            return whole
        zeros = 0
        if vocabulary_rows is not None and layout.is_vocabulary(name):
            found, zeros = layout.vocabulary_pieces(whole.shape[0], vocabulary_rows, 1, rank, size)
        else:
            found = layout.pieces(rule, whole.shape[rule.dim], 1, rank, size)
        parts = [whole.narrow(rule.dim, piece.start, piece.length) for piece in found]
        return torch.cat([*parts, whole.new_zeros((zeros, *whole.shape[1:]))] if zeros else parts, rule.dim)

    def read_slice_into(
        self,
        name: str,
        kind: str,
        out: torch.Tensor,
        tensor_parallel_rank: int,
        tensor_parallel_size: int,
        vocabulary_rows: int | None = None,
    ) -> None:
        """:meth:`read_slice` into memory there is already.

        Raises:
            UserError: as :meth:`read_slice`, and when ``out`` has another shape; names the parameter and both shapes.
        """
        found = self.read_slice(name, kind, tensor_parallel_rank, tensor_parallel_size, vocabulary_rows)
        if out.shape != found.shape:
            raise UserError(
                f"parameter {name}: the checkpoint's slice for tensor-parallel rank {tensor_parallel_rank} of {tensor_parallel_size} has "
                f"shape {tuple(found.shape)}, the config's model {tuple(out.shape)}: the checkpoint is of another model"
            )
        out.copy_(found)

    def _place(self, name: str) -> tuple[str, int | None]:
        if name not in self._places:
            raise UserError(f"checkpoint {self.path} has no parameter '{name}'; its first is '{next(iter(self.names), 'none')}'")
        return self._places[name]

    def _check_optimizer(self) -> None:
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, (key, _) in self._places.items():
                if self._files.shapes.get(f"{_STATE}{kind}.{key}") != self._files.shapes[key]:
                    raise UserError(
                        f"checkpoint {self.path} does not hold {kind} of {name} in the parameter's shape: save the optimizer (no "
                        "--no-save-optim), and with --use-distributed-optimizer add --dist-ckpt-optim-fully-reshardable"
                    )

    def _names_of(self, group: dict[str, Any]) -> list[str]:
        """By Megatron-LM's rule: weight decay for what is no bias and has more than one dimension."""
        decayed = bool(group.get("wd_mult", 1.0))
        return [name for name in self.names if (len(self.shape(name)) > 1 and not name.endswith(".bias")) is decayed]


def load_common_state(directory: Path) -> dict[str, Any]:
    """What all ranks have in common: ``args``, ``iteration``, the optimizer's settings ...

    Args:
        directory: of the checkpoint, such as ``iter_0000100``.

    Raises:
        UserError: another format, a damaged file, or one that holds anything but data.
    """
    if (directory / _COMMON_FILE).is_file():
        return load(directory / _COMMON_FILE)
    if (directory / ".metadata").is_file():
        files = DistributedFiles(directory)
        if _COMMON_KEY in files.objects:
            return files.read_object(_COMMON_KEY)[0]
    raise UserError(
        f"{directory} is not a checkpoint of --ckpt-format torch_dist: it has neither {_COMMON_FILE} nor '{_COMMON_KEY}' in .metadata; "
        "of Megatron-LM's formats torch_dist is the one that is read"
    )


def _parameters(key: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[str, int | None]]]:
    """Names of the parameters that lie under a key, each with the key and its place in it."""
    if key.startswith("optimizer."):
        return []
    for fused, own in _NORMS.items():
        own_name = key.replace(fused, own)
        if own_name != key:
            break
    else:
        own_name = key
    if not key.startswith(_LAYERS) or re.match(r"decoder\.layers\.\d", key):
        return [(own_name, (key, None))]
    rest = own_name.removeprefix(_LAYERS)
    return [(f"{_LAYERS}{layer}.{rest}", (key, layer)) for layer in range(shape[0])]


def _optimizer(path: Path, common: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Adam's step and the optimizer's groups."""
    state = common.get("optimizer")
    state = state.get("optimizer", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state.get("param_groups"):
        raise UserError(f"checkpoint {path} holds no settings of the optimizer: save without --no-save-optim")
    steps = [state.get("state", {}).get("common_step"), *(group.get("step") for group in state["param_groups"])]
    step = next((int(step) for step in steps if step is not None), None)
    if step is None:
        raise UserError(f"checkpoint {path} does not say how many steps its optimizer has taken; Adam is the optimizer that is read")
    return step, [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
