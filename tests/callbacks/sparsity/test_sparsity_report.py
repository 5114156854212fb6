"""The sparsity report: its figures against independent computations, and that it changes nothing in the run that it reports."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    Classifier,
    Images,
    KillAt,
    Killed,
    TwoOptimisers,
    assert_state_dicts_equal,
    compiled_classifier,
    fingerprint,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import Dashboard, EMATeacher, ExactResume, LossTerm
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cost import Timing, measure, size_in_bytes, speedup, theoretical_cost, training_cost
from lit_methods.callbacks.sparsity.dynamic import DynamicSparsity
from lit_methods.callbacks.sparsity.flops import Macs
from lit_methods.callbacks.sparsity.health import chains, effective_masks, health
from lit_methods.callbacks.sparsity.masks import nm_mask
from lit_methods.callbacks.sparsity.sparseland.callback import SparsityReport
from lit_methods.callbacks.sparsity.sparseland.guards import comparison_table, missing_evidence, not_comparable

STATIC = SparsityCard(stage="before", regime="sparse_to_sparse", mask="static", criterion="random")


def loader(batch_size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size)


def rigl(**kwargs: Any) -> DynamicSparsity:
    return DynamicSparsity(**{"density": 0.3, "method": "rigl", "interval": 1, "end_fraction": 1.0, **kwargs})


def fit(folder: Path, callbacks: list[pl.Callback], module: pl.LightningModule | None = None, **kwargs: Any) -> pl.Trainer:
    trainer = tiny_trainer(callbacks=callbacks, default_root_dir=folder, **{"max_epochs": 1, **kwargs})
    torch.manual_seed(5)
    trainer.fit(module or Classifier(), loader(), loader())
    return trainer


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sparsity.json").read_text())


class Keep(pl.Callback):
    """Masks of our own making; ``show`` is what the report sees, the weights are masked once, at the start, or never."""

    def __init__(self, masks: dict[str, Tensor], card: SparsityCard | None = None, apply: bool = True) -> None:
        self.masks, self.apply = masks, apply
        if card is not None:
            self.sparsity_card = card

    def sparsity_masks(self) -> dict[str, Tensor]:
        return self.masks

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.apply:
            for name, mask in self.masks.items():
                pl_module.get_parameter(name).mul_(mask)


HEAD = "network.7.weight"  # (4, 8)


def head(rows: list[int]) -> dict[str, Tensor]:
    """Keeps some rows of the last layer."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[rows] = True
    return {HEAD: mask}


# ---- measures ----------------------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_real_tensors():
    torch.manual_seed(0)
    weight = torch.randn(7, 12) * (torch.rand(7, 12) < 0.4)
    csr = weight.to_sparse_csr()
    stored = csr.values().nbytes + csr.col_indices().int().nbytes + csr.crow_indices().int().nbytes
    kept = int((weight != 0).sum())
    sizes = size_in_bytes(weight.shape, kept, weight.element_size())
    assert sizes == {"dense": weight.nbytes, "csr": stored, "bitmask": kept * 4 + 11}
    assert size_in_bytes((8, 16), 64, 2, two_four=True)["2:4"] == 64 * 2 + 16  # the layout of cuSPARSELt: 2 bits for each of 64 values


def test_dead_units_are_counted():
    mask = torch.ones(4, 5, 3, 3, dtype=torch.bool)
    mask[1], mask[:, 2], mask[:, 4] = False, False, False
    mask[0, 0, 1, 1] = False
    assert (health(mask).dead_outputs, health(mask).dead_inputs, health(mask).disconnected) == (1, 2, False)
    assert health(torch.zeros(2, 3, dtype=torch.bool)).disconnected


@pytest.mark.parametrize("seed", range(4))
def test_effective_weights_are_those_that_a_gradient_reaches(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3, 2, 2), (4, 5, 2, 2), (6, 4 * 9), (3, 6)]  # convolutions on 5 x 5, then 3 x 3 flattened
    masks = [torch.rand(shape, generator=generator) < 0.15 + 0.1 * (len(shape) == 4) for shape in shapes]
    weights = [mask.double().requires_grad_() for mask in masks]  # positive weights, positive input: nothing cancels
    x = nn.functional.conv2d(torch.ones(1, 3, 5, 5, dtype=torch.double), weights[0])
    x = nn.functional.conv2d(x, weights[1]).flatten(1)
    (x @ weights[2].T @ weights[3].T).sum().backward()
    for mask, weight, effective in zip(masks, weights, effective_masks(masks), strict=True):
        assert torch.equal(effective, mask & (weight.grad > 0))
    assert any(not torch.equal(mask, effective) for mask, effective in zip(masks, effective_masks(masks), strict=True))


