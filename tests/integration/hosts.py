"""Several hosts on one machine: each has its network, its name, its mounts and its sshd; all are gone at the end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_NETWORK = "10.77.0"
_PREFIX = "groupmates"
_START_SECONDS = 20.0


def why_not() -> str | None:
    """What this machine lacks to play several hosts; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "several hosts need root: network namespaces"
    missing = lacking(TOOLS)
    if missing:
        return f"several hosts need apt-get install {' '.join(missing)}"
    probe = f"{_PREFIX}{os.getpid()}probe"
    allowed = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if allowed.returncode:
        return f"several hosts need network namespaces: {allowed.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def lacking(tools: Mapping[str, str]) -> list[str]:
    """The Debian packages of those tools that are not installed."""
    return sorted({package for tool, package in tools.items() if _find(tool) is None})


class Hosts:
    """Hosts ``node1`` to ``node<number>``, which reach each other by name and by ssh without a password.

    They share this machine's processes and files, but for what :meth:`hide` takes from one of them.

    Args:
        directory: for keys and logs.
        number: of hosts.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.names = [f"node{index + 1}" for index in range(number)]
        self._directory = directory
        self._prefix = f"{_PREFIX}{os.getpid()}"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def command(self, host: str, *command: str) -> list[str]:
        """``command`` as it must be started from here to run on ``host``, in the current directory."""
        inside = ("--uts", "--net", "--mount", "--pid", f"--wd={Path.cwd()}")
        return ["nsenter", f"--target={self._first_process(host)}", *inside, *command]

    def run(self, host: str, *command: str) -> str:
        """What ``command`` prints on ``host``; it must succeed."""
        done = subprocess.run(self.command(host, *command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)} on {host}: {done.stdout}{done.stderr}"
        return done.stdout

    def hide(self, host: str, directory: Path) -> None:
        """Let ``host`` see an empty directory in place of ``directory``."""
        self.run(host, "mount", "-t", "tmpfs", "none", str(directory))

    def show(self, host: str, directory: Path) -> None:
        """Undo :meth:`hide`."""
        self.run(host, "umount", str(directory))

    def kill_processes(self, host: str) -> None:
        """SIGKILL everything that runs on ``host`` but its sshd."""
        kept = {self._holders[host].pid, self._first_process(host)}
        for pid in set(self._processes(host)) - kept:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all processes of the hosts and remove the hosts. May be called again."""
        for name, holder in self._holders.items():
            for pid in self._processes(name):  # the first process of a host takes all others with it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            holder.wait()
        for name in [*self.names, "switch"]:
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)

    def _start(self) -> None:
        keys = self._directory / "ssh"
        keys.mkdir(mode=0o700)
        for name in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        names = "".join(f"{_NETWORK}.{number} {name}\n" for number, name in enumerate(self.names, 1))
        (keys / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (keys / "ssh_config").write_text(
            f"Host *\n IdentityFile {keys / 'user_key'}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        (keys / "sshd_config").write_text(
            f"HostKey {keys / 'host_key'}\nAuthorizedKeysFile {keys / 'user_key.pub'}\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nMaxStartups 100\nUseDNS no\n"
        )
        _remove_left_over_networks()
        switch = self._namespace("switch")
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, 1):
            self._start_host(name, number, keys)
        for name in self.names:
            self._await_ssh(name)

    def _start_host(self, name: str, number: int, keys: Path) -> None:
        switch, namespace = self._namespace("switch"), self._namespace(name)
        _call("ip", "netns", "add", namespace)
        _call("ip", "-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _call("ip", "-n", switch, "link", "set", name, "master", "bridge", "up")
        _call("ip", "-n", namespace, "address", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _call("ip", "-n", namespace, "link", "set", link, "up")
        script = (
            f"hostname {name} && mount --bind {keys}/hosts /etc/hosts && mount --bind {keys}/ssh_config /etc/ssh/ssh_config && "
            f"mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec {_find('sshd')} -D -e -f {keys}/sshd_config"
        )
        with (self._directory / f"sshd-{name}.log").open("wb") as log:
            # When the tests are killed the host dies too, and with its first process all the others.
            bound = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/run/netns/{namespace}"]
            apart = ["unshare", *"--uts --pid --fork --kill-child --mount-proc --mount --propagation private".split(), "sh", "-c", script]
            command = [*bound, *apart]
            self._holders[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _await_ssh(self, name: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if not self._children(name):
                time.sleep(0.05)
                assert self._holders[name].poll() is None, (self._directory / f"sshd-{name}.log").read_text()
                continue
            tried = subprocess.run(self.command(name, "ssh", name, "hostname"), capture_output=True, text=True)
            if tried.stdout.strip() == name:
                return
            assert time.monotonic() < deadline, tried.stderr + (self._directory / f"sshd-{name}.log").read_text()
            time.sleep(0.1)

    def _children(self, name: str) -> list[int]:
        holder = self._holders[name].pid
        return [int(pid) for pid in Path(f"/proc/{holder}/task/{holder}/children").read_text().split()]

    def _first_process(self, name: str) -> int:
        """The host's process number 1, which is its sshd."""
        (pid,) = self._children(name)
        return pid

    def _processes(self, name: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}{name}"


def _remove_left_over_networks() -> None:
    """Those of tests that were killed; no process is in them any more."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        match = re.match(rf"({_PREFIX}(\d+)\w+)", line)
        if match and not Path(f"/proc/{match[2]}").exists():
            subprocess.run(["ip", "netns", "del", match[1]], capture_output=True)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def hostfile(path: Path, slots: int, names: Sequence[str]) -> Path:
    """Write a deepspeed hostfile."""
    path.write_text("".join(f"{name} slots={slots}\n" for name in names))
    return path
