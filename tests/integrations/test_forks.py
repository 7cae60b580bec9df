"""What the session finds out about a checkout of Megatron-DeepSpeed by trying it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.config.forks import settings_of_megatron_deepspeed
from megatron_groupmates.integrations.forks import MEGATRON_DEEPSPEED, rotary_angles
from tests.integrations.trainer import fork_arguments

MODULE = "megatron.model.rotary_pos_embedding"


def angles(dim: int, length: int) -> torch.Tensor:
    frequencies = torch.tensor([10000.0 ** -(2 * pair / dim) for pair in range(dim // 2)] * 2)
    return (torch.arange(length)[:, None] * frequencies)[:, None, None]


def checkout(given: Callable[[torch.Tensor], Any], caches: bool = False) -> ModuleType:
    """A module as the checkout's, whose embedding returns ``given`` of the angles; with ``caches`` it keeps what it rotated by."""
    module = ModuleType(MODULE)
    module.last = None

    def rotary_embedding(dim: int) -> Callable[[int], Any]:
        return lambda length: given(angles(dim, length))

    def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        if module.last is None or not caches:
            module.last = freqs
        first, second = t.chunk(2, dim=-1)
        return t * module.last.cos() + torch.cat([-second, first], dim=-1) * module.last.sin()

    module.RotaryEmbedding, module.apply_rotary_pos_emb = rotary_embedding, apply_rotary_pos_emb
    return module


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (checkout(lambda angle: angle), "positions"),
        (checkout(lambda angle: (angle, angle)), "positions"),
        (checkout(lambda angle: [angle.cos(), angle.sin()], caches=True), "cosines"),
    ],
)
def test_what_a_checkout_rotates_by(module: ModuleType, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rotary_angles(module) == found
    assert module.last is None, "the checkout's own first step must not find what the example left"
    monkeypatch.setitem(sys.modules, MODULE, module)
    args = vars(fork_arguments(tmp_path, use_rotary_position_embeddings=True))
    assert MEGATRON_DEEPSPEED.settings(args)["model"]["rotary_angles"] == found


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (checkout(lambda angle: [angle.cos(), angle.sin()]), "rotates neither by the positions' angles nor by their cosines, so"),
        (checkout(lambda angle: 2 * angle), "rotates neither by the positions' angles nor by their cosines, so"),
        (checkout(lambda angle: (angle,)), r"rotates in a way that is not known here \(ValueError: not enough values"),
        (ModuleType(MODULE), r"in a way that is not known here \(AttributeError: .*RotaryEmbedding"),
    ],
)
def test_another_rotation_is_refused(module: ModuleType, message: str) -> None:
    with pytest.raises(UserError, match=f"--use-rotary-position-embeddings: {MODULE} of this checkout .*{message}"):
        rotary_angles(module)


def test_learned_positions_need_no_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    args = vars(fork_arguments(tmp_path))
    assert MEGATRON_DEEPSPEED.settings(args) == settings_of_megatron_deepspeed(args)
