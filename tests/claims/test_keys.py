"""Keys of a claim are checked before anything is resolved: without torch, with the place, the reason and the nearest key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_methods.claims.fairness import ResolvedStage, has_key, unknown_tuned
from lit_methods.claims.keys import check_keys, class_arguments, stage_config, trainer_arguments, wrong_key
from lit_methods.claims.plan import resolve_configs
from lit_methods.claims.study import Stage, Study, read_study
from lit_methods.errors import CommandError

CLAIM = """
claim: Decay helps.
metric: acc
direction: higher
method: cast
baseline: plain
seeds: [0, 1, 2]
seed_keys: [seed_everything, data.init_args.seed]
budget: {unit: steps}
tuned: {cast: [trainer.callbacks.init_args.l1_decay], plain: [trainer.max_epochs]}
arms:
  cast: [{config: cast_dense.yaml}, {config: cast.yaml, set: {trainer.callbacks.init_args.l1_decay: 0.1, model.learning_rate: 0.1}}]
  plain: [{config: cast_dense.yaml}]
"""


def study(folder: Path, before: str = "", after: str = "") -> tuple[Study, Path]:
    file = folder / "mini.yaml"
    assert before in CLAIM
    file.write_text(CLAIM.replace(before, after) if before else CLAIM)
    return read_study(file), file


def test_keys_of_a_callback_count_as_tuned_as_under_set(tmp_path: Path) -> None:
    check_keys(*study(tmp_path))
    config = {"trainer": {"callbacks": [{"class_path": "CAST", "init_args": {"l1_decay": 0.1}}, {"class_path": "StepCost"}]}}
    stages = {"cast": [ResolvedStage("fit", config)]}
    keys = ["trainer.callbacks", "trainer.callbacks.init_args.l1_decay", "trainer.callbacks.l1_decay"]
    assert unknown_tuned({"cast": keys}, stages) == []
    assert unknown_tuned({"cast": ["trainer.callbacks.init_args.l2_decay"]}, stages) == ["cast: trainer.callbacks.init_args.l2_decay"]
    assert has_key({"loss_weights": {"a.b": 1}}, ["loss_weights", "a", "b"]), "a key of a mapping may hold a dot"
    assert not has_key({"a": 1}, ["a", "b"])


@pytest.mark.parametrize(
    ("before", "after", "place", "nearest"),
    [
        ("l1_decay: 0.1", "l1_deca: 0.1", r"arms\.cast\[1\]\.set: .*CAST has no argument", "trainer.callbacks.init_args.l1_decay"),
        ("model.learning_rate", "model.learning_rat", r"ImageClassifier has no argument 'learning_rat'", "model.init_args.learning_rate"),
        ("model.learning_rate", "learning_rate", r"unknown key 'learning_rate'", "model.init_args.learning_rate"),
        ("model.learning_rate", "modle.learning_rate", r"unknown key 'modle", "model"),
        ("model.learning_rate", "model.network.width", r"MLP has no argument 'width'", "model.init_args.network.init_args.widths"),
        ("data.init_args.seed", "data.init_args.sed", r"seed_keys, in arms\.cast\[0\]: .*DigitsDataModule", "data.init_args.seed"),
        ("[trainer.max_epochs]", "[trainer.max_epoch]", r"tuned\.plain: .*the Trainer has no argument", "trainer.max_epochs"),
        ("[trainer.max_epochs]", "[trainer.callbacks.init_args.density]", r"tuned\.plain: .*have no callback", ""),
    ],
)
def test_a_wrong_key_is_named_with_file_place_and_nearest(before: str, after: str, place: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=place) as caught:
        check_keys(*study(tmp_path, before, after))
    assert str(caught.value).startswith(str(tmp_path / "mini.yaml"))
    assert not nearest or f"nearest: {nearest}" in str(caught.value)


def test_words_from_the_command_line_are_checked_too(tmp_path: Path) -> None:
    check_keys(*study(tmp_path), ["--data.init_args.batch_size", "4", "--config", "other.yaml"])
    with pytest.raises(CommandError, match=r"the command line: unknown key 'data\.batch_siz'"):
        check_keys(*study(tmp_path), ["--data.batch_siz=4"])


def test_it_is_fast_and_every_shipped_file_passes() -> None:
    """In a process of its own: this one may have imported torch already."""
    code = (
        "import sys; from lit_methods.claims.keys import check_keys; from lit_methods.claims.study import read_study;"
        "from lit_methods.cli.claims import find_studies\n"
        "for folder, kind in (('claims', 'claim'), ('compare', 'compare')):\n"
        "    for file in find_studies(folder, []).values(): check_keys(read_study(file, kind), file)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_are_read_from_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert class_arguments("DenseToSparse") is not None
    assert "temperature" in (class_arguments("SuperFlow") or ()), "behind a package that imports it lazily"
    assert class_arguments("SuperFlow") == class_arguments("lit_methods.SuperFlow")
    assert class_arguments("torch.optim.AdamW") is None
    assert class_arguments("NoSuchClass") is None
    assert {"max_epochs", "callbacks"} <= trainer_arguments()
    assert "self" not in trainer_arguments()
    (tmp_path / "mine_keys.py").write_text(
        "import torch\nclass Own(torch.nn.Module):\n    def __init__(self, a, *, b=1): ...\n"
        "class Child(Own):\n    def __init__(self, c, **rest): ...\nclass Unknown(torch.nn.Module): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    assert class_arguments("mine_keys.Own") == {"a", "b"}
    assert class_arguments("mine_keys.Child") == {"a", "b", "c"}, "what it passes on to its base"
    assert class_arguments("mine_keys.Unknown") is None


def test_files_compose_and_a_stage_may_choose_another_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    first: dict[str, Any] = {"model": {"class_path": "SuperFlow", "init_args": {"embed_dim": 4}}, "trainer": {"callbacks+": ["one"]}}
    second = {"model": {"init_args": {"temperature": 0.1}}, "trainer": {"callbacks+": ["two"], "max_epochs": 3}}
    for name, content in (("a", first), ("b", second)):
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    both = stage_config(Stage("fit", ("a.yaml", "b.yaml")))
    assert both == {
        "model": {"class_path": "SuperFlow", "init_args": {"embed_dim": 4, "temperature": 0.1}},
        "trainer": {"callbacks": ["one", "two"], "max_epochs": 3},
    }
    other = stage_config(Stage("fit", ("a.yaml",), {"model.class_path": "FixMatch", "model.init_args.threshold": 0.9}))
    assert other is not None
    assert other["model"] == {"class_path": "FixMatch"}
    assert wrong_key(other, "model.init_args.threshold") == ""
    assert "FixMatch has no argument 'embed_dim'" in wrong_key(other, "model.init_args.embed_dim")
    assert stage_config(Stage("fit", ("absent.yaml",))) is None


def test_a_config_that_is_not_there_is_said_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("a process was started"))
    with pytest.raises(CommandError, match=r"good, stage 1: there is no configs/superflwo\.yaml") as caught:
        resolve_configs({"good, stage 1": ["fit", "--config", "configs/superflwo.yaml"]}, 1)
    assert "configs/superflow.yaml" in str(caught.value)
