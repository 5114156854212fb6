"""Where trials run: processes of this machine, or jobs of SLURM through submitit."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_methods.claims.runner import stop
from lit_methods.errors import CommandError

CHILD = (sys.executable, "-m", "lit_methods")
OUTPUT = "output.txt"  # of a trial, in its folder


class Running(Protocol):
    """A trial that runs."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""

    def stop(self) -> None:
        """Ask it to end, and wait."""


class Launcher(Protocol):
    """Starts trials."""

    def start(self, tasks: Sequence[tuple[Sequence[str], Path]]) -> Sequence[Running]:
        """Start ``lit`` with some words for each folder."""


class _Process:
    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen

    def poll(self) -> int | None:
        return self._popen.poll()

    def stop(self) -> None:
        stop([self._popen])


class Processes:
    """Trials as processes of this machine, each with its output in a file.

    Args:
        devices: GPU ids; each trial gets one of them, the one that fewest have. (): trials see what this process sees.
        child: Command that takes the words of ``lit``.
    """

    def __init__(self, devices: Sequence[str] = (), child: Sequence[str] = CHILD) -> None:
        self._child = tuple(child)
        self._taken: dict[str, list[_Process]] = {device: [] for device in devices}

    def start(self, tasks: Sequence[tuple[Sequence[str], Path]]) -> Sequence[Running]:
        """Start them all."""
        return [self._start(words, folder) for words, folder in tasks]

    def _start(self, words: Sequence[str], folder: Path) -> _Process:
        environment = _environment()
        device = None
        if self._taken:
            busy = {name: sum(process.poll() is None for process in processes) for name, processes in self._taken.items()}
            device = min(busy, key=lambda name: busy[name])
            environment["CUDA_VISIBLE_DEVICES"] = device
        with (folder / OUTPUT).open("a", encoding="utf-8") as output:
            popen = subprocess.Popen(
                [*self._child, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through us, with all its workers
            )
        process = _Process(popen)
        if device is not None:
            self._taken[device].append(process)
        return process


class Task:
    """What a job of SLURM runs; it goes on where it stopped when it is preempted or out of time."""

    def __init__(self, words: Sequence[str], folder: Path, child: Sequence[str] = CHILD) -> None:
        self.words, self.folder, self.child = list(words), folder, tuple(child)

    def __call__(self) -> int:
        """Run ``lit`` to its end; its exit status."""
        with (self.folder / OUTPUT).open("a", encoding="utf-8") as output:
            command = [*self.child, *self.words]
            to_file = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            return subprocess.run(command, env=_environment(), check=False, **to_file).returncode  # type: ignore[call-overload, no-any-return]

    def checkpoint(self) -> Any:
        """The same words again: ``--resume auto`` is among them."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class _Job:
    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            status: int = self._job.result()
        except Exception as error:  # the job died without a result; whatever submitit makes of it, the trial has failed
            print(f"job {self._job.job_id}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            return 1
        return status

    def stop(self) -> None:
        self._job.cancel(check=False)


class Jobs:
    """Trials as jobs of a cluster; those that start together are one array.

    Args:
        folder: Where submitit keeps what it needs, on a disk that all nodes see.
        cluster: ``slurm``; ``local``: processes of this machine, ``debug``: this process, both for trying it out.
        options: submitit's, such as ``slurm_partition``, ``timeout_min``, ``gpus_per_node``.
        child: Command that takes the words of ``lit``.

    Raises:
        CommandError: submitit is missing, or refuses the options.
    """

    def __init__(self, folder: Path, cluster: str, options: Mapping[str, Any], child: Sequence[str] = CHILD) -> None:
        try:
            import submitit
        except ImportError as error:
            raise CommandError('--cluster needs submitit: pip install "lit-methods[slurm]"', exit_code=1) from error
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**options)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise CommandError(f"--cluster {cluster}: {error}", exit_code=1) from error
        self._child = tuple(child)

    def start(self, tasks: Sequence[tuple[Sequence[str], Path]]) -> Sequence[Running]:
        """Submit them, as one array where there are several."""
        with self._executor.batch():
            jobs = [self._executor.submit(Task(words, folder.resolve(), self._child)) for words, folder in tasks]
        return [_Job(job) for job in jobs]


def _environment() -> dict[str, str]:
    """This process's variables, but for what would lead all trials into one run folder."""
    return {name: value for name, value in os.environ.items() if name != "LIT_METHODS_RUN_FOLDER"} | {"PYTHONUNBUFFERED": "1"}
