"""sLCT: consistency training that withstands outliers, made for latents of an autoencoder (arXiv:2502.01441).

Golden vectors come from quandao10/LCT@34661b9 (models/karras_diffusion.py, models/optimal_transport.py, models/network_dit.py,
models/script_util.py, train_cm_latent.py). The metric is :func:`~lit_methods.consistency_models.metrics.cauchy`, the rest of the training
that of :mod:`~lit_methods.consistency_models.ict`. The assignment is solved by SciPy, exactly; the authors call POT's ``emd``, which finds
the same optimum. Latents are :mod:`~lit_methods.consistency_models.latents`'s. Left out: the authors' own backbones.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lit_methods.catalog import Technique
from lit_methods.consistency_models.ict import ConsistencyTraining, Drawn
from lit_methods.consistency_models.metrics import cauchy
from lit_methods.consistency_models.pairs import PairLoss
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="slct",
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

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def adaptive_c(levels: int, s0: int = 10, initial: float = 0.03456, slope: float = -1.15, intercept: float = -0.85) -> float:
    """Scale c of the Cauchy metric: ``initial`` in the first stage (N = s0 + 1), then exp(slope ln(N - 1) + intercept).

    Args:
        levels: N >= 2.
        s0: Intervals of the first stage.
        initial: Its c; 0.00054 sqrt(D) in the code, 0.03456 for D = 4096.
        slope: Of ln c over ln(N - 1): a fit of how the differences of the answers shrink. The code's; the paper's is -1.18 (mem).
        intercept: The code's; the paper's is -0.72 (mem).
    """
    return initial if levels <= s0 + 1 else math.exp(slope * math.log(levels - 1) + intercept)


def is_early(index: Tensor, levels: int, fraction: float = 0.25) -> Tensor:
    """Which pairs are among the smallest levels: those with N - 1 - i >= floor(N (1 - fraction)).

    Args:
        index: (B,) i in 1..N-1 of the lower level, ascending.
        levels: N.
        fraction: Share of the levels, in [0, 1].

    Returns:
        (B,) bool.
    """
    return levels - 1 - index >= int(levels * (1 - fraction))


class EarlyLoss(NamedTuple):
    """Losses (B,), 0 outside the region, and their mean inside: a scalar, 0 if no sample is inside."""

    losses: Tensor
    mean: Tensor


def early_diffusion_loss(answer: Tensor, x: Tensor, upper: Tensor, inside: Tensor, sigma_data: float = 0.5) -> EarlyLoss:
    """mean((y - x)^2) (1 / sigma^2 + 1 / sigma_data^2) of the samples inside: denoising, on the student's own answer.

    Args:
        answer: (B, ...) y = f(x + sigma z, sigma).
        x: (B, ...) data.
        upper: (B,) sigma, the higher level of each pair, > 0.
        inside: (B,) bool, see :func:`is_early`.
        sigma_data: Standard deviation of the data.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(answer.dtype, torch.float32)
        squares = (answer.to(wide) - x.to(wide)).square().flatten(1).mean(1)
        losses = torch.where(inside, squares * (1 / upper**2 + 1 / sigma_data**2), 0.0)
        return EarlyLoss(losses, losses.sum() / inside.sum().clamp(min=1))


def slct_loss(losses: Tensor, early: Tensor, weight: float = 5.0) -> Tensor:
    """Mean of the consistency losses (B,) plus ``weight`` times the diffusion loss of the early levels: a scalar."""
    return losses.mean() + weight * early


class Coupling(NamedTuple):
    """Which noise goes to which sample, and what it costs.

    Attributes:
        match: (B,) int64, row of the noise for each row of the data, on their device.
        cost: Scalar, sum of squared distances of the matched pairs.
        identity_cost: The same, for the order in which they were drawn.
    """

    match: Tensor
    cost: Tensor
    identity_cost: Tensor

    @property
    def plan(self) -> Tensor:
        """(B, B) float64 transport plan with uniform marginals: a permutation matrix over B."""
        return F.one_hot(self.match, len(self.match)).double() / max(1, len(self.match))


