"""iCT: consistency training without an averaged teacher (arXiv:2310.14189), and its predecessor CT (arXiv:2303.01469) as a baseline.

Golden vectors come from openai/consistency_models@e32b69e (curriculum, loss and sampler of CT) and from the equations of the paper (iCT has
no released code). The maths stand in :mod:`~lit_methods.consistency_models.levels`, :mod:`~lit_methods.consistency_models.curricula`,
:mod:`~lit_methods.consistency_models.metrics` and :mod:`~lit_methods.consistency_models.pairs`. Left out: the trained weights of LPIPS.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchvision.utils import make_grid

from lit_methods.averages import ema_update
from lit_methods.catalog import Technique
from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, square_root_levels
from lit_methods.consistency_models.evaluation import sliced_wasserstein
from lit_methods.consistency_models.latents import LatentSpace
from lit_methods.consistency_models.levels import inverse_gap, karras_levels, lognormal_probabilities, uniform_probabilities
from lit_methods.consistency_models.metrics import absolute, perceptual, pseudo_huber, square
from lit_methods.consistency_models.pairs import PairLoss, consistency_function, consistency_pair_loss, heun_step
from lit_methods.consistency_models.sampling import multistep_sample
from lit_methods.distributed import gather_rows
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import own_seed

TECHNIQUE = Technique(
    slug="ict",
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


@dataclass(frozen=True)
class Drawn:
    """What a batch is trained with: noise (B, ...), i in 1..N-1, both levels and weight, each (B,), and N."""

    noise: Tensor
    index: Tensor
    lower: Tensor
    upper: Tensor
    weight: Tensor
    count: int


@dataclass(frozen=True)
class Levels:
    """Of N levels: sigma (N,), and chances and weights of the pairs, (N - 1,) each; float32."""

    count: int
    sigma: Tensor
    chances: Tensor
    weights: Tensor


class _Pictures(NamedTuple):
    data: Tensor
    samples: dict[int, Tensor]


class ConsistencyTraining(LightningModule):
    """Trains f(x, sigma), which maps a noisy sample of any level to the sample it came from, so that one call makes a sample of noise.

    The defaults are iCT's. CT is the same with ``curriculum: square_root``, ``s0: 2``, ``s1: 150``, ``levels: uniform``, ``metric: l2``,
    ``weight: one`` and ``teacher: ema``.

    Batches: ``image`` (B, ...) floating point, of about ``sigma_data`` standard deviation (images in [-1, 1]); with ``num_classes`` also
    ``label`` (B,) int64. ``forward`` is f. Sampling and validation use the weights as they are: attach ``WeightEMA``, which lends its
    averaged weights then, as the paper has it. The averaged teacher of CT is another thing; it lives in ``teacher_network``.

    Logged: ``consistency/loss``; every ``log_every_n_steps`` steps ``consistency/levels`` (N), ``consistency/weight`` (mean lambda),
    ``consistency/teacher_decay`` (with ``teacher: ema``) and ``consistency/loss_q1`` to ``_q4``, the mean loss of the samples whose level
    lies in each quarter of the index range; after validation ``consistency/val_sw2`` and ``consistency/val_sw2_<n>_steps``, the sliced
    Wasserstein distance of as many samples as there are validation data to these, for one step and for several (``test_sw2`` after a test).
    All validation data and samples are kept in memory until then: limit them for large images.
    ``predict_step`` returns as many samples as a batch has images, for each number of steps; ``SampleGrid`` writes them as pictures.
    ``validation_step`` returns them, too: ``SampleQuality`` makes FID, precision and recall of them.

    On latents give the ``autoencoder``, and data by ``LatentDataModule``: pictures and predictions are decoded. The statistics of the
    latents are part of the module's ``state_dict``; the autoencoder isn't trained and isn't saved.

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        curriculum: Number of levels over training: ``doubling`` (iCT) or ``square_root`` (CT).
        s0: Intervals between levels at the start.
        s1: At the end.
        levels: How pairs are drawn: discretised ``lognormal`` (iCT) or ``uniform`` (CT).
        p_mean: Of ln sigma, for ``lognormal``.
        p_std: Of ln sigma, for ``lognormal``.
        metric: ``pseudo_huber`` (iCT; sum of squares), ``l2`` or ``l1`` (CT; means), or ``perceptual``, in the form of LPIPS.
        c: Of Pseudo-Huber; None: 0.00054 sqrt(D).
        weight: ``inverse_gap``: 1 / (sigma_{i+1} - sigma_i) (iCT), or ``one`` (CT).
        teacher: ``stopgrad``: the network itself (iCT). ``ema``: an average of it (CT).
        teacher_decay: mu0 of the average.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of the data.
        num_classes: Classes that the network is told; None: none.
        sample_times: Levels of the steps after the first, for the longest sampling: (0.821,) gives two steps (CIFAR-10).
        clip: Clamp samples to [-1, 1].
        learning_rate: Of RAdam; constant.
        weight_decay: Of RAdam.
        eps: Of RAdam.
        total_steps: K of the curriculum; None: ``trainer.estimated_stepping_batches`` when training first starts. Saved: a resumed run
            keeps its curriculum, also if it is to train longer.
        autoencoder: Whose latents the data are; None: the data are what is wanted.
        features: Of ``perceptual``: images -> features, or a list of them, one a layer; (B, D, ...) each. Not trained, not saved.
        denoiser: D of noisy samples (B, ...), levels (B,) and labels, if there are classes: a trained diffusion model whose path pairs are
            taken from (distillation, CD). None: pairs share their noise (CT, iCT). Not trained, not saved.
        grid: Images in a row of the dashboard's picture; 0: no picture.
        seed: Of levels and noise, in training as in sampling. Dropout draws from the global generators.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("consistency/loss",), note="Jumps up where the number of levels doubles: the weights grow with it."),
        Curve("Loss by noise level", ("consistency/loss_q*",), note="Quarters of the index range, from small noise (q1) to large (q4)."),
        Curve("Noise levels", ("consistency/levels",)),
        Curve("Distance of samples to data", ("consistency/val_sw2*",), note="Sliced Wasserstein; lower is better."),
        ImagePanel("Samples", "consistency/samples", note="Of one step first, of the longest sampling last; the same noise every time."),
    )

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
        super().__init__()
        choices = (("curriculum", curriculum, Curriculum), ("levels", levels, LevelDraws), ("metric", metric, Metric))
        for name, value, known in (*choices, ("weight", weight, Weight), ("teacher", teacher, Teacher)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
        if not 1 <= s0 <= s1:
            raise ValueError(f"s0={s0} and s1={s1} are the numbers of intervals at start and end: give 1 <= s0 <= s1")
        if c is not None and c <= 0:
            raise ValueError(f"c is {c}: give a number above 0, or null for 0.00054 sqrt(D)")
        if list(sample_times) != sorted(sample_times, reverse=True) or any(not sigma_min < time < sigma_max for time in sample_times):
            raise ValueError(f"sample_times are {list(sample_times)}: give descending levels between {sigma_min} and {sigma_max}")
        if (metric == "perceptual") != (features is not None):
            raise ValueError("metric: perceptual and features, the network that it compares by, go together: give both or neither")
        self.save_hyperparameters(ignore=["network", "autoencoder", "features", "denoiser"])
        self.network = network
        self.teacher_network = copy.deepcopy(network).requires_grad_(False) if teacher == "ema" else None
        self.latents = None if autoencoder is None else LatentSpace(autoencoder, sigma_data)
        self.features = None if features is None else Frozen(features)
        self.denoiser = None if denoiser is None else Frozen(denoiser)
        self.curriculum: Curriculum = curriculum
        self.levels: LevelDraws = levels
        self.metric: Metric = metric
        # not hyperparameters of every subclass, and a subclass that `lit` makes has its own arguments alone in hparams
        self.c, self.pair_weight, self.teacher_decay, self.clip = c, weight, teacher_decay, clip
        self.total_steps = total_steps
        self._known: Levels | None = None
        self._seen: list[tuple[Tensor, dict[int, Tensor]]] = []  # data and as many samples
        self._pictures: _Pictures | None = None

    def setup(self, stage: str) -> None:
        """Take over the statistics of the latents, if the data have any."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.latents is not None and isinstance(getattr(data, "latent_mean", None), Tensor):
            self.latents.set_statistics(data.latent_mean, data.latent_std)

    # ---- f -------------------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """f(x, sigma): (B, ...), (B,) and labels -> (B, ...)."""
        return self._f(self.network)(x, sigma, *condition)

    def teach(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """The teacher's f: of the network itself, or of its average."""
        return self._f(self.network if self.teacher_network is None else self.teacher_network)(x, sigma, *condition)

    def _f(self, network: nn.Module) -> Callable[..., Tensor]:
        def narrow(x: Tensor, *rest: Tensor) -> Tensor:  # with precision bf16-true the network is narrower than f
            answer: Tensor = network(x.to(self.dtype), *rest)  # type: ignore[arg-type]
            return answer

        return consistency_function(narrow, self.hparams["sigma_min"], self.hparams["sigma_data"])

    def num_levels(self, step: int) -> int:
        """N at an optimiser step."""
        count = doubling_levels if self.curriculum == "doubling" else square_root_levels
        assert self.total_steps is not None
        return count(min(step, self.total_steps), self.total_steps, self.hparams["s0"], self.hparams["s1"])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The metric: (B, ...) twice -> (B,)."""
        if self.metric == "pseudo_huber":
            return pseudo_huber(a, b, 0.00054 * math.sqrt(a[0].numel()) if self.c is None else self.c)
        if self.features is not None:
            return perceptual(a, b, self.features.module)
        return square(a, b) if self.metric == "l2" else absolute(a, b)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The curriculum needs an end."""
        if self.total_steps is None:
            estimate = self.trainer.estimated_stepping_batches
            if not math.isfinite(estimate) or estimate < 1:
                raise ValueError("the curriculum needs an end, and this training has none: set max_steps, max_epochs, or total_steps")
            self.total_steps = int(estimate)

    def _levels_of(self, count: int, device: torch.device) -> Levels:
        """Levels, chances and weights of N levels; made anew where N changes."""
        if self._known is None or (self._known.count, self._known.sigma.device) != (count, device):
            hp = self.hparams
            sigma = karras_levels(count, hp["sigma_min"], hp["sigma_max"], hp["rho"])
            lognormal = self.levels == "lognormal"
            chances = lognormal_probabilities(sigma, hp["p_mean"], hp["p_std"]) if lognormal else uniform_probabilities(sigma)
            gaps = inverse_gap(sigma[:-1], sigma[1:]) if self.pair_weight == "inverse_gap" else torch.ones_like(chances)
            self._known = Levels(count, *(table.to(device, torch.float32) for table in (sigma, chances, gaps)))
        return self._known

    def draw(self, x: Tensor, batch_idx: int) -> Drawn:
        """Noise and levels of a batch. They follow from seed, epoch, batch and rank alone, not from the global generators.

        W ranks therefore draw what one process draws that accumulates over W times as many batches.
        """
        count = self.num_levels(self.trainer.global_step)
        known = self._levels_of(count, x.device)
        place = f"ConsistencyTraining {self.trainer.current_epoch} {batch_idx * self.trainer.world_size + self.trainer.global_rank}"
        generator = torch.Generator(x.device).manual_seed(own_seed(place, self.hparams["seed"]))
        index = torch.multinomial(known.chances, len(x), replacement=True, generator=generator) + 1
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return Drawn(noise, index, known.sigma[index - 1], known.sigma[index], known.weights[index - 1], count)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The consistency loss of Eq. 5 of iCT."""
        x = batch["image"].float()
        drawn, condition = self.draw(x, batch_idx), self._condition(batch)
        path = None if self.denoiser is None else partial(_follow, self.denoiser, condition)
        found = consistency_pair_loss(
            self, self.teach, x, drawn.noise, drawn.lower, drawn.upper, self.distance, drawn.weight, *condition, path=path
        )
        loss = self.loss(found, x, drawn)
        self.log("consistency/loss", loss.detach())
        if self.logs_now():
            self.log_dict(self.details(found, x, drawn), on_step=True, on_epoch=False)
        return loss

    def loss(self, found: PairLoss, x: Tensor, drawn: Drawn) -> Tensor:
        """Mean over the batch."""
        return found.losses.mean()

    def logs_now(self) -> bool:
        """Whether what this step logs is written down: the rest needn't be computed."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def details(self, found: PairLoss, x: Tensor, drawn: Drawn) -> dict[str, Tensor | float]:
        """What is logged beside the loss."""
        quarter = ((drawn.index - 1) * 4).div(drawn.count - 1, rounding_mode="floor")
        inside = quarter[:, None] == torch.arange(4, device=quarter.device)
        means = (found.losses.detach()[:, None] * inside).sum(0) / inside.sum(0)  # NaN where no sample fell
        logs: dict[str, Tensor | float] = {f"consistency/loss_q{number}": mean for number, mean in enumerate(means, start=1)}
        if self.teacher_network is not None:
            logs["consistency/teacher_decay"] = self._teacher_decay()
        return logs | {"consistency/levels": float(drawn.count), "consistency/weight": drawn.weight.mean()}

    def _condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (batch["label"],) if self.hparams["num_classes"] is not None else ()

    def _teacher_decay(self) -> float:
        """Of the step that is being taken."""
        hp = self.hparams
        return ct_teacher_decay(self.num_levels(self.trainer.global_step), hp["s0"], self.teacher_decay)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """CT's teacher follows at once: a checkpoint that a callback saves when the batch ends has it."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher_network is not None:
            ema_update(_state(self.teacher_network), _state(self.network), self._teacher_decay())

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """RAdam at a constant rate."""
        hp = self.hparams
        return torch.optim.RAdam(self.network.parameters(), lr=hp["learning_rate"], eps=hp["eps"], weight_decay=hp["weight_decay"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The curriculum's length belongs to the run."""
        checkpoint["consistency_training"] = {"total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over."""
        self.total_steps = checkpoint.get("consistency_training", {}).get("total_steps", self.total_steps)

    # ---- sampling ------------------------------------------------------------------------------------------------------------------------

    def sample(self, noise: Tensor, steps: int = 1, *condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples of standard normal noise (B, ...), in 1 to ``len(sample_times) + 1`` steps.

        Args:
            noise: (B, ...), the shape of a batch of data.
            steps: Network calls.
            condition: Labels (B,), with classes.
            generator: Of the noise between steps.
        """
        hp = self.hparams
        if not 1 <= steps <= len(hp["sample_times"]) + 1:
            raise ValueError(
                f"{steps} steps need {steps - 1} sample_times between the largest and smallest level: give them, or fewer steps"
            )
        times = [hp["sigma_max"], *hp["sample_times"][: steps - 1], hp["sigma_min"]]
        settings = {"sigma_min": hp["sigma_min"], "sigma_max": hp["sigma_max"], "clip": self.clip}
        return multistep_sample(lambda x, t: self(x, t, *condition), noise * hp["sigma_max"], times, generator=generator, **settings)

    def to_images(self, samples: Tensor) -> Tensor:
        """What samples (B, ...) look like: decoded, if they are latents."""
        return samples if self.latents is None else self.latents.decode(samples)

    def _draw_samples(self, batch: dict[str, Tensor], batch_idx: int, purpose: str) -> dict[int, Tensor]:
        """Steps -> as many samples as the batch has, of the same noise each time; other ranks draw other noise."""
        place = f"{purpose} {batch_idx * self.trainer.world_size + self.trainer.global_rank}"
        seeds = [own_seed(f"{place} {part}", self.hparams["seed"]) for part in ("start", "between")]
        data = batch["image"]
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seeds[0])).to(data.device)
        return {
            steps: self.sample(noise, steps, *self._condition(batch), generator=torch.Generator(data.device).manual_seed(seeds[1]))
            for steps in range(1, len(self.hparams["sample_times"]) + 2)
        }

    def _see(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        drawn = self._draw_samples(batch, batch_idx, "evaluation")
        self._seen.append((batch["image"].float().cpu(), {steps: samples.float().cpu() for steps, samples in drawn.items()}))
        return {f"{steps}_steps": samples for steps, samples in drawn.items()}

    def _compare(self, name: str) -> None:
        """Log how far the samples of all ranks are from the data of all ranks."""
        if not self._seen:
            raise ValueError(f"rank {self.global_rank} has seen no data to compare samples with: take fewer ranks or a smaller batch_size")
        data = gather_rows(torch.cat([one for one, _ in self._seen]), with_grad=False)
        found = {
            steps: gather_rows(torch.cat([samples[steps] for _, samples in self._seen]), with_grad=False) for steps in self._seen[0][1]
        }
        self._seen = []
        for steps, samples in found.items():
            distance = sliced_wasserstein(samples.flatten(1), data.flatten(1))
            self.log(name if steps == 1 else f"{name}_{steps}_steps", distance.to(self.device), rank_zero_only=False)
        self._pictures = _Pictures(data, found)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._seen = []

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._seen = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Draw as many samples as there are data: here, where ``WeightEMA`` lends its weights. Returns ``<n>_steps`` -> samples."""
        return self._see(batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As in validation."""
        return self._see(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Say how far the samples are from the data."""
        self._compare("consistency/val_sw2")

    def on_test_epoch_end(self) -> None:
        """Say how far the samples are from the data."""
        self._compare("consistency/test_sw2")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``<n>_steps`` -> as many samples as the batch has images, for each number of steps; of the batch, shape and labels are used."""
        drawn = self._draw_samples(batch, batch_idx, "prediction")
        return {f"{steps}_steps": self.to_images(samples) for steps, samples in drawn.items()}

    def dashboard_media(self) -> dict[str, Media]:
        """Samples of the last validation: a grid of images, or the density of points in the plane; nothing for other data."""
        if self._pictures is None:
            return {}
        data, found = self._pictures
        steps, grid = [str(count) for count in found], self.hparams["grid"]
        if (
            data.ndim == 4
            and grid
            and (shown := [self.to_images(samples[:grid]).cpu() for samples in found.values()])[0].shape[1] in (1, 3)
        ):
            rows = torch.cat(shown).add(1).div(2).clamp(0, 1)
            picture = make_grid(rows, nrow=len(shown[0]), padding=1).mul(255).round().byte().permute(1, 2, 0)
            words = f"{len(shown[0])} samples in {', '.join(steps)} steps, one row each"
        elif data.ndim == 2 and data.shape[1] == 2:
            limit = 1.25 * float(data.abs().max())
            picture = torch.cat([density_picture(points, limit) for points in (data, *found.values())], dim=1)
            words = f"Density of the data on the left; of samples in {', '.join(steps)} steps beside it"
        else:
            return {}
        return {"consistency/samples": ImageMedia(picture.contiguous().numpy(), alt=words)}


def density_picture(points: Tensor, limit: float, size: int = 192) -> Tensor:
    """How many points fall into each pixel of a square around 0, bright where there are many; points outside aren't seen.

    Args:
        points: (N, 2).
        limit: Half the side of the square, > 0.
        size: Pixels a side.

    Returns:
        (size, size, 3) uint8, the second coordinate upwards.
    """
    place = ((points + limit) * (size / (2 * limit))).floor()
    place = place[((place >= 0) & (place < size)).all(1)].long()
    counts = torch.bincount((size - 1 - place[:, 1]) * size + place[:, 0], minlength=size**2).view(size, size).float()
    bright = (counts / counts.max().clamp(min=1)).sqrt()[:, :, None]
    low, high = torch.tensor([13.0, 20.0, 33.0]), torch.tensor([240.0, 220.0, 130.0])
    return (low + bright * (high - low)).round().byte()


def _follow(denoiser: nn.Module, condition: tuple[Tensor, ...], x: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    return heun_step(denoiser, x, upper, lower, *condition)


def _state(module: nn.Module) -> list[Tensor]:
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]
