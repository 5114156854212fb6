"""The six methods against rules written out in plain loops, in models, and in an evaluation."""

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from lit_methods import LongContextLM
from lit_methods.callbacks import AdaSnapKV, BlockSparse, FlexPrefill, IsoCostReport, Quest, SnapKV, SparseAttentionCallback, VerticalSlash
from lit_methods.callbacks.sparse_attention.sparse_frontier import core, report
from lit_methods.datamodules import LongTasksDataModule, TokenTasksDataModule
from lit_methods.sparse_attention.attention import AttentionSwap
from lit_methods.sparse_attention.blocks import masked_attention, token_attention
from lit_methods.sparse_attention.method import AttentionCall, SparseAttention

transformers = pytest.importorskip("transformers")

CALL = AttentionCall(0, 8**-0.5)
LLAMA = {
    "model_type": "llama", "vocab_size": 586, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def drawn(heads: int, length: int, width: int = 8, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, length, width, generator=torch.Generator().manual_seed(seed))


# ---- what is chosen --------------------------------------------------------------------------------------------------------------------


def walked(columns: list[int], offsets: list[int], end: int) -> tuple[list[int], list[int]]:
    """Ranges and single keys of one block of queries, by a walk along both lists."""
    left = sorted((own for own in offsets if 0 <= own < end), reverse=True)
    ranges, singles, waiting = [], [], sorted(own for own in columns if own >= 0)
    if not left:
        return [], []
    stop = max(end - left.pop(0), 64)
    begin = stop - 64
    while True:
        if waiting and waiting[0] < stop:
            key = waiting.pop(0)
            if key < begin:
                singles.append(key)
        elif left:
            reach = max(end - left.pop(0), 64)
            if reach > stop + 64:
                ranges += range(begin, stop, 64)
                begin, stop = reach - 64, reach
            elif reach > stop:
                stop += 64
        else:
            return ranges + list(range(begin, stop, 64)), singles


@pytest.mark.parametrize(("length", "seed"), [(700, 0), (256, 1), (65, 2), (30, 3)])
def test_ranges_are_merged_as_by_a_walk(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pick = [np.sort(rng.permutation(length)[: min(length, 40)]) for _ in range(4)]
    columns, offsets = (torch.from_numpy(np.stack(own)).view(1, 2, -1) for own in (pick[:2], pick[2:]))
    columns[0, 1, :5] = -1
    offsets[0, 0] = torch.cat([torch.full((2,), -1), offsets[0, 0, 2:]]).sort().values
    kept = core.slash_blocks(columns, offsets, length)
    assert kept.columns is not None
    for head in range(2):
        for block in range(-(-length // 64)):
            ranges, singles = walked(columns[0, head].tolist(), offsets[0, head].tolist(), 64 * (block + 1))
            assert [own for own in kept.starts[0, head, block].tolist() if own >= 0] == ranges
            assert [own for own in kept.columns[0, head, block].tolist() if own >= 0] == [own for own in singles if own < 64 * (block + 1)]


def test_diagonals_are_summed() -> None:
    weights = torch.rand(2, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack(
        [sum((weights[:, :, i, 4 + i - offset] for i in range(5) if 4 + i - offset >= 0), torch.zeros(2, 3)) for offset in range(9)], -1
    )
    torch.testing.assert_close(core.slash_sums(weights), wanted)


def test_flexprefill_without_a_share_is_vertical_slash() -> None:
    q, k = drawn(4, 300), drawn(2, 300, seed=1)
    ours, theirs = core.flexprefill(q, k, 0.0, 70, 32), core.vertical_slash(q, k, 70, 70, 32)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    more = core.flexprefill(q, k, 0.9, 70, 32)
    counts = (more[0] >= 0).sum(-1)
    assert counts.min() > 70
    assert len(counts.unique()) > 1, "heads take what they need"


def test_heads_of_a_group_share_their_keys() -> None:
    """The same as with keys that are repeated for each query head."""
    q, k = drawn(4, 200), drawn(2, 200, seed=1)
    repeated = k.repeat_interleave(2, 1)
    for choose in (lambda key: core.vertical_slash(q, key, 20, 80, 32)[1], lambda key: core.block_sparse(q, key, 16, 4)):
        assert torch.equal(choose(k), choose(repeated))


@pytest.mark.parametrize("sparsity", [0.95, 0.9, 0.7, 0.0])
def test_blocks_for_a_sparsity(sparsity: float) -> None:
    """The paper's table: 26, 53 and 188 of 16 tokens at 16,384."""
    wanted = {0.95: 26, 0.9: 53}
    found = core.blocks_for_sparsity(1024, sparsity)
    assert found == wanted.get(sparsity, found)
    assert core.block_sparsity(1024, found) <= sparsity or found == 1024
    assert found == 3 or core.block_sparsity(1024, found - 1) > sparsity


def test_a_bound_of_a_page_is_a_bound() -> None:
    q, k = drawn(2, 1)[:, :, 0], drawn(2, 40, seed=1)
    low, high = core.page_bounds(k, 8)
    best = (q[:, :, None] @ k.transpose(-1, -2))[:, :, 0].unflatten(-1, (5, 8)).amax(-1)
    bound = torch.maximum(q[:, :, None] * low, q[:, :, None] * high).sum(-1)
    assert (best <= bound + 1e-5).all()
    order = bound[..., :4].topk(2).indices.sort().values
    assert torch.equal(core.quest_pages(q, low, high, 2)[..., :2], order)


@pytest.mark.parametrize(
    "method",
    [
        VerticalSlash(400, 400),
        FlexPrefill(1.0, 64),
        BlockSparse(16, 100),
        BlockSparse(16, sparsity=0.0),
        SnapKV(500),
        AdaSnapKV(500),
        Quest(16, 512),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("length", [1, 5, 70, 130])
def test_a_budget_for_everything_is_full_attention(method: Any, length: int) -> None:
    """Texts shorter than a block, a page and a window, too."""
    q, k, v = drawn(4, length + 1), drawn(2, length + 1, seed=1), drawn(2, length + 1, seed=2)
    swap = AttentionSwap(method)
    swap.method.start()
    full = masked_attention(q, k, v, torch.ones(1, 1, length + 1, length + 1, dtype=torch.bool).tril())
    read = swap.attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], 0, CALL.scale, causal=True)
    torch.testing.assert_close(read, full[:, :, :length])
    torch.testing.assert_close(swap.attention(q[:, :, length:], k, v, 0, CALL.scale, causal=True), full[:, :, length:])


def test_ada_snapkv_gives_heads_what_they_need() -> None:
    q, k, v = drawn(4, 120), drawn(2, 120, seed=1), drawn(2, 121, seed=2)
    k[:, 0] *= 3
    method = AdaSnapKV(24, window=8, kernel=5, local=4, prefix=2)
    index = method.compress(q, k, CALL)
    counts = (index >= 0).sum(-1)
    assert (counts.sum(-1) == 48).all()
    assert (counts[:, 0] != counts[:, 1]).any()
    assert ((index == 0).any(-1) & (index == 119).any(-1)).all()
    assert torch.isfinite(token_attention(drawn(4, 1), torch.cat([k, k[:, :, :1]], 2), v, index)).all()


def test_pages_grow_with_what_is_decoded() -> None:
    """Bounds that are kept from the text equal those of the whole cache, and another cache is noticed."""
    q, k = drawn(4, 60), drawn(2, 60, seed=1)
    method, fresh = Quest(8, 16), Quest(8, 16)
    method.compress(q[:, :, :37], k[:, :, :37], CALL)
    for length in range(38, 60):
        query, keys = q[:, :, length - 1 : length], k[:, :, :length]
        assert torch.equal(method.decode(query, keys, CALL), fresh.decode(query, keys, CALL))
    assert torch.equal(method.decode(q[:1, :, :1], k[:1, :, :20], CALL), fresh.decode(q[:1, :, :1], k[:1, :, :20], CALL))


def test_values_out_of_range_are_refused() -> None:
    wrong: list[Any] = [
        lambda: VerticalSlash(3), lambda: VerticalSlash(slashes=63), lambda: FlexPrefill(1.5),
        lambda: FlexPrefill(min_budget=10),
        lambda: BlockSparse(0), lambda: BlockSparse(top=2), lambda: BlockSparse(sparsity=1.0), lambda: SnapKV(100),
        lambda: SnapKV(kernel=4),
        lambda: AdaSnapKV(min_share=2.0), lambda: Quest(16, 24), lambda: Quest(0), lambda: SparseAttentionCallback("quest"),
        lambda: SparseAttentionCallback(during=["fit"]), lambda: SparseAttentionCallback(implementation="fast"),
        lambda: IsoCostReport(batch=0),
    ]  # fmt: skip
    for make in wrong:
        with pytest.raises(ValueError, match=r"(must|give|needs)"):
            make()


# ---- in a module -----------------------------------------------------------------------------------------------------------------------


def module(**more: Any) -> LongContextLM:
    torch.manual_seed(0)
    return LongContextLM(**{"decoded_tokens": 4, "config": LLAMA, **more})


def data(**more: Any) -> TokenTasksDataModule:
    return TokenTasksDataModule(**{"length": 68, "questions": 4, "num_train": 16, "num_val": 6, "batch_size": 4, **more})


def trainer(*callbacks: pl.Callback, **more: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **more})


def figures_of(method: SparseAttention | None, model: LongContextLM, **more: Any) -> dict[str, float]:
    run = trainer(SparseAttentionCallback(method, **more))
    run.test(model, data(), verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_methods_act_where_they_should() -> None:
    model = module()
    model.model.lm_head.weight.data.mul_(20)  # differences show
    plain = trainer()
    plain.test(model, data(), verbose=False)
    loss = float(plain.callback_metrics["language/test_loss"])
    full = figures_of(None, model)
    assert full["language/test_loss"] == pytest.approx(loss, abs=1e-6)
    assert full["sparse_frontier/test_prefill_sparsity"] == full["sparse_frontier/test_decode_sparsity"] == 0
    for method, place in (
        (BlockSparse(8, 3), "prefill"), (SnapKV(16, 8, 3, 8, 2), "decode"), (AdaSnapKV(16, 8, 3, 8, 2), "decode"), (Quest(4, 16), "decode"),
    ):  # fmt: skip
        found = figures_of(method, model)
        other = {"prefill": "decode", "decode": "prefill"}[place]
        assert abs(found["language/test_loss"] - loss) > 1e-4, method
        assert found[f"sparse_frontier/test_{place}_sparsity"] > 0.3
        assert found[f"sparse_frontier/test_{other}_sparsity"] == 0
        dense = figures_of(copy.deepcopy(method), model, implementation="dense")
        assert found["language/test_loss"] == pytest.approx(dense["language/test_loss"], abs=1e-5)
        assert figures_of(method, model, during=["validate"])["language/test_loss"] == pytest.approx(loss, abs=1e-6)
    assert figures_of(Quest(4, 16), model, targets=["*.1.self_attn"])["sparse_frontier/test_decode_sparsity"] > 0.3
    again = trainer()
    again.test(model, data(), verbose=False)
    assert float(again.callback_metrics["language/test_loss"]) == loss, "nothing stays behind"


def test_a_run_that_raises_leaves_nothing() -> None:
    class Fails(LongContextLM):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise RuntimeError("stop")

    model = Fails(4, config=LLAMA)
    callback = SparseAttentionCallback(Quest(4, 16))
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callback, max_steps=1).fit(model, data())
    assert not [key for own in model.modules() for key in vars(own) if "lit_methods" in key]
    assert callback.swap is None


def test_modules_without_attention_are_refused() -> None:
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    with pytest.raises(ValueError, match="SparseAttentionCallback: BoringModel has no attention layer"):
        trainer(SparseAttentionCallback()).test(BoringModel(), BoringDataModule(), verbose=False)
    with pytest.raises(ValueError, match="there is no SparseAttentionCallback"):
        trainer(IsoCostReport()).test(BoringModel(), BoringDataModule(), verbose=False)


def test_replies_are_scored() -> None:
    """A reply is what the model writes; random weights write nothing right, and an answer that is put in its mouth counts."""
    model = module(config={**LLAMA, "vocab_size": 256, "max_position_embeddings": 4096}, max_new_tokens=3)
    questions = LongTasksDataModule(task="story_filtering", length=2000, samples=2, batch_size=2)
    run = trainer(SparseAttentionCallback(VerticalSlash(8, 64, 32)))
    run.test(model, questions, verbose=False)
    assert float(run.callback_metrics["language/test_score"]) == 0
    assert run.callback_metrics["sparse_frontier/test_prefill_sparsity"] > 0.2
    assert run.callback_metrics["sparse_frontier/test_executed_sparsity"] != run.callback_metrics["sparse_frontier/test_prefill_sparsity"]
    golds = iter([questions.test_set[index]["answer"] for index in range(2)])
    model.reply = lambda ids, mask: torch.tensor([list(f"<answer>{next(golds)}</answer>".ljust(40).encode()) for _ in ids])  # type: ignore[method-assign]
    run.test(model, questions, verbose=False)
    assert float(run.callback_metrics["language/test_score"]) == 1


def test_reading_question_by_question_is_reading_at_once() -> None:
    model = module().eval()
    tokens = torch.randint(1, 80, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        torch.testing.assert_close(model.read(tokens, mask), model(tokens, mask)[:, -4:])
    with pytest.raises(ValueError, match="some must be left"):
        model.read(tokens[:, :4])


# ---- the report ------------------------------------------------------------------------------------------------------------------------


def test_runs_are_collected(tmp_path: Any) -> None:
    model = module()
    for name, method in (("dense", None), ("quest", Quest(4, 16)), ("blocks", BlockSparse(8, 3))):
        isocost = IsoCostReport(runs=tmp_path, metric="language/{part}_accuracy", batch=2)
        run = trainer(SparseAttentionCallback(method), isocost, default_root_dir=tmp_path / name)
        run.test(model, data(), verbose=False)
    found = {one["method"]: one for one in report.read_records(tmp_path)}
    assert found.keys() == {"dense", "Quest", "BlockSparse"}
    shape = core.ModelShape(2, 32, 4, 2, 8, 64, 586)
    assert report.model_shape(model) == shape
    assert found["dense"]["prefill_flops"] == core.prefill_flops(shape, 68, batch=2)
    assert found["dense"]["decode_memory"] == core.decode_weights(shape) + core.decode_cache(shape, 68, batch=2)
    assert found["Quest"]["decode_memory"] < found["dense"]["decode_memory"]
    assert found["Quest"]["budget"] == {"page": 4, "budget": 16, "share": True}
    media = isocost.dashboard_media()
    assert len(media["isocost/runs"].rows) == 3  # type: ignore[union-attr]
    assert {"isocost/prefill_flops", "isocost/decode_memory", "isocost/tasks"} <= media.keys()
    longer = {**found["dense"], "score": 0.8}, {**found["Quest"], "score": 0.6}
    assert report.errors(longer) == [0, pytest.approx(0.25)]
    assert "isocost/lengths" in report.draw(longer)
    (tmp_path / "dense" / "isocost.json").write_text("{}")
    with pytest.warns(UserWarning, match="leaves"):
        assert len(report.read_records(tmp_path)) == 2


def test_the_frontier_and_the_law() -> None:
    assert core.pareto_front([1, 2, 3, 2, 1], [1, 3, 2, 3, 0]).tolist() == [True, True, False, True, False]
    np.testing.assert_allclose(core.relative_error([0.5, 0.0], [0.25, 0.0]), [0.5, np.nan])
    sizes, lengths, compressions = (own.ravel() for own in np.meshgrid([1e6, 1e7, 1e8], [64, 128], [2, 4, 8], indexing="ij"))
    scores = np.exp(-1 + 0.05 * np.log(sizes) - 0.1 * np.log(lengths) - 0.2 * np.log(compressions))
    law = core.fit_score_law(sizes, lengths, compressions, scores)
    np.testing.assert_allclose([law.constant, law.size, law.length, law.compression], [-1, 0.05, -0.1, -0.2])
    assert core.held_out_fit(sizes, lengths, compressions, scores, "compression") == pytest.approx(1)
    assert core.fit_score_law([5, 5], [1, 1], [2, 4], [0.5, 0.25]).size == 0
    with pytest.raises(ValueError, match="give more runs"):
        core.fit_score_law([5], [1], [2], [0.0])
    with pytest.raises(ValueError, match="the same size"):
        core.held_out_fit([5, 5], [1, 2], [2, 4], [0.5, 0.25], "size")
    dense = [1.0] * 20
    assert core.largest_safe_sparsity(dense, {0.5: dense, 0.9: [0.0] * 10 + [1.0] * 10}) == 0.5
