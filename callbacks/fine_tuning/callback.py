"""What the callbacks of this folder share: all is frozen but a few values, which are kept as a delta of the base model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.callbacks.fine_tuning.delta import Delta, Entry, hash_of, save_delta
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import plain_modules, plain_parameters, refuse_lazy, refuse_sharded, select_modules
from lit_methods.catalog import Technique
from lit_methods.compiled import plain_names
from lit_methods.runs.folder import run_dir

_AVERAGES = "it makes its copy of the module before the trained values are there: average with EMATeacher"


class Subset(Protocol):
    """Values of one layer that are trained."""

    def attach(self) -> None:
        """Make the values, as parameters of the layer."""

    def detach(self) -> None:
        """Leave an ordinary layer, with what was learned."""

    def entry(self) -> Entry:
        """What was learned, in the order of the base model."""

    @property
    def values(self) -> nn.Parameter:
        """What is trained."""


class SubsetCallback(OrderedCallback):
    """Base of the callbacks that train few values of a module, and keep what was learned as a delta.

    Subclasses choose and make the values (:meth:`make_subsets`) and say what is saved (:meth:`state`, :meth:`restore`).

    Runs: values are chosen in ``setup``, or behind the module's own ``setup`` and ``configure_model`` where it has them, before the
    optimisers are made; every other parameter is frozen while fit runs, but those of ``also``. ``configure_optimizers`` finds the values
    among ``parameters()``. After fit the module is an ordinary one with the fused weights, and trained what was trained before; a second
    fit starts from these, as from another base model. At the end ``<name>.safetensors`` with the delta, and a JSON file beside it, are
    written into the run's folder, if the Trainer saves checkpoints.

    Saves: under the weights' own names the fused ones, in the order of the base model, so that checkpoints load and export without the
    callback; what was chosen and learned, and the hash of the base model, in the callback's state.

    Refuses: strategies that shard weights, ``ModelPruning``, Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging``, a second
    callback of this family, lazy layers, and values that no optimiser holds.

    Args:
        also: ``fnmatch`` patterns on names of submodules that are trained whole beside the values, such as a new head.
        root: Submodule that the delta is of, whose names it uses: ``model``; null: the one child with parameters, else the module.

    Attributes:
        technique: The catalogue's entry, whose slug stands before the names of figures and in the delta.
    """

    technique: ClassVar[Technique]
    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        "SubsetCallback": "each freezes what the other one trains",
        "SparsityCallback": "its weights are frozen",
        **dict.fromkeys(("WeightAveraging", "StochasticWeightAveraging"), _AVERAGES),
    }

    def __init__(self, also: Sequence[str], root: str | None) -> None:
        super().__init__()
        checks.patterns(also=also)
        self.also, self.root = list(also), root
        self._delta: Delta | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the last run."""
        self._subsets: dict[str, Any] = {}  # name of a layer's weight -> its values
        self._module: Any = None
        self._frozen: list[nn.Parameter] = []
        self._kept: dict[str, nn.Parameter] = {}  # of ``also``
        self._base = ""
        self._left: dict[str, Any] = {}  # state after fit

    @property
    def slug(self) -> str:
        """Short name of the technique."""
        return self.technique.slug

    # ---- for subclasses ----------------------------------------------------------------------------------------------------------------

    def make_subsets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Any]:
        """Choose: name of each weight -> its :class:`Subset`, not attached yet. In a resumed run :meth:`restore` chooses again."""
        raise NotImplementedError

    def attach(self) -> None:
        """Put the values on the layers."""
        for subset in self._subsets.values():
            subset.attach()

    def detach(self) -> None:
        """Take the values off the layers."""
        for subset in self._subsets.values():
            subset.detach()

    def trained(self) -> dict[str, Any]:
        """The subsets with values: name of the weight -> subset."""
        return self._subsets

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; tensors, numbers, text and collections."""
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave; the module has just loaded the fused weights."""
        raise NotImplementedError

    def notes(self) -> dict[str, Any]:
        """What the delta's description says beside its entries."""
        return {}

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the values and make them, before the optimisers are made; where the module builds layers later, behind that.

        Raises:
            ValueError: What can't work: a sharding strategy, patterns that match nothing, layers that can't be trained in part.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        self.leave(trainer, pl_module)
        self.reset()
        self._delta = None
        self.when_built(pl_module, lambda: self._begin(trainer, pl_module))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with checks.naming(type(self).__name__):
            refuse_lazy(pl_module, type(self).__name__)
            self._module = pl_module
            self.root_name()
            also = select_modules(pl_module, self.also) if self.also else {}
            held = {id(parameter) for module in also.values() for parameter in module.parameters()}
            self._kept = {name: parameter for name, parameter in plain_parameters(pl_module).items() if id(parameter) in held}
            subsets = self.make_subsets(trainer, pl_module)
            if both := sorted(set(self._kept) & set(subsets)):
                raise ValueError(f"{both[0]} is trained in part, and whole by also={self.also}: leave it out of one of them")
            self._subsets = dict(subsets)
            self._freeze()
            self.attach()

    def _freeze(self) -> None:
        held = {id(parameter) for parameter in self._kept.values()}
        self._frozen = [parameter for parameter in self._module.parameters() if parameter.requires_grad and id(parameter) not in held]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that all values will be trained, and take the hash of the base model.

        Raises:
            ValueError: No optimiser holds one of them.
        """
        held = {id(parameter) for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        orphans = [name for name, subset in self.trained().items() if id(subset.values) not in held]
        if orphans:
            which = f"the trained values of {orphans[0]} (and {len(orphans) - 1} more)"
            way = "let configure_optimizers take self.parameters(), or those of them with requires_grad"
            raise ValueError(f"{type(self).__name__}: no optimiser holds {which}: {way}")
        if not self._base:
            self._base = distributed.broadcast_text(self._hash() if distributed.rank() == 0 else "")
        count, total = self.counts()
        rank_zero_info(
            f"{type(self).__name__}: {count:,} of {total:,} values are trained ({count / max(1, total):.3%}), {len(self.trained())} weights"
        )

    def _hash(self) -> str:
        """Of the base model: nothing is learned yet, and ``state_dict`` has the base's own order."""
        root = plain_modules(self._module)[self.root_name()]
        state, names = plain_names(root.state_dict()), plain_parameters(root)
        return hash_of({name: state[name] for name in names if name in state})

    def counts(self) -> tuple[int, int]:
        """Values that are trained, and all of the module."""
        count = sum(subset.values.numel() for subset in self.trained().values()) + sum(own.numel() for own in self._kept.values())
        added = {id(subset.values) for subset in self.trained().values()}
        return count, sum(parameter.numel() for parameter in self._module.parameters() if id(parameter) not in added)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the delta into the run's folder."""
        folder = run_dir(trainer)
        if trainer.checkpoint_callback is not None and not trainer.fast_dev_run and trainer.is_global_zero:  # type: ignore[attr-defined]
            save_delta(self.delta(), Path(folder) / f"{self.slug}.safetensors")

    def state_dict(self) -> dict[str, Any]:
        """What was chosen and learned, as it is or as it was when the module was left."""
        return {**self.state(), "base": self._base} if self._subsets else self._left

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a run's state: the module has loaded the fused weights just before."""
        if state and self._subsets:
            with checks.naming(type(self).__name__):
                self.restore(state)
            self._base = state["base"]

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module with the fused weights; delta and state stay readable."""
        if self._module is None:
            return
        if self._subsets:
            self._left = apply_to_collection(self.state_dict(), Tensor, lambda value: value.detach().cpu().clone())
            self._delta = self.delta()
            self.detach()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._subsets, self._frozen, self._kept, self._module = {}, [], {}, None

    # ---- the delta ---------------------------------------------------------------------------------------------------------------------

    def root_name(self) -> str:
        """Name of the submodule that the delta is of; empty: the module itself.

        Raises:
            ValueError: ``root`` isn't there.
        """
        modules = plain_modules(self._module)
        if self.root is not None:
            if self.root not in modules:
                children = ", ".join(name for name, _ in self._module.named_children())
                raise ValueError(f"root={self.root!r} is no submodule of {type(self._module).__name__}; its children are {children}")
            return self.root
        filled = [name for name, child in self._module.named_children() if next(child.parameters(), None) is not None]
        own = next(self._module.parameters(recurse=False), None)
        return filled[0] if len(filled) == 1 and own is None else ""

    def delta(self) -> Delta:
        """What was learned so far, in fit or behind it.

        Raises:
            ValueError: There was no fit, or weights lie outside ``root``.
        """
        if self._module is None:
            if self._delta is None:
                raise ValueError(f"{type(self).__name__} has no delta: train first")
            return self._delta
        root = self.root_name()
        prefix = f"{root}." if root else ""
        entries = dict(self._entries())
        if outside := [name for name in entries if not name.startswith(prefix)]:
            raise ValueError(f"{type(self).__name__}: {outside[0]} lies outside root={root!r}: choose a root that holds all trained layers")
        return Delta({name.removeprefix(prefix): entry for name, entry in entries.items()}, self._base, self.slug, self.notes())

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        for name, subset in self.trained().items():
            yield name, subset.entry()
        for name, parameter in self._kept.items():
            values = parameter.detach().flatten().cpu().clone()
            yield name, Entry(torch.arange(len(values)), values, replaces=True)

    def save_delta(self, path: Path | str) -> Path:
        """Write the delta: safetensors, and a JSON file beside it; :func:`~lit_methods.callbacks.fine_tuning.delta.load_delta` reads it."""
        return save_delta(self.delta(), path)

    def log_step(self, pl_module: pl.LightningModule, values: Mapping[str, Tensor | float]) -> None:
        """Log figures of a training step, under the slug."""
        pl_module.log_dict({f"{self.slug}/{name}": value for name, value in values.items()}, on_step=True, on_epoch=False, batch_size=1)


__all__ = ["Subset", "SubsetCallback"]
