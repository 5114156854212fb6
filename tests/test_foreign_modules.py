"""Every public callback on modules that nobody here wrote: what works, what is refused, what is wrong. docs/foreign_modules.md shows it.

``python tests/test_foreign_modules.py`` writes the page's tables. Each cell is a short training, and ends in one of three ways:

- ``works``: the loss stays finite, the module is afterwards what it is without the callback, and what the callback promises holds.
- ``refuses``: an error before the first optimiser step that names the callback, in three lines at most.
- ``wrong``: anything else. Those that are known stand in ``WRONG``, with the reason, and must stay wrong: a mend shows.
"""

import functools
import importlib
import inspect
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foreign import CLASSES, FOREIGN, Foreign, Items
from helpers import cloned_state, tiny_trainer
from helpers import fingerprint as whole_fingerprint
from lit_methods import LabelStore
from lit_methods.callbacks import (
    ADELE,
    CAST,
    DSL,
    FDS,
    TCM,
    AdaWAC,
    ConR,
    Dashboard,
    DynamicSparsity,
    EMARemoval,
    EMATeacher,
    ExactResume,
    FeatureProbe,
    FiniteGuard,
    GroupSparsity,
    IterativeSoftShrinkage,
    LossTerm,
    MaskedBNSparsity,
    MultiScaleConsistency,
    NMSparsity,
    Preemption,
    RandomPruning,
    Reliability,
    SparseIFT,
    SparsityReport,
    StepCost,
    TwoTowerConsistency,
    WeightEMA,
)
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.catalog import public_names

PAGE = Path(__file__).resolve().parents[1] / "docs" / "foreign_modules.md"
STEPS = 3
REFUSALS_ARE = (ValueError, TypeError, RuntimeError, ImportError)


# ---- the columns -----------------------------------------------------------------------------------------------------------------------


class Shrink(LossTerm):
    """The smallest loss term: features are to be small."""

    def term(self, inputs: dict[str, Any]) -> Tensor:
        outputs = inputs["features"][self.targets[0]]
        features = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values() if hasattr(outputs, "values") else outputs))
        return features.square().mean()


def adawac(foreign: Foreign) -> pl.Callback:
    assert foreign.index is not None
    if foreign.views:
        return AdaWAC(foreign.logits, foreign.features, index=foreign.index)
    return AdaWAC(foreign.logits, "", [foreign.inputs] * 2, [foreign.labels or 1] * 2, foreign.index, mode="base")


def adele(foreign: Foreign) -> pl.Callback:
    samples = foreign.samples()
    store = LabelStore.create(tempfile.mkdtemp(), [sample["label"].numpy().astype(np.uint8) for sample in samples])
    pictures = [{"image": sample["image"], "index": sample["index"]} for sample in samples]
    loader = torch.utils.data.DataLoader(Items(pictures), batch_size=4)
    return ADELE(CLASSES, foreign.logits, eval_interval=1, common_epoch=1, scales=(1.0,), store=store, loader=loader)


def cast(foreign: Foreign) -> pl.Callback:
    taught: dict[str, Any] = {"distill": foreign.logits} if foreign.logits and foreign.adam else {"distill_weight": 0.0}
    steps = {"total_steps": STEPS} if foreign.steps > 1 else {}
    return CAST(2, 4, targets=foreign.sparse, mask_interval=1, probe_interval=1, update=None if foreign.adam else "adam", **taught, **steps)


def snip(foreign: Foreign) -> pl.Callback:
    words = {"logits": foreign.logits, "inputs": foreign.inputs, "labels": foreign.labels, "targets": foreign.sparse}
    return RandomPruning(0.5, "snip", "score", exact=True, samples_per_class=1, **words)


@dataclass(frozen=True)
class Column:
    """A callback and what it promises.

    Attributes:
        build: Makes it, with arguments that suit the module.
        kind: ``watches``: the weights end as they do without it; ``term``: it has a loss of its own, which is logged and changes the
            weights; ``changes`` and ``averages``: it changes them otherwise; ``masks``: weights stay 0; ``moves``: masks that move;
            ``n:m``: two weights of four; ``layers``: masks that move, of layers that it puts in place of the module's.
        needs: Attributes of :class:`Foreign` that it can't do without.
    """

    build: Callable[[Foreign], pl.Callback]
    kind: str
    needs: tuple[str, ...] = ()


