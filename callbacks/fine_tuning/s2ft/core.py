"""Structured sparse fine-tuning: which heads and channels, how weights are permuted, and a linear layer of which one slice is trained.

Paper: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, arXiv:2412.06289, NeurIPS 2024. Code of the
authors: Infini-AI-Lab/S2FT at commit a58edbb (``s2ft/s2.py``, ``experiments/utils/s2_utils.py``). Left out: trainer, baselines.

Weights are (out, in), as in y = x W^T + b. A unit is a head of an attention or a channel of an MLP: some rows of the weights that produce
it, and some columns of the weight that consumes it.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["column", "row"]
"""Which slice of a weight is trained, in the authors' words: ``column``: some outputs, rows of W; ``row``: some inputs, columns of W."""

# ---- selection -------------------------------------------------------------------------------------------------------------------------


def select_units(
    units: Sequence[int],
    ratio: float,
    generator: torch.Generator | None = None,
    scores: Sequence[Tensor] | None = None,
    largest: bool = True,
) -> list[Tensor]:
    """Choose int(ratio x all units) of the whole model; layers get uneven numbers.

    Args:
        units: Units of each layer, heads or channels.
        ratio: Share of all units, in [0, 1].
        generator: For the random choice, uniform without replacement.
        scores: Instead of a random choice: a score of each unit, (units,) per layer, on any device.
        largest: Take those with the largest scores, else the smallest; equal ones in the order of layers and units.

    Returns:
        Per layer the chosen units, ascending, (k,) int64 on the CPU.
    """
    total = sum(units)
    count = int(total * ratio)
    if scores is None:
        chosen = torch.randperm(total, generator=generator)[:count]
    else:
        flat = torch.cat([score.detach().flatten().cpu().double() for score in scores]) if scores else torch.zeros(0)
        chosen = flat.argsort(descending=largest, stable=True)[:count]
    mask = torch.zeros(total, dtype=torch.bool)
    mask[chosen] = True
    return [part.nonzero().flatten() for part in mask.split(list(units))]


def row_norms(weight: Tensor, units: int) -> Tensor:
    """Norm of what produces each unit: (units x r, in) -> (units,)."""
    return weight.detach().reshape(units, -1).norm(dim=1)


def column_norms(weight: Tensor, units: int) -> Tensor:
    """Norm of what consumes each unit: (out, units x r) -> (units,)."""
    return weight.detach().reshape(len(weight), units, -1).transpose(0, 1).reshape(units, -1).norm(dim=1)


# ---- permutation -----------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the units of a layer stand once it is permuted.

    Attributes:
        order: (units,) int64: place -> unit; [only column, both, only row, rest], each ascending.
        column: First place of the column slice, and the one behind its last.
        row: The same of the row slice.
    """

    order: Tensor
    column: tuple[int, int]
    row: tuple[int, int]


def unit_layout(units: int, column: Tensor, row: Tensor) -> Layout:
    """Order the units so that both selections are contiguous.

    Args:
        units: How many there are.
        column: (k,) int64: units whose producing rows are trained; any order.
        row: (k',) int64: units whose consuming columns are trained; the two may overlap.
    """
    place = torch.full((units,), 3)
    place[row.long()] = 2
    place[column.long()] -= 2  # 3 -> 1, only column; 2 -> 0, both
    group = torch.tensor([1, 0, 2, 3])[place]
    order = group.argsort(stable=True)
    first, both, last = (int((group == number).sum()) for number in range(3))
    return Layout(order, (0, first + both), (first, first + both + last))


def expanded(order: Tensor, size: int, sections: int = 1) -> Tensor:
    """Order of units -> order of rows.

    Args:
        order: (units,) int64.
        size: Rows of a unit.
        sections: Blocks of the weight, one behind the other, that each have all units, such as q, k and v in one weight.

    Returns:
        (sections x units x size,) int64.
    """
    inside = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    return torch.cat([inside + section * len(inside) for section in range(sections)])


# ---- the layer -------------------------------------------------------------------------------------------------------------------------


class _PartialLinear(torch.autograd.Function):
    """x W^T + b with a trained slice; saved for the backward pass is what the slice needs of x, and nothing else of it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, start: int, kind: Kind
    ) -> Tensor:
        delta_ = delta.to(x.dtype)
        ctx.start, ctx.kind = start, kind
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if kind == "column":
            ctx.save_for_backward(x, weight, delta)
            y[..., start : start + len(delta)] += x @ delta_.T
        else:
            part = x[..., start : start + delta.shape[1]].clone()  # a view would keep all of x
            ctx.save_for_backward(part, weight, delta)
            y += part @ delta_.T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:  # type: ignore[override]
        saved, weight, delta = ctx.saved_tensors
        column, start = ctx.kind == "column", ctx.start
        part = grad[..., start : start + len(delta)] if column else grad
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
            through = part @ delta.to(grad.dtype)
            if column:
                grad_x += through
            else:
                grad_x[..., start : start + delta.shape[1]] += through
        grad_delta = None
        if ctx.needs_input_grad[3]:
            outputs, inputs = part.reshape(-1, delta.shape[0]), saved.reshape(-1, delta.shape[1])
            grad_delta = (outputs.T @ inputs).to(delta.dtype)
        return grad_x, None, None, grad_delta, None, None


