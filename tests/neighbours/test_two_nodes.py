"""Two nodes: ``torchrun --nnodes 2`` twice on this machine, as a cluster's launcher would start it, against the same run on one node."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import HANGS

pytestmark = pytest.mark.slow

WORDS = [
    *("fit", "--config", "configs/tcm.yaml", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"),
    *("--trainer.max_steps", "6", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(nodes: int, processes: int, runs: Path) -> list[str]:
    """Run ``lit`` on ``nodes`` agents with ``processes`` each; returns what they print."""
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", free_port()),
    ]
    lit = ["-m", "lit_methods", *WORDS, "--trainer.num_nodes", str(nodes), "--trainer.devices", str(processes), "--run_root", str(runs)]
    started = [
        subprocess.Popen(
            [*agent, "--node-rank", str(node), *lit],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    printed = [process.communicate(timeout=HANGS)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, printed
    return printed


def test_two_nodes_share_a_run_and_end_like_one(tmp_path: Path) -> None:
    start(2, 1, tmp_path / "two")
    start(1, 2, tmp_path / "one")
    ends = []
    for name in ("two", "one"):
        (run,) = (tmp_path / name / "tcm").iterdir()  # one folder, whichever node was first
        ends.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True))
        assert (run / "report.html").is_file()
    assert ends[0]["global_step"] == 6
    for key, value in ends[0]["state_dict"].items():
        torch.testing.assert_close(value, ends[1]["state_dict"][key], rtol=0, atol=0)
