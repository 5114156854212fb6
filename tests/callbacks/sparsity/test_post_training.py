"""Magnitude, Wanda, SparseGPT and DSnoT on modules that aren't ours: before fit, within it, in evaluations, block by block."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    kill_and_resume,
    left_behind,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import DSnoT, ExactResume, Magnitude, SparseGPT, SparsityReport, Wanda
from lit_methods.callbacks.sparsity.input_statistics import input_statistics
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.callbacks.sparsity.one_shot import sparsegpt, wanda_mask

ALL = (Magnitude, Wanda, SparseGPT, DSnoT)
LINEAR = ["network.5.weight", "network.7.weight"]  # of the helpers' small network; 144 and 8 inputs


def loader(batch_size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size)


class Tokens(torch.utils.data.Dataset):
    """``size`` windows of 5 token ids below 32."""

    def __init__(self, size: int = 16) -> None:
        self.tokens = torch.randint(0, 32, (size, 5), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


class Language(pl.LightningModule):
    """A language model of transformers; the batch is (B, L) tokens."""

    def __init__(self, kind: str = "llama", **sizes: Any) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(7)
        config = {
            "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
            "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
            "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "is_decoder": True},
        }[kind]
        settings = transformers.AutoConfig.for_model(kind, vocab_size=32, **(config | sizes))
        self.model = transformers.AutoModelForCausalLM.from_config(settings)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch, labels=batch).loss)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Tokens(), batch_size=4)

    test_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


BLOCKS = {"llama": "model.model.layers", "gpt2": "model.transformer.h", "bert": "model.bert.encoder.layer"}


def run_test(module: pl.LightningModule, callback: pl.Callback, **kwargs: Any) -> pl.Trainer:
    trainer = tiny_trainer(callbacks=[callback])
    trainer.test(module, verbose=False, **kwargs)
    return trainer


# ---- in a fit --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("build", [Classifier, TwoOptimisers, compiled_classifier])
def test_pruned_before_the_first_step_and_sparse_to_the_end(method, build):
    callback, module = method(0.5, samples=12), build()
    report = SparsityReport()
    trainer = tiny_trainer(max_epochs=1, callbacks=[report, callback])
    trainer.fit(module, loader())
    assert sorted(callback.store.masks) == [name for name in sorted(callback.store.masks) if "conv" not in name]
    for name, mask in callback.store.masks.items():
        weight = callback.store.weights[name]
        assert not weight[~mask].any()
        assert weight[mask].all()
        assert abs(mask.double().mean() - 0.5) < 0.05
    assert trainer.callback_metrics["post_training/density"] == pytest.approx(callback.store.density())
    assert trainer.callback_metrics["post_training/expected_error"] > 0


def test_pruned_behind_a_step_and_dense_before_it():
    densities = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            densities.append(callback.store.density())

    callback = DSnoT(0.5, at_step=2, samples=12)
    tiny_trainer(max_steps=4, callbacks=[callback, Watch()]).fit(Classifier(), loader())
    assert densities[0] == 1
    assert densities[1:] == [densities[1]] * 3
    assert densities[1] == pytest.approx(0.5, abs=0.01)
    late = Wanda(0.5, at_step=9)
    with pytest.warns(UserWarning, match="training ended before step 9"):
        tiny_trainer(max_steps=2, callbacks=[late]).fit(Classifier(), loader())


def test_a_killed_run_ends_like_a_whole_one(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True, with_epoch=False)

    for method, at_step, kill_at in ((SparseGPT, 0, 2), (DSnoT, 3, 2)):
        folder = tmp_path / method.__name__
        folder.mkdir()
        made: list[Any] = []

        def build(method: Any = method, at_step: int = at_step, made: list[Any] = made) -> Any:
            made.append(method(0.5, samples=12, at_step=at_step))
            return Classifier(), Data(), [made[-1], ExactResume()]

        whole, resumed = kill_and_resume(build, 5, kill_at, folder)
        assert_state_dicts_equal(resumed, whole)
        assert made[0].report == made[-1].report


def test_a_second_fit_goes_on_with_the_masks_and_nothing_is_left_behind():
    callback, module = DSnoT(0.5, samples=12), Classifier()
    masks = []
    for _ in range(2):
        tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
        masks.append({name: mask.clone() for name, mask in callback.store.masks.items()})
    assert_state_dicts_equal(*masks)
    assert left_behind(Classifier, lambda: Wanda(0.5, samples=12), loader()) == {}


def sparse_in_two_processes() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, callback = Language(), SparseGPT(0.5, samples=16, blocks=BLOCKS["llama"])
    trainer = tiny_trainer(max_steps=1, callbacks=[callback], devices=2, strategy="ddp")
    trainer.fit(module, DataLoader(Tokens(), batch_size=2))
    return dict(callback.store.masks), {name: torch.tensor(own["error"]) for name, own in callback.report.items()}


def test_two_processes_add_up_their_statistics():
    """Their two shares are the windows of one process: in the fit's loader each rank sees all of them."""
    (masks, errors), (other, same) = run_two_processes(sparse_in_two_processes)
    assert_state_dicts_equal(masks, other)
    assert_state_dicts_equal(errors, same)
    module, callback = Language(), SparseGPT(0.5, samples=8, blocks=BLOCKS["llama"])
    tiny_trainer(max_steps=1, callbacks=[callback]).fit(module, DataLoader(Tokens(), batch_size=2))
    alone = {name: torch.tensor(own["error"]) for name, own in callback.report.items()}
    assert_state_dicts_equal(masks, dict(callback.store.masks))
    assert_state_dicts_equal(errors, alone, rtol=1e-4)


