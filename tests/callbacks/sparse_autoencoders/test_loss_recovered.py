"""Loss Recovered: against a plain computation, on models that aren't ours, with hooks that match nothing."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import run_two_processes, tiny_trainer
from lit_methods import SparseAutoencoder
from lit_methods.callbacks import LossRecovered
from lit_methods.callbacks.sparse_autoencoders.loss_recovered import loss_recovered, spliced_losses
from lit_methods.datamodules import HarvestedActivations, TextDataModule
from lit_methods.datamodules.activations.harvest import TinyLanguageModel
from lit_methods.datamodules.activations.splicing import spliced

TOKENS = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")


def halved(x: Tensor) -> Tensor:
    return 0.5 * x


@torch.no_grad()
def test_losses_are_those_of_a_model_with_the_block_changed_by_hand():
    model = TinyLanguageModel(11).eval()
    found = spliced_losses(model, {"input_ids": TOKENS}, "blocks.0", halved, skip_first=2)
    mask = nn.Transformer.generate_square_subsequent_mask(8)

    def by_hand(factor: float) -> Tensor:
        x = model.blocks[0](model.embedding(TOKENS), src_mask=mask, is_causal=True)
        x = torch.cat([x[:, :2], factor * x[:, 2:]], 1)
        return cross_entropy(model.head(model.blocks[1](x, src_mask=mask, is_causal=True)))

    for ours, factor in ((found.original, 1.0), (found.spliced, 0.5), (found.zero, 0.0)):
        torch.testing.assert_close(ours, by_hand(factor).double(), rtol=1e-5, atol=1e-5)
    assert int(found.tokens) == 3 * 7
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_labels_and_padding_say_which_tokens_count():
    model = TinyLanguageModel(11).eval()
    mask = torch.ones_like(TOKENS)
    mask[:, 6:] = 0
    assert int(spliced_losses(model, {"input_ids": TOKENS, "attention_mask": mask}, "blocks.1", halved).tokens) == 3 * 5
    labels = TOKENS.roll(-1, 1)
    labels[:, -1] = -100
    aligned = spliced_losses(model, {"input_ids": TOKENS, "labels": labels}, "blocks.1", halved)
    for ours, wanted in zip(aligned, spliced_losses(model, TOKENS, "blocks.1", halved), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_identity_recovers_all_and_zeros_nothing():
    model = TinyLanguageModel(11).eval()
    for change, share in ((nn.Identity(), 1.0), (torch.zeros_like, 0.0)):
        found = spliced_losses(model, TOKENS, "blocks.1", change)
        assert float(loss_recovered(found.original, found.spliced, found.zero)) == pytest.approx(share, abs=1e-6)


class Outputs(nn.Module):
    """Gives tuples, dicts, or calls its block with keywords, as models of others do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.block = kind, Block(kind)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(hidden=x)
        return out["hidden"] if self.kind == "dict" else out[0] if self.kind == "tuple" else out


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor) -> Any:
        return {"hidden": hidden + 1, "more": 3} if self.kind == "dict" else (hidden + 1, None) if self.kind == "tuple" else hidden + 1


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_splicing_into_modules_of_any_form(kind):
    model, x = Outputs(kind), torch.zeros(2, 3)
    with spliced(model, "block", lambda value: value * 10):
        assert model(x).equal(torch.full((2, 3), 10.0))
    with spliced(model, "block", lambda value: value + 4, site="input"):
        assert model(x).equal(torch.full((2, 3), 5.0))
    assert model(x).equal(torch.ones(2, 3))


def test_a_hook_that_matches_nothing_or_is_not_run():
    model = TinyLanguageModel(11).eval()
    with pytest.raises(ValueError, match=r"hook='block\.1' is no submodule of TinyLanguageModel; nearest of .*: blocks\.1"):
        spliced_losses(model, TOKENS, "block.1", halved)
    with pytest.raises(ValueError, match=r"expected \(B, L, d\)"):
        spliced_losses(
            nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(32, 11 * 8), nn.Unflatten(1, (8, 11))), TOKENS, "1", halved
        )
    model.spare = nn.Identity()
    with pytest.raises(ValueError, match="hook='spare' isn't run"), spliced(model, "spare", halved):
        model(TOKENS)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


