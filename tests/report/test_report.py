"""Reading run directories and writing the page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.report import blocks, plots
from megatron_groupmates.report.build import build_report
from megatron_groupmates.report.read import read_run, read_runs, unique_labels
from tests.common.report_runs import TOKENS_PER_STEP, full_provenance, write_experiment, write_lines, write_run

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Structure(HTMLParser):
    """Checks that tags are closed in order; collects every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("experiment")
    runs = write_experiment(root)
    build_report(runs, root / "report")
    return root / "report", runs


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", "group", seed=7, provenances=[full_provenance("group", 100)]))
    assert (run.name, run.arm, run.seed, run.state, run.seconds) == ("a", "group", 7, "finished", 42.0)
    assert run.branch_tokens == 100 * TOKENS_PER_STEP and run.tokens_per_step == TOKENS_PER_STEP
    assert run.consumed_tokens == 500 * TOKENS_PER_STEP and run.flops == 1e6 * run.consumed_tokens
    assert run.evaluations[0] == (100 * TOKENS_PER_STEP, 7.0)
    assert run.final == (500 * TOKENS_PER_STEP, pytest.approx(5.3))
    assert [(item.number, item.effective_tokens) for item in run.generations] == [(1, 140 * TOKENS_PER_STEP)]


def test_a_run_that_has_only_begun_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: fresh}\n")
    run = read_run(tmp_path)
    assert (run.arm, run.state) == ("no selection", "unknown")
    assert (run.evaluations, run.final, run.generations) == ((), None, ())


def test_evaluations_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "group")
    write_lines(
        run / "metrics.jsonl",
        [{"step": 1, "consumed_tokens": 10, "evaluation_loss": float("nan")}, {"step": 2, "consumed_tokens": 20, "evaluation_loss": 5.0}],
    )
    assert read_run(run).evaluations == ((20, 5.0),)
    assert read_run(run).num_not_finite == 1


def test_labels_are_the_shortest_distinct_ones() -> None:
    assert unique_labels([("group", 1, "a"), ("random", 1, "b")]) == ["group", "random"]
    assert unique_labels([("group", 1, "a"), ("group", 2, "b"), ("random", 1, "c")]) == ["group, seed 1", "group, seed 2", "random"]
    assert unique_labels([("group", 1, "a"), ("group", 1, "b")]) == ["group, a", "group, b"]
    assert unique_labels([("group", 1, "a"), ("group", 1, "a")]) == ["group, run 1", "group, run 2"]


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a run directory: it has no config\.yaml"):
        build_report([tmp_path / "nowhere"], tmp_path / "out")
    run = write_run(tmp_path / "a", "group")
    with pytest.raises(UserError, match="a run is given twice"):
        read_runs([run, tmp_path / "." / "a"])
    (run / "config.yaml").write_text("just text")
    with pytest.raises(UserError, match="not a run's config: a mapping expected, found str"):
        read_run(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "{broken\n"),
        ("training.json", "{"),
        ("config.yaml", "a: [\n"),
        ("selection/log.jsonl", "{}\n"),
        ("selection/generation-000001/generation.json", "{"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "a", "group", provenances=[full_provenance("group", 100)])
    (run / name).write_text(content)
    with pytest.raises(UserError, match=r"(?s)a(/selection)? holds a damaged file: .*; restore it from a copy"):
        read_run(run)


def test_the_page_shows_every_arm_and_needs_nothing_from_outside(experiment: tuple[Path, list[Path]]) -> None:
    text = (experiment[0] / "report.html").read_text()
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    assert all(address.startswith("#") for address in structure.addresses)
    assert "http" not in text and "url(" in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE) and ">None<" not in text
    assert "Left out" not in text
    assert text.count("<svg") == 8
    for arm in ("group", "individual", "similarity", "random"):
        assert f'<td class="text">{arm}</td>' in text
    for figure in ("5.280", "0.580", "random_rollouts", "which one seed cannot separate"):
        assert figure in text


def test_the_ids_of_one_page_are_distinct(experiment: tuple[Path, list[Path]]) -> None:
    ids = re.findall(r'<clipPath id="([^"]+)"', (experiment[0] / "report.html").read_text())
    assert ids and len(set(ids)) == len(ids)


