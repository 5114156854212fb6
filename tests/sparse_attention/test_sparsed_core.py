"""SparseD's pattern against loops, and its edges."""

import pytest
import torch

from lit_methods.sparse_attention.sparsed.core import (
    attention_block_mask,
    blocks_to_keep,
    first_generation_block,
    pattern_similarity,
    select_blocks,
    selection_step,
    sparsed_pattern,
    step_modes,
    window_pattern,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_mask(attention, block, share):
    """One head, in plain loops."""
    rows, columns = (-(-size // block) for size in attention.shape)
    score = torch.zeros(rows, columns)
    for i in range(attention.shape[0]):
        for j in range(attention.shape[1]):
            score[i // block, j // block] += attention[i, j].abs() / block**2
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    keep = min(max(1, int(columns * share) + 1), columns)
    for i in range(rows):
        mask[i, score[i].argsort(descending=True)[:keep]] = True
    return mask


@pytest.mark.parametrize(("queries", "keys", "block", "share"), [(12, 12, 4, 0.3), (7, 13, 3, 0.0), (5, 5, 8, 0.5), (1, 9, 2, 1.0)])
def test_the_mask_is_the_loop(queries, keys, block, share):
    attention = drawn(2, 3, queries, keys).softmax(-1)
    found = attention_block_mask(attention, block, share)
    for b in range(2):
        for h in range(3):
            assert torch.equal(found[b, h], slow_mask(attention[b, h], block, share))


def test_pieces_choose_as_the_whole():
    q, k = drawn(2, 3, 37, 8), drawn(2, 3, 37, 8, seed=1)
    whole = select_blocks(q, k, 4, 0.3)
    assert torch.equal(whole, select_blocks(q, k, 4, 0.3, at_once=1))
    assert torch.equal(whole, attention_block_mask((q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1), 4, 0.3))
    assert not torch.equal(whole, select_blocks(q, k, 4, 0.3, scale=0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole, select_blocks(q, k, 4, 0.3)), "the scores are float32 under autocast, too"


@pytest.mark.parametrize(
    ("tokens", "new", "block", "first"),
    [(48, 16, 8, 4), (45, 12, 8, 5), (16, 0, 4, 3), (16, 16, 4, 0), (16, 40, 4, 0), (3, 1, 8, 0), (17, 1, 4, 4), (17, 2, 4, 4)],
)
def test_the_border_counts_as_prompt(tokens, new, block, first):
    assert first_generation_block(tokens, new, block) == first
    blocks = -(-tokens // block)
    assert first == next((i for i in range(blocks) if tokens - i * block <= new), blocks - 1)


@pytest.mark.parametrize("isolate", [False, True])
def test_each_part_keeps_its_share(isolate):
    q, k = drawn(1, 4, 64, 8), drawn(1, 4, 64, 8, seed=1)
    mask, first = sparsed_pattern(q, k, 4, 0.3, 24, isolate)
    assert first == 10
    assert (mask[..., first:].sum(-1) == blocks_to_keep(6, 0.3)).all()
    prompt = mask[..., :first].sum(-1)
    assert (prompt == blocks_to_keep(10, 0.3)).all() if isolate else (prompt <= blocks_to_keep(16, 0.3)).all()


def test_keys_of_the_answer_can_not_crowd_out_a_prompt_that_is_chosen_for_itself():
    q, k = torch.ones(1, 1, 32, 4), torch.ones(1, 1, 32, 4)
    k[:, :, 16:] = 3  # all queries look at the answer
    assert sparsed_pattern(q, k, 4, 0.3, 16)[0][..., :4].sum() == 0
    assert (sparsed_pattern(q, k, 4, 0.3, 16, isolate_prompt=True)[0][..., :4].sum(-1) == 2).all()


def test_everything_is_kept_where_the_share_is_one():
    q = drawn(1, 2, 10, 4)
    assert sparsed_pattern(q, q, 4, 1.0, 4)[0].all()
    assert sparsed_pattern(q, q, 16, 0.0, 4)[0].all(), "one block is kept at least"
    assert sparsed_pattern(q, q, 4, 1.0, 10, isolate_prompt=True)[0].all(), "without a prompt"


@pytest.mark.parametrize(("steps", "skip", "full"), [(10, 0.2, 4), (128, 0.2, 27), (1, 0.0, 1), (4, 1.0, 4), (5, 0.0, 2)])
def test_full_attention_runs_in_two_steps_more_than_skipped(steps, skip, full):
    modes = step_modes(steps, skip)
    assert (modes < 2).sum() == full == min(steps, int(steps * skip) + 2)
    assert (modes == 1).sum() == (selection_step(steps, skip) < steps)


def test_similarity_is_by_head():
    one = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    other = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    torch.testing.assert_close(pattern_similarity(one, other), torch.tensor([1 / 3, 1.0, 1.0]))


@pytest.mark.parametrize("sinks", [0, 1, 9])
@pytest.mark.parametrize(("blocks", "share"), [(16, 0.3), (1, 0.3), (5, 0.0), (4, 1.0)])
def test_windows_keep_as_many_as_sparsed_and_the_query_itself(blocks, share, sinks):
    mask = window_pattern(blocks, share, sinks)
    keep = blocks_to_keep(blocks, share)
    assert (mask.sum(1) == keep).all()
    kept_sinks = min(sinks, keep - 1)
    assert mask[:, :kept_sinks].all()
    assert mask.diagonal().all()


def test_bad_input_is_named():
    q = drawn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"share is 1.5"):
        sparsed_pattern(q, q, 4, 1.5, 2)
    with pytest.raises(ValueError, match="block_size is 0"):
        sparsed_pattern(q, q, 0, 0.5, 2)
    with pytest.raises(ValueError, match="of one shape"):
        sparsed_pattern(q, drawn(1, 2, 8, 4), 4, 0.5, 2)
    with pytest.raises(ValueError, match="skip is -1"):
        step_modes(4, -1)
    with pytest.raises(ValueError, match="a key at least"):
        attention_block_mask(torch.zeros(1, 4, 0), 2, 0.5)