def test_layers_that_do_not_fit_are_no_chain():
    with pytest.raises(ValueError, match="5 outputs can't feed one with 7 inputs"):
        effective_masks([torch.ones(5, 3, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)])


def test_chains_are_found_where_they_are_certain():
    assert chains(Classifier()) == [["network.0.weight", "network.5.weight", "network.7.weight"]]
    assert chains(compiled_classifier()) == chains(Classifier())
    assert chains(resnet_classifier()) == [], "shortcuts feed the layers, too"
    nested = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert chains(nested) == [["0.weight", "1.1.weight"], ["3.weight", "4.weight"]]
    assert chains(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1))) == []


def test_each_weight_costs_what_its_own_method_asks_for():
    cost = theoretical_cost(Macs({"a": 200, "b": 80, "c": 40}, 60), {"a": 0.5, "b": 0.25}, samples=2)
    assert (cost.flops_dense, cost.flops_sparse, cost.attention_macs) == (380, 2 * (50 + 10 + 20 + 30), 30)
    assert cost.ratio_without_attention == 80 / 160
    cards = {
        "a": SparsityCard(stage="during", regime="sparse_to_sparse", mask="dynamic", cost="rigl", update_interval=3),
        "b": SparsityCard(stage="during", regime="dense_to_sparse", mask="dynamic", backward_dense=True, cost="ste"),
    }
    a = (3 * 100 * 3 + 2 * 100 + 200) / 4
    b = 20 + 2 * 80
    assert training_cost(cost, cards) == a + b + 3 * 40 + 3 * 60


def test_a_card_with_a_wrong_word_is_refused():
    with pytest.raises(ValueError, match=r"SparsityCard.stage is 'after': give one of before, during, post"):
        SparsityCard(stage="after", regime="dense_to_sparse", mask="static")
    with pytest.raises(ValueError, match="no dense forward pass"):
        SparsityCard(stage="during", regime="sparse_to_sparse", mask="static", forward_dense=True)
    assert rigl().sparsity_card.cost == "rigl"
    assert rigl(method="static").sparsity_card.mask == "static"


def test_a_speedup_needs_two_timings():
    times = [measure(lambda n=n: sum(range(n)), torch.device("cpu"), "dense-masked", 4) for n in (1000, 60_000)]
    assert speedup(times[1], times[0]) > 5
    with pytest.raises(TypeError, match="a ratio of FLOPs is called flops_ratio"):
        speedup(1e9, 1e8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="don't compare"):
        speedup(times[0], Timing(1.0, 20, 0.0, "resident", "csr", "cuda", 4))
    with pytest.raises(ValueError, match="at least 20"):
        measure(lambda: None, torch.device("cpu"), "csr", 1, repeats=3)


