"""The two jobs that a launcher starts on many ranks: ``train`` and ``serve``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_groupmates.cli.host_checks import HostsRefused, check_host, check_hosts, is_finished
from megatron_groupmates.config import Config, RunPaths, UserError, parse_config, server_tensor_parallel_size
from megatron_groupmates.parallel.launch import LaunchEnvironment, read_launch_environment
from megatron_groupmates.training.metrics import read_training_state
from megatron_groupmates.utils.storage import configure_storage

# Clustering and greedy selection of a large pool keep one rank busy while the others wait in a collective. A rank that
# dies is noticed by the others, not by this timeout.
_SERVER_TIMEOUT_SECONDS = 12 * 3600.0
_VERDICT_SECONDS = 3.0


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
    with _started(options, "train") as job:
        config, environment = job.config, job.environment
        if is_finished(config):
            if environment.rank == 0:
                steps = config.training.train_iters
                print(f"{job.paths.root} is finished: step {read_training_state(job.paths)['step']} of {steps}; nothing to do", flush=True)
            return 0
        from megatron_groupmates.parallel.groups import initialize_parallel, shut_down

        groups = initialize_parallel(environment, config.parallel.tensor_model_parallel_size, config.run.seed, store=job.store)
        from megatron_groupmates.training.loop import train

        train(config, groups)
        shut_down()
    return 0


def _serve(options: argparse.Namespace) -> int:
    with _started(options, "serve") as job:
        config = job.config
        from megatron_groupmates.parallel.groups import initialize_parallel, shut_down

        tensor_size = server_tensor_parallel_size(config)
        groups = initialize_parallel(job.environment, tensor_size, config.run.seed, _SERVER_TIMEOUT_SECONDS, store=job.store)
        from megatron_groupmates.server.watch import serve

        completed = serve(config, groups, once=options.once)
        shut_down()
    return 0 if completed else 1


@dataclasses.dataclass(frozen=True)
class _Job:
    """What one rank of a job starts from. ``store`` is None in a job of one rank."""

    config: Config
    paths: RunPaths
    environment: LaunchEnvironment
    store: Any


@contextlib.contextmanager
def _started(options: argparse.Namespace, command: str) -> Iterator[_Job]:
    """The job once every host has what it needs; while it runs, a lost rank ends it. Every rank of the job must enter.

    Rank 0 writes the run's config. Whatever ends this rank is told to the others, which would else wait for it in a collective.
    """
    from megatron_groupmates.utils.logging import configure_logging
    from megatron_groupmates.utils.run_directory import write_run_config

    environment = read_launch_environment(os.environ, options.local_rank)
    configure_logging(command, environment.rank, options.verbose)
    if environment.world_size == 1:
        config = check_host(command, lambda: _read(options, command))
        write_run_config(config)
        yield _Job(config, RunPaths.of(config), environment, None)
        return
    from megatron_groupmates.parallel.meeting import Meeting
    from megatron_groupmates.parallel.watch import PeerWatch

    meeting = Meeting(environment)
    try:
        config, host = check_hosts(meeting, command, lambda: _read(options, command))
    except HostsRefused:
        time.sleep(_VERDICT_SECONDS)  # a launcher that sees this rank end ends rank 0 too, which is about to say why
        raise SystemExit(1) from None
    if environment.rank == 0:
        write_run_config(config)
    watch = PeerWatch(meeting, host, lambda: how_to_go_on(command, config))
    watch.start()
    try:
        yield _Job(config, RunPaths.of(config), environment, meeting.store)
    except RuntimeError as error:
        # What a collective raises when a peer has gone: the watch knows which, says so and ends this process.
        watch.await_verdict(_VERDICT_SECONDS)
        watch.leave(_in_short(error))
        raise
    except BaseException as error:
        watch.leave(_in_short(error))
        raise
    watch.leave()


def how_to_go_on(command: str, config: Config) -> str:
    """What is kept of a job that lost a rank, and what to do."""
    if command == "serve":
        return "what the round has finished is kept; start the same command again"
    from megatron_groupmates.checkpoint.discovery import latest_tag

    checkpoints = RunPaths.of(config).checkpoints
    tag = latest_tag(checkpoints)
    if tag is None:
        return "there is no complete checkpoint yet; start the same command again"
    return f"the newest complete checkpoint is {checkpoints / tag}; the same command goes on from it, exactly as without the interruption"


def _read(options: argparse.Namespace, command: str) -> Config:
    config = read_config(options)
    if command == "serve" and not config.selection.enabled:
        raise UserError("selection.enabled: false, so there is nothing to serve; set it to true")
    if command == "train" and config.checkpoint.format != "groupmates":
        raise UserError(
            f"checkpoint.format: {config.checkpoint.format}: this run is trained by the checkout it belongs to; start that with its "
            "--group-mates arguments (serve, status, trace and report take this config)"
        )
    return config


def _in_short(error: BaseException) -> str:
    """The first line of an error, with its kind where the user cannot mend it."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"
