"""Samples that cannot be read in mid-run, in shards that are really damaged, on two tensor-parallel ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import DamagedSample, PoolReader
from megatron_groupmates.pool.skips import read_skips
from tests.common.distributed import run_ranks
from tests.training.runs import SEQUENCE_LENGTH, Job, losses, make_config, rows, train_in_rank
from tests.training.test_documents import traced

TENSOR = "parallel.tensor_model_parallel_size=2"
SKIP = "data.on_damaged_sample=skip"


def row_of(config: Config, sample: int) -> int:
    """Pool row of a global sample of a run without selection."""
    pool = PoolIndex.open(config.data.pool)
    order = SampleOrder(
        pool.num_samples, config.run.seed, [LogEntry(0, 0, 0, "")], {0: np.ones(pool.num_samples, dtype=bool)}, Packing(pool.lengths)
    )
    return int(order.rows(sample, 1)[0][0])


def place_of(config: Config, sample: int) -> tuple[str, int]:
    """(shard, row) of a global sample of a run without selection."""
    pool = PoolIndex.open(config.data.pool)
    (shard,), (row,) = pool.locate(np.array([row_of(config, sample)]))
    return pool.shard_names[shard], int(row)


def damage(config: Config, sample: int) -> None:
    """Overwrite the data of a global sample by ids that the vocabulary does not have."""
    pool, row = PoolIndex.open(config.data.pool), row_of(config, sample)
    path = Path(config.data.pool) / f"{place_of(config, sample)[0]}.tar"
    content = bytearray(path.read_bytes())
    start, size = int(pool.offsets[row]), int(pool.member_bytes[row])
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)


def _blinded(read: Any, row: int | None) -> Any:
    """A method of the reader that cannot read ``row``."""

    def fail(self: PoolReader, wanted: Any) -> Any:
        if row in np.asarray(wanted).tolist():
            raise DamagedSample("cannot read the sample: a test")
        return read(self, wanted)

    return fail


def train_until_told(rank: int, world_size: int, jobs: list[tuple[Job, str, bool]], blind: dict[int, int]) -> list[str]:
    """What each start ended with, the message where it was refused.

    Args:
        rank: of this process.
        world_size: number of ranks.
        jobs: starts, each with the pool its ``data.pool`` is replaced by beforehand, and whether its record is put away.
        blind: rank to a pool row that it alone cannot read.
    """
    import torch

    for name in ("read_batch", "read_many"):
        setattr(PoolReader, name, _blinded(getattr(PoolReader, name), blind.get(rank)))
    outcomes = []
    for job, pool, forget in jobs:
        if rank == 0:
            shutil.rmtree(job.config.data.pool)
            shutil.copytree(pool, job.config.data.pool)
            if forget:
                record = Path(job.config.run.output_dir) / "skipped.jsonl"
                record.rename(record.with_name("kept.jsonl"))
        torch.distributed.barrier()
        try:
            outcomes.append(train_in_rank(rank, world_size, job))
        except UserError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        torch.distributed.barrier()
    return outcomes


def test_skips_are_recorded_agreed_on_and_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Global sample 18 lies in a damaged shard, sample 21 cannot be read by rank 1 alone."""
    whole, killed = (make_config(tmp_path, TENSOR, SKIP, run=name) for name in ("whole", "killed"))
    limited = make_config(tmp_path, TENSOR, SKIP, "data.max_skipped_samples=1", run="limited")
    strict, late = make_config(tmp_path, TENSOR, run="strict"), make_config(tmp_path, TENSOR, SKIP, run="late")
    reader = PoolReader(PoolIndex.open(whole.data.pool))
    good = {number: reader.read(row_of(whole, number)) for number in range(48)}
    pools = {name: str(tmp_path / f"pool of {name}") for name in ("good", "bad")}
    shutil.copytree(whole.data.pool, pools["good"])
    places = [place_of(whole, number) for number in (18, 21)]
    damage(whole, 18)
    shutil.copytree(whole.data.pool, pools["bad"])
    jobs = [
        (Job(config=whole), pools["bad"], False),
        (Job(config=killed, die_before_step=7), pools["bad"], False),
        (Job(config=killed), pools["good"], False),
        (Job(config=limited), pools["bad"], False),
        (Job(config=strict), pools["bad"], False),
        (Job(config=late, die_before_step=6), pools["good"], False),
        (Job(config=late), pools["bad"], False),
        (Job(config=whole), pools["bad"], True),
    ]
    outcomes = run_ranks(train_until_told, 2, jobs, {1: row_of(whole, 21)}, tmp_path=tmp_path)
    for told in outcomes:
        assert told[:3] == ["finished", "killed", "finished"]
        assert told[3].startswith("UserError: 2 samples cannot be read, data.max_skipped_samples is 1; restore the shards, or raise")
        assert all(f"shard {shard}, row {row}" in told[3] for shard, row in places)
        assert told[4].startswith("DamagedSample: ") and f"row {places[0][1]}: cannot read the sample" in told[4]
        assert told[5] == "killed"
        assert "global sample 18 was trained on before this start, so it cannot be skipped now" in told[6]
        assert "skipped.jsonl is not the one the checkpoint was trained with; restore it from a copy" in told[7]
    (Path(whole.run.output_dir) / "kept.jsonl").rename(Path(whole.run.output_dir) / "skipped.jsonl")

    for config in (whole, killed):
        directory = Path(config.run.output_dir)
        skips = read_skips(directory / "skipped.jsonl")
        assert [(skip.sample, (skip.shard, skip.row)) for skip in skips] == list(zip((18, 21), places, strict=True))
        events = [row for row in rows(config) if row.get("event") == "skipped_sample"]
        assert [(row["step"], row["sample"], row["shard"], row["row"], row["error"]) for row in events] == [
            (step, skip.sample, skip.shard, skip.row, skip.error) for step, skip in zip((4, 5), skips, strict=True)
        ]
    assert losses(killed) == losses(whole) and len(losses(whole)) == 12
    assert all(np.isfinite(losses(whole)))

    directory = Path(killed.run.output_dir)
    (directory / "config.yaml").write_text((tmp_path / "killed.yaml").read_text())
    blank = np.zeros(SEQUENCE_LENGTH + 1)
    for number, line in enumerate(traced(directory, 0, 48, capsys)):
        ids = blank if number in (18, 21) else good[number]
        assert line["tokens_sha256"] == hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
        assert line.get("skipped", False) == (number in (18, 21))


