"""Base of the callbacks that prune a trained network layer by layer, without training: statistics, masks, weights, figures."""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods import checks, distributed
from lit_methods.callbacks.sparsity.calibrator import LayerwiseCalibrator, find_blocks, is_linear, is_transposed, rows_of_outputs
from lit_methods.callbacks.sparsity.callback import MaskCallback, notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.meter import batch_size
from lit_methods.callbacks.sparsity.one_shot import check_width, expected_error, parse_pattern
from lit_methods.callbacks.sparsity.store import Choice, MaskStore, choose_weights, listed
from lit_methods.callbacks.targets import plain_modules, refuse_lazy, refuse_sharded
from lit_methods.callbacks.twin import evaluating, observed, training_batches
from lit_methods.callbacks.wrapping import built_by
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.checkpoints import check_readable
from lit_methods.steps import log_global

_STEPS = ("validation_step", "test_step", "training_step", "predict_step")


@dataclass
class Pruned:
    """What became of a layer.

    Attributes:
        keep: bool (R, C), True where kept.
        weight: (R, C) new weight; None: the old one, 0 where not kept.
        figures: Further figures of the layer, scalars by name.
    """

    keep: Tensor
    weight: Tensor | None = None
    figures: dict[str, Tensor | float] = field(default_factory=dict)


