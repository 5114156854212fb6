"""Every public callback beside Lightning's own tools: it works, or refuses before the first step and names the thing.

The callbacks are those of the stubs; one that is new there and has no entry here fails the first test.
"""

import copy
import importlib
import pickle
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset

from helpers import advice_on_figures, run_two_processes, tiny_trainer
from lit_methods import LabelStore, PairwiseSimilarity, StageSchedule
from lit_methods.callbacks import LabelCorrection, LossTerm
from lit_methods.callbacks.fine_tuning.s2ft.couplings import Coupling
from lit_methods.catalog import public_names
from lit_methods.datamodules import TextDataModule

SIZE, BATCH, CLASSES = 16, 4, 4

# ---- modules and data that every callback can attach to ----------------------------------------------------------------------------------


class Samples(Dataset):
    """Pictures with a label, a number, a mask and an index; small clouds."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(SIZE, 3, 8, 8, generator=generator)
        self.label = torch.arange(SIZE) % CLASSES
        self.mask = torch.randint(0, CLASSES, (SIZE, 8, 8), generator=generator)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, mask = self.image[index], self.label[index], self.mask[index]
        return {
            "image": image, "image_2": image.flip(-1), "label": label, "target": label.float(), "index": index,
            "mask": mask, "mask_2": mask.flip(-1), "row": label, "activation": image.flatten()[:6],
        }  # fmt: skip


class ClipMasks(nn.Module):
    """Masks of clips, from the colours of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, clip: Tensor) -> Tensor:
        return (clip * self.scale).sum(dim=1, keepdim=True)


class Dictionary(nn.Module):
    """An autoencoder of given directions, which nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decoder_directions", torch.randn(10, 6))

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("decoder_directions").T

    def decode(self, code: Tensor) -> Tensor:
        return code @ self.get_buffer("decoder_directions")


class Slot(nn.Module):
    """Where an attention layer of one's own takes another function."""

    attention_function: Any = None


class Pictures(pl.LightningModule):
    """A small network with two heads, a text tower, an embedding, a momentum branch, a dictionary and a vector of biases."""

    lr = 1e-2

    def __init__(self, first: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_size = BATCH
        linear = first or (lambda: nn.Linear(8 * 16, 16))
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear(), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)
        )
        self.head, self.pixels, self.text = nn.Linear(8, CLASSES), nn.Conv2d(8, CLASSES, 1), nn.Linear(6, 8)
        self.network = nn.Sequential(self.conv, self.pixels)
        self.table = nn.Embedding(CLASSES, 8)
        self.register_buffer("words", torch.randn(CLASSES, 6))
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.dictionary, self.attention, self.clips = Dictionary(), Slot(), ClipMasks()
        self.register_buffer("thresholds", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.conv(x)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(), self.batch_size, drop_last=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch["image"]), batch["mask"])
        texts = self.text(self.get_buffer("words"))
        features = self.body(self.conv(batch["image"])) + self.table(batch["row"])
        loss = loss + self.clips(batch["image"].unsqueeze(2).repeat(1, 1, 8, 1, 1)).square().mean()
        return loss + nn.functional.cross_entropy(self.head(features) + features @ texts.T, batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"1_steps": batch["image"]}

    def point_logits(self, cloud: Any) -> Tensor:
        return self.forward(cloud["image"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for name, parameter in self.named_parameters() if not name.startswith("teacher")]
        return torch.optim.AdamW(trained, lr=self.lr)


class Fetches(Pictures):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Logs(Pictures):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss)
        return loss


class Notes(Pictures):
    """Keeps the names of what is logged for all processes together."""

    def __init__(self) -> None:
        super().__init__()
        self.of_all: set[str] = set()

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.of_all |= {name} if kwargs["sync_dist"] else set()
        super().log(name, *args, **kwargs)


class Power(LossTerm):
    """A term of the features alone."""

    def term(self, inputs: dict[str, Any]) -> Tensor:
        return torch.stack([feature.square().mean() for feature in inputs["features"].values()]).sum()


class Idle(LabelCorrection):
    """Predicts, and changes nothing."""

    def wants(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        return True

    def predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, size: tuple[int, int]) -> Any:
        return pl_module.get_submodule("network")(images)

    def corrected(self, labels: Tensor, predicted: Any) -> Tensor:
        return labels


