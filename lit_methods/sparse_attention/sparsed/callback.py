"""SparseD in any denoiser: the pattern of each head, chosen once in a generation, and what it is compared with."""

import time
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.wrapping import attach, detach
from lit_methods.catalog import Technique
from lit_methods.distributed import sum_over_ranks
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.sparse_attention.attention import AttentionSwap, attention_layers
from lit_methods.sparse_attention.blocks import Implementation, KeptBlocks
from lit_methods.sparse_attention.method import AttentionCall, SparseAttention
from lit_methods.sparse_attention.sparsed.core import (
    kept_share,
    number_of_blocks,
    pattern_similarity,
    sparsed_pattern,
    step_modes,
    window_pattern,
)
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sparsed",
    title="SparseD: Sparse Attention for Diffusion Language Models",
    arxiv="2509.24014",
    family="sparse_attention",
    form="callback",
    classes=(
        "lit_methods.SparseDAttention",
        "lit_methods.SparseD",
        "lit_methods.SlidingWindow",
        "lit_methods.StreamingLLM",
    ),
    configs=("sparsed.yaml",),
    golden=("block_selection", "llada_sampler", "pattern", "schedule"),
    claim="A masked diffusion model says more of the text's beginning again when it denoises with SparseD than with a sliding window that "
    "keeps as many blocks, by 0.2 or more of the characters.",
    summary="Full attention in the first denoising steps, then a block pattern per head that is chosen once and kept for all later steps.",
)

# ---- methods ---------------------------------------------------------------------------------------------------------------------------


class BlockPattern(SparseAttention):
    """Base of methods that give each head a mask of blocks for the rest of a generation.

    Args:
        select: rho, share of the blocks that is kept, in [0, 1].
        block_size: Tokens of a block.

    Attributes:
        masks: (layer, part) -> (B, H, n, n) bool, the patterns of the generation that runs, or ran last.
        last_masks: The same, as the queries and keys of the last step would have it; empty where nothing was compared.
    """

    def __init__(self, select: float = 0.3, block_size: int = 32) -> None:
        checks.share(select=select)
        checks.at_least(1, block_size=block_size)
        self.select, self.block_size = select, block_size
        self.index, self.steps, self.new_tokens = 0, 1, 0
        self.watch = False
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.last_masks: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[tuple[int, int], KeptBlocks] = {}

    def start(self) -> None:
        """Forget the patterns."""
        self.masks, self.last_masks, self._kept = {}, {}, {}

    def begin_step(self, index: int, steps: int, new_tokens: int) -> None:
        """Say which step comes next. The first one begins a generation, and forgets the patterns of the one before.

        Args:
            index: i in [0, S).
            steps: S.
            new_tokens: Tokens of the answer, at the end of the text.
        """
        if index == 0:
            self.start()
        self.index, self.steps, self.new_tokens = index, steps, new_tokens

    def kept(self, key: tuple[int, int]) -> KeptBlocks:
        """The pattern of a layer, as attention takes it."""
        if key not in self._kept:
            self._kept[key] = KeptBlocks.from_mask(self.masks[key], self.block_size, causal=False)
        return self._kept[key]


class SparseD(BlockPattern):
    """SparseD: full attention in the first steps, then a pattern per head that the queries and keys of one step decide.

    Steps before int(S skip) + 1 attend to everything, and so does that one, whose queries and keys choose the blocks; all later steps
    attend to these blocks, with their own queries, keys and values.

    Args:
        skip: Share of the steps that the pattern waits for.
        select: rho, share of the blocks that each block of queries keeps: of the prompt's, and of the answer's. The paper: 0.3 for long
            texts, 0.5 for short ones.
        block_size: Tokens of a block. The paper: 128 for long texts, 32 for short ones.
        isolate_prompt: Choose the prompt's blocks among themselves, as the paper's text says; false, as the authors' code, lets those of
            the answer crowd them out.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(self, skip: float = 0.2, select: float = 0.3, block_size: int = 32, isolate_prompt: bool = False) -> None:
        super().__init__(select, block_size)
        checks.share(skip=skip)
        self.skip, self.isolate_prompt = skip, isolate_prompt
        self._modes: list[int] = [0]

    def begin_step(self, index: int, steps: int, new_tokens: int) -> None:
        """Say which step comes next; the first one also makes the schedule of all.

        Args:
            index: i in [0, S).
            steps: S.
            new_tokens: Tokens of the answer, at the end of the text.
        """
        super().begin_step(index, steps, new_tokens)
        if index == 0:
            self._modes = step_modes(steps, self.skip).tolist()

    def _pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return sparsed_pattern(q, k, self.block_size, self.select, self.new_tokens, self.isolate_prompt, scale)[0]

    def denoise(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks | None:
        """All keys at first, then the pattern's."""
        mode = self._modes[self.index]
        if mode == 1:
            self.masks[call.key] = self._pattern(q, k, call.scale)
        if mode < 2:
            return None
        if self.watch and self.index == self.steps - 1:
            self.last_masks[call.key] = self._pattern(q, k, call.scale)
        return self.kept(call.key)


