"""Random pruning at initialisation: a random mask with a well chosen density per layer, kept for the whole training (arXiv:2202.02643).

Golden vectors come from VITA-Group/Random_Pruning@871077f: CIFAR/sparselearning/core.py (densities of the layers; ERK+ from
ImageNet/core.py) and CIFAR/sparselearning/snip.py (shares of the layers by SNIP and GraSP). The maths stand in
:mod:`~lit_methods.callbacks.sparsity.density`, :mod:`~lit_methods.callbacks.sparsity.scores` and
:mod:`~lit_methods.callbacks.sparsity.masks`. Left out: the code's switch to masks that change, which is
:class:`~lit_methods.callbacks.DynamicSparsity`. The paper's further measures are in :class:`~lit_methods.callbacks.Reliability`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_methods import checks
from lit_methods.callbacks.batch import Key, inputs_and_labels, logits_of, require_logits
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.density import exact_counts, layer_density
from lit_methods.callbacks.sparsity.masks import keep_largest, random_mask
from lit_methods.callbacks.sparsity.scores import grasp_scores, kept_masks, kept_shares, snip_scores
from lit_methods.callbacks.targets import plain_parameters
from lit_methods.callbacks.twin import independent_copy, training_batches
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="random_pruning",
    short="Random Pruning",
    title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
    arxiv="2202.02643",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.RandomPruning", "lit_methods.callbacks.Reliability"),
    configs=("random_pruning.yaml",),
    golden=("layer_density", "snip_ratio", "grasp_ratio"),
    claim="With random static masks at 95 % sparsity, layer densities by ER reach a higher accuracy than uniform ones.",
    summary="Trains with a random mask that is drawn before training, at layer densities by shape (ER, ERK), SNIP, GraSP or magnitude.",
)

Method = Literal["uniform", "uniform_plus", "er", "erk", "erk_plus", "snip", "grasp", "global_magnitude"]
ScoreMethod = Literal["snip", "grasp", "global_magnitude"]

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def layer_scores(
    forward: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    inputs: Tensor | None,
    labels: Tensor | None,
    method: ScoreMethod,
    temperature: float = 200.0,
) -> list[Tensor]:
    """Scores whose competition over all layers gives the layers' shares, see :func:`kept_masks` and :data:`REMOVED`.

    Args:
        forward: Inputs (B, ...) -> (B, C) logits or log-probabilities, through ``weights``.
        weights: Leaves of the graph, any shapes.
        inputs: (B, ...); for GraSP B >= 2, split into two halves as they stand; None for ``global_magnitude``.
        labels: (B,) int64; None for ``global_magnitude``.
        method: ``snip``: |w * dL/dw| of the cross-entropy L. ``grasp``: -w * Hg, with outputs divided by ``temperature``.
            ``global_magnitude``: |w|.
        temperature: GraSP divides outputs by it; > 0.

    Returns:
        One tensor per weight, its shape; no graph.

    Raises:
        ValueError: A weight takes no part in the loss, or scores aren't finite.
    """
    if method == "global_magnitude":
        scores = [weight.detach().abs() for weight in weights]
    else:
        assert inputs is not None
        assert labels is not None
        try:
            if method == "snip":
                scores = snip_scores(weights, F.cross_entropy(forward(inputs), labels))
            else:
                half = len(inputs) // 2
                parts = ((inputs[:half], labels[:half]), (inputs[half:], labels[half:]))
                scores = grasp_scores(weights, [F.cross_entropy(forward(x) / temperature, y) for x, y in parts])
        except RuntimeError as error:
            if "not have been used" not in str(error):
                raise
            raise ValueError(f"{method} scores need weights that take part in the loss, but one doesn't: leave it out by skip") from error
    if not all(bool(score.isfinite().all()) for score in scores):
        raise ValueError(f"{method} scores aren't finite: look at the inputs, or choose method='erk', which needs no data")
    return scores


REMOVED: dict[str, str] = {"snip": "lowest", "grasp": "highest", "global_magnitude": "lowest"}
"""Which scores of :func:`layer_scores` are removed, for :func:`~lit_methods.callbacks.sparsity.scores.kept_masks`."""


def balanced_batch(batches: Iterable[tuple[Tensor, Tensor]], per_class: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The first ``per_class`` samples of every class, sorted by class.

    Args:
        batches: Inputs (B, ...) and labels (B,) in 0..num_classes-1. No more of them are read than needed.
        per_class: Samples per class, >= 1.
        num_classes: C.

    Returns:
        Inputs (C * per_class, ...) and labels (C * per_class,).

    Raises:
        ValueError: A label out of range, or too few samples of a class.
    """
    seen = torch.zeros(num_classes, dtype=torch.int64)
    chosen: list[tuple[Tensor, Tensor]] = []
    for inputs, labels in batches:
        there = labels.cpu()
        if bool(((there < 0) | (there >= num_classes)).any()):
            raise ValueError(f"labels reach from {int(there.min())} to {int(there.max())}, but the network has {num_classes} classes")
        earlier = F.one_hot(there, num_classes).cumsum(0).gather(1, there[:, None])[:, 0] - 1  # of the same class in this batch
        keep = (earlier + seen[there] < per_class).to(labels.device)
        chosen.append((inputs[keep], labels[keep]))
        seen += torch.bincount(there, minlength=num_classes)
        if int(seen.min()) >= per_class:
            break
    if int(seen.min()) < per_class:
        few = f"{int(seen.min())} training samples of class {int(seen.argmin())}"
        raise ValueError(f"there are {few}, but samples_per_class is {per_class}: lower it")
    inputs, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    order = labels.argsort(stable=True)
    return inputs[order], labels[order]


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class RandomPruning(MaskCallback):
    """Draws a random mask before training, with a density for each layer, and keeps it: static sparse training.

    ``snip``, ``grasp`` and ``global_magnitude`` let the scores of all layers compete; only the shares of the layers are used, and the
    positions are random, unless ``positions`` is ``score``: that is the baseline, SNIP and GraSP themselves.

    Runs: as :class:`MaskCallback`. SNIP and GraSP take one batch of the training data on rank 0, in a copy of the module in training mode:
    its weights, running statistics, hooks, the loader's place and the generators of random numbers are as before. Data sets that carry a
    generator of their own are read once more. Scores are computed in float32 or wider.

    Saves: what :class:`MaskCallback` saves, the wanted densities and the gradient norm of the first step.

    Refuses: what :class:`MaskCallback` refuses; with SNIP and GraSP, modules without (B, classes) logits and batches without (B,) labels.

    Args:
        density: Share of the chosen weights that is kept, in (0, 1]; 0.05 is 95 % sparsity.
        method: Densities by shape: ``uniform``, ``uniform_plus`` (first layer dense, last one at least ``last_density``), ``er``, ``erk``,
            ``erk_plus`` (last layer at ``last_density``); by one batch: ``snip``, ``grasp``; by the initial weights: ``global_magnitude``.
        positions: ``random``, or ``score``: keep the positions that the scores of ``snip``, ``grasp`` or ``global_magnitude`` choose.
        exact: Keep the exact count in every layer; False: each entry by itself, as in the paper, so that densities vary a little.
        power: Exponent of the ratios of ``er``, ``erk`` and ``erk_plus``.
        last_density: Density of the classifier, for the plus methods; null: 0.2 for ``uniform_plus``, 1 for ``erk_plus``.
        exact_budget: ``uniform_plus`` meets the density; False: as in the authors' code, which misses it a little.
        first_layer: Name of the first layer for ``uniform_plus``; null: the first of the chosen ones.
        last_layer: Name of the classifier for the plus methods; null: the last of the chosen ones.
        samples_per_class: Samples of each class in GraSP's batch.
        temperature: GraSP divides logits by it.
        redraw: SNIP draws the weights of its copy anew (Xavier normal) first, as in the authors' code; training weights stay.
        logits: Method or submodule that maps the inputs of a batch to (B, classes) logits; ``forward``: the module itself.
        inputs: Key or position of the inputs in a batch; null: ``image``, or 0.
        labels: Key or position of the labels; null: ``label``, or 1.
        targets: Patterns of the modules to mask, as ``skip``, ``seed``, ``mask_gradients`` and ``mask_optimizer_state`` in
            :class:`MaskCallback`.

    Raises:
        ValueError: An argument outside its range; at fit start, data that SNIP or GraSP can't use.
        TypeError: In ``setup``, SNIP or GraSP find no logits.
    """

    artifact, kept = "random_pruning_masks{where}", {"layer_densities": "layer_densities", "gradient_norm": "_gradient_norm"}
    stream = "random_pruning"
    panels: ClassVar[tuple[Panel, ...]] = (
        TablePanel("Density per layer", "random_pruning/layers", note="Wanted, and as drawn. A layer near 0 cuts the network."),
        Curve("Density of the random masks", ("random_pruning/density",), note="Constant: the masks stay."),
        Curve("Gradient norm at initialisation", ("random_pruning/gradient_norm_at_init",), note="Compare between methods; near 0 is bad."),
    )

    def __init__(
        self,
        density: float,
        method: Method = "erk",
        positions: Literal["random", "score"] = "random",
        exact: bool = False,
        power: float = 1.0,
        last_density: float | None = None,
        exact_budget: bool = True,
        first_layer: str | None = None,
        last_layer: str | None = None,
        samples_per_class: int = 25,
        temperature: float = 200.0,
        redraw: bool = True,
        logits: str = "forward",
        inputs: Key = None,
        labels: Key = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip, seed, mask_gradients, mask_optimizer_state)
        checks.within("(0, 1]", "a share", density=density, last_density=last_density)
        checks.literals(RandomPruning, locals())
        checks.at_least(1, "a number of samples", samples_per_class=samples_per_class)
        checks.positive(temperature=temperature)
        checks.at_least(0, power=power)
        if positions == "score" and method not in REMOVED:
            raise ValueError(f"positions='score' needs scores, which {method!r} has not: choose {', '.join(REMOVED)}, or 'random'")
        self.density, self.method, self.positions, self.exact, self.power = density, method, positions, exact, power
        self.last_density, self.exact_budget, self.first_layer, self.last_layer = last_density, exact_budget, first_layer, last_layer
        self.samples_per_class, self.temperature, self.redraw = samples_per_class, temperature, redraw
        self.logits, self.inputs, self.labels = logits, inputs, labels
        self.layer_densities: dict[str, float] = {}  # wanted; on rank 0
        self._gradient_norm: Tensor | None = None

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        by_score = {"snip": "gradient", "grasp": "gradient", "global_magnitude": "magnitude"}
        return SparsityCard(
            stage="before",
            regime="sparse_to_sparse",
            mask="static",
            layerwise="global" if self.method == "global_magnitude" else self.method,
            criterion=by_score[self.method] if self.positions == "score" else "random",  # type: ignore[arg-type]
            cost="static",
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights, and refuse what can't work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.method in ("snip", "grasp"):
            who = f"{type(self).__name__} with method={self.method!r}"
            self.when_built(pl_module, lambda: require_logits(pl_module, self.logits, who))

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter]) -> None:
        """As mask callbacks; first and last layer must be among the weights."""
        super().check(trainer, pl_module, weights)
        with checks.naming(type(self).__name__):
            self._ends(list(weights))

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first gradients are still to come."""
        self._gradient_norm = None

    def _ends(self, names: Sequence[str]) -> dict[str, int | None]:
        """Places of the first and the last layer among the weights, where they are named."""
        ends: dict[str, int | None] = {}
        for end, layer in (("first", self.first_layer), ("last", self.last_layer)):
            found = [index for index, name in enumerate(names) if layer in (name, name.rpartition(".")[0])]
            if layer is not None and not found:
                raise ValueError(f"{end}_layer is {layer!r}, which is none of the masked layers: {', '.join(names)}")
            ends[end] = found[0] if found else None
        return ends

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Random at the layers' densities, or where the scores say."""
        if self.method in REMOVED:
            scores, remove = self._scores(trainer, pl_module), REMOVED[self.method]
            shares, sizes = kept_shares(scores, self.density, remove), [score.numel() for score in scores]
            whole = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
            if abs(whole - self.density) > 0.1 * self.density + 2 / sum(sizes):
                why = f"would keep {whole:.1%} of the weights where density is {self.density:.1%}, as that many have the same score"
                way = (
                    "give larger inputs (with maps smaller than kernels most scores are 0), start norms at a scale above 0, or choose a "
                    "method by shape, such as 'erk'"
                )
                raise ValueError(f"method={self.method!r} {why}: {way}")
        else:
            names, shapes = list(weights), [weight.shape for weight in weights.values()]
            options = {name: getattr(self, name) for name in ("power", "last_density", "exact_budget")}
            shares = layer_density(shapes, self.density, self.method, **options, **self._ends(names), names=names)  # type: ignore[arg-type]
        self.layer_densities = dict(zip(weights, shares, strict=True))
        if dead := [name for name, share in self.layer_densities.items() if share * weights[name].numel() < 1]:
            rank_zero_warn(f"RandomPruning: {self.method} leaves {', '.join(dead)} no weight, and the network is cut: raise density")
        if self.positions == "score":
            return dict(zip(weights, kept_masks(scores, self.density, remove), strict=True))
        if not self.exact:
            return {name: random_mask(weights[name].shape, share, self.generator) for name, share in self.layer_densities.items()}
        counts = exact_counts([weight.numel() for weight in weights.values()], shares)
        drawn = {name: torch.rand(weight.shape, generator=self.generator) for name, weight in weights.items()}
        return {name: keep_largest(score, count) for (name, score), count in zip(drawn.items(), counts, strict=True)}

    def _scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
        """Scores of the chosen weights, in a copy of the module."""
        if self.method == "global_magnitude":
            return layer_scores(torch.clone, list(self.store.weights.values()), None, None, "global_magnitude")
        # scoring takes random numbers (dropout, augmentation) and may use kernels without second derivatives
        with isolate_rng(pl_module.device.type == "cuda"), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(self.seed)
            twin = independent_copy(trainer, pl_module)
            copies = plain_parameters(twin)
            weights = [copies[name].requires_grad_() for name in self.store.weights]
            batches = (inputs_and_labels(batch, self.inputs, self.labels) for batch in training_batches(trainer))
            first = next(batches, None)
            if first is None:
                raise ValueError(f"method={self.method!r} needs a training batch, but the training data are empty")
            if self.method == "grasp":
                with torch.no_grad():
                    classes = logits_of(independent_copy(trainer, pl_module), self.logits, first[0]).shape[1]
                inputs, labels = balanced_batch(chain([first], batches), self.samples_per_class, classes)
            else:
                inputs, labels = first
                if self.redraw:
                    self._redraw(weights)
            method: ScoreMethod = "snip" if self.method == "snip" else "grasp"
            return layer_scores(lambda x: logits_of(twin, self.logits, x), weights, inputs, labels, method, self.temperature)

    @torch.no_grad()
    def _redraw(self, weights: Sequence[Tensor]) -> None:
        """Xavier normal, the same on every machine."""
        generator = torch.Generator().manual_seed(own_seed("random_pruning", self.seed) + 1)
        for weight in weights:
            weight.copy_(nn.init.xavier_normal_(torch.empty(weight.shape), generator=generator))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Mask gradients; at the first step, take their norm."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._gradient_norm is None:
            mask_of = {id(weight): self.store.masks[name] for name, weight in self.store.weights.items()}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
            squares = [(p.grad.detach().float() * mask_of.get(id(p), 1)).square().sum() for p in parameters]
            self._gradient_norm = torch.stack([square.to(pl_module.device) for square in squares]).sum().sqrt()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log density and the first step's gradient norm."""
        norm = {} if self._gradient_norm is None else {"random_pruning/gradient_norm_at_init": self._gradient_norm}
        log_global(pl_module, {"random_pruning/density": self.store.density(), **norm}, batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the layers."""
        if not self.store.masks:
            return {}
        rows = []
        for name, (kept, number) in self.store.counts().items():
            shape = " x ".join(map(str, self.store.weights[name].shape))
            rows.append((name, shape, number, self.layer_densities.get(name), kept / number, kept))
        return {"random_pruning/layers": TableMedia(("layer", "shape", "weights", "wanted density", "density", "kept"), tuple(rows))}