def test_a_pool_that_fails_verification_is_refused_whatever_the_policy(tmp_path: Path):
    config = make_config(tmp_path, SKIP)
    shard = next((tmp_path / "pool").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"data.pool: .* has \d+ bytes, the index says"):
        from megatron_groupmates.training.data import open_pool

        open_pool(config, config.data.pool, "data.pool")


def test_a_branch_begins_with_what_its_parent_left_out(tmp_path: Path):
    from megatron_groupmates.config import RunPaths
    from megatron_groupmates.training.skipping import DamageGuard

    class OneRank:
        is_main = True

        def barrier(self) -> None:
            pass

    config = make_config(tmp_path, f"checkpoint.load={tmp_path / 'parent/checkpoints'}")
    (tmp_path / "parent").mkdir()
    lines = [json.dumps({"sample": number, "shard": "s", "row": 1, "error": "e"}) + "\n" for number in (3, 8, 12)]
    (tmp_path / "parent/skipped.jsonl").write_text("".join(lines))
    paths, pool = RunPaths.below(tmp_path / "branch"), PoolIndex.open(config.data.pool)
    DamageGuard(config, paths, pool, OneRank(), 10, print)
    assert paths.skipped_samples.read_text() == "".join(lines[:2])
    DamageGuard(config, paths, pool, OneRank(), 20, print)
    assert paths.skipped_samples.read_text() == "".join(lines[:2]), "once it has begun it keeps its own record"
