"""Chosen entries of a weight that are trained as one vector. Nothing here knows Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.callbacks.fine_tuning.delta import Entry
from lit_methods.callbacks.fine_tuning.sara import core
from lit_methods.callbacks.sparsity.parametrized import LatentWeight, ParametrizedWeight


class SelectedEntries(LatentWeight):
    """Parametrisation: the frozen weight, as a function of its entries that are trained.

    Args:
        weight: P.
        index: (k,) integers, ascending positions in the flattened weight.
    """

    index: Tensor

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        whole = torch.int32 if weight.numel() < 2**31 else torch.int64  # half of the memory
        self.register_buffer("index", index.to(whole), persistent=False)
        values = weight.detach().flatten().index_select(0, index)
        self.values = nn.Parameter(values.to(torch.promote_types(values.dtype, torch.float32)))  # small steps are lost in bfloat16

    def forward(self, weight: Tensor) -> Tensor:
        """The weight; its gradient reaches the entries alone."""
        return core.scattered(self.values, weight, self.index)

    def neutral_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The entries of a weight that is loaded."""
        if len(self.index) and weight.numel() <= int(self.index[-1]):
            return {"values": self.values.detach()}  # another shape, which the weight's own error names
        return {"values": weight.detach().flatten().index_select(0, self.index.to(weight.device)).to(self.values.dtype)}


class SelectedLayer:
    """One weight, or bias, of which some entries are trained.

    Args:
        module: Owner of the weight.
        attribute: Its name in the owner.
        index: (k,) int64, ascending positions in the flattened weight.

    Attributes:
        active: (k,) bool: still trained, once re-selection has frozen some; None: all.
        frozen: (k,) values as they were then.
    """

    def __init__(self, module: nn.Module, attribute: str, index: Tensor) -> None:
        self.module, self.attribute = module, attribute
        weight: Any = getattr(module, attribute)
        self._layer = ParametrizedWeight(module, attribute, SelectedEntries(weight, index))
        self.active: Tensor | None = None
        self.frozen: Tensor | None = None

    @property
    def values(self) -> nn.Parameter:
        """The entries that are trained."""
        return self._layer.parametrization.values

    @property
    def index(self) -> Tensor:
        """Where they stand."""
        return self._layer.parametrization.index

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight, which holds the entries, too."""
        return self._layer.latent

    def attach(self) -> None:
        """Put the parametrisation on."""
        self._layer.attach()

    def detach(self) -> None:
        """An ordinary weight again, with what was learned."""
        self.follow()
        self._layer.detach()

    @torch.no_grad()
    def follow(self) -> None:
        """Undo what a step did to frozen entries, and let the dense weight hold the trained ones; behind each step of the optimiser."""
        values = self.values.detach()
        if self.active is not None and self.frozen is not None:
            values.copy_(torch.where(self.active, values, self.frozen))
        core.scatter_(values, self.weight.data, self.index)

    def freeze_outside(self, active: Tensor) -> None:
        """Train these entries alone from now on; the others keep their values."""
        self.active, self.frozen = active, self.values.detach().clone()

    def mask(self) -> Tensor:
        """Dense mask of what is trained now, bool."""
        mask = torch.zeros(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        index = self.index if self.active is None else self.index[self.active]
        return mask.put_(index.long(), torch.ones(len(index), dtype=torch.bool, device=mask.device))

    def entry(self) -> Entry:
        """What was learned."""
        return Entry(self.index.cpu().long(), self.values.detach().to("cpu", self.weight.dtype).clone(), replaces=True)


__all__ = ["SelectedEntries", "SelectedLayer"]
