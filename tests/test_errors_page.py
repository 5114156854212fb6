"""Every message that ``docs/errors.md`` quotes is what the code says: each is provoked here, and compared with the page.

An entry of the page is a heading of the second level whose first ``text`` block quotes a message; ``<...>`` in it stands for what differs
from machine to machine. The function here with the ``@shows`` of that heading provokes the message.
"""

import contextlib
import errno
import io
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lit_methods.cli.explain import explain_run_error
from lit_methods.cli.main import main
from lit_methods.runs.lock import lock_run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
DEMO = "lightning.pytorch.demos.boring_classes."
BASE = f"""\
model: {{class_path: {DEMO}BoringModel}}
data: {{class_path: {DEMO}BoringDataModule}}
trainer: {{accelerator: cpu, devices: 1, max_steps: 2, limit_val_batches: 1, enable_progress_bar: false, enable_model_summary: false}}
"""
MINE = """\
import os, signal, torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.demos.boring_classes import BoringModel

class Wide(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 5)

class Narrow(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()

class Exploding(BoringModel):
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum() * float("nan")

class Large(BoringModel):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

class Fatal(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

class FatalData(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Fatal(), num_workers=1)

class Manual(BoringModel):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
"""
Provoke = Callable[[pytest.MonkeyPatch], str]
PROVOKERS: dict[str, Provoke] = {}


def shows(heading: str) -> Callable[[Provoke], Provoke]:
    """Says which heading of the page quotes what the function provokes."""

    def register(provoke: Provoke) -> Provoke:
        assert heading not in PROVOKERS
        PROVOKERS[heading] = provoke
        return provoke

    return register


def entries() -> dict[str, str]:
    """Heading of each entry -> the message that it quotes."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        quoted = re.search(r"^```text\n(.*?)^```$", part, flags=re.M | re.S)
        assert quoted is not None, f"docs/errors.md: {part.splitlines()[0]!r} quotes no message"
        found[part.splitlines()[0].strip()] = quoted[1]
    return found


def quoted_in(quoted: str, said: str) -> bool:
    """Whether ``said`` holds the quoted lines, one after the other; ``<...>`` matches anything within a line, white space counts once."""
    lines = [" ".join(line.split()) for line in quoted.strip().splitlines()]
    pattern = r" ?\n ?".join(re.sub(r"<[^<>]*>", ".*?", re.escape(line).replace(r"\ ", " ")) for line in lines)
    return re.search(pattern, "\n".join(" ".join(line.split()) for line in said.splitlines())) is not None


def lit(*words: object, status: int | None = None) -> str:
    """What the command prints; with ``status``, its exit status is checked."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        ended = main([str(word) for word in words])
    assert status is None or ended == status, out.getvalue()
    return out.getvalue()


def fit(*words: object, status: int = 2) -> str:
    return lit("fit", "--config", "base.yaml", *words, status=status)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a config and some modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("base.yaml").write_text(BASE)
    Path("mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


# ---- configs and arguments -------------------------------------------------------------------------------------------------------------


@shows("A key that doesn't exist")
def _(_: pytest.MonkeyPatch) -> str:
    Path("mine.yaml").write_text("model:\n  class_path: SuperFlow\n  init_args:\n    temprature: 0.1\n")
    return lit("fit", "--config", "mine.yaml", status=2)


@shows("A module of your own that has a library's name")
def _(_: pytest.MonkeyPatch) -> str:
    Path("yaml.py").write_text("class Mine: pass\n")
    return fit("--model", "yaml.Mine")


@shows("A class that isn't found")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--model", "SuperFlwo")


@shows("A class of your own that isn't found")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--model", "my_project.MyModule")


@shows("A config that isn't found")
def _(_: pytest.MonkeyPatch) -> str:
    return lit("fit", "--config", "configs/superflaw.yaml", status=2)


@shows("A value of the wrong type")
def _(_: pytest.MonkeyPatch) -> str:
    Path("mine.yaml").write_text("trainer:\n  max_steps: many\n")
    return fit("--config", "mine.yaml")


@shows("No model")
def _(_: pytest.MonkeyPatch) -> str:
    return lit("fit", status=2)


@shows("My callbacks are gone")
def _(_: pytest.MonkeyPatch) -> str:
    Path("mine.yaml").write_text("trainer:\n  callbacks:\n  - class_path: EMATeacher\n")
    Path("later.yaml").write_text("trainer:\n  callbacks:\n  - class_path: LearningRateMonitor\n")
    printed = fit("--config", "mine.yaml", "--config", "later.yaml", "--print_config", status=0)
    assert "EMATeacher" not in printed
    Path("later.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: LearningRateMonitor\n")
    assert "EMATeacher" in fit("--config", "mine.yaml", "--config", "later.yaml", "--print_config", status=0)
    return printed


# ---- libraries and machine -------------------------------------------------------------------------------------------------------------


@shows("spconv is missing")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "spconv", None)
    for name in [name for name in sys.modules if name.startswith("spconv.")]:
        monkeypatch.delitem(sys.modules, name)
    return lit("fit", "--config", "configs/superflow_probe.yaml", status=1)


