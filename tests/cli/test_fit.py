"""``lit fit | validate | test | predict``: composition, names, the run folder, loggers, friendly errors."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from helpers import run_lit
from lit_methods.cli.main import main
from wandb_log import read_run

DEMO = "lightning.pytorch.demos.boring_classes."
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = f"""
model: {{class_path: {DEMO}BoringModel}}
data: {{class_path: {DEMO}BoringDataModule}}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  limit_val_batches: 1
  enable_model_summary: false
  log_every_n_steps: 1
"""
MINE = """
import torch
from torch import nn
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel

class Mine(BoringModel):
    def __init__(self, width: int = 3, inner: nn.Module | None = None, rate: float = 0.1):
        super().__init__()
        self.inner, self.rate = inner, rate
    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.log("mine/loss", out["loss"], prog_bar=True)
        return out
    def test_step(self, batch, batch_idx):
        self.log("mine/test", self.layer(batch).sum())
    def predict_step(self, batch, batch_idx):
        return self.layer(batch)

class Bare(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

class Broken(BoringModel):
    def training_step(self, batch, batch_idx):
        raise ValueError("a defect of the user's own code")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a small config and the user's own module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    for name in ("mine", "broken_module", "needy_module"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    Path("base.yaml").write_text(BASE)
    Path("mine.py").write_text(MINE)
    return tmp_path


def runs(name: str = "base") -> list[Path]:
    return sorted(Path("runs", name).iterdir())


def resolved(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["fit", *words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_run_leaves_one_folder_with_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    assert main(["fit", "--config", "base.yaml", "--model", "mine.Mine", "--model.rate", "0.25"]) == 0
    (run,) = runs()
    assert re.fullmatch(r"\d{8}-\d{6}", run.name)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["rate"] == 0.25
    assert config["name"] == "base"
    assert config["seed_everything"] == 0
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__
    assert not (run / "git.json").exists()
    assert "mine/loss" in (run / "csv" / "metrics.csv").read_text()
    assert yaml.safe_load((run / "csv" / "hparams.yaml").read_text())["model"]["init_args"]["rate"] == 0.25
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    out = capsys.readouterr().out
    for part in ("run folder", "last.ckpt", "mine/loss", "step 2/2"):
        assert part in out
    if (run / "report.html").exists():
        assert f"<h1>{run.parent.name} · " in (run / "report.html").read_text(encoding="utf-8")
        assert "report.html" in out
    assert {path.name for path in folder.iterdir()} - before <= {"runs", "__pycache__"}
    assert "LIT_METHODS_RUN_FOLDER" not in os.environ


def test_a_second_run_never_overwrites_the_first() -> None:
    words = ["fit", "--config", "base.yaml", "--trainer.logger", "false"]
    assert main(words) == 0
    first = runs()
    written = (first[0] / "config.yaml").stat().st_mtime_ns
    assert main(words) == 0
    assert len(runs()) == 2
    assert (first[0] / "config.yaml").stat().st_mtime_ns == written
    assert main(["fit", "--config", str(first[0] / "config.yaml"), "--run-root", "elsewhere"]) == 0  # a saved config repeats its run
    assert len(list(Path("elsewhere/base").iterdir())) == 1
    assert main(["fit", "--config", "base.yaml", "--name", "mine"]) == 0
    assert len(runs("mine")) == 1


def test_a_run_goes_on_from_its_checkpoint_and_the_other_commands_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "base.yaml", "--model", "mine.Mine"]
    assert main(["fit", *words]) == 0
    assert main(["fit", *words, "--resume", "last", "--trainer.max_steps", "5"]) == 0
    second = runs()[-1]
    assert torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["ckpt_path"].endswith("checkpoints/last.ckpt")
    last = str(second / "checkpoints" / "last.ckpt")
    for command in ("validate", "test", "predict"):
        assert main([command, *words, "--ckpt_path", last, "--name", command]) == 0
        assert (runs(command)[0] / "config.yaml").is_file()
    assert "mine/test" in capsys.readouterr().out


def test_configs_compose_and_later_ones_win(capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text("trainer: {max_steps: 7, callbacks+: [{class_path: ThroughputProgressBar, init_args: {log_seconds: 3}}]}")
    Path("bar.yaml").write_text("trainer: {callbacks+: [{class_path: ModelCheckpoint}]}")
    files = ["--config", "base.yaml", "--config", "more.yaml", "--config", "bar.yaml", "--config", "configs/trainer/cpu.yaml"]
    config = resolved(capsys, *files)
    assert config["trainer"]["max_steps"] == 7
    assert [entry["class_path"] for entry in config["trainer"]["callbacks"]] == [
        "lit_methods.callbacks.ThroughputProgressBar",
        "lightning.pytorch.callbacks.ModelCheckpoint",
    ]
    assert config["trainer"]["callbacks"][0]["init_args"]["log_seconds"] == 3


def test_a_namesake_goes_by_its_dotted_path_and_a_shared_short_name_is_refused() -> None:
    """In a process of its own: a class that was imported once stays known to the parser."""
    Path("twins.py").write_text("from lightning.pytorch import Callback\nclass ExactResume(Callback): ...\n")
    command = ["fit", "--config", "base.yaml", "--trainer.callbacks+=twins.ExactResume"]
    alone = run_lit([*command, "--print_config"])
    assert alone.returncode == 0, alone.stderr
    assert "class_path: twins.ExactResume" in alone.stdout
    both = run_lit([*command, "--trainer.callbacks+=ExactResume"])
    assert both.returncode == 2
    assert "twins.ExactResume" in both.stderr
    assert "lit_methods.callbacks" in both.stderr


def test_an_optimizer_comes_from_the_config_for_a_module_without_one() -> None:
    words = [
        "--config",
        "base.yaml",
        "--model",
        "mine.Bare",
        "--optimizer",
        "AdamW",
        "--optimizer.lr",
        "0.5",
        "--trainer.limit_val_batches",
        "0",
    ]
    assert main(["fit", *words]) == 0
    state = torch.load(runs()[0] / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["lr"] == 0.5
    assert "exp_avg" in state["state"][0]


def test_callbacks_of_the_user_replace_ours_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Trainer] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kwargs: seen.append(self))
    monkeypatch.setattr("lit_methods.cli.summary.summary_rows", lambda *args: [("run", "none")])
    kinds = lambda trainer: sorted(type(callback).__name__ for callback in trainer.callbacks)  # noqa: E731
    assert main(["fit", "--config", "base.yaml"]) == 0
    assert {"RunFolder", "ThroughputProgressBar", "ModelCheckpoint", "ExactResume", "Dashboard"} <= set(kinds(seen[0]))
    given = ["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=link"]
    assert main(["fit", "--config", "base.yaml", *given]) == 0
    assert kinds(seen[1]).count("ModelCheckpoint") == 1
    assert "ThroughputProgressBar" not in kinds(seen[1])
    assert main(["fit", "--config", "base.yaml", "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]) == 0
    assert not {"ThroughputProgressBar", "ModelCheckpoint"} & set(kinds(seen[2]))
    assert not Path("runs/base").exists()  # nothing ran, so the empty folders are gone


def test_every_logger_writes_into_the_run_and_gets_the_config() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [
        "base.yaml",
        "configs/logger/csv.yaml",
        "configs/logger/tensorboard.yaml",
        "configs/logger/wandb.yaml",
        "configs/debug/profiler.yaml",
    ]
    words = [word for file in files for word in ("--config", file)]
    assert main(["fit", *words, "--model", "mine.Mine", "--trainer.max_steps", "2"]) == 0
    import wandb

    wandb.finish()
    (run,) = runs()
    assert (run / "csv" / "metrics.csv").is_file()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert "mine/loss" in events.Tags()["scalars"]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "mine.Mine" in str(events.Tensors("config/text_summary")[0].tensor_proto.string_val)
    (offline,) = (run / "wandb").glob("offline-run-*")
    read_run(offline)  # waits until it is whole
    stored = next(offline.glob("*.wandb")).read_bytes()
    assert b"mine.Mine" in stored  # the config
    assert "run_training_epoch" in (run / "profiler" / "fit-profile.txt").read_text()
    assert not Path("wandb").exists()


@pytest.mark.parametrize(
    "fragment", sorted(str(path.relative_to(CONFIGS)) for part in ("trainer", "logger", "debug") for path in CONFIGS.glob(f"{part}/*.yaml"))
)
def test_fragments_parse_and_every_key_is_explained(fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "--config", "base.yaml", "--config", f"configs/{fragment}")
    for key, value in yaml.safe_load((CONFIGS / fragment).read_text())["trainer"].items():
        if not isinstance(value, dict | list):
            assert config["trainer"][key] == value
    for line in (CONFIGS / fragment).read_text().splitlines():
        if re.match(r"\s*(- )?\w+\+?:\s*\S", line) and "class_path" not in line:
            assert "  # " in line, f"{fragment}: {line!r} has no comment"


@pytest.mark.parametrize("fragment", ["trainer/cpu", "debug/fast"])
def test_fragments_run(fragment: str) -> None:
    assert main(["fit", "--config", "base.yaml", "--config", f"configs/{fragment}.yaml"]) == 0
    steps = torch.load(runs()[0] / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == (4 if fragment == "debug/fast" else 2)


def test_overfitting_runs_whatever_the_config_says_of_validation() -> None:
    """Many configs count validation in steps, more of them than the two that an epoch has then."""
    Path("steps.yaml").write_text("trainer:\n  val_check_interval: 100\n  check_val_every_n_epoch: null\n")
    configs = ("base.yaml", "steps.yaml", "configs/debug/overfit.yaml")
    assert main(["fit", *(word for config in configs for word in ("--config", config)), "--trainer.max_epochs", "10"]) == 0
    assert torch.load(runs()[0] / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20


# -- what is said when something is wrong --------------------------------------------------------------------------------------------

YAML_ERRORS = {
    "top_level": ("modle: mine.Mine\n", ["unknown key 'modle'", "line 1", "model"]),
    "top_level_of_trainer": ("max_steps: 3\n", ["unknown key 'max_steps'", "trainer.max_steps"]),
    "trainer_key": ("trainer:\n  max_stps: 3\n", ["trainer.max_stps", "line 2", "max_steps"]),
    "model_argument": (
        "model:\n  class_path: mine.Mine\n  init_args:\n    widht: 3\n",
        ["Mine has no argument 'widht'", "line 4", "width"],
    ),
    "data_argument": (
        f"data:\n  class_path: {DEMO}BoringDataModule\n  init_args: {{a: 3}}\n",
        ["BoringDataModule has no argument 'a'", "line 3"],
    ),
    "callback_argument": (
        "trainer:\n  callbacks+:\n  - class_path: ModelCheckpoint\n    init_args:\n      monitr: x\n",
        ["ModelCheckpoint has no argument 'monitr'", "line 5", "monitor"],
    ),
    "our_callback": (
        "trainer: {callbacks+: [{class_path: ThroughputProgresBar}]}\n",
        ["no class 'ThroughputProgresBar'", "ThroughputProgressBar"],
    ),
    "callback_class": ("trainer: {callbacks+: [ModelChekpoint]}\n", ["no class 'ModelChekpoint'", "ModelCheckpoint"]),
    "logger_class": ("trainer: {logger: {class_path: CSVLoger}}\n", ["no class 'CSVLoger'", "CSVLogger"]),
    "nested_class": (
        "model:\n  class_path: mine.Mine\n  init_args:\n    inner: {class_path: MinkUNt}\n",
        ["model.init_args.inner", "no class 'MinkUNt'", "line 4", "MinkUNet"],
    ),
    "nested_argument": (
        "model:\n  class_path: mine.Mine\n  init_args:\n    inner:\n"
        "      class_path: torch.nn.Linear\n      init_args: {in_features: 2, out_feature: 2}\n",
        ["Linear has no argument 'out_feature'", "line 6", "out_features"],
    ),
    "nested_required": (
        "model:\n  class_path: mine.Mine\n  init_args:\n    inner:\n      class_path: torch.nn.Linear\n      init_args: {in_features: 2}\n",
        ["out_features"],
    ),
    "type": ("model: {class_path: mine.Mine, init_args: {width: wide}}\n", ["width", "expected int", "'wide'", "line 1"]),
    "trainer_type": ("trainer:\n  max_steps: many\n", ["trainer.max_steps", "expected int", "'many'", "line 2"]),
    "beside_class_path": ("model: {class_path: mine.Mine, width: 3}\n", ["'width'", "init_args"]),
    "class_path_typo": ("model: {clas_path: mine.Mine}\n", ["'clas_path'", "class_path"]),
    "wrong_kind": (f"model: {{class_path: {DEMO}BoringDataModule}}\n", ["is no LightningModule"]),
    "syntax": ("trainer:\n  max_steps: [3\n", ["wrong.yaml", "line 3", "not valid YAML"]),
    "no_mapping": ("- 1\n- 2\n", ["wrong.yaml", "top level"]),
    "import": ("model: no_such_module.Mine\n", ["no_such_module", "No module named"]),
    "attribute": ("model: mine.Mien\n", ["mine has no 'Mien'", "Mine"]),
    "broken_import": ("model: broken_module.Mine\n", ["broken_module.py, line 1", "ZeroDivisionError"]),
    "missing_library": ("model: needy_module.Mine\n", ["needs the library: pip install lit-methods[lidar]"]),
}


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(["fit", *words]) == code
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if not line.startswith("Seed set")]
    assert lines[0].startswith("error: ")
    assert len(lines) <= 6
    assert "Traceback" not in text
    assert "usage" not in text
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.*"))
    return text


@pytest.mark.parametrize("case", YAML_ERRORS)
def test_a_mistake_in_a_config_gets_one_short_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, parts = YAML_ERRORS[case]
    Path("wrong.yaml").write_text(text)
    Path("broken_module.py").write_text("x = 1 / 0\n")
    Path("needy_module.py").write_text("raise ImportError('this needs the library: pip install lit-methods[lidar]')\n")
    said = refused(capsys, "--config", "base.yaml", "--config", "wrong.yaml")
    for part in parts:
        assert part in said


COMMAND_LINE_ERRORS = {
    "no_model": ([], ["no model given", "--config", "--model"]),
    "model": (["--model", "SuperFlwo"], ["no class 'SuperFlwo'", "SuperFlow"]),
    "model_argument": (["--model", "mine.Mine", "--model.widht", "3"], ["no argument 'widht'", "width"]),
    "long_model_argument": (["--model", "mine.Mine", "--model.init_args.widht", "3"], ["no argument 'widht'", "width"]),
    "nested": (
        ["--model", "mine.Mine", "--model.inner", "torch.nn.Linear", "--model.inner.in_featurs", "3"],
        ["in_featurs", "in_features"],
    ),
    "trainer": (["--model", "mine.Mine", "--trainer.max_stps=3"], ["trainer.max_stps", "max_steps"]),
    "type": (["--model", "mine.Mine", "--trainer.max_steps", "many"], ["trainer.max_steps", "expected int", "'many'"]),
    "key": (["--model", "mine.Mine", "--seed_everythin", "3"], ["seed_everythin", "seed_everything"]),
    "callback": (["--model", "mine.Mine", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitr=x"], ["'monitr'", "monitor"]),
    "optimizer": (["--model", "mine.Bare", "--optimizer", "AdmW"], ["no class 'AdmW'", "AdamW"]),
    "optimizer_argument": (["--model", "mine.Bare", "--optimizer", "AdamW", "--optimizer.lrr", "1"], ["no argument 'lrr'", "lr"]),
    "config_not_found": (["--config", "bsae.yaml"], ["'bsae.yaml' not found", "base.yaml"]),
    "shipped_not_found": (["--config", "configs/trainer/gpuu.yaml"], ["not found", "configs/trainer/gpu.yaml"]),
    "no_config": (["--config"], ["--config needs a file"]),
    "forgotten_flag": (["base.yaml"], ["--config base.yaml"]),
    "checkpoint": (["--config", "base.yaml", "--ckpt_path", "x.ckpt"], ["'x.ckpt' not found"]),
    "resume": (["--config", "base.yaml", "--resume", "last"], ["no run in runs/base has a checkpoint"]),
}


@pytest.mark.parametrize("case", COMMAND_LINE_ERRORS)
def test_a_mistake_on_the_command_line_gets_one_short_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, parts = COMMAND_LINE_ERRORS[case]
    said = refused(capsys, *words)
    for part in parts:
        assert part in said


def test_bad_input_found_by_our_code_gets_one_message_and_a_traceback_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_root = ["--config", "base.yaml", "--data", "NuScenesDataModule", "--data.root", "no/such/folder"]
    said = refused(capsys, *refused_root, code=1)
    assert "no/such/folder" in said
    assert main(["fit", *refused_root, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LIT_METHODS_DEBUG", "1")
    assert main(["fit", *refused_root]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_of_the_users_own_code_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a defect of the user's own code"):
        main(["fit", "--config", "base.yaml", "--model", "mine.Broken"])


def test_lightnings_own_complaints_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "gpu" in refused(capsys, "--config", "base.yaml", "--config", "configs/trainer/gpu.yaml", code=1)


def test_a_callback_that_two_files_add_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: WeightEMA\n", encoding="utf-8")
    said = refused(capsys, *["--config", "base.yaml"], *["--config", "more.yaml"] * 2, code=1)
    assert "WeightEMA stands twice" in said
    assert "Traceback" not in said


def test_damaged_and_foreign_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "base.yaml"]) == 0
    last = runs()[0] / "checkpoints" / "last.ckpt"
    Path("cut.ckpt").write_bytes(last.read_bytes()[:800])
    capsys.readouterr()
    assert main(["test", "--config", "base.yaml", "--ckpt_path", "cut.ckpt"]) == 1
    assert "cut off" in capsys.readouterr().err
    content = torch.load(last, weights_only=True)
    content["state_dict"] = {"other.weight": torch.ones(2, 2)}
    torch.save(content, "other.ckpt")
    assert main(["test", "--config", "base.yaml", "--ckpt_path", "other.ckpt"]) == 1
    said = capsys.readouterr().err
    assert "does not fit BoringModel" in said
    assert "Traceback" not in said


def test_help_of_a_class_and_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 25
    assert main(["fit", "--model.help", "mine.Mine"]) == 0
    assert "--model.width" in capsys.readouterr().out
    assert main(["fit", "--trainer.callbacks.help", "ThroughputProgressBar"]) == 0
    assert "log_seconds" in capsys.readouterr().out


def test_wandb_is_offline_without_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    from lit_methods.cli.lightning_cli import prepare_mentioned

    prepare_mentioned(["fit", "--trainer.logger", "WandbLogger"], [])
    assert os.environ["WANDB_MODE"] == "offline"
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    prepare_mentioned(["fit", "--trainer.logger", "WandbLogger"], [])
    assert "WANDB_MODE" not in os.environ
    assert not capsys.readouterr().out