# ---- what it reports -----------------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_run_are_right(tmp_path):
    callback, report = rigl(), SparsityReport(pretrained=False)
    history: list[dict[str, Tensor]] = []
    used: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_mask_updated(self, trainer, pl_module, source):
            history.append({name: mask.clone() for name, mask in source.sparsity_masks().items()})

        def on_train_batch_start(self, *_):
            used.append(callback.sparsity_masks())

    module = Classifier()
    trainer = fit(tmp_path, [report, callback, Watch()], module)
    found = written(tmp_path)
    size = sum(mask.numel() for mask in history[0].values())
    first, last = history[0], history[-1]
    flat = [torch.cat([mask.flatten() for mask in masks.values()]) for masks in history]
    assert found["density"]["prunable"] == int(flat[-1].sum()) / size
    parameters = sum(p.numel() for p in module.parameters())
    assert found["density"]["all"] == (parameters - size + int(flat[-1].sum())) / parameters
    assert found["dynamics"]["itop"] == int(torch.stack(flat).any(0).sum()) / size
    moved = [not torch.equal(a, b) for a, b in pairwise(flat)]
    assert found["dynamics"]["updates"] == sum(moved) > 1
    a, b = flat[-2], flat[-1]
    assert found["dynamics"]["changed"] == int((a ^ b).sum()) / size
    assert found["dynamics"]["jaccard"] == int((a & b).sum()) / int((a | b).sum())
    assert found["dynamics"]["survival"] == int((a & b).sum()) / int(a.sum())
    assert found["dynamics"]["jaccard_first"] == int((flat[0] & b).sum()) / int((flat[0] | b).sum())
    for row in found["layers"]:
        name = row["name"]
        weight = module.get_parameter(name)
        assert (row["size"], row["kept"], row["nonzero"]) == (weight.numel(), int(last[name].sum()), int((weight != 0).sum()))
        assert row["density"] == row["kept"] / row["size"]
        assert row["itop"] == int(torch.stack([masks[name] for masks in history]).any(0).sum()) / row["size"]
        assert row["dead_inputs"] == sum(not last[name][:, i].any() for i in range(weight.shape[1]))
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval().network(torch.zeros(1, 3, 8, 8))
    macs = {"network.0.weight": 108 * 36, "network.5.weight": 144 * 8, "network.7.weight": 32}
    assert found["inference"]["flops_dense"] == counter.get_total_flops() == 2 * sum(macs.values())
    density = {name: float(mask.sum()) / mask.numel() for name, mask in last.items()}
    assert found["inference"]["flops_sparse"] == pytest.approx(2 * sum(macs[name] * density[name] for name in macs))
    total = 0.0
    for masks in used:  # RigL with an interval of 1: (3 f_S + 2 f_S + f_D) / 2, at the masks of the step
        total += 6 * sum((5 * macs[n] * float(m.sum()) / m.numel() + macs[n]) / 2 * 2 for n, m in masks.items())
    assert found["training"]["flops"] == pytest.approx(total)
    assert found["training"]["samples"] == 24
    assert trainer.callback_metrics["sparsity/itop"] == pytest.approx(found["dynamics"]["itop"])
    assert found["cards"]["DynamicSparsity"]["cost"] == "rigl"
    assert not found["guards"]
    assert not torch.equal(first[HEAD], last[HEAD]) or sum(moved)


def test_static_masks_explore_nothing(tmp_path):
    fit(tmp_path, [SparsityReport(), rigl(method="static")])
    found = written(tmp_path)
    assert found["dynamics"] == {"itop": found["density"]["prunable"], "updates": 0}
    assert found["guards"] == []


@pytest.mark.parametrize("make", [Classifier, TwoOptimisers, compiled_classifier])
def test_the_run_is_the_same_with_and_without_a_report(make, tmp_path):
    """Dropout draws, batch norm counts, features that a loss term keeps: all as if nobody had looked."""

    class Power(LossTerm):
        def term(self, inputs):
            assert all(len(calls) == 1 for calls in inputs["feature_calls"].values())
            return torch.stack([feature.square().mean() for feature in inputs["features"].values()]).sum()

    terms = [] if make is TwoOptimisers else [Power(targets=["network.5"])]
    modules = [make(), make()]
    before = torch.get_rng_state()
    fit(tmp_path, [rigl(), *terms], modules[0])
    ends = [torch.get_rng_state()]
    torch.set_rng_state(before)
    fit(tmp_path, [SparsityReport(mask_check_every_n=1, measure_speed=True, strict=True), rigl(), *terms], modules[1])
    ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    assert_state_dicts_equal(modules[1].state_dict(), modules[0].state_dict())
    assert fingerprint(modules[1]) == fingerprint(modules[0])
    assert written(tmp_path)["inference"]["counted_on"] == "validation_step"
    speed = written(tmp_path)["speed"]
    assert speed["seconds"] > 0
    assert (speed["kernel"], speed["repeats"], speed["batch_size"]) == ("dense-masked", 20, 6)


