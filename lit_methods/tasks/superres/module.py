"""Super-resolution with any network: the module that techniques for it attach to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.runs.checkpoints import load_into
from lit_methods.steps import log_global
from lit_methods.tasks.superres.metrics import LuminancePSNR, LuminanceSSIM, psnr_y, to_uint8
from lit_methods.tasks.superres.networks import enlarge

_SHOWN = 192  # pixels of the picture's side at high resolution


class SuperResolution(LightningModule):
    """Trains a network to enlarge images, with the mean absolute error of the pixels.

    Runs: batches have ``lr`` (B, C, h, w) and ``hr`` (B, C, scale * h, scale * w) float32 in [0, 1], C 3 (RGB) or 1 (luminance), and, for
    evaluation, ``name``, a list of B strings; such as those of ``SuperResolutionDataModule``. ``forward`` takes ``lr`` and returns the
    enlarged images, not clipped. PSNR (dB) and SSIM are those of the luminance of 8-bit images, ``crop_border`` pixels left out, means over
    images, beside plain bicubic enlargement; in a test for each loader, named by the datamodule's ``test_names``.

    Saves: the network.

    Refuses: a network, module and data of different scales.

    Args:
        network: (B, C, h, w) -> (B, C, scale * h, scale * w), such as ``EDSR`` or ``Swin2SRNetwork``.
        scale: Enlargement.
        learning_rate: Adam's learning rate.
        betas: Adam's two momentum decay rates.
        milestones: Optimiser steps at which the learning rate is multiplied by ``gamma``; under ``IterativeSoftShrinkage`` they count from
            the switch.
        gamma: Factor at a milestone.
        crop_border: Pixels left out by the metrics; None: ``scale``.
        pretrained: Checkpoint that ``network`` starts from; None: as it was built.
        pretrained_prefix: What stands before the network's names in that file.

    Raises:
        ValueError: A value lies outside its range, or ``pretrained`` doesn't fit the network.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("L1 loss", ("superres/loss",), goal="min"),
        Curve(
            "PSNR (Y)",
            ("superres/val_psnr", "superres/val_psnr_bicubic", "superres/test_psnr/*"),
            note="dB. Below bicubic, the network is of no use yet.",
            goal="max",
        ),
        Curve("SSIM (Y)", ("superres/val_ssim", "superres/test_ssim/*"), goal="max"),
        ImagePanel("Bicubic, network, truth", "superres/picture", note="From the middle of the first validation image."),
    )

    def __init__(
        self,
        network: nn.Module,
        scale: int = 2,
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        milestones: Sequence[int] = (),
        gamma: float = 0.5,
        crop_border: int | None = None,
        pretrained: Path | None = None,
        pretrained_prefix: str = "network.",
    ) -> None:
        super().__init__()
        checks.at_least(1, scale=scale)
        checks.positive(learning_rate=learning_rate)
        checks.betas(betas=betas)
        checks.at_least(0, gamma=gamma)
        checks.at_least(0, "pixels", crop_border=crop_border)
        if list(milestones) != sorted(milestones) or any(step < 1 for step in milestones):
            raise ValueError(f"milestones={list(milestones)} are optimiser steps, 1 or more, in rising order")
        if getattr(network, "scale", scale) != scale:
            raise ValueError(f"the network enlarges by {network.scale}, but scale={scale}: give both the same")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        if pretrained is not None:
            load_into(network, pretrained, pretrained_prefix)
        self.scale, self.border = scale, scale if crop_border is None else crop_border
        self.val_psnr, self.val_ssim = LuminancePSNR(self.border), LuminanceSSIM(self.border)
        self.val_psnr_bicubic = LuminancePSNR(self.border)
        self.test_metrics = nn.ModuleList()
        self._test_names: list[str] = []
        self._media: dict[str, Media] = {}

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, scale * h, scale * w)."""
        return self.network(images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """L1 loss of a batch."""
        sr = self(batch["lr"])
        if sr.shape != batch["hr"].shape:
            raise ValueError(
                f"the network makes {tuple(sr.shape)} of {tuple(batch['lr'].shape)}, but the batch's hr is {tuple(batch['hr'].shape)}: "
                "give network, module and datamodule the same scale and channels"
            )
        loss = F.l1_loss(sr, batch["hr"])
        self.log("superres/loss", loss.detach(), prog_bar=True, batch_size=len(sr))
        return loss

    # ---- evaluation ------------------------------------------------------------------------------------------------------------------

    def psnr_y(self, batch: dict[str, Any]) -> Tensor:
        """(B,) PSNR of an evaluation batch, dB; what ``IterativeSoftShrinkage(probe="psnr_y")`` asks for."""
        return psnr_y(self(batch["lr"]), batch["hr"], self.border)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics; the first one makes the picture."""
        sr, bicubic = self(batch["lr"]), enlarge(batch["lr"], self.scale)
        self.val_psnr.update(sr, batch["hr"])
        self.val_ssim.update(sr, batch["hr"])
        self.val_psnr_bicubic.update(bicubic, batch["hr"])
        if batch_idx == 0 and dataloader_idx == 0 and self.trainer.is_global_zero:
            alt = f"{batch['name'][0]}, enlarged {self.scale} times: bicubic, by the network, and as it is"
            self._media["superres/picture"] = ImageMedia(side_by_side([bicubic[0], sr[0], batch["hr"][0]]), alt)

    def on_validation_epoch_end(self) -> None:
        """Logs means over all images of all ranks."""
        for name in ("val_psnr", "val_ssim", "val_psnr_bicubic"):
            metric = getattr(self, name)
            log_global(self, {f"superres/{name}": metric.compute()}, prog_bar=name == "val_psnr")
            metric.reset()

    def on_test_start(self) -> None:
        """Metrics for every test loader."""
        loaders = self.trainer.test_dataloaders
        number = len(loaders) if isinstance(loaders, list | tuple) else 1
        names = list(getattr(getattr(self.trainer, "datamodule", None), "test_names", ()))
        self._test_names = names if len(names) == number else [str(index) for index in range(number)]
        pairs = [nn.ModuleList([LuminancePSNR(self.border), LuminanceSSIM(self.border)]) for _ in range(number)]
        self.test_metrics = nn.ModuleList(pairs).to(self.device)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics of its set."""
        sr, metrics = self(batch["lr"]), self.test_metrics[dataloader_idx]
        assert isinstance(metrics, nn.ModuleList)
        for metric in metrics:
            metric.update(sr, batch["hr"])  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Logs means over all images of all ranks, set by set."""
        for name, metrics in zip(self._test_names, self.test_metrics, strict=True):
            assert isinstance(metrics, nn.ModuleList)
            for kind, metric in zip(("psnr", "ssim"), metrics, strict=True):
                log_global(self, {f"superres/test_{kind}/{name}": metric.compute()})  # type: ignore[operator]
        self.test_metrics = nn.ModuleList()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Enlarged images.

        Returns:
            ``sr`` (B, C, scale * h, scale * w) uint8, and ``name`` as it stands in the batch, where it has one.
        """
        return {"sr": to_uint8(self(batch["lr"]))} | ({"name": batch["name"]} if "name" in batch else {})

    def dashboard_media(self) -> dict[str, Media]:
        """The picture of the last validation."""
        return self._media

    # ---- optimiser -------------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam without weight decay, learning rate in steps."""
        hp = self.hparams
        optimizer = torch.optim.Adam(self.parameters(), lr=hp["learning_rate"], betas=tuple(hp["betas"]))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=list(hp["milestones"]), gamma=hp["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def side_by_side(images: Sequence[Tensor], gap: int = 4) -> np.ndarray:
    """Squares from the middle of images, from left to right, with white between them.

    Args:
        images: (C, H, W) in [0, 1] or uint8, C 1 or 3, of one size.
        gap: Pixels between two.

    Returns:
        (h, w, 3) uint8.
    """
    height, width = images[0].shape[1:]
    side = min(height, width, _SHOWN)
    top, left = (height - side) // 2, (width - side) // 2
    parts = [to_uint8(image[:, top : top + side, left : left + side]).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy() for image in images]
    white = np.full((side, gap, 3), 255, dtype=np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, white)][:-1], axis=1)


__all__ = ["SuperResolution", "side_by_side"]
