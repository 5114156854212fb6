"""A diffusion model of short videos that is trained here, or one from elsewhere, and the long videos that a sampler makes with it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchvision.utils import make_grid

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.diffusion.cono.sampler import LongVideoSampler, Sampled
from lit_methods.diffusion.denoisers import denoise_of
from lit_methods.diffusion.video_metrics import adjacent_similarity, content_drift, junction_jump, similarity_to_start
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed, seeded_noise
from lit_methods.steps import log_global, training_length
from lit_methods.tasks.diffusion.noise_prediction import noisy, signal_shares

TECHNIQUE = Technique(
    slug="cono",
    title="CoNo: Consistency Noise Injection for Tuning-free Long Video Diffusion",
    arxiv="2406.05082",
    family="diffusion",
    form="module",
    classes=(
        "lit_methods.VideoDiffusionModule",
        "lit_methods.LongVideoSampler",
        "lit_methods.SmallVideoUNet",
        "lit_methods.GaussianVideos",
        "lit_methods.DiffusersVideo",
        "lit_methods.datamodules.MovingDigitsDataModule",
        "lit_methods.datamodules.GaussianVideosDataModule",
        "lit_methods.datamodules.VideoPromptsDataModule",
    ),
    configs=("cono.yaml",),
    golden=("noise_shuffle", "consistency", "lookback", "freenoise_noise", "window_attention", "codenoise"),
    claim=(
        "With the look-back between two extensions, the pieces of a long video meet with smaller jumps than where each piece extends the "
        "one before."
    ),
    summary="Long videos from a model of short ones, untrained: shuffled noises, a look-back between extensions, a pull on the content.",
)

Batch = Mapping[str, Any]


class VideoDiffusionModule(Evaluated):
    """Trains a denoiser of short videos to predict the noise in them, and samples long videos with it, in validation, test and predict.

    The loss is the mean squared error of the predicted noise at a step t that is drawn uniformly. A sampler makes one long video for each
    video of an evaluation, by its prompts.

    Runs: training batches have ``video`` (B, N, C, H, W) floating point, and ``prompt`` (B, P, ...), of which the first is the video's own.
    Evaluation batches have ``prompt``: conditions, or B lists of P texts for a network with ``encode_prompts``; with ``video`` the error of
    the predicted noise is measured, too. ``index`` (B,) int64 is the number of a video: its noise follows from that and the seed, so that
    any number of processes makes the same videos. A network that needs no training, such as :class:`GaussianVideos` or
    :class:`DiffusersVideo`, is for ``lit test`` and ``lit predict``. Latents and the pull on the content are in float32 in any precision.
    Beside the panels the share of the gap that the pull closes at a step, ``cono/<part>_kappa``, is logged.

    Saves: the network.

    Refuses: a network that lacks what the sampler needs; one without weights in a training; videos that don't fit ``clip_shape`` and the
    sampler's ``frames``; texts for a network that can't read them; a schedule in a training without an end.

    Args:
        network: A :class:`~lit_methods.diffusion.denoisers.Denoiser`, or a module of (x_t, t, cond) -> noise. With ``shares`` (T,) of its
            own, alpha-bar of its diffusion, these are used; with ``decode``, figures and pictures are of decoded frames.
        sampler: Makes the long videos; None: CoNo with the paper's settings.
        clip_shape: C, H, W of a frame, or of its latents.
        timesteps: T, steps of the diffusion, for a network without ``shares``.
        beta_first: Variance of the noise that the first step adds.
        beta_last: Variance of the noise that the last step adds.
        drop_prompt: Share of the training prompts that are replaced by the one that says nothing, for classifier-free guidance.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps in which the learning rate rises.
        schedule: ``cosine`` to 0, or ``constant``.
        strips: Videos in the dashboard's picture; 0: no picture.
        seed: Seed of steps and noise.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Long videos", "cono/strip", note="A row for each video; a red line where a piece begins."),
        Curve("Error of the predicted noise", ("cono/loss", "cono/val_loss", "cono/test_loss"), goal="min"),
        Curve(
            "Jump where pieces meet",
            ("cono/val_jump", "cono/test_jump"),
            note="Mean absolute difference of the two frames; the mean over all neighbours is what to compare it with.",
            goal="min",
        ),
        Curve("Change from frame to frame", ("cono/val_change", "cono/test_change"), note="Mean absolute difference of all neighbours."),
        Curve("Drift from the first clip to the last", ("cono/val_drift", "cono/test_drift"), goal="min"),
        Curve("Likeness of neighbours where pieces meet", ("cono/val_junction_similarity", "cono/test_junction_similarity"), goal="max"),
        Curve("Gap to the first clip's content", ("cono/val_gap", "cono/test_gap"), note="Of the predicted noise, before it is pulled."),
        TablePanel("Drift, frame by frame", "cono/drift", note="Cosine with the mean of the first clip, and with the frame before."),
        TablePanel("Gap to the first clip's content, step by step", "cono/gaps", note="One column for each pass behind the first."),
    )

    def __init__(
        self,
        network: nn.Module,
        sampler: LongVideoSampler | None = None,
        clip_shape: Sequence[int] = (1, 16, 16),
        timesteps: int = 1000,
        beta_first: float = 0.00085,
        beta_last: float = 0.012,
        drop_prompt: float = 0.1,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "constant"] = "cosine",
        strips: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(VideoDiffusionModule, locals())
        checks.at_least(1, "steps", timesteps=timesteps)
        checks.within("(0, 1)", "a variance", beta_first=beta_first, beta_last=beta_last)
        checks.share(drop_prompt=drop_prompt)
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps, strips=strips, seed=seed)
        if len(clip_shape) != 3 or min(clip_shape) < 1:
            raise ValueError(f"clip_shape is {list(clip_shape)}: give channels, height and width of a frame, such as [1, 16, 16]")
        self.save_hyperparameters(ignore=["network", "sampler"])
        self.network = network
        self.sampler = LongVideoSampler() if sampler is None else sampler
        own = getattr(network, "shares", None)
        self.shares: Tensor = signal_shares(timesteps, beta_first, beta_last) if own is None else own  # no buffer: bfloat16 would round it
        self._rows: list[Tensor] = []
        self._strip: Tensor | None = None
        self._sizes: list[int] = []

    def setup(self, stage: str) -> None:
        """Look whether network, sampler and data fit."""
        self.sampler.check(self.network)
        if self.sampler.steps > len(self.shares):
            raise ValueError(f"the sampler has {self.sampler.steps} steps, and the diffusion {len(self.shares)}: give no more than that")
        if stage == "fit" and self.hparams["drop_prompt"] and not hasattr(self.network, "unconditional"):
            raise ValueError(
                f"drop_prompt={self.hparams['drop_prompt']} needs unconditional(cond), and {type(self.network).__name__} has none: "
                "give it one, or drop_prompt=0"
            )

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Noise in videos (B, F, C, H, W) at steps (B,) int64."""
        return denoise_of(self.network)(x_t.to(self.dtype), t, cond)  # type: ignore[arg-type]

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def _error(self, video: Tensor, cond: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise: (B,)."""
        share = self.shares.to(video.device)[time]
        return (self(noisy(video.float(), noise, share), time, cond).float() - noise).square().flatten(1).mean(1)

    def _video(self, batch: Batch) -> Tensor:
        if "video" not in batch:
            raise ValueError(f"batches have {sorted(batch)} and no video: train with a datamodule that has one, or use lit test")
        video: Tensor = batch["video"]
        wanted = (self.sampler.frames, *self.hparams["clip_shape"])
        if video.ndim != 5 or tuple(video.shape[1:]) != wanted:
            raise ValueError(
                f"videos are {tuple(video.shape)}, and frames and clip_shape make (B, {', '.join(map(str, wanted))}): give the datamodule, "
                " clip_shape and the sampler the same sizes"
            )
        return video

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error at steps that are drawn."""
        video, cond = self._video(batch), batch["prompt"][:, 0]
        place = f"VideoDiffusionModule {self.global_rank} {self.trainer.global_step} {batch_idx}"
        generator = torch.Generator(video.device).manual_seed(own_seed(place, self.hparams["seed"]))
        time = torch.randint(len(self.shares), (len(video),), generator=generator, device=video.device)
        noise = torch.randn(video.shape, generator=generator, device=video.device)
        if self.hparams["drop_prompt"]:
            dropped = torch.rand(len(video), generator=generator, device=video.device) < self.hparams["drop_prompt"]
            network: Any = self.network
            cond = torch.where(dropped.view(-1, *(1,) * (cond.ndim - 1)), network.unconditional(cond), cond)
        loss = self._error(video, cond, time, noise).mean()
        self.log("cono/loss", loss.detach(), prog_bar=True, batch_size=len(video))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine per step.

        Raises:
            ValueError: There is nothing to train, or the training has no end and the cosine needs one.
        """
        hp = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"{type(self.network).__name__} has nothing to train: use lit test or lit predict")
        optimizer = torch.optim.AdamW(parameters, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        if hp["schedule"] == "constant":
            return scheduled(optimizer, lambda step: min(1.0, (step + 1) / max(1, hp["warmup_steps"])))
        total = training_length(self, what="schedule='cosine'", instead=None)
        return scheduled(optimizer, lambda step: warmup_cosine(step, total, hp["warmup_steps"]))

    # ---- long videos ---------------------------------------------------------------------------------------------------------------------

    def _index(self, batch: Batch, size: int, batch_idx: int) -> Tensor:
        """Numbers of the batch's videos: (B,) int64 on the CPU; without ``index`` by their place."""
        if "index" in batch:
            return batch["index"].cpu()  # type: ignore[no-any-return]
        return torch.arange(size) + (batch_idx * self.trainer.world_size + self.global_rank) * size

    def _prompts(self, batch: Batch) -> list[Tensor]:
        """Conditions of each piece: P of (B, ...)."""
        prompt: Any = batch["prompt"]
        if isinstance(prompt, Tensor):
            return list(prompt.unbind(1))
        if not hasattr(self.network, "encode_prompts"):
            raise ValueError(f"prompts are texts, and {type(self.network).__name__} has no encode_prompts: give conditions as tensors")
        if len({len(texts) for texts in prompt}) != 1:
            raise ValueError(f"videos of a batch have {sorted({len(texts) for texts in prompt})} prompts: give all the same number")
        network: Any = self.network
        return [network.encode_prompts(list(texts)) for texts in zip(*prompt, strict=True)]

    def noise(self, name: str, frames: int, index: Tensor) -> Tensor:
        """Standard normal noise (B, frames, C, H, W) float32 of the videos (B,), drawn on the CPU, the same in any number of processes."""
        like = torch.empty(frames, *self.hparams["clip_shape"])
        places = [f"VideoDiffusionModule {name} of {number}" for number in index.tolist()]
        return torch.stack([seeded_noise(place, self.hparams["seed"], like) for place in places]).to(self.device)

    def sample(self, prompts: Sequence[Tensor], index: Tensor) -> Sampled:
        """Long videos.

        Args:
            prompts: Conditions of the pieces, each (B, ...).
            index: (B,) int64, numbers of the videos.
        """
        return self.sampler.sample(self.network, self.shares.to(self.device), prompts, lambda name, size: self.noise(name, size, index))

    def to_frames(self, video: Tensor) -> Tensor:
        """What a video looks like: decoded, if the network can."""
        network: Any = self.network
        frames: Tensor = network.decode(video) if hasattr(network, "decode") else video
        return frames.float()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``video`` (B, F, C, H, W): a long video for each row of ``prompt``."""
        prompts = self._prompts(batch)
        found = self.sample(prompts, self._index(batch, len(prompts[0]), batch_idx))
        return {"video": self.to_frames(found.video)}

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        prompts = self._prompts(batch)
        size = len(prompts[0])
        index = self._index(batch, size, batch_idx)
        found = self.sample(prompts, index)
        frames = self.to_frames(found.video)
        places = found.junctions
        similarity = adjacent_similarity(frames)
        loss = frames.new_full((size,), torch.nan)
        if "video" in batch:
            video = self._video(batch)
            time = (index * 389) % len(self.shares)  # 389 is prime: few videos are spread over the steps, too
            loss = self._error(video, prompts[0], time.to(self.device), self.noise("loss", video.shape[1], index))
        none = frames.new_full((size,), torch.nan)
        figures = [
            loss,
            junction_jump(frames, places) if places else none,
            (frames[:, 1:] - frames[:, :-1]).abs().flatten(1).mean(1),
            content_drift(frames, self.sampler.frames),
            similarity[:, [place - 1 for place in places]].mean(1) if places else none,
        ]
        gaps = frames.new_zeros(size, 0) if found.gaps is None else found.gaps.flatten(0, 1).T.to(frames)
        rows = (torch.stack(figures, dim=1), similarity_to_start(frames, self.sampler.frames), similarity, gaps)
        self._rows.append(torch.cat(rows, dim=1))
        self._sizes = [part.shape[1] for part in rows]
        if self._strip is None and self.hparams["strips"]:
            self._strip = _strip(frames[: self.hparams["strips"]], places)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._rows, self._strip = [], None

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._rows, self._strip = [], None

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no video to sample: take fewer ranks or a smaller batch_size")
        rows = gather_rows(torch.cat(self._rows), with_grad=False).mean(0)
        figures, start, similarity, gaps = rows.split(self._sizes)
        names = ("loss", "jump", "change", "drift", "junction_similarity")
        logs = {f"cono/{part}_{name}": value for name, value in zip(names, figures, strict=True)}
        shape = self.hparams["clip_shape"]
        if len(gaps):
            logs |= {f"cono/{part}_gap": gaps.mean(), f"cono/{part}_kappa": torch.tensor(self.sampler.closed_share(shape))}
        log_global(self, {name: value for name, value in logs.items() if not value.isnan()})
        neighbours = [None, *similarity.tolist()]
        table = tuple(_numbered(start.tolist(), neighbours))
        self._media = {"cono/drift": TableMedia(("frame", "likeness to the first clip", "to the frame before"), table)}
        if len(gaps):
            by_step = gaps.view(-1, self.sampler.steps).T.tolist()
            columns = ("step", *(f"pass {number + 2}" for number in range(len(by_step[0]))))
            self._media["cono/gaps"] = TableMedia(columns, tuple((self.sampler.steps - n, *values) for n, values in enumerate(by_step)))
        if self._strip is not None and self._strip.numel():
            words = f"{self.hparams['strips']} videos of {self.sampler.length} frames by {self.sampler.strategy}, one row each"
            self._media["cono/strip"] = ImageMedia(self._strip.numpy(), alt=words)
        self._rows = []


def _numbered(*columns: Sequence[float | None]) -> list[tuple[float | None, ...]]:
    """Rows of a table: number and entries."""
    return [(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def _strip(frames: Tensor, junctions: Sequence[int]) -> Tensor:
    """Videos (B, F, 1 or 3, H, W) in [-1, 1], a row each: (h, w, 3) uint8; red lines at junctions; empty for other channels."""
    count = frames.shape[1]
    if frames.shape[2] not in (1, 3):
        return torch.zeros(0, 0, 3, dtype=torch.uint8)
    images = frames.flatten(0, 1).add(1).div(2).clamp(0, 1).cpu()
    picture = make_grid(images, nrow=count, padding=1).mul(255).round().byte().permute(1, 2, 0).contiguous()
    for place in junctions:
        picture[:, place * (frames.shape[-1] + 1)] = torch.tensor([230, 60, 50], dtype=torch.uint8)
    return picture


__all__ = ["VideoDiffusionModule"]
