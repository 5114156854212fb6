"""sLCT: consistency training that withstands outliers, made for latents of an autoencoder (arXiv:2502.01441).

The curriculum and the learning rates come from quandao10/LCT@34661b9 (models/script_util.py, train_cm_latent.py), the maths stand in
:mod:`~lit_methods.consistency_models.slct.core`. Latents are :mod:`~lit_methods.consistency_models.latents`'s. Left out: the authors' own
backbones.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.consistency_models.metrics import cauchy
from lit_methods.consistency_models.pair_training import Drawn, PairTraining
from lit_methods.consistency_models.pairs import PairLoss
from lit_methods.consistency_models.slct.core import adaptive_c, couple, early_diffusion_loss, is_early, remove_norm_scales, slct_loss
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="slct",
    short="sLCT",
    title="Improved Training Technique for Latent Consistency Models",
    arxiv="2502.01441",
    family="consistency_models",
    form="module",
    classes=("lit_methods.SLCT", "lit_methods.NonScalingLayerNorm", "lit_methods.datamodules.LatentDataModule"),
    configs=("slct.yaml", "slct_digits.yaml", "slct_ilct.yaml"),
    golden=("loss", "metric", "c_schedule", "ot_coupling", "nsln"),
    claim=(
        "With 5 % impulses in the training data, the Cauchy metric with a falling c brings one-step samples nearer to the clean data than "
        "Pseudo-Huber does."
    ),
    summary="Consistency training that withstands outliers, made for latents: Cauchy metric, early denoising loss, coupled noise.",
)

CouplingKind = Literal["ot", "none"]


class SLCT(PairTraining):
    """iCT's training for latents, or any data with outliers: Cauchy metric, falling c, early denoising loss, coupled noise.

    The loss is the mean of lambda ln(1 + m / (2 c^2)) over pairs of neighbouring levels, where m is the mean square of the two answers'
    difference, plus ``diffusion_weight`` times the denoising loss of the pairs at the smallest levels; c falls with the number of levels.

    Runs: batches have ``image`` (B, ...) floating point, of about ``sigma_data`` standard deviation: latents that were standardised and
    multiplied by 0.5, as ``LatentDataModule`` does. Everything that isn't named below is as in :class:`ConsistencyTraining`. The coupling
    is found for each rank's batch by itself, on the CPU in float32, with one host wait a step; with accumulated gradients for each
    micro-batch. Its time grows with the cube of ``coupling_size``, and is longest in few dimensions. Nothing is clipped: set
    ``gradient_clip_val`` of the Trainer if you want it. A loss that isn't finite is for ``FiniteGuard``. Beside the panels the mean weight
    of the pairs, ``consistency/weight``, and the number of pairs at the smallest levels, ``consistency/early_samples``, are logged.

    Saves: the network, the length of the curriculum, the statistics of the latents.

    Refuses: a training without an end, unless ``total_steps`` is given; a batch with a number that isn't finite, which can't be coupled.

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        s0: Intervals between levels at the start.
        s1: Intervals between levels at the end.
        c_initial: c of the first stage, > 0; None: 0.00054 sqrt(D).
        c_slope: Slope of ln c over ln(N - 1), from the second stage on; None: c stays as it is at first.
        c_intercept: Intercept of the same line.
        diffusion_weight: Factor of the denoising loss at the smallest levels; 0: without.
        diffusion_fraction: Share of the levels that are small.
        coupling: ``ot``: each batch's noise is matched with its data at the smallest total distance. ``none``: as drawn.
        coupling_size: Samples that are matched at a time, in the order of the batch; None: the whole batch.
        remove_scales: Take the trained scale from the network's ``nn.LayerNorm`` (:func:`remove_norm_scales`).
        p_mean: Mean of ln sigma.
        p_std: Standard deviation of ln sigma.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of the data.
        num_classes: Classes that the network is told; None: none.
        sample_times: Levels of the steps after the first, for the longest sampling.
        learning_rate: RAdam's learning rate; constant.
        weight_decay: RAdam's weight decay.
        eps: RAdam's addend to the denominator; large, as weights and small c make large gradients.
        total_steps: K of the curriculum; None: the length of the training when it first starts.
        autoencoder: Whose latents the data are; None: the data are what is wanted.
        grid: Images in a row of the dashboard's picture; 0: no picture.
        seed: Seed of levels and noise.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *PairTraining.panels,
        Curve("Parts of the loss", ("consistency/pair_loss", "consistency/early_loss")),
        Curve("c of the Cauchy metric", ("consistency/c",), note="Falls where the number of levels doubles, behind the first stage."),
        Curve("Outliers", ("consistency/outlier",), note="The largest difference of the answers, in units of their root mean square."),
        Curve("Cost of the coupling", ("consistency/coupling",), note="Below 1: matched noise lies nearer to the data than as drawn."),
    )

    def __init__(
        self,
        network: nn.Module,
        s0: int = 10,
        s1: int = 640,
        c_initial: float | None = None,
        c_slope: float | None = -1.15,
        c_intercept: float = -0.85,
        diffusion_weight: float = 5.0,
        diffusion_fraction: float = 0.25,
        coupling: CouplingKind = "ot",
        coupling_size: int | None = None,
        remove_scales: bool = True,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        num_classes: int | None = None,
        sample_times: Sequence[float] = (0.821,),
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        eps: float = 1e-4,
        total_steps: int | None = None,
        autoencoder: nn.Module | None = None,
        grid: int = 16,
        seed: int = 0,
    ) -> None:
        checks.one_of(CouplingKind, coupling=coupling)
        checks.at_least(1, "samples, or null for the whole batch,", coupling_size=coupling_size)
        checks.within("[0, 1]", "a share of the levels", diffusion_fraction=diffusion_fraction)
        checks.at_least(0, diffusion_weight=diffusion_weight)
        checks.positive(p_std=p_std, rho=rho, learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, eps=eps)
        checks.at_least(1, "classes", num_classes=num_classes)
        checks.within("(0, inf)", "a number, or null for 0.00054 sqrt(D),", c_initial=c_initial)
        if remove_scales:
            remove_norm_scales(network)
        super().__init__(network, s0, s1, sigma_min, sigma_max, sigma_data, sample_times, total_steps, autoencoder, grid)
        self.save_hyperparameters(ignore=["network", "autoencoder"])
        self._cost_ratio: Tensor | None = None

    def c_at(self, levels: int, size: int) -> float:
        """Scale c at N levels, for samples of ``size`` components."""
        hp = self.hparams
        initial: float = 0.00054 * math.sqrt(size) if hp["c_initial"] is None else hp["c_initial"]
        return initial if hp["c_slope"] is None else adaptive_c(levels, hp["s0"], initial, hp["c_slope"], hp["c_intercept"])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The Cauchy metric: (B, ...) twice -> (B,)."""
        return cauchy(a, b, self.c_at(self.num_levels(self.trainer.global_step), a[0].numel()))

    def draw(self, x: Tensor, batch_idx: int) -> Drawn:
        """As in iCT, and then matched with the data."""
        drawn = super().draw(x, batch_idx)
        if self.hparams["coupling"] == "none":
            return drawn
        size = self.hparams["coupling_size"] or max(len(x), 1)
        noises = drawn.noise.split(size)
        couplings = [couple(data, noise) for data, noise in zip(x.split(size), noises, strict=True)]
        as_drawn = torch.stack([coupling.identity_cost for coupling in couplings]).sum()
        self._cost_ratio = torch.stack([coupling.cost for coupling in couplings]).sum() / as_drawn
        matched = [noise[coupling.match] for noise, coupling in zip(noises, couplings, strict=True)]
        return dataclasses.replace(drawn, noise=torch.cat(matched))

    def _early(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        hp = self.hparams
        inside = is_early(drawn.index, drawn.count, hp["diffusion_fraction"])
        return early_diffusion_loss(pair.student, x, drawn.upper, inside, hp["sigma_data"]).mean, inside.sum()

    def loss(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> Tensor:
        """Both losses."""
        weight: float = self.hparams["diffusion_weight"]
        return slct_loss(pair.losses, self._early(pair, x, drawn)[0], weight) if weight else pair.losses.mean()

    def details(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> dict[str, Tensor | float]:
        """What is logged beside the loss."""
        with torch.no_grad():
            early, samples = self._early(pair, x, drawn)
            gaps = (pair.student.float() - pair.teacher.float()).abs()
        ratio = 1.0 if self._cost_ratio is None else self._cost_ratio
        return super().details(pair, x, drawn) | {
            "consistency/c": self.c_at(drawn.count, x[0].numel()),
            "consistency/pair_loss": pair.losses.detach().mean(),
            "consistency/early_loss": early,
            "consistency/early_samples": samples.float(),
            "consistency/outlier": gaps.max() / gaps.square().mean().sqrt(),
            "consistency/coupling": ratio,
        }
