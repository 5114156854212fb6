"""Random search as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.random_search.core`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_methods import checks, distributed
from lit_methods.callbacks.batch import Key, inputs_and_labels, logits_of, require_logits
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.channels import ChannelGroup, node_groups, node_masks, removed_entries
from lit_methods.callbacks.sparsity.masks import random_mask
from lit_methods.callbacks.sparsity.random_search import core
from lit_methods.callbacks.targets import plain_modules, plain_parameters, refuse_lazy
from lit_methods.callbacks.twin import independent_copy, training_batches
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="random_search",
    short="Random Search",
    title="Random Search as a Baseline for Sparse Neural Network Architecture Search",
    arxiv="2403.08265",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.RandomSearch",),
    configs=("random_search.yaml",),
    golden=("node_search", "best_so_far", "neutral_test"),
    claim="With half of the hidden nodes removed, a random sub-network ends at most one point of accuracy below the best of 100 by initial "
    "loss.",
    summary="Draws many random sub-networks by removing nodes, scores each before training, and trains the best; with its two baselines.",
)

Score = Literal["loss", "accuracy", "gradient_norm", "synflow"]
_BATCHES = "RandomSearch takes scoring batches"
_SHOWN = 20  # bars of the histogram


class RandomSearch(MaskCallback):
    """Trains the best of many random sub-networks, chosen by their loss before any training: what a search must beat.

    Candidates keep the weights of the start, and so does the chosen one: only the masks differ. ``mode`` makes the arms to compare with:
    ``random`` is a candidate that nobody scored, ``dense`` the parent network.

    Runs: as :class:`MaskCallback`. Nodes are outputs of linear layers and channels of convolutions, with the rows and columns of the
    weights that make and read them; which of them can go is traced with one batch (extra ``sparsity``, Torch-Pruning): in a transformer
    these are the hidden nodes of its MLPs. Inputs and outputs of the network stay. Candidate t follows from ``seed`` and t alone. Ranks
    share the candidates, and score them on rank 0's batches, in float32 or wider, in a copy of the module: dropout is off, batch norms use
    the batch's statistics. A resumed run, and a second fit, take the masks as they are and don't search again.

    Saves: what :class:`MaskCallback` saves, and the scores of all candidates.

    Refuses: what :class:`MaskCallback` refuses; modules without (B, classes) logits and batches without (B,) labels, unless ``mode`` is
    ``dense`` or no nodes are removed and nothing is scored.

    Args:
        sparsity: Share of the nodes that goes in each hidden layer (of the weights of each layer, where ``space`` is ``weight``), in
            [0, 1). At least one node stays. The share of the *parameters* that goes is larger, and logged.
        mode: ``search``, ``random`` or ``dense``.
        candidates: How many are drawn and scored.
        space: ``node``, or ``weight``: single weights go, at the same density in each layer.
        score: What the best candidate has least of: ``loss`` (mean cross-entropy), ``accuracy`` (most of it), ``gradient_norm`` (most: of
            the kept weights), ``synflow`` (most: the sum of |w dR/dw| without data).
        batches: Training batches that score: as a first epoch would bring them.
        halving_steps: 0: every candidate is scored once, untrained. Else rounds: each candidate trains so many steps (twice as many in each
            further round) from the start, the better half goes on.
        halving_rate: Adam's learning rate in these rounds.
        logits: Method or submodule that maps the inputs of a batch to (B, classes) logits; ``forward``: the module itself.
        inputs: Key or position of the inputs in a batch; null: ``image``, or 0.
        labels: Key or position of the labels; null: ``label``, or 1.
        targets: Patterns of the modules to mask, as ``skip``, ``seed``, ``mask_gradients`` and ``mask_optimizer_state`` in
            :class:`MaskCallback`. Nodes that a module left out takes part in stay.

    Raises:
        ValueError: An argument outside its range; at fit start, data that can't score, or no hidden node that can be removed.
        TypeError: In ``setup``, no logits are found.
        ImportError: Torch-Pruning is missing, where nodes are removed.
    """

    artifact, stream, on_all_ranks = "random_search_masks{where}", "random_search", True
    kept: ClassVar[Mapping[str, str]] = {"scores": "scores", "nodes": "nodes", "parameters": "parameters", "passes": "passes"}
    panels: ClassVar[tuple[Panel, ...]] = (
        TablePanel("The search", "random_search/search", note="The best so far falls fast, then hardly: more candidates buy little."),
        HistogramPanel("Scores of all candidates", "random_search/scores", note="Narrow: there is little to search for."),
        TablePanel("Nodes per layer", "random_search/layers"),
        Curve("Density of the masks", ("random_search/density",), note="Of the masked weights; constant."),
    )

    def __init__(
        self,
        sparsity: float = 0.5,
        mode: Literal["search", "random", "dense"] = "search",
        candidates: int = 100,
        space: Literal["node", "weight"] = "node",
        score: Score = "loss",
        batches: int = 1,
        halving_steps: int = 0,
        halving_rate: float = 1e-3,
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
        checks.within("[0, 1)", "a share", sparsity=sparsity)
        checks.literals(RandomSearch, locals())
        checks.at_least(1, "a whole number", candidates=candidates, batches=batches)
        checks.at_least(0, "optimiser steps", halving_steps=halving_steps)
        checks.positive(halving_rate=halving_rate)
        self.sparsity, self.mode, self.number, self.space, self.score = sparsity, mode, candidates, space, score
        self.batches, self.halving_steps, self.halving_rate = batches, halving_steps, halving_rate
        self.logits, self.inputs, self.labels = logits, inputs, labels
        self.scores: Tensor = torch.empty(0)  # (T,), lower is better; empty without a search
        self.nodes: dict[str, tuple[int, int]] = {}  # layer -> nodes that stay, and all
        self.parameters: tuple[int, int] = (0, 0)  # of the module: effective, and all
        self.passes = 0  # forward passes of the search, over all ranks

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        criterion: Literal["random", "gradient"] = "random" if self.mode == "random" or self.score in ("loss", "accuracy") else "gradient"
        return SparsityCard(
            stage="before", regime="sparse_to_sparse", mask="static", layerwise="uniform", criterion=criterion, cost="static"
        )

    @property
    def _draws(self) -> bool:
        return self.mode != "dense" and self.sparsity > 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights, and refuse what can't work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._draws:
            self.when_built(pl_module, lambda: refuse_lazy(pl_module, "RandomSearch"))
            if self.space == "node" or self.mode == "search":
                self.when_built(pl_module, lambda: require_logits(pl_module, self.logits, "RandomSearch"))

    # ---- the search --------------------------------------------------------------------------------------------------------------------

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Draw, score and choose."""
        self.scores, self.nodes, self.passes = torch.empty(0), {}, 0
        dense = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        self.parameters = (total, total)
        if not self._draws:
            return dense
        with isolate_rng(pl_module.device.type == "cuda"), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(own_seed("random_search score", self.seed))
            twin: Any = independent_copy(trainer, pl_module)
            twin.trainer = None  # what is copied again shouldn't copy it
            data = self._data(trainer, pl_module) if self.space == "node" or self.mode == "search" else []
            groups = self._groups(twin, data[0][0], weights) if self.space == "node" else []
            drawn = _Drawn(dense, groups, self.sparsity, self.seed, plain_modules(twin))
            if self.mode == "search":
                self._search(twin, data, drawn, pl_module)
                place = int(core.best_so_far(self.scores)[1][-1])
                rank_zero_info(f"RandomSearch: candidate {place} of {self.number} has the best {self.score}: {self._told_score(place):.4g}")
            else:
                place = self.number  # the one after those of a search with this seed: it was never scored
            self._count(pl_module, drawn, place)
            return dense | drawn.masks(place)

    def _data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of rank 0's first batches, on every rank."""
        found: Any = None
        if distributed.rank() == 0:
            way = "mode='dense', or space='weight' with mode='random', need none"
            batches = islice(training_batches(trainer, _BATCHES, way), self.batches)
            found = [tuple(part.cpu() for part in inputs_and_labels(batch, self.inputs, self.labels)) for batch in batches]
        found = distributed.broadcast_object(found)
        if not found:
            raise ValueError("RandomSearch needs a training batch to score candidates, but the training data are empty")
        dtype = torch.promote_types(next(pl_module.parameters()).dtype, torch.float32)
        moved = [move_data_to_device(batch, pl_module.device) for batch in found]
        return [(inputs.to(dtype) if inputs.is_floating_point() else inputs, labels) for inputs, labels in moved]

    def _groups(self, twin: nn.Module, inputs: Tensor, weights: Mapping[str, nn.Parameter]) -> list[ChannelGroup]:
        """Hidden nodes that can go, all of whose layers are among the chosen weights."""
        modules = plain_modules(twin)
        groups, left = node_groups(twin, inputs[:4], lambda net, x: logits_of(net, self.logits, x))
        chosen = []
        for group in groups:
            layers = [part.module for part in group.parts if _is_matrix(modules[part.module])]
            outside = [name for name in layers if f"{name}.weight" not in weights]
            if outside:
                left[outside[0]] = "targets, skip or the optimisers leave it out"
            else:
                chosen.append(group)
        if not chosen:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
            raise ValueError(f"RandomSearch finds no hidden nodes that can be removed ({reasons}): take space='weight', or other targets")
        if left:
            rank_zero_info(f"RandomSearch leaves nodes alone: {'; '.join(f'{name} ({why})' for name, why in left.items())}")
        return chosen

    def _search(self, twin: nn.Module, data: list[tuple[Tensor, Tensor]], drawn: "_Drawn", pl_module: pl.LightningModule) -> None:
        """Score the candidates, each rank its share, and let halves go on where rounds are wanted."""
        twin.train(False)
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                module.train()  # the batch's statistics: those of the start mean nothing, and the copy's are thrown away
        own = plain_parameters(twin)
        begin = {name: value.detach().clone() for name, value in own.items()}
        start = {name: begin[name] for name in drawn.dense}
        racing, steps = list(range(self.number)), self.halving_steps
        self.scores = torch.full((self.number,), torch.inf)  # of those that have left the race
        while True:
            mine = racing[distributed.rank() :: distributed.world_size()]

            def score(values: Mapping[str, Tensor], steps: int = steps) -> Tensor:
                with torch.no_grad():
                    for name, value in own.items():
                        value.copy_(values.get(name, begin[name]))
                if steps:
                    self._train(twin, data, [own[name] for name in values], steps)
                return self._score(twin, data, [own[name] for name in values])

            found = core.candidate_scores(start, (drawn.masks(place) for place in mine), score) if mine else torch.empty(0)
            rows = torch.stack([torch.tensor(mine, dtype=torch.float64), found.cpu().double()], dim=1)
            together = distributed.gather_rows(rows.to(pl_module.device), with_grad=False).cpu()
            self.scores.fill_(torch.inf)[together[:, 0].long()] = together[:, 1].to(self.scores.dtype)
            self.passes += len(racing) * (len(data) + steps)
            if not steps or len(racing) <= 2:
                break
            racing, steps = core.fewer(self.scores, racing), 2 * steps
        if not bool(self.scores[racing].isfinite().all()):
            raise ValueError(f"RandomSearch: a candidate's {self.score} isn't finite: look at the inputs, or choose another score")

    def _train(self, twin: nn.Module, data: list[tuple[Tensor, Tensor]], weights: list[Tensor], steps: int) -> None:
        """Some steps of Adam on the scoring batches in turn; what is 0 stays 0."""
        masks = [(weight, weight != 0) for weight in weights]
        optimizer = torch.optim.Adam(twin.parameters(), lr=self.halving_rate)
        for step in range(steps):
            inputs, labels = data[step % len(data)]
            optimizer.zero_grad()
            F.cross_entropy(logits_of(twin, self.logits, inputs), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, mask in masks:
                    weight.mul_(mask)

    def _score(self, twin: nn.Module, data: list[tuple[Tensor, Tensor]], weights: list[Tensor]) -> Tensor:
        """Scalar, lower is better; in float32 or wider."""
        if self.score == "synflow":
            signs = [parameter.detach().sign() for parameter in twin.parameters()]
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.abs_()
            flow = logits_of(twin, self.logits, torch.ones_like(data[0][0][:1])).sum()
            scores = [weight * gradient for weight, gradient in zip(weights, torch.autograd.grad(flow, weights), strict=True)]
            with torch.no_grad():
                for parameter, sign in zip(twin.parameters(), signs, strict=True):
                    parameter.mul_(sign)
            return -torch.stack([part.detach().double().sum() for part in scores]).sum()
        if self.score == "gradient_norm":
            loss = torch.stack([F.cross_entropy(logits_of(twin, self.logits, inputs), labels) for inputs, labels in data]).mean()
            gradients = torch.autograd.grad(loss, weights)
            kept = [gradient * (weight != 0) for gradient, weight in zip(gradients, weights, strict=True)]
            return -torch.stack([part.double().square().sum() for part in kept]).sum().sqrt()
        with torch.no_grad():
            outputs = [(logits_of(twin, self.logits, inputs), labels) for inputs, labels in data]
            if self.score == "accuracy":
                return -torch.cat([(logits.argmax(1) == labels).double() for logits, labels in outputs]).mean()
            return torch.cat([F.cross_entropy(logits, labels, reduction="none") for logits, labels in outputs]).mean()

    def _count(self, pl_module: pl.LightningModule, drawn: "_Drawn", place: int) -> None:
        """Nodes and parameters that are left."""
        masks, removed = drawn.masks(place), drawn.removed(place)
        for group, keep in drawn.keep(place):
            layers = [part.module for part in group.parts if part.side == "out" and _is_matrix(drawn.modules[part.module])]
            self.nodes |= dict.fromkeys(layers, (int(keep.sum()), len(keep)))
        named = plain_parameters(pl_module)
        owner = {name: (name.rpartition(".")[0], "out") for name, value in named.items() if value.ndim == 1}
        vectors = {name: ~removed[place] for name, place in owner.items() if place in removed and len(removed[place]) == len(named[name])}
        total = sum(value.numel() for value in named.values())
        whole = sum(value.numel() for name, value in named.items() if name not in masks and name not in vectors)
        self.parameters = (core.effective_parameters(masks.values(), vectors.values()) + whole, total)
        if dead := [name for name, mask in masks.items() if not mask.any()]:
            rank_zero_warn(f"RandomSearch leaves {', '.join(dead)} no weight, and the network is cut: lower sparsity")

    # ---- what it shows -----------------------------------------------------------------------------------------------------------------

    def _told_score(self, place: int) -> float:
        """As a user reads it: losses as they are, the others, which count negative, with their own sign."""
        value = float(self.scores[place])
        return value if self.score == "loss" else -value

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log densities, and what the search found."""
        effective, total = self.parameters
        figures: dict[str, Any] = {"density": self.store.density(), "parameter_sparsity": 1 - effective / max(total, 1)}
        if self.nodes:
            kept, nodes = (sum(numbers) for numbers in zip(*self.nodes.values(), strict=True))
            figures["node_sparsity"] = 1 - kept / nodes
        if len(self.scores):
            finite = self.scores[self.scores.isfinite()]
            sign = 1 if self.score == "loss" else -1
            figures |= {"best_score": sign * float(finite.min()), "mean_score": sign * float(finite.mean()), "forward_passes": self.passes}
        log_global(pl_module, {f"random_search/{name}": value for name, value in figures.items()}, batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """The course of the search, its scores, and the layers."""
        media: dict[str, Media] = {}
        if self.nodes:
            rows = tuple((name, kept, nodes, 1 - kept / nodes) for name, (kept, nodes) in self.nodes.items())
            media["random_search/layers"] = TableMedia(("layer", "nodes kept", "nodes", "node sparsity"), rows)
        if len(self.scores):
            finite = self.scores[self.scores.isfinite()].double().numpy()
            counts, edges = np.histogram(finite if self.score == "loss" else -finite, bins=min(_SHOWN, len(finite)))
            media["random_search/scores"] = HistogramMedia(counts, edges)
            places = core.best_so_far(self.scores)[1].tolist()
            steps = [(place, self._told_score(place)) for place in dict.fromkeys(places)]
            media["random_search/search"] = TableMedia(("candidate", f"best {self.score} so far"), tuple(steps))
        return media


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


class _Drawn:
    """The candidates: each follows from the seed and its number, so that none has to be kept."""

    def __init__(
        self, dense: Mapping[str, Tensor], groups: Sequence[ChannelGroup], sparsity: float, seed: int, modules: Mapping[str, nn.Module]
    ) -> None:
        self.dense, self.groups, self.sparsity, self.seed, self.modules = dense, groups, sparsity, seed, modules

    def keep(self, place: int) -> Iterator[tuple[ChannelGroup, Tensor]]:
        """Each group with the nodes that stay."""
        generator = torch.Generator().manual_seed(own_seed(f"random_search {place}", self.seed))
        for group in self.groups:
            yield group, core.random_nodes(group.channels, self.sparsity, generator)

    def removed(self, place: int) -> Mapping[Any, Tensor]:
        """Module and side -> what goes."""
        return removed_entries(self.keep(place))

    def masks(self, place: int) -> dict[str, Tensor]:
        """Name -> mask of every weight that isn't whole."""
        if self.groups:
            found = node_masks(self.modules, self.removed(place))
        else:
            generator = torch.Generator().manual_seed(own_seed(f"random_search {place}", self.seed))
            found = {name: random_mask(mask.shape, 1 - self.sparsity, generator, exact=True) for name, mask in self.dense.items()}
        device = next((p.device for module in self.modules.values() for p in module.parameters(recurse=False)), torch.device("cpu"))
        return {name: mask.to(device) for name, mask in found.items()}
