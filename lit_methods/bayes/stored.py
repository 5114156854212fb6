"""A sparse posterior as a file: means and rhos of active weights, one bit for each weight, and whatever else the module holds."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.bayes.conversion import bayes_layers, choose_layers, to_bayes
from lit_methods.bayes.layers import BAYES, BayesLayer, drawn
from lit_methods.bayes.variational import posterior_std
from lit_methods.callbacks.sparsity.history import pack_bits, unpack_bits
from lit_methods.callbacks.targets import plain_modules, plain_name
from lit_methods.files import write_atomically

_FORMAT = "lit-methods sparse posterior 1"


def sparse_state(root: nn.Module) -> dict[str, Any]:
    """The state of a Bayesian module without what isn't there: tensors, texts and numbers only.

    Returns:
        ``layers``: name -> ``shape``, ``bits`` (the mask, eight weights a byte), ``mean`` and ``rho`` (active,), ``spread``. ``rest``: all
        other entries of the state dict, under their names.
    """
    layers, gone = {}, set()
    for name, layer in bayes_layers(root).items():
        prefix = f"{name}." if name else ""
        gone |= {prefix + own for own in ("weight", "rho", "mask")}
        kept = {"mean": layer.weight.detach()[layer.mask].cpu(), "rho": layer.rho.detach()[layer.mask].cpu()}
        layers[name] = {"shape": list(layer.mask.shape), "bits": pack_bits(layer.mask).cpu(), "spread": layer.spread, **kept}
    rest = {plain_name(name): value.cpu() for name, value in root.state_dict().items() if plain_name(name) not in gone}
    return {"format": _FORMAT, "layers": layers, "rest": rest}


def stored_bytes(root: nn.Module) -> int:
    """Bytes of the numbers in :func:`sparse_state`; a file holds some thousand more."""
    layers = bayes_layers(root)
    sizes = {plain_name(name): value.numel() * value.element_size() for name, value in root.state_dict().items()}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        del sizes[f"{prefix}rho"], sizes[f"{prefix}mask"]
        number, active, item = layer.mask.numel(), int(layer.mask.sum()), layer.weight.element_size() + layer.rho.element_size()
        sizes[f"{prefix}weight"] = math.ceil(number / 8) + active * item
    return sum(sizes.values())


def save_sparse(root: nn.Module, path: str | Path) -> int:
    """Write :func:`sparse_state` to a file; returns the file's bytes."""
    buffer = io.BytesIO()
    torch.save(sparse_state(root), buffer)
    write_atomically(Path(path), buffer.getvalue())
    return len(buffer.getvalue())


def read_sparse(path: str | Path) -> dict[str, Any]:
    """Undo :func:`save_sparse`.

    Raises:
        ValueError: The file holds something else.
    """
    state: Any = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is no sparse posterior: expected a file of save_sparse; checkpoints are loaded as usual")
    return dict(state)


@torch.no_grad()
def load_sparse(root: nn.Module, state: Mapping[str, Any] | str | Path) -> None:
    """Fill a module, converted or not, with a stored posterior.

    Args:
        root: Built like the one that was saved.
        state: From :func:`sparse_state`, or the file's path.

    Raises:
        ValueError: It is of another module.
    """
    state = read_sparse(state) if isinstance(state, str | Path) else state
    names = _fitting(root, state)
    if missing := [name for name in names if name not in bayes_layers(root)]:
        to_bayes(root, missing)
    for name, layer in bayes_layers(root).items():
        saved = state["layers"][name]
        mask = unpack_bits(saved["bits"], saved["shape"]).to(layer.mask.device)
        layer.spread = saved["spread"]
        layer.mask.copy_(mask)
        for parameter, key in ((layer.weight, "mean"), (layer.rho, "rho")):
            parameter.zero_().masked_scatter_(mask, saved[key].to(parameter.device, parameter.dtype))
    _load_rest(root, state)


