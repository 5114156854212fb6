"""DLoRAL: video super-resolution in one diffusion step, with an adapter for consistency and one for details (arXiv:2506.15591).

Maths and origin: :mod:`lit_methods.restoration.dloral.core`; U-Nets and autoencoders: :mod:`~lit_methods.restoration.dloral.networks`. Left
out: the tagger that writes prompts; a batch may bring texts of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.restoration.lora_stages import AlternatingLoRAStages
from lit_methods.catalog import Technique
from lit_methods.diffusion.lora import merge, unmerge, weigh_adapters
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.files import replacing
from lit_methods.frozen import Frozen
from lit_methods.optim import scheduled
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.restoration.color import adain_color_fix, wavelet_color_fix
from lit_methods.restoration.dloral.core import (
    CrossFrameRetrieval,
    FixedStage,
    Retrieved,
    StageSchedule,
    Terms,
    csd_loss,
    frame_difference_mask,
    has_csd,
    in_tiles,
    restored_latent,
    weighted_loss,
)
from lit_methods.restoration.dloral.networks import DETAIL_ADAPTER, Backbone, DualLoRAUNet, base_fingerprint
from lit_methods.restoration.flow import CorrelationFlow, flow_difference, warping_error
from lit_methods.restoration.perceptual import FeatureDistance, RandomFeatures
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="dloral",
    short="DLoRAL",
    title="One-Step Diffusion for Detail-Rich and Temporally Consistent Video Super-Resolution",
    arxiv="2506.15591",
    family="restoration",
    form="module",
    classes=(
        "lit_methods.DualLoRAVSRModule",
        "lit_methods.callbacks.AlternatingLoRAStages",
        "lit_methods.OneStepPretraining",
        "lit_methods.CrossFrameRetrieval",
        "lit_methods.SmallBackbone",
        "lit_methods.DiffusersBackbone",
        "lit_methods.datamodules.VideoRestorationDataModule",
    ),
    configs=("dloral.yaml", "dloral_base.yaml"),
    golden=("warp", "cfr", "schedule", "csd", "frame_mask", "color_fix"),
    claim=(
        "Trained in alternating stages, consistency and detail adapters restore videos with a lower warping error than the detail adapter "
        "alone."
    ),
    summary="One-step video super-resolution: consistency and detail LoRAs on a frozen diffusion model, trained in alternating stages.",
)

Batch = Mapping[str, Any]
Fusion = Literal["retrieval", "none", "per_frame"]
_FIGURES = ("psnr", "psnr_input", "distance", "warping", "warping_input", "warping_clean", "empty", "moving")
_DEFAULT = StageSchedule()
_SHOWN = 6  # frames in the pictures


class Restoration(NamedTuple):
    """What becomes of frames.

    Attributes:
        frames: (N, 3, H, W) in [-1, 1].
        latents: (N, C, h, w), before they are decoded.
        empty: Share of retrieval's queries without a match; None where they aren't counted.
    """

    frames: Tensor
    latents: Tensor
    empty: Tensor | None


class DualLoRAVSRModule(Evaluated):
    """Restores each frame of a video in one step of a frozen diffusion model, with the help of the frame before.

    z_HQ = fused - eps([aligned, fused]), where ``aligned`` is the previous frame's latent, warped, and ``fused`` the current one's with
    what cross-frame retrieval finds in it; eps is the frozen U-Net with a consistency and a detail adapter (LoRA). A consistency stage
    trains the first and the retrieval, a detail stage the second; the widened first convolution learns in both. The loss is
    l2 |x - y|^2 + lpips d(x, y) + consistency |O(x2, x3) - O(y2, y3)| + csd CSD(z), with the stage's factors and O the optical flow.

    Runs: training batches have ``lq`` and ``gt`` (B, T, 3, H, W) float32 in [-1, 1], T >= 3, the degraded frames enlarged to the size of
    the clean ones; and ``prompt``, B texts, where the backbone reads them. Evaluation restores whole clips of the same keys frame by frame,
    ``predict`` frames out of pairs, ``lq`` (B, 2, 3, H, W), with ``name`` (list). Steps and noise of score distillation follow from seed,
    step and place in the global batch: any number of processes draws the same. The stages are switched by
    :class:`~lit_methods.callbacks.AlternatingLoRAStages`, which comes by itself. Retrieval, flow and figures are computed in float32
    under any precision. Adapters are merged into the weights while ``test`` and ``predict`` run.

    Saves: both adapters, the widened convolution and the retrieval; and two sums of the frozen weights, to know them again.

    Refuses: a checkpoint of another frozen model, or of adapters of another rank; clips that are too short; latents of other channels.

    Args:
        backbone: U-Net and autoencoder: ``SmallBackbone``, ``DiffusersBackbone``.
        retrieval: Cross-frame retrieval; None: the paper's, for the backbone's latents.
        schedule: ``StageSchedule``, or ``FixedStage`` for a baseline of one stage.
        fusion: ``retrieval``; ``none``: the aligned latent without retrieval; ``per_frame``: the current frame alone.
        flow: Optical flow, frozen: ``CorrelationFlow``, ``SPyNet``, ``RAFTFlow``; None: the first.
        perceptual: Distance of frames (N, 3, H, W) -> (N,), frozen; None: ``FeatureDistance`` of ``RandomFeatures``.
        rank: Of each adapter.
        alpha: The adapters' factor is alpha / rank.
        targets: ``fnmatch`` patterns on names of the U-Net's layers that get adapters.
        timestep: Step of the diffusion that the restoration takes place at.
        cfg: Guidance of score distillation.
        csd_range: Its steps are drawn from these numbers, the second not among them.
        inference: ``detail``: both adapters; ``consistency``: the first alone.
        color_fix: What colours are taken from the degraded frame in evaluation and predict: ``wavelet``, ``adain``, ``none``.
        tile: Side of the tiles of latents in evaluation and predict, best that of training: retrieval sums over the positions that it
            sees, and has no norm. None: all at once.
        tile_overlap: Pixels of the latents that tiles share.
        output: Folder in which ``predict`` writes PNG files.
        output_fps: ``predict`` also writes a video of each folder of frames, so many frames a second; needs the extra ``video``.
        learning_rate: AdamW's, constant behind the warm-up.
        betas: AdamW's two momentum decay rates.
        weight_decay: AdamW's.
        warmup_steps: Steps in which the learning rate rises.
        seed: Seed of the adapters, of steps and of noise.

    Raises:
        ValueError: A value outside its range, or a backbone whose parts don't fit.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Restored frames", "dloral/frames", note="Rows: degraded, restored, clean; one clip from left to right."),
        ImagePanel(
            "A line of pixels over time",
            "dloral/profile",
            note="Degraded, restored, clean from left to right; time runs down. Jagged: flicker.",
        ),
        Curve("Loss", ("dloral/loss",), note="Its factors change with the stage.", goal="min"),
        Curve("Terms of the loss", ("dloral/l2", "dloral/lpips", "dloral/consistency", "dloral/csd"), note="Before their factors."),
        Curve(
            "Warping error",
            ("dloral/val_warping", "dloral/test_warping", "dloral/val_warping_input", "dloral/val_warping_clean"),
            note="Difference of neighbours along the clean video's flow; of restored, degraded and clean frames.",
            goal="min",
        ),
        Curve("PSNR", ("dloral/val_psnr", "dloral/test_psnr", "dloral/val_psnr_input"), note="dB; and of the degraded frames.", goal="max"),
        Curve("Perceptual distance", ("dloral/val_distance", "dloral/test_distance"), goal="min"),
        Curve("Queries without a match", ("dloral/val_empty", "dloral/test_empty"), note="Share of retrieval's rows that are all 0."),
        Curve("Moving pixels", ("dloral/val_moving", "dloral/test_moving"), note="Share that changes more than the mean pixel does."),
    )

    def __init__(
        self,
        backbone: Backbone,
        retrieval: CrossFrameRetrieval | None = None,
        schedule: StageSchedule | FixedStage = _DEFAULT,
        fusion: Fusion = "retrieval",
        flow: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        rank: int = 4,
        alpha: float = 8.0,
        targets: Sequence[str] = ("*",),
        timestep: int = 1,
        cfg: float = 7.5,
        csd_range: tuple[int, int] = (20, 500),
        inference: Literal["detail", "consistency"] = "detail",
        color_fix: Literal["wavelet", "adain", "none"] = "wavelet",
        tile: int | None = None,
        tile_overlap: int = 16,
        output: Path | None = None,
        output_fps: float | None = None,
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(DualLoRAVSRModule, locals())
        checks.at_least(1, rank=rank, tile=tile)
        checks.positive(alpha=alpha, learning_rate=learning_rate, output_fps=output_fps)
        checks.at_least(0, cfg=cfg, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed, timestep=timestep)
        checks.betas(betas=betas)
        steps = len(backbone.shares)
        if len(csd_range) != 2 or not 0 <= csd_range[0] < csd_range[1] <= steps:
            raise ValueError(f"csd_range is {list(csd_range)}: give a first step and a later one, within 0 and {steps}")
        if timestep >= steps:
            raise ValueError(f"timestep is {timestep}, and the backbone's diffusion has steps 0 to {steps - 1}")
        checks.at_least(0, "pixels", tile_overlap=tile_overlap)
        if tile is not None and tile_overlap >= tile:
            raise ValueError(f"tile_overlap is {tile_overlap} and tile {tile}: give fewer pixels than a tile has")
        if output_fps is not None:
            if output is None:
                raise ValueError("output_fps needs output, the folder to write to")
            _video_library()
        self.save_hyperparameters(ignore=["backbone", "retrieval", "schedule", "flow", "perceptual", "output"])
        generator = torch.Generator().manual_seed(own_seed("DualLoRAVSRModule adapters", seed))
        self.retrieval = CrossFrameRetrieval(backbone.channels) if retrieval is None else retrieval
        if self.retrieval.channels != backbone.channels:
            raise ValueError(f"retrieval is for {self.retrieval.channels} channels, and the backbone's latents have {backbone.channels}")
        self.unet = DualLoRAUNet(backbone, rank, alpha, targets, timestep, generator)
        del backbone.network  # it is the module's now
        self.backbone = Frozen(backbone)
        self.flow = Frozen(CorrelationFlow() if flow is None else flow)
        self.perceptual = Frozen(FeatureDistance(RandomFeatures()) if perceptual is None else perceptual)
        self.schedule, self.fusion = schedule, fusion
        self.shares: Tensor = backbone.shares
        self.output = None if output is None else Path(output).expanduser()
        self._base = base_fingerprint(self.unet)
        self._rows: list[Tensor] = []
        self._clip: tuple[Tensor, Tensor, Tensor] | None = None

    def configure_callbacks(self) -> Sequence[Callback]:
        """The callback that switches the stages, unless there is one."""
        there = any(isinstance(callback, AlternatingLoRAStages) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [AlternatingLoRAStages()]

    # ---- one step --------------------------------------------------------------------------------------------------------------------

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of frames (N, 3, H, W)."""
        with torch.no_grad():
            latents: Tensor = self.backbone.module.encode(frames, noise)  # type: ignore[operator]
            return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Frames in [-1, 1] of latents; gradients go through."""
        frames: Tensor = self.backbone.module.decode(latents)  # type: ignore[operator]
        return frames.clamp(-1, 1)

    def restore(
        self, previous: Tensor, current: Tensor, flow: Tensor, cond: Any, *, tiles: bool = False, measure: bool = False
    ) -> Restoration:
        """Latents of frames -> restored frames.

        Args:
            previous: (N, C, h, w), latents of the frames before.
            current: Like ``previous``.
            flow: (N, 2, h, w) from the current to the previous frame, at the latents' size.
            cond: Conditions, (N, ...).
            tiles: Restore in tiles, where the module has some.
            measure: Also count the queries of retrieval without a match.
        """
        empty: list[Tensor] = []

        def step(previous: Tensor, current: Tensor, flow: Tensor) -> Tensor:
            if self.fusion == "per_frame":
                return restored_latent(current, self.unet(torch.cat([current, current], dim=1), cond))
            found: Retrieved = self.retrieval(current, previous, flow, measure=measure)
            if self.fusion == "none":
                found = found._replace(fused=current)
            if found.empty is not None:
                empty.append(found.empty)
            return restored_latent(found.fused, self.unet(found.unet_input, cond))

        tile = self.hparams["tile"] if tiles else None
        given = (previous, current, flow)
        latents = step(*given) if tile is None else in_tiles(step, given, tile, self.hparams["tile_overlap"])
        return Restoration(self.decode(latents.to(current.dtype)), latents, torch.stack(empty).mean() if empty else None)

    def latent_flow(self, current: Tensor, previous: Tensor, size: Sequence[int]) -> Tensor:
        """Flow from current to previous frames (N, 3, H, W), reduced to the latents' size: (N, 2, h, w)."""
        small = [F.interpolate(_wide(frames), list(size), mode="bicubic", align_corners=False) for frames in (current, previous)]
        flow: Tensor = self.flow(*small)
        return flow

    def _padded(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) with their borders repeated up to a multiple that the networks take."""
        multiple: int = self.backbone.module.multiple  # type: ignore[assignment]
        below, right = (-side % multiple for side in frames.shape[-2:])
        return F.pad(frames, (0, right, 0, below), mode="replicate") if below or right else frames

    def _conditions(self, batch: Batch, clips: int, each: int) -> tuple[Any, Any]:
        texts = batch.get("prompt")
        if texts is not None and len(texts) != clips:
            raise ValueError(f"prompt has {len(texts)} texts for {clips} clips: give one for each")
        repeated = None if texts is None else [text for text in texts for _ in range(each)]
        with torch.no_grad():
            return self.backbone.module.conditions(clips * each, repeated)  # type: ignore[operator,no-any-return]

    # ---- training --------------------------------------------------------------------------------------------------------------------

    def _clips(self, batch: Batch, least: int) -> Tensor:
        lq = batch.get("lq")
        if not isinstance(lq, Tensor):
            raise ValueError(f"batches have {sorted(batch)} and no lq: use VideoRestorationDataModule, or one with its keys")
        if lq.ndim != 5 or lq.shape[1] < least or lq.shape[2] != 3:
            raise ValueError(f"lq is {tuple(lq.shape)}: give clips (B, T, 3, H, W) of {least} frames or more")
        if "gt" in batch and batch["gt"].shape != lq.shape:
            raise ValueError(f"lq is {tuple(lq.shape)}, gt {tuple(batch['gt'].shape)}: enlarge the degraded frames to the clean ones' size")
        return lq

    def _draw(self, clips: int, frames: int, shape: Sequence[int], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of what the global batch draws: noise of the autoencoder, steps and noise of score distillation."""
        place = f"DualLoRAVSRModule step {self.global_step} batch {batch_idx}"
        generator = torch.Generator().manual_seed(own_seed(place, self.hparams["seed"]))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        part = slice(rank * clips, (rank + 1) * clips)
        low, high = self.hparams["csd_range"]
        steps = torch.randint(low, high, (world * clips,), generator=generator)[part]
        noise = torch.randn(world * clips, *shape, generator=generator)[part]
        encoding = torch.randn(world * clips, frames, *shape, generator=generator)[part]
        return encoding.to(self.device), steps.to(self.device), noise.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Losses of all frames but the first, with the factors of the stage."""
        lq, gt = self._clips(batch, 3), batch["gt"]
        weights = self.schedule.at(self.global_step)
        clips, frames = lq.shape[:2]
        pairs = frames - 1
        padded = self._padded(lq.flatten(0, 1))
        shape = self.backbone.module.latent_shape(*padded.shape[-2:])  # type: ignore[operator]
        encoding, steps, noise = self._draw(clips, frames, shape, batch_idx)
        latents = self.encode(padded, encoding.flatten(0, 1)).unflatten(0, (clips, frames))
        images = padded.unflatten(0, (clips, frames))
        flow = self.latent_flow(images[:, 1:].flatten(0, 1), images[:, :-1].flatten(0, 1), shape[1:])
        wanted, unwanted = self._conditions(batch, clips, pairs)
        done = self.restore(latents[:, :-1].flatten(0, 1), latents[:, 1:].flatten(0, 1), flow, wanted)

        restored = _wide(done.frames[..., : lq.shape[-2], : lq.shape[-1]])
        clean = _wide(gt[:, 1:].flatten(0, 1))
        csd = None
        if has_csd(weights):
            t, n = steps.repeat_interleave(pairs), noise.repeat_interleave(pairs, 0)  # a clip's frames share both
            share = self.shares.to(t.device)[t]
            csd = pairs * csd_loss(done.latents, n, t, share, self.unet.teacher, wanted, unwanted, self.hparams["cfg"])
        terms = Terms(
            pairs * F.mse_loss(restored, clean),
            pairs * self.perceptual.module(restored, clean).mean(),
            self._flow_loss(restored.unflatten(0, (clips, pairs)), clean.unflatten(0, (clips, pairs))),
            csd,
        )
        loss = weighted_loss(terms, weights)
        logs = {f"dloral/{name}": value.detach() for name, value in terms._asdict().items() if value is not None}
        self.log_dict(logs, batch_size=clips)
        self.log("dloral/loss", loss.detach(), prog_bar=True, batch_size=clips)
        return loss

    def _flow_loss(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Difference of the flows of restored and clean frames, (B, F, 3, H, W) each."""
        with torch.no_grad():
            target = self.flow(clean[:, :-1].flatten(0, 1), clean[:, 1:].flatten(0, 1))
        found = self.flow.module(restored[:, :-1].flatten(0, 1), restored[:, 1:].flatten(0, 1))
        return flow_difference(found, target)

    def on_fit_start(self) -> None:
        """Adapters that an interrupted prediction left merged are taken out; all of them work."""
        unmerge(self.unet)
        weigh_adapters(self.unet, {DETAIL_ADAPTER: 1.0})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW of both adapters, the widened convolution and the retrieval, whatever the first stage trains."""
        hp, names = self.hparams, self.unet.trained_names()
        parameters = [parameter for name, parameter in self.unet.named_parameters() if name in names]
        optimizer = torch.optim.AdamW(
            [*parameters, *self.retrieval.parameters()], lr=hp["learning_rate"], betas=tuple(hp["betas"]), weight_decay=hp["weight_decay"]
        )
        return scheduled(optimizer, lambda step: min(1.0, (step + 1) / max(1, hp["warmup_steps"])))

    # ---- checkpoints -----------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Two sums of the frozen weights go along."""
        checkpoint["dloral_base"] = self._base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See whether the adapters were trained on the same frozen model.

        Raises:
            ValueError: They weren't.
        """
        base = checkpoint.get("dloral_base")
        if base is not None and bool(self._base.any()) and not torch.allclose(base, self._base, rtol=1e-5):
            raise ValueError(
                "the checkpoint's adapters were trained on another frozen model (sums of its weights differ): give backbone the same "
                "pretrained weights, or path, as in that run"
            )

    # ---- evaluation ------------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._rows, self._clip = [], None

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left; merge the adapters."""
        self._rows, self._clip = [], None
        self._merge()

    def on_test_epoch_end(self) -> None:
        """Take the adapters out of the weights, and log."""
        self._unmerge()
        super().on_test_epoch_end()

    def on_predict_epoch_start(self) -> None:
        """Merge the adapters."""
        self._merge()

    def _merge(self) -> None:
        unmerge(self.unet)
        weigh_adapters(self.unet, {DETAIL_ADAPTER: float(self.hparams["inference"] == "detail")})
        merge(self.unet)

    def _unmerge(self) -> None:
        unmerge(self.unet)
        weigh_adapters(self.unet, {DETAIL_ADAPTER: 1.0})

    def restore_frame(self, previous: Tensor, current: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Degraded frames (N, 3, H, W) and those before -> restored ones, with the colour fix; and the share of queries without a match."""
        first, second = self._padded(previous), self._padded(current)
        z_first, z_second = self.encode(first), self.encode(second)
        flow = self.latent_flow(second, first, z_second.shape[-2:])
        cond, _ = self._conditions(batch, len(current), 1)
        done = self.restore(z_first, z_second, flow, cond, tiles=True, measure=True)
        frames = done.frames[..., : current.shape[-2], : current.shape[-1]].float()
        if self.hparams["color_fix"] != "none":
            fix = wavelet_color_fix if self.hparams["color_fix"] == "wavelet" else adain_color_fix
            frames = fix(frames, current.float()).clamp(-1, 1)
        return frames, done.empty

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        lq, gt = self._clips(batch, 2), batch["gt"].float()
        frames, empty = [], []
        for place in range(lq.shape[1]):  # the first frame stands before itself
            frame, share = self.restore_frame(lq[:, max(0, place - 1)], lq[:, place], batch)
            frames.append(frame)
            if share is not None:
                empty.append(share)
        restored = torch.stack(frames, dim=1)
        none = restored.new_full((len(lq),), torch.nan)
        figures = [
            _psnr(restored, gt),
            _psnr(lq.float(), gt),
            self.perceptual(restored.flatten(0, 1), gt.flatten(0, 1)).view(gt.shape[:2]).mean(1),
            *self._warping(gt, restored, lq.float(), gt),
            torch.stack(empty).mean().expand(len(lq)) if empty else none,
            torch.stack([_moving(clip) for clip in gt]),
        ]
        self._rows.append(torch.stack([figure.float() for figure in figures], dim=1))
        if self._clip is None:
            self._clip = lq[0].float().cpu(), restored[0].cpu(), gt[0].cpu()

    def _warping(self, clean: Tensor, *videos: Tensor) -> list[Tensor]:
        """Warping errors (B,) of videos (B, T, 3, H, W), by the clean one's flow."""
        first, second = clean[:, :-1].flatten(0, 1), clean[:, 1:].flatten(0, 1)
        there, back = self.flow(first, second), self.flow(second, first)
        errors = (warping_error(video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1), there, back) for video in videos)
        return [error.view(len(clean), -1).mean(1) for error in errors]

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no clip to restore: take fewer ranks or a smaller eval_batch_size")
        means = gather_rows(torch.cat(self._rows), with_grad=False).mean(0)
        figures = {f"dloral/{part}_{name}": value for name, value in zip(_FIGURES, means, strict=True) if not value.isnan()}
        log_global(self, figures)
        if self._clip is not None:
            shown = [video[:_SHOWN] for video in self._clip]
            words = f"{len(shown[0])} frames of a clip in three rows: degraded, restored, clean"
            self._media["dloral/frames"] = ImageMedia(_strips(shown), words)
            self._media["dloral/profile"] = ImageMedia(
                _profile(self._clip), "the middle line of pixels of each frame, below each other: degraded, restored and clean"
            )
        self._rows = []

    # ---- predict ---------------------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Restore the last frame of each pair.

        Returns:
            ``image`` (B, 3, H, W) float32 in [-1, 1], and ``name`` as it stands in the batch.
        """
        lq = self._clips(batch, 2)
        frames, _ = self.restore_frame(lq[:, -2], lq[:, -1], batch)
        names = [str(name) for name in batch["name"]] if "name" in batch else [f"{batch_idx:06d}_{row}" for row in range(len(lq))]
        if self.output is not None:
            for name, frame in zip(names, frames, strict=True):
                self._write(name, frame)
        return {"image": frames, "name": names}

    def _write(self, name: str, frame: Tensor) -> None:
        assert self.output is not None
        parts = Path(name).parts
        if not name or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"a frame is called {name!r}, which would lie outside output: rename it")
        file = self.output.joinpath(*parts[:-1], f"{parts[-1]}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            Image.fromarray(_pixels(frame)).save(partial, format="PNG")

    def on_predict_epoch_end(self) -> None:
        """Take the adapters out of the weights; write the videos."""
        self._unmerge()
        if self.output is None:
            return
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero and self.hparams["output_fps"] is not None:
            for folder in sorted({file.parent for file in self.output.rglob("*.png")}):
                write_video(folder, folder.with_name(f"{folder.name}.mp4"), self.hparams["output_fps"])
        rank_zero_info(f"restored frames are in {self.output}")


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _psnr(frames: Tensor, clean: Tensor) -> Tensor:
    """Videos (B, T, 3, H, W) in [-1, 1] -> (B,) dB, the mean over the frames."""
    error = (frames - clean).square().flatten(2).mean(2).clamp(min=1e-10)
    return (-10 * (error / 4).log10()).mean(1)


def _moving(clip: Tensor) -> Tensor:
    """Share of the pixels of a clip (T, 3, H, W) that change more than the mean one, of grey frames at an eighth of the size."""
    size = [max(1, side // 8) for side in clip.shape[-2:]]
    grey = F.interpolate(clip.mean(1, keepdim=True), size, mode="area")
    return frame_difference_mask(grey).mean()


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).cpu().contiguous().numpy()


def _strips(videos: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """Videos (T, 3, H, W) below each other, their frames side by side."""
    rows = [torch.cat(list(F.pad(video, (1, 1, 1, 1), value=1.0)), dim=-1) for video in videos]
    scale = max(1, 64 // videos[0].shape[-1])
    return _pixels(torch.cat(rows, dim=-2)).repeat(scale, 0).repeat(scale, 1)


def _profile(videos: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """The middle line of videos (T, 3, H, W), time running down, side by side; a frame is four lines high and more."""
    lines = [F.pad(video[:, :, video.shape[2] // 2].movedim(0, 1), (1, 1), value=1.0) for video in videos]  # (3, T, W + 2)
    picture = _pixels(torch.cat(lines, dim=-1))
    scale = max(1, 192 // videos[0].shape[-1])
    return picture.repeat(max(4, 2 * scale), 0).repeat(scale, 1)


def _video_library() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('videos need PyAV: pip install "lit-methods[video]"') from error
    return av


def write_video(folder: Path, file: Path, fps: float) -> None:
    """The PNG files of a folder, in the order of their names, as an H.264 video; an odd last row or column is left out."""
    from fractions import Fraction

    av = _video_library()
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        for index, path in enumerate(sorted(folder.glob("*.png"))):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            pixels = pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2]
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


__all__ = ["DualLoRAVSRModule", "Restoration", "write_video"]
