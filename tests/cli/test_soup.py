"""lit soup: phases of ordinary runs, restart, soups equal to the mean of their members, baselines, array jobs, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
from helpers import Classifier, Images
from lit_methods.callbacks.sparsity.sparse_model_soups.command import make_rounds, soup
from lit_methods.callbacks.sparsity.sparse_model_soups.core import recalibrating, uniform_soup
from lit_methods.claims.runner import CHILD, Runner
from lit_methods.cli.main import main

PYTHON = sys.executable
TESTS = Path(__file__).resolve().parents[1]
MODULE = """
import os
import lightning.pytorch as pl
import torch
from helpers import Classifier, Images

class Scored(Classifier):
    def __init__(self, weight_decay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        self.weight_decay = weight_decay

    def forward(self, x):
        return self.network(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=self.weight_decay)

class Pictures(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Images(24), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Images(24), batch_size=24)
"""
CONFIG = """
model: {class_path: my_soup.Scored, init_args: {weight_decay: 0.0}}
data: {class_path: my_soup.Pictures}
trainer:
  accelerator: cpu
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  callbacks+: [{class_path: IMP, init_args: {sparsity: 0.8, phases: 2, dense_epochs: 1, retrain_epochs: 1}}]
"""
WORDS = ["soup", "--config", "small.yaml", "--candidates", "2", "--metric", "val_acc", "--bn_fraction", "1"]
BASELINES = ["--baselines", "imp", "imp_longer", "imp_reprune", "imp_avg"]


def prepare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A task of one's own in the current folder, whose runs are forks."""
    (folder / "my_soup.py").write_text(MODULE)
    (folder / "small.yaml").write_text(CONFIG)
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(TESTS))
    patch.setattr(sys, "executable", forks.interpreter())
    patch.setattr(Runner.__init__, "__defaults__", ((sys.executable, *CHILD[1:]),))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a finished soup with all baselines."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("soup")
        prepare(home, patch)
        assert main([*WORDS, *BASELINES, "--jobs", "2"]) == 0
        (made,) = (home / "runs" / "small-soup").iterdir()
        yield made


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that may be spoilt, whose last round is still to be averaged."""
    prepare(tmp_path, monkeypatch)
    folder = tmp_path / "runs" / "small-soup" / finished.name
    shutil.copytree(finished, folder)
    for file in folder.rglob("config.yaml"):  # which name checkpoints by their full paths
        file.write_text(file.read_text().replace(str(finished), str(folder)))
    manifest = read(folder)
    manifest["finished"] = False
    del manifest["soups"]["phase2/soup"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]


def checkpoint(folder: Path, name: str) -> Path:
    return folder / read(folder)["runs"][name]["checkpoint"]


def spoil(file: Path, change: Any) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


# ---- what comes out --------------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_each_phase_starts_from_the_mean_of_the_one_before(finished: Path) -> None:
    manifest = read(finished)
    assert manifest["finished"]
    assert manifest["runs"]["phase2/candidate1"]["start"] == "phase1/soup"
    assert {name: round(entry["sparsity"], 2) for name, entry in manifest["soups"].items() if "phase2" in name} == {
        "phase2/soup": 0.8, "imp/phase2": 0.8, "imp_longer/phase2": 0.8,
    }  # fmt: skip
    assert manifest["soups"]["imp_reprune/soup"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert manifest["runs"]["imp_longer/phase2"]["steps"] == 2 * manifest["runs"]["phase2/candidate0"]["steps"] == 6
    assert len({run["seed"] for run in manifest["runs"].values()}) == 5
    metrics = json.loads((finished / "metrics.jsonl").read_text())["metrics"]
    assert {
        f"sparse_model_soups/{name}"
        for name in ("soup", "dense", "ensemble", "ece", "mce", "worst_class_accuracy", "imp", "imp_longer", "imp_reprune", "imp_avg")
    } <= set(metrics)
    assert json.loads((finished / "cost.json").read_text())["steps"] == sum(run["steps"] for run in manifest["runs"].values())


@pytest.mark.thorough
def test_a_soup_is_the_mean_with_batch_norms_measured_anew(finished: Path) -> None:
    states = [torch.load(checkpoint(finished, f"phase2/candidate{i}"), weights_only=True)["state_dict"] for i in range(2)]
    assert not torch.equal(states[0]["network.5.weight"], states[1]["network.5.weight"])
    made = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    module = Classifier()
    module.load_state_dict(uniform_soup(states))
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # behind the only batch norm: it doesn't matter
    images = Images(24).images
    torch.testing.assert_close(made["state_dict"]["network.5.weight"], module.state_dict()["network.5.weight"])
    with recalibrating(module):
        module.network(images)
    mean = made["state_dict"]["network.1.running_mean"]
    torch.testing.assert_close(mean, module.network[1].running_mean, rtol=1e-4, atol=1e-5)  # of batches of 8, and of all 24 at once
    assert (made["state_dict"]["network.5.weight"] == 0).sum() == (states[0]["network.5.weight"] == 0).sum()


@pytest.mark.thorough
def test_the_soup_is_an_ordinary_checkpoint(finished: Path, tmp_path: Path) -> None:
    words = ["--config", str(finished.parents[2] / "small.yaml"), "--ckpt_path", str(finished / "checkpoints" / "last.ckpt")]
    assert main(["validate", *words, "--run_root", str(tmp_path)]) == 0
    (logged,) = tmp_path.rglob("metrics.jsonl")
    wanted = read(finished)["figures"]["soup"]
    assert json.loads(logged.read_text().splitlines()[-1])["metrics"]["val_acc"] == pytest.approx(wanted)


@pytest.mark.thorough
def test_a_finished_soup_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *BASELINES]) == 0
    said = capsys.readouterr().out
    assert "has finished: nothing is left to do" in said
    assert "starts" not in said


# ---- restart ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_what_is_finished_is_kept_and_a_killed_run_goes_on(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(copied)
    home = copied / "phase2" / "candidate1"
    (run,) = (home / "run").iterdir()
    (run / "finished.json").unlink()  # as if it was killed at its end: the checkpoint is there
    manifest = read(copied)
    del manifest["runs"]["phase2/candidate1"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert main([*WORDS, *BASELINES]) == 0
    said = capsys.readouterr().out
    assert "goes on in" in said
    assert re.findall(r"\] (\S+) starts", said) == ["phase2/candidate1"]
    assert "goes on from" in (home / "output.txt").read_text()
    assert read(copied)["soups"]["phase2/soup"]["value"] == before["figures"]["soup"]
    assert [path.name for path in (home / "run").iterdir()] == [run.name]


@pytest.mark.thorough
def test_other_settings_make_another_soup(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--soup", "greedy", "--trainer.callbacks.dense_epochs", "0", "--trainer.callbacks.start", str(copied / "dense.ckpt")]
    assert main([*words, "--trainer.callbacks.phases", "1"]) == 0
    caught = capsys.readouterr()
    assert "is left out, it differs: settings.baselines, settings.soup" in caught.err
    (folder,) = (path for path in copied.parent.iterdir() if path.name != copied.name)
    entry = read(folder)["soups"]["phase1/soup"]
    best = max(entry["candidates"], key=entry["candidates"].get)
    assert entry["kind"] == "greedy"
    assert best in entry["selected"]
    assert entry["value"] >= entry["candidates"][best]


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


def flip_mask(content: dict[str, Any]) -> None:
    (state,) = (state for key, state in content["callbacks"].items() if key.startswith("IMP"))
    state["masks"]["network.5.weight"] = ~state["masks"]["network.5.weight"]


def cut_weight(content: dict[str, Any]) -> None:
    content["state_dict"]["network.5.weight"] = content["state_dict"]["network.5.weight"][:4]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_mask, "phase2/candidate1 has another mask than phase2/candidate0 (network.5.weight"),
        (cut_weight, "phase2/candidate1 has another architecture than the first: network.5.weight (4, 144) against (8, 144)"),
        (
            lambda content: content.update(global_step=2),
            "was retrained for 2 optimiser steps, phase2/candidate0 for 3: not the same budget",
        ),
        (lambda content: content.update(callbacks={}), "has no masks of IMP"),
        ("cut off", "phase2/candidate1: "),
        ("gone", "phase2/candidate1 is finished in"),
    ],
)
def test_candidates_that_do_not_belong_together(change: Any, said: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint(copied, "phase2/candidate1")
    if change == "gone":
        file.unlink()
    elif change == "cut off":
        file.write_bytes(file.read_bytes()[:100])
    else:
        spoil(file, change)
    before = sorted(path for path in copied.rglob("*") if path.name not in (".lock", "lock"))
    assert main([*WORDS, *BASELINES]) != 0
    assert said in capsys.readouterr().err
    assert sorted(path for path in copied.rglob("*") if path.name not in (".lock", "lock")) == before, "nothing is lost"
    assert not read(copied)["finished"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidates", "2"], "needs a config"),
        (["--config", "small.yaml", "--candidates", "0"], "must be 1 or more, got 0"),
        (["--config", "small.yaml", "--bn_fraction", "2"], "share of the training batches"),
        (["--config", "small.yaml", "--vary", "peak"], "needs one of --values for each of 3 candidates, got 0"),
        (["--config", "small.yaml", "--vary", "seed", "--values", "1", "2"], "takes no --values"),
        (["--config", "small.yaml", "--vary", "sparsity", "--values", "0.5", "0.6"], "candidates must share their mask"),
        (["--config", "small.yaml", "--vary", "model.init_args.decay", "--values", "0", "1"], "no key 'model.init_args.decay' to vary"),
        (["--config", "small.yaml", "--trainer.callbacks", "null"], "one callback IMP, and this one has 0"),
        (["--config", "small.yaml", "--trainer.callbacks.dense_epochs", "0", "--trainer.callbacks.start", "no.ckpt"], "doesn't exist"),
        (["--merge", "nowhere"], "has no manifest.json"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, monkeypatch)
    assert main(["soup", *words]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- plans and jobs --------------------------------------------------------------------------------------------------------------------


def test_varied_keys_reach_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, monkeypatch)
    assert main(["soup", "--config", "small.yaml", "--vary", "model.init_args.weight_decay", "--values", "0", "1e-4", "--slurm"]) == 0
    (folder,) = (tmp_path / "runs" / "small-soup").iterdir()
    import yaml

    made = [yaml.safe_load((folder / f"phase2/candidate{i}/config.yaml").read_text()) for i in range(2)]
    assert [config["model"]["init_args"]["weight_decay"] for config in made] == [0, 1e-4]
    assert [config["seed_everything"] for config in made] == [3, 4]
    assert {config["trainer"]["callbacks"][0]["init_args"]["start"] for config in made} == {str(folder / "phase1" / "soup.ckpt")}
    submit = (folder / "submit.sh").read_text()
    assert submit.count("--array=0-1") == 2
    assert submit.count("lit soup --merge") == 3
    for script in (folder / "submit.sh", *(folder / "jobs").iterdir()):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    (stand_in / "sbatch").write_text('#!/bin/bash\necho "$@" >> sbatch.txt\nwc -l < sbatch.txt\n')
    (stand_in / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in}:/usr/bin:/bin")
    subprocess.run(["bash", str(folder / "submit.sh"), "--gpus=1"], check=True)
    submitted = (tmp_path / "sbatch.txt").read_text().splitlines()
    assert [re.findall(r"afterok:(\d)", line) for line in submitted] == [[], ["1"], ["2"], ["3"], ["4"], ["5"]]
    assert all(("--gpus=1" in line) == (place % 2 == 0) for place, line in enumerate(submitted))
    capsys.readouterr()
    assert main(["soup", "--merge", str(folder)]) == 1
    assert "not finished: dense" in capsys.readouterr().out


@pytest.mark.thorough
def test_merging_after_array_jobs_ends_like_the_command(copied: Path) -> None:
    before = (copied / "phase2" / "soup.ckpt").stat().st_mtime_ns
    assert soup(["--merge", str(copied)]) == 0
    assert read(copied)["finished"]
    assert (copied / "phase2" / "soup.ckpt").stat().st_mtime_ns > before


def test_the_first_phase_runs_once_for_all_chains() -> None:
    settings = {
        "candidates": 3,
        "vary": "seed",
        "values": None,
        "soup": "uniform",
        "baselines": ["imp", "imp_avg", "imp_longer", "imp_reprune"],
    }
    rounds = make_rounds(settings, {"phases": 2, "retrain_epochs": 4, "dense_epochs": 5, "start": None})
    names = [[fit.name for fit in {fit.name: fit for one in soups for fit in one.members}.values()] for soups in rounds]
    assert names[0] == ["dense"]
    assert names[1] == ["phase1/candidate0", "phase1/candidate1", "phase1/candidate2", "imp_longer/phase1"]
    assert len(names[2]) == 3 + 1 + 1 + 2 + 2
    assert next(fit for one in rounds[2] for fit in one.members if fit.name == "imp_longer/phase2").epochs == 12
    varied = make_rounds(
        settings | {"vary": "retrain_epochs", "values": [2, 4, 6], "baselines": []},
        {"phases": 1, "retrain_epochs": 4, "dense_epochs": 0, "start": "x"},
    )
    assert [fit.epochs for fit in varied[0][0].members] == [2, 4, 6]
    assert {fit.start for fit in varied[0][0].members} == {""}


def test_help_is_light() -> None:
    code = "import sys; from lit_methods.cli.main import main; main(['soup', '--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([PYTHON, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
