"""A run of a technique's public class against the loop of one's own that its page shows.

Golden vectors prove the core, not the run. ``docs/techniques/<slug>.md`` has a block that begins with ``# <slug>_loop.py`` and defines
``train(...)``: a plain loop of core functions and torch, which returns what it logs at each step. ``tests/trajectory`` calls it and trains
the public class by an ordinary Trainer from the same start: weights and logs must be the same.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import tiny_trainer

PAGES = Path(__file__).resolve().parents[1] / "docs" / "techniques"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
both_dtypes = [torch.float32, torch.float64]
Logs = list[dict[str, Tensor]]


def page_loop(slug: str, pages: Path = PAGES) -> ModuleType:
    """The block ``# <slug>_loop.py`` of a technique's page as a module; tracebacks show the page's lines.

    Raises:
        AssertionError: The page has no such block, or it defines no ``train``.
    """
    page = pages / f"{slug}.md"
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^```python\n(# {slug}_loop\.py\n.*?)^```$", text, flags=re.M | re.S)
    assert found, f"{page.name} has no Python block that begins with # {slug}_loop.py"
    loop = ModuleType(f"{slug}_loop")
    exec(compile("\n" * text[: found.start(1)].count("\n") + found[1], str(page), "exec"), vars(loop))
    assert callable(getattr(loop, "train", None)), f"the loop of {page.name} defines no train(...)"
    return loop


class _Steps(pl.Callback):
    """Keeps what was logged at each step."""

    def __init__(self) -> None:
        self.logs: Logs = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logs.append({name: torch.as_tensor(value).detach().clone() for name, value in trainer.callback_metrics.items()})


def run(module: pl.LightningModule, batches: Any, callbacks: Sequence[pl.Callback] = (), **trainer_kwargs: Any) -> Logs:
    """Train over ``batches`` once; what was logged at each of them, by name.

    Args:
        module: Trained in place.
        batches: What ``Trainer.fit`` takes: a list of batches, a loader, a datamodule.
        callbacks: The technique's.
        trainer_kwargs: For the trainer.
    """
    steps = _Steps()
    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1, **trainer_kwargs}
    trainer = tiny_trainer(callbacks=[*callbacks, steps], **options)
    if isinstance(batches, list):
        batches = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # Lightning takes a list for several loaders
    trainer.fit(module, **{"datamodule" if isinstance(batches, pl.LightningDataModule) else "train_dataloaders": batches})
    return steps.logs


def assert_same_logs(actual: Logs, expected: Sequence[Mapping[str, Any]], tolerance: float) -> None:
    """Whatever the loop logged, the run logged at the same step; it may log more."""
    assert len(actual) == len(expected), f"the run has {len(actual)} steps, the loop {len(expected)}"
    for step, (ours, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert wanted, "the loop logs nothing"
        for name, value in wanted.items():
            assert name in ours, f"step {step}: the run logs no {name}: {sorted(ours)}"
            _assert_close(ours[name], value, tolerance, f"step {step}, {name}")


def assert_same_state(actual: nn.Module | Mapping[str, Any], expected: nn.Module | Mapping[str, Any], tolerance: float) -> None:
    """Same names, and the same values: weights and buffers."""
    ours, wanted = (part.state_dict() if isinstance(part, nn.Module) else part for part in (actual, expected))
    assert set(ours) == set(wanted), f"names differ: {sorted(set(ours) ^ set(wanted))}"
    for name, value in wanted.items():
        _assert_close(ours[name], value, tolerance, name)


def _assert_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    ours, wanted = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


# ---- a module that is nobody's technique -----------------------------------------------------------------------------------------------


class PlainClassifier(pl.LightningModule):
    """Cross-entropy of a network on batches with ``image`` and ``label``; one optimiser, which ``optimizer`` makes of the parameters."""

    def __init__(self, network: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.network, self.make_optimizer = network, optimizer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch["image"]), batch["label"], ignore_index=255)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def small_mlp(dtype: torch.dtype, sizes: Sequence[int] = (8, 16, 16, 4), seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).to(dtype)


def labelled(count: int, dtype: torch.dtype, size: int = 12, shape: Iterable[int] = (8,), classes: int = 4) -> list[dict[str, Tensor]]:
    """``count`` batches of normal images and random labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(size, *shape, generator=generator).to(dtype),
            "label": torch.randint(classes, (size,), generator=generator),
        }
        for _ in range(count)
    ]
