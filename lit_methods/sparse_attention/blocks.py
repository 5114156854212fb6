"""Which keys each block of queries sees, and attention that computes no others.

Everything here takes queries (B, Hq, n, d) and keys and values (B, Hkv, m, d); Hkv divides Hq, and query head h reads the key head
h // (Hq / Hkv), as grouped-query attention has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["auto", "blocked", "flex", "dense"]
IMPLEMENTATIONS = ("auto", "blocked", "flex", "dense")

_CHUNK = 2**19  # gathered values of keys at a time: 2 MiB in float32, which stay in a core's cache
_CHUNK_DEVICE = 2**26  # the same on an accelerator, which wants large products


@dataclass(frozen=True)
class KeptBlocks:
    """For each block of queries: ranges of neighbouring keys, and single keys.

    Ranges and single keys of one block of queries must not overlap. A range may begin anywhere, and may reach past the last key. Negative
    entries mean "none" and may stand anywhere.

    Attributes:
        starts: (B, H, Q, S) int64, first keys of ranges; H is the number of query heads, or a divisor of it: head h then serves the H-th
            part of the query heads that are neighbours.
        query_block: Queries of a block; Q blocks cover all queries, and the last may be short.
        width: Keys of a range.
        causal: Whether a query sees no key behind itself, also within a range.
        columns: (B, H, Q, C) int64, single keys; None: none.
    """

    starts: Tensor
    query_block: int
    width: int
    causal: bool
    columns: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, block: int, *, causal: bool) -> "KeptBlocks":
        """Blocks out of a mask of blocks.

        Args:
            mask: (B, H, Q, K) bool: which blocks of keys a block of queries sees.
            block: Queries and keys of a block.
            causal: As in the class.
        """
        kept, order = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        most = int(mask.sum(-1).max()) if mask.numel() else 0
        starts = torch.where(kept.bool(), order * block, -1)[..., :most]
        return cls(starts, block, block, causal)

    def per_head(self, heads: int) -> "KeptBlocks":
        """The same, with an entry for each of ``heads`` query heads.

        Raises:
            ValueError: They can't be shared out.
        """
        own = self.starts.shape[1]
        if own == heads:
            return self
        if heads % own:
            raise ValueError(f"blocks are chosen for {own} heads and there are {heads} query heads: {own} must divide {heads}")
        columns = None if self.columns is None else self.columns.repeat_interleave(heads // own, 1)
        return KeptBlocks(self.starts.repeat_interleave(heads // own, 1), self.query_block, self.width, self.causal, columns)

    def aligned(self) -> bool:
        """Whether all ranges are whole blocks of a grid, and there are no single keys: what FlexAttention's block masks can say."""
        return self.columns is None and not bool((self.starts.clamp(min=0) % self.width).any())

    def mask(self, queries: int, keys: int) -> Tensor:
        """(B, H, queries, keys) bool: the same as a dense mask, causal if ``causal``."""
        places = (self.starts[..., None] + torch.arange(self.width, device=self.starts.device)).flatten(-2)
        places = torch.where((self.starts >= 0)[..., None].expand(*self.starts.shape, self.width).flatten(-2), places, -1)
        if self.columns is not None:
            places = torch.cat([places, self.columns], -1)
        kept = torch.zeros(*self.starts.shape[:3], keys + 1, dtype=torch.bool, device=places.device)
        kept.scatter_(-1, torch.where((places >= 0) & (places < keys), places, keys), True)
        rows = kept[..., :keys].repeat_interleave(self.query_block, 2)[:, :, :queries]
        return rows.tril() if self.causal else rows

    def pairs(self, queries: int, keys: int) -> Tensor:
        """(B, H) float64: how many pairs of query and key are kept; those that a causal mask hides don't count."""
        first = torch.arange(self.starts.shape[2], device=self.starts.device)[:, None] * self.query_block
        last = (first + self.query_block).clamp(max=queries)  # one past the block's last query

        def count(starts: Tensor, width: int) -> Tensor:
            ends = (starts + width).clamp(max=keys)
            if not self.causal:
                each = (last - first) * (ends - starts)
            else:
                each = _triangle(last - starts, ends - starts) - _triangle(first - starts, ends - starts)
            return torch.where((starts >= 0) & (starts < keys), each, 0).to(torch.float64).sum((-1, -2))

        total = count(self.starts, self.width)
        return total if self.columns is None else total + count(self.columns, 1)


def _triangle(rows: Tensor, width: Tensor) -> Tensor:
    """Sum over j = 1 .. ``rows`` of min(j, width): pairs of the first ``rows`` queries, of which the first sits on the first key."""
    rows = rows.clamp(min=0)
    inside = torch.minimum(rows, width)
    return inside * (inside + 1) // 2 + (rows - inside) * width


def all_pairs(queries: int, keys: int, causal: bool) -> float:
    """Pairs of query and key of full attention."""
    return queries * (queries + 1) / 2 if causal else float(queries * keys)