def correction(path: Path) -> dict[str, Any]:
    folder = path / "labels"
    store = LabelStore(folder) if folder.exists() else LabelStore.create(folder, np.zeros((SIZE, 8, 8), dtype=np.int64))
    return {"store": store, "loader": DataLoader(Samples(), 8)}


def clouds(path: Path) -> dict[str, Any]:
    folder = path / "clouds"
    store = LabelStore(folder) if folder.exists() else LabelStore.create(folder, [np.full((2, 6), 100, dtype=np.int64)] * 2)
    sizes = {"points_per_sample": torch.tensor([6])}
    scenes = [{"points": torch.randn(6, 8), "index": torch.tensor([k]), **sizes} for k in range(2)]
    masks = np.zeros((1, 6), dtype=np.int64)
    return {"num_classes": 101, "network": "head", "store": store, "loader": scenes, "masks": {0: masks, 1: masks}.__getitem__}


def recovery(path: Path) -> dict[str, Any]:
    np.save(path / "truth.npy", np.eye(4, 6, dtype=np.float32))
    return {"truth": path / "truth.npy", "autoencoder": "dictionary"}


NM = {"targets": ["body.4"]}
MAKE: dict[str, dict[str, Any] | Callable[[Path], dict[str, Any]]] = {
    "EMATeacher": {"schedule": "cosine"},
    "EMARemoval": {"student": "head", "teacher": "teacher"},
    "WeightEMA": {},
    "BilevelTuning": {"weight_decay": {"*": 3.0}, "every_n_steps": 2, "lower_batches": 1, "upper_batches": 1, "max_iterations": 4},
    "Reliability": {},
    "FeatureProbe": {},
    "SampleGrid": {},
    "SampleQuality": {"features": nn.Flatten(), "neighbours": 2},
    "ConR": {"features": "body", "predictions": "head"},
    "FDS": {"features": "body", "last_bucket": CLASSES, "kernel_size": 3},
    "DenseToSparse": {"target": "body"},
    "SubmissionWriter": {},
    "TemporalVoting": {"num_outputs": CLASSES, "ignore_index": 3},
    "LossTerm": {"targets": ["body"]},
    "TCM": {"embedding": "body"},
    "ClipConsistency": {"target": "clips"},
    "ContinuousAPLoss": {"student": "body", "teacher_module": "table"},
    "FLOPSRegularizer": {"targets": ["body"]},
    "UncertaintyRegularizer": {"query": "body", "target": "table"},
    "DirectionalConsistency": {"generator": "body", "consistency": PairwiseSimilarity(), "source": "image"},
    "AdaWAC": {"network": "network", "features": "pixels", "labels": ("mask", "mask_2")},
    "ADELE": lambda path: {"num_classes": CLASSES, "network": "network", "tracked": "mask", "scales": [1.0], **correction(path)},
    "MultiScaleConsistency": {"network": "network", "labels": "mask"},
    "MaskLabelSpreading": clouds,
    "ReliabilityConsistency": {"network": "head"},
    "LabelCorrection": correction,
    "TwoTowerConsistency": {"image_tower": "body", "text_tower": "text", "second_image": None},
    "Dashboard": {},
    "ExactResume": {},
    "FiniteGuard": {},
    "Preemption": {},
    "ThroughputProgressBar": {"plain": True},
    "StepCost": {"flops": True, "warmup_steps": 0},
    "CAST": {"n": 2, "m": 4, **NM, "distill": "head", "finalize": False},
    "DSL": {"density": 0.5, "targets": ["table"], "interval": 2},
    "DynamicSparsity": {"density": 0.5, "interval": 2, **NM},
    "GroupSparsity": NM,
    "IMP": {"sparsity": 0.5, "phases": 1, "retrain_epochs": 1, **NM},
    "IterativeSoftShrinkage": {"prune_iters": 2, **NM},
    "MaskedBNSparsity": {"stage": "global_sparsity"},
    "NMSparsity": {"n": 2, "m": 4, **NM},
    "RandomPruning": {"density": 0.5, **NM},
    "RandomSearch": {"candidates": 2, "space": "weight", **NM},
    "ScorePruning": {"keep": 0.5, "pretrain_steps": 1, "prune_steps": 1, **NM},
    "SparseAttentionCallback": {},
    "IsoCostReport": {},
    "Magnitude": NM,
    "Wanda": {"samples": 8, "forward": "point_logits", **NM},
    "SparseGPT": {"samples": 8, "forward": "point_logits", **NM},
    "DSnoT": {"samples": 8, "forward": "point_logits", "at_step": 2, **NM},
    "AlternatingLoRAStages": {"consistency": ["table.*"], "detail": ["head.*"], "schedule": StageSchedule(0, 1, 1, 1)},
    "LoRA": lambda path: pytest.importorskip("peft") and {"targets": ["body.4"], "rank": 2},
    "S2FT": {"d_ratio": 0.3, "couplings": [Coupling("body.6", ["body.4"])]},
    "SaRA": {"threshold": None, "share": 0.3, "progressive_steps": 1},
    "SparseIFT": {"sparsity": 0.5, "network": "body", "interval": 2, "flops_tolerance": None},
    "SparsityReport": {},
    "SSVI": {"density": 0.5, "interval": 2, "samples": 0, **NM},
    "AFAEvaluation": {"autoencoder": "dictionary"},
    "BidirectionalityMonitor": {"autoencoder": "dictionary"},
    "FeatureRecovery": recovery,
    "GroupBiasAdaptation": {"groups": 2, "pre_activations": "body", "bias": "thresholds", "includes_bias": False, "every_n_steps": 2},
    "SteeringProbe": {"concept": "label", "autoencoder": "dictionary"},
    "SupervisedDictionaryEval": {"attributes": ["label"], "autoencoder": "dictionary", "k_edits": [1]},
    "LossRecovered": lambda path: {
        "language_model": nn.Sequential(nn.Embedding(99, 6), nn.Linear(6, 99)), "hook": "0", "autoencoder": "dictionary",
        "text": TextDataModule(block_size=8, batch_size=2), "batches": 2,
    },
}  # fmt: skip
STANDS_IN = {"LossTerm": Power, "LabelCorrection": Idle}


