"""Files as DeepSpeed 0.16 writes them, made from today's: what differs between the two is nothing the reader may need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import check_complete
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from tests.common.zero_checkpoints import CLIENT_STATE, Recipe, full_shapes

RECIPES = [*(Recipe(stage, "bf16") for stage in (1, 2, 3)), Recipe(0, "fp32"), Recipe(1, "bf16-fp32-accumulation")]


def make_older(tag_dir: Path) -> None:
    """Rewrite every file with the keys and types of 0.16 (the same in 0.16.0 and 0.16.9)."""
    for path in tag_dir.iterdir():
        state = torch.load(path, weights_only=False)
        state["ds_version"] = "0.16.9"
        if path.name.endswith("model_states.pt"):
            del state["checkpoint_parallel_dimensions"]
            state["sparse_tensor_module_names"] = set()
            # It trained in 16 bits with the buffers in 16 bits too.
            for name in state["buffer_names"] if "bf16" in tag_dir.name else ():
                state["module"][name] = state["module"][name].bfloat16()
        elif "ds_version" in state["optimizer_state_dict"]:
            state["optimizer_state_dict"]["ds_version"] = "0.16.9"
            state["optimizer_state_dict"].pop("param_alignment_paddings", None)
        torch.save(state, path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.tag)
def test_files_of_deepspeed_0_16(saved, copy_of, recipe):
    tag_dir = copy_of(recipe.tag)
    make_older(tag_dir)
    check_complete(tag_dir)
    checkpoint = ZeroCheckpoint(tag_dir)
    assert checkpoint.names == list(full_shapes())
    assert checkpoint.client_state == CLIENT_STATE
    assert (checkpoint.zero_stage, checkpoint.step) == (recipe.stage, recipe.steps)
    for rank, held in enumerate(saved(2, 2).held):
        for kind, tensors in held[recipe.tag].items():
            for name, tensor in tensors.items():
                assert torch.equal(checkpoint.read_slice(name, kind, rank, 2), tensor), (rank, kind, name)
