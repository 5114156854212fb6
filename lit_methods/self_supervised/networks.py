"""Vision transformers of I-JEPA: an encoder that may see a part of the patches, and a narrow predictor.

Source: facebookresearch/ijepa@52c1ae9 (src/models/vision_transformer.py): the layout and the names of the weights, so that its checkpoints
fit. The blocks are timm's.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.self_supervised.jepa import repeat_per_context, take_patches


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed embeddings of the places on a grid: sines and cosines of column and row.

    The first half of the numbers tells the column and the second half the row: sines, then cosines, of the place divided by 10000 to the
    powers 0, 4 / width, 8 / width, and so on.

    Args:
        width: D, a multiple of 4.
        grid: Rows and columns.

    Returns:
        (rows * columns, D) float64 in [-1, 1], row by row.

    Raises:
        ValueError: Another width.
    """
    if width < 4 or width % 4:
        raise ValueError(f"width is {width}: positions in two dimensions need a multiple of 4")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def _blocks(width: int, depth: int, heads: int, norm_eps: float) -> nn.ModuleList:
    norm = partial(nn.LayerNorm, eps=norm_eps)
    return nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))


@torch.no_grad()
def _initialise(network: nn.Module, blocks: nn.ModuleList) -> None:
    """Normal weights of 0.02, cut off; what a block adds is smaller the deeper it lies."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    block: Any
    for number, block in enumerate(blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            weight.div_((2 * number) ** 0.5)


class _Patches(nn.Module):
    """The projection of patches, under the authors' name ``patch_embed.proj``."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, patches, width)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViTEncoder(nn.Module):
    """A vision transformer without a class token and with fixed positions, which may be shown a part of the patches.

    Args:
        image_size: Side of the square images in pixels.
        patch_size: Side of a patch in pixels, which divides ``image_size``.
        channels: Channels of an image.
        width: Numbers in a token, a multiple of 4 and of ``heads``.
        depth: Blocks.
        heads: Heads of attention.
        norm_eps: Addend to the variance in the layer norms.

    Attributes:
        grid: Rows and columns of patches.
        width: As above.
        heads: As above.

    Raises:
        ValueError: Sizes that don't divide each other.
    """

    pos_embed: Tensor

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        checks.at_least(1, image_size=image_size, patch_size=patch_size, channels=channels, depth=depth, heads=heads)
        checks.at_least(0, norm_eps=norm_eps)
        if image_size % patch_size or width % heads:
            what = f"image_size={image_size} with patch_size={patch_size}, and width={width} with heads={heads}"
            raise ValueError(f"{what}: the second must divide the first")
        side = image_size // patch_size
        self.grid, self.width, self.heads = (side, side), width, heads
        self.patch_embed = _Patches(channels, patch_size, width)
        self.register_buffer("pos_embed", sincos_positions(width, self.grid).float()[None])
        self.blocks = _blocks(width, depth, heads, norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        _initialise(self, self.blocks)
        inputs = channels * patch_size**2
        trunc_normal_(self.patch_embed.proj.weight, std=0.02 * (768 / inputs) ** 0.5)  # else positions drown what small patches show

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens of the patches.

        Args:
            images: (B, channels, image_size, image_size) floating point.
            masks: (C, B, n) int64 indices of the patches that are seen; None: all N.

        Returns:
            (B, N, width), or (C * B, n, width), mask after mask.
        """
        tokens = self.patch_embed(images)
        if tokens.shape[1] != self.pos_embed.shape[1]:
            rows, columns = self.grid
            raise ValueError(f"images {tuple(images.shape)} have {tokens.shape[1]} patches, expected {rows} x {columns}: set image_size")
        tokens = tokens + self.pos_embed
        if masks is not None:
            tokens = take_patches(tokens, masks)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class ViTPredictor(nn.Module):
    """Predicts tokens at places from tokens at other places: a narrow vision transformer.

    Args:
        grid: Rows and columns of patches.
        encoder_width: Numbers in a token that comes in and goes out.
        width: Numbers in a token inside, a multiple of 4 and of ``heads``.
        depth: Blocks.
        heads: Heads of attention.
        norm_eps: Addend to the variance in the layer norms.
    """

    predictor_pos_embed: Tensor

    def __init__(self, grid: tuple[int, int], encoder_width: int, width: int, depth: int, heads: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        checks.at_least(1, predictor_depth=depth, predictor_heads=heads)
        if width % heads:
            raise ValueError(f"predictor_width={width} with predictor_heads={heads}: the second must divide the first")
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_positions(width, grid).float()[None])
        self.predictor_blocks = _blocks(width, depth, heads, norm_eps)
        self.predictor_norm = nn.LayerNorm(width, eps=norm_eps)
        self.predictor_proj = nn.Linear(width, encoder_width)
        _initialise(self, self.predictor_blocks)
        trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, context_masks: Tensor, target_masks: Tensor) -> Tensor:
        """Predictions of the target blocks.

        Args:
            context: (C * B, n, encoder_width) tokens, context after context.
            context_masks: (C, B, n) int64: where they are.
            target_masks: (M, B, k) int64: where to predict.

        Returns:
            (M * C * B, k, encoder_width): target block 1 from each context, then target block 2 from each context, and so on.
        """
        contexts, batch_size, seen = context_masks.shape
        positions = self.predictor_pos_embed.expand(batch_size, -1, -1)
        tokens = self.predictor_embed(context) + take_patches(positions, context_masks)
        asked = self.mask_token + repeat_per_context(take_patches(positions, target_masks), batch_size, contexts)
        tokens = torch.cat([tokens.repeat(len(target_masks), 1, 1), asked.to(tokens.dtype)], dim=1)
        for block in self.predictor_blocks:
            tokens = block(tokens)
        return self.predictor_proj(self.predictor_norm(tokens)[:, seen:])


__all__ = ["ViTEncoder", "ViTPredictor", "sincos_positions"]
