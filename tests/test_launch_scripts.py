"""The launch scripts for many hosts, with stand-ins for the launchers: which jobs they start, in which order, with which arguments."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("multi_host/deepspeed.sh", "multi_host/torchrun.sh", "multi_host/slurm.sbatch")
DEEPSPEED = "deepspeed -q --force_multi --hostfile {hosts} --master_port {port} --module megatron_groupmates {job}"
# Writes its arguments down; `train` fails where it is told to.
LAUNCHER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> {calls}
case " $* " in *" train "*) {train} ;; *" serve "*) {server} ;; esac
"""
# Answers the scripts' questions about the run: a selection is awaited after the first start of the trainer.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *" plan "*) echo '{{"mode": "{mode}", "output_dir": "{directory}"}}' ;;
    *" status "*)
        {status}
        if [ "$(grep -c ' train ' {calls})" -lt 2 ]; then state=awaiting_selection; else state=finished; fi
        echo '{{"trainer": {{"state": "'$state'", "step": 5}}}}' ;;
    *) exec {python} "$@" ;;
esac
"""
SLURM = {"SLURM_JOB_ID": "70001", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]"}


class StandIns:
    """A directory of launchers that only note how they are called."""

    def __init__(self, directory: Path, mode: str, train: str = "exit 0", server: str = "exit 0", status: str = ":") -> None:
        self._calls, self._bin = directory / "calls", directory / "bin"
        self._bin.mkdir()
        self._calls.touch()
        values = {"calls": self._calls, "mode": mode, "directory": directory, "python": shlex.quote(sys.executable), "status": status}
        launcher = LAUNCHER.format(calls=self._calls, train=train, server=server)
        scripts = {name: launcher for name in ("deepspeed", "torchrun", "srun")}
        scripts |= {"python": PYTHON.format(**values), "scontrol": "#!/bin/sh\nprintf 'n1\\nn2\\nn3\\n'\n"}
        for name, content in scripts.items():
            (self._bin / name).write_text(content)
            (self._bin / name).chmod(0o755)

    def start(self, script: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return subprocess.Popen(
            ["bash", str(ROOT / "examples" / script), *map(str, arguments)],
            cwd=ROOT,
            env={**environment, "PATH": f"{self._bin}:{os.environ['PATH']}", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **variables)
        output, errors = process.communicate(timeout=500)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_end(pid: Path) -> None:
    deadline = time.monotonic() + 60
    while is_running(int(pid.read_text())):
        assert time.monotonic() < deadline, "it outlives the script"
        time.sleep(0.02)


@pytest.fixture
def hostfiles(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("trainers", "servers"):
        (tmp_path / name).write_text("host slots=8\n")
    return tmp_path / "trainers", tmp_path / "servers"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_the_arguments(script: str, tmp_path: Path) -> None:
    done = StandIns(tmp_path, "async").run(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(line.startswith("#") for line in lines) and "#!" not in done.stdout
    assert f"examples/{script} CONFIG.yaml" in done.stdout and "# --set" in done.stdout
    assert lines[-1].split()[-1].endswith((".", "slot.")), "the help is whole"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("deepspeed.sh", [], "the first argument is the config file; see --help"),
        ("deepspeed.sh", ["--set", "a.b=c"], "the first argument is the config file; see --help"),
        ("deepspeed.sh", ["c.yaml", "--nonsense", "x"], "unknown argument --nonsense; see --help"),
        ("deepspeed.sh", ["c.yaml", "--trainers"], "--trainers needs a value"),
        ("deepspeed.sh", ["c.yaml"], "--trainers is missing; see --help"),
        ("deepspeed.sh", ["c.yaml", "--trainers", "nowhere"], "there is no hostfile nowhere"),
        ("torchrun.sh", [], "the first argument is the config file; see --help"),
        ("torchrun.sh", ["c.yaml", "--hosts", "2"], "--job is missing; see --help"),
        ("torchrun.sh", ["c.yaml", "--job", "train", "--hosts", "2", "--meet", "a:1"], "--ranks-per-host is missing; see --help"),
        (
            "torchrun.sh",
            ["c.yaml", "--job", "fly", "--hosts", "2", "--meet", "a:1", "--ranks-per-host", "8"],
            "--job is train, serve or inline, not fly",
        ),
        ("slurm.sbatch", [], "the first argument is the config file; see --help"),
        ("slurm.sbatch", ["c.yaml"], "--ranks-per-node is missing; see --help"),
        ("slurm.sbatch", ["c.yaml", "--ranks-per-node"], "--ranks-per-node needs a value"),
        ("slurm.sbatch", ["c.yaml", "--ranks-per-node", "8"], "submit this script with sbatch; see --help"),
    ],
)
def test_wrong_arguments_are_told(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "async")
    done = stand_ins.run(f"multi_host/{script}", *arguments)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")
    assert stand_ins.calls == []


def test_deepspeed_starts_trainer_and_server_side_by_side(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    stand_ins = StandIns(tmp_path, "async")
    trainers, servers = hostfiles
    arguments = ("--trainers", trainers, "--servers", servers, "--set", "run.seed=5", "--port", "7000")
    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(stand_ins.calls) == [
        DEEPSPEED.format(hosts=servers, port=7001, job="serve --config c.yaml --set run.seed=5"),
        DEEPSPEED.format(hosts=trainers, port=7000, job="train --config c.yaml --set run.seed=5"),
    ]


def test_a_trainer_that_fails_takes_the_server_with_it(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    """The server's launcher and what it has started, which does not die with its parent by itself."""
    pid = tmp_path / "pid"
    train = f"until [ -s {pid} ]; do sleep 0.05; done; exit 7"
    stand_ins = StandIns(tmp_path, "async", train=train, server=f"sleep 600 & echo $! > {pid}; wait")
    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", hostfiles[0], "--servers", hostfiles[1])
    assert done.returncode == 7, "the trainer's exit code"
    await_end(pid)


