"""One way to open a checkpoint, whoever trains the run."""

from __future__ import annotations

from pathlib import Path

from megatron_groupmates.checkpoint.megatron_deepspeed import MegatronDeepSpeedCheckpoint
from megatron_groupmates.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config

_READERS = {"groupmates": ZeroCheckpoint, "megatron_deepspeed": MegatronDeepSpeedCheckpoint, "megatron_lm": TorchDistCheckpoint}


def open_checkpoint(config: Config, tag_dir: Path | str) -> ZeroCheckpoint | TorchDistCheckpoint:
    """The reader of one checkpoint of the run, under megatron-core's names and in its layout, by ``checkpoint.format``.

    Args:
        config: the run.
        tag_dir: directory of the tag.

    Raises:
        UserError: when it is incomplete, damaged, or of a kind that is not read.
    """
    return _READERS[config.checkpoint.format](tag_dir)
