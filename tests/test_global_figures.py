"""Figures of an evaluation in two processes: those of one process over the same data, and logged so that Lightning knows it."""

import csv
from pathlib import Path

import pytest

from helpers import advice_on_figures, run_two_processes
from lit_methods.cli.main import main

QUICK = ("random_pruning", "conr", "dsl_recommendation")
EXACT = (*QUICK, "adawac", "cast_lm", "consistencydet", "coprompt", "fixmatch", "issp", "superflow_probe", "tcm")
DRAWN = ("epg", "epg_denoise", "ict", "superflow")  # noise by the batch's number, or contrast within a batch: other batches, other figures


def validate(config: str, root: str, devices: int) -> list[str]:
    """What Lightning says of ``sync_dist`` while the module of a config is validated."""
    words = f"validate --config configs/{config}.yaml --trainer.devices {devices} --trainer.accelerator cpu --trainer.callbacks []"
    words += " --trainer.enable_progress_bar false" + (" --trainer.strategy ddp" if devices > 1 else "")
    with advice_on_figures() as advice:
        assert main([*words.split(), "--run_root", root]) == 0
    return advice


def figures(root: Path) -> dict[str, float]:
    (file,) = root.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    return {name: float(value) for row in rows for name, value in row.items() if value and name not in ("epoch", "step")}


@pytest.mark.parametrize("config", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in (*EXACT, *DRAWN)])
def test_two_processes_measure_what_one_does(config, tmp_path):
    validate(config, str(tmp_path / "one"), 1)
    assert run_two_processes(validate, config, str(tmp_path / "two"), 2) == [[], []]
    alone, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert alone
    if config in EXACT:
        assert two == pytest.approx(alone, rel=1e-4, abs=1e-5)
    else:
        assert two.keys() == alone.keys()
