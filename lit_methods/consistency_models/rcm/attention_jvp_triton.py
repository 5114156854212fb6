"""The recurrence of :mod:`~lit_methods.consistency_models.rcm.attention_jvp` as a Triton kernel, for CUDA or Triton's interpreter."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: float = 1.4426950408889634


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr, o_ptr, to_ptr, lse_ptr, tlse_ptr, queries, keys, scale, log2_e,
    TANGENT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all keys; every tensor is contiguous (heads, tokens, D)."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    inside = row < queries
    place = head * queries * D + row[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + place, mask=inside[:, None], other=0.0)
    base_two = scale * log2_e  # exp2 is the fast one
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    values = tl.zeros((ROWS, D), dtype=tl.float32)
    if TANGENT:
        tq = tl.load(tq_ptr + place, mask=inside[:, None], other=0.0)
        moved = tl.zeros((ROWS, D), dtype=tl.float32)
        drift = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, keys, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = column < keys
        spot = head * keys * D + column[:, None] * D + dim[None, :]
        k = tl.load(k_ptr + spot, mask=real[:, None], other=0.0)
        v = tl.load(v_ptr + spot, mask=real[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * base_two
        scores = tl.where(real[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = values * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if TANGENT:
            tk = tl.load(tk_ptr + spot, mask=real[:, None], other=0.0)
            tv = tl.load(tv_ptr + spot, mask=real[:, None], other=0.0)
            slope = tl.dot(tq, tl.trans(k), input_precision="ieee") + tl.dot(q, tl.trans(tk), input_precision="ieee")
            weighted = p * slope * scale  # p is 0 outside
            moved = moved * shrink[:, None] + tl.dot(p.to(v.dtype), tv, input_precision="ieee")
            moved += tl.dot(weighted.to(v.dtype), v, input_precision="ieee")
            drift = drift * shrink + tl.sum(weighted, 1)
        maximum = higher
    values = values / total[:, None]
    tl.store(o_ptr + place, values.to(o_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_ptr + head * queries + row, (maximum + tl.log2(total)) / log2_e, mask=inside)
    if TANGENT:
        drift = drift / total
        tangent = moved / total[:, None] - drift[:, None] * values
        tl.store(to_ptr + place, tangent.to(to_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(tlse_ptr + head * queries + row, drift, mask=inside)


def sweep(
    q: Tensor, k: Tensor, v: Tensor, tangents: tuple[Tensor, Tensor, Tensor] | None, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Output, its tangent, log-sum-exp, its tangent; the tangents are None without tangents of the inputs.

    Args:
        q: (B, H, S, D) float16, bfloat16 or float32, D one of 16, 32, 64, 128; products of half precision, sums in float32.
        k: (B, H, S_kv, D).
        v: (B, H, S_kv, D).
        tangents: Tangents of the three, of the same shapes.
        scale: Factor of the scores.

    Raises:
        ValueError: What the kernel can't do.
    """
    size = q.shape[-1]
    if size not in (16, 32, 64, 128) or v.shape[-1] != size or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"the Triton kernel takes heads of 16, 32, 64 or 128 in float16, bfloat16 or float32, got {size}, {v.shape[-1]} in {q.dtype}: "
            "give backend='torch'"
        )
    heads, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    # one dtype for all: tl.dot doesn't mix them, and tangents often come in float32
    given = [one.to(q.dtype).contiguous() for one in (q, k, v, *(tangents or (q, k, v)))]
    output = torch.empty(*q.shape[:3], size, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tangent, lse_tangent = (torch.empty_like(output), torch.empty_like(lse)) if tangents is not None else (None, None)
    rows = 64 if size <= 64 and q.dtype != torch.float32 else 32
    grid = (triton.cdiv(queries, rows), heads)
    settings: dict[str, Any] = {"TANGENT": tangents is not None, "D": size, "ROWS": rows, "COLUMNS": 32}
    results = (output, output if tangent is None else tangent, lse, lse if lse_tangent is None else lse_tangent)
    _kernel[grid](*given, *results, queries, keys, scale, LOG2_E, **settings)
    return output, tangent, lse, lse_tangent
