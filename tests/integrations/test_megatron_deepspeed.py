"""The entry module and the patch for Megatron-DeepSpeed: wiring, on a stand-in checkout and, where given, on a real one."""

from __future__ import annotations

import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations import megatron_deepspeed as entry
from megatron_groupmates.integrations import session
from megatron_groupmates.integrations.arguments import add_group_mates_arguments
from megatron_groupmates.integrations.hooks import calling_functions
from tests.integrations.trainer import BATCH, LENGTH, STEPS, fork_arguments, fork_with, publish_rows, single_rank
from tests.pool.helpers import make_pool

PATCH = Path(__file__).resolve().parents[2] / "patches/megatron-deepspeed/group-mates.patch"
# What the entry module uses of the checkout, and nothing of what it does.
CHECKOUT = {
    "megatron/__init__.py": "ARGS = None\ndef get_args():\n    return ARGS\n",
    "megatron/profiler.py": "on_step_begin = []\n",
    "megatron/core/__init__.py": "",
    "megatron/core/enums.py": "class ModelType:\n    encoder_or_decoder = 'model type'\n",
    "megatron/training.py": """
import argparse
import megatron
from megatron.profiler import on_step_begin
CALLS = []
def pretrain(provider, model_provider, model_type, forward_step, extra_args_provider, args_defaults, data_post_process):
    CALLS.append((model_provider, model_type, forward_step, args_defaults, data_post_process))
    parser = argparse.ArgumentParser()
    if PATCHED:
        extra_args_provider(parser)
    megatron.ARGS = extra_args_provider(parser).parse_args(ARGUMENTS)
    CALLS.append(provider([8, 4, 4]))
    for hook in on_step_begin:
        hook()
PATCHED = False
""",
    "pretrain_gpt.py": """
model_provider, forward_step, data_post_process = 'model', 'forward step', 'post process'
def git_ds_info():
    pass
def train_valid_test_datasets_provider(num_samples):
    return 'own', num_samples
""",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in checkout that can be imported; its ``megatron.training`` module."""
    for name, content in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "pretrain_gpt")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("megatron.training").training
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "pretrain_gpt")]:
        del sys.modules[name]


def test_without_arguments_the_checkouts_own_data_are_used(checkout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.ARGUMENTS = []
    monkeypatch.setattr(session, "step_boundary", lambda args: pytest.fail("no boundary of ours"))
    entry.main()
    assert checkout.CALLS == [
        ("model", "model type", "forward step", {"tokenizer_type": "GPT2BPETokenizer"}, "post process"),
        ("own", [8, 4, 4]),
    ]


def test_with_arguments_data_and_boundaries_are_ours(checkout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    boundaries: list[argparse.Namespace] = []
    checkout.ARGUMENTS = ["--group-mates-selection", "/sel", "--group-mates-pool", "/pool"]
    monkeypatch.setattr(session, "datasets", lambda args, num_samples: (args.group_mates_pool, num_samples))
    monkeypatch.setattr(session, "step_boundary", boundaries.append)
    entry.main()
    assert checkout.CALLS[1] == ("/pool", [8, 4, 4])
    assert [args.group_mates_selection for args in boundaries] == ["/sel"]


def test_a_patched_checkout_is_named(checkout: Any) -> None:
    checkout.ARGUMENTS, checkout.PATCHED = [], True
    with pytest.raises(UserError, match=r"this checkout has the Group-MATES patch: start its own pretrain_gpt.py"):
        entry.main()


def test_another_directory_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_groupmates.integrations.megatron_deepspeed"]
    done = subprocess.run(command, cwd=PATCH.parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "error: there is no pretrain_gpt here: start this in the directory of a Megatron-DeepSpeed checkout" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_patch_lands_where_it_should(tmp_path: Path, megatron_deepspeed: Path) -> None:
    copy = tmp_path / "checkout"
    (copy / "megatron").mkdir(parents=True)
    for name in ("megatron/arguments.py", "megatron/training.py"):
        shutil.copy(megatron_deepspeed / name, copy / name)
    # --unidiff-zero is not given: every line of context has to fit.
    done = subprocess.run(["git", "apply", "-v", str(PATCH)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "offset" not in done.stderr
    training, arguments = (copy / "megatron" / name for name in ("training.py", "arguments.py"))
    assert calling_functions(training.read_text(), "is_on") == ["train", "build_train_valid_test_datasets"]
    assert calling_functions(training.read_text(), "step_boundary") == ["train"]
    assert "build_train_valid_test_datasets" in calling_functions(training.read_text(), "datasets")
    assert calling_functions(arguments.read_text(), "add_group_mates_arguments") == ["parse_args"]


def test_our_arguments_do_not_collide_with_the_checkouts(megatron_deepspeed: Path) -> None:
    own = [option.option_strings for option in add_group_mates_arguments(argparse.ArgumentParser())._actions]
    source = (megatron_deepspeed / "megatron/arguments.py").read_text()
    assert not [name for names in own for name in names if f"'{name}'" in source and name not in ("-h", "--help")]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_checkouts_own_sampler_gets_the_right_samples(tmp_path: Path, megatron_deepspeed: Path, workers: int) -> None:
    """Its sampler class from its source, since importing its modules needs its environment."""
    tree = ast.parse((megatron_deepspeed / "megatron/data/data_samplers.py").read_text())
    (source,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MegatronPretrainingSampler"]
    names: dict[str, Any] = {}
    exec(compile(ast.Module([source], []), "data_samplers.py", "exec"), names)
    pool = make_pool(tmp_path / "pool", (12, 20, 8), length=LENGTH)
    args, fork, size, rank = fork_arguments(tmp_path, data_parallel_size=2, num_workers=workers), fork_with(), 2, 1
    seen = []
    with single_rank():
        data, _, _ = session.datasets(args, [STEPS * BATCH, 0, 0], fork)
        sampler = names["MegatronPretrainingSampler"](len(data), 0, args.micro_batch_size, rank, size)
        issued = [0]

        def counted() -> Any:
            for batch in sampler:
                issued[0] += args.micro_batch_size * size
                yield batch

        batches = iter(DataLoader(data, batch_sampler=counted(), num_workers=workers))
        for step in range(STEPS):
            assert issued[0] == min(STEPS * BATCH, step * BATCH + session.read_ahead_samples(args))
            if step == 3:
                publish_rows(tmp_path / "selection", pool, 1)
            session.step_boundary(args, fork)
            seen += [next(batches)["text"].numpy() for _ in range(BATCH // (args.micro_batch_size * size))]
            args.iteration, args.consumed_train_samples = step + 1, (step + 1) * BATCH
        assert {entry["generation"] for entry in args.group_mates["log"]} == {0, 1}
    from tests.integrations.test_session import expected

    whole = expected(tmp_path, 0, STEPS * BATCH).reshape(-1, size, args.micro_batch_size, LENGTH)
    np.testing.assert_array_equal(np.stack(seen), whole[:, rank])
