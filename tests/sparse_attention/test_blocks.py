"""Attention over kept keys against plain formulas with a dense mask."""

import pytest
import torch
from torch import Tensor

from lit_methods.sparse_attention.blocks import KeptBlocks, all_pairs, block_attention, masked_attention, token_attention


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time."""
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        own = h // (q.shape[1] // k.shape[1])
        seen = mask[b, h // (q.shape[1] // mask.shape[1]), i]
        if seen.any():
            result[b, h, i] = (k[b, own, seen] @ q[b, h, i] / q.shape[3] ** 0.5).softmax(0) @ v[b, own, seen]
    return result


def some_blocks(heads: int, length: int, causal: bool, columns: bool) -> KeptBlocks:
    """Ranges of 8 keys that begin anywhere, apart from each other, and single keys between them; some blocks have none."""
    generator = torch.Generator().manual_seed(1)
    blocks = -(-length // 16)
    starts = torch.rand(2, heads, blocks, length // 12, generator=generator).argsort(-1) * 12 + 2
    starts = torch.where(torch.rand(starts.shape, generator=generator) < 0.4, starts, -1)
    starts[0, 0, 0] = -1
    single = torch.where(torch.rand(starts.shape, generator=generator) < 0.5, torch.arange(length // 12) * 12 + 10, -1)
    return KeptBlocks(starts, 16, 8, causal, single if columns else None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "chosen", "length", "columns"), [(4, 4, 50, True), (4, 2, 64, False), (4, 1, 7, False), (2, 2, 33, True)]
)
def test_every_way_equals_one_query_at_a_time(causal: bool, heads: int, chosen: int, length: int, columns: bool) -> None:
    q, k, v = drawn(2, heads, length, 8), drawn(2, 2, length, 8, seed=1), drawn(2, 2, length, 4, seed=2)
    kept = some_blocks(chosen, length, causal, columns)
    mask = kept.mask(length, length)
    wanted = dense(q, k, v, mask)
    torch.testing.assert_close(masked_attention(q, k, v, mask), wanted)
    torch.testing.assert_close(block_attention(q, k, v, kept, implementation="dense"), wanted)
    torch.testing.assert_close(block_attention(q, k, v, kept, implementation="blocked"), wanted)
    torch.testing.assert_close(kept.pairs(length, length), mask.sum((-1, -2)).double())


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_on_a_grid_by_flex_attention(causal: bool) -> None:
    length = 70
    q, k, v = (drawn(1, 2, length, 16, seed=seed).float() for seed in range(3))
    grid = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    grid[..., 0] = True
    kept = KeptBlocks.from_mask(grid, 16, causal=causal)
    assert kept.aligned()
    rows = grid.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :length, :length]
    assert torch.equal(kept.mask(length, length), rows.tril() if causal else rows)
    wanted = block_attention(q, k, v, kept, implementation="dense")
    torch.testing.assert_close(block_attention(q, k, v, kept, implementation="flex"), wanted)
    torch.testing.assert_close(block_attention(q, k, v, kept, implementation="blocked"), wanted)


def test_only_kept_keys_are_read() -> None:
    """A key that nobody keeps may be anything."""
    q, k, v = drawn(1, 1, 64, 4), drawn(1, 1, 64, 4, seed=1), drawn(1, 1, 64, 4, seed=2)
    grid = torch.eye(4, dtype=torch.bool)[None, None]
    grid[0, 0, 2, 2] = False
    kept = KeptBlocks.from_mask(grid, 16, causal=True)
    poisoned = v.clone()
    poisoned[:, :, 32:48] = torch.nan
    found = block_attention(q, k, poisoned, kept)
    assert torch.equal(found, block_attention(q, k, v, kept))
    assert not found[:, :, 32:48].any()


def test_blocks_without_a_key_give_nothing() -> None:
    q = drawn(1, 2, 20, 4)
    kept = KeptBlocks.from_mask(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 8, causal=True)
    assert not block_attention(q, q, q, kept).any()
    assert not kept.pairs(20, 20).any()


def test_gradients_reach_queries_keys_and_values() -> None:
    values = [drawn(2, heads, 40, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    kept = some_blocks(4, 40, True, True)
    grads = [torch.autograd.grad(block_attention(*values, kept, implementation=way).square().sum(), values) for way in ("blocked", "dense")]
    torch.testing.assert_close(grads[0], grads[1])


def test_low_precision_stays_low() -> None:
    q, k, v = (drawn(2, 2, 40, 8, seed=seed).bfloat16() for seed in range(3))
    found = block_attention(q, k, v, some_blocks(2, 40, True, False))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, block_attention(q, k, v, some_blocks(2, 40, True, False), implementation="dense"), rtol=0.05, atol=0.02
    )


@pytest.mark.parametrize("chosen", [4, 2])
def test_one_query_and_chosen_tokens(chosen: int) -> None:
    q, k, v = drawn(2, 4, 1, 8), drawn(2, 2, 30, 8, seed=1), drawn(2, 2, 30, 8, seed=2)
    index = torch.rand(2, chosen, 30, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :9]
    index[0, 0, 3:] = -1
    index[1, 0] = -1
    mask = torch.zeros(2, chosen, 1, 31, dtype=torch.bool).scatter_(-1, index.where(index >= 0, 30)[:, :, None], True)[..., :30]
    torch.testing.assert_close(token_attention(q, k, v, index), dense(q, k, v, mask))


def test_pairs_of_full_attention() -> None:
    assert all_pairs(5, 5, True) == 15
    assert all_pairs(5, 7, False) == 35


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = drawn(1, 3, 32, 4), drawn(1, 2, 32, 4)
    kept = KeptBlocks(torch.zeros(1, 1, 2, 1, dtype=torch.int64), 16, 16, True)
    with pytest.raises(ValueError, match="must divide that of query heads"):
        block_attention(q, k, k, kept)
    with pytest.raises(ValueError, match="of one width"):
        block_attention(drawn(1, 2, 32, 8), k, k, kept)
    with pytest.raises(ValueError, match=r"\(batch, heads, 3, ranges\)"):
        block_attention(drawn(1, 2, 40, 4), drawn(1, 2, 40, 4), drawn(1, 2, 40, 4), kept)
    with pytest.raises(ValueError, match="as many keys as queries"):
        block_attention(drawn(1, 2, 16, 4), k, k, kept)
    odd = KeptBlocks(torch.full((1, 1, 2, 1), 3), 16, 16, True)
    with pytest.raises(ValueError, match="begin anywhere"):
        block_attention(k, k, k, odd, implementation="flex")
    with pytest.raises(ValueError, match="must be one of"):
        block_attention(k, k, k, kept, implementation="fast")  # type: ignore[arg-type]
