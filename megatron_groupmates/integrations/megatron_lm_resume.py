"""What a Megatron-LM checkpoint says of the data it was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.torch_dist import load_common_state
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config import UserError


def saved_state(args: argparse.Namespace) -> dict[str, Any] | None:
    """``args.group_mates`` of the checkpoint that the checkout has resumed from, read as data: nothing in it is run.

    Args:
        args: the checkout's, with ``load`` and ``iteration``.

    Returns:
        None where the checkpoint was trained without Group-MATES.

    Raises:
        UserError: the checkpoint is of a kind whose arguments cannot be read, or is damaged.
    """
    directory = _loaded_from(args) / f"iter_{args.iteration:07d}"
    legacy = sorted(directory.glob("mp_rank_00*/model_optim_rng.pt"))
    state = load(legacy[0]) if legacy else load_common_state(directory)
    saved = state.get("args")
    if not isinstance(saved, Record):
        raise UserError(f"{directory} holds no arguments of the trainer, which say what data it was trained on; resume from one that does")
    return saved.fields.get("group_mates")


def _loaded_from(args: argparse.Namespace) -> Path:
    """Where the checkout has found its checkpoint: a non-persistent one goes before others that are no newer."""
    if getattr(args, "non_persistent_ckpt_type", None) == "global" and (args.non_persistent_global_ckpt_dir or args.load):
        directory = Path(args.non_persistent_global_ckpt_dir or Path(args.load) / "non_persistent")
        tracker = directory / "latest_checkpointed_iteration.txt"
        if tracker.is_file() and tracker.read_text().strip() == str(args.iteration):
            return directory
    return Path(args.load or args.pretrained_checkpoint)