@torch.no_grad()
def couple(x: Tensor, noise: Tensor) -> Coupling:
    """The assignment of noise to data with the smallest sum of squared distances (exact; on the CPU, O(B^3)).

    Args:
        x: (B, ...) data, finite.
        noise: The same shape, finite.

    Raises:
        ValueError: Shapes that differ, or a value that isn't finite.
    """
    if x.shape != noise.shape:
        raise ValueError(f"{tuple(x.shape)} data don't fit {tuple(noise.shape)} noise: give as many of the same size")
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        flat, drawn = x.flatten(1).to(wide), noise.flatten(1).to(wide)
        # the squared norms are in every assignment alike, so the products alone decide
        products = (flat @ drawn.T).cpu().numpy()
        try:
            _, columns = linear_sum_assignment(products, maximize=True)
        except ValueError as problem:
            raise ValueError("the data or the noise of this batch hold a NaN or an infinity: no coupling can be found") from problem
        match = torch.from_numpy(columns).to(x.device)
        return Coupling(match, (flat - drawn[match]).square().sum(), (flat - drawn).square().sum())


class NonScalingLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) + beta over the last dimension; beta is trained, a scale doesn't exist.

    A trained scale would amplify channels with outliers.

    Args:
        features: D of (..., D).
        eps: Added to the variance.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.layer_norm(x, self.bias.shape, None, self.bias, self.eps)


