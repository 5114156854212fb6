"""Other activations in the place of a model's own, at one submodule."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_methods.datamodules.activations.hooked import Site, first_tensor, named_module


def _replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a submodule gives or gets, with its first tensor changed."""
    if isinstance(value, Tensor):
        return change(value).to(value.dtype)
    if isinstance(value, Mapping):
        key = next(key for key, part in value.items() if first_tensor(part) is not None)
        kind: Any = type(value)
        copied = kind(value)
        copied[key] = _replaced(value[key], change)
        return copied
    place = next(place for place, part in enumerate(value) if first_tensor(part) is not None)
    parts = [*value[:place], _replaced(value[place], change), *value[place + 1 :]]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@contextmanager
def spliced(model: nn.Module, hook: str, change: Callable[[Tensor], Tensor], site: Site = "output") -> Iterator[None]:
    """Inside, a submodule's activations are replaced whenever the model runs.

    Args:
        model: Any.
        hook: Name of the submodule, as ``model.named_modules()`` has it.
        change: Activations, the first tensor that the submodule gives or gets, -> what takes their place, of the same shape.
        site: ``output`` of the submodule, or its ``input``.

    Raises:
        ValueError: No such submodule (the message has the nearest names), or it wasn't run.
    """
    part, runs = named_module(model, hook), 0

    def counted(value: Any) -> Any:
        nonlocal runs
        runs += 1
        if first_tensor(value) is None:
            raise ValueError(f"hook={hook!r}: its {site} is {type(value).__name__} without a tensor: name another submodule")
        return _replaced(value, change)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return counted(args), kwargs
        return args, counted(kwargs)

    handle = (
        part.register_forward_pre_hook(before, with_kwargs=True)
        if site == "input"
        else part.register_forward_hook(lambda module, args, output: counted(output))
    )
    try:
        yield
    finally:
        handle.remove()
    if not runs:
        raise ValueError(f"hook={hook!r} isn't run when {type(model).__name__} is called: name one that is")


__all__ = ["spliced"]
