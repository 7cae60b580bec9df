"""The two jobs that a launcher starts on many ranks: ``train`` and ``serve``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_groupmates.config import Config, UserError, parse_config, server_tensor_parallel_size
from megatron_groupmates.parallel.launch import read_launch_environment
from megatron_groupmates.utils.storage import configure_storage

# Clustering and greedy selection of a large pool keep one rank busy while the others wait in a collective. A rank that
# dies is noticed by the launcher, not by this timeout.
_SERVER_TIMEOUT_SECONDS = 12 * 3600.0


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``, the same for every command that reads a config."""
    parser.add_argument("--config", required=True, metavar="C.yaml", help="the run's YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one setting; repeatable",
    )


def read_config(options: argparse.Namespace) -> Config:
    """The config that ``--config`` and ``--set`` describe; its storage options hold for this process from now on."""
    path = Path(options.config)
    if not path.is_file():
        raise UserError(f"--config: {path} does not exist")
    config = parse_config(path.read_text(), options.overrides, source=str(path))
    configure_storage(config.data.storage_options or {})
    return config


def add_commands(commands: Any) -> None:
    """Register ``train`` and ``serve``."""
    train = commands.add_parser(
        "train",
        help="the trainer; start it with deepspeed, torchrun or srun",
        description="Train from the newest checkpoint of run.output_dir, or from the start. Kill it at any time and start it again.",
    )
    add_config_options(train)
    train.add_argument("--verbose", action="store_true", help="also show debug messages and the libraries' warnings")
    train.set_defaults(handler=_train)

    serve = commands.add_parser(
        "serve",
        help="the selection server; a second job beside the trainer",
        description="Wait for the checkpoints of planned refreshes and publish a new selection for each. "
        "Kill it at any time and start it again: finished work of a round is kept.",
    )
    add_config_options(serve)
    serve.add_argument("--once", action="store_true", help="one round on the newest checkpoint, then end")
    serve.add_argument("--verbose", action="store_true", help="also show debug messages and the libraries' warnings")
    serve.set_defaults(handler=_serve)


def _train(options: argparse.Namespace) -> int:
    config = read_config(options)
    from megatron_groupmates.training.metrics import read_training_state

    environment, paths = _prepare(options, config, "train")
    state = read_training_state(paths)
    if state.get("state") == "finished" and state["step"] >= config.training.train_iters:
        if environment.rank == 0:
            print(
                f"{paths.root} is finished: step {state['step']} of {config.training.train_iters}; nothing to do",
                flush=True,
            )
        return 0
    from megatron_groupmates.parallel.groups import initialize_parallel, shut_down

    groups = initialize_parallel(environment, config.parallel.tensor_model_parallel_size, config.run.seed)
    from megatron_groupmates.training.loop import train

    train(config, groups)
    shut_down()
    return 0


def _serve(options: argparse.Namespace) -> int:
    config = read_config(options)
    if not config.selection.enabled:
        raise UserError("selection.enabled: false, so there is nothing to serve; set it to true")
    environment, _ = _prepare(options, config, "serve")
    from megatron_groupmates.parallel.groups import initialize_parallel, shut_down

    groups = initialize_parallel(environment, server_tensor_parallel_size(config), config.run.seed, _SERVER_TIMEOUT_SECONDS)
    from megatron_groupmates.server.watch import serve

    completed = serve(config, groups, once=options.once)
    shut_down()
    return 0 if completed else 1


def _prepare(options: argparse.Namespace, config: Config, name: str) -> tuple[Any, Any]:
    """Logging, then the run directory: rank 0 writes it, every rank checks it."""
    from megatron_groupmates.utils.logging import configure_logging
    from megatron_groupmates.utils.run_directory import check_run_directory, write_run_config

    environment = read_launch_environment(os.environ, options.local_rank)
    configure_logging(name, environment.rank, options.verbose)
    paths = check_run_directory(config)
    if environment.rank == 0:
        write_run_config(config)
    return environment, paths
