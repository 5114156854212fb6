"""The Sparse Frontier against the authors' code; see tests/golden/data/sparse_frontier/README.md for the origin."""

import numpy as np
import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparse_attention.sparse_frontier import core
from lit_methods.sparse_attention.blocks import KeptBlocks, block_attention, token_attention
from lit_methods.tasks.language.answers import answer_scores

Outputs = dict[str, Tensor | np.ndarray | float | int]


def qkv(case: GoldenCase) -> tuple[Tensor, Tensor, Tensor]:
    return case.tensor("in_q"), case.tensor("in_k"), case.tensor("in_v")


def executed(case: GoldenCase, kept: KeptBlocks) -> Outputs:
    q, k, v = qkv(case)
    return {"out_mask": kept.mask(q.shape[2], k.shape[2])[0], "out_attention": block_attention(q, k, v, kept)}


def vertical_slash(case: GoldenCase) -> Outputs:
    q, k, _ = qkv(case)
    columns, offsets = core.vertical_slash(q, k, case.hp("vertical_size"), case.hp("slash_size"), case.hp("approximation_size"))
    kept = core.slash_blocks(columns, offsets, q.shape[2])
    return executed(case, kept) | {
        "out_vertical_index_sorted": columns[0],
        "out_slash_offset_sorted": offsets[0],
        "out_sparsity": core.cell_sparsity(kept, q.shape[2])[0],
    }


def flexprefill(case: GoldenCase) -> Outputs:
    q, k, _ = qkv(case)
    columns, offsets = core.flexprefill(q, k, case.hp("alpha"), case.hp("min_budget"), case.hp("approximation_size"))
    kept = core.slash_blocks(columns, offsets, q.shape[2])
    return executed(case, kept) | {
        "out_vertical_index_sorted": columns[0],
        "out_slash_offset_sorted": offsets[0],
        "out_vertical_size": columns.shape[-1],
        "out_slash_size": offsets.shape[-1],
        "out_sparsity": core.cell_sparsity(kept, q.shape[2])[0],
    }


def block_sparse(case: GoldenCase) -> Outputs:
    q, k, _ = qkv(case)
    size = case.hp("chunk_size")
    index = core.block_sparse(q, k, size, case.hp("top_chunks"))
    blocks = -(-q.shape[2] // size)
    return executed(case, core.chosen_blocks(index, size, q.shape[2])) | {
        "out_block_index": index[0],
        "out_sparsity": core.block_sparsity(blocks, case.hp("top_chunks")),
        "out_blocks_for_target_sparsity": core.blocks_for_sparsity(blocks, case.hp("target_sparsity")),
    }


def eviction(case: GoldenCase, kept: Tensor) -> Outputs:
    return {
        "out_kept_token_mask": kept[0],
        "out_tokens_per_head": kept[0].sum(-1),
        "out_sparsity": 1 - kept[0].float().mean(),
    }


def budget(case: GoldenCase) -> dict[str, int]:
    names = {
        "capacity": "token_capacity", "window": "approximation_window", "kernel": "kernel_size", "local": "local_window",
        "prefix": "prefix_tokens",
    }  # fmt: skip
    return {ours: case.hp(theirs) for ours, theirs in names.items()}


def tokens_last(case: GoldenCase) -> tuple[Tensor, Tensor]:
    return case.tensor("in_q").transpose(0, 1)[None], case.tensor("in_k").transpose(0, 1)[None]


def snapkv(case: GoldenCase) -> Outputs:
    return eviction(case, core.snapkv(*tokens_last(case), **budget(case)))


def ada_snapkv(case: GoldenCase) -> Outputs:
    return eviction(case, core.ada_snapkv(*tokens_last(case), **budget(case), min_share=case.hp("min_head_capacity_ratio")))


def quest(case: GoldenCase) -> Outputs:
    q, k, v = qkv(case)
    page, heads = case.hp("page_size"), q.shape[1]
    chosen, attended, found = [], [], []
    for length in range(case.hp("prefill_tokens") + 1, q.shape[2] + 1):
        query, keys = q[:, :, length - 1 : length], k[:, :, :length]
        pages = core.quest_pages(
            query[:, :, 0], *core.page_bounds(keys, page), case.hp("token_budget") // page, bool(case.hp("share_pages"))
        )
        tokens = core.page_tokens(pages, page, length)
        chosen.append(pages[0].repeat_interleave(heads // pages.shape[1], 0))
        attended.append((tokens[0, 0] >= 0).sum())
        found.append(token_attention(query, keys, v[:, :, :length], tokens)[0, :, 0])
    low, high = core.page_bounds(k, page)
    return {
        "out_page_min_after": low[0].transpose(0, 1),
        "out_page_max_after": high[0].transpose(0, 1),
        "out_selected_pages_sorted": torch.stack(chosen),
        "out_attended_tokens": torch.stack(attended),
        "out_attention": torch.stack(found),
    }


def score(case: GoldenCase) -> Outputs:
    found = answer_scores(case.arrays["in_task"].item(), case.arrays["in_pred"].tolist(), case.arrays["in_gold"].tolist())
    return {"out_per_sample": np.nan_to_num(found), "out_mean": float(np.nanmean(found)), "out_variance": float(np.nanvar(found, ddof=1))}


def cost_model(case: GoldenCase) -> Outputs:
    shape = core.ModelShape(*(case.hp(name) for name in ("layers", "hidden", "q_heads", "kv_heads", "head_dim", "mlp", "vocab")))
    given = {"density": case.hp("density"), "batch": case.hp("batch")}
    length, cache = case.hp("seq_len"), core.decode_cache(shape, case.hp("seq_len"), **given)
    choice = case.hp("estimation_queries"), case.hp("verticals"), case.hp("slashes")
    return {
        "out_prefill_flops": core.prefill_flops(shape, length, **given),
        "out_prefill_attention_flops": core.attention_flops(shape, length, **given),
        "out_decode_memory": core.decode_weights(shape) + cache,
        "out_decode_weights": core.decode_weights(shape),
        "out_decode_kv": cache,
        "out_vertical_slash_overhead": core.vertical_slash_overhead(shape, length, *choice, batch=case.hp("batch")),
        "out_quest_overhead": core.quest_overhead(shape, length, case.hp("page_size"), case.hp("batch")),
    }


attention = {"overrides": {"out_attention": (0.0, 1e-5)}}
test_golden = golden_test(
    "sparse_frontier",
    {
        "vertical_slash": Kind(vertical_slash, **attention),
        "flexprefill": Kind(flexprefill, **attention),
        "block_sparse": Kind(block_sparse, **attention),
        "snapkv": Kind(snapkv),
        "ada_snapkv": Kind(ada_snapkv),
        "quest": Kind(quest, **attention),
        "score": Kind(score),
        "cost_model": Kind(cost_model, rtol=1e-9),
    },
)
