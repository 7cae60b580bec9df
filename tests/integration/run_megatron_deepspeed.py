"""Group-MATES in a real checkout of Megatron-DeepSpeed, on CPU, from raw text to the end of training.

    python tests/integration/run_megatron_deepspeed.py --checkout MEGATRON_DEEPSPEED --python FORK_ENVIRONMENT/bin/python \
        --output DIRECTORY

For each way in (the entry module and the patch): train, one selection round of the server, adoption at a step boundary, a
kill, a resume, the end; then the same run without interruption. Checked are its losses, its last weights bit by bit, and
every sample that the trainer has seen against the trace command. With no --group-mates argument both ways in give the losses
and weights of the checkout's own pretrain_gpt.py on its own data, bit by bit.

The checkout itself stays as it is. In the scratch copies .view is .reshape in CoreAttention, which newer torch needs on a
CPU, and get_batch writes down the samples it gets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_groupmates.checkpoint.unpickle import load

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "patches/megatron-deepspeed/group-mates.patch"
ENTRY = ("--module", "megatron_groupmates.integrations.megatron_deepspeed")
SCRIPT = ("pretrain_gpt.py",)
RANKS, BATCH, MICRO_BATCH, WORKERS, SEQUENCE, VOCABULARY = 2, 4, 1, 2, 64, 384
STEPS, REFRESH, SAVE_INTERVAL, KILL_AFTER = 40, 4, 4, 10
TIMEOUT_SECONDS = 900.0
DEEPSPEED_CONFIG = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "steps_per_print": 1000,
    "zero_optimization": {"stage": 1},
}
SELECTION = {
    "selection": {
        "mode": "blocking",
        "ratio": 0.5,
        "first_refresh_step": REFRESH,
        "refresh_interval": 100,
        "num_clusters": 4,
        "wait_timeout_seconds": TIMEOUT_SECONDS,
    },
    "oracle": {
        "estimator": "exact",
        "rollout_length": 2,
        "num_random_rollouts": 8,
        "num_bootstrap_rollouts": 4,
        "num_candidates": 32,
        "reference_samples": 4,
        "noise_rollouts": 0,
        "learning_rate": 1e-4,
    },
    "relational": {"embedding_dim": 8, "epochs": 2},
    "server": {"tensor_model_parallel_size": 1},
}
RECORD_SAMPLES = """
    if mpu.get_tensor_model_parallel_rank() == 0:
        import hashlib, json
        seen = [hashlib.sha256(row.tobytes()).hexdigest() for row in tokens_.cpu().numpy().astype('<u4')]
        with open(f'{args.save}/seen-{mpu.get_data_parallel_rank()}.jsonl', 'a') as file:
            file.write(json.dumps([args.curr_iteration, seen]) + chr(10))
