"""``lit_methods.functional``: its list is up to date, its names resolve, and nothing is imported before it is used."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lit_methods import functional

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_functional", ROOT / "docs" / "tools" / "functional.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_what_the_cores_offer(writer: ModuleType) -> None:
    assert writer.STUB.read_text(encoding="utf-8") == writer.stub(), "a core's functions have changed: run `make functional`"


def test_every_name_is_the_function_of_its_home(writer: ModuleType) -> None:
    assert functional.__all__ == dir(functional) == sorted(writer.offered())
    for name, (module, original) in writer.offered().items():
        found = getattr(functional, name)
        assert callable(found), name
        assert (found.__module__, found.__name__) == (f"lit_methods.{module}", original)
    with pytest.raises(AttributeError, match="no attribute 'conr'"):
        functional.conr  # noqa: B018


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import lit_methods.functional, sys; print(sorted({'torch', 'lightning', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_core_offers_its_all_or_what_has_no_underscore(writer: ModuleType, tmp_path: Path) -> None:
    core = tmp_path / "core.py"
    core.write_text("from math import exp\ndef b(): ...\ndef a(): ...\ndef _c(): ...\nclass D: ...\n")
    assert writer.functions_of(core) == ["b", "a"]
    core.write_text(core.read_text() + "__all__ = ['D', 'a', 'exp']\n")
    assert writer.functions_of(core) == ["a"]


def test_two_techniques_with_one_name_are_told_apart(writer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = {"family.first.core": ["step"], "family.second.core": ["step"]}
    monkeypatch.setattr(writer, "core_modules", lambda: list(cores))
    monkeypatch.setattr(writer, "path_of", lambda module: module)
    monkeypatch.setattr(writer, "functions_of", cores.get)
    monkeypatch.setattr(writer, "SHARED", {})
    assert set(writer.offered()) == {"first_step", "second_step"}
    monkeypatch.setitem(writer.FIRST, "step", "family.first.core")
    assert set(writer.offered()) == {"step", "second_step"}
    monkeypatch.setattr(writer, "SHARED", {"shared": "second_step"})
    with pytest.raises(ValueError, match="both offer second_step"):
        writer.offered()
