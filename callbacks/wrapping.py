"""Standing around a method of somebody else's module, and leaving without a trace."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

Addition = Callable[..., Any]


def _is_ours(function: Any) -> bool:
    return getattr(function, "wrapper", None) is function  # functools.wraps of another wrapper copies the attribute, not the identity


def _after(add: Addition, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run what stands inside, and pass its output on with the method's first argument."""
    return add(call(*args, **kwargs), args[0] if args else next(iter(kwargs.values()), None))


def attach(module: LightningModule, add: Addition, method: str = "training_step", *, around: bool = False) -> None:
    """Pass the output of a method through ``add``; any number of additions, which may leave in any order.

    One wrapper per method holds all additions and applies them in the order of attachment, the first one innermost. It calls what was there
    before: the class's method, or what ``torch.compile`` or the user put on the instance. Lightning still sees the method's signature.

    Args:
        module: Its instance attribute of the method's name is set.
        add: ``add(output, first) -> output``. ``output`` is what the method (or the addition before) returned, ``first`` the method's first
            argument: for ``training_step`` the batch on its device, or the iterator for a step that takes ``dataloader_iter``.
        method: Name of the method, or of a submodule that is called.
        around: ``add(call, *arguments)`` is called in the method's place: it may act before ``call(*arguments)``, or leave the call out.
    """
    inside = getattr(module, method)
    if not _is_ours(inside):

        @functools.wraps(inside)  # Lightning reads (batch), (batch, batch_idx) or (dataloader_iter) through __wrapped__
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = inside
            for _, layer in tuple(layers):
                call = functools.partial(layer, call)
            return call(*args, **kwargs)

        layers: list[tuple[Addition, Addition]] = []
        vars(wrapped).update(wrapper=wrapped, layers=layers, was_own=method in vars(module))
        vars(module)[method] = wrapped  # past nn.Module.__setattr__, as a submodule may have that name
    getattr(module, method).layers.append((add, add if around else functools.partial(_after, add)))


def built_by(module: LightningModule) -> str | None:
    """The module's last hook that may add layers to it, which Lightning calls behind the callbacks' ``setup``; None: they are all there."""
    return next((hook for hook in ("configure_model", "setup") if is_overridden(hook, module)), None)


def when_built(module: LightningModule, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act()`` as soon as all layers are there: now, or behind the next call of the hook that may add some.

    Returns:
        Stops waiting; does nothing once ``act`` was called.
    """
    hook = built_by(module)
    if hook is None:
        act()
        return lambda: None

    def behind(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        stop()
        act()
        return output

    stop = functools.partial(detach, module, behind, hook)
    attach(module, behind, hook, around=True)
    return stop


def takes_iterator(module: LightningModule) -> bool:
    """Whether ``training_step`` takes ``dataloader_iter``: a callback knows its batch behind it alone."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters


def refuse_iterators(module: LightningModule, who: str) -> None:
    """Raise if ``training_step`` takes ``dataloader_iter``: callbacks are then handed the batch of the step before.

    Raises:
        ValueError: It does.
    """
    if takes_iterator(module):
        raise ValueError(
            f"{who} needs the batch of each step, but training_step of {type(module).__name__} takes dataloader_iter, which can't be read "
            "twice: Lightning hands callbacks the batch of the step before. Let it take (batch, batch_idx)"
        )


def without_additions(module: LightningModule) -> Callable[..., Any]:
    """``training_step`` as it is below our wrapper, and below what a third party has put around that."""
    step: Any = module.training_step
    while step is not None and not _is_ours(step):
        step = getattr(step, "__wrapped__", None)
    return module.training_step if step is None else step.__wrapped__  # type: ignore[no-any-return]


def detach(module: LightningModule, add: Addition, method: str = "training_step") -> None:
    """Undo one :func:`attach`; the last one to leave takes the wrapper away. A second call does nothing.

    Call it where a run ends and where it raises (:meth:`~lit_methods.callbacks.ordering.OrderedCallback.leave`). A wrapper that a third
    party has meanwhile put around ours stays, and ours in it then adds nothing.
    """
    wrapper: Any = getattr(module, method)
    layers = getattr(wrapper, "layers", [])
    position = next((index for index, (own, _) in enumerate(layers) if own == add), None)
    if position is None:
        return
    del layers[position]
    if not layers and _is_ours(wrapper):
        del vars(module)[method]  # the class's own method shows through again, or the submodule
        if wrapper.was_own:
            vars(module)[method] = wrapper.__wrapped__
