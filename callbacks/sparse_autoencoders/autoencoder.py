"""What a module must have to be judged as a sparse autoencoder, and where it is found."""

import operator
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

PARTS = ("encode", "decode", "decoder_directions", "decoder_bias")


@runtime_checkable
class Autoencoder(Protocol):
    """A dictionary of h features of d numbers.

    Attributes:
        encode: (B, d) activations -> (B, h) features.
        decode: (B, h) features -> (B, d) reconstructions, features @ decoder_directions + decoder_bias.
        decoder_directions: (h, d).
        decoder_bias: (d,).
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    decoder_directions: Tensor
    decoder_bias: Tensor


def find_autoencoder(module: nn.Module, name: str | None) -> Any:
    """The module itself, or what it holds under a name.

    Args:
        module: A LightningModule, say.
        name: Dotted name of an attribute; None: the module itself.

    Raises:
        ValueError: There is none, or it lacks a part; the message names those submodules that have all.
    """
    try:
        found = module if name is None else operator.attrgetter(name)(module)
        missing = [part for part in PARTS if not hasattr(found, part)]
    except AttributeError:
        found, missing = None, list(PARTS)
    if not missing:
        return found
    fitting = [f"autoencoder: {other}" for other, part in module.named_modules() if other and all(hasattr(part, one) for one in PARTS)]
    what = f"autoencoder={name!r} of {type(module).__name__}"
    lacks = f"{what} doesn't exist" if found is None else f"{what} is a {type(found).__name__} without {', '.join(missing)}"
    way = f"set {' or '.join(fitting)}" if fitting else "name one with encode, decode, decoder_directions (h, d) and decoder_bias (d,)"
    raise ValueError(f"{lacks}: {way}")


@torch.no_grad()
def linear_decoder(autoencoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (h, d) and bias (d,) in the units of the activations, so that x_hat = features @ directions + bias.

    Where the autoencoder has divided its inputs by an ``input_scale``, both are multiplied by it. Then the effect of a feature on an
    activation is its value times its direction.

    Args:
        autoencoder: What :func:`find_autoencoder` gives.
        x: (B, d) activations to try it with.

    Raises:
        ValueError: Its reconstruction is something else, or shapes don't fit.
    """
    features = autoencoder.encode(x).float()
    directions, bias = autoencoder.decoder_directions.detach().float(), autoencoder.decoder_bias.detach().float()
    if directions.ndim != 2 or features.shape[1:] != directions.shape[:1] or not x.shape[1:] == bias.shape == directions.shape[1:]:
        shapes = f"features are {tuple(features.shape)}, decoder_directions {tuple(directions.shape)}, decoder_bias {tuple(bias.shape)}"
        raise ValueError(f"activations are {tuple(x.shape)}, {shapes}: expected (B, d), (B, h), (h, d) and (d,)")
    scale = getattr(autoencoder, "input_scale", 1.0)
    directions, bias = directions * scale, bias * scale
    reconstruct = getattr(autoencoder, "reconstruct", None)
    found = (autoencoder.decode(autoencoder.encode(x)) if reconstruct is None else reconstruct(x)).float()
    expected = features @ directions + bias
    gap = float((found - expected).norm() / found.norm().clamp(min=torch.finfo(found.dtype).tiny))
    if gap > 1e-2:
        raise ValueError(
            f"its reconstruction differs from encode(x) @ decoder_directions + decoder_bias by {gap:.2g} of its length: features have no "
            "fixed direction in the activations, as where each sample is normalised by itself; normalise the data instead"
        )
    return directions, bias


__all__ = ["Autoencoder", "find_autoencoder", "linear_decoder"]
