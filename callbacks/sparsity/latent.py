"""Weights that the forward pass sees through a parametrisation, and that checkpoints hold as the forward pass sees them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from lit_methods import checks
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.callback import MaskCallback, refuse_shared
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_modules, plain_name, refuse_sharded

# ---- the maths -------------------------------------------------------------------------------------------------------------------------

Gradient = Literal["ste", "exact"]
Direction = Literal["input", "output"]


def group_dim(ndim: int, direction: Direction = "input", transposed: bool = False) -> int:
    """Dimension along which the groups of M run.

    Args:
        ndim: Dimensions of the weight; a kernel (more than 2) always has its groups over the input channels.
        direction: ``input`` (the authors' row mode) or ``output`` (column mode) of a linear layer.
        transposed: The weight is stored (in, out, ...), as in transposed convolutions.
    """
    inputs = 0 if transposed else 1
    return 1 - inputs if direction == "output" and ndim == 2 else inputs


def _scaled(weight: Tensor, mask: Tensor, beta: Tensor | float) -> Tensor:
    """W * (M + (1 - M) beta)."""
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):  # some times faster there, and bit-equal
        return weight * mask.to(weight.dtype).clamp_(min=beta)
    return torch.where(mask, weight, weight * beta)


class _StraightThrough(torch.autograd.Function):
    """W * (M + (1 - M) beta) forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, beta: Tensor) -> Tensor:  # type: ignore[override]
        return _scaled(weight, mask, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def masked_weight(weight: Tensor, mask: Tensor, beta: Tensor | float, gradient: Gradient = "ste") -> Tensor:
    """The weight of the forward pass: W * (M + (1 - M) beta).

    Args:
        weight: Latent weight W, any shape, floating point.
        mask: M, bool, shape of ``weight``.
        beta: Factor of pruned weights, 0 to 1, a number or a scalar tensor.
        gradient: ``ste``: the gradient reaches W unchanged, as in the released code. ``exact``: that of the formula with M and beta
            constant, so that pruned weights get beta times theirs.

    Returns:
        Shape and dtype of ``weight``.
    """
    if gradient == "exact":
        return _scaled(weight, mask, beta)
    factor = beta if isinstance(beta, Tensor) else torch.tensor(beta, dtype=torch.float64)
    return _StraightThrough.apply(weight, mask, factor)  # type: ignore[no-any-return]


# ---- the parametrisation ---------------------------------------------------------------------------------------------------------------


class LatentWeight(nn.Module):
    """Base of the parametrisations: latent weight -> weight of the forward pass, of the same shape."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """An assigned weight becomes the latent one."""
        return weight

    def neutral_state(self) -> Mapping[str, Tensor]:
        """Values of its own parameters with which the forward pass sees the latent weight as it is, by name."""
        return {}


def _plain_on_save(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: the effective weight under the name that it has without us."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight):
            for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
                del state[key]
            with torch.no_grad():
                state[f"{prefix}{name}"] = getattr(module, name).detach()


def _plain_on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: a weight under its plain name becomes the latent one."""
    chains: Any = module.parametrizations
    for name, chain in chains.items():
        if isinstance(chain[0], LatentWeight) and f"{prefix}{name}" in state:
            state[f"{prefix}parametrizations.{name}.original"] = state.pop(f"{prefix}{name}")
            for own, value in chain[0].neutral_state().items():
                state[f"{prefix}parametrizations.{name}.0.{own}"] = value


class Shared:
    """State of a parametrisation that all copies of the module share (an EMA teacher), so that they follow it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


class ParametrizedWeight:
    """One weight of a module, with a parametrisation that can be attached and taken off without a trace.

    Args:
        module: Owner of the weight.
        attribute: Name of the weight in it.
        parametrization: What the forward pass sees it through.

    Attributes:
        latent: The parameter that optimisers train, once attached.
    """

    latent: nn.Parameter

    def __init__(self, module: nn.Module, attribute: str, parametrization: LatentWeight) -> None:
        self.module, self.attribute, self.parametrization = module, attribute, parametrization

    def attach(self) -> None:
        """Put the parametrisation on."""
        self._order = list(self.module._parameters)
        hooked = parametrize.is_parametrized(self.module)  # by us, for another weight of this module
        parametrize.register_parametrization(self.module, self.attribute, self.parametrization)
        self.latent = self.module.parametrizations[self.attribute].original  # type: ignore[index, union-attr, assignment]
        self._handles: list[Any] = []
        if not hooked:
            self._handles.append(self.module.register_state_dict_post_hook(_plain_on_save))
            self._handles.append(self.module.register_load_state_dict_pre_hook(_plain_on_load))

    def detach(self) -> None:
        """The effective weight becomes an ordinary parameter again, the same object and at its old place.

        Not by ``remove_parametrizations``: it takes the attribute out of a class that copies of the module (an EMA teacher) share.
        """
        module, attribute = self.module, self.attribute
        with torch.no_grad():
            self.latent.data = getattr(module, attribute).detach().clone()
        for handle in self._handles:
            handle.remove()
        chains: Any = module.parametrizations
        del chains[attribute]
        if not len(chains):
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
        elif not any(isinstance(chain[0], LatentWeight) for chain in chains.values()):
            delattr(type(module), attribute)  # somebody else's parametrisation stays, and its class with it
        own = module._parameters
        own[attribute] = self.latent
        for name in self._order:
            if name in own:
                own[name] = own.pop(name)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


_LOST = "its checkpoints hold the weights of the forward pass only, so a resumed average would lose the latent ones"


class LatentCallback(OrderedCallback):
    """Base of the callbacks that train latent weights W, of which the forward pass sees a function.

    Subclasses make the parametrised weights (:meth:`make_layers`), say what becomes of them at the end (:meth:`finish`) and what is saved
    (:meth:`state`).

    Runs: weights are parametrised in ``setup``, before the optimisers are made. :meth:`finish` is called behind the last batch, so that the
    last validation and the last checkpoint are of the finished network, and again when training ends, as it may have been stopped early.
    After fit the module is an ordinary one with the weights of the forward pass. While fit runs, parameters are called
    ``<module>.parametrizations.weight.original`` in ``named_parameters()``.

    Saves: under the weights' own names those of the forward pass, so that checkpoints load and export without the callback; latent weights
    in the callback's state.

    Refuses: strategies that shard weights, Lightning's ``ModelPruning``, ``WeightAveraging`` and ``StochasticWeightAveraging``, tied
    weights, weights that are parametrised already, and mask callbacks on the same weights.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module except first and last.
        skip: Patterns on submodule names that stay as they are.
    """

    latents: ClassVar[str] = "latent"  # where the state holds them
    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        **dict.fromkeys(("WeightAveraging", "StochasticWeightAveraging"), _LOST),
    }

    def __init__(self, targets: Iterable[str], skip: Sequence[str]) -> None:
        super().__init__()
        checks.patterns(targets=targets, skip=skip)
        self.targets: list[str] | dict[str, str] = dict(targets) if isinstance(targets, Mapping) else list(targets)
        self.skip = list(skip)
        self.reset()

    def reset(self) -> None:
        """Forget the last run."""
        self._layers: dict[str, Any] = {}
        self._left: dict[str, Any] = {}  # state after fit

    @property
    def state_key(self) -> str:
        """Differs between callbacks of different targets: several may be used together."""
        return self._generate_state_key(targets=self.targets, skip=self.skip)

    # ---- for subclasses ----------------------------------------------------------------------------------------------------------------

    def chosen(self, pl_module: nn.Module) -> dict[str, Any]:
        """Name of each chosen weight -> the weight, or what a subclass says of it."""
        weights = prunable_weights(pl_module, list(self.targets), self.skip)
        if self.targets:
            return dict(weights)
        every = list(prunable_weights(pl_module))
        inner: dict[str, Any] = {name: weight for name, weight in weights.items() if name not in (every[0], every[-1])}
        if not inner:
            between = "has no linear, convolution or attention module between its first and its last one, which stay dense by default"
            raise ValueError(f"{type(pl_module).__name__} {between}: name the ones to prune with targets")
        return inner

    def make_layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Mapping[str, Any], places: Mapping[str, "Place"]
    ) -> Mapping[str, ParametrizedWeight]:
        """The chosen weights with their parametrisations, which are then put on; {} for none."""
        raise NotImplementedError

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the weights into their final form; called twice at least, the second time for runs that were stopped early."""

    def state(self) -> dict[str, Any]:
        """State of the callback while it has parametrised weights."""
        raise NotImplementedError

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights and parametrise them, before the optimisers are made.

        Raises:
            ValueError: What can't work: a sharding strategy, weights that somebody else masks, parametrises or ties.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        self.leave(trainer, pl_module)
        self.reset()
        chosen = self.chosen(pl_module)
        refuse_unfit(trainer, pl_module, type(self).__name__, set(chosen))
        modules = plain_modules(pl_module)
        layers = dict(self.make_layers(trainer, pl_module, chosen, {name: Place(modules, name) for name in chosen}))
        for layer in layers.values():
            layer.attach()
        self._layers = layers
        rank_zero_info(f"{self.title()}: {len(layers)} weights: {', '.join(layers)}")

    def title(self) -> str:
        """What the callback calls itself when it starts."""
        return type(self).__name__

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Behind the last batch: :meth:`finish`."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epochs_over = last and trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if epochs_over or 0 <= trainer.max_steps <= trainer.global_step:
            self.finish(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`finish`, if training was stopped early."""
        self.finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Latent weights and what the subclass needs, as they are or as they were when the module was left."""
        return self.state() if self._layers else self._left

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module with the weights of the forward pass; the state stays readable."""
        if self._layers:
            state = self.state()
            self._left = state | {self.latents: apply_to_collection(state[self.latents], Tensor, lambda value: value.cpu().clone())}
            layers, self._layers = self._layers, {}
            for layer in layers.values():
                layer.detach()


class Place:
    """Where a weight lies.

    Attributes:
        module: Owner of the weight.
        attribute: Name of the weight in it.
        transposed: It is stored (in, out, ...), as in transposed convolutions and GPT-2's linear layers.
    """

    def __init__(self, modules: Mapping[str, nn.Module], name: str) -> None:
        owner, _, self.attribute = name.rpartition(".")
        self.module = modules[owner]
        self.transposed = isinstance(self.module, nn.modules.conv._ConvTransposeNd) or type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]


def refuse_unfit(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str, names: set[str]) -> None:
    """Raise if weights can't be parametrised alone.

    Raises:
        ValueError: One of ``names`` is parametrised already, is tied to another one, or is masked by a mask callback.
    """
    if foreign := sorted(name for name in names if ".parametrizations." in name):
        raise ValueError(f"{who}: {foreign[0]} belongs to another parametrisation: leave that module out of targets, or add it to skip")
    owners: dict[int, list[str]] = {}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_name(name))
    for tied in owners.values():
        if len(set(tied)) > 1 and names & set(tied):
            raise ValueError(f"{who}: {' and '.join(dict.fromkeys(tied))} are one tied weight: leave it out with skip, or untie it")
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, MaskCallback):
            refuse_shared(who, other, names, pl_module)
