"""Runs that are killed at random moments and started again by the same command end like the uninterrupted one, bit for bit."""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import BETWEEN, FIRST, MID, PHASES, WRITE, Run, start
from kills import differences, logged_rows
from lit_methods.catalog import configs_folder, techniques
from lit_methods.cli.resume import FINISHED, unreadable

SEED, KILLS, TERMS = 20, 20, 4
TINY = ["--model", "helpers.Classifier", "--data", "faults.FewImages", "--name", "tiny", "--trainer.max_epochs", "3"]
EVERY_STEP = [
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks+=faults.Trace", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "2"),
]


def command(words: list[str], root: Path) -> list[str]:
    return ["fit", *words, *EVERY_STEP, "--run_root", str(root), "--resume", "auto"]


def whole_run(words: list[str], folder: Path) -> tuple[Path, float]:
    """Checkpoint at the end of the uninterrupted run, and the seconds that a step took."""
    run = start(command(words, folder / "whole"), folder, folder / "whole.log")
    assert run.wait_for(lambda phases: MID in phases), run.log.read_text()[-3000:]
    began = time.monotonic()
    assert run.end() == 0, run.log.read_text()[-3000:]
    seconds = (time.monotonic() - began) / max(1, run.phases.count(WRITE) // 2)  # two files per step
    return finished(folder / "whole"), seconds


def finished(root: Path) -> Path:
    """The last checkpoint of the one run below ``root`` that came to its end."""
    (marker,) = root.glob(f"*/*/{FINISHED}")
    return marker.parent / "checkpoints" / "last.ckpt"


def hit(words: list[str], folder: Path, phase: str, nth: int, delay: float, number: int) -> tuple[Run, Path]:
    """Start the run, send it the signal ``delay`` seconds after it tells ``phase`` for the nth time, wait for its end."""
    folder.mkdir()
    run = start(command(words, folder / "runs"), folder, folder / "log.txt")
    run.wait_for(lambda phases: phases.count(phase) >= nth)
    time.sleep(delay)
    run.send(number)
    return run, folder / "runs"


def no_broken_file_under_a_good_name(root: Path) -> None:
    for path in root.rglob("*.ckpt"):
        if not path.name.startswith("."):
            assert unreadable(path) is None, f"{path}: {unreadable(path)}"


def resumed_equals(words: list[str], root: Path, whole: Path, point: str) -> None:
    again = start(command(words, root), root.parent, root.parent / "again.txt")
    assert again.end() == 0, f"{point}: {again.log.read_text()[-3000:]}"
    wrong = differences(end_of(finished(root)), end_of(whole))
    assert not wrong, f"{point}: {'; '.join(wrong)}"


def end_of(last: Path) -> dict[str, Any]:
    """Weights, optimisers, schedules, step, epoch, and the rows of ``metrics.jsonl`` without what was measured."""
    state = torch.load(last, map_location="cpu", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {name: state[name] for name in kept} | {"rows": logged_rows(last.parents[1])}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return whole_run(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("phase", "nth"), [(FIRST, 1), (WRITE, 9), (MID, 7)])
def test_a_killed_run_goes_on(phase: str, nth: int, tiny: tuple[Path, float], tmp_path: Path) -> None:
    run, root = hit(TINY, tmp_path / "run", phase, nth, 0.0, signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    no_broken_file_under_a_good_name(root)
    resumed_equals(TINY, root, tiny[0], f"SIGKILL {phase} {nth}")
    runs = list((root / "tiny").iterdir())
    assert len(runs) == (2 if run.phases[-1] == FIRST else 1), "goes on in its own folder where there is a checkpoint"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_saves_itself_and_goes_on_in_its_folder(number: int, tiny: tuple[Path, float], tmp_path: Path) -> None:
    run, root = hit(TINY, tmp_path / "run", MID, 10, 0.0, number)
    assert run.end() == 143, run.log.read_text()[-2000:]
    assert "the same command goes on" in run.log.read_text()
    (folder,) = (root / "tiny").iterdir()
    assert unreadable(folder / "checkpoints" / "last.ckpt") is None
    config = (folder / "config.yaml").read_bytes()
    resumed_equals(TINY, root, tiny[0], f"signal {number}")
    assert (folder / "config.yaml").read_bytes() == config, "the first start's config stays"
    assert len((folder / "restarts.jsonl").read_text().splitlines()) == 1
    assert (folder / "csv" / "metrics.csv").is_file(), "Lightning's CSVLogger would delete the first start's"
    assert (folder / "csv" / "restart-1" / "metrics.csv").is_file()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "one history"
    assert not list((folder / "checkpoints").glob("last-v*")), "one last.ckpt"
    again = start(command(TINY, root), tmp_path, tmp_path / "third.txt")
    assert again.end() == 0
    assert "nothing is left to do" in again.log.read_text()
    assert len(list((root / "tiny").iterdir())) == 1


def arms(which: str) -> dict[str, list[str]]:
    """Name -> words of the command."""
    if which == "small network":
        return {"Classifier": TINY}
    short = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    landed = {slug: entry.configs[0] for slug, entry in techniques().items() if (configs_folder() / entry.configs[0]).is_file()}
    return {slug: ["--config", f"configs/{config}", *short, "--data.init_args.num_workers", "0"] for slug, config in landed.items()}


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("which", ["small network", "all techniques"])
def test_twenty_kills(which: str, tmp_path: Path) -> None:
    """The random points follow from SEED: which technique, phase, how often it was told before, and the delay behind it."""
    draw = random.Random(SEED)
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    commands = arms(which)
    wholes = {}
    for name, words in commands.items():
        (tmp_path / name).mkdir()
        wholes[name] = whole_run(words, tmp_path / name)
    for index, number in enumerate([signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS):
        name = list(commands)[index % len(commands)]
        whole, seconds = wholes[name]
        phase = PHASES[index // len(commands) % len(PHASES)]
        nth = draw.randint(1, {FIRST: 2, MID: 5, WRITE: 6}.get(phase, 2))
        delay = draw.uniform(0, {WRITE: 0.02, BETWEEN: 0.1 * seconds}.get(phase, 0.5 * seconds))
        point = f"seed {SEED}, point {index}: {signal.Signals(number).name} to {name}, {phase} {nth} + {delay:.4f} s"
        run, root = hit(commands[name], tmp_path / f"{index}", phase, nth, delay, number)
        status = run.end()
        # a signal may also come before training listens, or behind its last step
        expected = {-signal.SIGKILL} if number == signal.SIGKILL else {143, 0, -signal.SIGTERM}
        assert status in expected, f"{point}: exit status {status}\n{run.log.read_text()[-3000:]}"
        where = run.phases[-1] if run.phases else FIRST
        tried[where] += 1
        no_broken_file_under_a_good_name(root)
        resumed_equals(commands[name], root, whole, point)
        survived[where] += 1
        print(f"{point}: ended {where}, exit status {status}, resumed, equal", flush=True)
    by_phase = ", ".join(f"{phase} {survived[phase]}/{tried[phase]}" for phase in PHASES)
    print(f"{which}: tried {sum(tried.values())} ({KILLS} SIGKILL, {TERMS} SIGTERM), survived {sum(survived.values())}: {by_phase}")
    assert survived == tried
    assert sum(tried.values()) == KILLS + TERMS
