"""A rank that is lost, or stops, ends the others with one message that names it."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel import watch as watch_module
from megatron_groupmates.parallel.launch import LaunchEnvironment
from megatron_groupmates.parallel.meeting import Meeting
from megatron_groupmates.parallel.watch import PeerWatch, describe_loss

ADVICE = "start again"


def environments(world_size: int) -> list[LaunchEnvironment]:
    """Two ranks a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [LaunchEnvironment(rank, rank % 2, world_size, 2, "127.0.0.1", port) for rank in range(world_size)]


class Ranks:
    """The watches of all ranks in this process; what each would have ended with."""

    def __init__(self, world_size: int) -> None:
        self.ended: list[int] = []
        self.messages: list[str] = []
        meetings = [Meeting(environment, 20.0) for environment in environments(world_size)]
        self.watches = [PeerWatch(meeting, f"node{rank // 2}", lambda: ADVICE, self._end(rank)) for rank, meeting in enumerate(meetings)]
        starts = [threading.Thread(target=watch.start) for watch in self.watches]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join(20)

    def _end(self, rank: int) -> Callable[[int], None]:
        def end(code: int) -> None:
            assert code == 1
            self.ended.append(rank)

        return end

    def lose(self, *ranks: int) -> None:
        """What the kernel does to the connection of a process that ends."""
        for rank in ranks:
            self.watches[rank]._leaving.set()  # a process that has ended says nothing
            for connection in self.watches[rank]._sockets:
                connection.shutdown(socket.SHUT_RDWR)

    def wait(self, number: int) -> set[int]:
        """Until so many have ended; who has."""
        deadline = time.monotonic() + 10
        while len(self.ended) < number and time.monotonic() < deadline:
            time.sleep(0.01)
        return set(self.ended)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the watches say; they part at once."""
    for name in ("_PARTING_SECONDS", "_OWN_WORDS_SECONDS"):
        monkeypatch.setattr(watch_module, name, 0.2)
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep()
    watch_module.logger.addHandler(handler)
    yield said
    watch_module.logger.removeHandler(handler)


def test_lost_ranks_are_named_and_the_others_end(messages: list[str]) -> None:
    ranks = Ranks(4)
    ranks.lose(2, 3)
    assert ranks.wait(2) >= {0, 1}
    assert messages == [f"lost ranks 2, 3 on host node1: killed, crashed, or the host is gone; {ADVICE}"]


def test_a_loss_is_told_also_where_the_file_system_has_gone_with_it(messages: list[str]) -> None:
    def unreadable() -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    ranks = Ranks(4)
    ranks.watches[0]._advice = unreadable
    ranks.lose(2, 3)
    assert ranks.wait(2) >= {0, 1}
    assert messages == [
        "lost ranks 2, 3 on host node1: killed, crashed, or the host is gone; start the same command again "
        "(where it goes on from cannot be read: [Errno 116] Stale file handle)"
    ]


def test_ranks_beyond_the_files_that_rank_0_may_open_go_on_unwatched(messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(listener: socket.socket) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(watch_module, "_accept", too_many)
    monkeypatch.setattr(watch_module, "_CONNECT_SECONDS", 0.2)
    ranks = Ranks(2)
    assert messages[0] == "rank 0 cannot watch more ranks ([Errno 24] Too many open files); a lost one may be noticed by a time-out only"
    assert "rank 1 on host node0 cannot reach rank 0" in messages[1] and len(messages) == 2
    ranks.watches[0].leave()


def test_a_reason_of_any_length_is_heard(messages: list[str]) -> None:
    ranks = Ranks(2)
    ranks.watches[1].leave("x" * 100_000)
    assert ranks.wait(1) == {0} and messages[0].startswith("rank 1 on host node0 stopped: xxx")


def test_a_rank_that_stops_gives_its_reason(messages: list[str]) -> None:
    ranks = Ranks(4)
    ranks.watches[3].leave("data.pool: no pool there")
    assert ranks.wait(3) >= {0, 1, 2}
    assert messages == ["rank 3 on host node1 stopped: data.pool: no pool there"]


def test_a_mistake_that_rank_0_sees_as_well_is_left_to_it(messages: list[str]) -> None:
    ranks = Ranks(4)
    ranks.watches[3].leave("data.pool: no pool there")
    ranks.watches[0].leave("data.pool: no pool there")
    time.sleep(0.5)
    assert messages == []
    assert 0 not in ranks.ended, "rank 0 says it itself and ends with an exit code of its own"


def test_when_rank_0_stops_the_others_end_without_a_word(messages: list[str]) -> None:
    ranks = Ranks(3)
    ranks.watches[0].leave("bad settings")
    assert ranks.wait(2) == {1, 2}
    assert messages == []


def test_the_end_of_a_job_is_no_loss(messages: list[str]) -> None:
    ranks = Ranks(4)
    for rank in (3, 0, 1, 2):
        ranks.watches[rank].leave()
    time.sleep(0.5)
    assert (messages, ranks.ended) == ([], [])


def test_a_rank_0_that_is_lost_is_told_on_each_host(messages: list[str]) -> None:
    ranks = Ranks(4)
    for connection in ranks.watches[0]._sockets:
        if connection.family != socket.AF_UNIX and connection.getsockname():
            connection.shutdown(socket.SHUT_RDWR)
    assert ranks.wait(3) >= {1, 2, 3}
    expected = f"lost rank 0 on host node0: killed, crashed, or the host is gone; {ADVICE}"
    assert messages.count(expected) == 2, "one on its own host, one on the other"


def test_a_stranger_is_not_taken_for_a_rank(messages: list[str]) -> None:
    ranks = Ranks(2)
    hub = ranks.watches[0]._meeting.hear("watch")
    for content in (b"GET / HTTP/1.0\n\n", b'{"rank": 1, "token": "guess"}\n', b"[1]\n", b"\xff\n", b'{"left": "x"}\n', b""):
        with socket.create_connection(("127.0.0.1", hub["port"]), timeout=5) as stranger:
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b""
    assert (messages, ranks.ended) == ([], [])
    ranks.lose(1)
    assert ranks.wait(1) >= {0}, "the watch goes on after them"


def test_a_rank_that_cannot_connect_goes_on_unwatched(messages: list[str]) -> None:
    first, second = (Meeting(environment, 20.0) for environment in environments(2))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        first.tell("watch", {"addresses": ["127.0.0.1"], "port": port, "token": "t", "host": "node0"})
        alone = PeerWatch(second, "node1", lambda: ADVICE, lambda code: pytest.fail("must go on"))
        alone.start()
        alone.leave()
        alone.await_verdict(0.1)
    assert messages == [
        f"rank 1 on host node1 cannot reach rank 0 on host node0 at port {port}; if a host is lost, it is noticed by a time-out only"
    ]


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ([(5, "b")], "lost rank 5 on host b: killed"),
        ([(3, "b"), (2, "b")], "lost ranks 2, 3 on host b: killed"),
        ([(3, "b"), (9, "c"), (2, "b")], "lost ranks 2, 3 on host b and rank 9 on host c: killed"),
    ],
)
def test_losses_in_words(lost: list[tuple[int, str]], text: str) -> None:
    assert describe_loss(lost).startswith(text)


def test_who_did_not_come_is_named() -> None:
    first, second, _ = (Meeting(environment, 0.3) for environment in environments(3))
    first.tell("report/0", {"host": "node0"})
    second.tell("report/1", {"host": "node0"})
    message = r"rank 2 of 3 did not start within \d+ s; see what the launcher printed for the hosts other than node0"
    with pytest.raises(UserError, match=message):
        first.gather("report", range(3))
    with pytest.raises(UserError, match=r"rank 2 \(host node1\) of 3 did not"):
        first.gather("report", range(3), {0: "node0", 1: "node0", 2: "node1"})


def test_a_rank_0_that_says_nothing_is_told() -> None:
    _, second = (Meeting(environment, 0.3) for environment in environments(2))
    with pytest.raises(UserError, match="rank 0 went away while the job started"):
        second.hear("verdict")


def test_nobody_at_the_master_address_is_told() -> None:
    with pytest.raises(UserError, match=r"rank 1 cannot meet the other ranks at 127.0.0.1:\d+: .*--master_addr, --master_port"):
        Meeting(environments(2)[1], 0.5)


def test_a_port_that_is_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        environment = LaunchEnvironment(0, 0, 2, 2, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(UserError, match=r"rank 0 cannot meet the other ranks at 127.0.0.1:\d+: .*the port free there"):
            Meeting(environment, 0.5)


def test_each_start_of_torchrun_meets_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environments(2)
    first = Meeting(environment[0], 0.3)
    first.tell("verdict", "of the first start")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    again = Meeting(environment[0], 0.3)  # joins the store that is there, as rank 0 too
    with pytest.raises(UserError, match="rank 0 went away"):
        again.hear("verdict")
