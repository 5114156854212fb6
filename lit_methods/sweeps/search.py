"""Runs the trials of a sweep: starts them, reads what they log, stops those that are behind, and tells the study how they ended."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.errors import CommandError, nearest
from lit_methods.files import write_json
from lit_methods.sweeps.launch import OUTPUT, Launcher, Running
from lit_methods.sweeps.study import SUMMARY, Study

if TYPE_CHECKING:
    import optuna

FAILURES = 3  # trials that fail one after the other before the sweep stops: the next one would, too
TAIL = 8  # lines of a failed trial's output that are shown


@dataclass
class _Active:
    trial: "optuna.Trial"
    process: Running
    folder: Path
    started: float
    early: bool = False


def search(
    study: Study,
    launcher: Launcher,
    total: int | None,
    jobs: int,
    passed: Sequence[str] = (),
    say: Callable[[str], None] = print,
    pause: float = 0.2,
) -> None:
    """Run trials until there are ``total``, or the grid is whole; those of an interrupted call go on first.

    Args:
        study: What chooses.
        launcher: What runs them.
        total: Trials in all; None for a whole grid.
        jobs: Trials at a time.
        passed: Further words for every trial.
        say: Where progress is told.
        pause: Seconds between two looks.

    Raises:
        CommandError: Several trials failed one after the other.
        KeyboardInterrupt: The trials' processes have been ended; a further call goes on with them.
    """
    waiting = study.unfinished()
    active: list[_Active] = []
    failures = 0
    try:
        while True:
            room = jobs - len(active)
            starting = waiting[:room]
            waiting = waiting[room:]
            while len(starting) < room and study.left(total):
                starting.append(study.ask())
            active += _start(study, launcher, starting, passed, say)
            if not active:
                break
            for one in list(active):
                status = _look(study, one)
                if status is None:
                    continue
                active.remove(one)
                failures = 0 if _finish(study, one, status, say) else failures + 1
                write_json(study.folder / SUMMARY, study.summary())
                if failures >= FAILURES:
                    tail = _tail(one.folder)
                    raise CommandError(f"{failures} trials failed one after the other; the last one:\n{tail}", exit_code=1)
            time.sleep(pause)
    finally:
        for one in active:
            one.process.stop()
        write_json(study.folder / SUMMARY, study.summary())


def _start(
    study: Study, launcher: Launcher, trials: "Sequence[optuna.Trial]", passed: Sequence[str], say: Callable[[str], None]
) -> list[_Active]:
    tasks = []
    for trial in trials:
        folder = study.folder / "trials" / f"{trial.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        values = study.values_of(trial)
        say(f"trial {trial.number}: {', '.join(f'{key}={value}' for key, value in values.items())}")
        words = [*study.sweep.trial_words(values), *passed, "--run_root", str(folder), "--name", "run", "--resume", "auto"]
        tasks.append((words, folder))
    if not tasks:
        return []
    return [
        _Active(trial, process, folder, time.monotonic())
        for trial, process, (_, folder) in zip(trials, launcher.start(tasks), tasks, strict=True)
    ]


def _look(study: Study, one: _Active) -> int | None:
    """The exit status of a trial that has ended; one that is behind is ended here."""
    status = one.process.poll()
    logged = logged_values(one.folder, study.sweep.metric)
    if study.watch(one.trial, logged) and status is None:
        one.process.stop()
        one.early = True
        return 0
    return status


def _finish(study: Study, one: _Active, status: int, say: Callable[[str], None]) -> bool:
    """Tell how a trial ended; False for a failure."""
    sweep, logged, run = study.sweep, logged_values(one.folder, study.sweep.metric), newest_run(one.folder)
    facts: dict[str, Any] = {"seconds": round(time.monotonic() - one.started, 1), "logged": len(logged)}
    facts |= {"run": str(run.relative_to(study.folder))} if run else {}
    why = ""
    if status:
        why = f"it ended with status {status}"
    elif not logged:
        names = sorted(_metrics(run)) if run else []
        near = nearest(sweep.metric, names) or names
        why = f"it never logged {sweep.metric}" + (f"; logged were {', '.join(near[:8])}" if near else ", nor anything else")
    elif not math.isfinite(logged[-1]):
        why = f"{sweep.metric} is {logged[-1]}"
    state = "failed" if why else "stopped early" if one.early else "finished"
    study.finish(one.trial, state, logged[-1] if logged else None, why, facts)
    said = why if why else f"{sweep.metric} {logged[-1]:.5g}"
    say(f"trial {one.trial.number}: {state}, {said}, {facts['seconds']:.0f} s")
    if why and status:
        say(_tail(one.folder))
    return not why


def newest_run(folder: Path) -> Path | None:
    """The run of a trial: the newest one, where an early kill left another behind."""
    runs = sorted((path for path in (folder / "run").glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1] if runs else None


def logged_values(folder: Path, metric: str) -> list[float]:
    """Values of a metric that a trial has logged so far, in order."""
    run = newest_run(folder)
    return [] if run is None else _metrics(run).get(metric, [])


def _metrics(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            values = json.loads(line)["metrics"]
        except (ValueError, KeyError, TypeError):  # its last line is being written
            continue
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    return found


def _tail(folder: Path) -> str:
    file = folder / OUTPUT
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if file.is_file() else []
    return "\n".join([*(f"  {line}" for line in lines), f"  all of it: {file}"])
