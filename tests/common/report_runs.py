"""Run directories as trainer and server leave them, with made-up numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

SEQUENCE_LENGTH = 128
BATCH = 8
TOKENS_PER_STEP = SEQUENCE_LENGTH * BATCH
KINDS = ("docstring", "python_source", "c_header", "licence", "man_page", "data_table")


def write_run(
    root: Path,
    method: str | None,
    *,
    seed: int = 1,
    final_loss: float = 5.3,
    state: str = "finished",
    branch_step: int = 100,
    steps: int = 500,
    provenances: list[dict[str, Any]] | None = None,
) -> Path:
    """A run directory whose evaluation loss falls as a decaying exponential from 7 to ``final_loss``.

    ``method`` None is a run without selection. Generation n is adopted 40 steps after its provenance's checkpoint.
    """
    root.mkdir(parents=True)
    config = {
        "run": {"name": root.name, "seed": seed},
        "model": {"sequence_length": SEQUENCE_LENGTH},
        "training": {"global_batch_size": BATCH},
        "selection": {"enabled": method is not None, "method": method or "group"},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    rows: list[dict[str, Any]] = []
    log = [{"generation": 0, "effective_sample": 0, "epoch": 0, "digest": "d0"}]
    for number, provenance in enumerate(provenances or [], start=1):
        write_generation(root, number, provenance)
        log.append(
            {"generation": number, "effective_sample": (provenance["checkpoint_step"] + 40) * BATCH, "epoch": 0, "digest": f"d{number}"}
        )
        rows.append(
            {
                "step": provenance["checkpoint_step"] + 35,
                "event": "adoption",
                "generation": number,
                "effective_sample": log[-1]["effective_sample"],
                "seconds": 0.01,
            }
        )
    for step in range(branch_step, steps + 1, 20):
        position = {"step": step, "consumed_train_samples": step * BATCH, "consumed_tokens": step * TOKENS_PER_STEP}
        share = (step - branch_step) / (steps - branch_step)
        fall = (1 - math.exp(-3 * share)) / (1 - math.exp(-3))
        rows.append(
            {
                **position,
                "loss": 7.1 - share,
                "z_loss": 0.0,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "generation": 0,
                "seconds": 0.1,
                "tokens_per_second": 1e4,
            }
        )
        rows.append({**position, "evaluation_loss": 7 + (final_loss - 7) * fall})
    write_lines(root / "metrics.jsonl", rows)
    write_lines(root / "selection" / "log.jsonl", log)
    (root / "training.json").write_text(
        json.dumps(
            {
                "state": state,
                "step": steps,
                "consumed_tokens": steps * TOKENS_PER_STEP,
                "seconds": 42.0,
                "flops": 1e6 * steps * TOKENS_PER_STEP,
                "branch_step": branch_step,
                "branch_tokens": branch_step * TOKENS_PER_STEP,
            }
        )
    )
    return root


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_generation(root: Path, number: int, provenance: dict[str, Any]) -> None:
    """Write the part of ``generation.json`` that a report reads."""
    path = root / "selection" / f"generation-{number:06d}" / "generation.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"number": number, "provenance": provenance}))


def full_provenance(method: str, checkpoint_step: int, favoured: str = "docstring") -> dict[str, Any]:
    """A provenance with every part."""
    pool = [round(1000 * math.exp(-(((edge - 10) / 4) ** 2))) for edge in range(20)]
    selected = [count if edge < 8 else round(count * math.exp(-(edge - 7))) for edge, count in enumerate(pool)]
    share = {
        "group": {"group": 1.0, "individual": 0.93, "similarity": 0.41, "random": 0.26},
        "individual": {"group": 0.92, "individual": 1.0, "similarity": 0.4, "random": 0.25},
        "similarity": {"group": 0.42, "individual": 0.41, "similarity": 1.0, "random": 0.25},
        "random": {"group": 0.27, "individual": 0.24, "similarity": 0.26, "random": 1.0},
    }
    return {
        "method": method,
        "checkpoint_tag": f"global_step{checkpoint_step}",
        "checkpoint_step": checkpoint_step,
        "recipe": "default",
        "seed": 1,
        "stages": {
            "random_rollouts": {
                "seconds": 9.0,
                "flops": 4e10,
                "rollouts_per_second": 4.1,
                "tokens_per_second": 52000.0,
                "share": {"step": 0.6, "evaluation": 0.35, "restore": 0.05},
            },
            "fit_init": {"seconds": 1.0, "flops": 1e9},
            "bootstrap_rollouts": {"seconds": 8.0, "flops": 4e10},
            "fit_final": {"seconds": 1.5, "flops": 1e9},
            "embed": {"seconds": 5.0, "flops": 3e10},
            "select": {"seconds": 0.7, "flops": 1e8},
        },
        "fit": fit_reports(),
        "selected_by_kind": {
            kind: {"selected": 250 if kind == favoured else 40 * index, "candidates": 400} for index, kind in enumerate(KINDS)
        },
        "influence_histogram": {"edges": [edge / 10 - 1 for edge in range(21)], "pool": pool, "selected": selected},
        "oracle": oracle_facts(),
        "overlap": {"share": share, "jaccard": share},
        "counts": {
            "candidates": 2400,
            "selected": 850,
            "budget_tokens": 110_000,
            "selected_tokens": 109_000,
            "minimum_source_share": [
                {"kind": "licence", "minimum_tokens": 5500, "selected_tokens": 15369, "reserved": False},
                {"kind": "man_page", "minimum_tokens": 22000, "selected_tokens": 21974, "reserved": True},
            ],
            "cluster_sizes": [900, 600, 400, 300, 150, 0, 50],
            "cluster_selected": [450, 0, 200, 150, 0, 0, 50],
        },
        "examples": example_documents(),
    }


def fit_reports() -> dict[str, Any]:
    """``provenance["fit"]`` of a round whose final fit started warm."""
    check = {"correlation": 0.613, "samples": 80, "kind": "first_position"}
    return {
        "init": {
            "relational": {"spearman": 0.51, "pearson": 0.55, "mse": 0.71, "mae": 0.6},
            "accepted": True,
            "sign_check": {"correlation": 0.702, "samples": 160, "kind": "dense"},
            "warm_start": None,
            "attempts": [{"epoch": 3}],
        },
        "final": {
            "accepted": True,
            "attempts": [{"epoch": 3}, {"epoch": 5}],
            "held_out_rollouts": 80,
            "relational": {"spearman": 0.58, "pearson": 0.62, "mse": 0.61, "mae": 0.55},
            "individual": {"spearman": 0.57, "pearson": 0.61, "mse": 0.62, "mae": 0.56},
            "constant": {"spearman": 0.0, "pearson": 0.0, "mse": 1.0, "mae": 0.8},
            "sign_check": check,
            "warm_start": {"from": 1, "spearman_before": 0.44, "spearman": 0.58, "spearman_from_scratch": 0.561},
        },
    }


def example_documents(count: int = 3) -> dict[str, list[dict[str, Any]]]:
    """``provenance["examples"]``; the second document chosen has no text, the third none that can be read."""
    sides = {"chosen": -1.0, "rejected": 1.0}
    examples = {
        side: [
            {
                "row": 100 + number,
                "shard": "shard_00000001",
                "shard_row": number,
                "score": sign * (0.9 - number / 10),
                "kind": KINDS[number],
                "num_tokens": 128,
                "text": f"The {side} document {number}.\n" + "It goes on for some lines. " * 12,
            }
            for number in range(count)
        ]
        for side, sign in sides.items()
    }
    examples["chosen"][1] |= {"text": None, "tokens": [5, 17, 3]}
    examples["chosen"][2] |= {"text": None, "kind": None}
    return examples


def oracle_facts(**changes: Any) -> dict[str, Any]:
    """``provenance["oracle"]`` of a first-order round with an adaptive budget, measured noise and a passed check."""
    facts = {
        "estimator": "first_order",
        "requested": "first_order",
        "learning_rate": 3e-4,
        "rollouts": {"random": 384, "bootstrap": 256},
        "validation": {"rollouts": 20, "spearman": 0.871, "floor": 0.5, "fell_back": False},
        "budget": {
            "kind": "adaptive",
            "maximum": 2000,
            "curve": [{"rollouts": count, "spearman": value} for count, value in ((128, 0.31), (256, 0.442), (384, 0.44))],
            "stopped": "patience",
        },
        "bootstrap": {"rollouts": 40, "distinct_samples": 19, "distinct_sets": 12, "max_uses": 40, "uses": bootstrap_uses()},
        "noise": [
            {"learning_rate": 3e-4, "rollouts": 32, "spearman": 0.913},
            {"learning_rate": 3e-5, "rollouts": 32, "spearman": 0.962},
        ],
    }
    return {**facts, **changes}


def bootstrap_uses() -> list[int]:
    """How many samples are in 1, 2, 3 ... of 40 rollouts of 5 samples: 19 samples, 200 places."""
    samples_by_uses = {1: 8, 2: 2, 4: 3, 9: 1, 12: 1, 35: 1, 40: 3}
    return [samples_by_uses.get(number, 0) for number in range(1, 41)]


def write_experiment(root: Path) -> list[Path]:
    """Four arms from one branch point: group, individual, similarity and random."""
    rounds = [full_provenance("group", 100), full_provenance("group", 300)]
    cheap = [
        {
            "method": "similarity",
            "checkpoint_step": step,
            "stages": {"embed": {"seconds": 5.0, "flops": 3e10}},
            "selected_by_kind": full_provenance("similarity", step)["selected_by_kind"],
        }
        for step in (100, 300)
    ]
    return [
        write_run(root / "group", "group", final_loss=5.28, provenances=rounds),
        write_run(root / "individual", "individual", final_loss=5.29, provenances=rounds),
        write_run(root / "similarity", "similarity", final_loss=5.31, provenances=cheap),
        write_run(root / "random", "random", final_loss=5.39),
    ]
