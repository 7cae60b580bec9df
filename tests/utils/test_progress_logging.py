"""What a person sees: bars that do not flood a log file, one line per message, warnings of every rank."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from megatron_groupmates.utils.logging import _NOISY, configure_logging
from megatron_groupmates.utils.progress import progress_bar


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    package = logging.getLogger("megatron_groupmates")
    before = (package.handlers[:], package.propagate, package.level)
    levels = {name: logging.getLogger(name).level for name in (*logging.root.manager.loggerDict, *_NOISY)}
    with warnings.catch_warnings():
        yield
    package.handlers[:], package.propagate = before[0], before[1]
    package.setLevel(before[2])
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines_of(monkeypatch: pytest.MonkeyPatch, rank: int, verbose: bool) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("train", rank, verbose)
    logger = logging.getLogger("megatron_groupmates.room.module")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logger.log(level, "%s message", logging.getLevelName(level))
    return [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]


def test_rank_0_shows_messages_and_other_ranks_their_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, 0, False) == ["[train] INFO message", "[train] WARNING message"]
    assert lines_of(monkeypatch, 3, False) == ["[train:3] WARNING message"]
    assert lines_of(monkeypatch, 0, True) == ["[train] DEBUG message", "[train] INFO message", "[train] WARNING message"]


def test_configuring_twice_does_not_print_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    lines_of(monkeypatch, 0, False)
    assert len(lines_of(monkeypatch, 0, False)) == 2


def test_libraries_are_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("deepspeed").setLevel(logging.INFO)
    lines_of(monkeypatch, 0, True)
    assert logging.getLogger("deepspeed").level == logging.INFO
    lines_of(monkeypatch, 0, False)
    assert logging.getLogger("deepspeed").level == logging.ERROR


def test_a_bar_in_a_log_file_is_a_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(1000, "embedding", unit="sample", initial=10)
    for _ in range(990):
        bar.update()
    bar.close()
    assert stream.getvalue().count("\r") <= 3
    assert "embedding: 100%" in stream.getvalue() and "1000/1000" in stream.getvalue()
    assert stream.getvalue().isascii()


def test_other_ranks_show_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, "training", enabled=False) as bar:
        bar.update(3)
    assert stream.getvalue() == ""
