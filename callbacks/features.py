"""Keeping what chosen submodules get and put out."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakSet

import lightning.pytorch as pl
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import plain_name, select_modules
from lit_methods.checks import naming, patterns

Calls = dict[str, list[Any]]


class FeatureCapture:
    """Forward hooks that keep the outputs of chosen submodules, graph included, until they are cleared.

    A submodule that is called several times in a step (two views, a shared encoder) has all its outputs in ``calls``,
    in call order, and the newest in ``last``. Copies of the module made by ``deepcopy`` carry the hooks along, but
    what a copy puts out is not kept.

    Args:
        root: Where to look.
        targets: ``fnmatch`` patterns on submodule names; no target and no type captures nothing.
        types: Module classes that are captured; empty: any.
        active: Start keeping at once.

    Attributes:
        calls: Name -> outputs.
        arguments: Name -> positional and keyword arguments of each of these calls, as a tuple and a dictionary.

    Raises:
        ValueError: A pattern matches nothing.
    """

    _open: ClassVar["WeakSet[FeatureCapture]"] = WeakSet()

    def __init__(self, root: nn.Module, targets: Sequence[str], types: tuple[type, ...] = (), *, active: bool = True) -> None:
        chosen = select_modules(root, targets, types) if targets or types else {}
        self.root, self.active = root, active
        self.calls: Calls = {name: [] for name in chosen}
        self.arguments: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in chosen}
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(name, module), with_kwargs=True) for name, module in chosen.items()
        ]
        self._open.add(self)

    def _hook(self, name: str, original: nn.Module) -> Callable[[nn.Module, Any, Any, Any], None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.active and module is original:
                self.calls[name].append(output)
                self.arguments[name].append((args, kwargs))

        return keep

    @property
    def last(self) -> dict[str, Any]:
        """The newest output of every submodule that was called since the last :meth:`clear`."""
        return {name: outputs[-1] for name, outputs in self.calls.items() if outputs}

    @contextmanager
    def apart(self) -> Iterator[Calls]:
        """Inside, what the submodules put out goes into the calls that are yielded; other captures of the same module keep nothing."""
        others = [capture for capture in self._open if capture is not self and capture.root is self.root and capture.active]
        calls, arguments, active = self.calls, self.arguments, self.active
        self.calls, self.arguments, self.active = {name: [] for name in calls}, {name: [] for name in calls}, True
        for capture in others:
            capture.pause()
        try:
            yield self.calls
        finally:
            self.calls, self.arguments, self.active = calls, arguments, active
            for capture in others:
                capture.resume()

    def clear(self) -> None:
        """Forget the outputs, and with them their graphs. Call it at every step."""
        for kept in (*self.calls.values(), *self.arguments.values()):
            kept.clear()

    def pause(self) -> None:
        """Keep nothing until :meth:`resume`."""
        self.active = False

    def resume(self) -> None:
        """Keep outputs again."""
        self.active = True

    def close(self) -> None:
        """Remove the hooks and forget the outputs. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open.discard(self)
        self.clear()

    def __enter__(self) -> "FeatureCapture":
        """``with FeatureCapture(...) as features:`` closes at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()


class FeatureCallback(OrderedCallback):
    """Base of the callbacks that see what submodules put out in ``training_step``.

    Runs: the hooks are there from ``setup`` of fit to its end (where the module has a ``setup`` or ``configure_model`` of its own, from
    behind that); they keep something between the start and the end of a training batch.
    Saves: nothing.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: none.
    """

    def __init__(self, targets: Sequence[str] = ()) -> None:
        super().__init__()
        patterns(targets=targets)
        self.targets = list(targets)
        self._features: FeatureCapture | None = None

    @property
    def _capture(self) -> FeatureCapture:
        """The capture; fit must have been set up."""
        assert self._features is not None
        return self._features

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module, when its layers are there: :meth:`hook_in`."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.leave(trainer, pl_module)  # a run that was cut off without notice
            self.when_built(pl_module, lambda: self.hook_in(pl_module))

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Hook into the submodules, all of which are there. A subclass that needs more of the module overrides it.

        Raises:
            ValueError: A target matches nothing.
        """
        with naming(type(self).__name__):
            self._features = FeatureCapture(pl_module, self.targets, active=False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to keep features."""
        self._capture.clear()
        self._capture.resume()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep none in validation."""
        self._capture.pause()
        self._capture.clear()

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks off the module."""
        if self._features is not None:
            self._features.close()
            self._features = None


def one_of_calls(calls: Mapping[str, Any], pattern: str, argument: str) -> str:
    """The one name that a pattern matches.

    Args:
        calls: What is kept under submodules' names.
        pattern: ``fnmatch`` pattern.
        argument: Name of the callback's argument, for the message.

    Raises:
        ValueError: None matches, or several do.
    """
    names = [name for name in calls if fnmatch.fnmatchcase(name, pattern)]
    if len(names) != 1:
        raise ValueError(f"{argument}={pattern!r} matches {len(names)} submodules, {', '.join(names)}: name one")
    return names[0]


def one_submodule(root: nn.Module, pattern: str, argument: str) -> tuple[str, nn.Module]:
    """Name and module of the one submodule that a pattern matches.

    Args:
        root: Where to look.
        pattern: ``fnmatch`` pattern on submodule names.
        argument: Name of the callback's argument, for the message.

    Raises:
        ValueError: None matches, which lists the nearest names, or several do.
    """
    try:
        chosen = select_modules(root, [pattern])
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    name = one_of_calls(chosen, pattern, argument)
    return name, chosen[name]


def require_network(pl_module: pl.LightningModule, name: str, who: str) -> None:
    """Raise unless the module has a submodule of exactly this name, which callbacks on logits call ``network``.

    Raises:
        ValueError: It has none; the message lists the names that there are.
    """
    names = [plain_name(own) for own, _ in pl_module.named_modules()]
    if name not in names:
        known = ", ".join(own for own in names if own and own.count(".") < 2)
        raise ValueError(
            f"{who}: network={name!r} is no submodule of {type(pl_module).__name__}: name the one that maps images to logits; "
            f"there are {known or 'none'}"
        )


__all__ = ["Calls", "FeatureCallback", "FeatureCapture", "one_of_calls", "one_submodule", "require_network"]