@shows("No GPU is found")
def _(_: pytest.MonkeyPatch) -> str:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return fit("--config", "configs/trainer/gpu.yaml", status=1)


@shows("The GPU's memory is full")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--model", "mine.Large", status=1)


@shows("A loader worker was killed")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--data", "mine.FatalData", status=1)


@shows("A port is taken")
def _(_: pytest.MonkeyPatch) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as error:
            torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], 1, is_master=True, use_libuv=False)
    return str(error.value)


@shows("The disk is full")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    def full(content: object, file: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), getattr(file, "name", str(file)))

    monkeypatch.setattr(torch, "save", full)
    return fit(status=1)


@shows("The run's folder can't be written")
def _(_: pytest.MonkeyPatch) -> str:
    Path("runs").write_text("a file in the place of the folder")
    return fit(status=1)


@shows("The cache of the built-in world can't be written")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    Path("cache").write_text("a file in the place of the folder")
    monkeypatch.setenv("LIT_METHODS_CACHE", str(Path("cache").resolve() / "worlds"))
    return fit("--data", "NuScenesDataModule", status=1)


@shows("W&B stays offline")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("NETRC", str(Path.cwd() / "netrc"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    from lit_methods.cli.lightning_cli import prepare_mentioned

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        prepare_mentioned(["fit", "--trainer.logger", "WandbLogger"], [])
    monkeypatch.setenv("WANDB_MODE", "offline")  # undone at the end: as it was before
    return out.getvalue()


# ---- data ------------------------------------------------------------------------------------------------------------------------------


@shows("A pretrained model can't be downloaded")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return fit("--model", "CausalLM", "--model.name_or_path", "my-org/my-model", status=1)


@shows("The folder of the data isn't there")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--data", "NuScenesDataModule", "--data.root", "data/nuscenes", "--data.version", "v1.0-mini", status=1)


@shows("A file of the data set is broken")
def _(_: pytest.MonkeyPatch) -> str:
    from lit_methods.datamodules.driving.common import read_points

    Path("x.pcd.bin").write_bytes(bytes(1003))
    with pytest.raises(ValueError) as error:
        read_points(Path("x.pcd.bin"), 5)
    return str(error.value)


@shows("A file of the data set may not be read")
def _(patch: pytest.MonkeyPatch) -> str:
    from lit_methods.datamodules.vision.semi import read_label_list

    Path("labels.txt").write_text("0\n")
    patch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(ValueError) as error:
        read_label_list(Path("labels.txt"), 10)
    return str(error.value)


@shows("A file claims more than it has")
def _(_: pytest.MonkeyPatch) -> str:
    from lit_methods.datamodules.reading import read_npy

    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}".ljust(117) + b"\n"
    Path("x.npy").write_bytes(b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + bytes(16))
    with pytest.raises(ValueError) as error:
        read_npy(Path("x.npy"))
    return str(error.value)


@shows("An evaluation has fewer samples than processes")
def _(_: pytest.MonkeyPatch) -> str:
    from lit_methods.datamodules.loaders import make_loader

    with pytest.raises(ValueError) as error:
        make_loader(range(2), 4, shuffle=False, seed=0, rank=1, world_size=3)
    return f"error: {error.value}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------------


@shows("A file that can't be read")
def _(monkeypatch: pytest.MonkeyPatch) -> str:
    path = Path("x.npy").absolute()
    path.touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda place, mode, **_: Path(place) != path and access(place, mode))  # root may read everything
    return f"error: {explain_run_error(PermissionError(errno.EACCES, 'Permission denied', str(path)))}"


@shows("The checkpoint isn't found")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--ckpt_path", "runs/base/last.ckpt")


@shows("Nothing to resume")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--resume", "last")