# ---- dense -----------------------------------------------------------------------------------------------------------------------------


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention with a dense mask, in plain formulas: the reference.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, m, d).
        v: (B, Hkv, m, e).
        mask: (B or 1, H or 1, n, m) bool; H is Hq or divides it.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, Hq, n, e) in the dtype of ``v``; 0 for queries without a key.
    """
    heads = q.shape[1]
    k, v = (own.repeat_interleave(heads // own.shape[1], 1) for own in (k, v))
    if mask.shape[1] not in (1, heads):
        mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        weights = torch.where(mask.any(-1, keepdim=True), weights, 0)
        return (weights @ v.to(wide)).to(v.dtype)


# ---- blocks alone ----------------------------------------------------------------------------------------------------------------------


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: KeptBlocks, scale: float | None = None, implementation: Implementation = "auto"
) -> Tensor:
    """Attention over the kept keys.

    Args:
        q: (B, Hq, n, d).
        k: (B, Hkv, m, d); m = n if ``kept.causal``.
        v: (B, Hkv, m, e).
        kept: Which keys a block of queries sees.
        scale: Factor of the products; None: 1 / sqrt(d).
        implementation: ``blocked`` gathers the kept keys of some blocks at a time and computes these; ``flex`` is FlexAttention, for
            ranges on a grid; ``dense`` computes everything under a mask, to compare with;
            ``auto``: ``flex`` on CUDA where it can, else ``blocked``.

    Returns:
        (B, Hq, n, e) in the dtype of ``v``; 0 for queries without a key.

    Raises:
        ValueError: Shapes that don't fit together, or ``flex`` for ranges that lie on no grid.
    """
    _check(q, k, v, kept)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = "flex" if q.is_cuda and kept.width >= 16 and kept.query_block >= 16 and kept.aligned() else "blocked"
    kept = kept.per_head(q.shape[1])
    if implementation == "dense":
        return masked_attention(q, k, v, kept.mask(q.shape[2], k.shape[2]), scale)
    return _flex(q, k, v, kept, scale) if implementation == "flex" else _blocked(q, k, v, kept, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, kept: KeptBlocks) -> None:
    shapes = f"queries are {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: they must be (batch, heads, length, width), with as many values as keys")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: heads of queries and keys must be of one width")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the number of key heads must divide that of query heads")
    if kept.causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"{shapes}: causal blocks need as many keys as queries")
    blocks = -(-q.shape[2] // kept.query_block)
    if kept.starts.ndim != 4 or kept.starts.shape[0] != q.shape[0] or kept.starts.shape[2] != blocks:
        raise ValueError(
            f"{shapes}; starts are {tuple(kept.starts.shape)}: they must be (batch, heads, {blocks}, ranges), as a block has "
            f"{kept.query_block} queries"
        )


def _blocked(q: Tensor, k: Tensor, v: Tensor, kept: KeptBlocks, scale: float | None) -> Tensor:
    """Gathers the kept keys of some blocks of queries at a time; blocks with about as many keys go together."""
    batch, heads, length, width = q.shape
    groups, keys, size = heads // k.shape[1], k.shape[2], kept.query_block
    blocks = kept.starts.shape[2]
    starts = kept.starts.flatten(0, 2)
    columns = torch.empty(len(starts), 0, dtype=torch.int64, device=q.device) if kept.columns is None else kept.columns.flatten(0, 2)
    starts, ranges = _front(starts, keys)
    columns, singles = _front(columns, keys)
    padded = F.pad(q, (0, 0, 0, blocks * size - length)).reshape(batch * heads * blocks, size, width)
    flat_k, flat_v = k.reshape(-1, width), v.reshape(-1, v.shape[3])
    result = v.new_zeros(len(padded), size, v.shape[3])
    step = torch.arange(kept.width, device=q.device)
    inside = torch.arange(size, device=q.device)
    for rows, most_ranges, most_singles in _chunks(ranges * kept.width + singles, ranges, singles, width, q.is_cuda):
        own = starts[rows, :most_ranges]
        places = torch.cat([torch.where(own[..., None] >= 0, own[..., None] + step, -1).flatten(1), columns[rows, :most_singles]], 1)
        there = (places >= 0) & (places < keys)
        block = rows % blocks
        allowed = there[:, None, :]
        if kept.causal:
            allowed = allowed & (places[:, None, :] <= (block[:, None] * size + inside)[:, :, None])
        base = rows // blocks // groups * keys  # first key of the key head
        index = (torch.where(there, places, 0) + base[:, None]).flatten()
        chosen_k = flat_k.index_select(0, index).view(len(rows), 1, -1, width)
        chosen_v = flat_v.index_select(0, index).view(len(rows), 1, -1, v.shape[3])
        allowed = allowed.expand(-1, size, -1)
        some = allowed.any(-1, keepdim=True)
        # a query without a key gets all of them, and 0 afterwards: kernels disagree about empty rows
        found = F.scaled_dot_product_attention(padded[rows, None], chosen_k, chosen_v, (allowed | ~some)[:, None], scale=scale)
        result[rows] = torch.where(some, found[:, 0], 0).to(result.dtype)
    return result.view(batch, heads, blocks * size, -1)[:, :, :length]


def _front(entries: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Rows with what is there first, in order, and how many that is."""
    there = (entries >= 0) & (entries < keys)
    order = there.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return torch.where(there, entries, -1).gather(-1, order), there.sum(-1)


