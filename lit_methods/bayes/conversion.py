"""From an ordinary module to a Bayesian one and back: layers are converted in place, whatever module they lie in."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lit_methods.bayes.layers import BAYES, BayesLayer
from lit_methods.bayes.variational import Spread
from lit_methods.callbacks.targets import plain_modules, plain_name, select_modules
from lit_methods.seeds import own_seed

_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_SHOWN = 6  # layers in a message


def bayes_layers(root: nn.Module) -> dict[str, BayesLayer]:
    """Name -> Bayes layer, in the order of ``root.named_modules()``; a layer in several places stands there once."""
    return {name: part for name, part in plain_modules(root).items() if isinstance(part, BayesLayer)}


def _obstacle(layer: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why a layer can't be converted; None: it can."""
    kind = type(layer)
    weight = layer._parameters.get("weight")
    if isinstance(weight, nn.Parameter) and is_lazy(weight):
        return "has no shape yet"
    if kind not in BAYES:
        return f"is a {kind.__name__}"
    if weight is None:
        return "has a weight that is made in the forward pass"
    if len(owners[id(weight)]) > 1:
        return "shares its weight with another layer"
    if isinstance(layer, nn.Embedding) and (layer.sparse or layer.max_norm is not None or layer.scale_grad_by_freq):
        return "is an Embedding with sparse, max_norm or scale_grad_by_freq"
    return None


def choose_layers(root: nn.Module, targets: Sequence[str] = (), skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Layers of a module that are to be converted: linear, convolutions, look-up tables, as far as they are trained.

    Args:
        root: Any module.
        targets: ``fnmatch`` patterns on submodule names; empty: every layer with a weight matrix or kernel.
        skip: Patterns on names of layers that stay as they are.

    Raises:
        ValueError: A pattern matches nothing; a layer that is meant can't be converted, and the message names each with its reason; or
            nothing is left.
    """
    named = plain_modules(root)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"skip pattern {pattern!r} matches no submodule of {type(root).__name__}: correct it or leave it out")
    owners: dict[int, list[str]] = {}
    for name, part in named.items():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    meant = {name: named[name] for name in map(plain_name, select_modules(root, targets))} if targets else named
    inside = [f"{name}." for name, part in named.items() if isinstance(part, nn.MultiheadAttention)]  # which reads its parts' weights
    chosen: dict[str, nn.Module] = {}
    wrong: dict[str, str] = {}
    for name, part in meant.items():
        known = isinstance(part, _LAYERS) or type(part).__name__ == "Conv1D"
        if not known or isinstance(part, BayesLayer) or name.startswith(tuple(inside)):
            continue
        frozen = all(not parameter.requires_grad for parameter in part.parameters())
        if any(fnmatchcase(name, pattern) for pattern in skip) or (frozen and not targets):
            continue
        why = "is frozen" if frozen else _obstacle(part, owners)
        if why is None:
            chosen[name] = part
        else:
            wrong[name] = why
    if wrong:
        shown = ", ".join(f"{name or 'the module itself'} {why}" for name, why in list(wrong.items())[:_SHOWN])
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        kinds = ", ".join(kind.__name__ for kind in BAYES)
        raise ValueError(
            f"layers of {type(root).__name__} can't be given distributions: {shown}{more}. {kinds} with weights of their own can; name "
            "those by targets, or add the others to skip: they stay as they are"
        )
    if not chosen and not bayes_layers(root):
        kinds = ", ".join(kind.__name__ for kind in BAYES)
        raise ValueError(
            f"{type(root).__name__} has no trained layer to give distributions to among targets={list(targets)}: one of {kinds}"
        )
    return chosen


def to_bayes(
    root: nn.Module,
    targets: Sequence[str] = (),
    skip: Sequence[str] = (),
    mean_std: float | None = None,
    std: float = 6e-4,
    std_spread: float = 5e-4,
    seed: int = 0,
    spread: Spread = "softplus",
) -> list[str]:
    """Give layers of a module normal distributions, in place; batch norms, biases and everything else stay.

    The layers stay the same objects under the same names: hooks, and parameters that somebody holds, stay good.

    Args:
        root: Any module.
        targets: Patterns of the layers, as in :func:`choose_layers`.
        skip: Patterns of layers that stay as they are.
        mean_std: Draw the means from N(0, mean_std^2); None: they are the weights of now.
        std: Mean of the standard deviations at the start, > 0.
        std_spread: Their spread.
        seed: Of what is drawn.
        spread: How sigma follows from rho.

    Returns:
        Names of the converted layers.

    Raises:
        ValueError: As :func:`choose_layers`.
    """
    chosen = choose_layers(root, targets, skip)
    generator = torch.Generator().manual_seed(own_seed("to_bayes", seed))
    for layer in chosen.values():
        layer.__class__ = BAYES[type(layer)]  # in place, so that nobody who holds the layer is left behind
        assert isinstance(layer, BayesLayer)
        layer.begin(mean_std, std, std_spread, generator, spread)
    return list(chosen)


def mean_state(root: nn.Module) -> dict[str, Tensor]:
    """State of the ordinary module with the means as its weights: loads into the network as it was before :func:`to_bayes`."""
    added = {f"{name}.{own}" if name else own for name in bayes_layers(root) for own in ("rho", "mask")}
    return {name: value for name, value in root.state_dict().items() if plain_name(name) not in added}


__all__ = ["bayes_layers", "choose_layers", "mean_state", "to_bayes"]
