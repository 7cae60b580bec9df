"""Which files make up a ZeRO checkpoint, and whether they are all there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_groupmates.checkpoint.partitions import adam_step
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config.errors import UserError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<tensor>\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<data>\d+)_mp_rank_(?P<tensor>\d+)_optim_states\.pt")
_UNSUPPORTED = {
    "*expert_*": "mixture of experts",
    "expp_rank_*": "mixture of experts",
    "layer_*": "DeepSpeed's pipeline engine (layer_NN-model_MM-model_states.pt; Megatron-DeepSpeed: add --no-pipeline-parallel)",
}


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """The files of one tag. Keys are (tensor-parallel rank, data-parallel rank).

    Attributes:
        model: one file per tensor-parallel rank under data-parallel rank 0; with ZeRO-3, one per rank.
        optimizer: one file per rank, or none without ZeRO.
        tensor_size: tensor-parallel size of the run that saved it.
        data_size: data-parallel size of that run.
    """

    model: dict[tuple[int, int], Path]
    optimizer: dict[tuple[int, int], Path]
    tensor_size: int
    data_size: int


def latest_tag(checkpoint_dir: Path | str) -> str | None:
    """The newest complete checkpoint's tag, by the file that its trainer writes when all ranks are done; None before the first.

    DeepSpeed writes ``latest``. Without it the file may be Megatron-LM's, which names an iteration.
    """
    path, tracker = Path(checkpoint_dir) / "latest", Path(checkpoint_dir) / "latest_checkpointed_iteration.txt"
    if path.is_file():
        return path.read_text().strip() or None
    iteration = tracker.read_text().strip() if tracker.is_file() else ""
    return f"iter_{int(iteration):07d}" if iteration.isdigit() else None


def tag_of(step: int, newest: str) -> str:
    """The tag of a step in a directory whose newest tag is ``newest``."""
    return f"iter_{step:07d}" if newest.startswith("iter_") else f"global_step{step}"


def tag_step(tag: str) -> int | None:
    """The step in a tag such as ``global_step120``; None when it does not end in a number."""
    match = re.search(r"(\d+)$", tag)
    return int(match[1]) if match else None


def find_files(tag_dir: Path | str) -> CheckpointFiles:
    """The files of a checkpoint, compared with the world size the first one records.

    Raises:
        UserError: when the directory, a file or a rank is missing, when files of several world sizes lie together, or
            when the checkpoint uses parallelism that is not supported.
    """
    tag_dir = Path(tag_dir)
    if not tag_dir.is_dir():
        raise UserError(f"checkpoint {tag_dir} is not a directory; give a tag such as <checkpoints>/global_step100")
    for pattern, what in _UNSUPPORTED.items():
        if any(tag_dir.glob(pattern)):
            raise UserError(f"checkpoint {tag_dir} was saved with {what}, which is not supported")
    model, optimizer = _matching(tag_dir, _MODEL_FILE), _matching(tag_dir, _OPTIMIZER_FILE)
    if (0, 0) not in model:
        raise UserError(
            f"checkpoint {tag_dir} has no model states of rank 0 (mp_rank_00_model_states.pt): "
            "it is not a DeepSpeed checkpoint, or its writer was stopped"
        )
    state = load_model_state(model[0, 0])
    tensor_size, data_size = state["mp_world_size"], state["dp_world_size"]
    everybody = {(t, d) for t in range(tensor_size) for d in range(data_size)}
    uses_zero = state["optimizer"] is None
    is_stage_3 = model[0, 0].name.startswith("zero_pp_rank_")
    every_model = everybody if is_stage_3 else {(t, 0) for t in range(tensor_size)}
    sizes = f"tensor-parallel size {tensor_size} and data-parallel size {data_size}"
    _compare(tag_dir, "model_states", set(model), every_model, sizes)
    _compare(tag_dir, "optim_states", set(optimizer), everybody if uses_zero else set(), sizes)
    return CheckpointFiles(model, optimizer, tensor_size, data_size)


def load_model_state(path: Path) -> dict[str, Any]:
    """A model states file, tensors mapped.

    Raises:
        UserError: when it is damaged or something else.
    """
    state = load(path)
    needed = {"module", "optimizer", "param_shapes", "mp_world_size", "dp_world_size", "global_steps"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise UserError(f"{path} is not a file of DeepSpeed's model states")
    return state


def load_optimizer_state(path: Path) -> dict[str, Any]:
    """What ZeRO's optimizer put into an optimizer states file, tensors mapped.

    Raises:
        UserError: when it is damaged or something else.
    """
    state = load(path)
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if not isinstance(inner, dict) or "partition_count" not in inner:
        raise UserError(f"{path} is not a file of DeepSpeed's optimizer states")
    return inner


def check_complete(tag_dir: Path | str) -> None:
    """Return when the checkpoint is whole: all ranks' files readable and of one save, and announced by ``latest``.

    Raises:
        UserError: saying what is missing, damaged, mixed, or still being written.
    """
    tag_dir = Path(tag_dir)
    # Megatron-LM's hold no DeepSpeed files: they are whole when they are announced, and their reader checks what it reads.
    files = None if tag_dir.name.startswith("iter_") else find_files(tag_dir)
    latest = latest_tag(tag_dir.parent)
    if not _announced(tag_dir.name, latest):
        names = f"names {latest}" if latest else "does not exist yet"
        raise UserError(
            f"checkpoint {tag_dir} is still being written: {tag_dir.parent / 'latest'} {names}; wait for its writer, or use an earlier tag"
        )
    if files is None:
        return
    first = load_model_state(files.model[0, 0])
    for path in files.model.values():
        state = load_model_state(path)
        for key in ("mp_world_size", "dp_world_size", "global_steps"):
            _same(path, key, state[key], first[key])
    steps: dict[Path, int] = {}
    for path in files.optimizer.values():
        state = load_optimizer_state(path)
        counts = state["partition_count"]
        _same(path, "partition_count", max(counts) if isinstance(counts, list) else counts, files.data_size)
        steps[path] = adam_step(state)
    for path, step in steps.items():
        _same(path, "Adam step", step, next(iter(steps.values())))


def _matching(tag_dir: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(tag_dir.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        key = int(match["tensor"]), int(match["data"] or 0)
        if key in found:
            raise UserError(
                f"checkpoint {tag_dir} mixes two saves: {found[key].name} and {path.name} are of the same rank; remove the older files"
            )
        found[key] = path
    return found


def _compare(tag_dir: Path, kind: str, found: set[tuple[int, int]], expected: set[tuple[int, int]], sizes: str) -> None:
    if missing := sorted(expected - found):
        raise UserError(
            f"checkpoint {tag_dir} is not complete: it was saved at {sizes}, but the {kind} files of {_ranks(missing)} are missing"
        )
    if surplus := sorted(found - expected):
        raise UserError(
            f"checkpoint {tag_dir} mixes world sizes: it was saved at {sizes}, but also holds {kind} "
            f"files of {_ranks(surplus)}; remove the files of the other save"
        )


def _ranks(keys: list[tuple[int, int]]) -> str:
    return ", ".join(f"mp_rank_{tensor:02d}/dp_rank_{data}" for tensor, data in keys)


def _same(path: Path, what: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise UserError(f"checkpoint {path.parent} mixes two saves: {path.name} has {what} {value}, the other files {expected}")


def _announced(tag: str, latest: str | None) -> bool:
    """``latest`` names this tag or one of a later step; tags without a step cannot be ordered and pass."""
    if latest is None:
        return False
    step, latest_step = tag_step(tag), tag_step(latest)
    return tag == latest or step is None or latest_step is None or step <= latest_step
