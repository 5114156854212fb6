"""One process writes a run's folder: a lock that goes with its process, and says who holds it.

The lock is one of the system's (``fcntl.lockf``) on the file ``.lock`` in the run's folder. It ends with the process, however that ends,
and NFS with a lock service knows it on all hosts. The file holds who took it, so that a message can name the process.

Where the file system or the system (Windows) has no such locks, the file's existence is the lock. It outlives a kill, so its owner is
looked at: one of this host that lives no more doesn't count, nor does an earlier start of the same SLURM job. The owner on another host
can't be looked at: the folder is refused, and the message says which file to delete.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO, Any, Literal

from lit_methods.errors import CommandError
from lit_methods.files import shown

LOCK = ".lock"
_NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL") if hasattr(errno, name)}
_TAKEN = (errno.EAGAIN, errno.EACCES)
_MAKING = 60.0  # seconds for which an empty file may be a lock that is being written
_HELD: dict[Path, "RunLock"] = {}  # of this process: a system's lock is gone as soon as its process closes the file once


class RunInUse(CommandError):
    """Another process writes the run's folder; the message says which one, and what to do."""

    def __init__(self, folder: Path) -> None:
        owner, file = _owner(folder), folder / LOCK
        advice = "wait until it has ended, or end it; without --resume auto a run gets a folder of its own"
        if owner.get("kind") == "file" and owner.get("host") != socket.gethostname():
            advice = f"if it has ended, delete {shown(file)}: this file system has no locks that end with their process"
        super().__init__(f"{shown(folder)} is being written by {described(owner)}, and two runs would mix their files\n  {advice}", 1)


class RunLock:
    """A lock that is held, until :meth:`close` or the end of the process."""

    def __init__(self, folder: Path, file: IO[str] | None) -> None:
        self.folder, self._file, self._process = folder, file, os.getpid()
        self.holders = 1  # the command and its callback may hold it both

    @property
    def mine(self) -> bool:
        """Whether this process took it: a fork inherits the object and not the lock."""
        return self._process == os.getpid()

    def renew(self, file: IO[str] | None) -> None:
        """Hold another file in the same place."""
        if self._file is not None:
            self._file.close()
        self._file, self.holders = file, self.holders + 1

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, where nobody else in this process holds it. The file goes first, while no other process can hold it."""
        if not self.mine or self.holders == 0:
            return
        self.holders -= 1
        if self.holders:
            return
        _HELD.pop(self.folder, None)
        with contextlib.suppress(OSError):
            (self.folder / LOCK).unlink()
        if self._file is not None:
            self._file.close()


def lock_run(folder: Path) -> RunLock | None:
    """Hold the run in ``folder`` as long as this process lives or the lock isn't closed.

    The lock is the process's own: loader workers don't inherit it, so it goes with the process even if they outlive it.

    Returns:
        The lock, the one of before where this process has it already; None where another process holds it.

    Raises:
        OSError: The folder can't be written.
    """
    folder = folder.resolve()
    if (held := _HELD.get(folder)) is not None and held.mine and (folder / LOCK).exists():
        held.holders += 1
        return held
    file = _system_lock(folder)
    if file is False or (file is None and not _file_lock(folder)):
        return None
    if held is not None and held.mine:  # the folder was deleted under way, and made anew
        held.renew(file)
        return held
    lock = _HELD[folder] = RunLock(folder, file)
    return lock


def hold_run(folder: Path) -> RunLock | None:
    """Like :func:`lock_run`, but refuses where another run's process holds the folder.

    Returns:
        The lock; None in a process that the holder has started for its own run, as ``ddp_spawn`` does.

    Raises:
        RunInUse: Another process holds it.
        OSError: The folder can't be written.
    """
    lock = lock_run(folder)
    if lock is None:
        owner, parent = _owner(folder), multiprocessing.parent_process()
        if parent is None or (owner.get("pid"), owner.get("host")) != (parent.pid, socket.gethostname()):
            raise RunInUse(folder)
    return lock


def in_use(folder: Path) -> bool:
    """Whether another process holds the run in ``folder``; False where that can't be known."""
    folder = folder.resolve()
    file = folder / LOCK
    if not file.is_file() or ((held := _HELD.get(folder)) is not None and held.mine):
        return False
    if (owner := _owner(folder)).get("kind") == "file":
        return not _gone(owner, file)
    try:
        import fcntl

        with open(file, "r+", encoding="utf-8") as opened:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):
        return False
    return False


def described(owner: dict[str, Any]) -> str:
    """A lock's owner in words: ``process 12 on node7, since 2026-01-31 10:00``."""
    if not isinstance(owner.get("pid"), int):
        return "another process"
    return f"process {owner['pid']} on {str(owner.get('host'))[:80]!r}, since {str(owner.get('since'))[:20]}".replace("'", "")


def _system_lock(folder: Path) -> IO[str] | Literal[False] | None:
    """The file with the system's lock on it; False where another process has that, None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    if not _has_locks(folder, fcntl):
        return None
    while True:
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in _TAKEN:
                return False
            raise
        if not _still(file, folder / LOCK):  # its holder has deleted it in between
            file.close()
            continue
        file.seek(0)
        if _read(file.read()).get("kind") == "file":  # of a host that sees no locks here
            file.close()
            return None
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), _me("lock"))
        return file


def _has_locks(folder: Path, fcntl: Any) -> bool:
    """Whether the folder's file system knows locks: tried on a file of our own, as the lock's mere existence may mean something."""
    trial = folder / f"{LOCK}.{secrets.token_hex(6)}.tmp"
    try:
        with open(trial, "w", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True


def _still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _file_lock(folder: Path) -> bool:
    """Take the lock that consists in the file's existence; False where an owner that may live has it."""
    path = folder / LOCK
    for _ in range(3):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            owner = _owner(folder)
            if not _gone(owner, path):
                return False
            aside = path.with_name(f"{LOCK}.{secrets.token_hex(6)}.tmp")
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, aside)  # of two that find it stale only one moves it
                if _read_file(aside) != owner:  # another one was faster, and this is its lock
                    os.rename(aside, path)
                    return False
                aside.unlink()
            continue
        try:
            os.write(descriptor, _me("file"))
        finally:
            os.close(descriptor)
        return True
    return False


def _me(kind: str) -> bytes:
    """This process as a lock's owner."""
    me = {
        "kind": kind,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "born": _born(os.getpid()),
        "job": [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return json.dumps(me).encode()


def _born(pid: int) -> str | None:
    """When a process was started, so that a later one with its number isn't taken for it; None where that can't be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _gone(owner: dict[str, Any], path: Path) -> bool:
    """Whether the owner of a lock that consists in a file has ended for certain."""
    if not owner:  # being made, or left by a version or a crash that wrote nothing
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _MAKING
        return True
    job, restart = (owner.get("job") or [None, None])[:2]
    if job is not None and job == os.environ.get("SLURM_JOB_ID") and restart != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return True  # SLURM starts a job again when it has ended
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return owner.get("born") is not None and owner["born"] != _born(pid)


def _owner(folder: Path) -> dict[str, Any]:
    return _read_file(folder / LOCK)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return _read(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _read(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
