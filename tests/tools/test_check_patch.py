"""The patch check as users run it, on small checkouts and on real ones."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_patch.py"
PATCHES = TOOL.parents[1] / "patches"
# The lines that the hunks need around them, in the functions that they are meant for.
ARGUMENTS = '''\
def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    """Parse all arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False)

    parser = add_megatron_arguments(parser)

    # Custom arguments.
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    return parser.parse_args()
'''
TRAINING = '''\
def post_training_step_callbacks(model, iteration):
    """Run all post-training-step functions (e.g., FT heartbeats, GC)."""
    args = get_args()

    # Bring CPU and GPU back in sync if on right iteration.
    if args.train_sync_interval and iteration % args.train_sync_interval == 0:
        torch.cuda.synchronize()


def train(model):
    post_training_step_callbacks(model, 1)
'''
PRETRAIN = '''\
def train_valid_test_datasets_provider(train_val_test_num_samples):
    """Build the train test and validation datasets.

    Args:
        train_val_test_num_samples : A list containing the number of samples in train test and validation.
    """
    args = get_args()

    config = core_gpt_dataset_config_from_args(args)

    return config
'''


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_patch", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    directory = tmp_path / "Megatron-LM"
    (directory / "megatron" / "training").mkdir(parents=True)
    (directory / "megatron" / "training" / "arguments.py").write_text(ARGUMENTS)
    (directory / "megatron" / "training" / "training.py").write_text(TRAINING)
    (directory / "pretrain_gpt.py").write_text(PRETRAIN)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_checkout_that_fits(tool: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(checkout)
    assert tool.main([str(checkout)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(megatron-lm, version unknown: not a git checkout)" in lines[0]
    assert [line.split() for line in lines[3:6]] == [
        ["add_group_mates_arguments", "megatron/training/arguments.py", "9", "-83", "parse_args"],
        ["step_boundary", "megatron/training/training.py", "9", "-1880", "post_training_step_callbacks"],
        ["datasets", "pretrain_gpt.py", "13", "-347", "train_valid_test_datasets_provider"],
    ]
    assert contents(checkout) == before
    subprocess.run(lines[-1], shell=True, check=True)
    assert "step_boundary(args, iteration)" in (checkout / "megatron" / "training" / "training.py").read_text()


def test_the_command_that_is_printed_works_in_a_part_of_a_repository(
    tool: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "--quiet", str(checkout.parent)], check=True)
    assert tool.main([str(checkout)]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--directory=Megatron-LM" in command
    subprocess.run(command, shell=True, check=True)
    assert "megatron_groupmates" in (checkout / "pretrain_gpt.py").read_text()


@pytest.mark.parametrize(
    ("path", "old", "new", "messages"),
    [
        (
            "megatron/training/training.py",
            "def post_training_step_callbacks(model, iteration):",
            "def training_log(model, iteration):",
            ["line 9: step_boundary() would land in training_log, not in post_training_step_callbacks", "must not be used"],
        ),
        (
            "pretrain_gpt.py",
            "def train_valid_test_datasets_provider(train_val_test_num_samples):",
            "class Data:\n  def build(self, train_val_test_num_samples):",
            ["datasets() would land in Data.build, not in train_valid_test_datasets_provider"],
        ),
        (
            "megatron/training/training.py",
            "post_training_step_callbacks(model, 1)",
            "other(model)",
            ["post_training_step_callbacks(), which holds step_boundary(), is not called by train()", "would not run"],
        ),
        (
            "megatron/training/arguments.py",
            "    # Custom arguments.\n",
            "    # More arguments.\n",
            [
                "group-mates.patch does not fit",
                "while searching for",
                "# Custom arguments.",
                "patch failed: megatron/training/arguments.py",
            ],
        ),
        ("pretrain_gpt.py", "    return config", "    import megatron_groupmates", ["pretrain_gpt.py has the patch already"]),
        ("pretrain_gpt.py", "    return config", "    return (", ["pretrain_gpt.py, patched, is not Python any more"]),
    ],
)
def test_a_checkout_that_does_not_fit(
    tool: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str], path: str, old: str, new: str, messages: list[str]
) -> None:
    change(checkout / path, old, new)
    assert tool.main([str(checkout)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and [message for message in messages if message not in told] == []


def test_what_is_no_checkout(tool: ModuleType, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: str) -> str:
        assert tool.main(list(arguments)) == 1
        return capsys.readouterr().err

    assert "there is no such directory" in message(str(tmp_path / "nowhere"))
    assert "is a checkout of neither Megatron-LM" in message(str(tmp_path))
    assert "there is no such patch" in message(str(checkout), "--patch", str(tmp_path / "no.patch"))
    (tmp_path / "empty.patch").write_text("nothing\n")
    assert "changes no file" in message(str(checkout), "--patch", str(tmp_path / "empty.patch"))
    (tmp_path / "other.patch").write_text("--- a/README\n+++ b/README\n@@ -1 +1,2 @@\n a\n+b\n")
    (checkout / "README").write_text("a\n")
    (checkout / "megatron" / "training" / "arguments.py").unlink()
    assert "has no megatron/training/arguments.py, which group-mates.patch changes" in message(str(checkout))


def test_a_patch_without_its_hook(tool: ModuleType, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weaker = (PATCHES / "megatron-lm" / "group-mates.patch").read_text().replace("+        step_boundary(args, iteration)", "+        pass")
    (tmp_path / "weaker.patch").write_text(weaker)
    assert tool.main([str(checkout), "--patch", str(tmp_path / "weaker.patch")]) == 1
    assert "training.py, patched, does not call step_boundary()" in capsys.readouterr().err


def test_real_checkouts_of_megatron_lm(
    tool: ModuleType, megatron_lm_checkouts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkout in megatron_lm_checkouts:
        assert tool.main([str(checkout)]) == 0, capsys.readouterr().err
        # The last hunk's context in another function: git still applies it.
        moved = tmp_path / checkout.name
        for path in ("pretrain_gpt.py", "megatron/training/arguments.py", "megatron/training/training.py"):
            (moved / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / path, moved / path)
        change(moved / "megatron" / "training" / "training.py", "def post_training_step_callbacks(", "def something_else(")
        assert tool.main([str(moved)]) == 1
        assert "would land in something_else" in capsys.readouterr().err


def test_a_real_checkout_of_megatron_deepspeed(tool: ModuleType, megatron_deepspeed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(megatron_deepspeed)]) == 0, capsys.readouterr().err
    assert "(megatron-deepspeed, " in capsys.readouterr().out
