"""The trainer on a GPT-2: LayerNorm, gelu, biases, learned positions, tied weights; the same at every parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config
from tests.common.distributed import run_ranks
from tests.training.layouts import train_layouts
from tests.training.runs import evaluations, losses, make_config

STEPS = 3
GPT2 = (
    "model.activation=gelu",
    "model.normalization=LayerNorm",
    "model.qk_layernorm=false",
    "model.add_bias_linear=true",
    "model.position_embedding_type=learned_absolute",
    "model.untie_embeddings_and_output_weights=false",
    "model.init_std=0.2",
    f"training.train_iters={STEPS}",
    "training.gradient_clipping=0.5",
    "training.precision=fp32",
    f"checkpoint.save_interval={STEPS}",
)
TENSOR = "parallel.tensor_model_parallel_size=2"
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"one": ()},
    2: {
        "tensor": (TENSOR,),
        "sequence": (TENSOR, "parallel.sequence_parallel=true"),
        "data-zero-2": ("optimizer.zero_stage=2",),
        "data-zero-3": ("optimizer.zero_stage=3",),
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    root, configs = tmp_path_factory.mktemp("gpt2"), {}
    for world_size, runs in LAYOUTS.items():
        own = {name: make_config(root, *GPT2, *changes, run=name) for name, changes in runs.items()}
        run_ranks(train_layouts, world_size, list(own.values()), tmp_path=root)
        configs |= own
    return configs


def checkpoint(config: Config) -> ZeroCheckpoint:
    return ZeroCheckpoint(Path(config.run.output_dir) / f"checkpoints/global_step{STEPS}")


@pytest.mark.parametrize("name", list(LAYOUTS[2]))
def test_every_layout_trains_alike(trained, name):
    one, other = trained["one"], trained[name]
    assert len(losses(one)) == STEPS and losses(one)[-1] != losses(one)[0]
    assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=0)
    assert evaluations(one)[-1][1] == pytest.approx(evaluations(other)[-1][1], rel=1e-5)
    expected, found = checkpoint(one), checkpoint(other)
    assert sorted(found.names) == sorted(expected.names)
    for parameter in expected.names:
        # The second moment of a key's bias is of rounding alone: no loss depends on it.
        for kind in ("exp_avg",) if parameter.endswith("linear_qkv.bias") else ("exp_avg", "exp_avg_sq", "param"):
            value = expected.read(parameter, kind)
            error = float((found.read(parameter, kind) - value).norm() / value.norm())
            assert error < 1e-4, (parameter, kind)


def test_the_checkpoint_says_that_the_mlp_is_not_gated_and_holds_tied_weights_once(trained):
    saved = checkpoint(trained["tensor"])
    assert saved.client_state["gated_linear_unit"] is False
    assert "output_layer.weight" not in saved.names
    assert {"embedding.position_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.bias"} <= set(saved.names)
