"""What a real checkout of Megatron-DeepSpeed saved and computed; ``tests/data/megatron_deepspeed/make.sh`` made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_groupmates.checkpoint.megatron_deepspeed import MegatronDeepSpeedCheckpoint
from megatron_groupmates.config import Config, config_from_dict
from megatron_groupmates.config.forks import settings_of_megatron_deepspeed

DATA = Path(__file__).parents[1] / "data" / "megatron_deepspeed"
FLOAT32 = ("gpt-tp2-zero1", "gpt-dp2-zero2", "gpt-dp2-zero3", "llama-tp2-zero2")
BFLOAT16 = "llama-dp2-zero1-bf16"
VARIANTS = (*FLOAT32, BFLOAT16)
STEP, BATCH, NUM_EVALUATED = 2, 4, 4


def tag_dir(variant: str) -> Path:
    """The checkpoint of :data:`STEP` steps."""
    return DATA / variant / f"global_step{STEP}"


def arguments(variant: str) -> dict[str, Any]:
    """The checkout's arguments."""
    return dict(MegatronDeepSpeedCheckpoint(tag_dir(variant)).client_state["args"].fields)


def fork_config(variant: str, **sections: dict[str, Any]) -> Config:
    """The config of the run that left the checkpoint; ``sections`` change settings of it."""
    tree = settings_of_megatron_deepspeed(arguments(variant))
    tree["data"] |= {"pool": "pool", "reference": "reference"}
    tree["run"] = {"output_dir": "run", "seed": 5}
    tree["checkpoint"]["directory"] = str(DATA / variant)
    for section, settings in sections.items():
        tree[section] = tree.get(section, {}) | settings
    return config_from_dict(tree)


def expected(variant: str) -> dict[str, np.ndarray]:
    """``samples``, ``losses`` and the weights after the next step; see ``train.py`` there."""
    with np.load(DATA / variant / "expected.npz") as content:
        return dict(content)


def batch_of_next_step(variant: str) -> torch.Tensor:
    """What the checkout trained on in the step after the checkpoint: int64 ``[BATCH, s + 1]``."""
    return torch.from_numpy(expected(variant)["samples"][STEP * BATCH : (STEP + 1) * BATCH])


def whole(name: str, slices: list[torch.Tensor], heads: int, gated: bool) -> torch.Tensor:
    """A parameter in megatron-core's layout from what each rank of the checkout held of it under ``name``: the obvious way."""
    if "query_key_value" in name:
        parts = [part.view(3, heads // len(slices), -1, *part.shape[1:]) for part in slices]
        return torch.cat(parts, 1).transpose(0, 1).reshape(-1, *slices[0].shape[1:])
    if "dense_h_to_4h" in name and gated:
        return torch.cat([torch.cat([part.chunk(2)[half] for part in slices]) for half in (0, 1)])
    if "word_embeddings" in name or "output_layer" in name or "dense_h_to_4h" in name:
        return torch.cat(slices)
    if name.endswith("self_attention.dense.weight") or name.endswith("dense_4h_to_h.weight"):
        return torch.cat(slices, 1)
    assert all(torch.equal(part, slices[0]) for part in slices), name
    return slices[0]


def next_weights(variant: str) -> dict[str, torch.Tensor]:
    """The checkout's weights one step after the checkpoint, under its names, whole and in megatron-core's layout."""
    kept, args = expected(variant), arguments(variant)
    ranks = range(args["tensor_model_parallel_size"])
    names = [name.removeprefix("0/") for name in kept if name.startswith("0/")]
    return {
        name: whole(name, [torch.from_numpy(kept[f"{rank}/{name}"]) for rank in ranks], args["num_attention_heads"], args["swiglu"])
        for name in names
    }