@pytest.mark.parametrize("mode", ["async", "inline"])
def test_a_script_that_is_ended_ends_its_jobs(mode: str, tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    pid = tmp_path / "pid"
    stand_ins = StandIns(tmp_path, mode, train=f"sleep 600 & echo $! > {pid}; wait")
    servers = ("--servers", hostfiles[1]) if mode == "async" else ()
    script = stand_ins.start("multi_host/deepspeed.sh", "c.yaml", "--trainers", hostfiles[0], *servers)
    while not (pid.exists() and pid.read_text()):
        assert script.poll() is None, script.communicate()
        time.sleep(0.02)
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode == 143
    await_end(pid)


def test_deepspeed_inline_takes_turns_on_the_same_hosts(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    stand_ins = StandIns(tmp_path, "inline", server="exit 1")
    trainers, servers = hostfiles
    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", trainers)
    assert done.returncode == 0, done.stderr
    train = DEEPSPEED.format(hosts=trainers, port=29500, job="train --config c.yaml")
    assert stand_ins.calls == [train, DEEPSPEED.format(hosts=trainers, port=29501, job="serve --config c.yaml --once"), train]
    assert done.stderr == "the round failed; training goes on with the selection it has\n"

    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", trainers, "--servers", servers)
    assert done.stderr == "error: selection.mode is inline: the trainers' hosts do both, so leave out --servers\n"


def test_inline_ends_where_the_server_neither_selects_nor_says_why(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    stand_ins = StandIns(
        tmp_path, "inline", server="exit 1", status="""echo '{"trainer": {"state": "awaiting_selection", "step": 5}}'; exit"""
    )
    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", hostfiles[0])
    assert done.returncode == 1
    assert done.stderr.endswith("left the trainer at step 5 with neither a selection nor a recorded failure; see what it printed\n")
    assert [call.split(" megatron_groupmates ")[1].split()[0] for call in stand_ins.calls] == ["train", "serve", "train"]


def test_inline_fails_where_the_run_cannot_be_looked_at(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    stand_ins = StandIns(tmp_path, "inline", status="exit 3")
    assert stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", hostfiles[0]).returncode != 0
    assert len(stand_ins.calls) == 1


def test_a_server_needs_hosts(tmp_path: Path, hostfiles: tuple[Path, Path]) -> None:
    stand_ins = StandIns(tmp_path, "blocking")
    done = stand_ins.run("multi_host/deepspeed.sh", "c.yaml", "--trainers", hostfiles[0])
    assert done.stderr == "error: selection.mode is blocking: the selection server needs hosts of its own, give --servers\n"
    done = stand_ins.run("multi_host/slurm.sbatch", "c.yaml", "--ranks-per-node", "8", **SLURM)
    assert done.stderr == "error: selection.mode is blocking: the selection server needs nodes of its own, give --server-nodes\n"
    done = stand_ins.run("multi_host/slurm.sbatch", "c.yaml", "--ranks-per-node", "8", "--server-nodes", "3", **SLURM)
    assert done.stderr == "error: the job has 3 nodes; none is left to train beside --server-nodes 3\n"


def test_torchrun_starts_one_job(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "async")
    arguments = ("--hosts", "2", "--ranks-per-host", "8", "--meet", "a:7000", "--set", "run.seed=5")
    launch = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint a:7000 "
    launch += "--rdzv-id groupmates-{job} -m megatron_groupmates"
    for job in ("train", "serve"):
        assert stand_ins.run("multi_host/torchrun.sh", "c.yaml", "--job", job, *arguments).returncode == 0
        assert stand_ins.calls[-1] == launch.format(job=job) + f" {job} --config c.yaml --set run.seed=5"


def test_torchrun_inline_takes_turns(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "inline")
    done = stand_ins.run("multi_host/torchrun.sh", "c.yaml", "--job", "inline", "--hosts", "2", "--ranks-per-host", "8", "--meet", "a:7000")
    assert done.returncode == 0, done.stderr
    assert [call.partition(" -m megatron_groupmates ")[2] for call in stand_ins.calls] == [
        "train --config c.yaml",
        "serve --config c.yaml --once",
        "train --config c.yaml",
    ]


SRUN = "srun --relative {first} --nodes {count} --kill-on-bad-exit=1 --cpu-bind none "


def test_slurm_gives_the_last_nodes_to_the_server(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "async")
    done = stand_ins.run("multi_host/slurm.sbatch", "c.yaml", "--server-nodes", "1", "--ranks-per-node", "8", "--set", "a.b=c", **SLURM)
    assert done.returncode == 0, done.stderr
    step = SRUN + "--ntasks {count} --ntasks-per-node 1 torchrun --nnodes {count} --nproc-per-node 8 --rdzv-backend c10d "
    step += "--rdzv-endpoint {host} --rdzv-id 70001-{first} -m megatron_groupmates {job} --config c.yaml --set a.b=c"
    port = 15000 + 70001 * 16 % 15000
    assert sorted(stand_ins.calls) == [
        step.format(first=0, count=2, host=f"n1:{port}", job="train"),
        step.format(first=2, count=1, host=f"n3:{port + 2}", job="serve"),
    ]


def test_slurm_inline_without_torchrun(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "inline")
    done = stand_ins.run("multi_host/slurm.sbatch", "c.yaml", "--no-torchrun", "--ranks-per-node", "8", **SLURM)
    assert done.returncode == 0, done.stderr
    step = SRUN.format(first=0, count=3) + "--ntasks 24 --ntasks-per-node 8 python -u -m megatron_groupmates {job}"
    train = step.format(job="train --config c.yaml")
    assert stand_ins.calls == [train, step.format(job="serve --config c.yaml --once"), train]
    done = stand_ins.run("multi_host/slurm.sbatch", "c.yaml", "--ranks-per-node", "8", "--server-nodes", "1", **SLURM)
    assert done.stderr == "error: selection.mode is inline: all nodes do both, so leave out --server-nodes\n"


def test_slurm_scripts_are_submitted_from_the_repository(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path, "async")
    script = ROOT / "examples/multi_host/slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "c.yaml", "--ranks-per-node", "8"], cwd=tmp_path, env={**os.environ, **SLURM}, capture_output=True, text=True
    )
    assert done.stderr == f"error: submit from the root of the repository, not from {tmp_path}\n"
    assert stand_ins.calls == []
