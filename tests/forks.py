"""Fresh processes that needn't import anything: a server imports torch, Lightning and lit_methods once, and forks a child for each request.

An import of Lightning costs more processor time than most tests. What a child runs is what ``python <words>`` would run, with a current
folder, an environment, standard streams and an exit status of its own. Two things differ from a process that starts from nothing: what the
server has imported is there already, and environment variables that are read at those imports come too late. A test of the start itself
(import time, the console script) takes ``subprocess``.

:func:`interpreter` is a command that stands in for Python where a program starts processes by the name of an interpreter.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS = "LIT_METHODS_TEST_FORKS"
"""Environment variable: the folder of the server's socket, one for all test processes of a run."""
EXTRA = "LIT_METHODS_TEST_DESCRIPTOR"
"""Environment variable of a child that was given a further file descriptor: its number."""
INTERPRETER = "LIT_METHODS_TEST_INTERPRETER"
"""Environment variable of a child: what its ``sys.executable`` is, such as :func:`interpreter`, so that what it starts are forks, too."""
LIMIT = 1 << 24  # bytes of a request
HANGS = 300.0  # seconds after which a test is ended that would never end; no test takes a part of this


# ---- the server ------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what ``lit`` commands and two-process tests import."""
    from lit_methods.catalog import techniques

    for name in ("lit_methods.cli.lightning_cli", "lit_methods.callbacks.run.dashboard", "lit_methods.callbacks.run.preemption", "pytest"):
        importlib.import_module(name)
    for name in {dotted.rpartition(".")[0] for entry in techniques().values() for dotted in entry.classes}:
        with contextlib.suppress(ImportError):  # an optional library is missing; whoever needs it will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child leaves these objects alone: it would copy every page that the child shares with the server


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a child for every request, until nobody holds the server any more; returns in a child, with its request."""
    holders: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *holders], [], [])[0]:
            if ready is not listener:  # a test process has ended
                ready.close()
                holders.remove(ready)
                continue
            client, _ = listener.accept()
            request, descriptors = _receive(client)
            if request is None:
                client.close()
            elif request == "hold":
                holders.append(client)
                client.sendall(b"\n")
            elif os.fork():
                client.close()
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                for other in (listener, *holders):
                    other.close()
                child = os.fork()
                if not child:
                    client.close()
                    os.setpgid(0, 0)
                    assert isinstance(request, dict)
                    return request | {"descriptors": descriptors}
                with contextlib.suppress(OSError):  # the child has done it, and may have ended
                    os.setpgid(child, child)  # a group of its own, before anybody knows its number
                with contextlib.suppress(OSError):  # whoever asked has gone
                    client.sendall(f"{child}\n".encode())
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not holders:
            raise SystemExit(0)


def _receive(client: socket.socket) -> tuple[Any, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(client, 1 << 16, 8)
    while data and not data.endswith(b"\n"):
        more = client.recv(1 << 16)
        if not more or len(data) > LIMIT:
            return None, descriptors
        data += more
    return (json.loads(data) if data else None), descriptors


def become(request: dict[str, Any], path: list[str]) -> None:
    """Run the words of a request as ``python`` does, and end this process."""
    import random

    import numpy as np
    import torch

    for wanted, descriptor in enumerate(request["descriptors"][:3]):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["descriptors"][3:]:
        os.environ[EXTRA] = str(request["descriptors"][3])
    sys.executable = os.environ.get(INTERPRETER, sys.executable)
    os.chdir(request["folder"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    random.seed()
    np.random.seed()  # noqa: NPY002
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, *rest = request["words"]
    first = str(Path(kind).parent) if kind not in ("-m", "-c") else ""
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    for name in list(sys.modules):
        if name.partition(".")[0] in request["forget"]:
            del sys.modules[name]
    importlib.invalidate_caches()
    status = 0
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = [rest[0], *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status & 0xFF)


# ---- whoever asks ----------------------------------------------------------------------------------------------------

_held: socket.socket | None = None


def folder_of_the_server() -> Path:
    """Folder of the socket: the same for all processes of a test run."""
    if ADDRESS not in os.environ:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex  # xdist tells its test processes which run they belong to
        folder = Path(tempfile.gettempdir()) / f"lit-forks-{run[:12]}"  # short: the path of a socket has at most 100 letters
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ[ADDRESS] = str(folder)
    return Path(os.environ[ADDRESS])


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder_of_the_server() / "socket"))
    return connection


def hold() -> None:
    """Start the server unless one of the test processes has, and keep it until this process ends."""
    global _held
    if _held is not None:
        return
    folder = folder_of_the_server()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
            log = (folder / "server.txt").open("w")
            words = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder / "socket")]
            server = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
            assert server.stdout is not None
            if not server.stdout.readline():
                raise RuntimeError(f"the server of forked processes didn't start:\n{(folder / 'server.txt').read_text()}")
            atexit.register(_let_go, server)
        _held = _connect()
        _held.sendall(b'"hold"\n')
        _held.recv(1)


def _let_go(server: "subprocess.Popen[bytes]") -> None:
    if _held is not None:
        _held.close()
    server.wait()  # for the other test processes too: its processor time counts as ours
    shutil.rmtree(folder_of_the_server(), ignore_errors=True)


@dataclass
class Fork:
    """A running child.

    Attributes:
        pid: Process id, which is also its process group.
    """

    connection: socket.socket
    pid: int
    status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, negative for a signal.

        Raises:
            TimeoutError: It is still running after ``timeout`` seconds.
        """
        if self.status is None:
            self.connection.settimeout(timeout)
            self.status = int(_line(self.connection))
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and to all that it has started, unless it has ended."""
        if self.status is None and not select.select([self.connection], [], [], 0)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1)  # the next line, of a child that has ended already, stays in the socket
        if not more:
            raise ConnectionError("the server of forked processes has ended")
        data += more
    return data


def fork(
    words: Sequence[str],
    folder: str | Path = ".",
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (0, 1, 2),
    forget: Sequence[str] = (),
) -> Fork:
    """Start ``python <words>`` as a fork of the server.

    Args:
        words: ``-m module ...``, ``-c code ...`` or ``script.py ...``.
        folder: Its current folder.
        environment: The whole environment; None: this process's.
        descriptors: Standard input, output and error, and perhaps one more, whose number the child finds in :data:`EXTRA`.
        forget: Top-level packages that the child imports anew.
    """
    connection = _connect()
    request = {
        "words": list(words),
        "folder": str(Path(folder).resolve()),
        "environment": dict(environment or os.environ),
        "forget": list(forget),
    }
    data = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [data[: 1 << 15]], list(descriptors))
    connection.sendall(data[sent:])
    pid = int(_line(connection))
    return Fork(connection, pid)


def interpreter() -> str:
    """Path of a command that does what ``sys.executable`` does, with forks of the server."""
    hold()
    command = folder_of_the_server() / "python"
    if not command.exists():
        partial = command.with_suffix(f".{os.getpid()}")
        partial.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{Path(__file__).resolve()}" "$@"\n', encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(command)
    return str(command)


def _stand_in(words: list[str]) -> int:
    """Be ``python <words>``: pass signals on, and end as the child ends."""
    child = fork(words)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: child.kill(received))
    status = child.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        raise SystemExit(_stand_in(sys.argv[1:]))
    own_folder = str(Path(__file__).resolve().parent)
    import_path = [entry for entry in sys.path if entry not in ("", own_folder)]
    preload()
    door = socket.socket(socket.AF_UNIX)
    door.bind(sys.argv[2])
    door.listen(64)
    os.write(1, b"ready\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    asked = serve(door)
    door.close()
    become(asked, import_path)