# ---- block by block --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_each_block_sees_what_pruned_ones_put_out(kind, method):
    module = Language(kind)
    reference = copy.deepcopy(module.model).eval()
    callback = method(0.5, samples=8, blocks=BLOCKS[kind])
    run_test(module, callback)
    x = torch.stack([Tokens()[index] for index in range(8)])
    masks = dict(callback.store.masks)
    assert masks, "the head is tied to the embedding or outside of the blocks: it stays dense"
    assert all(name.startswith(BLOCKS[kind]) for name in masks)
    blocks = list(dict.fromkeys(name.removeprefix(BLOCKS[kind]).split(".")[1] for name in masks))
    for number in blocks:  # the whole model anew for each block, with those before it pruned
        names = [name for name in masks if name.startswith(f"{BLOCKS[kind]}.{number}.")]
        layers = {name: reference.get_submodule(name.removeprefix("model.").removesuffix(".weight")) for name in names}
        seen: dict[str, Tensor] = {}

        def look(name: str, seen: dict[str, Tensor] = seen) -> Any:
            return lambda _, args: seen.update({name: args[0]})

        handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
        with torch.no_grad():
            reference(input_ids=x)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            statistics = input_statistics(seen[name].detach(), hessian=True)
            weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
            with torch.no_grad():
                masked = weight * wanda_mask(weight, statistics.square, 0.5)
                weight.copy_(masked if method is Wanda else sparsegpt(weight, statistics.hessian, 0.5))
    trained = {name.removeprefix("model."): value for name, value in cloned_state(module).items()}
    assert_state_dicts_equal(trained, cloned_state(reference), rtol=1e-3, atol=1e-5)


def test_one_block_is_held_at_a_time(monkeypatch):
    from lit_methods.callbacks.sparsity import post_training

    held = {}
    for blocks in (BLOCKS["llama"], None):
        made: list[Any] = []

        class Kept(post_training.LayerwiseCalibrator):
            def __init__(self, *args: Any, made: list[Any] = made) -> None:
                super().__init__(*args)
                made.append(self)

        monkeypatch.setattr(post_training, "LayerwiseCalibrator", Kept)
        run_test(Language(num_hidden_layers=8, tie_word_embeddings=True), SparseGPT(0.5, samples=8, blocks=blocks))
        held[blocks] = made[0].held
    activations = 8 * 5 * 16 * 4
    assert held[BLOCKS["llama"]] < held[None] / 8 + activations + 8


