"""InterLCM: face restoration by the last steps of a frozen latent consistency model (arXiv:2502.02215); trains both encoders, restores.

Maths and origin: :mod:`lit_methods.restoration.interlcm.core`; models: :mod:`~lit_methods.restoration.interlcm.models`; encoders:
:mod:`~lit_methods.restoration.interlcm.networks`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.utils import make_grid

from lit_methods import checks, distributed
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.files import replacing
from lit_methods.frozen import Frozen
from lit_methods.optim import warmup_cosine
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.restoration.color import adain_color_fix, wavelet_color_fix
from lit_methods.restoration.interlcm.core import (
    Chain,
    LCMSchedule,
    consistency_chain,
    critic_hinge,
    lcm_schedule,
    lcm_timesteps,
    renoise,
    restoration_loss,
    restore_from_low_quality,
)
from lit_methods.restoration.interlcm.models import check_lcm
from lit_methods.seeds import seeded_noise
from lit_methods.steps import log_global, training_length

TECHNIQUE = Technique(
    slug="interlcm",
    title="InterLCM: Low-Quality Images as Intermediate States of Latent Consistency Models for Effective Blind Face Restoration",
    arxiv="2502.02215",
    family="restoration",
    form="module",
    classes=(
        "lit_methods.InterLCM",
        "lit_methods.DigitLCM",
        "lit_methods.SmallLCM",
        "lit_methods.DiffusersLCM",
        "lit_methods.VisualEncoder",
        "lit_methods.SpatialEncoder",
        "lit_methods.datamodules.FaceRestorationDataModule",
    ),
    configs=("interlcm.yaml",),
    golden=("schedule", "trajectory", "color_fix", "loss"),
    claim=(
        "One-step restorations that start at an earlier step, with more noise, lie nearer to clean images than those that start later; "
        "no encoder is trained."
    ),
    summary=(
        "Restores faces by a frozen latent consistency model that takes the degraded image for its first answer; trains what conditions it."
    ),
)

Start = Literal["lq", "noise", "regression"]
ColorFix = Literal["wavelet", "adain"]
Batch = dict[str, Any]
_SHOWN = 8  # images in the picture


class InterLCM(Evaluated):
    """Takes a degraded image for the answer of a latent consistency model's first step, noises it, and makes the steps that are left.

    z_1 = sqrt(a_1) E(y) + sqrt(1 - a_1) noise; a frozen network then answers at t_1, .., t_{n-1}, with fresh noise between, and the last
    answer is decoded. Two encoders of y are trained through the whole chain: one makes the prompt, the other residuals of the network.
    The loss is L1 + perceptual distance + 0.1 times the adversarial term, which begins behind ``gan_start`` optimiser steps.

    Runs: manual optimisation. Batches have ``lq`` and ``image``, the degraded and the clean image, (B, C, H, W) in [-1, 1]; ``lit predict``
    needs ``lq`` alone. ``index`` (B,) and ``name`` are used where they are: noise of an evaluation follows from seed and index, so results
    don't depend on batches and ranks. ``max_steps`` and learning rates count the encoders' steps. Weights for evaluation are those of
    ``WeightEMA``, if it is attached. Colour fixes apply to evaluations and predictions.

    Saves: the encoders, the discriminator, and their optimisers. Model, perceptual and identity networks are frozen: neither trained nor
    saved. Where ``accumulate`` is above 1, an iteration that was under way begins anew.

    Refuses: a model that lacks something; images outside [-1, 1] in an evaluation; a training without encoders; sharded weights.

    Args:
        lcm: Frozen model: ``DiffusersLCM``, ``SmallLCM``, ``DigitLCM``, or an object with eps_model, encode, decode and abar.
        visual_encoder: Images (B, C, H, W) -> prompt (B, L, D); null: no prompt.
        spatial_encoder: Latents, times, prompt, images -> residuals of the model's network; null: none.
        n_steps: n, the first step counted, which calls no network: 4 calls it three times, from t = 759; 2 once, from t = 499.
        times: Times of the steps instead, falling; the first one counts as the degraded image's.
        start: ``lq``: the paper's. Baselines: ``noise``: all n steps from pure noise. ``regression``: one call at the second time, without
            noise.
        perceptual: Distance of two batches of images -> (B,), such as ``LPIPSDistance`` or ``FeatureDistance``; null: none.
        discriminator: Images -> scores; null: no adversarial term.
        pixel_weight: Of the L1 loss.
        perceptual_weight: Of the perceptual distance.
        gan_weight: Of the adversarial term.
        gan_start: Optimiser steps before it begins.
        color_fix: Colours of the degraded image, by ``wavelet`` or ``adain``; null: none, as for colourisation.
        checkpointing: Compute activations of model and encoders again in the backward pass instead of keeping them.
        identity: Network of images -> (B, D), such as ArcFace; evaluations then log the cosine of restored and clean. Null: none.
        nearest: Clean training images that restored ones are compared with in evaluations, for the distance to the nearest; 0: none.
        output: Folder for what ``lit predict`` restores, as PNG.
        learning_rate: Adam's, of encoders and discriminator.
        final_learning_rate: At the end of the cosine.
        schedule_steps: Optimiser steps of the cosine; null: the length of the training.
        betas: Adam's two momentum decay rates.
        accumulate: Batches per optimiser step.
        seed: Seed of all noise.

    Raises:
        TypeError: ``lcm`` lacks a method.
        ValueError: A number outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Restored images", "interlcm/images", note="Rows: degraded, restored from each start step, clean."),
        Curve(
            "Loss", ("interlcm/loss", "interlcm/l1", "interlcm/perceptual"), note="The adversarial term is part of the loss.", goal="min"
        ),
        Curve(
            "Discriminator",
            ("interlcm/gan", "interlcm/critic_real", "interlcm/critic_fake"),
            note="Hinge losses of both kinds: near 1 each, if it can't tell them apart. gan is -mean D(restored).",
        ),
        Curve("Restored against clean images", ("interlcm/val_psnr", "interlcm/val_lq_psnr"), note="PSNR in dB; degraded for comparison."),
        Curve("Error", ("interlcm/val_error", "interlcm/val_lq_distance"), note="Mean squares to the clean and the degraded image."),
        Curve("Perceptual distance", ("interlcm/val_perceptual",), goal="min"),
    )

    def __init__(
        self,
        lcm: nn.Module,
        visual_encoder: nn.Module | None = None,
        spatial_encoder: nn.Module | None = None,
        n_steps: int = 4,
        times: Sequence[int] | None = None,
        start: Start = "lq",
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        pixel_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        gan_weight: float = 0.1,
        gan_start: int = 10001,
        color_fix: ColorFix | None = None,
        checkpointing: bool = False,
        identity: nn.Module | None = None,
        nearest: int = 0,
        output: Path | None = None,
        learning_rate: float = 5e-5,
        final_learning_rate: float = 2e-5,
        schedule_steps: int | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(InterLCM, locals())
        checks.at_least(0, pixel_weight=pixel_weight, perceptual_weight=perceptual_weight, gan_weight=gan_weight, gan_start=gan_start)
        checks.at_least(0, nearest=nearest, seed=seed)
        checks.at_least(1, accumulate=accumulate, schedule_steps=schedule_steps)
        checks.positive(learning_rate=learning_rate, final_learning_rate=final_learning_rate)
        checks.betas(betas=betas)
        check_lcm(lcm)
        self.save_hyperparameters(ignore=["lcm", "visual_encoder", "spatial_encoder", "perceptual", "discriminator", "identity", "output"])
        self.automatic_optimization = False
        self.times = _times(n_steps, times, len(lcm.abar))  # type: ignore[arg-type]
        self.frozen = Frozen(lcm if isinstance(lcm, nn.Module) else _Held(lcm))
        self.visual_encoder, self.spatial_encoder, self.discriminator = visual_encoder, spatial_encoder, discriminator
        if callable(getattr(spatial_encoder, "begin", None)):
            spatial_encoder.begin(lcm)  # type: ignore[union-attr, operator]
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.identity = None if identity is None else Frozen(identity)
        self.output = None if output is None else Path(output).expanduser()
        self._batches = 0  # of the iteration under way
        self._schedule: LCMSchedule | None = None
        self._latents: dict[torch.Size, torch.Size] = {}  # sizes of latents of images of some sizes
        self._forget()

    # ---- restoring -----------------------------------------------------------------------------------------------------------------------

    @property
    def lcm(self) -> Any:
        """The frozen model."""
        held = self.frozen.module
        return held.held if isinstance(held, _Held) else held

    def schedule(self) -> LCMSchedule:
        """Times, alpha-bar and scalings of the steps, on the module's device; made anew where it or the precision changes."""
        abar: Tensor = self.lcm.abar
        known = self._schedule
        if known is None or known.times.device != self.device or known.shares.dtype != torch.promote_types(abar.dtype, torch.float32):
            known = self._schedule = lcm_schedule(abar.to(self.device), self.times)
        return known

    def noise_count(self) -> int:
        """How many noises an image needs."""
        return {"lq": len(self.times) - 1, "noise": len(self.times), "regression": 0}[self.hparams["start"]]

    def chain(self, lq: Tensor, noises: Sequence[Tensor], schedule: LCMSchedule | None = None) -> Chain:
        """All steps for degraded images.

        Args:
            lq: (B, C, H, W) in [-1, 1].
            noises: As many as :meth:`noise_count` says, standard normal, like the latents.
            schedule: Other steps than the module's.
        """
        steps = self.schedule() if schedule is None else schedule
        latents = self.encode(lq)
        prompt = None if self.visual_encoder is None else self.visual_encoder(lq)
        recompute = self.hparams["checkpointing"] and torch.is_grad_enabled()

        def conditioned(z: Tensor, t: Tensor, prompt: Tensor | None) -> Tensor:
            residuals = None if self.spatial_encoder is None else self.spatial_encoder(z, t, prompt, lq)
            eps: Tensor = self.lcm.eps_model(z, t, prompt, residuals)
            return eps

        def predict(z: Tensor, t: Tensor) -> Tensor:
            if recompute:
                return checkpoint(conditioned, z, t, prompt, use_reentrant=False)  # type: ignore[no-any-return]
            return conditioned(z, t, prompt)

        if self.hparams["start"] == "noise":
            return consistency_chain(noises[0], predict, steps, noises[1:])
        if self.hparams["start"] == "regression":
            step = min(1, len(steps.times) - 1)
            return consistency_chain(
                renoise(latents, torch.zeros_like(latents), steps.shares[step]), predict, _part(steps, step, step + 1), []
            )
        return restore_from_low_quality(latents, predict, steps, noises)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images, without gradient, in float32 or wider."""
        with torch.no_grad():
            latents: Tensor = self.lcm.encode(images)
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def _latent_size(self, images: Tensor) -> torch.Size:
        if images.shape[1:] not in self._latents:
            self._latents[images.shape[1:]] = self.encode(images[:1]).shape[1:]
        return self._latents[images.shape[1:]]

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, in float32 or wider."""
        if self.hparams["checkpointing"] and torch.is_grad_enabled():
            images: Tensor = checkpoint(self.lcm.decode, latents, use_reentrant=False)
        else:
            images = self.lcm.decode(latents)
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def forward(self, lq: Tensor, noises: Sequence[Tensor]) -> Tensor:
        """Degraded images (B, C, H, W) and noises like their latents -> restored ones."""
        images = self.decode(self.chain(lq, noises).denoised[-1])
        if images.shape != lq.shape:
            raise ValueError(
                f"degraded images are {tuple(lq.shape)} and restored ones {tuple(images.shape)}: give images with the channels of the "
                "model, whose sides its autoencoder can divide, such as multiples of 8"
            )
        return images

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse what can't work.

        Raises:
            ValueError: The strategy shards weights.
        """
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"InterLCM averages gradients itself, but {strategy} shards weights: use strategy='ddp'")
        self._batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch; at the last one of an iteration both optimisers step."""
        lq, clean = self._pair(batch)
        place = f"InterLCM {self.trainer.current_epoch} {batch_idx * self.trainer.world_size + self.global_rank}"
        like = lq.new_empty(self.noise_count(), len(lq), *self._latent_size(lq), dtype=torch.promote_types(lq.dtype, torch.float32))
        noises = seeded_noise(place, self.hparams["seed"], like)
        step = self.trainer.global_step + 1
        critic = self.discriminator if step > self.hparams["gan_start"] else None
        with self._unsynchronised():
            output = self(lq, list(noises))
            logs = self._encoders_backward(output, clean, critic, step)
            if critic is not None:
                logs |= self._critic_backward(output.detach(), clean, critic)
        self.log_dict({f"interlcm/{name}": value for name, value in logs.items()}, batch_size=len(lq))
        self._batches += 1
        if self._batches == self.hparams["accumulate"]:
            self._step(critic is not None)

    def _encoders_backward(self, output: Tensor, clean: Tensor, critic: nn.Module | None, step: int) -> dict[str, Tensor]:
        hp = self.hparams
        distance = output.new_zeros(()) if self.perceptual is None else self.perceptual.module(output, clean).mean()
        scores = None
        if critic is not None:
            critic.requires_grad_(False)
            scores = critic(output)
        found = restoration_loss(
            output,
            clean.to(output.dtype),
            distance,
            scores,
            step,
            hp["gan_start"],
            hp["pixel_weight"],
            hp["perceptual_weight"],
            hp["gan_weight"],
        )
        self.manual_backward(found.total / hp["accumulate"])
        logs = {"loss": found.total.detach(), "l1": found.pixel.detach()}
        if self.perceptual is not None:
            logs["perceptual"] = distance.detach()
        return logs if critic is None else logs | {"gan": found.gan.detach()}

    def _critic_backward(self, output: Tensor, clean: Tensor, critic: nn.Module) -> dict[str, Tensor]:
        critic.requires_grad_(True)
        real, fake = critic_hinge(critic(clean), critic(output))
        self.manual_backward((real + fake) / self.hparams["accumulate"])
        return {"critic_real": real.detach(), "critic_fake": fake.detach()}

    def _step(self, with_critic: bool) -> None:
        optimizers: Any = self.optimizers()
        encoders, critics = (optimizers[0], optimizers[1:]) if isinstance(optimizers, list) else (optimizers, [])
        for optimizer in critics if with_critic else []:
            distributed.average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
            for group in optimizer.param_groups:
                group["lr"] = encoders.param_groups[0]["lr"]
            optimizer._on_before_step = optimizer._on_after_step = _nothing  # Lightning would count this step, too: it counts the encoders'
            optimizer.step()
            optimizer.zero_grad()
        distributed.average_gradients([parameter for group in encoders.param_groups for parameter in group["params"]])
        encoders.step()
        encoders.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self._batches = 0

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """DDP expects a gradient of every weight in every backward pass; here they are averaged by hand, once an iteration."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def configure_optimizers(self) -> Any:
        """Adam for the encoders, and for the discriminator, whose learning rate is theirs, along half a cosine.

        Raises:
            ValueError: There is nothing to train.
        """
        hp = self.hparams
        trained = [
            p for part in (self.visual_encoder, self.spatial_encoder) if part is not None for p in part.parameters() if p.requires_grad
        ]
        if not trained:
            raise ValueError("InterLCM has no encoder to train: give visual_encoder or spatial_encoder, or use lit test or lit predict")
        if hp["start"] == "lq" and len(self.times) == 1:
            raise ValueError(
                "with one step no network is called and there is nothing to train: give n_steps=2 or more, or start='regression'"
            )
        groups = [trained, *([] if self.discriminator is None else [list(self.discriminator.parameters())])]
        optimizers = [torch.optim.Adam(group, lr=hp["learning_rate"], betas=tuple(hp["betas"])) for group in groups]
        total = training_length(self, hp["schedule_steps"], what="the cosine of the learning rate", instead="schedule_steps")
        fall = partial(warmup_cosine, total_steps=total, final=hp["final_learning_rate"] / hp["learning_rate"])
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizers[0], fall)]

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._rows: list[Tensor] = []  # (B, 1 + figures): number of the image, and its figures
        self._names: list[str] = []
        self._shown: list[Tensor] = []
        self._known: Tensor | None = None

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._forget()

    def _degraded(self, batch: Batch) -> Tensor:
        lq = batch.get("lq") if isinstance(batch, dict) else None
        if not isinstance(lq, Tensor) or lq.ndim != 4:
            raise ValueError("InterLCM needs batches with lq (B, C, H, W): give it FaceRestorationDataModule or the like")
        return lq

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        lq, clean = self._degraded(batch), batch.get("image")
        if not isinstance(clean, Tensor) or clean.shape != lq.shape:
            found = "none" if not isinstance(clean, Tensor) else str(tuple(clean.shape))
            raise ValueError(f"lq is {tuple(lq.shape)} and image {found}: give pairs of degraded and clean images of one size")
        return lq, clean

    def _numbers(self, batch: Batch, size: int, batch_idx: int) -> list[int]:
        index = batch.get("index")
        first = (batch_idx * self.trainer.world_size + self.global_rank) * size
        return index.tolist() if isinstance(index, Tensor) else list(range(first, first + size))

    def noises(self, lq: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Noise of images with numbers, drawn on the CPU, the same in any batch and process."""
        like = torch.empty(len(self.times), *self._latent_size(lq))
        drawn = [seeded_noise(f"InterLCM image {number}", self.hparams["seed"], like) for number in numbers]
        return list(torch.stack(drawn, dim=1).to(lq.device, torch.promote_types(lq.dtype, torch.float32)))

    def restored(self, lq: Tensor, numbers: Sequence[int]) -> Tensor:
        """Restored images, their colours fixed, in [-1, 1].

        Args:
            lq: (B, C, H, W) in [-1, 1].
            numbers: Of the images, which the noise follows from.

        Raises:
            ValueError: Images outside [-1, 1].
        """
        _check_range(lq)
        return self._finished(self(lq, self.noises(lq, numbers)[: self.noise_count()]), lq)

    def _finished(self, images: Tensor, lq: Tensor) -> Tensor:
        fix = self.hparams["color_fix"]
        if fix is not None:
            images = (wavelet_color_fix if fix == "wavelet" else adain_color_fix)(images, lq.to(images.dtype))
        return images.clamp(-1, 1)

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        lq, clean = self._pair(batch)
        numbers = self._numbers(batch, len(lq), batch_idx)
        found = self.restored(lq, numbers)
        figures = self._figures(found, lq.to(found.dtype), clean.to(found.dtype))
        self._names = list(figures)
        self._rows.append(torch.stack([found.new_tensor(numbers, dtype=torch.float64), *(part.double() for part in figures.values())], 1))
        if not self._shown:
            self._shown = [
                lq[:_SHOWN].float(),
                *self._from_each_start(lq[:_SHOWN], numbers[:_SHOWN], found[:_SHOWN]),
                clean[:_SHOWN].float(),
            ]

    def _figures(self, found: Tensor, lq: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Name -> (B,)."""
        error, before = _mean_square(found, clean), _mean_square(lq, clean)
        figures = {"psnr": _psnr(error), "lq_psnr": _psnr(before), "error": error, "lq_distance": _mean_square(found, lq)}
        figures["l1"] = (found - clean).abs().flatten(1).mean(1)
        if min(clean.shape[-2:]) >= 11:
            from torchmetrics.functional.image import structural_similarity_index_measure

            ssim = structural_similarity_index_measure(found, clean, data_range=2.0, reduction="none")
            figures["ssim"] = ssim.reshape(-1)  # type: ignore[union-attr]
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(found, clean)
        if self.identity is not None:
            figures["identity"] = F.cosine_similarity(self.identity(found).flatten(1), self.identity(clean).flatten(1))
        if self.hparams["nearest"]:
            figures["nearest"] = torch.cdist(found.flatten(1), self._training_images(found)).amin(1)
        return figures

    def _training_images(self, like: Tensor) -> Tensor:
        """The first clean training images, (N, C H W)."""
        if self._known is None:
            data: Any = getattr(self.trainer, "datamodule", None)
            known = getattr(data, "train_set", None)
            if known is None:
                raise ValueError("nearest compares with training images, and the datamodule has none here: give nearest=0")
            count = min(len(known), self.hparams["nearest"])
            self._known = torch.stack([known[number]["image"] for number in range(count)]).flatten(1).to(like)
        return self._known

    def _from_each_start(self, lq: Tensor, numbers: Sequence[int], found: Tensor) -> list[Tensor]:
        """What comes of later starts, too: the first of them is ``found``."""
        rows = [found.float()]
        if self.hparams["start"] == "lq":
            steps, noises = self.schedule(), self.noises(lq, numbers)
            for first in range(1, len(self.times) - 1):
                later = self.chain(lq, noises[first : len(self.times) - 1], _part(steps, first, len(self.times)))
                rows.append(self._finished(self.decode(later.denoised[-1]), lq).float())
        return rows

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no image to restore: take fewer ranks or a smaller batch_size")
        rows = gather_rows(torch.cat(self._rows), with_grad=False)
        means = rows[rows[:, 0].argsort(stable=True)][:, 1:].mean(0).float()
        log_global(self, {f"interlcm/{part}_{name}": value for name, value in zip(self._names, means, strict=True)})
        if self._shown[0].shape[1] in (1, 3):
            self._media["interlcm/images"] = ImageMedia(
                _picture(self._shown), f"{len(self._shown[0])} images, one a column: {self._legend()}"
            )
        self._forget()

    def _legend(self) -> str:
        if self.hparams["start"] != "lq":
            return "degraded, restored, clean"
        return f"degraded, restored from t = {', '.join(str(int(time)) for time in self.times[1:])}, clean"

    # ---- a folder of images --------------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``image`` (B, C, H, W) in [-1, 1], ``index`` (B,), ``name`` (list) of a batch; written to ``output``, if it is given."""
        lq = self._degraded(batch)
        numbers = self._numbers(batch, len(lq), batch_idx)
        names = [str(name) for name in batch["name"]] if "name" in batch else [f"{number:05d}" for number in numbers]
        found = self.restored(lq, numbers)
        if self.output is not None:
            for name, image in zip(names, found, strict=True):
                self._write(name, image)
        return {"image": found, "index": torch.tensor(numbers, device=found.device), "name": names}

    def on_predict_epoch_end(self) -> None:
        """Say where the images are."""
        if self.output is not None:
            rank_zero_info(f"restored images are in {self.output}")

    def _write(self, name: str, image: Tensor) -> None:
        assert self.output is not None
        if not name or Path(name).name != name:
            raise ValueError(f"an image is called {name!r}, which is no file name: rename it")
        self.output.mkdir(parents=True, exist_ok=True)
        pixels = ((image.float() + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
        with replacing(self.output / f"{name}.png") as file:
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")


class _Held(nn.Module):
    """A model that is no module."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


def _nothing(*_: Any) -> None:
    """Done before and behind a step that Lightning doesn't count."""


def _times(n_steps: int, times: Sequence[int] | None, train_steps: int) -> Tensor:
    if times is None:
        origin = min(50, train_steps)
        checks.within(f"[1, {origin}]", "steps", n_steps=n_steps)
        return lcm_timesteps(n_steps, origin, train_steps)
    if not times or list(times) != sorted(set(times), reverse=True) or not 0 <= min(times) <= max(times) < train_steps:
        raise ValueError(f"times are {list(times)}: give falling times below {train_steps}, such as [999, 759, 499, 259]")
    return torch.tensor(list(times))


def _part(schedule: LCMSchedule, first: int, end: int) -> LCMSchedule:
    return LCMSchedule(*(values[first:end] for values in schedule))


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).square().mean(1)


def _psnr(error: Tensor) -> Tensor:
    return -10 * (error.clamp(min=1e-12) / 4).log10()


def _check_range(images: Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(images.float()))
    if not (low >= -1.01 and high <= 1.01):
        raise ValueError(f"InterLCM got images from {low:.3g} to {high:.3g}, expected [-1, 1]: divide bytes by 127.5 and take 1 off")


def _picture(rows: Sequence[Tensor]) -> Any:
    """Rows of images (n, 1 or 3, H, W) in [-1, 1] -> (h, w, 3) uint8, at least 64 pixels an image."""
    images = torch.cat(list(rows)).add(1).div(2).clamp(0, 1).cpu()
    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=len(rows[0]), padding=2).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()


__all__ = ["InterLCM"]
