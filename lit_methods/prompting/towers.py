"""CLIP's two towers (arXiv:2103.00020) with a place for prompts in both, as in MaPLe (arXiv:2210.03117).

Weights come from a local folder in the format of Hugging Face transformers (:class:`CLIPTowers`); a small pair of towers for runs without
files is in :mod:`lit_methods.prompting.tiny`. Deep prompts were read in ShuvenduRoy/CoPrompt@a2a6c12 (clip/model.py), which the golden
vectors come from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.hub import fetch

EXTRA = 'pip install "lit-methods[transformers]"'
Place = Literal["after_first", "end"]
Activation = Literal["quick_gelu", "gelu"]


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    """X sigmoid(1.702 x), any shape."""
    return x * torch.sigmoid(1.702 * x)


def run_prompted_blocks(blocks: Sequence[Callable[[Tensor], Tensor]], tokens: Tensor, deep_prompts: Tensor, place: Place) -> Tensor:
    """Blocks one after the other; from the second on, each first replaces the prompt tokens by its own prompts, as long as there are any.

    The first block takes the tokens as they are: its prompts stand among them already. Where there are more prompts than blocks that could
    take them, the last ones aren't used.

    Args:
        blocks: (B, L, W) -> (B, L, W) each.
        tokens: (B, L, W).
        deep_prompts: (J - 1, n, W), the same for every sample: prompt i replaces n tokens before block i + 1.
        place: Where the n tokens stand: ``after_first`` (texts) or ``end`` (images).

    Returns:
        (B, L, W).

    Raises:
        ValueError: The tokens don't have room for the prompts, or another width.
    """
    number = deep_prompts.shape[1]
    room = tokens.shape[1] - (place == "after_first")
    if number > room or (len(deep_prompts) and deep_prompts.shape[2] != tokens.shape[2]):
        raise ValueError(
            f"{number} prompts of width {deep_prompts.shape[2]} don't fit {tokens.shape[1]} tokens of width {tokens.shape[2]}: "
            "give fewer, or a longer context"
        )
    start = 1 if place == "after_first" else tokens.shape[1] - number
    for index, block in enumerate(blocks):
        if 0 < index <= len(deep_prompts):
            own = deep_prompts[index - 1].to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :start], own, tokens[:, start + number :]], dim=1)
        tokens = block(tokens)
    return tokens


# ---- the towers ------------------------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """A pre-norm transformer block as CLIP has it: attention, then four times as many hidden units.

    Args:
        width: W.
        heads: Divides W.
        causal: Each token sees itself and those before it.
        activation: ``quick_gelu`` (OpenAI's weights) or ``gelu``.
        eps: Addend of the layer norms.
    """

    def __init__(self, width: int, heads: int, causal: bool, activation: Activation = "quick_gelu", eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn_in_proj, self.attn_out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_c_fc, self.mlp_c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) -> (B, L, W)."""
        parts = self.attn_in_proj(self.ln_1(tokens)).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, W / heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        tokens = tokens + self.attn_out_proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp_c_proj(self.activation(self.mlp_c_fc(self.ln_2(tokens))))


@dataclass(frozen=True)
class TowerSizes:
    """What decides the shapes of the two towers.

    Attributes:
        image_size: Side of an image in pixels.
        patch_size: Side of a patch; divides the former.
        image_width: Width of the image tower.
        image_layers: Its blocks.
        image_heads: Its heads.
        text_width: Width of the text tower.
        text_layers: Its blocks.
        text_heads: Its heads.
        vocabulary: Number of tokens.
        context_length: Tokens of a text at most, beginning and end included.
        embed_dim: D of both embeddings.
        activation: Activation of all blocks.
        eps: Addend of all layer norms.
    """

    image_size: int
    patch_size: int
    image_width: int
    image_layers: int
    image_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int
    context_length: int
    embed_dim: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5


class TwoTowers(nn.Module):
    """An image and a text tower of CLIP's architecture that take prompts.

    Args:
        sizes: Shapes.
        tokenize: Texts -> (N, context_length) int64, each with ``end_token`` behind its last word; what follows it is ignored.
        end_token: The token whose output is the embedding of the text.
        logit_scale: ln of what cosines are multiplied with.
    """

    logit_scale: Tensor

    def __init__(
        self, sizes: TowerSizes, tokenize: Callable[[Sequence[str]], Tensor], end_token: int, logit_scale: float = math.log(100.0)
    ) -> None:
        super().__init__()
        self.sizes, self.tokenize, self.end_token = sizes, tokenize, end_token
        s = sizes
        self.patches = nn.Conv2d(3, s.image_width, s.patch_size, s.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(s.image_width) * s.image_width**-0.5)
        self.image_positions = nn.Parameter(torch.randn((s.image_size // s.patch_size) ** 2 + 1, s.image_width) * s.image_width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(s.image_width, eps=s.eps), nn.LayerNorm(s.image_width, eps=s.eps)
        self.image_blocks = nn.ModuleList(
            ResidualBlock(s.image_width, s.image_heads, False, s.activation, s.eps) for _ in range(s.image_layers)
        )
        self.image_projection = nn.Linear(s.image_width, s.embed_dim, bias=False)
        self.words = nn.Embedding(s.vocabulary, s.text_width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.text_positions = nn.Parameter(torch.randn(s.context_length, s.text_width) * 0.01)
        self.text_blocks = nn.ModuleList(ResidualBlock(s.text_width, s.text_heads, True, s.activation, s.eps) for _ in range(s.text_layers))
        self.ln_final = nn.LayerNorm(s.text_width, eps=s.eps)
        self.text_projection = nn.Linear(s.text_width, s.embed_dim, bias=False)
        self.register_buffer("logit_scale", torch.tensor(logit_scale))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """(B, 3, S, S) images and (C, L) tokens -> (B, C) scaled cosines, without prompts."""
        image, text = self.encode_image(images), self.encode_text(ids)
        return self.logit_scale.exp() * F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T

    def end_of(self, ids: Tensor) -> Tensor:
        """(N, L) tokens -> (N,) position of each text's first end token."""
        return (ids == self.end_token).int().argmax(dim=1)

    def cut(self, ids: Tensor) -> Tensor:
        """The tokens without the columns that lie behind the end of every text: no token looks ahead, so they change nothing."""
        return ids[:, : int(self.end_of(ids).max()) + 1]

    def encode_image(self, images: Tensor, prompt: Tensor | None = None, deep_prompts: Tensor | None = None) -> Tensor:
        """Embeddings of images.

        Args:
            images: (B, 3, S, S), normalised as the towers want it.
            prompt: (n, W) tokens that are put behind the patches; None: none.
            deep_prompts: (J - 1, n, W), see :func:`run_prompted_blocks`; None: none.

        Returns:
            (B, D), not normalised.

        Raises:
            ValueError: Images of another size.
        """
        side = self.sizes.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images are {tuple(images.shape)}: these towers want (B, 3, {side}, {side}); set the datamodule's image_size")
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.to(patches.dtype).expand(len(images), 1, -1), patches], dim=1) + self.image_positions
        if prompt is not None:
            tokens = torch.cat([tokens, prompt.to(tokens.dtype).expand(len(images), -1, -1)], dim=1)
        if deep_prompts is None:
            deep_prompts = tokens.new_empty(0, 0, tokens.shape[2])
        tokens = run_prompted_blocks(list(self.image_blocks), self.ln_pre(tokens), deep_prompts, "end")
        embedding: Tensor = self.image_projection(self.ln_post(tokens[:, 0]))
        return embedding

    def encode_text(self, ids: Tensor, prompt: Tensor | None = None, deep_prompts: Tensor | None = None) -> Tensor:
        """Embeddings of texts.

        Args:
            ids: (N, L) int64.
            prompt: (n, W) in place of the embeddings of tokens 1 to n of every text; None: none.
            deep_prompts: (J - 1, n, W), see :func:`run_prompted_blocks`; None: none.

        Returns:
            (N, D), not normalised.
        """
        tokens = self.words(ids)
        if prompt is not None:
            own = prompt.to(tokens.dtype).expand(len(ids), -1, -1)
            tokens = torch.cat([tokens[:, :1], own, tokens[:, 1 + prompt.shape[0] :]], dim=1)
        if deep_prompts is None:
            deep_prompts = tokens.new_empty(0, 0, tokens.shape[2])
        tokens = run_prompted_blocks(list(self.text_blocks), tokens + self.text_positions[: ids.shape[1]], deep_prompts, "after_first")
        ends = tokens[torch.arange(len(ids), device=ids.device), self.end_of(ids)]
        embedding: Tensor = self.text_projection(self.ln_final(ends))
        return embedding


# ---- weights of transformers -----------------------------------------------------------------------------------------------------------


class _Tokenizer:
    """A tokenizer of transformers as :class:`TwoTowers` wants it."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids: Tensor = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")[
            "input_ids"
        ]
        return ids


def _block(own: ResidualBlock, theirs: Any) -> None:
    attention = theirs.self_attn
    pairs = [(own.ln_1, theirs.layer_norm1), (own.ln_2, theirs.layer_norm2), (own.attn_out_proj, attention.out_proj)]
    for ours, source in [*pairs, (own.mlp_c_fc, theirs.mlp.fc1), (own.mlp_c_proj, theirs.mlp.fc2)]:
        ours.load_state_dict(source.state_dict())
    own.attn_in_proj.weight.copy_(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
    own.attn_in_proj.bias.copy_(torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias]))


@torch.no_grad()
def copy_clip(towers: TwoTowers, model: Any) -> None:
    """Copy the weights of a ``CLIPModel`` of transformers into towers of the same sizes."""
    vision, text = model.vision_model, model.text_model
    towers.patches.weight.copy_(vision.embeddings.patch_embedding.weight)
    towers.class_token.copy_(vision.embeddings.class_embedding)
    towers.image_positions.copy_(vision.embeddings.position_embedding.weight)
    towers.words.weight.copy_(text.embeddings.token_embedding.weight)
    towers.text_positions.copy_(text.embeddings.position_embedding.weight)
    towers.logit_scale.copy_(model.logit_scale)
    for own, theirs in [
        (towers.ln_pre, vision.pre_layrnorm),
        (towers.ln_post, vision.post_layernorm),
        (towers.ln_final, text.final_layer_norm),
        (towers.image_projection, model.visual_projection),
        (towers.text_projection, model.text_projection),
    ]:
        own.load_state_dict(theirs.state_dict())
    for blocks, layers in ((towers.image_blocks, vision.encoder.layers), (towers.text_blocks, text.encoder.layers)):
        for own, layer in zip(blocks, layers, strict=True):
            assert isinstance(own, ResidualBlock)
            _block(own, layer)


class CLIPTowers(TwoTowers):
    """CLIP from a local folder in the format of transformers, such as a copy of ``openai/clip-vit-base-patch16``. Nothing is downloaded.

    Args:
        path: Folder with ``config.json``, weights and the tokenizer's files.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        FileNotFoundError: ``path`` holds no ``config.json``.
        ValueError: It holds another kind of model, one with another activation, or not all files.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path).expanduser()
        try:
            import transformers
        except ImportError as error:
            raise ImportError(f"CLIPTowers needs transformers: {EXTRA}") from error
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"path={str(path)!r} has no config.json: give the folder of a CLIP model of transformers, such as a copy of "
                "openai/clip-vit-base-patch16"
            )

        def read(kind: Any, blank: Any = None, **options: Any) -> Any:
            return fetch(
                lambda: kind.from_pretrained(str(path), local_files_only=True, **options),
                path,
                given=f"path={str(path)!r}",
                instead="give a complete copy of a CLIP model of transformers: config.json, weights, the tokenizer's files",
                blank=blank,
            )

        config = read(transformers.AutoConfig, trust_remote_code=False)
        if config.model_type != "clip":
            raise ValueError(f"path={str(path)!r} holds a {config.model_type!r} model: give one of type 'clip'")
        image, text = config.vision_config, config.text_config
        kinds = {image.hidden_act, text.hidden_act}
        if len(kinds) > 1 or not kinds <= {"quick_gelu", "gelu"}:
            raise ValueError(f"path={str(path)!r} has the activations {sorted(kinds)}: quick_gelu or gelu in both towers is known here")
        tokenizer = read(transformers.AutoTokenizer, trust_remote_code=False)
        sizes = TowerSizes(
            image_size=image.image_size, patch_size=image.patch_size, image_width=image.hidden_size, image_layers=image.num_hidden_layers,
            image_heads=image.num_attention_heads, text_width=text.hidden_size, text_layers=text.num_hidden_layers,
            text_heads=text.num_attention_heads, vocabulary=text.vocab_size, context_length=text.max_position_embeddings,
            embed_dim=config.projection_dim, activation=image.hidden_act, eps=image.layer_norm_eps,
        )  # fmt: skip
        super().__init__(sizes, _Tokenizer(tokenizer, sizes.context_length), int(tokenizer.eos_token_id))
        copy_clip(self, read(transformers.CLIPModel, lambda: transformers.CLIPModel(config), dtype=torch.float32))


__all__ = ["CLIPTowers", "ResidualBlock", "TowerSizes", "TwoTowers", "copy_clip", "quick_gelu", "run_prompted_blocks"]
