"""What the callbacks of this folder share; for those with masks one store, re-applied wherever a dead weight could come back to life."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.callbacks.averaging.ema import EMATeacher
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.history import Kind, MaskHistory, pack_bits
from lit_methods.callbacks.sparsity.store import Choice, MaskStore, choose_weights, listed, trained
from lit_methods.callbacks.targets import plain_parameters, refuse_sharded
from lit_methods.callbacks.wrapping import built_by
from lit_methods.seeds import own_seed


def notify_mask_updated(trainer: pl.Trainer, pl_module: pl.LightningModule, source: Any) -> None:
    """Call ``on_mask_updated(trainer, pl_module, source)`` of every callback that has it, on all ranks."""
    for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
        listen = getattr(callback, "on_mask_updated", None)
        if callable(listen):
            listen(trainer, pl_module, source)


def check_ranks(who: str, masks: Iterable[Tensor], sources: str) -> None:
    """Raise if masks differ between processes.

    Raises:
        RuntimeError: They do, and so do the ``sources`` that they come from.
    """
    if distributed.world_size() > 1:
        bits = [pack_bits(mask) for mask in masks]
        if bits and not distributed.same_on_all_ranks(torch.cat([packed.to(bits[0].device) for packed in bits])):
            raise RuntimeError(f"{who}: the masks differ between ranks, so do the {sources} that they come from")


class SparsityCallback(OrderedCallback):
    """Base of the callbacks that make chosen weights of a module sparse.

    Args:
        targets: ``fnmatch`` patterns on submodule names.
        skip: Patterns on submodule names that stay dense.

    Attributes:
        prefix: What stands before the names of figures that it logs.
        kept: Key in the state -> attribute with the value, which is saved and restored as it is: numbers, text, tensors, collections.
    """

    prefix: ClassVar[str] = ""
    kept: ClassVar[Mapping[str, str]] = {}

    def __init__(self, targets: Iterable[str], skip: Sequence[str]) -> None:
        super().__init__()
        checks.patterns(targets=targets, skip=skip)
        self.targets: list[str] | dict[str, str] = dict(targets) if isinstance(targets, Mapping) else list(targets)
        self.skip = list(skip)

    @property
    def state_key(self) -> str:
        """Differs between callbacks of different targets: several may be used together."""
        return self._generate_state_key(targets=self.targets, skip=self.skip)

    def kept_state(self) -> dict[str, Any]:
        """What :attr:`kept` names."""
        return {key: copy.copy(getattr(self, attribute)) for key, attribute in self.kept.items()}

    def restore_kept(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what :attr:`kept` names from a checkpoint's state, tensors on a device."""
        for key, attribute in self.kept.items():
            setattr(self, attribute, copy.copy(move_data_to_device(state[key], device)))

    def log_step(self, pl_module: pl.LightningModule, values: Mapping[str, Tensor | float]) -> None:
        """Log figures of a training step, under :attr:`prefix`."""
        pl_module.log_dict({f"{self.prefix}/{name}": value for name, value in values.items()}, on_step=True, on_epoch=False, batch_size=1)


