"""Compare oracle data influences with the obvious way to measure them, on one checkpoint and the same rollouts.

Builds a model, trains it for a few steps with the package's DeepSpeed engine and saves a checkpoint. The obvious way, written
plainly in obvious_oracle.py: before each rollout the state dict of model and optimizer is loaded from disk; one sequence per
step, AdamW over the model's parameters; after each step the reference examples, padded to the sequence length, in batches.
Reference examples have the lengths of instruction data: log-normal, median 180 tokens, none longer than the sequence; all
their tokens are scored.

Contenders take turns on the same rollouts; a rollout's time is that of its steps and of the losses after them, without L_0.
`exact` must give the obvious way's losses. A directional label is compared with one measured increment of the obvious way.
Prints Markdown rows. The default takes many minutes on one core; fewer --reference-samples or a
shorter --sequence-length take less, and show less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from obvious_oracle import Obvious

from megatron_groupmates.config import Config, config_from_dict
from megatron_groupmates.influence.labels import influence_labels
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.losses import IGNORED_LABEL, next_token_batch
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.parallel import ParallelGroups, initialize_parallel, read_launch_environment, resolve_precision

MODELS = {
    "11m": {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 4},
    "412m": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 8},
}
TRAINED_STEPS, TRAINED_BATCH, TRAINED_LENGTH = 8, 4, 256
MEDIAN_LENGTH, LENGTH_SPREAD = 180, 0.9
EXACT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


def make_config(arguments: argparse.Namespace, directory: Path) -> Config:
    """A run with DCLM's shape and optimizer."""
    return config_from_dict(
        {
            "run": {"output_dir": str(directory / "run"), "wandb_mode": "disabled"},
            "model": {
                **MODELS[arguments.model],
                "vocab_size": arguments.vocab_size,
                "sequence_length": arguments.sequence_length,
                "z_loss": 1e-4,
            },
            "data": {"pool": "none", "reference": "none"},
            "training": {
                "train_iters": 1000,
                "global_batch_size": TRAINED_BATCH,
                "micro_batch_size": TRAINED_BATCH,
                "precision": arguments.precision,
            },
            "optimizer": {"schedule": "constant"},
        }
    )


def make_tokens(config: Config, count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids int64 ``[count, length]``: Zipf's law over ids, another order of them in each of eight kinds of sequence."""
    generator = np.random.default_rng(seed)
    size = config.model.vocab_size
    weights = 1 / np.arange(1, size + 1)
    tokens = generator.choice(size, (count, length), p=weights / weights.sum())
    orders = np.stack([np.random.default_rng(kind).permutation(size) for kind in range(8)])
    return torch.from_numpy(orders[generator.integers(0, 8, count)[:, None], tokens])


def make_reference(config: Config, count: int, device: torch.device) -> ReferenceSet:
    """``count`` examples, padded to the sequence length."""
    limit = config.model.sequence_length
    lengths = np.random.default_rng(3).lognormal(np.log(MEDIAN_LENGTH), LENGTH_SPREAD, count).round().clip(2, limit)
    tokens, labels = next_token_batch(make_tokens(config, count, limit + 1, 4))
    outside = torch.arange(limit) >= torch.from_numpy(lengths)[:, None]
    return ReferenceSet(tokens=tokens.masked_fill(outside, 0).to(device), labels=labels.masked_fill(outside, IGNORED_LABEL).to(device))


def train_checkpoint(config: Config, groups: ParallelGroups, directory: Path) -> Path:
    """A checkpoint as the trainer writes it, after a few of its steps; the tag's directory."""
    from megatron_groupmates.model.gpt import build_gpt, token_logits
    from megatron_groupmates.model.losses import token_losses
    from megatron_groupmates.training import engine as checkpoints

    engine = checkpoints.build_engine(config, build_gpt(config, groups, 1, resolve_precision(config.training.precision)), groups)
    length = min(TRAINED_LENGTH, config.model.sequence_length)
    samples = make_tokens(config, TRAINED_STEPS * TRAINED_BATCH, length + 1, 5).to(groups.device)
    for batch in samples.split(TRAINED_BATCH):
        tokens, labels = next_token_batch(batch)
        engine.backward(token_losses(token_logits(engine.module, tokens), labels, groups.tensor_group).training_loss(config.model.z_loss))
        engine.step()
    progress = checkpoints.Progress(TRAINED_STEPS, len(samples), "", "")
    checkpoints.save(engine, config, directory, progress)
    return directory / checkpoints.checkpoint_tag(TRAINED_STEPS)


def exact_flops(config: Config, reference: ReferenceSet, length: int) -> float:
    """Model FLOPs of one exact rollout: those of the scored tokens and of no padding."""
    size, sequence = model_size(config), config.model.sequence_length
    lengths = (reference.labels != IGNORED_LABEL).sum(1).double()
    pairs = float((lengths * (lengths + 1)).sum()) / (sequence + 1)
    evaluation = 2 * size.matrix_parameters * float(lengths.sum()) + size.attention_flops_per_token * pairs
    return length * (size.training_flops_per_token * sequence + evaluation)


def clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(arguments: argparse.Namespace, config: Config, groups: ParallelGroups, tag_dir: Path) -> dict[str, Any]:
    """Seconds of each contender and what they measured, over interleaved repeats; asserts that they agree."""
    from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
    from megatron_groupmates.influence.directional import directional_labels
    from megatron_groupmates.influence.oracle import measure_rollouts
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt

    device, rate, length = groups.device, config.optimizer.learning_rate, arguments.rollout_length
    reference = make_reference(config, arguments.reference_samples, device)
    samples = make_tokens(config, arguments.repeats * length + arguments.labels, config.model.sequence_length + 1, 6).to(device)
    model = build_gpt(config, groups, 1, resolve_precision(config.training.precision))
    probe = Probe(model, config, groups, reference, arguments.reference_batch_size, DocumentRules(eot_id=0))
    probe.load(ZeroCheckpoint(tag_dir))
    obvious = Obvious(config, groups, tag_dir, reference, arguments.padded_batch_size)
    start = obvious.reference_loss()
    seconds: dict[str, list[float]] = {name: [] for name in ("obvious", "exact", "first_order", "directional")}
    losses: dict[str, list[Any]] = {name: [] for name in ("obvious", "exact", "first_order")}

    def timed(name: str, act: Callable[[], Any], share: float = 1.0) -> Any:
        started = clock(device)
        result = act()
        seconds[name].append((clock(device) - started) * share)
        return result

    probe.checkpoint_gradient()  # one for all rollouts and labels of a round
    dense = np.arange(arguments.repeats * length, len(samples))
    for repeat in range(arguments.repeats):
        rows = np.arange(repeat * length, (repeat + 1) * length)
        losses["obvious"].append([start, *timed("obvious", lambda rows=rows: obvious.rollout(samples[rows]))])
        for estimator in ("exact", "first_order"):
            # Twice the same rollout: the first takes in L_0, and the second, which is timed, must be its equal.
            marks: list[float] = []
            measured = measure_rollouts(
                probe,
                np.stack([rows, rows]),
                lambda numbers: samples[numbers],
                rate,
                estimator,
                on_rollout=lambda count, marks=marks: marks.append(clock(device)),
            )
            assert device.type == "cuda" or np.array_equal(measured[0], measured[1]), "a rollout depends on the one before it"
            seconds[estimator].append(marks[1] - marks[0])
            losses[estimator].append(measured[1])
        timed(
            "directional",
            lambda: directional_labels(probe, dense, lambda numbers: samples[numbers], rate, arguments.label_batch_size),
            1 / len(dense),
        )
    taken = np.arange(arguments.repeats * length)
    individual = directional_labels(probe, taken, lambda numbers: samples[numbers], rate, arguments.label_batch_size)
    found = {name: np.array(values) for name, values in losses.items()}
    error = float(np.abs(found["exact"] / found["obvious"] - 1).max())
    assert error < EXACT_TOLERANCE[arguments.precision], f"exact differs from the obvious way by {error:.1e}"
    labels = {name: influence_labels(values, "momentum_corrected", config.optimizer.beta1) for name, values in found.items()}
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "error": error,
        "spearman": {
            "exact": 1.0,
            "first_order": spearman(labels["first_order"], labels["exact"]),
            "directional": spearman(individual, labels["exact"].ravel()),
        },
        "flops": exact_flops(config, reference, length),
        "reference_tokens": reference.num_scored_tokens,
    }


