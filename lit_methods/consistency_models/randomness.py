"""The same random numbers twice: student and teacher drop the same units."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SameRandomness:
    """Remembers where torch's generators stand, so that a later block can start there again.

    >>> import torch
    >>> same = SameRandomness(torch.device("cpu"))
    >>> first = torch.rand(3)
    >>> with same.again():
    ...     second = torch.rand(3)
    >>> bool((first == second).all())
    True

    The generators go on afterwards from where they were before the block. CPU, and the given CUDA device.

    Args:
        device: Where dropout draws.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(one) for one in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the generators start where they stood when this object was made."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for one, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, one)
            yield
