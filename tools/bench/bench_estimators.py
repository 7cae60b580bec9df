"""Which oracle estimator fits the best relational model for its FLOPs: exact, first_order, or directional with exact rollouts.

As the quickstart does, gathers text of many kinds on this machine, trains a tokenizer and a small model with the package's
trainer, and takes its checkpoint in the middle of the run. Then, at the run's learning rate and at a lower one: measures exact
rollouts of candidates that no fit sees; lets each estimator measure as many rollouts as several budgets of FLOPs pay for; fits
the relational model to them with several seeds; and reports the rank correlation of its predictions with the exact,
momentum-corrected increments of the held-out rollouts: the median over the seeds, the lowest and the highest, and how many
seeds gave no model because the fit's sign check refused it. FLOPs are those of measuring, without the fit. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import yaml

from megatron_groupmates.config import Config, config_from_dict, learning_rate
from megatron_groupmates.influence.fit import fit_relational
from megatron_groupmates.influence.labels import Standardiser, influence_labels
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.oracle import draw_random_rollouts
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.parallel import ParallelGroups, initialize_parallel, read_launch_environment
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.recipe import resolve_recipe

ROOT = Path(__file__).resolve().parents[2]
ESTIMATORS = ("exact", "first_order", "directional")
LENGTH = 10
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row of the table; ``spearman`` has an entry for each seed of the fit, nan where it was refused."""

    rate: float
    estimator: str
    rollouts: int
    flops: float
    spearman: list[float]

    def row(self) -> str:
        low, middle, high = self.quantiles()
        figures = f"{self.flops / 1e9:,.0f} | {self.rollouts} | {middle:.3f} | {low:.3f} to {high:.3f}"
        return f"| {self.rate:g} | {self.estimator} | {figures} | {np.isnan(self.spearman).sum()} of {len(self.spearman)} |"

    def quantiles(self) -> np.ndarray:
        """Lowest, median and highest of the fits that were accepted; nan without any."""
        accepted = [value for value in self.spearman if not np.isnan(value)]
        return np.quantile(accepted, (0, 0.5, 1)) if accepted else np.full(3, np.nan)


