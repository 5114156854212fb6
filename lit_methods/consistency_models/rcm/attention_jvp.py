"""Softmax attention with its tangent, block by block, in memory linear in the number of tokens.

Continuous-time consistency models need the derivative of a network along a direction, while attention that never holds the whole
matrix of scores has none in PyTorch. Here one pass over blocks of keys gives the output, its tangent and the log-sum-exp of the scores, by
the recurrence of rCM (arXiv:2510.08431), which extends that of FlashAttention-2 (arXiv:2307.08691). Golden vectors: torch.func.jvp of plain
attention, checked with NVlabs/rcm@5b41aa9 rcm/utils/flash_attention_jvp_triton.py. Left out: masks, dropout, causal attention.

Three ways in:

- :func:`attention_with_tangent` for layers that pass values and tangents on, side by side; the tangent takes no part in autograd.
- :func:`blockwise_attention` in any network, which ``torch.func.jvp`` and ``backward`` then go through.
- :func:`plain_attention`, the same in three lines, with memory quadratic in the number of tokens.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_methods import checks

Backend = Literal["auto", "torch", "triton"]


class Attention(NamedTuple):
    """What attention gives.

    Attributes:
        output: (B, H, S, D_v), dtype of ``v``.
        tangent: Its derivative along the tangents of the inputs, the same shape and dtype.
        lse: (B, H, S) natural logarithm of the sum of exponentiated scores, float32 or wider.
    """

    output: Tensor
    tangent: Tensor
    lse: Tensor


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log-sum-exp of the scores, through the whole matrix of scores; arguments as everywhere here."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangent_q: Tensor,
    tangent_k: Tensor,
    tangent_v: Tensor,
    scale: float | None = None,
    block_size: int = 256,
    backend: Backend = "auto",
) -> Attention:
    """Attention and its derivative along a direction, in one pass.

    ``output`` can be differentiated with respect to q, k and v; ``tangent`` and ``lse`` are constants to autograd, so that no derivative of
    a derivative is ever taken, and the tangents of the inputs get no gradient.

    Args:
        q: (B, H, S, D) floating point; half precision is summed in float32.
        k: (B, H, S_kv, D), S_kv >= 1.
        v: (B, H, S_kv, D_v).
        tangent_q: Like ``q``.
        tangent_k: Like ``k``.
        tangent_v: Like ``v``.
        scale: Factor of the scores; None: 1 / sqrt(D).
        block_size: Queries and keys at a time; any number from 1 on, and no need to divide S.
        backend: ``auto``: the Triton kernel on CUDA where it can run, else PyTorch. The kernel sums in float32.

    Raises:
        ValueError: Shapes that don't fit, or an unknown backend.
    """
    _check(q, k, v, block_size)
    for name, primal, tangent in (("q", q, tangent_q), ("k", k, tangent_k), ("v", v, tangent_v)):
        if primal.shape != tangent.shape:
            raise ValueError(f"tangent_{name} is {tuple(tangent.shape)} and {name} {tuple(primal.shape)}: give tangents of the same shapes")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Attention(*_AttentionWithTangent.apply(q, k, v, tangent_q, tangent_k, tangent_v, scale, block_size, _choose(backend, q, v)))


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block_size: int = 256, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention that ``torch.func.jvp`` can go through in linear memory; arguments as in :func:`attention_with_tangent`.

    Returns:
        Output (B, H, S, D_v) and log-sum-exp (B, H, S); both may be differentiated once, forwards or backwards.
    """
    _check(q, k, v, block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output, lse = _BlockwiseAttention.apply(q, k, v, scale, block_size, _choose(backend, q, v))
    return output, lse


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape[2] != v.shape[2] or k.shape[2] < 1:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} don't fit: give (B, H, S, D), (B, H, S_kv, D), (B, H, S_kv, D_v), "
            "with at least one key"
        )
    checks.at_least(1, block_size=block_size)


def _choose(backend: str, q: Tensor, v: Tensor) -> str:
    checks.one_of(("auto", "torch", "triton"), backend=backend)
    if backend != "auto":
        return backend
    if not q.is_cuda or q.dtype == torch.float64 or q.shape[-1] != v.shape[-1] or q.shape[-1] not in (16, 32, 64, 128):
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch"
    return "triton"