def public_callbacks() -> dict[str, type[pl.Callback]]:
    """Name -> class of every callback in the stub."""
    names = [name for name, package in public_names().items() if package == "lit_methods.callbacks"]
    found = {name: getattr(importlib.import_module("lit_methods.callbacks"), name) for name in names}
    return {name: one for name, one in found.items() if isinstance(one, type) and issubclass(one, pl.Callback)}


def made(name: str, path: Path) -> pl.Callback:
    arguments = MAKE[name]
    cls: Any = STANDS_IN.get(name, public_callbacks()[name])
    return cls(**(arguments(path) if callable(arguments) else arguments))


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], path: Path, *, steps: int = 4, **kwargs: Any) -> pl.Trainer:
    options = {"default_root_dir": path, "enable_progress_bar": False} | kwargs
    bar = any(type(callback).__name__ == "ThroughputProgressBar" for callback in callbacks)
    options["enable_progress_bar"] = bar
    trainer = tiny_trainer(max_steps=steps, callbacks=callbacks, **options)
    trainer.fit(module, val_dataloaders=DataLoader(Samples(), 8))
    assert trainer.global_step == steps
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())
    return trainer


# ---- the tools ---------------------------------------------------------------------------------------------------------------------------


def alone(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Pictures(), [make()], path)


def learning_rate_finder(make: Callable[[], pl.Callback], path: Path) -> None:
    for first in (True, False):
        finder = LearningRateFinder(num_training_steps=3, update_attr=False)
        fit(Pictures(), [finder, make()] if first else [make(), finder], path)


def tuner(make: Callable[[], pl.Callback], path: Path) -> None:
    bar = type(make()).__name__ == "ThroughputProgressBar"
    module, trainer = Pictures(), tiny_trainer(max_steps=4, callbacks=[make()], default_root_dir=path, enable_progress_bar=bar)
    Tuner(trainer).lr_find(module, num_training=3, update_attr=False)
    trainer.fit(module)
    assert trainer.global_step == 4


def batch_size_finder(make: Callable[[], pl.Callback], path: Path) -> None:
    for first in (True, False):
        finder = BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=2)
        fit(Pictures(), [finder, make()] if first else [make(), finder], path)


