"""Noticing that a rank or its host has gone: without this the others wait in a collective for its timeout.

Every rank keeps one TCP connection to rank 0. A process that ends, however it ends, has its connection closed by the kernel; a
host that is gone does not answer the kernel's keep-alives. So nothing is polled, and no rank is taken for dead because it is
busy. Rank 0 says who was lost and tells all others, which end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment
from megatron_groupmates.parallel.meeting import Meeting

logger = logging.getLogger(__name__)

# A host that answers nothing is lost after 10 + 6 x 5 seconds.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 6), (socket.TCP_USER_TIMEOUT, 40_000))
_CONNECT_SECONDS = 10.0
_GATHER_SECONDS = 0.1  # processes of one host end together: name them in one message
_OWN_WORDS_SECONDS = 1.0  # a mistake that all ranks see is told by rank 0, which may see it a little later
_PARTING_SECONDS = 1.0  # for the rank that speaks to have spoken, before a launcher ends it because this one has ended
_LONGEST_LINE = 65536
_LONGEST_PROBLEM = 2000


@dataclasses.dataclass
class _Member:
    """One rank as rank 0 sees it."""

    rank: int = -1
    host: str = ""
    received: bytes = b""


class PeerWatch:
    """The watch of one rank. Start it on every rank of a job that has more than one.

    Args:
        meeting: where rank 0 says how it is reached.
        host: name of this rank's host.
        advice: called when a rank is lost; what the user can do now.
        end: ends this process with an exit code, replaced in tests.
    """

    def __init__(self, meeting: Meeting, host: str, advice: Callable[[], str], end: Callable[[int], Any] = os._exit) -> None:
        self._environment: LaunchEnvironment = meeting.environment
        self._meeting = meeting
        self._host = host
        self._advice = advice
        self._end = end
        self._sockets: list[socket.socket] = []
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()
        self._is_hub = self._environment.rank == 0

    def start(self) -> None:
        """Connect to rank 0, or open the watch on it. Every rank must call. A rank that cannot connect goes on unwatched."""
        target = self._open_hub() if self._is_hub else self._join()
        if target is None:
            return
        os.register_at_fork(after_in_child=self._close_all)  # else a data loader's worker would keep a dead rank's connection
        self._thread = threading.Thread(target=target, name="peer watch", daemon=True)
        self._thread.start()

    def leave(self, problem: str | None = None) -> None:
        """This rank ends on its own: well, or because of ``problem``, which it prints itself. Tells the others."""
        if self._thread is None:
            return
        self._leaving.set()
        problem = None if problem is None else problem[:_LONGEST_PROBLEM]
        if self._is_hub:
            self._send(self._wake, {"left": problem})
            self._thread.join(_OWN_WORDS_SECONDS)
        else:
            self._send(self._sockets[0], {"left": problem})

    def await_verdict(self, seconds: float) -> None:
        """Give the watch time to find out who was lost; it then ends this process. Returns when it did not."""
        if self._thread is not None:
            self._thread.join(seconds)

    # Rank 0.

    def _open_hub(self) -> Callable[[], None]:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            listener = socket.create_server(("", 0), backlog=1024)
        self._wake, woken = socket.socketpair()
        self._sockets += [listener, self._wake, woken]
        self._token = secrets.token_hex(16)
        addresses = [_address_towards(self._environment), self._environment.master_addr, self._host]
        port = listener.getsockname()[1]
        self._meeting.tell("watch", {"addresses": addresses, "port": port, "token": self._token, "host": self._host})
        return lambda: self._watch_members(listener, woken)

    def _watch_members(self, listener: socket.socket, woken: socket.socket) -> None:
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        members: dict[socket.socket, _Member] = {}
        while True:
            lost: list[_Member] = []
            problems: list[str] = []
            for key, _ in selector.select():
                connection: Any = key.fileobj
                if connection is listener:
                    try:
                        accepted = _accept(listener)
                    except OSError as error:
                        # Were it asked again at once, this thread would do nothing else.
                        logger.warning("rank 0 cannot watch more ranks (%s); a lost one may be noticed by a time-out only", error)
                        selector.unregister(listener)
                        continue
                    members[accepted] = _Member()
                    self._sockets.append(accepted)
                    selector.register(accepted, selectors.EVENT_READ)
                elif connection is woken:
                    (left,) = _lines(_Member(), _receive(woken))
                    self._tell_all(members, {"over": left["left"] is not None})
                    return
                elif not self._hear(connection, members[connection], lost, problems):
                    selector.unregister(connection)
                    del members[connection]
                    connection.close()
            if (lost or problems) and self._conclude(members, lost, problems):
                return

    def _hear(self, connection: socket.socket, member: _Member, lost: list[_Member], problems: list[str]) -> bool:
        """One message or the end of one connection; False when it is over."""
        content = _receive(connection)
        if not content:
            if member.rank >= 0:
                lost.append(member)
            return False
        for line in _lines(member, content):
            if line.get("token") == self._token:
                member.rank, member.host = int(line["rank"]), str(line["host"])
                self._send(connection, {"welcome": member.rank})
            elif member.rank >= 0 and "left" in line:
                if line["left"] is not None:
                    problems.append(f"rank {member.rank} on host {member.host} stopped: {line['left']}")
                return False
            else:
                return False  # no rank of this job
        return True

    def _conclude(self, members: dict[socket.socket, _Member], lost: list[_Member], problems: list[str]) -> bool:
        """Say what happened and end the job; False where this rank is about to end on its own and says it."""
        if problems and not lost:
            time.sleep(_OWN_WORDS_SECONDS)
        elif any(member.host != self._host for member in lost):
            lost += _also_gone(members)  # but if it was on this host the launcher ends this rank too, any moment now
        if self._leaving.is_set():
            return False
        self._tell_all(members, {"over": True})
        logger.error("%s", self._with_advice([(member.rank, member.host) for member in lost]) if lost else problems[0])
        self._end_here(_GATHER_SECONDS)
        return True

    def _tell_all(self, members: Iterable[socket.socket], message: dict[str, Any]) -> None:
        for connection in members:
            self._send(connection, message)

    # The other ranks.

    def _join(self) -> Callable[[], None] | None:
        hub = self._meeting.hear("watch")
        for address in dict.fromkeys(hub["addresses"]):
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, hub["port"]), timeout=_CONNECT_SECONDS)
                _keep_alive(connection)
                self._send(connection, {"token": hub["token"], "rank": self._environment.rank, "host": self._host})
                if _receive(connection):
                    connection.settimeout(None)
                    self._sockets.append(connection)
                    return lambda: self._watch_hub(connection, hub["host"])
                connection.close()
        logger.warning(
            "rank %d on host %s cannot reach rank 0 on host %s at port %d; if a host is lost, it is noticed by a time-out only",
            self._environment.rank,
            self._host,
            hub["host"],
            hub["port"],
        )
        return None

    def _watch_hub(self, connection: socket.socket, hub_host: str) -> None:
        heard = _Member()
        while content := _receive(connection):
            for line in _lines(heard, content):
                if line.get("over") is False:
                    return
                if line.get("over"):
                    self._end_here(_PARTING_SECONDS)
        if not self._leaving.is_set():
            # The first rank of each host says it; on rank 0's host that is the second.
            if self._environment.local_rank == int(self._host == hub_host):
                logger.error("%s", self._with_advice([(0, hub_host)]))
            self._end_here(_PARTING_SECONDS)

    # Both.

    def _with_advice(self, lost: Iterable[tuple[int, str]]) -> str:
        try:
            return f"{describe_loss(lost)}; {self._advice()}"
        except (UserError, OSError) as error:  # the file system may have gone with the host
            return f"{describe_loss(lost)}; start the same command again (where it goes on from cannot be read: {error})"

    def _end_here(self, after_seconds: float) -> None:
        # The main thread may wait in a collective for ever; whatever is on disk is complete at any moment.
        time.sleep(after_seconds)
        self._end(1)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who is gone is noticed where it is read from
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _close_all(self) -> None:
        for connection in self._sockets:
            connection.close()


def describe_loss(lost: Iterable[tuple[int, str]]) -> str:
    """Which (rank, host) were lost, in words."""
    by_host: dict[str, list[int]] = {}
    for rank, host in sorted(lost):
        by_host.setdefault(host, []).append(rank)
    told = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} on host {host}" for host, ranks in by_host.items()]
    return f"lost {' and '.join(told)}: killed, crashed, or the host is gone"


def _also_gone(members: dict[socket.socket, _Member]) -> list[_Member]:
    """Those of ``members`` whose connections end within a moment."""
    time.sleep(_GATHER_SECONDS)
    gone = []
    for connection, member in members.items():
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            if not _receive(connection) and member.rank >= 0:
                gone.append(member)
        connection.setblocking(True)
    return gone


def _accept(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    _keep_alive(connection)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _receive(connection: socket.socket) -> bytes:
    """Some bytes; none when the other side is gone."""
    try:
        return connection.recv(_LONGEST_LINE)
    except BlockingIOError:
        raise
    except OSError:
        return b""


def _lines(member: _Member, content: bytes) -> list[dict[str, Any]]:
    """The complete JSON lines that ``content`` ends; the rest is kept for later. What is not JSON reads as an empty message."""
    *complete, member.received = (member.received + content)[-_LONGEST_LINE:].split(b"\n")
    messages = []
    for line in complete:
        try:
            message = json.loads(line)
        except ValueError:
            message = {}
        messages.append(message if isinstance(message, dict) else {})
    return messages


def _address_towards(environment: LaunchEnvironment) -> str:
    """The address of this host on the way to the master address; that itself where there is no way."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(environment.master_addr, environment.master_port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    return environment.master_addr
