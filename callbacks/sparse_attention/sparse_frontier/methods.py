"""The six methods as answers to "which keys?".

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparse_attention.sparse_frontier.core`.

Arguments are the budgets of the paper's table for 16,384 tokens at a sparsity of 0.9 unless their line says otherwise.
"""

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.sparse_attention.sparse_frontier import core
from lit_methods.sparse_attention.blocks import KeptBlocks
from lit_methods.sparse_attention.method import AttentionCall, SparseAttention


class FrontierMethod(SparseAttention):
    """Base of the six: what is executed, and what the choice itself costs.

    Attributes:
        executed: 1 - executed / all pairs of each prefill, as the authors count: whole cells or blocks, mean of the heads.
    """

    def __init__(self) -> None:
        self.executed: list[Tensor] = []

    def start(self) -> None:
        """Count anew."""
        self.executed = []

    def prefill_overhead(self, shape: core.ModelShape, length: int, batch: int) -> float:
        """Operations of choosing, in the prefill of ``batch`` texts."""
        return 0.0

    def decode_overhead(self, shape: core.ModelShape, length: int, batch: int) -> float:
        """Values that choosing reads, in one step of decoding."""
        return 0.0


class _Slashes(FrontierMethod):
    """What VerticalSlash and FlexPrefill share."""

    def choose(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Keys and distances."""
        raise NotImplementedError

    def prefill(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks:
        """Ranges of 64 keys, and single ones."""
        kept = core.slash_blocks(*self.choose(q, k, call.scale), q.shape[2])
        self.executed.append(core.cell_sparsity(kept, q.shape[2]).mean())
        return kept


class VerticalSlash(_Slashes):
    """Prefill: the keys, and the distances of query to key, that get most attention of the last queries; decoding is dense.

    Args:
        verticals: Keys of a head, the first 4 always among them.
        slashes: Distances of a head, 0 to 63 always among them.
        window: Last queries that are asked; the paper takes 512 where a text is searched, else 256.

    Raises:
        ValueError: A number below 4, 64 or 1.
    """

    def __init__(self, verticals: int = 315, slashes: int = 315, window: int = 256) -> None:
        super().__init__()
        checks.at_least(core.FIRST, "keys: the first 4 are always kept", verticals=verticals)
        checks.at_least(core.CELL, "distances: 0 to 63 are always kept", slashes=slashes)
        checks.at_least(1, "queries", window=window)
        self.verticals, self.slashes, self.window = verticals, slashes, window

    def choose(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The same numbers for each head."""
        return core.vertical_slash(q, k, self.verticals, self.slashes, self.window, scale)

    def prefill_overhead(self, shape: core.ModelShape, length: int, batch: int) -> float:
        """By the paper's formula."""
        return core.vertical_slash_overhead(shape, length, self.window, self.verticals, self.slashes, batch)


class FlexPrefill(_Slashes):
    """Prefill: as VerticalSlash, but each head and text takes as many keys and distances as it needs.

    Args:
        alpha: Share of the attention in [0, 1] that keys, and distances, must reach; 0: ``min_budget`` of each.
        min_budget: Least number of keys and of distances, at least 64.
        window: Last queries that are asked; the paper takes 512 where a text is searched, else 256.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, alpha: float = 0.0, min_budget: int = 315, window: int = 256) -> None:
        super().__init__()
        checks.share(alpha=alpha)
        checks.at_least(core.CELL, "distances: 0 to 63 are always kept", min_budget=min_budget)
        checks.at_least(1, "queries", window=window)
        self.alpha, self.min_budget, self.window = alpha, min_budget, window

    def choose(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """More for some heads than for others."""
        return core.flexprefill(q, k, self.alpha, self.min_budget, self.window, scale)

    def prefill_overhead(self, shape: core.ModelShape, length: int, batch: int) -> float:
        """By the paper's formula for VerticalSlash, with the least budget: what a text takes isn't known before."""
        return core.vertical_slash_overhead(shape, length, self.window, self.min_budget, self.min_budget, batch)


class BlockSparse(FrontierMethod):
    """Prefill: for each block of queries the blocks of keys whose means fit best; decoding is dense.

    Args:
        block: Tokens of a block.
        top: Blocks of keys for a block of queries: itself, the one before it, and the first always among them.
        sparsity: Instead of ``top``, as a share of the pairs of blocks in [0, 1): for each text as few blocks as don't exceed it.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, block: int = 16, top: int = 53, sparsity: float | None = None) -> None:
        super().__init__()
        checks.at_least(1, "tokens", block=block)
        checks.at_least(3, "blocks: the first, the last and the one before it are always kept", top=top)
        checks.within("[0, 1)", "a share of the pairs", sparsity=sparsity)
        self.block, self.top, self.sparsity = block, top, sparsity

    def prefill(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks:
        """Blocks on a grid."""
        blocks = -(-q.shape[2] // self.block)
        top = self.top if self.sparsity is None else core.blocks_for_sparsity(blocks, self.sparsity)
        self.executed.append(torch.tensor(core.block_sparsity(blocks, top), dtype=torch.float64))
        return core.chosen_blocks(core.block_sparse(q, k, self.block, top), self.block, q.shape[2])


class SnapKV(FrontierMethod):
    """After a dense prefill: each head of keys keeps those that the last queries look at; what comes later is kept, too.

    Args:
        capacity: Keys of a head.
        window: Last queries that are asked; the paper takes 512 where a text is searched, else 256.
        kernel: Odd number of neighbours over which scores are averaged.
        local: Last keys that are kept in any case, within the capacity.
        prefix: First keys that are kept in any case, within the capacity.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, capacity: int = 1638, window: int = 256, kernel: int = 21, local: int = 128, prefix: int = 4) -> None:
        super().__init__()
        checks.at_least(1, window=window, kernel=kernel)
        checks.at_least(0, "keys", local=local, prefix=prefix)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}: it must be odd, so that a key stands in the middle of its neighbours")
        if capacity < max(local + prefix, 1):
            raise ValueError(
                f"capacity is {capacity}: the {prefix} first and {local} last keys are kept in any case, so give {local + prefix} or more, "
                "or lower prefix and local"
            )
        self.capacity, self.window, self.kernel, self.local, self.prefix = capacity, window, kernel, local, prefix

    def compress(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        """The same number for each head."""
        return core.token_index(core.snapkv(q, k, self.capacity, self.window, self.kernel, self.local, self.prefix, scale=call.scale))


class AdaSnapKV(SnapKV):
    """As SnapKV, but heads share one budget: those that look at more keys keep more.

    Args:
        capacity: Keys of a head, on average.
        window: Last queries that are asked; the paper takes 512 where a text is searched, else 256.
        kernel: Odd number of neighbours over which scores are averaged.
        local: Last keys that are kept in any case, within the capacity.
        prefix: First keys that are kept in any case, within the capacity.
        min_share: Share of the capacity in [0, 1] that each head gets in any case.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self, capacity: int = 1638, window: int = 256, kernel: int = 21, local: int = 128, prefix: int = 4, min_share: float = 0.2
    ) -> None:
        super().__init__(capacity, window, kernel, local, prefix)
        checks.share(min_share=min_share)
        self.min_share = min_share

    def compress(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        """More for some heads than for others."""
        budget = self.capacity, self.window, self.kernel, self.local, self.prefix, self.min_share
        return core.token_index(core.ada_snapkv(q, k, *budget, scale=call.scale))


class Quest(FrontierMethod):
    """Decoding with a whole cache: each query sees the pages whose keys may fit it best, and the last one.

    Args:
        page: Tokens of a page.
        budget: Tokens that a query sees besides the last page; a multiple of ``page``.
        share: Whether the query heads of a group see the same pages.

    Raises:
        ValueError: A number below 1, or a budget that isn't a multiple of ``page``.
    """

    def __init__(self, page: int = 16, budget: int = 1632, share: bool = True) -> None:
        super().__init__()
        checks.at_least(1, "tokens", page=page)
        if budget < page or budget % page:
            raise ValueError(f"budget is {budget}: it must be a multiple of page={page}, and at least one page")
        self.page, self.budget, self.share = page, budget, share
        self._bounds: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Forget all pages."""
        super().start()
        self._bounds = {}

    def compress(self, q: Tensor, k: Tensor, call: AttentionCall) -> None:
        """Nothing is cut: the bounds of the text's whole pages are kept, which later tokens don't change."""
        whole = k.shape[2] // self.page * self.page
        self._bounds[call.key] = core.page_bounds(k[:, :, :whole], self.page)

    def decode(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        """Tokens of the best pages."""
        pages = core.quest_pages(q[:, :, 0], *self._all_bounds(k, call), self.budget // self.page, self.share)
        return core.page_tokens(pages, self.page, k.shape[2])

    def _all_bounds(self, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Those of the text, and of what came since, which beam search may have changed."""
        low, high = self._bounds.get(call.key, (k[:, :, :0], k[:, :, :0]))
        if low.shape[0] != k.shape[0] or low.shape[2] * self.page > k.shape[2]:  # another cache
            low, high = k[:, :, :0], k[:, :, :0]
        new_low, new_high = core.page_bounds(k[:, :, low.shape[2] * self.page :], self.page)
        return torch.cat([low, new_low], 2), torch.cat([high, new_high], 2)

    def decode_overhead(self, shape: core.ModelShape, length: int, batch: int) -> float:
        """By the paper's formula."""
        return core.quest_overhead(shape, length, self.page, batch)


__all__ = ["AdaSnapKV", "BlockSparse", "FlexPrefill", "FrontierMethod", "Quest", "SnapKV", "VerticalSlash"]
