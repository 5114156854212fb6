"""Keeping what chosen submodules put out."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.targets import select_modules


class FeatureCapture:
    """Forward hooks that keep the outputs of chosen submodules, graph included, until they are cleared.

    A submodule that is called several times in a step (two views, a shared encoder) has all its outputs in ``calls``,
    in call order, and the newest in ``last``. Copies of the module made by ``deepcopy`` carry the hooks along, but
    what a copy puts out is not kept.

    Args:
        root: Where to look.
        targets: As in :func:`~lit_methods.callbacks.targets.select_modules`; no target and no type captures nothing.
        types: As there.
        active: Start keeping at once.

    Raises:
        ValueError: A pattern matches nothing.
    """

    def __init__(self, root: nn.Module, targets: Sequence[str], types: tuple[type, ...] = (), *, active: bool = True) -> None:
        chosen = select_modules(root, targets, types) if targets or types else {}
        self.active = active
        self.calls: dict[str, list[Any]] = {name: [] for name in chosen}
        self._handles: list[RemovableHandle] = [module.register_forward_hook(self._hook(name, module)) for name, module in chosen.items()]

    def _hook(self, name: str, original: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if self.active and module is original:
                self.calls[name].append(output)

        return keep

    @property
    def last(self) -> dict[str, Any]:
        """The newest output of every submodule that was called since the last :meth:`clear`."""
        return {name: outputs[-1] for name, outputs in self.calls.items() if outputs}

    def clear(self) -> None:
        """Forget the outputs, and with them their graphs. Call it at every step."""
        for outputs in self.calls.values():
            outputs.clear()

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
        self.clear()

    def __enter__(self) -> "FeatureCapture":
        """``with FeatureCapture(...) as features:`` closes at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()
