"""Training of a small flow model by flow matching, as a prior for FLAIR."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.inverse_problems.flair.core import flow_matching_error
from lit_methods.inverse_problems.flair.priors import FlowPrior
from lit_methods.optim import Iterations
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import seeded_noise


class FlowMatchingModule(LightningModule):
    """Trains a flow model by flow matching: the mean of |v(x_t, t) - (x1 - x0)|^2 at times t ~ U(0, 1).

    Runs: batches have ``image`` (B, C, H, W) floating point; those of a prior of images lie in [-1, 1], as ``RestorationDataModule`` gives
    them. Where a prior has no weights to train, a training step does nothing. Times and noise of a step follow from seed, step, batch and
    rank; those of validation from the images' numbers, ``index`` (B,), or their places.

    Saves: the network.

    Refuses: batches without images; in evaluation images outside [-1, 1], if the prior is one of images.

    Args:
        prior: Flow model.
        learning_rate: AdamW's; constant.
        weight_decay: AdamW's.
        seed: Seed of times and noise.

    Raises:
        TypeError: ``prior`` is no ``FlowPrior``.
        ValueError: A number outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss of the prior", ("flow/loss",), note="Flow matching; never 0, as x1 - x0 can't be known from x_t.", goal="min"),
        Curve("Loss of the prior on other images", ("flow/val_loss",), goal="min"),
    )

    def __init__(self, prior: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(prior, FlowPrior):
            raise TypeError(f"prior is a {type(prior).__name__}: give a FlowPrior, such as LatentFlow, SD3Flow or GaussianMixtureFlow")
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, seed=seed)
        self.prior, self.seed = prior, seed
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.automatic_optimization = prior.trainable
        if not prior.trainable:  # iterations are counted on it, and DDP asks for one
            self.counter = nn.Parameter(torch.zeros(1))

    def images(self, batch: Any, check: bool = True) -> Tensor:
        """The batch's images.

        Args:
            batch: What the datamodule gives.
            check: Look at their range, too, which waits for the device.

        Raises:
            ValueError: There are none, or they lie outside [-1, 1].
        """
        images = batch.get("image") if isinstance(batch, dict) else None
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(f"{type(self).__name__} needs batches with image (B, C, H, W): give it RestorationDataModule or the like")
        if check and self.prior.bounded and images.numel():
            low, high = (float(value) for value in torch.aminmax(images.float()))
            if not (low >= -1.01 and high <= 1.01):
                raise ValueError(
                    f"{type(self).__name__} got images from {low:.3g} to {high:.3g}, expected [-1, 1]: divide bytes by 127.5 and take 1 off"
                )
        return images

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """The loss of flow matching."""
        if not self.automatic_optimization:
            self.optimizers().step(closure=lambda: None)  # type: ignore[union-attr, call-arg]
            return None
        with torch.no_grad():
            x0 = self.prior.encode(self.images(batch, check=False))
        place = f"flow {self.global_step} {batch_idx} {self.global_rank}"
        t = torch.special.ndtr(seeded_noise(f"{place} time", self.seed, x0.new_empty(len(x0))))  # uniform
        x1 = seeded_noise(place, self.seed, x0)
        share = t.view(-1, 1, 1, 1)
        loss = flow_matching_error(self.prior.velocity((1 - share) * x0 + share * x1, t), x0, x1).mean()
        self.log("flow/loss", loss, batch_size=len(x0))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The loss at ten times for each image, with the same noise each time."""
        x0 = self.prior.encode(self.images(batch))
        x1 = seeded_noise(f"flow val {batch_idx} {self.global_rank}", self.seed, x0)
        times = (torch.arange(10, device=x0.device, dtype=x0.dtype) + 0.5) / 10
        errors = [flow_matching_error(self.prior.velocity((1 - t) * x0 + t * x1, t.expand(len(x0))), x0, x1) for t in times]
        self.log("flow/val_loss", torch.stack(errors).mean(), batch_size=len(x0), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; without weights, the count of the iterations."""
        if not self.automatic_optimization:
            return Iterations([self.counter])
        trained = [parameter for parameter in self.prior.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)


__all__ = ["FlowMatchingModule"]
