"""What a machine does under a run: disks that are full, read-only or somebody else's, folders that go, outputs that nobody reads.

A message each, and the checkpoint that was there still loads.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from helpers import HANGS
from lit_methods.cli.explain import explain_run_error
from lit_methods.cli.lightning_cli import LitCLI
from lit_methods.cli.main import main
from lit_methods.cli.output import Steady, steady_output
from lit_methods.cli.resume import unreadable
from lit_methods.errors import CommandError

WORDS = [
    *("fit", "--model", "helpers.Classifier", "--data", "faults.FewImages", "--name", "run", "--trainer.max_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.log_every_n_steps", "1"),
]


class At(pl.Callback):
    """Does something at a step: the name of a function below."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            globals()[self.what](Path(trainer.default_root_dir))


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder.parents[1] / "filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def read_only(folder: Path) -> None:
    """Also while files in it are open."""
    for words in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *words, str(folder)], check=True)


def protect(folder: Path) -> None:
    read_only(folder / "checkpoints")


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def at(step: int, what: str) -> list[str]:
    return ["--trainer.callbacks+=test_machine.At", "--trainer.callbacks.step", str(step), "--trainer.callbacks.what", what]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "t", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    while os.path.ismount(disk):  # a test may have laid it over itself, or over a folder in it
        subprocess.run(["umount", "-l", str(disk)], check=True)


def last_step(run: Path) -> int:
    files = list((run / "checkpoints").iterdir())
    assert all(unreadable(path) is None for path in files), files
    step: int = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return step


