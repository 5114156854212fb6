"""I-JEPA: images are learned by predicting the features of some blocks of patches from other patches (arXiv:2301.08243).

Masks, networks and maths stand beside this file. Source: facebookresearch/ijepa@52c1ae9 (src/train.py, src/helper.py). Left out: the
stretching of the schedules beyond the training (``ipe_scale``), and several contexts for an image, which the paper doesn't use.
"""

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks, distributed
from lit_methods.averages import ema_update, linear_decay, state_tensors
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import own_seed
from lit_methods.self_supervised.jepa import Distance, jepa_loss, jepa_targets, learning_rate_at, weight_decay_at
from lit_methods.self_supervised.masks import check_blocks, draw_block_masks
from lit_methods.self_supervised.networks import ViTPredictor
from lit_methods.steps import log_global, steps_per_epoch, training_length

if TYPE_CHECKING:
    from typing_extensions import Self


class IJEPA(Evaluated):
    """Learns images without labels: from the visible patches, predicts the features that an averaged encoder has of hidden blocks.

    Of each image the encoder sees the context, a large block without the target blocks. A narrow predictor gives the features of the target
    blocks at their places; the target encoder, which sees the whole image, has made those that it should give. The loss is their smooth L1
    distance, after the target features are normalised. The target encoder isn't trained: after each optimiser step it becomes m times
    itself plus (1 - m) times the encoder, with m rising linearly to 1 over the training.

    ``forward`` gives what is learned: the target encoder's tokens, averaged over the patches, (B, width).

    Runs: batches have ``image`` (B, channels, H, W), such as those of the classification datamodules; labels aren't used. Masks follow from
    ``seed``, step, batch and rank, their sizes not from the rank. AdamW has learning rate and weight decay of their own for each step;
    biases and norms have no weight decay. After validation the same loss is logged over the validation images.

    Saves: encoder, target encoder and predictor.

    Refuses: a training without an end, unless ``total_steps`` is given; a grid that is too small for the blocks; an encoder without the
    attributes ``grid`` and ``width``.

    Args:
        encoder: ``encoder(images, masks)`` -> tokens, with ``grid``, ``width`` and ``heads``, such as ``ViTEncoder``.
        predictor_width: Numbers in a token of the predictor.
        predictor_depth: Blocks of the predictor.
        predictor_heads: Its heads of attention; None: as many as the encoder's.
        target_blocks: Blocks to predict in each image.
        target_scale: Their smallest and largest area, as a share of the image.
        target_aspect: Their smallest and largest height / width.
        context_scale: Smallest and largest area of the context's block, as a share of the image.
        min_keep: Patches that a context has more than.
        distance: ``smooth_l1``, as in the authors' code, or ``mse``, as in the paper's text.
        momentum: m of the first step, in [0, 1].
        learning_rate: The highest, at the end of the warm-up.
        start_learning_rate: Learning rate that the warm-up begins at.
        final_learning_rate: Learning rate of the last step.
        warmup_epochs: Epochs of linear rise; may be a fraction.
        weight_decay: AdamW's weight decay at the start.
        final_weight_decay: And at the end, along half a cosine.
        total_steps: Optimiser steps over which the schedules go; None: the length of the training.
        seed: Seed of the masks.

    Raises:
        ValueError: An argument outside its range, or an encoder that doesn't fit.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss of the prediction", ("jepa/loss", "jepa/val_loss"), note="Its targets move: compare features, not losses.", goal="min"),
        Curve("Spread of the features", ("jepa/feature_std",), note="Standard deviation over the images of a batch; near 0: collapse."),
        Curve("Momentum of the target encoder", ("jepa/momentum",)),
    )

    def __init__(
        self,
        encoder: nn.Module,
        predictor_width: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int | None = None,
        target_blocks: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        distance: Distance = "smooth_l1",
        momentum: float = 0.996,
        learning_rate: float = 1e-3,
        start_learning_rate: float = 2e-4,
        final_learning_rate: float = 1e-6,
        warmup_epochs: float = 40,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        missing = [name for name in ("grid", "width") if not hasattr(encoder, name)]
        if missing:
            raise ValueError(
                f"encoder is a {type(encoder).__name__} without {' and '.join(missing)}: expected an encoder of patches with grid (rows, "
                "columns) and width, whose forward takes images and masks, such as ViTEncoder"
            )
        checks.at_least(1, target_blocks=target_blocks, total_steps=total_steps)
        checks.at_least(0, min_keep=min_keep, warmup_epochs=warmup_epochs)
        for name, (low, high) in {"target_scale": target_scale, "context_scale": context_scale}.items():
            checks.within("(0, 1]", "a share of the image", **{f"{name}[0]": low, f"{name}[1]": high})
        checks.positive(learning_rate=learning_rate, **{f"target_aspect[{place}]": value for place, value in enumerate(target_aspect)})
        checks.at_least(0, start_learning_rate=start_learning_rate, final_learning_rate=final_learning_rate)
        checks.at_least(0, weight_decay=weight_decay, final_weight_decay=final_weight_decay)
        checks.one_of(Distance, distance=distance)
        checks.share(momentum=momentum)
        self.save_hyperparameters(ignore=["encoder"])
        built: Any = encoder  # whose attributes were looked for above
        check_blocks(built.grid, target_scale, target_aspect, context_scale, min_keep)
        heads = predictor_heads if predictor_heads is not None else getattr(built, "heads", 1)
        self.encoder, self._grid = encoder, built.grid
        self.predictor = ViTPredictor(built.grid, built.width, predictor_width, predictor_depth, heads)
        self.target_encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.eval_loss = MeanMetric()
        self._length = 1  # of the schedules, in optimiser steps

    def train(self, mode: bool = True) -> "Self":
        """The target encoder always evaluates."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) images -> (B, width) features: the target encoder's tokens, averaged."""
        return self.target_encoder(images).mean(1)

    def draw_masks(self, batch_size: int, place: str) -> tuple[Tensor, Tensor]:
        """Context (1, B, n) and targets (M, B, k): indices of patches, on the module's device. ``place`` and seed say which."""
        hp = self.hparams
        sizes, places = (
            torch.Generator().manual_seed(own_seed(f"IJEPA {what} {place}", hp["seed"]))
            for what in ("sizes", f"places on rank {distributed.rank()}")
        )
        names = ("target_blocks", "target_scale", "target_aspect", "context_scale", "min_keep")
        masks = draw_block_masks(batch_size, self._grid, sizes, places, **{name: hp[name] for name in names})
        context, targets = (mask.to(self.device, non_blocking=True) for mask in masks)
        return context, targets

    def prediction_loss(self, images: Tensor, place: str) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of everything.

        Args:
            images: (B, channels, H, W).
            place: What the masks follow from.

        Returns:
            Scalar loss; (B, n, width) tokens of the context; (B, N, width) features of the target encoder, without a gradient.
        """
        context, targets = self.draw_masks(len(images), place)
        with torch.no_grad():
            features = self.target_encoder(images)
        tokens = self.encoder(images, context)
        predictions = self.predictor(tokens, context, targets)
        return jepa_loss(predictions, jepa_targets(features, targets, len(context)), self.hparams["distance"]), tokens, features

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _, features = self.prediction_loss(batch["image"], f"step {self.global_step} batch {batch_idx}")
        self.log_prediction(loss, features)
        return loss

    def log_prediction(self, loss: Tensor, features: Tensor) -> None:
        """What is logged of the prediction in training."""
        self.log("jepa/loss", loss.detach(), prog_bar=True, batch_size=len(features))
        self.log("jepa/feature_std", features.float().mean(1).std(0, correction=0).mean(), batch_size=len(features))
        self.log("jepa/momentum", self.momentum(), batch_size=len(features))

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, _, _ = self.prediction_loss(batch["image"], f"evaluation batch {batch_idx}")
        self.eval_loss.update(loss, weight=len(batch["image"]))

    def _log_evaluation(self, part: Part) -> None:
        log_global(self, {f"jepa/{part}_loss": self.eval_loss.compute()}, prog_bar=True)
        self.eval_loss.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``feature`` (B, width), and ``label`` where the batch has one."""
        return {"feature": self(batch["image"])} | ({"label": batch["label"]} if "label" in batch else {})

    # ---- optimiser -------------------------------------------------------------------------------------------------------------------

    def momentum(self) -> float:
        """M of the optimiser step that comes next."""
        return linear_decay(self.global_step, self._length, self.hparams["momentum"])

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay leaves a parameter alone."""
        return "bias" in name or parameter.ndim < 2

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; its learning rate changes with every step, and its weight decay in :meth:`optimizer_step`."""
        hp = self.hparams
        self._length = training_length(self, hp["total_steps"], what="the schedule of I-JEPA")
        warmup = round(hp["warmup_epochs"] * steps_per_epoch(self, "warmup_epochs")) if hp["warmup_epochs"] else 0
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        bare = {name for name, parameter in trained.items() if self.undecayed(name, parameter)}
        groups: list[dict[str, Any]] = [
            {"params": [parameter for name, parameter in trained.items() if name not in bare], "decays": True},
            {"params": [trained[name] for name in trained if name in bare], "weight_decay": 0.0, "decays": False},
        ]
        peak, rates = hp["learning_rate"], (hp["start_learning_rate"], hp["learning_rate"], hp["final_learning_rate"])
        optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=hp["weight_decay"])
        return scheduled(optimizer, lambda step: learning_rate_at(step + 1, self._length, warmup, *rates) / peak)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """The step's weight decay first; the target encoder follows at once, so that a checkpoint saved when the batch ends has it."""
        hp, momentum = self.hparams, self.momentum()
        for group in optimizer.param_groups:
            if group.get("decays"):
                group["weight_decay"] = weight_decay_at(self.global_step + 1, self._length, hp["weight_decay"], hp["final_weight_decay"])
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        ema_update(state_tensors(self.target_encoder), state_tensors(self.encoder), momentum)


__all__ = ["IJEPA"]
