"""SparseD, the sliding window and StreamingLLM in denoisers: ours, of transformers, and of others."""

import importlib.util

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import left_behind, run_two_processes, tiny_trainer
from lit_methods import SlidingWindow, SparseD, SparseDAttention, StreamingLLM
from lit_methods.datamodules import RepeatedTextDataModule
from lit_methods.datamodules.text.text import made_up_text
from lit_methods.sparse_attention.blocks import masked_attention
from lit_methods.sparse_attention.method import SparseAttention
from lit_methods.tasks.language.denoising import llada_generate

SIZES = {"vocab_size": 49, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES}


def data(**kwargs):
    return RepeatedTextDataModule(**({"block_size": 32, "repeated": 8, "batch_size": 4} | kwargs))


def model(**kwargs):
    pytest.importorskip("transformers")
    from lit_methods import MaskedDiffusionLM

    torch.manual_seed(0)
    return MaskedDiffusionLM(**({"config": LLAMA, "answer_length": 8, "steps": 8, "learning_rate": 1e-2} | kwargs))


def validated(callback, module=None, **trainer):
    module = model() if module is None else module
    found = tiny_trainer(callbacks=[callback], limit_val_batches=2, **trainer)
    found.validate(module, datamodule=data(), verbose=False)
    return {name.partition("val_")[2]: float(value) for name, value in found.callback_metrics.items() if name.startswith("sparsed/")}


class Watched(SparseDAttention):
    """Keeps the patterns of the last generation, which the method forgets."""

    def _measure(self, found, full):
        self.masks = dict(self.method.masks)
        super()._measure(found, full)


class Attention(nn.Module):
    """Anyone's attention, with the slot."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.is_causal, self.attention_function = heads, False, None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.attention_function is None:
            found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            found, _ = self.attention_function(self, q, k, v, None)
        return self.out(found.flatten(2))


class Denoiser(pl.LightningModule):
    """Nobody's module: one layer, LLaDA's loop."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(49, 16), Attention(16, 2), nn.Linear(16, 49)
        self.place = nn.Parameter(torch.randn(64, 16))
        self.generated = []

    def forward(self, tokens):
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        return self.head(x + self.attention(x))

    def on_denoise_step(self, step):
        pass

    def generate(self, prompt):
        return llada_generate(self, prompt, 48, 8, 8, 8, announce=self.on_denoise_step)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten())

    def validation_step(self, batch, batch_idx):
        self.generated.append(self.generate(batch["input_ids"][:, :-8]))

    def predict_step(self, batch, batch_idx):
        return self.generate(batch["input_ids"][:, :-8])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_keeps_about_the_share_and_logs_it():
    callback = Watched(SparseD(skip=0.2, select=0.3, block_size=4))
    figures = validated(callback)
    kept = callback.masks
    assert not callback.method.masks, "a pattern is of one generation"
    assert len(kept) == 2
    assert all(mask.shape == (4, 4, 8, 8) for mask in kept.values()), "24 tokens of prompt, 8 of answer, a mask for each of 4 query heads"
    assert 0.1 < figures["kept"] <= 0.5
    assert figures["kept"] < figures["computed"] < 1, "the first three of eight steps are full"
    assert figures["computed"] == pytest.approx((3 + 5 * figures["kept"]) / 8, abs=0.01)
    assert 0 <= figures["similarity"] <= 1
    assert 0 <= figures["head_similarity"] <= 1
    assert 0 <= figures["agreement"] <= 1
    assert figures["step_seconds"] > 0
    picture = callback.dashboard_media()["sparsed/pattern"].pixels
    assert picture.shape == (2 * 166, 4 * 166, 3)
    assert len(np.unique(picture)) == 3


@pytest.mark.parametrize("method", [SparseD(select=1.0, block_size=4), SlidingWindow(select=1.0, block_size=4), SparseD(skip=1.0)])
def test_everything_kept_is_full_attention(method):
    figures = validated(SparseDAttention(method))
    assert figures["agreement"] == 1
    assert figures["computed"] == pytest.approx(1)


