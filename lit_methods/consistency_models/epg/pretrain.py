"""EPG, stage 1: an encoder of noisy images whose features agree along the path from noise to data.

The maths stands in :mod:`~lit_methods.consistency_models.epg.core`.
Left out: nothing of the stage; :class:`AugmentedViews` says where its colours differ.
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.averages import ema_update
from lit_methods.catalog import Technique
from lit_methods.consistency_models.curricula import check_intervals, doubling_levels
from lit_methods.consistency_models.epg.core import (
    Map,
    Pixels,
    PretrainLoss,
    TemperatureSchedule,
    consistency_temperature,
    cosines,
    encode,
    gather_keys,
    needs_width,
    neighbour_labels,
    pretrain_levels,
    pretrain_loss,
)
from lit_methods.consistency_models.epg.networks import Encoded, projection_head
from lit_methods.consistency_models.epg.stage import Stage
from lit_methods.consistency_models.epg.views import Views
from lit_methods.consistency_models.evaluation import WholeSetEvaluation
from lit_methods.consistency_models.levels import like
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Part
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import own_seed, seeded_noise
from lit_methods.steps import log_global, logs_now, training_length

TECHNIQUE = Technique(
    slug="epg",
    short="EPG",
    title="Advancing End-to-End Pixel Space Generative Modeling via Self-supervised Pre-training",
    arxiv="2510.12586",
    family="consistency_models",
    form="module",
    classes=("lit_methods.EPGPretrain", "lit_methods.EPGFinetune"),
    configs=("epg.yaml", "epg_denoise.yaml", "epg_consistency.yaml"),
    golden=("info_nce", "pretrain_loss", "pretrain_curriculum", "ect_pair", "consistency_loss"),
    claim=(
        "On digits, a network whose encoder was pre-trained with representation consistency denoises held-out images better after 50 steps "
        "of fine-tuning than one trained from scratch."
    ),
    summary="Draws images from pixels, without an autoencoder: an encoder of noisy images is pre-trained, then tuned with a decoder.",
)


class _Seen(NamedTuple):
    features: Tensor  # (levels, B, D), the clean level first
    labels: Tensor | None


class EPGPretrain(Stage, WholeSetEvaluation[_Seen]):
    """Stage 1 of EPG: trains an encoder of noisy images without labels; :class:`EPGFinetune` then draws images with it.

    The loss is ``contrastive_weight`` times the InfoNCE of two almost noiseless views, by an averaged target, plus ``consistency_weight``
    times the InfoNCE of an image's features at two neighbouring noise levels.

    Runs: batches have ``image`` (B, C, H, W) floating point in [-1, 1], at most mirrored; without ``views`` also ``view1`` and ``view2``,
    like it; for the accuracies ``label`` (B,) int64. ``forward`` gives features of images at a noise level, ``predict_step`` {"feature":
    (B, D)} of clean images. Keys of all ranks are negatives. The head has batch norm: set ``sync_batchnorm`` of the Trainer on several
    GPUs. The target averages parameters; its batch norm has statistics of its own. Validation looks at noisy images of each of
    ``probe_sigmas``: the share whose feature is most like the clean feature of the same image, and, with labels, the accuracy of a vote of
    the nearest clean features of other images. Features of all validation images are kept until then, and their (N, N) cosines: limit them
    for a large set. Beside the panels the temperature of the consistency, ``epg/temperature``, is logged.

    Saves: encoder, head and their averaged targets, and the length of the curriculum.

    Refuses: a training without an end, unless ``total_steps`` is given; several GPUs without ``sync_batchnorm``. Not for strategies that
    shard weights.

    Args:
        encoder: (B, C, H, W) and (B,) noise condition ln(sigma) / 4 -> :class:`Encoded`, with an attribute ``width``, such as
            ``PixelViTEncoder``.
        views: Makes two views of each image; None: the batch has them.
        s0: Intervals between levels at the start.
        s1: At the end.
        consistency_weight: Factor of the consistency of features; 0: the contrast alone, a MoCo v3 as a baseline.
        contrastive_weight: Factor of the contrast.
        contrastive_temperature: > 0.
        temperature: Temperature of the consistency, > 0.
        final_temperature: Where the schedule ends; None: as ``temperature``.
        temperature_schedule: ``constant``, ``interpolated`` (over sigma) or ``cosine`` (over training).
        projector_width: Hidden width of the projection head.
        projector_dim: Width of its output.
        projector_layers: Its linear layers.
        target_decay: Share of itself that the target keeps at an optimiser step, in [0, 1].
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        sigma_data: Standard deviation of what the encoder sees.
        base_resolution: Height in pixels at which levels are as they are; others are multiplied by height / this. None: never.
        pixel_mean: Mean of the pixels in [0, 1], subtracted: one number or one for each channel.
        pixel_std: By which they are divided then.
        learning_rate: AdamW's learning rate after the warm-up.
        betas: AdamW's two momentum decay rates.
        weight_decay: AdamW's weight decay.
        warmup_steps: Over which the rate rises.
        schedule: Learning rate after the warm-up: ``cosine`` or ``constant``.
        total_steps: K of curriculum and schedules; None: the length of the training when it first starts. Saved with the checkpoint.
        probe_sigmas: Levels, before the resolution shift, at which validation looks.
        neighbours: That vote.
        seed: Seed of views, levels and noise.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("epg/loss", "epg/contrastive", "epg/consistency"), note="The consistency gets harder where levels come closer."),
        Curve("Cosine with keys", ("epg/positive_*", "epg/negative_*"), note="Of the own key (high), and of all others (low)."),
        Curve("Noise levels", ("epg/levels",)),
        Curve(
            "Noisy images recognised", ("epg/val_match_*",), note="Share whose feature is most like that of the same image without noise."
        ),
        Curve("Accuracy of nearest neighbours", ("epg/val_knn_*",), note="Noisy query, clean neighbours of other images."),
        Curve("Norm of the gradient", ("epg/grad_norm",)),
        ImagePanel("Agreement along the path from noise to data", "epg/paths", note="Row: level of the query; column: level of the keys."),
    )

    def __init__(
        self,
        encoder: nn.Module,
        views: Views | None = None,
        s0: int = 20,
        s1: int = 1280,
        consistency_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        contrastive_temperature: float = 0.2,
        temperature: float = 0.1,
        final_temperature: float | None = None,
        temperature_schedule: TemperatureSchedule = "constant",
        projector_width: int = 4096,
        projector_dim: int = 256,
        projector_layers: int = 3,
        target_decay: float = 0.99,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        base_resolution: int | None = 64,
        pixel_mean: Sequence[float] = (0.5,),
        pixel_std: Sequence[float] = (0.5,),
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.03,
        warmup_steps: int = 10_000,
        schedule: Literal["cosine", "constant"] = "cosine",
        total_steps: int | None = None,
        probe_sigmas: Sequence[float] = (0.1, 0.5, 2.0),
        neighbours: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_intervals(s0, s1)
        checks.one_of(TemperatureSchedule, temperature_schedule=temperature_schedule)
        checks.positive(contrastive_temperature=contrastive_temperature, temperature=temperature, final_temperature=final_temperature)
        checks.at_least(0, consistency_weight=consistency_weight, contrastive_weight=contrastive_weight)
        checks.share(target_decay=target_decay)
        checks.positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, sigma_data=sigma_data, learning_rate=learning_rate)
        checks.at_least(1, projector_width=projector_width, projector_dim=projector_dim, projector_layers=projector_layers)
        checks.at_least(1, base_resolution=base_resolution, neighbours=neighbours, total_steps=total_steps)
        checks.at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps)
        for sigma in probe_sigmas:
            checks.positive(probe_sigmas=sigma)
        checks.betas(betas=betas)
        self.save_hyperparameters(ignore=["encoder", "views"])
        self.encoder = encoder
        self.projector = projection_head(needs_width(encoder), projector_width, projector_dim, projector_layers)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.pixels = Pixels(pixel_mean, pixel_std)
        self.views = views
        self.total_steps = total_steps
        self._picture: Tensor | None = None

    # ---- features ------------------------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W) in [-1, 1], to which noise of levels (B,) was added, in units of ``pixel_std``."""
        feature: Tensor = encode(self._feature(self.encoder), self.pixels(image), sigma, sigma_data=self.hparams["sigma_data"])
        return feature

    def _feature(self, encoder: nn.Module) -> Map:
        def feature(x: Tensor, noise: Tensor) -> Tensor:  # with precision bf16-true the network is narrower than the levels
            encoded: Encoded = encoder(x.to(self.dtype), noise)  # type: ignore[arg-type]
            return encoded.feature

        return feature

    def num_levels(self, step: int) -> int:
        """N at an optimiser step."""
        assert self.total_steps is not None
        return doubling_levels(min(step, self.total_steps), self.total_steps, self.hparams["s0"], self.hparams["s1"], "ceil")

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The curriculum needs an end. Batch norm of the head should see the global batch."""
        self.total_steps = training_length(self, self.total_steps)
        plain = any(type(part) is nn.BatchNorm1d for part in self.projector)
        if plain and self.trainer.world_size > 1 and self.device.type == "cuda":
            raise ValueError("each GPU's batch norm would see its own images only: set sync_batchnorm: true in the Trainer")

    def draw_index(self, count: int, batch_idx: int) -> int:
        """Index in 1..N-1 of the lower level: the same on all ranks, as it follows from seed, epoch and batch."""
        generator = torch.Generator().manual_seed(own_seed(f"EPGPretrain level {self.current_epoch} {batch_idx}", self.hparams["seed"]))
        return int(torch.randint(1, count, (), generator=generator))

    def place(self, batch_idx: int) -> str:
        """Names this batch of this rank, to seed what is drawn for it."""
        return f"EPG {self.current_epoch} {self.global_batch(batch_idx)}"

    def draw_noise(self, x: Tensor, batch_idx: int) -> Tensor:
        """The noise of a batch."""
        return seeded_noise(f"{self.place(batch_idx)} noise", self.hparams["seed"], x)

    def draw_views(self, batch: dict[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Both views, in [-1, 1]."""
        if self.views is not None:
            device = batch["image"].device
            return self.views(
                batch["image"],
                torch.Generator(device).manual_seed(own_seed(f"{self.place(batch_idx)} views", self.hparams["seed"])),
            )
        if not {"view1", "view2"} <= batch.keys():
            raise ValueError(f"the batch has {', '.join(batch)}: give it view1 and view2, or give EPGPretrain views, such as ShiftedViews")
        return batch["view1"], batch["view2"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Contrast and consistency."""
        hp, step = self.hparams, self.trainer.global_step
        x = self.pixels(batch["image"])
        view1, view2 = (self.pixels(view) for view in self.draw_views(batch, batch_idx))
        count, shift = self.num_levels(step), self.shift(x)
        levels = pretrain_levels(self.draw_index(count, batch_idx), count, hp["sigma_min"], hp["sigma_max"], hp["rho"], shift)
        assert self.total_steps is not None
        tau = consistency_temperature(
            hp["temperature_schedule"],
            hp["temperature"],
            hp["temperature"] if hp["final_temperature"] is None else hp["final_temperature"],
            levels.high / shift,
            min(1.0, step / self.total_steps),
            hp["sigma_min"],
            hp["sigma_max"],
        )
        losses = pretrain_loss(
            self._feature(self.encoder),
            self.projector,
            self._feature(self.target_encoder),
            self.target_projector,
            x,
            view1,
            view2,
            self.draw_noise(x, batch_idx),
            levels,
            sigma_data=hp["sigma_data"],
            contrastive_temperature=hp["contrastive_temperature"],
            consistency_temperature=tau,
            with_consistency=hp["consistency_weight"] > 0,
            gather=gather_keys,
        )
        contrastive, consistency = losses.contrastive.mean(), losses.consistency.mean()
        loss: Tensor = hp["contrastive_weight"] * contrastive + hp["consistency_weight"] * consistency
        self.log_dict({"epg/loss": loss.detach(), "epg/contrastive": contrastive.detach(), "epg/consistency": consistency.detach()})
        if logs_now(self):
            self.log_dict(self._details(losses) | {"epg/levels": float(count), "epg/temperature": tau}, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def _details(self, losses: PretrainLoss) -> dict[str, Tensor | float]:
        logs: dict[str, Tensor | float] = {}
        for name, (query, keys) in {"contrastive": losses.contrasted, "consistency": losses.aligned}.items():
            if name == "consistency" and self.hparams["consistency_weight"] == 0:
                continue
            likeness = cosines(query, keys)
            own = likeness.diagonal()
            logs[f"epg/positive_{name}"] = own.mean()
            logs[f"epg/negative_{name}"] = (likeness.sum() - own.sum()) / max(1, likeness.numel() - len(own))
        return logs

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The target follows at once: a checkpoint that a callback saves when the batch ends has it."""
        super().optimizer_step(*args, **kwargs)
        for target, online in ((self.target_encoder, self.encoder), (self.target_projector, self.projector)):
            pairs = [[parameter.data for parameter in one.parameters()] for one in (target, online)]
            ema_update(pairs[0], pairs[1], self.hparams["target_decay"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a warm-up and a cosine."""
        self.total_steps = training_length(self, self.total_steps)
        return self.adamw([*self.encoder.parameters(), *self.projector.parameters()])

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _at(self, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma * self.shift(x), device=x.device)
        feature: Tensor = encode(self._feature(self.encoder), x + like(level, x) * noise, level, sigma_data=self.hparams["sigma_data"])
        return feature.float()

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep features at some levels."""
        hp, x = self.hparams, self.pixels(batch["image"])
        place = f"EPG evaluation {self.global_batch(batch_idx)}"
        noise = seeded_noise(place, hp["seed"], x)
        if batch_idx == 0:
            self._picture = self._paths(x[:64], noise[:64])
        features = torch.stack([self._at(x, noise, sigma) for sigma in (hp["sigma_min"], *hp["probe_sigmas"])])
        self._seen.append(_Seen(features, batch.get("label")))

    def _paths(self, x: Tensor, noise: Tensor) -> Tensor:
        """How often a feature finds its own image, over the levels of query and keys; the noisy image along both axes."""
        sigmas = np.geomspace(0.03, 10.0, 10).tolist()
        features = F.normalize(torch.stack([self._at(x, noise, sigma) for sigma in sigmas]), dim=2)
        best = torch.einsum("aid,bjd->abij", features, features).argmax(3)
        share = (best == torch.arange(len(x), device=x.device)).float().mean(2).cpu()
        size = 48
        picture = torch.full((11 * size, 11 * size, 3), 13.0)
        low, high = torch.tensor([20.0, 30.0, 48.0]), torch.tensor([240.0, 220.0, 130.0])
        cells = low + share[:, :, None] * (high - low)
        picture[size:, size:] = cells.repeat_interleave(size, 0).repeat_interleave(size, 1)
        if x.ndim == 4 and x.shape[1] in (1, 3):
            shown = torch.stack([self.pixels.back(x[:1] + sigma * self.shift(x) * noise[:1])[0] for sigma in sigmas])
            shown = (
                F.interpolate(shown.float().cpu().clamp(-1, 1), (size - 4, size - 4), mode="nearest")
                .add(1)
                .mul(127.5)
                .expand(-1, 3, -1, -1)
            )
            for number, image in enumerate(shown.permute(0, 2, 3, 1), start=1):
                place = slice(number * size + 2, (number + 1) * size - 2)
                picture[2 : size - 2, place] = picture[place, 2 : size - 2] = image
        return picture.round().byte()

    def compare(self, part: Part, seen: list[_Seen]) -> None:
        """Match noisy with clean features, of all ranks."""
        features = gather_rows(torch.cat([batch.features for batch in seen], dim=1).transpose(0, 1).contiguous(), with_grad=False)
        known = [batch.labels for batch in seen if batch.labels is not None]
        labels = gather_rows(torch.cat(known), with_grad=False) if known else None
        clean, *noisy = features.transpose(0, 1)
        own = torch.arange(len(clean), device=clean.device)
        logs = {}
        for sigma, features_at in zip(self.hparams["probe_sigmas"], noisy, strict=True):
            logs[f"epg/{part}_match_{sigma:g}"] = (cosines(features_at, clean).argmax(1) == own).float().mean()
        if labels is not None and len(clean) > 1:
            names = ["clean", *(f"{sigma:g}" for sigma in self.hparams["probe_sigmas"])]
            for name, features_at in zip(names, (clean, *noisy), strict=True):
                guess = neighbour_labels(features_at, clean, labels, self.hparams["neighbours"], leave_out=True)
                logs[f"epg/{part}_knn_{name}"] = (guess == labels).float().mean()
        log_global(self, logs)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """{"feature": (B, D)} of images without noise."""
        x = self.pixels(batch["image"])
        return {"feature": self._at(x, torch.zeros_like(x), self.hparams["sigma_min"])}

    def dashboard_media(self) -> dict[str, Media]:
        """Which levels' features find each other, at the last validation."""
        if self._picture is None:
            return {}
        words = "Share of images found by their own feature, over the noise levels of query and keys; bright: all"
        return {"epg/paths": ImageMedia(self._picture.numpy(), alt=words)}
