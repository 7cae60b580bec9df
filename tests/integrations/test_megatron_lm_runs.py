"""Real Megatron-LM checkouts train with Group-MATES on a CPU: patched and not, through an adoption and a resume."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_groupmates.checkpoint.opening import open_checkpoint
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.model.losses import next_token_batch
from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.generation import load_generation, publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import read_log
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.utils.run_directory import read_run_config
from tests.common.gpt_runs import one_rank
from tests.pool.helpers import make_pool

ROOT = Path(__file__).parents[2]
PATCH = ROOT / "patches" / "megatron-lm" / "group-mates.patch"
SEQUENCE_LENGTH, BATCH, STEPS, REFRESH, SEED = 16, 4, 8, 4, 1234
MODEL = (
    f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQUENCE_LENGTH} --max-position-embeddings {SEQUENCE_LENGTH} "
    f"--micro-batch-size 2 --global-batch-size {BATCH} --lr 1e-2 --train-iters {STEPS} --log-interval 1 --eval-iters 0 --eval-interval 100 "
    "--hidden-dropout 0 --attention-dropout 0 --clip-grad 0 --tokenizer-type NullTokenizer --vocab-size 1000 --split 100,0,0 "
    f"--seed {SEED} "
    "--transformer-impl local --distributed-backend gloo --use-cpu-initialization --rerun-mode disabled --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion"
).split()
SELECTION = f"""\
selection: {{mode: blocking, method: random, first_refresh_step: {REFRESH}, max_refreshes: 1, wait_timeout_seconds: 200}}
"""


@pytest.fixture(params=range(9))
def checkout(request: pytest.FixtureRequest, megatron_lm_checkouts: list[Path], tmp_path: Path) -> Path:
    """Each checkout given, copied."""
    if request.param >= len(megatron_lm_checkouts):
        pytest.skip(f"{len(megatron_lm_checkouts)} checkouts given")
    return copied(megatron_lm_checkouts[request.param], tmp_path / "checkout")


def copied(checkout: Path, to: Path) -> Path:
    shutil.copytree(checkout, to, ignore=shutil.ignore_patterns(".git", "tests", "docs", "__pycache__"))
    for wheel in importlib.util.find_spec("megatron").submodule_search_locations:
        for helpers in Path(wheel).glob("core/datasets/helpers_cpp*.so"):  # what the checkout would compile
            shutil.copy(helpers, to / "megatron" / "core" / "datasets")
    return to


def patched(checkout: Path, to: Path) -> Path:
    shutil.copytree(checkout, to)
    subprocess.run(["git", "init", "--quiet", str(to)], check=True)
    subprocess.run(["git", "-C", str(to), "apply", str(PATCH)], check=True)
    return to


def train(checkout: Path, ranks: int, *arguments: str, entry: tuple[str, ...] = ("pretrain_gpt.py",), record: str = "") -> dict[int, str]:
    """What each step logs: its loss and gradient norm, as text."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'integrations' / 'on_cpu'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
    if record:
        environment["RECORD_TOKENS"] = record
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run(
        [*launcher, *entry, *MODEL, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+).*?grad norm: (\S+)", done.stdout)
    return {int(step): f"{loss} {norm}" for step, loss, norm in found}


ENTRY = ("-m", "megatron_groupmates.integrations.megatron_lm")


def group_mates(directory: Path) -> list[str]:
    (directory / "selection.yaml").write_text(SELECTION)
    return [
        *("--group-mates-selection", str(directory / "selection"), "--group-mates-pool", str(directory / "pool")),
        *("--group-mates-config", str(directory / "selection.yaml"), "--num-workers", "1"),
    ]


def publish_when_saved(directory: Path, index: PoolIndex, rows: np.ndarray) -> threading.Thread:
    """Publishes generation 1 once the checkpoint is there from which a server would make it."""

    def wait_and_publish() -> None:
        tracker, deadline = directory / "save" / "latest_checkpointed_iteration.txt", time.monotonic() + 200
        while time.monotonic() < deadline and not (tracker.is_file() and tracker.read_text() == str(REFRESH)):
            time.sleep(0.1)
        write_generation(directory / "selection", 1, index, rows, {})
        publish(directory / "selection", 1)

    thread = threading.Thread(target=wait_and_publish)
    thread.start()
    return thread


def served(prefix: str, ranks: int) -> np.ndarray:
    """Tokens of the global samples in order, int64[n, s], from what the ranks recorded."""
    by_rank = [[json.loads(line) for line in Path(f"{prefix}.{rank}").read_text().splitlines()] for rank in range(ranks)]
    return np.array([sample for micro_step in zip(*by_rank, strict=True) for batch in micro_step for sample in batch])


def expected(selection: Path, index: PoolIndex, stop: int, all_tokens: bool = False) -> np.ndarray:
    """The same by an order made afresh from the log; with ``all_tokens`` the last one too, which is a label alone."""
    entries = read_log(selection / "log.jsonl")
    masks = {entry.generation: load_generation(selection, entry.generation, index).mask for entry in entries}
    rows = SampleOrder(index.num_samples, SEED, entries, masks, Packing(index.lengths)).contexts(0, stop).rows
    return np.stack([PoolReader(index).read(row)[: None if all_tokens else -1] for row in rows.tolist()])


def measure(directory: Path, index: PoolIndex) -> dict[int, float]:
    """Losses of the steps after the checkpoint, by the probe of the selection server."""
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.gpt import build_gpt

    config = read_run_config(directory / "selection")
    checkpoint = open_checkpoint(config, directory / "save" / f"iter_{REFRESH:07d}")
    samples = torch.from_numpy(expected(directory / "selection", index, STEPS * BATCH, all_tokens=True))
    (directory / "group").mkdir()
    with one_rank(directory / "group") as groups:
        model = build_gpt(config, groups, 1, torch.float32)
        probe = Probe(model, config, groups, ReferenceSet(*next_token_batch(samples[:BATCH])), 3, DocumentRules(eot_id=0))
        probe.load(checkpoint)
        losses, peak = {}, checkpoint.next_learning_rate / (STEPS - REFRESH)
        for step in range(REFRESH, STEPS):
            batch = samples[step * BATCH : (step + 1) * BATCH]
            losses[step + 1] = probe.sample_losses(*probe.pack(batch)).mean().item()
            probe.step(batch, peak * (STEPS - step))  # the linear decay of the run
    return losses


@pytest.mark.timeout(1200)
def test_a_run_adopts_mid_run_and_resumes_at_another_data_parallel_size(checkout: Path, tmp_path: Path) -> None:
    samples = list(np.random.default_rng(0).integers(1, 500, (144, SEQUENCE_LENGTH + 1)))
    index = make_pool(tmp_path / "pool", (40, 56, 48), samples=samples, vocab_size=1000)
    publisher = publish_when_saved(tmp_path, index, np.arange(100, 140))
    options = [*group_mates(tmp_path), "--save", str(tmp_path / "save"), "--save-interval", str(REFRESH)]
    options += ["--eval-iters", "2", "--eval-interval", "3"]  # without a pool for it there is none
    whole = train(patched(checkout, tmp_path / "patched"), 2, *options, record=str(tmp_path / "first"))
    publisher.join()

    log = read_log(tmp_path / "selection" / "log.jsonl")
    assert [entry.generation for entry in log] == [0, 1] and REFRESH * BATCH < log[1].effective_sample < STEPS * BATCH
    tokens = served(str(tmp_path / "first"), 2)
    np.testing.assert_array_equal(tokens, expected(tmp_path / "selection", index, STEPS * BATCH))

    # From the middle, on one rank instead of two, without the patch: the same samples and losses.
    options += ["--load", str(tmp_path / "save"), "--ckpt-step", str(REFRESH)]
    resumed = train(checkout, 1, *options, entry=ENTRY, record=str(tmp_path / "second"))
    assert list(resumed) == list(range(REFRESH + 1, STEPS + 1))
    again = served(str(tmp_path / "second"), 1)
    np.testing.assert_array_equal(again, tokens[REFRESH * BATCH :])
    # The second line after a start may be the mean of the first two steps: some versions do not begin anew after the first.
    steps = [step for step in resumed if step != REFRESH + 2]
    np.testing.assert_allclose(*([float(log[step].split()[0]) for step in steps] for log in (whole, resumed)), rtol=1e-5)
    assert [whole[step].split()[1] for step in resumed] == [norm.split()[1] for norm in resumed.values()]

    # A selection server reads the same losses, and takes the same steps, from the checkpoint.
    measured = measure(tmp_path, index)
    np.testing.assert_allclose([measured[step] for step in steps], [float(whole[step].split()[0]) for step in steps], rtol=1e-5)

    state = json.loads((tmp_path / "selection" / "training.json").read_text())
    assert (state["state"], state["step"], state["consumed_train_samples"]) == ("finished", STEPS, STEPS * BATCH)

    # Started once more after its end: nothing is left to train on, and nothing fails.
    assert train(checkout, 1, *options[:-2], entry=ENTRY) == {}
    assert json.loads((tmp_path / "selection" / "training.json").read_text())["state"] == "finished"


@pytest.mark.timeout(600)
def test_without_the_flags_the_patch_changes_nothing(checkout: Path, tmp_path: Path) -> None:
    arguments = ["--mock-data", "--num-workers", "0", "--vocab-size", "200000"]
    plain = train(checkout, 1, *arguments)
    assert len(plain) == STEPS
    assert train(patched(checkout, tmp_path / "patched"), 1, *arguments) == plain
    assert train(checkout, 1, *arguments, entry=ENTRY) == plain
