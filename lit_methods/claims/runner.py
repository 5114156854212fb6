"""Runs stages in processes of their own, each once: locks, cache, clean stop."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lit_methods.claims.display import Display
from lit_methods.claims.plan import MissingData, Node
from lit_methods.claims.sources import changed_sources
from lit_methods.errors import CommandError, nearest
from lit_methods.files import try_lock, write_json

CHILD = (sys.executable, "-m", "lit_methods.cli.stage", "run")
GRACE_SECONDS = 10.0  # between asking a stage to stop and killing it

Result = dict[str, Any]


class Runner:
    """Keeps one folder per stage, ``<root>/stages/<config>-s<seed>-<key>/``, with ``output.txt``, ``run/<time>/`` and ``result.json``.

    ``result.json`` is written last and whole, so a stage that was interrupted has none and starts anew. It holds: ``id`` (of this very
    run), ``upstream`` (the id of the run whose checkpoint it took), ``metrics`` (last value of each), ``seconds``, ``cost`` (what
    ``StepCost`` wrote, for a fit), ``checkpoint`` and ``run`` (relative to the root), ``sources`` (source file -> SHA-256), ``words``,
    ``kind`` (stages of one kind take about the same time), ``finished``. It counts as long as all its sources have that content, its
    checkpoint exists, and the stage before is still that very run. Data outside of the sources, such as a data set's folder, is not
    looked at.

    Args:
        root: Folder of all stages.
        threads: Torch threads of one stage; results must not depend on how many run at a time.
        slug: The study's; W&B groups its runs as ``<slug>-claim``.
        child: Command that takes a file for the sources and then the words of ``lit``.
    """

    def __init__(self, root: Path, threads: int, slug: str, child: Sequence[str] = CHILD) -> None:
        self.root, self.threads, self.slug, self.child = root.resolve(), threads, slug, tuple(child)

    def folder(self, node: Node) -> Path:
        """Folder of a stage."""
        return self.root / "stages" / node.name

    def cached(self, node: Node, upstream: Result | None) -> tuple[Result | None, str]:
        """The stage's result if it still counts, else why it has to run again ("": it never ran to its end)."""
        file = self.folder(node) / "result.json"
        if not file.is_file():
            return None, ""
        try:
            result: Result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None, "its result.json is damaged"
        if result["checkpoint"] and not (self.root / result["checkpoint"]).is_file():
            return None, "its checkpoint is gone"
        if result["upstream"] != (upstream["id"] if upstream else None):
            return None, "the stage before has run again"
        if changed := changed_sources(result["sources"]):
            return None, f"changed since: {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}"
        return result, ""

    def run(self, nodes: Sequence[Node], jobs: int = 1, display: Display | None = None) -> dict[str, Result]:
        """Run what isn't cached; key -> result of every stage.

        Args:
            nodes: Stages, upstream ones first.
            jobs: Stages at a time; any whose stage before is done may run.
            display: Where to show it; None: nowhere.

        Raises:
            MissingData: A stage didn't find its data, or a library; none of the others failed otherwise.
            CommandError: A stage failed. Those that ran beside it have been finished and kept.
            KeyboardInterrupt: Ctrl-C; the processes of all stages have been ended.
        """
        results: dict[str, Result] = {}
        waiting, running, failures = list(nodes), dict[str, tuple[Node, _Process]](), list[CommandError]()
        try:
            while running or (waiting and not failures):
                for node in list(waiting):
                    if failures or len(running) >= jobs or (node.upstream is not None and node.upstream.key not in results):
                        continue
                    self.folder(node).mkdir(parents=True, exist_ok=True)
                    lock = try_lock(self.folder(node) / "lock")
                    if lock is None:
                        continue  # another command runs it: its result will be there
                    waiting.remove(node)
                    upstream = results[node.upstream.key] if node.upstream else None
                    kept, why = self.cached(node, upstream)
                    if kept is not None:
                        lock.close()
                        results[node.key] = kept
                        if display:
                            display.kept()
                        continue
                    running[node.key] = (node, self._start(node, upstream, lock))
                    if display:
                        display.begins(node.name, why)
                for key, (node, process) in list(running.items()):
                    if process.popen.poll() is None:
                        continue
                    try:
                        results[key] = self._finish(node, process, results[node.upstream.key] if node.upstream else None)
                        if display:
                            rest = [other.kind for other in waiting] + [other.kind for other, _ in running.values() if other is not node]
                            display.ends(node.name, node.kind, results[key]["seconds"], rest)
                    except CommandError as error:
                        failures.append(error)
                    finally:
                        process.lock.close()
                        del running[key]
                if display:
                    rest = [other.kind for other in waiting] + [other.kind for other, _ in running.values()]
                    display.shows([other.name for other, _ in running.values()], rest)
                if running or waiting:
                    time.sleep(0.05)
        finally:
            stop([process.popen for _, process in running.values()])
            for _, process in running.values():
                process.lock.close()
        if failures and all(isinstance(failure, MissingData) for failure in failures):
            raise failures[0]
        if failures:
            raise CommandError("\n".join(map(str, failures)), exit_code=1)
        return results

    def _start(self, node: Node, upstream: Result | None, lock: TextIO) -> "_Process":
        folder = self.folder(node)
        for name in ("result.json", "missing.json"):
            (folder / name).unlink(missing_ok=True)  # out of date
        self.clear(folder)
        checkpoint = str(self.root / upstream["checkpoint"]) if upstream and upstream["checkpoint"] else ""
        words = [word.replace("{checkpoint}", checkpoint) for word in node.words] + ["--run_root", str(folder), "--name", "run"]
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            popen = subprocess.Popen(
                [*self.child, str(folder / "sources.json"), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(node),
                start_new_session=True,  # a group of its own: Ctrl-C reaches it through us, with all its workers
            )
        return _Process(popen, lock, time.monotonic())

    def clear(self, folder: Path) -> None:
        """What an interrupted stage has left goes, before it starts anew."""
        shutil.rmtree(folder / "run", ignore_errors=True)

    def environment(self, node: Node) -> dict[str, str]:
        """Environment variables of a stage: ours, its threads, and how W&B groups it unless the user has said so."""
        grouping = {
            "WANDB_RUN_GROUP": f"{self.slug}-claim",
            "WANDB_JOB_TYPE": "+".join(node.arms),
            "WANDB_TAGS": f"claim,{self.slug},seed-{node.seed}",
        }
        ours = {name: value for name, value in os.environ.items() if name != "LIT_METHODS_RUN_FOLDER"}
        threads = str(self.threads)
        return grouping | ours | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}

    def _finish(self, node: Node, process: "_Process", upstream: Result | None) -> Result:
        folder, status = self.folder(node), process.popen.returncode
        output = folder / "output.txt"
        run = max((folder / "run").iterdir(), default=None) if (folder / "run").is_dir() else None
        cost = json.loads((run / "cost.json").read_text(encoding="utf-8")) if run and (run / "cost.json").is_file() else None
        if status and (folder / "missing.json").is_file():
            raise MissingData(json.loads((folder / "missing.json").read_text(encoding="utf-8"))["missing"])
        if status or run is None or (node.fits and (cost is None or cost["interrupted"])):
            tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            reason = f"failed with status {status}" if status else "was stopped before its end"
            head = f"{' and '.join(node.arms)}, seed {node.seed}: stage {reason}: lit {' '.join(node.words)}"
            raise CommandError("\n".join([head, *(f"  {line}" for line in tail), f"  all of it: {output}"]), exit_code=1)
        last = run / "checkpoints" / "last.ckpt"
        result = {
            "id": uuid.uuid4().hex,
            "upstream": upstream["id"] if upstream else None,
            "metrics": last_metrics(run / "metrics.jsonl"),
            "seconds": round(time.monotonic() - process.started, 1),
            "cost": cost,
            "checkpoint": str(last.relative_to(self.root)) if last.is_file() else (upstream["checkpoint"] if upstream else ""),
            "run": str(run.relative_to(self.root)),
            "sources": json.loads((folder / "sources.json").read_text(encoding="utf-8")),
            "words": node.words,
            "kind": node.kind,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(folder / "result.json", result)
        return result


class _Process:
    def __init__(self, popen: "subprocess.Popen[bytes]", lock: TextIO, started: float) -> None:
        self.popen, self.lock, self.started = popen, lock, started


def stop(processes: Sequence["subprocess.Popen[bytes]"], grace: float = GRACE_SECONDS) -> None:
    """End processes with all that they started: ask, wait, kill."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, name)  # also the workers of a process that is gone
        limit = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))


@contextlib.contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_metrics(file: Path) -> dict[str, float]:
    """Last value of each metric of a run; {} without a file."""
    metrics: dict[str, float] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            metrics.update({name: float(value) for name, value in json.loads(line)["metrics"].items()})
    return metrics


def value_of(result: Mapping[str, Any], metric: str, node: Node, config: Mapping[str, Any] | None = None) -> float:
    """A metric of a finished stage.

    Args:
        result: What the stage left.
        metric: The metric's name.
        node: The stage, for messages.
        config: The stage's resolved config, which may say why a metric is missing.

    Raises:
        CommandError: It wasn't logged, or isn't finite.
    """
    where = f"{' and '.join(node.arms)}, seed {node.seed}, stage {node.name}"
    if metric not in result["metrics"]:
        logged = sorted(result["metrics"])
        why = why_missing(metric, logged, node.words[0], (config or {}).get("trainer") or {})
        raise CommandError(f"{where}: no metric {metric!r}; logged were: {', '.join(logged) or 'nothing'}\n  {why}", exit_code=1)
    value = float(result["metrics"][metric])
    if not math.isfinite(value):
        raise CommandError(f"{where}: {metric} is {value}: the run has diverged, see {result['run']}/report.html", exit_code=1)
    return value


def why_missing(metric: str, logged: Sequence[str], command: str, trainer: Mapping[str, Any]) -> str:
    """Why a stage has not logged a metric, as far as its name, the logged names and the trainer's settings tell.

    Args:
        metric: The name that is missing.
        logged: The names that are there.
        command: ``fit``, ``validate`` or ``test``.
        trainer: Settings of the stage's trainer; may be empty.
    """
    if not logged:
        every = trainer.get("log_every_n_steps")
        return "the run logged nothing: " + (
            f"it may have ended before its first entry (trainer.log_every_n_steps is {every})"
            if command == "fit" and every
            else "see its output"
        )
    of_validation = re.compile(r"(^|[/_])val(id|idation)?([/_]|$)")
    if command == "fit" and of_validation.search(metric) and not any(map(of_validation.search, logged)):
        epochs, between = trainer.get("max_epochs"), trainer.get("check_val_every_n_epoch")
        if trainer.get("limit_val_batches") == 0:
            return "validation did not run: trainer.limit_val_batches is 0"
        if between and epochs and 0 < epochs < between:
            return f"validation did not run: it comes every {between} epochs, and trainer.max_epochs is {epochs}"
        interval, steps = trainer.get("val_check_interval"), trainer.get("max_steps") or -1
        if isinstance(interval, int) and 0 < steps < interval:
            return f"validation did not run: it comes every {interval} batches, and trainer.max_steps is {steps}"
        return "no metric of a validation was logged: there is no validation data, or the run ended before its first validation"
    near = nearest(metric, logged)
    return f"nearest: {', '.join(near)}" if near else "no logged name is like it: does the model or a callback log it in this stage?"