def _accumulator(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _sweep(
    q: Tensor, k: Tensor, v: Tensor, tangents: tuple[Tensor, Tensor, Tensor] | None, scale: float, block_size: int, backend: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Output, its tangent, log-sum-exp, its tangent; the tangents are None without tangents of the inputs."""
    if backend == "triton":
        from lit_methods.consistency_models.rcm.attention_jvp_triton import sweep

        return sweep(q, k, v, tangents, scale)
    wide = _accumulator(q, k, v)
    output, lse = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=wide)
    tangent, lse_tangent = (torch.empty_like(output), torch.empty_like(lse)) if tangents is not None else (None, None)
    with torch.autocast(q.device.type, enabled=False):
        for rows in _blocks(q.shape[2], block_size):
            q_block = q[:, :, rows].to(wide)
            maximum = q_block.new_full(q_block.shape[:3], -math.inf)
            total, drift = torch.zeros_like(maximum), torch.zeros_like(maximum)  # l and r of the recurrence
            values = q_block.new_zeros(*q_block.shape[:3], v.shape[3])
            moved = torch.zeros_like(values)  # A and B together: they are scaled alike
            for columns in _blocks(k.shape[2], block_size):
                k_block, v_block = k[:, :, columns].to(wide), v[:, :, columns].to(wide)
                scores = q_block @ k_block.mT * scale
                higher = torch.maximum(maximum, scores.amax(-1))
                shrink = (maximum - higher).exp()
                p = (scores - higher[..., None]).exp_()
                total = total * shrink + p.sum(-1)
                values = values * shrink[..., None] + p @ v_block
                if tangents is not None:
                    tk, tv = (one[:, :, columns].to(wide) for one in tangents[1:])
                    tq_block = tangents[0][:, :, rows].to(wide)
                    weighted = (tq_block @ k_block.mT + q_block @ tk.mT).mul_(scale).mul_(p)
                    moved = moved * shrink[..., None] + p @ tv + weighted @ v_block
                    drift = drift * shrink + weighted.sum(-1)
                maximum = higher
            values = values / total[..., None]
            output[:, :, rows] = values.to(output.dtype)
            lse[:, :, rows] = maximum + total.log()
            if tangent is not None and lse_tangent is not None:
                drift = drift / total
                tangent[:, :, rows] = (moved / total[..., None] - drift[..., None] * values).to(tangent.dtype)
                lse_tangent[:, :, rows] = drift
    return output, tangent, lse, lse_tangent


def _backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: the probabilities are computed again, from the log-sum-exp (FlashAttention-2, Algorithm 2)."""
    wide = lse.dtype
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = (torch.zeros(one.shape, dtype=wide, device=one.device) for one in (q, k, v))
        slope = (grad.to(wide) * output.to(wide)).sum(-1)
        if grad_lse is not None:
            slope = slope - grad_lse.to(wide)
        for rows in _blocks(q.shape[2], block_size):
            q_block, grad_block = q[:, :, rows].to(wide), grad[:, :, rows].to(wide)
            for columns in _blocks(k.shape[2], block_size):
                k_block, v_block = k[:, :, columns].to(wide), v[:, :, columns].to(wide)
                p = (q_block @ k_block.mT * scale - lse[:, :, rows, None]).exp_()
                dv[:, :, columns] += p.mT @ grad_block
                ds = (grad_block @ v_block.mT - slope[:, :, rows, None]).mul_(p).mul_(scale)
                dq[:, :, rows] += ds @ k_block
                dk[:, :, columns] += ds.mT @ q_block
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _AttentionWithTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *settings: Any) -> Any:  # type: ignore[override]
        output, tangent, lse, _ = _sweep(q, k, v, (tq, tk, tv), *settings)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.mark_non_differentiable(tangent, lse)
        ctx.settings = settings
        return output, tangent, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        scale, block_size, _ = ctx.settings
        return *_backward(q, k, v, output, lse, grad, None, scale, block_size), *(None,) * 6


class _Tangents(torch.autograd.Function):
    """The tangents alone. As a function of its own, because torch.func unwraps its tensors, which a kernel needs, at such a call only."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *settings: Any) -> Any:  # type: ignore[override]
        _, tangent, _, lse_tangent = _sweep(q, k, v, (tq, tk, tv), *settings)
        return tangent, lse_tangent

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> Any:
        if any(tangent is not None for tangent in given[:6]):
            raise NotImplementedError(
                "blockwise_attention has a first derivative only: use plain_attention for the derivative of a derivative"
            )
        return None, None


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Any:  # type: ignore[override]
        output, _, lse, _ = _sweep(q, k, v, None, *settings)
        return output, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.save_for_forward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> Any:
        primals = ctx.saved_tensors[:3]
        tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(primals, given[:3], strict=True))
        return _Tangents.apply(*primals, *tangents, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        scale, block_size, _ = ctx.settings
        return *_backward(q, k, v, output, lse, grad, grad_lse, scale, block_size), None, None, None