def test_attention_is_not_reduced_by_sparse_weights(tmp_path):
    import timm

    module = Classifier(
        timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, num_classes=4, depth=1, embed_dim=24, num_heads=2)
    )
    fit(tmp_path, [SparsityReport(), rigl(method="static", distribution="uniform")], module, limit_train_batches=1)
    inference = written(tmp_path)["inference"]
    tokens, width = 5, 24
    assert inference["attention_macs"] == 2 * tokens**2 * width
    assert inference["flops_ratio_without_attention"] == pytest.approx(0.3, abs=0.002)
    assert inference["flops_ratio"] > inference["flops_ratio_without_attention"]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module.eval().network(torch.zeros(1, 3, 8, 8))
    assert inference["flops_dense"] == counter.get_total_flops()


class Bert(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **size))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.bert(input_ids=batch[0], labels=batch[1][:, 0] % 2).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def demo() -> pl.LightningModule:
    from lightning.pytorch.demos import LightningTransformer

    module = LightningTransformer(vocab_size=50)
    module.prepare_data = lambda: None  # it would download its own text
    return module


@pytest.mark.parametrize(
    ("make", "blocks", "width", "precision"), [(Bert, 2, 16, "32-true"), (Bert, 2, 16, "bf16-true"), (demo, 6, 200, "32-true")]
)
def test_language_models_are_counted_on_their_training_step(make, blocks, width, precision, tmp_path):
    torch.manual_seed(0)
    tokens = torch.utils.data.TensorDataset(torch.randint(0, 50, (8, 7)), torch.randint(0, 50, (8, 7)))
    callbacks = [rigl(distribution="uniform"), SparsityReport(mask_check_every_n=1, strict=True)]
    trainer = tiny_trainer(max_steps=2, callbacks=callbacks, default_root_dir=tmp_path, precision=precision)
    trainer.fit(make(), DataLoader(tokens, batch_size=4))
    inference = written(tmp_path)["inference"]
    assert inference["counted_on"] == "training_step"
    assert inference["attention_macs"] == blocks * 2 * 7**2 * width
    assert inference["flops_ratio_without_attention"] == pytest.approx(0.3, abs=0.01)