def print_results(arguments: argparse.Namespace, config: Config, result: dict[str, Any]) -> None:
    """Settings and a table."""
    seconds, length = result["seconds"], arguments.rollout_length
    print(
        f"{model_size(config).parameters / 1e6:.1f} M parameters, vocabulary {config.model.vocab_size}, {arguments.precision}, sequence "
        f"{config.model.sequence_length}, rollouts of {length}, {arguments.reference_samples} reference examples of together "
        f"{result['reference_tokens']} tokens; medians of {arguments.repeats} rollouts; "
        f"exact and obvious losses differ by {result['error']:.1e} of themselves at most\n"
    )
    print("| estimator | unit | obvious, s | ours, s | ratio | Spearman with exact |\n|---|---|---|---|---|---|")
    for name in ("exact", "first_order"):
        agreement, ratio = result["spearman"][name], seconds["obvious"] / seconds[name]
        print(f"| {name} | rollout | {seconds['obvious']:.2f} | {seconds[name]:.2f} | {ratio:.1f} | {agreement:.2f} |")
    increment, label = seconds["obvious"] / length, seconds["directional"]
    print(f"| directional | label | {increment:.2f} | {label:.4f} | {increment / label:.1f} | {result['spearman']['directional']:.2f} |")
    achieved = result["flops"] / seconds["exact"] / 1e12
    utilisation = f", {achieved / arguments.peak_tflops:.1%} of {arguments.peak_tflops:g}" if arguments.device == "cuda" else ""
    print(f"\nexact: {achieved:.3g} model TFLOP/s{utilisation}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--model", choices=tuple(MODELS), default="11m")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rollout-length", type=int, default=2, help="steps of a rollout (default: 2; the paper's: 10)")
    parser.add_argument("--reference-samples", type=int, default=128, help="examples (default: 128, as in the paper)")
    parser.add_argument("--reference-batch-size", type=int, default=8, help="of ours, in sequence lengths of tokens (default: 8)")
    parser.add_argument("--padded-batch-size", type=int, default=8, help="examples in a batch of the obvious way (default: 8)")
    parser.add_argument("--labels", type=int, default=8, help="samples that get a directional label in each repeat (default: 8)")
    parser.add_argument("--label-batch-size", type=int, default=2, help="samples in one forward pass for them (default: 2)")
    parser.add_argument("--repeats", type=int, default=2, help="rollouts that every contender measures (default: 2)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU (default: 989, an H200 in bf16)")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = make_config(arguments, directory)
        groups = initialize_parallel(read_launch_environment({}), 1, seed=1, init_method=f"file://{directory / 'rendezvous'}")
        assert groups.device.type == arguments.device, f"no {arguments.device} device here"
        print_results(arguments, config, compare(arguments, config, groups, train_checkpoint(config, groups, directory)))


if __name__ == "__main__":
    main()
