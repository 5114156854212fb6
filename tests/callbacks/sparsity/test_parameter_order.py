"""What a module's own code sees in ``parameters()`` while weights are parametrised: names and order as without, scales where they fit."""

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import Images, tiny_trainer
from lit_methods.callbacks import CAST, EMATeacher, NMSparsity
from lit_methods.callbacks.sparsity.latent import ParametrizedWeight
from lit_methods.callbacks.sparsity.parameter_order import follow_old_order
from lit_methods.callbacks.sparsity.parametrized import LatentWeight, parameters_in_old_order


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))


class Momentum(pl.LightningModule):
    """A student, and a teacher that each step moves after it: by their parameters, in parallel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student = network()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    @torch.no_grad()
    def follow(self) -> None:
        for theirs, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            theirs.lerp_(own, 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        return F.cross_entropy(self(batch[0]), batch[1]) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=0.01)


class ByName(Momentum):
    """Groups that are made of layers' types and parameters' names; what fits in none is an error."""

    def follow(self) -> None:
        pass

    def configure_optimizers(self) -> Any:
        named = dict(self.student.named_parameters())
        kind = {f"{name}.{own}": type(part) for name, part in self.student.named_modules() for own in part._parameters}
        decay = [name for name in named if name.endswith("weight") and issubclass(kind[name], nn.Linear)]
        still = [name for name in named if name.endswith("bias") or kind[name] is nn.LayerNorm]
        assert set(decay) | set(still) == set(named), "a parameter fits in no group"
        groups = [{"params": [named[name] for name in names], "weight_decay": rate} for names, rate in ((decay, 0.1), (still, 0.0))]
        return torch.optim.AdamW(groups, lr=0.01)


class Look(pl.Callback):
    """Names while fit runs, and the latent weights that the teacher follows."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.names = [name for name, _ in pl_module.named_parameters()]
        self.groups = [[id(parameter) for parameter in group["params"]] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        latent, teacher = pl_module.student[3].parametrizations.weight.original, pl_module.teacher[3].weight
        self.expected = teacher.lerp(latent.detach(), 0.5)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        assert torch.equal(pl_module.teacher[3].weight, self.expected)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = tiny_trainer(max_steps=3, callbacks=list(callbacks))
    trainer.fit(module, torch.utils.data.DataLoader(Images(), batch_size=4))
    return trainer


def cast(**kwargs: Any) -> CAST:
    return CAST(2, 4, targets=["student.3"], distill_weight=0.0, **kwargs)


@pytest.mark.parametrize(
    "callback", [lambda: NMSparsity(2, 4, "ste", targets=["student.3"]), lambda: cast(scale_groups=0)], ids=["NMSparsity", "CAST"]
)
def test_a_momentum_branch_follows_the_latent_weights(callback: Any) -> None:
    module, look = Momentum(), Look()
    names = [name for name, _ in module.named_parameters()]
    fit(module, callback(), look)
    assert look.names == names
    assert [name for name, _ in module.named_parameters()] == names
    assert (module.student[3].weight != 0).float().mean() == 0.5


def test_scales_beside_a_momentum_branch_are_refused_before_the_first_step() -> None:
    module = Momentum()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"CAST has added parameters to 'student' that 'teacher' lacks.*set scale_groups to 0"):
        fit(module, cast(scale_groups=2))
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items() if "student" in name)
    assert "training_step" not in vars(module)
    assert "configure_optimizers" not in vars(module)


class Broadcasts(Momentum):
    """Its update takes whatever shapes fit, and the shorter list ends it."""

    @torch.no_grad()
    def follow(self) -> None:
        for theirs, own in zip(self.teacher.parameters(), self.student.parameters(), strict=False):
            if theirs.ndim == own.ndim and own.shape[0] == theirs.shape[0] and own.shape[-1] in (1, theirs.shape[-1]):
                theirs.lerp_(own.expand_as(theirs), 0.5)


def test_a_branch_that_moves_beside_scales_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"added parameters to 'student' that 'teacher' lacks.*moves that: if it walks.*scale_groups"):
        fit(Broadcasts(), cast(scale_groups=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CAST has added")
        fit(Broadcasts(), cast(scale_groups=0))
        fit(ByName(), cast(scale_groups=1))


def test_an_error_of_a_step_without_a_second_branch_stays_what_it_is() -> None:
    class Fails(ByName):
        def __init__(self) -> None:
            super().__init__()
            del self.teacher

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("of my own")

    with pytest.raises(RuntimeError, match=r"^of my own$"):
        fit(Fails(), cast())


def test_scales_are_trained_in_the_group_of_their_weight() -> None:
    module, callback, look = ByName(), cast(scale_groups=2, finalize=False), Look()
    look.on_train_batch_start = look.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
    scales: list[nn.Parameter] = []

    class Grab(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            scales.append(pl_module.student[3].parametrizations.weight[0].scale)

    fit(module, callback, look, Grab())
    decay, still = look.groups
    assert id(scales[0]) in decay
    assert len(decay) == 4
    assert len(still) == 5
    assert "student.3.weight" in look.names
    assert not torch.equal(scales[0], torch.ones_like(scales[0])), "it is trained"


def test_the_users_own_error_in_configure_optimizers_is_told() -> None:
    class Fails(Momentum):
        def configure_optimizers(self) -> Any:
            raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        fit(Fails(), cast())


class Scaled(LatentWeight):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def test_optimiser_states_of_the_old_order_reach_their_parameters() -> None:
    """Up to 0.1 a latent weight stood behind the bias of its layer, and what is added behind that."""
    module = network()
    layers = [ParametrizedWeight(module[place], "weight", Scaled()) for place in (1, 3)]
    for layer in layers:
        layer.attach()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    old = [names[id(parameter)] for parameter in parameters_in_old_order(module)]
    assert old[:3] == ["1.bias", "1.weight", "1.parametrizations.weight.0.scale"]
    assert sorted(old) == sorted(names.values())

    optimizer = torch.optim.Adam(module.parameters())
    state = {
        "state": {
            place: {"step": torch.tensor(1.0), "exp_avg": torch.full_like(parameter, place)}
            for place, parameter in enumerate(parameters_in_old_order(module))
        },
        "param_groups": [{**optimizer.state_dict()["param_groups"][0], "params": list(range(len(old)))}],
    }
    follow_old_order(module, [optimizer], [state])
    optimizer.load_state_dict(state)
    for parameter in module.parameters():
        expected = torch.full_like(parameter, old.index(names[id(parameter)]))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected), names[id(parameter)]


def test_groups_in_an_order_of_their_own_stay() -> None:
    module = network()
    ParametrizedWeight(module[1], "weight", Scaled()).attach()
    optimizer = torch.optim.Adam(reversed(list(module.parameters())))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    follow_old_order(module, [optimizer], [state])
    assert state == before


def test_a_teachers_state_of_old_names_is_taken() -> None:
    teacher = EMATeacher(decay=0.5)
    fit(Momentum(), NMSparsity(2, 4, "ste", targets=["student.3"]), teacher)
    state = teacher.state_dict()
    (averages,) = state["averages"].values()
    averages["student.3.parametrizations.weight.original"] = torch.full_like(averages.pop("student.3.weight"), 7.0)
    teacher.load_state_dict(state)
    assert (teacher.averaged()["student.3.weight"] == 7).all()
    averages["student.3.other"] = averages.pop("student.3.parametrizations.weight.original")
    with pytest.raises(ValueError, match="has other tensors than this run's"):
        teacher.load_state_dict(state)
