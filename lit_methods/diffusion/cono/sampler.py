"""Long videos from any denoiser of short ones: CoNo, and what it is compared with."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.diffusion.cono.core import (
    LongVideo,
    Reduction,
    assemble,
    closed_share,
    delta_of_share,
    extend_video,
    junctions,
    sample_clip,
)
from lit_methods.diffusion.ddim import DDIMSchedule, ddim_schedule
from lit_methods.diffusion.denoisers import Denoise, denoise_of, with_guidance
from lit_methods.diffusion.windows import covering_views, draw_block_orders, fuse_windows, reschedule_noise
from lit_methods.seeds import own_seed

Strategy = Literal["cono", "naive", "independent", "freenoise", "genl", "direct"]
Place = Literal["device", "cpu"]
NoiseSource = Callable[[str, int], Tensor]


class Sampled(NamedTuple):
    """What a sampler made.

    Attributes:
        video: (B, F, C, H, W).
        junctions: First frame of each piece but the first, the same ones for every strategy.
        gaps: (passes, S, B) norm of the predicted noise's difference to the first clip's content at each step, before it was
            regularised; None where clips have no reference.
    """

    video: Tensor
    junctions: list[int]
    gaps: Tensor | None


@dataclass
class LongVideoSampler:
    """Samples a video of several clips' length from a denoiser that was trained on one clip's, without training.

    The video has N + (P - 1)(N - ``left``) frames for clips of N frames and P pieces, each with its prompt. Strategies:

    - ``cono``: shuffled noises, guided frames, look-back, pull on the content (:func:`~lit_methods.diffusion.cono.core.extend_video`).
    - ``naive``: guided frames alone, from fresh noise.
    - ``independent``: a clip for each piece, nothing in common.
    - ``freenoise``: all frames at once, with FreeNoise's noise, and attention over the frames in sliding windows.
    - ``genl``: Gen-L-Video: overlapping windows, whose predictions are averaged at each step.
    - ``direct``: all frames at once.

    Runs: with any :class:`~lit_methods.diffusion.denoisers.Denoiser` of videos (B, F, C, H, W), or a callable with the same arguments;
    latents stay in the dtype of the noise, float32 or wider, whatever the network computes in. ``freenoise`` needs its
    ``attention_windows(size, stride)``; ``freenoise`` and ``direct`` need ``frame_prompts = True`` for prompts that differ, which are then
    (B, F, ...), and ``guidance`` needs ``unconditional(cond)``.

    Saves: nothing.

    Refuses: a denoiser that lacks what the strategy needs; more prompts than pieces.

    Args:
        strategy: See above.
        pieces: P, pieces of the video, 1 or more. Where there are fewer prompts, the last one goes on.
        frames: N, frames of a clip.
        left: N1, frames that a piece shares with the one before.
        right: N2, frames of the look-back that are guided by the extension behind it.
        steps: S, steps of DDIM.
        guided_until: T_d: guided frames are replaced at steps S..T_d, counted down to 1.
        delta: Step size of the pull on the content; 140 for VideoCrafter1, 260 for LaVie; 0: none.
        kappa: The share of the gap that a step closes, in place of ``delta``: its effect doesn't depend on the size of the frames.
        reduction: What ``delta`` belongs to: the ``mean`` or the ``sum`` of squares over a frame's elements.
        guidance: Scale of classifier-free guidance; 1: none. 15 in the paper.
        look_back: ``cono`` makes the pass between two extensions; False: extensions follow each other.
        stride: Frames from one window to the next, of ``freenoise`` and ``genl``.
        memory: Where the predicted noise of every step is kept: ``device``, or ``cpu``, if that is too small.
        seed: Seed of the order in which ``freenoise`` repeats noises.

    Raises:
        ValueError: A value outside its range.
    """

    strategy: Strategy = "cono"
    pieces: int = 3
    frames: int = 16
    left: int = 6
    right: int = 8
    steps: int = 50
    guided_until: int = 10
    delta: float = 140.0
    kappa: float | None = None
    reduction: Reduction = "mean"
    guidance: float = 1.0
    look_back: bool = True
    stride: int = 4
    memory: Place = "device"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.one_of(Strategy, strategy=self.strategy)
        checks.one_of(Reduction, reduction=self.reduction)
        checks.one_of(Place, memory=self.memory)
        checks.at_least(1, pieces=self.pieces, frames=self.frames, steps=self.steps, guided_until=self.guided_until, stride=self.stride)
        checks.at_least(0, left=self.left, right=self.right, delta=self.delta, guidance=self.guidance)
        checks.within("[0, 2)", "a share, or null for delta,", kappa=self.kappa)
        if self.left >= self.frames or self.left + self.right > self.frames or self.stride > self.frames:
            raise ValueError(
                f"left={self.left}, right={self.right}, stride={self.stride} in clips of {self.frames} frames: give left < frames, "
                "left + right <= frames, stride <= frames"
            )

    @property
    def length(self) -> int:
        """Frames of the video."""
        return self.frames + (self.pieces - 1) * (self.frames - self.left)

    def check(self, model: Any) -> None:
        """Raise ValueError if a denoiser lacks what the strategy needs."""
        denoise_of(model)
        wanted = {"unconditional": self.guidance != 1, "attention_windows": self.strategy == "freenoise"}
        for name, needed in wanted.items():
            if needed and not hasattr(model, name):
                what = f"guidance={self.guidance}" if name == "unconditional" else "strategy='freenoise'"
                raise ValueError(f"{what} needs a denoiser with {name}, and {type(model).__name__} has none: give it one, or change that")

    def closed_share(self, shape: Sequence[int]) -> float:
        """Share of the gap to the first clip's content that a step closes, for frames of (C, H, W)."""
        return self.kappa if self.kappa is not None else closed_share(self.delta, (self.frames, *shape), self.reduction)

    @torch.no_grad()
    def sample(self, model: Any, shares: Tensor, prompts: Sequence[Tensor], noise_of: NoiseSource) -> Sampled:
        """Sample videos.

        Args:
            model: The denoiser.
            shares: (T,) alpha-bar of the diffusion that it was trained for.
            prompts: One to P conditions (B, ...).
            noise_of: (name, frames) -> standard normal noise (B, frames, C, H, W), float32 or wider. Names differ from clip to clip.

        Raises:
            ValueError: More prompts than pieces, none, or prompts for each frame that the denoiser doesn't take.
        """
        if not 1 <= len(prompts) <= self.pieces:
            raise ValueError(f"{len(prompts)} prompts for {self.pieces} pieces: give 1 to {self.pieces}, or more pieces")
        self.check(model)
        denoise = _narrowed(model)
        if self.guidance != 1:
            denoise = with_guidance(denoise, model.unconditional, self.guidance)
        schedule = ddim_schedule(shares, self.steps)
        prompts = [*prompts, *[prompts[-1]] * (self.pieces - len(prompts))]
        if self.strategy in ("cono", "naive"):
            return self._extended(denoise, schedule, prompts, noise_of)
        places = junctions(self.frames, self.left, self.pieces)
        if self.strategy == "independent":
            clips = [
                sample_clip(denoise, noise_of(f"clip {number}", self.frames), prompt, schedule).frames
                for number, prompt in enumerate(prompts)
            ]
            return Sampled(assemble(clips, self.left), places, None)
        if self.strategy == "genl":
            return Sampled(self._windows(denoise, schedule, prompts, noise_of("video", self.length)), places, None)
        cond, noise = self._of_frames(model, prompts), noise_of("video", self.length)
        windows: Any = nullcontext()
        if self.strategy == "freenoise" and self.length > self.frames:
            generator = torch.Generator().manual_seed(own_seed("LongVideoSampler orders", self.seed))
            orders = draw_block_orders(self.length, self.frames, self.stride, generator)
            noise = reschedule_noise(noise, orders, self.frames, self.stride, dim=1)
            windows = model.attention_windows(self.frames, self.stride)
        with windows:
            return Sampled(sample_clip(denoise, noise, cond, schedule).frames, places, None)

    def _extended(self, denoise: Denoise, schedule: DDIMSchedule, prompts: list[Tensor], noise_of: NoiseSource) -> Sampled:
        noise = noise_of("clip 0", self.frames)
        fresh = None
        delta = 0.0
        if self.strategy == "naive":
            fresh = [noise_of(f"clip {number}", self.frames) for number in range(1, self.pieces)]
        else:
            delta = self.delta if self.kappa is None else delta_of_share(self.kappa, noise.shape, self.reduction)
        found: LongVideo = extend_video(
            denoise,
            noise,
            prompts,
            schedule,
            self.left,
            self.right,
            self.guided_until,
            delta,
            self.reduction,
            look_back=self.look_back and self.strategy == "cono",
            fresh=fresh,
            memory=torch.device("cpu") if self.memory == "cpu" else None,
        )
        gaps = [clip.gaps for clip in found.clips if clip.gaps is not None]
        return Sampled(found.video, found.junctions, torch.stack(gaps) if gaps else None)

    def _piece_of(self, frame: int) -> int:
        """The piece that a frame of the video is in."""
        return max(0, (frame - self.left) // (self.frames - self.left)) if frame >= self.frames else 0

    def _of_frames(self, model: Any, prompts: list[Tensor]) -> Tensor:
        """One prompt for the video where all are the same, else one for each of its frames: (B, F, ...)."""
        if all(torch.equal(prompt, prompts[0]) for prompt in prompts[1:]):
            return prompts[0]
        if not getattr(model, "frame_prompts", False):
            raise ValueError(
                f"strategy={self.strategy!r} samples all frames at once, and {type(model).__name__} takes one prompt a video: give one "
                "prompt, or strategy cono, naive, independent or genl"
            )
        return torch.stack([prompts[self._piece_of(frame)] for frame in range(self.length)], dim=1)

    def _windows(self, denoise: Denoise, schedule: DDIMSchedule, prompts: list[Tensor], noise: Tensor) -> Tensor:
        """Gen-L-Video: all windows of all videos are one batch; each has the prompt of its middle frame."""
        views = covering_views(self.length, self.frames, self.stride)
        batch, count = len(noise), len(views)
        cond = torch.cat([prompts[self._piece_of(int(start) + self.frames // 2)] for start, _ in views])

        def fused(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            parts = torch.cat([x[:, start:end] for start, end in views.tolist()])
            eps = denoise(parts, t[:1].expand(len(parts)), cond).to(x.dtype).unflatten(0, (count, batch))
            return fuse_windows(eps.movedim(1, 2), views, self.length).movedim(1, 0)

        return sample_clip(fused, noise, cond, schedule).frames


def _narrowed(model: Any) -> Denoise:
    """``denoise`` of a model, given its inputs in the dtype of its weights."""
    denoise = denoise_of(model)
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), None)
    return denoise if dtype is None else lambda x_t, t, cond: denoise(x_t.to(dtype), t, cond)


__all__ = ["LongVideoSampler", "Sampled"]
