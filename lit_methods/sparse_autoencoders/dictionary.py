"""Codes and dictionaries: sparse codes and products with them, rows of unit norm, input normalisation, losses.

A code z (B, h) has few entries other than 0. As :class:`SparseCode` it holds these alone, and what is computed with it costs as much as
there are entries: decoding k of h features needs no (B, h) x (h, d) product, forward or backward. The pieces are common to the published
sparse autoencoders; techniques name their sources.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Normalization = Literal["none", "sample", "norm_1", "norm_sqrt"]
LossScale = Literal["mean", "sum", "half_sum"]
EncoderStart = Literal["kaiming", "decoder"]
DENSE_FROM = 1 / 8  # share of entries from which dense products are taken; on two CPU cores sparse ones were faster at 1/16


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SparseCode(NamedTuple):
    """The entries of a code (B, h) that may differ from 0; n of them, all other entries are 0.

    Attributes:
        values: (n,) floating point.
        rows: (n,) int64, ascending: whose sample each entry is.
        columns: (n,) int64: which feature.
        shape: (B, h).
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """The code as (B, h), with gradient."""
        flat = self.rows * self.shape[1] + self.columns
        zeros = self.values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.index_put((flat,), self.values).view(self.shape)

    def is_dense(self) -> bool:
        """Whether so many entries are kept that dense products are faster."""
        return len(self.values) >= DENSE_FROM * math.prod(self.shape)


Code = Tensor | SparseCode


def dense(code: Code) -> Tensor:
    """A code of either form as (B, h)."""
    return code if isinstance(code, Tensor) else code.dense()


class _Entries(torch.autograd.Function):
    """u[rows, columns] whose gradient is sparse, too."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, columns)
        ctx.shape = u.shape
        return u[rows, columns]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, columns = ctx.saved_tensors
        if len(rows) >= DENSE_FROM * ctx.shape.numel():
            return grad.new_zeros(ctx.shape).index_put((rows, columns), grad), None, None
        places = torch.stack([rows, columns])
        return torch.sparse_coo_tensor(places, grad, ctx.shape, check_invariants=False), None, None


def _bags(values: Tensor, bag: Tensor, chosen: Tensor, count: int, table: Tensor) -> Tensor:
    """(count, d): bag b is the sum of values x rows ``chosen`` of the table, over the entries with ``bag`` == b; any order."""
    bag, order = bag.sort(stable=True)
    starts = torch.searchsorted(bag, torch.arange(count, device=bag.device))
    return F.embedding_bag(chosen[order], table, starts, mode="sum", per_sample_weights=values[order].to(table.dtype))


class _Products(torch.autograd.Function):
    """x @ weight.T that takes sparse gradients: backward then costs as much as there are entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight = None, None
        if grad.layout == torch.sparse_coo:
            (rows, columns), values = grad._indices(), grad._values()
            if ctx.needs_input_grad[0]:
                of_x = _bags(values, rows, columns, len(x), weight).to(x.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = _bags(values, columns, rows, len(weight), x).to(weight.dtype)
            return of_x, of_weight
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype)
        return of_x, of_weight


def project(x: Tensor, encoder: Tensor) -> Tensor:
    """Pre-activations x W^T: every input's product with every feature's row.

    Args:
        x: (B, d) floating point.
        encoder: (h, d), a row for each feature.

    Returns:
        (B, h), in the dtype of autocast where that is on. Gradients may be sparse, as those of :func:`keep_entries` are.
    """
    return _Products.apply(x.to(encoder.dtype), encoder)  # type: ignore[no-any-return]


def keep_entries(u: Tensor, rows: Tensor, columns: Tensor) -> SparseCode:
    """The code that has the given entries of ``u`` (B, h) and is 0 elsewhere; gradients flow to these entries alone.

    Args:
        u: (B, h) floating point.
        rows: (n,) int64, ascending.
        columns: (n,) int64; no entry twice.
    """
    return SparseCode(_Entries.apply(u, rows, columns), rows, columns, (u.shape[0], u.shape[1]))


def decode(code: Code, decoder: Tensor) -> Tensor:
    """Sum of the features' directions, each times its entry of the code: z W.

    Args:
        code: (B, h), dense or sparse.
        decoder: (h, d), a row for each feature.

    Returns:
        (B, d), float32 or wider. A sparse code costs n d operations, in forward and backward, and no (B, h) memory.
    """
    if isinstance(code, SparseCode) and not code.is_dense():
        starts = torch.searchsorted(code.rows, torch.arange(code.shape[0], device=code.rows.device))
        weights = code.values.to(decoder.dtype)
        return wide(F.embedding_bag(code.columns, decoder, starts, mode="sum", per_sample_weights=weights))
    z = dense(code)
    return wide(z.to(torch.promote_types(z.dtype, decoder.dtype)) @ decoder)


def unit_rows(weight: Tensor) -> Tensor:
    """(h, d) -> (h, d) with every row divided by its L2 norm; a row of zeros stays."""
    return F.normalize(weight, dim=1)


def project_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """The part of the gradient that turns each row of ``weight`` and doesn't lengthen it.

    Args:
        weight: (h, d); its rows' directions count, whatever their norms.
        grad: (h, d).

    Returns:
        (h, d): grad - (grad . w) w for each unit row w.
    """
    direction = unit_rows(weight)
    return grad - (grad * direction).sum(dim=1, keepdim=True) * direction


def initial_weights(
    width: int, features: int, start: EncoderStart = "kaiming", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Encoder and decoder as BatchTopK's code begins: Kaiming-uniform for a (d, h) matrix; the decoder has the same rows at unit norm.

    Args:
        width: d.
        features: h.
        start: ``kaiming``: rows of the encoder have norms of about sqrt(2 d / h). ``decoder``: they are the decoder's, of norm 1.
        generator: CPU generator; None: the global one.

    Returns:
        encoder, decoder: (h, d) float32 each.
    """
    bound = math.sqrt(6 / features)
    encoder = torch.empty(width, features).uniform_(-bound, bound, generator=generator).T.contiguous()
    decoder = unit_rows(encoder)
    return encoder if start == "kaiming" else decoder.clone(), decoder


def standardize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample with mean 0 and standard deviation 1 over its width.

    Args:
        x: (B, d) floating point, d >= 2.

    Returns:
        normalized: (B, d): (x - mean) / (std + 1e-5).
        mean: (B, 1).
        std: (B, 1), with n - 1 in the denominator. ``normalized * std + mean`` maps back (without the 1e-5, as in the authors' code).
    """
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    std = centred.std(dim=-1, keepdim=True)
    return centred / (std + 1e-5), mean, std


def reconstruction_loss(reconstruction: Tensor, x: Tensor, scale: LossScale = "mean") -> Tensor:
    """Squared error of reconstructions, mean over the batch.

    Args:
        reconstruction: (B, d).
        x: (B, d).
        scale: ``mean``: mean over the width, too. ``sum``: sum over it. ``half_sum``: half of that.

    Returns:
        Scalar, float32 or wider.
    """
    squares = (wide(reconstruction) - wide(x)).square()
    return squares.mean() if scale == "mean" else squares.sum(dim=-1).mean() * (0.5 if scale == "half_sum" else 1.0)


def normalized_mse(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Squared error of a batch over its squared norm: sum |x - x_hat|^2 / sum |x|^2; scalar."""
    return (wide(reconstruction) - wide(x)).square().sum() / wide(x).square().sum()