def _fitting(root: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the stored layers, all of which the module has in the same shape."""
    there: dict[str, nn.Module] = {**bayes_layers(root)}
    there |= (
        choose_layers(root, [name for name in state["layers"] if name and name not in there]) if set(state["layers"]) - set(there) else {}
    )
    for name, saved in state["layers"].items():
        shape = list(getattr(there[name], "weight").shape) if name in there else None  # noqa: B009
        if shape != saved["shape"]:
            raise ValueError(
                f"the stored posterior has {name} of shape {saved['shape']}, this {type(root).__name__} {shape}: build it alike"
            )
    return list(state["layers"])


def _load_rest(root: nn.Module, state: Mapping[str, Any]) -> None:
    own = {plain_name(name): name for name in root.state_dict()}
    missing, unexpected = root.load_state_dict({own.get(name, name): value for name, value in state["rest"].items()}, strict=False)
    layers = {f"{name}.{part}" if name else part for name in state["layers"] for part in ("weight", "rho", "mask")}
    odd = [name for name in (*missing, *unexpected) if plain_name(name) not in layers]
    if odd:
        raise ValueError(f"the stored posterior is of another module: {', '.join(odd[:6])} don't fit; build it alike")


class ThinLayer(nn.Module):
    """A Bayes layer for prediction that holds active weights alone; its matrix exists while it is called.

    Args:
        layer: A layer of the ordinary type, for its settings; its weight is thrown away.
        saved: Entry of :func:`sparse_state`.
    """

    places: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, layer: nn.Module, saved: Mapping[str, Any]) -> None:
        super().__init__()
        self.shape = tuple(saved["shape"])
        kind = type(layer) if isinstance(layer, BayesLayer) else BAYES[type(layer)]
        self._product, self.bias = kind.product, getattr(layer, "bias", None)
        object.__setattr__(self, "_settings", layer)  # not a submodule: its weight is no longer there
        layer._parameters["weight"] = None
        places = unpack_bits(saved["bits"], [saved["bits"].numel() * 8])[: torch.Size(self.shape).numel()].nonzero().flatten()
        self.register_buffer("places", places.to(torch.int32), persistent=False)
        self.register_buffer("mean", saved["mean"], persistent=False)
        std = posterior_std(saved["rho"], None, saved["spread"])
        padding = getattr(layer, "padding_idx", None)
        self.register_buffer("std", std if padding is None else std * (places // self.shape[1] != padding), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer: with one draw of the active weights, or their means."""
        values = self.mean + self.std * torch.randn_like(self.mean) if drawn() == "weights" else self.mean
        weight = values.new_zeros(torch.Size(self.shape).numel()).index_put_((self.places.long(),), values).view(self.shape)
        return self._product(self._settings, x, weight, self.bias)  # type: ignore[arg-type]


def predictor(root: nn.Module, state: Mapping[str, Any] | str | Path) -> nn.Module:
    """Turn a module, built like the one that was saved, into one that predicts from stored active weights, in place.

    No dense weight is kept: each layer makes its own while it is called. Predict under ``drawing("weights")``, or by
    :func:`~lit_methods.bayes.prediction.posterior_logits`. It can't be trained.

    Args:
        root: Not the layer itself, but a module that holds it.
        state: From :func:`sparse_state`, or the file's path.

    Returns:
        ``root`` in evaluation mode.
    """
    state = read_sparse(state) if isinstance(state, str | Path) else state
    names = _fitting(root, state)
    _load_rest(root, state)
    modules = plain_modules(root)
    thin = {id(modules[name]): ThinLayer(modules[name], state["layers"][name]) for name in names}
    for part in list(root.modules()):
        for own, child in list(part._modules.items()):
            if id(child) in thin:  # also where the layer stands a second time
                part._modules[own] = thin[id(child)]
    return root.eval().requires_grad_(False)


__all__ = ["ThinLayer", "load_sparse", "predictor", "read_sparse", "save_sparse", "sparse_state", "stored_bytes"]
