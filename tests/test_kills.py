"""Every technique, killed at named points and evenly over its run by SIGKILL and SIGTERM, ends like the uninterrupted run, bit for bit."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from test_catalogue import SHORTENED, SMALLER

import kills
from helpers import run_python
from lit_methods.catalog import techniques

# two epochs of three batches, or five optimiser steps with validations in mid-epoch; a checkpoint every other step, and at epochs' ends
COMMON = (
    "--trainer.limit_train_batches 3 --trainer.limit_val_batches 2 --trainer.log_every_n_steps 1 "
    "--trainer.check_val_every_n_epoch 1 --trainer.accelerator cpu --trainer.enable_progress_bar false "
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps 2 --trainer.callbacks.save_last true "
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_epochs 1 --trainer.callbacks.filename epoch "
    "--trainer.callbacks+=kills.Points"
)
MODES = {
    "max_epochs": "--trainer.max_epochs 2 --trainer.val_check_interval 1.0",
    "max_steps": "--trainer.max_epochs 4 --trainer.max_steps 5 --trainer.val_check_interval 2",
}


def all_equal(slug: str, mode: str, folder: Path, killed: int, terminated: int) -> list[dict[str, Any]]:
    """Kill the technique's first config; what was tried, all of it equal to the uninterrupted run."""
    words = ["--config", f"configs/{techniques()[slug].configs[0]}"]
    words += " ".join([SHORTENED.get(slug, ""), SMALLER.get(slug, ""), MODES[mode], COMMON]).split()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    given = ["-c", "import kills; kills.main()", slug, mode, folder, killed, terminated, *words]
    done = run_python(given, env=environment, timeout=3600)
    tried = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"slug"')]
    wrong = [f"{case['signal']} at {case['point']}: {case['wrong']}" for case in tried if case["wrong"]]
    print(f"{slug}, {mode}: {len(tried)} kills, {len(tried) - len(wrong)} equal", *wrong, sep="\n  ", flush=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not wrong, "\n".join(wrong)
    return tried


def test_label_corrections_survive_kills(tmp_path: Path) -> None:
    tried = all_equal("adele", "max_epochs", tmp_path, 3, 1)
    assert [case["signal"] for case in tried] == ["SIGKILL"] * 3 + ["SIGTERM"]


@pytest.mark.thorough
@pytest.mark.parametrize("slug", ["issp", "cast", "gba"])
def test_some_techniques_survive_kills(slug: str, tmp_path: Path) -> None:
    all_equal(slug, "max_steps", tmp_path, 6, 2)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slug", sorted(techniques()))
def test_every_technique_survives_thirty_kills(slug: str, mode: str, tmp_path: Path) -> None:
    """Fifteen points per kind of end, all named ones among them as far as the technique has them."""
    tried = all_equal(slug, mode, tmp_path, 13, 2)
    assert len(tried) == 15


def test_named_points_come_first_and_the_others_are_spread() -> None:
    names = ["batch", "step", "checkpoint write", "checkpoint written"] * 10 + ["epoch end", "training end"]
    picked = kills.chosen(names, 8)
    assert len(picked) == 8
    assert {names.index("checkpoint write"), names.index("checkpoint written"), 38, 39} <= set(picked)
    assert max(index for index in picked if index < 40) > 20


def test_differences_are_found_at_every_depth() -> None:
    one = {"a": [1, {"b": 2.0}], "c": float("nan")}
    assert kills.differences(one, {"a": [1, {"b": 2.0}], "c": float("nan")}) == []
    assert kills.differences(one, {"a": [1, {"b": 3.0}], "c": float("nan")}) == ["a[1].b: 2.0 instead of 3.0"]
    assert kills.differences({"a": [1]}, {"a": [1, 2]}) == ["a has 1 entries instead of 2"]
    assert kills.differences({}, {"a": 1}) == [" has ['a'] on one side"]
