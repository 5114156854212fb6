"""Files that are whole or not there, and YAML in which a key stands once."""

import contextlib
from pathlib import Path

import pytest

from lit_methods.cli.main import main
from lit_methods.files import read_yaml, refuse_repeated_keys, replacing, write_atomically, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with contextlib.suppress(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_json(tmp_path / "b.json", {"ü": [1]})
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == '{\n "ü": [\n  1\n ]\n}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.json"], "no leftovers"


@pytest.mark.parametrize(
    ("text", "key", "line", "first"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 3, 1),
        ("trainer:\n  callbacks+: [x]\nmodel: M\ntrainer: {max_steps: 3}\n", "trainer", 4, 1),
        ("list:\n  - {p: 1,\n     p: 2}\n", "p", 3, 2),
        ("base: &base {x: 1}\nuser:\n  <<: *base\n  y: 1\n  y: 2\n", "y", 5, 4),
    ],
)
def test_a_key_that_stands_twice(text: str, key: str, line: int, first: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^mine.yaml, line {line}: key '{key}' stands twice, first in line {first}, "):
        refuse_repeated_keys(text, "mine.yaml")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="stands twice"):
        read_yaml(tmp_path / "mine.yaml")


def test_what_is_no_repetition_passes(tmp_path: Path) -> None:
    refuse_repeated_keys("a: {x: 1}\nb: {x: 1}\nc: [{x: 1}, {x: 2}]\n", "")
    refuse_repeated_keys("base: &base {x: 1}\nuser: {<<: *base, x: 2}\n", "")
    refuse_repeated_keys("loop: &loop [*loop]\n", "")
    refuse_repeated_keys("not: [valid", "")
    (tmp_path / "mine.yaml").write_text("a: {x: 1}")
    assert read_yaml(tmp_path / "mine.yaml") == {"a": {"x": 1}}


def test_the_command_refuses_a_repeated_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trainer: {max_steps: 3}\nseed_everything: 1\ntrainer: {max_epochs: 1}\n")
    words = ["fit", "--config", "configs/tcm.yaml", "--print_config"]
    assert main([*words, "--config", "mine.yaml"]) == 2
    assert "mine.yaml, line 3: key 'trainer' stands twice, first in line 1" in capsys.readouterr().err
    assert main([*words, "--trainer", "{max_steps: 1, max_steps: 2}"]) == 2
    assert "command line, line 1: key 'max_steps'" in capsys.readouterr().err
