"""``lit sweep``: its file, what it runs, how it goes on, and the page of its trials. Trials are a small script in the place of ``lit``."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lit_methods.cli.main import main
from lit_methods.errors import CommandError
from lit_methods.sweeps.definition import read_sweep
from lit_methods.sweeps.launch import Jobs, Processes

pytest.importorskip("optuna", reason='lit sweep needs: pip install "lit-methods[tuning]"')

GRID = """
command: [lit, fit, --config, mine.yaml, "${args}"]
method: grid
metric: {name: val_loss, goal: minimize}
parameters:
  model.init_args.rate: {values: [0.1, 0.2]}
  data.init_args.sizes: {values: [[1, 2], null]}
"""

# logs rate at each of its steps; with rate 0.9 it logs a bad value and waits to be stopped, with rate 0.7 it fails
CHILD = """
import json, pathlib, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
root = pathlib.Path(sys.argv[sys.argv.index("--run_root") + 1])
rate = float(words["model.init_args.rate"])
run = root / sys.argv[sys.argv.index("--name") + 1] / "20260101-000000"
run.mkdir(parents=True, exist_ok=True)
(run / "words.json").write_text(json.dumps(sys.argv[1:]))
if rate == 0.7:
    sys.exit("no such thing")
with (run / "metrics.jsonl").open("a") as file:
    for step in range(4):
        file.write(json.dumps({"step": step, "metrics": {"val_loss": rate + (step == 3) / 100}}) + "\\n")
        file.flush()
    if rate == 0.9:
        time.sleep(60)
