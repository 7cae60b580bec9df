"""Whether a patch of ours fits a checkout exactly, and whether each of its hooks lands in the function it is meant for."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations.hooks import calling_functions, calls, mentions_us


@dataclasses.dataclass(frozen=True)
class Hook:
    """One call that a patch adds.

    Attributes:
        name: what is called.
        path: file of the checkout.
        function: the function that must hold the call.
        caller: function of the same file that must call that one; '' where another file does.
    """

    name: str
    path: str
    function: str
    caller: str = ""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A hook where it was found.

    Attributes:
        hook: what was looked for.
        line: of the patched file, from 1.
        offset: lines by which the hunk lies elsewhere than in the version that the patch was made from.
    """

    hook: Hook
    line: int
    offset: int


# By folder in patches/, which is the name of the trainer.
HOOKS: dict[str, tuple[Hook, ...]] = {
    "megatron-lm": (
        Hook("add_group_mates_arguments", "megatron/training/arguments.py", "parse_args"),
        Hook("step_boundary", "megatron/training/training.py", "post_training_step_callbacks", caller="train"),
        Hook("datasets", "pretrain_gpt.py", "train_valid_test_datasets_provider"),
    ),
    "megatron-deepspeed": (
        Hook("add_group_mates_arguments", "megatron/arguments.py", "parse_args"),
        Hook("step_boundary", "megatron/training.py", "train", caller="pretrain"),
        Hook("datasets", "megatron/training.py", "build_train_valid_test_datasets", caller="build_train_valid_test_data_loaders"),
    ),
}


def trainer_of(checkout: Path) -> str:
    """Which key of :data:`HOOKS` a checkout is.

    Raises:
        UserError: none of them.
    """
    if not checkout.is_dir():
        raise UserError(f"{checkout}: there is no such directory")
    for trainer, path in (("megatron-lm", "megatron/training/training.py"), ("megatron-deepspeed", "megatron/training.py")):
        if (checkout / path).is_file() and (checkout / "pretrain_gpt.py").is_file():
            return trainer
    raise UserError(
        f"{checkout} is a checkout of neither Megatron-LM (megatron/training/training.py) nor Megatron-DeepSpeed (megatron/training.py) "
        "with a pretrain_gpt.py; give the top directory of one"
    )


def check_patch(checkout: Path, patch: Path, trainer: str) -> list[Placed]:
    """Apply ``patch`` to copies of the files it changes, and find its hooks there; the checkout is only read.

    Raises:
        UserError: a file is missing, the checkout has the patch already, a hunk does not fit exactly, or a hook is elsewhere
            than :data:`HOOKS` says; names the file, and the function or the lines.
    """
    if not patch.is_file():
        raise UserError(f"{patch}: there is no such patch")
    paths = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)
    if not paths:
        raise UserError(f"{patch} changes no file: it is not a patch in git's format")
    for path in paths:
        if not (checkout / path).is_file():
            raise UserError(f"{checkout} has no {path}, which {patch.name} changes: the version is not one that the patch is for")
        if mentions_us((checkout / path).read_text()):
            raise UserError(f"{checkout / path} has the patch already: take it out (git checkout {path}), or leave it at that")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for path in paths:
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / path, scratch / path)
        offsets = _apply(scratch, patch)
        return [_find(scratch, checkout, hook, offsets.get(hook.path, 0)) for hook in HOOKS[trainer]]


def _apply(scratch: Path, patch: Path) -> dict[str, int]:
    """Apply with all of the context required; the offset of each file's last hunk."""
    # A repository of its own: within another one, git would take the paths to be relative to that one's top.
    subprocess.run(["git", "init", "--quiet", str(scratch)], check=True, capture_output=True)
    command = ["git", "-C", str(scratch), "apply", "--verbose", "--whitespace=nowarn", str(patch.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise UserError(f"{patch.name} does not fit: {_first_error(done.stderr)}")
    offsets: dict[str, int] = {}
    path = ""
    for line in done.stderr.splitlines():
        if checking := re.match(r"Checking patch (.*)\.\.\.$", line):
            path = checking[1]
        elif moved := re.match(r"Hunk #\d+ succeeded at \d+ \(offset (-?\d+) lines?\)", line):
            offsets[path] = int(moved[1])
    return offsets


def _first_error(output: str) -> str:
    """What git says, with the lines that it looked for."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("error:")), 0)
    last = next((number for number, line in enumerate(lines) if line.startswith("error: patch failed")), len(lines) - 1)
    return "\n".join(lines[first : last + 1]).removeprefix("error: ")


def _find(scratch: Path, checkout: Path, hook: Hook, offset: int) -> Placed:
    source = (scratch / hook.path).read_text()
    try:
        found = [call for call in calls(source) if call.name == hook.name]
    except SyntaxError as error:
        raise UserError(f"{checkout / hook.path}, patched, is not Python any more: {error}") from error
    if not found:
        raise UserError(f"{checkout / hook.path}, patched, does not call {hook.name}()")
    for call in found:
        if call.function != hook.function:
            raise UserError(
                f"{checkout / hook.path}, line {call.line}: {hook.name}() would land in {call.function or 'no function'}, not in "
                f"{hook.function}; its context has moved, and the patch must not be used on this version"
            )
    if hook.caller and hook.caller not in calling_functions(source, hook.function):
        raise UserError(
            f"{checkout / hook.path}: {hook.function}(), which holds {hook.name}(), is not called by {hook.caller}() in this version: the "
            "hook would not run"
        )
    return Placed(hook, found[0].line, offset)
