#!/usr/bin/env python
"""Check that the patch of Group-MATES fits a checkout of Megatron-LM or Megatron-DeepSpeed, before it is applied.

    python tools/check_patch.py ~/Megatron-LM
    python tools/check_patch.py ~/Megatron-DeepSpeed --patch patches/megatron-deepspeed/group-mates.patch

The patch is applied to copies of the files that it changes; the checkout itself is only read. Two things are checked:
every hunk fits exactly (no fuzz: a hunk that fits roughly may land in another function and still count as applied), and,
by the syntax tree of the patched files, every hook is in the function that it is meant for, which the trainer calls.

Which trainer it is shows in the checkout's files. Exit code 0: fits, and the command that applies it is printed;
1: does not, and the message says which hunk or hook.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.integrations.patches import HOOKS, Placed, check_patch, trainer_of

_PATCHES = Path(__file__).resolve().parents[1] / "patches"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="CHECKOUT", help="top directory of the checkout")
    parser.add_argument("--patch", metavar="FILE", help=f"patch to check (default: the one of patches/, for {' or '.join(HOOKS)})")
    return parser.parse_args(arguments)


def report(placed: list[Placed]) -> str:
    """A table of the hooks."""
    rows = [("hook", "file", "line", "moved by", "function")]
    rows += [(each.hook.name, each.hook.path, str(each.line), f"{each.offset:+d}", each.hook.function) for each in placed]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def apply_command(checkout: Path, patch: Path) -> str:
    """The command that applies the patch: within a larger repository git must be told where in it the checkout lies."""
    asked = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "--show-prefix"], capture_output=True, text=True)
    top, prefix = [*asked.stdout.splitlines(), "", ""][:2]
    if asked.returncode or not prefix:
        return shlex.join(["git", "-C", str(checkout), "apply", str(patch.resolve())])
    return shlex.join(["git", "-C", top, "apply", f"--directory={prefix.rstrip('/')}", str(patch.resolve())])


def version(checkout: Path) -> str:
    """What git calls the checkout's commit."""
    asked = subprocess.run(["git", "-C", str(checkout), "describe", "--tags", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or "version unknown: not a git checkout"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    checkout = Path(args.checkout)
    try:
        trainer = trainer_of(checkout)
        patch = Path(args.patch) if args.patch else _PATCHES / trainer / "group-mates.patch"
        placed = check_patch(checkout, patch, trainer)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{patch.name} fits {checkout} ({trainer}, {version(checkout)})\n\n{report(placed)}\n")
    print(f"Every hook is where it belongs. To apply it:\n  {apply_command(checkout, patch)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