@shows("The checkpoint is cut off")
def _(_: pytest.MonkeyPatch) -> str:
    Path("cut.ckpt").write_bytes(b"PK\x03\x04 and nothing more")
    return fit("--ckpt_path", "cut.ckpt", status=1)


@shows("The checkpoint comes from another model")
def _(_: pytest.MonkeyPatch) -> str:
    fit("--name", "narrow", status=0)
    (last,) = Path("runs/narrow").glob("*/checkpoints/last.ckpt")
    return fit("--model", "mine.Wide", "--ckpt_path", last, status=1)


@shows("The checkpoint was written with other arguments")
def _(_: pytest.MonkeyPatch) -> str:
    fit("--name", "three", "--model", "mine.Narrow", status=0)
    (last,) = Path("runs/three").glob("*/checkpoints/last.ckpt")
    return fit("--model", "mine.Narrow", "--model.width", 5, "--ckpt_path", last, status=0)


@shows("The run is being written by another process")
def _(_: pytest.MonkeyPatch) -> str:
    fit("--name", "twice", status=0)
    (run,) = Path("runs/twice").iterdir()
    (run / "finished.json").unlink()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"+" if lock_run(run) else b"-")
        signal.pause()
    try:
        assert os.read(read, 1) == b"+"
        return fit("--name", "twice", "--resume", "auto", status=1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


CAST = ["--trainer.callbacks+=CAST", "--trainer.callbacks.targets", "[layer]", "--trainer.callbacks.m", "4", "--optimizer", "AdamW"]


def run_with_cast() -> Path:
    """The checkpoint of a run with a technique that regroups what the optimiser holds."""
    fit("--name", "cast", *CAST, "--trainer.callbacks.n", 2, status=0)
    (last,) = Path("runs/cast").glob("*/checkpoints/last.ckpt")
    return last


@shows("A technique is missing when a run goes on")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--ckpt_path", run_with_cast(), "--optimizer", "AdamW", status=1)


@shows("A technique goes on with another argument")
def _(_: pytest.MonkeyPatch) -> str:
    last = run_with_cast()
    with pytest.warns(UserWarning, match="goes on with other arguments") as said:
        fit("--ckpt_path", last, *CAST, "--trainer.callbacks.n", 1, status=0)
    return "\n".join(str(warning.message) for warning in said)


@shows("--resume auto starts anew")
def _(_: pytest.MonkeyPatch) -> str:
    fit("--name", "again", status=0)
    return fit("--name", "again", "--trainer.max_steps", 3, "--resume", "auto", status=0)


# ---- training --------------------------------------------------------------------------------------------------------------------------


@shows("The output can't be written any more")
def _(_: pytest.MonkeyPatch) -> str:
    read, write = os.pipe()
    os.close(read)
    told = io.StringIO()
    with os.fdopen(write, "w", buffering=1) as closed, contextlib.redirect_stderr(told), contextlib.redirect_stdout(closed):
        assert main(["fit", "--config", "base.yaml"]) == 0
    return told.getvalue()


@shows("The loss is NaN")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--model", "mine.Exploding", status=1)


@shows("A pattern matches no layer")
def _(_: pytest.MonkeyPatch) -> str:
    from lit_methods.callbacks.targets import select_modules

    network = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError) as error:
        select_modules(network, ["encoders"])
    return str(error.value)


@shows("A loss term on a module with manual optimisation")
def _(_: pytest.MonkeyPatch) -> str:
    return fit("--model", "mine.Manual", "--trainer.callbacks+=DenseToSparse", "--trainer.callbacks.target=layer", status=1)


# ---- the page --------------------------------------------------------------------------------------------------------------------------


def test_every_entry_is_provoked_and_every_provoked_message_is_on_the_page() -> None:
    assert set(entries()) == set(PROVOKERS)


@pytest.mark.parametrize("heading", PROVOKERS)
def test_the_page_quotes_what_is_said(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = PROVOKERS[heading](monkeypatch)
    assert quoted_in(entries()[heading], said), f"docs/errors.md quotes:\n{entries()[heading]}\nbut this is said:\n{said[-2000:]}"


def test_a_stale_quote_is_found() -> None:
    said = "Epoch 0\nerror: config 'a.yaml' not found: looked here\n  nearest: b.yaml\n"
    assert quoted_in("error: config <name> not found: looked here\n  nearest: <names>\n", said)
    assert not quoted_in("error: config <name> is missing\n", said)
    assert not quoted_in("error: config <name> not found: looked here\n  did you mean: <names>\n", said)
