"""SparseD's pattern as pure functions: which blocks of keys each block of queries keeps, head by head, and in which steps they are used.

Paper: "SparseD: Sparse Attention for Diffusion Language Models", arXiv:2509.24014. Golden vectors: the authors' code
(INV-WZQ/SparseD@52155b4 models/Dream/SparseD_utils.py, models/Dream/modeling_dream.py).

Left out: the compiled kernel of a GPU, which computes the same from the same mask, and guidance, which the authors run with full attention.
The denoising loops that the steps belong to are the host's, in ``lit_methods.tasks.language.denoising``.
"""

import math

import torch
from torch import Tensor

from lit_methods import checks

# ---- the schedule ----------------------------------------------------------------------------------------------------------------------


def selection_step(steps: int, skip: float) -> int:
    """The step whose queries and keys decide the pattern: int(S skip) + 1, counted from 0. It and those before it attend to everything.

    Args:
        steps: S, steps of the whole generation, >= 1.
        skip: Share of the steps that the pattern waits for, in [0, 1].

    Returns:
        The number of the step; S or more: no pattern is ever made.

    Raises:
        ValueError: A number outside its range.
    """
    checks.at_least(1, steps=steps)
    checks.share(skip=skip)
    return int(steps * skip) + 1


def step_modes(steps: int, skip: float) -> Tensor:
    """What attention does in each step: 0 full, 1 full and the pattern is made, 2 sparse.

    Args:
        steps: S, steps of the whole generation, >= 1.
        skip: As in :func:`selection_step`.

    Returns:
        (S,) int64.

    Raises:
        ValueError: A number outside its range.
    """
    step, end = torch.arange(steps), selection_step(steps, skip)
    return (step >= end).long() + (step > end).long()


# ---- the blocks that are kept ----------------------------------------------------------------------------------------------------------