def s2_linear(x: Tensor, weight: Tensor, delta: Tensor, start: int, kind: Kind, bias: Tensor | None = None) -> Tensor:
    """A linear layer with W frozen and the delta S of one slice trained: partial back-propagation.

    ``column``: y = x W^T + b, and y[..., s:e] += x S^T. ``row``: y = x W^T + b + x[..., s:e] S^T.

    Args:
        x: (..., in) floating point, any rank. Under autocast it is computed in autocast's dtype.
        weight: W (out, in), gets no gradient.
        delta: S, (e - s, in) or (out, e - s); its gradient has its own dtype.
        start: s.
        kind: See above.
        bias: b (out,) or None, gets no gradient.

    Returns:
        y (..., out).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _PartialLinear.apply(x, weight, bias, delta, start, kind)  # type: ignore[no-any-return]


def fused_weight(weight: Tensor, delta: Tensor, start: int, kind: Kind) -> Tensor:
    """W with S added to its slice; a new tensor of W's dtype.

    Args:
        weight: W (out, in).
        delta: S, as :func:`s2_linear` takes it.
        start: First row or column of the slice.
        kind: ``column``: S is added to rows of W; ``row``: to columns.
    """
    fused = weight.detach().clone()
    dim, size = (0, delta.shape[0]) if kind == "column" else (1, delta.shape[1])
    fused.narrow(dim, start, size).add_(delta.detach().to(fused.dtype))
    return fused


# ---- serving ---------------------------------------------------------------------------------------------------------------------------


def batched_delta(x: Tensor, index: Tensor, values: Tensor, which: Tensor, kind: Kind, outputs: int) -> Tensor:
    """What each request's own delta adds to the output of a layer whose base all requests share.

    Args:
        x: (B, ..., in) inputs.
        index: (N, k) int64: trained rows (``column``) or columns (``row``) of each of N deltas; shorter ones are filled up with any index.
        values: (N, k, in) or (N, out, k); 0 where filled up.
        which: (B,) int64: the delta of each request; -1: none.
        kind: ``column`` or ``row``.
        outputs: Width of the layer's output.

    Returns:
        (B, ..., out), to be added to x W^T + b.
    """
    flat = x.reshape(len(x), -1, x.shape[-1])
    own = which.clamp(min=0)
    chosen, some = index[own], values[own].to(x.dtype) * (which >= 0)[:, None, None]
    if kind == "row":
        inputs = flat.gather(2, chosen[:, None].expand(-1, flat.shape[1], -1))
        added = inputs @ some.transpose(1, 2)
    else:
        added = flat.new_zeros(*flat.shape[:2], outputs)
        added.scatter_add_(2, chosen[:, None].expand(-1, flat.shape[1], -1), flat @ some.transpose(1, 2))
    return added.reshape(*x.shape[:-1], outputs)


__all__ = ["batched_delta", "fused_weight", "s2_linear", "select_units", "unit_layout"]