def said(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    assert main([*WORDS, *words]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err + out


def test_a_disk_that_fills_up(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 1, *at(3, "fill"), "--run_root", str(small_disk))
    assert "the disk or the quota is full (No space left on device)" in text
    assert "--resume auto" in text
    (run,) = (small_disk / "run").iterdir()
    assert last_step(run) == 2
    assert not [path for path in run.rglob(".*")], "no leftovers"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert all(line.startswith('{"step"') and line.endswith("}}") for line in lines), "whole lines alone"
    assert "the disk or the quota is full" in said(capsys, 1, "--run_root", str(small_disk), "--name", "second")
    (small_disk / "filler").unlink()
    said(capsys, 0, "--run_root", str(small_disk), "--resume", "last", "--trainer.max_epochs", "2")
    assert last_step(max((small_disk / "run").iterdir())) == 12


def test_a_disk_that_becomes_read_only(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 1, *at(3, "protect"), "--run_root", str(small_disk))
    assert "no folder to write to (Read-only file system)" in text
    (run,) = (small_disk / "run").iterdir()
    assert last_step(run) == 2
    read_only(small_disk)
    text = said(capsys, 1, "--run_root", str(small_disk), "--name", "second")
    assert f"can't make a run folder in {small_disk}/second: Read-only file system" in text
    assert "--run_root" in text


def test_a_folder_that_is_deleted_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="was deleted under way: it is made anew"):
        said(capsys, 0, *at(3, "delete"), "--trainer.logger", "false")
    (run,) = Path("runs", "run").iterdir()
    assert last_step(run) == 6
    for name in ("config.yaml", "report.html", "metrics.jsonl", "finished.json"):
        assert (run / name).is_file(), name
    assert not (run / ".lock").exists()


def test_a_folder_that_is_deleted_under_a_logger(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's CSVLogger makes its folder once."""
    text = said(capsys, 1, *at(3, "delete"))
    assert re.search(r"runs/run/[-\d]+ was deleted under way, or a folder in it: .*csv", text), text


# ---- permissions -----------------------------------------------------------------------------------------------------------------------


def as_nobody(act: Callable[[], str]) -> str:
    """What ``act`` returns in a process of a user without rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(write, act().encode())
        except BaseException as error:
            os.write(write, f"raised {error!r}".encode())
        os._exit(0)
    os.close(write)
    text = b""
    while part := os.read(read, 4096):
        text += part
    os.waitpid(child, 0)
    return text.decode()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may look into, as pytest's own isn't."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_somebody_elses_folder(public: Path) -> None:
    def start() -> str:
        try:
            LitCLI._new_folder(public, "run")
        except CommandError as error:
            return str(error)
        return "made"

    said = as_nobody(start)
    assert f"can't make a run folder in {public}/run: Permission denied" in said
    assert "--run_root" in said


@pytest.mark.parametrize("which", ["file", "folder", "folder on the way"])
def test_data_that_this_user_cannot_read(which: str, public: Path) -> None:
    (public / "data" / "deep").mkdir(parents=True)
    file = public / "data" / "deep" / "x.npy"
    file.write_bytes(b"x")
    closed = {"file": file, "folder": public / "data" / "deep", "folder on the way": public / "data"}[which]
    closed.chmod(0)

    def read() -> str:
        try:
            list((public / "data" / "deep").iterdir()) if which == "folder" else file.read_bytes()
        except OSError as error:
            return str(explain_run_error(error))
        return "read"

    said = as_nobody(read)
    assert f"{closed} may not be read by this user (Permission denied): " in said
    assert "to write" not in said


def test_a_folder_that_cannot_be_written_is_not_called_unreadable(public: Path) -> None:
    def write() -> str:
        try:
            (public / "new").write_text("x")
        except OSError as error:
            return str(explain_run_error(error))
        return "written"

    assert "no folder to write to (Permission denied)" in as_nobody(write)


# ---- the output ------------------------------------------------------------------------------------------------------------------------


def test_a_run_outlives_its_reader(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``lit fit ... | head -1``."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(WORDS) == 0
        monkeypatch.undo()
    assert "the output can't be written any more (Broken pipe): lit goes on without it" in capsys.readouterr().err


def test_a_finished_reader_of_a_list_is_no_trouble(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["list"]) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.thorough
def test_outputs_that_are_closed_or_full(folder: Path) -> None:
    lit = f"{sys.executable} -m lit_methods {' '.join(WORDS)}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for number, (ending, word) in enumerate(
        [("| head -1; exit ${PIPESTATUS[0]}", "Broken pipe"), (">&-", ""), (">&- 2>&- <&-", ""), ("> /dev/full", "No space left")]
    ):
        command = ["bash", "-c", f"{lit} --run_root {number} {ending}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == 0, (ending, done.stderr)
        assert word in done.stderr
        assert "Traceback" not in done.stderr
        (run,) = Path(str(number), "run").iterdir()
        assert last_step(run) == 6


def test_a_descriptor_that_is_closed_gets_nothing_of_ours(folder: Path) -> None:
    code = (
        "import os; os.close(1); from lit_methods.cli.output import steady_output\n"
        "with steady_output(True):\n    file = open('last.ckpt', 'w'); os.write(1, b'printed by a library'); assert file.fileno() > 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)
    assert Path("last.ckpt").read_text() == ""


def test_what_cannot_be_encoded_is_written_all_the_same() -> None:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Steady(buffer)
    stream.write("ü \udcff")
    stream.flush()
    assert buffer.buffer.getvalue() == rb"\xfc \udcff"  # type: ignore[attr-defined]
    assert stream.encoding == "ascii"


def test_outputs_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with steady_output(True):
        print("to nowhere")
    assert sys.stdout is None


# ---- paths -----------------------------------------------------------------------------------------------------------------------------


def test_a_path_that_is_not_utf_8_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 2, "--run_root", os.fsdecode(b"latin-1 \xfc"))
    assert r"'latin-1 \udcfc' isn't UTF-8" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ['ein Ördner\'s "日本" & %s {x}'])
def test_paths_of_any_letters(name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / name
    try:
        place.mkdir()
    except OSError:
        pytest.skip("the file system knows no such names")
    monkeypatch.chdir(place)
    root = ["--run_root", f"runs of {name}"]
    said(capsys, 0, *root)
    (run,) = Path(f"runs of {name}", "run").iterdir()
    config = str(run / "config.yaml")
    again = ["--trainer.max_epochs", "2", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), *root]
    assert main(["fit", "--config", config, *again]) == 0
    assert main(["validate", "--config", config, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), *root]) == 0
    (run / "finished.json").unlink()
    said(capsys, 0, *root, "--resume", "auto")
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


# ---- a start that fails ----------------------------------------------------------------------------------------------------------------


class RefusesLate(BoringModel):
    """Refuses behind everything that is set up."""

    def on_train_start(self) -> None:
        raise ValueError("not on this machine")


def nothing_left() -> bool:
    return not Path("runs").exists() or not list(Path("runs").rglob("*"))


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.strategy", "fsdp"],
        ["--trainer.precision", "transformer-engine"],
        ["--trainer.callbacks+=EMATeacher", "--trainer.callbacks.targets", "[nowhere]"],
        ["--trainer.gradient_clip_val", "1", "--trainer.gradient_clip_algorithm", "nothing"],
        ["--ckpt_path", "other.ckpt"],
    ],
    ids=lambda words: words[1],
)
def test_a_failed_start_leaves_no_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "loops": {}, "pytorch-lightning_version": "2.5.0"}, "other.ckpt")
    said(capsys, 1, *words)
    assert nothing_left()


def test_what_a_module_refuses_before_its_first_batch_leaves_no_folder() -> None:
    words = [word if word != "helpers.Classifier" else "test_machine.RefusesLate" for word in WORDS]
    words[words.index("faults.FewImages")] = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    with pytest.raises(ValueError, match="not on this machine"):
        main([*words, "--trainer.num_sanity_val_steps", "0"])
    assert nothing_left()
