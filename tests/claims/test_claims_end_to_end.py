"""A whole claim in miniature: real runs of a tiny module in processes of their own."""

import json
import sys
from pathlib import Path

import pytest

from lit_methods.claims.runner import CHILD, Runner
from lit_methods.cli.main import main

TESTS = Path(__file__).resolve().parents[1]
MODULE = """
import os
import lightning.pytorch as pl
import torch
from helpers import Classifier, Images

class Rate(Classifier):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()  # draws its weights with a seed of its own
        torch.manual_seed(int(os.environ["PL_GLOBAL_SEED"]))
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

class Pictures(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Images(24), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Images(24), batch_size=24)
"""
CONFIG = """
model: {class_path: my_task.Rate, init_args: {lr: 0.1}}
data: {class_path: my_task.Pictures}
trainer: {accelerator: cpu, max_epochs: 4, num_sanity_val_steps: 0, log_every_n_steps: 1}
"""
CLAIM = """
claim: Training with a learning rate fits better than without one.
source: nowhere
metric: val_loss
direction: lower
method: trained
baseline: idle
gate: 0.01
seeds: [0, 1, 2]
budget: {unit: [steps, parameters]}
tuned: {trained: [], idle: []}
arms:
  trained: [{command: fit, config: task.yaml}]
  idle: [{command: fit, config: task.yaml, set: {model.init_args.lr: 0.0}}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    (tmp_path / "my_task.py").write_text(MODULE)
    for folder, name, text in (("", "task", CONFIG), ("claims", "mini", CLAIM)):
        path = tmp_path / "configs" / folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.usefixtures("forked_python")  # the slow tests below start real ones
def test_a_claim_in_miniature(task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Runner.__init__, "__defaults__", ((sys.executable, *CHILD[1:]),))
    assert main(["claims", "mini", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "trained - idle: -" in said
    assert "better in 3 of 3 seeds, gate 0.01: holds" in said
    assert "[6/6]" in said
    assert "no evidence stored" in said
    summary = json.loads((task / "runs/claims/mini/summary.json").read_text())
    assert summary["verdict"]["verdict"] == "holds"
    assert summary["seeds"] == [0, 1, 2]
    assert all(len(values) == 3 for values in summary["values"].values())
    assert len({round(value, 6) for value in summary["values"]["trained"]}) == 3, "the seeds matter"
    assert {seen["steps"] for seens in summary["budget"].values() for seen in seens} == {12}  # 4 epochs of 3 batches
    assert len({seen["parameters"] for seens in summary["budget"].values() for seen in seens}) == 1
    results = list(task.glob("runs/claims/stages/*/result.json"))
    assert len(results) == 6
    for file in results:
        result = json.loads(file.read_text())
        assert {"./my_task.py", "lit_methods/cli/lightning_cli.py", "lit_methods.callbacks/run/step_cost.py"} <= result["sources"].keys()
        assert (task / "runs/claims" / result["checkpoint"]).is_file()
        assert json.loads((task / "runs/claims" / result["run"] / "environment.json").read_text())["torch_threads"] == 1


@pytest.mark.slow
def test_an_unfair_claim_is_refused_before_anything_runs(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = task / "configs/claims/mini.yaml"
    claim.write_text(CLAIM.replace("lr: 0.0}", "lr: 0.0, trainer.max_epochs: 8}"))
    assert main(["claims", "mini"]) == 2
    said = capsys.readouterr().err
    assert "max_epochs: 4 (8)" in said
    assert "differences:" in said
    assert not list(task.glob("runs/claims/stages/*"))


@pytest.mark.slow
def test_a_quick_look_with_cost_and_flops_gives_no_verdict(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = task / "configs/claims/mini.yaml"
    text = CLAIM.replace("[steps, parameters]", "flops").replace(
        "arms:", "cost: {method: trained, baseline: idle, stage: 0, steps: 6}\narms:"
    )
    claim.write_text(text)
    words = ["claims", "mini", "--quick", "--trainer.limit_train_batches", "3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "smoke only: no verdict" in said
    assert "cost per training step, trained against idle" in said
    quick = json.loads((task / "runs/claims/mini/quick.json").read_text())
    assert quick["budget"]["trained"][0]["flops"] == quick["budget"]["idle"][0]["flops"] > 0
    assert not (task / "runs/claims/mini/summary.json").exists()
    assert not (task / "runs/claims/evidence.md").exists()
    assert main(words) == 0
    assert "2 of them kept from before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_in_miniature(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = task / "configs/compare/rates.yaml"
    path.parent.mkdir()
    path.write_text(
        CLAIM.replace("claim:", "question:").replace("method: trained\n", "").replace("baseline:", "reference:").replace("gate: 0.01\n", "")
    )
    assert main(["compare", "rates", "--jobs", "2", "--seeds", "0", "1"]) == 0
    assert "| trained |" in capsys.readouterr().out
    folder = task / "runs/claims/compare-rates"
    assert (folder / "compare.svg").read_text().startswith("<svg")
    assert "| trained |" in (folder / "compare.md").read_text()
    summary = json.loads((folder / "compare.json").read_text())
    assert summary["intervals"]["trained"][0] < 0