def test_attention_of_torch_is_left_out_and_a_vision_transformer_is_pruned():
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(7)
    network = timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4)
    module, callback = Classifier(network), DSnoT(pattern="2:4", samples=8, blocks="network.blocks")
    tiny_trainer(max_steps=1, callbacks=[callback]).fit(module, loader())
    assert len(callback.store.masks) == 8
    assert all(is_nm(callback.store.weights[name], 2, 4) for name in callback.store.masks)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    torch.manual_seed(7)
    rows = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), encoder, nn.Flatten(), nn.Linear(48, 4))
    chained = Wanda(samples=8, blocks="network.2.layers")
    with pytest.warns(UserWarning, match="MultiheadAttention doesn't call it"):
        tiny_trainer(max_steps=1, callbacks=[chained]).fit(Classifier(rows), loader())
    assert sorted(chained.store.masks) == [f"network.2.layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]


# ---- in evaluations --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_a_test_prunes_first_and_looking_changes_nothing_else(method):
    run_test(Language(), pl.Callback())
    state = torch.get_rng_state()
    module = Language()
    before = cloned_state(module)
    callback = method(pattern="2:4", samples=8, skip=["model.lm_head"])
    trainer = run_test(module, callback)
    assert torch.equal(torch.get_rng_state(), state), "as without the callback"
    after = cloned_state(module)
    for name, value in before.items():
        if name in callback.store.masks:
            assert is_nm(after[name], 2, 4)
            assert method is SparseGPT or torch.equal(after[name], value * callback.store.masks[name])
        else:
            assert torch.equal(after[name], value)
    assert trainer.callback_metrics["post_training/density"] == 0.5
    (table,) = (callback.dashboard_media()[panel.key] for panel in callback.panels if type(panel).__name__ == "TablePanel")
    assert len(table.rows) == len(callback.store.masks) == 21


def test_a_pruned_checkpoint_is_tested_as_it_is_and_loads_into_a_plain_module(tmp_path):
    module, callback = Language(), DSnoT(0.5, samples=8, blocks=BLOCKS["llama"])
    trainer = tiny_trainer(max_steps=1, callbacks=[callback])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    other, again = Language(), DSnoT(0.5, samples=8, blocks=BLOCKS["llama"])
    run_test(other, again, ckpt_path=tmp_path / "pruned.ckpt", weights_only=True)
    assert_state_dicts_equal(cloned_state(other), cloned_state(module))
    assert_state_dicts_equal(dict(again.store.masks), dict(callback.store.masks))
    assert again.report == callback.report
    plain = Language()
    plain.load_state_dict(torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"])
    assert all(not plain.get_parameter(name)[~mask].any() for name, mask in callback.store.masks.items())


def test_without_swaps_it_is_wanda_and_untuned_layers_keep_that_mask():
    masks = {}
    for name, callback in {
        "wanda": Wanda(0.5, samples=8, blocks=BLOCKS["llama"]),
        "none": DSnoT(0.5, max_cycles=0, samples=8, blocks=BLOCKS["llama"]),
        "attention": DSnoT(0.5, update_threshold=0.0, untuned=["*mlp*"], samples=8),
        "all": DSnoT(0.5, update_threshold=0.0, samples=8),
    }.items():
        run_test(Language(), callback)
        masks[name] = dict(callback.store.masks)
    assert_state_dicts_equal(masks["wanda"], masks["none"])
    differ = [name for name in masks["all"] if not torch.equal(masks["all"][name], masks["attention"][name])]
    assert differ
    assert all("mlp" in name for name in differ)


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: Wanda(targets=["nothing.*"]), "matches no submodule"),
        (lambda: Wanda(targets=["network.0", "network.5"]), r"network.0.weight \(no linear layer\)"),
        (lambda: DSnoT(pattern="5:10"), r"DSnoT: network.5.weight: 5:10 doesn't fit a layer of 144 inputs"),
        (lambda: Wanda(blocks="network.4"), "network.4', but that is a Flatten .*one of network"),
        (lambda: Wanda(blocks="encoder"), "there is no such submodule of Classifier"),
        (lambda: Wanda(forward="embed"), "forward is 'embed'"),
        (lambda: Wanda(skip=["network.5", "network.7"]), "no linear layer"),
    ],
)
def test_what_can_not_work_is_refused_before_training(callback, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(max_steps=1, callbacks=[callback()]).fit(Classifier(), loader())


def test_calibration_that_can_not_work_is_refused():
    with pytest.raises(ValueError, match="no calibration data"):
        tiny_trainer(callbacks=[Wanda()]).validate(Classifier(), loader())
    module = Language()
    module.calibration_dataloader = list  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="there are no calibration data"):
        run_test(module, Wanda())
    with pytest.raises(ValueError, match=r"block 1 .* doesn't get what the one before puts out"):
        run_test(Adding(), Wanda(blocks="layers", samples=4))
    other = Adding()
    other.unused = nn.Linear(5, 5)
    with pytest.raises(ValueError, match=r"unused.* got no input"):
        run_test(other, Wanda(samples=4))


class Adding(pl.LightningModule):
    """Two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        x = self.layers[0](batch.float())
        self.layers[1](x.relu())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Tokens(), batch_size=4)

    test_dataloader = train_dataloader


@pytest.mark.parametrize(
    "arguments",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"pattern": "4:4"}, {"samples": 0}, {"at_step": -1}, {"initial": "random"}, {"max_cycles": -1}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DSnoT(**arguments)