def test_what_is_computed_is_masked_attention(monkeypatch):
    """Against an attention of our own that computes everything under the token mask."""
    import lit_methods.sparse_attention.attention as place

    found, masks = [], []
    real = place.block_attention

    def spy(q, k, v, kept, scale, implementation):
        out = real(q, k, v, kept, scale, implementation)
        found.append(out)
        masks.append(masked_attention(q, k, v, kept.mask(q.shape[2], k.shape[2]), scale))
        return out

    monkeypatch.setattr(place, "block_attention", spy)
    validated(SparseDAttention(SparseD(block_size=4), compare=False))
    assert len(found) == 2 * 5 * 2, "two batches, five sparse steps, two layers"
    for ours, reference in zip(found, masks, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(("method", "sinks"), [(SlidingWindow(0.3, 4), 0), (StreamingLLM(0.3, 4), 1)])
def test_baselines_look_at_neighbours_from_the_first_step_on(method, sinks):
    callback = Watched(method)
    figures = validated(callback)
    assert figures["kept"] == figures["computed"] == pytest.approx(3 / 8)
    mask = next(iter(callback.masks.values()))[0, 0]
    assert mask[:, :sinks].all()
    assert mask[7].tolist() == [bool(sinks)] + [False] * 4 + [not sinks, True, True]


def test_modules_of_others_are_served_and_left_as_they_were():
    figures = validated(SparseDAttention(SparseD(select=0.0, block_size=4)), Denoiser())
    assert figures["kept"] < 0.4
    few = {"limit_train_batches": 2, "limit_val_batches": 1}
    assert not left_behind(Denoiser, lambda: SparseDAttention(SparseD(block_size=4)), data(), **few)
    if importlib.util.find_spec("transformers") is not None:
        assert not left_behind(model, lambda: SparseDAttention(SparseD(block_size=4)), data(), **few)


def loader():
    made = data()
    made.setup("fit")
    return DataLoader(made.val_set, batch_size=4, collate_fn=torch.utils.data.default_collate)


def test_a_generation_that_raises_leaves_nothing():
    module = model()
    configs = [layer.config for layer in module.modules() if hasattr(layer, "config")]

    def broken(step):
        if step.index == 5:
            raise RuntimeError("broken")

    module.on_denoise_step = broken
    callback = SparseDAttention(SparseD(block_size=4), compare=False)
    with pytest.raises(RuntimeError, match="broken"):
        validated(callback, module)
    assert module.on_denoise_step is broken
    assert "generate" not in vars(module)
    assert all(layer.config is config for layer, config in zip([m for m in module.modules() if hasattr(m, "config")], configs, strict=True))
    assert not callback.method.masks


def test_predictions_are_sparse_and_the_loss_is_not():
    plain, module = Denoiser(), Denoiser()
    module.load_state_dict(plain.state_dict())
    trainer = tiny_trainer(callbacks=[SparseDAttention(SlidingWindow(select=0.0, block_size=4))])
    sparse, full = torch.cat(trainer.predict(module, loader())), torch.cat(tiny_trainer().predict(plain, loader()))
    assert not torch.equal(sparse, full)
    for one in (plain, module):
        options = {"callbacks": [SparseDAttention(SparseD(block_size=4))]} if one is module else {}
        tiny_trainer(max_steps=3, limit_val_batches=1, **options).fit(one, loader(), loader())
    for (name, ours), theirs in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_models_of_transformers(kind):
    extra = {"num_key_value_heads": 1} if kind == "llama" else {"global_attn_every_n_layers": 1, **SPECIAL} if kind == "modernbert" else {}
    module = model(config={"model_type": kind, "max_position_embeddings": 64, **SIZES, **extra})
    assert validated(SparseDAttention(SparseD(block_size=4)), module)["computed"] < 1


def test_dream_and_bf16():
    module = model(sampler="dream", temperature=0.5)
    assert validated(SparseDAttention(SparseD(skip=1.0)), module)["agreement"] == 1, "both generations draw the same numbers"
    assert validated(SparseDAttention(SparseD(block_size=4)), model(), precision="bf16-mixed")["computed"] < 1


class Silent(Denoiser):
    """Doesn't say which step comes next."""

    def generate(self, prompt):
        return llada_generate(self, prompt, 48, 8, 8, 8)


class Drawing(Denoiser):
    """Draws from the global generator."""

    def on_denoise_step(self, step):
        torch.rand(1)


def test_looking_changes_no_random_numbers():
    after = []
    for compare in (False, True):
        torch.manual_seed(0)
        module = Drawing()
        tiny_trainer(callbacks=[SparseDAttention(SparseD(block_size=4), compare=compare)]).validate(
            module, datamodule=data(), verbose=False
        )
        after.append(torch.rand(1))
    assert torch.equal(*after)


class Bare(pl.LightningModule):
    """Doesn't denoise."""

    def validation_step(self, batch, batch_idx):
        pass


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="SparseDAttention: Bare has no generate and no on_denoise_step"):
        tiny_trainer(callbacks=[SparseDAttention()]).validate(Bare(), loader(), verbose=False)
    with pytest.raises(ValueError, match=r"SparseDAttention: .*no attention layer called \['layer.7'\]"):
        validated(SparseDAttention(targets=["layer.7"]), Denoiser())
    with pytest.raises(ValueError, match="SparseDAttention: generate of Silent never called on_denoise_step"):
        validated(SparseDAttention(SparseD(block_size=4), compare=False), Silent())
    with pytest.raises(ValueError, match="method is a SparseAttention, which leaves denoising dense"):
        SparseDAttention(SparseAttention())
    with pytest.raises(ValueError, match="targets is the string"):
        SparseDAttention(targets="attention")
    with pytest.raises(ValueError, match="select is 2"):
        SparseD(select=2.0)
    with pytest.raises(ValueError, match="sinks is 0"):
        StreamingLLM(sinks=0)
    with pytest.raises(ValueError, match="implementation is 'other'"):
        SparseDAttention(implementation="other")


def measured(root, **trainer):
    found = tiny_trainer(callbacks=[SparseDAttention(SparseD(block_size=4))], limit_val_batches=1.0, **trainer)
    found.validate(model(), datamodule=data(root=root, batch_size=4 // trainer.get("devices", 1)), verbose=False)
    return {name: float(value) for name, value in found.callback_metrics.items() if name.startswith("sparsed/") and "seconds" not in name}


def two(root):
    return measured(root, devices=2, strategy="ddp")


def test_two_processes_log_what_one_does(tmp_path):
    (tmp_path / "text.txt").write_text(made_up_text(400)[:4000])  # 8 texts for validation
    one = measured(tmp_path / "text.txt")
    first, second = run_two_processes(two, tmp_path / "text.txt")
    assert first == second == pytest.approx(one, abs=1e-5)
    assert {f"sparsed/val_{name}" for name in ("agreement", "computed", "kept", "similarity", "head_similarity")} <= set(one)
