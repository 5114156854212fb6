"""The module of all MRI reconstructions: one training step, one evaluation, one set of pictures."""

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.image import structural_similarity_index_measure

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.inverse_problems.cirim.core import Loss, accumulated_loss, consistency_residual, image_distance, normalised_magnitude
from lit_methods.inverse_problems.mri import CENTERED, check_shapes, magnitude, sense_combine
from lit_methods.optim import linear_rise
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.steps import log_global, training_length

Schedule = Literal["constant", "inverse_sqrt"]
_WINDOW = 7  # pixels of SSIM's window, fastMRI's
_ERROR = 4  # how much brighter errors are shown
_HIGH = 96  # least height of the pictures, in pixels


def inverse_square_root(step: int, warmup_steps: int) -> float:
    """A linear rise to 1, then sqrt((warmup + 1) / (step + 1))."""
    return linear_rise(step, warmup_steps) if step < warmup_steps else ((warmup_steps + 1) / (step + 1)) ** 0.5


class Reconstruction(Evaluated):
    """Base: subclasses give a network that maps (k-space, coil maps, mask) to images (K, T, B, H, W, 2).

    Args:
        network: The network; its ``fourier`` is that of k-space.
        learning_rate: Adam's learning rate.
        betas: Adam's two momentum decay rates.
        schedule: ``constant``, or ``inverse_sqrt``: a linear rise over ``warmup_ratio``, then falling with the root of the step.
        warmup_ratio: Share of all steps, in [0, 1).
        loss: ``l1``, or ``ssim``: 0.9 (1 - SSIM) + 0.1 L1, of magnitudes over their maximum.
        accumulate: Train all steps of all cascades; false: the last image alone.
        cascade_weights: Later cascades count more.
        per_sample: Divide by the maximum of each image; false: by that of the batch.
        rescale: Measure each slice scaled to the largest magnitude of its target, as the loss sees it.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("mri/loss",), goal="min"),
        Curve("PSNR", ("mri/val_psnr", "mri/val_zero_filled_psnr"), note="dB, mean over volumes; the floor is zero-filled.", goal="max"),
        Curve("SSIM", ("mri/val_ssim", "mri/val_zero_filled_ssim"), note="Mean over volumes.", goal="max"),
        Curve("NMSE", ("mri/val_nmse",), note="Squared error over squared target.", goal="min"),
        Curve(
            "Data consistency",
            ("mri/val_residual", "mri/lambda/*"),
            note="Distance from what was measured; with explicit consistency also the weight lambda of each cascade.",
        ),
        ImagePanel("Reconstruction", "mri/pictures", note=f"Target, reconstruction, error ({_ERROR} times), zero-filled."),
    )

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        schedule: Schedule = "constant",
        warmup_ratio: float = 0.1,
        loss: Loss = "l1",
        accumulate: bool = True,
        cascade_weights: bool = True,
        per_sample: bool = False,
        rescale: bool = True,
    ) -> None:
        super().__init__()
        checks.one_of(Schedule, schedule=schedule)
        checks.one_of(Loss, loss=loss)
        checks.positive(learning_rate=learning_rate)
        checks.betas(betas=betas)
        checks.within("[0, 1)", "a share", warmup_ratio=warmup_ratio)
        self.network, self.fourier = network, getattr(network, "fourier", CENTERED)
        self.learning_rate, self.betas, self.schedule, self.warmup_ratio = learning_rate, betas, schedule, warmup_ratio
        self.loss, self.accumulate, self.cascade_weights, self.per_sample = loss, accumulate, cascade_weights, per_sample
        self.rescale = rescale
        self._rows: list[Tensor] = []
        self._seconds: list[float] = []

    def setup(self, stage: str) -> None:
        """Refuse a fit of something without weights.

        Raises:
            ValueError: There is nothing to train.
        """
        if stage == "fit" and not any(True for _ in self.network.parameters()):
            raise ValueError(f"{type(self).__name__} has nothing to train: use lit validate, lit test or lit predict")

    @staticmethod
    def measured(batch: Mapping[str, Any], *others: str) -> tuple[Tensor, Tensor, Tensor]:
        """K-space, which is set to 0 where the mask is false, coil maps and mask of a batch.

        Raises:
            ValueError: One is missing, or the shapes don't fit.
        """
        names = ("kspace", "maps", "mask", *others)
        if missing := [name for name in names if name not in batch]:
            raise ValueError(
                f"the batch has {sorted(batch)}, but no {', '.join(missing)}: use a datamodule of MRI, such as PhantomScansDataModule"
            )
        kspace, maps, mask = (batch[name] for name in names[:3])
        check_shapes(kspace, maps, mask)
        return kspace * mask, maps, mask

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
        """The reconstruction, (B, H, W, 2)."""
        return self.network(kspace, maps, mask)[-1, -1]  # type: ignore[no-any-return]

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        predictions = self.network(*self.measured(batch, "target"))
        if self.accumulate:
            loss, each = accumulated_loss(predictions, batch["target"], self.loss, self.cascade_weights, self.per_sample)
            figures = {f"mri/loss_cascade/{number}": value for number, value in enumerate(each)}
        else:
            found, truth = (normalised_magnitude(image, self.per_sample) for image in (predictions[-1, -1], batch["target"]))
            loss, figures = image_distance(found, truth, self.loss), {}
        weights = {f"mri/lambda/{number}": weight.detach().squeeze() for number, weight in enumerate(self.consistency_weights())}
        self.log_dict({"mri/loss": loss, **figures, **weights})
        return loss

    def consistency_weights(self) -> list[Tensor]:
        """The lambda of each cascade, where there are some."""
        return [weight for name, weight in self.network.named_parameters() if "dc_weight" in name]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas)
        if self.schedule == "constant":
            return optimizer
        warmup = round(self.warmup_ratio * training_length(self))
        schedule = LambdaLR(optimizer, lambda step: inverse_square_root(step, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        kspace, maps, mask = self.measured(batch, "target")
        started = time.perf_counter()
        image = self(kspace, maps, mask).float()
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        self._seconds.append((time.perf_counter() - started) / len(image))
        zero_filled, target = sense_combine(kspace, maps, self.fourier), magnitude(batch["target"])
        found = [self._scaled(magnitude(x), target) for x in (image, zero_filled)]
        volume = batch["volume"] if "volume" in batch else self._unnamed(len(image))
        largest = batch.get("maximum", target.amax((1, 2))).clamp(min=1e-12)
        columns = [volume.to(target), torch.full_like(largest, target[0].numel()), target.square().sum((1, 2)), largest]
        for x in found:
            columns += [(x - target).square().sum((1, 2)), self._similarity(x, target, largest)]
        columns.append(consistency_residual(image, kspace, maps, mask, self.fourier))
        self._rows.append(torch.stack(columns, 1))
        if batch_idx == 0:
            self._draw(target[0], *(x[0] for x in found))

    def _unnamed(self, number: int) -> Tensor:
        """Negative names for slices that are volumes of their own, no two alike on all ranks."""
        before = sum(map(len, self._rows))
        return -1 - self.global_rank - self.trainer.world_size * torch.arange(before, before + number, device=self.device)

    def _scaled(self, image: Tensor, target: Tensor) -> Tensor:
        if not self.rescale:
            return image
        size = image.amax((1, 2), keepdim=True)
        return image * (target.amax((1, 2), keepdim=True) / torch.where(size > 0, size, 1))

    @staticmethod
    def _similarity(image: Tensor, target: Tensor, largest: Tensor) -> Tensor:
        """SSIM of each slice over the largest value of its volume, (B,)."""
        ours, wanted = ((x / largest[:, None, None])[:, None] for x in (image, target))
        with torch.autocast(image.device.type, enabled=False):
            found = structural_similarity_index_measure(
                ours, wanted, gaussian_kernel=False, kernel_size=_WINDOW, data_range=1.0, reduction="none"
            )
        assert isinstance(found, Tensor)
        return found.reshape(len(image))

    def _log_evaluation(self, part: Part) -> None:
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 9, device=self.device)
        rows = gather_rows(rows, with_grad=False)
        seconds, self._seconds, self._rows = self._seconds, [], []
        volume = rows[:, 0].unique(return_inverse=True)[1]
        sums = rows.new_zeros(int(volume.max()) + 1, rows.shape[1]).index_add(0, volume, rows)
        slices = torch.bincount(volume).to(rows)
        largest = rows.new_zeros(len(sums)).scatter_reduce(0, volume, rows[:, 3], "amax")
        figures: dict[str, Tensor] = {}
        for prefix, column in (("", 4), ("zero_filled_", 6)):
            figures |= {
                f"{prefix}psnr": (10 * torch.log10(largest.square() * sums[:, 1] / sums[:, column].clamp(min=1e-20))).mean(),
                f"{prefix}ssim": (sums[:, column + 1] / slices).mean(),
                f"{prefix}nmse": (sums[:, column] / sums[:, 2].clamp(min=1e-20)).mean(),
            }
        figures["residual"] = (sums[:, 8] / slices).mean()
        log_global(self, {f"mri/{part}_{name}": value for name, value in figures.items()})
        if part == "test":
            self.log("mri/test_seconds_per_slice", sum(seconds) / max(1, len(seconds)), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``image``: the reconstruction, (B, H, W, 2)."""
        return {"image": self(*self.measured(batch))}

    def _draw(self, target: Tensor, image: Tensor, zero_filled: Tensor) -> None:
        """Four pictures (H, W) side by side, white at the target's largest magnitude."""
        pictures = torch.cat([target, image, _ERROR * (image - target).abs(), zero_filled], 1) / target.max().clamp(min=1e-12)
        pixels = (pictures.clamp(0, 1) * 255).round().byte().cpu()
        scale = -(-_HIGH // len(pixels))
        pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[..., None].expand(-1, -1, 3)
        words = "the target, the reconstruction, its error made brighter, and the zero-filled image"
        self._media = {"mri/pictures": ImageMedia(pixels.numpy().copy(), words)}


__all__ = ["Reconstruction", "Schedule", "inverse_square_root"]
