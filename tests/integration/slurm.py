"""A Slurm cluster of Debian's packages on the hosts of :mod:`tests.integration.hosts`: its controller runs on the first."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from pathlib import Path

from tests.integration.hosts import Hosts, lacking

TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"}
_START_SECONDS = 60.0


def why_not() -> str | None:
    """What this machine lacks to be a cluster; None when it lacks nothing."""
    missing = lacking(TOOLS)
    return f"a Slurm cluster needs apt-get install {' '.join(missing)}" if missing else None


def start_slurm(hosts: Hosts, directory: Path) -> dict[str, str]:
    """Start the daemons; they end with the hosts. What must be in the environment of Slurm's commands.

    Args:
        hosts: every one becomes a node of four cores.
        directory: for the daemons' state and logs; empty.
    """
    socket, key = directory / "munge.socket", directory / "munge.key"
    directory.chmod(0o755)
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    controller = hosts.names[0]
    (directory / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={socket}
StateSaveLocation={directory}
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
PlugStackConfig=/dev/null
SlurmdParameters=config_overrides
NodeName={",".join(hosts.names)} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
    )
    files = [f"--{name}-file={directory / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    hosts.run(controller, "munged", f"--socket={socket}", *files, "--force")
    hosts.run(controller, "slurmctld", "-f", str(directory / "slurm.conf"))
    for host in hosts.names:
        (directory / host).mkdir()
        hosts.run(host, "slurmd", "-f", str(directory / "slurm.conf"), "-N", host)
    settings = {"SLURM_CONF": str(directory / "slurm.conf")}
    deadline = time.monotonic() + _START_SECONDS
    while True:
        command = hosts.command(controller, "sinfo", "--noheader", "--format=%T %D")
        nodes = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True).stdout
        if nodes.split() == ["idle", str(len(hosts.names))]:
            return settings
        assert time.monotonic() < deadline, nodes + (directory / "slurmctld.log").read_text()
        time.sleep(0.2)
