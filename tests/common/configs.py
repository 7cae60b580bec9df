"""A small valid config that every room's tests start from."""

from __future__ import annotations

import copy
from typing import Any

from megatron_groupmates.config import Config, config_from_dict

_TREE: dict[str, dict[str, Any]] = {
    "run": {"output_dir": "run"},
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "sequence_length": 8, "vocab_size": 320},
    "data": {"pool": "pool", "reference": "reference", "num_workers": 0},
    "training": {"train_iters": 20, "global_batch_size": 4, "micro_batch_size": 2},
    "selection": {"enabled": True, "first_refresh_step": 5, "refresh_interval": 5},
}


def tiny_tree(**section_overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The nested dict of :func:`tiny_config`, before it is parsed."""
    tree = copy.deepcopy(_TREE)
    for section, settings in section_overrides.items():
        tree.setdefault(section, {}).update(settings)
    return tree


def tiny_config(**section_overrides: dict[str, Any]) -> Config:
    """A config that fits ``tests.pool.helpers.make_pool``'s defaults (9 tokens a sample, 300 ids).

    Args:
        section_overrides: settings by section, for instance ``tiny_config(model={"num_layers": 1})``.
    """
    return config_from_dict(tiny_tree(**section_overrides))
