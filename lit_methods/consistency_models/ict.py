"""iCT: consistency training without an averaged teacher (arXiv:2310.14189), and its predecessor CT (arXiv:2303.01469) as a baseline.

Golden vectors come from openai/consistency_models@e32b69e (curriculum, loss and sampler of CT) and from the equations of the paper (iCT has
no released code). The maths stand in :mod:`~lit_methods.consistency_models.levels`, :mod:`~lit_methods.consistency_models.curricula`,
:mod:`~lit_methods.consistency_models.metrics` and :mod:`~lit_methods.consistency_models.pairs`. Left out: distillation from a diffusion
model (CD), and LPIPS.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchvision.utils import make_grid

from lit_methods.callbacks.ema import ema_update
from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, square_root_levels
from lit_methods.consistency_models.evaluation import sliced_wasserstein
from lit_methods.consistency_models.levels import inverse_gap, karras_levels, lognormal_probabilities, uniform_probabilities
from lit_methods.consistency_models.metrics import absolute, pseudo_huber, square
from lit_methods.consistency_models.pairs import PairLoss, consistency_function, consistency_pair_loss
from lit_methods.consistency_models.sampling import multistep_sample
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel

Curriculum = Literal["doubling", "square_root"]
Levels = Literal["lognormal", "uniform"]
Metric = Literal["pseudo_huber", "l2", "l1"]
Weight = Literal["inverse_gap", "one"]
Teacher = Literal["stopgrad", "ema"]


class ConsistencyTraining(LightningModule):
    """Trains f(x, sigma), which maps a noisy sample of any level to the sample it came from, so that one call makes a sample of noise.

    The defaults are iCT's. CT is the same with ``curriculum: square_root``, ``s0: 2``, ``s1: 150``, ``levels: uniform``, ``metric: l2``,
    ``weight: one`` and ``teacher: ema``.

    Batches: ``image`` (B, ...) floating point, of about ``sigma_data`` standard deviation (images in [-1, 1]); with ``num_classes`` also
    ``label`` (B,) int64. ``forward`` is f. Sampling and validation use the weights as they are: attach ``WeightEMA``, which lends its
    averaged weights then, as the paper has it. The averaged teacher of CT is another thing; it lives in ``teacher_network``.

    Logged: ``consistency/loss``, ``consistency/levels`` (N), ``consistency/weight`` (mean lambda), ``consistency/teacher_decay`` (with
    ``teacher: ema``), ``consistency/loss_q1`` to ``_q4``, the mean loss of the samples whose level lies in each quarter of the index range;
    ``consistency/val_sw2`` and ``consistency/val_sw2_<n>_steps``, the sliced Wasserstein distance of as many samples as there are
    validation data to these, for one step and for several.
    ``predict_step`` takes a batch of anything and returns as many samples for each number of steps.

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        curriculum: Number of levels over training: ``doubling`` (iCT) or ``square_root`` (CT).
        s0: Intervals between levels at the start.
        s1: At the end.
        levels: How pairs are drawn: discretised ``lognormal`` (iCT) or ``uniform`` (CT).
        p_mean: Of ln sigma, for ``lognormal``.
        p_std: Of ln sigma, for ``lognormal``.
        metric: ``pseudo_huber`` (iCT; sum of squares), ``l2`` or ``l1`` (CT; means).
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
        grid: Samples of a picture; 0: none.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("consistency/loss",), note="Jumps up where the number of levels doubles: the weights grow with it."),
        Curve("Loss by noise level", ("consistency/loss_q?",), note="Quarters of the index range, from small noise (q1) to large (q4)."),
        Curve("Noise levels", ("consistency/levels",)),
        Curve("Distance of samples to data", ("consistency/val_sw2*",), note="Sliced Wasserstein; lower is better."),
        ImagePanel("Samples", "consistency/samples", note="One step above, the longest sampling below; the same noise in every epoch."),
    )

    def __init__(
        self,
        network: nn.Module,
        curriculum: Curriculum = "doubling",
        s0: int = 10,
        s1: int = 1280,
        levels: Levels = "lognormal",
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
        grid: int = 16,
    ) -> None:
        super().__init__()
        choices = (("curriculum", curriculum, Curriculum), ("levels", levels, Levels), ("metric", metric, Metric))
        for name, value, known in (*choices, ("weight", weight, Weight), ("teacher", teacher, Teacher)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
        if not 1 <= s0 <= s1:
            raise ValueError(f"s0={s0} and s1={s1} are the numbers of intervals at start and end: give 1 <= s0 <= s1")
        if c is not None and c <= 0:
            raise ValueError(f"c is {c}: give a number above 0, or null for 0.00054 sqrt(D)")
        if list(sample_times) != sorted(sample_times, reverse=True) or any(not sigma_min < time < sigma_max for time in sample_times):
            raise ValueError(f"sample_times are {list(sample_times)}: give descending levels between {sigma_min} and {sigma_max}")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.teacher_network = copy.deepcopy(network).requires_grad_(False) if teacher == "ema" else None
        self.curriculum: Curriculum = curriculum
        self.levels: Levels = levels
        self.metric: Metric = metric
        self.total_steps = total_steps
        self._batch_step = 0
        self._samples: dict[int, Tensor] = {}
        self._seen: list[tuple[Tensor, dict[int, Tensor]]] = []  # validation data and as many samples

    # ---- f -------------------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """f(x, sigma): (B, ...), (B,) and labels -> (B, ...)."""
        hp = self.hparams
        return consistency_function(self.network, hp["sigma_min"], hp["sigma_data"])(x, sigma, *condition)

    def teach(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """The teacher's f: of the network itself, or of its average."""
        hp = self.hparams
        network = self.network if self.teacher_network is None else self.teacher_network
        return consistency_function(network, hp["sigma_min"], hp["sigma_data"])(x, sigma, *condition)

    def num_levels(self, step: int) -> int:
        """N at an optimiser step."""
        count = doubling_levels if self.curriculum == "doubling" else square_root_levels
        assert self.total_steps is not None
        return count(min(step, self.total_steps), self.total_steps, self.hparams["s0"], self.hparams["s1"])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The metric: (B, ...) twice -> (B,)."""
        if self.metric == "pseudo_huber":
            c = self.hparams["c"]
            return pseudo_huber(a, b, 0.00054 * math.sqrt(a[0].numel()) if c is None else c)
        return square(a, b) if self.metric == "l2" else absolute(a, b)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The curriculum needs an end."""
        if self.total_steps is None:
            estimate = self.trainer.estimated_stepping_batches
            if not math.isfinite(estimate):
                raise ValueError("the curriculum needs an end, and this training has none: set max_steps, max_epochs, or total_steps")
            self.total_steps = int(estimate)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Noise like ``x``, lower and upper levels (B,) of its samples, and N."""
        hp = self.hparams
        count = self.num_levels(self.trainer.global_step)
        sigma = karras_levels(count, hp["sigma_min"], hp["sigma_max"], hp["rho"])
        chances = lognormal_probabilities(sigma, hp["p_mean"], hp["p_std"]) if self.levels == "lognormal" else uniform_probabilities(sigma)
        index = torch.multinomial(chances, len(x), replacement=True)
        lower, upper = (sigma[index + offset].to(x.device, torch.float32) for offset in (0, 1))
        return torch.randn_like(x), lower, upper, count

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The consistency loss of Eq. 5 of iCT."""
        x = batch["image"]
        noise, lower, upper, count = self.draw(x)
        weight = inverse_gap(lower, upper) if self.hparams["weight"] == "inverse_gap" else torch.ones_like(lower)
        found = consistency_pair_loss(self, self.teach, x, noise, lower, upper, self.distance, weight, *self._condition(batch))
        loss = self.loss(found, x, upper)
        self.log_dict({"consistency/loss": loss.detach(), "consistency/levels": float(count), "consistency/weight": weight.mean()})
        self._log_quarters(found.losses.detach(), upper, count)
        return loss

    def loss(self, found: PairLoss, x: Tensor, upper: Tensor) -> Tensor:
        """Mean over the batch."""
        return found.losses.mean()

    def _condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (batch["label"],) if self.hparams["num_classes"] is not None else ()

    def _log_quarters(self, losses: Tensor, upper: Tensor, count: int) -> None:
        hp = self.hparams
        low, high = hp["sigma_min"] ** (1 / hp["rho"]), hp["sigma_max"] ** (1 / hp["rho"])
        quarter = ((upper ** (1 / hp["rho"]) - low) / (high - low) * 4).ceil().clamp(1, 4)
        inside = quarter[:, None] == torch.arange(1, 5, device=losses.device)
        means = (losses[:, None] * inside).sum(0) / inside.sum(0)  # NaN where no sample fell
        self.log_dict({f"consistency/loss_q{number}": mean for number, mean in enumerate(means, start=1)}, on_epoch=False, on_step=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """CT's teacher follows after an optimiser step."""
        step = self.trainer.global_step
        if self.teacher_network is not None and step != self._batch_step:
            decay = ct_teacher_decay(self.num_levels(step - 1), self.hparams["s0"], self.hparams["teacher_decay"])
            ema_update(_state(self.teacher_network), _state(self.network), decay)
            self.log("consistency/teacher_decay", decay)
        self._batch_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """RAdam at a constant rate."""
        hp = self.hparams
        return torch.optim.RAdam(self.network.parameters(), lr=hp["learning_rate"], eps=hp["eps"], weight_decay=hp["weight_decay"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The curriculum's length belongs to the run."""
        checkpoint["consistency_training"] = {"total_steps": self.total_steps, "batch_step": self._batch_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over."""
        state = checkpoint.get("consistency_training", {})
        self.total_steps = state.get("total_steps", self.total_steps)
        self._batch_step = state.get("batch_step", 0)

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
        settings = {"sigma_min": hp["sigma_min"], "sigma_max": hp["sigma_max"], "clip": hp["clip"]}
        return multistep_sample(lambda x, t: self(x, t, *condition), noise * hp["sigma_max"], times, generator=generator, **settings)

    def _draw_samples(self, count: int, shape: Sequence[int], condition: tuple[Tensor, ...], seed: int) -> dict[int, Tensor]:
        """Steps -> samples, of the same noise each time."""
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        found = {}
        for steps in range(1, len(self.hparams["sample_times"]) + 2):
            again = torch.Generator(self.device).manual_seed(seed + 1)
            found[steps] = self.sample(noise, steps, *condition, generator=again)
        return found

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Draw as many samples as there are data: here, where ``WeightEMA`` lends its weights."""
        data = batch["image"]
        self._seen.append((data, self._draw_samples(len(data), data.shape[1:], self._condition(batch), seed=batch_idx)))

    def on_validation_epoch_end(self) -> None:
        """Say how far the samples are from the data."""
        data, drawn = (list(part) for part in zip(*self._seen, strict=True))
        self._seen = []
        samples = {steps: torch.cat([part[steps] for part in drawn]) for steps in drawn[0]}
        for steps, found in samples.items():
            distance = sliced_wasserstein(found.flatten(1).float(), torch.cat(data).flatten(1).float())
            self.log("consistency/val_sw2" if steps == 1 else f"consistency/val_sw2_{steps}_steps", distance, sync_dist=True)
        self._samples = {steps: found[: self.hparams["grid"]].detach().float().cpu() for steps, found in samples.items()}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``<n>_steps`` -> as many samples as the batch has, for each number of steps."""
        data = batch["image"]
        drawn = self._draw_samples(len(data), data.shape[1:], self._condition(batch), seed=1000 + batch_idx)
        return {f"{steps}_steps": samples for steps, samples in drawn.items()}

    def dashboard_media(self) -> dict[str, Media]:
        """A grid of samples, where they are images."""
        first = next(iter(self._samples.values()), None)
        if first is None or first.ndim != 4 or len(first) == 0:
            return {}
        rows = torch.cat(list(self._samples.values())).add(1).div(2).clamp(0, 1)
        picture = make_grid(rows, nrow=len(first), padding=1).mul(255).round().byte().permute(1, 2, 0)
        words = f"{len(first)} samples in {', '.join(f'{steps}' for steps in self._samples)} steps, one row each"
        return {"consistency/samples": ImageMedia(picture.contiguous().numpy(), alt=words)}


def _state(module: nn.Module) -> list[Tensor]:
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]
