"""Sizes of the experiment, its data and its configs."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_groupmates.config import Config, config_from_dict
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import write_json
from tools.bench.recipes_families import plan_pool, write_pool

ROOT = Path(__file__).resolve().parents[2]
POOLS = ("natural", "families")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Every size of the experiment."""

    pool_bytes: str
    """Text to gather, as tools/gather_documents.py takes it."""
    held_out_bytes: str
    """Text of the reference, and of the evaluation set."""
    pool_samples: int
    """Samples of each pool; what the warm-up leaves is what is selected from."""
    family_share: float = 0.4
    """Of the families pool: samples that have near-duplicates."""
    copies: tuple[int, int] = (3, 10)
    """Least and most copies of an original."""
    noise: float = 0.05
    """Probability that a token of a copy is replaced."""
    vocab_size: int = 2048
    sequence_length: int = 128
    hidden_size: int = 64
    ffn_hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    batch: int = 16
    micro_batch: int = 8
    """Smaller than the batch, so that a micro-batch stays in a CPU's caches."""
    warmup_steps: int
    """Steps on random data before the checkpoint that all arms begin from."""
    arm_steps: int
    """Steps of an arm: one pass over its selection."""
    oracle_learning_rate: float = 3e-4
    rollouts: int
    """First-order rollouts of an arm, bootstrap included; exact ones are as many as the same FLOPs pay for."""
    bootstrap_share: float = 0.25
    candidates: int
    """Samples that rollouts are drawn from."""
    held_out_rollouts: int
    """Exact rollouts of other samples, which judge the fits."""
    held_out_candidates: int
    reference_samples: int
    evaluation_samples: int
    clusters: int
    embedding_dim: int = 48
    epochs: int = 30
    rollout_batch: int = 16
    device: str = "cpu"
    workers: int = 2


SCALES = {
    "cpu": Scale(
        pool_bytes="7M",
        held_out_bytes="200K",
        pool_samples=20000,
        warmup_steps=450,
        arm_steps=160,
        rollouts=160,
        candidates=4000,
        held_out_rollouts=20,
        held_out_candidates=300,
        reference_samples=48,
        evaluation_samples=256,
        clusters=16,
    ),
    "gpu": Scale(
        pool_bytes="400M",
        held_out_bytes="4M",
        pool_samples=160000,
        vocab_size=8192,
        sequence_length=512,
        hidden_size=512,
        ffn_hidden_size=1536,
        num_layers=8,
        num_heads=8,
        batch=64,
        micro_batch=64,
        warmup_steps=900,
        arm_steps=320,
        rollouts=2000,
        candidates=20000,
        held_out_rollouts=100,
        held_out_candidates=2000,
        reference_samples=128,
        evaluation_samples=1024,
        clusters=64,
        device="cuda",
        workers=1,
    ),
    "quick": Scale(
        pool_bytes="700K",
        held_out_bytes="60K",
        pool_samples=1400,
        vocab_size=512,
        hidden_size=32,
        ffn_hidden_size=64,
        num_layers=1,
        warmup_steps=20,
        arm_steps=10,
        rollouts=24,
        candidates=400,
        held_out_rollouts=4,
        held_out_candidates=100,
        reference_samples=16,
        evaluation_samples=32,
        clusters=4,
        epochs=5,
    ),
}


def prepare_data(directory: Path, scale: Scale, given: Path | None) -> None:
    """Both pools, reference and evaluation set in ``directory``; does nothing where they are there.

    ``given`` holds ``pool``, ``reference`` and ``evaluation`` as tools/preprocess_dclm.py writes them, and spares gathering text.

    Raises:
        UserError: too few samples.
    """
    if (directory / "ready.json").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    source = given or directory / "gathered"
    if given is None:
        _gather(directory, source, scale)
    pool = PoolIndex.open(source / "pool")
    for name, share in zip(POOLS, (0.0, scale.family_share), strict=True):
        plan = plan_pool(pool.num_samples, scale.pool_samples, share, scale.copies, seed=1)
        made_by = {"tool": Path(__file__).name, "source": pool.fingerprint, "family_share": share, "noise": scale.noise}
        write_pool(pool, plan, scale.noise, 2, directory / name, made_by)
    for name in ("reference", "evaluation"):
        shutil.copytree(source / name, directory / name)
    write_json(
        directory / "ready.json", {name: PoolIndex.open(directory / name).num_samples for name in (*POOLS, "reference", "evaluation")}
    )


def _gather(directory: Path, output: Path, scale: Scale) -> None:
    tools, raw, tokenizer = ROOT / "tools", directory / "raw", directory / "tokenizer"
    held_out = ("--reference-bytes", scale.held_out_bytes, "--evaluation-bytes", scale.held_out_bytes)
    commands: list[list[Any]] = [["gather_documents.py", "--output", raw, "--max-bytes", scale.pool_bytes, *held_out]]
    commands.append(["train_tokenizer.py", "--input", raw / "pool", "--output", tokenizer, "--vocab-size", scale.vocab_size])
    for part in ("pool", "reference", "evaluation"):
        pack = ("--tokenizer", tokenizer, "--pack", scale.sequence_length + 1)
        commands.append(["preprocess_dclm.py", "--input", raw / part, "--output", output / part, *pack])
    for script, *arguments in commands:
        subprocess.run([sys.executable, tools / script, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make_config(scale: Scale, data: Path, pool: str, seed: int, output: Path, branch: Path | None = None) -> Config:
    """The quickstart's settings at this scale: of the warm-up, or of an arm that goes on from the warm-up's run ``branch``."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart" / "config.yaml").read_text())
    steps = scale.warmup_steps + scale.arm_steps
    tree["run"] = {"output_dir": str(output), "wandb_mode": "disabled", "seed": seed}
    tree["model"] |= {
        "num_layers": scale.num_layers,
        "hidden_size": scale.hidden_size,
        "ffn_hidden_size": scale.ffn_hidden_size,
        "num_attention_heads": scale.num_heads,
        "sequence_length": scale.sequence_length,
        "vocab_size": scale.vocab_size,
    }
    tree["data"] = {"pool": str(data / pool), "reference": str(data / "reference"), "num_workers": 0}
    tree["training"] |= {
        "train_iters": scale.warmup_steps if branch is None else steps,
        "global_batch_size": scale.batch,
        "micro_batch_size": scale.micro_batch,
        "precision": "fp32" if scale.device == "cpu" else "bf16",
        "log_interval": 50,
        "eval_interval": steps,
        "eval_samples": scale.evaluation_samples,
    }
    # Of the whole run: the checkpoint lies before the decay.
    tree["optimizer"] |= {"decay_iters": steps, "warmup_iters": min(40, scale.warmup_steps // 2)}
    tree["parallel"]["tensor_model_parallel_size"] = 1
    tree["checkpoint"]["save_interval"] = steps
    tree["oracle"] |= {"reference_samples": scale.reference_samples, "reference_batch_size": 32}
    tree["relational"] |= {"embedding_dim": scale.embedding_dim, "epochs": scale.epochs, "batch_rollouts": scale.rollout_batch}
    # The generation is there before an arm starts: it adopts it at its first step.
    tree["selection"] |= {"enabled": branch is not None, "first_refresh_step": scale.warmup_steps, "max_refreshes": 1}
    tree["selection"] |= {"max_staleness_steps": 0, "num_clusters": scale.clusters}
    if branch is not None:
        tree["data"]["evaluation"] = str(data / "evaluation")
        tree["checkpoint"] |= {"load": str(branch / "checkpoints"), "load_tag": f"global_step{scale.warmup_steps}"}
    return config_from_dict(tree)
