"""CoPrompt (arXiv:2306.01195): prompts and adapters on both of CLIP's towers, kept near the frozen ones on perturbed inputs.

Read in ShuvenduRoy/CoPrompt@a2a6c12. The same class is MaPLe (arXiv:2210.03117), CoOp (arXiv:2109.01134), CLIP-Adapter-like tuning and
zero-shot classification, by its arguments. The loss is in :mod:`lit_methods.prompting.coprompt.core`, deep prompts in
:mod:`lit_methods.prompting.towers`. Left out: loading prompts that the authors' code has saved.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.frozen import Frozen
from lit_methods.optim import scheduled, warmup_cosine_rate
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.prompting.coprompt.core import (
    Adapter,
    Criterion,
    adapter_features,
    coprompt_loss,
    cosine_logits,
    harmonic_mean,
    sentence_index,
    sentence_table,
)
from lit_methods.prompting.coprompt.prompts import FeatureAdapter, Prompts
from lit_methods.prompting.towers import TwoTowers
from lit_methods.steps import log_global, steps_per_epoch, training_length

TECHNIQUE = Technique(
    slug="coprompt",
    short="CoPrompt",
    title="Consistency-guided Prompt Learning for Vision-Language Models",
    arxiv="2306.01195",
    family="prompting",
    form="module",
    classes=(
        "lit_methods.CoPrompt",
        "lit_methods.callbacks.TwoTowerConsistency",
        "lit_methods.CLIPTowers",
        "lit_methods.TinyTowers",
        "lit_methods.datamodules.FewShotDataModule",
    ),
    configs=("coprompt.yaml", "coprompt_maple.yaml", "coprompt_coop.yaml"),
    golden=("loss", "lr_schedule", "prompt_transformer"),
    claim=(
        "On coloured shapes with 16 images a class, prompts and adapters with the consistency term reach a higher harmonic mean of base "
        "and new classes' accuracy than without it."
    ),
    summary=(
        "Tunes prompts and adapters of both of CLIP's towers to a few images a class, and keeps embeddings near the frozen towers' on "
        "perturbed inputs."
    ),
)

_CHUNK = 512  # texts that the frozen tower encodes at a time
SPLITS = ("base", "new")


class CoPrompt(LightningModule):
    """Tunes prompts and adapters of two frozen towers to a few images a class, without forgetting what the towers know.

    The loss is the cross-entropy of the cosines between images and class prompts, plus ``consistency_weight`` times the distance of both
    embeddings from those of the frozen towers, which see another view of the image and a sentence that describes the class. One sentence is
    drawn for each optimiser step, for all classes, and the same on all ranks.

    ============================  ============  ========  =================  =============  ======================
    method                        num_context   depth     visual_prompts     adapters       consistency_weight
    ============================  ============  ========  =================  =============  ======================
    CoPrompt                      2             9         True               True           8
    MaPLe                         2             9         True               False          0
    CoOp                          16            1         False              False          0
    adapters alone                0             1         False              True           0
    zero-shot (``lit validate``)  0             1         False              False          0
    ============================  ============  ========  =================  =============  ======================

    Runs: batches have ``image`` (B, 3, S, S) and ``label`` (B,) int64, and in training with a consistency term ``image_second``, another
    view. The names of the classes, their sentences and the template come from the datamodule (``base_classes``, ``new_classes``,
    ``descriptions``, ``template``) or from :meth:`set_classes`. The first evaluation loader has images of the base classes, the second of
    the new ones, each with labels from 0. Cosines, adapters and consistency are in float32 or wider. Works under DDP (batch means), with
    accumulation (one sentence for all micro-batches of a step), and with ``WeightEMA``.

    Saves: prompts and adapters alone. The towers are frozen and must be given again; class names aren't saved, so a checkpoint serves any
    classes.

    Refuses: classes without a name or a description; a batch without the second view; nothing to train; a training without an end.

    Args:
        towers: ``CLIPTowers`` with weights from a folder, or ``TinyTowers``. Never trained.
        num_context: n, trained tokens in front of the class name; 0: none, the template is used.
        depth: J, blocks that get prompts of their own, the first included; at most as many as each tower has.
        context_init: Words that the first prompt starts from if there are at least n of them; else it is drawn. None: drawn.
        visual_prompts: Prompts in the image tower, too.
        adapters: An adapter behind each tower.
        image_mix: Share of the image adapter.
        text_mix: Share of the text adapter.
        consistency_weight: lambda; 0: no consistency, and no pass through the frozen image tower.
        criterion: ``cosine``, ``mse`` or ``l1``, between unit vectors.
        learning_rate: SGD's learning rate after the warm-up.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay, for everything that is trained.
        warmup_epochs: First epochs, with a constant small rate.
        warmup_learning_rate: Theirs.
        compare_zero_shot: Evaluate the frozen towers, too: a second pass for each image.
        seed: Seed of the draw of sentences.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Parts of the loss", ("prompting/loss", "prompting/cross_entropy"), goal="min"),
        Curve("Consistency", ("prompting/consistency_text", "prompting/consistency_image"), note="Before lambda.", goal="min"),
        Curve(
            "Accuracy",
            ("prompting/val_base_accuracy", "prompting/val_new_accuracy", "prompting/val_harmonic_mean"),
            note="New classes below zero-shot: the prompts have forgotten what the towers knew.",
            goal="max",
        ),
        Curve("Zero-shot", ("prompting/val_zero_shot_*",), note="Of the frozen towers; it doesn't change."),
        Curve("Drift", ("prompting/val_drift_base", "prompting/val_drift_new"), note="1 - cosine of tuned and frozen image embeddings."),
        Curve("Norm of prompts", ("prompting/prompt_norm",)),
        TablePanel("Accuracy of each class", "prompting/classes"),
    )

    def __init__(
        self,
        towers: TwoTowers,
        num_context: int = 2,
        depth: int = 9,
        context_init: str | None = "a photo of a",
        visual_prompts: bool = True,
        adapters: bool = True,
        image_mix: float = 0.1,
        text_mix: float = 0.2,
        consistency_weight: float = 8.0,
        criterion: Criterion = "cosine",
        learning_rate: float = 0.0035,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_learning_rate: float = 1e-5,
        compare_zero_shot: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, num_context=num_context, consistency_weight=consistency_weight, warmup_epochs=warmup_epochs)
        checks.within("[0, 1]", "a share", image_mix=image_mix, text_mix=text_mix)
        checks.within("[0, 1)", momentum=momentum)
        checks.at_least(0, weight_decay=weight_decay)
        checks.positive(learning_rate=learning_rate, warmup_learning_rate=warmup_learning_rate)
        checks.one_of(Criterion, criterion=criterion)
        layers = min(towers.sizes.text_layers, towers.sizes.image_layers) if visual_prompts else towers.sizes.text_layers
        if num_context and not 1 <= depth <= layers:
            raise ValueError(f"depth={depth}: these towers have {layers} blocks that can take prompts, give 1 to {layers}")
        self.save_hyperparameters(ignore=["towers"])
        self.towers = Frozen(towers)
        self.consistency_weight, self.criterion = consistency_weight, criterion
        self.image_mix, self.text_mix, self.num_context = image_mix, text_mix, num_context
        self.prefix = ""
        self.prompts: Prompts | None = None
        if num_context:
            words = [] if context_init is None else context_init.replace("_", " ").split()
            known = num_context <= len(words)
            self.prefix = " ".join(words) if known else " ".join(["X"] * num_context)
            width = towers.sizes.text_width
            with torch.no_grad():
                drawn = 0.02 * torch.randn(num_context, width)
                first = towers.words(towers.tokenize([self.prefix]))[0, 1 : 1 + num_context] if known else drawn
            self.prompts = Prompts(first, depth, towers.sizes.image_width if visual_prompts else None)
        dim = towers.sizes.embed_dim
        self.image_adapter = FeatureAdapter(dim) if adapters else None
        self.text_adapter = FeatureAdapter(dim) if adapters else None
        self.classes: dict[str, tuple[str, ...]] = {}
        self.template, self.descriptions = "a photo of a {}.", dict[str, list[str]]()
        self._teacher_text: Tensor | None = None
        self._ids: dict[str, Tensor] = {}
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        self._counts: dict[str, Tensor] = {}
        self._drift: dict[str, Tensor] = {}
        self._media: dict[str, Media] = {}

    # ---- classes -----------------------------------------------------------------------------------------------------------------------

    def set_classes(
        self,
        base_classes: Sequence[str],
        new_classes: Sequence[str] = (),
        descriptions: Mapping[str, Sequence[str]] | None = None,
        template: str = "a photo of a {}.",
    ) -> None:
        """Which classes there are. A datamodule that knows them is asked by itself.

        Args:
            base_classes: Names of the classes 0, 1, ... of training and of the first evaluation loader.
            new_classes: Names of the classes of the second evaluation loader.
            descriptions: Class name -> sentences, for the consistency term; equally many for every base class.
            template: A text with ``{}`` for the name, for zero-shot classification.

        Raises:
            ValueError: No base class, or a template without ``{}``.
        """
        if not base_classes or "{}" not in template:
            raise ValueError(f"{len(base_classes)} base classes and template={template!r}: give 1 or more, and a text with {{}}")
        self.classes = {"base": tuple(base_classes), "new": tuple(new_classes)}
        self.descriptions = {name: list(own) for name, own in (descriptions or {}).items()}
        self.template = template
        self._teacher_text, self._texts, self._ids = None, {}, {}

    def setup(self, stage: str) -> None:
        """Ask the datamodule for the classes.

        Raises:
            RuntimeError: Neither it nor :meth:`set_classes` names them.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "base_classes", ()):
            named = {name: getattr(data, name) for name in ("new_classes", "descriptions", "template") if hasattr(data, name)}
            self.set_classes(data.base_classes, **named)
        if not self.classes:
            raise RuntimeError(
                "CoPrompt doesn't know the names of the classes: use a datamodule with base_classes, such as FewShotDataModule, or call "
                "set_classes(...) before the run"
            )
        if stage == "fit" and self.consistency_weight > 0:
            sentence_table(self.classes["base"], self.descriptions)

    def prompt_ids(self, split: str) -> Tensor:
        """(C, L) int64 tokens of the prompts of ``base`` or ``new``: with places for trained tokens if there are any, else the template."""
        if split not in self._ids:
            names = [name.replace("_", " ") for name in self.classes[split]]
            texts = [f"{self.prefix} {name}." for name in names] if self.num_context else [self.template.format(name) for name in names]
            with torch.inference_mode(False):  # an evaluation may ask first, and training goes on with the same tensor
                self._ids[split] = self._tokens(texts)
        return self._ids[split].to(self.device)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        return self._clip.cut(self._clip.tokenize(texts)).to(self.device)

    @property
    def _clip(self) -> TwoTowers:
        """The frozen towers, past the holder that hides them from the optimiser."""
        return self.towers.module  # type: ignore[return-value]

    # ---- embeddings --------------------------------------------------------------------------------------------------------------------

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, D) of the tuned tower, before its adapter; gradients reach the prompts."""
        prompt, deep = self.prompts.of_image() if self.prompts is not None else (None, None)
        return self._clip.encode_image(images, prompt, deep)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """(C, D) of the tuned tower, before its adapter."""
        if self.prompts is None:
            return self._clip.encode_text(ids)
        return self._clip.encode_text(ids, self.prompts.context, self.prompts.deep)

    @torch.no_grad()
    def frozen_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) unit embeddings of plain texts by the frozen tower."""
        ids = self._tokens(texts)
        return torch.cat([F.normalize(self._clip.encode_text(part).float(), dim=1) for part in ids.split(_CHUNK)])

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with."""
        return self._clip.logit_scale.float().exp()

    @property
    def adapters(self) -> tuple[Adapter | None, Adapter | None]:
        """Weights of the image adapter and of the text adapter."""
        return (
            None if self.image_adapter is None else self.image_adapter.weights,
            None if self.text_adapter is None else self.text_adapter.weights,
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) images -> (B, C) scaled cosines with the base classes."""
        return self._logits(images, self.tuned_texts("base"))

    def tuned_texts(self, split: str) -> Tensor:
        """(C, D) embeddings of the classes of ``base`` or ``new``, adapter included."""
        return adapter_features(self.embed_texts(self.prompt_ids(split)), self.adapters[1], self.text_mix)

    def _logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return cosine_logits(adapter_features(self.embed_images(images), self.adapters[0], self.image_mix), texts, self.scale)

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy plus the weighted consistency."""
        image, text, labels = self.embed_images(batch["image"]), self.embed_texts(self.prompt_ids("base")), batch["label"]
        adapters = self.adapters
        if self.consistency_weight > 0:
            if "image_second" not in batch:
                raise ValueError(
                    f"the batch has {sorted(batch)} and no 'image_second', another view of the images: use FewShotDataModule, or set "
                    "consistency_weight to 0"
                )
            losses = coprompt_loss(
                image,
                text,
                self.towers_image(batch["image_second"]),
                self._teacher_texts(),
                labels,
                logit_scale=self.scale,
                consistency_weight=self.consistency_weight,
                criterion=self.criterion,
                image_adapter=adapters[0],
                text_adapter=adapters[1],
                image_mix=self.image_mix,
                text_mix=self.text_mix,
            )
            loss, entropy = losses.total, losses.cross_entropy
            logs = {"consistency_text": losses.consistency_text, "consistency_image": losses.consistency_image}
        else:
            own = adapter_features(image, adapters[0], self.image_mix), adapter_features(text, adapters[1], self.text_mix)
            loss = entropy = F.cross_entropy(cosine_logits(*own, self.scale), labels)
            logs = {}
        if self.prompts is not None:
            logs["prompt_norm"] = self.prompts.context.norm(dim=1).mean()
        logs["cross_entropy"] = entropy
        self.log("prompting/loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        self.log_dict({f"prompting/{name}": value.detach() for name, value in logs.items()}, batch_size=len(labels))
        return loss

    @torch.no_grad()
    def towers_image(self, images: Tensor) -> Tensor:
        """(B, D) of the frozen image tower."""
        return self._clip.encode_image(images)

    def _teacher_texts(self) -> Tensor:
        """(C, D): a sentence for each base class, of this step."""
        if self._teacher_text is None:  # (S, C, D)
            rows = sentence_table(self.classes["base"], self.descriptions)
            self._teacher_text = self.frozen_texts([text for row in rows for text in row]).unflatten(0, (len(rows), -1))
        table = self._teacher_text
        return table[sentence_index(self.trainer.global_step, len(table), self.hparams["seed"])]

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin_evaluation(self) -> None:
        self._texts, self._counts, self._drift = {}, {}, {}
        for split in SPLITS:
            names = self.classes[split]
            if names:
                frozen = self.frozen_texts([self.template.format(name.replace("_", " ")) for name in names])
                self._texts[split] = self.tuned_texts(split), frozen
                self._counts[split] = torch.zeros(3, len(names), dtype=torch.int64, device=self.device)  # seen, right, right zero-shot
                self._drift[split] = torch.zeros((), device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Embed the classes: now that averaged weights, if there are any, are in place."""
        self._begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Embed the classes."""
        self._begin_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Embed the classes."""
        self._begin_evaluation()

    def _split(self, dataloader_idx: int) -> str:
        if dataloader_idx >= len(self._texts):
            raise ValueError(
                f"evaluation loader {dataloader_idx} has no classes: the first is of base_classes, the second of new_classes, and there "
                f"are {len(self.classes['base'])} and {len(self.classes['new'])}"
            )
        return SPLITS[dataloader_idx]

    def _evaluate(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        split, labels = self._split(dataloader_idx), batch["label"]
        text, frozen_text = self._texts[split]
        image = adapter_features(self.embed_images(batch["image"]), self.adapters[0], self.image_mix)
        right = cosine_logits(image, text, 1.0).argmax(dim=1) == labels
        zero = torch.zeros_like(right)
        if self.hparams["compare_zero_shot"]:
            frozen = self.towers_image(batch["image"]).float()
            zero = cosine_logits(frozen, frozen_text, 1.0).argmax(dim=1) == labels
            self._drift[split] += (1 - F.cosine_similarity(image.float(), frozen)).sum()
        self._counts[split].index_add_(1, labels, torch.stack([torch.ones_like(right), right, zero]).long())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Accuracies over all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Accuracies over all ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        accuracy: dict[str, Tensor] = {}
        rows: list[tuple[Any, ...]] = []
        logs: dict[str, Tensor] = {}
        for split, own in self._counts.items():
            counts = gather_rows(own[None], with_grad=False).sum(0)
            drift = gather_rows(self._drift[split][None], with_grad=False).sum()
            seen, right, zero = counts.sum(1)
            if seen == 0:  # fewer batches than loaders
                continue
            accuracy[split] = right / seen
            logs[f"{split}_accuracy"] = accuracy[split]
            if self.hparams["compare_zero_shot"]:
                logs |= {f"zero_shot_{split}_accuracy": zero / seen, f"drift_{split}": drift / seen}
            rows += [
                (name, split, round(own_right / all_, 4), round(zero_right / all_, 4) if self.hparams["compare_zero_shot"] else None)
                for name, (all_, own_right, zero_right) in zip(self.classes[split], counts.T.tolist(), strict=True)
                if all_
            ]
        if len(accuracy) == len(SPLITS):
            logs["harmonic_mean"] = harmonic_mean(accuracy["base"], accuracy["new"])
            if self.hparams["compare_zero_shot"]:
                logs["zero_shot_harmonic_mean"] = harmonic_mean(*(logs[f"zero_shot_{split}_accuracy"] for split in SPLITS))
        for name, value in logs.items():
            log_global(self, {f"prompting/{stage}_{name}": value}, prog_bar=name == "harmonic_mean")
        self._media["prompting/classes"] = TableMedia(("class", "part", "accuracy", "zero-shot"), tuple(rows))
        self._texts = {}

    def dashboard_media(self) -> dict[str, Media]:
        """The table of classes."""
        return self._media

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``logits`` (B, C) of the base classes (first loader) or the new ones (second), and ``label`` where the batch has one."""
        logits = self._logits(batch["image"], self._texts[self._split(dataloader_idx)][0])
        return {"logits": logits} | ({"label": batch["label"]} if "label" in batch else {})

    # ---- optimiser ---------------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with a rate for each epoch.

        Raises:
            ValueError: Nothing is trained, or the training has no end.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("num_context is 0 and adapters is False: there is nothing to train, evaluate zero-shot by lit validate")
        hp = self.hparams
        epochs = self.trainer.max_epochs or -1
        if epochs < 0:
            steps = training_length(self, what="the cosine over the epochs", instead=None)
            epochs = math.ceil(steps / steps_per_epoch(self, "the cosine"))
        rate: float = hp["learning_rate"]
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=hp["momentum"], weight_decay=hp["weight_decay"])

        def factor(epoch: int) -> float:
            return warmup_cosine_rate(epoch, rate, epochs, hp["warmup_epochs"], hp["warmup_learning_rate"]) / rate

        return scheduled(optimizer, factor, "epoch")


__all__ = ["CoPrompt"]
