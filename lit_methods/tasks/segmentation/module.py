"""Segmentation of images by one network: cross-entropy and Dice, measured on all pixels or volume by volume."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global, training_length
from lit_methods.tasks.segmentation.core import batch_dice, sample_cross_entropy
from lit_methods.tasks.segmentation.metrics import ClassCounts, dice_and_hd95

_COLOURS = np.array(
    [[0, 0, 0], [230, 100, 60], [70, 140, 230], [110, 190, 80], [220, 190, 60], [170, 90, 200], [80, 200, 200]], dtype=np.uint8
)


def colour_labels(labels: NDArray[np.integer[Any]], ignore_index: int = 255) -> NDArray[np.uint8]:
    """(..., 3) RGB of (...) labels: black background, white where ``ignore_index``."""
    colours = _COLOURS[np.where(labels <= 0, 0, (labels - 1) % (len(_COLOURS) - 1) + 1)]
    colours[labels == ignore_index] = 255
    return colours


def grey_image(image: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3) of a (C, H, W) image in any range, stretched to 0 to 255."""
    pixels = image.detach().float().cpu()[:3]
    low, high = pixels.min(), pixels.max()
    pixels = ((pixels - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()


class ImageSegmentor(Evaluated):
    """Trains a network to tell the class of every pixel.

    The loss is (1 - ``dice_ratio``) cross-entropy + ``dice_ratio`` Dice.

    Runs: batches have ``image`` (B, C, H, W) float32 and ``label`` (B, H, W) int64, 0 for the background; further keys, such as a second
    view and ``index``, are for callbacks. In evaluation a batch with ``volume`` is one volume: (S, C, h, w) slices and (S, H, W) labels,
    whose size may be another; predictions are resized to it without interpolation. ``forward`` takes images and returns (B, num_classes, H,
    W) logits. Dice and IoU are means over the foreground classes of all pixels together; ``segmentation/val_dice/<class>`` is that of a
    class, ``segmentation/test_volume_dice`` and ``segmentation/test_hd95`` are means over volumes and foreground classes.

    Saves: the network.

    Refuses: ``poly_power`` in a training without an end.

    Args:
        network: Images -> logits, such as ``SmallUNet2d``, ``TimmUNet`` or ``LargeFOV``.
        num_classes: Classes, the background counted.
        class_names: Names of all classes; None numbers them.
        dice_ratio: Share of the Dice loss; 0: cross-entropy alone.
        ignore_index: Label of pixels that don't count.
        optimizer: ``sgd`` or ``adam``.
        learning_rate: At the start.
        momentum: SGD's momentum.
        weight_decay: Weight decay of the optimiser.
        poly_power: The learning rate falls as (1 - step / steps) to this power; 0: constant.
        slices_per_pass: Slices of a volume that the network takes at once.

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Segmentation loss", ("segmentation/loss",), goal="min"),
        Curve("Dice", ("segmentation/val_dice", "segmentation/test_dice"), note="Mean over the foreground classes.", goal="max"),
        Curve("IoU", ("segmentation/val_iou", "segmentation/val_miou"), note="Without and with the background.", goal="max"),
        ImagePanel("Predictions", "segmentation/predictions", note="Image, label, prediction."),
        TablePanel("Dice of volumes", "segmentation/volumes"),
    )

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 4,
        class_names: Sequence[str] | None = None,
        dice_ratio: float = 0.5,
        ignore_index: int = 255,
        optimizer: Literal["sgd", "adam"] = "adam",
        learning_rate: float = 3e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        poly_power: float = 0.0,
        slices_per_pass: int = 24,
    ) -> None:
        super().__init__()
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.within("[0, 1]", "a share", dice_ratio=dice_ratio)
        checks.positive(learning_rate=learning_rate)
        checks.within("[0, 1)", momentum=momentum)
        checks.at_least(0, weight_decay=weight_decay, poly_power=poly_power)
        checks.at_least(1, "slices", slices_per_pass=slices_per_pass)
        checks.one_of(("sgd", "adam"), optimizer=optimizer)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes={num_classes}")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.class_names = tuple(class_names or (str(c) for c in range(num_classes)))
        self.eval_counts = ClassCounts(num_classes, ignore_index)
        self.eval_dice, self.eval_distance = MeanMetric(), MeanMetric()
        self._volumes: list[tuple[Any, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes, H, W) logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of the first view."""
        logits, labels = self(batch["image"]), batch["label"]
        ratio = self.hparams["dice_ratio"]
        with torch.autocast(logits.device.type, enabled=False):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = (1 - ratio) * sample_cross_entropy(wide, labels, self.ignore_index).mean()
            if ratio:
                loss = loss + ratio * batch_dice(wide, labels, self.ignore_index)
        self.log("segmentation/loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    # ---- evaluation ------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch, or a whole volume, to the measures."""
        if "volume" in batch:
            self._add_volume(batch)
            return
        prediction, labels = self(batch["image"]).argmax(dim=1), batch["label"]
        self.eval_counts.update(prediction, labels)
        if batch_idx == 0:
            columns = []
            for image, label, guess in zip(batch["image"][:8], labels[:8].cpu().numpy(), prediction[:8].cpu().numpy(), strict=True):
                columns.append(np.concatenate([grey_image(image), colour_labels(label), colour_labels(guess)], axis=0))
            zoom = max(1, 96 // labels.shape[1])
            picture = np.concatenate(columns, axis=1).repeat(zoom, axis=0).repeat(zoom, axis=1)
            self._media["segmentation/predictions"] = ImageMedia(picture, "Held-out images, below them their labels, and the predictions")

    def _add_volume(self, batch: dict[str, Any]) -> None:
        labels = batch["label"]
        prediction = torch.cat([self(part).argmax(dim=1) for part in batch["image"].split(self.hparams["slices_per_pass"])])
        if prediction.shape != labels.shape:
            prediction = F.interpolate(prediction[:, None].float(), size=labels.shape[1:], mode="nearest")[:, 0].long()
        self.eval_counts.update(prediction, labels)
        guess, truth = prediction.cpu().numpy(), labels.cpu().numpy()
        scores = [dice_and_hd95(guess == c, truth == c) for c in range(1, self.num_classes)]
        self._volumes.append((str(batch["volume"]), *(round(100 * dice, 2) for dice, _ in scores)))
        for dice, distance in scores:
            self.eval_dice.update(dice)
            self.eval_distance.update(distance)

    def _log_evaluation(self, part: Part) -> None:
        hits, predicted, labelled = self.eval_counts.compute().double()
        self.eval_counts.reset()
        there = (predicted + labelled) > 0
        dice = 2 * hits / (predicted + labelled).clamp(min=1)
        iou = hits / (predicted + labelled - hits).clamp(min=1)
        seen = there[1:].sum().clamp(min=1)
        log_global(self, {f"segmentation/{part}_dice": (dice[1:].sum() / seen).float()}, prog_bar=True)
        figures = {"iou": iou[1:].sum() / seen, "miou": iou.sum() / there.sum().clamp(min=1)}
        figures |= {f"dice/{name}": value for name, value in zip(self.class_names[1:], dice[1:], strict=True)}
        if int(gather_rows(torch.tensor([len(self._volumes)])).sum()):  # a rank may have had none
            figures |= {"volume_dice": self.eval_dice.compute(), "hd95": self.eval_distance.compute()}
        log_global(self, {f"segmentation/{part}_{name}": value.float() for name, value in figures.items()})
        if self._volumes:
            self._media["segmentation/volumes"] = TableMedia(("volume", *self.class_names[1:]), tuple(self._volumes))
            self._volumes = []
        self.eval_dice.reset()
        self.eval_distance.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """``label`` (B, H, W) int64: the likeliest class of each pixel."""
        return {"label": torch.cat([self(part).argmax(dim=1) for part in batch["image"].split(self.hparams["slices_per_pass"])])}

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """SGD or Adam, with the polynomial decay."""
        hp, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "adam":
            optimizer = torch.optim.Adam(trained, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        else:
            optimizer = torch.optim.SGD(trained, lr=hp["learning_rate"], momentum=hp["momentum"], weight_decay=hp["weight_decay"])
        if not hp["poly_power"]:
            return optimizer
        total = training_length(self, what=f"poly_power={hp['poly_power']}", instead=None)
        return scheduled(optimizer, lambda step: max(0.0, 1 - step / total) ** hp["poly_power"])


__all__ = ["ImageSegmentor", "colour_labels", "grey_image"]
