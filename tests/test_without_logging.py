"""Trainers that log nothing (``log_every_n_steps=0``, ``barebones=True``) train every module of the shipped configs."""

import importlib
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_methods.catalog import configs_folder, public_names

QUICK = ("random_pruning", "fixmatch", "ict", "rcm")
CONFIGS = (
    *QUICK, "adawac", "cast_lm", "conr", "consistencydet", "coprompt", "dsl_recommendation", "epg", "issp", "shrinkmatch", "simmatchv2",
    "slct", "superflow", "superflow_probe", "tcm",
)  # fmt: skip


def full(section: Any) -> Any:
    """Short class names, as ``lit`` takes them, with the packages that export them."""
    if isinstance(section, dict):
        name = section.get("class_path")
        path = {"class_path": f"{public_names()[name]}.{name}"} if name in public_names() else {}
        return {key: full(value) for key, value in section.items()} | path
    return [full(value) for value in section] if isinstance(section, list) else section


def parts(config: str) -> tuple[LightningModule, LightningDataModule]:
    """Module and data of a shipped config."""
    importlib.import_module("lit_methods.callbacks")
    content = yaml.safe_load((configs_folder() / f"{config}.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    torch.manual_seed(0)
    made = parser.instantiate(parser.parse_object({key: full(content[key]) for key in ("model", "data")}))
    return made.model, made.data


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}], ids=["log_every_n_steps=0", "barebones"])
@pytest.mark.parametrize("config", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in CONFIGS])
def test_a_module_trains_where_nothing_is_logged(config, options, tmp_path):
    module, data = parts(config)
    quiet = {} if "barebones" in options else {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=2, limit_train_batches=2, limit_val_batches=1, accelerator="cpu", devices=1, default_root_dir=tmp_path,
        gradient_clip_val=None, **quiet, **options,
    )  # fmt: skip
    before = [parameter.clone() for parameter in module.parameters()]
    trainer.fit(module, datamodule=data)
    assert trainer.global_step >= 1
    assert any(not torch.equal(ours, first) for ours, first in zip(module.parameters(), before, strict=True))
