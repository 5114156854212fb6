"""LongContextLM with SparseAttentionCallback by a Trainer against the page's loop: weights, losses, and what each method answers."""

import copy

import pytest
import torch

from lit_methods import LongContextLM
from lit_methods.callbacks import AdaSnapKV, BlockSparse, FlexPrefill, Quest, SnapKV, SparseAttentionCallback, VerticalSlash
from lit_methods.datamodules import TokenTasksDataModule
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama", "vocab_size": 772, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "attn_implementation": "eager",
}  # fmt: skip
METHODS = {
    "dense": None,
    "vertical_slash": VerticalSlash(6, 64, 16),
    "flexprefill": FlexPrefill(0.1, 64, 16),
    "block_sparse": BlockSparse(8, 3),
    "snapkv": SnapKV(20, 8, 5, 8, 2),
    "ada_snapkv": AdaSnapKV(20, 8, 5, 8, 2),
    "quest": Quest(8, 16),
}


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    data = TokenTasksDataModule(length=260, keys=256, values=2, questions=4, num_train=12, num_val=4, batch_size=4)
    data.setup("fit")
    batches, (texts,) = list(data.train_dataloader()), list(data.val_dataloader())
    loop, start = page_loop("sparse_frontier"), LongContextLM(4, config=LLAMA, learning_rate=0.02, warmup_share=0, final_share=1).to(dtype)
    losses = {}
    for name, method in METHODS.items():
        module, model = copy.deepcopy(start), copy.deepcopy(start.model)
        logs = run(module, data, [SparseAttentionCallback(method)], limit_val_batches=1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        wanted = loop.train(model, optimizer, batches)
        assert len(logs) == 3
        assert_same_logs([{"language/loss": step["language/loss"]} for step in logs], wanted, TOLERANCE[dtype])
        assert_same_state(module.model, model, TOLERANCE[dtype])
        loss, accuracy = loop.answer(model, texts, 4, name)
        found = module.trainer.callback_metrics
        torch.testing.assert_close(found["language/val_loss"], loss.to(found["language/val_loss"].dtype), rtol=1e-5, atol=1e-6)
        assert float(found["language/val_accuracy"]) == pytest.approx(float(accuracy))
        losses[name] = round(float(loss), 6)
    assert len(set(losses.values())) == len(losses), f"each method answers in its own way: {losses}"
