"""Networks of CoTAP: a timm vision transformer whose last block has the object-aware filter, heads of prototypes, queues."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.hub import timm_network
from lit_methods.runs.checkpoints import load_into
from lit_methods.self_supervised.cotap.core import cls_attention, enqueue, object_filter


class Encoded(NamedTuple):
    """What the encoder knows of images.

    Attributes:
        cls: (B, 2 d) of the class token.
        patches: (B, h * w, 2 d).
        grid: h and w.
        before: (B, d, h, w) patches before the last block.
        attention: (B, heads, h, w) of the class token in the last block, without a gradient; None: not asked for.
        objects: (B, heads, h * w, M) attention of the patches to the object prototypes.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]
    before: Tensor
    attention: Tensor | None
    objects: Tensor

    def maps(self) -> Tensor:
        """(B, 2 d, h, w) patches in their places."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class ObjectAwareViT(nn.Module):
    """A vision transformer of timm whose last block is followed by the object-aware filter, with the block's own weights.

    Images of any size that the patches divide are taken: timm resizes the positions.

    Args:
        name: Network of timm with one class token, such as ``vit_small_patch16_224.dino``.
        pretrained: Load timm's weights; they are downloaded once.
        weights: File with weights of the vision transformer, such as iBOT's, in DINO's layout; None: timm's, or random ones.
        prototypes: M, object prototypes.
        kernel: Side of a prototype in patches, odd.
        image_size: Side of the images that the positions are made for; None: the network's own.
        patch_size: Side of a patch in pixels; None: the network's own.
        width: d, numbers in a token; None: the network's own. With this, ``depth`` or ``heads`` timm has no weights.
        depth: Blocks; None: the network's own.
        heads: Heads of attention; None: the network's own.

    Attributes:
        width: d.
        patch_size: Side of a patch in pixels.
        prototypes: (M, d, kernel, kernel), learned by their entropy alone: the filter takes them without a gradient.

    Raises:
        ValueError: No such network, one without exactly one class token, or a number out of range.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224.dino",
        pretrained: bool = True,
        weights: Path | None = None,
        prototypes: int = 64,
        kernel: int = 3,
        image_size: int | None = None,
        patch_size: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        checks.at_least(1, prototypes=prototypes, image_size=image_size, patch_size=patch_size, width=width, heads=heads)
        checks.at_least(2, "blocks", depth=depth)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}: give an odd number of patches, such as 3")
        sizes = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
        changed: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
        if width is not None and width % (heads or 1):
            raise ValueError(f"width={width} with heads={heads}: the second must divide the first")
        self.vit: Any = timm_network(name, pretrained and weights is None, num_classes=0, dynamic_img_size=True, **changed)
        if getattr(self.vit, "num_prefix_tokens", 0) != 1 or not hasattr(self.vit, "blocks"):
            raise ValueError(f"{name!r} has no token of its class alone before the patches: give a plain vision transformer with one")
        if weights is not None:
            load_into(self.vit, weights)
        self.vit.norm = self.vit.fc_norm = nn.Identity()  # the filter's norms take their place; a norm that is never used trains badly
        self.width: int = self.vit.embed_dim
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.norm_in = nn.LayerNorm(self.width, eps=1e-6)
        self.norm_out_patch, self.norm_out_cls = (nn.LayerNorm(2 * self.width, eps=1e-6) for _ in range(2))
        self.prototypes = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, self.width, kernel, kernel), std=1.0))

    def forward(self, images: Tensor, look: bool = False) -> Encoded:
        """Tokens of images.

        Args:
            images: (B, 3, H, W), of which the side of a patch divides H and W.
            look: Give the attention of the class token, too.

        Raises:
            ValueError: The patches don't fill the images.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images are {tuple(images.shape)}: their sides must be multiples of the patches' {self.patch_size} pixels")
        grid = (height // self.patch_size, width // self.patch_size)
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks[:-1]:
            tokens = block(tokens)
        last = vit.blocks[-1]
        attention = None
        if look:
            with torch.no_grad():
                attention = cls_attention(tokens, last).unflatten(2, grid)
        norms = self.norm_in, self.norm_out_patch, self.norm_out_cls
        found, objects = object_filter(tokens, self.prototypes.detach(), last, *norms, grid)
        before = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        return Encoded(found[:, 0], found[:, 1:], grid, before, attention, objects)


class PrototypeHead(nn.Module):
    """MLP with one hidden layer between the first and the last, norm 1, cosines with K prototypes.

    Args:
        width: Numbers that come in.
        hidden: Numbers in the hidden layers.
        bottleneck: Numbers that are compared with the prototypes.
        prototypes: K.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck, bias=False)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, bottleneck), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., K) in [-1, 1]."""
        return F.linear(F.normalize(self.layers(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class CoTAPNetwork(nn.Module):
    """Encoder and both heads: what the student is, and its teacher.

    Args:
        encoder: :class:`ObjectAwareViT`, or a network with its ``width``, ``patch_size``, ``prototypes`` and result.
        patch_prototypes: K of the patches' head.
        cls_prototypes: K of the class token's head.
        hidden: Numbers in the heads' hidden layers.
        bottleneck: Numbers that the heads compare with their prototypes.
    """

    def __init__(self, encoder: nn.Module, patch_prototypes: int, cls_prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        width = 2 * int(encoder.width)  # type: ignore[arg-type]
        self.patch_head = PrototypeHead(width, hidden, bottleneck, patch_prototypes)
        self.cls_head = PrototypeHead(width, hidden, bottleneck, cls_prototypes)

    def patch_scores(self, encoded: Encoded, images: int) -> Tensor:
        """(images, K, h, w) scores of the patches of the first images."""
        return self.patch_head(encoded.patches[:images]).transpose(1, 2).unflatten(2, encoded.grid)


class FeatureQueue(nn.Module):
    """The newest rows, the same on all ranks; how many there are is known without asking the device.

    Args:
        length: Most rows.
        shape: Shape of a row.

    Attributes:
        rows: (length, *shape), newest first.
        filled: () int64 rows that are there.
    """

    rows: Tensor
    filled: Tensor

    def __init__(self, length: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, *shape))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._filled = 0
        self.register_load_state_dict_post_hook(lambda queue, _: queue._count())

    def _count(self) -> None:
        self._filled = int(self.filled)

    def __len__(self) -> int:
        return self._filled

    @property
    def full(self) -> bool:
        """Whether the next row pushes one out."""
        return self._filled == len(self.rows)

    def values(self) -> Tensor:
        """(filled, *shape), newest first."""
        return self.rows[: self._filled]

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put (n, *shape) in front."""
        self.rows.copy_(enqueue(self.rows, rows))
        self._filled = min(len(self.rows), self._filled + len(rows))
        self.filled.fill_(self._filled)


class ObjectBank(FeatureQueue):
    """A queue that knows whether its rows have been clustered.

    Args:
        length: Most rows.
        shape: Shape of a row.
    """

    done: Tensor

    def __init__(self, length: int, shape: tuple[int, ...]) -> None:
        super().__init__(length, shape)
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self.clustered = False

    def _count(self) -> None:
        super()._count()
        self.clustered = bool(self.done)

    def mark_clustered(self) -> None:
        """From now on its rows have been clustered."""
        self.clustered = True
        self.done.fill_(True)


__all__ = ["CoTAPNetwork", "Encoded", "FeatureQueue", "ObjectAwareViT", "ObjectBank", "PrototypeHead"]
