"""CoNo: shuffled noises, guided frames, a look-back between two extensions, and a pull on the content (arXiv:2406.05082).

The authors' code isn't public. What the equations leave open is our reading: the prompt of the internal pass is that of the extension it
looks back from; the predicted noise is regularised first, and guided frames are replaced then; every piece of the video but the first
drops the frames that it shares with the one before. The golden vectors follow the same reading.

Frames stand at dimension -4: (..., N, C, H, W). Left out: FreeNoise's and Gen-L-Video's ways, which stand in
:mod:`~lit_methods.diffusion.windows`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods.diffusion.ddim import DDIMSchedule, ddim_step
from lit_methods.diffusion.denoisers import Denoise

FRAMES = -4
Reduction = Literal["mean", "sum"]


# ---- noises ----------------------------------------------------------------------------------------------------------------------------


def extending_shuffle(noise: Tensor, left: int) -> Tensor:
    """Noise of the next clip: all frames reversed, and then the first ``left`` reversed back.

    It begins with the last ``left`` noises in their own order; reversed alone, the content would move backwards.

    Args:
        noise: (..., N, C, H, W) of the clip before.
        left: N1, frames that both clips share, 0..N.

    Raises:
        ValueError: More shared frames than there are.
    """
    _check_shared(noise.shape[FRAMES], left, 0)
    reverse = noise.flip(FRAMES)
    return torch.cat([_frames(reverse, 0, left).flip(FRAMES), _frames(reverse, left, None)], dim=FRAMES)


def internal_shuffle(noise: Tensor, left: int, right: int) -> Tensor:
    """Noise of the clip between: the noises behind the first N1 + N2 are moved in front of the N2.

    Args:
        noise: (..., N, C, H, W) of the extension.
        left: N1, frames shared with the clip before.
        right: N2, first new frames of the extension. With N1 + N2 = N the noise stays as it is.

    Raises:
        ValueError: N1 + N2 > N.
    """
    _check_shared(noise.shape[FRAMES], left, right)
    middle = left + right
    return torch.cat([_frames(noise, 0, left), _frames(noise, middle, None), _frames(noise, left, middle)], dim=FRAMES)


# ---- long-term consistency -------------------------------------------------------------------------------------------------------------


def content(eps: Tensor) -> Tensor:
    """Mean over the frames: (..., N, C, H, W) -> (..., 1, C, H, W)."""
    return eps.mean(FRAMES, keepdim=True)


def content_distance(eps: Tensor, reference: Tensor, reduction: Reduction = "mean") -> Tensor:
    """G = |mean of the reference's frames - mean of eps' frames|^2.

    Args:
        eps: (..., N, C, H, W).
        reference: (..., M, C, H, W), or its :func:`content`.
        reduction: Over the C H W elements: ``mean`` or ``sum``.

    Returns:
        (...).
    """
    squares = (content(reference) - content(eps)).square().flatten(FRAMES)
    return squares.mean(-1) if reduction == "mean" else squares.sum(-1)


def content_gradient(eps: Tensor, reference: Tensor, reduction: Reduction = "mean") -> Tensor:
    """D g / d eps = -(2 / N) (mean of the reference - mean of eps) for every frame, divided by C H W for ``mean``.

    Args:
        eps: (..., N, C, H, W).
        reference: (..., M, C, H, W), or its :func:`content`.
        reduction: As in :func:`content_distance`.

    Returns:
        Like ``eps``.
    """
    return ((content(eps) - content(reference)) * (2 / _divisor(eps.shape, reduction))).expand_as(eps)


def regularise(eps: Tensor, reference: Tensor, delta: float, reduction: Reduction = "mean") -> Tensor:
    """Eps - delta d g / d eps: a share kappa = 2 delta / (N numel) of the gap to the reference's content is closed.

    Args:
        eps: (..., N, C, H, W) predicted noise.
        reference: (..., M, C, H, W) predicted noise of the first clip at the same step, or its :func:`content`.
        delta: Step size, >= 0; 140 for VideoCrafter1 and 260 for LaVie in the paper.
        reduction: As in :func:`content_distance`; with ``sum`` it diverges from delta = N on.
    """
    return eps - delta * content_gradient(eps, reference, reduction)


def closed_share(delta: float, shape: Sequence[int], reduction: Reduction = "mean") -> float:
    """Kappa = 2 delta / (N numel), what one step closes of the gap; above 1 it overshoots, from 2 on it diverges.

    Args:
        delta: Step size.
        shape: (..., N, C, H, W) of the predicted noise; numel is C H W for ``mean`` and 1 for ``sum``.
        reduction: As in :func:`content_distance`.
    """
    return 2 * delta / _divisor(shape, reduction)


def delta_of_share(kappa: float, shape: Sequence[int], reduction: Reduction = "mean") -> float:
    """The step size that closes a share ``kappa`` of the gap: the inverse of :func:`closed_share`."""
    return kappa * _divisor(shape, reduction) / 2


def _divisor(shape: Sequence[int], reduction: Reduction) -> int:
    frames, *element = shape[FRAMES:]
    return frames * (element[0] * element[1] * element[2] if reduction == "mean" else 1)


# ---- sampling --------------------------------------------------------------------------------------------------------------------------


class Guide(NamedTuple):
    """Predicted noises that replace those of some frames.

    Attributes:
        start: First frame that is replaced.
        noises: Of each step, (..., n, C, H, W), the noisiest step first.
    """

    start: int
    noises: Sequence[Tensor]


class Clip(NamedTuple):
    """A clip that was sampled.

    Attributes:
        frames: (..., N, C, H, W).
        noises: Predicted noise of each step as it was used, guidance and all: S tensors like ``frames``.
        gaps: (S, ...) norm of the difference to the reference's content before it was regularised; None without a reference.
    """

    frames: Tensor
    noises: list[Tensor]
    gaps: Tensor | None


def sample_clip(
    denoise: Denoise,
    noise: Tensor,
    prompt: Any,
    schedule: DDIMSchedule,
    guides: Sequence[Guide] = (),
    guided_until: int = 10,
    reference: Sequence[Tensor] | None = None,
    delta: float = 0.0,
    reduction: Reduction = "mean",
    memory: torch.device | None = None,
) -> Clip:
    """DDIM without noise, where the predicted noise is pulled to a reference's content, and then replaced in guided frames.

    Args:
        denoise: (x_t, t, prompt) -> predicted noise, classifier-free guidance included.
        noise: (B, N, C, H, W), in float32 or wider: what is predicted in less is widened.
        prompt: Handed on to ``denoise``.
        schedule: S steps.
        guides: Which frames are replaced, and by what.
        guided_until: T_d. Steps are counted down, S..1; those below T_d replace nothing, so that details are free.
        reference: :func:`content` of the first clip's predicted noise, of each step; None: nothing is pulled.
        delta: Step size of :func:`regularise`.
        reduction: As in :func:`content_distance`.
        memory: Where predicted noises are kept; None: where they are made.
    """
    x, noises, gaps = noise, [], []
    steps = len(schedule.times)
    for number, (time, share, following) in enumerate(zip(*schedule, strict=True)):
        eps = denoise(x, time.expand(len(x)), prompt).to(x.dtype)
        if reference is not None:
            wanted = reference[number].to(x.device)
            gaps.append(content_distance(eps, wanted, "sum").sqrt())
            eps = regularise(eps, wanted, delta, reduction)
        if steps - number >= guided_until:
            for guide in guides:
                eps = _replaced(eps, guide.start, guide.noises[number].to(x.device))
        noises.append(eps if memory is None else eps.to(memory))
        x = ddim_step(x, eps, share.to(x.dtype), following.to(x.dtype))
    return Clip(x, noises, torch.stack(gaps) if gaps else None)


class LongVideo(NamedTuple):
    """A long video.

    Attributes:
        video: (B, F, C, H, W).
        clips: What was sampled, in that order: A, then B, I, C for each round with the look-back, or one for each prompt without.
        junctions: First frame of each piece but the first.
    """

    video: Tensor
    clips: list[Clip]
    junctions: list[int]


def extend_video(
    denoise: Denoise,
    noise: Tensor,
    prompts: Sequence[Any],
    schedule: DDIMSchedule,
    left: int = 6,
    right: int = 8,
    guided_until: int = 10,
    delta: float = 140.0,
    reduction: Reduction = "mean",
    look_back: bool = True,
    fresh: Sequence[Tensor] | None = None,
    memory: torch.device | None = None,
) -> LongVideo:
    """A clip for the first prompt, and a piece of N - ``left`` new frames for each further one.

    With the look-back, pieces 2 and 3 (4 and 5, ..) are made together: B extends the clip before, I runs between the two, guided on both
    sides, and C extends I. The video is A, I[left:], C[left:]. Without it, each clip extends the one before.

    Args:
        denoise: As in :func:`sample_clip`.
        noise: (B, N, C, H, W) of the first clip.
        prompts: One for each piece.
        schedule: S steps.
        left: N1, frames at the start of a clip that are guided by the end of the one before, 0..N - 1.
        right: N2, frames at the end of I that are guided by the first new frames of B; N1 + N2 <= N.
        guided_until: As in :func:`sample_clip`.
        delta: Step size of :func:`regularise`, whose reference is the first clip; 0: without.
        reduction: As in :func:`content_distance`.
        look_back: Whether there is a pass I between extensions.
        fresh: Noise of each extension instead of the shuffled one: the naive way, as a baseline.
        memory: As in :func:`sample_clip`.

    Raises:
        ValueError: No prompt, or frames that don't fit.
    """
    frames = noise.shape[FRAMES]
    _check_shared(frames, left, right if look_back else 0)
    if not prompts or left >= frames:
        raise ValueError(f"{len(prompts)} prompts and {left} of {frames} frames shared: give a prompt, and share fewer frames than all")
    first = sample_clip(denoise, noise, prompts[0], schedule, memory=memory)
    reference = [content(eps) for eps in first.noises]

    def further(shuffled: Tensor, prompt: Any, *guides: Guide) -> Clip:
        return sample_clip(denoise, shuffled, prompt, schedule, guides, guided_until, reference, delta, reduction, memory)

    noise_of_next = iter(fresh or ())
    clips, pieces, before = [first], [first], first
    for number, prompt in enumerate(prompts[1:]):
        noise = extending_shuffle(noise, left) if fresh is None else next(noise_of_next)
        clip = further(noise, prompt, Guide(0, _part(before, frames - left, frames)))
        clips.append(clip)
        if look_back and number % 2 == 0:  # B: what the video keeps is the pass between
            noise = internal_shuffle(noise, left, right)
            clip = further(noise, prompt, Guide(0, _part(clip, 0, left)), Guide(frames - right, _part(clip, left, left + right)))
            clips.append(clip)
        pieces.append(clip)
        before = clip
    return LongVideo(assemble([piece.frames for piece in pieces], left), clips, junctions(frames, left, len(pieces)))


def assemble(pieces: Sequence[Tensor], left: int) -> Tensor:
    """The first clip whole, and every further one without the ``left`` frames that it shares with the one before."""
    return torch.cat([pieces[0], *(_frames(piece, left, None) for piece in pieces[1:])], dim=FRAMES)


def junctions(frames: int, left: int, pieces: int) -> list[int]:
    """First frame of each piece but the first, in a video of clips of so many frames, ``left`` of them shared."""
    return [frames + number * (frames - left) for number in range(pieces - 1)]


def _frames(x: Tensor, start: int, end: int | None) -> Tensor:
    return x[..., start:end, :, :, :]


def _part(clip: Clip, start: int, end: int) -> list[Tensor]:
    return [_frames(eps, start, end) for eps in clip.noises]


def _replaced(eps: Tensor, start: int, part: Tensor) -> Tensor:
    end = start + part.shape[FRAMES]
    return torch.cat([_frames(eps, 0, start), part, _frames(eps, end, None)], dim=FRAMES)


def _check_shared(frames: int, left: int, right: int) -> None:
    if left < 0 or right < 0 or left + right > frames:
        raise ValueError(f"left is {left} and right {right} in clips of {frames} frames: give 0 or more, together at most {frames}")


__all__ = [
    "Clip",
    "Guide",
    "LongVideo",
    "closed_share",
    "content",
    "content_distance",
    "content_gradient",
    "delta_of_share",
    "extend_video",
    "extending_shuffle",
    "internal_shuffle",
    "regularise",
    "sample_clip",
]