"""
# Imported by the checkout's vision models only: any name will do.
TORCHVISION = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


class Failed(Exception):
    """A check that does not hold, or a process that ended otherwise than it should."""


class Fork:
    """A scratch copy of the checkout and how to train with it.

    Args:
        checkout: what to copy.
        python: of the checkout's environment.
        directory: scratch directory of this copy.
        patched: apply our patch.
        tensor_parallel: tensor-parallel size of its runs.
        port: for its ranks to meet.
    """

    def __init__(self, checkout: Path, python: Path, directory: Path, patched: bool, tensor_parallel: int, port: int) -> None:
        self.directory, self._python, self._tensor_parallel, self._port = directory / "checkout", python, tensor_parallel, port
        shutil.copytree(checkout, self.directory, symlinks=True)
        if patched:
            run(["git", "apply", "-v", str(PATCH)], self.directory, directory / "apply.log")
        change(self.directory / "megatron/model/transformer.py", _reshape_in_core_attention)
        change(self.directory / "pretrain_gpt.py", _record_samples)
        stand_in = directory / "stand-in/torchvision"
        if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
            stand_in.mkdir(parents=True)
            for name in ("__init__.py", "transforms.py", "datasets.py"):
                (stand_in / name).write_text(TORCHVISION)
        self._config = directory / "deepspeed.json"
        self._config.write_text(json.dumps(DEEPSPEED_CONFIG))
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))},
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PYTHONPATH": f"{ROOT}:{stand_in.parent}",
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }

    def start(self, start: Sequence[str], save: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
        """Begin training; ``start`` is what the deepspeed launcher runs."""
        save.mkdir(parents=True, exist_ok=True)
        launcher = [self._python.parent / "deepspeed", "--num_accelerators", str(RANKS), "--master_port", str(self._port)]
        return launch([*launcher, *start, *self._arguments(save), *more], self.directory, log, self._environment)

    def train(self, start: Sequence[str], save: Path, log: Path, *more: str) -> dict[int, str]:
        """Train to the end; the losses by step, as printed."""
        finish(self.start(start, save, log, *more), log)
        return losses(log)

    def write_corpus(self, prefix: Path) -> None:
        """Random tokens in the checkout's own format."""
        program = (
            "import numpy, sys, torch; from megatron.data.indexed_dataset import MMapIndexedDatasetBuilder as Builder\n"
            "builder, generator = Builder(sys.argv[1] + '.bin', dtype=numpy.uint16), numpy.random.default_rng(0)\n"
            "for _ in range(200):\n"
            f"    builder.add_item(torch.from_numpy(generator.integers(0, {VOCABULARY - 1}, size=200).astype(numpy.int32)))\n"
            "    builder.end_document()\n"
            "builder.finalize(sys.argv[1] + '.idx')"
        )
        environment = self._environment | {"PYTHONPATH": f"{self.directory}:{self._environment['PYTHONPATH']}"}
        run([self._python, "-c", program, str(prefix)], self.directory, prefix.with_suffix(".log"), environment)

    def _arguments(self, save: Path) -> list[str]:
        return (
            f"--deepspeed --deepspeed_config {self._config} --zero-stage 1 --no-pipeline-parallel --pipeline-model-parallel-size 1 "
            f"--tensor-model-parallel-size {self._tensor_parallel} --distributed-backend gloo --use-cpu-initialization "
            "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion "
            "--no-query-key-layer-scaling --num-layers 2 --hidden-size 64 --num-attention-heads 4 "
            f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --attention-dropout 0 --hidden-dropout 0 "
            f"--micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH} --train-iters {STEPS} --lr 1e-3 --min-lr 1e-4 "
            "--lr-decay-style cosine --weight-decay 0.1 --tokenizer-type NullTokenizer "
            f"--vocab-size {VOCABULARY - 1} --make-vocab-size-divisible-by 8 --log-interval 1 --eval-iters 0 --eval-interval 1000 "
            f"--save {save} --load {save} --save-interval {SAVE_INTERVAL} --num-workers {WORKERS} --seed 7"
        ).split()


def _reshape_in_core_attention(source: str) -> str:
    begin, end = source.index("class CoreAttention"), source.index("class FlashSelfAttention(")
    return source[:begin] + source[begin:end].replace(".view(", ".reshape(") + source[end:]


def _record_samples(source: str) -> str:
    begin = source.index("    tokens_ = data_b['text'].long()\n", source.index("def get_batch("))
    end = source.index("\n", begin)
    return source[:end] + RECORD_SAMPLES + source[end:]


def change(path: Path, edit: Callable[[str], str]) -> None:
    """Replace a file's text by ``edit`` of it."""
    path.write_text(edit(path.read_text()))


