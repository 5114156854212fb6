"""MAID and HOAG: what their controllers promise, resume in the middle, two processes, and mistakes."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_state_dicts_equal, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import BilevelLearning
from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import NoisyImagesDataModule, QuadraticBilevelDataModule, WeightDecayDataModule
from lit_methods.datamodules.matrices.fake import mnist
from lit_methods.inverse_problems.bilevel import conjugate_gradient, solve_lower
from lit_methods.inverse_problems.maid.core import MAIDController, MAIDSettings, MAIDState, Solver, hypergradient
from lit_methods.inverse_problems.maid.hoag import HOAGController, HOAGState, scheduled_accuracy
from lit_methods.inverse_problems.maid.random_search import RandomController, RandomState
from lit_methods.inverse_problems.problems import Quadratic, TotalVariation, make_problem


def problem_of(data: Any) -> Any:
    data.setup("fit")
    return data.problem


def quadratic(seed: int = 0, **words: Any) -> Quadratic:
    return Quadratic(problem_of(QuadraticBilevelDataModule(rows=20, hyperparameters=4, seed=seed, **words)))


IMAGES = {"size": 8, "number": 2}
SMALL = {
    "quadratic": lambda: QuadraticBilevelDataModule(rows=20, hyperparameters=4, steps_per_epoch=3),
    "weight_decay": lambda: WeightDecayDataModule("breast_cancer", steps_per_epoch=3),
    "tv": lambda: NoisyImagesDataModule(**IMAGES, steps_per_epoch=3),
    "experts": lambda: NoisyImagesDataModule(**IMAGES, name="photographs", steps_per_epoch=3),
}


@pytest.mark.parametrize("momentum", [True, False])
def test_a_lower_solve_reaches_its_accuracy(momentum: bool) -> None:
    problem = quadratic()
    theta, x = problem.start()
    exact = torch.linalg.lstsq(problem.a2, (problem.b2 - problem.a3 @ theta)[:, None]).solution[:, 0]
    for epsilon in (1e-1, 1e-4, 1e-8):
        found, iterations = Solver(momentum)(problem, theta, x, epsilon)
        assert torch.linalg.vector_norm(found - exact) <= epsilon
        assert iterations > 0
    assert solve_lower(lambda p: 3 * (p - 2), torch.zeros(1), 3.0, 3.0, 1e-6, momentum).x == pytest.approx(2.0), "mu = L: one step"


def test_conjugate_gradients_return_zero_below_the_tolerance() -> None:
    found = conjugate_gradient(lambda v: 2 * v, torch.full((3,), 1e-3), 1.0)
    assert not found.x.any()
    assert found.iterations == 0


@pytest.mark.parametrize("name", list(SMALL))
def test_constants_bound_the_curvature_and_hypergradients_are_right(name: str) -> None:
    problem = make_problem(name, problem_of(SMALL[name]()), filters=2)  # type: ignore[arg-type]
    theta, x = problem.start()
    theta = theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, smoothness = problem.constants(theta)
    hessian = torch.autograd.functional.hessian(lambda v: problem.lower(v.view(x.shape), theta), x.flatten())
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert mu <= eigenvalues[0] * (1 + 1e-9)
    assert eigenvalues[-1] <= smoothness * (1 + 1e-9)
    exact = hypergradient(problem, theta, x, 1e-9 * mu, 1e-10, Solver(max_iterations=200_000)).z

    def value(point: Tensor) -> float:
        return float(problem.upper(Solver(max_iterations=200_000)(problem, point, x, 1e-9 * mu)[0]))

    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = (value(theta + 1e-4 * direction) - value(theta - 1e-4 * direction)) / 2e-4
    assert float((exact * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=1e-8)


def test_the_error_bound_holds_on_quadratics_and_steps_go_down() -> None:
    problem = quadratic(seed=1)
    theta, x = problem.start()
    exact = hypergradient(problem, theta, x, 1e-12, 1e-12, Solver(max_iterations=100_000)).z
    for accuracy in (1e-1, 1e-2, 1e-3):
        found = hypergradient(problem, theta, x, accuracy, accuracy, Solver())
        assert torch.linalg.vector_norm(found.z - exact) <= found.bound
    controller = MAIDController(MAIDSettings(probe=False), MAIDState(0.1, 0.1, 0.01))
    x, values = controller.solver(problem, theta, x, 0.1)[0], [float(problem.gap(theta))]
    for _ in range(15):
        theta, x, _, searches = controller.iterate(problem, theta, x)
        values.append(float(problem.gap(theta)))
        assert searches[-1].success or values[-1] == values[-2]
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_fixed_accuracy_never_changes_and_hoag_follows_its_schedule() -> None:
    problem = quadratic()
    theta, x = problem.start()
    controller = MAIDController(MAIDSettings(fixed_accuracy=True), MAIDState(0.01, 0.02, 0.01))
    for _ in range(4):
        theta, x, *_ = controller.iterate(problem, theta, x)
    assert (controller.state.epsilon, controller.state.delta) == (0.01, 0.02)
    assert [scheduled_accuracy(1.0, 2, name) for name in ("geometric", "quadratic", "cubic")] == pytest.approx([0.81, 1 / 9, 1 / 27])  # type: ignore[arg-type]
    theta, x = problem.start()
    hoag, first = HOAGController("geometric", HOAGState(0.1)), float(problem.gap(theta))
    for _ in range(60):
        theta, x, *_ = hoag.iterate(problem, theta, x)
    assert float(problem.gap(theta)) < first


@pytest.mark.parametrize(("name", "method"), [(name, "maid") for name in SMALL] + [("quadratic", "hoag"), ("weight_decay", "random")])
def test_a_killed_run_ends_the_same(name: str, method: Any, tmp_path: Path) -> None:
    if method == "random":
        pytest.importorskip("optuna")

    def build() -> Any:
        return BilevelLearning(name, method, filters=2, beta=0.05, seed=3), SMALL[name](), [ExactResume()]  # type: ignore[arg-type]

    whole, resumed = kill_and_resume(build, 5, 2, tmp_path, limit_val_batches=0, max_epochs=-1)
    assert_state_dicts_equal(resumed, whole)


def test_hoag_takes_a_bad_step_back_in_the_module_too() -> None:
    module, data = BilevelLearning("tv", "hoag"), SMALL["tv"]()
    tiny_trainer(max_steps=6, limit_val_batches=0).fit(module, datamodule=data)
    problem = make_problem("tv", data.problem)
    controller, (theta, x) = HOAGController("geometric", HOAGState(0.1), Solver()), problem.start()
    x, _ = controller.solver(problem, theta, x, 0.1)
    for _ in range(6):
        theta, x, *_ = controller.iterate(problem, theta, x)
    assert controller.state.failures > 0
    assert module.theta is not None
    torch.testing.assert_close(module.theta.detach(), theta, rtol=0, atol=1e-12)


def test_random_search_keeps_the_best_draw() -> None:
    pytest.importorskip("optuna")
    problem = quadratic()
    theta, x = problem.start()
    controller = RandomController(2.0, 7, RandomState(1e-3))
    values, draws = [], []
    x, _ = controller.solver(problem, theta, x, 1e-3)
    for _ in range(12):
        draws.append(controller.draw(theta))
        theta, x, gradient, (search,) = controller.iterate(problem, theta, x)
        assert gradient is None
        values.append(controller.state.value)
        assert float(problem.upper(x)) == values[-1]
        assert search.success == (search.step > 0)
    assert torch.stack(draws).abs().max() <= 1
    assert len({float(draw[0]) for draw in draws}) == 12
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] < values[0]
    assert 0 < controller.state.failures < 12


def test_without_optuna_random_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tuning"):
        BilevelLearning(method="random")


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(BilevelLearning(), datamodule=SMALL["quadratic"]())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="another method"):
        tiny_trainer().fit(
            BilevelLearning(method="hoag"), datamodule=SMALL["quadratic"](), ckpt_path=tmp_path / "one.ckpt", weights_only=True
        )


@pytest.mark.parametrize("real", [False, True])
def test_mnist_is_read(real: bool, tmp_path: Path) -> None:
    root = Path(os.environ.get("LIT_METHODS_TEST_DATA", "")) / "mnist_t10k" if real else tmp_path
    if real and not root.is_dir():
        pytest.skip("no MNIST in LIT_METHODS_TEST_DATA")
    if not real:
        mnist(root, 6)
    data = WeightDecayDataModule(root=root, samples=60, shares=(0.5, 0.3))
    batch = problem_of(data)
    assert batch["features"].shape == (30, 144)
    assert batch["val_features"].shape == (18, 144)
    assert 0 <= batch["features"].min() < batch["features"].max() <= 1
    assert len(data.val_set[0]["test_label"]) == 12
    for name, count in (("label", 30), ("val_label", 18)):
        assert len(batch[name]) == count
        assert len(batch[name].bincount(minlength=10)) == 10, "digits"


def _two() -> dict[str, Tensor]:
    module = BilevelLearning("weight_decay", beta=50.0, seed=3)
    tiny_trainer(devices=2, strategy="ddp", max_steps=3, limit_val_batches=0).fit(module, datamodule=SMALL["weight_decay"]())
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_two_processes_take_the_decisions_of_one() -> None:
    module = BilevelLearning("weight_decay", beta=50.0, seed=3)
    tiny_trainer(max_steps=3, limit_val_batches=0).fit(module, datamodule=SMALL["weight_decay"]())
    for state in run_two_processes(_two):
        assert_state_dicts_equal(state, dict(module.state_dict()))


def test_autocast_changes_nothing_and_the_budget_ends_a_run() -> None:
    states = []
    for precision in ("32-true", "bf16-mixed"):
        module = BilevelLearning("tv", seed=1, budget=60)
        trainer = tiny_trainer(max_steps=50, precision=precision, limit_val_batches=0)
        trainer.fit(module, datamodule=SMALL["tv"]())
        states.append(dict(module.state_dict()))
        assert trainer.global_step < 50
        assert module.controller.state.lower_iterations >= 60
    assert_state_dicts_equal(*states)


def test_a_denoiser_denoises_and_predicts() -> None:
    data, module = NoisyImagesDataModule(size=24, number=3, steps_per_epoch=15), BilevelLearning("tv", beta=0.1)
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    noisy, clean = data.val_set[0]["noisy"], data.val_set[0]["clean"]
    before = float(-10 * (noisy - clean).square().mean().log10())
    assert float(trainer.callback_metrics["bilevel/val_psnr"]) > before + 1
    assert module.predict_step({"noisy": noisy, "clean": clean}, 0)["x"].shape == noisy.shape
    assert "bilevel/pictures" in module.dashboard_media()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BilevelLearning(epsilon=0), "epsilon"),
        (lambda: BilevelLearning(rho=1.5), "rho"),
        (lambda: BilevelLearning(problem="cubic"), "problem"),
        (lambda: QuadraticBilevelDataModule(rows=3, hyperparameters=4), "rows"),
        (lambda: WeightDecayDataModule(shares=(0.6, 0.5)), "shares"),
        (lambda: problem_of(WeightDecayDataModule(root=Path("nowhere"))), "train-images-idx3-ubyte"),
        (lambda: BilevelLearning(search_width=0.0), "search_width"),
        (lambda: problem_of(NoisyImagesDataModule(Path("nowhere"))), "PNG files"),
        (lambda: TotalVariation({"noisy": torch.zeros(1, 1, 4, 4)}), "clean"),
        (lambda: TotalVariation(dict.fromkeys(("noisy", "clean"), torch.full((1, 1, 4, 4), torch.nan))), "NaN"),
        (
            lambda: Quadratic({n: torch.ones(4, 2) if n in ("A1", "A2", "A3") else torch.ones(4) for n in ("A1", "A2", "A3", "b1", "b2")}),
            "singular",
        ),
    ],
)
def test_mistakes_are_told(make: Any, says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=says):
        make()
