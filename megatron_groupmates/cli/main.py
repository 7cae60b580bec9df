"""The command line: parses, calls one command, turns user errors into one clear message and exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Sequence

from megatron_groupmates import __version__
from megatron_groupmates.cli import inspect_commands, job_commands, plan
from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.launch import read_launch_environment

_EPILOG = """\
start with:
  python -m megatron_groupmates plan --config C.yaml           check settings and pool, print costs; needs no GPU
  deepspeed --module megatron_groupmates train --config C.yaml
  deepspeed --module megatron_groupmates serve --config C.yaml (a second job, on other GPUs or hosts)
  python -m megatron_groupmates status RUN
"""

_OTHER_RANKS_WAIT_SECONDS = 15.0


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(
        prog="megatron_groupmates",
        description="Group-level data selection for DeepSpeed/Megatron pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (job_commands, plan, inspect_commands):
        module.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    local_rank = None
    try:
        arguments, local_rank = split_local_rank(sys.argv[1:] if arguments is None else arguments)
        options = build_parser().parse_args(arguments)
        options.local_rank = local_rank
        return options.handler(options)
    except UserError as error:
        return _fail(str(error), local_rank)
    except BrokenPipeError:
        # The reader of standard output has gone (`| head`): what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(
            f"no space left while writing {error.filename or 'a file'}: free some, then start the same command again; "
            "what was complete is kept",
            local_rank,
        )
    except KeyboardInterrupt:
        return 130


def split_local_rank(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """Take out the ``--local_rank=N`` (or ``--local-rank N``) that launchers put before or among the arguments.

    Raises:
        UserError: its value is missing or no number.
    """
    rest: list[str] = []
    local_rank = None
    remaining = iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            value = value or next(remaining, "")
            if not value.isdecimal():
                raise UserError(f"{name} takes the number of a rank on its host, got {value!r}")
            local_rank = int(value)
        else:
            rest.append(argument)
    return rest, local_rank


def _fail(message: str, local_rank: int | None) -> int:
    # Most mistakes are seen by every rank at once: rank 0 speaks, and the launcher ends the others before they repeat it.
    with contextlib.suppress(UserError):  # the launcher's variables may be the mistake
        if read_launch_environment(os.environ, local_rank).rank:
            time.sleep(_OTHER_RANKS_WAIT_SECONDS)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1