class SlidingWindow(BlockPattern):
    """The baseline that looks at neighbours alone, from the first step on, and keeps as many blocks as SparseD of all.

    Args:
        select: rho, share of the blocks that is kept, in [0, 1].
        block_size: Tokens of a block.
    """

    sinks = 0

    def denoise(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks | None:
        """The window's keys."""
        blocks = number_of_blocks(q.shape[2], self.block_size)
        if call.key not in self.masks:
            mask = window_pattern(blocks, self.select, self.sinks).to(q.device)
            self.masks[call.key] = mask.expand(q.shape[0], q.shape[1], -1, -1)
        return self.kept(call.key)


class StreamingLLM(SlidingWindow):
    """The baseline that looks at the first blocks and at neighbours, from the first step on, together as many as SparseD keeps of all.

    Args:
        select: rho, share of the blocks that is kept, in [0, 1].
        block_size: Tokens of a block.
        sinks: First blocks that everybody sees.
    """

    def __init__(self, select: float = 0.3, block_size: int = 32, sinks: int = 1) -> None:
        super().__init__(select, block_size)
        checks.at_least(1, sinks=sinks)
        self.sinks = sinks


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class SparseDAttention(EvaluationCallback):
    """Generates with sparse attention: SparseD, or a baseline, takes the place of attention while a denoiser writes, and nowhere else.

    The module is asked for ``generate(prompt, ...)``, and for a method ``on_denoise_step(step)`` that it calls before each run of its
    model; ``MaskedDiffusionLM`` has both. Its attention layers must be transformers' or have the slot ``attention_function``.

    Runs: around each ``generate``, in validation, test and prediction; training and the loss see full attention. With ``compare`` each
    text of an evaluation is generated a second time with full attention.

    Saves: nothing; patterns live as long as a generation.

    Refuses: modules without these methods, or without an attention layer that it can replace.

    Args:
        method: What chooses the keys; null: ``SparseD`` with its defaults.
        targets: fnmatch patterns on names of attention layers; null: all.
        compare: In evaluations: how far tokens agree with those of full attention, and how alike the pattern is to that of the last step.
        implementation: ``auto``, ``blocked``, ``flex`` or ``dense``: how the kept blocks are computed.

    Raises:
        ValueError: An unknown implementation.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Blocks that each head keeps", "sparsed/pattern", note="A row per layer, a square per head: queries down, keys across."),
        Curve(
            "Similarity of patterns (Jaccard)",
            ("sparsed/val_similarity", "sparsed/val_head_similarity"),
            note="Of a head over the steps, and of two heads.",
        ),
        Curve("Kept blocks, computed pairs (share)", ("sparsed/val_kept", "sparsed/val_computed")),
        Curve("Tokens as with full attention (share)", ("sparsed/val_agreement",), goal="max"),
        Curve("Seconds per denoising step", ("sparsed/val_step_seconds", "sparsed/val_full_step_seconds"), goal="min"),
    )

    def __init__(
        self,
        method: SparseAttention | None = None,
        targets: list[str] | None = None,
        compare: bool = True,
        implementation: Implementation = "auto",
    ) -> None:
        checks.literals(SparseDAttention, locals())
        checks.patterns(targets=targets)
        self.method: SparseAttention = SparseD() if method is None else method
        if type(self.method).denoise is SparseAttention.denoise:
            raise ValueError(
                f"method is a {type(self.method).__name__}, which leaves denoising dense: give SparseD, SlidingWindow or StreamingLLM"
            )
        self.targets, self.compare = targets, compare
        self.swap = AttentionSwap(self.method, implementation)
        self._module: pl.LightningModule | None = None
        self._split: Split | None = None
        self._steps, self._new_tokens = 0, 0
        self._sums: dict[str, Tensor] = {}
        self._picture: Tensor | None = None

    # ---- around the module

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stand around ``generate`` and ``on_denoise_step``."""
        super().setup(trainer, pl_module, stage)
        self.leave(trainer, pl_module)
        missing = [name for name in ("generate", "on_denoise_step") if not callable(getattr(pl_module, name, None))]
        if missing:
            raise ValueError(
                f"SparseDAttention: {type(pl_module).__name__} has no {' and no '.join(missing)}: give generate(prompt) and call "
                "on_denoise_step(step) before each run of the model, with step.index, .steps and .new_tokens, as MaskedDiffusionLM does"
            )
        self._module = pl_module
        attach(pl_module, self._generate, "generate", around=True)
        attach(pl_module, self._step, "on_denoise_step", around=True)
        self.when_built(pl_module, self._look)

    def _look(self) -> None:
        assert self._module is not None
        with checks.naming("SparseDAttention"):
            attention_layers(self._module, self.targets)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module."""
        self.swap.detach()
        if self._module is not None:
            detach(self._module, self._generate, "generate")
            detach(self._module, self._step, "on_denoise_step")
        self._module = self._split = None

    def _step(self, call: Callable[..., Any], step: Any) -> Any:
        if isinstance(self.method, BlockPattern):
            self.method.begin_step(step.index, step.steps, step.new_tokens)
        self._steps, self._new_tokens = step.steps, step.new_tokens
        return call(step)

    def _generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A generation with the method in the model; in evaluations, one without it before."""
        module = self._module
        assert module is not None
        compared = self.compare and self._split is not None
        if isinstance(self.method, BlockPattern):
            self.method.watch = compared
        with checks.naming("SparseDAttention"):
            full, seconds = self._timed(module, call, args, kwargs, looking=True) if compared else (None, 0.0)
            self.swap.reset()
            with self.swap.attach(module, self.targets):
                found, own_seconds = self._timed(module, call, args, kwargs)
                if self._split is not None:
                    self._add("step_seconds", own_seconds)
                    self._measure(found, full)
        if full is not None:
            self._add("full_step_seconds", seconds)
        return found

    def _timed(
        self, module: pl.LightningModule, call: Callable[..., Any], args: Any, kwargs: Any, looking: bool = False
    ) -> tuple[Any, float]:
        """What a generation gives, and seconds per step. ``looking``: all generators are as before, so that nobody notices it."""
        cuda = [module.device] if module.device.type == "cuda" else []
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)] if looking else []
        states = [generator.get_state() for generator in given]
        self._steps = 0
        with torch.random.fork_rng(devices=cuda, enabled=looking):
            for device in cuda:
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            found = call(*args, **kwargs)
            for device in cuda:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
        for generator, state in zip(given, states, strict=True):
            generator.set_state(state)
        if self._steps == 0:
            raise ValueError(f"generate of {type(module).__name__} never called on_denoise_step, which says which step comes next")
        return found, seconds / self._steps

    # ---- figures

    def _add(self, name: str, value: Tensor | float) -> None:
        one = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu(), torch.ones((), dtype=torch.float64)])
        self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + one

    def _measure(self, found: Tensor, full: Tensor | None) -> None:
        share = self.swap.sparsity("denoise")
        self._add("computed", 1.0 if share is None else 1 - share)
        if full is not None:
            self._add("agreement", (found == full)[:, -self._new_tokens :].double().mean())
        if not isinstance(self.method, BlockPattern) or not self.method.masks:
            return
        masks = self.method.masks
        for mask in masks.values():
            self._add("kept", kept_share(mask))
            if mask.shape[1] > 1:
                self._add("head_similarity", pattern_similarity(mask, mask.roll(1, dims=1)).mean())
        for key, last in self.method.last_masks.items():
            self._add("similarity", pattern_similarity(masks[key], last).mean())
        if self._picture is None:
            self._picture = pattern_picture([mask[0] for mask in masks.values()])

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Begin anew."""
        self._split, self._sums, self._picture = split, {}, None

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log the means over all generations of all ranks."""
        figures = {}
        for name in FIGURES:  # the same names on all ranks
            total, number = sum_over_ranks(
                self._sums.get(name, torch.zeros(2, dtype=torch.float64)).to(pl_module.device, torch.float32)
            ).unbind()
            if number > 0:
                figures[f"sparsed/{split}_{name}"] = total / number
        log_global(pl_module, figures)
        self._split = None

    def dashboard_media(self) -> dict[str, Media]:
        """The pattern of the evaluation's first text."""
        if self._picture is None:
            return {}
        pixels = self._picture.numpy().astype(np.uint8)
        return {
            "sparsed/pattern": ImageMedia(pixels, alt="Blocks of keys (across) that each block of queries (down) keeps, by layer and head")
        }


FIGURES = ("agreement", "computed", "full_step_seconds", "head_similarity", "kept", "similarity", "step_seconds")


def pattern_picture(masks: list[Tensor], side: int = 160) -> Tensor:
    """Masks of blocks as squares with a frame, a row per layer.

    Args:
        masks: A (H, n, n) bool per layer; True is dark.
        side: About how many pixels a square has.

    Returns:
        (height, width, 3) uint8.
    """
    rows = []
    for mask in masks:
        times = max(1, side // mask.shape[-1])
        squares = (~mask).to(torch.uint8).cpu().repeat_interleave(times, 1).repeat_interleave(times, 2) * 200 + 40
        squares = torch.nn.functional.pad(squares, (3, 3, 3, 3), value=255)
        rows.append(torch.cat(list(squares), dim=1))
    widest = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, widest - row.shape[1]), value=255) for row in rows])[..., None].expand(-1, -1, 3)


__all__ = ["TECHNIQUE", "BlockPattern", "SlidingWindow", "SparseD", "SparseDAttention", "StreamingLLM", "pattern_picture"]
