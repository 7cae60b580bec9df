"""What the session has to know of the trainer that it runs in."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config import UserError
from megatron_groupmates.config.forks import settings_of_megatron_deepspeed


@dataclasses.dataclass(frozen=True)
class Fork:
    """One kind of trainer.

    Attributes:
        checkpoint_format: ``checkpoint.format`` of its runs.
        settings: the trainer's arguments -> the config sections that they stand for.
        item: a sample's tokens int64[seq_length + 1] -> what the trainer's loader collates.
        end_of_document: id of the trainer's own end-of-document token; None where it has no tokenizer.
        saved_state: the trainer's arguments -> ``args.group_mates`` of the checkpoint that it has resumed from; None where
            that has none, as in one trained without Group-MATES.
        boundary_before_save: whether a step's checkpoint is saved after the boundary behind that step. A generation that is
            made from it is then waited for at the next boundary: waiting at this one would keep it from being saved.
    """

    checkpoint_format: str
    settings: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
    item: Callable[[np.ndarray], dict[str, Any]]
    end_of_document: Callable[[], int | None]
    saved_state: Callable[[argparse.Namespace], dict[str, Any] | None]
    boundary_before_save: bool = False


def text_item(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The item of Megatron-DeepSpeed's GPT dataset: ``text``, int64[seq_length + 1]."""
    return {"text": tokens}


def _end_of_document() -> int | None:
    return getattr(importlib.import_module("megatron").get_tokenizer(), "eod", None)


def _saved_state(args: argparse.Namespace) -> dict[str, Any] | None:
    """Read from the first model states file of the tag, as data: nothing in it is run."""
    tag = getattr(args, "load_tag", None) or f"global_step{args.iteration}"
    found = (sorted((Path(args.load) / name).glob("*mp_rank_00_model_states.pt")) for name in (tag, f"{tag}_universal"))
    files = next((paths for paths in found if paths), None)
    if files is None:
        raise UserError(f"--load {args.load}: {tag} has no model states, which say what the checkpoint was trained on")
    saved = load(files[0]).get("args")
    return saved.fields.get("group_mates") if isinstance(saved, Record) else None


MEGATRON_DEEPSPEED = Fork(
    checkpoint_format="megatron_deepspeed",
    settings=settings_of_megatron_deepspeed,
    item=text_item,
    end_of_document=_end_of_document,
    saved_state=_saved_state,
)
