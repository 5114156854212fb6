"""MaskSparsity on modules that aren't ours: what the penalty adds and when, masks, the six stages, checkpoints of pruned networks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import ImageClassifier, SmallConvNet
from lit_methods.callbacks import EMATeacher, ExactResume, MaskedBNSparsity, NMSparsity, SparsityReport
from lit_methods.callbacks.sparsity.channels import load_pruned
from lit_methods.callbacks.sparsity.masksparsity.core import (
    keep_masks,
    load_masks,
    ot_threshold,
    save_masks,
    sparse_gradient,
    threshold_mask,
)
from lit_methods.datamodules import DigitsDataModule
from lit_methods.datamodules.loaders import make_loader

KEEP = torch.tensor([True, True, False, False])  # what ratio=0.5 chooses among four equal scales


class ColourNet(Classifier):
    """Three convolutions with batch norm for (3, 8, 8) images; no dropout."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        super().__init__(SmallConvNet((6, 8, 8), in_channels=3, num_classes=4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


def loader(batch_size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size)


def sparsity(stage: str = "mask_sparsity", **kwargs: Any) -> MaskedBNSparsity:
    return MaskedBNSparsity(**{"stage": stage, "lambda_": 0.05, "criterion": "ratio", "forward": "network", **kwargs})


def fit(callback: pl.Callback | list[pl.Callback], module: pl.LightningModule | None = None, **kwargs: Any) -> pl.LightningModule:
    module = module or ColourNet()
    trainer = tiny_trainer(**{"max_steps": 2, "callbacks": callback, **kwargs})
    torch.manual_seed(3)  # of dropout: tracing must not draw from it
    trainer.fit(module, loader())
    return module


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalties(dtype):
    limit = 0.1 * 0.05  # of smooth_l1; not 0.005 in float64
    gamma = torch.tensor([-0.5, -0.09, -0.004, 0.0, limit, 0.09, 0.2], dtype=dtype)
    r = {
        "l1": gamma.sign(),
        "l2": gamma,
        "smooth_l1": torch.tensor([-1.0, -1.0, -0.004, 0.0, 1.0, 1.0, 1.0], dtype=dtype),  # |gamma| = lr * lambda takes the sign
        "bounded_l2": torch.tensor([0.0, -0.09, -0.004, 0.0, limit, 0.09, 0.0], dtype=dtype),
    }
    grad, prune = torch.linspace(-1, 1, 7, dtype=dtype), torch.arange(7) % 2 == 0
    for penalty, expected in r.items():
        found = sparse_gradient(gamma, grad, prune, penalty, 0.05, learning_rate=0.1)
        torch.testing.assert_close(found, grad + 0.05 * expected * prune, rtol=1e-7, atol=0)
        assert found.dtype == dtype
        torch.testing.assert_close(sparse_gradient(gamma, grad, None, penalty, 0.05, 0.1), grad + 0.05 * expected, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="penalty is 'L1': give one of l1, l2, smooth_l1, bounded_l2"):
        sparse_gradient(gamma, grad, None, "L1", 0.05)


def test_the_guard_of_the_threshold():
    gamma = torch.tensor([0.02, -0.3, 0.001, 0.01, 0.3])
    assert threshold_mask(gamma, 0.01).tolist() == [True, True, False, False, True], "a channel at the threshold goes"
    assert threshold_mask(gamma, 1.0).tolist() == [True, False, False, False, False], "two largest are equal: channel 0 stays instead"
    assert threshold_mask(gamma, 1.0, 2).tolist() == [False, True, False, False, True]
    assert threshold_mask(gamma, 1.0, 3).tolist() == [True, True, False, False, True]
    assert threshold_mask(gamma, 1.0, 9).all()
    assert threshold_mask(gamma, 0.01, 3).tolist() == [True, True, False, False, True], "enough are kept, the guard does nothing"


