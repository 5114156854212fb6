"""No shipped config says null where a class takes none: the parser lets it through, and the class meets None."""

import inspect
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

import pytest
import yaml

import lit_methods
from lit_methods import callbacks, datamodules
from lit_methods.catalog import configs_folder

FILES = sorted(path.relative_to(configs_folder()).as_posix() for path in configs_folder().rglob("*.yaml"))


def objects(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Class and arguments of everything that a config builds."""
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"].rpartition(".")[2], node.get("init_args") or {}
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def takes_none(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return any(takes_none(part) for part in typing.get_args(hint))
    return hint in (Any, NoneType, inspect.Parameter.empty) or isinstance(hint, typing.TypeVar)


def wrong_nulls(config: Any) -> list[str]:
    found = []
    for name, arguments in objects(config):
        cls = next((getattr(place, name) for place in (lit_methods, callbacks, datamodules) if name in place.__all__), None)
        if cls is None:
            continue
        hints = typing.get_type_hints(cls.__init__)
        found += [f"{name}.{key}" for key, value in arguments.items() if value is None and not takes_none(hints.get(key, Any))]
    return found


@pytest.mark.parametrize("file", FILES)
def test_null_stands_only_where_none_is_taken(file: str) -> None:
    assert wrong_nulls(yaml.safe_load((configs_folder() / file).read_text(encoding="utf-8"))) == []


def test_a_wrong_null_is_found() -> None:
    config = {"trainer": {"callbacks+": [{"class_path": "LossRecovered", "init_args": {"autoencoder": None, "text": None}}]}}
    assert wrong_nulls(config) == ["LossRecovered.autoencoder"]
