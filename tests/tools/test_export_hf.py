"""The export tool as users run it: checkpoints of real engines, loaded by transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from megatron_groupmates.config import config_from_dict, config_to_dict
from megatron_groupmates.utils.files import atomic_directory
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import open_groups, tiny_tree
from tests.pool.helpers import make_pool, tiny_tokenizer, tokenizer_json

TOOL = Path(__file__).parents[2] / "tools" / "export_hf.py"
ROWS, TOKENIZER_IDS = 320, 300
TOKENS = torch.randint(TOKENIZER_IDS, (2, 16), generator=torch.Generator().manual_seed(1))


def tree(root: str, tensor_size: int) -> dict[str, Any]:
    """A run whose settings are not the defaults of any library, so that one left out of the export shows."""
    changes = {"vocab_size": ROWS, "rotary_base": 500, "norm_epsilon": 1e-2, "init_std": 0.2}
    return tiny_tree(root, **{f"model__{name}": value for name, value in changes.items()}, parallel__tensor_model_parallel_size=tensor_size)


def train_and_save(rank: int, world_size: int, root: str) -> torch.Tensor:
    """Two steps of a real engine, saved twice; returns its logits over the whole vocabulary."""
    import deepspeed

    from megatron_groupmates.model.gpt import build_gpt, token_logits
    from megatron_groupmates.parallel.device import skip_inference_operators

    groups = open_groups(world_size)
    config = config_from_dict(tree(root, world_size))
    model = build_gpt(config, groups, world_size, torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms begin at one, where mixing up two of them would not show.
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))

    def all_logits() -> torch.Tensor:
        mine = token_logits(engine.module, TOKENS)
        parts = [torch.empty_like(mine) for _ in range(world_size)]
        torch.distributed.all_gather(parts, mine.detach().contiguous(), group=groups.tensor_group)
        parts[groups.tensor_rank] = mine
        return torch.cat(parts, -1)

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        skip_inference_operators()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, mpu=groups, config=settings, dist_init_required=False)[0]
        for step in (1, 2):
            engine.backward(all_logits().square().mean())
            engine.step()
            state = {"gated_linear_unit": True, "config": config_to_dict(config)}
            engine.save_checkpoint(f"{root}/run/checkpoints", tag=f"global_step{step}", client_state=state)
    with torch.no_grad():
        return all_logits()


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run directory's parent, with the run's pool beside it, and the logits of its newest checkpoint."""

    root: Path
    logits: torch.Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Saved]:
    runs: dict[int, Saved] = {}

    def save(tensor_size: int) -> Saved:
        if tensor_size not in runs:
            root = tmp_path_factory.mktemp(f"export-tp{tensor_size}")
            make_pool(root / "pool")
            logits = run_ranks(train_and_save, tensor_size, str(root), tmp_path=root)[0]
            (root / "run" / "config.yaml").write_text(yaml.safe_dump(tree(str(root), tensor_size)))
            runs[tensor_size] = Saved(root, logits)
        return runs[tensor_size]

    return save


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_hf", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(directory: Path, **options: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_transformers_computes_what_the_trainer_does(
    saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path, tensor_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(tensor_size)
    arguments = ["--checkpoint", str(run.root / "run"), "--output", str(tmp_path / "hf"), "--max-shard-size", "60KB"]
    assert tool.main(arguments) == 0, capsys.readouterr().err
    assert "step 2, float32, 300 of 320 vocabulary rows" in capsys.readouterr().out
    model = load(tmp_path / "hf", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.eos_token_id == 0
    assert run.logits.std() > 0.1
    torch.testing.assert_close(logits_of(model), run.logits[..., :TOKENIZER_IDS], rtol=0, atol=1e-4)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 70_000 for path in files)


def test_every_row_is_kept_without_a_tokenizer_and_bfloat16_is_the_rounded_master(
    saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path
) -> None:
    run = saved(1)
    tag = str(run.root / "run" / "checkpoints" / "global_step2")
    assert tool.main(["--checkpoint", tag, "--output", str(tmp_path / "full"), "--no-tokenizer"]) == 0
    full = load(tmp_path / "full", dtype=torch.float32)
    torch.testing.assert_close(logits_of(full), run.logits, rtol=0, atol=1e-4)
    assert not (tmp_path / "full" / "tokenizer.json").exists()
    assert [path.name for path in (tmp_path / "full").glob("*.safetensors*")] == ["model.safetensors"]
    assert tool.main(["--checkpoint", tag, "--output", str(tmp_path / "half"), "--no-tokenizer", "--dtype", "bfloat16"]) == 0
    half = load(tmp_path / "half", dtype="auto").state_dict()
    for name, value in full.state_dict().items():
        assert half[name].dtype == torch.bfloat16 and torch.equal(half[name], value.bfloat16()), name


