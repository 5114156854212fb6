"""Callbacks that only look: a module whose forward pass keeps state ends with them as without them, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from helpers import tiny_trainer
from lit_methods import LabelStore
from lit_methods.callbacks import (
    FDS,
    Dashboard,
    EMATeacher,
    ExactResume,
    FeatureProbe,
    FiniteGuard,
    LabelCorrection,
    Reliability,
    SampleGrid,
    SampleQuality,
    StepCost,
    ThroughputProgressBar,
    TwoTowerConsistency,
)

SIZE = 12


class Samples(Dataset):
    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.image = torch.randn(SIZE, 3, 4, 4, generator=generator)
        self.label = torch.randint(0, 4, (SIZE,), generator=generator)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.image[index], self.label[index]
        return {"image": image, "image_second": image.flip(-1), "label": label, "target": label.float(), "index": index}


class Unknown(pl.LightningDataModule):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(7), 6)


class Queue(nn.Module):
    """Keeps outputs in a buffer that is written in place, and numbers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, 16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.place, self.history = 0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("queue")[self.place] = x.detach().mean(0)
        self.calls += 1
        self.place = (self.place + 1) % 8
        self.history.append(float(x.detach().sum()))
        return x + 0.01 * self.get_buffer("queue").mean(0)


class Noise(nn.Module):
    """Draws in training and in evaluation, from a generator of its own and from the global one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.generator) + 0.1 * torch.randn(x.shape)


class Measured(nn.Module):
    """A metric within the forward pass, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.norm = MeanMetric(), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.update(x.detach())
        return self.norm(x) + 0.01 * torch.tanh(self.mean.compute())


class Adapted(nn.Module):
    """A layer with an adapter that a forward hook adds, and that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adapter = nn.Linear(16, 16), Queue()
        self.layer.register_forward_hook(lambda module, arguments, output: output + self.adapter(arguments[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))


STATES: dict[str, Callable[[], nn.Module]] = {
    "queue": Queue,
    "noise": Noise,
    "metric": Measured,
    "hook": Adapted,
    "spectral": spectral,
    "old spectral": lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(16, 16)),
}


class Keeps(pl.LightningModule):
    """A classifier with state in its forward pass; its validation returns samples, which :meth:`to_images` shows."""

    def __init__(self, state: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), STATES[state]())
        self.head, self.decoder, self.text = nn.Linear(16, 4), Queue(), nn.Linear(16, 16)
        self.register_buffer("words", torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def to_images(self, x: Tensor) -> Tensor:
        return self.decoder(x.flatten(1)[:, :16])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        text = self.text(self.get_buffer("words"))
        return nn.functional.cross_entropy(self(batch["image"]) + self.body(batch["image"]) @ text.T, batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch["image"])
        return {"1_steps": batch["image"] + 0.5}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Idle(LabelCorrection):
    """Predicts after every epoch, and leaves the labels as they are."""

    def wants(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        return True

    def predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, size: tuple[int, int]) -> Tensor:
        return pl_module(images)

    def corrected(self, labels: Tensor, predicted: Tensor) -> Tensor:
        assert predicted.isfinite().all()
        return labels


def idle(path: Path) -> Idle:
    store = LabelStore.create(path / "labels", np.zeros((SIZE, 4, 4), dtype=np.int64))
    return Idle(store=store, loader=DataLoader(Samples(), 6))


OBSERVERS: dict[str, Callable[[Path], pl.Callback]] = {
    "Reliability": lambda path: Reliability(unknown=Unknown()),
    "FeatureProbe": lambda path: FeatureProbe(),
    "FDS": lambda path: FDS("body", last_bucket=4, start_smooth=99),
    "SampleQuality": lambda path: SampleQuality(nn.Flatten(), neighbours=2),
    "SampleGrid": lambda path: SampleGrid(path),
    "StepCost": lambda path: StepCost(warmup_steps=0, flops=True),
    "LabelCorrection": idle,
    "TwoTowerConsistency": lambda path: TwoTowerConsistency("body", "text", weight=0.0),
    "EMATeacher": lambda path: EMATeacher(),
    "EMATeacher of a part": lambda path: EMATeacher(targets=["body"], float32=True),
    "Dashboard": lambda path: Dashboard(),
    "ThroughputProgressBar": lambda path: ThroughputProgressBar(),
    "FiniteGuard": lambda path: FiniteGuard(),
    "ExactResume": lambda path: ExactResume(),
}


def everything(module: nn.Module) -> dict[str, Any]:
    """Weights, buffers, metrics, generators and numbers."""
    found: dict[str, Any] = {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}
    for name, part in module.named_modules():
        if isinstance(part, Queue):
            found[f"{name} numbers"] = torch.tensor([part.place, *part.history], dtype=torch.float64)
        if isinstance(part, Noise):
            found[f"{name} generator"] = part.generator.get_state()
        if isinstance(part, MeanMetric):
            found |= {f"{name} metric": part.mean_value.clone(), f"{name} weight": part.weight.clone()}
    return found


def trained(state: str, callbacks: list[pl.Callback], path: Path) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module = Keeps(state)
    bar = any(isinstance(callback, ThroughputProgressBar) for callback in callbacks)
    trainer = tiny_trainer(max_epochs=2, callbacks=callbacks, default_root_dir=path, enable_progress_bar=bar)
    trainer.fit(module, DataLoader(Samples(), 6, shuffle=True), DataLoader(Samples(1), 6))
    return everything(module) | {"global generator": torch.get_rng_state()}


@pytest.mark.parametrize("state", STATES)
def test_training_is_the_same_with_and_without(state: str, tmp_path: Path) -> None:
    plain = trained(state, [], tmp_path)
    wrong = []
    for name, make in OBSERVERS.items():
        if (state, name) == ("noise", "TwoTowerConsistency"):
            continue  # a term that trains: its frozen towers draw noise of their own, as a second view does
        # with ExactResume validation leaves the generators alone, which is its task
        guard = [ExactResume()] if name == "ExactResume" else []
        expected = trained(state, guard, tmp_path / name) if guard else plain
        seen = trained(state, [make(tmp_path / name)], tmp_path / name)
        wrong += [f"{name}: {key}" for key in expected if not torch.equal(expected[key], seen[key])]
    assert not wrong
    assert any(not torch.equal(value, everything(Keeps(state))[key]) for key, value in plain.items() if key in everything(Keeps(state)))


def test_a_module_that_cannot_be_copied_is_measured_itself_in_words(tmp_path: Path) -> None:
    class Rigid(Keeps):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("one of a kind")

    trainer = tiny_trainer(callbacks=[Reliability()], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"Reliability: Rigid can't be copied \(RuntimeError: one of a kind\), so it is itself run"):
        (found,) = trainer.validate(Rigid("queue"), DataLoader(Samples(), 6), verbose=False)
    assert 0 <= found["reliability/val_accuracy"] <= 1
