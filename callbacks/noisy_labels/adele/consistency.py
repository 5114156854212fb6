"""ADELE's consistency over scales as a Callback (arXiv:2110.03740), for any module with a network that takes images of any size."""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_methods.callbacks.batch import Key, find_in_batch, logits_from, rescaled, resized, rows_of_calls
from lit_methods.callbacks.features import require_network
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.noisy_labels.adele.core import multiscale_consistency
from lit_methods.checks import at_least, positive, share, within
from lit_methods.distributed import gather_rows
from lit_methods.panels import Curve, Panel


class MultiScaleConsistency(LossTerm):
    """Replaces the loss by cross-entropy at several scales and the divergence of their predictions p_k from their mixture m.

    The loss is sum_k ce_k + lambda * sum_k KL(p_k || m), with m = sum_k w_k p_k and learned weights w of the scales. What the module puts
    out in ``training_step`` is used for the first scale; the resized images are sent through ``network`` here.

    Runs: around ``training_step``. The weights of the scales belong to the callback and not to the module, so that the module's checkpoints
    stay its own; they take plain SGD steps with the learning rate of the module's first group and ``momentum``, and clipping of gradients
    doesn't reach them.
    Saves: the scales' weights and the state of their optimiser.
    Refuses: loss terms that are set up before it, whose parts would be thrown away; modules without the submodule ``network``, which must
    take images of any size.

    Args:
        network: Name of the submodule whose output is the logits (B, classes, ...).
        images: Key or position of the images in the batch; None: ``image``, or 0 of a sequence.
        labels: Key or position of the labels in the batch; None: ``label``, or 1 of a sequence.
        scales: Factors of the images' sides, beside 1; the authors: 0.7 and 1.5.
        consistency_weight: lambda >= 0.
        threshold: rho: an image's consistency counts if a pixel of the mixture is that certain.
        learn_scale_weights: Train the scales' weights; False: equal ones.
        momentum: Momentum of the weights' steps.
        mean_over_scales: Divide the loss by the number of scales (the authors' code for volumes).
        mask_ignored: Leave ignored pixels out of the consistency.
        ignore_index: Label of pixels that don't count.
        replace: Throw away the module's own loss; False: add to it.
        weight: Factor of the whole loss.

    Raises:
        ValueError: A value lies outside its range.
    """

    set_up_before = ("LossTerm",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Consistency over scales",
            ("multi_scale_consistency/loss", "multi_scale_consistency/ce", "multi_scale_consistency/consistency"),
            goal="min",
        ),
        Curve("Confident images", ("multi_scale_consistency/confident",), note="Share whose consistency counts. 0: the term does nothing."),
        Curve("Weights of the scales", ("multi_scale_consistency/weight_*",)),
    )

    def __init__(
        self,
        network: str = "network",
        images: Key = None,
        labels: Key = None,
        scales: Sequence[float] = (0.7, 1.5),
        consistency_weight: float = 1.0,
        threshold: float = 0.8,
        learn_scale_weights: bool = True,
        momentum: float = 0.9,
        mean_over_scales: bool = False,
        mask_ignored: bool = False,
        ignore_index: int = 255,
        replace: bool = True,
        weight: float = 1.0,
    ) -> None:
        positive(**{f"scales[{k}]": scale for k, scale in enumerate(scales)})
        at_least(0, consistency_weight=consistency_weight)
        share(threshold=threshold)
        within("[0, 1)", momentum=momentum)
        super().__init__([network], weight)
        self.replaces = replace
        self.images, self.labels, self.scales = images, labels, tuple(scales)
        self.consistency_weight, self.threshold, self.learns = consistency_weight, threshold, learn_scale_weights
        self.momentum, self.mean_over_scales, self.mask_ignored, self.ignore_index = momentum, mean_over_scales, mask_ignored, ignore_index
        self._fresh()

    def _fresh(self) -> None:
        self.scale_weights = torch.ones(1 + len(self.scales), requires_grad=self.learns)
        self._velocity = torch.zeros(1 + len(self.scales))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The module optimises manually, or the submodule isn't there.
        """
        if stage == "fit" and trainer.global_step == 0:
            self._fresh()
        super().setup(trainer, pl_module, stage)

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Hook into the module, if it has the network."""
        require_network(pl_module, self.targets[0], "MultiScaleConsistency")
        super().hook_in(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights where the module is."""
        self.scale_weights = self.scale_weights.detach().to(pl_module.device).requires_grad_(self.learns)
        self._velocity = self._velocity.to(pl_module.device)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch at all scales.

        Raises:
            ValueError: The batch or the network's output lacks something.
        """
        batch, network = inputs["batch"], self.targets[0]
        images = find_in_batch(batch, self.images, ("image", 0), "images")
        labels = find_in_batch(batch, self.labels, ("label", 1), "labels").long()
        who = f"network={network!r}"
        first = rows_of_calls(inputs["feature_calls"][network][:1], who)
        if len(first) < len(labels):
            raise ValueError(f"{who} put out {len(first)} rows for {len(labels)} images: it must see the batch's images first")
        size = labels.shape[1:]
        logits = [resized(first[: len(labels)], size, align_corners=True)]
        for scaled in (rescaled(images, scale, align_corners=True) for scale in self.scales):
            again = self.run_again(scaled, inputs["module"].get_submodule(network))
            logits.append(resized(logits_from(again.output, who), size, align_corners=True))
        parts = multiscale_consistency(logits, labels, self.scale_weights, self.threshold, self.ignore_index, self.mask_ignored)
        loss = parts.ce + self.consistency_weight * parts.consistency
        if self.mean_over_scales:
            loss = loss / len(logits)
        logs = {"ce": parts.ce, "consistency": parts.consistency, "confident": parts.confident.float().mean()}
        return loss, logs | {f"weight_{k}": value for k, value in enumerate(self.scale_weights.detach().softmax(dim=0))}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Step the weights of the scales: mean gradient over ranks, loss scale taken out, a step that isn't finite left out."""
        if not self.learns or self.scale_weights.grad is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        grad = self.scale_weights.grad / (1.0 if scaler is None else scaler.get_scale())
        grad = gather_rows(grad[None], with_grad=False).mean(0)
        grad = torch.where(grad.isfinite().all(), grad, 0.0)
        self._velocity.mul_(self.momentum).add_(grad)
        self.scale_weights -= optimizer.param_groups[0]["lr"] * self._velocity
        self.scale_weights.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The weights and the velocity."""
        return {"scale_weights": self.scale_weights.detach().clone(), "velocity": self._velocity.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.scale_weights = state_dict["scale_weights"].clone().requires_grad_(self.learns)
        self._velocity = state_dict["velocity"].clone()


__all__ = ["MultiScaleConsistency"]
