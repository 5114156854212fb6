"""Every relation that a callback declares holds for every pair of public callbacks, in both orders of the user's list.

What pairs do to each other in training is tried by ``test_sparsity_matrix.py`` and by the techniques' own tests.
"""

import importlib
import inspect
from itertools import permutations

import lightning.pytorch as pl
import pytest

from lit_methods.callbacks.ordering import _is_named, sort_callbacks
from lit_methods.catalog import public_names


def public_callbacks() -> list[type[pl.Callback]]:
    """Ours, and those of Lightning."""
    ours = [getattr(importlib.import_module(package), name) for name, package in public_names().items() if package.endswith("callbacks")]
    lightnings = [getattr(pl.callbacks, name) for name in pl.callbacks.__all__]
    return [found for found in [*ours, *lightnings] if inspect.isclass(found) and issubclass(found, pl.Callback)]


CALLBACKS = public_callbacks()


def bare(kind: type[pl.Callback]) -> pl.Callback:
    """An object without arguments: its class declares the relations."""
    return pl.Callback.__new__(kind)


def related(kind: type[pl.Callback], attribute: str) -> list[type[pl.Callback]]:
    """The public callbacks that the names in a declaration mean."""
    return [
        other for other in CALLBACKS if other is not kind and any(_is_named(bare(other), name) for name in getattr(kind, attribute, ()))
    ]


# both take the place of the module's whole loss, so each wants to come first: refused, by name and without training
CONTRADICT = ({"AdaWAC", "MultiScaleConsistency"},)


def excluded(kind: type[pl.Callback], other: type[pl.Callback]) -> bool:
    declared = other in related(kind, "conflicts_with") or kind in related(other, "conflicts_with")
    return declared or {kind.__name__, other.__name__} in CONTRADICT


DECLARING = [
    kind for kind in CALLBACKS if any(getattr(kind, name, ()) for name in ("runs_before", "runs_after", "set_up_before", "conflicts_with"))
]


@pytest.mark.parametrize("kind", DECLARING, ids=lambda kind: kind.__name__)
def test_what_a_callback_declares_holds_beside_every_other(kind: type[pl.Callback]) -> None:
    for other in related(kind, "conflicts_with"):
        for pair in permutations((kind, other)):
            with pytest.raises(ValueError, match="can't be used together"):
                sort_callbacks([bare(one) for one in pair])
    for attribute, place in (("runs_before", 0), ("set_up_before", 0), ("runs_after", 1)):
        for other in related(kind, attribute):
            if excluded(kind, other):
                continue
            for pair in permutations((kind, other)):
                order = [type(one) for one in sort_callbacks([bare(one) for one in pair])]
                assert order.index(kind) == place, f"{kind.__name__}.{attribute} names {other.__name__}"


def test_no_two_callbacks_contradict_each_other() -> None:
    for first, second in permutations(CALLBACKS, 2):
        if not excluded(first, second):
            sort_callbacks([bare(first), bare(second)])


def test_those_that_contradict_each_other_are_refused() -> None:
    by_name = {kind.__name__: kind for kind in CALLBACKS}
    for pair in CONTRADICT:
        with pytest.raises(ValueError, match="can't be ordered"):
            sort_callbacks([bare(by_name[name]) for name in pair])


def test_what_is_declared_is_found() -> None:
    declared = {(kind.__name__, other.__name__) for kind in DECLARING for other in related(kind, "conflicts_with")}
    assert ("EMATeacher", "ModelPruning") in declared
    assert len(declared) > 10
