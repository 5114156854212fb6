"""What a submodule of a model gives on a batch of text, and which rows of it count."""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods.callbacks.targets import plain_module, plain_modules

Site = Literal["output", "input"]


class _Caught(Exception):
    """Ends a forward pass behind the submodule that is looked at: the layers above needn't be computed."""


def named_module(model: nn.Module, name: str) -> nn.Module:
    """A submodule by its name.

    Raises:
        ValueError: There is none; the message has the nearest names.
    """
    named = {found: part for found, part in plain_modules(plain_module(model)).items() if found}
    if name not in named:
        near = difflib.get_close_matches(name, named, n=5, cutoff=0.0)
        shown = ", ".join(f"{other} ({type(named[other]).__name__})" for other in near)
        owner = type(plain_module(model)).__name__
        raise ValueError(f"hook={name!r} is no submodule of {owner}; nearest of {len(named)} names: {shown or 'it has none'}")
    return named[name]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a submodule gives or gets: itself, or in a tuple, a list, a dict or an output of transformers."""
    if isinstance(value, Tensor):
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(first_tensor, inner) if found is not None), None)


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch of text.

    Of a dict it gets what its ``forward`` names, without labels; where it names nothing of it, the first tensor.
    """
    parameters = inspect.signature(plain_module(model).forward).parameters
    options = {"use_cache": False} if "use_cache" in parameters else {}
    if isinstance(batch, Mapping):
        named = {name: value for name, value in batch.items() if name in parameters and name != "labels"}
        if named:
            return model(**named, **options)
    return model(first_tensor(batch), **options)


@contextmanager
def _catching(part: nn.Module, site: Site) -> Iterator[list[Any]]:
    """Puts what the next call of a submodule gives, or gets, into the list, and ends that pass."""
    found: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((*args, *kwargs.values()))
        raise _Caught

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output)
        raise _Caught

    handle = part.register_forward_pre_hook(before, with_kwargs=True) if site == "input" else part.register_forward_hook(behind)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def activations(model: nn.Module, hook: str, batch: Any, site: Site = "output") -> Tensor:
    """What a submodule gives (or gets) when the model runs on a batch; the layers behind it aren't computed.

    Args:
        model: Any; dropout and batch norm are as its modes say.
        hook: Name of the submodule, as ``model.named_modules()`` has it. If it runs several times, its first call counts.
        batch: A tensor, or a dict; see :func:`call`.
        site: ``output`` of the submodule, or its first ``input``.

    Returns:
        Shape and dtype as they are: the first tensor of a tuple or dict.

    Raises:
        ValueError: No such submodule, it isn't run, or it gives no tensor.
    """
    part = named_module(model, hook)
    with _catching(part, site) as found:
        with suppress(_Caught):
            call(model, batch)
    if not found:
        raise ValueError(f"hook={hook!r} isn't run when {type(plain_module(model)).__name__} is called: name one that is")
    tensor = first_tensor(found[0])
    if tensor is None or not tensor.is_floating_point():
        raise ValueError(f"hook={hook!r}: its {site} is {type(found[0]).__name__} without a floating-point tensor: name another submodule")
    return tensor


def kept_rows(activation: Tensor, batch: Any, skip_first: int = 0, drop_tokens: Sequence[int] = ()) -> Tensor:
    """Activations of the tokens that count, one a row.

    Args:
        activation: (B, L, d), or (B, d), of which all rows count.
        batch: With ``input_ids`` (B, L), and ``attention_mask`` (B, L) where there is padding.
        skip_first: Tokens at the beginning of each window that don't count.
        drop_tokens: Tokens that don't count wherever they stand.

    Returns:
        (N, d), in the order of the text.

    Raises:
        ValueError: Another shape.
    """
    if activation.ndim == 2:
        return activation
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else first_tensor(batch)
    if activation.ndim != 3 or (ids is not None and ids.shape != activation.shape[:2]):
        tokens = None if ids is None else tuple(ids.shape)
        raise ValueError(
            f"activations are {tuple(activation.shape)} for tokens {tokens}: hook a submodule that gives (B, L, d), one vector a token"
        )
    keep = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
    keep[:, :skip_first] = False
    if isinstance(batch, Mapping) and (mask := batch.get("attention_mask")) is not None:
        keep &= mask.to(keep.device).bool()
    if drop_tokens and ids is not None:
        keep &= ~torch.isin(ids.to(keep.device), torch.tensor(list(drop_tokens), device=keep.device))
    return activation[keep]


__all__ = ["Site", "activations", "call", "first_tensor", "kept_rows", "named_module"]
