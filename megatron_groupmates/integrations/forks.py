"""What the session has to know of the trainer that it runs in."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config import UserError
from megatron_groupmates.config.forks import settings_of_megatron_deepspeed

_ROTARY_LENGTH, _ROTARY_DIM = 5, 8  # of the example that is rotated


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


def rotary_angles(module: ModuleType) -> Literal["positions", "cosines"]:
    """What a Megatron-DeepSpeed checkout rotates queries and keys by, found by rotating some (``model.rotary_angles``).

    Args:
        module: the checkout's ``megatron.model.rotary_pos_embedding``; left as it is.

    Raises:
        UserError: by neither the positions' angles nor their cosines.
    """
    before, problem = dict(vars(module)), "neither by the positions' angles nor by their cosines"
    try:
        given = module.RotaryEmbedding(_ROTARY_DIM)(_ROTARY_LENGTH)
        # As its model takes it: one tensor for both, or one for queries and one for keys.
        for_queries, for_keys = (given, given) if isinstance(given, torch.Tensor) else given
        vectors = torch.randn(_ROTARY_LENGTH, 1, 1, _ROTARY_DIM, generator=torch.Generator().manual_seed(0)).to(for_queries.device)
        found = [module.apply_rotary_pos_emb(vectors, by) for by in (for_queries, for_keys)]
        angles = _angles().to(for_queries.device)
        for name, by in (("positions", angles), ("cosines", angles.cos())):
            expected = _rotated(vectors, by)
            if all(torch.allclose(one, expected, atol=1e-4) for one in found):
                return name
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        problem = f"in a way that is not known here ({type(error).__name__}: {error})"
    finally:
        vars(module).update(before)  # it keeps what it last rotated by
    raise UserError(
        f"--use-rotary-position-embeddings: {module.__name__} of this checkout rotates {problem}, so the selection server cannot "
        "compute what the trainer does; use the checkout's own version of that file, or learned positions"
    )


def _angles() -> torch.Tensor:
    """float32[length, 1, 1, dim], at Megatron's default base."""
    frequencies = 10000 ** (-torch.arange(0, _ROTARY_DIM, 2).float() / _ROTARY_DIM)
    return torch.outer(torch.arange(_ROTARY_LENGTH).float(), frequencies).repeat(1, 2)[:, None, None]


def _rotated(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return vectors * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _settings(args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not args.get("use_rotary_position_embeddings"):
        return settings_of_megatron_deepspeed(args)
    return settings_of_megatron_deepspeed(args, rotary_angles(importlib.import_module("megatron.model.rotary_pos_embedding")))


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
    settings=_settings,
    item=text_item,
    end_of_document=_end_of_document,
    saved_state=_saved_state,
)
