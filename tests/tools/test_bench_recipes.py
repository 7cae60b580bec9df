"""The experiment behind ``recipe: default``: its statistics, its pools with families, its arms and its table."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from tests.pool.helpers import make_pool
from tools.bench import bench_recipes
from tools.bench.recipes_adapter import ALTERNATIVES, PAPER, Choices, make_arms
from tools.bench.recipes_families import FAMILIES_FILE, family_counts, noisy_copy, plan_pool, write_pool
from tools.bench.recipes_job import Task
from tools.bench.recipes_oracle import LENGTH, exact_for_same_flops
from tools.bench.recipes_report import HEADER, compare, conclusions, kinds_table, plot, table, to_json
from tools.bench.recipes_scale import SCALES
from tools.bench.recipes_statistics import interval, paired_interval, student_quantile

DEFAULT = Choices(
    labels="momentum_corrected",
    standardisation="per_position",
    relation="product",
    share="global",
    bootstrap="diverse",
    estimator="first_order",
    learning_rate=3e-4,
)


@pytest.mark.parametrize("degrees", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975])
def test_quantiles_of_students_distribution(degrees: int, probability: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-4, abs=1e-4)


def test_interval_is_the_one_of_a_t_test() -> None:
    values = [0.1, 0.3, 0.2, 0.5]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-4)
    assert found.verdict == "higher" if low > 0 else found.verdict == "not separated"


def test_intervals_of_few_values() -> None:
    assert interval([]).text() == "-" and interval([]).verdict == "not separated"
    one = interval([0.25])
    assert one.text() == "0.250" and math.isnan(one.half_width) and one.verdict == "not separated"
    assert interval([-1.0, -1.0]).verdict == "lower" and interval([0.0, 0.0]).verdict == "not separated"


def test_pairs_are_of_common_seeds() -> None:
    found = paired_interval({1: 5.0, 2: 7.0, 3: 9.0}, {2: 6.5, 3: 8.5, 4: 0.0})
    assert (found.mean, found.half_width, found.count) == (0.5, 0.0, 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(30, 200), st.floats(0.0, 0.7), st.integers(1, 3), st.integers(0, 4), st.integers(0, 5))
def test_planned_pools(num_samples: int, share: float, least: int, more: int, seed: int) -> None:
    plan = plan_pool(220, num_samples, share, (least, least + more), seed)
    assert len(plan.rows) == len(plan.family) == len(plan.copy) == num_samples
    assert 0 <= (plan.family >= 0).sum() - round(share * num_samples) <= least + more
    assert len(np.unique(plan.rows[~plan.copy])) == (~plan.copy).sum(), "a sample is there twice"
    assert not (plan.copy & (plan.family < 0)).any()
    for family in range(plan.family.max() + 1):
        members = plan.family == family
        assert least <= (members & plan.copy).sum() <= least + more
        assert (members & ~plan.copy).sum() == 1 and len(np.unique(plan.rows[members])) == 1


def test_a_pool_needs_enough_samples() -> None:
    with pytest.raises(UserError, match="a pool of 50 samples needs 50 different ones, but the text gives 40; give --data more"):
        plan_pool(40, 50, 0.0, (3, 10), 0)


def test_noise_replaces_tokens_by_those_of_another_text() -> None:
    generator, tokens, other = np.random.default_rng(0), np.arange(1000), np.arange(5000, 5010)
    assert np.array_equal(noisy_copy(tokens, other, 0.0, generator), tokens)
    assert np.isin(noisy_copy(tokens, other, 1.0, generator), other).all()
    changed = noisy_copy(tokens, other, 0.1, generator) != tokens
    assert 50 < changed.sum() < 150


def test_written_pool(tmp_path: Path) -> None:
    source = make_pool(tmp_path / "source", (30, 30), length=40)
    plan = plan_pool(source.num_samples, 50, 0.5, (3, 4), seed=3)
    write_pool(source, plan, 0.1, 4, tmp_path / "pool", {"tool": "test"})
    pool = PoolIndex.open(tmp_path / "pool")
    found, expected = PoolReader(pool).read_batch(np.arange(50)), PoolReader(source).read_batch(plan.rows)
    same = (found == expected).mean(axis=1)
    assert (same[~plan.copy] == 1).all()
    assert (same[plan.copy] > 0.6).all() and (same[plan.copy] < 1).any()
    assert np.array_equal(np.load(tmp_path / "pool" / FAMILIES_FILE), plan.family)
    assert np.array_equal(pool.kind_of, source.kind_of[plan.rows]) and pool.eot_id == source.eot_id


def test_members_of_families_are_counted() -> None:
    family = np.array([0, 0, 0, 1, 1, -1, -1])
    assert family_counts(family, np.array([0, 1, 2, 3, 5])) == {"families": 2, "members": 2.0, "redundant_share": 0.4}
    assert family_counts(family, np.array([5, 6])) == {"families": 0, "members": 0.0, "redundant_share": 0.0}


def test_each_arm_changes_one_choice() -> None:
    arms = make_arms(DEFAULT)
    assert list(arms)[:4] == ["random", "similarity", "individual", "group"] and arms["group"] == DEFAULT
    for field, values in ALTERNATIVES.items():
        for value in set(values) - {getattr(DEFAULT, field)}:
            choices = arms[f"{field}-{value}"]
            assert choices == dataclasses.replace(DEFAULT, **{field: value})
    assert arms["paper"] == PAPER and arms["paper-first_order"].learning_rate == 3e-4
    assert len(arms) == 4 + 7 + 2


def test_exact_rollouts_for_the_same_flops() -> None:
    for first_order, reference in ((160, 48), (2000, 128)):
        flops = 3 * LENGTH * first_order + 3 * reference
        count = exact_for_same_flops(first_order, reference)
        assert LENGTH * (3 + reference) * count + reference <= flops < LENGTH * (3 + reference) * (count + 1) + reference
    assert exact_for_same_flops(10, 128) == 8


def _result(arm: str, seed: int, loss: float, rows: list[int], fit: dict[str, Any] | None = None) -> dict[str, Any]:
    families = {"families": 1, "members": 2.0, "redundant_share": 0.25}
    kinds = {"web": len(rows), "code": 0}
    return {"arm": arm, "seed": seed, "loss": loss, "fit": fit, "rows": np.array(rows), "kinds": kinds, "families": families}


@pytest.fixture
def results() -> list[dict[str, Any]]:
    found = []
    for seed, offset in ((1, 0.0), (2, 0.5), (3, 0.2)):
        noise = 0.001 * seed
        good = {"accepted": True, "spearman": 0.5 + noise}
        found.append(_result("random", seed, 5.0 + offset, [1, 2, 3, 4]))
        found.append(_result("individual", seed, 4.7 + offset + noise, [5, 6, 7, 8], good))
        found.append(_result("group", seed, 4.7 + offset, [5, 6, 7, 9], good))
        refused = {"accepted": False} if seed == 2 else {"accepted": True, "spearman": 0.3}
        found.append(_result("labels-increments", seed, 4.9 + offset + noise, [5, 6, 1, 2], refused))
    order = ["random", "individual", "group", "labels-increments"]
    return sorted(found, key=lambda result: order.index(result["arm"]))


def test_arms_are_compared_by_seed(results: list[dict[str, Any]]) -> None:
    rows = {row.arm: row for row in compare(results)}
    assert list(rows) == ["random", "individual", "group", "labels-increments"]
    assert rows["group"].to_random.text(signed=True) == "-0.300 +- 0.000" and rows["random"].to_random.mean == 0
    # The seeds differ by far more than the arms do: only pairs separate them.
    assert rows["labels-increments"].loss.half_width > 0.5 and rows["labels-increments"].to_default.verdict == "higher"
    assert rows["individual"].to_default.verdict == "not separated"
    assert (rows["labels-increments"].refused, rows["labels-increments"].learned) == (1, 3)
    assert rows["labels-increments"].spearman_to_default.count == 2
    assert rows["group"].overlap.mean == 0.75 and rows["random"].overlap.mean == 0 and rows["group"].redundant.mean == 0.25


def test_table_and_conclusions(results: list[dict[str, Any]]) -> None:
    rows = compare(results)
    lines = table(rows).splitlines()
    assert {line.count("|") for line in lines} == {len(HEADER) + 1} and len(lines) == 2 + 4
    assert "| +0.202 +- 0.002 | worse |" in lines[-1] and "| 1 of 3 |" in lines[-1]
    assert "| not separated |" in lines[3]
    assert conclusions(rows)[1] == "individual is not separated from group: +0.0020 +- 0.0025 over 3 seeds"
    assert conclusions(rows)[2].startswith("labels-increments is worse than group: +0.2020")
    assert kinds_table(results).splitlines()[2] == "| random | 100% | 0% |"


def test_json_holds_no_nan_and_the_plot_is_written(results: list[dict[str, Any]], tmp_path: Path) -> None:
    pools = {"natural": compare(results), "families": compare([result for result in results if result["seed"] == 1])}
    content = json.loads(json.dumps(to_json(pools), allow_nan=False))
    assert content["families"]["group"]["to_random"] == {"mean": pytest.approx(-0.3), "half_width": None, "count": 1}
    plot(pools, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    monkeypatch.setattr(sys, "argv", ["bench_recipes.py", *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # the command sets them for its workers: put back after the test
    assert bench_recipes.main() == code
    return capsys.readouterr().err


def test_errors_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert f"{output} holds no results yet; run without --table" in _run(monkeypatch, capsys, "--output", output, "--table")
    assert "--scale gpu: no GPU is visible" in _run(monkeypatch, capsys, "--output", output, "--scale", "gpu")
    assert "is of other sizes or of another default recipe; give another --output" in _run(monkeypatch, capsys, "--output", output)
    assert "--arms: unknown magic; choose among random, " in _run(monkeypatch, capsys, "--output", output, "--arms", "magic", "--table")
    assert f"{output} holds no results yet" in _run(monkeypatch, capsys, "--output", output, "--table", "--seeds", 1)


def test_table_of_results_that_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, results: list[dict[str, Any]]
) -> None:
    settings_of_then = {"scale": dataclasses.asdict(SCALES["quick"]), "default": {**dataclasses.asdict(DEFAULT), "relation": "additive"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings_of_then))
    for result in results:
        task = Task(tmp_path, SCALES["quick"], "families", result["seed"], ())
        for path in (task.result(result["arm"]), task.rows(result["arm"])):
            path.parent.mkdir(parents=True, exist_ok=True)
        np.save(task.rows(result["arm"]), result["rows"])
        content = {**result, "seconds": {"train": 2.0}}
        del content["rows"]
        task.result(result["arm"]).write_text(json.dumps(content))
    assert _run(monkeypatch, capsys, "--output", tmp_path, "--table", code=0) == ""
    text = (tmp_path / "recipes.md").read_text()
    assert "### families pool, 3 seeds" in text and "natural" not in text and "- labels-increments is worse than group" in text
    assert "seeds 1 to 3." in text and "32 hidden, 1 layers" in text
    assert json.loads((tmp_path / "recipes.json").read_text())["cpu_seconds_per_seed"] == {"families": {"train": 8.0}}
