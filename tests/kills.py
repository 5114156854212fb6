"""Runs of the ``lit`` command that are killed at named points, many for the price of one parse of the command.

What SIGKILL leaves behind at a point is what lies on the disk there. So one run is left to come to its end, and at each of its points the
folder is kept as it is; every one of these folders is gone on with by the same command and compared with the uninterrupted run. SIGTERM is
sent for real, since the run answers it. All runs of a technique are forks of one process that has parsed the command and built nothing.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from lit_methods.cli.lightning_cli import LitCLI
from lit_methods.cli.resume import FINISHED

FINAL = "final.pt"  # everything at the end of training, behind all callbacks
# measured times, and what follows from them
MEASURED = re.compile(r"second|time|throughput|memory|per_s\b|step_cost|_ms\b")
NAMED = (
    *("checkpoint write", "checkpoint written", "report write", "report written", "first validation batch", "last validation batch"),
    *("validation end", "epoch end", "training end", "fit end", "label store write", "label store written", "row written"),
)

_reached: Callable[[str], None] = lambda name: None  # noqa: E731  (what happens at a point: replaced in a run that is watched)


class Points(Checkpoint):
    """Tells where the run is; Lightning calls it behind all other callbacks. Keeps the end of training for comparison."""

    def on_train_batch_start(self, *_: Any) -> None:
        _reached("batch")

    def on_before_optimizer_step(self, *_: Any) -> None:
        _reached("step")

    def on_train_batch_end(self, *_: Any) -> None:
        _reached("batch end")

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            _reached("first validation batch")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch and not trainer.sanity_checking:
            _reached("last validation batch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            _reached("validation end")

    def on_train_epoch_end(self, *_: Any) -> None:
        _reached("epoch end")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from lit_methods.runs.folder import run_dir

        trainer.save_checkpoint(run_dir(trainer) / FINAL)
        _reached("training end")

    def on_fit_end(self, *_: Any) -> None:
        _reached("fit end")


def _watch_files() -> None:
    """Make points of the moments before and behind the renames that put a file in its place, and of each row of the history."""
    from lit_methods.callbacks.run import dashboard

    replace, append = os.replace, dashboard._append

    def kind(path: Path) -> str | None:
        if path.suffix == ".ckpt":
            return "checkpoint"
        return "label store" if path.name.startswith("corrected-") else "report" if path.name == "report.html" else None

    def told(source: Any, target: Any, **kwargs: Any) -> None:
        what = kind(Path(target))
        if what:
            _reached(f"{what} write")
        replace(source, target, **kwargs)
        if what:
            _reached(f"{what} written")

    def told_row(path: Path, text: str) -> None:
        append(path, text)
        _reached("row written")

    os.replace, dashboard._append = told, told_row


# ---- processes -------------------------------------------------------------------------------------------------------------------------


class _Child(Exception):
    """Brings a fork back to the command that it is to run."""


class _Done(Exception):
    """All runs are done."""


@dataclass
class Case:
    """One kill: what was done, at which point, how it went."""

    slug: str
    mode: str
    signal: str
    point: str
    wrong: str = ""


def _run(cli: LitCLI, root: Path, reached: Callable[[str], None] | None = None) -> int:
    """Run the parsed command in a fork, with ``root`` as the folder of runs; its exit status."""
    global _reached
    root.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(root.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cli.config[cli.subcommand].run_root = str(root)
    if reached is not None:
        _reached = reached
        _watch_files()
    raise _Child


def kept(source: Path, target: Path) -> None:
    """Copy a folder as a kill would leave it now; files that are only ever replaced are linked."""

    def copy(one: str, other: str) -> str:
        in_place = Path(one).suffix in (".jsonl", ".csv", ".bin", ".json", ".lock", ".yaml", "") or ".0." in Path(one).name
        (shutil.copy2 if in_place else os.link)(one, other)
        return other

    shutil.copytree(source, target, copy_function=copy, symlinks=True)


def chosen(names: list[str], count: int) -> list[int]:
    """Which points are tried: the first and the last of each named kind, and the others evenly over the run."""
    named = [[index for index, name in enumerate(names) if name == kind] for kind in NAMED]
    picked = [places[0] for places in named if places] + [places[-1] for places in named if len(places) > 1]
    picked = list(dict.fromkeys(picked))[: max(count - count // 4, 1)]
    rest = [index for index in range(len(names)) if index not in picked]
    missing = max(0, count - len(picked))
    picked += [rest[int((step + 0.5) * len(rest) / missing)] for step in range(missing) if rest]
    return sorted(set(picked))


def all_cases(cli: LitCLI, slug: str, mode: str, folder: Path, kills: int, terms: int) -> Iterator[Case]:
    """Kill and go on: ``kills`` times by SIGKILL and ``terms`` times by SIGTERM."""
    names: list[str] = []
    whole = folder / "whole"

    def keep(name: str) -> None:
        kept(whole, folder / f"at-{len(names)}")
        names.append(name)

    keep.names = names  # type: ignore[attr-defined]  # the fork that runs writes them down at its end
    status = _run(cli, whole, keep)
    points = folder / "points.json"
    if status or not points.is_file():
        yield Case(slug, mode, "", "", f"the uninterrupted run ended with {status}: {whole.with_suffix('.log').read_text()[-1500:]}")
        return
    names = json.loads(points.read_text())
    expected = end_of(whole)
    for index in chosen(names, kills):
        yield _gone_on(cli, Case(slug, mode, "SIGKILL", f"{index} {names[index]}"), folder / f"at-{index}", expected)
    for index in chosen(names, max(terms, 4))[:: max(1, max(terms, 4) // max(terms, 1))][:terms]:
        case, root = Case(slug, mode, "SIGTERM", f"{index} {names[index]}"), folder / f"term-{index}"
        count = itertools.count()  # a run that is stopped may pass more points than a whole one

        def stop(_: str, index: int = index, count: Iterator[int] = count) -> None:
            if next(count) == index:
                os.kill(os.getpid(), signal.SIGTERM)

        status = _run(cli, root, stop)
        if status not in (143, 0, -signal.SIGTERM):  # it may come before training listens, or behind its last step
            case.wrong = f"exit status {status}: {root.with_suffix('.log').read_text()[-1500:]}"
            yield case
        else:
            yield _gone_on(cli, case, root, expected)
    for rest in folder.glob("at-*"):
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _gone_on(cli: LitCLI, case: Case, root: Path, expected: dict[str, Any]) -> Case:
    status = _run(cli, root)
    try:
        assert status == 0, f"exit status {status}: {root.with_suffix('.log').read_text()[-1500:]}"
        case.wrong = "; ".join(differences(end_of(root), expected))
    except Exception as error:
        case.wrong = f"{type(error).__name__}: {error}"
    if not case.wrong:
        shutil.rmtree(root, ignore_errors=True)
    return case


def end_of(root: Path) -> dict[str, Any]:
    """What must be equal at the end of the one finished run below ``root``."""
    (marker,) = root.glob(f"*/*/{FINISHED}")
    state = torch.load(marker.parent / FINAL, map_location="cpu", weights_only=True)
    ours = {name: value for name, value in state["callbacks"].items() if not name.startswith(("ModelCheckpoint", "RunFolder", "StepCost"))}
    return {
        "weights": state["state_dict"],
        "optimisers": state["optimizer_states"],
        "schedules": state["lr_schedulers"],
        "step": state["global_step"],
        "epoch": state["epoch"],
        "batches": state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"],
        "rows": logged_rows(marker.parent),
        "callbacks": ours,
    }


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``, without measured times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["metrics"] = {name: value for name, value in row["metrics"].items() if not MEASURED.search(name)}
    return [row for row in rows if row["metrics"]]


def differences(actual: Any, expected: Any, where: str = "") -> list[str]:
    """Where two nested values differ, at most three places of each part."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        same = actual.dtype == expected.dtype and actual.shape == expected.shape and torch.equal(actual.nan_to_num(), expected.nan_to_num())
        return [] if same else [where]
    if isinstance(expected, dict) and isinstance(actual, dict):
        found = [f"{where} has {sorted(map(str, set(actual) ^ set(expected)))[:3]} on one side"] if set(actual) != set(expected) else []
        for key in expected:
            if key in actual:
                found += differences(actual[key], expected[key], f"{where}.{key}".strip("."))
        return found[: 3 if where else None]
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        found = [f"{where} has {len(actual)} entries instead of {len(expected)}"] if len(actual) != len(expected) else []
        for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
            found += differences(one, other, f"{where}[{index}]")
        return found[:3]
    return [] if actual == expected or (actual != actual and expected != expected) else [f"{where}: {actual} instead of {expected}"[:200]]


def main() -> None:
    """``slug mode folder kills terms words...`` of ``sys.argv``: try all kills of one command, and print each as a line of JSON."""
    slug, mode, folder, kills, terms, *words = sys.argv[1:]
    place = Path(folder)
    begin = LitCLI.before_instantiate_classes

    def parsed(cli: LitCLI) -> None:
        for case in all_cases(cli, slug, mode, place, int(kills), int(terms)):
            print(json.dumps(vars(case)), flush=True)
        raise _Done

    def before(cli: LitCLI) -> None:
        try:
            parsed(cli)
        except _Child:
            begin(cli)

    LitCLI.before_instantiate_classes = before  # type: ignore[method-assign]
    from lit_methods.cli.main import main as lit

    owner, status = os.getpid(), 1
    try:
        status = lit(["fit", *words, "--resume", "auto", "--run_root", str(place / "parsed")])
    except _Done:
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    if os.getpid() != owner:
        names = getattr(_reached, "names", None)
        if names is not None:
            (place / "points.json").write_text(json.dumps(names))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)
    sys.exit(status)
