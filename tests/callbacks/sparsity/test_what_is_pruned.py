"""What is chosen is what is trained: over kinds of layers and sparsity callbacks, the reported density is that of the exported weights."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from helpers import cloned_state, tiny_trainer
from lit_methods.callbacks import (
    CAST,
    DSL,
    DynamicSparsity,
    IterativeSoftShrinkage,
    NMSparsity,
    RandomPruning,
    SparseIFT,
    SparsityReport,
)

# ---- kinds of layers -------------------------------------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function of the input and some layers."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def linear(first: Callable[[nn.Module], nn.Module] = lambda layer: layer, inner: Callable[[nn.Module], nn.Module] = lambda layer: layer):
    layers = [first(nn.Linear(16, 16)), nn.Tanh(), inner(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers)


def convolutions(kind: Any, shape: tuple[int, ...]) -> nn.Module:
    inner = [kind(shape[0], 8, 1), nn.Tanh(), kind(8, 8, 1), nn.Tanh(), kind(8, 4, 1)]
    return nn.Sequential(nn.Unflatten(1, shape), *inner, nn.Flatten(), nn.Linear(64 // shape[0], 4))


def tokens(x: Tensor) -> Tensor:
    return x.mul(8).long().clamp(0, 15)


def embedding(tied: bool = False) -> nn.Module:
    net = Call(
        lambda self, x: self.head(self.body(self.embed(tokens(x)).mean(1)))[:, :4],
        embed=nn.Embedding(16, 8),
        body=nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
        head=nn.Linear(8, 16, bias=False),
    )
    if tied:
        net.head.weight = net.embed.weight
    return net


def attention(**kwargs: Any) -> nn.Module:
    width = kwargs.get("kdim", 8)
    return Call(
        lambda self, x: self.head(self.attention(*(x.view(len(x), -1, size) for size in (8, width, width)))[0].flatten(1)),
        first=nn.Linear(4, 4),
        attention=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, **kwargs),
        head=nn.Linear(16, 4),
    )


def recurrent(kind: Any) -> nn.Module:
    layers = {"rnn": kind(4, 8, num_layers=2, batch_first=True), "head": nn.Linear(8, 4)}
    return Call(lambda self, x: self.head(self.rnn(x.view(len(x), 4, 4))[0].mean(1)), **layers)


def gpt_layers() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), conv1d(8, 16), nn.Tanh(), conv1d(16, 8), nn.Tanh(), nn.Linear(16, 4))


class Kind(NamedTuple):
    """Layers of one kind; ``left``: names that must not be pruned."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


PLAIN: dict[str, Kind] = {
    "Linear": Kind(linear),
    "Conv1d": Kind(lambda: convolutions(nn.Conv1d, (4, 4))),
    "Conv2d": Kind(lambda: convolutions(nn.Conv2d, (4, 2, 2))),
    "Conv3d": Kind(lambda: convolutions(nn.Conv3d, (2, 2, 2, 2))),
    "ConvTranspose2d": Kind(lambda: convolutions(nn.ConvTranspose2d, (4, 2, 2))),
    "Embedding": Kind(embedding, targets=("net.embed", "net.body.*")),
    "tied Embedding": Kind(lambda: embedding(tied=True), left=("net.embed.weight", "net.head.weight")),
    "MultiheadAttention": Kind(attention, left=("net.attention.bias_k", "net.attention.bias_v")),
    "MultiheadAttention, kdim": Kind(lambda: attention(kdim=4, vdim=4), left=("net.attention.bias_k", "net.attention.bias_v")),
    "LSTM": Kind(lambda: recurrent(nn.LSTM), targets=("net.rnn",)),
    "GRU": Kind(lambda: recurrent(nn.GRU), targets=("net.rnn",)),
    "Conv1D": Kind(gpt_layers),
}
MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "torch's pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.2),
}
KINDS: dict[str, Kind] = PLAIN | {
    name: Kind(lambda make=make: linear(first=make), left=("net.0.weight",))  # type: ignore[misc]
    for name, make in MADE.items()
}
CALLBACKS: dict[str, Callable[..., Any]] = {
    "RandomPruning": lambda **k: RandomPruning(0.5, exact=True, **k),
    "DynamicSparsity, static": lambda **k: DynamicSparsity(0.5, "static", **k),
    "DynamicSparsity, SET": lambda **k: DynamicSparsity(0.5, "set", interval=2, end_fraction=0.6, **k),
    "DynamicSparsity, RigL": lambda **k: DynamicSparsity(0.5, "rigl", interval=2, end_fraction=0.6, **k),
    "DSL": lambda **k: DSL(0.5, interval=3, **k),
    "IterativeSoftShrinkage": lambda **k: IterativeSoftShrinkage(0.5, prune_iters=2, **k),
    "NMSparsity": lambda **k: NMSparsity(1, 2, "ste", **k),
    "CAST": lambda **k: CAST(1, 2, distill_weight=0.0, scale_groups=1, **k),
    "SparseIFT, none": lambda **k: SparseIFT(0.5, "none", "static", flops_tolerance=None, **k),
}


