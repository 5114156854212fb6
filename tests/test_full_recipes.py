"""Every recipe of ``configs/full/`` starts: two steps on a CPU on a tiny release; it saves, validates, and goes on from its first step."""

import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from full_recipes import LAPTOP, LLAMA2_7B, RECIPES, UNTRIED, Recipe
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers import run_lit
from lit_methods.callbacks import CAST
from lit_methods.callbacks.sparsity.cast.self_distillation import DenseSelf
from lit_methods.catalog import configs_folder
from lit_methods.cli.lightning_cli import planned
from lit_methods.cli.main import main
from lit_methods.datamodules.folders import COMMON
from lit_methods.hub import weights_left_out

FULL = configs_folder() / "full"
LONGEST = 1500.0  # seconds of one command
NO_WORKERS = re.compile(r"^( +num_workers:) \d+", flags=re.M)  # processes that read: they would only take memory here
CHEAP = "dsl_recommendation_neumf"


def test_every_recipe_is_started_or_says_why_not() -> None:
    """And the page has a row for each."""
    files = {path.stem for path in FULL.glob("*.yaml")}
    assert files == RECIPES.keys() | UNTRIED.keys()
    assert not RECIPES.keys() & UNTRIED.keys()
    page = Path("docs/full_recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`?(\w+)`?", page, flags=re.M)
    assert sorted(set(rows) & files) == sorted(files)
    for name, recipe in RECIPES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert recipe.why.split(":")[0] in row, f"{name}: the row doesn't say {recipe.why!r}"


def run(words: list[str], work: Path, env: Mapping[str, str]) -> str:
    found = run_lit(words, work, env, timeout=LONGEST)
    assert found.returncode == 0, f"lit {' '.join(words)}\n{found.stderr[-3000:]}"
    return found.stdout


def written(name: str, recipe: Recipe, work: Path, **places: object) -> Path:
    """The recipe's file with what stands in for weights; nothing else is changed, and no process reads data."""
    text = (FULL / f"{name}.yaml").read_text(encoding="utf-8")
    for old, new in recipe.replaced.items():
        assert old in text, f"{name}.yaml has no {old!r} any more"
        text = text.replace(old, new.format(work=work, **places))
    file = work / f"{name}.yaml"
    file.write_text(NO_WORKERS.sub(r"\1 0", text), encoding="utf-8")
    return file


def only_run(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def at_step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True, map_location="meta", mmap=True)["global_step"])


def start(name: str, work: Path) -> None:
    """Fit two steps, validate, and do the second step again from the checkpoint of the first."""
    recipe = RECIPES[name]
    for library in recipe.needs:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    began = time.monotonic()
    env = dict(os.environ) | {COMMON: "release", "HF_HUB_OFFLINE": "1"}
    run(["fake", f"configs/full/{name}.yaml", "release"], work, env)
    if recipe.prepare is not None:
        recipe.prepare(work)
    laptop = [f"--trainer.{word}" for word in LAPTOP]
    first: Path | None = None
    if recipe.first:
        file = written(name, recipe, work, first="none.ckpt")
        words = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--run_root=before"]
        run(["fit", "--config", str(file), *laptop, *recipe.words, *recipe.first, *words], work, env)
        first = only_run(work / "before" / name) / "checkpoints" / "last.ckpt"
    file = written(name, recipe, work, first=first)
    if recipe.evaluated:
        said = run(["test", "--config", str(file), *laptop, *recipe.words], work, env)
        assert (only_run(work / "runs" / name) / "metrics.jsonl").is_file(), said[-1000:]
        return
    limits = ["--trainer.limit_val_batches=1"]
    steps = ["--trainer.max_steps=2", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    keep = ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.save_last=true"]
    run(["fit", "--config", str(file), *laptop, *recipe.words, *limits, *steps, *keep], work, env)
    own = only_run(work / "runs" / name)
    saved = sorted((own / "checkpoints").glob("epoch*.ckpt"), key=at_step)
    last = own / "checkpoints" / "last.ckpt"
    assert at_step(saved[0]) < at_step(last)
    again = ["--config", str(own / "config.yaml"), *limits]
    said = run(["validate", *again, "--ckpt_path", str(last), "--run_root=validated"], work, env)
    assert (only_run(work / "validated" / name) / "metrics.jsonl").is_file(), said[-1000:]
    run(["fit", *again, "--ckpt_path", str(saved[0]), "--run_root=resumed"], work, env)
    assert at_step(only_run(work / "resumed" / name) / "checkpoints" / "last.ckpt") == at_step(last)
    if place := os.environ.get("LIT_METHODS_RECIPES"):
        with open(place, "a", encoding="utf-8") as log:
            log.write(json.dumps({"recipe": name, "seconds": round(time.monotonic() - began)}) + "\n")


def test_a_small_recipe_starts(tmp_path: Path) -> None:
    start(CHEAP, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {CHEAP}))
