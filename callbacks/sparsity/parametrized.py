"""Weights that the forward pass sees through a parametrisation, which can be taken off without a trace. Nothing here knows Lightning."""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LatentWeight(nn.Module):
    """Base of the parametrisations: latent weight -> weight of the forward pass, of the same shape."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """An assigned weight becomes the latent one."""
        return weight

    def neutral_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Values of its own parameters with which the forward pass sees a latent weight as it is, by name."""
        return {}


Parametrization = TypeVar("Parametrization", bound=LatentWeight)


class _Chain(parametrize.ParametrizationList):
    """torch's list of parametrisations of a weight, whose latent weight stays a parameter of the layer: by its old name, in its old place.

    So ``parameters()`` gives the same ones in the same order as without us, to code that goes by names or walks two networks in parallel.
    """

    _owner: tuple[nn.Module, str]  # in a tuple, as it is no part of this module

    @property
    def original(self) -> nn.Parameter:  # type: ignore[override]
        """The latent weight."""
        layer, attribute = self._owner
        parameter = layer._parameters[attribute]
        assert parameter is not None
        return parameter

    @classmethod
    def take(cls, layer: nn.Module, attribute: str) -> nn.Parameter:
        """Give a layer the latent weight back that ``register_parametrization`` has just taken from it."""
        chains: Any = layer.parametrizations
        chain = chains[attribute]
        latent: nn.Parameter = chain._parameters.pop("original")
        chain.__class__, chain._owner = cls, (layer, attribute)
        layer._parameters[attribute] = latent
        return latent


def _plain_on_save(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: the effective weight under the name that it has without us, and nothing of the parametrisation's own."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight):
            for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
                del state[key]
            with torch.no_grad():
                state[f"{prefix}{name}"] = getattr(module, name).detach()


def _plain_on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: a weight becomes the latent one, and the parametrisation shows it as it is."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight) and f"{prefix}{name}" in state:
            for own, value in chain[0].neutral_state(state[f"{prefix}{name}"]).items():
                state[f"{prefix}parametrizations.{name}.0.{own}"] = value


def _flatten(module: nn.Module, *_: Any) -> None:
    """Let a recurrent layer compute with its weights as they are seen from outside; it keeps a list of them, beside its attributes."""
    names: Any = module._flat_weights_names
    vars(module)["_flat_weights"] = [getattr(module, name) for name in names]


def _flatten_latent(module: nn.Module, *_: Any) -> None:
    """Let its list hold parameters again: others have a graph, and can't be copied."""
    names: Any = module._flat_weights_names
    chains: Any = getattr(module, "parametrizations", {})
    vars(module)["_flat_weights"] = [chains[name].original if name in chains else getattr(module, name) for name in names]


class Shared:
    """State of a parametrisation that all copies of the module share (an EMA teacher), so that they follow it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


def added_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What parametrisations of ours have of their own inside a module: parameters that it lacks without them, such as scales."""
    return [parameter for part in module.modules() if isinstance(part, LatentWeight) for parameter in part.parameters()]


def parameters_in_old_order(module: nn.Module) -> list[nn.Parameter]:
    """All parameters as ``parameters()`` gave them up to release 0.1, which optimiser states of its checkpoints follow.

    A latent weight then stood behind the others of its layer and what is inside that.
    """
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        chains: Any = getattr(part, "parametrizations", {})
        own = {name: parameter for name, parameter in part._parameters.items() if parameter is not None}
        mine = [parameter for name, parameter in own.items() if not (name in chains and isinstance(chains[name], _Chain))]
        found |= {id(parameter): parameter for parameter in ([part.original] if isinstance(part, _Chain) else mine)}
    return list(found.values())


class ParametrizedWeight(Generic[Parametrization]):
    """One weight of a module, with a parametrisation that can be attached and taken off without a trace.

    Args:
        module: Owner of the weight.
        attribute: Name of the weight in it.
        parametrization: What the forward pass sees it through.

    Attributes:
        latent: The parameter that optimisers train, once attached.
    """

    latent: nn.Parameter

    @property
    def added(self) -> list[nn.Parameter]:
        """Parameters of the parametrisation's own, such as scales."""
        return list(self.parametrization.parameters())

    def __init__(self, module: nn.Module, attribute: str, parametrization: Parametrization) -> None:
        self.module, self.attribute, self.parametrization = module, attribute, parametrization
        self._order = list(module._parameters)  # before any of them is parametrised

    def parts(self) -> dict[str, Tensor]:
        """The latent weight, and the parametrisation's own parameters."""
        return {"latent": self.latent, **dict(self.parametrization.named_parameters())}

    def attach(self) -> None:
        """Put the parametrisation on."""
        chains: Any = getattr(self.module, "parametrizations", {})
        hooked = any(isinstance(chain[0], LatentWeight) for chain in chains.values())
        parametrize.register_parametrization(self.module, self.attribute, self.parametrization)
        self.latent = _Chain.take(self.module, self.attribute)
        self._order_again()
        self._handles: list[Any] = []
        if not hooked:
            self._handles.append(self.module.register_state_dict_post_hook(_plain_on_save))
            self._handles.append(self.module.register_load_state_dict_pre_hook(_plain_on_load))
            if isinstance(self.module, nn.RNNBase):
                self._handles.append(self.module.register_forward_pre_hook(_flatten))
                self._handles.append(self.module.register_forward_hook(_flatten_latent, always_call=True))

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
        kind = type(module)
        if not len(chains):
            del module.parametrizations
            module.__class__ = kind.__bases__[0]
        else:  # others stay: a class like this one, without the property
            rest = {name: value for name, value in vars(kind).items() if name not in (attribute, "__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, rest)
        if isinstance(module, nn.RNNBase):
            _flatten(module)

    def _order_again(self) -> None:
        own = self.module._parameters
        for name in self._order:
            if name in own:
                own[name] = own.pop(name)
