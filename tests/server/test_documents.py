"""A run on documents of any length: the probe takes the trainer's steps, and a round selects whole documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, RunPaths, UserError, config_from_dict, learning_rate
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.dataset import read_contexts
from megatron_groupmates.pool.generation import load_generation, read_pointer
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.server import watch
from megatron_groupmates.server.context import sample_reader
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import BATCH, REFRESHES, SEQUENCE_LENGTH, VOCABULARY, tiny_tree, train_tiny_runs
from tests.influence.test_probe import differences, saved_state, state_of
from tests.pool.helpers import make_pool

STEP = REFRESHES[0]
NUM_DOCUMENTS = 150
RESETS = {"data__reset_attention_mask": True, "data__reset_position_ids": True, "data__eod_mask_loss": True}


def make_documents(directory: Path) -> None:
    """Documents of 1 to 40 tokens: those of kind ``web`` (a third) predictable, the others random of other ids."""
    generator = np.random.default_rng(4)
    samples = []
    for number in range(NUM_DOCUMENTS):
        body = generator.integers(16, VOCABULARY, generator.integers(0, 40))
        if number % 3 == 1:
            body = predictable(int(generator.integers(8)), len(body))
        samples.append(np.append(body, 0))
    make_pool(directory, (60, 50, 40), samples=samples, vocab_size=VOCABULARY)


def predictable(first: int, length: int) -> np.ndarray:
    tokens = [first]
    while len(tokens) < length:
        tokens.append((5 * tokens[-1] + 3) % 8)
    return np.array(tokens[:length], dtype=np.int64) + 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A trained run with a checkpoint of every step up to the first refresh and one more."""
    root = tmp_path_factory.mktemp("documents")
    make_documents(root / "pool")
    reference = [predictable(number, SEQUENCE_LENGTH + 1) for number in range(6)]
    make_pool(root / "reference", (6,), samples=reference, vocab_size=VOCABULARY)
    tree = tiny_tree(root, data__packing="documents", training__train_iters=STEP + 1, **RESETS)
    run_ranks(train_tiny_runs, 1, [tree], tmp_path=root)
    (root / "run/checkpoints/latest").write_text(f"global_step{STEP}")
    return config_from_dict(tree)


def order_of(config: Config) -> SampleOrder:
    pool = PoolIndex.open(config.data.pool)
    packing = choose_packing(pool, config.data.packing, SEQUENCE_LENGTH)
    everyone = {0: np.ones(pool.num_samples, dtype=bool)}
    return SampleOrder(pool.num_samples, config.run.seed, [LogEntry(0, 0, 0, "")], everyone, packing)


@pytest.mark.parametrize("forgotten", ["none", "reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_the_probe_takes_the_trainers_step_bit_for_bit(config: Config, groups: Any, forgotten: str):
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.gpt import build_gpt

    tag = Path(config.run.output_dir) / "checkpoints" / f"global_step{STEP}"
    pool = PoolIndex.open(config.data.pool)
    reference = load_reference(PoolIndex.open(config.data.reference), SEQUENCE_LENGTH, 4, torch.device("cpu"))
    rules = {name.removeprefix("data__"): value for name, value in RESETS.items()}
    rules = DocumentRules(pool.eot_id, **{**rules, **({} if forgotten == "none" else {forgotten: False})})
    probe = Probe(build_gpt(config, groups, 1, torch.float32), config, groups, reference, 4, rules)
    probe.load(ZeroCheckpoint(tag))
    samples = read_contexts(PoolReader(pool), order_of(config).contexts(STEP * BATCH, BATCH)).tokens
    assert (samples[:, :-1] == pool.eot_id).any()
    probe.step(samples, learning_rate(config, STEP + 1))
    after = saved_state(ZeroCheckpoint(tag.with_name(f"global_step{STEP + 1}")), groups)
    # Every rule matters, else equality would say nothing about it.
    assert (differences(state_of(probe), after) == []) == (forgotten == "none")


def test_a_round_selects_whole_documents(config: Config, groups: Any):
    pool, selection = PoolIndex.open(config.data.pool), RunPaths.of(config).selection
    assert {1, 40} <= set(pool.lengths.tolist())
    assert watch.serve(config, groups, once=True)
    assert read_pointer(selection) == 1
    generation = load_generation(selection, 1, pool)
    consumed = order_of(config).consumed(STEP * BATCH)
    assert consumed.any() and not (generation.mask & consumed).any()
    budget = config.selection.ratio * int(pool.lengths[~consumed].sum())
    assert budget - pool.lengths.max() < pool.lengths[generation.mask].sum() <= budget
    assert all(cost["flops"] >= 0 for cost in generation.provenance["stages"].values())


def test_longer_documents_are_read_from_their_beginning(config: Config):
    pool = PoolIndex.open(config.data.pool)
    rows = np.array([int(pool.lengths.argmax()), int(pool.lengths.argmin())])
    long, short = sample_reader(pool, torch.device("cpu"), SEQUENCE_LENGTH)(rows)
    reader = PoolReader(pool)
    assert long.tolist() == reader.read(rows[0])[: SEQUENCE_LENGTH + 1].tolist() and len(long) == SEQUENCE_LENGTH + 1
    assert short.tolist() == reader.read(rows[1]).tolist()


def test_a_pool_smaller_than_a_context_is_refused(tmp_path: Path, groups: Any):
    tree = tiny_tree(tmp_path, data__packing="documents", selection__enabled=False)
    for name in ("pool", "reference"):
        make_pool(tmp_path / name, (2,), length=5, vocab_size=VOCABULARY)
    from megatron_groupmates.training.loop import train

    with pytest.raises(UserError, match=r"has 10 tokens, fewer than one training sequence of 17"):
        train(config_from_dict(tree), groups)
