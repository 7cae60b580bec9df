"""Compare ways to encode a pool's samples, of the lengths of web text, with the language model's hidden states.

- padded: every sample padded to the sequence length, in the pool's order; the obvious way.
- sorted: samples of like length together, padded to the longest of their batch.
- package: samples of like length one behind the other, no padding.

Lengths are log-normal around --median tokens, cut at the sequence length; with --median 0 all samples have that length, so
that there is nothing to save. A forward pass takes about as many tokens in each way. The ways take turns and
must give the same features to 1e-5. One thread; prints Markdown rows: medians of its processor time over the repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_groupmates.config import Config, config_from_dict
from megatron_groupmates.parallel import initialize_parallel, read_launch_environment

PASS_TOKENS = 4096
LENGTH_SPREAD = 0.9
TOLERANCE = 1e-5

Encode = Callable[[list[torch.Tensor]], torch.Tensor]


def make_config(arguments: argparse.Namespace) -> Config:
    """A run with a model of the size asked for."""
    return config_from_dict(
        {
            "run": {"output_dir": "unused", "wandb_mode": "disabled"},
            "model": {
                "num_layers": arguments.layers,
                "hidden_size": arguments.hidden_size,
                "num_attention_heads": arguments.hidden_size // 64,
                "vocab_size": 8192,
                "sequence_length": arguments.sequence_length,
            },
            "data": {"pool": "none", "reference": "none"},
            "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
        }
    )


def make_samples(arguments: argparse.Namespace) -> list[torch.Tensor]:
    """Token ids int64 ``[length + 1]`` of each sample: the last is only ever a target."""
    generator, limit = np.random.default_rng(0), arguments.sequence_length
    lengths = np.full(arguments.samples, limit)
    if arguments.median:
        lengths = generator.lognormal(np.log(arguments.median), LENGTH_SPREAD, arguments.samples).round().clip(2, limit).astype(int)
    return [torch.from_numpy(generator.integers(1, 8192, length + 1)) for length in lengths]


def ways(config: Config) -> dict[str, Encode]:
    """Each way by its name: samples -> features float32 ``[n, 2 * hidden_size]``."""
    from megatron_groupmates.influence.encoder import ProbeEncoder, encode_rows, token_batches
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt, hidden_states

    groups = initialize_parallel(read_launch_environment(os.environ), 1, seed=0)
    model = build_gpt(config, groups, 1, torch.float32)
    embedding = model.embedding.word_embeddings.weight.detach()
    size, limit = config.model.hidden_size, config.model.sequence_length

    def padded_passes(samples: list[torch.Tensor], passes: list[np.ndarray], whole: bool) -> torch.Tensor:
        features = torch.empty(len(samples), 2 * size)
        for numbers in passes:
            inputs = [samples[number][:-1] for number in numbers]
            tokens = pad_sequence([*inputs, torch.zeros(limit if whole else 1, dtype=torch.int64)], batch_first=True)[:-1]
            hidden = hidden_states(model, tokens)
            features[numbers, :size] = torch.stack([embedding[part].mean(0) for part in inputs])
            features[numbers, size:] = torch.stack([hidden[: len(part), place].mean(0) for place, part in enumerate(inputs)])
        return features

    def padded(samples: list[torch.Tensor]) -> torch.Tensor:
        step = max(1, PASS_TOKENS // limit)
        return padded_passes(samples, [np.arange(first, min(first + step, len(samples))) for first in range(0, len(samples), step)], True)

    def by_length(samples: list[torch.Tensor]) -> torch.Tensor:
        lengths = np.array([len(sample) - 1 for sample in samples])
        return padded_passes(samples, list(token_batches(lengths, PASS_TOKENS)), False)

    def package(samples: list[torch.Tensor]) -> torch.Tensor:
        encoder, rows = ProbeEncoder(model, size, DocumentRules(eot_id=0)), np.arange(len(samples))
        lengths = np.array([len(sample) for sample in samples])
        return torch.from_numpy(encode_rows(encoder, rows, lengths, lambda part: [samples[row] for row in part], 64 * (limit + 1)))

    return {"padded": padded, "sorted": by_length, "package": package}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24, help="samples to encode (default: %(default)s)")
    parser.add_argument("--median", type=int, default=600, help="their median tokens; 0: all are whole sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens that the model reads at most (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the model, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each way (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples(arguments)
    num_tokens = sum(len(sample) - 1 for sample in samples)
    seconds: dict[str, list[float]] = {}
    encoders = ways(make_config(arguments))
    for _ in range(arguments.repeats):
        expected: torch.Tensor | None = None
        for name, encode in encoders.items():
            start = time.process_time()
            found = encode(samples)
            seconds.setdefault(name, []).append(time.process_time() - start)
            expected = found if expected is None else expected
            if (worst := float((found - expected).abs().max())) > TOLERANCE:
                sys.exit(f"the features of {name} differ by {worst:.1e}")
    print(
        f"{len(samples)} samples, {num_tokens:,} tokens, {num_tokens / len(samples) / arguments.sequence_length:.0%} of whole sequences\n"
    )
    print("| way | seconds | tokens/s | against padded |\n|---|---|---|---|")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {num_tokens / median:,.0f} | {medians['padded'] / median:.2f} |")


if __name__ == "__main__":
    main()