def number_of_blocks(tokens: int, block_size: int) -> int:
    """Blocks of ``block_size`` that hold so many tokens; the last may be short."""
    return -(-tokens // block_size)


def blocks_to_keep(blocks: int, share: float) -> int:
    """int(n rho) + 1, at least one, and no more than there are.

    Args:
        blocks: n, blocks of keys, >= 1.
        share: rho in [0, 1]; even 0 keeps one.
    """
    return min(max(1, int(blocks * share) + 1), blocks)


def pooled_scores(attention: Tensor, block_size: int) -> Tensor:
    """Mean of |attention| over blocks of b queries and b keys. Rows and columns that a last block lacks count as zeros.

    Args:
        attention: (..., Q, K) attention weights, floating point.
        block_size: b >= 1.

    Returns:
        (..., ceil(Q / b), ceil(K / b)) in the dtype of ``attention``.
    """
    *front, queries, keys = attention.shape
    rows, columns = number_of_blocks(queries, block_size), number_of_blocks(keys, block_size)
    padded = torch.nn.functional.pad(attention.abs(), (0, columns * block_size - keys, 0, rows * block_size - queries))
    return padded.reshape(*front, rows, block_size, columns, block_size).mean((-3, -1))


def top_blocks(scores: Tensor, share: float) -> Tensor:
    """The best blocks of keys of each block of queries.

    Args:
        scores: (..., n_q, n_k) floating point.
        share: rho in [0, 1]; int(n_k rho) + 1 are kept, at most all. Of equal scores ``torch.topk`` chooses.

    Returns:
        (..., n_q, n_k) bool; True: kept.
    """
    best = scores.topk(blocks_to_keep(scores.shape[-1], share), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def attention_block_mask(attention: Tensor, block_size: int, share: float) -> Tensor:
    """The blocks that hold the largest mean attention weights: :func:`top_blocks` of :func:`pooled_scores`.

    Args:
        attention: (..., Q, K) attention weights.
        block_size: b >= 1.
        share: rho in [0, 1].

    Returns:
        (..., ceil(Q / b), ceil(K / b)) bool; True: kept.

    Raises:
        ValueError: A number outside its range, or nothing to choose from.
    """
    checks.at_least(1, block_size=block_size)
    checks.share(share=share)
    if attention.ndim < 2 or not attention.shape[-1]:
        raise ValueError(f"attention must be (..., queries, keys) with a key at least, got {tuple(attention.shape)}")
    return top_blocks(pooled_scores(attention, block_size), share)


def select_blocks(q: Tensor, k: Tensor, block_size: int, share: float, scale: float | None = None, at_once: int = 2**26) -> Tensor:
    """:func:`attention_block_mask` of softmax(q k^T / sqrt(d)), without all weights in memory at a time.

    Args:
        q: (B, H, Q, d) queries, positions put in.
        k: (B, H, K, d) keys, as many heads as queries.
        block_size: b >= 1.
        share: rho in [0, 1].
        scale: Factor of the products; None: 1 / sqrt(d).
        at_once: Attention weights in memory at a time; at least those of one block of queries.

    Returns:
        (B, H, ceil(Q / b), ceil(K / b)) bool; True: kept. The weights are computed in float32 or wider.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, keys = q.to(wide), k.to(wide).transpose(-2, -1)
        of_a_query = max(1, q.shape[0] * q.shape[1] * k.shape[2])
        rows = max(1, at_once // (of_a_query * block_size)) * block_size
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        chosen = [attention_block_mask((part @ keys * factor).softmax(-1), block_size, share) for part in q.split(rows, dim=2)]
        return torch.cat(chosen, dim=2)


def first_generation_block(tokens: int, new_tokens: int, block_size: int) -> int:
    """The first block that lies wholly in the answer at the end; the last block where none does.

    Args:
        tokens: T, prompt and answer, >= 1.
        new_tokens: Tokens of the answer, >= 0.
        block_size: b >= 1.
    """
    whole = number_of_blocks(max(tokens - new_tokens, 0), block_size)  # the block at the border counts as prompt
    return min(whole, number_of_blocks(tokens, block_size) - 1)


def sparsed_pattern(
    q: Tensor, k: Tensor, block_size: int, share: float, new_tokens: int, isolate_prompt: bool = False, scale: float | None = None
) -> tuple[Tensor, int]:
    """The blocks of keys that each head and block of queries attends to from the next step on.

    Keys of the answer are chosen among themselves, with a softmax over them alone, so that those of a long prompt can't crowd them out.

    Args:
        q: (B, H, T, d) queries of the selection step, positions put in.
        k: (B, H, T, d) keys of that step, as many heads as queries.
        block_size: b >= 1.
        share: rho in [0, 1]: share of the blocks that is kept, of the prompt and of the answer.
        new_tokens: Tokens of the answer, at the end of the T.
        isolate_prompt: Choose the prompt's keys among themselves, too, as the paper's text says. False, as the authors' code: the best of
            all keys are chosen and those in the answer dropped, so a query may keep fewer blocks of the prompt than ``share`` says.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, H, n, n) bool mask of blocks, True: kept; and the first block of the answer.

    Raises:
        ValueError: A number outside its range, or shapes that don't fit.
    """
    checks.at_least(1, block_size=block_size)
    checks.at_least(0, new_tokens=new_tokens)
    checks.share(share=share)
    if q.ndim != 4 or q.shape != k.shape or not q.shape[2]:
        raise ValueError(f"q and k must be (B, H, T, d) of one shape, T >= 1: got {tuple(q.shape)} and {tuple(k.shape)}")
    first = first_generation_block(q.shape[2], new_tokens, block_size)
    border = first * block_size
    if isolate_prompt:
        prompt = [select_blocks(q, k[:, :, :border], block_size, share, scale)] if first else []
    else:
        prompt = [select_blocks(q, k, block_size, share, scale)[..., :first]]
    return torch.cat([*prompt, select_blocks(q, k[:, :, border:], block_size, share, scale)], dim=-1), first


# ---- patterns that don't look at the text ----------------------------------------------------------------------------------------------


def window_pattern(blocks: int, share: float, sinks: int = 0) -> Tensor:
    """Each block of queries keeps its neighbours, as many as SparseD keeps of all: a sliding window; with sinks, StreamingLLM.

    At the ends the window is moved inwards, so that all keep equally many.

    Args:
        blocks: n, blocks of the text, >= 1.
        share: rho in [0, 1]; :func:`blocks_to_keep` of it are kept, sinks included.
        sinks: First blocks that everybody keeps, out of that number; the window takes what is left.

    Returns:
        (n, n) bool, True: kept.
    """
    keep = blocks_to_keep(blocks, share)
    place = torch.arange(blocks)
    sinks = min(sinks, keep - 1)  # the window keeps one at least, so that a query sees itself
    window = keep - sinks
    start = (place - window // 2).clamp(min=sinks, max=blocks - window)
    inside = (place >= start[:, None]) & (place < start[:, None] + window)
    return inside | (place < sinks)


# ---- what a pattern is like ------------------------------------------------------------------------------------------------------------


def kept_share(mask: Tensor) -> Tensor:
    """Share of the blocks that are kept.

    Args:
        mask: (..., n, n) bool, not empty.

    Returns:
        Scalar in [0, 1], float32.
    """
    return mask.float().mean()


def pattern_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Jaccard similarity of two patterns, head by head: blocks that both keep, divided by those that either keeps.

    Args:
        one: (..., n, n) bool.
        other: Of a shape that broadcasts with it.

    Returns:
        (...), float32 in [0, 1]; 1 where neither keeps any.
    """
    both, either = (one & other).sum((-2, -1)), (one | other).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones((), device=both.device))


__all__ = [
    "attention_block_mask",
    "blocks_to_keep",
    "first_generation_block",
    "pattern_similarity",
    "select_blocks",
    "selection_step",
    "sparsed_pattern",
    "step_modes",
    "window_pattern",
]
