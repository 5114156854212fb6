"""Masks on modules that aren't ours: exactly sparse after every step, whatever the optimiser, and gone without a trace."""

from itertools import product
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import EMATeacher, ExactResume, IterativeSoftShrinkage, NMSparsity, RandomPruning
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.dynamic import DynamicSparsity
from lit_methods.callbacks.sparsity.store import MaskStore, prunable_weights


def loader(batch_size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size)


def rigl(**kwargs: Any) -> DynamicSparsity:
    return DynamicSparsity(**{"density": 0.3, "method": "rigl", "interval": 1, "end_fraction": 1.0, **kwargs})


class Watch(pl.Callback):
    """Checks after every batch that dead weights and their momenta are 0, and collects what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.densities: list[float] = []
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_mask_updated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: MaskCallback) -> None:
        self.told.append(trainer.global_step)
        self.masks.append({name: mask.clone() for name, mask in source.sparsity_masks().items()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        (callback,) = (c for c in trainer.callbacks if isinstance(c, MaskCallback))
        store = callback.store
        self.densities.append(store.density())
        for name, mask in store.masks.items():
            weight = store.weights[name]
            assert not weight[~mask].any()
            for optimizer in trainer.optimizers:
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                        assert not value[~mask].any()


@pytest.mark.parametrize("make", [Classifier, TwoOptimisers, compiled_classifier, resnet_classifier])
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_weights_are_exactly_sparse_after_every_step(make, method):
    if make is resnet_classifier and method == "set":
        pytest.skip("covered by rigl: the same path")
    module, plain, watch, callback = make(), make(), Watch(), rigl(method=method)
    batch_size = 12 if make is resnet_classifier else 6
    tiny_trainer(max_steps=1).fit(plain, loader(batch_size))
    tiny_trainer(max_epochs=1, callbacks=[watch, callback]).fit(module, loader(batch_size))
    assert fingerprint(module) == fingerprint(plain)
    assert len(set(watch.densities)) == 1
    total = sum(weight.numel() for weight in callback.store.weights.values())
    assert sum(int(mask.sum()) for mask in callback.store.masks.values()) == round(0.3 * total)
    for name, parameter in module.named_parameters():
        if name in callback.store.masks:
            assert torch.equal(parameter != 0, callback.store.masks[name] & (parameter != 0))
    changed = any(not torch.equal(watch.masks[0][name], mask) for name, mask in callback.store.masks.items())
    assert changed == (method != "static")


def test_weight_decay_momentum_and_adam_dont_revive_the_dead():
    class Adam(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    watch, callback = Watch(), rigl(mask_gradients=False)
    tiny_trainer(max_epochs=2, callbacks=[callback, watch], gradient_clip_val=0.5, accumulate_grad_batches=2).fit(Adam(), loader())
    assert watch.told[0] == 0
    assert watch.told[1:] == [1, 2, 3], "4 optimiser steps in all: updates after steps strictly before the end"


def test_masked_gradients_count_in_no_norm():
    norms = []

    class Norm(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append([float(p.grad.norm()) for p in self.network[5].parameters()])
            gradient = self.network[5].weight.grad
            assert not gradient[~callback.store.masks["network.5.weight"]].any()

    callback = rigl(method="static")
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(Norm(), loader())
    assert norms


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_a_killed_run_ends_like_an_uninterrupted_one(method, tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True)

    def make():
        return Classifier(), Data(), [rigl(method=method), ExactResume()]

    whole, resumed = kill_and_resume(make, 8, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def train_in_two_processes(method: str) -> tuple[dict, dict, bool]:
    module, callback = Classifier(), rigl(method=method)
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback], devices=2, strategy="ddp", accelerator="cpu")
    trainer.fit(module, loader(3))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, dict(callback.store.masks), callback.store.version > 1


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_two_processes_have_the_same_masks(method):
    (state, masks, moved), (other_state, other_masks, _) = run_two_processes(train_in_two_processes, method)
    assert moved
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_copies_are_masked_when_masks_change(first):
    teacher, average, callback = EMATeacher(decay=0.9), EMAWeightAveraging(decay=0.9, update_starting_at_step=0), rigl(interval=1)
    seen = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer, pl_module):  # after every batch's work
            copies = [teacher.averaged()]
            if average._average_model is not None:
                copies.append(dict(pl_module.named_parameters()))  # EMAWeightAveraging swaps its copy in for validation
            for name, mask in callback.store.masks.items() if callback.store else ():
                seen.extend(bool(copy[name][~mask].any()) for copy in copies)

    others = [teacher, average, Look()]
    trainer = tiny_trainer(max_epochs=2, callbacks=[callback, *others] if first else [*others, callback], num_sanity_val_steps=0)
    trainer.fit(Classifier(), loader(), loader())
    assert seen
    assert not any(seen)


def test_bf16_keeps_the_count():
    watch = Watch()
    tiny_trainer(max_epochs=1, callbacks=[rigl(), watch], precision="bf16-mixed").fit(Classifier(), loader())
    assert len(set(watch.densities)) == 1


@pytest.mark.parametrize("start", ["random", "random_exact"])
def test_masks_are_not_drawn_from_the_numbers_of_the_weights(start):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 400), torch.nn.ReLU(), torch.nn.Linear(400, 4))
    module = Classifier(network)
    callback = rigl(method="static", start=start, seed=0)
    tiny_trainer(max_steps=1, callbacks=[callback]).fit(module, loader())
    kept = network[1].weight[callback.store.masks["network.1.weight"]]
    assert 0.45 < float((kept > 0).float().mean()) < 0.55


def test_what_cannot_work_is_refused():
    module = Classifier()
    with pytest.raises(ValueError, match=r"both mask 'network\.0\.weight'"):
        tiny_trainer(callbacks=[rigl(), rigl(targets=["*.0"])]).fit(module, loader())
    with pytest.raises(ValueError, match="nearest of"):
        tiny_trainer(callbacks=[rigl(targets=["netwrk.*"])]).fit(module, loader())
    with pytest.raises(ValueError, match="skip pattern 'head' matches no submodule"):
        tiny_trainer(callbacks=[rigl(skip=["head"])]).fit(module, loader())
    with pytest.raises(ValueError, match="can't be used together"):
        tiny_trainer(callbacks=[rigl(), pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)]).fit(module, loader())
    for wrong in ({"density": 0}, {"interval": 0}, {"method": "rgl"}, {"drop_fraction": 2}, {"anneal": "line"}):
        with pytest.raises(ValueError):
            rigl(**wrong)
    for name, wrong in product(("begin", "rate", "seed", "total_steps"), (-1, float("nan"), float("inf"))):
        with pytest.raises(ValueError, match=f"{name} is {wrong}"):
            rigl(**{name: wrong})
    with pytest.raises(ValueError, match="power is -1"):
        RandomPruning(0.5, power=-1)
    with pytest.raises(ValueError, match="prunes every weight"):
        IterativeSoftShrinkage(pick="min_4:4")
    small = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)))
    with pytest.raises(ValueError, match=r"rate=0\.999 leaves none of 200 weights"):
        tiny_trainer(max_steps=1, callbacks=[NMSparsity(rate=0.999)]).fit(small, loader())


def test_the_module_is_let_go_when_fit_raises():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    callback = rigl()
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Broken(), loader())
    assert not trainer.optimizers or not trainer.optimizers[0]._optimizer_step_post_hooks


def test_default_weights_leave_norms_embeddings_and_tied_heads_alone():
    class Language(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 8)
            self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = torch.nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

    names = set(prunable_weights(Language()))
    assert names == {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight", "layer.linear1.weight", "layer.linear2.weight"}
    assert set(prunable_weights(Language(), ["head", "embedding"])) == {"head.weight"} or set(
        prunable_weights(Language(), ["head", "embedding"])
    ) == {"embedding.weight"}
    assert "layer.linear1.weight" not in prunable_weights(Language(), skip=["layer.linear1"])
    with pytest.raises(ValueError, match="no weight of Language is left"):
        prunable_weights(Language(), ["layer.norm1"])


def test_the_store_names_what_is_wrong():
    store = MaskStore({"w": torch.nn.Parameter(torch.tensor([[1.0, torch.inf, torch.nan]]))})
    with pytest.raises(ValueError, match="no masked weight 'v'"):
        store.set({"v": torch.ones(1, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"is \(3,\) torch.bool, expected \(1, 3\)"):
        store.set({"w": torch.ones(3, dtype=torch.bool)})
    store.set({"w": torch.tensor([[True, False, False]])})
    store.apply()
    assert store.weights["w"].tolist() == [[1.0, 0.0, 0.0]]
    assert store.density() == pytest.approx(1 / 3)
    other = MaskStore({"u": torch.nn.Parameter(torch.zeros(1, 3))})
    with pytest.raises(ValueError, match="of other weights"):
        other.load_state_dict(store.state_dict())
