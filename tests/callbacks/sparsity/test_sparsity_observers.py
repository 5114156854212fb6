"""What measures doesn't train: with and without it, weights, buffers, counters and generators end bit-equal, whatever the module keeps."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from helpers import tiny_trainer
from lit_methods.callbacks import CAST, IterativeSoftShrinkage, MaskedBNSparsity, RandomPruning, SparseIFT, SparsityReport

# ---- modules with state in their forward pass ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A parametrisation that counts its calls, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * (1 + 0.01 * self.calls)


class Net(pl.LightningModule):
    """A small network; ``keep`` is called with the logits of every forward pass."""

    def __init__(self, first: Callable[[nn.Module], nn.Module] = lambda layer: layer, keep: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        hidden = [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
        self.net, self.keep = nn.Sequential(first(nn.Linear(8, 16)), nn.ReLU(), *hidden), keep
        self.register_buffer("queue", torch.randn(16, 4))
        self.counter, self.seen = 0, []
        self.random = torch.Generator().manual_seed(5)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits if self.keep is None else self.keep(self, logits)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits.softmax(1), batch[1])
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def confidence(self, batch: list[Tensor]) -> Tensor:
        """(B,) highest probabilities."""
        return self(batch[0]).softmax(1).max(1).values

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Taught(Net):
    """Its step moves an averaged teacher in place and by ``.data``, and no other step runs the network."""

    validation_step = pl.LightningModule.validation_step

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for index, (mine, theirs) in enumerate(zip(self.teacher.parameters(), self.net.parameters(), strict=True)):
            if index % 2:
                mine.data = 0.9 * mine.data + 0.1 * theirs.data
            else:
                mine.mul_(0.9).add_(theirs.detach(), alpha=0.1)
        with torch.no_grad():
            target = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), target)


def queue(own: Net, logits: Tensor) -> Tensor:
    mean = own.queue.mean(0)
    place = own.counter % 16
    own.queue[place : place + len(logits)] = logits.detach()[: 16 - place]
    own.counter += len(logits)
    own.seen.append(len(logits))
    return logits + 0.1 * mean


def noise(own: Net, logits: Tensor) -> Tensor:
    return logits + 0.1 * torch.randn(logits.shape, generator=own.random)


def counting(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
    return layer


MODULES: dict[str, Callable[[], Net]] = {
    "batch norm, dropout, metric": Net,
    "spectral norm": lambda: Net(parametrizations.spectral_norm),
    "spectral norm of old": lambda: Net(spectral_norm),
    "a parametrisation that counts": lambda: Net(counting),
    "queue and counter": lambda: Net(keep=queue),
    "generator": lambda: Net(keep=noise),
    "averaged teacher": Taught,
}

# ---- what measures, beside the same without it -----------------------------------------------------------------------------------------


def shrinking(probe: str | None) -> IterativeSoftShrinkage:
    return IterativeSoftShrinkage(0.5, prune_iters=3, probe=probe)


OBSERVERS: dict[str, tuple[Callable[[], list[Any]], Callable[[], list[Any]]]] = {
    "SparsityReport": (lambda: [SparsityReport(mask_check_every_n=1)], list),
    "SparsityReport beside masks": (lambda: [RandomPruning(0.5), SparsityReport(mask_check_every_n=1)], lambda: [RandomPruning(0.5)]),
    "SparsityReport's latency": (lambda: [SparsityReport(measure_speed=True)], list),
    "SNIP": (lambda: [RandomPruning(1.0, "snip")], list),
    "GraSP": (lambda: [RandomPruning(1.0, "grasp", samples_per_class=1)], list),
    "ISS-P's probe": (lambda: [shrinking("confidence")], lambda: [shrinking(None)]),
    "CAST's probe": (
        lambda: [CAST(1, 2, distill_weight=0.0, scale_groups=0, probe_interval=1)],
        lambda: [CAST(1, 2, distill_weight=0.0, scale_groups=0, probe_interval=0)],
    ),
    "MaskSparsity's trace": (lambda: [MaskedBNSparsity("global_sparsity", lambda_=0.0)], list),
    "Sparse-IFT's count": (lambda: [SparseIFT(0.0, "none", "static", flops_tolerance=None)], list),
}


def ended(make: Callable[[], Net], callbacks: list[Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """State after two epochs, and what no state dict holds."""
    pl.seed_everything(7, verbose=False)
    module, generator = make(), torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 8, generator=generator), torch.arange(32) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    validation = torch.utils.data.DataLoader(data, batch_size=8)
    tiny_trainer(max_epochs=2, callbacks=callbacks).fit(module, loader, validation)
    state = {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    metric = [value.clone() for value in copy.deepcopy(module.accuracy.metric_state).values()]
    rest = [module.counter, len(module.seen), module.random.get_state(), generator.get_state(), torch.get_rng_state(), *metric]
    modes = [part.training for part in module.modules()]
    return state, [*rest, modes]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_training_is_the_same_with_and_without(observer: str, module: str) -> None:
    watched, alone = (ended(MODULES[module], make()) for make in OBSERVERS[observer])
    assert watched[0].keys() == alone[0].keys()
    assert [name for name, value in watched[0].items() if not torch.equal(value, alone[0][name])] == []
    assert all(same(one, other) for one, other in zip(watched[1], alone[1], strict=True)), "counters, generators, metrics"


def test_the_report_logs_at_lightnings_steps() -> None:
    rows: list[tuple[int, dict[str, float]]] = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append((step or 0, metrics))

    module = Net()
    data = torch.utils.data.TensorDataset(torch.randn(24, 8), torch.arange(24) % 4)
    from lit_methods.callbacks import DynamicSparsity

    callbacks = [DynamicSparsity(0.3, "set", interval=2, end_fraction=1.0), SparsityReport()]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    tiny_trainer(max_epochs=3, callbacks=callbacks, logger=Logger()).fit(module, loader, loader)
    steps = [step for step, metrics in rows if "sparsity/density" in metrics]
    assert steps == sorted(steps), "no curve goes back"
    assert steps[0] == 0
    assert steps[-1] == 17, "the last step of 18, as Lightning counts"
    assert {1, 3, 7, 9, 13} <= set(steps), "behind the steps that changed masks"
    assert {step for step, metrics in rows if "val/acc" in metrics} == {5, 11, 17}
