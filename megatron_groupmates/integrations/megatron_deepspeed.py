"""Megatron-DeepSpeed's ``pretrain_gpt.py`` with Group-MATES, without a patch.

Start it from the checkout's directory in place of ``pretrain_gpt.py``, with this package on the path:

    deepspeed --module megatron_groupmates.integrations.megatron_deepspeed <the checkout's arguments> --group-mates-...

Model, loss and loop are the checkout's. Without any ``--group-mates-...`` argument so are its data.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations import session
from megatron_groupmates.integrations.arguments import add_group_mates_arguments, is_on


def main() -> None:
    """Train as the checkout in the working directory does."""
    # By name when called: which megatron there is depends on the working directory.
    pretrain_gpt, megatron = _checkout_module("pretrain_gpt"), _checkout_module("megatron")
    on_step_begin = _checkout_module("megatron.profiler").on_step_begin

    def provide_datasets(num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
        args = megatron.get_args()
        if not is_on(args):
            return pretrain_gpt.train_valid_test_datasets_provider(num_samples)
        return session.datasets(args, num_samples)

    def at_step_boundary() -> None:
        args = megatron.get_args()
        if is_on(args):
            session.step_boundary(args)

    on_step_begin.append(at_step_boundary)
    pretrain_gpt.git_ds_info()
    _checkout_module("megatron.training").pretrain(
        provide_datasets,
        pretrain_gpt.model_provider,
        _checkout_module("megatron.core.enums").ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        extra_args_provider=_add_arguments,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        data_post_process=pretrain_gpt.data_post_process,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    try:
        return add_group_mates_arguments(parser)
    except argparse.ArgumentError as error:
        raise UserError("this checkout has the Group-MATES patch: start its own pretrain_gpt.py, with the same arguments") from error


def _checkout_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"there is no {name} here: start this in the directory of a Megatron-DeepSpeed checkout") from error


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        session.close(failed=True)
        sys.exit(f"error: {error}")
