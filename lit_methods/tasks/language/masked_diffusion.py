"""Masked diffusion language models: LLaDA's objective on any bidirectional model of transformers, and generation by denoising."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.files import write_atomically
from lit_methods.optim import adamw_by_shares
from lit_methods.panels import Curve, Panel, TableMedia, TablePanel
from lit_methods.runs.checkpoints import load_into
from lit_methods.runs.folder import run_dir
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global
from lit_methods.tasks.language.denoisers import denoising_model
from lit_methods.tasks.language.denoising import (
    Confidence,
    DenoisingStep,
    dream_generate,
    llada_generate,
    llada_schedule,
    mask_tokens,
    masked_diffusion_loss,
    masking_rates,
    shifted_right,
)

Sampler = Literal["llada", "dream"]
TrainOn = Literal["all", "answer"]
SHOWN = 8  # rows of the table of answers


class MaskedDiffusionLM(Evaluated):
    """Trains a masked diffusion language model, and generates by denoising: the answer starts as masks, and each step reveals some.

    The loss is LLaDA's: with t uniform in (0, 1) for each sequence, every token becomes a mask with probability p = t (at least 0.001),
    and the cross-entropies of the masked tokens count 1 / p. It bounds the negative log-likelihood of a token.

    Runs: batches, such as those of ``TextDataModule``, have ``input_ids`` (B, L) int64; other keys aren't looked at. The last
    ``answer_length`` tokens are the answer: validation and test generate it from what stands before it and log the share of its tokens that
    come out as in the data. ``predict`` generates too, and writes ``generated.jsonl`` into the run's folder, with text where the datamodule
    can decode tokens. Before each run of the model in a generation the method ``on_denoise_step`` is called, which callbacks may stand
    around.

    Saves: the model.

    Refuses: data that have the mask among their tokens, or more tokens than the model; answers that leave no prompt or, with ``llada``,
    that are no whole number of blocks; a schedule in a training without an end.

    Args:
        name_or_path: Folder (or name) of a masked or causal model of transformers, or of LLaDA or Dream; loaded in float32, causal ones
            without their causal mask.
        config: Instead: ``model_type`` and the arguments of its configuration; weights are random. ``llama`` is what LLaDA is made of.
        pretrained: Checkpoint of this class that the model starts from.
        mask_token: The token that stands for a mask; null: the one that the model's configuration names, else the last of its vocabulary.
        train_on: ``all``: every token may be masked, as in pre-training. ``answer``: those of the answer alone, as in fine-tuning.
        answer_length: Tokens at the end of a sequence that are generated.
        sampler: ``llada``: block after block, the surest tokens first. ``dream``: the whole answer at once.
        steps: Runs of the model in a generation.
        block_length: Tokens of a block of ``llada``; null: the whole answer is one.
        temperature: 0: always the likeliest token.
        top_p: Share of the probability that ``dream`` samples from.
        confidence: What ``dream`` takes for sure: ``maskgit_plus``, ``topk_margin`` or ``entropy``.
        shift: The model's logits are about the token that follows, as Dream's; null: for folders of Dream.
        seed: Seed of the masks and samples of evaluations and predictions.
        learning_rate: AdamW's learning rate after the warm-up.
        betas: AdamW's two momentum decay rates.
        eps: AdamW's addend to the denominator.
        weight_decay: AdamW's weight decay, for all weights.
        warmup_share: Share of the steps in which the learning rate rises.
        final_share: Learning rate at the end, as a share of the full one; a cosine leads there; 1: constant.

    Raises:
        ImportError: transformers is not installed.
        ValueError: A value outside its range, or no model.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Bound of the loss per token (nats)", ("language/loss", "language/val_loss", "language/test_loss"), goal="min"),
        Curve("Answer's tokens as in the data (share)", ("language/val_accuracy", "language/test_accuracy"), goal="max"),
        TablePanel("Generated answers", "language/answers"),
    )

    def __init__(
        self,
        name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        pretrained: Path | None = None,
        mask_token: int | None = None,
        train_on: TrainOn = "all",
        answer_length: int = 16,
        sampler: Sampler = "llada",
        steps: int = 16,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        confidence: Confidence = "maskgit_plus",
        shift: bool | None = None,
        seed: int = 0,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_share: float = 0.05,
        final_share: float = 0.1,
    ) -> None:
        super().__init__()
        checks.literals(MaskedDiffusionLM, locals())
        checks.at_least(1, answer_length=answer_length, steps=steps, block_length=block_length)
        checks.at_least(0, temperature=temperature, mask_token=mask_token, seed=seed, eps=eps, weight_decay=weight_decay)
        checks.within("(0, 1]", "a share", top_p=top_p)
        if sampler == "llada":
            llada_schedule(steps, answer_length, block_length or answer_length)
        checks.positive(learning_rate=learning_rate)
        checks.within("[0, 1)", "a share of the steps", warmup_share=warmup_share)
        checks.share(final_share=final_share)
        checks.betas(betas=betas)
        self.save_hyperparameters()
        found = denoising_model(name_or_path, config)
        self.shift = found.shift if shift is None else shift
        vocabulary: int = found.model.config.vocab_size  # type: ignore[union-attr,assignment]
        checks.within(f"[0, {vocabulary})", "one of the model's tokens", mask_token=mask_token)
        self._free_mask = mask_token is None and found.mask_token is None  # nothing but data can forbid it
        self.mask_token = next(token for token in (mask_token, found.mask_token, vocabulary - 1) if token is not None)
        if pretrained is not None:
            load_into(found.model, pretrained, "model.")
        self.model = found.model
        self.eval_loss, self.eval_accuracy = MeanMetric(), MeanMetric()
        self._generated: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 tokens and masks -> (B, L, V) logits of what stands at each position."""
        logits: Tensor = self.model(input_ids=input_ids).logits
        return shifted_right(logits) if self.shift else logits

    def setup(self, stage: str) -> None:
        """Compare the size of the vocabulary with the data's.

        Raises:
            ValueError: The data have more tokens than the model, or take the mask's.
        """
        size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        own: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        if size is not None and size > own - self._free_mask:
            also = ", the mask included" if self._free_mask else ""
            raise ValueError(
                f"the data have {size} different tokens, the model {own}: set config.vocab_size to {size + self._free_mask}{also}"
            )

    # ---- the objective

    def _start(self, tokens: Tensor) -> int:
        """Where the answer begins.

        Raises:
            ValueError: There is no prompt.
        """
        start = tokens.shape[1] - self.hparams["answer_length"]
        if start < 1:
            raise ValueError(
                f"answer_length is {self.hparams['answer_length']}, and the sequences have {tokens.shape[1]} tokens: set it lower"
            )
        return int(start)

    def _loss(self, tokens: Tensor, rates: Tensor, uniform: Tensor) -> Tensor:
        start = self._start(tokens) if self.hparams["train_on"] == "answer" else 0
        seen, masked = mask_tokens(tokens, rates, uniform, self.mask_token, start)
        return masked_diffusion_loss(self(seen), tokens, masked, rates, tokens.shape[1] - start)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """LLaDA's loss of the batch."""
        tokens = batch["input_ids"]
        rates = masking_rates(torch.rand(len(tokens), device=tokens.device))
        loss = self._loss(tokens, rates, torch.rand(tokens.shape, device=tokens.device))
        self.log("language/loss", loss.detach(), prog_bar=True, batch_size=len(tokens))
        return loss

    # ---- generation

    def on_denoise_step(self, step: DenoisingStep) -> None:
        """Called before each run of the model in a generation.

        Args:
            step: Which one it is.
        """
        bar = getattr(getattr(self, "_trainer", None), "progress_bar_callback", None)
        if bar is not None and hasattr(bar, "on_denoise_step"):
            bar.on_denoise_step(step.index, step.steps)

    def generate(self, prompt: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Write ``answer_length`` tokens behind a prompt, by the sampler of the arguments.

        Args:
            prompt: (B, P) int64.
            generator: For temperatures above 0.

        Returns:
            (B, P + answer_length) int64.
        """
        hp = self.hparams
        options: dict[str, Any] = {"temperature": hp["temperature"], "generator": generator, "announce": self.on_denoise_step}
        if hp["sampler"] == "dream":
            options |= {"top_p": hp["top_p"], "confidence": hp["confidence"]}
            return dream_generate(self, prompt, self.mask_token, hp["answer_length"], hp["steps"], **options)
        block = hp["block_length"] or hp["answer_length"]
        return llada_generate(self, prompt, self.mask_token, hp["answer_length"], block, hp["steps"], **options)

    def _generator(self, place: str) -> torch.Generator:
        return torch.Generator().manual_seed(own_seed(f"{place}, process {self.global_rank}", self.hparams["seed"]))

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss with masks that are the same at every evaluation, and the generated answers."""
        tokens, generator = batch["input_ids"], self._generator(f"evaluation {batch_idx}")
        rates = masking_rates(torch.rand(len(tokens), generator=generator)).to(tokens.device)
        uniform = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        self.eval_loss.update(self._loss(tokens, rates, uniform), weight=len(tokens))
        start = self._start(tokens)
        generated = self.generate(tokens[:, :start], generator)
        right = generated[:, start:] == tokens[:, start:]
        self.eval_accuracy.update(right.float().mean(), weight=len(tokens))
        if batch_idx == 0:
            rows = zip(tokens[:SHOWN].tolist(), generated[:SHOWN].tolist(), strict=True)
            texts = [(self._text(said[:start]), self._text(said[start:]), self._text(found[start:])) for said, found in rows]
            self._media = {"language/answers": TableMedia(("prompt", "in the data", "generated"), tuple(texts))}
        return {"generated": generated}

    def _text(self, tokens: list[int]) -> str:
        """Text of tokens, where the datamodule knows it; else the numbers."""
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        text = None if decode is None else decode(tokens)
        return " ".join(map(str, tokens)) if text is None else text

    def _log_evaluation(self, part: Part) -> None:
        figures = {f"language/{part}_loss": self.eval_loss.compute(), f"language/{part}_accuracy": self.eval_accuracy.compute()}
        log_global(self, figures, prog_bar=True)
        self.eval_loss.reset()
        self.eval_accuracy.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Generate an answer behind the prompt of each sequence.

        Returns:
            ``generated`` (B, L) int64, prompt and answer.
        """
        tokens = batch["input_ids"]
        generated = self.generate(tokens[:, : self._start(tokens)], self._generator(f"prediction {batch_idx}"))
        self._generated += [{"tokens": row, "text": self._text(row)} for row in generated.tolist()]
        return {"generated": generated}

    def on_predict_epoch_start(self) -> None:
        """Forget what an earlier prediction generated."""
        self._generated = []

    def on_predict_epoch_end(self) -> None:
        """Write what was generated, one JSON object a line."""
        name = "generated.jsonl" if self.trainer.world_size == 1 else f"generated_process{self.global_rank}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._generated)
        folder = run_dir(self.trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, lines)
        self._generated = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine per step.

        Raises:
            ValueError: The training has no end, and the schedule needs one.
        """
        return adamw_by_shares(self)


__all__ = ["MaskedDiffusionLM"]