def test_the_energy_threshold():
    gamma = torch.tensor([0.3, -0.1, 0.2, 0.4], dtype=torch.float64)  # squares 0.01, 0.04, 0.09, 0.16 of 0.30
    assert float(ot_threshold(gamma, 0.10)) == pytest.approx(0.15)  # 0.01 is 3.3 %, 0.05 is 16.7 %
    assert float(ot_threshold(gamma, 0.01)) == 0.0
    assert float(ot_threshold(gamma, 0.99)) == pytest.approx(0.35)
    assert float(ot_threshold(gamma / 1000, 0.10)) == 1.0, "a layer without a scale of 1e-3 goes, the guard keeps a channel"
    assert float(ot_threshold(torch.zeros(3))) == 1.0
    with pytest.raises(ValueError, match=r"discard is 1.0: give a share"):
        ot_threshold(gamma, 1.0)


def test_criteria_choose_the_smallest_scales():
    gammas = {"a": torch.tensor([0.9, -0.1, 0.2, 0.005]), "b": torch.tensor([1.0, 0.8, -0.7, 0.6])}
    kept = {name: {n: m.int().tolist() for n, m in keep_masks(gammas, name, ratio=0.5).items()} for name in ("threshold", "ratio")}
    assert kept["threshold"] == {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1]}
    assert kept["ratio"] == {"a": [1, 0, 1, 0], "b": [1, 1, 0, 0]}
    assert keep_masks(gammas, "global_ratio", ratio=0.5)["b"].tolist() == [True, True, True, False]
    assert keep_masks(gammas, "global_ratio", ratio=0.5)["a"].tolist() == [True, False, False, False]
    assert keep_masks(gammas, "global_ratio", ratio=0.0)["a"].all()
    assert keep_masks(gammas, "ratio", ratio={"b*": 0.75})["a"].all()
    assert keep_masks(gammas, "ratio", ratio={"b*": 0.75})["b"].tolist() == [True, False, False, False]
    assert keep_masks(gammas, "ratio", ratio=1.0, min_channels=2)["a"].tolist() == [True, False, True, False]
    assert keep_masks({"a": torch.ones(4)}, "ratio")["a"].tolist() == KEEP.tolist(), "of equal scales the first stay"
    assert keep_masks(gammas, "ot", energy=0.05)["a"].tolist() == [True, False, True, False]
    assert keep_masks(gammas, "ot", energy=0.06)["a"].tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="global_ratio takes one share"):
        keep_masks(gammas, "global_ratio", ratio={"a": 0.5})


@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_masks_survive_a_file(ending, tmp_path):
    path = tmp_path / f"masks{ending}"
    save_masks(path, {"net.bn": KEEP, "net.whole": torch.ones(3, dtype=torch.bool)})
    found = load_masks(path)
    assert list(found) == ["net.bn"], "layers that stay whole are left out"
    assert torch.equal(found["net.bn"], KEEP)


def test_broken_mask_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz' does not exist"):
        load_masks(tmp_path / "none.npz")
    np.savez(tmp_path / "floats.npz", bn=np.ones(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"floats.npz: 'bn' is \(4,\) torch.float32, expected one bool a channel"):
        load_masks(tmp_path / "floats.npz")
    (tmp_path / "masks.txt").touch()
    with pytest.raises(ValueError, match=r"give .npz or .pt"):
        load_masks(tmp_path / "masks.txt")


# ---- what the penalty adds, and when ---------------------------------------------------------------------------------------------------


def gammas(module: nn.Module) -> Tensor:
    return torch.cat([norm.weight.detach() for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)])


