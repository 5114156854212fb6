"""Choosing submodules by name pattern and type."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import lightning.pytorch as pl
from torch import nn
from torch.nn.parameter import is_lazy

from lit_methods.compiled import plain_name as plain_name

_SHOWN = 8


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that ``torch.compile`` and data-parallel strategies put around it."""
    while True:
        if isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        elif isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        else:
            return module


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names that they have without ``torch.compile`` and parametrisations; tied ones once."""
    return {plain_parameter_name(name): parameter for name, parameter in module.named_parameters()}


def plain_parameter_name(name: str) -> str:
    """``name`` as it is without ``torch.compile`` and parametrisations: ``0.parametrizations.weight.original`` becomes ``0.weight``."""
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain_name(name))


def plain_modules(module: nn.Module) -> dict[str, nn.Module]:
    """All submodules, the root (``""``) included, by their names without ``torch.compile``; of a compiled one the module inside."""
    return {plain_name(name): plain_module(part) for name, part in module.named_modules()}


def select_modules(root: nn.Module, targets: Sequence[str], types: tuple[type, ...] = ()) -> dict[str, nn.Module]:
    """Submodules of ``root`` whose qualified name matches a pattern and whose type is among ``types``.

    Args:
        root: A module, also one under DDP or ``torch.compile``; their wrappers don't show in the names.
        targets: ``fnmatch`` patterns (``*`` also crosses dots) on names such as ``backbone.layer4``; empty: every
            submodule, which needs ``types``. The root itself is never chosen.
        types: Module classes; empty: any.

    Returns:
        name -> module, in the order of ``root.named_modules()``. Of a compiled submodule it is the compiled one,
        whose hooks run outside the compiled code; :func:`plain_module` gets at the one inside.

    Raises:
        ValueError: No choice was given, or one pattern (or the types) match nothing; the message lists the nearest
            names.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets is the string {targets!r}: give a list of patterns, [{targets!r}]")
    if not targets and not types:
        raise ValueError("nothing is chosen: give targets (patterns such as 'backbone.*'), types, or both")
    named: dict[str, nn.Module] = {}
    for name, module in plain_module(root).named_modules():
        named.setdefault(plain_name(name), module)  # a compiled module comes before the one inside it
    named.pop("", None)
    fitting = {name: module for name, module in named.items() if not types or isinstance(plain_module(module), types)}
    kind = f" of type {' or '.join(t.__name__ for t in types)}" if types else ""
    for position, pattern in enumerate(targets):
        if not any(fnmatchcase(name, pattern) for name in fitting):
            where = f"submodule{kind} of {type(root).__name__}"
            raise ValueError(f"targets[{position}]={pattern!r} matches no {where}; {_candidates(pattern, fitting or named)}")
    if not fitting:
        raise ValueError(f"{type(root).__name__} has no submodule{kind}; {_candidates('', named)}")
    return {name: module for name, module in fitting.items() if not targets or any(fnmatchcase(name, p) for p in targets)}


def _candidates(pattern: str, named: dict[str, nn.Module]) -> str:
    if not named:
        return "it has no submodules at all"
    nearest = difflib.get_close_matches(pattern, named, n=_SHOWN, cutoff=0.0) if pattern else list(named)[:_SHOWN]
    shown = ", ".join(f"{name} ({type(plain_module(named[name])).__name__})" for name in nearest)
    return f"{'nearest' if pattern else 'first'} of {len(named)} candidates: {shown}"


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the strategy cuts weights into pieces: FSDP, DeepSpeed or tensor parallelism."""
    return any(word in type(trainer.strategy).__name__ for word in ("FSDP", "DeepSpeed", "ModelParallel"))


def refuse_lazy(root: nn.Module, who: str) -> None:
    """Raise if a parameter has no shape yet, so that it can't be copied or averaged.

    Raises:
        ValueError: A lazy layer that has seen no batch.
    """
    lazy = [plain_name(name) for name, parameter in root.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"{who} needs all weights when fit starts, but {', '.join(lazy[:4])} of {type(root).__name__} has no shape yet: run the lazy "
            "layers once before fit, on a batch of the right size"
        )


def refuse_sharded(trainer: pl.Trainer, who: str) -> None:
    """Raise if the strategy cuts weights into pieces, which a mask of the whole weight doesn't fit.

    Raises:
        ValueError: FSDP, DeepSpeed or tensor parallelism.
    """
    if is_sharded(trainer):
        raise ValueError(f"{who} needs whole weights, but {type(trainer.strategy).__name__} shards them: use strategy='ddp'")