def prepare_data(directory: Path) -> None:
    """The quickstart's pool and reference set, smaller."""
    tools, raw, tokenizer = ROOT / "tools", directory / "raw", directory / "tokenizer"
    commands = [["gather_documents.py", "--output", raw, "--max-bytes", "3M", "--reference-bytes", "200K", "--evaluation-bytes", "50K"]]
    commands.append(["train_tokenizer.py", "--input", raw / "pool", "--output", tokenizer, "--vocab-size", "2048"])
    for part in ("pool", "reference"):
        commands.append(
            ["preprocess_dclm.py", "--input", raw / part, "--output", directory / part, "--tokenizer", tokenizer, "--pack", "129"]
        )
    for script, *arguments in commands:
        subprocess.run([sys.executable, tools / script, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make_config(data: Path, output: Path, steps: int) -> Config:
    """The quickstart's model without selection, trained by smaller batches: more steps for the same work."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart" / "config.yaml").read_text())
    tree["run"] |= {"output_dir": str(output), "wandb_mode": "disabled"}
    tree["data"] = {"pool": str(data / "pool"), "reference": str(data / "reference"), "num_workers": 0}
    tree["training"] |= {"train_iters": steps, "precision": "fp32", "global_batch_size": BATCH, "micro_batch_size": BATCH}
    # The learning rate of the middle of a run: the decay lies behind the checkpoint.
    tree["optimizer"] |= {"decay_iters": 2 * steps, "warmup_iters": min(20, steps // 2)}
    tree["parallel"]["tensor_model_parallel_size"] = 1
    tree["selection"]["enabled"] = False
    return config_from_dict(tree)


class Experiment:
    """A loaded probe with candidates to fit on, and others to judge the fits by."""

    def __init__(self, arguments: argparse.Namespace, config: Config, groups: ParallelGroups, tag_dir: Path) -> None:
        from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
        from megatron_groupmates.influence.encoder import ProbeEncoder, encode_rows
        from megatron_groupmates.influence.probe import Probe
        from megatron_groupmates.model.batch import DocumentRules
        from megatron_groupmates.model.gpt import build_gpt
        from megatron_groupmates.server.context import sample_reader

        self.arguments, self.config = arguments, config
        pool, sequence = PoolIndex.open(config.data.pool), config.model.sequence_length
        rules = DocumentRules.of(config, pool.eot_id)
        reference = load_reference(PoolIndex.open(config.data.reference), sequence, arguments.reference_samples, groups.device)
        model = build_gpt(config, groups, 1, torch.float32)
        self.probe = Probe(model, config, groups, reference, arguments.reference_samples, rules)
        self.probe.load(ZeroCheckpoint(tag_dir))
        read = sample_reader(pool, groups.device, sequence)
        count = arguments.candidates + arguments.held_out_candidates
        rows = np.random.default_rng(1).choice(pool.num_samples, count, replace=False)
        encoder = ProbeEncoder(model, config.model.hidden_size, rules)
        features = encode_rows(encoder, rows, pool.lengths[rows], read, 64 * (sequence + 1))
        half = {"both": slice(None), "embeddings": slice(None, config.model.hidden_size), "hidden": slice(config.model.hidden_size, None)}
        self.features = np.ascontiguousarray(features[:, half[arguments.features]])
        self.read_samples = lambda numbers: read(rows[numbers])
        forward = model_size(config).forward_flops_per_token
        self.sample_flops, self.reference_flops = forward * sequence, forward * self.probe.num_reference_tokens
        largest = max(self.affordable(estimator, 1e9 * max(arguments.gflops)) for estimator in ESTIMATORS)
        self.rollouts = draw_random_rollouts(largest, LENGTH, arguments.candidates, seed=2)
        self.held_out = draw_random_rollouts(arguments.held_out, LENGTH, arguments.held_out_candidates, seed=3) + arguments.candidates

    def affordable(self, estimator: str, flops: float) -> int:
        """Rollouts that ``flops`` pay for."""
        fixed, each = self.costs(estimator)
        return max(0, int((flops - fixed) / each))

    def costs(self, estimator: str) -> tuple[float, float]:
        """FLOPs that come once, and of each rollout. A backward pass counts as two forward passes."""
        steps = 3 * self.sample_flops * LENGTH
        if estimator == "first_order":
            return 3 * self.reference_flops, steps
        rollout = steps + self.reference_flops * LENGTH
        if estimator == "exact":
            return self.reference_flops, rollout
        # The reference gradient, two losses of each candidate, and what exact rollouts need.
        return (3 + 1) * self.reference_flops + 2 * self.sample_flops * self.arguments.candidates, rollout

    def labels(self, rollouts: np.ndarray, rate: float, estimator: str) -> np.ndarray:
        """Momentum-corrected influences ``[R, T]`` of ``rollouts``."""
        from megatron_groupmates.influence.oracle import measure_rollouts

        losses = measure_rollouts(self.probe, rollouts, self.read_samples, rate, estimator)
        return influence_labels(losses, "momentum_corrected", self.config.optimizer.beta1)

    def qualities(self, labels: np.ndarray, targets: np.ndarray, individual: np.ndarray | None) -> list[float]:
        """For each seed of the fit, the rank correlation of its predictions for the held-out rollouts with ``targets``; nan if refused."""
        found = []
        for seed in range(self.arguments.fit_seeds):
            rollouts, settings = self.rollouts[: len(labels)], resolve_recipe(self.config).fit
            model = fit_relational(self.features, rollouts, labels, settings, seed, individual=individual).model
            if model is None:
                found.append(float("nan"))
                continue
            with torch.no_grad():
                found.append(spearman(model(torch.from_numpy(self.features[self.held_out])).numpy(), targets))
        return found

    def run(self, rate: float) -> Iterator[Outcome | str]:
        """All estimators and budgets at one learning rate, and at the end what the labels themselves are worth."""
        from megatron_groupmates.influence.directional import directional_labels

        targets = _standardised(self.labels(self.held_out, rate, "exact"))
        largest = 1e9 * max(self.arguments.gflops)
        measured = {name: self.labels(self.rollouts[: self.affordable(name, largest)], rate, name) for name in ("exact", "first_order")}
        numbers = np.arange(self.arguments.candidates)
        dense = directional_labels(self.probe, numbers, self.read_samples, rate, 64)
        for budget in self.arguments.gflops:
            for estimator in ESTIMATORS:
                count = self.affordable(estimator, 1e9 * budget)
                fixed, each = self.costs(estimator)
                labels = measured["first_order" if estimator == "first_order" else "exact"][:count]
                individual = dense if estimator == "directional" else None
                yield Outcome(rate, estimator, count, fixed + each * count, self.qualities(labels, targets, individual))
        count = len(measured["exact"])
        exact = _standardised(measured["exact"])
        first_order = spearman(_standardised(measured["first_order"][:count]), exact)
        directional = spearman(_standardised(dense[self.rollouts[:count]]), exact)
        yield f"learning rate {rate:g}, {count} rollouts: first_order {first_order:.3f}, directional {directional:.3f}"


def _standardised(labels: np.ndarray) -> np.ndarray:
    return Standardiser.fit(labels, "per_position").apply(labels)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Rank correlation against FLOPs, a panel for each learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({outcome.rate for outcome in outcomes}, reverse=True)
    figure, panels = pyplot.subplots(1, len(rates), figsize=(5 * len(rates), 4), sharey=True, squeeze=False, layout="constrained")
    for panel, rate in zip(panels[0], rates, strict=True):
        for estimator in ESTIMATORS:
            chosen = [outcome for outcome in outcomes if (outcome.rate, outcome.estimator) == (rate, estimator)]
            low, middle, high = np.stack([outcome.quantiles() for outcome in chosen], axis=1)
            spread = np.stack([middle - low, high - middle])
            panel.errorbar([outcome.flops for outcome in chosen], middle, spread, marker="o", capsize=3, label=estimator)
        panel.set(xscale="log", xlabel="FLOPs of measuring", title=f"learning rate {rate:g}")
    panels[0, 0].set_ylabel("Spearman with held-out exact increments")
    panels[0, 0].legend()
    figure.savefig(path, dpi=150)


def train_checkpoint(config: Config, groups: ParallelGroups) -> Path:
    """Train, and the directory of the last checkpoint."""
    from megatron_groupmates.training.engine import checkpoint_tag
    from megatron_groupmates.training.loop import train
    from megatron_groupmates.utils.run_directory import write_run_config

    write_run_config(config)
    train(config, groups)
    return Path(config.run.output_dir) / "checkpoints" / checkpoint_tag(config.training.train_iters)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="keep the text here, or take it from here (default: a temporary directory)")
    parser.add_argument("--train-steps", type=int, default=400, help=f"of {BATCH} sequences, to the checkpoint (default: 400)")
    parser.add_argument("--low-learning-rate", type=float, default=3e-4, help="beside the run's own (default: 3e-4)")
    parser.add_argument("--candidates", type=int, default=500, help="samples that rollouts and dense labels are of (default: 500)")
    parser.add_argument("--held-out-candidates", type=int, default=250, help="samples that the held-out rollouts are of (default: 250)")
    parser.add_argument("--held-out", type=int, default=40, help="held-out exact rollouts (default: 40)")
    parser.add_argument("--reference-samples", type=int, default=32, help="reference examples (default: 32)")
    parser.add_argument("--gflops", type=float, nargs="+", default=[300, 600, 1200], metavar="G", help="budgets (default: 300 600 1200)")
    parser.add_argument(
        "--features",
        choices=("both", "embeddings", "hidden"),
        default="both",
        help="of the probe that the fit reads: mean embeddings, mean last hidden states, or both as in a run (default)",
    )
    parser.add_argument("--fit-seeds", type=int, default=3, help="fits of each budget (default: 3)")
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    outcomes, agreements = [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = arguments.data or directory / "data"
        if not (data / "reference").exists():
            prepare_data(data)
        groups = initialize_parallel(read_launch_environment({}), 1, seed=1, init_method=f"file://{directory / 'rendezvous'}")
        torch.set_num_threads(1)
        config = make_config(data, directory / "run", arguments.train_steps)
        experiment = Experiment(arguments, config, groups, train_checkpoint(config, groups))
        if (fewest := min(experiment.affordable(estimator, 1e9 * min(arguments.gflops)) for estimator in ESTIMATORS)) < 4:
            sys.exit(f"--gflops: {min(arguments.gflops):g} GFLOP pay for {fewest} rollouts, a fit takes 4; give more")
        print(f"reference loss {experiment.probe.reference_loss():.3f}\n")
        print("| learning rate | estimator | GFLOP | rollouts | Spearman | range | refused |\n|---|---|---|---|---|---|---|", flush=True)
        for rate in (learning_rate(config, arguments.train_steps), arguments.low_learning_rate):
            for found in experiment.run(rate):
                if isinstance(found, Outcome):
                    outcomes.append(found)
                    print(found.row(), flush=True)
                else:
                    agreements.append(found)
    print("\nSpearman of each estimator's labels with the exact ones of the same rollouts:", *agreements, sep="\n")
    if arguments.plot:
        plot(outcomes, arguments.plot)


if __name__ == "__main__":
    main()