def test_the_tokenizer_makes_the_pools_ids(saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert tool.main(["--checkpoint", str(saved(1).root / "run"), "--output", str(tmp_path / "hf")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == tokenizer_json()
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.model_max_length) == ("<|endoftext|>", 0, 16)
    for text in ("the cat sat on a mat", " rain  fell\n\non roofs, of old houses ", "na\u00efve \u2603"):
        ids = tokenizer(text)["input_ids"]
        assert ids == tiny_tokenizer().encode_batch([text])[0].tolist()
        assert tokenizer.decode(ids) == text


def test_again_other_and_older(saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(saved(1).root / "run"), "--output", str(tmp_path / "hf")]
    assert tool.main(arguments) == 0
    weights = tmp_path / "hf" / "model.safetensors"
    first = weights.read_bytes()
    inode = weights.stat().st_ino
    assert tool.main(arguments) == 0
    assert "is complete already" in capsys.readouterr().out and weights.stat().st_ino == inode
    weights.unlink()
    assert tool.main(arguments) == 0 and weights.read_bytes() == first
    assert tool.main([*arguments, "--tag", "global_step1"]) == 0 and weights.read_bytes() != first
    assert json.loads((tmp_path / "hf" / "export.json").read_text())["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failure_leaves_the_earlier_export(
    saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_groupmates.checkpoint import export_directory

    arguments = ["--checkpoint", str(saved(1).root / "run"), "--output", str(tmp_path / "hf")]
    assert tool.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def full_disk(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_directory, "write_json", full_disk)
    assert tool.main([*arguments, "--dtype", "bfloat16"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_is_refused(saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(1).root / "run"
    output = tmp_path / "hf"

    def refused(*arguments: str, checkpoint: Path = run, output: Path = output) -> str:
        assert tool.main(["--checkpoint", str(checkpoint), "--output", str(output), *arguments]) == 1
        return capsys.readouterr().err

    with atomic_directory(tmp_path / "mine") as mine:
        (mine / "thesis.tex").write_text("x")
    assert "not empty and not an export of this tool (it has no export.json)" in refused(output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert "is a file; give a directory" in refused(output=run / "config.yaml")
    assert "'huge' is not a size such as 5GB" in refused("--max-shard-size", "huge")
    assert "is not a directory; give a run" in refused(checkpoint=tmp_path / "none")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("")
    assert "has no complete checkpoint yet: it has no file 'latest'" in refused(checkpoint=tmp_path / "new")
    assert "global_step7" in refused("--tag", "global_step7")

    settings = tree(str(tmp_path), 1)
    for name, value, message in (
        ("data", {"pool": str(tmp_path / "gone")}, "the tokenizer of the run's pool (data.pool) cannot be read"),
        ("model", {"vocab_size": 256}, "has 300 tokens, the model's vocabulary 256 rows: it is not the tokenizer of this run's pool"),
        ("model", {"num_layers": 3}, "has no parameter 'decoder.layers.2.input_layernorm.weight', which the config's model has"),
        ("model", {"num_layers": 1}, "has a parameter 'decoder.layers.1.input_layernorm.weight', which the config's model has not"),
        ("model", {"ffn_hidden_size": 64}, "linear_fc1.weight' has shape (96, 32), the config's model (128, 32)"),
    ):
        changed = {**settings, "data": {"pool": str(saved(1).root / "pool")}}
        changed["selection"] = {"enabled": False}
        changed[name] = {**changed[name], **value}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
        assert message in refused("--config", str(tmp_path / "config.yaml"))
    assert not output.exists()


def test_a_tag_alone_and_one_still_being_written(
    saved: Callable[[int], Saved], tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved(1).root / "run" / "checkpoints" / "global_step2", tmp_path / "saves" / "global_step2")
    arguments = ["--checkpoint", str(tmp_path / "saves" / "global_step2"), "--output", str(tmp_path / "hf")]
    assert tool.main(arguments) == 1
    assert "is still being written" in capsys.readouterr().err
    (tmp_path / "saves" / "latest").write_text("global_step2")
    assert tool.main(arguments) == 0
    assert tool.main(["--checkpoint", str(tmp_path / "saves"), "--output", str(tmp_path / "hf")]) == 0
    assert "is complete already" in capsys.readouterr().out
