"""What a shell completes the ``lit`` command by, asked as the shells ask it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forks import HANGS
from lit_methods.catalog import techniques
from lit_methods.cli.completion import SCRIPTS, candidates, trainer_arguments
from lit_methods.cli.main import _commands, main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    Path("more").mkdir()
    Path("more/yours.yaml").touch()
    Path("runs/first/20260101-000000").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lit cla", ["claims"]),
        ("lit info tc", ["tcm"]),
        ("lit claims tc", ["tcm"]),
        ("lit fit --config configs/tc", ["configs/tcm.yaml"]),
        ("lit fit --config=configs/tc", ["--config=configs/tcm.yaml"]),
        ("lit fit --config mi", ["mine.yaml"]),
        ("lit fit --config more/", ["more/yours.yaml"]),
        ("lit fit --model SuperF", ["SuperFlow"]),
        ("lit fit --data Digits", ["DigitsDataModule"]),
        ("lit fit --trainer.callbacks+=EMAT", ["--trainer.callbacks+=EMATeacher"]),
        ("lit fit --trainer.max_ep", ["--trainer.max_epochs"]),
        ("lit fit --model SuperFlow --model.temperat", ["--model.temperature"]),
        ("lit fit --resume a", ["auto"]),
        ("lit fit --ckpt", ["--ckpt_path"]),
        ("lit runs fi", ["first"]),
        ("lit runs --be", ["--best"]),
        ("lit completion f", ["fish"]),
        ("lit list --family metr", ["metric_learning"]),
        ("lit new x --form te", ["term"]),
        ("lit cp 'configs/tc", ["configs/tcm.yaml"]),
        ("lit nothing x", []),
    ],
)
def test_a_word_is_completed(line: str, expected: list[str]) -> None:
    assert candidates(line) == expected


def test_every_command_and_technique_is_offered() -> None:
    assert {*_commands(), "fit", "validate", "test", "predict"} <= set(candidates("lit "))
    assert set(techniques()) <= set(candidates("lit info "))
    assert candidates("lit claims ") == sorted(techniques())


def test_the_trainers_keys_are_lightnings() -> None:
    import inspect

    from lightning.pytorch import Trainer

    assert trainer_arguments() == list(inspect.signature(Trainer.__init__).parameters)[1:]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from lit_methods.cli.main import main; main(['completion', '--line', 'lit fit --model Sup']);"
        "sys.exit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert "SuperFlow" in done.stdout.split()


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "bash, zsh or fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.startswith(f"# lit completion for {shell}. In ")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=HANGS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "reply"),
    [("lit info tc", "tcm"), ("lit fit --trainer.callbacks+=EMAT", "EMATeacher"), ("lit fit --config=configs/tc", "configs/tcm.yaml")],
)
def test_bash_completes(line: str, reply: str, here: Path) -> None:
    (here / "bin").mkdir()
    (here / "bin" / "lit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lit_methods "$@"\n')
    (here / "bin" / "lit").chmod(0o755)
    script = SCRIPTS["bash"] + f'\nCOMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _lit_complete 2>/dev/null; echo "${{COMPREPLY[@]}}"\n'
    environment = os.environ | {"PATH": f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=HANGS, check=True)
    assert done.stdout.split() == [reply]
