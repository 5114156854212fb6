"""Where a run's checkpoints are looked for: in subfolders, in a ``dirpath`` that runs share, never in silence."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.cli.resume import checkpoints_of, differing_keys, find_restart, last_checkpoint
from lit_methods.errors import CommandError
from lit_methods.runs.folder import OWNER, owner_of

NOW = 1_700_000_000


def make_run(runs: Path, time: str, *, dirpath: Path | str | None = None, at: int = 0) -> tuple[Path, dict[str, Any]]:
    """A run folder with its config, written ``at`` seconds after some moment."""
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": dirpath and str(dirpath)}}
    config = {"seed_everything": 0, "trainer": {"max_steps": 3, "callbacks": [{"class_path": "lit_methods.callbacks.ConR"}, callback]}}
    folder = runs / time
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    os.utime(folder / "config.yaml", (NOW + at, NOW + at))
    return folder, config


def save(path: Path, at: int, *, run: Path | None = None, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"loops": {}, "optimizer_states": [], "state_dict": {}, **more}
    torch.save(content | ({OWNER: owner_of(run)} if run is not None else {}), path)
    os.utime(path, (NOW + at, NOW + at))
    return path


def test_a_slash_in_the_file_name_makes_a_subfolder(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path / "digits", "one")
    save(folder / "checkpoints" / "epoch=0-val" / "loss=0.50.ckpt", at=5)
    newest = save(folder / "checkpoints" / "epoch=1-val" / "loss=0.40.ckpt", at=9)
    save(folder / "checkpoints" / ".last.ckpt.tmp.ckpt", at=20)
    restart = find_restart(tmp_path / "digits", config)
    assert restart is not None
    assert (restart.folder, restart.checkpoint) == (folder, newest)
    assert last_checkpoint(tmp_path / "digits") == newest


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_the_times_say(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path / "digits", "one")
    save(folder / "checkpoints" / "early.ckpt", at=90, global_step=4)  # copied last
    save(folder / "checkpoints" / "at-step.ckpt", at=10, global_step=12)
    newest = save(folder / "checkpoints" / "last.ckpt", at=11, global_step=12)
    (folder / "checkpoints" / "broken.ckpt").write_bytes(b"PK")
    os.utime(folder / "checkpoints" / "broken.ckpt", (NOW + 95, NOW + 95))
    restart = find_restart(tmp_path / "digits", config)
    assert restart is not None
    assert restart.checkpoint == newest
    other, _ = make_run(tmp_path / "digits", "two", at=100)
    later = save(other / "checkpoints" / "last.ckpt", at=101, global_step=2)
    assert last_checkpoint(tmp_path / "digits") == later, "of several runs the one that was written last"


def test_a_shared_dirpath_holds_checkpoints_of_several_runs(tmp_path: Path) -> None:
    runs, scratch = tmp_path / "digits", tmp_path / "scratch"
    first, config = make_run(runs, "one", dirpath=scratch)
    second, _ = make_run(runs, "two", dirpath=scratch, at=100)
    (second / "finished.json").write_text("{}")
    mine = save(scratch / "deep" / "a.ckpt", at=50, run=first)
    theirs = save(scratch / "b.ckpt", at=150, run=second)
    assert checkpoints_of(first) == [mine]
    assert checkpoints_of(second) == [theirs]
    moved = tmp_path / "elsewhere" / "digits"
    moved.parent.mkdir()
    runs.rename(moved)
    assert checkpoints_of(moved / "one") == [mine], "a run that has moved still knows its checkpoints"
    (moved / "two" / "finished.json").unlink()
    restart = find_restart(moved, config)
    assert restart is not None
    assert restart.checkpoint == theirs


def test_a_nameless_checkpoint_belongs_to_a_run_that_began_before_it(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    folder, config = make_run(tmp_path / "digits", "one", dirpath=scratch, at=100)
    save(scratch / "old.ckpt", at=50)
    assert checkpoints_of(folder) == []
    (scratch / "broken.ckpt").write_bytes(b"half")
    assert find_restart(tmp_path / "digits", config) is None
    new = save(scratch / "new.ckpt", at=150)
    assert checkpoints_of(folder) == [new]


def test_starting_anew_is_never_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = make_run(tmp_path / "digits", "one")
    assert find_restart(tmp_path / "digits", config) is None
    assert f"{folder} is left out, it has no checkpoint that can be read" in capsys.readouterr().err
    make_run(tmp_path / "far", "one", dirpath="s3://bucket/run")
    config["trainer"]["callbacks"][1]["init_args"]["dirpath"] = "s3://bucket/run"
    with pytest.raises(CommandError, match=r"s3://bucket/run, where --resume can't look"):
        find_restart(tmp_path / "far", config)


def test_an_argument_of_a_later_version_is_no_difference() -> None:
    old = {
        "model": {"init_args": {"width": 3, "layers": [{"size": 2}]}},
        "trainer": {"callbacks": [{"init_args": {"weight": 1.0}}]},
        "name": "a",
    }
    new: dict[str, Any] = copy.deepcopy(old) | {"name": "b", "resume": None}
    new["model"]["init_args"] |= {"dropout": 0.0}
    new["trainer"]["callbacks"][0]["init_args"] |= {"targets": []}
    assert differing_keys(old, new) == []
    assert differing_keys(new, old) == ["model.init_args.dropout", "trainer.callbacks.0.init_args.targets"]
    new["model"]["init_args"]["layers"][0]["size"] = 4
    new["trainer"]["callbacks"].append({"init_args": {}})
    assert differing_keys(old, new) == ["model.init_args.layers.0.size", "trainer.callbacks"]
