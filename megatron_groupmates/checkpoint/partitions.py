"""Where each parameter's values lie in the flat groups that ZeRO saves. Pure functions on unpickled states.

ZeRO-1 and 2 flatten the parameters of an optimizer group one after the other and cut the result into one part per
data-parallel rank, so a parameter can span ranks; each rank's ``param_slice_mappings`` says what it holds of which
parameter. ZeRO-3 cuts every parameter by itself, padded to equal parts. Without ZeRO the optimizer holds parameters
by number, in the order of its groups, and the names have to be found again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.config.errors import UserError

KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class LocalParameter:
    """What one tensor-parallel rank held of a parameter.

    Attributes:
        shape: of that rank's slice.
        group: number of the optimizer's parameter group.
        fragments: kind -> one-dimensional mapped tensors which, one after the other, are the slice. Moments have none
            before the first optimizer step.
    """

    shape: tuple[int, ...]
    group: int
    fragments: dict[str, list[torch.Tensor]]

    def copy_into(self, kind: str, out: torch.Tensor, dim: int = 0, start: int = 0) -> None:
        """Write the indices of dimension ``dim`` from ``start`` on, as many as ``out`` has, into ``out``.

        Values go from the mapped file to ``out`` fragment by fragment, with nothing of their size in between; along the
        first dimension only the bytes asked for are touched.

        Args:
            kind: one of :data:`KINDS`.
            out: of the slice's shape but for ``dim``, on any device; contiguous when ``dim`` is 0.
            dim: 0, or 1 for a matrix.
            start: first index.
        """
        if not self.fragments[kind] and kind != "param":
            out.zero_()
            return
        offset = 0
        for fragment in self.fragments[kind]:
            if dim == 0:
                _copy_range(fragment, offset - start * math.prod(self.shape[1:]), out.view(-1))
            else:
                _copy_columns(fragment, offset, self.shape[1], start, out)
            offset += fragment.numel()


def base_optimizer(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """The torch optimizer's own state (``state`` and ``param_groups``) inside the one of DeepSpeed's wrapper.

    Raises:
        UserError: for an elastic checkpoint, which has none.
    """
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        optimizer_state = optimizer_state.get(key, optimizer_state)
        if not isinstance(optimizer_state, dict):
            raise UserError(
                "the checkpoint was saved with 'elastic_checkpoint', which leaves out the optimizer's "
                "settings; save it with zero_optimization.elastic_checkpoint set to false"
            )
    return optimizer_state


def adam_step(optimizer_state: dict[str, Any]) -> int:
    """The step of Adam's bias correction; 0 before the first step.

    Raises:
        UserError: as :func:`base_optimizer`.
    """
    base = base_optimizer(optimizer_state)
    # DeepSpeed's fused Adam keeps the step in the group, torch's beside the moments.
    steps = [entry["step"] for entry in (*base["state"].values(), *base["param_groups"]) if "step" in entry]
    return int(steps[0]) if steps else 0


def zero_1_2(model_state: dict[str, Any], optimizer_states: Sequence[dict[str, Any]]) -> dict[str, LocalParameter]:
    """Parameters of one tensor-parallel rank by name: ZeRO-1, ZeRO-2 and DeepSpeed's ``BF16_Optimizer``.

    Args:
        model_state: of the tensor-parallel rank.
        optimizer_states: of its data-parallel ranks, in order.

    Raises:
        UserError: when the parts do not add up to the parameters.
    """
    found: dict[str, LocalParameter] = {}
    for group, shapes in enumerate(model_state["param_shapes"]):
        flats = [_flat_group(state, state["single_partition_of_fp32_groups"][group], group) for state in optimizer_states]
        for name, shape in shapes.items():
            fragments: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
            for state, flat in zip(optimizer_states, flats, strict=True):
                address = state["param_slice_mappings"][group].get(name)
                for kind in KINDS if address is not None else ():
                    if kind in flat:
                        start, numel = _address(address)
                        fragments[kind].append(flat[kind][start : start + numel])
            found[name] = _checked(name, shape, group, fragments)
    return found


def zero_3(model_state: dict[str, Any], optimizer_states: Sequence[dict[str, Any]]) -> dict[str, LocalParameter]:
    """Parameters of one tensor-parallel rank by name, ZeRO-3. Arguments and errors as for :func:`zero_1_2`."""
    found: dict[str, LocalParameter] = {}
    group_of = {
        number: index for index, group in enumerate(base_optimizer(optimizer_states[0])["param_groups"]) for number in group["params"]
    }
    for sub_group, shapes in enumerate(model_state["param_shapes"]):
        flats = [_flat_group(state, state["fp32_flat_groups"][sub_group], sub_group) for state in optimizer_states]
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            length = math.ceil(numel / len(flats))
            lengths = [max(0, min(length, numel - rank * length)) for rank in range(len(flats))]
            fragments = {
                kind: [flat[kind][start : start + own] for flat, own in zip(flats, lengths, strict=True) if kind in flat] for kind in KINDS
            }
            found[name] = _checked(name, shape, group_of.get(sub_group, 0), fragments)
            start += length
    return found


def without_zero(model_state: dict[str, Any]) -> dict[str, LocalParameter]:
    """Parameters of one tensor-parallel rank by name, when the optimizer lies in the model states.

    Raises:
        UserError: when the optimizer's parameters cannot be told apart by their shapes.
    """
    if "fp32_groups_flat" in model_state["optimizer"]:
        raise UserError(
            "it was saved by DeepSpeed's fused 16-bit optimizer without ZeRO, which does not record where a "
            "parameter lies; train with ZeRO stage 1, or with torch.optim.AdamW"
        )
    base = base_optimizer(model_state["optimizer"])
    shared = shared_names(model_state)
    parameters = {name: value for name, value in model_parameters(model_state).items() if name not in shared}
    groups = [group["params"] for group in base["param_groups"]]
    masters = _master_copies(model_state["optimizer"], groups)
    if any("param_names" in group for group in base["param_groups"]):
        named = {name: number for group in base["param_groups"] for name, number in zip(group["param_names"], group["params"], strict=True)}
    else:
        shapes = {
            number: tuple(masters[number].shape) if number in masters else _moment_shape(base, number)
            for numbers in groups
            for number in numbers
        }
        named = match_by_shape({name: tuple(value.shape) for name, value in parameters.items()}, groups, shapes)
    group_of = {number: index for index, numbers in enumerate(groups) for number in numbers}
    found = {}
    for name, number in named.items():
        state = base["state"].get(number, {})
        fragments = {kind: [state[kind].reshape(-1)] if kind in state else [] for kind in KINDS}
        fragments["param"] = [masters.get(number, parameters[name]).reshape(-1)]
        found[name] = _checked(name, parameters[name].shape, group_of[number], fragments)
    return found


def match_by_shape(
    model: dict[str, tuple[int, ...]], groups: Sequence[Sequence[int]], shapes: dict[int, tuple[int, ...] | None]
) -> dict[str, int]:
    """Find which numbered optimizer parameter each named one is, groups holding their parameters in the model's order.

    Args:
        model: name -> shape, in the model's order.
        groups: numbers of each group, in order.
        shapes: number -> shape, None where it is not known.

    Raises:
        UserError: when there is no way or more than one.
    """
    # A state is how many of each group are used; kept with one way to reach it and whether that way is the only one.
    ways: dict[tuple[int, ...], tuple[tuple[int, ...], bool]] = {(0,) * len(groups): ((), True)}
    for shape in model.values():
        reached: dict[tuple[int, ...], tuple[tuple[int, ...], bool]] = {}
        for used, (path, unique) in ways.items():
            for index, group in enumerate(groups):
                if used[index] == len(group) or shapes[group[used[index]]] not in (None, shape):
                    continue
                state = (*used[:index], used[index] + 1, *used[index + 1 :])
                reached[state] = ((*path, group[used[index]]), unique and state not in reached)
        ways = reached
    path, unique = ways.get(tuple(len(group) for group in groups), ((), False))
    if not unique or len(path) != len(model):
        raise UserError(
            "the optimizer's parameters cannot be matched to the model's names by shape; give the "
            "optimizer named parameters (torch.optim takes model.named_parameters()), or train with ZeRO "
            "stage 1"
        )
    return dict(zip(model, path, strict=True))


def model_parameters(model_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of the saved module that are not buffers, by name, in the model's order."""
    buffers = set(model_state.get("buffer_names") or ())
    return {
        name: value
        for name, value in _by_full_name(model_state["module"])
        if isinstance(value, torch.Tensor) and name not in buffers and not name.endswith("_extra_state")
    }