class PostTrainingPruning(MaskCallback):
    """Base of what prunes the linear layers of a trained network once, from the inputs that calibration samples give them.

    Runs: once. With ``fit``: before the first step, or behind step ``at_step``; the masks then hold for the rest of the training, as
    :class:`MaskCallback` says. With ``test``, ``validate`` and ``predict``: before the first batch, unless the checkpoint's network was
    pruned by this callback already. Calibration samples come from the datamodule's ``calibration_dataloader()`` where it has one, else from
    the training data, in the order of a first epoch; they run through a copy of the module in evaluation mode, in the weights' precision,
    without autocast. Statistics are float32 or wider and summed over the ranks, each of which takes its share of the samples. A layer's
    input (B, ..., C) is B samples; (B, C) is one sample with B tokens, so that its statistics depend on the batch size.

    Saves: what :class:`MaskCallback` saves, and each layer's figures.

    Refuses: what :class:`MaskCallback` refuses; no calibration data; a layer that gets no input from them; lazy layers; N:M that doesn't
    divide a layer's inputs; targets that are no linear layers; blocks that don't feed each other.

    Args:
        sparsity: Share of a layer's weights that goes, in (0, 1). Doesn't matter with a pattern.
        pattern: ``N:M``: N of every M consecutive inputs go instead, such as ``2:4``; null: unstructured.
        samples: Calibration samples of all ranks together.
        blocks: Name of a ``ModuleList`` or ``Sequential`` whose children run one after the other, such as ``model.model.layers``. They are
            pruned one by one: only the activations between two of them are held, and each sees what pruned ones put out. Layers outside of
            it stay dense. null: all layers in one pass, on the inputs that they have in the dense network.
        forward: Name of the module's method (batch) that runs the network; null: its validation, test, training or predict step.
        at_step: Optimiser steps before pruning, in ``fit``; 0: before the first.
        targets: ``fnmatch`` patterns on submodule names; empty: every linear layer (of the blocks).
        skip: Patterns on submodule names that stay dense.
        mask_gradients: As in :class:`MaskCallback`.
        mask_optimizer_state: As in :class:`MaskCallback`.

    Attributes:
        pruned: Whether it has pruned, in this run or in the one that the checkpoint is of.
        report: Name of a weight -> the layer's figures.
        held: Largest number of bytes of activations between blocks and statistics that pruning held at once, in this process.
    """

    prefix = "post_training"
    artifact = "pruning_masks{where}"
    on_all_ranks = True
    kept: ClassVar[Mapping[str, str]] = {"pruned": "pruned", "report": "report"}
    criterion: ClassVar[Any] = "activation"
    least_samples: ClassVar[int] = 1

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Expected error per token", ("post_training/expected_error",), note="Mean of |E| over rows and layers. After pruning."),
        Curve("Density of the pruned layers", ("post_training/density",)),
        TablePanel("Pruned layers", "post_training/layers", note="Seconds and memory: of the run that pruned."),
    )

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: str | None = None,
        samples: int = 128,
        blocks: str | None = None,
        forward: str | None = None,
        at_step: int = 0,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip, mask_gradients=mask_gradients, mask_optimizer_state=mask_optimizer_state)
        checks.within("(0, 1)", "a share of each layer", sparsity=sparsity)
        checks.at_least(self.least_samples, "a whole number", samples=samples)
        checks.at_least(0, "a whole number", at_step=at_step)
        self.sparsity, self.pattern, self.samples = sparsity, parse_pattern(pattern), samples
        self.blocks, self.forward, self.at_step = blocks, forward, at_step
        self.pruned = False
        self.report: dict[str, dict[str, float]] = {}
        self.held = 0
        self._costs: dict[str, tuple[float, float]] = {}  # layer -> seconds, MB of statistics
        self._context: tuple[pl.Trainer, pl.LightningModule] | None = None

    # ---- for subclasses ----------------------------------------------------------------------------------------------------------------

    @property
    def needs_hessian(self) -> bool:
        """Whether statistics have the Hessian."""
        return False

    def prune_layer(self, name: str, weight: Tensor, statistics: InputStatistics | None) -> Pruned:
        """Prune a layer.

        Args:
            name: Of its weight.
            weight: (R, C) float32 or float64: outputs, inputs.
            statistics: Of its inputs; None without calibration samples.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Figures of the whole network, by the names that they are logged under."""
        errors = [layer["error"] for layer in self.report.values() if "error" in layer]
        found = {"post_training/expected_error": sum(errors) / len(errors)} if errors else {}
        return {"post_training/density": self.store.density(), **found}

    @property
    def sparsity_card(self) -> SparsityCard:
        """Dense until it is pruned, then a fixed mask."""
        return SparsityCard(
            stage="post" if not self.at_step else "during",
            regime="dense_to_sparse",
            mask="static",
            granularity="unstructured" if self.pattern is None else "n:m",
            forward_dense=bool(self.at_step),
            backward_dense=bool(self.at_step),
            weights_touched=bool(self.at_step),
            criterion=self.criterion,
        )

    # ---- what is pruned ----------------------------------------------------------------------------------------------------------------

    def candidates(self, pl_module: nn.Module) -> Choice:
        """Weights of linear layers; with ``blocks``, of those in them."""
        choice = choose_weights(pl_module, self.targets, self.skip)
        modules = plain_modules(pl_module)
        attention = [f"{name}." if name else "" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
        inside = set() if self.blocks is None else {id(part) for block in find_blocks(pl_module, self.blocks) for part in block.modules()}
        weights: dict[str, nn.Parameter] = {}
        left, others = dict(choice.left), dict[str, str]()
        for name, weight in choice.weights.items():
            owner = name.rpartition(".")[0]
            if not is_linear(modules[owner]) or not name.endswith("weight"):
                others[name] = "no linear layer"
            elif self.blocks is not None and id(modules[owner]) not in inside:
                others[name] = f"outside of {self.blocks}"
            elif any(owner.startswith(prefix) for prefix in attention):
                left[name] = "MultiheadAttention doesn't call it"
            else:
                weights[name] = weight
        return Choice(weights, left | others if self.targets or not weights else left)  # by default they aren't meant

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter]) -> None:
        """As mask callbacks; groups must fit every layer, and ``forward`` must be there."""
        super().check(trainer, pl_module, weights)
        self._check_fit(pl_module, weights)

    def _check_fit(self, pl_module: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        modules = plain_modules(pl_module)
        for name in weights:
            with checks.naming(f"{type(self).__name__}: {name}"):
                check_width(rows_of_outputs(modules[name.rpartition(".")[0]]).shape[1], self.pattern)
        if self.samples:
            refuse_lazy(pl_module, type(self).__name__)
            self._step_of(pl_module)

    def _step_of(self, pl_module: Any) -> str:
        """Name of the method that runs the network on a batch."""
        names = _STEPS if pl_module.automatic_optimization else tuple(name for name in _STEPS if name != "training_step")
        if self.forward is not None:
            if not callable(getattr(pl_module, self.forward, None)):
                raise ValueError(
                    f"{type(self).__name__}: forward is {self.forward!r}, but {type(pl_module).__name__} has no such method: give the name "
                    "of one that takes a batch and runs the network"
                )
            return self.forward
        own = [name for name in names if is_overridden(name, pl_module, pl.LightningModule)]
        return own[0] if own else "predict_step"  # Lightning's own calls the module on the batch

    # ---- pruning -----------------------------------------------------------------------------------------------------------------------

    def prune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter], batches: Iterable[Any] = ()
    ) -> dict[str, Tensor]:
        """Prune layers in place.

        Args:
            trainer: What the module belongs to.
            pl_module: Any module.
            weights: Parameter name -> weight of a linear layer.
            batches: This rank's calibration batches, on the device.

        Returns:
            Parameter name -> bool mask, the parameter's shape.
        """
        device = pl_module.device.type
        masks: dict[str, Tensor] = {}
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            isolate_rng(device == "cuda"),
            torch.autocast(device, enabled=False),
            torch.compiler.set_stance("force_eager"),
            checks.naming(type(self).__name__),
        ):
            if not self.samples:
                modules = plain_modules(pl_module)
                for name in weights:
                    masks[name] = self._prune_one(name, modules[name.rpartition(".")[0]], None)
            else:
                twin = observed(trainer, pl_module, type(self).__name__)
                with evaluating(twin):
                    named = plain_modules(twin)
                    layers = {name: named[name.rpartition(".")[0]] for name in weights}
                    blocks = () if self.blocks is None else find_blocks(twin, self.blocks)
                    calibrator = LayerwiseCalibrator(layers, blocks, self.needs_hessian)

                    def prune(found: dict[str, InputStatistics]) -> None:
                        masks.update({name: self._prune_one(name, layers[name], own) for name, own in found.items()})

                    calibrator.run(self._forward(trainer, twin), batches, prune)
                    self.held = calibrator.held
            distributed.broadcast_tensors([*masks.values(), *(weight.data for weight in weights.values())])
        self.pruned = True
        return {name: masks[name] for name in weights}

    def _prune_one(self, name: str, layer: nn.Module, statistics: InputStatistics | None) -> Tensor:
        started = time.perf_counter()
        weight = rows_of_outputs(layer)
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
        pruned = self.prune_layer(name, dense, statistics)
        new = torch.where(pruned.keep, dense if pruned.weight is None else pruned.weight, 0)
        weight.copy_(new)
        figures = dict(pruned.figures)
        if statistics is not None:
            length = statistics.tokens / statistics.samples
            figures["error"] = expected_error(dense, new, statistics).abs().mean() / length
        self.report[name] = {key: float(value) for key, value in figures.items()}
        self._costs[name] = (time.perf_counter() - started, 0.0 if statistics is None else statistics.bytes() / 1e6)
        return pruned.keep.T.contiguous() if is_transposed(layer) else pruned.keep

    def _forward(self, trainer: pl.Trainer, twin: pl.LightningModule) -> Callable[[Any], Any]:
        """Runs the network on a batch, in the weights' precision."""
        method = getattr(twin, self._step_of(twin))
        count = len(inspect.signature(method).parameters) - 1 if method.__name__.endswith("_step") else 0
        plugin = trainer.precision_plugin

        def run(batch: Any) -> Any:
            with nullcontext() if "mixed" in str(trainer.precision) else plugin.val_step_context():
                return method(plugin.convert_input(batch), *(0, 0)[: max(0, count)])

        return run

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
        """This rank's share of the calibration samples."""
        if not self.samples:
            return
        left = self.samples // distributed.world_size() + (distributed.rank() < self.samples % distributed.world_size())
        for batch in self._source(trainer, pl_module):
            if not left:
                return
            size = batch_size(batch)
            if size > left:
                batch = apply_to_collection(batch, Tensor, lambda part, n=size, k=left: part[:k] if part.ndim and len(part) == n else part)
            left -= min(left, max(1, size))
            yield batch
        if left:
            rank_zero_warn(f"{type(self).__name__}: the calibration data have fewer samples than {self.samples}: all of them are taken")

    def _source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
        data = getattr(trainer, "datamodule", None)
        own = getattr(data, "calibration_dataloader", None) or getattr(pl_module, "calibration_dataloader", None)
        if callable(own):
            loader = own()
        elif trainer.training or trainer.sanity_checking:
            given = trainer.fit_loop._data_source.dataloader()
            if isinstance(given, DataLoader | list | tuple):
                yield from training_batches(trainer)
                return
            loader = None
        elif data is not None and is_overridden("train_dataloader", data, pl.LightningDataModule):
            data.setup("fit")
            loader = data.train_dataloader()
        elif is_overridden("train_dataloader", pl_module, pl.LightningModule):
            loader = pl_module.train_dataloader()
        else:
            loader = None
        if not isinstance(loader, Iterable) or isinstance(loader, Mapping):
            kind = "none" if loader is None else type(loader).__name__
            raise ValueError(
                f"no calibration data: expected one DataLoader, got {kind}; give a datamodule with train_dataloader() or "
                "calibration_dataloader()"
            )
        for batch in loader:
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    # ---- in a fit ----------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune before the first step, unless ``at_step`` or a resumed run says otherwise."""
        self._context = (trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that neither resumes nor goes on with the masks of another begins dense."""
        if self.store.density() == 1:
            self.pruned, self.report = False, {}

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The masks of the pruned network; before ``at_step`` everything is kept."""
        if self.at_step:
            return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        return self.prune(trainer, pl_module, weights, self._batches(trainer, pl_module))

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prune behind step ``at_step``."""
        if step != self.at_step or not names:
            return {}
        assert self._context is not None
        trainer, pl_module = self._context
        return self.prune(trainer, pl_module, {name: self.store.weights[name] for name in names}, self._batches(trainer, pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log density and errors."""
        log_global(pl_module, self.figures(), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the network is still dense."""
        if not self.pruned:
            rank_zero_warn(f"{type(self).__name__}: training ended before step {self.at_step}: the weights are dense; lower at_step")

    # ---- in an evaluation --------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the layers, and refuse what can't work, in every stage."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            refuse_sharded(trainer, type(self).__name__)
            if built_by(pl_module) is None:
                self._check_fit(pl_module, self._chosen_anyway(pl_module))

    def _chosen_anyway(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights to prune, trained or not."""
        with checks.naming(type(self).__name__):
            choice = self.candidates(pl_module)
            if choice.left and (self.targets or not choice.weights):
                meant = f"targets={self.targets} mean {listed(choice.left)}" if self.targets else f"nothing is left: {listed(choice.left)}"
                raise ValueError(f"only linear layers can be pruned, but {meant}: add these to skip, or name others by targets")
        return choice.weights

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune before a validation that isn't part of a fit."""
        if trainer.state.fn == "validate":
            self._prune_for_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune before the first batch."""
        self._prune_for_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune before the first batch."""
        self._prune_for_evaluation(trainer, pl_module)

    def _prune_for_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weights = self._chosen_anyway(pl_module)
            self._check_fit(pl_module, weights)
            state = self._state_in(trainer.ckpt_path)
            own = self.pruned and all(weight is weights.get(name) for name, weight in self.store.weights.items())
            if state is not None and state["pruned"]:
                self.store = MaskStore({name: weights[name] for name in state["masks"] if name in weights})
                with checks.naming(type(self).__name__):
                    self.store.load_state_dict(state)
                    self.restore_kept(state, pl_module.device)
            elif state is not None or not own:  # neither a fit nor another evaluation of this process has pruned it
                self.store = MaskStore(weights)
                self.store.set(self.prune(trainer, pl_module, self.store.weights, self._batches(trainer, pl_module)))
            self.store.follow_device()
            self.store.apply()
            self._check_ranks()
        notify_mask_updated(trainer, pl_module, self)

    def _state_in(self, path: Any) -> dict[str, Any] | None:
        """This callback's state in a checkpoint: Lightning restores callbacks for fit alone."""
        if not path or not Path(path).is_file():
            return None
        return check_readable(path).get("callbacks", {}).get(self.state_key) or None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log density and errors of a validation that isn't part of a fit."""
        if trainer.state.fn == "validate":
            log_global(pl_module, self.figures(), batch_size=1)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log density and errors."""
        log_global(pl_module, self.figures(), batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the layers."""
        if not self.store.masks:
            return {}
        names = list(dict.fromkeys(key for layer in self.report.values() for key in layer))
        rows = []
        for name, (kept, number) in self.store.counts().items():
            shape, seconds = " x ".join(map(str, self.store.weights[name].shape)), self._costs.get(name, (None, None))
            rows.append((name, shape, kept / number, *(self.report.get(name, {}).get(key) for key in names), *seconds))
        return {"post_training/layers": TableMedia(("layer", "shape", "density", *names, "seconds", "statistics, MB"), tuple(rows))}

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimisers and the trainer."""
        super().leave(trainer, pl_module)
        self._context = None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the layer of a weight fits one of some patterns."""
    return any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in patterns)