def dataloader_iter(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Fetches(), [make()], path)


def lazy_layers(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Pictures(lambda: nn.LazyLinear(16)), [make()], path)


def no_logging(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Logs(), [make()], path, log_every_n_steps=0, logger=True)


def barebones(make: Callable[[], pl.Callback], path: Path) -> None:
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    trainer = tiny_trainer(max_steps=4, callbacks=[make()], default_root_dir=path, **bare | {"num_sanity_val_steps": None})
    trainer.fit(Logs())
    assert trainer.global_step == 4


def pickled(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Pictures(), [pickle.loads(pickle.dumps(make()))], path)
    used = make()
    fit(Pictures(), [used], path)
    again = pickle.loads(pickle.dumps(used))
    assert type(again) is type(used)
    fit(Pictures(), [copy.deepcopy(used)], path)


def weight_norm(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Pictures(lambda: nn.utils.weight_norm(nn.Linear(8 * 16, 16))), [make()], path)


def pruned(make: Callable[[], pl.Callback], path: Path) -> None:
    fit(Pictures(lambda: prune.l1_unstructured(nn.Linear(8 * 16, 16), "weight", 0.3)), [make()], path)


TOOLS = (
    alone, learning_rate_finder, tuner, batch_size_finder, dataloader_iter, lazy_layers, no_logging, barebones, pickled, weight_norm,
    pruned,
)  # fmt: skip

# ---- what is refused ---------------------------------------------------------------------------------------------------------------------

_BATCH = "needs the batch of each step, but training_step of Fetches takes dataloader_iter"
_LAZY = "has no shape yet: run the lazy layers once before fit"
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "dataloader_iter"): f"{name if name not in STANDS_IN else 'Power'} {_BATCH}" for name in (
        "LossTerm", "ConR", "TCM", "AdaWAC", "MultiScaleConsistency", "TwoTowerConsistency", "DenseToSparse", "FDS", "ADELE",
        "FLOPSRegularizer", "UncertaintyRegularizer", "ContinuousAPLoss", "BilevelTuning",
        "FLOPSRegularizer", "UncertaintyRegularizer", "DirectionalConsistency",
        "FLOPSRegularizer", "UncertaintyRegularizer", "ReliabilityConsistency",
        "FLOPSRegularizer", "ContinuousAPLoss",
        "FLOPSRegularizer", "UncertaintyRegularizer",
        "FLOPSRegularizer", "ContinuousAPLoss", "ClipConsistency",
    )},
    **{(name, "lazy_layers"): _LAZY for name in (
        "EMATeacher", "WeightEMA", "TwoTowerConsistency", "MaskedBNSparsity", "SparseIFT", "SparsityReport", "Wanda", "SparseGPT", "DSnoT",
        "EMATeacher", "WeightEMA", "TwoTowerConsistency", "MaskedBNSparsity", "RandomSearch", "S2FT", "SaRA", "SparseIFT", "SparsityReport",
        "SSVI", "BilevelTuning",
    )},
    **{("SparseIFT", tool): "its weight is parametrised" for tool in ("weight_norm", "pruned")},
}  # fmt: skip
REFUSED |= {("BilevelTuning", tool): "fit has no validation data" for tool in ("barebones", "tuner")}
REFUSED |= {("MaskedBNSparsity", tool): "no batch norm of Pictures can be pruned" for tool in ("weight_norm", "pruned")}
REFUSED |= {  # it reports on another callback
    ("IsoCostReport", tool): "there is no SparseAttentionCallback to report on"
    for tool in (
        "alone", "learning_rate_finder", "tuner", "batch_size_finder", "dataloader_iter", "lazy_layers", "no_logging", "barebones",
        "pickled", "weight_norm", "pruned",
    )
}  # fmt: skip
REFUSED["ThroughputProgressBar", "barebones"] = "Trainer was configured with `enable_progress_bar=False`"  # Lightning itself

LATER = {"MaskedBNSparsity", "ThroughputProgressBar"}  # tries channels on a batch when fit starts; Lightning's refusal

