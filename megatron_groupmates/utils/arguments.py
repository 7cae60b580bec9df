"""Command-line options that several tools have."""

from __future__ import annotations

import argparse
import json
import os

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.storage import configure_storage


def add_storage_options(parser: argparse._ActionsContainer) -> None:
    """``--storage-options JSON``, for :func:`use_storage_options`."""
    parser.add_argument(
        "--storage-options",
        default="{}",
        metavar="JSON",
        help='arguments of remote file systems by protocol, such as {"s3": {"endpoint_url": "https://..."}}',
    )


def use_storage_options(arguments: argparse.Namespace) -> None:
    """Configure this process's access to remote files.

    Raises:
        UserError: the option is not a JSON object of objects.
    """
    text = arguments.storage_options
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UserError(f"--storage-options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--storage-options is an object of protocols, not {text}")
    configure_storage(options)


def add_workers(parser: argparse._ActionsContainer, task: str) -> None:
    """``--workers N``, the cores by default; ``task`` is what the processes do."""
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help=f"processes that {task}, 0 for none beside this one (default: the cores, %(default)s)",
    )
