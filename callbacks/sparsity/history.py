"""What masks have been through, and masks as bits for checkpoints. Nothing here knows Lightning."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.callbacks.sparsity.dynamics import MaskChange, intersection, mask_change, union

Kind = Literal["first", "last", "ever", "always"]
Masks = Mapping[str, Tensor]
_NEXT: dict[str, Callable[[Masks, Masks], Masks]] = {
    "first": lambda old, new: {**new, **old},
    "last": lambda old, new: new,
    "ever": union,
    "always": intersection,
}


class MaskHistory:
    """Masks of the past, name -> bool tensor, each on the device on which it was given.

    Args:
        kinds: What is remembered: the ``first`` masks, the ``last`` ones, which positions were ``ever`` and which ``always`` active.

    Attributes:
        first: First mask of each weight.
        last: Last one.
        ever: Union of all so far.
        always: Intersection of all so far.
    """

    def __init__(self, *kinds: Kind) -> None:
        self.kinds = kinds
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.ever: dict[str, Tensor] = {}
        self.always: dict[str, Tensor] = {}

    def note(self, masks: Masks) -> None:
        """Take in masks; weights that aren't named stay as they are."""
        for kind in self.kinds:
            known: dict[str, Tensor] = getattr(self, kind)
            known |= _NEXT[kind](known, masks)

    def change(self, masks: Masks) -> MaskChange | None:
        """From the last masks to these; None if they are the same."""
        before = {name: self.last[name] for name in masks if name in self.last}
        same = all(torch.equal(mask, masks[name]) for name, mask in before.items())
        return None if same else mask_change(before, masks)

    def state(self, **kinds: Kind) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: key -> the masks of that kind, on the CPU."""
        return {key: {name: mask.cpu() for name, mask in getattr(self, kind).items()} for key, kind in kinds.items()}

    def load(self, state: Mapping[str, Any], weights: Mapping[str, Tensor], **kinds: Kind) -> None:
        """Undo :meth:`state`; masks go to the device of the weight of their name."""
        for key, kind in kinds.items():
            setattr(self, kind, {name: mask.to(weights[name].device) for name, mask in state[key].items() if name in weights})


def flips(before: Masks, after: Masks) -> Tensor:
    """How many entries differ, over the weights that both name: a scalar on the first mask's device."""
    counts = [(mask != before[name].to(mask.device)).sum() for name, mask in after.items() if name in before]
    return torch.stack([count.to(counts[0].device) for count in counts]).sum() if counts else torch.zeros((), dtype=torch.int64)


def pack_bits(mask: Tensor, *, low_first: bool = False) -> Tensor:
    """A bool mask as (bytes,) uint8, eight entries each, the last one filled up with 0.

    Args:
        mask: Any shape.
        low_first: The first of eight entries is the lowest bit; False: the highest, as in ``numpy.packbits``.
    """
    bits = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << _places(mask.device, low_first)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int], *, low_first: bool = False) -> Tensor:
    """Undo :func:`pack_bits`."""
    bits = (packed[:, None] >> _places(packed.device, low_first)) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(*shape)


def _places(device: torch.device, low_first: bool) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=device)
    return places if low_first else places.flip(0)


def pack(masks: Masks) -> dict[str, Any]:
    """Masks for a checkpoint, a bit per weight: name -> ``shape`` and ``bits``."""
    return {name: {"shape": list(mask.shape), "bits": pack_bits(mask)} for name, mask in masks.items()}


def unpack(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo :func:`pack`."""
    return {name: unpack_bits(entry["bits"], entry["shape"]) for name, entry in packed.items()}
