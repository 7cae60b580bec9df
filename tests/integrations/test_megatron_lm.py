"""The Megatron-LM entry module: what it refuses, and that it wraps three functions of a checkout and nothing else."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations import megatron_lm
from megatron_groupmates.integrations.megatron_lm_resume import saved_state

ROOT = Path(__file__).parents[2]
ARGUMENTS = """\
def add_megatron_arguments(parser):
    parser.add_argument("--seed", type=int)
    return parser


def parse_args():
    import argparse

    return add_megatron_arguments(argparse.ArgumentParser()).parse_args()
"""
TRAINING = """\
from megatron.training.arguments import parse_args


def get_args():
    return pretrain.args


def build_train_valid_test_datasets(provider, num_samples=None):
    return provider(num_samples or (8, 4, 4))


def build_train_valid_test_data_loaders(provider):
    return build_train_valid_test_datasets(provider)


def post_training_step_callbacks(model, iteration):
    return iteration


def train(provider):
    for iteration in (1, 2):
        print("step", post_training_step_callbacks(None, iteration=iteration))


def pretrain(provider):
    pretrain.args = parse_args()
    print("datasets", build_train_valid_test_data_loaders(provider))
    train(provider)
"""
SCRIPT = """\
from megatron.training.training import pretrain

if __name__ == "__main__":
    pretrain(lambda num_samples: ["own", num_samples])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in the shape that Megatron-LM has."""
    directory = tmp_path / "Megatron-LM"
    (directory / "megatron" / "training").mkdir(parents=True)
    (directory / "megatron" / "training" / "arguments.py").write_text(ARGUMENTS)
    (directory / "megatron" / "training" / "training.py").write_text(TRAINING)
    (directory / "pretrain_gpt.py").write_text(SCRIPT)
    return directory


def start(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_groupmates.integrations.megatron_lm", *arguments]
    return subprocess.run(command, cwd=checkout, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)


def test_without_the_flag_the_checkouts_own_functions_run(checkout: Path) -> None:
    done = start(checkout, "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["datasets ['own', (8, 4, 4)]", "step 1", "step 2"]


def test_its_arguments_are_the_checkouts_and_ours(checkout: Path) -> None:
    done = start(checkout, "--group-mates-pool", "pool")
    assert done.returncode and "error: --group-mates-pool pool: has no effect without --group-mates-selection" in done.stderr


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (
            "pretrain_gpt.py",
            "pretrain(lambda",
            "import megatron_groupmates(lambda",
            "has the patch of Group-MATES already: start it directly",
        ),
        (
            "megatron/training/training.py",
            "post_training_step_callbacks(None",
            "other(None",
            "post_training_step_callbacks() is not called by train() as in Megatron-LM core_v0.13 to main (it is not called)",
        ),
        (
            "megatron/training/arguments.py",
            "def parse_args",
            "def parse",
            "add_megatron_arguments() is not called by parse_args() as in Megatron-LM core_v0.13 to main (it is called by parse instead)",
        ),
    ],
)
def test_a_checkout_that_cannot_be_wrapped(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, path: str, old: str, new: str, message: str
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (checkout / path).write_text((checkout / path).read_text().replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        megatron_lm.main([])


def test_a_directory_that_is_no_checkout(tmp_path: Path) -> None:
    done = start(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is not a Megatron-LM checkout: it has no pretrain_gpt.py with megatron/training")


def trainer_arguments(**changes: Any) -> argparse.Namespace:
    values = {"reset_attention_mask": False, "create_attention_mask_in_dataloader": True}
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": True}, r"--sft \(True\) means fine-tuning data, which Group-MATES cannot follow"),
        ({"phase_transition_iterations": [5]}, r"--phase-transition-iterations \(\[5\]\) means sample numbers that begin at 0"),
        ({"iterations_to_skip": [3]}, r"--iterations-to-skip \(\[3\]\) means steps that no step hook sees"),
        ({"async_save": True}, r"--async-save \(True\) means checkpoints that are completed in later steps"),
        ({"inprocess_restart": True}, r"--inprocess-restart \(True\) means several starts in one process"),
        ({"override_ckpt_iteration": 7}, r"--override-ckpt-iteration \(7\) means another step than the checkpoint's"),
        ({"non_persistent_ckpt_type": "local"}, "--non-persistent-ckpt-type local: .* cannot read from such a checkpoint"),
        ({"reset_attention_mask": True, "create_attention_mask_in_dataloader": False}, "--reset-attention-mask has no effect under"),
    ],
)
def test_arguments_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        megatron_lm._check_arguments(trainer_arguments(**changes))


def test_a_provider_that_some_ranks_alone_would_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def provider() -> None: ...

    monkeypatch.setattr(sys.modules["__main__"], "train_valid_test_datasets_provider", provider, raising=False)
    with pytest.raises(UserError, match="is_distributed is not set: every rank must build its datasets"):
        megatron_lm._check_arguments(trainer_arguments())
    provider.is_distributed = True  # type: ignore[attr-defined]
    megatron_lm._check_arguments(trainer_arguments())


@pytest.mark.parametrize("evaluation", [None, "held-out"])
def test_datasets_of_virtual_stages(monkeypatch: pytest.MonkeyPatch, evaluation: str | None) -> None:
    """One boundary before the first step, however often datasets are built; no evaluation without a pool for it."""
    split = SimpleNamespace(train="train", valid="valid")
    ranks = SimpleNamespace(get_tensor_model_parallel_rank=lambda: 0)
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(parallel_state=ranks))
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.utils", SimpleNamespace(Split=split))
    monkeypatch.setattr(megatron_lm, "_at_boundary", None)
    monkeypatch.setattr(megatron_lm, "_fork_of", lambda args: None)
    boundaries: list[int] = []

    def boundary(args: argparse.Namespace, fork: None) -> None:
        boundaries.append(args.iteration)
        args.group_mates = {}

    held_out = SimpleNamespace() if evaluation else None
    monkeypatch.setattr(megatron_lm.session, "datasets", lambda args, samples, fork: (SimpleNamespace(), held_out, None))
    monkeypatch.setattr(megatron_lm.session, "step_boundary", boundary)
    args = trainer_arguments(iteration=6, eval_iters=100, group_mates_evaluation=evaluation)
    for _ in range(2):
        train, valid, test = megatron_lm.datasets(args, [8, 4, 4])
        assert (train.split, valid and valid.split, test) == ("train", evaluation and "valid", None)
    assert boundaries == [6]
    assert args.eval_iters == (100 if evaluation else 0)


@pytest.mark.parametrize("path", ["common.pt", "mp_rank_00/model_optim_rng.pt", "mp_rank_00_000/model_optim_rng.pt"])
def test_the_saved_state_is_read_as_data(tmp_path: Path, path: str) -> None:
    args = argparse.Namespace(load=str(tmp_path), iteration=7)
    file = tmp_path / "iter_0000007" / path
    file.parent.mkdir(parents=True)
    torch.save({"args": argparse.Namespace(group_mates={"log": []})}, file)
    assert saved_state(args) == {"log": []}
    torch.save({"args": argparse.Namespace(seed=1)}, file)
    assert saved_state(args) is None
    torch.save({"args": None}, file)
    with pytest.raises(UserError, match="holds no arguments of the trainer"):
        saved_state(args)
    torch.save({"args": argparse.Namespace(group_mates=argparse.ArgumentParser)}, file)
    with pytest.raises(UserError, match=r"refused: the file wants to create or call 'argparse.ArgumentParser'"):
        saved_state(args)


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_the_saved_state_of_a_non_persistent_checkpoint(tmp_path: Path, given: str | None) -> None:
    other = tmp_path / given if given else tmp_path / "load" / "non_persistent"
    for directory, name in ((tmp_path / "load", "persistent"), (other, "non-persistent")):
        (directory / "iter_0000007").mkdir(parents=True)
        torch.save({"args": argparse.Namespace(group_mates={"from": name})}, directory / "iter_0000007" / "common.pt")
    args = argparse.Namespace(
        load=str(tmp_path / "load"),
        iteration=7,
        non_persistent_ckpt_type="global",
        non_persistent_global_ckpt_dir=str(other) if given else None,
    )
    assert saved_state(args) == {"from": "persistent"}, "it has no tracker"
    tracker = other / "latest_checkpointed_iteration.txt"
    tracker.write_text("6")
    assert saved_state(args) == {"from": "persistent"}, "an older one is not loaded"
    tracker.write_text("7")
    assert saved_state(args) == {"from": "non-persistent"}
    args.non_persistent_ckpt_type = None
    assert saved_state(args) == {"from": "persistent"}


def test_it_imports_no_trainer() -> None:
    script = "import sys, megatron_groupmates.integrations.megatron_lm\nprint([n for n in sys.modules if n.split('.')[0] in %r])"
    command = [sys.executable, "-c", script % (["megatron", "deepspeed", "transformers", "faiss"],)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
