"""Supervised dictionaries as a callback that judges any sparse autoencoder.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparse_autoencoders.sae_evals.core`.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge
from lit_methods.callbacks.sparse_autoencoders.sae_evals import axes, core
from lit_methods.callbacks.twin import training_batches
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sae_evals",
    short="Supervised dictionaries for SAEs",
    title="Towards Principled Evaluations of Sparse Autoencoders for Interpretability and Control",
    arxiv="2405.08366",
    family="sparse_autoencoders",
    form="callback",
    classes=("lit_methods.callbacks.SupervisedDictionaryEval", "lit_methods.callbacks.LossRecovered"),
    configs=("sae_evals.yaml",),
    golden=("supervised_dictionary", "f1_interpretability", "sparse_edit"),
    claim="On sums of attributes of unequal magnitude, edits of a large one by supervised codes succeed more often, by 0.3 or more, than "
    "edits by two features of a sparse autoencoder.",
    summary="Judges a sparse autoencoder by what a dictionary computed from known attributes does: approximation, sparse control, F1.",
)

_SHOWN = 50  # rows of the table of features


class SupervisedDictionaryEval(AutoencoderJudge):
    """Measures features against a dictionary computed from the known attributes of each activation: a ~ b + sum_i v_(i, value of i).

    Three axes, each for the features and for the supervised codes, which are the mark to reach:

    - approximation: ``error``, the squared error as a share of the variance; with a subject model ``sufficiency`` and ``necessity``
    - control: activations are turned into ones with another value of one attribute, all else equal, by the codes (``supervised``,
      ``subspace``), by the k features that bring them nearest (``greedy_<k>``), and by the k that tell the values best (``guided_<k>``).
      ``distance`` to the counterfactual, ``weight`` of what was removed; with a subject model ``agreement`` with the prediction under the
      full patch, and ``attribution``, the distance along the gradient. ``none``: no edit.
    - interpretability: ``features`` that tell a value with an F1 above the threshold, ``union_features`` that tell a union of values,
      ``best_f1`` of a value's best feature; with a subject model the logit difference that is left with these features ``kept`` alone, or
      ``removed``

    Runs: in validation and test. Codes and rankings come from the first ``train_batches`` of the training data, all else from the
    evaluation data of all ranks, up to ``max_samples``. Pairs for edits are found among these: without values in common there are none,
    and a warning says so. The sanity check looks and logs nothing. Metrics are ``sae_evals/<split>_<figure>/<attribute>/<edit>``;
    distances beside a subject model, attribution, unions and most weights stand in the tables alone.
    Saves: nothing; all of it is computed anew.
    Refuses: modules without ``encode``, ``decode`` and ``decoder_directions``, autoencoders whose features have no fixed
    direction, batches without the attributes, evaluation without training data.

    Args:
        attributes: Keys of (B,) integers in the batch. ``io*pos`` is a joint attribute, with a code for each pair of values.
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the (B, d) activations in a batch; null: ``activation``, or 0.
        k_edits: Numbers of features that an edit may exchange.
        group_size: Most values in a union that explains a feature.
        threshold: F1 above which a feature counts as one that tells a value.
        target: The greedy edit goes for the counterfactual ``activation``, or for its ``reconstruction``.
        matched: Further keys of (B,) integers that a pair must have in common, such as a template.
        subject: Model that reads activations, ``subject(activation, batch)`` -> (B, C) logits or a dict of such by attribute; or the
            name of the datamodule's attribute that is one; null: distances alone.
        monitored: Edit, such as ``greedy_2``, that is logged once more, as ``sae_evals/<split>_edit``: its agreement, mean over the
            attributes, or of one of them where it is ``io/greedy_2``; without a subject model its distance. One number to compare runs by.
        train_batches: Training batches of each rank that codes and rankings are made from.
        max_samples: Evaluation samples that are looked at.
        every_n_epochs: Validation epochs from one measurement to the next; testing always measures.

    Raises:
        ValueError: An argument out of range; in ``setup`` and while running, what is refused.
    """

    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Edits that do what the full patch does",
            ("sae_evals/val_agreement/*", "sae_evals/test_agreement/*"),
            note="Features against supervised codes.",
            goal="max",
        ),
        Curve("The monitored edit", ("sae_evals/val_edit", "sae_evals/test_edit")),
        TablePanel(
            "Edits: agreement against weight removed", "sae_evals/edits", note="High agreement at a small weight, a small distance: good."
        ),
        Curve("Squared error / variance", ("sae_evals/val_error/*", "sae_evals/test_error/*"), goal="min"),
        Curve(
            "Sufficiency and necessity of reconstructions",
            ("sae_evals/val_sufficiency/*", "sae_evals/val_necessity/*", "sae_evals/test_sufficiency/*", "sae_evals/test_necessity/*"),
            note="1: the reconstruction holds all that the model uses.",
        ),
        Curve("Weight that edits of the monitored attribute remove", ("sae_evals/val_weight/*", "sae_evals/test_weight/*"), goal="min"),
        Curve("Features that tell a value", ("sae_evals/val_features/*", "sae_evals/test_features/*"), note="F1 above the threshold."),
        Curve("F1 of each value's best feature", ("sae_evals/val_best_f1/*", "sae_evals/test_best_f1/*"), goal="max"),
        Curve(
            "Logit difference with features of one attribute kept or removed",
            ("sae_evals/val_kept/*", "sae_evals/val_removed/*", "sae_evals/test_kept/*", "sae_evals/test_removed/*"),
        ),
        HistogramPanel("Best F1 of each active feature", "sae_evals/f1"),
        TablePanel("Features by F1", "sae_evals/features", note="What each of the best features tells."),
    )

    def __init__(
        self,
        attributes: Sequence[str],
        autoencoder: str = "",
        activation: Key = None,
        k_edits: Sequence[int] = (1, 2, 4),
        group_size: int = 10,
        threshold: float = 0.8,
        target: axes.Target = "activation",
        matched: Sequence[str] = (),
        subject: nn.Module | str | None = None,
        monitored: str | None = None,
        train_batches: int = 50,
        max_samples: int = 4096,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(autoencoder, activation)
        checks.patterns(attributes=attributes, matched=matched)
        if not attributes:
            raise ValueError("attributes is empty: name the keys of the batch that hold attributes, such as [io, s, pos]")
        checks.one_of(axes.Target, target=target)
        checks.share(threshold=threshold)
        checks.at_least(1, group_size=group_size, train_batches=train_batches, max_samples=max_samples, every_n_epochs=every_n_epochs)
        for k in k_edits:
            checks.at_least(1, "features", k_edits=k)
        self.attributes, self.matched = list(attributes), list(matched)
        self.monitored = monitored
        edits = ["none", "supervised", "subspace", *(f"{kind}_{k}" for kind in ("greedy", "guided") for k in k_edits)]
        checks.one_of([*edits, *(f"{name}/{edit}" for name in attributes for edit in edits)], monitored=monitored)
        self.k_edits, self.group_size, self.threshold, self.target = tuple(k_edits), group_size, threshold, target
        self.subject, self.train_batches, self.max_samples, self.every_n_epochs = subject, train_batches, max_samples, every_n_epochs
        self._rows: list[dict[str, Tensor]] = []
        self._kept = 0
        self._media: dict[str, Media] = {}

    # ---- collecting --------------------------------------------------------------------------------------------------------------------

    def _skipped(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and (trainer.current_epoch + 1) % self.every_n_epochs != 0

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Forget the evaluation before."""
        super().begin_evaluation(trainer, pl_module, split)
        self._rows, self._kept = [], 0

    def _take(self, batch: Any) -> dict[str, Tensor]:
        """What is kept of a batch: activations, attributes, and whatever else has a row for each of its samples."""
        x = find_in_batch(batch, self.activation, ("activation", 0), "activation")
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"the batch's activations are {tuple(x.shape)} {x.dtype}: expected (B, d) floating point")
        rows = {"activation": x.detach().float()}
        for name in dict.fromkeys(part for key in (*self.attributes, *self.matched) for part in key.split("*")):
            ids = find_in_batch(batch, name, (name, 0), "attributes")
            if ids.shape != x.shape[:1] or ids.is_floating_point() or ids.is_complex():
                raise ValueError(f"the batch's {name!r} is {tuple(ids.shape)} {ids.dtype} for {len(x)} activations: expected (B,) integers")
            if ids.numel() and int(ids.min()) < 0:
                raise ValueError(f"the batch's {name!r} has the value {int(ids.min())}: values are 0, 1, 2, ...")
            rows[name] = ids.long()
        if self.subject is not None and isinstance(batch, dict):
            rows |= {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]} | rows
        return rows

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Keep the samples of the first loader."""
        room = -(-self.max_samples // distributed.world_size()) - self._kept
        if dataloader_idx or self._skipped(trainer) or room <= 0:
            return
        rows = {name: value[:room].cpu() for name, value in self._take(batch).items()}
        self._kept += len(rows["activation"])
        self._rows.append(rows)

    def _training(self, trainer: pl.Trainer) -> Iterable[Any]:
        """Batches of the training data of this rank."""
        if trainer.state.fn == "fit":
            return training_batches(trainer, "codes come", "train on one, or on a list of batches")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise ValueError("the codes come from training data: give validate and test a datamodule that has them, not loaders")
        with torch.inference_mode(False):
            data.setup("fit")
        return (trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in data.train_dataloader())

    # ---- measuring ---------------------------------------------------------------------------------------------------------------------

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Measure and log."""
        rows, self._rows = self._rows, []
        if not self._skipped(trainer):
            with checks.naming(type(self).__name__), isolate_rng(pl_module.device.type == "cuda"), torch.no_grad():
                train = [self._take(batch) for batch in islice(self._training(trainer), self.train_batches)]
                if not trainer.sanity_checking and train:
                    figures = self._measure(self._subject(trainer, pl_module), _joined(train, pl_module), rows, pl_module)
                    log_global(pl_module, {f"sae_evals/{split}_{name}": one for name, one in figures.items() if self._logged(name)})
        super().end_evaluation(trainer, pl_module, split)

    def _subject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """The subject model on the device, or None."""
        subject: Any = self.subject
        if isinstance(subject, str):
            data = trainer.datamodule  # type: ignore[attr-defined]
            subject = getattr(data, subject, None)
            if subject is None:
                raise ValueError(f"subject={self.subject!r} is no attribute of {type(data).__name__}: name one, or give a module, or null")
        return subject.to(pl_module.device).eval() if isinstance(subject, nn.Module) else subject

    def _ids(self, rows: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        """Attribute -> (N,) values; of a joint one, the pair counted as one number."""
        found = {}
        for name in self.attributes:
            number = torch.zeros_like(rows[name.split("*")[0]])
            for part in name.split("*"):
                number = number * sizes[part] + rows[part]
            found[name] = number
        return found

    def _measure(self, model: Any, train: dict[str, Tensor], kept: list[dict[str, Tensor]], module: pl.LightningModule) -> Any:
        names = sorted({part for key in self.attributes for part in key.split("*")})
        local = _joined(kept, module) if kept else {name: value[:0] for name, value in train.items()}
        rows = {
            name: distributed.gather_rows(value.to(module.device), with_grad=False)[: self.max_samples] for name, value in local.items()
        }
        order = rows["activation"][:, 0].argsort(stable=True)  # of the samples themselves, so that pairs don't depend on the ranks
        rows = {name: value[order] for name, value in rows.items()}
        most = torch.stack([torch.cat([train[name], rows[name]]).amax() for name in names])[None]
        singles = dict(zip(names, (distributed.gather_rows(most, with_grad=False).amax(0) + 1).tolist(), strict=True))
        if not len(rows["activation"]):
            return {}
        ids, train_ids = self._ids(rows, singles), self._ids(train, singles)
        sizes = [int(torch.tensor([singles[part] for part in name.split("*")]).prod()) for name in self.attributes]
        dtype = self.directions.dtype
        directions, bias = axes.linear_decoder(self.judged, rows["activation"][:64].to(dtype))

        def encode(x: Tensor) -> Tensor:
            return torch.cat([self.judged.encode(part).float() for part in x.to(dtype).split(axes.CHUNK)])

        sums = core.attribute_sums(train["activation"], list(train_ids.values()), sizes)
        sums = core.AttributeSums(*(distributed.sum_over_ranks(one) for one in sums))
        features = encode(train["activation"]) != 0
        ranking = {}
        for (name, values), size in zip(train_ids.items(), sizes, strict=True):
            counts = core.ActivityCounts(*(distributed.sum_over_ranks(one) for one in core.activity_counts(features, values, size)))
            ranking[name] = core.feature_order(core.f1_scores(counts).f1)
        reference = axes.Reference(_single(core.mean_codes(sums, sizes)), _single(core.mse_codes(sums, sizes)), ranking)
        sample = axes.Sample(rows["activation"], ids, encode(rows["activation"]), rows)
        subject = None if model is None else axes.Subject(model, sample)

        figures = axes.approximation(sample, reference, sample.features @ directions + bias, subject)
        matched = [rows[name] for name in self.matched]
        told = {}
        for (name, values), size in zip(ids.items(), sizes, strict=True):
            made = axes.edits(sample, reference, directions, name, matched, self.k_edits, self.target)
            if len(made.keep):
                figures |= axes.control(name, made, subject)
            else:
                rank_zero_warn(f"{type(self).__name__}: no two samples differ in {name} alone: it isn't edited; evaluate on more samples")
            told[name] = axes.explained(core.activity_counts(sample.features != 0, values, size), self.group_size)
            figures |= axes.interpretability(name, told[name], self.threshold)
            if subject is not None:
                chosen = told[name].best > self.threshold
                figures |= axes.causal_check(name, sample, chosen, directions, bias, reference.mean.bias, subject)
        if self.monitored is not None:
            *of, edit = self.monitored.rsplit("/", 1)
            figure = "distance" if subject is None else "agreement"
            wanted = [value for name in of or ids if (value := figures.get(f"{figure}/{name}/{edit}")) is not None]
            figures |= {"edit": torch.stack(wanted).mean()} if wanted else {}
        self._media = {"sae_evals/edits": _edits_table(figures), **_feature_media(told, (sample.features != 0).float().mean(0))}
        return figures

    def _logged(self, name: str) -> bool:
        """Whether a figure is logged; all of them stand in the tables."""
        figure, *rest = name.split("/")
        if figure == "distance":
            return self.subject is None
        if figure not in ("agreement", "weight"):
            return figure not in ("attribution", "union_features")
        attribute, edit = rest
        followed = self.monitored is not None and self.monitored.startswith(f"{attribute}/")
        if figure == "weight":
            return followed and edit.startswith(("supervised", "greedy"))
        return edit not in ("none", "subspace") or (followed and edit == "none")

    def dashboard_media(self) -> dict[str, Media]:
        """Tables of edits and features, and the histogram of F1."""
        return self._media


def _joined(rows: list[dict[str, Tensor]], module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: torch.cat([one[name].to(module.device) for one in rows]) for name in rows[0]}


def _single(codes: core.SupervisedCodes) -> core.SupervisedCodes:
    return core.SupervisedCodes(codes.bias.float(), [code.float() for code in codes.codes])


def _edits_table(figures: axes.Figures) -> TableMedia:
    """A row for each attribute and edit, by falling agreement, or by rising distance."""
    rows: list[tuple[Any, ...]] = []
    for name, distance in figures.items():
        if name.startswith("distance/"):
            end = name.removeprefix("distance/")
            attribute, edit = end.rsplit("/", 1)
            values = [figures.get(f"{figure}/{end}") for figure in ("agreement", "weight", "attribution")]
            rows.append((attribute, edit, *(None if value is None else float(value) for value in values), float(distance)))
    rows.sort(key=lambda row: (row[0], -(row[2] or 0.0), row[5]))
    return TableMedia(("attribute", "edit", "agreement", "weight removed", "distance along the gradient", "distance"), tuple(rows))


def _feature_media(told: dict[str, axes.Explained], active: Tensor) -> dict[str, Media]:
    """The features that tell something best, and how many reach which F1."""
    names = list(told)
    best, which = torch.stack([found.best for found in told.values()]).max(0)
    rows = []
    for feature in best.argsort(descending=True, stable=True)[:_SHOWN].tolist():
        name = names[int(which[feature])]
        found = told[name]
        if found.best[feature].isfinite():
            shown = [float(found.best[feature]), int(found.union_size[feature]), float(found.union[feature]), float(active[feature])]
            rows.append((feature, name, int(found.value[feature]), *shown))
    columns = ("feature", "attribute", "value", "F1", "values in the best union", "its F1", "share of samples where active")
    counts, edges = np.histogram(best[best.isfinite()].cpu().numpy(), bins=20, range=(0.0, 1.0))
    return {"sae_evals/features": TableMedia(columns, tuple(rows)), "sae_evals/f1": HistogramMedia(counts, edges)}


__all__ = ["SupervisedDictionaryEval"]
