"""Checkpoints of real DeepSpeed engines, written once per session and layout."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.distributed import run_ranks
from tests.common.once import make_once
from tests.common.zero_checkpoints import Recipe, write_checkpoints

# Every layout writes these; the last ones only where they add something.
RECIPES = [Recipe(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")] + [Recipe(1, "bf16-fp32-accumulation")]
EXTRA_RECIPES = [
    Recipe(0, "fp16"),
    Recipe(1, "fp16"),
    Recipe(1, "fp32", tied=True),
    Recipe(0, "fp32", tied=True),
    Recipe(1, "fp32", steps=0),
    Recipe(2, "fp32", zero_options=(("round_robin_gradients", True),)),
    Recipe(3, "fp32", zero_options=(("sub_group_size", 300),)),
]
REFUSED_RECIPES = [Recipe(0, "fp32", steps=0), Recipe(1, "fp32", zero_options=(("elastic_checkpoint", True),))]
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]


@dataclasses.dataclass(frozen=True)
class Saved:
    """Checkpoints of one layout and what the engines held: tag -> kind -> name -> tensor, by tensor-parallel rank."""

    directory: Path
    held: list[dict[str, dict[str, dict[str, torch.Tensor]]]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Saved]:
    """``saved(tensor_size, data_size)``."""

    @functools.cache
    def read_or_write(tensor_size: int, data_size: int) -> Saved:
        recipes = RECIPES + (EXTRA_RECIPES + REFUSED_RECIPES if data_size == 2 else [])

        def write(root: Path) -> tuple[Path, list[Any]]:
            directory = root / "checkpoints"
            num_ranks = tensor_size * data_size
            held = run_ranks(write_checkpoints, num_ranks, tensor_size, recipes, str(directory), tmp_path=root)
            return directory, held[:tensor_size]

        return Saved(*make_once(tmp_path_factory, f"tp{tensor_size}-dp{data_size}", write))

    return read_or_write


@pytest.fixture
def copy_of(saved: Callable[[int, int], Saved], tmp_path: Path) -> Callable[[str], Path]:
    """``copy_of(tag)``: a checkpoint of layout (2, 2) that the test may damage, in a directory with its ``latest``."""

    def copy(tag: str) -> Path:
        shutil.copytree(saved(2, 2).directory / tag, tmp_path / "checkpoints" / tag)
        (tmp_path / "checkpoints" / "latest").write_text(tag)
        return tmp_path / "checkpoints" / tag

    return copy
