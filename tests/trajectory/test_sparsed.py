"""MaskedDiffusionLM with SparseDAttention by a Trainer against the page's loop: losses, weights, patterns, and what is generated."""

import lightning.pytorch as pl
import pytest
import torch

from lit_methods import MaskedDiffusionLM, SparseD, SparseDAttention
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

pytest.importorskip("transformers")

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, **SIZES}


class Reseed(pl.Callback):
    """The numbers of each step, whatever a loader draws between two."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(batch_idx)


class Watched(SparseD):
    """Keeps the patterns behind a generation."""

    def denoise(self, q, k, call):
        found = super().denoise(q, k, call)
        if call.key in self.masks:
            self.seen = {**getattr(self, "seen", {}), call.key[0]: self.masks[call.key]}
        return found


def reseeded(batches):
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        yield batch


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_and_its_generation_are_the_loop(dtype):
    torch.manual_seed(0)
    options = {"answer_length": 8, "steps": 8, "block_length": 4, "learning_rate": 1e-2, "warmup_share": 0.0, "final_share": 1.0}
    module, theirs = (MaskedDiffusionLM(config=LLAMA, **options).to(dtype) for _ in range(2))
    theirs.load_state_dict(module.state_dict())
    batches = [{"input_ids": torch.randint(0, 29, (3, 30))} for _ in range(4)]
    method = Watched(skip=0.2, select=0.3, block_size=4)
    callback = SparseDAttention(method)
    logs = run(module, batches, [callback, Reseed()])

    loop = page_loop("sparsed")
    optimizer = torch.optim.AdamW(theirs.model.parameters(), lr=1e-2, weight_decay=0.0)
    wanted = loop.train(theirs.model.train(), optimizer, reseeded(batches), mask_token=29)
    assert len(wanted) == 4
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.model, theirs.model, TOLERANCE[dtype])

    prompt = batches[0]["input_ids"][:, :22]
    ours = torch.cat(
        [found["generated"] for found in module.trainer.predict(module, torch.utils.data.DataLoader(batches[:1], batch_size=None))]
    )
    answer, masks = loop.generate(theirs.model.eval(), prompt, 29, new_tokens=8, block_length=4, steps=8, block_size=4)
    assert torch.equal(ours, answer)
    assert len(masks) == len(method.seen) == 2
    for layer, mask in enumerate(masks.values()):
        assert torch.equal(method.seen[layer], mask)
        assert 0 < mask.float().mean() < 1
