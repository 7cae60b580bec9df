"""What a rank needs in memory to read its slice of a checkpoint, shown on synthetic files that have DeepSpeed's structure."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import check_complete
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import config_from_dict, ffn_hidden_size
from megatron_groupmates.model.gpt import build_gpt
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.parallel import initialize_parallel, read_launch_environment
from tests.common.distributed import run_ranks
from tests.common.zero_checkpoints import CLIENT_STATE, Recipe, full_shapes
from tools.bench.bench_checkpoint import measure_apart
from tools.bench.synthetic_zero import KINDS, STEP, gpt_shapes, value, write_checkpoint

TREE: dict[str, Any] = {
    "run": {"output_dir": "unused", "seed": 5},
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 16, "vocab_size": 48},
    "data": {"pool": "unused"},
    "training": {"train_iters": 2, "global_batch_size": 2, "micro_batch_size": 2},
}
# Its weights and moments take 124 MB, its files 144 MB, its largest tensor 21 MB.
LARGER = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "vocab_size": 40_000}
BOUND = 48 << 20


def stored_sizes(path: Path) -> list[tuple[str, int]]:
    """Bytes of each storage of a file: tensors may share one."""
    with zipfile.ZipFile(path) as archive:
        return [(name, entry.file_size) for entry in archive.infolist() if (name := entry.filename.partition("/")[2]).startswith("data/")]


def structure(part: Any) -> Any:
    """Types, keys and shapes, without the values."""
    if isinstance(part, torch.Tensor):
        return part.dtype, tuple(part.shape)
    if isinstance(part, dict):
        return type(part), [(key, structure(entry)) for key, entry in part.items()]
    if isinstance(part, list | tuple):
        return type(part), [structure(entry) for entry in part]
    if hasattr(part, "type_name"):
        return part.type_name, structure(part.args), structure(part.fields)
    return type(part)


@pytest.mark.parametrize(("tensor_size", "data_size"), [(1, 2), (2, 2)])
def test_the_synthetic_files_are_built_as_deepspeed_s(saved, tmp_path, tensor_size, data_size):
    real = saved(tensor_size, data_size).directory / Recipe(1, "bf16").tag
    synthetic = write_checkpoint(tmp_path, full_shapes(), tensor_size, data_size, CLIENT_STATE, {"rotary": torch.arange(3.0)})
    assert sorted(path.name for path in synthetic.iterdir()) == sorted(path.name for path in real.iterdir())
    for path in synthetic.iterdir():
        found, expected = load(path), load(real / path.name)
        # The run's own settings.
        del found["ds_config"], expected["ds_config"]
        assert structure(found) == structure(expected), path.name
        assert stored_sizes(path) == stored_sizes(real / path.name)
    check_complete(synthetic)


@pytest.mark.parametrize("saved_size", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_the_reader_finds_the_values_written(tmp_path, saved_size, size):
    config = config_from_dict(TREE)
    shapes = gpt_shapes(config.model, ffn_hidden_size(config))
    checkpoint = ZeroCheckpoint(write_checkpoint(tmp_path, shapes, saved_size, 2, {"gated_linear_unit": True}))
    assert checkpoint.names == list(shapes)
    assert checkpoint.adam_step == STEP
    for name in shapes:
        for kind in KINDS:
            for rank in range(size):
                assert torch.equal(checkpoint.read_slice(name, kind, rank, size), value(shapes, name, kind, rank, size)), (name, kind)


def _shapes_of_the_model(rank: int, world_size: int) -> list[tuple[str, tuple[int, ...]]]:
    groups = initialize_parallel(read_launch_environment(os.environ), 1, seed=5)
    model = build_gpt(config_from_dict(TREE), groups, 1, torch.float32)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def test_the_synthetic_parameters_are_those_of_the_model(tmp_path):
    config = config_from_dict(TREE)
    [expected] = run_ranks(_shapes_of_the_model, 1, tmp_path=tmp_path)
    assert [(name, shape) for name, (shape, _) in gpt_shapes(config.model, ffn_hidden_size(config)).items()] == expected


def test_a_rank_needs_its_slice_and_little_more(tmp_path):
    config = config_from_dict({**TREE, "model": LARGER})
    shapes = gpt_shapes(config.model, ffn_hidden_size(config))
    tag = write_checkpoint(tmp_path, shapes, 2, 2, {"gated_linear_unit": True})
    ours, obvious = (measure_apart(way, tag, shapes, 0, 1) for way in ("slices", "obvious"))
    assert ours.slice_bytes == obvious.slice_bytes == 3 * 4 * model_size(config).parameters
    assert ours.slice_bytes < ours.peak_bytes - ours.before_bytes + (1 << 20)
    assert ours.peak_bytes - ours.before_bytes - ours.slice_bytes < BOUND
    # Loading whole files is what the bound would find.
    assert obvious.peak_bytes - obvious.before_bytes - obvious.slice_bytes > 2 * BOUND