class MaskCallback(SparsityCallback):
    """Base of the callbacks that keep chosen weights at exactly 0: W * M after every step, with a mask M of zeros and ones.

    Subclasses say which masks a run starts with (:meth:`initial_masks`), and may change them later (:meth:`after_step`). Everything else is
    here.

    Runs: masks are made when fit starts, on rank 0, and broadcast, of weights that are trained: frozen ones and those that no optimiser
    holds are left out, which a warning says. A second fit of the same module goes on with its masks. Weights are masked at once and again
    after every step of every optimiser (a hook of the optimiser itself, so that manual optimisation, accumulation and AMP need nothing
    special), as is the optimiser's memory of dead weights. Averaged copies (``EMATeacher``, Lightning's ``WeightAveraging``) are masked
    when masks change. Every change calls ``on_mask_updated(trainer, pl_module, callback)`` of all callbacks that have it. Under DDP the
    ranks' masks are compared at the start and after every change. After fit the module is an ordinary one, whose dead weights are 0.

    Saves: masks, the step counts per optimiser, the state of the random generator, and what :attr:`remembers` and :attr:`kept` name. A
    resumed run takes them over and makes no new ones.

    Refuses: strategies that shard weights, Lightning's ``ModelPruning``, a second mask callback on the same weights, lazy layers, and
    ``targets`` that name a weight which isn't trained, or which ``weight_norm`` and the like make in the forward pass.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module.
        skip: Patterns on submodule names that stay dense.
        seed: Seed of everything random about the masks.
        mask_gradients: Set gradients of dead weights to 0 before clipping and the optimiser's step, so that they count in no norm.
        mask_optimizer_state: Set momenta and moments of dead weights to 0 after every step.

    Attributes:
        artifact: Name under which the masks are kept with a run; ``{where}`` stands for the patterns. Empty: they aren't.
        store: The masks; empty before fit.
        remembers: Key in the state -> which masks of the past ``history`` keeps.
        history: They themselves.
    """

    targets: list[str]
    artifact: ClassVar[str] = ""
    remembers: ClassVar[Mapping[str, Kind]] = {}
    stream: ClassVar[str] = ""  # name of the random numbers; empty: that of the class
    on_all_ranks: ClassVar[bool] = False  # whether all ranks make the first masks together; still, rank 0's count
    runs_after: ClassVar[Sequence[str]] = ("EMATeacher", "WeightAveraging")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "it renames the weights while fit runs; DynamicSparsity and RandomPruning do the same by masks"
    }

    def __init__(
        self,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip)
        checks.at_least(0, "a whole number", seed=seed)
        self.seed, self.mask_gradients, self.mask_optimizer_state = seed, mask_gradients, mask_optimizer_state
        self.store, self.history = MaskStore({}), MaskHistory()
        self.generator = torch.Generator()
        self._reseed()
        self._held: set[int] | None = None  # id of what optimisers hold, while fit runs
        self._left: dict[str, str] = {}  # weights that aren't masked -> why
        self._owned: list[list[str]] = []  # per optimiser: names of its masked weights
        self._steps: list[int] = []  # per optimiser
        self._handles: list[Any] = []
        self._gradients: dict[str, Tensor] = {}
        self._told = 0  # version of the masks that everybody knows
        self._loaded: dict[str, Any] | None = None

    def _reseed(self) -> None:
        self.generator.manual_seed(own_seed(self.stream or type(self).__name__, self.seed))

    # ---- for subclasses ----------------------------------------------------------------------------------------------------------------

    def candidates(self, pl_module: nn.Module) -> Choice:
        """The weights that targets and skip mean, trained or not."""
        return choose_weights(pl_module, self.targets, self.skip)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter]) -> None:
        """Raise if the chosen weights can't be masked; called in ``setup``, or when fit starts, if the module builds layers in between."""
        refuse_shared(self, trainer, pl_module, weights)

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle what a run needs before its masks are made, from ``store.weights``."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state, once the store has its weights."""
        self.store.load_state_dict({"masks": {name: mask for name, mask in state["masks"].items() if name not in self._left}})
        self.generator.set_state(state["generator"])
        self._steps = [int(step) for step in state["steps"]]
        self.history.load(state, self.store.weights, **self.remembers)
        self.restore_kept(state, next(iter(self.store.weights.values())).device)

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Name -> bool mask of every weight; called once, on rank 0 alone unless :attr:`on_all_ranks`."""
        raise NotImplementedError

    def wants_gradients(self, step: int) -> bool:
        """Whether :meth:`after_step` will need the dense gradients of optimiser step ``step`` (counted from 1)."""
        return False

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changed masks after optimiser step ``step`` (counted from 1 for the optimiser that owns ``names``); {} for none.

        Args:
            step: Steps that this optimiser has made.
            names: Its masked weights. Their values are those after the step, dead ones already 0 again.
            gradients: Dense gradients of this step, averaged over ranks and micro-batches and unscaled, where they were wanted.
        """
        return {}

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights, and refuse what can't work.

        Raises:
            ValueError: A pattern that matches nothing, a sharding strategy, or two mask callbacks on one weight.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__)
            if built_by(pl_module) is None:
                self.check(trainer, pl_module, self.chosen(pl_module))

    def chosen(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that this callback masks, by name."""
        return self._choice(pl_module).weights

    def _choice(self, pl_module: nn.Module) -> Choice:
        with checks.naming(type(self).__name__):
            return trained(type(self).__name__, self.candidates(pl_module), self.targets, self._held)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make, keep or restore the masks, apply them, and listen to the optimisers."""
        optimizers: list[torch.optim.Optimizer] = trainer.optimizers
        held = [{id(parameter) for group in optimizer.param_groups for parameter in group["params"]} for optimizer in optimizers]
        self._held = set().union(*held)
        choice, before = self._choice(pl_module), self.store
        if built_by(pl_module) is not None:
            self.check(trainer, pl_module, choice.weights)
        self._left = choice.left
        if choice.left:
            rank_zero_warn(f"{type(self).__name__} leaves out weights that it can't prune: {listed(choice.left)}")
        self.store, self.history = MaskStore(choice.weights), MaskHistory(*self.remembers.values())
        self._steps = [0] * len(optimizers)
        state, self._loaded = self._loaded, None
        kept = state is None and before.is_of(choice.weights)
        if kept:  # a second fit
            self.store.set(before.masks)
        elif state is None:
            self._reseed()
        with checks.naming(type(self).__name__):
            self.begin_fit(trainer, pl_module)
            if state is not None:
                self.restore(state)
            elif not kept:
                if self.on_all_ranks or distributed.rank() == 0:
                    self.store.set(self.initial_masks(trainer, pl_module, self.store.weights))
                drawn = self.generator.get_state()
                distributed.broadcast_tensors([*self.store.masks.values(), drawn])
                self.generator.set_state(drawn)
        self.store.follow_device()
        self.store.apply()
        self.history.note(self.store.masks)
        self._apply_to_averages(trainer)
        self._check_ranks()
        self._told = self.store.version
        self._owned = [[name for name, weight in self.store.weights.items() if id(weight) in ids] for ids in held]
        self._handles = [
            optimizer.register_step_post_hook(lambda optimizer, *_, index=index: self._stepped(trainer, optimizer, index))
            for index, optimizer in enumerate(optimizers)
        ]
        active, total = map(sum, zip(*self.store.counts().values(), strict=True))
        share = f"{active:,} of {total:,} entries active ({active / total:.2%})"
        rank_zero_info(f"{type(self).__name__}: {len(self.store.weights)} weights, {share}: {', '.join(self.store.weights)}")
        notify_mask_updated(trainer, pl_module, self)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Keep dense gradients where they are wanted, then mask them; before clipping."""
        index = self.index_of(trainer, optimizer)
        names = self._owned[index]
        if self.wants_gradients(self._steps[index] + 1):
            grads = {name: self.store.weights[name].grad for name in names}
            self._gradients = {name: grad.detach().clone() for name, grad in grads.items() if grad is not None}
        if self.mask_gradients:
            self.store.apply_to_gradients(names)

    def index_of(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> int:
        """Place of an optimiser, or of Lightning's wrapper of it, among the trainer's."""
        return next(index for index, own in enumerate(trainer.optimizers) if own is getattr(optimizer, "_optimizer", optimizer))

    @torch.no_grad()
    def _stepped(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, index: int) -> None:
        """After each optimiser step: dead weights back to 0, then the technique's own change of masks."""
        names = self._owned[index]
        self.store.apply(names)
        if self not in trainer.callbacks:  # type: ignore[attr-defined]  # a trial of a tuner, which will be undone
            return
        self._steps[index] += 1
        gradients, self._gradients = self._gradients, {}
        changed = self.after_step(self._steps[index], names, gradients)
        if changed:
            self.store.set(changed)
            self.store.apply(changed)
            self.history.note(changed)
            self._check_ranks()
        if self.mask_optimizer_state and (changed or not self.mask_gradients):  # else it is 0 already
            self.store.apply_to_optimizer(optimizer, names)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Mask averaged copies and tell the others when masks have changed."""
        if self.store.version != self._told:
            self._told = self.store.version
            self._apply_to_averages(trainer)
            notify_mask_updated(trainer, pl_module, self)

    def _check_ranks(self) -> None:
        check_ranks(type(self).__name__, self.store.masks.values(), "weights or gradients")

    def _apply_to_averages(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMATeacher):
                self.store.apply_to(callback.averaged())
            elif isinstance(callback, WeightAveraging) and callback._average_model is not None:
                self.store.apply_to(plain_parameters(callback._average_model.module))

    def sparsity_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask, as it is now; {} before fit."""
        return self.store.masks

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks, under :attr:`artifact`."""
        where = "".join("-" + re.sub(r"[^A-Za-z0-9]+", "-", pattern).strip("-") for pattern in (*self.targets, *self.skip))
        return {self.artifact.format(where=where): self.store.masks} if self.artifact and self.store.masks else {}

    def state_dict(self) -> dict[str, Any]:
        """Masks of now and of the past, steps, the generator's state, and what :attr:`kept` names."""
        if not self.store.masks:
            return {}
        own = {"steps": list(self._steps), "generator": self.generator.get_state()}
        return self.store.state_dict() | own | self.history.state(**self.remembers) | self.kept_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until fit starts, before which Lightning calls this; a tuner restores while it runs."""
        if state and self._handles:
            self.restore(state)
        else:
            self._loaded = state or None

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimisers; the store stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._gradients, self._held = [], {}, None


def refuse_shared(owner: SparsityCallback, trainer: pl.Trainer, pl_module: nn.Module, names: Iterable[str]) -> None:
    """Raise if another mask callback masks one of the weights.

    Raises:
        ValueError: It does.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        shared = sorted(set(names) & set(other.chosen(pl_module))) if isinstance(other, MaskCallback) and other is not owner else []
        if shared:
            both = f"{type(owner).__name__} and {type(other).__name__}"
            raise ValueError(f"{both} both mask {shared[0]!r} (and {len(shared) - 1} more): give them different targets")
