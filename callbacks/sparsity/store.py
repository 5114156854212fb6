"""The mask store: which weights of a model are masked, and with what. Nothing here knows Lightning."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import is_parametrized

from lit_methods.callbacks.sparsity.parametrized import LatentWeight
from lit_methods.callbacks.targets import plain_module, plain_name, select_modules

_PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Module classes whose matrices and kernels are masked by default: linear, convolution, attention projections."""


def _is_prunable(module: nn.Module) -> bool:
    of_gpt2 = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")  # a linear layer
    return isinstance(module, _PRUNABLE) or of_gpt2


_MADE_OF = ("_g", "_v", "_orig")  # endings of what weight_norm, spectral_norm and torch's pruning put in the place of a parameter
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Choice:
    """Weights that a technique prunes, and those that it can't.

    Attributes:
        weights: Parameter name -> parameter with at least two dimensions, in the order of ``named_modules()``.
        left: Name of a weight that was meant as well -> why it is left out.
    """

    weights: dict[str, nn.Parameter]
    left: dict[str, str]


def _is_ingredient(owner: nn.Module, name: str) -> bool:
    """Whether a parameter isn't multiplied itself: somebody else's code makes the weight from it in the forward pass."""
    if isinstance(owner, parametrize.ParametrizationList):
        return not any(isinstance(step, LatentWeight) for step in owner)
    made = next((name.removesuffix(ending) for ending in _MADE_OF if name.endswith(ending)), name)
    return made != name and made not in owner._parameters and isinstance(getattr(owner, made, None), Tensor)


def choose_weights(root: nn.Module, targets: Sequence[str] = (), skip: Sequence[str] = ()) -> Choice:
    """What :func:`prunable_weights` chooses; left out are weights that ``weight_norm`` and the like make in the forward pass.

    Raises:
        ValueError: A pattern matches nothing, a chosen layer is lazy, or nothing is there to prune.
    """
    everything = {plain_name(name): module for name, module in root.named_modules()}
    chosen = select_modules(root, targets) if targets else {name: module for name, module in everything.items() if _is_prunable(module)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise ValueError(f"skip pattern {pattern!r} matches no submodule of {type(root).__name__}: correct it or leave it out")
    dense = {
        id(parameter)
        for module in everything.values()
        if not targets and not _is_prunable(module)
        for parameter in module.parameters(recurse=False)
    }
    weights: dict[str, nn.Parameter] = {}
    left: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in chosen.items():
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        owner, prefix = plain_module(module), f"{name}." if name else ""
        chains: Any = getattr(owner, "parametrizations", {})
        for own, chain in chains.items():
            if not any(isinstance(step, LatentWeight) for step in chain):
                left[plain_name(prefix + own)] = f"made in the forward pass by {type(chain[0]).__name__.strip('_')}"
        for own, parameter in owner.named_parameters(recurse=False):
            full = plain_name(prefix + own)
            if own in chains:
                left[full] = "parametrised already: it belongs to another parametrisation"
                continue
            if is_lazy(parameter):
                way = "run the lazy layers once before fit, on a batch of the right size, or leave them out with skip"
                raise ValueError(f"{full} of {type(root).__name__} has no shape yet: {way}")
            if _is_ingredient(owner, own):
                left[full] = "the forward pass makes the weight of it"
            elif isinstance(owner, nn.MultiheadAttention) and own in ("bias_k", "bias_v"):
                continue
            elif parameter.ndim >= 2 and id(parameter) not in dense and id(parameter) not in seen:
                seen.add(id(parameter))
                weights[full] = parameter
    if not weights and not left:
        why = "; they are parametrised already, by another callback perhaps" if any(map(is_parametrized, root.modules())) else ""
        given = f"targets={list(targets)} with skip={list(skip)} hold no parameter with two dimensions or more{why}"
        raise ValueError(f"no weight of {type(root).__name__} is left to prune: {given}; targets name modules, not parameters")
    return Choice(weights, left)


def prunable_weights(root: nn.Module, targets: Sequence[str] = (), skip: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Weights that a sparsity technique may mask: no biases, norms or embeddings.

    Args:
        root: Any module, also a compiled one.
        targets: ``fnmatch`` patterns on submodule names such as ``encoder.*``; empty: every linear, convolution and attention module. A
            module that a pattern names is taken whatever its type, an embedding for example.
        skip: Patterns on submodule names that stay dense, such as ``head``; each must match something.

    Returns:
        Parameter name -> parameter with at least two dimensions, in the order of ``root.named_modules()``. A tied weight stands there once,
        under its first name; by default it is left out if one of its owners is no prunable type (a head tied to an embedding). What
        ``weight_norm`` and the like make a weight of is left out, too.

    Raises:
        ValueError: A pattern matches nothing, a chosen layer is lazy, or nothing is left.
    """
    choice = choose_weights(root, targets, skip)
    if not choice.weights:
        raise ValueError(f"no weight of {type(root).__name__} is left to prune: {listed(choice.left)}")
    return choice.weights


def trained(who: str, choice: Choice, targets: Sequence[str], held: Collection[int] | None = None) -> Choice:
    """A choice without weights that no training moves: they would be pruned once, and a momentum branch would bring them back.

    Args:
        who: Name of the technique, for messages.
        choice: What it would prune.
        targets: The user's patterns. What they name must be trained; without them the rest is left out.
        held: ``id`` of every parameter that an optimiser holds; None: not known yet.

    Raises:
        ValueError: ``targets`` name a weight that can't be pruned or isn't trained, or nothing is left.
    """
    left = dict(choice.left)
    for name, weight in choice.weights.items():
        if not weight.requires_grad:
            left[name] = "frozen"
        elif held is not None and id(weight) not in held:
            left[name] = "in no optimiser"
    if left and targets:
        raise ValueError(f"{who} prunes weights that are trained, but targets={list(targets)} mean {listed(left)} too: add these to skip")
    weights = {name: weight for name, weight in choice.weights.items() if name not in left}
    if left and not weights:
        way = "train some of them, take weight_norm and the like off before fit, or name other layers by targets"
        raise ValueError(f"{who} has no weight left to prune: {listed(left)}; {way}")
    return Choice(weights, left)


def listed(left: Mapping[str, str]) -> str:
    """Names with their reasons, in one line: ``a, b (frozen); c (in no optimiser)``."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({why})" for why, names in reasons.items())


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**18  # weights whose bits are made at a time: they stay in the processor's cache


@torch.no_grad()
def zero_removed_(tensor: Tensor, mask: Tensor) -> None:
    """Set a floating-point tensor to exactly 0 where ``mask`` (bool, its shape) is False, in place, also where it is infinite or NaN."""
    if tensor.device.type == "cpu":  # five times faster there than masked_fill_: and with all bits, or none
        bits = _BITS[tensor.element_size()]
        rows = max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel()))
        for part, kept in zip(tensor.view(bits).split(rows), mask.split(rows), strict=True):
            part.bitwise_and_(kept.to(bits).neg_())
    else:
        tensor.masked_fill_(~mask, 0.0)


