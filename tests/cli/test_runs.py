"""``lit runs``: the table, filters and the best of the runs below a folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forks import HANGS
from lit_methods.cli.main import main
from lit_methods.cli.runs import folders_of, read_run
from lit_methods.errors import CommandError

PANEL = {"kind": "Curve", "title": "Accuracy", "metrics": ["toy/val_acc"], "note": "", "goal": "max"}
LOSS = {"kind": "Curve", "title": "Loss", "metrics": ["toy/loss"], "note": "", "goal": "min"}


def make_run(root: Path, name: str, time: str, accuracies: list[float], rate: float, status: str = "finished", batch: int = 8) -> Path:
    folder = root / name / time
    folder.mkdir(parents=True)
    rows = [
        {"step": 10 * at + 9, "epoch": at, "metrics": {"toy/val_acc": value, "toy/loss": 1 - value}} for at, value in enumerate(accuracies)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.json").write_text(json.dumps({"format": 1, "status": status, "sections": [{"panels": [PANEL, LOSS]}]}))
    config = f"model:\n  class_path: Toy\n  init_args: {{learning_rate: {rate}}}\ndata:\n  init_args: {{batch_size: {batch}}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs"), "small", "20260101-000000", [0.2, 0.9, 0.5], 0.1)
    make_run(Path("runs"), "small", "20260103-000000", [0.3, 0.4], 0.01, "interrupted")
    make_run(Path("runs"), "large", "20260102-000000", [0.6, 0.7], 0.1, batch=64)
    return Path("runs")


def table(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert main(["runs", *words]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def names(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    return [row[0] for row in table(capsys, *words) if row and "/2026" in row[0]]


SMALL, KILLED, LARGE = "small/20260101-000000", "small/20260103-000000", "large/20260102-000000"


def test_all_runs_with_the_last_value_of_their_key_metrics(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = table(capsys)
    assert head == ["run", "status", "step", "toy/val_acc", "toy/loss"]
    assert rows[0] == [SMALL, "finished", "29", "0.5", "0.5"]
    assert [row[0] for row in rows] == [SMALL, LARGE, KILLED], "by time"
    assert rows[2][1] == "interrupted"
    assert names(capsys, "small") == [SMALL, KILLED]
    assert names(capsys, "runs/large/20260102-000000") == [LARGE]


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ("learning_rate=0.1", [SMALL, LARGE]),
        ("model.learning_rate = 1e-1", [SMALL, LARGE]),
        ("batch_size!=64", [SMALL, KILLED]),
        ("val_acc>0.45", [SMALL, LARGE]),
        ("toy/loss<=0.5", [SMALL, LARGE]),
        ("status=interrupted", [KILLED]),
        ("step>=29", [SMALL]),
        ("model.class_path=Toy", [SMALL, LARGE, KILLED]),
    ],
)
def test_filters(condition: str, left: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, "--where", condition) == left


def test_several_filters_hold_together(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, "--where", "learning_rate=0.1", "--where", "batch_size<10") == [SMALL]
    assert main(["runs", "--where", "learning_rate>5"]) == 0
    assert "no run" in capsys.readouterr().out


def test_the_best_of_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "--best", "val_acc", "--config", "learning_rate")
    assert rows[0] == ["run", "status", "step", "best", "toy/val_acc", "at", "step", "model.learning_rate"]
    assert rows[1] == [SMALL, "finished", "29", "0.9", "19", "0.1"], "its best value, not its last"
    assert [row[0] for row in rows[1:4]] == [SMALL, LARGE, KILLED]
    assert rows[-1] == ["best:", f"runs/{SMALL}"]
    assert names(capsys, "--best", "toy/loss") == [SMALL, LARGE, KILLED], "the panel says that lower is better"
    assert names(capsys, "--best", "val_acc", "--min", "--top", "1") == [SMALL]
    assert names(capsys, "--sort", "val_acc") == [KILLED, SMALL, LARGE]
    assert names(capsys, "--sort", "batch_size", "--max")[0] == LARGE


def test_json_has_every_field(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "large", "--json", "--best", "val_acc"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["run"] == f"runs/{LARGE}"
    assert run["best"] == {"metric": "toy/val_acc", "step": 19, "value": 0.7}
    assert run["config"]["model.learning_rate"] == "0.1"


def test_damaged_files_leave_their_part_empty(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(root, "odd", "20260104-000000", [0.1], 0.1)
    (folder / "report.json").write_text("[" * 100_000)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "epoch": 1, "metr\n{"step": 29, "epoch": 2, "metrics": {"toy/val_acc": NaN}}\n')
    (folder / "config.yaml").write_text("a: [")
    run = read_run(folder)
    assert (run.status, run.step, run.goals) == ("unknown", 29, {})
    assert run.best("toy/val_acc", "max") == (9, 0.1), "a value that isn't finite is none"
    assert len(names(capsys)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--best", "val_ac"], "toy/val_acc"),
        (["--where", "learning_rate"], "is no condition"),
        (["--where", "lerning_rate=1"], "learning_rate"),
        (["nothing"], "no run 'nothing'"),
        (["--top", "0"], "1 or more"),
        (["--min", "--max"], "not both"),
        (["--run_root", "elsewhere"], "elsewhere/ holds no runs"),
        (["--config", "rate"], "no run has the key"),
    ],
)
def test_mistakes_are_one_short_message(words: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) <= 3


def test_a_metric_without_a_goal_wants_a_direction(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(root, "plain", "20260105-000000", [0.1], 0.1)
    (folder / "report.json").unlink()
    assert main(["runs", "plain", "--best", "val_acc"]) == 2
    assert "--min or --max" in capsys.readouterr().err
    assert names(capsys, "plain", "--best", "val_acc", "--max") == ["plain/20260105-000000"]


def test_it_imports_neither_torch_nor_lightning(root: Path) -> None:
    code = "import sys; from lit_methods.cli.main import main; main(['runs']); sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=HANGS, check=False).returncode == 0


def test_no_runs_at_all(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no runs"):
        folders_of([], tmp_path)


def test_a_real_run_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = ["fit", "--config", "configs/random_pruning.yaml", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2]
    words += ["--trainer.limit_val_batches", 1, "--trainer.enable_progress_bar", "false", "--run_root", tmp_path]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    assert main(["runs", "--run_root", str(tmp_path)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert "finished" in row
    assert "val" in head
