"""iCT: consistency training without an averaged teacher (arXiv:2310.14189), and its predecessor CT (arXiv:2303.01469) as a baseline.

Golden vectors come from openai/consistency_models@e32b69e (curriculum, loss and sampler of CT) and from the equations of the paper (iCT has
no released code). The training is :class:`~lit_methods.consistency_models.pair_training.PairTraining`, the maths stand in the files of the
family. Left out: the trained weights of LPIPS.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.averages import ema_update, state_tensors
from lit_methods.catalog import Technique
from lit_methods.consistency_models.curricula import ct_teacher_decay, square_root_levels
from lit_methods.consistency_models.levels import uniform_probabilities
from lit_methods.consistency_models.metrics import absolute, perceptual, pseudo_huber, square
from lit_methods.consistency_models.pair_training import Drawn, PairTraining
from lit_methods.consistency_models.pairs import PairLoss, Path, heun_step
from lit_methods.frozen import Frozen

TECHNIQUE = Technique(
    slug="ict",
    short="iCT",
    title="Improved Techniques for Training Consistency Models",
    arxiv="2310.14189",
    family="consistency_models",
    form="module",
    classes=("lit_methods.ConsistencyTraining", "lit_methods.callbacks.WeightEMA", "lit_methods.callbacks.EMARemoval"),
    configs=("ict.yaml", "ct.yaml", "cd.yaml", "ict_digits.yaml"),
    golden=("ct_curriculum", "ict_curriculum", "noise_levels", "ct_loss", "ict_loss", "sampler"),
    claim="On a ring of 8 Gaussians, one-step samples of iCT lie nearer to the data than those of CT, after the same number of steps.",
    summary="Trains a network that makes a sample in one call, without a diffusion model and without an averaged teacher; CT as baseline.",
)

Curriculum = Literal["doubling", "square_root"]
LevelDraws = Literal["lognormal", "uniform"]
Metric = Literal["pseudo_huber", "l2", "l1", "perceptual"]
Weight = Literal["inverse_gap", "one"]
Teacher = Literal["stopgrad", "ema"]


class ConsistencyTraining(PairTraining):
    """Trains f(x, sigma), which maps a noisy sample of any level to the sample it came from, so that one call makes a sample of noise.

    The loss is lambda d(f(x + sigma' z, sigma'), sg f(x + sigma z, sigma)) for neighbouring levels sigma < sigma'. The defaults are iCT's.
    CT is the same with ``curriculum: square_root``, ``s0: 2``, ``s1: 150``, ``levels: uniform``, ``metric: l2``, ``weight: one`` and
    ``teacher: ema``; consistency distillation (CD) has a ``denoiser``, too.

    Runs: batches have ``image`` (B, ...) floating point, of about ``sigma_data`` standard deviation (images in [-1, 1]); with
    ``num_classes`` also ``label`` (B,) int64. ``forward`` is f. Sampling and validation use the weights as they are: attach ``WeightEMA``,
    which lends its averaged weights then, as the paper has it. (The averaged teacher of CT is another thing.) Validation draws as many
    samples as there are data and returns them, so that ``SampleQuality`` makes FID, precision and recall of them; all are kept in memory
    until it ends: limit them for large images. ``predict_step`` returns as many samples as a batch has images, for each number of steps;
    ``SampleGrid`` writes them as pictures. On latents give the ``autoencoder``, and data by ``LatentDataModule``: pictures and predictions
    are decoded. Beside the panels the mean of lambda, ``consistency/weight``, and with ``teacher: ema`` ``consistency/teacher_decay`` are
    logged.

    Saves: the network, CT's averaged teacher (``teacher_network``), the length of the curriculum, the statistics of the latents.
    Autoencoder, features and denoiser aren't trained and aren't saved.

    Refuses: a training without an end, unless ``total_steps`` is given.

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        curriculum: Number of levels over training: ``doubling`` (iCT) or ``square_root`` (CT).
        s0: Intervals between levels at the start.
        s1: Intervals between levels at the end.
        levels: How pairs are drawn: discretised ``lognormal`` (iCT) or ``uniform`` (CT).
        p_mean: Mean of ln sigma, for ``lognormal``.
        p_std: Standard deviation of ln sigma, for ``lognormal``.
        metric: ``pseudo_huber`` (iCT; sum of squares), ``l2`` or ``l1`` (CT; means), or ``perceptual``, in the form of LPIPS.
        c: Scale of Pseudo-Huber, > 0; None: 0.00054 sqrt(D).
        weight: ``inverse_gap``: 1 / (sigma_{i+1} - sigma_i) (iCT), or ``one`` (CT).
        teacher: ``stopgrad``: the network itself (iCT). ``ema``: an average of it (CT).
        teacher_decay: Decay mu0 of the average.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of the data.
        num_classes: Classes that the network is told; None: none.
        sample_times: Levels of the steps after the first, for the longest sampling: (0.821,) gives two steps (CIFAR-10).
        clip: Clamp samples to [-1, 1].
        learning_rate: RAdam's learning rate; constant.
        weight_decay: RAdam's weight decay.
        eps: RAdam's addend to the denominator.
        total_steps: K of the curriculum; None: ``trainer.estimated_stepping_batches`` when training first starts. Saved: a resumed run
            keeps its curriculum, also if it is to train longer.
        autoencoder: Whose latents the data are; None: the data are what is wanted.
        features: Network of ``perceptual``: images -> features, or a list of them, one a layer; (B, D, ...) each.
        denoiser: D of noisy samples (B, ...), levels (B,) and labels, if there are classes: a trained diffusion model whose path pairs are
            taken from (distillation, CD). None: pairs share their noise (CT, iCT).
        grid: Images in a row of the dashboard's picture; 0: no picture.
        seed: Seed of levels and noise, in training as in sampling. Dropout draws from the global generators.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        network: nn.Module,
        curriculum: Curriculum = "doubling",
        s0: int = 10,
        s1: int = 1280,
        levels: LevelDraws = "lognormal",
        p_mean: float = -1.1,
        p_std: float = 2.0,
        metric: Metric = "pseudo_huber",
        c: float | None = None,
        weight: Weight = "inverse_gap",
        teacher: Teacher = "stopgrad",
        teacher_decay: float = 0.9,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        num_classes: int | None = None,
        sample_times: Sequence[float] = (0.821,),
        clip: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        total_steps: int | None = None,
        autoencoder: nn.Module | None = None,
        features: nn.Module | None = None,
        denoiser: nn.Module | None = None,
        grid: int = 16,
        seed: int = 0,
    ) -> None:
        checks.literals(ConsistencyTraining, locals())
        checks.share(teacher_decay=teacher_decay)
        checks.positive(c=c)
        checks.positive(p_std=p_std, rho=rho, learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, eps=eps)
        checks.at_least(1, "classes", num_classes=num_classes)
        if (metric == "perceptual") != (features is not None):
            raise ValueError("metric: perceptual and features, the network that it compares by, go together: give both or neither")
        super().__init__(network, s0, s1, sigma_min, sigma_max, sigma_data, sample_times, total_steps, autoencoder, grid)
        self.save_hyperparameters(ignore=["network", "autoencoder", "features", "denoiser"])
        self.teacher_network = copy.deepcopy(network).requires_grad_(False) if teacher == "ema" else None
        self.features = None if features is None else Frozen(features)
        self.denoiser = None if denoiser is None else Frozen(denoiser)
        # not hyperparameters of every subclass, and a subclass that `lit` makes has its own arguments alone in hparams
        self.curriculum, self.levels, self.metric = curriculum, levels, metric
        self.c, self.pair_weight, self.teacher_decay, self.clip = c, weight, teacher_decay, clip

    def teach(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """The teacher's f: that of the network itself, or of its average."""
        return self._f(self.network if self.teacher_network is None else self.teacher_network)(x, sigma, *condition)

    def num_levels(self, step: int) -> int:
        """N at an optimiser step."""
        if self.curriculum == "doubling":
            return super().num_levels(step)
        assert self.total_steps is not None
        return square_root_levels(min(step, self.total_steps), self.total_steps, self.hparams["s0"], self.hparams["s1"])

    def chances(self, sigma: Tensor) -> Tensor:
        """How likely each pair is."""
        return super().chances(sigma) if self.levels == "lognormal" else uniform_probabilities(sigma)

    def weights(self, sigma: Tensor) -> Tensor:
        """Lambda of each pair."""
        return super().weights(sigma) if self.pair_weight == "inverse_gap" else torch.ones_like(sigma[1:])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The metric: (B, ...) twice -> (B,)."""
        if self.features is not None:
            return perceptual(a, b, self.features.module)
        if self.metric == "pseudo_huber":
            return pseudo_huber(a, b, 0.00054 * math.sqrt(a[0].numel()) if self.c is None else self.c)
        return square(a, b) if self.metric == "l2" else absolute(a, b)

    def path(self, condition: tuple[Tensor, ...]) -> Path | None:
        """With a ``denoiser`` a step of Heun's method along its path."""
        denoiser = self.denoiser
        return None if denoiser is None else lambda x, upper, lower: heun_step(denoiser, x, upper, lower, *condition)

    def details(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> dict[str, Tensor | float]:
        """What is logged beside the loss."""
        logs = super().details(pair, x, drawn)
        return logs if self.teacher_network is None else logs | {"consistency/teacher_decay": self._teacher_decay()}

    def _teacher_decay(self) -> float:
        """Decay of the step that is being taken."""
        return ct_teacher_decay(self.num_levels(self.trainer.global_step), self.hparams["s0"], self.teacher_decay)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """CT's teacher follows at once: a checkpoint that a callback saves when the batch ends has it."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher_network is not None:
            ema_update(state_tensors(self.teacher_network), state_tensors(self.network), self._teacher_decay())
