"""Which selection directory fits which checkpoint."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations.forks import MEGATRON_DEEPSPEED
from megatron_groupmates.integrations.resume import check_resume

FACTS = {"pool": "p" * 64, "seed": 7, "packing": "none", "exclusion": ""}


def state(*entries: tuple[int, int], **changes: Any) -> dict[str, Any]:
    log = [{"generation": number, "effective_sample": first, "epoch": 0, "digest": str(number) * 64} for number, first in entries]
    return {**FACTS, "log": log, **changes}


@pytest.mark.parametrize(
    ("saved", "current", "consumed"),
    [
        (None, state(), 0),
        (None, state((0, 0), (1, 8)), 0),  # from the start again: the same entries replay
        (None, state(), 40),  # switched on in the middle of a run
        (None, state((0, 40)), 40),  # again, as training ended before its first checkpoint
        (state((0, 0)), state((0, 0)), 20),
        (state((0, 0), (1, 8)), state((0, 0), (1, 8), (2, 30)), 20),  # the checkpoint is from before an adoption
        (state((0, 0), (1, 8), (2, 24)), state((0, 0), (1, 8)), 24),  # an entry of which nothing was consumed
        (state((0, 40)), state((0, 40)), 60),
    ],
)
def test_directories_that_fit(saved: dict[str, Any] | None, current: dict[str, Any], consumed: int) -> None:
    check_resume(saved, current, consumed, "DIR")


@pytest.mark.parametrize(
    ("saved", "current", "message"),
    [
        (
            None,
            state((0, 0)),
            "DIR: its log says that it served samples from 0 on, but the checkpoint, at sample 20, was not trained with it",
        ),
        (
            state((0, 0)),
            state(),
            "DIR is new, but the checkpoint, at sample 20, was trained with Group-MATES; give the directory of its run",
        ),
        (state((0, 0), pool="q" * 64), state((0, 0)), "pool: the checkpoint was trained with qqqqqqqqqqqqqqqq, this run has pppp"),
        (state((0, 0), seed=8), state((0, 0)), "--seed: the checkpoint was trained with 8, this run has 7"),
        (state((0, 0), packing="documents/9"), state((0, 0)), "data.packing: .* with documents/9, this run has none"),
        (state((0, 0)), state((0, 0), exclusion="e" * 64), "data.exclude: .* with none, this run has eeee"),
        (state((0, 0), (1, 8)), state((0, 0), (1, 12)), "entry 1 is generation 1 .1{16}. from sample 12, .* in the checkpoint .* sample 8"),
        (state((0, 0), (1, 8)), state((0, 0), (2, 8)), "entry 1 is generation 2 .2{16}., from sample 8|entry 1 is generation 2"),
        (state((0, 0), (1, 8)), state((0, 0)), "DIR: its log is not the one .*: entry 1 is missing, in the checkpoint generation 1"),
        (state((0, 0)), state((0, 0), (1, 8)), "entry 1 is generation 1 .*, in the checkpoint missing"),
    ],
)
def test_directories_of_other_runs_are_refused(saved: dict[str, Any] | None, current: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_resume(saved, current, 20, "DIR")


@pytest.mark.parametrize(("name", "load_tag"), [("global_step3", None), ("global_step3_universal", None), ("global_step9", "global_step9")])
def test_what_a_megatron_deepspeed_checkpoint_says(tmp_path: Path, name: str, load_tag: str | None) -> None:
    (tmp_path / name).mkdir()
    args = argparse.Namespace(iteration=3, load=str(tmp_path), load_tag=load_tag)
    content = {"module": OrderedDict(), "args": argparse.Namespace(group_mates=state((0, 0)), params_dtype=torch.float32)}
    torch.save(content, tmp_path / name / "mp_rank_00_model_states.pt")
    assert MEGATRON_DEEPSPEED.saved_state(args) == state((0, 0))
    torch.save({"args": argparse.Namespace(seed=3)}, tmp_path / name / "mp_rank_00_model_states.pt")
    assert MEGATRON_DEEPSPEED.saved_state(args) is None


def test_a_checkpoint_without_model_states_is_named(tmp_path: Path) -> None:
    args = argparse.Namespace(iteration=3, load=str(tmp_path), load_tag=None)
    with pytest.raises(UserError, match=f"--load {tmp_path}: global_step3 has no model states"):
        MEGATRON_DEEPSPEED.saved_state(args)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1",)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    torch.save({"args": argparse.Namespace(group_mates=Evil())}, tmp_path / "global_step3/mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"refused: the file wants to create or call '.*eval'"):
        MEGATRON_DEEPSPEED.saved_state(argparse.Namespace(iteration=3, load=str(tmp_path), load_tag=None))
