"""Training of a composed image retriever: coarse targets first, fine ones later (arXiv:2211.07394).

Read in Monoxide-Chen/uncertainty_retrieval@f1fd828. The maths is in :mod:`lit_methods.retrieval.cir_uncertainty.core`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows, rank
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import learning_rate_factor, scheduled
from lit_methods.panels import Curve, ImagePanel, Panel
from lit_methods.retrieval.cir_uncertainty.core import (
    UncertaintyLoss,
    augment_targets,
    best_of_gallery,
    coarse_weight,
    composed_info_nce,
    gaussian_targets,
    on_sphere,
    precision_at,
    recall_at,
    uncertainty_loss,
)
from lit_methods.retrieval.cir_uncertainty.networks import Compositor, ImageTrunk, TextVectors
from lit_methods.retrieval.cir_uncertainty.pictures import Search, search_picture
from lit_methods.retrieval.cir_uncertainty.schedule import CoarseSchedule, planned_progress
from lit_methods.seeds import seeded_noise
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="cir_uncertainty",
    short="Composed retrieval under uncertainty",
    title="Composed Image Retrieval with Text Feedback via Multi-grained Uncertainty Regularization",
    arxiv="2211.07394",
    family="retrieval",
    form="module",
    classes=(
        "lit_methods.ComposedRetrieval",
        "lit_methods.callbacks.UncertaintyRegularizer",
        "lit_methods.ResNetTrunk",
        "lit_methods.SmallMapTrunk",
        "lit_methods.VectorTrunk",
        "lit_methods.TransformerText",
        "lit_methods.LSTMText",
        "lit_methods.EmbeddedWords",
        "lit_methods.ContentStyleCompositor",
        "lit_methods.ResidualCompositor",
        "lit_methods.datamodules.FashionRetrievalDataModule",
        "lit_methods.datamodules.ShiftedClassesDataModule",
    ),
    configs=("cir_uncertainty.yaml", "cir_uncertainty_cosmo.yaml"),
    golden=("loss", "augmenter", "compositor", "recall", "lr_schedule"),
    claim=(
        "Where every image of a class is right, training on targets under noise first and on exact ones later has a higher precision among "
        "the first 50 images than InfoNCE on exact targets alone."
    ),
    summary="Trains retrieval by an image with words on noisy targets, weighted by their spread, which fade into exact targets.",
)

Loss = Literal["regularised", "info_nce", "uncertainty", "fixed"]
Noise = Literal["statistics", "gaussian"]
Optimizer = Literal["sgd", "adam"]
RECALL_AT, PRECISION_AT = (1, 5, 10, 50), (50,)
FIXED = {"info_nce": 0.0, "uncertainty": 1.0, "fixed": 0.5}  # gamma of the baselines
PICTURED, PICTURED_IMAGES = 4, 6


class ComposedRetrieval(Evaluated):
    """Learns a query of a reference image and words, so that f_q f_t ranks the images t that the words lead to.

    f_t = 4 h(trunk(target)) / |h(..)| and f_q = 4 h(c(trunk(reference), text)) / |h(..)|, with a compositor c and a linear head h on the
    pooled map. The targets f get noise of their own statistics: f' = alpha (f - mean) / std + beta, alpha ~ N(1, std), beta ~ N(mean, std).
    The loss is gamma L_u + (1 - gamma) InfoNCE(f_q, f_t) with L_u = (exp(-s) InfoNCE(f_q, f') + s) / 2, s the deviation of all of f', and
    gamma = exp(-gamma_0 epoch / epochs): coarse first, fine later.

    Runs: a batch has ``reference`` and ``target`` (B, c, H, W), ``text_ids`` and ``text_mask`` (B, L). Validation and test rank all images
    of a category for each of its queries, a query's own image last, on all ranks' features; figures over categories are means.
    Saves: the networks. gamma and the noise follow from epoch, step, batch and rank.
    Refuses: parts whose widths don't fit; a vocabulary smaller than the data's; ``regularised`` in a training without an end.

    Args:
        image_encoder: (B, c, H, W) images -> (B, C, h, w) maps, such as ``ResNetTrunk`` or ``VectorTrunk``.
        text_encoder: (B, L) tokens and mask -> (B, T), such as ``TransformerText``, ``LSTMText`` or ``EmbeddedWords``.
        compositor: (B, C, h, w) and (B, T) -> (B, C, h, w), such as ``ContentStyleCompositor`` or ``ResidualCompositor``.
        width: D of the features. The noise's scale is about ``norm_scale`` / sqrt(D): it should be well below 1.
        norm_scale: Length of the features; logits are its square times the cosine.
        loss: ``regularised``; the baselines ``info_nce`` (gamma 0), ``uncertainty`` (gamma 1) and ``fixed`` (gamma 0.5).
        noise: ``statistics``: of the target itself; ``gaussian``: f + ``noise_scale`` * noise, a baseline.
        noise_scale: Standard deviation of ``gaussian``.
        alpha_scale: Factor of alpha.
        beta_scale: Factor of beta.
        gamma_0: How fast gamma falls.
        schedule: gamma changes once per ``epoch``, or at each ``step``.
        gather: Compare with the targets of all ranks, with gradient; s is then that of all ranks' targets.
        optimizer: ``sgd`` with ``momentum``, or ``adam``.
        learning_rate: Full learning rate.
        momentum: Of SGD.
        weight_decay: L2 penalty of either.
        text_rate: Factor of the text encoder's learning rate.
        warmup_epochs: Epochs of linear rise, from ``drop``^2.
        milestones: Epochs at which the learning rate is multiplied by ``drop``.
        drop: That factor.
        seed: Seed of the noise.

    Raises:
        ValueError: A value outside its range, or parts that don't fit together.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel(
            "Searches", "cir_uncertainty/searches", note="Reference image, words, and what was found; right ones have a green frame."
        ),
        Curve("Loss", ("cir_uncertainty/loss",), note="The weighted sum; its parts change their weight.", goal="min"),
        Curve("InfoNCE and uncertainty loss", ("cir_uncertainty/info_nce", "cir_uncertainty/uncertainty"), note="Before their weights."),
        Curve("gamma", ("cir_uncertainty/gamma",), note="Weight of the coarse part."),
        Curve("Spread s of the noisy targets", ("cir_uncertainty/spread",), note="Near 1: each target is standardised."),
        Curve("Recall of validation queries", ("cir_uncertainty/val_recall_at_*",), note="A right image among the first K.", goal="max"),
        Curve("Precision at 50", ("cir_uncertainty/val_precision_at_50*",), note="Share of right images among 50.", goal="max"),
        Curve("Images of the gallery", ("cir_uncertainty/val_gallery*",), note="FashionIQ's protocols differ in it."),
    )

    def __init__(
        self,
        image_encoder: ImageTrunk,
        text_encoder: TextVectors,
        compositor: Compositor,
        width: int = 512,
        norm_scale: float = 4.0,
        loss: Loss = "regularised",
        noise: Noise = "statistics",
        noise_scale: float = 0.1,
        alpha_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma_0: float = 1.0,
        schedule: CoarseSchedule = "epoch",
        gather: bool = False,
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        text_rate: float = 1.0,
        warmup_epochs: int = 0,
        milestones: Sequence[int] = (),
        drop: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(ComposedRetrieval, locals())
        checks.at_least(2, "dimensions", width=width)
        checks.positive(norm_scale=norm_scale, learning_rate=learning_rate, text_rate=text_rate)
        checks.at_least(0, noise_scale=noise_scale, alpha_scale=alpha_scale, beta_scale=beta_scale, gamma_0=gamma_0)
        checks.at_least(0, weight_decay=weight_decay, warmup_epochs=warmup_epochs, seed=seed)
        checks.within("[0, 1)", "a number", momentum=momentum)
        checks.within("(0, 1]", "a factor", drop=drop)
        for place, milestone in enumerate(milestones):
            checks.at_least(0, "epochs", **{f"milestones[{place}]": milestone})
        for name, given, wanted in (
            ("channels", getattr(compositor, "channels", None), image_encoder.channels),
            ("text_width", getattr(compositor, "text_width", None), text_encoder.width),
        ):
            if given is not None and given != wanted:
                raise ValueError(f"the compositor's {name} is {given} and the encoder gives {wanted}: set {name} to {wanted}")
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder", "compositor"])
        self.image_encoder, self.text_encoder, self.compositor = image_encoder, text_encoder, compositor
        self.head = nn.Linear(image_encoder.channels, width)
        self._planned: int | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Compare the vocabularies.

        Raises:
            ValueError: The data have more tokens than the text encoder.
        """
        tokens = getattr(getattr(self.trainer, "datamodule", None), "tokens", None)
        known = getattr(self.text_encoder, "vocab_size", None)
        if tokens is not None and known is not None and len(tokens) > known:
            raise ValueError(f"the data have {len(tokens)} tokens and the text encoder {known}: set its vocab_size to {len(tokens)}")

    # ---- features ----------------------------------------------------------------------------------------------------------------------

    def _features(self, maps: Tensor) -> Tensor:
        return on_sphere(self.head(maps.mean(dim=(2, 3))), self.hparams["norm_scale"])

    def image_features(self, image: Tensor) -> Tensor:
        """(B, c, H, W) images -> (B, D) features of gallery images and targets."""
        return self._features(self.image_encoder(image))

    def forward(self, reference: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(B, c, H, W) images, (B, L) tokens and mask -> (B, D) composed queries."""
        return self._features(self.compositor(self.image_encoder(reference), self.text_encoder(text_ids, text_mask)))

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Ask how long the training is; not earlier, as a resumed loader would be made before it is told its place."""
        self._planned = None
        if self.hparams["loss"] == "regularised":
            self._planned = planned_progress(self, self.hparams["schedule"])

    def gamma(self) -> float:
        """Weight of the coarse part at this step."""
        hp = self.hparams
        if hp["loss"] != "regularised":
            return FIXED[hp["loss"]]
        done = self.trainer.global_step if hp["schedule"] == "step" else self.current_epoch
        assert self._planned is not None
        return coarse_weight(done / self._planned, hp["gamma_0"])

    def augmented(self, targets: Tensor, batch_idx: int) -> Tensor:
        """(B, D) targets under the noise of this step, which differs between ranks unless their targets are gathered."""
        hp = self.hparams
        who = "all ranks" if hp["gather"] else f"rank {rank()}"
        place = f"cir_uncertainty step {self.global_step} batch {batch_idx} {who}"
        alpha, beta = (seeded_noise(f"{place} {part}", hp["seed"], targets) for part in ("alpha", "beta"))
        if hp["noise"] == "gaussian":
            return gaussian_targets(targets, alpha, hp["noise_scale"])
        return augment_targets(targets, alpha, beta, hp["alpha_scale"], hp["beta_scale"]).features

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Both losses of the batch."""
        reference, target, ids, mask = fields(batch, "reference", "target", "text_ids", "text_mask")
        queries, targets = self(reference, ids, mask), self.image_features(target)
        if self.hparams["gather"]:
            queries, targets = gather_rows(queries), gather_rows(targets)
        gamma = self.gamma()
        if gamma == 0:
            loss = composed_info_nce(queries, targets)
            found = {"info_nce": loss}
        else:
            both: UncertaintyLoss = uncertainty_loss(queries, targets, self.augmented(targets, batch_idx), gamma)
            loss, found = both.loss, {name: value for name, value in both._asdict().items() if name != "loss"}
        size = len(reference)
        self.log("cir_uncertainty/loss", loss.detach(), prog_bar=True, batch_size=size)
        logs = {name: value.detach() for name, value in found.items()} | {"gamma": torch.tensor(gamma)}
        self.log_dict({f"cir_uncertainty/{name}": value for name, value in logs.items()}, batch_size=size)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD or Adam, the text encoder with a rate of its own; per epoch a linear rise, then steps down."""
        hp, rate = self.hparams, self.hparams["learning_rate"]
        texts = {id(parameter) for parameter in self.text_encoder.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        split = [[p for p in trained if (id(p) in texts) == own] for own in (False, True)]
        groups = [{"params": part, "lr": rate * factor} for part, factor in zip(split, (1.0, hp["text_rate"]), strict=True) if part]
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(groups, lr=rate, momentum=hp["momentum"], weight_decay=hp["weight_decay"])
        else:
            optimizer = torch.optim.Adam(groups, lr=rate, weight_decay=hp["weight_decay"])

        def factor(epoch: int) -> float:
            return learning_rate_factor(
                epoch,
                total_steps=1,  # not used by steps down
                steps_per_epoch=1,
                schedule="multistep",
                milestones=hp["milestones"],
                gamma=hp["drop"],
                warmup_epochs=hp["warmup_epochs"],
                warmup_start=hp["drop"] ** 2,
            )

        return scheduled(optimizer, factor, "epoch")

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows (n, 5) int64 of ``is_query``, ``category``, ``index``, ``label``, ``identity``, and features (n, D), of an evaluation."""
        names = ("is_query", "category", "index", "label", "identity")
        image, ids, mask, *numbers = fields(batch, "image", "text_ids", "text_mask", *names)
        asked = numbers[0].bool()
        rows = torch.stack([column.long() for column in numbers], dim=1)
        queries, gallery = asked.nonzero()[:, 0], (~asked).nonzero()[:, 0]
        found = []
        if len(queries):
            found.append(self(image[queries], ids[queries], mask[queries]))
        if len(gallery):
            found.append(self.image_features(image[gallery]))
        return rows[torch.cat([queries, gallery])], torch.cat(found)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        rows, features = self.encode(batch)
        self._kept.append((rows.cpu(), features.detach().float().cpu()))

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._kept = []

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._kept = []

    def _log_evaluation(self, part: Part) -> None:
        rows = torch.cat([torch.zeros(0, 5, dtype=torch.int64), *(rows for rows, _ in self._kept)])
        features = torch.cat([torch.zeros(0, self.head.out_features), *(features for _, features in self._kept)])
        self._kept = []
        rows, features = gather_rows(rows, with_grad=False), gather_rows(features, with_grad=False)
        # samplers give some rows twice, so that all ranks have as many
        _, back = torch.unique(rows[:, :3], dim=0, return_inverse=True)
        first = torch.full((int(back.max()) + 1 if len(back) else 0,), len(rows))
        first = first.scatter_reduce(0, back, torch.arange(len(rows)), "amin")
        rows, features = rows[first], features[first]
        figures: dict[str, list[tuple[str, float]]] = {}
        data: Any = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "categories", ())
        pictures: list[Search] = []
        for category in rows[:, 1].unique().tolist():
            mine = rows[:, 1] == category
            asked, shown = mine & (rows[:, 0] == 1), mine & (rows[:, 0] == 0)
            queries, gallery = rows[asked], rows[shown]
            if not len(queries) or not len(gallery):
                continue
            best = best_of_gallery(
                features[asked], features[shown], queries[:, 3], gallery[:, 3], queries[:, 4], gallery[:, 4], max(RECALL_AT)
            )
            name = str(names[category]) if category < len(names) else str(category)
            values = {f"recall_at_{k}": value for k, value in zip(RECALL_AT, recall_at(best.hits, RECALL_AT).tolist(), strict=True)}
            values |= {
                f"precision_at_{k}": value for k, value in zip(PRECISION_AT, precision_at(best.hits, PRECISION_AT).tolist(), strict=True)
            }
            values["gallery"] = float(len(gallery))
            for figure, value in values.items():
                figures.setdefault(figure, []).append((name, value))
            if rank() == 0 and hasattr(data, "shown_query"):
                for row in range(min(len(queries), PICTURED - len(pictures))):
                    places = best.places[row, :PICTURED_IMAGES]
                    image, words = data.shown_query(category, int(queries[row, 2]))
                    found = [data.shown_image(category, place) for place in gallery[places, 2].tolist()]
                    pictures.append(Search(image, words, found, best.hits[row, :PICTURED_IMAGES].tolist()))
        if not figures:
            rank_zero_warn("the evaluation has seen no query with a gallery: raise the number of its batches for retrieval figures")
            return
        if pictures:
            self._media["cir_uncertainty/searches"] = search_picture(pictures)
        logged = {figure: sum(value for _, value in each) / len(each) for figure, each in figures.items()}
        if len(names) > 1:
            logged |= {f"{figure}/{name}": value for figure, each in figures.items() for name, value in each}
        log_global(self, {f"cir_uncertainty/{part}_{name}": value for name, value in logged.items()})

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``is_query`` (B,) bool, ``category``, ``index`` (B,) int64 and ``features`` (B, D), queries first."""
        rows, features = self.encode(batch)
        return {"is_query": rows[:, 0].bool(), "category": rows[:, 1], "index": rows[:, 2], "features": features}


def fields(batch: Any, *names: str) -> tuple[Tensor, ...]:
    """What a step needs of its batch.

    Raises:
        KeyError: Something is missing; the message says what was found.
    """
    try:
        return tuple(batch[name] for name in names)
    except (KeyError, TypeError, IndexError):
        have = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        wanted = ", ".join(names)
        raise KeyError(f"the batch needs {wanted}, it has {have}: FashionRetrievalDataModule makes such batches") from None


__all__ = ["ComposedRetrieval"]
