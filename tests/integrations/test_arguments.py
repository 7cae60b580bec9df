"""The argument group, and what its combinations mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.integrations.arguments import GroupMatesArguments, add_group_mates_arguments, is_on


def parse(*words: str) -> argparse.Namespace:
    return add_group_mates_arguments(argparse.ArgumentParser()).parse_args(words)


def test_off_without_arguments() -> None:
    assert GroupMatesArguments.of(parse()) is None
    assert not is_on(parse())
    assert not is_on(argparse.Namespace()), "the arguments of a checkpoint from before know nothing of ours"


def test_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = parse("--group-mates-selection", "sel", "--group-mates-pool", "s3://bucket/pool", "--group-mates-config", "c.yaml")
    assert GroupMatesArguments.of(given) == GroupMatesArguments(
        selection=str(tmp_path / "sel"), pool="s3://bucket/pool", config=str(tmp_path / "c.yaml")
    )
    given = parse("--group-mates-selection", "/sel", "--group-mates-pool", "~/pool", "--group-mates-poll-interval", "5")
    expected = GroupMatesArguments(selection="/sel", pool=str(Path.home() / "pool"), poll_interval=5)
    assert GroupMatesArguments.of(given) == expected
    assert is_on(given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group-mates-pool", "p"], "--group-mates-pool p: has no effect without --group-mates-selection DIR"),
        (["--group-mates-poll-interval", "3"], "--group-mates-poll-interval 3: has no effect without"),
        (["--group-mates-selection", "d"], "--group-mates-selection d: needs --group-mates-pool POOL too"),
        (
            ["--group-mates-selection", "d", "--group-mates-pool", "p", "--group-mates-poll-interval", "0"],
            "--group-mates-poll-interval 0: give a number of steps from 1 on",
        ),
        (["--group-mates-selection", "s3://d", "--group-mates-pool", "p"], "--group-mates-selection s3://d: give a path on a file system"),
        (
            ["--group-mates-selection", "d", "--group-mates-pool", "p", "--group-mates-config", "s3://c"],
            "--group-mates-config s3://c: give a path",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GroupMatesArguments.of(parse(*words))


@pytest.mark.parametrize("yaml_words", [["--yaml-cfg", "c.yaml"], ["--yaml-cfg=c.yaml"]])
def test_a_file_that_replaces_all_arguments(monkeypatch: pytest.MonkeyPatch, yaml_words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *yaml_words])
    parse()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--group-mates-pool=p", *yaml_words])
    with pytest.raises(UserError, match="--yaml-cfg: its file replaces all arguments, so --group-mates-pool would have no effect"):
        parse()