(run / "report.html").write_text("report")
"""


@pytest.fixture
def child(tmp_path: Path) -> list[str]:
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    return [sys.executable, "-S", "-E", str(file)]


def declared(tmp_path: Path, text: str = GRID, name: str = "mine") -> Any:
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    return read_sweep(file)


def searched(
    tmp_path: Path, child: list[str], text: str = GRID, total: int | None = None, jobs: int = 2, again: bool = False
) -> dict[str, Any]:
    """The summary behind a search with the script."""
    from lit_methods.sweeps.search import search
    from lit_methods.sweeps.study import Study

    folder = tmp_path / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(declared(tmp_path, text), folder, jobs)
    if again:
        study.again()
    said: list[str] = []
    search(study, Processes(child=child), total, jobs, ["--trainer.max_steps", "3"], said.append, pause=0.02)
    summary: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return summary | {"said": said}


# ---- the file ----------------------------------------------------------------------------------------------------------


def test_a_file_in_wandbs_format_says_what_trials_run(tmp_path: Path) -> None:
    sweep = declared(
        tmp_path,
        """
        name: mine_too
        program: train.py
        command: ["${env}", lit, fit, --config, a.yaml, "${args}"]
        method: bayes
        metric: {name: val_acc, goal: maximize}
        run_cap: 7
        early_terminate: {type: hyperband, max_iter: 27, s: 2}
        parameters:
          a: {min: 1, max: 4}
          b: {min: 0.0, max: 1}
          c: {distribution: log_uniform_values, min: 1.0e-4, max: 0.1}
          d: {distribution: log_uniform, min: -1, max: 1}
          e: {distribution: q_uniform, min: 0, max: 1, q: 0.25}
          f: {value: true}
        """,
    )
    assert (sweep.name, sweep.words, sweep.method, sweep.metric, sweep.goal, sweep.cap) == (
        "mine_too", ("fit", "--config", "a.yaml"), "bayes", "val_acc", "maximize", 7,
    )  # fmt: skip
    assert [parameter.distribution for parameter in sweep.parameters] == [
        "int_uniform", "uniform", "log_uniform_values", "log_uniform", "q_uniform", "constant",
    ]  # fmt: skip
    assert (sweep.parameters[3].low, sweep.parameters[3].high) == pytest.approx((0.36788, 2.71828), rel=1e-4)
    assert sweep.parameters[4].steps == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert sweep.parameters[0].steps == (1, 2, 3, 4)
    assert sweep.early is not None
    assert (sweep.early.first, sweep.early.eta) == (3, 3)
    assert sweep.trial_words({"a": 2, "f": True, "g": None, "h": [1, "x"]}) == [
        "fit", "--config", "a.yaml", "--a=2", "--f=true", "--g=null", '--h=[1, "x"]',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method: grid", "method: gird"), "method is 'gird': give grid, random or bayes"),
        (("metric: {name: val_loss, goal: minimize}", "metric: {name: a, goal: min}"), "goal"),
        (("[lit, fit,", "[python, train.py,"), "must begin with lit fit"),
        (("${args}", "${args_no_hyphens}"), "args_no_hyphens"),
        (("parameters:", "parameter:"), "unknown key 'parameter'\n  nearest: parameters"),
        (("{values: [0.1, 0.2]}", "{values: []}"), "model.init_args.rate has no values"),
        (("{values: [0.1, 0.2]}", "{min: 2, max: 1}"), "min must be smaller"),
        (("{values: [0.1, 0.2]}", "{min: 0, max: 1, distribution: log_uniform_values}"), "above 0"),
        (("{values: [0.1, 0.2]}", "{min: one, max: 2}"), "min is 'one': give a number"),
        (("{values: [0.1, 0.2]}", "{value: 1, probabilities: [1]}"), "unknown key 'probabilities'"),
        (("{values: [0.1, 0.2]}", "{parameters: {a: {value: 1}}}"), "nested: write its keys out"),
        (("{values: [0.1, 0.2]}", "{distribution: normal, mu: 0, sigma: 1}"), "unknown key 'mu'"),
        (("method: grid", "method: grid\nearly_terminate: {type: median}"), "give type: hyperband"),
        (("method: grid", "method: grid\nrun_cap: 0"), "run_cap is 0: give a whole number of 1 or more"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_its_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GRID
    with pytest.raises(CommandError) as error:
        declared(tmp_path, GRID.replace(*change))
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)


def test_the_command_refuses_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(GRID.replace("{values: [0.1, 0.2]}", "{min: 0.0, max: 1.0}"))
    root = ["--root", str(tmp_path / "sweeps")]
    assert main(["sweep", str(tmp_path / "mine.yaml"), *root]) == 2
    assert "a grid needs values" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(GRID.replace("grid", "random"))
    assert main(["sweep", str(tmp_path / "mine.yaml"), *root]) == 2
    assert "give --trials, or run_cap" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "none.yaml"), *root]) == 2
    assert main(["sweep", str(tmp_path / "mine.yaml"), "--jobs", "0", *root]) == 2
    assert not (tmp_path / "sweeps").exists()


# ---- what runs ---------------------------------------------------------------------------------------------------------


def test_a_grid_runs_once_and_whole(tmp_path: Path, child: list[str]) -> None:
    found = searched(tmp_path, child)
    assert {trial["state"] for trial in found["trials"]} == {"finished"}
    assert [trial["value"] for trial in found["trials"]] == pytest.approx([0.11, 0.11, 0.21, 0.21])  # the last one of a run
    assert [trial["values"]["data.init_args.sizes"] for trial in found["trials"]] == [[1, 2], None, [1, 2], None]
    run = tmp_path / "sweep" / found["trials"][3]["run"]
    words = json.loads((run / "words.json").read_text())
    assert words[:5] == ["fit", "--config", "mine.yaml", "--model.init_args.rate=0.2", "--data.init_args.sizes=null"]
    assert words[5:7] == ["--trainer.max_steps", "3"]
    assert words[-2:] == ["--resume", "auto"]
    assert searched(tmp_path, child)["said"] == []  # nothing is left to do


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_drawn_values_lie_in_their_range_and_go_on_differently(tmp_path: Path, child: list[str], method: str) -> None:
    text = GRID.replace("grid", method).replace("{values: [0.1, 0.2]}", "{distribution: log_uniform_values, min: 1.0e-3, max: 0.5}")
    first = searched(tmp_path, child, text, total=3)
    whole = searched(tmp_path, child, text, total=5)
    rates = [trial["values"]["model.init_args.rate"] for trial in whole["trials"]]
    assert rates[:3] == [trial["values"]["model.init_args.rate"] for trial in first["trials"]]
    assert len(set(rates)) == 5
    assert all(1e-3 <= rate <= 0.5 for rate in rates)


def test_a_trial_that_is_behind_stops_early(tmp_path: Path, child: list[str]) -> None:
    text = (
        GRID.replace("[0.1, 0.2]", "[0.1, 0.9]").replace("[[1, 2], null]", "[1]")
        + "early_terminate: {type: hyperband, min_iter: 2, eta: 2}\n"
    )
    found = searched(tmp_path, child, text, jobs=1)
    assert [trial["state"] for trial in found["trials"]] == ["finished", "stopped early"]
    assert found["trials"][1]["value"] in (0.9, pytest.approx(0.91))  # the last one that was logged by then


def test_failures_are_told_kept_and_run_again_when_asked(tmp_path: Path, child: list[str]) -> None:
    text = GRID.replace("[0.1, 0.2]", "[0.7, 0.1]").replace("[[1, 2], null]", "[1]")
    found = searched(tmp_path, child, text)
    assert [trial["state"] for trial in found["trials"]] == ["failed", "finished"]
    assert found["trials"][0]["why"] == "it ended with status 1"
    assert any("no such thing" in line and "output.txt" in line for line in found["said"])
    again = searched(tmp_path, child, text, again=True)
    assert [trial["state"] for trial in again["trials"]] == ["failed", "finished", "failed"]
    assert searched(tmp_path, child, text)["said"] == []
    with pytest.raises(CommandError, match="3 trials failed one after the other"):
        searched(tmp_path / "other", child, GRID.replace("[0.1, 0.2]", "[0.7]").replace("[[1, 2], null]", "[1, 2, 3, 4]"))


def test_a_metric_that_nobody_logs_is_named(tmp_path: Path, child: list[str]) -> None:
    found = searched(tmp_path, child, GRID.replace("val_loss", "val_los").replace("[0.1, 0.2]", "[0.1]").replace("[[1, 2], null]", "[1]"))
    assert found["trials"][0]["why"] == "it never logged val_los; logged were val_loss"


def test_an_interrupted_sweep_goes_on_with_its_trial(tmp_path: Path, child: list[str]) -> None:
    from lit_methods.sweeps.search import search
    from lit_methods.sweeps.study import Study

    class Interrupted(Processes):
        def start(self, tasks: Any) -> Any:
            raise KeyboardInterrupt

    (tmp_path / "sweep").mkdir()
    with pytest.raises(KeyboardInterrupt):
        search(Study(declared(tmp_path), tmp_path / "sweep"), Interrupted(), None, 1, say=lambda text: None)
    left = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in left] == ["running"]
    found = searched(tmp_path, child)
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2, 3]
    assert found["trials"][0]["values"] == left[0]["values"]
    with pytest.raises(CommandError, match="holds another sweep, its metric differ"):
        searched(tmp_path, child, GRID.replace("minimize", "maximize"))


def test_each_trial_sees_a_device_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "child.py"
    file.write_text("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)")
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    running = Processes(["0", "3"], [sys.executable, str(file)]).start([([], folder) for folder in folders])
    try:
        while not all((folder / "output.txt").read_text() for folder in folders):
            assert all(process.poll() is None for process in running)
        assert [(folder / "output.txt").read_text().strip() for folder in folders] == ["0", "3", "0"]
    finally:
        for process in running:
            process.stop()


@pytest.mark.thorough
def test_trials_are_jobs_of_a_cluster(tmp_path: Path, child: list[str]) -> None:
    pytest.importorskip("submitit", reason='--cluster needs: pip install "lit-methods[slurm]"')
    from lit_methods.sweeps.search import search
    from lit_methods.sweeps.study import Study

    (tmp_path / "sweep").mkdir()
    study = Study(declared(tmp_path, GRID.replace("[0.1, 0.2]", "[0.1, 0.7]")), tmp_path / "sweep", 2)
    jobs = Jobs(tmp_path / "jobs", "local", {"timeout_min": 5, "nodes": 1, "tasks_per_node": 1}, child)
    search(study, jobs, 3, 2, say=lambda text: None, pause=0.05)
    assert [trial["state"] for trial in study.summary()["trials"]] == ["finished", "finished", "failed"]


# ---- its page ----------------------------------------------------------------------------------------------------------


def test_the_report_of_a_sweep_has_a_table_that_sorts_and_a_plot(
    tmp_path: Path, child: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID.replace("[0.1, 0.2]", "[0.2, 0.1, 0.7]").replace("[[1, 2], null]", "['<b>']")
    searched(tmp_path, child, text)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "sweep"]) == 0
    assert "report of a sweep: sweep/report.html" in capsys.readouterr().out
    page = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    assert page.index('<td data-value="1"><a href="trials/0001/run/') < page.index('<td data-value="0">')  # the best one first
    assert "it ended with status 1" in page
    assert "&lt;b&gt;" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    chart = data["chart-0"]
    assert chart["kind"] == "parallel"
    assert [axis["label"] for axis in chart["axes"]] == ["model.rate", "val_loss"]  # what is the same everywhere has no axis
    assert chart["axes"][0]["values"] == [0.2, 0.1]
    assert main(["report", "sweep", "--out", "other.html"]) == 0
    assert 'href="sweep/trials/0001/run/' in (tmp_path / "other.html").read_text(encoding="utf-8")
    (tmp_path / "mine.html").write_text("mine")
    assert main(["report", "sweep", "--out", "mine.html"]) == 2
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    assert main(["report", "sweep"]) == 1


@pytest.mark.thorough
def test_a_real_run_is_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.yaml").write_text(
        textwrap.dedent(
            """
            command: [lit, fit, --config, configs/random_pruning.yaml, "${args}"]
            method: grid
            metric: {name: reliability/val_accuracy, goal: maximize}
            parameters:
              model.init_args.learning_rate: {values: [0.01]}
            """
        )
    )
    words = ["sweep", "rates.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
    assert main([*words, "--plan", "--model.init_args.no_such_key", "1"]) == 2
    assert "no_such_key" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "1 trial: 1 finished" in said
    assert "best: trial 0" in said
    assert main(["runs", "--run_root", "runs/sweeps/rates/trials/0000"]) == 0
    assert "finished" in capsys.readouterr().out
