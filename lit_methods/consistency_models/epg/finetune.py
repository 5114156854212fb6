"""EPG, stage 2: a network with the pretrained encoder becomes a diffusion or a consistency model.

The maths stands in :mod:`~lit_methods.consistency_models.epg.core`.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.compiled import names_in
from lit_methods.consistency_models.curricula import ect_lower, ect_stage
from lit_methods.consistency_models.epg.core import (
    Pixels,
    consistency_tuning_loss,
    denoising_loss,
    denoising_weight,
    encode,
    gather_keys,
    interval_guidance,
    nearest_level,
    needs_width,
)
from lit_methods.consistency_models.epg.networks import Encoded, projection_head_of
from lit_methods.consistency_models.epg.stage import Stage
from lit_methods.consistency_models.evaluation import Purpose, SampleEvaluation, Samples
from lit_methods.consistency_models.levels import karras_levels, like, quarter_means
from lit_methods.consistency_models.metrics import square
from lit_methods.consistency_models.pairs import consistency_function
from lit_methods.consistency_models.sampling import Solver, check_sample_times, denoise_sample, multistep_sample
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Part
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, ImagePanel, Panel
from lit_methods.runs.checkpoints import read_state_dict
from lit_methods.seeds import own_seed, seeded_noise
from lit_methods.steps import log_global, logs_now, training_length

Mode = Literal["denoise", "consistency"]
Weight = Literal["inverse_gap", "one"]


class Drawn(NamedTuple):
    """What a batch is trained with: noise (B, ...), levels (B,) before the shift, and the lower ones or weights (B,)."""

    noise: Tensor
    sigma: Tensor
    lower: Tensor
    weight: Tensor


class EPGFinetune(Stage, SampleEvaluation):
    """Stage 2 of EPG: the encoder of stage 1 and a new decoder, trained end to end to denoise, or as a consistency model.

    To denoise, the loss is the weighted mean of (x0(x + sigma n, sigma) - x)^2. As a consistency model it is S / sg sqrt(S + c^2) / (t - r)
    with the squared distance S of the answers at two levels r < t that come closer stage by stage, plus ``perceptual_weight`` times the
    InfoNCE of answers and images in the features of the frozen encoder of stage 1.

    Runs: batches have ``image`` (B, C, H, W) floating point in [-1, 1]; with ``num_classes`` also ``label`` (B,) int64. ``forward`` is the
    denoised image x0, or f of the consistency model. Validation and samples use the weights as they are: attach ``WeightEMA``. The encoder
    is loaded when fit starts, by name and not strictly: what is missing or unknown is said. ``encoder_ckpt: null`` is training from
    scratch, a baseline. Validation computes the error of ``forward`` at ``probe_sigmas`` and draws as many samples as there are data; all
    are kept until it ends: limit them for large images. ``predict_step`` returns as many samples as a batch has images, for each number of
    steps. Beside the panels a consistency model logs ``epg/stage``, ``epg/consistency`` and ``epg/perceptual``.

    Saves: encoder, decoder, embeddings of classes, the length of the schedule. The frozen copy for the contrast is not saved: the file must
    be there when a run is resumed.

    Refuses: a checkpoint of another encoder; guidance without classes; a cosine without an end, unless ``total_steps`` is given.

    Args:
        encoder: As in :class:`EPGPretrain`; its blocks go to the decoder.
        decoder: :class:`Encoded` and (B, D) embeddings of classes or None -> (B, C, H, W), such as ``PixelViTDecoder``.
        mode: ``denoise`` (EPG-DM) or ``consistency`` (EPG-CM).
        encoder_ckpt: Checkpoint of stage 1; None: a random encoder.
        num_classes: Classes that the network is told; None: none.
        class_dropout: Chance that a label is withheld in training.
        p_mean: Mean of ln sigma; None: -1.2 for ``denoise``, -0.4 for ``consistency``.
        p_std: Standard deviation of ln sigma.
        num_levels: ``denoise``: sigma is snapped to the nearest of so many levels; None: it isn't.
        weight: ``denoise``: ``inverse_gap``, of the levels before the shift, or ``one``.
        ect_q: ``consistency``: how much nearer the levels of a pair come with each stage.
        ect_k: How much wider pairs are at small noise.
        ect_b: How fast that fades.
        ect_first: Steps of the first stage.
        ect_length: Steps of every further stage.
        ect_delta: First stage; 0: it is denoising.
        c: Scale of the distance.
        perceptual_weight: Factor of the contrast with the frozen encoder; None: 1 with ``encoder_ckpt``, 0 without.
        perceptual_temperature: > 0.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of what the encoder sees.
        base_resolution: As in :class:`EPGPretrain`; None: no shift.
        pixel_mean: Mean of the pixels in [0, 1], subtracted.
        pixel_std: By which they are divided then.
        solver: ``denoise``: ``heun``, ``euler`` or ``sde``.
        sample_steps: ``denoise``: levels of the sampler.
        sample_times: ``consistency``: levels of the steps after the first, before the shift, for the longest sampling.
        guidance: ``denoise``: how strongly samples follow their class; 1: as the network has it.
        guidance_interval: Levels, before the shift, between which that is done.
        learning_rate: AdamW's learning rate after the warm-up.
        betas: AdamW's two momentum decay rates.
        weight_decay: AdamW's weight decay.
        warmup_steps: Over which the rate rises.
        schedule: Learning rate after the warm-up: ``cosine`` or ``constant``.
        gradient_clip: Largest norm of the gradient once the warm-up is over; None: the Trainer's setting all the time.
        total_steps: Length of the cosine; None: the length of the training when it first starts. Saved with the checkpoint.
        probe_sigmas: Levels, before the shift, of the error after validation.
        grid: Images in a row of the dashboard's picture; 0: no picture.
        seed: Seed of levels, noise and withheld labels. Dropout draws from the global generators.

    Raises:
        ValueError: An argument outside its range.
    """

    prefix: ClassVar[str] = "epg"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("epg/loss",), note="For consistency it jumps up where a stage begins: the weights grow."),
        Curve("Loss by noise level", ("epg/loss_q*",), note="Quarters of the lognormal, from small noise (q1) to large (q4)."),
        Curve("Norm of the gradient", ("epg/grad_norm",)),
        Curve("Error of the denoised image", ("epg/val_mse*",), note="Mean square, at some noise levels; lower is better."),
        Curve("Distance of samples to data", ("epg/val_sw2*",), note="Sliced Wasserstein; lower is better."),
        ImagePanel("Samples", "epg/samples", note="The same noise every time."),
    )

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        mode: Mode = "denoise",
        encoder_ckpt: str | None = None,
        num_classes: int | None = None,
        class_dropout: float = 0.1,
        p_mean: float | None = None,
        p_std: float = 1.6,
        num_levels: int | None = 1280,
        weight: Weight = "inverse_gap",
        ect_q: float = 2.0,
        ect_k: float = 8.0,
        ect_b: float = 1.0,
        ect_first: int = 100_000,
        ect_length: int = 100_000,
        ect_delta: int = 1,
        c: float = 0.06,
        perceptual_weight: float | None = None,
        perceptual_temperature: float = 0.1,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        base_resolution: int | None = 64,
        pixel_mean: Sequence[float] = (0.5,),
        pixel_std: Sequence[float] = (0.5,),
        solver: Solver = "heun",
        sample_steps: int = 32,
        sample_times: Sequence[float] = (),
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.19, 1.61),
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_steps: int = 10_000,
        schedule: Literal["cosine", "constant"] = "cosine",
        gradient_clip: float | None = None,
        total_steps: int | None = None,
        probe_sigmas: Sequence[float] = (0.1, 0.25, 0.5, 1.0, 2.0),
        grid: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(EPGFinetune, locals())
        checks.within("[0, 1)", class_dropout=class_dropout)
        checks.positive(p_std=p_std, c=c, perceptual_temperature=perceptual_temperature, learning_rate=learning_rate)
        checks.positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, sigma_data=sigma_data, gradient_clip=gradient_clip)
        checks.at_least(1, num_classes=num_classes, sample_steps=sample_steps, base_resolution=base_resolution, total_steps=total_steps)
        checks.at_least(2, "levels", num_levels=num_levels)
        checks.at_least(0, ect_k=ect_k, ect_b=ect_b)
        for level in guidance_interval:
            checks.at_least(0, "a noise level", guidance_interval=level)
        for sigma in probe_sigmas:
            checks.positive(probe_sigmas=sigma)
        checks.at_least(0, perceptual_weight=perceptual_weight, guidance=guidance, weight_decay=weight_decay, warmup_steps=warmup_steps)
        checks.at_least(0, "images", grid=grid)
        checks.betas(betas=betas)
        if num_levels is None and weight == "inverse_gap" and mode == "denoise":
            raise ValueError("weight='inverse_gap' needs the levels of num_levels: give a number, or weight='one'")
        if perceptual_weight and encoder_ckpt is None:
            raise ValueError(
                f"perceptual_weight={perceptual_weight} needs the encoder of stage 1: give encoder_ckpt, or perceptual_weight=0"
            )
        checks.at_least(0, ect_delta=ect_delta, ect_first=ect_first)
        checks.at_least(1, ect_length=ect_length)
        checks.within("(1, inf)", ect_q=ect_q)
        if guidance != 1 and (num_classes is None or class_dropout == 0):
            raise ValueError(f"guidance={guidance} compares with and without a class: give num_classes and a class_dropout above 0")
        check_sample_times(sample_times, sigma_min, sigma_max)
        self.save_hyperparameters(ignore=["encoder", "decoder"])
        self.mode: Mode = mode
        self.encoder, self.decoder = encoder, decoder
        width = needs_width(encoder)
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)  # the last one: no class
        self.pixels = Pixels(pixel_mean, pixel_std)
        self.perceptual: Frozen | None = None
        self.perceptual_weight = (1.0 if encoder_ckpt else 0.0) if perceptual_weight is None else perceptual_weight
        self.p_mean = {"denoise": -1.2, "consistency": -0.4}[mode] if p_mean is None else p_mean
        self.total_steps = total_steps
        self.grid = grid
        self._errors: list[Tensor] = []  # beside ``_seen``

    # ---- the network ---------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load stage 1, before the optimiser is made; a resumed run then gets its own weights."""
        path = self.hparams["encoder_ckpt"]
        if stage != "fit" or path is None:
            return
        state, own = names_in(self.encoder, read_state_dict(path, "encoder.")), self.encoder.state_dict()
        wrong = [f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here" for name in own.keys() & state.keys()
                 if own[name].shape != state[name].shape]  # fmt: skip
        if wrong or not own.keys() & state.keys():
            raise ValueError(
                f"{path} has another encoder than {type(self.encoder).__name__}: {'; '.join(sorted(wrong)[:3]) or 'no name is the same'}"
            )
        named = self.encoder.load_state_dict(state, strict=False)
        said = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in zip(("missing", "unknown"), named, strict=True) if names]
        rank_zero_info(f"encoder of {path}: {len(own.keys() & state.keys())} tensors loaded" + "".join(f", {one}" for one in said))
        if self.mode == "consistency" and self.perceptual_weight:
            head = projection_head_of(read_state_dict(path, "projector."))
            frozen = copy.deepcopy(self.encoder)
            frozen.load_state_dict(state, strict=False)
            self.perceptual = Frozen(nn.ModuleDict({"encoder": frozen, "projector": head.to(self.dtype)}))

    def network(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F: scaled noisy images (B, ...), noise condition (B,) and labels (B,) -> (B, ...)."""
        known = None if self.classes is None else self.classes(labels)
        encoded: Encoded = self.encoder(x.to(self.dtype), noise, known)  # type: ignore[arg-type]
        answer: Tensor = self.decoder(encoded, known)
        return answer

    def forward(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        """x0(x, sigma) or f(x, sigma): normalised noisy images (B, ...), shifted levels (B,) and labels -> (B, ...) float32."""
        hp = self.hparams
        if self.mode == "consistency":
            return consistency_function(self.network, hp["sigma_min"] * self.shift(x), hp["sigma_data"])(x, sigma, *labels)
        answer: Tensor = encode(self.network, x, sigma, *labels, sigma_data=hp["sigma_data"])
        return answer.to(x.dtype)

    def embed(self, x: Tensor) -> Tensor:
        """What the frozen copy of stage 1 makes of images without noise: (B, ...) -> (B, C), with a gradient for ``x``."""
        assert self.perceptual is not None
        encoder, projector = self.perceptual.module["encoder"], self.perceptual.module["projector"]  # type: ignore[index]
        clean = torch.full((len(x),), self.hparams["sigma_min"] * self.shift(x), device=x.device)
        encoded: Encoded = encode(lambda u, noise: encoder(u.to(self.dtype), noise), x, clean, sigma_data=self.hparams["sigma_data"])
        projected: Tensor = projector(encoded.feature)
        return projected

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def place(self, batch_idx: int, what: str) -> str:
        """Names what is drawn for this batch of this rank."""
        return f"EPGFinetune {what} {self.current_epoch} {self.global_batch(batch_idx)}"

    def stage(self, step: int) -> int:
        """Of the curriculum, at an optimiser step."""
        hp = self.hparams
        return ect_stage(step, hp["ect_delta"], hp["ect_first"], hp["ect_length"])

    def draw(self, x: Tensor, batch_idx: int) -> Drawn:
        """Noise and levels of a batch. They follow from seed, epoch, batch and rank alone, not from the global generators."""
        hp = self.hparams
        normal = seeded_noise(self.place(batch_idx, "levels"), hp["seed"], x.new_empty(len(x)))
        noise = seeded_noise(self.place(batch_idx, "noise"), hp["seed"], x)
        sigma = (self.p_mean + hp["p_std"] * normal).exp()
        if self.mode == "consistency":
            sigma = sigma.clamp(min=hp["sigma_min"])
            lower = ect_lower(sigma, self.stage(self.trainer.global_step), hp["ect_q"], hp["ect_k"], hp["ect_b"], hp["sigma_min"])
            return Drawn(noise, sigma, lower, torch.ones_like(sigma))
        weight = torch.ones_like(sigma)
        if hp["num_levels"] is not None:
            levels = karras_levels(hp["num_levels"], hp["sigma_min"], hp["sigma_max"], hp["rho"]).to(sigma)
            index = nearest_level(sigma, levels)
            sigma = levels[index]
            if hp["weight"] == "inverse_gap":
                weight = denoising_weight(index, levels)
        return Drawn(noise, sigma, torch.zeros_like(sigma), weight)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Denoising, or the consistency of pairs with the contrast."""
        hp, x = self.hparams, self.pixels(batch["image"])
        drawn, shift = self.draw(x, batch_idx), self.shift(x)
        labels = self._labels(batch, batch_idx)
        logs: dict[str, Tensor | float] = {}
        if self.mode == "denoise":
            sigma = shift * drawn.sigma
            losses = denoising_loss(self(x + like(sigma, x) * drawn.noise, sigma, *labels), x, drawn.weight)
        else:
            stage = self.stage(self.trainer.global_step)
            tuning = consistency_tuning_loss(
                self,
                self,
                x,
                drawn.noise,
                shift * drawn.sigma,
                shift * drawn.lower,
                *labels,
                c=hp["c"],
                warmup=stage == 0,
                perceptual=None if self.perceptual is None else self.embed,
                temperature=hp["perceptual_temperature"],
                gather=gather_keys,
            )
            losses = tuning.consistency + self.perceptual_weight * tuning.perceptual
            logs = {
                "epg/stage": float(stage),
                "epg/consistency": tuning.consistency.detach().mean(),
                "epg/perceptual": tuning.perceptual.detach().mean(),
            }
        loss = losses.mean()
        self.log("epg/loss", loss.detach())
        if logs_now(self):
            self.log_dict(logs | self._quarters(losses.detach(), drawn.sigma), on_step=True, on_epoch=False)
        return loss

    def _quarters(self, losses: Tensor, sigma: Tensor) -> dict[str, Tensor | float]:
        edges = torch.tensor([-0.67449, 0.0, 0.67449], device=sigma.device)  # quartiles of a normal
        return quarter_means("epg/loss", losses, torch.bucketize((sigma.log() - self.p_mean) / self.hparams["p_std"], edges))

    def _labels(self, batch: dict[str, Tensor], batch_idx: int | None = None) -> tuple[Tensor, ...]:
        """Labels, if there are classes; in training some are withheld."""
        if self.classes is None:
            return ()
        if "label" not in batch:
            raise ValueError(f"num_classes={self.hparams['num_classes']}, but the batch has no label, only {', '.join(batch)}")
        labels = batch["label"]
        if batch_idx is None or self.hparams["class_dropout"] == 0:
            return (labels,)
        generator = torch.Generator(labels.device).manual_seed(own_seed(self.place(batch_idx, "classes"), self.hparams["seed"]))
        withheld = torch.rand(len(labels), generator=generator, device=labels.device) < self.hparams["class_dropout"]
        return (torch.where(withheld, self.hparams["num_classes"], labels),)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip when the warm-up is over, or as the Trainer says."""
        own = self.hparams["gradient_clip"]
        if own is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.trainer.global_step >= self.hparams["warmup_steps"]:
            self.clip_gradients(optimizer, gradient_clip_val=own, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a warm-up."""
        if self.hparams["schedule"] == "cosine":
            self.total_steps = training_length(self, self.total_steps)
        return self.adamw(self.parameters())

    # ---- sampling ------------------------------------------------------------------------------------------------------------------------

    def sample(self, noise: Tensor, *labels: Tensor, steps: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Images in [-1, 1] of standard normal noise (B, C, H, W).

        Args:
            noise: The shape of a batch of data.
            labels: (B,), with classes.
            steps: ``denoise``: levels, 2 or more; None: ``sample_steps``. ``consistency``: network calls, at most one more than there are
                ``sample_times``; None: 1.
            generator: Draws the noise between steps.
        """
        hp, shift = self.hparams, self.shift(noise)
        if self.mode == "consistency":
            steps = 1 if steps is None else steps
            if not 1 <= steps <= len(hp["sample_times"]) + 1:
                raise ValueError(f"{steps} steps need {steps - 1} sample_times: give them, or fewer steps")
            low, high = hp["sigma_min"] * shift, hp["sigma_max"] * shift
            times = [high, *(shift * time for time in hp["sample_times"][: steps - 1]), low]

            def clamped(x: Tensor, sigma: Tensor) -> Tensor:
                return self.pixels.clamp(self(x, sigma, *labels))

            return self.pixels.back(multistep_sample(clamped, noise * high, times, sigma_min=low, sigma_max=high, generator=generator))
        levels = karras_levels(steps or hp["sample_steps"], hp["sigma_min"], hp["sigma_max"], hp["rho"]).flip(0).tolist()

        def denoise(x: Tensor, level: float) -> Tensor:
            sigma = torch.full((len(x),), level, dtype=x.dtype, device=x.device)
            if not labels:
                return self.pixels.clamp(self(x, sigma))
            guided = interval_guidance(
                lambda x, labels: self(x, sigma, labels),
                x,
                level / shift,
                labels[0],
                hp["num_classes"],
                hp["guidance"],
                (hp["guidance_interval"][0], hp["guidance_interval"][1]),
            )
            return self.pixels.clamp(guided)

        start = noise * shift * levels[0]
        return self.pixels.back(denoise_sample(denoise, start, [shift * level for level in levels], hp["solver"], generator))

    def _draw_samples(self, batch: dict[str, Tensor], batch_idx: int, purpose: Purpose) -> dict[int, Tensor]:
        hp, data = self.hparams, batch["image"]
        place = f"EPG {purpose} {self.global_batch(batch_idx)}"
        noise = seeded_noise(f"{place} start", hp["seed"], data.float())
        counts = [hp["sample_steps"]] if self.mode == "denoise" else range(1, len(hp["sample_times"]) + 2)
        return {
            steps: self.sample(
                noise,
                *self._labels(batch),
                steps=steps,
                generator=torch.Generator(data.device).manual_seed(own_seed(f"{place} between", hp["seed"])),
            )
            for steps in counts
        }

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def ending(self, steps: int) -> str:
        """The sampler of ``denoise`` has one number of steps, which figures needn't name."""
        return "" if self.mode == "denoise" else super().ending(steps)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Denoise, and draw as many samples as there are data."""
        hp, x = self.hparams, self.pixels(batch["image"])
        place = f"EPG evaluation {self.global_batch(batch_idx)}"
        errors = []
        for sigma in hp["probe_sigmas"]:
            level = torch.full((len(x),), sigma * self.shift(x), device=x.device)
            noisy = x + like(level, x) * seeded_noise(f"{place} {sigma:g}", hp["seed"], x)
            errors.append(square(self(noisy, level, *self._labels(batch)).float(), x))
        self._errors.append(torch.stack(errors, dim=1))
        return super()._evaluate(batch, batch_idx)

    def compare(self, part: Part, seen: list[Samples]) -> None:
        """Log the errors of all ranks, and how far their samples are from their data."""
        errors = gather_rows(torch.cat(self._errors), with_grad=False).mean(0)
        logs = {f"epg/{part}_mse": errors.mean()}
        logs |= {f"epg/{part}_mse_{sigma:g}": error for sigma, error in zip(self.hparams["probe_sigmas"], errors, strict=True)}
        log_global(self, logs)
        super().compare(part, seen)

    def forget(self) -> None:
        """Drop what was kept."""
        super().forget()
        self._errors = []