COLUMNS: dict[str, Column] = {
    "LossTerm": Column(lambda foreign: Shrink([foreign.features], weight=0.5), "term", ("features",)),
    "TCM": Column(lambda foreign: TCM(foreign.features, foreign.labels, 1.0, -1.0), "term", ("features", "labels")),
    "ConR": Column(
        lambda foreign: ConR(foreign.features, foreign.predictions, foreign.labels), "term", ("features", "predictions", "labels")
    ),
    "FDS": Column(
        lambda foreign: FDS(foreign.features, foreign.inputs, foreign.labels, last_bucket=5, bucket_width=2.0),
        "changes",
        ("predictions", "labels"),
    ),
    "AdaWAC": Column(adawac, "term", ("logits", "labels", "index")),
    "MultiScaleConsistency": Column(
        lambda foreign: MultiScaleConsistency(foreign.logits, foreign.inputs, foreign.labels), "term", ("logits", "labels", "pictures")
    ),
    "ADELE": Column(adele, "watches", ("views",)),
    "TwoTowerConsistency": Column(lambda foreign: TwoTowerConsistency(*foreign.towers, second_image=None), "term", ("towers",)),  # type: ignore[misc]
    "EMATeacher": Column(lambda foreign: EMATeacher(decay=0.9), "watches"),
    "WeightEMA": Column(lambda foreign: WeightEMA(0.9), "averages"),
    "EMARemoval": Column(lambda foreign: EMARemoval(foreign.student, foreign.teacher), "changes", ("student", "teacher")),
    "Reliability": Column(
        lambda foreign: Reliability(foreign.logits, foreign.inputs, foreign.labels), "watches", ("logits", "labels", "validates")
    ),
    "FeatureProbe": Column(
        lambda foreign: FeatureProbe(foreign.logits, foreign.inputs, foreign.labels), "watches", ("logits", "labels", "validates")
    ),
    "RandomPruning": Column(lambda foreign: RandomPruning(0.5, exact=True, targets=foreign.sparse), "masks"),
    "RandomPruning, SNIP": Column(snip, "masks", ("logits", "labels")),
    "DynamicSparsity": Column(lambda foreign: DynamicSparsity(0.5, "rigl", interval=1, end_fraction=1.0, targets=foreign.sparse), "moves"),
    "DSL": Column(lambda foreign: DSL(0.5, interval=1, targets=foreign.sparse), "moves"),
    "IterativeSoftShrinkage": Column(lambda foreign: IterativeSoftShrinkage(0.5, prune_iters=2, targets=foreign.sparse), "masks"),
    "NMSparsity": Column(lambda foreign: NMSparsity(2, 4, "ste", targets=foreign.sparse), "n:m"),
    "CAST": Column(cast, "n:m"),
    "MaskedBNSparsity": Column(
        lambda foreign: MaskedBNSparsity(
            "global_sparsity", forward=foreign.trace, inputs=foreign.inputs, input_shape=foreign.shape, lambda_=0.01
        ),
        "changes",
        ("norms",),
    ),
    "SparseIFT": Column(lambda foreign: SparseIFT(0.5, "wide", "rigl", interval=1, end_fraction=1.0, flops_tolerance=None), "layers"),
    "GroupSparsity": Column(lambda foreign: GroupSparsity(foreign.sparse, weight=1.0), "changes"),
    "SparsityReport": Column(lambda foreign: SparsityReport(), "watches"),
    "StepCost": Column(lambda foreign: StepCost(1, flops=True), "watches"),
    "Dashboard": Column(lambda foreign: Dashboard(), "watches"),
    "ExactResume": Column(lambda foreign: ExactResume(), "watches"),
    "FiniteGuard": Column(lambda foreign: FiniteGuard(), "watches"),
    "Preemption": Column(lambda foreign: Preemption(), "watches"),
}
PARTS: dict[str, tuple[str, ...]] = {
    "Loss terms, features and labels": (
        "LossTerm",
        "TCM",
        "ConR",
        "FDS",
        "AdaWAC",
        "MultiScaleConsistency",
        "ADELE",
        "TwoTowerConsistency",
    ),
    "Averages, evaluation and runs": (
        "EMATeacher",
        "WeightEMA",
        "EMARemoval",
        "Reliability",
        "FeatureProbe",
        "StepCost",
        "Dashboard",
        "ExactResume",
        "FiniteGuard",
        "Preemption",
    ),
    "Sparsity": (
        "RandomPruning",
        "RandomPruning, SNIP",
        "DynamicSparsity",
        "DSL",
        "IterativeSoftShrinkage",
        "NMSparsity",
        "CAST",
        "MaskedBNSparsity",
        "SparseIFT",
        "GroupSparsity",
        "SparsityReport",
    ),
}
"""Tables of the page: heading -> columns."""
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        ("Magnitude", "Wanda", "SparseGPT", "DSnoT"),
        "it prunes linear layers alone, from calibration data; tests/callbacks/sparsity/test_post_training.py has it on such modules",
    ),
    **dict.fromkeys(
        ("S2FT", "SaRA", "LoRA"),
        "it fine-tunes pretrained models and freezes what it doesn't train; tests/callbacks/fine_tuning has it on transformers and others",
    ),
    **dict.fromkeys(
        ("LossRecovered", "SupervisedDictionaryEval"),
        "it judges sparse autoencoders; tests/callbacks/sparse_autoencoders has it on plain modules with encode and decode",
    ),
    "SSVI": "it converts layers or names those that it can't; tests/bayes has it on a ResNet, a ViT and a text model, and others refused",
    "ScorePruning": "it parametrises as NMSparsity does; tests/callbacks/sparsity/test_score_pruning.py has it on three such modules",
    "RandomSearch": "its masks are those of RandomPruning; test_random_search_technique.py has it on residual convolutions",
    "BilevelTuning": "it solves a strongly convex training to an accuracy; tests/callbacks/bilevel has it on a module that isn't ours",
    "ClipConsistency": "it takes masks of clips; tests/video has it on modules that aren't ours",
    "ContinuousAPLoss": "it ranks lists of similarities; tests/self_supervised has it on a module that isn't ours",
    "FLOPSRegularizer": "it thins out sparse vectors of texts; tests/retrieval has it on a module that isn't ours",
    "UncertaintyRegularizer": "it takes queries and targets of one shape; tests/retrieval has it on modules that aren't ours",
    **dict.fromkeys(
        ("SparseAttentionCallback", "IsoCostReport"),
        "it takes attention layers of transformers; tests/sparse_attention has it on BERT, GPT-2, LLaMA and ViT",
    ),
    "DirectionalConsistency": "it compares what a generator makes with what it was made from; tests/diffusion has it on two others",
    "IMP": "its masks are those of RandomPruning; test_sparse_model_soups_technique.py has it on a ResNet and on tied embeddings",
    "AlternatingLoRAStages": "it switches what its patterns name; tests/restoration/test_dloral_technique.py has it on a plain module",
    "DenseToSparse": "its batches are point clouds with superpixels of cameras",
    **dict.fromkeys(
        ("MaskLabelSpreading", "ReliabilityConsistency"),
        "it takes point clouds; tests/callbacks/lidar has it on modules that aren't ours",
    ),
    "TemporalVoting": "it votes on point clouds of neighbouring scans",
    "LabelCorrection": "a base class; ADELE is the one that can be attached",
    "SampleQuality": "it measures what a validation step draws, which none of these modules does",
    "SampleGrid": "it writes what a prediction step draws, which none of these modules does",
    "SubmissionWriter": "it writes labels of scans through a datamodule of the driving family",
    "ThroughputProgressBar": "it reads the trainer's metrics and nothing of the module",
    **dict.fromkeys(
        ("AFAEvaluation", "BidirectionalityMonitor", "FeatureRecovery", "SteeringProbe"),
        "it judges sparse autoencoders, which none of these modules is; tests of its own attach it to some",
    ),
    "GroupBiasAdaptation": "it moves a buffer of biases, which none of these modules has; tests of its own attach it to some",
}
"""Public callbacks without a column -> why."""
LACKS: dict[str, str] = {
    "features": "no submodule with features",
    "predictions": "nothing that predicts from features",
    "logits": "no logits of its inputs",
    "labels": "no labels",
    "index": "no places of samples in the batch",
    "views": "no masks of two views",
    "pictures": "its network takes no images of any size",
    "student": "no student and teacher",
    "teacher": "no student and teacher",
    "towers": "no two towers",
    "validates": "no validation step",
    "norms": "no batch norms",
}


