"""The session in a trainer of the user's own: data, adoption, switching on late, resume, and what is written."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_groupmates.cli.inspect_commands import run_order
from megatron_groupmates.cli.main import main as command
from megatron_groupmates.config import UserError, dump_config
from megatron_groupmates.integrations import session
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import read_log
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.utils.files import read_json, read_lines
from megatron_groupmates.utils.run_directory import open_run
from tests.common.distributed import run_ranks
from tests.integrations.trainer import BATCH, LENGTH, MICRO_BATCH, STEPS, fork_arguments, fork_with, publish_rows, single_rank, train
from tests.pool.helpers import make_pool

ROOT = Path(__file__).resolve().parents[2]
NEW = {"group_mates_selection": "new"}


@pytest.fixture
def pool(tmp_path: Path) -> PoolIndex:
    return make_pool(tmp_path / "pool", (12, 20, 8), length=LENGTH)


def expected(directory: Path, first: int, stop: int) -> np.ndarray:
    """Tokens of these samples by the log and generations on disk."""
    config, paths = open_run(directory / "selection")
    index = PoolIndex.open(config.data.pool)
    rows, _ = run_order(paths, config, index, stop).rows(first, stop - first)
    return PoolReader(index).read_batch(rows)


def await_preparation() -> None:
    """On every rank: a generation seen at the boundary before is adopted at the coming one, however busy the machine is."""
    assert session._open is not None and session._open._adopter._preparation is not None
    assert session._open._adopter._preparation.wait(60)


def run_alone(directory: Path, stop: int, saved: dict[str, Any] | None = None, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
    with single_rank():
        return train(fork_arguments(directory, **arguments), fork_with(saved), stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generation_is_adopted_behind_all_that_was_read(tmp_path: Path, pool: PoolIndex, workers: int) -> None:
    def publish_at_4(step: int) -> None:
        if step == 4:
            publish_rows(tmp_path / "selection", pool, 1)
        if step == 5:
            await_preparation()

    with single_rank():
        args = fork_arguments(tmp_path, num_workers=workers)
        seen, _ = train(args, fork_with(), STEPS, before_step=publish_at_4)
    np.testing.assert_array_equal(seen, expected(tmp_path, 0, STEPS * BATCH))
    log = read_log(tmp_path / "selection/log.jsonl")
    # Seen at boundary 4, prepared beside that step, adopted at boundary 5.
    assert (log[1].generation, log[1].effective_sample) == (1, 5 * BATCH + 2 * workers * MICRO_BATCH)
    (event,) = read_lines(tmp_path / "selection/metrics.jsonl")
    assert (event["event"], event["step"], event["effective_sample"]) == ("adoption", 5, log[1].effective_sample)
    state = read_json(tmp_path / "selection/training.json")
    assert (state["state"], state["step"], state["consumed_train_samples"]) == ("finished", STEPS, STEPS * BATCH)


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path, pool: PoolIndex) -> None:
    first, saved = run_alone(tmp_path, 3)
    assert read_json(tmp_path / "selection/training.json")["state"] == "running"
    publish_rows(tmp_path / "selection", pool, 1)
    second, later = run_alone(tmp_path, 7, saved, iteration=3, consumed_train_samples=12)
    third, _ = run_alone(tmp_path, STEPS, later, iteration=7, consumed_train_samples=28, num_workers=1)
    assert [entry["generation"] for entry in later["log"]] == [0, 1]
    seen = np.concatenate([first, second, third])
    np.testing.assert_array_equal(seen, expected(tmp_path, 0, STEPS * BATCH))
    rolled_back, _ = run_alone(tmp_path, STEPS, saved, iteration=3, consumed_train_samples=12)
    np.testing.assert_array_equal(rolled_back, seen[12:])
    again, _ = run_alone(tmp_path, STEPS)
    np.testing.assert_array_equal(again, seen)


def test_switched_on_in_the_middle_of_a_run(tmp_path: Path, pool: PoolIndex, capsys: pytest.CaptureFixture[str]) -> None:
    first, saved = run_alone(tmp_path, 6, None, iteration=4, consumed_train_samples=16)
    log = read_log(tmp_path / "selection/log.jsonl")
    assert [(entry.generation, entry.effective_sample) for entry in log] == [(0, 16)]
    publish_rows(tmp_path / "selection", pool, 1)
    second, _ = run_alone(tmp_path, STEPS, saved, iteration=6, consumed_train_samples=24)
    seen = np.concatenate([first, second])
    np.testing.assert_array_equal(seen, expected(tmp_path, 16, STEPS * BATCH))
    log = read_log(tmp_path / "selection/log.jsonl")
    served = seen[: log[1].effective_sample - 16]
    assert len(np.unique(served, axis=0)) == len(served), "generation 0 serves each sample once, from the switch on"
    again, _ = run_alone(tmp_path, STEPS, None, iteration=4, consumed_train_samples=16)
    np.testing.assert_array_equal(again, seen)

    assert command(["trace", str(tmp_path / "selection"), "--start", "16", "--stop", "18"]) == 0
    assert [json.loads(line)["sample"] for line in capsys.readouterr().out.splitlines()] == [16, 17]
    assert command(["trace", str(tmp_path / "selection"), "--start", "15", "--stop", "18"]) == 1
    assert "sample 15 was trained on before selection was switched on at sample 16" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"log.jsonl begins at sample 16, .* training goes on from sample 8, before it"):
        run_alone(tmp_path, STEPS, None, iteration=2, consumed_train_samples=8)


@pytest.mark.parametrize(("tokens", "state"), [(None, "running"), (5 * BATCH * 8, "running"), (4 * BATCH * 8, "finished")])
def test_training_by_tokens_is_over_when_they_are(tmp_path: Path, pool: PoolIndex, tokens: int | None, state: str) -> None:
    run_alone(tmp_path, 4, train_tokens=tokens, consumed_train_tokens=4 * BATCH * 8)
    assert read_json(tmp_path / "selection/training.json")["state"] == state


def test_a_run_that_goes_on_after_its_end_is_running(tmp_path: Path, pool: PoolIndex) -> None:
    _, saved = run_alone(tmp_path, STEPS, log_interval=100)
    assert read_json(tmp_path / "selection/training.json")["state"] == "finished"
    run_alone(tmp_path, 6, saved, iteration=5, consumed_train_samples=5 * BATCH, log_interval=100)
    assert read_json(tmp_path / "selection/training.json")["state"] == "running"


@pytest.mark.parametrize(("end", "state"), [("", "finished"), ("raise OSError('no space left')", "running")])
def test_training_is_over_where_no_error_ends_the_process(tmp_path: Path, pool: PoolIndex, end: str, state: str) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nimport torch.distributed as dist\n"
        "from tests.integrations.trainer import STEPS, fork_arguments, fork_with, train\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        f"train(fork_arguments(Path(sys.argv[1])), fork_with(), STEPS)\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ("no space left" in done.stderr) is (done.returncode != 0) is (state == "running"), done.stderr
    assert read_json(tmp_path / "selection/training.json")["state"] == state


def test_an_error_that_an_entry_module_prints_is_no_end_either(tmp_path: Path, pool: PoolIndex) -> None:
    with single_rank():
        train(fork_arguments(tmp_path), fork_with(), STEPS)
        session.close(failed=True)
    assert read_json(tmp_path / "selection/training.json")["state"] == "running"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_finished_run_can_be_started_again(tmp_path: Path, pool: PoolIndex, workers: int) -> None:
    """The samplers of both trainers assert that there is data after what is consumed, and loaders read it ahead."""
    make_pool(tmp_path / "held-out", (3,), length=LENGTH, seed=9)
    _, saved = run_alone(tmp_path, STEPS, num_workers=workers)
    consumed = STEPS * BATCH
    with single_rank():
        counts = {"iteration": STEPS, "consumed_train_samples": consumed, "consumed_valid_samples": 24}
        args = fork_arguments(tmp_path, group_mates_evaluation=str(tmp_path / "held-out"), num_workers=workers, **counts)
        train_data, valid, _ = session.datasets(args, [consumed, 8, 8], fork_with(saved))
        assert (len(train_data), len(valid)) == (consumed + BATCH, 24 + 8)
        assert len(train_data.__getitems__(range(consumed, consumed + BATCH))) == BATCH


def test_events_have_the_trainers_own_step(tmp_path: Path, pool: PoolIndex) -> None:
    def publish_at_0_and_4(step: int) -> None:
        if step in (0, 4):
            publish_rows(tmp_path / "selection", pool, 1 + step // 4)
        if step == 5:
            await_preparation()

    with single_rank():
        fork = dataclasses.replace(fork_with(), boundary_before_save=True)
        train(fork_arguments(tmp_path), fork, STEPS, before_step=publish_at_0_and_4)
    events = read_lines(tmp_path / "selection/metrics.jsonl")
    assert [(event["event"], event["generation"], event["step"]) for event in events] == [("adoption", 1, 0), ("adoption", 2, 5)]


def test_samples_run_out_and_begin_again(tmp_path: Path) -> None:
    make_pool(tmp_path / "pool", (10,), length=LENGTH)
    seen, _ = run_alone(tmp_path, STEPS, num_workers=1)
    np.testing.assert_array_equal(seen, expected(tmp_path, 0, STEPS * BATCH))
    assert [entry.epoch for entry in read_log(tmp_path / "selection/log.jsonl")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "saved", "message"),
    [
        ({"seq_length": 16, "max_position_embeddings": 16, **NEW}, None, "training sequences of 16 tokens need samples of 17 tokens"),
        ({"padded_vocab_size": 128, **NEW}, None, "--group-mates-pool: the tokenizer of .* has 300 tokens, model.vocab_size is 128"),
        ({"group_mates_pool": "/absent"}, None, "--group-mates-pool: .*/absent"),
        ({"dataloader_type": "cyclic"}, None, "--dataloader-type cyclic"),
        ({"seed": 8}, None, "holds a run with other settings.*\n.*run.seed: 7 -> 8"),
        ({"iteration": 2, "consumed_train_samples": 8}, None, "was not trained with it; give a new directory"),
        (
            {"reset_position_ids": True, **NEW},
            None,
            "--reset-position-ids: the trainer's tokenizer ends documents",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, pool: PoolIndex, arguments: dict[str, Any], saved: dict[str, Any] | None, message: str
) -> None:
    run_alone(tmp_path, 1)
    if arguments.keys() >= NEW.keys():
        arguments = arguments | {"group_mates_selection": str(tmp_path / "new")}
    with pytest.raises(UserError, match=message), single_rank():
        session.datasets(fork_arguments(tmp_path, **arguments), [48, 0, 0], fork_with(saved, end_of_document=5))


def test_another_runs_directory_is_refused(tmp_path: Path, pool: PoolIndex) -> None:
    _, saved = run_alone(tmp_path, 3)
    publish_rows(tmp_path / "selection", pool, 1)
    run_alone(tmp_path, 6, saved, iteration=3, consumed_train_samples=12)
    other = [{**entry, "effective_sample": 4 * number} for number, entry in enumerate([*saved["log"], saved["log"][0]])]
    with pytest.raises(UserError, match="its log is not the one that the checkpoint at sample 12 was trained with: entry 1 is missing"):
        run_alone(tmp_path, 6, {**saved, "log": other}, iteration=3, consumed_train_samples=12)


def test_validation_has_its_own_pool(tmp_path: Path, pool: PoolIndex, caplog: pytest.LogCaptureFixture) -> None:
    held_out = make_pool(tmp_path / "held-out", (3,), length=LENGTH, seed=9)
    with single_rank():
        args = fork_arguments(tmp_path, group_mates_evaluation=str(tmp_path / "held-out"))
        train_data, valid, test = session.datasets(args, [48, 8, 8], fork_with())
        assert (len(train_data), len(valid), test) == (48, 8, None)
        np.testing.assert_array_equal(valid[4]["text"], PoolReader(held_out).read(1))
        assert session.datasets(args, [0, 0, 0], fork_with()) == (None, None, None)
    with single_rank():
        args = fork_arguments(tmp_path, group_mates_selection=str(tmp_path / "other"))
        session.datasets(args, [48, 0, 0], fork_with())  # puts the package's messages where the trainer's go
        logging.getLogger("megatron_groupmates").addHandler(caplog.handler)
        _, valid, _ = session.datasets(args, [48, 8, 8], fork_with())
    assert valid is None
    assert "there is no validation: --eval-iters asks for it, but --group-mates-evaluation names no held-out pool" in caplog.text


def four_ranks(rank: int, world_size: int, directory: str) -> Any:
    """Tensor parallel 2, data parallel 2: as in the checkout only the first rank of each pair has a data loader."""

    def publish_at_3(step: int) -> None:
        if step == 3 and rank == 0:
            publish_rows(Path(directory) / "selection", PoolIndex.open(f"{directory}/pool"), 1)
        if step == 4:
            await_preparation()

    args = fork_arguments(Path(directory), data_parallel_size=2, num_workers=1)
    seen = train(args, fork_with(), STEPS, rank // 2 if rank % 2 == 0 else None, publish_at_3)
    session.close()
    return seen


def test_tensor_and_data_parallel_ranks_adopt_together(tmp_path: Path, pool: PoolIndex) -> None:
    results = run_ranks(four_ranks, 4, str(tmp_path), tmp_path=tmp_path)
    assert [saved for _, saved in results] == [results[0][1]] * 4
    parts = [results[rank][0].reshape(-1, MICRO_BATCH, LENGTH) for rank in (0, 2)]
    np.testing.assert_array_equal(np.stack(parts, axis=1).reshape(-1, LENGTH), expected(tmp_path, 0, STEPS * BATCH))
    assert len(results[1][0]) == len(results[3][0]) == 0
    # Adopted at boundary 4, behind the two micro-batches that each rank's one process has been asked for.
    assert read_log(tmp_path / "selection/log.jsonl")[1].effective_sample == 4 * BATCH + 2 * 2 * MICRO_BATCH


def test_other_ranks_get_the_config_from_rank_0(tmp_path: Path, pool: PoolIndex) -> None:
    run_alone(tmp_path, 1)
    config, _ = open_run(tmp_path / "selection")
    store = dist.HashStore()
    store.set(session._READY, json.dumps({"config": dump_config(config)}))
    assert session._config_of_rank_0(store) == config


def refused_ranks(rank: int, world_size: int, directory: str) -> str:
    args = fork_arguments(Path(directory), data_parallel_size=2, dataloader_type="cyclic" if rank == 0 else "single")
    with pytest.raises(UserError) as refused:
        session.datasets(args, [48, 0, 0], fork_with())
    return str(refused.value)


def test_all_ranks_end_with_what_rank_0_cannot_open(tmp_path: Path, pool: PoolIndex) -> None:
    first, second = run_ranks(refused_ranks, 2, str(tmp_path), tmp_path=tmp_path)
    assert first.startswith("--dataloader-type cyclic: ")
    assert second == f"rank 0 has ended: UserError: {first}"


def test_a_directory_that_hosts_do_not_share(tmp_path: Path, pool: PoolIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "read_log", lambda path: ())
    with pytest.raises(UserError, match=r"log.jsonl: rank 0 finds no log there, .* must be on a file system that all hosts share"):
        run_alone(tmp_path, 1)


def test_nothing_that_a_checkout_lacks_or_shadows_is_imported() -> None:
    """Megatron-DeepSpeed's own megatron shadows the wheel's; its environment may have neither deepspeed 0.18 nor transformers."""
    modules = ["session", "arguments", "forks", "settings", "resume", "megatron_deepspeed"]
    program = (
        "import sys\n"
        "for name in ('megatron', 'megatron.core', 'transformers', 'faiss', 'deepspeed', 'tokenizers'):\n"
        "    sys.modules[name] = None\n" + "".join(f"import megatron_groupmates.integrations.{name}\n" for name in modules)
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
