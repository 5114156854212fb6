"""What the module's own code meets in ``parameters()`` while weights are parametrised: additions such as scales, and an order of old."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lit_methods.callbacks.sparsity.parametrized import LatentWeight, added_parameters, parameters_in_old_order
from lit_methods.callbacks.targets import plain_name


@contextmanager
def _hidden(module: nn.Module) -> Iterator[None]:
    """Inside, ``parameters()`` leaves out what parametrisations of ours have added."""
    parts = [(part, dict(part._parameters)) for part in module.modules() if isinstance(part, LatentWeight)]
    for part, own in parts:
        part._parameters.clear()
        vars(part).update(own)  # the forward pass still finds them
    try:
        yield
    finally:
        for part, own in parts:
            for name in own:
                del vars(part)[name]
            part._parameters.update(own)


def configured(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``configure_optimizers``, a second time without the added parameters where it can't be run with them."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # the user's code, which may sort parameters by name
        with _hidden(module):
            try:
                return call(*args, **kwargs)
            except Exception:
                raise error from None


def join_groups(optimizers: list[torch.optim.Optimizer], added: Mapping[nn.Parameter, list[nn.Parameter]]) -> None:
    """Let parameters that no optimiser holds be trained in the group of the weight that they belong to.

    Args:
        optimizers: All optimisers.
        added: Latent weight -> what its parametrisation adds.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for group in groups:
        for parameter in list(group["params"]):
            group["params"] += [own for own in added.get(parameter, ()) if id(own) not in held]


def twins(module: nn.Module) -> tuple[str, str] | None:
    """Names of two submodules with the same parameters but for what parametrisations add to the first, as those of a momentum branch."""
    alike: dict[Any, list[tuple[str, bool]]] = {}
    for name, part in module.named_modules():
        added = {id(parameter) for parameter in added_parameters(part)}
        own = tuple(
            (plain_name(key), tuple(value.shape)) for key, value in part.named_parameters() if not (id(value) in added or is_lazy(value))
        )
        if own:
            alike.setdefault(own, []).append((plain_name(name), bool(added)))
    for places in alike.values():
        more, same = ([name for name, has in places if has is wanted] for wanted in (True, False))
        if more and same:
            return more[0], same[0]
    return None


def sums(module: nn.Module, name: str) -> torch.Tensor:
    """Sum of each parameter of a submodule, float64 on the CPU, to see whether one moves."""
    parts = {plain_name(own): part for own, part in module.named_modules()}
    return torch.stack([parameter.detach().double().sum().cpu() for parameter in parts[name].parameters()])


def follow_old_order(module: nn.Module, optimizers: list[torch.optim.Optimizer], states: list[dict[str, Any]]) -> None:
    """Let optimiser states of release 0.1 follow the parameters' order of today, in place; groups in an order of their own stay.

    Args:
        module: Its weights are parametrised.
        optimizers: They will load the states.
        states: ``optimizer_states`` of the checkpoint.
    """
    new, old = (
        {id(parameter): place for place, parameter in enumerate(them)} for them in (module.parameters(), parameters_in_old_order(module))
    )
    for optimizer, state in zip(optimizers, states, strict=False):
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
            parameters, keys = [id(parameter) for parameter in group["params"]], saved["params"]
            if len(keys) == len(parameters) and set(parameters) <= set(new) and parameters == sorted(parameters, key=new.__getitem__):
                key_of = dict(zip(sorted(parameters, key=old.__getitem__), keys, strict=True))
                saved["params"] = [key_of[parameter] for parameter in parameters]


__all__ = ["configured", "follow_old_order", "join_groups", "sums", "twins"]
