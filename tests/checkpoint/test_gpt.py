"""A megatron-core GPT saved by two tensor-parallel ranks computes the same in one."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import config_from_dict
from megatron_groupmates.model.gpt import build_gpt, token_logits
from megatron_groupmates.parallel import initialize_parallel, read_launch_environment
from megatron_groupmates.parallel.device import skip_inference_operators
from tests.common.distributed import run_ranks

CONFIG: dict[str, Any] = {
    "run": {"output_dir": "unused", "seed": 5},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 24,
        "sequence_length": 16,
        "vocab_size": 48,
    },
    "data": {"pool": "unused"},
    "training": {"train_iters": 2, "global_batch_size": 2, "micro_batch_size": 2},
}
TOKENS = torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(1))


def build(world_size: int) -> tuple[torch.nn.Module, Any]:
    config = config_from_dict(CONFIG)
    groups = initialize_parallel(read_launch_environment(os.environ), world_size, seed=5)
    return build_gpt(config, groups, world_size, torch.float32), groups


def all_logits(model: torch.nn.Module, groups: Any) -> torch.Tensor:
    """Logits over the whole vocabulary for ``TOKENS``, with gradients of this rank's slice only. Collective."""
    mine = token_logits(model, TOKENS)
    parts = [torch.empty_like(mine) for _ in range(groups.tensor_size)]
    torch.distributed.all_gather(parts, mine.detach().contiguous(), group=groups.tensor_group)
    parts[groups.tensor_rank] = mine
    return torch.cat(parts, -1)


def train_and_save(rank: int, world_size: int, directory: str) -> torch.Tensor:
    import deepspeed

    model, groups = build(world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        skip_inference_operators()
        engine = deepspeed.initialize(model=model, optimizer=optimizer, mpu=groups, config=settings, dist_init_required=False)[0]
        for _ in range(2):
            # No loss of language: any gradients that make every weight move will do.
            engine.backward(all_logits(engine.module, groups).square().mean())
            engine.step()
        engine.save_checkpoint(directory, tag="global_step2", client_state={"gated_linear_unit": True})
    with torch.no_grad():
        return all_logits(engine.module, groups)


def load_and_compute(rank: int, world_size: int, directory: str) -> tuple[torch.Tensor, bool]:
    model, groups = build(world_size)
    checkpoint = ZeroCheckpoint(f"{directory}/global_step2")
    parameters = dict(model.named_parameters())
    assert list(parameters) == checkpoint.names
    changed = True
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = checkpoint.read_slice(name, "param", groups.tensor_rank, groups.tensor_size)
            changed = changed and not torch.equal(parameter, value)
            parameter.copy_(value)
        return all_logits(model, groups), changed


def test_two_ranks_save_what_one_rank_computes_with(tmp_path):
    directory = str(tmp_path / "checkpoints")
    expected, _ = run_ranks(train_and_save, 2, directory, tmp_path=tmp_path)
    [(logits, changed)] = run_ranks(load_and_compute, 1, directory, tmp_path=tmp_path)
    assert changed
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