def remove_norm_scales(network: nn.Module) -> int:
    """Put a :class:`NonScalingLayerNorm` in the place of every ``nn.LayerNorm`` over one dimension that has a scale; biases are kept.

    Layers without a scale stay: in a DiT the conditioning scales them. Subclasses of ``nn.LayerNorm`` stay, too: they may do more. Do
    it before the optimiser is made.

    Args:
        network: Changed in place; not itself a ``nn.LayerNorm``.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm and child.elementwise_affine and len(child.normalized_shape) == 1:
                norm = NonScalingLayerNorm(child.normalized_shape[0], child.eps).to(child.weight)
                if child.bias is not None:
                    norm.bias.data.copy_(child.bias.data)
                setattr(parent, name, norm.train(child.training))
                count += 1
    return count


# ---- the module ------------------------------------------------------------------------------------------------------------------------


class SLCT(ConsistencyTraining):
    """iCT's training for latents, or any data with outliers: Cauchy metric, falling c, early denoising loss, coupled noise.

    Batches: ``image`` (B, ...) floating point, of about ``sigma_data`` standard deviation: latents that were standardised and multiplied by
    0.5, as ``LatentDataModule`` does. Everything that isn't named below is :class:`ConsistencyTraining`'s.

    The coupling is found for each rank's batch by itself, on the CPU in float32, and one host wait a step; with accumulated gradients for
    each micro-batch. Its time grows with the cube of ``coupling_size``, and is longest in few dimensions. Nothing is clipped: attach
    Lightning's ``gradient_clip_val`` if you want it. A loss that isn't finite is for ``FiniteGuard``.

    Logged beside ``ConsistencyTraining``'s, every ``log_every_n_steps`` steps: ``consistency/c``, ``consistency/pair_loss``,
    ``consistency/early_loss``, ``consistency/early_samples``, ``consistency/outlier`` (the largest |y - y_t| in units of the batch's root
    mean square), ``consistency/coupling`` (cost of the coupling over that of the order drawn; 1 without coupling).

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        s0: Intervals between levels at the start.
        s1: At the end.
        c_initial: c of the first stage; None: 0.00054 sqrt(D).
        c_slope: Of ln c over ln(N - 1), from the second stage on; None: c stays as it is at first.
        c_intercept: Of the same line.
        diffusion_weight: Of the denoising loss at the smallest levels; 0: without.
        diffusion_fraction: Share of the levels that are small.
        coupling: ``ot``: each batch's noise is matched with its data at the smallest total distance. ``none``: as drawn.
        coupling_size: Samples that are matched at a time, in the order of the batch; None: the whole batch.
        remove_scales: Take the trained scale from the network's ``nn.LayerNorm`` (:func:`remove_norm_scales`).
        p_mean: Of ln sigma.
        p_std: Of ln sigma.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of the data.
        num_classes: Classes that the network is told; None: none.
        sample_times: Levels of the steps after the first, for the longest sampling.
        learning_rate: Of RAdam; constant.
        weight_decay: Of RAdam.
        eps: Of RAdam; large, as weights and small c make large gradients.
        total_steps: K of the curriculum; None: the length of the training when it first starts.
        autoencoder: Whose latents the data are; None: the data are what is wanted.
        grid: Images in a row of the dashboard's picture; 0: no picture.
        seed: Of levels and noise.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *ConsistencyTraining.panels,
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
        if coupling not in ("ot", "none"):
            raise ValueError(f"coupling is {coupling!r}: give 'ot' or 'none'")
        if coupling_size is not None and coupling_size < 1:
            raise ValueError(f"coupling_size is {coupling_size}: give 1 or more samples, or null for the whole batch")
        if not 0 <= diffusion_fraction <= 1:
            raise ValueError(f"diffusion_fraction={diffusion_fraction} is a share of the levels: give 0 to 1")
        if diffusion_weight < 0:
            raise ValueError(f"diffusion_weight is {diffusion_weight}: give 0 or more")
        if c_initial is not None and c_initial <= 0:
            raise ValueError(f"c_initial is {c_initial}: give a number above 0, or null for 0.00054 sqrt(D)")
        if remove_scales:
            remove_norm_scales(network)
        super().__init__(
            network, s0=s0, s1=s1, p_mean=p_mean, p_std=p_std, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, sigma_data=sigma_data,
            num_classes=num_classes, sample_times=sample_times, learning_rate=learning_rate, weight_decay=weight_decay, eps=eps,
            total_steps=total_steps, autoencoder=autoencoder, grid=grid, seed=seed,
        )  # fmt: skip
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
        parts = [(noise, couple(data, noise)) for data, noise in zip(x.split(size), drawn.noise.split(size), strict=True)]
        self._cost_ratio = (
            torch.stack([found.cost for _, found in parts]).sum() / torch.stack([one.identity_cost for _, one in parts]).sum()
        )
        return dataclasses.replace(drawn, noise=torch.cat([noise[found.match] for noise, found in parts]))

    def _early(self, found: PairLoss, x: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        hp = self.hparams
        inside = is_early(drawn.index, drawn.count, hp["diffusion_fraction"])
        return early_diffusion_loss(found.student, x, drawn.upper, inside, hp["sigma_data"]).mean, inside.sum()

    def loss(self, found: PairLoss, x: Tensor, drawn: Drawn) -> Tensor:
        """Both losses."""
        weight: float = self.hparams["diffusion_weight"]
        return slct_loss(found.losses, self._early(found, x, drawn)[0], weight) if weight else found.losses.mean()

    def details(self, found: PairLoss, x: Tensor, drawn: Drawn) -> dict[str, Tensor | float]:
        """What is logged beside the loss."""
        with torch.no_grad():
            early, samples = self._early(found, x, drawn)
            gaps = (found.student.float() - found.teacher.float()).abs()
        ratio = 1.0 if self._cost_ratio is None else self._cost_ratio
        return super().details(found, x, drawn) | {
            "consistency/c": self.c_at(drawn.count, x[0].numel()),
            "consistency/pair_loss": found.losses.detach().mean(),
            "consistency/early_loss": early,
            "consistency/early_samples": samples.float(),
            "consistency/outlier": gaps.max() / gaps.square().mean().sqrt(),
            "consistency/coupling": ratio,
        }