def lacking(row: str, column: str) -> str:
    """Why a pair makes no sense; "" where it does."""
    foreign = FOREIGN[row]
    return next((LACKS[need] for need in COLUMNS[column].needs if getattr(foreign, need) in ("", None, False)), "")


PAIRS = [(row, column) for row in FOREIGN for column in COLUMNS if not lacking(row, column)]


# ---- what is known ---------------------------------------------------------------------------------------------------------------------


def cells(rows: Iterable[str], columns: Iterable[str], text: str) -> dict[tuple[str, str], str]:
    """The same text for every pair that makes sense."""
    return {(row, column): text for row in rows for column in columns if not lacking(row, column)}


FEATURES = ("LossTerm", "TCM", "ConR", "FDS", "AdaWAC")
MASKS = (
    "RandomPruning",
    "RandomPruning, SNIP",
    "DynamicSparsity",
    "DSL",
    "IterativeSoftShrinkage",
    "NMSparsity",
    "CAST",
)
PLACES = ("transformers BERT, tied", "transformers GPT-2, tied", "segmentation-models Unet")
"""Modules with a label for every token or pixel."""

REFUSES: dict[tuple[str, str], str] = {
    (
        "GAN, two optimisers, manual",
        "LossTerm",
    ): "calls backward itself (automatic_optimization = False): add the term's function",
    ("torchgeo RegressionTask", "TCM"): "TCM needs classes, as integers: name such ones by labels",
    **cells(PLACES, ("TCM",), "expected one value a sample, (B,) or (B, 1): name such ones by labels"),
    **cells(
        PLACES,
        ("Reliability", "FeatureProbe", "RandomPruning, SNIP"),
        "expected one class a sample, (B,) integers; name such ones by labels",
    ),
    **cells(
        ("lightly SimCLR", "lightly BYOL", "lightly MoCo"),
        ("FDS",),
        "FDS: the batch's 0 is a list: expected a tensor; name the key (or position) of one by inputs",
    ),
    ("torchgeo ClassificationTask", "RandomPruning, SNIP"): "start norms at a scale above 0, or choose a method by shape, such as 'erk'",
    **cells(
        ("spectral_norm by hook", "spectral_norm by parametrisation"), ("MaskedBNSparsity",), "no batch norm of Everyday can be pruned"
    ),
    **cells(
        ("lightly BYOL", "lightly MoCo"),
        ("CAST",),
        "if it walks the parameters of the two in parallel, set scale_groups to 0",
    ),
    **cells(("lightly BYOL", "lightly MoCo"), ("SparseIFT",), "it is frozen, and would be drawn anew; transform a submodule that it can"),
    **cells(
        ("transformers BERT, tied", "transformers GPT-2, tied", "transformers CLIP"),
        ("SparseIFT",),
        "Embedding holds weights of its own, whose widths aren't known",
    ),
    ("attention with kdim and vdim", "SparseIFT"): "MultiheadAttention holds weights of its own, whose widths aren't known",
    ("LSTM", "SparseIFT"): "LSTM holds weights of its own, whose widths aren't known",
    (
        "GAN, two optimisers, manual",
        "SparseIFT",
    ): "critic.0 has 22 inputs now and gets 16), as it isn't one network from stem to head: name the network to transform by network",
    **cells(
        ("weight_norm by hook", "spectral_norm by hook", "weight_norm by parametrisation", "spectral_norm by parametrisation"),
        ("SparseIFT",),
        "its weight is parametrised, which must come after the transformation",
    ),
    **cells(("dataloader_iter",), FEATURES, "takes dataloader_iter, which can't be read twice"),
    **cells(
        ("lazy layers",),
        ("EMATeacher", "SparsityReport", "WeightEMA", *MASKS, "GroupSparsity", "SparseIFT"),
        "has no shape yet: run the lazy layers once before fit, on a batch of the right size",
    ),
    **cells(
        ("spectral_norm by hook", "spectral_norm by parametrisation", "weight_norm by hook", "weight_norm by parametrisation"),
        (*MASKS, "GroupSparsity"),
        "take weight_norm and the like off before fit, or name other layers by targets",
    ),
}
"""(row, column) -> part of the refusal."""