def run(command: Sequence[str | Path], cwd: Path, log: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end; its output, also in ``log``."""
    finish(launch(command, cwd, log, environment), log)
    return log.read_text()


def launch(command: Sequence[str | Path], cwd: Path, log: Path, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to ``log``."""
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a process that must succeed."""
    try:
        code = process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        stop(process)
        code = -1
    if code:
        raise Failed(f"exit code {code} of {process.args}:\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started, as a host that fails does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def await_step(process: subprocess.Popen[bytes], log: Path, step: int, server: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until training has printed the loss of ``step``, as long as the server it waits for has not failed."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while step not in losses(log):
        if process.poll() is not None or time.monotonic() > deadline or (server is not None and server.poll()):
            raise Failed(f"training does not reach step {step} (see the server's log too):\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.02)


def losses(log: Path) -> dict[int, str]:
    """Loss by step, as the checkout prints it."""
    found = re.findall(r"iteration\s+(\d+)/.* lm loss: (\S+) ", log.read_text(errors="replace"))
    return {int(step): loss for step, loss in found}


def check(holds: bool, what: str) -> None:
    """Raise :class:`Failed` with ``what`` where it does not hold."""
    if not holds:
        raise Failed(what)


def prepare_data(directory: Path) -> tuple[Path, Path]:
    """Raw text, a tokenizer, and with our tools a pool and a held-out pool of it."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), size=generator.integers(2, 9))) for _ in range(200)]
    for name, count in (("pool", 400), ("held-out", 40)):
        (directory / "raw" / name).mkdir(parents=True)
        texts = (" ".join(generator.choice(words, size=generator.integers(20, 120))) for _ in range(count))
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (directory / "raw" / name / "0.jsonl").write_text("".join(lines))
    tool(directory, "train_tokenizer", "--input", directory / "raw/pool", "--output", directory / "tokenizer", "--vocab-size", VOCABULARY)
    for name in ("pool", "held-out"):
        given = ("--input", directory / "raw" / name, "--output", directory / name, "--tokenizer", directory / "tokenizer")
        tool(directory, "preprocess_dclm", *given, "--pack", SEQUENCE + 1, "--workers", 1)
    return directory / "pool", directory / "held-out"


def tool(directory: Path, name: str, *arguments: object) -> None:
    """Run one of our tools."""
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, arguments)]
    run(command, ROOT, directory / f"{name}.log")


def check_off_is_off(checkout: Path, python: Path, directory: Path, port: int) -> dict[int, str]:
    """Without our arguments patch and entry module train on the checkout's own data as the checkout does, bit by bit; the losses."""
    corpus = directory / "corpus_text_document"
    directory.mkdir()
    plain = Fork(checkout, python, directory / "unpatched", patched=False, tensor_parallel=2, port=port)
    patched = Fork(checkout, python, directory / "patched", patched=True, tensor_parallel=2, port=port)
    plain.write_corpus(corpus)
    own_data = ("--data-path", str(corpus), "--split", "100,0,0", "--data-impl", "mmap", "--exit-interval", "6")
    results = {}
    for name, fork, start in (("pretrain_gpt.py", plain, SCRIPT), ("patched", patched, SCRIPT), ("entry module", plain, ENTRY)):
        save = directory / name.replace(" ", "-")
        results[name] = fork.train(start, save, directory / f"{save.name}.log", *own_data), save / "global_step6"
    expected, weights = results.pop("pretrain_gpt.py")
    check(len(expected) == 6, f"losses of the checkout: {expected}")
    for name, (found, own_weights) in results.items():
        check(found == expected, f"losses without arguments, {name}: {found}, the checkout's {expected}")
        check_same_weights(weights, own_weights)
    return expected


def check_same_weights(first: Path, second: Path) -> None:
    """The model states of two checkpoints are the same bit by bit."""
    names = sorted(path.name for path in first.glob("mp_rank_*_model_states.pt"))
    check(bool(names), f"no model states in {first}")
    for name in names:
        weights = [dict(tensors_of(load(path / name)["module"])) for path in (first, second)]
        check(weights[0].keys() == weights[1].keys() and len(weights[0]) > 10, f"{name}: other parameters")
        for key, tensor in weights[0].items():
            check(torch.equal(tensor, weights[1][key]), f"{key} differs between {first} and {second}")