def prune_vector(callback: MaskedBNSparsity) -> Tensor:
    return torch.cat([~mask for mask in callback.keep_masks().values()])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 1e-3},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulated", "clipped by norm", "clipped by value", "bf16"],
)
def test_the_term_is_added_once_per_step_to_doomed_channels_alone(kwargs):
    """SGD's first step is -lr * gradient, so the difference to a run without the callback is -lr * lambda * sign(1)."""
    callback = sparsity(penalty="l1")
    module, plain = fit(callback, max_steps=1, **kwargs), fit(pl.Callback(), max_steps=1, **kwargs)
    doomed = prune_vector(callback)
    assert doomed.sum() == 11
    expected = torch.where(doomed, -0.1 * 0.05, 0.0)
    torch.testing.assert_close(gammas(module) - gammas(plain), expected, rtol=0, atol=1e-6)
    others = {name: value for name, value in module.state_dict().items() if not (".norms." in name and name.endswith("weight"))}
    assert_state_dicts_equal(others, {name: plain.state_dict()[name] for name in others})


def test_the_global_stage_penalises_every_prunable_scale_and_no_other():
    callback = sparsity("global_sparsity", skip=["*norms.1"])
    module, plain = fit(callback, max_steps=1), fit(pl.Callback(), max_steps=1)
    expected = torch.cat([torch.full((6,), -0.005), torch.zeros(8), torch.full((8,), -0.005)])
    torch.testing.assert_close(gammas(module) - gammas(plain), expected, rtol=0, atol=1e-6)
    assert set(callback.keep_masks()) == {"network.norms.0", "network.norms.2"}


def test_logged_losses_dont_contain_the_penalty():
    losses = []
    for callback in (sparsity(lambda_=1.0), pl.Callback()):
        trainer = tiny_trainer(max_steps=1, callbacks=[callback])
        trainer.fit(ColourNet(), loader())
        losses.append(float(trainer.callback_metrics["loss"]))
    assert losses[0] == losses[1]


class TwoClipped(TwoOptimisers):
    """Clips by itself, so hard that the loss's own gradient vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimiser in self.optimizers():  # type: ignore[union-attr]
            optimiser.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.network(batch[0]), batch[1]))
            self.clip_gradients(optimiser, 1e-6, "value")
            optimiser.step()


def test_manual_optimisation_with_two_optimisers():
    callback = sparsity()
    module = fit(callback, TwoClipped(), max_steps=4)  # each optimiser steps twice
    expected = torch.where(KEEP, 1.0, 1.0 - 2 * 0.1 * 0.05)
    torch.testing.assert_close(module.network[1].weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [Classifier, compiled_classifier])
def test_any_network_with_a_batch_norm(make):
    callback = sparsity()
    module, plain = fit(callback, make(), max_steps=1), fit(pl.Callback(), make(), max_steps=1)
    torch.testing.assert_close(gammas(module) - gammas(plain), torch.where(KEEP, 0.0, -0.005), rtol=0, atol=1e-6)
    assert list(callback.keep_masks()) == ["network.1"]


def test_torchvision_resnet18_shares_masks_in_its_sums():
    module = resnet_classifier()
    for index, norm in enumerate(layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.1, 1.0, generator=torch.Generator().manual_seed(index))
    callback = sparsity()
    fit(callback, module, max_steps=1)
    masks = callback.keep_masks()
    assert len(masks) == 20
    assert torch.equal(masks["network.layer2.0.bn2"], masks["network.layer2.0.downsample.1"])
    assert torch.equal(masks["network.layer2.0.bn2"], masks["network.layer2.1.bn2"])
    assert not torch.equal(masks["network.layer2.0.bn2"], masks["network.layer2.0.bn1"])
    (layers,) = [media for key, media in callback.dashboard_media().items() if key == "masksparsity/layers"]
    assert sum(bool(row[1]) for row in layers.rows) == 3 + 3 * 3, "members of groups"


def test_nothing_is_left_behind():
    plain = fit(pl.Callback())
    assert fingerprint(fit(sparsity())) == fingerprint(plain)

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    module = ColourNet()
    with pytest.raises(RuntimeError, match="stop"):
        fit([sparsity(), Fails()], module)
    assert set(vars(module)) - {"_trainer"} == set(vars(plain)) - {"_trainer"}


def test_the_kept_stay_large_and_the_doomed_vanish():
    """The claim's strong part: the ratio of the scales."""

    def train(**kwargs: Any) -> dict[str, float]:
        pl.seed_everything(0, verbose=False)
        callback = MaskedBNSparsity(lambda_=0.1, criterion="ratio", **kwargs)
        trainer = tiny_trainer(max_epochs=6, limit_val_batches=0, callbacks=[callback])
        trainer.fit(ImageClassifier(SmallConvNet(), learning_rate=0.05, schedule="cosine"), datamodule=DigitsDataModule())
        return {name.removeprefix("masksparsity/"): float(value) for name, value in trainer.callback_metrics.items()}

    masked, everywhere = train(stage="mask_sparsity"), train(stage="global_sparsity")
    assert masked["gamma_kept"] > 0.9
    assert masked["gamma_removed"] < 0.05
    assert everywhere["gamma_kept"] < 0.6
    assert masked["gamma_ratio"] > 5 * everywhere["gamma_ratio"]
    assert masked["removed_below_threshold"] > 0.9
    assert masked["removed_share"] == 0.5