WRONG: dict[tuple[str, str], str] = {}
"""(row, column) -> what is wrong, until it is mended."""


# ---- one pair --------------------------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """What a callback did to a module that it mustn't."""


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


class Watch(pl.Callback):
    """Notes whether training stayed finite and how far it came."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held = {id(weight) for optimizer in trainer.optimizers for group in optimizer.param_groups for weight in group["params"]}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(float(loss))


@dataclass
class Run:
    """A trained module, and what was seen of it."""

    module: pl.LightningModule
    trainer: pl.Trainer
    watch: Watch
    start: dict[str, Tensor]


def trained(foreign: Foreign, callback: Callable[[], pl.Callback] | None) -> Run:
    """Three steps; the same weights, data and random numbers each time."""
    pl.seed_everything(1, verbose=False)
    module, watch = foreign.build(), Watch()
    start = {name: value.detach().clone() for name, value in module.named_parameters() if not nn.parameter.is_lazy(value)}
    added = [] if callback is None else [callback()]
    pl.seed_everything(2, verbose=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = tiny_trainer(
            default_root_dir=folder,
            max_steps=STEPS * foreign.steps,
            limit_val_batches=1,
            num_sanity_val_steps=1,  # as everybody's trainer has it
            log_every_n_steps=1,
            callbacks=[*added, watch],
        )
        loader = foreign.loader()
        run = Run(module, trainer, watch, start)
        try:
            trainer.fit(module, loader, loader if foreign.validates else None)
        except Exception as error:
            error.run = run  # type: ignore[attr-defined]
            raise
    return run


@dataclass(frozen=True)
class Plain:
    """What a row is after the same training without a callback."""

    state: dict[str, Tensor]
    traces: dict[str, Any]
    names: list[str]


@functools.cache
def plain(row: str) -> Plain:
    run = trained(FOREIGN[row], None)
    assert all(map(math.isfinite, run.watch.losses)), f"{row} itself doesn't train"
    return Plain(cloned_state(run.module), fingerprint(run.module), [name for name, _ in run.module.named_parameters()])


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """What can be left on a module; classes by name and hooks by number, for a row's ``build`` makes new ones each time."""
    return {
        name: (kind.__qualname__, attributes, [f"{len(ids)} {hook}" for hook, ids in sorted(hooks.items())], *rest)
        for name, (kind, attributes, hooks, *rest) in whole_fingerprint(module).items()
    }


