"""Training on documents packed on the fly: the same samples whatever is killed, resumed, adopted or spread over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.cli.main import main
from megatron_groupmates.pool.log import read_log
from tests.common.distributed import RankFailure, run_ranks
from tests.pool.helpers import make_pool
from tests.training.runs import SEQUENCE_LENGTH, Job, evaluations, losses, make_config, train_jobs

PACKED = (
    "data.packing=documents",
    "data.reset_attention_mask=true",
    "data.reset_position_ids=true",
    "data.eod_mask_loss=true",
)
SELECTING = (
    "selection.enabled=true",
    "selection.first_refresh_step=4",
    "selection.refresh_interval=100",
    "selection.poll_interval_steps=1",
)


def documents_pool(directory: Path, num_documents: int = 240) -> None:
    """Documents of 1 to 40 tokens, each closed by the end-of-text token: about 2.4 contexts of 17 for each two."""
    generator = np.random.default_rng(0)
    samples = [np.append(generator.integers(1, 300, generator.integers(0, 40)), 0) for _ in range(num_documents)]
    make_pool(directory, (100, 90, 50), samples=samples)


def traced(run: Path, start: int, stop: int, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    capsys.readouterr()
    assert main(["trace", str(run), "--start", str(start), "--stop", str(stop)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_killed_run_on_documents_equals_an_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With an adoption in mid-run; on two data-parallel ranks with loader processes, against one rank without."""
    documents_pool(tmp_path / "pool")
    ahead = ("data.num_workers=1", "data.prefetch_factor=1")
    killed = make_config(tmp_path, *PACKED, *SELECTING, *ahead, run="killed")
    whole = make_config(tmp_path, *PACKED, *SELECTING, *ahead, run="whole")
    alone = make_config(tmp_path, *PACKED, *SELECTING, run="alone")
    directory = Path(killed.run.output_dir)
    for config in (whole, alone):
        # These follow the log that the killed run will have written.
        Path(config.run.output_dir).mkdir()
        (Path(config.run.output_dir) / "selection").symlink_to(directory / "selection")
    jobs = [
        Job(config=killed, publish_before_step=5, die_before_step=8),
        Job(config=killed, die_before_step=10),
        Job(config=killed),
        Job(config=whole),
    ]
    assert run_ranks(train_jobs, 2, jobs, tmp_path=tmp_path) == [["killed", "killed", "finished", "finished"]] * 2
    run_ranks(train_jobs, 1, [Job(config=alone)], tmp_path=tmp_path)
    assert len(losses(whole)) == 12 and losses(killed) == losses(whole) and evaluations(killed) == evaluations(whole)
    assert losses(alone) == pytest.approx(losses(whole), rel=2e-5)

    (directory / "config.yaml").write_text((tmp_path / "killed.yaml").read_text())
    entries = read_log(directory / "selection/log.jsonl")
    assert [entry.generation for entry in entries] == [0, 1] and 24 < entries[1].effective_sample < 48
    lines = traced(directory, 0, 48, capsys)
    assert [line["generation"] for line in lines] == [int(number >= entries[1].effective_sample) for number in range(48)]
    tokens = [(shard, row, first + n) for line in lines for shard, row, first, count in line["sources"] for n in range(count)]
    assert len(set(tokens)) == len(tokens) == 48 * (SEQUENCE_LENGTH + 1)
    halves = [{(s[0], s[1]) for line in lines if line["generation"] == number for s in line["sources"]} for number in (0, 1)]
    assert not halves[0] & halves[1], "no document is served under both generations"


def test_epochs_of_documents_and_what_a_branch_may_not_change(tmp_path: Path):
    documents_pool(tmp_path / "pool", 240)
    small = make_pool(tmp_path / "small", (8,), samples=[np.append(np.arange(1, 1 + 9 * number % 23), 0) for number in range(8)])
    contexts = small.num_tokens // (SEQUENCE_LENGTH + 1)
    assert 4 < contexts < 8
    config = make_config(tmp_path, "data.packing=documents", *SELECTING, f"data.pool={tmp_path / 'small'}", "training.train_iters=4")
    branch = [f"data.pool={tmp_path / 'small'}", f"checkpoint.load={tmp_path / 'run/checkpoints'}", "model.sequence_length=8"]
    other = make_config(tmp_path, "data.packing=documents", *branch, "data.evaluation=null", run="branch")
    message = r"data.packing: the checkpoint in .* was trained with packing documents/17, this run has documents/9"
    with pytest.raises(RankFailure, match=message):
        run_ranks(train_jobs, 1, [Job(config=config), Job(config=other)], tmp_path=tmp_path)
    log = read_log(Path(config.run.output_dir) / "selection/log.jsonl")
    assert [(entry.epoch, entry.effective_sample) for entry in log] == [(n, n * contexts) for n in range(-(-16 // contexts))]