def test_summary_has_the_figures_of_every_arm(experiment: tuple[Path, list[Path]]) -> None:
    summary = json.loads((experiment[0] / "summary.json").read_text())
    assert list(summary["arms"]) == ["group", "individual", "similarity", "random"]
    assert summary["arms"]["random"]["to_random_final_loss"]["ratio"] == pytest.approx(1.0)
    assert summary["arms"]["group"]["to_random_final_loss"]["ratio"] < 1
    assert [generation["generation"] for generation in summary["arms"]["group"]["generations"]] == [1, 2]
    assert summary["notes"] == []


def test_the_same_runs_give_the_same_page(experiment: tuple[Path, list[Path]], tmp_path: Path) -> None:
    build_report(experiment[1], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (experiment[0] / "report.html").read_bytes()


def test_missing_parts_are_left_out_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("run: {name: a}\n")
    build_report([tmp_path / "a"], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    for reason in (
        "no run has an evaluation yet",
        "no generation says which kinds it selected",
        "no generation was made with an influence model",
        "no generation compares the methods",
        "no generation was made with an oracle",
        "no generation was selected by cluster",
        "no generation kept example documents",
        "no generation says what its influences were measured with",
        "no run has recorded time or FLOPs yet",
    ):
        assert f"Left out: {reason}." in text
    assert "no selection: training is not finished (state: unknown)." in text
    assert "<svg" not in text


def test_one_arm_without_rounds_is_drawn_alone(tmp_path: Path) -> None:
    build_report([write_run(tmp_path / "a", None)], tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 2


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    rounds = [full_provenance("group", 100)]
    runs = [write_run(tmp_path / name, "group", provenances=rounds) for name in ("<b>$x", "c&$d")]
    build_report(runs, tmp_path / "out")
    structure = Structure()
    text = (tmp_path / "out" / "report.html").read_text()
    structure.feed(text)
    assert structure.open == [] and "<b>" not in text


def test_a_plot_is_well_formed_and_takes_its_ink_from_the_page(experiment: tuple[Path, list[Path]]) -> None:
    summary = json.loads((experiment[0] / "summary.json").read_text())
    text = blocks.drawn(summary, "Cost", plots.cost_plot)
    assert text is not None and "currentColor" in text and "#123456" not in text
    svg = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert svg is not None
    root = ElementTree.fromstring(svg.group().replace("xlink:href", "href"))
    assert root.get("aria-label") == "Cost" and root.get("viewBox") and root.get("height") is None


def test_more_stages_than_colours_are_one_in_the_plot_of_costs() -> None:
    stages = {"training": {"seconds": 90.0, "flops": 1e12}, "tiny": {"seconds": 0.5, "flops": 0.0}, "small": {"seconds": 1.0, "flops": 0.0}}
    stages |= {f"large {number}": {"seconds": 2.0, "flops": 1e9} for number in range(len(plots.COLOURS) - 1)}
    # Hardly any time, but most FLOPs of a run.
    stages["heavy"] = {"seconds": 0.1, "flops": 5e12}
    runs = {"group": {"stages": stages}, "random": {"stages": {"training": {"seconds": 95.0, "flops": 1e12}}}}
    figure = plots.cost_plot({"arms": runs})
    assert figure is not None
    seconds = figure.axes[0].containers
    names = [container.get_label() for container in seconds]
    assert names == ["training", *(name for name in stages if name.startswith("large")), "heavy", "other stages"]
    assert [patch.get_width() for patch in seconds[-1].patches] == [1.5, 0.0]
    assert len({container.patches[0].get_facecolor() for container in seconds}) == len(names)
    assert plots.cost_plot({"arms": {"group": {"stages": {"training": {"seconds": 0.0, "flops": 0.0}}}}}) is None


def test_numbers_are_written_for_people() -> None:
    values = (None, 0.0, 12.0, 1250.0, 4.1e10, 3e18)
    assert [blocks.count(value) for value in values] == ["-", "0", "12", "1.25k", "41G", "3E"]
    assert blocks.number(None) == "-" and blocks.number(1234.5) == "1,234.500"