def _chunks(totals: Tensor, ranges: Tensor, singles: Tensor, width: int, cuda: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Rows that are computed together, and the largest numbers of ranges and of single keys among them; rows without a key are left out."""
    order = totals.argsort()
    counts = totals[order].tolist()
    limit = (_CHUNK_DEVICE if cuda else _CHUNK) // width
    first = counts.count(0)
    while first < len(counts):
        last = first + 1
        while last < len(counts) and counts[last] * (last + 1 - first) <= limit:
            last += 1
        rows = order[first:last]
        yield rows, int(ranges[rows].max()), int(singles[rows].max())
        first = last


def _flex(q: Tensor, k: Tensor, v: Tensor, kept: KeptBlocks, scale: float | None) -> Tensor:
    """FlexAttention over a block mask; compiled on CUDA, where it computes the kept blocks alone."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if not kept.aligned():
        raise ValueError(f"ranges of {kept.width} keys begin anywhere, or there are single keys: FlexAttention can't, use 'blocked'")
    length, keys = q.shape[2], k.shape[2]
    starts, counts = _front(kept.starts, keys)
    columns = -(-keys // kept.width)
    places = starts.clamp(min=0) // kept.width
    indices = torch.zeros(*starts.shape[:3], columns, dtype=torch.int32, device=q.device)
    indices[..., : starts.shape[-1]] = places.to(torch.int32)[..., :columns]
    # the kernel computes the listed blocks alone; the plain implementation, on a CPU, reads nothing but the function below
    grid = None
    if not q.is_cuda:
        grid = torch.zeros(*starts.shape[:3], columns + 1, dtype=torch.bool, device=q.device)
        grid.scatter_(-1, torch.where(starts >= 0, places, columns), True)

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key < keys) & (query < length)
        if grid is not None:
            seen = seen & grid[b, h, query // kept.query_block, key // kept.width]
        return seen & (key <= query) if kept.causal else seen

    blocks = BlockMask.from_kv_blocks(
        counts.to(torch.int32), indices, BLOCK_SIZE=(kept.query_block, kept.width), mask_mod=inside, seq_lengths=(length, keys)
    )
    run: Any = _compiled_flex() if q.is_cuda else flex_attention
    found: Tensor = run(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return found


_COMPILED: list[Any] = []


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not _COMPILED:
        _COMPILED.append(torch.compile(flex_attention, dynamic=False))
    return _COMPILED[0]


# ---- decoding --------------------------------------------------------------------------------------------------------------------------


def token_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one new query to chosen keys.

    Args:
        q: (B, Hq, 1, d).
        k: (B, Hkv, m, d).
        v: (B, Hkv, m, e).
        index: (B, H, K) int64 keys, each once; negative: none. H is Hq, or Hkv: chosen for a whole group.
        scale: Factor of the products; None: 1 / sqrt(d).

    Returns:
        (B, Hq, 1, e); 0 without a key.

    Raises:
        ValueError: Shapes that don't fit together.
    """
    batch, heads, queries, width = q.shape
    own = k.shape[1]
    if queries != 1 or index.shape[1] not in (heads, own) or heads % own:
        raise ValueError(
            f"queries are {tuple(q.shape)}, keys {tuple(k.shape)} and chosen keys {tuple(index.shape)}: one query at a time, and keys "
            f"chosen for each of {heads} query heads or {own} key heads"
        )
    per = heads // index.shape[1]  # query heads that read one row of the index
    group = index.shape[1] // own
    flat = index.clamp(min=0) + (torch.arange(batch * index.shape[1], device=q.device) // group * k.shape[2]).view(batch, -1, 1)
    chosen_k = k.reshape(-1, width).index_select(0, flat.flatten()).view(batch * index.shape[1], 1, -1, width)
    chosen_v = v.reshape(-1, v.shape[3]).index_select(0, flat.flatten()).view(batch * index.shape[1], 1, -1, v.shape[3])
    there = (index >= 0).view(-1, 1, 1, index.shape[2])
    some = there.any(-1, keepdim=True)
    found = F.scaled_dot_product_attention(
        q.reshape(-1, 1, per, width), chosen_k, chosen_v, (there | ~some).expand(-1, -1, per, -1), scale=scale
    )
    return torch.where(some, found, 0).reshape(batch, heads, 1, -1)


__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "KeptBlocks",
    "all_pairs",
    "block_attention",
    "masked_attention",
    "token_attention",
]