class MaskStore:
    """Parameter name -> bool mask, for the weights of one model.

    Args:
        weights: Parameter name -> parameter, as from :func:`prunable_weights`. All masks are True at first.

    Attributes:
        masks: Name -> bool tensor on the parameter's device, shape of the parameter. Change them by :meth:`set` alone.
        version: Counts the calls of :meth:`set`.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.version = 0

    def is_of(self, weights: Mapping[str, nn.Parameter]) -> bool:
        """Whether the masks are of these very weights."""
        return bool(weights) and set(weights) == set(self.weights) and all(weights[name] is own for name, own in self.weights.items())

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Replace some masks; the weights change at the next :meth:`apply`.

        Raises:
            ValueError: An unknown name, another shape, or no bool tensor.
        """
        for name, mask in masks.items():
            if name not in self.weights:
                raise ValueError(f"there is no masked weight {name!r}: the store holds {', '.join(itertools.islice(self.weights, 8))}, ...")
            weight = self.weights[name]
            if mask.shape != weight.shape or mask.dtype != torch.bool:
                raise ValueError(f"mask of {name!r} is {tuple(mask.shape)} {mask.dtype}, expected {tuple(weight.shape)} torch.bool")
            self.masks[name] = mask.to(weight.device)
        self.version += 1

    def follow_device(self) -> None:
        """Move the masks to where the weights are."""
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in self.masks.items()}

    def apply(self, names: Iterable[str] | None = None) -> None:
        """Set dead weights to exactly 0 (also where they are infinite or NaN)."""
        self.apply_to({name: self.weights[name] for name in (self.weights if names is None else names)})

    def apply_to_gradients(self, names: Iterable[str]) -> None:
        """Set the gradients of dead weights to 0, in place."""
        self.apply_to({name: grad for name in names if (grad := self.weights[name].grad) is not None})

    def apply_to_optimizer(self, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
        """Set the optimiser's memory of dead weights to 0: every state tensor that has the weight's shape (momentum, Adam's moments)."""
        for name in names:
            weight = self.weights[name]
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    zero_removed_(value, self.masks[name])

    def apply_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Set dead entries of some tensors to 0, such as an averaged model: name -> tensor; other names are left alone."""
        for name, tensor in tensors.items():
            if name in self.masks:
                zero_removed_(tensor, self.masks[name].to(tensor.device))

    def counts(self) -> dict[str, tuple[int, int]]:
        """Name -> (active weights, all weights)."""
        active = torch.stack([mask.sum() for mask in self.masks.values()]).tolist()  # one wait for the device
        return {name: (int(count), mask.numel()) for (name, mask), count in zip(self.masks.items(), active, strict=True)}

    def densities(self) -> dict[str, float]:
        """Name -> active share of the weight."""
        return {name: active / total for name, (active, total) in self.counts().items()}

    def density(self) -> float:
        """Active share of all weights of the store."""
        counts = list(self.counts().values())
        return sum(active for active, _ in counts) / sum(total for _, total in counts)

    def state_dict(self) -> dict[str, Any]:
        """Masks by name, on the CPU."""
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the masks.

        Raises:
            ValueError: The checkpoint's masks are of other weights.
        """
        saved = state["masks"]
        if set(saved) != set(self.weights):
            odd = ", ".join(sorted(set(saved) ^ set(self.weights))[:6])
            raise ValueError(f"the checkpoint's masks are of other weights ({odd}): resume with the same module, targets and skip")
        self.set(saved)