def spelled(found: dict[str, Any], wanted: dict[str, Any], names: list[str]) -> str:
    """What differs between two fingerprints."""
    words = []
    for name in names[:3]:
        if name not in found or name not in wanted:
            words.append(f"{name} {'is gone' if name in wanted else 'is new'}")
            continue
        words += [
            f"{name}: {have}, not {want}"
            for have, want in zip(found[name], wanted[name], strict=True)
            if have != want and not isinstance(have, list)
        ]
        words += [
            f"{name}: {sorted(set(have) ^ set(want)) or have}"
            for have, want in zip(found[name], wanted[name], strict=True)
            if have != want and isinstance(have, list)
        ]
    return "; ".join(words)


def differing(state: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    names = [*state, *(name for name in other if name not in state)]
    return [name for name in names if name not in state or name not in other or not torch.equal(state[name], other[name])]


def effective(module: nn.Module, name: str) -> tuple[str, Tensor]:
    """The weight that a layer computes with, for a parameter that it may be made of: its name and value."""
    owner_name, _, attribute = name.rpartition(".")
    if owner_name.endswith(".parametrizations." + owner_name.rpartition(".")[2]):
        owner_name, _, attribute = owner_name.rpartition(".parametrizations.")[0], "", owner_name.rpartition(".")[2]
    owner = module.get_submodule(owner_name)
    base = re.sub(r"_(v|g|orig)$", "", attribute)
    for hook in owner._forward_pre_hooks.values():
        if hasattr(hook, "compute_weight"):
            hook(owner, ())
    return f"{owner_name}.{base}", getattr(owner, base).detach()


def check_masks(callback: Any, run: Run, names: Iterable[str], kind: str) -> None:
    """Reported and counted density of the weights that layers compute with are equal, and all of them are trained."""
    module = run.module.eval()
    masks: dict[str, Tensor] = callback.sparsity_masks()
    demand(bool(masks), "it reports no masks")
    parameters = dict(module.named_parameters())
    found: dict[str, list[Tensor]] = {}
    for name, mask in masks.items():
        plain_name = next((full for full in parameters if full.replace("_orig_mod.", "") == name.replace("_orig_mod.", "")), None)
        demand(plain_name is not None, f"masks {name}, which is no parameter afterwards")
        assert plain_name is not None
        demand(id(parameters[plain_name]) in run.watch.held, f"masks {name}, which no optimiser trains")
        demand("bias" not in name, f"masks {name}, a bias")
        where, weight = effective(module, plain_name)
        demand(weight.isfinite().all().item(), f"{where} is not finite")
        demand(weight.shape == mask.shape, f"masks {name}, of which {where} is made: the gains")
        demand(where not in found, f"masks two parameters of {where}")
        found[where] = [weight != 0, mask]
        demand(not weight[~mask.to(weight.device)].any().item(), f"removed entries of {where} aren't 0")
        if kind == "n:m":
            dims = [dim for dim in range(2) if weight.shape[dim] % 4 == 0 and is_nm(weight, 2, 4, dim)]
            demand(bool(dims), f"{where} isn't 2:4")
    counted = sum(int(nonzero.sum()) for nonzero, _ in found.values()) / sum(nonzero.numel() for nonzero, _ in found.values())
    reported = sum(int(mask.sum()) for _, mask in found.values()) / sum(mask.numel() for _, mask in found.values())
    grown = reported - counted if kind == "moves" or kind == "layers" else 0.0  # 0 until they are trained
    demand(counted + max(grown, 0.0) == reported, f"reports a density of {reported:.3f}, but {counted:.3f} of the weights aren't 0")
    demand(0.3 < reported < 0.7, f"the density is {reported:.3f}, not one half")


def check(row: str, column: str, callback: Any, run: Run) -> None:
    """What must hold behind a training that ended."""
    foreign, kind = FOREIGN[row], COLUMNS[column].kind
    module, alone, metrics = run.module, plain(row), run.trainer.callback_metrics
    demand(run.trainer.global_step == STEPS * foreign.steps, f"{run.trainer.global_step} steps were made, not {STEPS * foreign.steps}")
    demand(all(map(math.isfinite, run.watch.losses)), f"losses {run.watch.losses}")
    state = cloned_state(module)
    unequal = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    demand(not unequal, f"{unequal[:3]} aren't finite")
    if kind != "layers":
        names = [name for name, _ in module.named_parameters()]
        demand(names == alone.names, f"the parameters have other names or another order: {names[:6]}, not {alone.names[:6]}")
        traces = fingerprint(module)
        left = [name for name in {**traces, **alone.traces} if traces.get(name) != alone.traces.get(name)]
        demand(not left, f"leaves something behind: {spelled(traces, alone.traces, left)}")
    now = dict(module.named_parameters())
    changed = [name for name, value in run.start.items() if name not in now or not torch.equal(now[name], value)]
    demand(bool(changed) or not run.start, "nothing was learned")
    other = differing(state, alone.state)
    if kind == "watches":
        demand(not other, f"the weights end otherwise than without it: {other[:4]}")
    else:
        demand(bool(other), "the weights end as without it")
    if kind == "term":
        loss = metrics.get(f"{callback.name}/loss")
        demand(loss is not None and math.isfinite(float(loss)), f"{callback.name}/loss is {loss}")
    if kind in ("masks", "moves", "n:m", "layers"):
        check_masks(callback, run, alone.names, kind)
    if isinstance(callback, EMATeacher):
        averages = callback.averaged()
        demand({name.replace("_orig_mod.", "") for name in alone.names} <= set(averages), "the teacher lacks parameters")
        demand(all(value.isfinite().all() for value in averages.values() if value.is_floating_point()), "the teacher isn't finite")
    if isinstance(callback, SparsityReport):
        densities = {name: float(value) for name, value in metrics.items() if name == "sparsity/density"}
        demand(densities == {"sparsity/density": 1.0}, f"reports {densities} of a dense module")
    if isinstance(callback, FeatureProbe):
        demand(any(name.startswith("probe/") for name in metrics), f"logs nothing: {list(metrics)}")
    if isinstance(callback, Reliability):
        demand(any(name.startswith("reliability/") for name in metrics), f"logs nothing: {list(metrics)}")


def outcome(row: str, column: str) -> tuple[str, str]:
    """(``works``, ""), (``refuses``, its words) or (``wrong``, what is)."""
    made: list[pl.Callback] = []

    def build() -> pl.Callback:
        made.append(COLUMNS[column].build(FOREIGN[row]))
        return made[0]

    plain(row)  # it must train without it
    try:
        run = trained(FOREIGN[row], build)
    except Exception as error:
        said, ended = str(error), getattr(error, "run", None)
        kind = type(error).__name__
        if ended is None:
            return "wrong", f"can't be made: {kind}: {said}"
        if ended.trainer.global_step or ended.watch.losses:
            return "wrong", f"breaks after {ended.trainer.global_step} steps: {kind}: {said}"
        if not isinstance(error, REFUSALS_ARE) or len(said.splitlines()) > 3:
            return "wrong", f"breaks: {kind}: {said}"
        if not any(re.search(rf"\b{cls.__name__}\b", said.replace("-", "")) for cls in type(made[0]).__mro__[:2]):
            return "wrong", f"refuses without its name: {kind}: {said}"
        wrapped = [name for name in vars(ended.module) if name.endswith("_step")]
        if wrapped:
            return "wrong", f"refuses, but leaves {wrapped} on the module"
        return "refuses", said
    try:
        check(row, column, made[0], run)
    except Wrong as error:
        return "wrong", str(error)
    return "works", ""


# ---- the matrix ------------------------------------------------------------------------------------------------------------------------


def expected(row: str, column: str) -> Any:
    """The parameters of a pair, with the mark of one that is known to be wrong."""
    known = WRONG.get((row, column))
    return pytest.param(row, column, marks=[pytest.mark.xfail(strict=True, raises=Wrong, reason=f"wrong: {known}")] if known else [])


@functools.cache
def missing(row: str) -> str:
    """Why a row can't be built here; "" where it can."""
    for name in FOREIGN[row].needs:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f'{name} can\'t be imported ({error}): pip install -e ".[peers]"'
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("row", "column"), [expected(*pair) for pair in PAIRS])
def test_callback_on_a_foreign_module(row: str, column: str) -> None:
    """A pair of ``WRONG`` that is mended fails here as "XPASS(strict)": take it out of there, and put a refusal into ``REFUSES``."""
    if why := missing(row):
        pytest.skip(why)
    if column == "MaskedBNSparsity":
        pytest.importorskip("torch_pruning", reason='Torch-Pruning isn\'t installed: pip install -e ".[sparsity]"')
    how, said = outcome(row, column)
    if how == "wrong":
        raise Wrong(said)
    if (row, column) in WRONG:
        return  # mended
    refusal = REFUSES.get((row, column))
    assert how == ("refuses" if refusal else "works"), said
    assert (refusal or "") in said


