"""BilevelTuning: the plain controller on a plain problem, modules that aren't ours, an end within a line search, ranks, mistakes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import assert_state_dicts_equal, cloned_state, run_two_processes, tiny_trainer
from lit_methods.callbacks import BilevelTuning, ExactResume
from lit_methods.distributed import into_ranks, out_of_ranks
from lit_methods.inverse_problems.bilevel import largest_curvature
from lit_methods.inverse_problems.maid import core
from lit_methods.inverse_problems.maid.core import MAIDController, MAIDSettings, MAIDState, Solver


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six features of which two tell three classes."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed + 1))
    return x, (torch.stack([x[:, 0], x[:, 1], -x[:, 0]], 1) + noise).argmax(1)


class Linear(pl.LightningModule):
    """A classifier whose loss has a weight that is a buffer; batches are tuples."""

    def __init__(self, rate: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3, dtype=dtype)
        self.dropout, self.rate = nn.Dropout(0.5), rate
        self.register_buffer("log_smoothing", torch.tensor(-2.0, dtype=dtype))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(x.to(self.head.weight.dtype)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1]) + self.log_smoothing.exp() * logits.square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def loaders(size: int = 60) -> list[Any]:
    return [DataLoader(TensorDataset(*rows(60, seed)), batch_size=size) for seed in (0, 5)]


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], steps: int = 3, size: int = 60, **words: Any) -> pl.Trainer:
    ckpt = {"ckpt_path": words.pop("ckpt_path", None)}
    saving = [callback for callback in callbacks if isinstance(callback, pl.callbacks.ModelCheckpoint)]
    trainer = tiny_trainer(**{"max_steps": steps, "callbacks": callbacks, "enable_checkpointing": bool(saving), **words})
    trainer.fit(module, *loaders(size), **ckpt, weights_only=True)
    return trainer


def tuning(**words: Any) -> BilevelTuning:
    return BilevelTuning(**{"weight_decay": {"*weight": -2.0, "*bias": -1.0}, "every_n_steps": 1, "smoothness": 4.0, **words})


BOTH = {"hyperparameters": ["log_smoothing"], "upper_step": "validation_step"}


class Plain:
    """The same problem, written down: x holds weight and bias."""

    def __init__(self) -> None:
        (self.x, self.y), (self.other, self.label) = ((x.double(), y) for x, y in (rows(60, 0), rows(60, 5)))
        hessian = torch.autograd.functional.hessian(self.upper, torch.zeros(21).double())
        self.upper_smoothness = 2 * float(torch.linalg.eigvalsh(hessian)[-1])

    def logits(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows @ x[:18].view(3, 6).T + x[18:]

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        logits = self.logits(self.x, x)
        decay = (theta[1].exp() * x[:18].square().sum() + theta[2].exp() * x[18:].square().sum()) / 2
        return F.cross_entropy(logits, self.y) + theta[0].exp() * logits.square().mean() + decay

    def upper(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(self.other, x), self.label)

    def constants(self, theta: Tensor) -> tuple[float, float]:
        return float(theta[1:].exp().min()), 4.0


def test_it_is_the_plain_controller_on_the_plain_problem() -> None:
    module, callback = Linear(), tuning(**BOTH, probe=True, beta=5.0)
    trainer = fit(module, [callback], 4)
    problem, theta, x = Plain(), torch.tensor([-2.0, -2.0, -1.0]).double(), torch.zeros(21).double()
    controller = MAIDController(MAIDSettings(), MAIDState(0.1, 0.1, 5.0), Solver())
    controller.generator.set_state(tuning().controller.generator.get_state())
    x, controller.state.lower_iterations = controller.solver(problem, theta, x, 0.1)
    first = float(problem.upper(x))
    for _ in range(4):
        theta, x, *_ = controller.iterate(problem, theta, x)
    assert callback.theta is not None
    torch.testing.assert_close(callback.theta, theta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([module.head.weight.flatten(), module.head.bias]).detach(), x, rtol=1e-9, atol=1e-12)
    assert module.log_smoothing == callback.theta[0]
    assert callback.controller.state.lower_iterations == controller.state.lower_iterations
    assert controller.state.value is not None
    assert controller.state.value < first
    assert float(trainer.callback_metrics["bilevel_tuning/upper_loss"]) == pytest.approx(controller.state.value)
    assert "training_step" not in vars(module)


def test_a_module_in_float32_trains_between_and_its_own_weights_decay() -> None:
    torch.manual_seed(0)
    module = Linear(0.1, torch.float32)
    callback = BilevelTuning(weight_decay={"*": 0.0}, every_n_steps=4, beta=5.0)
    trainer = fit(module, [callback], 12, 20, precision="bf16-mixed")
    assert callback.theta is not None
    assert callback.theta.item() < -0.3, "a decay of 1 is too large for these rows"
    decay = callback.theta.exp().item() * sum(p.square().sum() for p in module.parameters()) / 2
    assert 0 < trainer.callback_metrics["bilevel_tuning/loss"] < 10 * decay
    fit(module, [callback], 4, 20)  # a second fit goes on with what it has
    assert module.training


class Interrupted(Exception):
    """A run that ends within a line search."""


def test_a_run_that_ends_within_a_line_search_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> tuple[Linear, list[Any]]:
        torch.manual_seed(1)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_on_train_epoch_end=False)
        return Linear(0.05, torch.float32), [tuning(**BOTH, every_n_steps=2, probe=True, beta=3000.0), ExactResume(), saving]

    module, callbacks = build()
    fit(module, callbacks, 6, 20)
    whole, theta = cloned_state(module), callbacks[0].theta
    searched, original = [0], core.upper_gradient

    def counted(problem: Any, x: Tensor) -> Any:
        searched[0] += 1
        if callbacks[0].controller.state.value is not None and callbacks[0]._done == 4 and searched[0] > counts[4] + 3:
            raise Interrupted
        return original(problem, x)

    counts = {4: 10**9}
    module, callbacks = build()
    iterate = BilevelTuning.iterate

    def noted(self: BilevelTuning, *arguments: Any) -> Any:
        counts[self._done] = searched[0]
        return iterate(self, *arguments)

    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(core, "upper_gradient", counted)
        patch.setattr(BilevelTuning, "iterate", noted)
        with pytest.raises(Interrupted):
            fit(module, callbacks, 6, 20)
    module, callbacks = build()
    torch.manual_seed(99)
    fit(module, callbacks, 6, 20, ckpt_path=tmp_path / "last.ckpt")
    assert_state_dicts_equal(cloned_state(module), whole)
    assert torch.equal(callbacks[0].theta, theta)


def _two() -> tuple[Tensor, dict[str, Tensor], int]:
    torch.manual_seed(0)
    module, callback = Linear(0.05), tuning(**BOTH, every_n_steps=2, beta=5.0)
    fit(module, [callback], 4, 10, devices=2, strategy="ddp")
    assert callback.theta is not None
    x = torch.tensor([1.0 + torch.distributed.get_rank()], requires_grad=True)  # f(x) = sum over ranks of r x^3
    shared = torch.tensor([2.0], requires_grad=True)
    value = out_of_ranks(x.detach() * into_ranks(shared) ** 3)
    (slope,) = torch.autograd.grad(value, shared, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, shared)
    assert (value.item(), slope.item(), curvature.item()) == (24.0, 36.0, 36.0)
    return callback.theta, cloned_state(module), callback.controller.state.lower_iterations


def test_two_processes_take_the_same_decisions() -> None:
    torch.manual_seed(0)
    (theta, state, iterations), (other, same, others) = run_two_processes(_two)
    assert torch.equal(theta, other)
    assert iterations == others
    assert_state_dicts_equal(state, same)


def test_curvature_is_found() -> None:
    matrix = torch.diag(torch.tensor([1.0, 5.0, -7.0]))
    assert largest_curvature(lambda v: matrix @ v, torch.ones(3), 60) == pytest.approx(7.0, rel=1e-3)
    assert largest_curvature(torch.zeros_like, torch.ones(3)) == 0.0


class Detached(Linear):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + self.log_smoothing.detach()


class Downwards(Linear):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) - 3 * self.head.weight.square().sum()


class Manual(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        (Linear, {"hyperparameters": ["log_smoothin"]}, "log_smoothing"),
        (Linear, {"hyperparameters": ["head.bias"]}, "trained parameter"),
        (Linear, {"weight_decay": {"*weight": -2.0}}, "head.bias has no weight decay"),
        (Linear, {"weight_decay": {"*": -2.0, "head.*": -1.0}}, "two patterns"),
        (Linear, {"weight_decay": {"body*": -2.0}}, "matches no trained parameter"),
        (Linear, {"upper_step": "valid_step"}, "upper_step"),
        (Linear, {"upper_step": "configure_callbacks"}, "without a loss"),
        (Linear, {"hyperparameters": ["log_smoothing"]}, "log_smoothing itself"),
        (Detached, {"hyperparameters": ["log_smoothing"]}, "without detaching"),
        (Downwards, {"smoothness": None, "max_iterations": 30}, "curves downwards"),
        (Manual, {}, "automatic_optimization"),
    ],
)
def test_what_cannot_be_is_told(module: Any, words: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        fit(module(), [tuning(**words)])
    assert "BilevelTuning" in str(caught.value)


def test_wrong_arguments_are_told() -> None:
    for words, says in (({"weight_decay": None}, "nothing to tune"), ({"beta": 0.0}, "beta"), ({"nu": 0.5}, "nu")):
        with pytest.raises(ValueError, match=says):
            tuning(**words)
    with pytest.raises(ValueError, match="no validation data"):
        fit(Linear(), [tuning()], limit_val_batches=0)
    callback = tuning()
    callback.theta = torch.zeros(2).double()
    with pytest.raises(ValueError, match="5 hyperparameters"):
        callback.load_state_dict({**tuning().state_dict(), "theta": torch.zeros(5)})