def test_without_masks_zeros_are_counted(tmp_path):
    module = Classifier()
    with torch.no_grad():
        module.network[5].weight[:4] = 0

    class Freeze(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pl_module.network[5].weight.grad[:4] = 0

    fit(tmp_path, [SparsityReport(), Freeze()], module)
    found = written(tmp_path)
    assert found["density"]["basis"] == "weight != 0"
    assert found["density"]["prunable"] == (108 + 576 + 32) / (108 + 1152 + 32)
    assert found["dynamics"] == {}


def test_parametrised_weights_are_seen_as_the_network_uses_them(tmp_path):
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    module = Classifier()
    mask = nm_mask(module.network[5].weight, 2, 4)
    parametrize.register_parametrization(module.network[5], "weight", Masked(mask))
    latent = module.network[5].parametrizations.weight.original
    card = SparsityCard(stage="during", regime="dense_to_sparse", mask="static", granularity="n:m", backward_dense=True, cost="ste")

    class NM(Keep):
        n, m = 2, 4

    fit(tmp_path, [SparsityReport(mask_check_every_n=1, strict=True), NM({"network.5.weight": mask}, card, apply=False)], module)
    (row,) = (row for row in written(tmp_path)["layers"] if row["name"] == "network.5.weight")
    assert row["nonzero"] == row["kept"] == 576
    assert (latent != 0).all()
    assert row["macs_sparse"] == row["macs_dense"] / 2 == 576
    assert row["bytes"]["2:4"] == 576 * 4 + 144
    assert written(tmp_path)["training"]["flops_per_sample"] == 6 * (108 * 36 + 32) + 2 * 576 + 4 * 1152


def test_gradual_pruning_is_charged_at_the_density_of_the_moment(tmp_path):
    steps = [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0, 1]]
    keep = Keep(head(steps[0]), SparsityCard(stage="during", regime="dense_to_sparse", mask="dynamic"))

    class Prune(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx < 2:
                keep.masks = head(steps[batch_idx + 1])
                for callback in trainer.callbacks:
                    if hasattr(callback, "on_mask_updated"):
                        callback.on_mask_updated(trainer, pl_module, keep)

    fit(tmp_path, [SparsityReport(), Prune(), keep])
    found = written(tmp_path)
    rest = 6 * (108 * 36 + 1152)
    assert found["training"]["flops"] == 6 * sum(rest + 6 * 8 * len(rows) for rows in steps)
    assert (found["dynamics"]["updates"], found["dynamics"]["itop"]) == (2, 1.0)


# ---- resume, ranks, neighbours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watch_first", [True, False])
def test_a_resumed_run_reports_what_the_whole_one_reports(watch_first, tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True)

    def run(folder: str, extra: list[pl.Callback], seed: int, ckpt_path: Path | None = None) -> SparsityReport:
        pl.seed_everything(seed, verbose=False)
        report = SparsityReport(mask_check_every_n=1, strict=True)
        callbacks = [*extra, report, rigl(), ExactResume()] if watch_first else [ExactResume(), rigl(), report, *extra]
        trainer = tiny_trainer(max_steps=8, default_root_dir=tmp_path / folder, callbacks=callbacks)
        trainer.fit(Classifier(), datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
        return report

    run("whole", [], 0)
    with pytest.raises(Killed):
        run("killed", [KillAt(3, tmp_path / "killed.ckpt")], 0)
    run("resumed", [], 1, tmp_path / "killed.ckpt")
    whole, resumed = written(tmp_path / "whole"), written(tmp_path / "resumed")
    assert whole["dynamics"]["updates"] > 4
    assert whole.pop("setting") | {"seed": 0} == resumed.pop("setting") | {"seed": 0}
    assert resumed == whole


def train_in_two_processes(folder: str) -> dict[str, Any]:
    report = SparsityReport(mask_check_every_n=1, strict=True)
    trainer = tiny_trainer(max_epochs=1, callbacks=[rigl(), report], devices=2, strategy="ddp", default_root_dir=folder)
    trainer.fit(Classifier(), loader(3), loader(3))
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sparsity/")}


def test_two_processes_report_the_whole_run(tmp_path):
    mine, theirs = run_two_processes(train_in_two_processes, str(tmp_path))
    assert mine == theirs
    found = written(tmp_path)
    assert found["training"]["samples"] == 24, "of both ranks together"
    assert mine["sparsity/itop"] == pytest.approx(found["dynamics"]["itop"])
    assert mine["sparsity/training_flops"] == pytest.approx(found["training"]["flops"])


@pytest.mark.parametrize("first", [True, False])
def test_it_lives_with_the_others(first, tmp_path):
    report = SparsityReport(mask_check_every_n=1, strict=True)
    others = [rigl(), EMATeacher(decay=0.9), pl.callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=0)]
    callbacks = [report, *others] if first else [*others, report]
    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 2}
    fit(tmp_path, callbacks, **options)
    found = written(tmp_path)
    assert found["inference"]["flops_dense"] == 2 * (108 * 36 + 1152 + 32)
    assert found["dynamics"]["updates"] > 0


def test_the_dashboard_shows_it(tmp_path):
    class Accurate(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    report = SparsityReport()
    trainer = fit(tmp_path, [Dashboard(), report, rigl()], Accurate(), max_epochs=2)
    media = report.dashboard_media()
    steps, samples, flops, names, values = zip(*media["sparsity/results"].rows, strict=True)
    assert (steps, samples, set(names)) == ((4, 8), (24, 48), {"val_accuracy"})
    assert flops[0] < flops[1]
    assert values[-1] == pytest.approx(float(trainer.callback_metrics["val_accuracy"]))
    assert [row[0] for row in media["sparsity/layers"].rows] == ["network.0.weight", "network.5.weight", HEAD]
    page = (tmp_path / "report.html").read_text()
    for panel in SparsityReport.panels:
        assert panel.title in page
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    itop = [row["metrics"]["sparsity/itop"] for row in rows if "sparsity/itop" in row["metrics"]]
    assert all(before <= after + 1e-6 for before, after in pairwise(itop)), "Lightning's own rows are rounded to float32"
    assert itop[0] < itop[-1]
    assert not any("speedup" in name for row in rows for name in row["metrics"])


# ---- guards ------------------------------------------------------------------------------------------------------------------------------


class Revive(pl.Callback):
    """Something that brings removed weights back."""

    runs_after = ("MaskCallback",)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.network[7].weight += 1e-3


CHANNEL = SparsityCard(stage="before", regime="sparse_to_sparse", mask="static", granularity="channel")
LAYER = SparsityCard(stage="before", regime="sparse_to_sparse", mask="static", granularity="layer")
DYNAMIC = SparsityCard(stage="during", regime="sparse_to_sparse", mask="dynamic")


def scattered() -> dict[str, Tensor]:
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, 3] = False
    return {HEAD: mask}


