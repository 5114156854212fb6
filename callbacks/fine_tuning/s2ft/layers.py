"""A layer whose rows or columns stand in another order while a slice of them is trained. Nothing here knows Lightning."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods.callbacks.fine_tuning.delta import Entry
from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.core import Kind


class Slice(NamedTuple):
    """What is trained of a weight, in places of the permuted one.

    Attributes:
        kind: ``column``: rows; ``row``: columns, as the authors call them.
        start: First of them.
        width: How many.
    """

    kind: Kind
    start: int
    width: int


class _Trained:
    """Mixed into the class of a layer with a trained slice."""

    s2_delta: nn.Parameter
    s2_placed: "PlacedLayer"

    def forward(self, x: Tensor) -> Tensor:
        """The layer with W frozen and the slice's delta trained."""
        layer: Any = self
        placed = self.s2_placed
        assert placed.slice is not None
        return core.s2_linear(x, placed.matrix(layer.weight), self.s2_delta, placed.slice.start, placed.slice.kind, layer.bias)


class S2Linear(_Trained, nn.Linear):
    """A linear layer with a trained slice."""


def _trained_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer has while a slice of it is trained."""
    kind = type(layer)
    if kind is nn.Linear:
        return S2Linear
    return type(f"S2{kind.__name__}", (_Trained, kind), {"__module__": __name__})


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x W^T + b in its own ``forward``: a linear layer, or GPT-2's, whose weight is stored (in, out)."""
    of_gpt2 = type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    # the attention of torch takes the weight of its last layer and never calls that
    return of_gpt2 or (plain and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear))


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """A stored weight of a layer, or its gradient, as (out, in): a view."""
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def matrix_of(layer: Any) -> Tensor:
    """The weight of a layer as (out, in), a view."""
    return oriented(layer, layer.weight)


def _original_on_save(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: the fused weight in its original order, under its own name."""
    placed: PlacedLayer = vars(module)["s2_placed"]
    state.pop(f"{prefix}s2_delta", None)
    state.update({f"{prefix}{name}": value for name, value in placed.original(module).items()})


def _permuted_on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: weights in their original order are permuted, and nothing is learned on top of them."""
    placed: PlacedLayer = vars(module)["s2_placed"]
    for name in ("weight", "bias"):
        value, own = state.get(f"{prefix}{name}"), getattr(module, name)
        if isinstance(value, Tensor) and own is not None and value.shape == own.shape:
            state[f"{prefix}{name}"] = placed.permuted(name, value)
    if placed.slice is not None:
        state[f"{prefix}s2_delta"] = torch.zeros_like(module.s2_delta)  # type: ignore[arg-type]


class PlacedLayer:
    """One linear layer, its order and the slice of it that is trained.

    Args:
        layer: As :func:`is_linear` takes it.
        rows: (out,) int64: place -> row, or None: as they are.
        columns: (in,) int64: place -> column, or None.
        part: What is trained, None: nothing.
    """

    def __init__(self, layer: nn.Module, rows: Tensor | None, columns: Tensor | None, part: Slice | None) -> None:
        self.layer, self.rows, self.columns, self.slice = layer, rows, columns, part
        self.transposed = type(layer).__name__ == "Conv1D"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlacedLayer":
        return self  # orders are read alone; copies of the layer say themselves which weights are meant

    def matrix(self, weight: Tensor) -> Tensor:
        """A stored weight as (out, in), a view."""
        return weight.T if self.transposed else weight

    @property
    def values(self) -> nn.Parameter:
        """S, which is trained."""
        layer: Any = self.layer
        return layer.s2_delta  # type: ignore[no-any-return]

    @property
    def base(self) -> Tensor:
        """The slice of W, as S finds it."""
        assert self.slice is not None
        weight: Any = self.layer.weight
        return self.matrix(weight.detach()).narrow(0 if self.slice.kind == "column" else 1, self.slice.start, self.slice.width)

    def permuted(self, name: str, value: Tensor, back: bool = False) -> Tensor:
        """A weight (as it is stored) or bias in our order, or ``back`` in the original one."""
        matrix = self.matrix(value) if name == "weight" else value
        for dim, order in ((0, self.rows), (1, self.columns)):
            if order is not None and dim < matrix.ndim:
                matrix = matrix.index_select(dim, (order.argsort() if back else order).to(matrix.device))
        return self.matrix(matrix) if name == "weight" else matrix

    @torch.no_grad()
    def original(self, layer: Any) -> dict[str, Tensor]:
        """Fused weight, and bias, in the original order: of the layer, or of a copy."""
        matrix = self.matrix(layer.weight.detach())
        if self.slice is not None:
            matrix = core.fused_weight(matrix, layer.s2_delta, self.slice.start, self.slice.kind)
        found = {"weight": self.permuted("weight", self.matrix(matrix), back=True).contiguous()}
        if layer.bias is not None:
            found["bias"] = self.permuted("bias", layer.bias.detach(), back=True)
        return found

    @torch.no_grad()
    def attach(self) -> None:
        """Permute, and let the slice be trained."""
        layer: Any = self.layer
        for name, value in (("weight", layer.weight), ("bias", layer.bias)):
            if value is not None:
                value.data = self.permuted(name, value.data).contiguous()
        layer.s2_placed = self
        if self.slice is not None:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # small steps would be lost in bfloat16
            layer.register_parameter("s2_delta", nn.Parameter(torch.zeros_like(self.base, dtype=dtype).contiguous()))
            self._kind = type(layer)
            layer.__class__ = _trained_class(layer)
        self._handles = [
            layer.register_state_dict_post_hook(_original_on_save),
            layer.register_load_state_dict_pre_hook(_permuted_on_load),
        ]

    @torch.no_grad()
    def detach(self) -> None:
        """An ordinary layer again, fused and in the original order; the parameters are the same objects."""
        layer: Any = self.layer
        for name, value in self.original(layer).items():
            getattr(layer, name).data = value
        for handle in self._handles:
            handle.remove()
        del layer.s2_placed
        if self.slice is not None:
            layer.__class__ = self._kind
            del layer._parameters["s2_delta"]

    @torch.no_grad()
    def entry(self) -> Entry:
        """What was learned, in the original order."""
        assert self.slice is not None
        dim, own, other = (0, self.rows, self.columns) if self.slice.kind == "column" else (1, self.columns, self.rows)
        places = torch.arange(self.slice.start, self.slice.start + self.slice.width)
        index, ascending = (places if own is None else own[places]).sort()
        values = self.values.detach().cpu().index_select(dim, ascending)
        if other is not None:
            values = values.index_select(1 - dim, other.argsort())
        return Entry(index, values.contiguous(), 1 - dim if self.transposed else dim, transposed=self.transposed)


__all__ = ["PlacedLayer", "S2Linear", "Slice", "is_linear", "matrix_of", "oriented"]
