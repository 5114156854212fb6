"""Hyperparameters that a command saves."""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.core.mixins import HyperparametersMixin, hparams_mixin
from lightning.pytorch.utilities.parsing import get_init_args


@contextmanager
def with_those_of_bases() -> Iterator[None]:
    """Inside, a base that calls ``save_hyperparameters()`` finds all of its arguments in ``hparams``, as it does outside of a command.

    Lightning's command saves the arguments in the command's config alone. These are those of the subclass: what a base has besides, whether
    the subclass hands it on or it stays at its default, would be missing where the base reads it.
    """
    original = HyperparametersMixin.save_hyperparameters

    @functools.wraps(original)
    def save(self: Any, *args: Any, ignore: Any = None, frame: Any = None, logger: bool = True) -> None:
        original(self, *args, ignore=ignore, frame=frame, logger=logger)
        given, here = hparams_mixin._given_hyperparameters.get(), inspect.currentframe()
        if given is None or args or here is None or here.f_back is None:
            return
        left_out = {*given, *([ignore] if isinstance(ignore, str) else ignore or ())}
        arguments = {name: value for name, value in get_init_args(here.f_back).items() if name not in left_out}
        self._set_hparams({name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()})
        self._hparams_initial = copy.deepcopy(self._hparams)

    HyperparametersMixin.save_hyperparameters = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        HyperparametersMixin.save_hyperparameters = original  # type: ignore[method-assign]


__all__ = ["with_those_of_bases"]
