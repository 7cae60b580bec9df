"""Train a tiny model with a checkout of Megatron-DeepSpeed and write down what it computes; see ``make.sh``.

Runs in the checkout's environment with the checkout on the path: ``deepspeed train.py <its arguments>``. Beside the
checkpoints, in ``--save``, it leaves ``expected.npz``: the samples (int64 ``[n, s + 1]``), its own loss of each of the last four after
step ``CHECKPOINT`` (float32), and each tensor-parallel rank's weights after the next step, under the checkout's names.
"""

from __future__ import annotations

import argparse
import os
import sys

import megatron.optimizer
import numpy as np
import pretrain_gpt
import torch
from megatron import get_args, profiler
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import pretrain

CHECKPOINT = 2
NUM_EVALUATED = 4
built: list[torch.nn.Module] = []


class Samples(torch.utils.data.Dataset):
    """Random tokens."""

    def __init__(self, number: int) -> None:
        args = get_args()
        self.tokens = np.random.default_rng(5).integers(0, args.vocab_size, (number, args.seq_length + 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"text": self.tokens[index]}


def datasets(train_val_test_num_samples: list[int]) -> tuple[Samples, None, None]:
    """The samples of the whole run, and those to evaluate."""
    return Samples(train_val_test_num_samples[0] + NUM_EVALUATED), None, None


def model_provider(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
    """The checkout's own model, kept at hand."""
    built.append(pretrain_gpt.model_provider(pre_process, post_process))
    return built[-1]


@torch.no_grad()
def losses(samples: np.ndarray) -> np.ndarray:
    """The checkout's mean loss of each sample by itself."""
    found = []
    for sample in torch.from_numpy(samples):
        tokens, labels = sample[None, :-1], sample[None, 1:]
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length).tril() < 0.5
        output, *_ = built[0](tokens, torch.arange(length)[None], mask, labels=labels)
        found.append(output.float().mean().item())
    return np.array(found, dtype=np.float32)


def after_step() -> None:
    """Keep the losses at the checkpoint and the weights one step later."""
    args = get_args()
    samples = Samples(args.train_iters * args.global_batch_size + NUM_EVALUATED).tokens
    if args.iteration == CHECKPOINT:
        kept["samples"], kept["losses"] = samples, losses(samples[-NUM_EVALUATED:])
    elif args.iteration == CHECKPOINT + 1:
        weights = {name: value.detach().float() for name, value in built[0].named_parameters()}
        everybody: list[dict[str, torch.Tensor]] = [{} for _ in range(mpu.get_tensor_model_parallel_world_size())]
        torch.distributed.all_gather_object(everybody, weights, group=mpu.get_tensor_model_parallel_group())
        for rank, own in enumerate(everybody):
            kept.update({f"{rank}/{name}": value.numpy() for name, value in own.items()})
        if torch.distributed.get_rank() == 0:
            np.savez(os.path.join(args.save, "expected.npz"), **kept)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What the checkout has no argument for."""
    parser.add_argument("--decoupled", action="store_true", help="AdamW, as Apex's FusedAdam, which the checkout takes on a GPU")
    return parser


if "--decoupled" in sys.argv:
    # Where there is no GPU the checkout takes torch's Adam, whose weight decay is part of the gradient.
    megatron.optimizer.Adam = torch.optim.AdamW
kept: dict[str, np.ndarray] = {}
profiler.on_step_end.append(after_step)
pretrain(
    datasets,
    model_provider,
    ModelType.encoder_or_decoder,
    pretrain_gpt.forward_step,
    extra_args_provider=add_arguments,
    args_defaults={"tokenizer_type": "NullTokenizer"},
)
