"""The examples parse, have the published hyperparameters, and their scripts refuse what they do not know."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_groupmates.config import Config, ffn_hidden_size, parse_config, refresh_steps
from megatron_groupmates.integrations.settings import SECTIONS_OF_FILE
from tests.common.configs import tiny_config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FOLDERS = [ROOT / name for name in ("examples", "tools", "tests")]
SCRIPTS = sorted(path.relative_to(ROOT) for folder in FOLDERS for kind in ("sh", "sbatch") for path in folder.rglob(f"*.{kind}"))


def read(name: str) -> Config:
    return parse_config((EXAMPLES / name).read_text(), source=name)


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "heads", "ffn", "batch", "warmup"),
    [
        ("400m_4x", 1024, 24, 8, 2816, 512, 2000),
        ("1b_1x", 2048, 24, 16, 5632, 256, 5000),
        ("3b_1x", 2560, 32, 32, 6912, 256, 5000),
    ],
)
def test_dclm_examples_have_the_published_hyperparameters(
    name: str, hidden: int, layers: int, heads: int, ffn: int, batch: int, warmup: int
) -> None:
    config = read(f"dclm/{name}.yaml")
    model, optimizer = config.model, config.optimizer
    assert (model.hidden_size, model.num_layers, model.num_attention_heads, ffn_hidden_size(config)) == (hidden, layers, heads, ffn)
    assert (model.sequence_length, model.vocab_size, model.z_loss) == (2048, 50_432, 1e-4)
    assert (config.training.global_batch_size, optimizer.warmup_iters) == (batch, warmup)
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.weight_decay) == (3e-3, 3e-5, 0.033)
    assert (optimizer.schedule, optimizer.decay_iters) == ("cosine", None)
    assert config.training.gradient_clipping == 1.0
    assert config.selection.enabled and config.selection.ratio == 0.5
    oracle = config.oracle
    assert (oracle.rollout_length, oracle.num_random_rollouts, oracle.num_bootstrap_rollouts) == (10, 20_000, 20_000)
    assert (oracle.num_candidates, oracle.reference_samples) == (81_920, 128)


def test_the_quickstart_trains_past_two_refreshes() -> None:
    config = read("quickstart/config.yaml")
    assert len(refresh_steps(config)) == 2
    assert refresh_steps(config)[-1] < config.training.train_iters


def test_every_example_config_is_covered_here() -> None:
    names = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml")}
    assert names == {"dclm/400m_4x.yaml", "dclm/1b_1x.yaml", "dclm/3b_1x.yaml", "quickstart/config.yaml", "own_fork/selection.yaml"}


def test_the_file_for_a_users_own_checkout_completes_its_arguments() -> None:
    given = yaml.safe_load((EXAMPLES / "own_fork/selection.yaml").read_text())
    assert set(given) <= set(SECTIONS_OF_FILE)
    config = tiny_config(**given)
    assert (config.oracle.estimator, config.selection.ratio, config.data.reference) == ("first_order", 0.5, "data/flan/oracle")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_are_valid_bash_and_stop_at_errors(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("quickstart/run.sh", ["--nonsense"], "error: unknown argument --nonsense; see --help\n"),
        ("quickstart/run.sh", ["run"], "error: unknown argument run; see --help\n"),
        ("quickstart/run.sh", ["--output"], "error: --output needs a directory\n"),
        ("quickstart/run.sh", ["--set"], "error: --set needs section.key=value\n"),
        ("dclm/run.sh", ["c.yaml", "--nonsense", "x"], "error: unknown argument --nonsense\n"),
        ("dclm/run.sh", ["c.yaml", "--set"], "error: --set needs a value\n"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_set_up(script: str, arguments: list[str], message: str) -> None:
    done = run_script(script, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_usage_is_shown() -> None:
    done = run_script("quickstart/run.sh", "--help")
    assert done.returncode == 0 and "--output DIR" in done.stdout
    for arguments in ([], ["--set"]):
        done = run_script("dclm/run.sh", *arguments)
        assert done.returncode == 1 and "bash examples/dclm/run.sh CONFIG.yaml" in done.stderr
