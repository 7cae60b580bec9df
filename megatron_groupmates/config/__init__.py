"""One YAML file -> frozen dataclasses, one section per component."""

from megatron_groupmates.config.checks import (
    check_world_size,
    ffn_hidden_size,
    has_gated_mlp,
    num_positions,
    server_tensor_parallel_size,
)
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.config.load import (
    config_differences,
    config_from_dict,
    config_to_dict,
    dump_config,
    parse_config,
)
from megatron_groupmates.config.oracle import oracle_estimator, oracle_learning_rate
from megatron_groupmates.config.paths import RunPaths
from megatron_groupmates.config.refreshes import refresh_number, refresh_steps
from megatron_groupmates.config.schedule import learning_rate
from megatron_groupmates.config.sections import Config

__all__ = [
    "Config",
    "RunPaths",
    "UserError",
    "check_world_size",
    "config_differences",
    "config_from_dict",
    "config_to_dict",
    "dump_config",
    "ffn_hidden_size",
    "has_gated_mlp",
    "learning_rate",
    "num_positions",
    "oracle_estimator",
    "oracle_learning_rate",
    "parse_config",
    "refresh_number",
    "refresh_steps",
    "server_tensor_parallel_size",
]
