"""The one place for communication between processes. Everything does nothing without a process group."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _grouped() else 1


def _transport(x: Tensor) -> Tensor:
    """``x`` as the backend can send it: contiguous, on the GPU for NCCL."""
    if x.device.type == "cpu" and dist.get_backend() == "nccl":
        x = x.to(torch.device("cuda", torch.cuda.current_device()))
    return x.contiguous()


def _row_counts(x: Tensor) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    return [int(count) for count in torch.cat(counts).tolist()]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        sent = _transport(x.detach())
        counts = _row_counts(sent)
        ctx.start, ctx.rows = sum(counts[: rank()]), len(x)
        shape = (sum(counts), *x.shape[1:])
        if 0 in shape:
            return x.new_empty(shape)
        longest = max(counts)
        if len(sent) < longest:
            sent = torch.cat([sent, sent.new_zeros(longest - len(sent), *sent.shape[1:])])
        # bytes travel: every backend can send them, whatever the dtype, and nothing is rounded
        packed = sent.reshape(longest, -1).view(torch.uint8)
        received = [torch.empty_like(packed) for _ in counts]
        dist.all_gather(received, packed)
        rows = [one[:count] for one, count in zip(received, counts, strict=True)]
        return torch.cat(rows).view(x.dtype).reshape(shape).to(x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # float32 on the way: gloo doesn't add every half type, and the sum of W terms keeps its digits
        wide = _transport(grad).to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(wide)
        return wide[ctx.start : ctx.start + ctx.rows].to(device=grad.device, dtype=grad.dtype)


def gather_rows(x: Tensor, *, with_grad: bool = True) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of rows, also none.

    The gradient that comes back to the local rows is the SUM over ranks of the gradients of their losses. DDP then
    takes the mean over ranks, so what is minimised is the mean over ranks of each rank's loss: W ranks that compute
    the same global loss, or that each compute the mean over equally many rows of their own, get the gradients of one
    process that sees everything. Every rank must call it, and run backward through it, equally often and in the same
    order. It reads the row counts on the host, which waits for the device.

    Args:
        x: (n_r, ...) of any dtype, same trailing shape and dtype on all ranks.
        with_grad: Let gradients flow to the rows of all ranks; False returns a constant.

    Returns:
        (sum of n_r, ...) of the same dtype and on the same device; ``x`` itself without a process group (detached
        when ``with_grad`` is False).

    Raises:
        ValueError: ``x`` is a scalar.
    """
    if x.ndim == 0:
        raise ValueError("gather_rows gathers along the first dimension and got a scalar: pass x.reshape(1)")
    if not with_grad:
        x = x.detach()
    if world_size() == 1:
        return x
    return _GatherRows.apply(x)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``, without gradient; same shape and dtype on all ranks, and on each of them the same bits."""
    return gather_rows(x[None], with_grad=False).sum(0)


class _IntoRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _OutOfRanks.apply(grad)  # type: ignore[no-any-return]


class _OutOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _IntoRanks.apply(grad)  # type: ignore[no-any-return]


def into_ranks(x: Tensor) -> Tensor:
    """``x``, the same on all ranks, on its way into what each rank computes of its own data: gradients are summed over the ranks.

    With :func:`out_of_ranks` at the end, ``out_of_ranks(f(into_ranks(x)))`` is the sum of every rank's f(x), and ``torch.autograd.grad`` of
    it gives each rank the gradient of that sum, any number of times. It isn't meant for a loss that DDP averages.
    """
    return x if world_size() == 1 else _IntoRanks.apply(x)


def out_of_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``, the same bits on all of them, whose gradient goes to each as it is: see :func:`into_ranks`."""
    return x if world_size() == 1 else _OutOfRanks.apply(x)


def any_over_ranks(x: Tensor) -> Tensor:
    """Whether each entry of a bool tensor is True on any rank; same shape on all ranks. ``x`` itself without a process group."""
    if world_size() == 1:
        return x
    counts = _transport(x).to(torch.uint8)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return counts.to(device=x.device, dtype=torch.bool)


def same_on_all_ranks(x: Tensor) -> bool:
    """Whether shape, dtype and every bit of ``x`` are equal on all ranks; True without a process group.

    Compares hashes, so little is sent; it copies ``x`` to the host and is not meant for a training step. Call it on
    every rank.
    """
    if world_size() == 1:
        return True
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    mine = _transport(torch.tensor(list(digest.digest()), dtype=torch.uint8))
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


def broadcast_seed(seed: int | None = None) -> int:
    """Rank 0's ``seed`` on every rank, in [0, 2**63); None: rank 0 draws one from the operating system.

    No random number generator is advanced.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little") >> 1
    if world_size() == 1:
        return seed
    carrier = _transport(torch.tensor([seed], dtype=torch.int64))
    dist.broadcast(carrier, src=0)
    return int(carrier)


def broadcast_text(text: str) -> str:
    """Rank 0's ``text`` on every rank."""
    return str(broadcast_object(text))


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value``, anything small that can be pickled, on every rank; tensors in it should be on the CPU."""
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Make ``tensors`` equal to rank 0's, in place; one message per dtype. Same shapes, dtypes and number on all ranks; no gradient."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        alike = [t.detach() for t in tensors if t.dtype == dtype]
        packed = _transport(torch.cat([t.reshape(-1) for t in alike]))
        dist.broadcast(packed.view(torch.uint8), src=0)
        for t, new in zip(alike, packed.split([t.numel() for t in alike]), strict=True):
            t.copy_(new.view(t.shape))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, in one message for each dtype; one that isn't there counts as 0."""
    if world_size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:  # the same message on every rank
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