def test_a_recipe_starts(name: str, tmp_path: Path) -> None:
    start(name, tmp_path)
    for path in tmp_path.rglob("*.ckpt"):  # gigabytes
        path.unlink()


def test_the_weights_that_stand_in_are_all_that_changes(tmp_path: Path) -> None:
    """Nothing but paths of weights, sizes of the networks that are too large, and the number of reading processes."""
    for name, recipe in RECIPES.items():
        before = yaml.safe_load((FULL / f"{name}.yaml").read_text(encoding="utf-8"))
        after = yaml.safe_load(written(name, recipe, tmp_path, first="first.ckpt").read_text(encoding="utf-8"))
        changed = {key for key, value in flat(before).items() if flat(after)[key] != value}
        allowed = ("pretrained", "path", "weights", "clip", "mask", "teacher_weights", "name_or_path", "tokenizer", "tiny_autoencoder")
        sizes = ("width", "hidden", "heads", "depth") if recipe.meta else ()
        said = {word for word in ("threshold",) if f"another {word}" in recipe.why}
        said |= {"name", "channels", "image_size"} if "another name and channels, image_size" in recipe.why else set()
        said |= {"head_hidden"} if "narrower heads" in recipe.why else set()
        said |= (
            {"image_size", "resize", "width", "kernel"}
            if "crops of 32 pixels, a tenth of the channels, smaller capsule kernel" in recipe.why
            else set()
        )
        assert {key.rpartition(".")[2].partition("[")[0] for key in changed} <= {*allowed, *sizes, *said, "num_workers"}, name


def flat(value: object, key: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {place: one for name, inner in value.items() for place, one in flat(inner, f"{key}.{name}").items()}
    if isinstance(value, list):
        return {place: one for number, inner in enumerate(value) for place, one in flat(inner, f"{key}[{number}]").items()}
    return {key: value}


class FirstStep(Exception):
    """The first step is about to be done."""


class StopAtTheFirstStep(Callback):
    """Ends the run when everything has been set up."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        raise FirstStep


class Weightless(SingleDeviceStrategy):
    """Leaves the module where it is, on the meta device."""

    def model_to_device(self) -> None:
        """It says so, when asked for its device."""
        assert self.model is not None
        self.model.to("meta")

    def teardown(self) -> None:
        """Nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.meta])
def test_what_is_too_large_here_comes_up_to_its_first_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network of the recipe, its callbacks and its optimisers, without memory for their numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(COMMON, str(tmp_path / "release"))
    assert main(["fake", f"configs/full/{name}.yaml", "release"]) == 0
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LLAMA2_7B}))
    words = [f"--model.init_args.name_or_path={folder}"] if name == "cast_llama2_7b" else []
    cli, _ = planned(["fit", "--config", f"configs/full/{name}.yaml", *(f"--trainer.{word}" for word in LAPTOP), *words])
    config = cli.config["fit"]
    with weights_left_out(), torch.device("meta"):
        module = cli.built("model", config.model)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters > {"cast_llama2_7b": 6.7e9, "rcm_wan1b": 4.2e9}[name]
    callbacks = [cli.built("callback", section) for section in config.trainer.callbacks]
    trainer = Trainer(
        strategy=Weightless(torch.device("cpu"), CPUAccelerator()),
        callbacks=[*callbacks, StopAtTheFirstStep()],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    # what reads numbers: how CAST knows a teacher again, and what it keeps when it leaves
    monkeypatch.setattr(DenseSelf, "fingerprint", lambda self: torch.zeros(1))
    monkeypatch.setattr(CAST, "leave", lambda self, *_: None)
    with pytest.raises(FirstStep):
        trainer.fit(module, datamodule=cli.built("data", config.data))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert len(trainer.optimizers) == {"cast_llama2_7b": 1, "rcm_wan1b": 2}[name]
