"""The ``--group-mates-...`` arguments that a trainer of the user's own gets."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from megatron_groupmates.config import UserError
from megatron_groupmates.utils.storage import is_remote


def add_group_mates_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the argument group; what the trainer calls an ``extra_args_provider``. Without any of them nothing changes.

    Raises:
        UserError: the command line has ``--yaml-cfg`` beside them, with whose file Megatron-LM replaces all arguments.
    """
    own = next((word for word in sys.argv if word.startswith("--group-mates-")), None)
    if own and any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):
        raise UserError(
            f"--yaml-cfg: its file replaces all arguments, so {own.partition('=')[0]} would have no effect; give the settings of the file "
            "as arguments"
        )
    group = parser.add_argument_group("Group-MATES", "train on data selected for the model; off unless --group-mates-selection is given")
    group.add_argument(
        "--group-mates-selection",
        metavar="DIR",
        help="switches it on: directory of this run's generations and their log, config.yaml, metrics; a new one for a new run. "
        "The selection server is started with --config DIR/config.yaml",
    )
    group.add_argument("--group-mates-pool", metavar="POOL", help="pool to train on (tools/preprocess_dclm.py): a directory or URL")
    group.add_argument(
        "--group-mates-config",
        metavar="FILE",
        help="YAML with the sections data (reference, exclude, ...), selection, oracle, relational and server; "
        "without it generations that something else publishes in DIR are adopted",
    )
    group.add_argument("--group-mates-evaluation", metavar="POOL", help="held-out pool for the validation that --eval-interval asks for")
    group.add_argument(
        "--group-mates-poll-interval",
        type=int,
        metavar="N",
        help="steps between looks for a new generation; selection.poll_interval_steps of FILE, or 1, when not given",
    )
    return parser


@dataclasses.dataclass(frozen=True)
class GroupMatesArguments:
    """The arguments, checked; paths are absolute, because the server may be started elsewhere.

    Attributes:
        selection: directory of everything that belongs to Group-MATES.
        pool: directory or URL.
        config: YAML file, None for none.
        evaluation: held-out pool, None for none.
        poll_interval: steps, None for the file's.
    """

    selection: str
    pool: str
    config: str | None = None
    evaluation: str | None = None
    poll_interval: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> GroupMatesArguments | None:
        """The arguments of a trainer; None where Group-MATES is off.

        Raises:
            UserError: naming the argument and what to change.
        """
        given = {field.name: getattr(args, f"group_mates_{field.name}", None) for field in dataclasses.fields(cls)}
        if given["selection"] is None:
            if lost := [name for name, value in given.items() if value is not None]:
                flag = _flag(lost[0])
                raise UserError(f"{flag} {given[lost[0]]}: has no effect without --group-mates-selection DIR; add it, or leave {flag} out")
            return None
        if given["pool"] is None:
            raise UserError(f"--group-mates-selection {given['selection']}: needs --group-mates-pool POOL too, the pool to train on")
        if given["poll_interval"] is not None and given["poll_interval"] < 1:
            raise UserError(f"--group-mates-poll-interval {given['poll_interval']}: give a number of steps from 1 on")
        for name in ("selection", "config"):
            if given[name] is not None and is_remote(given[name]):
                raise UserError(f"{_flag(name)} {given[name]}: give a path on a file system that every host shares, not a URL")
        return cls(**{name: absolute(value) if isinstance(value, str) else value for name, value in given.items()})


def is_on(args: argparse.Namespace) -> bool:
    """Whether a trainer's arguments switch Group-MATES on.

    Raises:
        UserError: as :meth:`GroupMatesArguments.of`.
    """
    return GroupMatesArguments.of(args) is not None


def absolute(path: str) -> str:
    """``path`` as other processes with other working directories understand it."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def _flag(name: str) -> str:
    return "--group-mates-" + name.replace("_", "-")
