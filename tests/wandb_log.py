"""Reading back what W&B has written of an offline run: its own transaction log, without the service."""

import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers import HANGS


def transaction_log(path: Path) -> Iterator[Any]:
    """The records of a run's ``.wandb`` file: LevelDB's log format with a header of seven bytes, each record a protocol buffer.

    A record that isn't yet written to its end (the file is still being written, or its writer was killed) ends the log.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block that is too short for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items(entries: Any) -> dict[str, Any]:
    """Keys and values; what belongs to one medium or summary is a dict."""
    found: dict[str, Any] = {}
    for entry in entries:
        first, *inner = entry.nested_key or [entry.key]
        value = json.loads(entry.value_json)
        if inner:
            found.setdefault(first, {})[inner[0]] = value
        else:
            found[first] = value
    return found


@dataclass
class OfflineRun:
    """What a run has logged.

    Attributes:
        folder: The run's folder, which holds ``files/``.
        rows: One dict per log call: metrics, media, ``trainer/global_step``.
        metrics: ``define_metric`` records by name or glob.
        summary: Last values, and dicts such as ``{"last": 1.0, "min": 0.5}``.
        config: The run's config as logged.
        artifacts: Artifact records in the order of logging.
        run: The first record about the run itself: ``run_id``, ``run_group``, ``job_type``, ``display_name``.
        tags: The run's tags in the end, sorted.
        exit_code: 0 for a good end; None while the run isn't finished.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    run: Any = None
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def names(self) -> list[str]:
        """Names of everything that was logged, W&B's own left out."""
        return sorted({name for row in self.rows for name in row if not name.startswith("_")})

    def steps(self, name: str) -> list[int]:
        """Optimiser steps at which ``name`` was logged."""
        return [row["trainer/global_step"] for row in self.rows if name in row]

    def values(self, name: str) -> list[Any]:
        """What was logged under ``name``."""
        return [row[name] for row in self.rows if name in row]


def read_run(folder: Path) -> OfflineRun:
    """The only run under ``folder``, a run's own folder or one that holds it at any depth; it must be finished.

    ``finish()`` returns a little before W&B's process has closed the file, so this waits until nobody has it open.
    """
    (log,) = (path for path in folder.rglob("run-*.wandb") if not path.parent.is_symlink())
    deadline = time.monotonic() + HANGS
    while (found := _read(log)).exit_code is None or is_written(log):
        assert time.monotonic() < deadline, f"{log} isn't finished"
        time.sleep(0.02)
    return found


def is_written(path: Path) -> bool:
    """Whether a process has the file open."""
    if not Path("/proc/self/fd").is_dir():  # no Linux: whether it still grows
        size = path.stat().st_size
        time.sleep(1.0)
        return path.stat().st_size != size
    wanted = str(path.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or isn't ours
            if any(os.readlink(entry.path) == wanted for entry in os.scandir(descriptors)):
                return True
    return False


def _read(log: Path) -> OfflineRun:
    found = OfflineRun(log.parent)
    for record in transaction_log(log):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.rows.append(items(record.history.item))
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "summary":
            found.summary |= items(record.summary.update)
        elif kind == "config":
            found.config |= items(record.config.update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "run":
            found.run = found.run or record.run
            found.tags = sorted(record.run.tags) or found.tags
            found.config |= items(record.run.config.update)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(record.request.log_artifact.artifact)
    return found


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh machine: no key, no netrc, no mode, and no way out of Python."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # remembered, so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "localhost", "::1"), f"went out to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def kill_service() -> None:
    """End W&B's own process at once, as the operating system does when memory is short."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            words = (status.parent / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if parent == os.getpid() and b"wandb-core" in words:
            os.kill(int(status.parent.name), signal.SIGKILL)
