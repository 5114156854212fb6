"""Training on pairs of neighbouring noise levels, for every technique that trains a consistency model from data (arXiv:2303.01469).

The maths stand in :mod:`~lit_methods.consistency_models.levels`, :mod:`~lit_methods.consistency_models.curricula` and
:mod:`~lit_methods.consistency_models.pairs`. A technique is its metric, its curriculum and what it adds to the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.curricula import check_intervals, doubling_levels
from lit_methods.consistency_models.evaluation import Purpose, SampleEvaluation
from lit_methods.consistency_models.latents import LatentSpace
from lit_methods.consistency_models.levels import inverse_gap, karras_levels, lognormal_probabilities, quarter_means
from lit_methods.consistency_models.pairs import PairLoss, Path, consistency_function, consistency_pair_loss
from lit_methods.consistency_models.sampling import check_sample_times, multistep_sample
from lit_methods.panels import Curve, ImagePanel, Panel
from lit_methods.seeds import own_seed
from lit_methods.steps import logs_now, training_length


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
    """N levels: sigma (N,), and chances and weights of the pairs, (N - 1,) each; float32."""

    count: int
    sigma: Tensor
    chances: Tensor
    weights: Tensor


class PairTraining(SampleEvaluation):
    """Base of consistency training: f(x, sigma) maps a noisy sample of any level to the sample it came from.

    The loss is lambda d(f(x + sigma' z, sigma'), sg f(x + sigma z, sigma)) for neighbouring levels sigma < sigma', as many as the doubling
    curriculum has, drawn from a lognormal, with lambda = 1 / (sigma' - sigma): iCT's. Subclasses give :meth:`distance` and save their
    arguments as hyperparameters, among them those of :meth:`draw` and :meth:`configure_optimizers`.

    Args:
        network: F of (B, ...) and (B,) noise condition ln(sigma) / 4, and labels if there are classes -> (B, ...).
        s0: Intervals between levels at the start.
        s1: Intervals between levels at the end.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        sigma_data: Standard deviation of the data.
        sample_times: Levels of the steps after the first, for the longest sampling.
        total_steps: K of the curriculum; None: the length of the training when it first starts.
        autoencoder: Whose latents the data are; None: the data are what is wanted.
        grid: Images in a row of the dashboard's picture; 0: no picture.
    """

    prefix: ClassVar[str] = "consistency"
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
        s0: int,
        s1: int,
        sigma_min: float,
        sigma_max: float,
        sigma_data: float,
        sample_times: Sequence[float],
        total_steps: int | None,
        autoencoder: nn.Module | None,
        grid: int,
    ) -> None:
        super().__init__()
        check_intervals(s0, s1)
        checks.positive(sigma_min=sigma_min, sigma_data=sigma_data)
        checks.at_least(1, "optimiser steps", total_steps=total_steps)
        checks.at_least(0, "images", grid=grid)
        check_sample_times(sample_times, sigma_min, sigma_max)
        self.network = network
        self.latents = None if autoencoder is None else LatentSpace(autoencoder, sigma_data)
        self.total_steps, self.grid, self.clip = total_steps, grid, False
        self._known: Levels | None = None

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
        """The teacher's f: that of the network itself."""
        return self(x, sigma, *condition)  # type: ignore[no-any-return]

    def _f(self, network: nn.Module) -> Callable[..., Tensor]:
        def narrow(x: Tensor, *rest: Tensor) -> Tensor:  # with precision bf16-true the network is narrower than f
            answer: Tensor = network(x.to(self.dtype), *rest)  # type: ignore[arg-type]
            return answer

        return consistency_function(narrow, self.hparams["sigma_min"], self.hparams["sigma_data"])

    def num_levels(self, step: int) -> int:
        """N at an optimiser step."""
        assert self.total_steps is not None
        return doubling_levels(min(step, self.total_steps), self.total_steps, self.hparams["s0"], self.hparams["s1"])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The metric: (B, ...) twice -> (B,)."""
        raise NotImplementedError

    def chances(self, sigma: Tensor) -> Tensor:
        """How likely each pair of N ascending levels is: (N,) -> (N - 1,)."""
        return lognormal_probabilities(sigma, self.hparams["p_mean"], self.hparams["p_std"])

    def weights(self, sigma: Tensor) -> Tensor:
        """Lambda of each pair of N ascending levels: (N,) -> (N - 1,)."""
        return inverse_gap(sigma[:-1], sigma[1:])

    def path(self, condition: tuple[Tensor, ...]) -> Path | None:
        """What leads a noisy sample from its higher level to the lower one; None: both share their noise."""
        return None

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The curriculum needs an end."""
        self.total_steps = training_length(self, self.total_steps, what="the curriculum")

    def _levels_of(self, count: int, device: torch.device) -> Levels:
        """Levels, chances and weights of N levels; made anew where N changes."""
        if self._known is None or (self._known.count, self._known.sigma.device) != (count, device):
            sigma = karras_levels(count, self.hparams["sigma_min"], self.hparams["sigma_max"], self.hparams["rho"])
            tables = (sigma, self.chances(sigma), self.weights(sigma))
            self._known = Levels(count, *(table.to(device, torch.float32) for table in tables))
        return self._known

    def draw(self, x: Tensor, batch_idx: int) -> Drawn:
        """Noise and levels of a batch. They follow from seed, epoch, batch and rank alone, not from the global generators.

        W ranks therefore draw what one process draws that accumulates over W times as many batches.
        """
        count = self.num_levels(self.trainer.global_step)
        known = self._levels_of(count, x.device)
        place = f"ConsistencyTraining {self.trainer.current_epoch} {self.global_batch(batch_idx)}"
        generator = torch.Generator(x.device).manual_seed(own_seed(place, self.hparams["seed"]))
        index = torch.multinomial(known.chances, len(x), replacement=True, generator=generator) + 1
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return Drawn(noise, index, known.sigma[index - 1], known.sigma[index], known.weights[index - 1], count)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The consistency loss of Eq. 5 of iCT."""
        x = batch["image"].float()
        drawn, condition = self.draw(x, batch_idx), self._condition(batch)
        pair = consistency_pair_loss(
            self, self.teach, x, drawn.noise, drawn.lower, drawn.upper, self.distance, drawn.weight, *condition, path=self.path(condition)
        )
        loss = self.loss(pair, x, drawn)
        self.log("consistency/loss", loss.detach())
        if logs_now(self):
            self.log_dict(self.details(pair, x, drawn), on_step=True, on_epoch=False)
        return loss

    def loss(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> Tensor:
        """Mean over the batch."""
        return pair.losses.mean()

    def details(self, pair: PairLoss, x: Tensor, drawn: Drawn) -> dict[str, Tensor | float]:
        """What is logged beside the loss."""
        quarter = ((drawn.index - 1) * 4).div(drawn.count - 1, rounding_mode="floor")
        logs = quarter_means("consistency/loss", pair.losses.detach(), quarter)
        return logs | {"consistency/levels": float(drawn.count), "consistency/weight": drawn.weight.mean()}

    def _condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (batch["label"],) if self.hparams["num_classes"] is not None else ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
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
            generator: Draws the noise between steps.
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

    def _draw_samples(self, batch: dict[str, Tensor], batch_idx: int, purpose: Purpose) -> dict[int, Tensor]:
        place = f"{purpose} {self.global_batch(batch_idx)}"
        seeds = [own_seed(f"{place} {part}", self.hparams["seed"]) for part in ("start", "between")]
        data = batch["image"]
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seeds[0])).to(data.device)
        return {
            steps: self.sample(noise, steps, *self._condition(batch), generator=torch.Generator(data.device).manual_seed(seeds[1]))
            for steps in range(1, len(self.hparams["sample_times"]) + 2)
        }