def data_of(**options: Any) -> HarvestedActivations:
    text = TextDataModule(block_size=16, batch_size=4)
    text.setup("fit")
    model = TinyLanguageModel(text.vocab_size, width=8)
    return HarvestedActivations(
        model=model, text=text, hook="blocks.0", tokens=256, val_tokens=64, buffer_size=128, batch_size=32, **options
    )


def test_a_run_logs_what_the_functions_give(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    data, module = data_of(skip_first=1), SparseAutoencoder(8, 16, activation="relu", normalize="norm_sqrt")
    trainer = tiny_trainer(max_epochs=1, num_sanity_val_steps=1, callbacks=[LossRecovered(batches=2)])
    trainer.fit(module, datamodule=data)
    sums = torch.zeros(4, dtype=torch.float64)
    batches = iter(data.text.val_dataloader())
    for batch in (next(batches), next(batches)):
        sums += torch.stack(spliced_losses(data.model.eval(), batch, "blocks.0", module.reconstruct, skip_first=1))
    original, replaced, zero = (sums[:3] / sums[3]).tolist()
    found = {name.partition("/")[2]: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("loss_recovered")}
    wanted = {"val_share": (replaced - zero) / (original - zero), "val_original": original, "val_spliced": replaced, "val_zero": zero}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_language_model_by_argument_and_an_autoencoder_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    data = data_of()

    class Inner(nn.Module):
        decoder_directions, decoder_bias = torch.eye(8), torch.zeros(8)

        def encode(self, x: Tensor) -> Tensor:
            return x

        decode = encode

    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sae = Inner()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    callback = LossRecovered(data.model, data.text, "blocks.1", autoencoder="sae", batches=1)
    trainer = tiny_trainer(callbacks=[callback])
    found = trainer.test(Holder(), dataloaders=[torch.zeros(2, 8)], verbose=False)[0]
    assert found["loss_recovered/test_share"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hook": "blocks.7"}, r"LossRecovered: hook='blocks\.7' is no submodule of TinyLanguageModel; nearest of .*: blocks"),
        ({"autoencoder": "sae"}, "LossRecovered: autoencoder='sae' is no submodule"),
        ({"batches": 0}, "batches"),
        ({"site": "middle"}, "site"),
    ],
)
def test_what_can_not_be_measured_is_refused(given, said, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=said):
        tiny_trainer(max_epochs=1, callbacks=[LossRecovered(**given)]).fit(
            SparseAutoencoder(8, 16, activation="relu"), datamodule=data_of()
        )


def test_data_without_a_language_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="LossRecovered: language_model, text isn't given and HarvestedActivations has none"):
        tiny_trainer(max_epochs=1, callbacks=[LossRecovered()]).fit(
            SparseAutoencoder(32, 16, activation="relu"), datamodule=HarvestedActivations()
        )


def share_of_two() -> float:
    trainer = tiny_trainer(devices=2, strategy="ddp", callbacks=[LossRecovered(batches=4)])
    trainer.validate(fixed(), datamodule=data_of(), verbose=False)
    return float(trainer.callback_metrics["loss_recovered/val_share"])


def fixed() -> SparseAutoencoder:
    pl.seed_everything(1, verbose=False)
    return SparseAutoencoder(8, 16, activation="relu")


def test_two_processes_read_what_one_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    trainer = tiny_trainer(callbacks=[LossRecovered(batches=4)])
    trainer.validate(fixed(), datamodule=data_of(), verbose=False)
    one = float(trainer.callback_metrics["loss_recovered/val_share"])
    assert run_two_processes(share_of_two) == pytest.approx([one, one], rel=1e-5)