QUICK = ("RandomPruning", "NMSparsity")  # one that masks weights, and one that the forward pass sees other weights of


def callbacks(names: Any = CALLBACKS) -> list[Any]:
    """Parameters of a test: the others of a base are left to `make test-all`."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in names]


class Module(pl.LightningModule):
    """A network, beside a branch that follows it and that no step of an optimiser moves."""

    def __init__(self, net: nn.Module, branch: str = "") -> None:
        super().__init__()
        self.net, self.branch = net, branch
        if branch:
            self.follower = copy.deepcopy(net).requires_grad_(branch != "frozen")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.branch:
            with torch.no_grad():
                now = self.net.state_dict()  # by name: a parametrised network has another order
                for key, other in self.follower.named_parameters():
                    other.lerp_(now[key], 0.1)
                target = self.follower(batch[0])
            loss = loss + F.mse_loss(self.net(batch[0]), target)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


def module(kind: Kind, branch: str = "") -> Module:
    torch.manual_seed(3)
    return Module(kind.build(), branch)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(24, 16, generator=generator) * 2
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (24,), generator=generator)), batch_size=6)


def fit(own: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> list[str]:
    """Train an epoch; what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_trainer(**{"max_epochs": 1, **kwargs}, callbacks=list(callbacks)).fit(own, loader())
    return [str(one.message) for one in caught]


def assert_reported(own: pl.LightningModule, callback: Any, report: SparsityReport) -> None:
    exported, masks = own.state_dict(), callback.sparsity_masks()
    assert masks
    for name, mask in masks.items():
        assert int((exported[name] != 0).sum()) == int(mask.sum()), name
    store = getattr(callback, "store", None)
    if store is not None and store.weights:
        assert store.density() == sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    rows, told = report._report["layers"], report._report["density"]["prunable"]
    kept, size = (sum(count(exported[row["name"]]) for row in rows) for count in (lambda w: int((w != 0).sum()), Tensor.numel))
    assert told == pytest.approx(kept / size, abs=1e-12), "of all prunable weights"
    assert kept < size


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", callbacks())
def test_the_reported_density_is_that_of_the_exported_weights(name: str, kind: str) -> None:
    known, report = KINDS[kind], SparsityReport()
    targets = {"targets": list(known.targets)} if known.targets else {}
    own, callback = module(known), CALLBACKS[name](**targets)
    told = fit(own, callback, report)
    assert not set(known.left) & set(callback.sparsity_masks())
    if kind in MADE and not name.startswith("SparseIFT"):
        assert any("leaves out" in message and "net.0" in message for message in told)
    assert_reported(own, callback, report)


@pytest.mark.parametrize("branch", ["frozen", "in no optimiser"])
@pytest.mark.parametrize("name", callbacks())
def test_a_branch_that_follows_is_left_alone(name: str, branch: str) -> None:
    own, callback, report = module(KINDS["Linear"], branch), CALLBACKS[name](), SparsityReport()
    refusing = name in ("NMSparsity", "CAST") and branch != "frozen"
    if refusing:  # it parametrises before optimisers are there
        with pytest.raises(ValueError, match=r"no optimiser holds follower"):
            fit(own, callback, report)
        return
    told = fit(own, callback, report)
    assert all(key.startswith("net.") for key in callback.sparsity_masks())
    assert any("leaves out" in message and "follower" in message and branch in message for message in told)
    assert_reported(own, callback, report)


