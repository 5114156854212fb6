"""Sparse-IFT as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.sparse_ift.core`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lit_methods import checks
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.density import layer_density
from lit_methods.callbacks.sparsity.drop_grow import target_count
from lit_methods.callbacks.sparsity.dynamic import DynamicSparsity
from lit_methods.callbacks.sparsity.dynamics import itop_rate
from lit_methods.callbacks.sparsity.meter import count_on_batch
from lit_methods.callbacks.sparsity.sparse_ift.core import Distribution, Family, Init, UVLayer, base_scaling, folded_frobenius, spectral_gap
from lit_methods.callbacks.sparsity.sparse_ift.surgery import (
    Transformation,
    TransformedLayer,
    flops_against_dense,
    iso_flop_transform,
    transformation_of,
)
from lit_methods.callbacks.sparsity.store import Choice
from lit_methods.callbacks.targets import plain_modules, plain_parameters, refuse_sharded
from lit_methods.callbacks.twin import independent_copy, step_by_hand
from lit_methods.callbacks.wrapping import takes_iterator
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sparse_ift",
    title="Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
    arxiv="2303.11525",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.SparseIFT",),
    configs=("sparse_ift.yaml",),
    golden=("isoflop_dims", "mask_update", "drop_schedule", "block_forward"),
    claim="Sparse Wide with RigL at 75 % sparsity reaches a higher test accuracy than the dense network "
    "whose hidden layers have the same FLOPs.",
    summary="Makes hidden layers larger and sparse at equal FLOPs (wide, parallel, factorized, doped) with static, SET or RigL masks.",
)


_COUPLED = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)


class SparseIFT(DynamicSparsity):
    """Makes hidden layers larger and sparse at equal FLOPs, before training, and trains them with static masks, SET or RigL.

    Members of the family, at sparsity s and B = 1 / (1 - s): ``wide``: hidden widths times sqrt(B); ``parallel``: B branches, each with a
    batch norm, summed; ``factorized``: V relu(BN(U x)); ``doped``: a sparse layer plus a dense one of low rank. ``none`` enlarges nothing:
    masks of the same layers, the baseline. :func:`iso_flop_transform` says what can be transformed.

    Runs: transforms the module in ``setup``, at every stage, before Lightning loads a checkpoint and before optimisers are made; layers
    that ``configure_model`` makes are made first. A module that is transformed already must be so in the same way. At the first training
    batch FLOPs are counted on one forward pass; all else as in :class:`DynamicSparsity`. The transformed module stays as it is after fit.

    Saves: what :class:`MaskCallback` saves, the settings, and which weights were ever and always active. A checkpoint fits the transformed
    module: load it with this callback, or into a module after :func:`iso_flop_transform`.

    Refuses: what :class:`DynamicSparsity` refuses, modules that can't be transformed, and Lightning's ``WeightAveraging`` before it in the
    list; callbacks that hook a transformed layer must stand behind it, too. ``wide`` refuses a module of several networks, such as a GAN,
    whose widened layers get data of the old width.

    Args:
        sparsity: s, share of removed weights in [0, 1); 0.5, 0.75 and 0.9 in the paper.
        family: ``wide``, ``parallel``, ``factorized``, ``doped`` or ``none``.
        method: ``static``, ``set`` or ``rigl``.
        network: Name of the submodule that is transformed, such as ``network``; null: the whole module, which is one network.
        uv_layer: Between U and V of ``factorized``: ``linear``, ``nonlinear_norelu`` (batch norm) or ``nonlinear_relu`` (and ReLU).
        sparse_u_only: V of ``factorized`` stays dense.
        sparse_shortcuts: Mask pointwise shortcuts; null: for ``wide`` and ``none``. The other members mask them as they are.
        init: Start of new weights: ``kaiming_normal`` by fan-out, or ``default``, torch's own.
        zero_init_last: Start the scale of the last norm of each residual block at 0.
        fold_weight_decay: Decay ||V U||^2 in place of U and V, where nothing stands between them; with SGD, Adam, RMSprop, Adagrad.
        measure_spectral_gap: Log the mean :func:`spectral_gap` of the masks after each epoch; one eigenvalue problem per layer.
        flops_tolerance: The enlarged layers may differ by so much from the dense ones' FLOPs, as a share, before training stops; tested
            at the first batch with uniform densities. Null: never.
        forward: Method of the module, ``(batch)``, that runs it once, to count FLOPs; null finds a step that does.
        distribution: Density of the layers: ``uniform``; ``er`` and ``erk``, whose FLOPs aren't equal; the plus variants keep the output
            layer at 0.2 or more, if targets name it.
        start: First masks: ``random``, each entry by itself; ``random_exact``; ``magnitude``.
        interval: Optimiser steps between two updates.
        drop_fraction: Share of the active weights that is replaced at the first updates, in [0, 1].
        anneal: ``cosine`` to 0 at the last update, ``constant``, or ``exponential``.
        rate: How fast ``exponential`` falls.
        begin: Updates come after this step.
        end_fraction: Updates end before this share of all optimiser steps.
        total_steps: All optimiser steps; null: ``trainer.estimated_stepping_batches``.
        stem: Name of the first layer below ``network``, which stays dense; null: the first linear layer or convolution.
        head: Name of the last layer below ``network``, which stays dense; null: the last one.
        targets: Patterns on names of layers below ``network``; empty: all but stem, head and shortcuts.
        skip: Patterns on names of layers that stay dense.
        seed: Seed of new weights and masks.
        mask_gradients: Set gradients of dead weights to 0 before clipping and the optimiser's step.
        mask_optimizer_state: Set momenta and moments of dead weights to 0 after every step.

    Raises:
        ValueError: An argument outside its range; in ``setup``, something that can't be transformed; at the first batch, unequal FLOPs.
    """

    artifact, remembers, kept = "sparse_ift_masks", {"ever": "ever", "always": "always"}, {"macs": "_macs"}
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "FLOPs against the dense network",
            ("sparse_ift/flops_ratio", "sparse_ift/flops_ratio_layers"),
            note="About 1. Above 1 for the whole network under wide: stem and head are dense and wider.",
        ),
        Curve(
            "Exploration of the larger layers",
            ("sparse_ift/itop", "sparse_ift/doc", "sparse_ift/density"),
            note="Share of weights ever active (ITOP), always active (DOC), active now. Equal and constant for static masks.",
        ),
        Curve("Drop fraction", ("sparse_ift/drop_fraction",), note="Share of the active weights that an update replaces."),
        Curve("Mean spectral gap of the masks", ("sparse_ift/spectral_gap",), note="Ramanujan bound - second singular value."),
        TablePanel("Iso-FLOP layers", "sparse_ift/layers", note="Active weights equal the dense layer's; stored ones are more."),
    )

    def __init__(
        self,
        sparsity: float,
        family: Family = "wide",
        method: Literal["static", "set", "rigl"] = "rigl",
        network: str | None = None,
        uv_layer: UVLayer = "nonlinear_relu",
        sparse_u_only: bool = False,
        sparse_shortcuts: bool | None = None,
        init: Init = "kaiming_normal",
        zero_init_last: bool = False,
        fold_weight_decay: bool = False,
        measure_spectral_gap: bool = False,
        flops_tolerance: float | None = 0.05,
        forward: str | None = None,
        distribution: Distribution = "uniform",
        start: Literal["random", "random_exact", "magnitude"] = "random",
        interval: int = 100,
        drop_fraction: float = 0.3,
        anneal: Literal["cosine", "constant", "exponential"] = "cosine",
        rate: float = 3.0,
        begin: int = 0,
        end_fraction: float = 0.75,
        total_steps: int | None = None,
        stem: str | None = None,
        head: str | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        base_scaling(sparsity)
        schedule = (interval, drop_fraction, anneal, rate, begin, end_fraction, total_steps)
        super().__init__(1 - sparsity, method, "uniform", start, *schedule, targets, skip, seed, mask_gradients, mask_optimizer_state)
        checks.literals(SparseIFT, locals())
        checks.at_least(0, "a share", flops_tolerance=flops_tolerance)
        if fold_weight_decay and not (family == "doped" or (family == "factorized" and uv_layer == "linear")):
            given = f"family={family!r} with uv_layer={uv_layer!r}"
            raise ValueError(f"fold_weight_decay needs a linear map V U: choose doped, or factorized with uv_layer='linear', not {given}")
        self.sparsity, self.family, self.network = sparsity, family, network
        self.uv_layer, self.sparse_u_only, self.sparse_shortcuts, self.init = uv_layer, sparse_u_only, sparse_shortcuts, init
        self.zero_init_last, self.fold_weight_decay, self.measure_spectral_gap = zero_init_last, fold_weight_decay, measure_spectral_gap
        self.flops_tolerance, self.forward, self.stem, self.head = flops_tolerance, forward, stem, head
        self.layer_rule: Distribution = distribution
        self.transformation: Transformation | None = None
        self._macs: dict[str, Any] | None = None  # per_weight, other
        self._uncounted = True
        self._built: set[str] = set()  # layers that were there when the module was transformed
        self._stored: dict[str, int] = {}  # entries of the weights of all transformed layers

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return replace(super().sparsity_card, layerwise="er" if self.layer_rule == "er_plus" else self.layer_rule)

    @property
    def _layers(self) -> tuple[TransformedLayer, ...]:
        """Transformed layers; none before ``setup``."""
        return () if self.transformation is None else self.transformation.layers

    # ---- the transformation ------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Transform the module, unless it is; then choose the masked weights.

        Raises:
            ValueError: The module, or another callback, doesn't allow it.
        """
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # Lightning calls it again, and says that it must do nothing then
        done = transformation_of(pl_module)
        if done is None:
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, WeightAveraging) and other._average_model is not None:
                    raise ValueError(f"{type(other).__name__} has copied the dense module: put SparseIFT before it in the list")
            names = ("targets", "skip", "stem", "head", "sparse_shortcuts", "uv_layer", "sparse_u_only", "init", "zero_init_last", "seed")
            options: dict[str, Any] = {name: getattr(self, name) for name in names}
            with checks.naming("SparseIFT"):
                iso_flop_transform(self._root(pl_module), self.family, self.sparsity, **options)
            done = transformation_of(pl_module)
        assert done is not None
        self._agree(done.settings(), f"{type(pl_module).__name__} is transformed already")
        self.transformation = done
        self._built = set(self._matrices(pl_module))
        super().setup(trainer, pl_module, stage)

    def _matrices(self, pl_module: pl.LightningModule) -> list[str]:
        """Names of all layers that a transformation could mean."""
        return [name for name, part in plain_modules(self._root(pl_module)).items() if isinstance(part, nn.Linear | _ConvNd)]

    def _root(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.network is None:
            return pl_module
        modules = plain_modules(pl_module)
        if self.network not in modules:
            known = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"network is {self.network!r}, no submodule of {type(pl_module).__name__}: give one such as {known}, or null")
        return modules[self.network]

    def _agree(self, settings: Mapping[str, Any], where: str) -> None:
        own = Transformation(self.family, self.sparsity, self.uv_layer, self.sparse_u_only, ()).settings()
        if dict(settings) != own:
            raise ValueError(f"{where}, with {dict(settings)}; this callback has {own}: use the same settings")

    def candidates(self, pl_module: nn.Module) -> Choice:
        """The masked weights of the transformed layers; none before ``setup``."""
        parameters = plain_parameters(pl_module)
        names = [name for layer in self._layers for name in layer.sparse]
        missing = [name for name in names if name not in parameters]
        if missing:
            made = f"{type(pl_module).__name__} has made its layers anew after setup"
            raise ValueError(f"{missing[0]} is gone: {made}. Let configure_model do nothing when the layers are there")
        return Choice({name: parameters[name] for name in names}, {})

    # ---- masks -------------------------------------------------------------------------------------------------------------------------

    def densities(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Density of each weight; the plus variants cap the sparsity of the output layer at 0.8."""
        base: Any = self.layer_rule.removesuffix("_plus")
        shares = layer_density([weight.shape for weight in weights.values()], self.density, base, names=list(weights))
        found = dict(zip(weights, shares, strict=True))
        if self.layer_rule.endswith("_plus"):
            for name in self._output_weights():
                if name in found:
                    found[name] = max(found[name], 0.2)
        return found

    def _output_weights(self) -> tuple[str, ...]:
        """Of the layer that ``head`` names, or else of the last transformed one, if targets name layers themselves."""
        layers = self._layers
        prefix = f"{self.network}." if self.network else ""
        if self.head is not None:
            return next((layer.sparse for layer in layers if layer.name == prefix + self.head), ())
        return layers[-1].sparse if self.targets else ()

    def counts(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Active entries after an update, as the authors' code counts them."""
        return {name: target_count(weight.numel(), 1 - self.layer_densities[name]) for name, weight in weights.items()}

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As dynamic sparsity; layers that weren't there to be transformed are refused."""
        if late := [name for name in self._matrices(pl_module) if name not in self._built]:
            made = f"{type(pl_module).__name__} has made {', '.join(late[:4])} in its setup, when its other layers were transformed already"
            raise ValueError(f"Sparse-IFT: {made}: make them in __init__ or in configure_model")
        super().begin_fit(trainer, pl_module)
        self._macs = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the masks."""
        super().on_fit_start(trainer, pl_module)
        self._uncounted = self._macs is None
        sizes = {name: parameter.numel() for name, parameter in plain_parameters(pl_module).items()}
        self._stored = {name: sizes[name] for layer in self._layers for name in layer.weights}
        for optimizer in trainer.optimizers if self.fold_weight_decay else ():
            if not isinstance(optimizer, _COUPLED) or optimizer.defaults.get("decoupled_weight_decay"):
                known = ", ".join(kind.__name__ for kind in _COUPLED)
                why = f"replaces a weight decay that joins the gradient ({known}), but {type(optimizer).__name__} decays weights by itself"
                raise ValueError(f"fold_weight_decay {why}: take one of these, or fold_weight_decay=false")

    # ---- folded weight decay -----------------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Put the decay of the folded matrices into the gradients; then as all mask callbacks."""
        if self.fold_weight_decay:
            self._fold(pl_module, optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _fold(self, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        decay = {id(p): float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]}
        parameters = plain_parameters(pl_module)
        for layer in self._layers:
            pair = [parameters[name] for name in layer.folded]
            if not pair or any(decay.get(id(one), 0.0) == 0 or one.grad is None for one in pair):
                continue
            u, v = pair
            with torch.enable_grad():
                penalty = 0.5 * decay[id(u)] * folded_frobenius(u, v)
            for one, grad in zip(pair, torch.autograd.grad(penalty, pair), strict=True):
                assert one.grad is not None
                one.grad.add_(grad.to(one.grad.dtype)).sub_(decay[id(one)] * one.detach())  # the optimiser will add the last term again

    # ---- FLOPs -------------------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first batch, count FLOPs and compare them with the dense network's.

        Raises:
            ValueError: They differ by more than ``flops_tolerance``, or a widened network can't run.
        """
        if self._uncounted and not takes_iterator(pl_module):
            self._count(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As mask callbacks; the batch of a step that takes ``dataloader_iter`` is known now, and counted."""
        if self._uncounted and takes_iterator(pl_module):
            self._count(trainer, pl_module, batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self._uncounted = False
        macs, _, why = count_on_batch(trainer, pl_module, batch, self.forward)
        if macs is None:
            if self.family == "wide" and not pl_module.automatic_optimization:
                self._rehearse(trainer, pl_module, batch)
            if self.family == "wide" and self.flops_tolerance is not None:
                failed = f"the widened {type(pl_module).__name__} can't run on a training batch ({why})"
                ways = "if no step can run on a copy, set flops_tolerance to null"
                raise ValueError(f"{failed}: if its forward counts on widths, give it larger widths yourself, with DynamicSparsity; {ways}")
            rank_zero_warn(f"SparseIFT can't count FLOPs, so they aren't compared with the dense network's ({why})")
            return
        self._macs = {"per_weight": macs.per_weight, "other": macs.other}
        now, before = self._layer_macs(self.layer_densities, enlarged=True)
        if self.family != "none" and self.flops_tolerance is not None and self.layer_rule == "uniform" and before:
            ratio = now / before
            if abs(ratio - 1) > self.flops_tolerance:
                given = f"{self.family!r} at sparsity {self.sparsity} gives the transformed layers {ratio:.3f} of the dense layers' FLOPs"
                why = "widths, branches and ranks are whole numbers, and these layers are small or 1 / (1 - sparsity) isn't one"
                way = "choose another sparsity (0.5, 0.75, 0.9), or raise flops_tolerance"
                raise ValueError(f"Sparse-IFT {given}, not 1 within {self.flops_tolerance}: {why}; {way}")

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Make a step of manual optimisation on a copy, which shows whether the widths fit before anything is trained."""
        twin = independent_copy(trainer, pl_module)
        modules, wrong = plain_modules(twin), []

        def compare(layer: Any, arguments: Any, name: str) -> None:
            linear = isinstance(layer, nn.Linear)
            wanted, given = layer.in_features if linear else layer.in_channels, arguments[0].shape[-1 if linear else 1]
            if given != wanted:
                wrong.append(f"{name} has {wanted} inputs now and gets {given}")

        for name in (layer.name for layer in self._layers):
            modules[name].register_forward_pre_hook(functools.partial(compare, name=name))
        try:
            with isolate_rng(pl_module.device.type == "cuda"), trainer.precision_plugin.train_step_context():
                step_by_hand(trainer, twin, apply_to_collection(batch, Tensor, torch.clone))
        except Exception as error:  # the user's code, which may need more than a copy has
            if not wrong:
                rank_zero_warn(f"SparseIFT can't try the widened network on a copy ({type(error).__name__}: {error})")
        if wrong:
            raise ValueError(
                f"SparseIFT: the widened {type(pl_module).__name__} can't run on a training batch ({wrong[0]}), as it isn't one network "
                "from stem to head: name the network to transform by network, or choose parallel, factorized or doped"
            )

    def _layer_macs(self, density: Mapping[str, float], enlarged: bool = False) -> tuple[float, float]:
        """MACs of the transformed layers (or those of them that have grown sparse and larger), now and dense."""
        assert self._macs is not None
        layers = [one for one in self._layers if not enlarged or (one.enlarged and one.sparse)]
        found = flops_against_dense(layers, self._macs["per_weight"], self._stored, density)
        return sum(now for now, _ in found), sum(before for _, before in found)

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def _values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Everything that is logged, by name."""
        density, sizes = self.store.densities(), self._stored
        layers = [one for one in self._layers if one.enlarged and one.sparse]
        itop, doc = (itop_rate(masks)[0] for masks in (self.history.ever, self.history.always))
        values = {"density": self.store.density(), "itop": itop, "doc": doc}
        if layers:
            dense = sum(one.dense_size for one in layers)
            stored = sum(sizes[name] for one in layers for name in one.weights)
            active = sum(sizes[name] * density.get(name, 1.0) for one in layers for name in one.weights)
            values |= {"weights_ratio": active / dense, "stored_ratio": stored / dense}
        if self.method != "static":
            end = int(self.end_fraction * self._length)
            values["drop_fraction"] = self.fraction(min(max(trainer.global_step, self.begin), end))
        if self._macs is not None:
            now, before = self._layer_macs(density)
            rest = sum(self._macs["per_weight"].values()) + self._macs["other"] - self._layer_macs({})[0]
            values["flops_ratio"] = (rest + now) / (rest + before)
            if layers:
                now, before = self._layer_macs(density, enlarged=True)
                values["flops_ratio_layers"] = now / before
        if self.measure_spectral_gap:
            values["spectral_gap"] = float(torch.stack([spectral_gap(mask).cpu() for mask in self.store.masks.values()]).mean())
        return {f"sparse_ift/{name}": value for name, value in values.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where things stand."""
        log_global(pl_module, self._values(trainer), batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the transformed layers."""
        if not self.store.masks or self.transformation is None:
            return {}
        sizes, counts = self._stored, self.store.counts()
        ratios = [(0.0, 0.0)] * len(self._layers)
        if self._macs is not None:
            ratios = flops_against_dense(self._layers, self._macs["per_weight"], sizes, self.store.densities())
        rows = []
        for layer, (now, before) in zip(self._layers, ratios, strict=True):
            active = sum(counts[name][0] if name in counts else sizes[name] for name in layer.weights)
            shape = " x ".join(map(str, layer.dense_shape))
            stored = sum(sizes[name] for name in layer.weights)
            kind, ratio = "sparse" if layer.sparse else "dense", now / before if before else None
            rows.append((layer.name, shape, layer.dense_size, stored, active, kind, ratio))
        heads = ("layer", "dense weight", "weights of the dense layer", "stored now", "active now", "kind", "FLOPs / dense")
        return {"sparse_ift/layers": TableMedia(heads, tuple(rows))}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What mask callbacks save, and the settings."""
        state = super().state_dict()
        return state if not state or self.transformation is None else {**state, "settings": self.transformation.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until fit starts.

        Raises:
            ValueError: The checkpoint's module was transformed differently.
        """
        if state:
            self._agree(state["settings"], "the checkpoint's module is transformed")
        super().load_state_dict(state)