@pytest.mark.parametrize(
    ("number", "words", "callbacks", "options"),
    [
        (2, HEAD, lambda: [Revive(), rigl(method="static")], {}),
        (3, "gradients of removed weights", lambda: [rigl(method="static", mask_gradients=False, mask_optimizer_state=False)], {}),
        (3, "optimiser state", lambda: [Keep(head([0]), STATIC)], {}),
        (5, "0.5000 where 0.2500 was asked for", lambda: [Keep(head([0, 1]), None)], {"target_density": 0.25}),
        (6, "no weight left", lambda: [Keep(head([]), STATIC)], {}),
        (7, "no weight was ever tried", lambda: [Keep(head([0]), DYNAMIC)], {}),
        (8, "declared channel", lambda: [Keep(scattered(), CHANNEL)], {}),
        (8, "declared layer", lambda: [Keep(head([0]), LAYER)], {}),
    ],
)
def test_guards_warn_and_can_raise(number, words, callbacks, options, tmp_path):
    every = 1 if number in (2, 3) else 0
    with pytest.warns(UserWarning, match=f"guard {number}, .*{words}"):
        fit(tmp_path, [SparsityReport(mask_check_every_n=every, **options), *callbacks()])
    assert any(guard["number"] == number and words in guard["message"] for guard in written(tmp_path)["guards"])
    if words != "optimiser state":  # there the gradients come first
        with pytest.raises(RuntimeError, match=f"guard {number}, .*{words}"):
            fit(tmp_path, [SparsityReport(mask_check_every_n=every, strict=True, **options), *callbacks()])