@pytest.mark.parametrize("name", callbacks(name for name in CALLBACKS if not name.startswith("SparseIFT")))
@pytest.mark.parametrize(
    ("kind", "branch", "targets", "why"),
    [
        ("Linear", "frozen", ["follower.*"], r"follower\.0\.weight.*frozen"),
        ("Linear", "in no optimiser", ["net.2", "follower.2"], r"follower\.2\.weight.*in no optimiser|no optimiser holds follower"),
        *((kind, "", ["net.0", "net.2"], r"net\.0\.weight") for kind in MADE),
    ],
)
def test_what_cannot_be_pruned_is_refused_where_it_is_named(name: str, kind: str, branch: str, targets: list[str], why: str) -> None:
    own = module(KINDS[kind], branch)
    before = cloned_state(own)
    with pytest.raises(ValueError, match=why):
        fit(own, CALLBACKS[name](targets=targets))
    assert all(torch.equal(value, before[key]) for key, value in cloned_state(own).items()), "nothing has happened"


@pytest.mark.parametrize("name", callbacks())
def test_lazy_layers_are_refused(name: str) -> None:
    own = Module(nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=r"net\.0\.weight of Module has no shape yet"):
        fit(own, CALLBACKS[name]())


# ---- layers that come later ------------------------------------------------------------------------------------------------------------


class Later(Module):
    """Makes most layers in one of its hooks, once."""

    def __init__(self, hook: str, stem: bool) -> None:
        super().__init__(nn.Identity())
        self.hook = hook
        self.stem = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) if stem else nn.Identity()

    def build(self, hook: str) -> None:
        if hook == self.hook and isinstance(self.net, nn.Identity):
            torch.manual_seed(3)
            self.net = linear()

    def setup(self, stage: str) -> None:
        self.build("setup")

    def configure_model(self) -> None:
        self.build("configure_model")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.stem(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("name", callbacks())
def test_layers_that_are_built_later_are_pruned_too(name: str, hook: str, stem: bool) -> None:
    own, callback, report = Later(hook, stem), CALLBACKS[name](), SparsityReport()
    if name.startswith("SparseIFT") and hook == "setup":
        with pytest.raises(ValueError, match=r"configure_model|no hidden layer"):
            fit(own, callback, report)
        return
    fit(own, callback, report)
    inner = ["net.2.weight", "net.4.weight"]
    assert [key for key in callback.sparsity_masks() if key in inner] == inner
    assert_reported(own, callback, report)
    assert "setup" not in vars(own)
    assert "configure_model" not in vars(own)


# ---- the order of parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("name", callbacks(["NMSparsity", "CAST"]))
def test_parameters_have_their_old_order_afterwards(name: str, kind: str) -> None:
    known = PLAIN[kind]
    own, callback = module(known), CALLBACKS[name](**({"targets": list(known.targets)} if known.targets else {}))
    before = [(key, id(parameter)) for key, parameter in own.named_parameters()]
    fit(own, callback)
    assert [(key, id(parameter)) for key, parameter in own.named_parameters()] == before
    assert list(own.state_dict()) == list(module(known).state_dict())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_compute_with_masked_weights(kind: str) -> None:
    own = module(KINDS[kind])
    seen: list[bool] = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            x = next(iter(loader()))[0]
            with torch.no_grad():
                seen.append(torch.equal(pl_module.net(x), with_plain_weights(pl_module)(x)))

    def with_plain_weights(pl_module: pl.LightningModule) -> nn.Module:
        plain = module(KINDS[kind])
        plain.load_state_dict(pl_module.state_dict())  # those of the forward pass
        return plain.net

    fit(own, NMSparsity(1, 2, "ste", targets=["net.rnn"]), Look())
    assert seen
    assert all(seen)
    copy.deepcopy(own)
