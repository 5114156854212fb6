"""What label propagation adds to a prediction, without training a network: SimMatchV2's edge-node step by itself."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.seeds import own_seed
from lit_methods.semi.simmatchv2.core import propagate
from lit_methods.steps import log_global


class PropagationProbe(LightningModule):
    """A logistic regression on pixels, fitted on the labelled images, whose predictions are propagated to their neighbours' labels.

    The embedding of an image is its centred, unit-length vector of pixels; the bank holds those of the labelled images. With ``alpha: 0``
    the prediction stays as it is.

    Runs: with ``SemiSupervisedDataModule``. Nothing is trained by an optimiser: one step is enough. After validation ``semi/val_accuracy``
    and ``semi/val_nll``, the negative log-likelihood of the propagated labels in nats, are logged.

    Saves: the regression and the bank.

    Refuses: data whose labelled images lack a class.

    Args:
        num_classes: C.
        neighbours: Labelled neighbours in each graph.
        temperature: t.
        alpha: How far labels travel, in [0, 1).
        logit_noise: Standard deviation of the noise on the logits.
        seed: Seed of the noise.
    """

    centre: Tensor
    bank: Tensor
    bank_class: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        num_classes: int,
        neighbours: int = 8,
        temperature: float = 0.1,
        alpha: float = 0.1,
        logit_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.at_least(1, neighbours=neighbours)
        checks.positive(temperature=temperature)
        checks.within("[0, 1)", alpha=alpha)
        checks.at_least(0, logit_noise=logit_noise)
        self.save_hyperparameters()
        self.propagation = (neighbours, temperature, alpha)
        self.num_classes, self.logit_noise = num_classes, logit_noise
        self.generator = torch.Generator().manual_seed(own_seed("PropagationProbe", seed))
        self.accuracy, self.nll = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Fit the regression on the labelled images."""
        from sklearn.linear_model import LogisticRegression

        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "labelled_set"):
            raise ValueError("PropagationProbe reads the labelled images of a SemiSupervisedDataModule: give one as data")
        chosen = data.labelled_set
        pixels = torch.stack([chosen.images.read(int(index)).flatten().float() for index in chosen.chosen])
        self.register_buffer("centre", pixels.mean(dim=0))
        self.register_buffer("bank", F.normalize(pixels - self.centre, dim=1))
        self.register_buffer("bank_class", data.labelled_classes)
        fitted = LogisticRegression(max_iter=1000).fit(self.bank.numpy(), self.bank_class.numpy())
        if list(fitted.classes_) != list(range(self.num_classes)):
            raise ValueError(f"the labelled images are of the classes {list(fitted.classes_)}, expected all of 0..{self.num_classes - 1}")
        weight, bias = np.asarray(fitted.coef_, dtype=np.float32), np.asarray(fitted.intercept_, dtype=np.float32)
        if self.num_classes == 2:  # scikit-learn gives the logit of the second class against the first alone
            weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
        self.register_buffer("weight", torch.from_numpy(weight))
        self.register_buffer("bias", torch.from_numpy(bias))

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, C) propagated labels."""
        z = F.normalize(images.flatten(1) - self.centre, dim=1)
        logits = F.linear(z, self.weight, self.bias)
        noise = torch.randn(logits.shape, generator=self.generator).to(logits)
        p = (logits + self.logit_noise * noise).softmax(dim=1)
        return propagate(p, z, self.bank, self.bank_class, *self.propagation)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing to train."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to both metrics."""
        propagated, label = self(batch["image"]), batch["label"]
        self.accuracy.update((propagated.argmax(dim=1) == label).float())
        self.nll.update(-propagated.gather(1, label[:, None]).clamp(min=1e-12).log())

    def on_validation_epoch_end(self) -> None:
        """Both over all images."""
        for name, metric in (("accuracy", self.accuracy), ("nll", self.nll)):
            log_global(self, {f"semi/val_{name}": metric.compute()})
            metric.reset()

    def configure_optimizers(self) -> None:
        """None."""
