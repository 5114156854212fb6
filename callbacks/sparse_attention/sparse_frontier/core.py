"""The Sparse Frontier: six ways to choose keys without training, what they cost, and how scores depend on it.

Paper: The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs, arXiv:2504.17768 (v3). Code of the authors:
PiotrNawrot/sparse-frontier at commit 31d86c1 (``sparse_frontier/modelling/attention``). Costs: equations 1 to 10 of the paper's appendix B.

Queries are (B, Hq, n, d) and keys (B, Hkv, n, d) with positions in them; query head h reads key head h // (Hq / Hkv). Scores are
computed in float32 or wider. Left out: the query-aware switch of FlexPrefill, which the authors turn off, and the GPU kernels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lit_methods.sparse_attention.blocks import KeptBlocks

CELL = 64  # queries and keys of what Vertical-Slash and FlexPrefill execute
FIRST = 4  # first keys that are always kept

# ---- prefill: verticals and slashes ----------------------------------------------------------------------------------------------------


def window_attention(q: Tensor, k: Tensor, window: int, scale: float | None = None) -> Tensor:
    """Attention weights of the last queries of a text.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        window: w queries; all, if the text is shorter.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, Hq, w, n), float32 or wider; a query gives none to keys behind itself.
    """
    batch, heads, length, width = q.shape
    window = min(window, length)
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        last = q[:, :, length - window :].to(wide).reshape(batch, k.shape[1], -1, width)  # queries of a group share their keys
        scores = (last @ k.to(wide).transpose(-1, -2)).view(batch, heads, window, length)
        scores = scores / math.sqrt(width) if scale is None else scores * scale
        hidden = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
        scores[..., length - window :].masked_fill_(hidden, -torch.inf)
        return scores.softmax(-1)


def slash_sums(weights: Tensor) -> Tensor:
    """Sums along diagonals.

    Args:
        weights: (B, H, w, n) of the last w queries.

    Returns:
        (B, H, n): for each offset, position of the query - position of the key, the sum of its weights.
    """
    batch, heads, window, length = weights.shape
    # with w zeros before each row, one step down a diagonal is always n + w + 1 values further
    padded = F.pad(weights, (window, 0)).contiguous()
    row = length + window
    diagonals = padded.as_strided(
        (batch, heads, window, length), (heads * window * row, window * row, row + 1, 1), padded.storage_offset() + 1
    )
    return diagonals.sum(2).flip(-1)


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """(B, H, K) places of the best ``counts`` (B, H) scores of each head, ascending, -1 in front where a head has fewer than K."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max()) if counts.numel() else 0]
    rank = torch.arange(order.shape[-1], device=scores.device)
    return torch.where(rank < counts[..., None], order, -1).sort(-1).values


def _forced(scores: Tensor, first: int) -> Tensor:
    forced = scores.clone()
    forced[..., :first] = torch.inf
    return forced


