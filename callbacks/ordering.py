"""Order of callbacks as data: each says what it must stand before or behind, and one pass sorts them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.callbacks.wrapping import when_built


class OrderedCallback(Callback):
    """A callback that declares its place among the others.

    :meth:`setup` applies the declarations of all callbacks of the trainer. Names are class names (``ModelPruning``) or
    dotted ones (``lightning.pytorch.callbacks.ModelPruning``); subclasses are meant too. What isn't in the list is
    ignored. Lightning calls ``setup`` in the order of the user's list, before anything can be sorted; all later hooks
    follow the sorted order. Where the order of the ``setup`` calls themselves matters, ``set_up_before`` and
    ``set_up_after`` refuse the wrong one.

    What ``setup`` does, :meth:`leave` takes back: it is called at the end of a run and when a run raises, so a subclass overrides it alone.
    What ``setup`` needs the module's layers for goes through :meth:`when_built`, as some modules make layers later.

    Attributes:
        runs_before: Callbacks whose hooks come after ours.
        runs_after: Callbacks whose hooks come before ours.
        set_up_before: Callbacks whose ``setup`` must come after ours; implies ``runs_before``.
        set_up_after: Callbacks whose ``setup`` must come before ours; implies ``runs_after``.
        conflicts_with: Callback -> why the two can't be used together.
    """

    runs_before: ClassVar[Sequence[str]] = ()
    runs_after: ClassVar[Sequence[str]] = ()
    set_up_before: ClassVar[Sequence[str]] = ()
    set_up_after: ClassVar[Sequence[str]] = ()
    conflicts_with: ClassVar[Mapping[str, str]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sort ``trainer.callbacks``; subclasses call ``super().setup(...)``."""
        self._stop_waiting()  # of a run that was cut off without notice
        order_callbacks(trainer)

    def when_built(self, pl_module: LightningModule, act: Callable[[], None]) -> None:
        """For ``setup``: call ``act()`` when the module's layers are there, before a checkpoint is loaded and before optimisers are made.

        That is at once, or behind the module's own ``setup`` or ``configure_model``.
        """
        self._unbuilt = [*self._unbuilt, when_built(pl_module, act)]

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take back what ``setup`` put on the module or the trainer; a second call does nothing."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """:meth:`leave`."""
        self._stop_waiting()
        self.leave(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """:meth:`leave`: Lightning doesn't call ``teardown`` when a run raises."""
        self._stop_waiting()
        self.leave(trainer, pl_module)

    _unbuilt: Sequence[Callable[[], None]] = ()  # what stops each :meth:`when_built`

    def _stop_waiting(self) -> None:
        for stop in self._unbuilt:
            stop()
        self._unbuilt = ()


def _is_named(callback: Callback, name: str) -> bool:
    if "." not in name:
        return any(cls.__name__ == name for cls in type(callback).__mro__)
    package, _, last = name.rpartition(".")
    # a class is known by where it is defined and by the packages above, which usually re-export it
    return any(cls.__name__ == last and f"{cls.__module__}.".startswith(f"{package}.") for cls in type(callback).__mro__)


def _declares(callback: Callback, other: Callback, *attributes: str) -> bool:
    """Whether one of the callback's attributes names the other."""
    for attribute in attributes:
        names = getattr(callback, attribute, ())
        if isinstance(names, str):
            raise TypeError(f"{type(callback).__name__}.{attribute} is the string {names!r}: it must be a sequence of names")
        if any(_is_named(other, name) for name in names):
            return True
    return False


def sort_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """``callbacks`` in an order that all of them agree with; those that nobody mentions keep their place.

    Args:
        callbacks: Any callbacks, also ones that declare nothing.

    Returns:
        A new list: of all callbacks whose forerunners are placed, the one that stood first comes next.

    Raises:
        ValueError: Two of them exclude each other, or the declarations go in a circle; the message names them and the
            reason.
    """
    before: list[set[int]] = [set() for _ in callbacks]  # before[i]: who must precede i
    for i, one in enumerate(callbacks):
        for name, why in getattr(one, "conflicts_with", {}).items():
            for other in callbacks:
                if other is not one and _is_named(other, name):
                    raise ValueError(f"{type(one).__name__} and {type(other).__name__} can't be used together: {why}")
        for j, other in enumerate(callbacks):
            if i == j:
                continue
            if _declares(one, other, "runs_before", "set_up_before"):
                before[j].add(i)
            if _declares(one, other, "runs_after", "set_up_after"):
                before[i].add(j)
    for i, predecessors in enumerate(before):  # two of a kind that name their common base are free among themselves
        for j in [j for j in predecessors if i in before[j] and type(callbacks[i]) is type(callbacks[j])]:
            predecessors.discard(j)
            before[j].discard(i)
    placed: list[int] = []
    while len(placed) < len(callbacks):
        free = next((i for i in range(len(callbacks)) if i not in placed and before[i] <= set(placed)), None)
        if free is None:
            raise ValueError(f"the callbacks can't be ordered: {_cycle(callbacks, before, set(placed))}; remove one of them")
        placed.append(free)
    return [callbacks[i] for i in placed]


def _cycle(callbacks: Sequence[Callback], before: list[set[int]], placed: set[int]) -> str:
    path = [next(i for i in range(len(callbacks)) if i not in placed)]
    while (previous := min(before[path[-1]] - placed)) not in path:
        path.append(previous)
    circle = [*path[path.index(previous) :], previous]
    return ", ".join(f"{type(callbacks[a]).__name__} must come after {type(callbacks[b]).__name__}" for a, b in pairwise(circle))


def order_callbacks(trainer: Trainer) -> None:
    """Sort the trainer's callbacks; to be called from ``setup``.

    The list is replaced and not changed in place: Lightning is walking through the old one just now, so every
    ``setup`` still runs once.

    Raises:
        ValueError: As :func:`sort_callbacks`, or a callback stands where its ``setup`` comes too late, or too early, for another's.
    """
    current: list[Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
    for earlier, later in combinations(current, 2):
        if _declares(later, earlier, "set_up_before") or _declares(earlier, later, "set_up_after"):
            first, second = type(later).__name__, type(earlier).__name__
            raise ValueError(
                f"{first} must be set up before {second}, which stands before it in the list of callbacks: put {first} first, or pass "
                "Trainer(callbacks=sort_callbacks([...])) with lit_methods.callbacks.ordering.sort_callbacks"
            )
    ordered = sort_callbacks(current)
    if any(a is not b for a, b in zip(ordered, current, strict=True)):
        trainer.callbacks = ordered  # type: ignore[attr-defined]