def public_callbacks() -> set[str]:
    found = {
        name: getattr(importlib.import_module(package), name) for name, package in public_names().items() if package.endswith("callbacks")
    }
    return {name for name, kind in found.items() if inspect.isclass(kind) and issubclass(kind, pl.Callback)}


def test_every_public_callback_is_a_column_or_left_out_for_a_reason() -> None:
    columns = {column.partition(",")[0] for column in COLUMNS}
    assert not columns & set(LEFT_OUT)
    assert columns | set(LEFT_OUT) == public_callbacks()
    assert {name for names in PARTS.values() for name in names} == set(COLUMNS)


def test_what_is_known_is_about_pairs_of_the_matrix() -> None:
    assert not set(REFUSES) & set(WRONG)
    assert set(REFUSES) | set(WRONG) <= set(PAIRS)


def test_the_extra_has_what_the_rows_need() -> None:
    text = (PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^peers = \[(.*?)^\]", text, flags=re.M | re.S)
    assert extra is not None
    for name in {name.partition(".")[0].replace("_", "-") for foreign in FOREIGN.values() for name in foreign.needs} - {"torchvision"}:
        assert name in extra[1], f"{name} is in no line of the extra peers"


# ---- a check of the checks -------------------------------------------------------------------------------------------------------------


class Meddles(pl.Callback):
    """Does one thing that a callback mustn't."""

    def __init__(self, what: str) -> None:
        self.what = what

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.what == "refuses":
            raise ValueError("this can't be")
        if self.what == "hooks":
            pl_module.register_forward_hook(lambda *_: None)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        first = next(pl_module.parameters())
        if self.what == "trains":
            first.data.mul_(1.01)
        elif self.what == "nan":
            first.data.fill_(math.nan)
        elif self.what == "breaks":
            raise ValueError("Meddles: too late")

    def sparsity_masks(self) -> dict[str, Tensor]:
        return {"network.stem.weight": torch.zeros(16, 16, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("refuses", "watches", "refuses without its name"),
        ("hooks", "watches", "leaves something behind"),
        ("trains", "watches", "the weights end otherwise"),
        ("nan", "changes", "losses"),
        ("breaks", "changes", "breaks after 1 steps"),
        ("nothing", "changes", "the weights end as without it"),
        ("trains", "term", "loss is None"),
        ("trains", "masks", "removed entries of network.stem.weight aren't 0"),
    ],
)
def test_what_is_wrong_is_seen(what: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "Meddles", Column(lambda foreign: Meddles(what), kind))
    monkeypatch.setattr(Meddles, "name", "meddles", raising=False)
    how, said = outcome("groups by parameter names", "Meddles")
    assert how == "wrong"
    assert words in said


# ---- the page --------------------------------------------------------------------------------------------------------------------------


def table(columns: Iterable[str]) -> str:
    """Modules by callbacks, with numbered notes below it."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(tuple(columns))}"]
    notes: list[str] = []
    for row in FOREIGN:
        words = []
        for column in columns:
            refusal, wrong = REFUSES.get((row, column)), WRONG.get((row, column))
            note = f"“{refusal}”" if refusal else wrong
            if note and note not in notes:
                notes.append(note)
            how = "refused" if refusal else "**wrong**" if wrong else "-" if lacking(row, column) else "yes"
            words.append(f"{how} ({notes.index(note) + 1})" if note else how)
        lines.append(f"| {row} | {' | '.join(words)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))]).strip()


def tables() -> str:
    parts = [f"## {heading}\n\n{table(columns)}" for heading, columns in PARTS.items()]
    left_out = "\n".join(["| callback | why it has no column |", "|---|---|", *(f"| {name} | {why} |" for name, why in LEFT_OUT.items())])
    return "\n\n".join([*parts, f"## Left out\n\n{left_out}"])


MARKS = "<!-- tables: written by tests/test_foreign_modules.py -->", "<!-- end of tables -->"


def filled(page: str) -> str:
    """The page with the tables as they are now."""
    assert all(page.count(mark) == 1 for mark in MARKS), "the page has lost the comments around its tables"
    return page[: page.index(MARKS[0]) + len(MARKS[0])] + f"\n\n{tables()}\n\n" + page[page.index(MARKS[1]) :]


def test_the_page_has_these_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python tests/test_foreign_modules.py"


def disagreements() -> Iterable[str]:
    """Every pair whose outcome isn't the one that the tables above say, in a line."""
    for row, column in PAIRS:
        if missing(row):
            continue
        how, said = outcome(row, column)
        wanted = "wrong" if (row, column) in WRONG else "refuses" if (row, column) in REFUSES else "works"
        if how != wanted or REFUSES.get((row, column), "") not in said:
            yield f"{row} | {column}: {how}, not {wanted}: {' '.join(said.split())[:200]}"


if __name__ == "__main__":
    if "--try" in sys.argv:
        for line in disagreements():
            print(line, flush=True)
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{PAGE.name}: the tables are up to date")
