"""A ZeRO checkpoint as named float32 tensors, whole or as any tensor-parallel rank's slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.checkpoint import layout, partitions
from megatron_groupmates.checkpoint.discovery import find_files, load_model_state, load_optimizer_state
from megatron_groupmates.config.errors import UserError

# What DeepSpeed itself puts beside the caller's client state.
_DEEPSPEED_KEYS = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "universal_checkpoint_info",
        "ds_config",
        "ds_version",
    }
)


class ZeroCheckpoint:
    """Reader of one tag, such as ``checkpoints/global_step100``. It writes nothing and runs no code of the checkpoint.

    Files of other tensor-parallel ranks are opened when a parameter needs them, and mapped: a read touches the bytes it
    returns. An instance can be used by one thread at a time.

    Attributes:
        step: training steps taken: what the trainer says (``client_state["step"]``), else DeepSpeed's ``global_steps``.
        adam_step: the step of Adam's bias correction. It differs from ``step`` after skipped steps, and DeepSpeed's
            16-bit optimizer without ZeRO starts it at 1.
        zero_stage: 0 to 3, by the files: DeepSpeed 0.16 writes those of ZeRO-1 in bf16 without ZeRO too.
        tensor_model_parallel_size: of the run that saved it.
        data_parallel_size: of that run.
        client_state: what the trainer gave to ``save_checkpoint``.
        param_groups: one dict per optimizer group: lr, weight_decay, betas, eps and the optimizer's other settings, and
            ``param_names``, the names of its parameters.

    Args:
        tag_dir: directory with the files.

    Raises:
        UserError: when the checkpoint is incomplete, damaged, of an unsupported kind, or holds anything but data.
    """

    def __init__(self, tag_dir: Path | str) -> None:
        self.path = Path(tag_dir)
        self._files = find_files(self.path)
        self.tensor_model_parallel_size = self._files.tensor_size
        self.data_parallel_size = self._files.data_size
        self._slices: dict[int, dict[str, partitions.LocalParameter]] = {}

        state = load_model_state(self._files.model[0, 0])
        self.client_state: dict[str, Any] = {key: value for key, value in state.items() if key not in _DEEPSPEED_KEYS}
        self.step: int = self.client_state.get("step", state["global_steps"])
        optimizer = state["optimizer"] or load_optimizer_state(self._files.optimizer[0, 0])
        self.zero_stage = 0 if state["optimizer"] else _stage(optimizer)
        self.adam_step = partitions.adam_step(optimizer)
        self._shared = partitions.shared_names(state)
        self.names: list[str] = list(partitions.model_parameters(state))
        self.param_groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in partitions.base_optimizer(optimizer)["param_groups"]
        ]
        self._check_frozen()
        for index, group in enumerate(self.param_groups):
            group["param_names"] = [name for name, parameter in self._local(0).items() if parameter.group == index]

    @property
    def consumed_train_samples(self) -> int:
        """Samples that training had taken when it saved this."""
        return int(self.client_state["consumed_train_samples"])

    @property
    def next_learning_rate(self) -> float | None:
        """Of the next optimizer step where the checkpoint says it; None where the trainer sets it just before by its schedule."""
        return None

    @property
    def left_out_of_oracles(self) -> list[str]:
        """One line for each thing that this trainer does and an oracle's step does not."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter ``name``.

        Raises:
            UserError: for an unknown name.
        """
        shape = list(self._parameter(name, 0).shape)
        if self.tensor_model_parallel_size > 1 and (dim := layout.split_dimension(name)) is not None:
            shape[dim] *= self.tensor_model_parallel_size
        return tuple(shape)

    def read(self, name: str, kind: str) -> torch.Tensor:
        """The whole parameter or moment, float32.

        Args:
            name: one of :attr:`names`.
            kind: ``param`` (the float32 master copy in a 16-bit run), ``exp_avg`` or ``exp_avg_sq``.

        Raises:
            UserError: for an unknown name or kind, or when the layout of a gated MLP is not known.
        """
        return self.read_slice(name, kind, 0, 1)

    def read_slice(
        self, name: str, kind: str, tensor_parallel_rank: int, tensor_parallel_size: int, vocabulary_rows: int | None = None
    ) -> torch.Tensor:
        """What rank ``tensor_parallel_rank`` of ``tensor_parallel_size`` holds in megatron-core's layout, float32.

        The size need not be the one the checkpoint was saved with.

        Args:
            name: one of :attr:`names`.
            kind: as for :meth:`read`.
            tensor_parallel_rank: wanted rank.
            tensor_parallel_size: wanted size.
            vocabulary_rows: rows of the whole word embeddings and output layer in the model that reads, when it pads
                its vocabulary differently. Surplus padding is left out, missing padding is zero.

        Raises:
            UserError: as :meth:`read`, and when the size does not divide the parameter.
        """
        rank, size = tensor_parallel_rank, tensor_parallel_size
        found = torch.empty(self._plan(name, rank, size, vocabulary_rows)[0])
        self.read_slice_into(name, kind, found, rank, size, vocabulary_rows)
        return found

    def read_slice_into(
        self,
        name: str,
        kind: str,
        out: torch.Tensor,
        tensor_parallel_rank: int,
        tensor_parallel_size: int,
        vocabulary_rows: int | None = None,
    ) -> None:
        """:meth:`read_slice` into memory there is already: from the mapped files piece by piece, with no copy in between.

        Args:
            name: as for :meth:`read_slice`, like all others.
            kind: see there.
            out: contiguous float32 of the slice's shape, on any device.
            tensor_parallel_rank: see there.
            tensor_parallel_size: see there.
            vocabulary_rows: see there.

        Raises:
            UserError: as :meth:`read_slice`, and when ``out`` has another shape; names the parameter and both shapes.
        """
        if kind not in partitions.KINDS:
            raise UserError(f"kind '{kind}' is not one of {', '.join(partitions.KINDS)}")
        rank, size = tensor_parallel_rank, tensor_parallel_size
        shape, dim, found = self._plan(name, rank, size, vocabulary_rows)
        if tuple(out.shape) != shape:
            raise UserError(
                f"parameter {name}: the checkpoint's slice for tensor-parallel rank {rank} of {size} has shape "
                f"{shape}, the config's model {tuple(out.shape)}: the checkpoint is of another model"
            )
        offset = 0
        for piece in found:
            part = out.narrow(dim, offset, piece.length)
            self._parameter(name, piece.rank).copy_into(kind, part, dim, piece.start)
            offset += piece.length
        out.narrow(dim, offset, shape[dim] - offset).zero_()

    def _plan(self, name: str, rank: int, size: int, vocabulary_rows: int | None) -> tuple[tuple[int, ...], int, list[layout.Piece]]:
        """Shape of a slice, and the pieces which one after the other along a dimension are its beginning; zeros follow."""
        assert 0 <= rank < size
        full, saved_size = self.shape(name), self.tensor_model_parallel_size
        repadded = vocabulary_rows not in (None, full[0]) and layout.is_vocabulary(name)
        if size == saved_size and not repadded:
            shape = self._parameter(name, rank).shape
            return shape, 0, [layout.Piece(rank, 0, shape[0])]
        rule = layout.layout_of(name, self.client_state.get("gated_linear_unit"))
        if rule.dim is None:
            return full, 0, [layout.Piece(0, 0, full[0])]
        if repadded:
            found, zeros = layout.vocabulary_pieces(full[0], vocabulary_rows, saved_size, rank, size)
        else:
            found, zeros = layout.pieces(rule, full[rule.dim], saved_size, rank, size), 0
        shape = list(full)
        shape[rule.dim] = sum(piece.length for piece in found) + zeros
        return tuple(shape), rule.dim, found

    def _parameter(self, name: str, rank: int) -> partitions.LocalParameter:
        parameter = self._local(rank).get(self._shared.get(name, name))
        if parameter is None:
            raise UserError(f"checkpoint {self.path} has no parameter '{name}'; its first is '{next(iter(self.names), 'none')}'")
        return parameter

    def _local(self, rank: int) -> dict[str, partitions.LocalParameter]:
        """Parameters of a tensor-parallel rank of the checkpoint."""
        if rank not in self._slices:
            model = load_model_state(self._files.model[rank, 0])
            states = [load_optimizer_state(path) for (tensor, _), path in sorted(self._files.optimizer.items()) if tensor == rank]
            try:
                self._slices[rank] = (
                    partitions.without_zero(model)
                    if self.zero_stage == 0
                    else partitions.zero_3(model, states)
                    if self.zero_stage == 3
                    else partitions.zero_1_2(model, states)
                )
            except UserError as error:
                raise UserError(f"checkpoint {self.path}: {error}") from None
        return self._slices[rank]

    def _check_frozen(self) -> None:
        frozen = [name for name in self.names if self._shared.get(name, name) not in self._local(0)]
        if frozen:
            more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
            raise UserError(
                f"checkpoint {self.path} has parameters that its optimizer does not train, which is not "
                f"supported: {', '.join(frozen[:3])}{more}"
            )


def _stage(optimizer_state: dict[str, Any]) -> int:
    """ZeRO stage; DeepSpeed's ``BF16_Optimizer``, which is its ZeRO-1 with float32 accumulation, records none."""
    recorded = optimizer_state.get("zero_stage")
    if recorded is None:
        return 1
    # An enumeration: the number is the constructor's argument.
    return int(recorded.args[0])