def vertical_slash(q: Tensor, k: Tensor, verticals: int, slashes: int, window: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Vertical-Slash: keys, and offsets of query to key, that get the most attention of the last queries.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        verticals: Keys, the first 4 among them; at most n count.
        slashes: Offsets, 0 to 63 among them; at most n count.
        window: Last queries that are asked.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        Keys (B, Hq, verticals) and offsets (B, Hq, slashes), int64, ascending.
    """
    weights = window_attention(q, k, window, scale)
    length = weights.shape[-1]
    counts = torch.ones(weights.shape[:2], dtype=torch.int64, device=q.device)
    columns = _best(_forced(weights.sum(2), FIRST), counts * min(verticals, length))
    return columns, _best(_forced(slash_sums(weights), CELL), counts * min(slashes, length))


def flexprefill(q: Tensor, k: Tensor, alpha: float, min_budget: int, window: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """FlexPrefill: as :func:`vertical_slash`, but each head takes as many as it needs for a share of the attention.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        alpha: Share of the attention in [0, 1] that keys, and offsets, must reach; 0: ``min_budget`` of each.
        min_budget: Least number of keys, and of offsets.
        window: Last queries that are asked.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        Keys (B, Hq, K) and offsets (B, Hq, S), int64, ascending; -1 in front where a head takes fewer.
    """
    weights = window_attention(q, k, window, scale)
    found = []
    for sums, first in ((weights.mean(2), FIRST), (slash_sums(weights) / weights.shape[2], CELL)):
        reached = sums.sort(-1, descending=True).values.cumsum(-1)
        counts = ((reached <= alpha).sum(-1) + 1).clamp(min=min_budget, max=sums.shape[-1])
        found.append(_best(_forced(sums, first), counts))
    return found[0], found[1]


def slash_blocks(columns: Tensor, offsets: Tensor, length: int) -> KeptBlocks:
    """What is executed for keys and offsets: ranges of 64 keys and single keys for each 64 queries.

    For the queries below end = 64 (m + 1), an offset o covers the 64 keys that end at max(end - o, 64). Ranges that overlap are merged in
    steps of 64, from the left: where the next one ends beyond a range but touches it, the range grows by 64, and where it doesn't touch, a
    new one begins. Keys outside all ranges, and before the end of the last one, are kept singly.

    Args:
        columns: (B, H, K) int64 keys, ascending; negative: none.
        offsets: (B, H, S) int64 offsets, ascending; negative: none.
        length: n.

    Returns:
        Causal blocks.
    """
    batch, heads = offsets.shape[:2]
    blocks = -(-length // CELL)
    device = offsets.device
    ends = torch.arange(1, blocks + 1, device=device) * CELL

    def largest_below(limits: Tensor) -> Tensor:
        """(B, H, L): the largest offset below each of (L,) limits; negative: none."""
        if offsets.shape[-1] == 0:
            return torch.full((batch, heads, len(limits)), -1, device=device)
        count = torch.searchsorted(offsets.contiguous(), limits.expand(batch, heads, -1).contiguous())
        return torch.where(count > 0, offsets.gather(-1, (count - 1).clamp(min=0)), -1)

    # a range is known by how far it ends before the end of the block of queries; seen so, its successor is the same for all blocks
    over = torch.iinfo(torch.int64).min
    gap = torch.arange(length, device=device)
    below = largest_below(gap)
    following = torch.where(below >= gap - CELL, gap - CELL, below).masked_fill(below < 0, over)
    first = largest_below(ends)
    state = torch.minimum(first, ends - CELL).masked_fill(first < 0, over)
    states = []
    for _ in range(blocks + 1):  # each range lies at least 64 keys behind the one before
        states.append(state)
        state = torch.where(state >= 0, following.gather(-1, state.clamp(min=0, max=length - 1)), over)
    chain = torch.stack(states, -1)  # (B, H, Q, J)
    there = chain > over
    chain, there = (own[..., : int(there.sum(-1).max())] for own in (chain, there))
    starts = torch.where(there, ends[:, None] - chain - CELL, -1)
    last = torch.where(there, starts + CELL, 0).amax(-1) if chain.shape[-1] else torch.zeros(batch, heads, blocks, device=device)

    keys = columns[:, :, None].expand(-1, -1, blocks, -1).contiguous()
    place = torch.searchsorted(starts.masked_fill(~there, length + CELL).contiguous(), keys, right=True)
    covered = torch.zeros_like(keys, dtype=torch.bool)
    if chain.shape[-1]:
        covered = (place > 0) & (keys < starts.gather(-1, (place - 1).clamp(min=0)) + CELL)
    singles = torch.where((keys < torch.minimum(last, ends)[..., None]) & ~covered, keys, -1)
    return KeptBlocks(starts, CELL, CELL, True, singles)


def cell_sparsity(kept: KeptBlocks, length: int) -> Tensor:
    """1 - computed / causal pairs of each head, float64, as the kernel computes: whole cells of 64 x 64, and 64 pairs for a single key.

    Args:
        kept: Of :func:`slash_blocks`.
        length: n.

    Returns:
        (B, H); below 0 for texts that are short beside a cell.
    """
    assert kept.columns is not None
    cells = (kept.starts >= 0).sum((-1, -2), dtype=torch.float64) * CELL**2 + (kept.columns >= 0).sum((-1, -2)) * CELL
    return 1 - cells / (length * (length + 1) / 2)


# ---- prefill: blocks -------------------------------------------------------------------------------------------------------------------


def block_sparse(q: Tensor, k: Tensor, block: int, top: int) -> Tensor:
    """Block-Sparse: for each block of queries, the blocks of keys whose means fit best.

    Means are over whole blocks, with zeros behind the text: as the authors' code, up to a whole block of zeros where the length is a
    multiple of ``block``. The block itself, the one before it, and the first are always kept.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        block: Tokens of a block.
        top: Blocks of keys for each block of queries; at most all.

    Returns:
        (B, Hq, n // block + 1, top) int64 blocks of keys, ascending. Early blocks of queries have fewer than ``top`` before them: what
        lies behind a block is there to fill the row, and means nothing.
    """
    count = q.shape[2] // block + 1
    fill = count * block - q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        mean_q, mean_k = (F.pad(own.to(wide), (0, 0, 0, fill)).unflatten(2, (count, block)).mean(3) for own in (q, k))
        grouped = mean_q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        scores = (grouped @ mean_k.transpose(-1, -2)).view(*q.shape[:2], count, count)
    place = torch.arange(count, device=q.device)
    distance = place[:, None] - place
    scores = scores.masked_fill(distance < 0, -torch.inf).masked_fill((distance == 0) | (distance == 1), torch.inf)
    scores[..., 0] = torch.inf
    return scores.topk(min(top, count), dim=-1).indices.sort(-1).values


def chosen_blocks(index: Tensor, block: int, length: int) -> KeptBlocks:
    """Causal blocks out of what :func:`block_sparse` returns.

    Args:
        index: (B, H, Q, top) int64.
        block: Tokens of a block.
        length: n.
    """
    index = index[:, :, : -(-length // block)]
    own = torch.arange(index.shape[2], device=index.device)[:, None]
    return KeptBlocks(torch.where(index <= own, index * block, -1), block, block, True)


def block_sparsity(blocks: int, top: int) -> float:
    """1 - computed / causal pairs of blocks, N = ``blocks`` and k = ``top``: 1 - [k (k + 1) / 2 + (N - k) k] / [N (N + 1) / 2]."""
    top = min(top, blocks)
    return 1 - (top * (top + 1) / 2 + (blocks - top) * top) / (blocks * (blocks + 1) / 2)


def blocks_for_sparsity(blocks: int, sparsity: float) -> int:
    """The fewest blocks, 3 at least, whose :func:`block_sparsity` doesn't exceed ``sparsity``; at most ``blocks``."""
    low, high = min(3, blocks), blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if block_sparsity(blocks, middle) <= sparsity else (middle + 1, high)
    return low


# ---- eviction --------------------------------------------------------------------------------------------------------------------------


def _pooled(scores: Tensor, kernel: int) -> Tensor:
    """Mean over ``kernel`` neighbours, zeros beyond the ends counted."""
    flat = scores.flatten(0, -2)[:, None]
    return F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)[:, 0, : scores.shape[-1]].view_as(scores)


def _kept_always(scores: Tensor, local: int, prefix: int) -> Tensor:
    forced = scores.clone()
    forced[..., max(scores.shape[-1] - local, 0) :] = torch.inf
    forced[..., :prefix] = torch.inf
    return forced


def snapkv(q: Tensor, k: Tensor, capacity: int, window: int, kernel: int, local: int, prefix: int, scale: float | None = None) -> Tensor:
    """SnapKV: which keys each key head keeps, by the attention of the last queries: mean of the group, sum of the queries, pooled.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        capacity: Keys that a head keeps; all, if there are fewer.
        window: Last queries that are asked.
        kernel: Odd number of neighbours whose scores are averaged.
        local: Last keys that are kept in any case, within the capacity.
        prefix: First keys that are kept in any case, within the capacity.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, Hkv, n) bool.
    """
    weights = window_attention(q, k, window, scale).unflatten(1, (k.shape[1], -1))
    scores = _kept_always(_pooled(weights.mean(2).sum(2), kernel), local, prefix)
    best = scores.topk(min(capacity, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def ada_snapkv(
    q: Tensor,
    k: Tensor,
    capacity: int,
    window: int,
    kernel: int,
    local: int,
    prefix: int,
    min_share: float = 0.2,
    scale: float | None = None,
) -> Tensor:
    """Ada-SnapKV: as :func:`snapkv`, but heads share one budget, and scores are the largest of the group and the queries.

    Each head first gets its best max(int(min_share * capacity), local + prefix) keys; what is left of capacity * Hkv goes to the best
    pairs of head and key.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, n, d).
        capacity: Keys that a head keeps on average; all, if there are fewer.
        window: Last queries that are asked.
        kernel: Odd number of neighbours whose scores are averaged.
        local: Last keys that are kept in any case, within the capacity.
        prefix: First keys that are kept in any case, within the capacity.
        min_share: Share of the capacity that each head gets in any case.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, Hkv, n) bool.
    """
    weights = window_attention(q, k, window, scale).unflatten(1, (k.shape[1], -1))
    scores = _kept_always(_pooled(weights.amax((2, 3)), kernel), local, prefix)
    batch, heads, length = scores.shape
    least = min(max(int(min_share * capacity), local + prefix), length)
    first = scores.topk(least, dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)
    left = max(min(capacity, length) * heads - least * heads, 0)
    rest = scores.masked_fill(kept, -torch.inf).flatten(1).topk(left, dim=-1).indices
    return kept.flatten(1).scatter_(1, rest, True).view(batch, heads, length)


def token_index(kept: Tensor) -> Tensor:
    """(B, H, n) bool -> (B, H, K) int64 places, ascending, -1 behind them where a head keeps fewer than the others."""
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : int(kept.sum(-1).max())]
    return torch.where(kept.gather(-1, order), order, -1)


# ---- decoding --------------------------------------------------------------------------------------------------------------------------


def page_bounds(k: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Least and largest value of each page of keys.

    Args:
        k: (B, Hkv, n, d).
        page: Tokens of a page; the last page may be short.

    Returns:
        Two of (B, Hkv, P, d).
    """
    fill = -k.shape[2] % page
    low, high = (F.pad(k, (0, 0, 0, fill), value=sign * torch.inf).unflatten(2, (-1, page)) for sign in (1, -1))
    return low.amin(3), high.amax(3)


def quest_pages(q: Tensor, low: Tensor, high: Tensor, budget: int, share: bool = False) -> Tensor:
    """Quest: pages whose keys may fit a query best, and the one that is being filled.

    The score of a page is sum_d max(q_d low_d, q_d high_d), which no product of the query with a key of the page exceeds.

    Args:
        q: (B, Hq, d), one query.
        low: (B, Hkv, P, d) of :func:`page_bounds`, the query's own key included.
        high: As ``low``.
        budget: Pages besides the last one; at most all.
        share: Whether the query heads of a group sum their scores and see the same pages.

    Returns:
        (B, Hq, budget + 1) int64 pages, ascending; (B, Hkv, budget + 1) with ``share``.
    """
    batch, _, width = q.shape
    pages = low.shape[2] - 1
    groups = q.view(batch, low.shape[1], -1, width)
    # max(q low, q high) = max(q, 0) high + min(q, 0) low: two products of matrices
    scores = groups.clamp(min=0) @ high[:, :, :pages].transpose(-1, -2) + groups.clamp(max=0) @ low[:, :, :pages].transpose(-1, -2)
    scores = scores.sum(2) if share else scores.flatten(1, 2)
    best = scores.topk(min(budget, pages), dim=-1).indices
    last = torch.full((*best.shape[:2], 1), pages, device=q.device)
    return torch.cat([best, last], -1).sort(-1).values


def page_tokens(pages: Tensor, page: int, length: int) -> Tensor:
    """(B, H, K) pages -> (B, H, K * page) int64 tokens, -1 for those behind the text of ``length``."""
    tokens = (pages[..., None] * page + torch.arange(page, device=pages.device)).flatten(-2)
    return torch.where(tokens < length, tokens, -1)


# ---- costs -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on.

    Attributes:
        layers: N.
        hidden: d, width of the residual stream.
        heads: h, query heads.
        kv_heads: n_kv, heads of keys and values.
        head_width: d_h.
        mlp: d_mlp, width inside a gated MLP.
        vocabulary: |V|.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocabulary: int


def attention_flops(shape: ModelShape, length: int, density: float = 1.0, batch: int = 1) -> float:
    """Operations of all attention layers in a prefill: B N [2 L d (2 d + 2 d_h n_kv) + rho h L^2 (4 d_h + 3)]."""
    projections = 2.0 * length * shape.hidden * (2 * shape.hidden + 2 * shape.head_width * shape.kv_heads)
    return batch * shape.layers * (projections + density * shape.heads * length**2 * (4.0 * shape.head_width + 3))


def prefill_flops(shape: ModelShape, length: int, density: float = 1.0, batch: int = 1) -> float:
    """Operations of a prefill of ``batch`` texts of ``length`` tokens, of whose pairs of query and key a share ``density`` is computed."""
    embedding = 2.0 * length * shape.hidden
    mlp = 2.0 * shape.layers * length * shape.mlp * (3 * shape.hidden + 1)
    return batch * (embedding + mlp + embedding * shape.vocabulary) + attention_flops(shape, length, density, batch)


def decode_weights(shape: ModelShape) -> float:
    """Values of weights that one step of decoding reads: N (4 d^2 + 3 d d_mlp) + d (|V| + 1)."""
    d = float(shape.hidden)
    return shape.layers * (4 * d**2 + 3 * d * shape.mlp) + d * (shape.vocabulary + 1)


def decode_cache(shape: ModelShape, length: int, density: float = 1.0, batch: int = 1) -> float:
    """Values of the cache that one step of decoding reads: B 2 N L d_h n_kv rho."""
    return batch * 2.0 * shape.layers * length * shape.head_width * shape.kv_heads * density


def vertical_slash_overhead(shape: ModelShape, length: int, window: int, verticals: int, slashes: int, batch: int = 1) -> float:
    """Operations of Vertical-Slash's choice: B N h [2 d_h L q + 5 L q + 2 L log2 L + 64 L (k_v + k_s)]."""
    each = 2.0 * shape.head_width * window + 5 * window + 2 * math.log2(length) + CELL * (verticals + slashes)
    return batch * shape.layers * shape.heads * length * each


def quest_overhead(shape: ModelShape, length: int, page: int, batch: int = 1) -> float:
    """Values that Quest's choice reads in one step: 2 B N n_kv d_h L / p."""
    return 2.0 * batch * shape.layers * shape.kv_heads * shape.head_width * length / page


# ---- analysis --------------------------------------------------------------------------------------------------------------------------


def pareto_front(costs: ArrayLike, scores: ArrayLike) -> NDArray[np.bool_]:
    """Points that no other beats: none is as cheap and as good, and better in one of both.

    Args:
        costs: (K,), less is better.
        scores: (K,), more is better.

    Returns:
        (K,) bool.
    """
    cost, score = np.asarray(costs, float), np.asarray(scores, float)
    no_worse = (cost[None] <= cost[:, None]) & (score[None] >= score[:, None])
    better = (cost[None] < cost[:, None]) | (score[None] > score[:, None])
    beaten: NDArray[np.bool_] = np.any(no_worse & better, axis=1)
    return np.logical_not(beaten)


def relative_error(dense: ArrayLike, sparse: ArrayLike) -> NDArray[np.float64]:
    """(p_dense - p_sparse) / p_dense; NaN where the dense score is 0."""
    p, s = np.asarray(dense, float), np.asarray(sparse, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p == 0, np.nan, (p - s) / p)


def largest_safe_sparsity(dense: Sequence[float], sparse: Mapping[float, Sequence[float]], level: float = 0.05) -> float:
    """The guarantee test of the paper's v1: the largest sparsity up to which no loss is significant, by a paired one-sided t-test.

    Args:
        dense: Scores of samples.
        sparse: Sparsity -> scores of the same samples.
        level: Level of the test.

    Returns:
        0 if the smallest sparsity loses already.
    """
    from scipy.stats import ttest_rel

    safe = 0.0
    for sparsity in sorted(sparse):
        gap = np.asarray(dense, float) - np.asarray(sparse[sparsity], float)
        lost = gap.mean() > 0 and (np.ptp(gap) == 0 or float(ttest_rel(dense, sparse[sparsity], alternative="greater").pvalue) < level)
        if lost:
            break
        safe = sparsity
    return safe


@dataclass(frozen=True)
class ScoreLaw:
    """log score = b0 + bN log N + bS log S + bC log C: size of the model, length of the text, and compression 1 / (1 - sparsity).

    The paper's v1 describes such a law; its coefficients couldn't be read, so the fit is ours.

    Attributes:
        constant: b0.
        size: bN.
        length: bS.
        compression: bC.
    """

    constant: float
    size: float
    length: float
    compression: float

    def predict(self, sizes: ArrayLike, lengths: ArrayLike, compressions: ArrayLike) -> NDArray[np.float64]:
        """Scores."""
        logs = (np.log(np.asarray(own, float)) for own in (sizes, lengths, compressions))
        return np.exp(self.constant + sum(b * log for b, log in zip((self.size, self.length, self.compression), logs, strict=True)))


def fit_score_law(sizes: ArrayLike, lengths: ArrayLike, compressions: ArrayLike, scores: ArrayLike) -> ScoreLaw:
    """Least squares of log score; what doesn't vary among the points gets the coefficient 0.

    Args:
        sizes: (K,) numbers of parameters.
        lengths: (K,) tokens.
        compressions: (K,) 1 / (1 - sparsity).
        scores: (K,); points with a score of 0 are left out.

    Raises:
        ValueError: Fewer points than coefficients.
    """
    columns = [np.asarray(own, float) for own in (sizes, lengths, compressions)]
    score = np.asarray(scores, float)
    good = score > 0
    logs = [np.log(own[good]) for own in columns]
    varied = [log for log in logs if len(log) and np.ptp(log) > 0]
    if good.sum() < len(varied) + 1:
        raise ValueError(f"{good.sum()} points with a score above 0 can't settle {len(varied) + 1} coefficients: give more runs")
    design = np.stack([np.ones(good.sum()), *varied], 1)
    found = iter(np.linalg.lstsq(design, np.log(score[good]), rcond=None)[0])
    constant = next(found)
    return ScoreLaw(float(constant), *(float(next(found)) if len(log) and np.ptp(log) > 0 else 0.0 for log in logs))


def held_out_fit(sizes: ArrayLike, lengths: ArrayLike, compressions: ArrayLike, scores: ArrayLike, by: str) -> float:
    """R^2 of log score on the points with the largest size, length or compression, by a law that was fitted to the others.

    Args:
        sizes: (K,).
        lengths: (K,).
        compressions: (K,).
        scores: (K,).
        by: ``size``, ``length`` or ``compression``.

    Raises:
        ValueError: All points have the same, or too few are left.
    """
    columns = {"size": sizes, "length": lengths, "compression": compressions}
    arrays = {name: np.asarray(own, float) for name, own in columns.items()}
    score = np.asarray(scores, float)
    test = arrays[by] == arrays[by].max()
    if test.all():
        raise ValueError(f"all points have the same {by}: none can be held out")
    law = fit_score_law(arrays["size"][~test], arrays["length"][~test], arrays["compression"][~test], score[~test])
    test &= score > 0
    guess = np.log(law.predict(arrays["size"][test], arrays["length"][test], arrays["compression"][test]))
    wanted = np.log(score[test])
    spread = np.square(wanted - wanted.mean()).sum()
    return float("nan") if spread == 0 else float(1 - np.square(wanted - guess).sum() / spread)


__all__ = [
    "ModelShape",
    "ScoreLaw",
    "ada_snapkv",
    "attention_flops",
    "block_sparse",
    "block_sparsity",
    "blocks_for_sparsity",
    "cell_sparsity",
    "chosen_blocks",
    "decode_cache",
    "decode_weights",
    "fit_score_law",
    "flexprefill",
    "held_out_fit",
    "largest_safe_sparsity",
    "page_bounds",
    "page_tokens",
    "pareto_front",
    "prefill_flops",
    "quest_overhead",
    "quest_pages",
    "relative_error",
    "slash_blocks",
    "slash_sums",
    "snapkv",
    "token_index",
    "vertical_slash",
    "vertical_slash_overhead",
    "window_attention",
]
