"""A wrong number for any argument of any public class reaches the user as one short message, as the constructor says it."""

import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lit_methods.catalog import public_names
from lit_methods.cli.explain import explain_run_error

KINDS = {Callback: "trainer.callbacks", LightningDataModule: "data", LightningModule: "model"}


def classes() -> Iterator[Any]:
    for name, package in sorted(public_names().items()):
        kind = getattr(importlib.import_module(package), name)
        base = next((base for base in KINDS if inspect.isclass(kind) and issubclass(kind, base)), None)
        if base is not None:
            yield pytest.param(f"{package}.{name}", kind, base, id=name)


def stand_in(hint: Any) -> Any:
    """Something of the type of an argument that must be given."""
    simple = {int: 2, float: 0.5, str: "x"}
    if hint in simple:
        return simple[hint]
    return ["x"] if "list" in str(hint).lower() or "sequence" in str(hint).lower() else {"class_path": "torch.nn.Identity"}


def message_of(path: str, base: type, arguments: dict[str, Any]) -> str | None:
    """What a user reads who gives a class of a config these arguments, as the parser of ``lit`` builds it; None if it is accepted."""
    parser = ArgumentParser(exit_on_error=False)
    if base is Callback:
        parser.add_argument("--it", type=list[Callback] | Callback | None)
    else:
        parser.add_subclass_arguments(base, "it")
    section = {"class_path": path, "init_args": arguments}
    config = parser.parse_object({"it": [section] if base is Callback else section})
    try:
        parser.instantiate_classes(config)
    except Exception as error:
        if (known := explain_run_error(error)) is None:
            pytest.fail(f"{arguments} end in a traceback: {type(error).__name__}: {error}")
        return str(known)
    return None


@pytest.mark.parametrize(("path", "kind", "base"), classes())
def test_a_wrong_number_in_a_constructor(path: str, kind: type, base: type) -> None:
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    parameters = inspect.signature(kind).parameters
    required = {name: stand_in(hints.get(name)) for name, given in parameters.items() if given.default is given.empty and given.kind < 4}
    for name in parameters:
        types = {hints.get(name), *typing.get_args(hints.get(name))}
        if not types & {int, float} or bool in types:
            continue
        try:
            message = message_of(path, base, required | {name: -7})
        except ArgumentError:
            continue  # a list or a pair is wanted: the parser refuses, and other tests hold its words
        if message is not None:
            assert len(message.splitlines()) <= 4, message
            assert not any(word in message for word in ("Namespace(", "Subtypes", "Traceback")), message


def test_the_class_that_failed_is_named_wherever_it_stands() -> None:
    density = {"class_path": "lit_methods.callbacks.DynamicSparsity", "init_args": {"density": 5.0}}
    message = message_of(density["class_path"], Callback, density["init_args"])  # type: ignore[arg-type]
    assert message is not None
    assert message.startswith("DynamicSparsity: density is 5.0: give ")
