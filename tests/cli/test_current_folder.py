"""What lies in the current folder runs nothing: git's programs, modules called like libraries, YAML's tags, a checkpoint's names."""

import ast
import functools
import os
import re
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

from helpers import HANGS
from lit_methods import git as our_git
from lit_methods.catalog import PACKAGES, package_folder
from lit_methods.claims.evidence import git_commit
from lit_methods.cli.main import main
from lit_methods.git import UnknownFilter, git
from lit_methods.import_path import CHILD_PREFIX
from lit_methods.runs.folder import git_state

DEMO = "lightning.pytorch.demos.boring_classes."
RUN = [
    *("--data", f"{DEMO}BoringDataModule", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"),
    *("--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    return tmp_path


# ---- git -------------------------------------------------------------------------------------------------------------------------------


def plain_git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=False, capture_output=True, timeout=HANGS)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose configuration names a program wherever git takes one; each writes a file called after itself into ``ran/``."""
    top = tmp_path_factory.mktemp("hostile")
    checkout, ran, programs = top / "checkout", top / "ran", top / "programs"
    for folder in (checkout, ran, programs):
        folder.mkdir()

    def program(name: str) -> str:
        path = programs / name
        path.write_text(f"#!/bin/sh\ntouch '{ran}/{name}'\ncat 2>/dev/null\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    inner = top / "inner"
    inner.mkdir()
    for folder in (checkout, inner):
        plain_git(folder, "init", "-q", "-b", "main")
        for name in ("filtered.txt", "converted.bin", "driven.x", "processed.y"):
            (folder / name).write_text("one\n")
        (folder / ".gitattributes").write_text("*.txt filter=evil\n*.bin diff=evil\n*.x diff=driver\n*.y filter=long\n")
        plain_git(folder, "add", ".")
        plain_git(folder, "commit", "-q", "-m", "first")
    plain_git(checkout, "submodule", "add", str(inner), "inner")
    plain_git(checkout, "commit", "-q", "-m", "second")
    settings = {
        "core.fsmonitor": "fsmonitor",
        "filter.evil.clean": "clean",
        "filter.evil.smudge": "smudge",
        "filter.long.process": "process",
        "diff.external": "external",
        "diff.evil.textconv": "textconv",
        "diff.driver.command": "driver",
        "core.pager": "pager",
        "gpg.program": "gpg",
    }
    for folder, mark in ((checkout, ""), (checkout / "inner", "inner-")):
        for key, name in settings.items():
            plain_git(folder, "config", key, program(mark + name))
        plain_git(folder, "config", "log.showSignature", "true")
        hooks = programs / f"{mark}hooks"
        hooks.mkdir()
        for hook in ("post-index-change", "post-checkout", "reference-transaction"):
            (hooks / hook).symlink_to(program(f"{mark}hook"))
        plain_git(folder, "config", "core.hooksPath", str(hooks))
        for name in ("filtered.txt", "converted.bin", "driven.x", "processed.y"):
            (folder / name).write_text("two\n")
    for path in ran.iterdir():
        path.unlink()
    return top


def ran(top: Path) -> list[str]:
    found = sorted(path.name for path in (top / "ran").iterdir())
    for path in (top / "ran").iterdir():
        path.unlink()
    return found


def test_our_calls_run_no_program_of_the_checkout(hostile: Path) -> None:
    checkout = hostile / "checkout"
    state = git_state(checkout)
    assert ran(hostile) == []
    assert state is not None
    assert state["dirty"]
    assert "filtered.txt" in " ".join(state["changes"])
    committed = git_commit(checkout)
    assert committed == {"commit": state["commit"], "dirty": True}
    git(checkout, "log", "-1", "--format=%H %cs", "--", "driven.x")
    git(checkout, "show", "HEAD:converted.bin")
    git(checkout, "ls-files", "-z")
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "check-ignore", "-q", "driven.x")
    assert ran(hostile) == []


def test_a_plain_call_would_have_run_them(hostile: Path) -> None:
    checkout = hostile / "checkout"
    for words in (("diff", "--stat", "HEAD"), ("diff", "HEAD"), ("status", "--porcelain"), ("show", "HEAD:converted.bin")):
        plain_git(checkout, *words)
    found = ran(hostile)
    assert {"fsmonitor", "clean", "process", "external", "inner-fsmonitor", "inner-clean"} <= set(found), found


def test_a_filter_that_cannot_be_named_is_not_run(hostile: Path) -> None:
    checkout = hostile / "checkout"
    plain_git(checkout, "config", "filter.a=b.clean", str(hostile / "programs" / "clean"))
    try:
        with pytest.raises(UnknownFilter, match="a=b"):
            git(checkout, "diff", "--stat", "HEAD")
        state = git_state(checkout)
        assert state is not None
        assert state["dirty"] is None
    finally:
        plain_git(checkout, "config", "--unset", "filter.a=b.clean")
    assert ran(hostile) == []


def test_git_is_called_in_one_place() -> None:
    for path in sources():
        if path != Path(our_git.__file__):
            assert not re.search(r"""\[\s*["']git["']\s*,""", path.read_text(encoding="utf-8")), f"{path}: call lit_methods.git.git"


# ---- modules ---------------------------------------------------------------------------------------------------------------------------

SHADOWS = ("torch", "yaml", "lightning", "timm", "wandb", "numpy", "jsonargparse", "rich", "plotly")


@pytest.mark.parametrize("way", ["module", pytest.param("script", marks=pytest.mark.thorough)])
def test_libraries_come_before_the_current_folder(way: str, here: Path) -> None:
    """A process of its own: how it starts is the promise."""
    for name in SHADOWS:
        Path(f"{name}.py").write_text(f"open('{name} ran', 'w')\nraise SystemExit('{name} of the current folder')\n")
    Path("mine.py").write_text(
        "import wandb, timm, yaml\nfrom lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel): pass\n"
    )
    command = {"module": [sys.executable, "-m", "lit_methods"], "script": [str(Path(sysconfig.get_path("scripts"), "lit"))]}[way]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    words = ["fit", "--model", "mine.Mine", *RUN, "--print_config"]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["class_path"] == "mine.Mine"
    assert not list(here.glob("* ran"))


def test_children_of_ours_look_there_last_too(here: Path) -> None:
    Path("yaml.py").write_text("raise SystemExit('of the current folder')\n")
    command = [sys.executable, "-c", f"{CHILD_PREFIX}import yaml; print(yaml.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.stdout.strip() == yaml.__file__, done.stderr


def test_a_module_behind_a_library_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("yaml.py").write_text("class Mine: pass\n")
    assert main(["fit", "--model", "yaml.Mine", *RUN]) == 2
    said = capsys.readouterr().err
    assert f"{here / 'yaml.py'} isn't looked at: {yaml.__file__} has the same name" in said


# ---- YAML ------------------------------------------------------------------------------------------------------------------------------

TAG = "!!python/object/apply:os.system ['touch ran']"


@pytest.mark.parametrize("place", ["model: {}\n", "model: BoringModel\nname: {}\n", "trainer:\n  max_steps: {}\n", "{}\n"])
def test_a_tag_in_a_config_runs_nothing(place: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.yaml").write_text(place.format(TAG))
    assert main(["fit", "--config", "evil.yaml", *RUN]) == 2
    said = capsys.readouterr().err
    assert "evil.yaml" in said
    assert place == "{}\n" or re.search(r"evil.yaml, line [123]: '!!python/object/apply:os.system' isn't read", said), said
    assert "Traceback" not in said
    assert not Path("ran").exists()


@pytest.mark.parametrize("key", ["--model", "--trainer.max_steps", "--model.init_args.x", "--name"])
def test_a_tag_on_the_command_line_runs_nothing(key: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["fit", "--model", f"{DEMO}BoringModel", *RUN, key, TAG, "--print_config"])
    assert status == (0 if key == "--name" else 2), "a name is a text"
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("ran").exists()


@functools.cache
def sources() -> list[Path]:
    return [path for package in PACKAGES for path in package_folder(package).rglob("*.py")]


def test_no_reader_of_ours_builds_objects() -> None:
    """What runs code out of data: YAML's other loaders, unguarded pickles, ``eval``. The unpickler that refuses all classes is allowed."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if not re.search(r"yaml\.|pickle|torch\.load|np\.load|\beval\(|\bexec\(", text):
            continue  # parsing all sources takes seconds
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path}, line {node.lineno}: {name}"
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "eval", "exec"), where
            assert name != "np.load" or options.get("allow_pickle") != "True", where
            if name == "torch.load":
                assert options.get("weights_only") == "True", where


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------------

MINE = """
from lightning.pytorch.demos.boring_classes import BoringModel

class Mine(BoringModel):
    def __init__(self, rate: float = 0.1, names: list[str] | None = None):
        super().__init__()
        self.save_hyperparameters()
    def test_step(self, batch, batch_idx):
        self.log("rate", self.hparams.rate)

class Other(Mine):
    pass
"""


def config_of(name: str) -> dict:
    (run,) = Path("runs", name).iterdir()
    return yaml.safe_load((run / "config.yaml").read_text())


def test_the_command_line_wins_over_a_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)
    Path("evil.py").write_text("open('ran', 'w')\n")
    words = [*RUN, "--model", "mine.Mine"]
    assert main(["fit", *words, "--model.rate", "0.25", "--model.names", "[a, b]", "--name", "first"]) == 0
    (last,) = Path("runs", "first").glob("*/checkpoints/last.ckpt")
    again = ["--ckpt_path", str(last), "--trainer.max_steps", "2"]
    capsys.readouterr()
    assert main(["fit", *words, "--model.rate", "0.25", "--model.names", "[a, b]", "--name", "same", *again]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main(["fit", *words, "--model.rate", "0.5", "--name", "other", *again]) == 0
    said = capsys.readouterr().err
    assert f"note: {last} was written with other arguments, and those of this command count:\n" in said
    assert "  rate 0.25 there, 0.5 here; names ['a', 'b'] there, None here\n" in said
    assert config_of("other")["model"]["init_args"] == {"rate": 0.5, "names": None}
    assert main(["test", *RUN, "--model", "mine.Other", "--name", "class", "--ckpt_path", str(last)]) == 0
    assert "class 'mine.Mine' there, mine.Other here; rate 0.25 there, 0.1 here" in capsys.readouterr().err
    content = torch.load(last, weights_only=True)
    content["hyper_parameters"] = {"_class_path": "evil.Evil", "rate": "\x1b[2J" + "x" * 500, "_instantiator": "evil.run"}
    torch.save(content, "evil.ckpt")
    assert main(["test", *words, "--name", "evil", "--ckpt_path", "evil.ckpt"]) == 0
    said = capsys.readouterr().err
    assert "class 'evil.Evil' there, mine.Mine here" in said
    assert "\x1b" not in said
    assert len(said) < 2000
    assert config_of("evil")["model"]["init_args"]["rate"] == 0.1
    assert not Path("ran").exists()
    assert "evil" not in sys.modules


def test_a_checkpoint_is_no_model(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)
    assert main(["fit", *RUN, "--model", "mine.Mine", "--name", "first"]) == 0
    (last,) = Path("runs", "first").glob("*/checkpoints/last.ckpt")
    capsys.readouterr()
    assert main(["test", *RUN, "--ckpt_path", str(last)]) == 2
    said = capsys.readouterr().err
    assert "no model given" in said
    assert f"its run's config: --config {last.parents[1] / 'config.yaml'}" in said
    last.rename("alone.ckpt")
    assert main(["test", *RUN, "--ckpt_path", "alone.ckpt"]) == 2
    assert "it was written by mine.Mine: --model mine.Mine" in capsys.readouterr().err