WAITS: dict[tuple[str, str], str] = {}  # what doesn't hold yet, with the reason
NEEDS_CLOUDS = "finds no superpixels, pairing_points, dense in the batch"  # DenseToSparse: its data aren't pictures


QUICK = ("LossTerm", "EMATeacher", "FDS")  # a term, a teacher and a pass over the data are tried in the quick tier


def pair(name: str, tool: Any) -> Any:
    quick = name in QUICK and tool is not batch_size_finder  # whose collection of garbage takes seconds
    return pytest.param(name, tool, id=f"{name}-{tool.__name__}", marks=() if quick else pytest.mark.thorough)


PAIRS = [pair(name, tool) for name in sorted(MAKE) for tool in TOOLS]


@pytest.mark.parametrize(("name", "tool"), PAIRS)
def test_it_works_or_refuses_at_the_start(name: str, tool: Any, tmp_path: Path) -> None:
    key = name, tool.__name__
    if key in WAITS:
        pytest.xfail(WAITS[key])
    refusal = REFUSED.get(key)
    if refusal is None and name != "DenseToSparse":
        tool(lambda: made(name, tmp_path), tmp_path)
        return
    with pytest.raises((ValueError, TypeError, MisconfigurationException), match=refusal or NEEDS_CLOUDS) as caught:
        tool(lambda: made(name, tmp_path), tmp_path)
    if refusal is not None and name not in LATER:
        assert "setup" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_every_public_callback_has_an_entry() -> None:
    assert set(MAKE) == set(public_callbacks())
    assert {name for name, _ in (*REFUSED, *WAITS)} <= set(MAKE)


# ---- two processes ---------------------------------------------------------------------------------------------------------------------

LOG_AT_THE_END_OF_EPOCHS = {
    "AdaWAC", "ADELE", "AFAEvaluation", "BidirectionalityMonitor", "DSnoT", "FeatureProbe", "FeatureRecovery", "IterativeSoftShrinkage",
    "MaskLabelSpreading",
    "LossRecovered", "Magnitude", "MaskedBNSparsity", "NMSparsity", "RandomPruning", "RandomSearch", "Reliability", "SampleQuality",
    "ScorePruning", "SparseGPT", "SparseIFT", "SparsityReport", "SSVI", "SteeringProbe", "SupervisedDictionaryEval", "Wanda",
}  # fmt: skip


def epochs_in_two_processes(names: list[str], path: Path) -> dict[str, tuple[list[str], dict[str, float]]]:
    """Name -> what Lightning advises about figures, and the figures of epochs, of a fit and a validation as one of two processes."""
    seen = {}
    for name in names:
        folder = path / name
        folder.mkdir(exist_ok=True)
        options = {"default_root_dir": folder, "enable_progress_bar": name == "ThroughputProgressBar"}
        callbacks = [made(name, folder)]
        with advice_on_figures() as advice:
            trainer = tiny_trainer(max_epochs=2, devices=2, strategy="ddp_find_unused_parameters_true", callbacks=callbacks, **options)
            data = pl.LightningDataModule.from_datasets(Samples(), Samples(), batch_size=8)
            module = Notes()
            trainer.fit(module, val_dataloaders=data.val_dataloader())
            figures = dict(trainer.callback_metrics)
            trainer.validate(module, datamodule=data, verbose=False)
            figures |= trainer.callback_metrics
        seen[name] = (advice, {key: float(figures[key]) for key in module.of_all})
    return seen


@pytest.mark.thorough
def test_figures_of_epochs_are_logged_as_those_of_all_processes(tmp_path: Path) -> None:
    absent = set() if find_spec("peft") else {"LoRA"}
    clouds, partner = {"DenseToSparse", "TemporalVoting"}, {"IsoCostReport"}  # what they need, and these modules haven't
    names = sorted(set(MAKE) - clouds - partner - absent)
    for name in ("ADELE", "LabelCorrection"):
        (tmp_path / name).mkdir()
        correction(tmp_path / name)  # one store for both
    first, second = run_two_processes(epochs_in_two_processes, names, tmp_path)
    for name in names:
        assert first[name][0] == second[name][0] == [], name
        assert first[name][1] == pytest.approx(second[name][1], nan_ok=True), name
    assert {name for name in names if first[name][1]} == LOG_AT_THE_END_OF_EPOCHS
