"""SSVI as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.ssvi.core`; the layers are those of :mod:`lit_methods.bayes`.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.bayes.conversion import bayes_layers, to_bayes
from lit_methods.bayes.layers import BayesLayer, drawing, drawn
from lit_methods.bayes.prediction import numbers_of, posterior_logits
from lit_methods.bayes.stored import stored_bytes
from lit_methods.callbacks.batch import require_logits
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.density import Method, layer_density
from lit_methods.callbacks.sparsity.dynamic import MovingMasks
from lit_methods.callbacks.sparsity.dynamics import itop_rate
from lit_methods.callbacks.sparsity.masks import keep_largest
from lit_methods.callbacks.sparsity.schedules import drop_schedule
from lit_methods.callbacks.sparsity.ssvi import core
from lit_methods.callbacks.sparsity.store import Choice, choose_weights
from lit_methods.callbacks.targets import refuse_lazy
from lit_methods.callbacks.wrapping import attach, built_by, detach
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global, logs_now, remaining_steps, steps_per_epoch, training_length

TECHNIQUE = Technique(
    slug="ssvi",
    short="SSVI",
    title="Training Bayesian Neural Networks with Sparse Subspace Variational Inference",
    arxiv="2402.11025",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.SSVI",),
    configs=("ssvi.yaml",),
    golden=("removal_addition", "drop_score", "variational_linear"),
    claim="At 2 % of the weights, a subspace that moves has a lower negative log-likelihood than one that was drawn once and stays.",
    summary="Trains a normal distribution for few weights of any module, all others being exactly 0, and searches for those few meanwhile.",
)

_COPIED = "it copies the module before its layers have distributions: average with EMATeacher"
_SHOWN = 20  # bars of the histogram


def warmed_up(epoch: int, epochs: int) -> float:
    """Share of the full KL term in an epoch: min(2 (epoch + 1) / epochs, 1), epochs counted from 0."""
    return min(2 * (epoch + 1) / epochs, 1.0)


@contextmanager
def without_decay(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, optimisers that are made put these parameters into groups of their own, without weight decay.

    A group that is added once the optimiser stands would come too late for its learning rate schedule.
    """
    ids = {id(parameter) for parameter in parameters}
    add = torch.optim.Optimizer.add_param_group

    def split(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        apart = [one for one in given if id(one[1] if isinstance(one, tuple) else one) in ids]
        rest = [one for one in given if all(one is not other for other in apart)]
        if rest or not apart:
            add(optimizer, {**group, "params": rest})
        if apart:
            add(optimizer, {**group, "params": apart, **({"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {})})

    torch.optim.Optimizer.add_param_group = split  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = add  # type: ignore[method-assign]


class SSVI(MovingMasks):
    """Sparse subspace variational inference: a normal distribution N(mu, sigma^2) for few weights, all others exactly 0, for any module.

    Linear layers, convolutions and look-up tables get distributions, with noise at their outputs in training, and the loss becomes the
    module's own + kl_scale / N * min(2 epoch / epochs, 1) * KL(q || N(0, prior_std^2)). Every ``interval`` optimiser steps the active
    weights whose distribution says least give way to those with the largest gradient. ``density`` 1 is dense mean-field inference.

    Runs: layers are converted in ``setup`` of every stage, before checkpoints are loaded and optimisers made, and stay so: checkpoints fit
    the converted module. Masks as in :class:`MaskCallback`, also of rho; sigma is trained without weight decay. On an update the
    optimiser's step is left out, its gradients being used up. Random numbers of a training step, the module's own included, follow from
    seed, batch and rank. In evaluation ``logits`` returns the log of the mean of ``samples`` softmaxes, each of one draw of the weights, so
    that the module's own metrics and ``Reliability`` judge the posterior.

    Saves: what :class:`MaskCallback` saves, which weights were ever active, and gradients on their way into the next update.

    Refuses: what :class:`MaskCallback` refuses; layers that can't have distributions, which the message names; manual optimisation;
    averages that copy the module before (``WeightAveraging``, ``StochasticWeightAveraging``); a loader without a length.

    Args:
        density: Share of the weights that is active, in (0, 1].
        criterion: What active weights are kept by: ``mean`` |mu|, ``snr`` |mu| / sigma, or of the distribution of |theta|: ``E_mean_abs``
            its mean, ``SNR_mean_abs`` its mean / standard deviation, ``E_exp_mean_abs`` and ``SNR_exp_mean_abs`` the same of exp |theta|.
        moves: Whether the subspace moves; false: the first one stays.
        distribution: How the density is spread over the layers: ``uniform``, ``er``, ``erk`` or a plus variant.
        dense_first: All weights of the first layer are active, and ``density`` is that of the others.
        prior_std: Standard deviation of the prior, > 0.
        kl_scale: Factor of the KL term, >= 0; below 1 the posterior is a cold one.
        interval: Optimiser steps between two updates.
        drop_fraction: Share of the active weights that is replaced at the first updates, in [0, 1]; falls to 0 along a cosine.
        end_fraction: Updates end before this share of all optimiser steps.
        gradient_steps: Weights are added by the mean gradient of so many last steps.
        grow_std: Deviation of new weights: ``mean`` of the layer, or ``eps``, 1e-6.
        noise: In training at each of the ``outputs``, or one draw of the ``weights`` for a batch.
        initial_mean_std: Means start from N(0, this^2); null: as the module made them.
        initial_std: Mean standard deviation at the start, > 0.
        train_samples: N, training samples of all ranks; null: length of the training data set.
        samples: Draws in evaluation; 0: the means are evaluated.
        logits: Method or submodule that maps the inputs of a batch to (B, classes) logits; ``forward``: the module itself.
        targets: ``fnmatch`` patterns on names of the layers; empty: every trained layer with a weight matrix.
        skip: Patterns on names of layers that stay as they are, dense and without a distribution.
        seed: Seed of the start, the masks and the noise.

    Raises:
        ValueError: An argument outside its range; in ``setup``, layers that can't be converted; at fit start, a density that leaves a layer
            without a weight.
        TypeError: In ``setup``, no logits are found.
    """

    artifact, stream, remembers = "ssvi_masks{where}", "ssvi", {"ever": "ever"}
    kept: ClassVar[Mapping[str, str]] = {"gradients": "_sums", "replaced": "_replaced"}
    conflicts_with: ClassVar[Mapping[str, str]] = {
        **MovingMasks.conflicts_with,
        **dict.fromkeys(("WeightAveraging", "StochasticWeightAveraging"), _COPIED),
    }
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("KL divergence", ("ssvi/kl",), note="Of the active weights, in nats, before its factor.", goal="min"),
        Curve("Factor of the KL term", ("ssvi/kl_factor",), note="Rises over the first half of the epochs."),
        Curve("Exploration", ("ssvi/itop", "ssvi/density"), note="Share of the weights ever active, and active now."),
        Curve("Share replaced by the last update", ("ssvi/replaced",), note="Falls to 0. Weights that return at once don't count."),
        Curve("Mean standard deviation", ("ssvi/mean_std",), note="Of active weights. Near the prior's: the data say little about them."),
        HistogramPanel("Signal to noise of active weights", "ssvi/snr", note="log10 of |mu| / sigma."),
        TablePanel("Bayes layers", "ssvi/layers"),
    )

    def __init__(
        self,
        density: float = 0.1,
        criterion: core.Criterion = "SNR_mean_abs",
        moves: bool = True,
        distribution: Method = "uniform",
        dense_first: bool = True,
        prior_std: float = 0.005,
        kl_scale: float = 0.01,
        interval: int = 100,
        drop_fraction: float = 0.3,
        end_fraction: float = 0.75,
        gradient_steps: int = 1,
        grow_std: Literal["mean", "eps"] = "mean",
        noise: Literal["outputs", "weights"] = "outputs",
        initial_mean_std: float | None = 0.01,
        initial_std: float = 6e-4,
        train_samples: int | None = None,
        samples: int = 10,
        logits: str = "forward",
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(targets, skip, seed)
        checks.literals(SSVI, locals())
        checks.within("(0, 1]", "a share", density=density)
        checks.share(drop_fraction=drop_fraction, end_fraction=end_fraction)
        checks.positive(prior_std=prior_std, initial_std=initial_std)
        checks.at_least(0, kl_scale=kl_scale, initial_mean_std=initial_mean_std)
        checks.at_least(1, "optimiser steps", interval=interval)
        checks.within(f"[1, {interval}]", "optimiser steps, at most interval,", gradient_steps=gradient_steps)
        checks.at_least(1, "training samples", train_samples=train_samples)
        checks.at_least(0, "draws", samples=samples)
        self.density, self.criterion, self.moves, self.distribution, self.dense_first = density, criterion, moves, distribution, dense_first
        self.prior_std, self.kl_scale = prior_std, kl_scale
        self.interval, self.drop_fraction, self.end_fraction = interval, drop_fraction, end_fraction
        self.gradient_steps, self.grow_std, self.noise = gradient_steps, grow_std, noise
        self.initial_mean_std, self.initial_std = initial_mean_std, initial_std
        self.train_samples, self.samples, self.logits = train_samples, samples, logits
        self.updates: dict[int, float] = {}  # optimiser step that is an update -> share of the active weights that leaves
        self._layers: dict[str, BayesLayer] = {}  # name of the mean -> layer
        self._sums: dict[str, Tensor] = {}  # name of the mean -> sum of the gradients since the window of the next update began
        self._replaced = 0.0  # share of the active weights that the last update changed
        self._epochs = self._number = 1
        self._around: list[tuple[Any, Any, str]] = []  # what stands around methods of the module
        self._averaged = False  # whether this evaluation has called what gives logits
        self._trainer: pl.Trainer | None = None

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        dense = self.density == 1
        return SparsityCard(
            stage="during" if self.moves else "before",
            regime="dense_to_dense" if dense else "sparse_to_sparse",
            mask="dynamic" if self.moves and not dense else "static",
            layerwise=self.distribution,
            criterion="other" if self.moves else "random",
            cost="dense" if dense else "rigl" if self.moves else "static",
            update_interval=self.interval,
        )

    # ---- conversion --------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the layers, unless they are, and stand around the methods whose course changes.

        Raises:
            ValueError: Layers that can't be converted, manual optimisation, or what all mask callbacks refuse.
            TypeError: Nothing gives logits.
        """
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError(
                f"SSVI adds to the loss that training_step returns, but {type(pl_module).__name__} calls backward itself "
                "(automatic_optimization = False): let Lightning do it, or write a loop with lit_methods.bayes"
            )
        self._unwrap()
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        self.when_built(pl_module, lambda: self._convert(trainer, pl_module, stage))

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.samples:
            require_logits(pl_module, self.logits, "SSVI")
        refuse_lazy(pl_module, "SSVI")
        with checks.naming("SSVI"):
            if not bayes_layers(pl_module):
                names = to_bayes(pl_module, self.targets, self.skip, self.initial_mean_std, self.initial_std, seed=self.seed)
                rank_zero_info(f"SSVI gives the weights of {len(names)} layers distributions: {', '.join(names)}")
        if stage != "fit":
            return
        self._layers = {f"{name}.weight" if name else "weight": layer for name, layer in bayes_layers(pl_module).items()}
        if built_by(pl_module) is None:
            self.check(trainer, pl_module, self.chosen(pl_module))
        self._wrap(pl_module, functools.partial(self._step, pl_module), "training_step")
        self._wrap(pl_module, self._configured, "configure_optimizers")

    def _wrap(self, owner: Any, around: Callable[..., Any], method: str) -> None:
        attach(owner, around, method, around=True)
        self._around.append((owner, around, method))

    def _unwrap(self, around: Callable[..., Any] | None = None) -> None:
        for entry in [entry for entry in self._around if around in (None, entry[1])]:
            detach(*entry)
            self._around.remove(entry)

    def _configured(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with without_decay([layer.rho for layer in self._layers.values()]):
            return call(*args, **kwargs)

    def candidates(self, pl_module: nn.Module) -> Choice:
        """Mean and rho of each Bayes layer; none before the conversion."""
        names = list(bayes_layers(pl_module))
        return choose_weights(pl_module, names) if any(names) else Choice({}, {})

    # ---- masks -------------------------------------------------------------------------------------------------------------------------

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the lengths of training and data.

        Raises:
            ValueError: No optimiser trains a deviation, or one decays it; or a length isn't known.
        """
        groups = {id(one): group for optimizer in trainer.optimizers for group in optimizer.param_groups for one in group["params"]}
        for name, layer in self._layers.items():
            if id(layer.rho) not in groups or id(layer.weight) not in groups:
                raise ValueError(
                    f"no optimiser holds the mean and the rho of {name}: return both from configure_optimizers, or add it to skip"
                )
            if groups[id(layer.rho)].get("weight_decay"):
                raise ValueError(f"the optimiser decays rho of {name}, which would draw sigma to 0.69: put it into a group without decay")
        self._replaced, self._sums = 0.0, {}
        self._epochs = math.ceil(training_length(pl_module) / steps_per_epoch(pl_module, "SSVI's KL term"))
        self._number = self.train_samples or self._data_length(trainer)
        self.updates = {}
        if self.moves and self.density < 1:
            length = remaining_steps(pl_module)
            schedule = drop_schedule(length, self.interval, 0, self.end_fraction, self.drop_fraction)
            self.updates = dict(zip(*schedule, strict=True))

    @staticmethod
    def _data_length(trainer: pl.Trainer) -> int:
        try:
            return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        except (AttributeError, TypeError) as error:
            raise ValueError(
                "SSVI weighs its KL term by the number of training samples, which the loader doesn't tell: give train_samples"
            ) from error

    def densities(self) -> dict[str, float]:
        """Name of each mean -> share of its weights that is active."""
        names, weights = list(self._layers), [layer.weight for layer in self._layers.values()]
        first = 1 if self.dense_first and len(names) > 1 else 0
        shares = layer_density([weight.shape for weight in weights[first:]], self.density, self.distribution, names=names[first:])
        return dict(zip(names, [1.0] * first + shares, strict=True))

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Random ones of exact counts; those of a posterior that is sparse already stay."""
        if any(not bool(layer.mask.all()) for layer in self._layers.values()):
            found = {name: layer.mask.clone() for name, layer in self._layers.items()}
        else:
            drawn_scores = {name: torch.rand(layer.weight.shape, generator=self.generator) for name, layer in self._layers.items()}
            shares = self.densities()
            found = {name: keep_largest(score, core.active_count(score.numel(), shares[name])) for name, score in drawn_scores.items()}
        return _with_rho(found)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the masks, and tell the layers."""
        super().on_fit_start(trainer, pl_module)
        for name, layer in self._layers.items():
            layer.mask.copy_(self.store.masks[name])

    def is_update(self, step: int) -> bool:
        """As scheduled."""
        return step in self.updates

    def wants_gradients(self, step: int) -> bool:
        """Of the last ``gradient_steps`` steps up to an update."""
        return any(step + later in self.updates for later in range(self.gradient_steps))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Keep dense gradients; on an update take all of them away, so that the optimiser moves nothing."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.is_update(self._steps[self.index_of(trainer, optimizer)] + 1):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather gradients, and move the subspace if this is a step for it."""
        for name in self._layers:
            if name in gradients:
                self._sums[name] = self._sums[name] + gradients[name] if name in self._sums else gradients[name]
        if not self.is_update(step):
            return {}
        sums, self._sums = self._sums, {}
        moved: dict[str, Tensor] = {}
        changed = active = 0
        for name, layer in self._layers.items():
            before = self.store.masks[name]
            if name not in sums or not bool(sums[name].isfinite().all()):
                continue
            found = core.removal_addition(
                layer.weight, layer.rho, before, sums[name], self.updates[step], self.criterion, grow_std=self.grow_std, spread=layer.spread
            )
            layer.weight.copy_(found.mu)
            layer.rho.copy_(found.rho)
            layer.mask.copy_(found.mask)
            moved[name] = found.mask
            changed += int((found.mask & ~before).sum())
            active += int(before.sum())
        self._replaced = changed / max(1, active)
        return _with_rho(moved)

    # ---- loss and noise ----------------------------------------------------------------------------------------------------------------

    def _step(self, module: pl.LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``training_step`` with its own random numbers, and with the KL term."""
        place = module.trainer.fit_loop.total_batch_idx * distributed.world_size() + distributed.rank()
        with numbers_of(f"ssvi step {place}", self.seed, module.device), drawing(self.noise):
            output = call(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if output is None or self not in module.trainer.callbacks:  # type: ignore[attr-defined]  # a skipped step, or a trial of a tuner
            return output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step of {type(module).__name__} returned {type(output).__name__} without a loss: SSVI needs a tensor, a dict "
                "with 'loss', or None"
            )
        with torch.autocast(loss.device.type, enabled=False):
            divergence = torch.stack([layer.kl(0.0, self.prior_std) for layer in self._layers.values()]).sum()
        factor = self.kl_scale / self._number * warmed_up(module.trainer.current_epoch, self._epochs)
        if logs_now(module):
            module.log_dict({"ssvi/kl": divergence.detach(), "ssvi/kl_factor": factor})
        total = loss + factor * divergence
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def _average(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What gives logits, over several draws."""
        assert self._trainer is not None
        if drawn() is not None:
            return call(*args, **kwargs)
        self._averaged = True
        device = self._trainer.strategy.root_device
        return posterior_logits(lambda: call(*args, **kwargs), self.samples, self.seed, device)

    def _begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._averaged = False
        if self.samples:
            target: Any = operator.attrgetter(self.logits)(pl_module)
            owner, _, method = self.logits.rpartition(".")
            part = (target, "forward") if isinstance(target, nn.Module) else (pl_module.get_submodule(owner), method)
            self._wrap(part[0], self._average, part[1])

    def _end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unwrap(self._average)
        if self.samples and not self._averaged:
            rank_zero_warn(
                f"SSVI averages {self.samples} draws of {self.logits!r}, which this evaluation of {type(pl_module).__name__} didn't call: "
                "its figures are those of the means. Let logits name what is called, or set samples to 0"
            )

    on_validation_start = on_test_start = on_predict_start = _begin_evaluation
    on_validation_end = on_test_end = on_predict_end = _end_evaluation

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where things stand."""
        layers = list(self._layers.values())
        active = torch.stack([layer.mask.sum() for layer in layers]).sum()
        seen = {name: self.history.ever[name] for name in self._layers}
        deviation = torch.stack([layer.sigma().detach().float().sum() for layer in layers]).sum() / active
        values: dict[str, Tensor | float] = {
            "density": active / sum(layer.mask.numel() for layer in layers),
            "mean_std": deviation,
            "itop": itop_rate(seen)[0],
        }
        values |= {"replaced": self._replaced, "stored_bytes": float(stored_bytes(pl_module))}
        log_global(pl_module, {f"ssvi/{name}": value for name, value in values.items()}, batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Histogram of |mu| / sigma, and the layers."""
        if not self.store.masks or not self._layers:
            return {}
        rows, ratios = [], []
        for name, layer in self._layers.items():
            mean, sigma = layer.weight.detach()[layer.mask].float(), layer.sigma().detach()[layer.mask].float()
            ratios.append((mean.abs() / sigma).clamp_min(1e-6).log10())
            shape = " x ".join(map(str, layer.weight.shape))
            share = len(mean) / layer.mask.numel()
            rows.append((name.removesuffix(".weight"), shape, len(mean), share, float(mean.abs().mean()), float(sigma.mean())))
        counts, edges = np.histogram(torch.cat(ratios).cpu().numpy(), bins=_SHOWN)
        heads = ("layer", "weight", "active", "density", "mean |mu|", "mean sigma")
        return {"ssvi/snr": HistogramMedia(counts, edges), "ssvi/layers": TableMedia(heads, tuple(rows))}

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of optimisers and methods; the layers stay Bayesian."""
        self._unwrap()
        self._trainer = None
        super().leave(trainer, pl_module)


def _with_rho(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of means, and the same of their rhos."""
    return {name: mask for mean, mask in masks.items() for name in (mean, f"{mean.removesuffix('weight')}rho")}
