"""The JSON schema of configs: shipped files pass it, mistakes don't, and editors find it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from lit_methods.catalog import configs_folder
from lit_methods.cli.main import main
from lit_methods.cli.schema import DRAFT, config_schema, line_for, with_line

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, which nbformat brings, is not installed")
RUNS = [path for path in sorted(configs_folder().rglob("*.yaml")) if path.parent.name in ("configs", "full", "trainer", "logger", "debug")]


@pytest.fixture(scope="module")
def checker() -> Any:
    made = config_schema()
    assert made["$schema"] == DRAFT
    jsonschema.Draft7Validator.check_schema(made)
    return jsonschema.Draft7Validator(json.loads(json.dumps(made)))


def mistakes(checker: Any, config: Any) -> list[str]:
    """Every key or value that is wrong, innermost messages."""
    pending, found = list(checker.iter_errors(config)), []
    while pending:
        error = pending.pop()
        pending += error.context
        if not error.context:
            found.append(f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}")
    return found


def test_every_shipped_config_of_a_run_passes(checker: Any) -> None:
    assert len(RUNS) > 100
    wrong = {
        path.name: found
        for path in RUNS
        if (found := mistakes(checker, yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_default_loader())))
    }
    assert not wrong, "\n".join(f"{name}: {found[:3]}" for name, found in wrong.items())


MODEL: dict[str, Any] = {"class_path": "SuperFlow", "init_args": {"temperature": 0.1}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"modle": MODEL}, "modle"),
        ({"model": {"class_path": "SuperFlow", "init_args": {"temprature": 0.1}}}, "temprature"),
        ({"model": {"class_path": "lit_methods.SuperFlow", "init_args": {"temperature": "warm"}}}, "warm"),
        ({"model": {"class_path": "SuperFlw"}}, "SuperFlw"),
        ({"model": "SuperFlw"}, "SuperFlw"),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"trainer": {"max_epochs": "three"}}, "three"),
        ({"trainer": {"callbacks+": [{"class_path": "EMATeacher", "init_args": {"dekay": 0.9}}]}}, "dekay"),
        ({"trainer": {"callbacks+": [{"class_path": "ModelCheckpoint", "init_args": {"save_lst": True}}]}}, "save_lst"),
        ({"data": {"class_path": "DigitsDataModule", "init_arg": {}}}, "init_arg"),
    ],
)
def test_a_mistake_is_seen(checker: Any, config: dict[str, Any], said: str) -> None:
    assert any(said in message for message in mistakes(checker, config)), mistakes(checker, config)


@pytest.mark.parametrize(
    "config",
    [
        {"model": MODEL, "name": "mine", "resume": "auto", "ckpt_path": None},
        {"model": {"class_path": "my_project.MyModule", "init_args": {"anything": [1]}}},
        {"model": "my_project.MyModule", "data": "DigitsDataModule"},
        {"trainer": {"callbacks+": [{"class_path": "my_project.Mine", "init_args": {"a": 1}}, "EMATeacher"], "logger": False}},
        {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}, "return_predictions": False},
    ],
)
def test_what_is_right_passes(checker: Any, config: dict[str, Any]) -> None:
    assert not mistakes(checker, config)


def test_keys_say_what_they_mean_and_what_they_are_without_being_given(checker: Any) -> None:
    of_tcm = checker.schema["definitions"]["arguments of EMATeacher"]
    assert of_tcm["description"]
    assert of_tcm["properties"]["decay"]["description"]
    assert of_tcm["properties"]["decay"]["default"] == pytest.approx(0.999, abs=0.1)


def test_the_command_writes_it_and_names_it_in_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/mine.yaml").write_text("# Mine.\n#   lit fit --config mine.yaml\nname: mine  # a name\n")
    assert main(["schema", "sub/mine.yaml"]) == 0
    assert json.loads(Path("lit-schema.json").read_text())["$schema"] == DRAFT
    line = "# yaml-language-server: $schema=../lit-schema.json"
    assert Path("sub/mine.yaml").read_text().splitlines() == ["# Mine.", "#   lit fit --config mine.yaml", line, "name: mine  # a name"]
    said = capsys.readouterr().out
    assert "schema: lit-schema.json" in said
    assert "named in: sub/mine.yaml" in said
    assert main(["schema", "nothing.yaml"]) == 2
    assert main(["schema", "--out", "sub"]) == 2
    assert "sub/lit-schema.json" in capsys.readouterr().err


def test_the_line_replaces_an_earlier_one() -> None:
    line = line_for(Path("a/b.yaml"), Path("c.json"))
    assert line == "# yaml-language-server: $schema=../c.json"
    assert with_line("name: a\n", line) == f"{line}\nname: a\n"
    assert with_line(f"# A.\n{line.replace('c.json', 'old.json')}\nname: a\n", line) == f"# A.\n{line}\nname: a\n"
