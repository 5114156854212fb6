"""DDC few-shot as a LightningModule: source training, fusion and adaptation in one run, and translation with structure guidance.

Maths, paper and origin: :mod:`~lit_methods.diffusion.ddc_fewshot.core`.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from lit_methods import checks
from lit_methods.averages import ema_update, state_tensors
from lit_methods.catalog import Technique
from lit_methods.consistency_models.evaluation import WholeSetEvaluation
from lit_methods.diffusion.ddc_fewshot.consistency import FeatureConsistency, GramStyle, fit_banks
from lit_methods.diffusion.ddc_fewshot.core import (
    Draw,
    NoiseLoss,
    StructureGuidance,
    Weights,
    adaptation_loss,
    cosine_shares,
    ddim_from,
    intra_cluster_distance,
    mix_content,
    noise_loss,
    noised,
    paper_weights,
    phasic_weights,
    predicted_clean,
    sampling_times,
    translation_start,
    weighted_mean,
    widened,
)
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Part
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import own_seed, seeded_noise
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="ddc_fewshot",
    short="DDC",
    title="Phasic Content Fusing Diffusion Model with Directional Distribution Consistency for Few-Shot Model Adaption",
    arxiv="2309.03729",
    family="diffusion",
    form="module",
    classes=(
        "lit_methods.PhasicContentDiffusion",
        "lit_methods.ContentFusionUNet",
        "lit_methods.TranslationSampler",
        "lit_methods.StructureGuidance",
        "lit_methods.DirectionalDistributionConsistency",
        "lit_methods.DirectionalCosine",
        "lit_methods.PairwiseSimilarity",
        "lit_methods.GramStyle",
        "lit_methods.callbacks.DirectionalConsistency",
    ),
    configs=("ddc_fewshot.yaml", "ddc_fewshot_points.yaml"),
    golden=("ddc", "phase", "diffusion", "style", "guided_ddim"),
    claim="With ten pictures of another style, translated digits keep their class more often with DDC and fused content than after plain "
    "fine-tuning.",
    summary="Adapts a diffusion model to ten pictures of another domain: content fused in by phases, features moved by one vector.",
)

Weighting = Literal["code", "paper", "none"]
DETAIL_DIVISOR = 5  # of the loss on details, in the authors' code
LARGEST_SHARE = 0.9  # of T: above it the authors' factor of the noise loss is negative
BINS = 20  # of the histogram of steps


@dataclass(frozen=True)
class TranslationSampler:
    """How images of the source domain are translated, or drawn from the source model first.

    Args:
        steps: Network calls of a translation, without those of the guidance.
        start_step: Step whose noise a source image gets; the translation goes from there to 0.
        eta: 0: no noise is added on the way; 1: as much as DDPM adds.
        content: The network sees features of the source image; False: the noised image alone.
        content_until: Content is seen while the step that is gone to is at least this one: never in the last.
        guided: Low frequencies of the source image on the way.
        guidance: How, where ``guided``.
        source_steps: Network calls for an image of the source model, from noise alone.

    Raises:
        ValueError: A number outside its range.
    """

    steps: int = 25
    start_step: int = 600
    eta: float = 1.0
    content: bool = True
    content_until: int = 0
    guided: bool = True
    guidance: StructureGuidance = field(default_factory=StructureGuidance)
    source_steps: int = 50

    def __post_init__(self) -> None:
        checks.at_least(1, "steps", steps=self.steps, start_step=self.start_step, source_steps=self.source_steps)
        checks.share(eta=self.eta)
        checks.at_least(0, "a step", content_until=self.content_until)


class PhasicContentDiffusion(WholeSetEvaluation[dict[str, Tensor]]):
    """Trains a diffusion model of images, and adapts it to a few images of another domain so that translations keep their content.

    Three stages, one behind the other in one run:

    1. ``source_steps`` steps: noise loss on source images;
    2. ``fusion_steps`` steps: the same with each image as its own content, c' = m(t) c + (1 - m(t)) z; only ``fuse`` is trained;
    3. to the end: adaptation. A step is one pass on content and style, at t in [``switch_step``, ``largest_step``):
       mean a (beta_f DDC(x0) + beta_s style(x0)) of source images with their content, plus mean (20^0.9 - a) noise loss on target images,
       a = 20^(t / T); and before it one pass on details, at t in [0, ``switch_step``): mean (20^0.9 - a) noise loss / 5 on target images.
       The first step has no pass on details, as in the authors' loop, which steps behind every second pass.

    Without ``consistency``, ``style`` and weights (``weighting: none``) the third stage is plain fine-tuning, at t in [0, T).

    Runs: batches have ``source``, ``target`` and ``detail`` (B, C, H, W) float32 in [-1, 1], as ``FewShotFoldersDataModule`` and
    ``FewShotDigitsDataModule`` give them; evaluations ``source``, and, if there are, ``label`` and ``styled``, the picture that is wanted.
    The datamodule's ``banks()`` gives all images of both domains, whose mean features are found at the start over all ranks. Adam's memory
    is empty at the start of a stage. The passes of a step have one backward pass together, so gradients are accumulated, clipped and
    averaged over ranks by Lightning, and no checkpoint falls between them. A weight that a stage doesn't use has a gradient of zeros, and
    is left out of the step. Steps, noise and content's noise are drawn for the global batch, from seed, step and batch: N processes train
    like one with N times larger batches. But ``PairwiseSimilarity`` compares the samples of one rank.

    Saves: the network, the source model (the network as it was when the third stage began), both means.

    Refuses: ``code`` weights with ``largest_step`` above 0.9 T, where the factor of the noise loss is negative; a datamodule without
    ``banks()``, unless nothing needs them; strategies that shard weights.

    Args:
        network: Predicts noise: called with (x_t, t) and with (x_t, t, content), with a method ``encode(x_t, t)`` that makes features of
            content, and a submodule ``fuse``; such as ``ContentFusionUNet``.
        consistency: ``DirectionalDistributionConsistency``, or a baseline in its place; None: none.
        style: Gram style against the target images; None: none.
        sampler: Translates; None: with the paper's settings.
        judge: Network with ``logits(images)``: says what class a translation has, for data with labels, and its features measure how much
            translations differ; None: pixels measure that.
        source_steps: Optimiser steps of the first stage; 0: ``network`` has been trained.
        fusion_steps: Optimiser steps of the second stage.
        weighting: Factors of the losses: ``code``: see above; ``paper``: m(t) (1 - w) and w = 1 - (t / T)^``paper_power``; ``none``: 1.
        timesteps: T, steps of the diffusion.
        switch_step: T_s, where content begins to be seen.
        largest_step: End of the steps with content, in the third stage.
        consistency_weight: beta_f.
        style_weight: beta_s.
        paper_power: Exponent of ``paper``; the paper's value isn't known here.
        noise_norm: ``l1`` or ``l2`` of the predicted noise.
        content_noised: The content image is noised to the same step, as in the authors' code; False: it is clean, as in the paper's text.
        learning_rate: Adam's learning rate; constant.
        betas: Adam's two momentum decay rates.
        from_noise: ``lit predict`` translates images that the source model draws, not those of the data; the third stage must have begun.
        grid: Translations in the dashboard's picture; 0: no picture.
        seed: Seed of steps and noise.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Translations", "ddc/translations", note="Above the source, in the middle with noise, below the translation."),
        Curve("Noise of the source stages", ("ddc/noise_loss",), goal="min"),
        Curve("Consistency and style", ("ddc/consistency", "ddc/style"), note="Before the factors.", goal="min"),
        Curve("Noise of target images", ("ddc/target_loss", "ddc/detail_loss"), note="At large and at small steps.", goal="min"),
        Curve("Class kept", ("ddc/val_class_kept", "ddc/test_class_kept"), note="Share of translations.", goal="max"),
        Curve("Distance from the picture that is wanted", ("ddc/val_error", "ddc/test_error"), goal="min"),
        Curve("Diversity", ("ddc/val_diversity", "ddc/test_diversity"), note="Of translations nearest to the same target.", goal="max"),
        Curve("Stage and factor", ("ddc/stage", "ddc/weight"), note="Mean factor of consistency and style."),
        HistogramPanel(
            "Steps drawn", "ddc/steps", note="Of the third stage, with content and without, by the first process since it was started."
        ),
    )

    def __init__(
        self,
        network: nn.Module,
        consistency: FeatureConsistency | None = None,
        style: GramStyle | None = None,
        sampler: TranslationSampler | None = None,
        judge: nn.Module | None = None,
        source_steps: int = 0,
        fusion_steps: int = 0,
        weighting: Weighting = "code",
        timesteps: int = 1000,
        switch_step: int = 300,
        largest_step: int = 800,
        consistency_weight: float = 1.0,
        style_weight: float = 1.0,
        paper_power: float = 1.0,
        noise_norm: NoiseLoss = "l1",
        content_noised: bool = True,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        from_noise: bool = False,
        grid: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(PhasicContentDiffusion, locals())
        checks.at_least(0, "steps", source_steps=source_steps, fusion_steps=fusion_steps)
        checks.at_least(2, "steps", timesteps=timesteps)
        checks.within(f"[1, {timesteps - 1}]", "a step", switch_step=switch_step)
        checks.within(f"({switch_step}, {timesteps}]", "a step behind switch_step", largest_step=largest_step)
        checks.at_least(0, consistency_weight=consistency_weight, style_weight=style_weight, grid=grid, seed=seed)
        checks.positive(learning_rate=learning_rate, paper_power=paper_power)
        checks.betas(betas=betas)
        if weighting == "code" and largest_step > LARGEST_SHARE * timesteps:
            raise ValueError(
                f"largest_step is {largest_step} of {timesteps}: behind {LARGEST_SHARE} T the noise loss has a negative factor, "
                f"20^0.9 - 20^(t/T): give at most {int(LARGEST_SHARE * timesteps)}, or weighting='paper'"
            )
        if not (hasattr(network, "encode") and isinstance(getattr(network, "fuse", None), nn.Module)):
            raise ValueError(f"{type(network).__name__} has no encode(x_t, t) and fuse, which take content in: use ContentFusionUNet")
        self.sampler = TranslationSampler() if sampler is None else sampler
        if self.sampler.start_step > timesteps:
            raise ValueError(f"the sampler's start_step is {self.sampler.start_step}, and timesteps {timesteps}: give no more than that")
        if style is None:
            style_weight = 0.0
        self.save_hyperparameters(ignore=["network", "consistency", "style", "sampler", "judge"])
        self.network = network
        self.source = copy.deepcopy(network).requires_grad_(False)
        self.consistency, self.style = consistency, style
        self.judge = None if judge is None else Frozen(judge)
        self._shares = cosine_shares(timesteps)  # no buffer: bfloat16 would round it
        self._steps = torch.zeros(BINS, dtype=torch.int64)

    @property
    def shares(self) -> Tensor:
        """alpha-bar of all steps: (T,) float64, on the module's device."""
        if self._shares.device != self.device:
            self._shares = self._shares.to(self.device)
        return self._shares

    # ---- the run -------------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Look whether the strategy fits.

        Raises:
            ValueError: It shards weights.
        """
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(
                f"PhasicContentDiffusion copies whole networks, but {strategy} shards them: use one process, or strategy='ddp'"
            )

    def on_train_start(self) -> None:
        """Find the mean features of both domains, and the targets' style."""
        fit_banks(self.trainer, self.consistency, self.style, self.device)
        self._steps.zero_()

    @property
    def adaptation_start(self) -> int:
        """Optimiser steps before the third stage."""
        return int(self.hparams["source_steps"] + self.hparams["fusion_steps"])

    def stage(self, step: int) -> int:
        """Stage of an optimiser step: 1, 2 or 3."""
        return 1 if step < self.hparams["source_steps"] else 2 if step < self.adaptation_start else 3

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """At the start of a stage Adam forgets; at that of the third the source model is what the network is now."""
        step = self.trainer.global_step
        if step in (self.hparams["source_steps"], self.adaptation_start):
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()
        if step == self.adaptation_start:
            ema_update(state_tensors(self.source), state_tensors(self.network), 0.0)

    def forward(self, x_t: Tensor, t: Tensor, content: Tensor | None = None) -> Tensor:
        """Noise in images (B, C, H, W) at steps (B,) int64; ``content`` is features, already mixed with noise."""
        given = () if content is None else (content,)
        return self.network(x_t.to(self.dtype), t, *given)  # type: ignore[no-any-return]

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def content(self, image: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """Features of content images (B, C, H, W) at steps (B,), mixed with noise, without gradient."""
        hp = self.hparams
        with torch.no_grad():
            seen = noised(image, draw(image), t, self.shares) if hp["content_noised"] else image
            features = widened(self.network.encode(seen.to(self.dtype), t))  # type: ignore[operator]
            return mix_content(features, draw(features), t, hp["switch_step"])

    def noise_error(self, image: Tensor, t: Tensor, draw: Draw, content: Tensor | None = None) -> Tensor:
        """Error of the noise that is predicted in images (B, C, H, W) at steps (B,): (B,)."""
        noise = draw(image)
        return noise_loss(self(noised(image, noise, t, self.shares), t, content), noise, self.hparams["noise_norm"])

    def weights(self, t: Tensor) -> Weights:
        """Factors of the losses at steps (B,)."""
        hp = self.hparams
        if hp["weighting"] == "paper":
            return paper_weights(t, hp["timesteps"], hp["switch_step"], hp["paper_power"])
        if hp["weighting"] == "code":
            return phasic_weights(t, hp["timesteps"])
        return Weights(torch.ones_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the stage."""
        if missing := [name for name in ("source", "target", "detail") if name not in batch]:
            raise ValueError(
                f"batches have {sorted(batch)} and no {' and no '.join(missing)}: use FewShotFoldersDataModule, or give these keys"
            )
        step = self.trainer.global_step
        generator = torch.Generator(self.device).manual_seed(own_seed(f"PhasicContentDiffusion {step} {batch_idx}", self.hparams["seed"]))
        processes, count = self.trainer.world_size, len(batch["source"])
        mine = slice(self.global_rank * count, (self.global_rank + 1) * count)  # of what is drawn for the global batch

        def draw(like: Tensor) -> Tensor:
            shape = (processes * count, *like.shape[1:])
            return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)[mine]

        def times(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (processes * count,), generator=generator, device=self.device)[mine]

        images = {name: widened(batch[name]) for name in ("source", "target", "detail")}
        stage = self.stage(step)
        logs: dict[str, Tensor | float]
        if stage < 3:
            t = times(0, self.hparams["timesteps"])
            content = self.content(images["source"], t, draw) if stage == 2 else None
            loss = self.noise_error(images["source"], t, draw, content).mean()
            logs = {"noise_loss": loss.detach()}
        else:
            loss, logs = self._adapt(images, times, draw, with_details=step > self.adaptation_start)
        self.log_dict({f"ddc/{name}": value for name, value in logs.items()} | {"ddc/stage": float(stage)}, batch_size=len(batch["source"]))
        # each process waits for a gradient of every weight, also where a stage has no content to fuse
        fuse: Any = self.network.fuse
        return loss + torch.stack([weight.sum() * 0 for weight in fuse.parameters()]).sum()

    def _adapt(self, images: dict[str, Tensor], times: Any, draw: Draw, with_details: bool) -> tuple[Tensor, dict[str, Tensor | float]]:
        hp = self.hparams
        whole = (0, hp["timesteps"])
        plain = hp["weighting"] == "none"
        t = times(*(whole if plain else (hp["switch_step"], hp["largest_step"])))
        weights, drawn = self.weights(t), [t]
        logs: dict[str, Tensor | float] = {"weight": weights.adaptation.mean().float()}
        losses = []
        if self.consistency is not None or self.style is not None:
            source = images["source"]
            x_t = noised(source, draw(source), t, self.shares)
            clean = predicted_clean(x_t, widened(self(x_t, t, self.content(source, t, draw))), t, self.shares)
            distance = style = clean.new_zeros(len(clean))
            if self.consistency is not None:
                with torch.no_grad():
                    wanted = self.consistency.embed(source)
                distance = self.consistency(self.consistency.embed(clean), wanted)
                logs["consistency"] = distance.detach().mean()
            if self.style is not None:
                style = self.style(clean)
                logs["style"] = style.detach().mean()
            losses.append(adaptation_loss(distance, style, weights.adaptation, hp["consistency_weight"], hp["style_weight"]))
        target = self.noise_error(images["target"], t, draw)
        losses.append(weighted_mean(target, weights.diffusion))
        logs["target_loss"] = target.detach().mean()
        if with_details:
            t = times(*(whole if plain else (0, hp["switch_step"])))
            detail = self.noise_error(images["detail"], t, draw)
            losses.append(weighted_mean(detail, self.weights(t).diffusion) / (DETAIL_DIVISOR if hp["weighting"] == "code" else 1))
            logs["detail_loss"] = detail.detach().mean()
            drawn.append(t)
        place = torch.cat(drawn) * BINS // hp["timesteps"]
        self._steps = self._steps.to(place.device).scatter_add_(0, place, torch.ones_like(place))
        return torch.stack(losses).sum(), logs

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weights that the stage doesn't train have no gradient: Adam's memory would move them."""
        step = self.trainer.global_step
        fuse = {id(weight) for weight in self.network.fuse.parameters()}  # type: ignore[union-attr]
        if (stage := self.stage(step)) == 3 and (self.consistency is not None or self.style is not None):
            return
        for weight in self.network.parameters():
            if (id(weight) in fuse) != (stage == 2):
                weight.grad = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate."""
        return torch.optim.Adam(self.network.parameters(), lr=self.hparams["learning_rate"], betas=tuple(self.hparams["betas"]))

    # ---- translation ---------------------------------------------------------------------------------------------------------------------

    def translate(self, source: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Translate images.

        Args:
            source: (B, C, H, W) in [-1, 1].
            draw: Gives standard normal noise like a tensor.

        Returns:
            The noised images that the translation starts with, and the translations, each (B, C, H, W).
        """
        sampler = self.sampler
        source = widened(source)

        def denoise(x: Tensor, t: Tensor, content: Tensor | None) -> Tensor:
            return widened(self(x, t, None if content is None else self.content(content, t, draw)))

        start = translation_start(source, draw(source), sampler.start_step, self.shares)
        made = ddim_from(
            denoise,
            start,
            sampling_times(sampler.start_step, sampler.steps),
            self.shares,
            draw,
            sampler.eta,
            source if sampler.content else None,
            sampler.content_until,
            source,
            sampler.guidance if sampler.guided else None,
        )
        return start, made

    @torch.no_grad()
    def draw_source(self, like: Tensor, draw: Draw) -> Tensor:
        """Images of the source model, from noise: (B, C, H, W) in [-1, 1]."""

        def denoise(x: Tensor, t: Tensor, content: Any) -> Tensor:
            return widened(self.source(x.to(self.dtype), t))  # type: ignore[no-any-return]

        times = sampling_times(len(self.shares), self.sampler.source_steps)
        return ddim_from(denoise, draw(widened(like)), times, self.shares, draw, self.sampler.eta)

    def _drawing(self, purpose: str, batch_idx: int) -> Draw:
        """Noise of a batch, drawn on the CPU, other noise at each call."""
        calls = iter(range(1 << 30))
        place = f"PhasicContentDiffusion {purpose} {self.global_batch(batch_idx)}"

        def draw(like: Tensor) -> Tensor:
            noise = seeded_noise(f"{place} {next(calls)}", self.hparams["seed"], torch.empty(like.shape, dtype=like.dtype))
            return noise.to(like.device)

        return draw

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``source`` and ``translation``, each (B, C, H, W) in [-1, 1]."""
        draw, source = self._drawing("prediction", batch_idx), batch["source"]
        if self.hparams["from_noise"]:
            source = self.draw_source(source, draw)
        return {"source": widened(source), "translation": self.translate(source, draw)[1]}

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        start, made = self.translate(batch["source"], self._drawing("evaluation", batch_idx))
        kept = {"source": batch["source"], "start": start, "made": made}
        judge: Any = None if self.judge is None else self.judge.module
        with torch.no_grad(), torch.autocast(made.device.type, enabled=False):
            kept["features"] = self._judged(made)
            if judge is not None and "label" in batch:
                kept["right"] = judge.logits(made).argmax(1) == batch["label"]
            if "styled" in batch:
                kept["error"] = (made - batch["styled"]).abs().flatten(1).mean(1)
        self._seen.append({name: value.detach().cpu() for name, value in kept.items()})
        return {"translation": made}

    def compare(self, part: Part, seen: list[dict[str, Tensor]]) -> None:
        """Log what translations of all ranks are like."""
        every = {name: gather_rows(torch.cat([batch[name] for batch in seen]), with_grad=False) for name in seen[0]}
        features = every["features"].float()
        targets = self._target_features(features)
        nearest = torch.cdist(features, targets).argmin(1)
        logs = {"diversity": intra_cluster_distance(torch.cdist(features, features), nearest, len(targets))}
        logs |= {name: every[key].float().mean() for key, name in (("right", "class_kept"), ("error", "error")) if key in every}
        log_global(self, {f"ddc/{part}_{name}": value for name, value in logs.items()})
        self._media = self._pictures(every)

    def _judged(self, images: Tensor) -> Tensor:
        """The judge's features (B, D) of images, or their pixels."""
        return images.flatten(1) if self.judge is None else self.judge(images)

    def _target_features(self, like: Tensor) -> Tensor:
        """Features of the target images (K, D), where the data have banks; else one row, which all translations are nearest to."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "banks"):
            return like[:1]
        with torch.autocast(self.device.type, enabled=False):
            found = [self._judged(batch["image"].to(self.device)) for batch in datamodule.banks()["target"]]
        return torch.cat(found).to(like)

    def _pictures(self, every: dict[str, Tensor]) -> dict[str, Media]:
        media: dict[str, Media] = {}
        count = min(self.hparams["grid"], len(every["made"]))
        if count and every["made"].shape[1] in (1, 3):
            rows = torch.cat([every[name][:count].float() for name in ("source", "start", "made")]).add(1).div(2).clamp(0, 1)
            pixels = make_grid(rows, nrow=count, padding=1).mul(255).round().byte().permute(1, 2, 0).contiguous()
            words = f"{count} source images, the same with the noise of step {self.sampler.start_step}, and their translations"
            media["ddc/translations"] = ImageMedia(pixels.numpy(), alt=words)
        if self._steps.any():
            edges = torch.linspace(0, self.hparams["timesteps"], BINS + 1).numpy()
            media["ddc/steps"] = HistogramMedia(self._steps.cpu().numpy(), edges)
        return media


__all__ = ["PhasicContentDiffusion", "TranslationSampler"]