# ---- the stages ------------------------------------------------------------------------------------------------------------------------


def run(
    stage: str, folder: Path, module: pl.LightningModule | None = None, **kwargs: Any
) -> tuple[pl.LightningModule, MaskedBNSparsity, Path]:
    """A stage of three epochs; its module, callback and checkpoint."""
    module, callback = module or ColourNet(), sparsity(stage, **kwargs)
    trainer = tiny_trainer(max_epochs=3, callbacks=[callback], default_root_dir=folder, log_every_n_steps=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(folder / f"{stage}.ckpt")
    return module, callback, folder / f"{stage}.ckpt"


class Start(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = cloned_state(pl_module)
        self.optimised = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Checkpoints of baseline, global and masked stage."""
    folder = tmp_path_factory.mktemp("recipe")
    found = {"baseline": run("baseline", folder)}
    found["global_sparsity"] = run("global_sparsity", folder, weights=found["baseline"][2])
    last = found["global_sparsity"][2]
    found["mask_sparsity"] = run("mask_sparsity", folder, weights=last, mask=last)
    return found


def test_the_masked_stage_starts_from_the_baseline_with_the_masks_of_the_global_run(recipe, tmp_path):
    (dense, _, baseline), (_, chooser, last) = recipe["baseline"], recipe["global_sparsity"]
    start = Start()
    for weights in (last, baseline):
        tiny_trainer(max_steps=1, callbacks=[sparsity(weights=weights, mask=last), start]).fit(ColourNet(), loader())
        assert_state_dicts_equal(start.state, dense.state_dict())
    _, callback, _ = recipe["mask_sparsity"]
    assert_state_dicts_equal(callback.keep_masks(), chooser.keep_masks())
    tiny_trainer(max_steps=1, callbacks=[sparsity("global_sparsity", weights=baseline), start]).fit(ColourNet(), loader())
    assert_state_dicts_equal(start.state, dense.state_dict())


@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_masks_come_from_files(ending, recipe, tmp_path):
    masks = {"network.norms.0": torch.arange(6) < 2, "network.norms.2.weight": torch.arange(8) != 4}
    save_masks(tmp_path / f"keep{ending}", masks)
    callback = sparsity(mask=tmp_path / f"keep{ending}")
    fit(callback)
    assert torch.equal(callback.keep_masks()["network.norms.0"], masks["network.norms.0"])
    assert callback.keep_masks()["network.norms.1"].all()
    assert (~callback.keep_masks()["network.norms.2"]).nonzero().tolist() == [[4]]
    save_masks(tmp_path / f"odd{ending}", {"network.nothing": torch.arange(6) < 2})
    with pytest.raises(ValueError, match=r"has a mask of 'network.nothing', which ColourNet has not"):
        fit(sparsity(mask=tmp_path / f"odd{ending}"))


def test_the_mask_stage_writes_a_file(recipe, tmp_path):
    _, chooser, last = recipe["global_sparsity"]
    callback = sparsity("mask", weights=last)
    tiny_trainer(callbacks=[callback], default_root_dir=tmp_path).validate(ColourNet(), loader(), verbose=False)
    assert_state_dicts_equal(load_masks(tmp_path / "masks.npz"), chooser.keep_masks())


def pruned(recipe: Any, folder: Path, **kwargs: Any) -> tuple[pl.LightningModule, pl.Trainer]:
    module = ColourNet()
    trainer = tiny_trainer(callbacks=[sparsity("prune", weights=recipe["mask_sparsity"][2], **kwargs)], default_root_dir=folder)
    trainer.validate(module, loader(), verbose=False)
    return module, trainer


def test_pruning_really_removes_channels(recipe, tmp_path):
    masked, callback, _ = recipe["mask_sparsity"]
    module, trainer = pruned(recipe, tmp_path)
    masks = callback.keep_masks()
    assert [norm.num_features for norm in module.network.norms] == [int(mask.sum()) for mask in masks.values()] == [3, 4, 4]
    for name, mask in masks.items():
        norm = masked.get_submodule(name)
        norm.weight.data[~mask], norm.bias.data[~mask] = 0.0, 0.0
    images = Images(24).images
    torch.testing.assert_close(module.eval().network(images), masked.eval().network(images), rtol=1e-5, atol=1e-6)
    size = [sum(p.numel() for p in one.parameters()) for one in (module, masked)]
    assert float(trainer.callback_metrics["masksparsity/parameters_kept"]) == pytest.approx(size[0] / size[1])
    convs = [3 * 6 * 9 * 64, 6 * 8 * 9 * 64, 8 * 8 * 9 * 16, 8 * 4], [3 * 3 * 9 * 64, 3 * 4 * 9 * 64, 4 * 4 * 9 * 16, 4 * 4]
    assert float(trainer.callback_metrics["masksparsity/macs_kept"]) == pytest.approx(sum(convs[1]) / sum(convs[0]))
    table = trainer.callbacks[0].dashboard_media()["masksparsity/pruning"].rows
    assert [row[0] for row in table] == ["parameters", "macs", "val_loss"]
    assert table[2][1] != table[2][2]


def test_a_stage_starts_from_the_checkpoint_of_a_compiled_network(recipe, tmp_path):
    content = torch.load(recipe["mask_sparsity"][2], weights_only=True)
    content["state_dict"] = {name.replace(".", "._orig_mod.", 1): value for name, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "compiled.ckpt")
    cut, _ = pruned({"mask_sparsity": (None, None, tmp_path / "compiled.ckpt")}, tmp_path / "compiled")
    expected, _ = pruned(recipe, tmp_path / "plain")
    assert_state_dicts_equal(cut.state_dict(), expected.state_dict())


@pytest.mark.parametrize("source", ["pruned", "masked"])
def test_fine_tuning_starts_with_the_pruned_network_and_a_new_optimiser(source, recipe, tmp_path):
    module, _ = pruned(recipe, tmp_path)
    before = cloned_state(module)
    weights = tmp_path / "checkpoints" / "pruned.ckpt" if source == "pruned" else recipe["mask_sparsity"][2]
    start = Start()
    tuned = ColourNet()
    trainer = tiny_trainer(max_steps=2, callbacks=[sparsity("finetune", weights=weights), start])
    trainer.fit(tuned, loader())
    assert_state_dicts_equal(start.state, before)
    assert start.optimised == sum(p.numel() for p in module.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    images = Images(4).images
    again = ColourNet()
    load_pruned(again, tmp_path / "tuned.ckpt")
    torch.testing.assert_close(again.eval().network(images), tuned.eval().network(images), rtol=0, atol=0)
    other = ColourNet()  # the Trainer rebuilds it, too, without the file that it came from
    tiny_trainer(callbacks=[sparsity("mask_sparsity")]).validate(other, loader(), ckpt_path=tmp_path / "tuned.ckpt", verbose=False)
    assert_state_dicts_equal(other.state_dict(), tuned.state_dict())


def test_the_structure_alone_is_trained_from_scratch(recipe):
    start = Start()
    module = ColourNet()
    fresh = cloned_state(module)
    weights = recipe["mask_sparsity"][2]
    tiny_trainer(max_steps=1, callbacks=[sparsity("finetune", weights=weights, from_scratch=True), start]).fit(module, loader())
    keep = recipe["mask_sparsity"][1].keep_masks()["network.norms.0"]
    assert torch.equal(start.state["network.convs.0.weight"], fresh["network.convs.0.weight"][keep])


def test_the_criterion_may_cut_anew(recipe, tmp_path):
    masked, _, last = recipe["mask_sparsity"]
    callback = sparsity("prune", weights=last, cut="criterion", criterion="threshold", threshold=0.97)
    tiny_trainer(callbacks=[callback], default_root_dir=tmp_path).test(module := WithTest(), loader(), verbose=False)
    for name in ("network.norms.0", "network.norms.1"):
        assert module.get_submodule(name).num_features == int((masked.get_submodule(name).weight.abs() > 0.97).sum())
    assert (tmp_path / "checkpoints" / "pruned.ckpt").is_file()


class WithTest(ColourNet):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))


def test_a_pruned_network_can_be_pruned_again(recipe, tmp_path):
    pruned(recipe, tmp_path)
    first = tmp_path / "checkpoints" / "pruned.ckpt"
    _, callback, last = run("mask_sparsity", tmp_path, weights=first, criterion="ratio", ratio=0.34)
    assert [len(mask) for mask in callback.keep_masks().values()] == [3, 4, 4]
    module = ColourNet()
    tiny_trainer(callbacks=[sparsity("prune", weights=last)], default_root_dir=tmp_path / "2").validate(module, loader(), verbose=False)
    assert [norm.num_features for norm in module.network.norms] == [2, 3, 3]
    again = ColourNet()
    plan = load_pruned(again, tmp_path / "2" / "checkpoints" / "pruned.ckpt")
    assert plan["network.norms.0"]["out"]["size"] == 6
    assert_state_dicts_equal(again.state_dict(), module.state_dict())


# ---- state, processes, neighbours ------------------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return make_loader(Images(24), batch_size=6, seed=0, shuffle=True, with_epoch=False)


@pytest.mark.parametrize("stage", ["global_sparsity", "mask_sparsity", "finetune"])
def test_a_killed_run_ends_like_an_uninterrupted_one(stage, recipe, tmp_path):
    weights = recipe["mask_sparsity" if stage == "finetune" else "baseline"][2]

    def make() -> tuple[pl.LightningModule, Data, list[pl.Callback]]:
        return ColourNet(), Data(), [sparsity(stage, weights=weights, penalty="smooth_l1"), ExactResume()]

    whole, resumed = kill_and_resume(make, 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def train_in_two_processes(stage: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, callback = ColourNet(), sparsity(stage)
    for norm in module.network.norms:
        norm.momentum = 0.0  # statistics of the batch stay each rank's own
        norm.eval()
    trainer = tiny_trainer(max_steps=2, max_epochs=1, callbacks=[callback], devices=2, strategy="ddp")
    trainer.fit(module, loader(12 // 2))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, callback.keep_masks()


@pytest.mark.parametrize("stage", ["global_sparsity", "mask_sparsity"])
def test_two_processes_have_the_same_scales_and_masks(stage):
    (state, masks), (other_state, other_masks) = run_two_processes(train_in_two_processes, stage)
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)
    drop = torch.cat([state[f"network.norms.{i}.weight"] for i in range(3)]) - 1
    doomed = torch.cat([~mask for mask in masks.values()])
    assert drop[doomed].mean() < -0.005, "the term is there, and once, not once a rank"
    assert drop[doomed].mean() > -0.1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [SparsityReport, EMATeacher])
def test_neighbours(make, first):
    callback, other = sparsity(), make()
    fit([callback, other] if first else [other, callback])
    assert prune_vector(callback).sum() == 11


def test_averages_are_made_of_the_module_as_it_is_trained(recipe):
    weights = recipe["mask_sparsity"][2]
    module = fit([sparsity("finetune", weights=weights), EMAWeightAveraging(decay=0.5)])
    assert module.network.norms[0].num_features == 3
    with pytest.raises(ValueError, match="MaskedBNSparsity must be set up before EMAWeightAveraging"):
        fit([EMAWeightAveraging(decay=0.5), sparsity("finetune", weights=weights)])
    with pytest.raises(ValueError, match="MaskedBNSparsity must be set up before NMSparsity"):
        fit([NMSparsity(n=2, m=4, targets=["network.convs.1"]), sparsity()])


def test_a_shape_stands_in_for_a_batch():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return ((image, label) for image, label in Images(6))

    combined = pl.utilities.CombinedLoader([DataLoader(Stream(), batch_size=6)], "min_size")

    class First(ColourNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            return super().training_step(batch[0], batch_idx)

    with pytest.raises(ValueError, match="give input_shape, the shape of one input"):
        tiny_trainer(max_steps=1, callbacks=[sparsity()]).fit(First(), combined)
    callback = sparsity(input_shape=[3, 8, 8])
    tiny_trainer(max_steps=1, callbacks=[callback]).fit(First(), combined)
    assert prune_vector(callback).sum() == 11


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "masked"}, "stage is 'masked': give one of baseline, global_sparsity"),
        ({"penalty": "L1"}, "penalty is 'L1': give one of l1"),
        ({"criterion": "magnitude"}, "criterion is 'magnitude'"),
        ({"lambda_": -1.0}, r"lambda_ is -1.0: give a number in \[0, inf\)"),
        ({"ratio": 1.5}, r"ratio is 1.5: give a number in \[0, 1\]"),
        ({"energy": 1.0}, "discard is 1.0"),
        ({"min_channels": 0}, r"min_channels is 0: give channels in \[1, inf\)"),
        ({"stage": "finetune"}, "stage='finetune' needs weights"),
        ({"stage": "global_sparsity", "mask": "m.npz"}, "mask goes with stage='mask_sparsity'"),
        ({"targets": "network.*"}, "targets is the string 'network.\\*': give a list of patterns"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedBNSparsity(**arguments)


def test_wrong_uses_are_refused(recipe, tmp_path):
    baseline, last = recipe["baseline"][2], recipe["mask_sparsity"][2]
    with pytest.raises(ValueError, match="stage='prune' doesn't train: run `lit validate`"):
        fit(sparsity("prune", weights=last))
    with pytest.raises(FileNotFoundError, match=r"none.ckpt' does not exist"):
        fit(sparsity(weights=tmp_path / "none.ckpt"))
    with pytest.raises(ValueError, match="doesn't say which channels can go"):
        fit(sparsity("finetune", weights=baseline))
    with pytest.raises(ValueError, match=r"baseline.ckpt holds weights of another architecture than Classifier"):
        fit(sparsity(weights=baseline), Classifier())
    with pytest.raises(TypeError, match="ColourNet has no 'forward' that maps inputs to outputs: give forward the name"):
        fit(sparsity(forward="forward"))
    with pytest.raises(ValueError, match="checkpoint is of stage 'mask_sparsity', this run of 'global_sparsity'"):
        tiny_trainer(max_steps=20, callbacks=[sparsity("global_sparsity")]).fit(ColourNet(), loader(), ckpt_path=last)
    with pytest.raises(ValueError, match=r"the batch has no 'x', it has .*: name the key .or position. by inputs"):
        fit(sparsity(inputs="x"))
    with pytest.raises(ValueError, match=r"no batch norm of ColourNet can be pruned .*targets or skip say so"):
        fit(sparsity(skip=["*"]))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MaskedBNSparsity`"):
        fit([sparsity(), sparsity("global_sparsity")])
