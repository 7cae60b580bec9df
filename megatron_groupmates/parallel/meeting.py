"""How the ranks of a job find each other before anything else: one store, through which they can also tell why they fail."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 600.0  # until the last rank has imported its libraries from a busy file system
_SAY_WHO_IS_MISSING_SECONDS = 20.0
_POLL_SECONDS = 0.02
_GRACE = 1.1


class Meeting:
    """The store that the ranks of one job share, kept by rank 0 or by torchrun. Needs no process group.

    Attributes:
        environment: ranks of this process.
        store: of this start of the job; what a start before left under the same names is not seen.
    """

    def __init__(self, environment: LaunchEnvironment, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Join the others. Every rank of the job must call; none waits for another but for rank 0.

        Raises:
            UserError: rank 0 cannot be reached, or its port is in use.
        """
        self.environment = environment
        _raise_file_limit()
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        torchrun_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = environment.master_addr, environment.master_port
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=environment.rank == 0 and not torchrun_keeps_it,
                timeout=self._timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"rank {environment.rank} cannot meet the other ranks at {address}:{port}: {_first_line(error)}; the address must be that "
                "of rank 0's host as the other hosts see it, and the port free there (deepspeed --master_addr, --master_port)"
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store: dist.Store = dist.PrefixStore(f"megatron_groupmates/{attempt}", store)

    def tell(self, name: str, value: Any) -> None:
        """Leave a JSON ``value`` for those who :meth:`hear` ``name``; each name once."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """What was told under ``name``, waiting for it.

        Raises:
            UserError: rank 0 went away, or nothing was told in time.
        """
        try:
            # Longer than rank 0 waits for the ranks that do not come: it says which.
            self.store.wait([name], self._timeout * _GRACE)
            return json.loads(self.store.get(name))
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank 0 went away while the job started ({_first_line(error)}); what it printed says why") from error

    def gather(self, name: str, ranks: Sequence[int], hosts: Mapping[int, str] | None = None) -> dict[int, Any]:
        """What each of ``ranks`` told under ``<name>/<rank>``, by rank. One rank calls.

        Args:
            name: first part of what they told.
            ranks: whose words are awaited.
            hosts: host of each rank, where it is known, for messages.

        Raises:
            UserError: some said nothing in time: their numbers, and who did.
        """
        found: dict[int, Any] = {}
        begun = said = time.monotonic()
        while len(found) < len(ranks):
            for rank in ranks:
                if rank not in found and self.store.check([f"{name}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{name}/{rank}"))
            missing = [rank for rank in ranks if rank not in found]
            now = time.monotonic()
            if missing and now - begun > self._timeout.total_seconds():
                raise UserError(
                    f"{_named(missing, hosts)} of {self.environment.world_size} did not start within {now - begun:.0f} s; "
                    f"see what the launcher printed for the hosts other than {_hosts_of(found)}"
                )
            if missing and now - said > _SAY_WHO_IS_MISSING_SECONDS:
                logger.info("waiting for %s of %d to start", _named(missing, hosts), self.environment.world_size)
                said = now
            if missing:
                time.sleep(_POLL_SECONDS)
        return found


def _raise_file_limit() -> None:
    """As many open files as the system lets this process have: rank 0 keeps connections to every other rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _named(ranks: Sequence[int], hosts: Mapping[int, str] | None) -> str:
    """``ranks 2, 3``, with their hosts where they are known."""
    shown = ", ".join(f"{rank} (host {hosts[rank]})" if hosts else str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


def _hosts_of(reports: Mapping[int, Any]) -> str:
    names = {report["host"]: None for report in reports.values() if isinstance(report, dict) and "host" in report}
    return ", ".join(names) or "this one"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
