"""Adding to what somebody else's ``training_step`` returns, and leaving without a trace."""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningModule

Addition = Callable[[Any, Any], Any]


def _is_ours(step: Any) -> bool:
    return getattr(step, "wrapper", None) is step  # functools.wraps of another wrapper copies the attribute, not the identity


def attach(module: LightningModule, add: Addition) -> None:
    """Pass the output of ``training_step`` through ``add``; any number of additions, which may leave in any order.

    One wrapper per module holds all additions and applies them in the order of attachment. It calls what was there
    before: the class's method, or what ``torch.compile`` or the user put on the instance. Lightning still sees the
    signature of the step.

    Args:
        module: Its instance attribute ``training_step`` is set.
        add: ``add(output, batch) -> output``. ``output`` is what the step (or the addition before) returned,
            ``batch`` the step's first argument: the batch on its device, or the iterator for a step that takes
            ``dataloader_iter``.
    """
    step = module.training_step
    if not _is_ours(step):

        @functools.wraps(step)  # Lightning reads (batch), (batch, batch_idx) or (dataloader_iter) through __wrapped__
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            batch = args[0] if args else next(iter(kwargs.values()), None)
            return functools.reduce(lambda output, f: f(output, batch), tuple(additions), step(*args, **kwargs))

        additions: list[Addition] = []
        vars(wrapped).update(wrapper=wrapped, additions=additions, was_own="training_step" in vars(module))
        module.training_step = wrapped  # type: ignore[method-assign]
    module.training_step.additions.append(add)  # type: ignore[attr-defined]


def without_additions(module: LightningModule) -> Callable[..., Any]:
    """``training_step`` as it is below our wrapper, and below what a third party has put around that."""
    step: Any = module.training_step
    while step is not None and not _is_ours(step):
        step = getattr(step, "__wrapped__", None)
    return module.training_step if step is None else step.__wrapped__  # type: ignore[no-any-return]


def detach(module: LightningModule, add: Addition) -> None:
    """Undo one :func:`attach`; the last one to leave takes the wrapper away. A second call does nothing.

    Call it from ``teardown`` and from ``on_exception``, for Lightning doesn't call ``teardown`` when fit raises. A
    wrapper that a third party has meanwhile put around ours stays, and ours in it then adds nothing.
    """
    step: Any = module.training_step
    additions = getattr(step, "additions", [])
    if add not in additions:
        return
    additions.remove(add)
    if not additions and _is_ours(step):
        del module.training_step  # the class's own method shows through again
        if step.was_own:
            module.training_step = step.__wrapped__  # type: ignore[method-assign]


def _hold_schedulers(module: pl.LightningModule, held: Callable[[Any], bool]) -> None:
    """Leave out ``module.lr_scheduler_step`` while any of the ``held`` says so; any number of them, leaving in any order."""
    if not hasattr(module.lr_scheduler_step, "holds"):
        inside = module.lr_scheduler_step

        @functools.wraps(inside)
        def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            if not any(hold(scheduler) for hold in waiting.holds):
                inside(scheduler, *args, **kwargs)

        waiting: Any = wrapped
        waiting.holds, waiting.inside, waiting.was_own = [], inside, "lr_scheduler_step" in vars(module)
        module.lr_scheduler_step = waiting  # type: ignore[method-assign]
    step: Any = module.lr_scheduler_step
    step.holds.append(held)


def _let_schedulers_go(module: pl.LightningModule, held: Callable[[Any], bool]) -> None:
    """Undo one ``_hold_schedulers``; a second call does nothing."""
    step: Any = module.lr_scheduler_step
    if held in getattr(step, "holds", ()):
        step.holds.remove(held)
        if not step.holds:
            del module.lr_scheduler_step
            if step.was_own:
                module.lr_scheduler_step = step.inside  # type: ignore[method-assign]