def _by_full_name(module: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a saved module with their full names; Megatron-DeepSpeed saves modules within modules."""
    for name, value in module.items():
        if isinstance(value, dict) and not name.endswith("_extra_state"):
            yield from _by_full_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shared_names(model_state: dict[str, Any]) -> dict[str, str]:
    """Second names of shared parameters -> the name they are stored under."""
    if model_state.get("shared_params") is not None:
        return dict(model_state["shared_params"])
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    return {
        name: owner
        for name, value in model_parameters(model_state).items()
        if (owner := first.setdefault((value.data_ptr(), tuple(value.shape)), name)) != name
    }


def _flat_group(state: dict[str, Any], master: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    moments = base_optimizer(state)["state"].get(number, {})
    return {"param": master, **{kind: moments[kind] for kind in KINDS[1:] if kind in moments}}


def _address(record: Record) -> tuple[int, int]:
    """(start, numel) of DeepSpeed's ``fragment_address``."""
    return record.fields["start"], record.fields["numel"]


def _master_copies(optimizer: dict[str, Any], groups: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
    """Float32 copies of 16-bit parameters by number; empty where the model itself is float32."""
    numbers = [number for group in groups for number in group]
    return dict(zip(numbers, _flatten(optimizer.get("fp32_groups", ())), strict="fp32_groups" in optimizer))


def _flatten(groups: Sequence[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor]:
    return (tensor for group in groups for tensor in group)


def _moment_shape(base: dict[str, Any], number: int) -> tuple[int, ...] | None:
    moment = base["state"].get(number, {}).get("exp_avg")
    return None if moment is None else tuple(moment.shape)


def _copy_range(fragment: torch.Tensor, offset: int, out: torch.Tensor) -> None:
    """Copy what ``fragment``, whose first element has index ``offset`` (below 0: before ``out``), shares with the flat ``out``."""
    first, last = max(0, offset), min(out.numel(), offset + fragment.numel())
    if first < last:
        out[first:last].copy_(fragment[first - offset : last - offset])


def _copy_columns(fragment: torch.Tensor, offset: int, width: int, start: int, out: torch.Tensor) -> None:
    """Copy columns from ``start`` on of the elements that ``fragment`` holds, from index ``offset`` on, of a matrix ``width`` wide."""
    end = offset + fragment.numel()
    # Rows that lie in the fragment as a whole, as one copy; the row it begins in and the row it ends in by themselves.
    first, last = -(-offset // width), end // width
    if first < last:
        rows = fragment[first * width - offset : last * width - offset].view(last - first, width)
        out[first:last].copy_(rows[:, start : start + out.shape[1]])
    for row in {offset // width, last} - set(range(first, last)):
        if row < out.shape[0]:
            _copy_range(fragment, offset - row * width - start, out[row])


def _checked(name: str, shape: Any, group: int, fragments: dict[str, list[torch.Tensor]]) -> LocalParameter:
    for kind, parts in fragments.items():
        numel = sum(part.numel() for part in parts)
        if numel != math.prod(shape) and (parts or kind == "param"):
            raise UserError(
                f"the optimizer states hold {numel} elements of '{name}' ({kind}), its shape "
                f"{tuple(shape)} has {math.prod(shape)}: files of different saves lie together, or one is "
                "damaged"
            )
    return LocalParameter(tuple(shape), group, fragments)
