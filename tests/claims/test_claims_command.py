"""``lit claims`` and ``lit compare`` from the words to the files that they leave, with stages that take milliseconds."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_methods.catalog import Technique
from lit_methods.claims.plan import make_plan
from lit_methods.claims.runner import Runner
from lit_methods.cli import claims as command
from lit_methods.cli.main import main

FAKE = Path(__file__).parent / "fake_lit.py"
ARMS = """
metric: acc
direction: higher
seeds: [0, 1, 2]
seed_keys: [seed]
budget: {unit: steps}
tuned: {good: [], bad: []}
arms:
  good: [{command: fit, config: a.yaml, set: {stage: good}}]
  bad: [{command: fit, config: a.yaml, set: {stage: bad}}]
"""
CLAIM = (
    "claim: Good is better.\nsource: table 1\nmethod: good\nbaseline: bad\ncost: {method: good, baseline: bad, stage: 0, steps: 5}\n" + ARMS
)
COMPARISON = "question: Which is best?\nreference: bad\ncost: {arms: [good, bad], stage: 0, steps: 5}\n" + ARMS


def resolve(commands: dict[str, list[str]], threads: int) -> dict[str, Any]:
    """The words themselves as the config, but for the seed."""
    return {name: {"words": " ".join(words).replace(f"--seed {words[words.index('--seed') + 1]}", "")} for name, words in commands.items()}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.txt"))
    monkeypatch.setattr("lit_methods.claims.plan.make_plan", functools.partial(make_plan, resolve=resolve))
    monkeypatch.setattr("lit_methods.claims.runner.Runner", functools.partial(Runner, child=(sys.executable, str(FAKE))))
    technique = Technique("mini", "Mini Things", "", "demo", "module", (), (), (), "Good is better.", "")
    monkeypatch.setattr(command, "techniques", lambda: {"mini": technique})
    for folder, name, text in (("claims", "mini", CLAIM), ("compare", "demo", COMPARISON)):
        path = tmp_path / "configs" / folder / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


def test_a_claim_leaves_verdict_record_and_page(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "mini", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "good - bad: +0.2" in said
    assert ": holds" in said
    assert "cost per training step, good against bad: +0 s" in said
    summary = json.loads((workplace / "runs/claims/mini/summary.json").read_text())
    record = json.loads((workplace / "runs/claims/evidence/mini.json").read_text())
    assert record == summary
    assert str(workplace) not in json.dumps(record), "a path of one machine"
    assert "| **holds** |" in (workplace / "runs/claims/evidence.md").read_text()
    assert "| **holds** |" in (workplace / "runs/claims/mini/row.md").read_text()
    assert main(["claims", "mini"]) == 0
    assert "6 stages, 6 of them kept from before" in capsys.readouterr().out


def test_what_is_not_the_claim_as_it_stands_gives_no_evidence(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "mini", "--quick"]) == 0
    assert "smoke only: no verdict" in capsys.readouterr().out
    assert main(["claims", "mini", "--seeds", "0", "1"]) == 0
    assert "no verdict: that needs at least 3 seeds" in capsys.readouterr().out
    assert main(["claims", "mini", "--data.more", "1"]) == 0
    said = capsys.readouterr().out
    assert ": holds" in said
    assert "no evidence stored, as words were passed on" in said
    assert main(["claims", "mini", "--no-evidence"]) == 0
    assert not (workplace / "runs/claims/evidence").exists()
    assert not (workplace / "runs/claims/evidence.md").exists()


def test_words_that_are_passed_on_reach_every_stage(workplace: Path) -> None:
    assert main(["claims", "mini", "--seeds", "4", "--trainer.max_epochs", "7", "--wandb"]) == 0
    results = [json.loads(path.read_text()) for path in workplace.glob("runs/claims/stages/a-s4-*/result.json")]
    assert len(results) == 2
    for result in results:
        words = " ".join(result["words"])
        assert "--trainer.max_epochs 7" in words
        assert "--config configs/logger/wandb.yaml" in words


def test_a_plan_runs_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "mini", "--plan"]) == 0
    assert "6 stages" in capsys.readouterr().out
    assert not (workplace / "log.txt").exists()


def test_a_plan_says_how_long_it_takes_or_that_nobody_knows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> str:
        assert main(["claims", "mini", "--plan", *words]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert planned() == "6 to run with --jobs 1; how long that takes isn't known: none of them has run here, and no evidence is stored"
    store = workplace / "runs/claims/evidence"
    store.mkdir(parents=True)
    (store / "mini.json").write_text(json.dumps({"seconds": 1200.0, "stages": 12, "machine": {"cpu": "a fast one"}}))
    assert planned("--jobs", "2") == "6 to run with --jobs 2: about 5:00, if this machine is like that of the stored evidence (a fast one)"
    assert "isn't known" in planned("--data.more", "1"), "what is evidence for other stages says nothing"
    assert main(["claims", "mini", "--seeds", "0"]) == 0
    results = list(workplace.glob("runs/claims/stages/a-*/result.json"))
    assert len(results) == 2
    for file in results:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 30.0}))
    (workplace / "runs/claims/stages/broken").mkdir()
    (workplace / "runs/claims/stages/broken/result.json").write_text("{half")
    capsys.readouterr()
    assert planned() == "2 kept from before; 4 to run with --jobs 1: about 2:00, from earlier runs here"
    assert planned("--seeds", "0").startswith("all stages are kept from before")


def test_a_quick_run_validates_whatever_the_config_says_and_its_figures_mean_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", "mini", "--quick"]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    assert "figures mean nothing" in json.loads((workplace / "runs/claims/mini/quick.json").read_text())["note"]
    for file in workplace.glob("runs/claims/stages/a-*/result.json"):
        words = " ".join(json.loads(file.read_text())["words"])
        assert "--trainer.limit_val_batches 1 --trainer.check_val_every_n_epoch 1 --trainer.val_check_interval 1" in words
    assert main(["compare", "demo", "--quick"]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    assert "figures mean nothing" in (workplace / "runs/claims/compare-demo/compare.md").read_text()


def test_a_metric_that_is_missing_comes_with_the_reason(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "configs/claims/mini.yaml").write_text(CLAIM.replace("metric: acc", "metric: accu"))
    assert main(["claims", "mini", "--seeds", "0"]) == 1
    error = capsys.readouterr().err
    assert "no metric 'accu'; logged were: acc, other\n  nearest: acc" in error


def test_a_failing_claim_gives_a_short_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "configs/claims/mini.yaml"
    path.write_text(CLAIM.replace("{stage: bad}", "{stage: bad, behave: diverge}"))
    assert main(["claims", "mini"]) == 1
    error = capsys.readouterr().err
    assert "bad, seed 0, stage a-s0-" in error
    assert "acc is nan" in error
    assert "Traceback" not in error


def test_a_comparison_leaves_table_plot_and_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "demo", "--jobs", "2"]) == 0
    assert "| good | 0.7 | 0.8 | 0.9 | 0.8 | 0.1 | +0.2 [+0.2, +0.2] | 10 | 4 | 0.1 |" in capsys.readouterr().out
    folder = workplace / "runs/claims/compare-demo"
    summary = json.loads((folder / "compare.json").read_text())
    assert summary["cost"] == {"good": 0.1, "bad": 0.1}
    assert summary["machine"]["cores"] >= 1
    assert "![plot](compare.svg)" in (folder / "compare.md").read_text()
    assert (folder / "compare.svg").read_text().count("<circle") == 6
    assert not (folder / "frontier.svg").exists()
    assert not (workplace / "runs/claims/evidence").exists()


def test_a_comparison_is_drawn_over_a_second_metric(workplace: Path) -> None:
    reports = ", ".join(f"{{name: {arm}, arm: {arm}, metric: acc}}" for arm in ("good", "bad"))
    (workplace / "configs/compare/demo.yaml").write_text(f"{COMPARISON}over: acc\nreports: [{reports}]\n")
    assert main(["compare", "demo"]) == 0
    folder = workplace / "runs/claims/compare-demo"
    assert "![plot](frontier.svg)" in (folder / "compare.md").read_text()
    assert "acc over acc" in (folder / "frontier.svg").read_text()
    assert json.loads((folder / "compare.json").read_text())["over"] == "acc"