def tensors_of(tree: object, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries, with where they are."""
    if isinstance(tree, torch.Tensor):
        return [(path, tree)]
    items = tree.items() if isinstance(tree, dict) else ()
    return [found for key, value in items for found in tensors_of(value, f"{path}/{key}")]


class Scenario:
    """One way in: train, select, adopt, be killed, resume, finish; and the same without interruption."""

    def __init__(self, start: Sequence[str], fork: Fork, directory: Path, pool: Path, data_parallel: int) -> None:
        self._start, self._fork, self._directory, self._data_parallel = start, fork, directory, data_parallel
        self.selection = directory / "selection"
        self._pool = pool

    def arguments(self, selection: Path, settings: Path) -> list[str]:
        """The four arguments that switch Group-MATES on."""
        given = {"selection": selection, "pool": self._pool, "config": settings, "poll-interval": 1}
        return [word for name, value in given.items() for word in (f"--group-mates-{name}", str(value))]

    def run(self, held_out: Path, server_port: int) -> dict[int, str]:
        """The whole of it; the losses by step."""
        settings = self._directory / "group_mates.yaml"
        settings.write_text(yaml.safe_dump({"data": {"reference": str(held_out)}, **SELECTION}))
        save, log = self._directory / "save", self._directory / "train.log"
        arguments = self.arguments(self.selection, settings)
        trainer, server = self._fork.start(self._start, save, log, *arguments), None
        try:
            await_step(trainer, log, REFRESH)
            server = self._serve(save, server_port)
            await_step(trainer, log, KILL_AFTER, server)
            stop(trainer)
            finish(server, self._directory / "server.log")
        finally:
            for process in (trainer, server):
                if process is not None and process.poll() is None:
                    stop(process)
        found = losses(log)
        check(max(found) < STEPS, "training was over before it could be killed")
        resumed = self._fork.train(self._start, save, self._directory / "resumed.log", *arguments)
        self.killed_after, self.resumed_from = max(found), min(resumed) - 1
        check(KILL_AFTER - SAVE_INTERVAL < self.resumed_from <= self.killed_after, f"resumed from step {self.resumed_from}")
        again = {step: loss for step, loss in resumed.items() if step in found and found[step] != loss}
        check(not again, f"steps that the resumed run repeats have other losses: {again}")
        found |= resumed
        self._check_adoption()

        straight = self._directory / "uninterrupted"
        shutil.copytree(self.selection, straight / "selection")
        whole = self._fork.train(self._start, straight / "save", straight / "train.log", *self.arguments(straight / "selection", settings))
        check(whole == found, f"losses {found}, without interruption {whole}")
        check_same_weights(save / f"global_step{STEPS}", straight / f"save/global_step{STEPS}")
        self._check_samples(save, straight / "save")
        state = json.loads((self.selection / "training.json").read_text())
        check(state["state"] == "finished" and state["step"] == STEPS, f"training.json says {state}")
        return found

    @property
    def adoption(self) -> dict[str, int]:
        """The log entry of the server's generation."""
        entries = [json.loads(line) for line in (self.selection / "log.jsonl").read_text().splitlines()]
        return next(entry for entry in entries if entry["generation"] == 1)

    def _serve(self, save: Path, port: int) -> subprocess.Popen[bytes]:
        """Start one round of the server on the first checkpoint; training goes on while the server still tidies up."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (save / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1", "--master_port", str(port), "--module"]
        command += ["megatron_groupmates", "serve", "--config", str(self.selection / "config.yaml"), "--once"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return launch(command, ROOT, self._directory / "server.log", environment)

    def _check_adoption(self) -> None:
        first = (REFRESH + 1) * BATCH + 2 * WORKERS * MICRO_BATCH * self._data_parallel - BATCH
        expected = -(-first // BATCH) * BATCH
        check(self.adoption["effective_sample"] == expected, f"adopted from sample {self.adoption['effective_sample']}, not {expected}")

    def _check_samples(self, *saves: Path) -> None:
        """Every sample that any run has been given is the one that the trace command says."""
        command = [sys.executable, "-m", "megatron_groupmates", "trace", str(self.selection), "--start", "0", "--stop", str(STEPS * BATCH)]
        traced = [json.loads(line) for line in run(command, ROOT, self._directory / "trace.log").splitlines()]
        generations = [line["generation"] for line in traced]
        effective = self.adoption["effective_sample"]
        check(generations == [0] * effective + [1] * (STEPS * BATCH - effective), f"trace: generations {generations}")
        micro = MICRO_BATCH * self._data_parallel
        for save in saves:
            for rank in range(self._data_parallel):
                self._check_rank(save / f"seen-{rank}.jsonl", [line["tokens_sha256"] for line in traced], rank * MICRO_BATCH, micro)

    def _check_rank(self, path: Path, expected: list[str], offset: int, micro: int) -> None:
        steps_seen, place = set(), -1
        previous = None
        for step, seen in map(json.loads, path.read_text().splitlines()):
            place = place + 1 if step == previous and place + 1 < BATCH // micro else 0
            previous = step
            steps_seen.add(step)
            first = step * BATCH + place * micro + offset
            check(seen == expected[first : first + MICRO_BATCH], f"{path}: step {step}, micro-batch {place} is not what trace says")
        check(steps_seen == set(range(STEPS)), f"{path}: steps {sorted(steps_seen)}")


def summary(way: str, scenario: Scenario, found: dict[int, str], tensor_parallel: int) -> str:
    """A few lines for people."""
    sample = scenario.adoption["effective_sample"]
    first = sample // BATCH + 1
    shown = ", ".join(f"step {step} {found[step]}" for step in (1, REFRESH, first, STEPS))
    return (
        f"{way} (tensor parallel {tensor_parallel}, data parallel {RANKS // tensor_parallel})\n"
        f"  lm loss: {shown}\n"
        f"  generation 1, selected from the checkpoint of step {REFRESH}, in force from sample {sample} (step {first})\n"
        f"  killed after step {scenario.killed_after}, resumed from step {scenario.resumed_from}: losses and last weights are those of a "
        f"run without\n  interruption, bit by bit; all {STEPS * BATCH} samples are what trace says"
    )


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="Megatron-DeepSpeed at 4efb479d; it is copied")
    parser.add_argument("--python", type=Path, required=True, help="python of the checkout's environment, with deepspeed beside it")
    parser.add_argument("--output", type=Path, required=True, help="scratch directory, must not exist yet")
    parser.add_argument("--port", type=int, default=29870, help="first of three ports for ranks to meet (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=("off", "entry", "patch"), default=["off", "entry", "patch"], help="what to run")
    options = parser.parse_args()
    output, python = options.output.resolve(), options.python.absolute()
    output.mkdir(parents=True)
    started = time.monotonic()
    try:
        if "off" in options.ways:
            found = check_off_is_off(options.checkout, python, output / "off", options.port)
            print(f"no argument\n  losses ({found[1]} ... {found[6]}) and weights of patch and entry module are the checkout's, bit by bit")
        if {"entry", "patch"} & set(options.ways):
            pool, held_out = prepare_data(output)
        for way, start, tensor_parallel in (("entry", ENTRY, 1), ("patch", SCRIPT, 2)):
            if way in options.ways:
                fork = Fork(options.checkout, python, output / way, way == "patch", tensor_parallel, options.port + 1)
                scenario = Scenario(start, fork, output / way, pool, RANKS // tensor_parallel)
                found = scenario.run(held_out, options.port + 2)
                print(summary({"entry": "entry module"}.get(way, way), scenario, found, tensor_parallel), flush=True)
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    print(f"all checks hold ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
