"""What a sparse network costs in theory: multiply-accumulates of each weight, and FLOPs of training. 1 MAC = 2 FLOPs.

Formulas of training: RigL (arXiv:1911.11134, appendix), gradual pruning (arXiv:1710.01878). Norms, biases and activations are not counted.
Theory says nothing about speed: that is measured (see :class:`~lit_methods.callbacks.SparsityReport`).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_methods.callbacks.sparsity.schedules import cubic_sparsity


def attention_macs(tokens: int, dim: int) -> int:
    """Scores and values of one self-attention: 2 * tokens^2 * dim, whatever the number of heads. No weight takes part."""
    return 2 * tokens**2 * dim


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass.

    Attributes:
        per_weight: Name of the weight -> MACs that it takes part in; a weight that is used twice counts twice.
        other: MACs without a known weight: attention scores and values, other products of activations.
    """

    per_weight: dict[str, int]
    other: int


class _Counter(TorchDispatchMode):
    """Counts matrix products and convolutions, and recognises weights by the memory that they live in, also through views."""

    def __init__(self, owner: dict[int, str]) -> None:
        super().__init__()
        self.owner = owner
        self.per_weight = dict.fromkeys(owner.values(), 0)
        self.other = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if packet in flop_registry:
            macs = int(flop_registry[packet](*args, **kwargs, out_val=output)) // 2
            tensors = [value for value in args if isinstance(value, Tensor)]
            names = [self.owner[pointer] for value in tensors if (pointer := value.untyped_storage().data_ptr()) in self.owner]
            if names:
                self.per_weight[names[0]] += macs
            else:
                self.other += macs
        return output


def count_macs(module: nn.Module, forward: Callable[[], Any], weights: Mapping[str, Tensor]) -> Macs:
    """Count one forward pass, whatever kinds of modules it runs through (linear, convolution, attention, a user's own).

    Args:
        module: Owner of the weights; compiled parts run uncompiled meanwhile, parametrised weights are known by their effective values.
        forward: Runs the pass. Gradients and autocast are switched off; train/eval modes and random generators are the caller's business.
        weights: Name -> weight, such as :func:`~lit_methods.callbacks.sparsity.store.prunable_weights`; each must have memory of its own.

    Returns:
        MACs of the whole batch that ``forward`` passes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(next(iter(weights.values())).device.type, enabled=False))
        stack.enter_context(parametrize.cached())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        owner = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        by_parameter = {id(weight): name for name, weight in weights.items()}
        effective = []  # kept alive, so that no other tensor gets their memory
        for submodule in module.modules():
            for attribute, originals in getattr(submodule, "parametrizations", {}).items():
                name = by_parameter.get(id(getattr(originals, "original", None)))
                if name is not None:
                    effective.append(getattr(submodule, attribute))
                    owner[effective[-1].untyped_storage().data_ptr()] = name
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # fused kernels hide the products, here as in attention
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        counter = stack.enter_context(_Counter(owner))
        forward()
    return Macs(dict.fromkeys(weights, 0) | counter.per_weight, counter.other)


def training_flops(regime: str, dense: float, sparse: float, update_interval: int = 100) -> float:
    """FLOPs to train on one sample, forward and backward, averaged over the steps.

    Args:
        regime: ``dense`` 3 f_D; ``static`` and ``set`` 3 f_S; ``rigl``, with a dense gradient once in ``update_interval`` + 1 steps,
            (3 f_S dT + 2 f_S + f_D) / (dT + 1); ``sparse_momentum`` 2 f_S + f_D; ``ste``, whose backward is dense, f_S + 2 f_D.
        dense: FLOPs of a dense forward pass, f_D.
        sparse: FLOPs of a sparse forward pass, f_S.
        update_interval: Steps between two updates, dT.

    Raises:
        ValueError: An unknown regime.
    """
    costs = {
        "dense": 3 * dense,
        "static": 3 * sparse,
        "set": 3 * sparse,
        "rigl": (3 * sparse * update_interval + 2 * sparse + dense) / (update_interval + 1),
        "sparse_momentum": 2 * sparse + dense,
        "ste": sparse + 2 * dense,
    }
    if regime not in costs:
        raise ValueError(f"regime is {regime!r}: give one of {', '.join(costs)}")
    return costs[regime]


def gradual_training_flops(dense: float, steps: int, start: int, end: int, initial: float, final: float) -> float:
    """FLOPs to train on one sample under gradual magnitude pruning: the mean over ``steps`` of 3 f_D (1 - s_t)."""
    return 3 * dense * sum(1 - cubic_sparsity(step, start, end, initial, final) for step in range(steps)) / steps
