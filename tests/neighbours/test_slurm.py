"""A real SLURM of one node: a job of two tasks is told to stop, saves itself, is queued again by its own request, and ends like any other.

    apt-get install slurm-wlm munge

The test starts the three services itself, with a configuration in a folder of its own; it needs root, as SLURM does.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import HANGS

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
missing = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing) or os.geteuid() != 0, reason=f"a SLURM of one node needs root and {', '.join(missing) or 'nothing else'}"
    ),
]

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
JobRequeue=1
MpiDefault=none
NodeName={host} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""
JOB = """#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --requeue --open-mode=append --output={log}
export OMP_NUM_THREADS=1
srun {python} -m lit_methods fit --config configs/tcm.yaml --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp \\
  --trainer.max_steps {steps} --trainer.max_epochs -1 --trainer.log_every_n_steps 1 --run_root {runs} --resume auto
"""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``; fails when it hangs."""
    end = time.monotonic() + HANGS
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited in vain for {what}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs a command of SLURM and returns what it prints."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=free_ports(2), folder=folder))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)

    def command(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    services = [
        subprocess.Popen([name, "-D", *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, more in (("slurmctld", []), ("slurmd", []))
    ]
    try:
        wait_for(lambda: "idle" in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout, "an idle node")
        yield command
    finally:
        for service in services:
            service.terminate()
        for service in services:
            service.wait()


def steps_logged(runs: Path) -> int:
    lines = [line for file in runs.glob("tcm/*/metrics.jsonl") for line in file.read_text().splitlines()]
    return len(lines)


def weights(runs: Path) -> dict[str, torch.Tensor]:
    (file,) = runs.glob("tcm/*/checkpoints/last.ckpt")
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return loaded


def test_a_job_that_is_told_to_stop_is_queued_again_and_ends_like_one_that_was_not(slurm: Callable[..., str], tmp_path: Path) -> None:
    def submit(name: str, steps: int) -> tuple[str, Path, Path]:
        log, runs, script = tmp_path / f"{name}.log", tmp_path / name, tmp_path / f"{name}.sh"
        script.write_text(JOB.format(log=log, python=sys.executable, steps=steps, runs=runs))
        return re.findall(r"\d+", slurm("sbatch", str(script)))[0], log, runs

    def state(job: str) -> str:
        return re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[0]

    steps = 400
    job, log, runs = submit("stopped", steps)
    wait_for(lambda: steps_logged(runs) > 10 or state(job) == "FAILED", "the first steps of the job")
    assert state(job) == "RUNNING", log.read_text()
    slurm("scancel", "--signal=USR1", job)
    wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job) and state(job) == "PENDING", "the job in the queue again")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM itself lets two minutes pass
    wait_for(lambda: state(job) in {"COMPLETED", "FAILED", "CANCELLED"}, "the end of the job")
    assert state(job) == "COMPLETED", log.read_text()
    assert "starts job" in log.read_text()
    (run,) = runs.glob("tcm/*")
    assert len((run / "restarts.jsonl").read_text().splitlines()) == 1

    other, other_log, other_runs = submit("whole", steps)
    wait_for(lambda: state(other) in {"COMPLETED", "FAILED", "CANCELLED"}, "the end of the second job")
    assert state(other) == "COMPLETED", other_log.read_text()
    ours, whole = weights(runs), weights(other_runs)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
