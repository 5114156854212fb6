"""CausalLM on models of transformers that are built from a configuration, and CAST on it."""

import math
import sys

import pytest
import torch

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, tiny_trainer
from lit_methods.callbacks import ExactResume
from lit_methods.optim import warmup_cosine
from lit_methods.tasks.language.causal_lm import causal_model, token_losses

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def model(**kwargs):
    pytest.importorskip("transformers")
    from lit_methods import CausalLM

    torch.manual_seed(0)
    return CausalLM(**({"config": CONFIG, "learning_rate": 1e-2} | kwargs))


def data(**kwargs):
    from lit_methods.datamodules import TextDataModule

    return TextDataModule(**({"block_size": 16, "batch_size": 8} | kwargs))


def test_token_losses_count_what_counts():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, -100, 4], [1, 1, -100]])
    total, count = token_losses(logits, labels)
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 0] + log_p[0, 2, 4] + log_p[1, 0, 1] + log_p[1, 1, 1])
    torch.testing.assert_close(total, expected)
    assert int(count) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_losses(logits.bfloat16(), labels)[0].dtype == torch.float32


def test_learning_rate():
    rates = [warmup_cosine(step, 12, 2, 0.1) for step in range(14)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[12] == rates[13] == pytest.approx(0.1)
    assert warmup_cosine(5, 10, 0, 1.0) == 1.0


def test_loss_falls_and_validation_is_the_mean_over_tokens():
    module, text = model(), data()
    trainer = tiny_trainer(max_steps=30, limit_val_batches=2)
    trainer.fit(module, datamodule=text)
    metrics = trainer.callback_metrics
    assert metrics["language/loss"] < 3.0 < math.log(40)
    trainer.validate(module, datamodule=text, verbose=False)
    value = float(trainer.callback_metrics["language/val_loss"])
    batches = list(text.val_dataloader())[:2]
    with torch.no_grad():
        sums = [token_losses(module.eval()(batch["input_ids"]), batch["labels"]) for batch in batches]
    assert value == pytest.approx(float(sum(s for s, _ in sums) / sum(c for _, c in sums)), rel=1e-5)
    assert float(trainer.callback_metrics["language/val_perplexity"]) == pytest.approx(math.exp(value), rel=1e-5)
    with torch.no_grad():
        prediction = module.predict_step(batches[0], 0)
    assert float(-prediction["log_prob"].mean()) == pytest.approx(float(sums[0][0] / sums[0][1]), rel=1e-5)


def test_the_model_is_causal():
    module = model().eval()
    tokens = torch.randint(0, 40, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6:] = 1
    with torch.no_grad():
        torch.testing.assert_close(module(tokens)[:, :6], module(changed)[:, :6])
        assert not torch.allclose(module(tokens)[:, 6:], module(changed)[:, 6:])


def test_a_folder_and_a_checkpoint_give_the_same_weights(tmp_path):
    first = model()
    first.model.save_pretrained(tmp_path / "folder")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "lightning.ckpt")
    for other in (model(config=None, name_or_path=str(tmp_path / "folder")), model(pretrained=tmp_path / "lightning.ckpt")):
        assert_state_dicts_equal(cloned_state(other), cloned_state(first))
        assert other.model.training
        assert all(parameter.dtype == torch.float32 for parameter in other.parameters())


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="give one of them"):
        model(config=None)
    with pytest.raises(ValueError, match="model_type is 'lama'"):
        model(config={**CONFIG, "model_type": "lama"})
    with pytest.raises(ValueError, match="learning_rate is 0"):
        model(learning_rate=0.0)
    with pytest.raises(ValueError, match=r"set config\.vocab_size to"):
        tiny_trainer(max_steps=1).fit(model(config={**CONFIG, "vocab_size": 8}), datamodule=data())


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"lit-methods\[transformers\]"):
        causal_model(None, CONFIG)


def test_a_killed_run_ends_bit_equal(tmp_path):
    pytest.importorskip("transformers")
    whole, resumed = kill_and_resume(lambda: (model(), data(), [ExactResume()]), steps=6, kill_at=3, tmp_path=tmp_path)
    assert_state_dicts_equal(resumed, whole)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_cast_makes_the_blocks_sparse(kind):
    pytest.importorskip("transformers")
    from lit_methods.callbacks import CAST, AdamS
    from lit_methods.callbacks.sparsity.masks import is_nm

    targets = {"llama": "model.model.layers.*_proj", "gpt2": "model.transformer.h.*.c_*", "opt": "model.model.decoder.layers.*"}[kind]
    config = {
        "llama": CONFIG,
        "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "opt": {
            **{key: CONFIG[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{"model_type": "opt", "ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        },
    }[kind]
    module, callback = model(config=config), CAST(2, 4, targets=[targets], l1_decay=0.1, labels="labels", mask_interval=2)
    trainer = tiny_trainer(max_steps=4, limit_val_batches=1, callbacks=[callback], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data())
    assert isinstance(trainer.optimizers[0], AdamS)
    masks = callback.sparsity_masks()
    weights = dict(module.named_parameters())
    for name, mask in masks.items():
        dim = 0 if kind == "gpt2" else 1  # Conv1D keeps (in, out)
        assert is_nm(weights[name], 2, 4, dim), name
        assert torch.equal(weights[name] != 0, mask)
    dense = set(weights) - set(masks)
    assert len(masks) == {"llama": 7, "gpt2": 4, "opt": 6}[kind]
    assert not any("proj" in name and name.endswith("weight") for name in dense if kind == "llama")
    assert trainer.callback_metrics["cast/kl"] >= 0
