"""Predictions of a Bayesian network: the mean of several softmaxes, each of one draw of all weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_methods.bayes.layers import drawing
from lit_methods.bayes.variational import mixture_log_probabilities
from lit_methods.seeds import own_seed


@contextmanager
def numbers_of(place: str, seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global random numbers follow from place and seed alone; afterwards they go on as before."""
    kind = device.type
    devices = [] if kind == "cpu" else [device.index if device.index is not None else 0]
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
        torch.random.default_generator.manual_seed(own_seed(place, seed))
        if devices:
            torch.get_device_module(device).manual_seed(own_seed(place, seed))
        yield


def posterior_logits(call: Callable[[], Tensor], samples: int, seed: int, device: torch.device) -> Tensor:
    """Log of the mean softmax over draws of the weights; draw k is the same network for every batch.

    No copy of the network is made: each layer makes its drawn weight when it is called, and lets it go.

    Args:
        call: Runs the network and returns (B, C) logits.
        samples: K, draws.
        seed: Of the draws.
        device: Where the network runs.

    Returns:
        (B, C) log-probabilities, float32 or wider.

    Raises:
        ValueError: The network returns something else.
    """
    found = []
    for draw in range(samples):
        with numbers_of(f"posterior {draw}", seed, device), drawing("weights"):
            logits = call()
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            way = "name what returns logits, or set samples to 0 to evaluate the mean"
            raise ValueError(f"softmaxes of several draws are averaged, but {shape} came out instead of (B, classes) logits: {way}")
        found.append(logits)
    return mixture_log_probabilities(torch.stack(found))


__all__ = ["numbers_of", "posterior_logits"]
