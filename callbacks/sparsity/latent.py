"""Weights that the forward pass sees through a parametrisation, and that checkpoints hold as the forward pass sees them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_methods import checks
from lit_methods.callbacks.sparsity.callback import SparsityCallback, refuse_shared
from lit_methods.callbacks.sparsity.parameter_order import configured, follow_old_order, join_groups, sums, twins
from lit_methods.callbacks.sparsity.parametrized import LatentWeight, ParametrizedWeight, Shared
from lit_methods.callbacks.sparsity.store import Choice, choose_weights, listed, trained
from lit_methods.callbacks.targets import plain_modules, plain_name, refuse_sharded
from lit_methods.callbacks.wrapping import attach, detach

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
    if weight.device.type == "cpu" and not torch.compiler.is_compiling() and float(beta) == 0:
        return weight * mask
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


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


_LOST = "its checkpoints hold the weights of the forward pass only, so a resumed average would lose the latent ones"


class LatentCallback(SparsityCallback):
    """Base of the callbacks that train latent weights W, of which the forward pass sees a function.

    Subclasses make the parametrised weights (:meth:`make_layers`), say what becomes of them at the end (:meth:`finish`) and what is saved
    (:attr:`kept`, :meth:`state`).

    Runs: weights are parametrised in ``setup``, or behind the module's own ``setup`` and ``configure_model`` where it has them, before the
    optimisers are made. Frozen weights are left out, which a warning says. :meth:`finish` is called behind the last batch, so that the last
    validation and the last checkpoint are of the finished network, and again when training ends, as it may have been stopped early. After
    fit the module is an ordinary one with the weights of the forward pass. While fit runs, ``parameters()`` and ``named_parameters()`` give
    the latent weights under the weights' names and in their places, so a momentum branch of the module's own follows those. Parameters
    that a parametrisation adds, such as scales, are trained in the group of their weight, if ``configure_optimizers`` leaves them out.

    Saves: under the weights' own names those of the forward pass, so that checkpoints load and export without the callback; latent weights
    in the callback's state.

    Refuses: strategies that shard weights, Lightning's ``ModelPruning``, ``WeightAveraging`` and ``StochasticWeightAveraging``, tied
    weights, weights that are parametrised already, mask callbacks on the same weights, lazy layers, weights in no optimiser, and
    ``targets`` that name frozen weights or what ``weight_norm`` and the like make in the forward pass.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module except first and last.
        skip: Patterns on submodule names that stay as they are.
    """

    latents: ClassVar[str] = "latent"  # where the state holds them
    without_added: ClassVar[str] = "leave its layers out by skip"  # what to do where parameters of a parametrisation are in the way
    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        **dict.fromkeys(("WeightAveraging", "StochasticWeightAveraging"), _LOST),
    }

    def __init__(self, targets: Iterable[str], skip: Sequence[str]) -> None:
        super().__init__(targets, skip)
        self.reset()

    def reset(self) -> None:
        """Forget the last run."""
        self._layers: dict[str, Any] = {}
        self._left: dict[str, Any] = {}  # state after fit
        self._around: dict[str, Callable[..., Any]] = {}  # methods of the module -> what stands around them
        self._walked = False  # whether a first step was watched
        self._of_old: list[dict[str, Any]] | None = None  # optimiser states of release 0.1, until they are loaded

    # ---- for subclasses ----------------------------------------------------------------------------------------------------------------

    def chosen(self, pl_module: nn.Module) -> dict[str, Any]:
        """Name of each chosen weight -> the weight, or what a subclass says of it."""
        weights = self.trained(pl_module, list(self.targets)).weights
        if self.targets:
            return dict(weights)
        every = list(trained(type(self).__name__, choose_weights(pl_module), ()).weights)
        inner: dict[str, Any] = {name: weight for name, weight in weights.items() if name not in (every[0], every[-1])}
        if not inner:
            between = "has no linear, convolution or attention module between its first and its last one, which stay dense by default"
            raise ValueError(f"{type(pl_module).__name__} {between}: name the ones to prune with targets")
        return inner

    def trained(self, pl_module: nn.Module, targets: Sequence[str]) -> Choice:
        """Weights that targets and skip mean, less those that no training moves."""
        return trained(type(self).__name__, choose_weights(pl_module, targets, self.skip), targets)

    def make_layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Mapping[str, Any], places: Mapping[str, "Place"]
    ) -> Mapping[str, ParametrizedWeight]:
        """The chosen weights with their parametrisations, which are then put on; {} for none."""
        raise NotImplementedError

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the weights into their final form; called twice at least, the second time for runs that were stopped early."""

    def parts(self) -> dict[str, Any]:
        """Name of each weight -> what is saved of it: the latent weight, alone or with further parts by name."""
        return {name: layer.latent.detach() for name, layer in self._layers.items()}

    def state(self) -> dict[str, Any]:
        """State of the callback while it has parametrised weights."""
        return {self.latents: self.parts(), **self.kept_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a subclass saves beside latent weights and :attr:`kept`."""

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights and parametrise them, before the optimisers are made; where the module builds layers later, behind that.

        Raises:
            ValueError: What can't work: a sharding strategy, weights that somebody else masks, parametrises or ties.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        self.leave(trainer, pl_module)
        self.reset()
        self.when_built(pl_module, lambda: self._begin(trainer, pl_module))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with checks.naming(type(self).__name__):
            self.parametrise(trainer, pl_module)

    def parametrise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights and put their parametrisations on; all layers are there."""
        if not self.targets and (left := self.trained(pl_module, ()).left):
            rank_zero_warn(f"{type(self).__name__} leaves out weights that it can't prune: {listed(left)}")
        chosen = self.chosen(pl_module)
        refuse_unfit(self, trainer, pl_module, set(chosen))
        modules = plain_modules(pl_module)
        layers = dict(self.make_layers(trainer, pl_module, chosen, {name: Place(modules, name) for name in chosen}))
        for layer in layers.values():
            layer.attach()
        self._layers = layers
        if any(layer.added for layer in layers.values()):
            self._around = {
                "configure_optimizers": functools.partial(configured, pl_module),
                "training_step": functools.partial(self._explained, pl_module),
            }
            for method, added in self._around.items():
                attach(pl_module, added, method, around=True)
        rank_zero_info(f"{self.title()}: {len(layers)} weights: {', '.join(layers)}")

    def title(self) -> str:
        """What the callback calls itself when it starts."""
        return type(self).__name__

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that all the weights will be trained.

        Raises:
            ValueError: No optimiser holds one of them.
        """
        join_groups(trainer.optimizers, {layer.latent: layer.added for layer in self._layers.values()})
        if self._of_old is not None:
            follow_old_order(pl_module, trainer.optimizers, self._of_old)
            self._of_old = None
        held = {id(parameter) for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        orphans = [name for name, layer in self._layers.items() if id(layer.latent) not in held]
        if orphans:
            which = f"{orphans[0]} (and {len(orphans) - 1} more)"
            raise ValueError(f"{type(self).__name__}: no optimiser holds {which}: return it from configure_optimizers, or add it to skip")

    def _explained(self, pl_module: pl.LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``training_step``, whose own code may walk two branches in parallel; that shows at the first one."""
        both = twins(pl_module) if pl_module.trainer.global_step == 0 and not self._walked else None
        if both is None:
            return call(*args, **kwargs)
        self._walked = True
        lacks = f"{type(self).__name__} has added parameters to {both[0]!r} that {both[1]!r} lacks, and training_step of"
        lacks, way = f"{lacks} {type(pl_module).__name__}", f"if it walks the parameters of the two in parallel, {self.without_added}"
        before = sums(pl_module, both[1])
        try:
            output = call(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):
                raise
            raise ValueError(f"{lacks} fails ({error}): {way}") from error
        if not torch.equal(before, sums(pl_module, both[1])):
            rank_zero_warn(f"{lacks} moves that: {way}")
        return output

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Optimiser states of release 0.1 follow the order of parameters that it gave."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if saved and "order" not in saved:
            self._of_old = checkpoint.get("optimizer_states")

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
        return {**self.state(), "order": "in place"} if self._layers else self._left

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over latent weights: the module has loaded those of the forward pass just before.

        Raises:
            ValueError: The checkpoint's weights are others.
        """
        if not state or not self._layers:
            return
        if odd := sorted(set(state[self.latents]) ^ set(self._layers)):
            raise ValueError(
                f"the checkpoint's latent weights are others ({', '.join(odd[:6])}): resume with the same module, targets and skip"
            )
        for name, layer in self._layers.items():
            own, saved = layer.parts(), state[self.latents][name]
            values = saved if isinstance(saved, Mapping) else {"latent": saved}
            if set(own) != set(values):
                who = f"{type(self).__name__}: {name}"
                raise ValueError(f"{who} was saved with {sorted(values)}: resume with the same arguments of the callback, its recipe say")
            for key, value in values.items():
                own[key].copy_(value)
        self.restore_kept(state, next(iter(self._layers.values())).latent.device)
        self.restore(state)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module with the weights of the forward pass; the state stays readable."""
        if self._layers:
            for method, added in self._around.items():
                detach(pl_module, added, method)
            self._around = {}
            state = self.state_dict()
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


def refuse_unfit(owner: LatentCallback, trainer: pl.Trainer, pl_module: pl.LightningModule, names: set[str]) -> None:
    """Raise if weights can't be parametrised alone.

    Raises:
        ValueError: One of ``names`` is parametrised already, is tied to another one, or is masked by a mask callback; or
            ``owner`` would leave out weights that another latent callback has.
    """
    who = type(owner).__name__
    if foreign := sorted(name for name in names if ".parametrizations." in name):
        raise ValueError(f"{who}: {foreign[0]} belongs to another parametrisation: leave that module out of targets, or add it to skip")
    owners: dict[int, list[str]] = {}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_name(name))
    for tied in owners.values():
        if len(set(tied)) > 1 and names & set(tied):
            raise ValueError(f"{who}: {' and '.join(dict.fromkeys(tied))} are one tied weight: leave it out with skip, or untie it")
    refuse_shared(owner, trainer, pl_module, names)
    left = owner.trained(pl_module, list(owner.targets)).left
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, LatentCallback) and other is not owner and (shared := sorted(set(left) & set(other._layers))):
            both = f"{who} and {type(other).__name__}"
            raise ValueError(f"{both} both mask {shared[0]!r} (and {len(shared) - 1} more): give them different targets")


__all__ = ["LatentCallback", "LatentWeight", "ParametrizedWeight", "Place", "Shared", "group_dim", "masked_weight", "refuse_unfit"]
