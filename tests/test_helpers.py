"""The helpers of the tests find what they are for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from forks import fork, hold
from helpers import Classifier, Images, assert_state_dicts_equal, kill_and_resume, left_behind, run_lit, run_python
from lit_methods.catalog import techniques
from selection import concerns, find_technique, is_about_all, is_own_file

TESTS = Path(__file__).parent

# ---- what a callback leaves behind -----------------------------------------------------------------------------------------------------


class Tidy(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook = pl_module.network[0].register_forward_hook(lambda *_: None)  # type: ignore[index]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.hook.remove()


class Untidy(Tidy):
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The hook stays."""


class Breaks(Tidy):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ArithmeticError


def test_left_behind_names_the_submodule_and_nothing_of_lightnings() -> None:
    loader = DataLoader(Images(), batch_size=8)
    assert left_behind(Classifier, Tidy, loader) == {}
    assert set(left_behind(Classifier, Untidy, loader)) == {"network.0"}
    assert set(left_behind(Classifier, Breaks(), loader, raises=ArithmeticError)) == {"network.0"}, "teardown isn't called then"
    with pytest.raises(AssertionError, match="did not end with ArithmeticError"):
        left_behind(Classifier, Tidy, loader, raises=ArithmeticError)


# ---- killed runs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: {"a": loader}], ids=["alone", "in a dict"])
def test_a_loader_that_can_not_resume_is_refused(wrap: Any, shuffle: bool, tmp_path: Path) -> None:
    loader = wrap(DataLoader(Images(), batch_size=8, shuffle=shuffle))
    with pytest.raises(TypeError, match=r"(?s)DataLoader of several batches without state_dict.*make_loader"):
        kill_and_resume(lambda: (Classifier(), loader, []), 3, 1, tmp_path)


def test_one_batch_needs_no_place(tmp_path: Path) -> None:
    def build() -> tuple[pl.LightningModule, Any, list[pl.Callback]]:
        return Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))), DataLoader(Images(), batch_size=24), []

    assert_state_dicts_equal(*kill_and_resume(build, 3, 1, tmp_path))


# ---- fresh processes -------------------------------------------------------------------------------------------------------------------

SPEAKS = "import os, sys; print(os.getcwd(), os.environ.get('A'), sys.argv[1:]); print('wrong', file=sys.stderr); sys.exit(7)"


def test_a_forked_process_does_what_a_started_one_does(tmp_path: Path) -> None:
    environment = {"A": "b c", "PATH": ""}
    forked = run_python(["-c", SPEAKS, "d", "e f"], tmp_path, environment)
    started = subprocess.run([sys.executable, "-c", SPEAKS, "d", "e f"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    (tmp_path / "mine.py").write_text("import sys; print(__name__, sys.argv)\nraise SystemExit('no')\n")
    for words in (["-m", "mine", "1"], ["mine.py", "1"]):
        done = run_python(words, tmp_path)
        assert (done.returncode, done.stderr) == (1, "no\n")
        assert done.stdout.startswith("__main__ [")
    failed = run_python(["-c", "1 / 0"], tmp_path)
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr


def test_lit_in_a_forked_process(tmp_path: Path) -> None:
    assert run_lit(["list"], tmp_path).stdout.startswith("slug")
    refused = run_lit(["fit", "--config", "nothing.yaml"], tmp_path)
    assert refused.returncode == 2
    assert "'nothing.yaml' not found" in refused.stderr


def test_signals_reach_a_forked_process_and_a_stuck_one_is_ended() -> None:
    hold()
    child = fork(["-c", "import time; time.sleep(600)"])
    child.kill()
    assert child.wait() == -9
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(["-c", "import time; time.sleep(600)"], timeout=0.5)


@pytest.mark.usefixtures("forked_python")
def test_a_stand_in_for_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", SPEAKS, "d"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "wrong\n")
    assert done.stdout.endswith(" None ['d']\n")


# ---- --technique -----------------------------------------------------------------------------------------------------------------------


def test_an_unknown_technique_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"(?s)no technique 'tmc'.*nearest: tcm.*adawac, adele"):
        find_technique("tmc")
    done = run_python(["-m", "pytest", "--technique", "tmc", "--collect-only"], TESTS.parent)
    assert done.returncode == 4
    assert "superflow" in done.stdout + done.stderr


@pytest.mark.catalogue
def test_a_technique_gets_its_files_and_its_cases() -> None:
    files = list(TESTS.rglob("test_*.py"))
    for slug, entry in techniques().items():
        own = {path.name for path in files if is_own_file(path, entry)}
        assert {f"test_{slug}.py"} < own, f"{slug} has no tests of its own beside the golden ones"
    tcm, docs = find_technique("tcm"), TESTS / "test_docs.py"
    assert is_about_all(docs)
    page = TESTS.parent / "docs" / "techniques"
    assert concerns(docs, [page / "tcm.md"], False, tcm)
    assert concerns(docs, [TESTS.parent / "configs" / "full" / "tcm_cub.yaml"], False, tcm)
    assert not concerns(docs, [page / "conr.md"], False, tcm)
    assert concerns(TESTS / "test_catalogue.py", ["tcm"], False, tcm)
    assert not concerns(TESTS / "test_catalogue.py", ["conr"], False, tcm)
    assert concerns(TESTS / "trajectory" / "test_tcm.py", [], False, tcm)
