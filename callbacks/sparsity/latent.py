"""Weights that the forward pass sees through a parametrisation, and that checkpoints hold as the forward pass sees them."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.targets import plain_name


class LatentWeight(nn.Module):
    """Base of our parametrisations: latent weight -> weight of the forward pass, of the same shape."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """An assigned weight becomes the latent one."""
        return weight

    def neutral_state(self) -> Mapping[str, Tensor]:
        """Values of own parameters with which the forward pass sees the latent weight as it is, by name."""
        return {}


def _plain_on_save(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: the effective weight under the name that it has without us."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight):
            for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
                del state[key]
            with torch.no_grad():
                state[f"{prefix}{name}"] = getattr(module, name).detach()


def _plain_on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: a weight under its plain name becomes the latent one."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight) and f"{prefix}{name}" in state:
            state[f"{prefix}parametrizations.{name}.original"] = state.pop(f"{prefix}{name}")
            for own, value in chain[0].neutral_state().items():
                state[f"{prefix}parametrizations.{name}.0.{own}"] = value


class ParametrizedWeight:
    """One weight of a module, with a parametrisation that can be attached and taken off without a trace.

    Args:
        module: Its owner.
        attribute: Its name there.
        parametrization: What the forward pass sees it through.

    Attributes:
        latent: The parameter that optimisers train, once attached.
    """

    latent: nn.Parameter

    def __init__(self, module: nn.Module, attribute: str, parametrization: LatentWeight) -> None:
        self.module, self.attribute, self.parametrization = module, attribute, parametrization

    def attach(self) -> None:
        """Put the parametrisation on."""
        self._order = list(self.module._parameters)
        hooked = parametrize.is_parametrized(self.module)  # by us, for another weight of this module
        parametrize.register_parametrization(self.module, self.attribute, self.parametrization)
        self.latent = self.module.parametrizations[self.attribute].original  # type: ignore[index, union-attr, assignment]
        self._handles = (
            []
            if hooked
            else [
                self.module.register_state_dict_post_hook(_plain_on_save),
                self.module.register_load_state_dict_pre_hook(_plain_on_load),
            ]
        )

    def detach(self) -> None:
        """The effective weight becomes an ordinary parameter again, the same object and at its old place.

        Not by ``remove_parametrizations``: it takes the attribute out of a class that copies of the module (an EMA teacher) share.
        """
        module, attribute = self.module, self.attribute
        with torch.no_grad():
            self.latent.data = getattr(module, attribute).detach().clone()
        for handle in self._handles:
            handle.remove()
        chains: Any = module.parametrizations
        del chains[attribute]
        if not len(chains):
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
        elif not any(isinstance(chain[0], LatentWeight) for chain in chains.values()):
            delattr(type(module), attribute)  # somebody else's parametrisation stays, and its class with it
        own = module._parameters
        own[attribute] = self.latent
        for name in self._order:
            if name in own:
                own[name] = own.pop(name)


def refuse_unfit(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str, names: set[str]) -> None:
    """Raise if weights can't be parametrised alone.

    Raises:
        ValueError: One of ``names`` is parametrised already, is tied to another one, or is masked by a mask callback.
    """
    if foreign := sorted(name for name in names if ".parametrizations." in name):
        raise ValueError(f"{who}: {foreign[0]} belongs to another parametrisation: leave that module out of targets, or add it to skip")
    owners: dict[int, list[str]] = {}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_name(name))
    for tied in owners.values():
        if len(set(tied)) > 1 and names & set(tied):
            raise ValueError(f"{who}: {' and '.join(dict.fromkeys(tied))} are one tied weight: leave it out with skip, or untie it")
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        shared = sorted(names & set(other.chosen(pl_module))) if isinstance(other, MaskCallback) else []
        if shared:
            raise ValueError(
                f"{who} and {type(other).__name__} both mask {shared[0]!r} (and {len(shared) - 1} more): give them other targets"
            )


Gradient = Literal["ste", "exact"]


Direction = Literal["input", "output"]


def group_dim(ndim: int, direction: Direction = "input", transposed: bool = False) -> int:
    """Dimension along which the groups of M run.

    Args:
        ndim: Of the weight; a kernel (more than 2) always has its groups over the input channels.
        direction: ``input`` (the authors' row mode) or ``output`` (column mode) of a linear layer.
        transposed: The weight is stored (in, out, ...), as in transposed convolutions.
    """
    inputs = 0 if transposed else 1
    return 1 - inputs if direction == "output" and ndim == 2 else inputs


def _scaled(weight: Tensor, mask: Tensor, beta: Tensor | float) -> Tensor:
    """W * (M + (1 - M) beta)."""
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):  # some times faster there, and bit-equal
        return weight * mask.to(weight.dtype).clamp_(min=beta)
    return torch.where(mask, weight, weight * beta)


class _StraightThrough(torch.autograd.Function):
    """W * (M + (1 - M) beta) forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, beta: Tensor) -> Tensor:  # type: ignore[override]
        return _scaled(weight, mask, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def masked_weight(weight: Tensor, mask: Tensor, beta: Tensor | float, gradient: Gradient = "ste") -> Tensor:
    """The weight of the forward pass: W * (M + (1 - M) beta).

    Args:
        weight: Latent weight W, any shape, floating point.
        mask: M, bool, shape of ``weight``.
        beta: Factor of pruned weights, 0 to 1, a number or a scalar tensor.
        gradient: ``ste``: the gradient reaches W unchanged, as in the released code. ``exact``: that of the formula with M and beta
            constant, so that pruned weights get beta times theirs.

    Returns:
        Shape and dtype of ``weight``.
    """
    if gradient == "exact":
        return _scaled(weight, mask, beta)
    factor = beta if isinstance(beta, Tensor) else torch.tensor(beta, dtype=torch.float64)
    return _StraightThrough.apply(weight, mask, factor)  # type: ignore[no-any-return]