def test_masks_that_move_though_declared_static(tmp_path):
    keep = Keep(head([0]), STATIC)

    class Move(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            keep.masks = head([1])
            report.on_mask_updated(trainer, pl_module, keep)

    report = SparsityReport(mask_check_every_n=0)
    with pytest.warns(UserWarning, match="guard 7, .*declared static"):
        fit(tmp_path, [keep, Move(), report])


def test_zeros_in_rows_and_columns_are_whole_channels(tmp_path):
    masks = head([0, 2])
    masks[HEAD][:, 5] = False
    fit(tmp_path, [SparsityReport(strict=True, mask_check_every_n=0), Keep(masks, CHANNEL)])
    assert written(tmp_path)["health"]["dead_inputs"] == 1


def test_what_it_cannot_run_it_says(tmp_path):
    class Odd(Classifier):
        def validation_step(self, batch, batch_idx):
            raise KeyError("image")

        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("only for training")
            return super().training_step(batch, batch_idx)

        def run_once(self, batch):
            return self.network(batch[0])

    with pytest.warns(UserWarning, match=r"reports no FLOPs.*validation_step: KeyError.*only for training"):
        fit(tmp_path, [SparsityReport(), rigl()], Odd(), limit_val_batches=0)
    assert written(tmp_path)["inference"] is None
    assert written(tmp_path)["dynamics"]["updates"] > 0
    fit(tmp_path, [SparsityReport(forward="run_once"), rigl()], Odd(), limit_val_batches=0)
    assert written(tmp_path)["inference"]["counted_on"] == "run_once"
    with pytest.raises(TypeError, match="no such method"):
        fit(tmp_path, [SparsityReport(forward="run_twice")], Odd())
    with pytest.raises(RuntimeError, match="forward='validation_step'"):
        fit(tmp_path, [SparsityReport(forward="validation_step")], Odd(), limit_val_batches=0)
    with pytest.raises(ValueError, match=r"names 'network\.9\.weight', no parameter of Classifier"):
        fit(tmp_path, [SparsityReport(), Keep({"network.9.weight": torch.ones(1, dtype=torch.bool)}, apply=False)])
    for wrong in ({"mask_check_every_n": -1}, {"target_density": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SparsityReport(**wrong)


# ---- several runs ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    found = {}
    for name, callbacks, options in (
        ("rigl", [rigl()], {}),
        ("static", [rigl(method="static")], {}),
        ("longer", [rigl()], {"max_epochs": 2}),
        ("uniform", [rigl(distribution="uniform", skip=["network.7"])], {}),
    ):
        folder = tmp_path_factory.mktemp(name)
        fit(folder, [SparsityReport(pretrained=False), *callbacks], **options)
        found[name] = written(folder)
    return found


def test_runs_that_do_not_compare_say_why(runs):
    assert not_comparable(runs["rigl"], runs["static"]) == []
    assert not_comparable(runs["rigl"], runs["longer"]) == ["training budget: 24 and 48 samples, neither equal FLOPs"]
    reasons = not_comparable(runs["rigl"], runs["uniform"])
    assert [reason.split(":")[0] for reason in reasons] == ["layer-wise rule", "masked layers"]
    assert "network.7.weight" in reasons[1]
    warm = runs["static"] | {"setting": runs["static"]["setting"] | {"pretrained": True, "density_base": "all parameters"}}
    assert [reason.split(":")[0] for reason in not_comparable(runs["rigl"], warm)] == ["density base", "start"]
    equal = runs["longer"] | {"training": runs["longer"]["training"] | {"flops": runs["rigl"]["training"]["flops"] * 1.005}}
    assert not_comparable(runs["rigl"], equal) == [], "the same FLOPs are a budget, too"
    table = comparison_table(runs)
    assert [row[-1] == "" for row in table.rows] == [True, True, False, False]


def test_evidence_that_is_missing(runs):
    def seeded(run: dict[str, Any], seed: int) -> dict[str, Any]:
        return run | {"setting": run["setting"] | {"seed": seed}}

    lacking = missing_evidence([runs["rigl"]])
    assert [what.split(":")[0] for what in lacking] == ["one seed only", *["no baseline for DynamicSparsity, density 0.3"] * 3]
    dense = runs["static"] | {"cards": {}, "method": [], "density": {"prunable": 1.0, "all": 1.0, "basis": "weight != 0"}}
    magnitude = runs["static"] | {
        "method": ["MagnitudePruning"],
        "cards": {"MagnitudePruning": runs["static"]["cards"]["DynamicSparsity"] | {"criterion": "magnitude"}},
    }
    complete = [seeded(run, seed) for run in (runs["rigl"], runs["static"], dense, magnitude) for seed in (0, 1)]
    # two seeds of a method differ in their setting's seed alone
    assert missing_evidence(complete) == []
    assert missing_evidence(complete[:4]) == [
        f"no baseline for DynamicSparsity, density 0.3: {what}" for what in ("dense, same budget", "magnitude pruning")
    ]
    assert math.isclose(runs["rigl"]["density"]["prunable"], 0.3, abs_tol=0.001)


def test_a_network_without_prunable_weights_is_dense() -> None:
    spectral = torch.nn.utils.parametrizations.spectral_norm
    network = torch.nn.Sequential(torch.nn.Flatten(), spectral(torch.nn.Linear(192, 8)), torch.nn.ReLU(), spectral(torch.nn.Linear(8, 4)))
    trainer = tiny_trainer(max_steps=3, log_every_n_steps=1, limit_val_batches=0, callbacks=[SparsityReport()])
    trainer.fit(Classifier(network), torch.utils.data.DataLoader(Images(), 4))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sparsity/")}
    assert {logged["sparsity/density"], logged["sparsity/density_all"], logged["sparsity/flops_ratio"]} == {1.0}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train_loss", "val_loss", "val_MulticlassAccuracy"], "val_MulticlassAccuracy"),
        (["val_MulticlassF1Score"], "val_MulticlassF1Score"),
        (["val/mIoU"], "val/mIoU"),
        (["valMeanIoU"], "valMeanIoU"),
        (["val/acc_top5"], "val/acc_top5"),
        (["eval_accuracy"], "eval_accuracy"),
        (["val_JaccardIndex", "val_Accuracy"], "val_Accuracy"),
        (["val_JaccardIndex"], "val_JaccardIndex"),
        (["train_acc", "val/replacement", "val/loss", "interval_accident"], None),
    ],
)
def test_the_metric_is_chosen_by_words(names, found):
    from lit_methods.callbacks.sparsity.sparseland.callback import likely_metric

    assert likely_metric(names) == found
