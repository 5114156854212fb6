"""The Sparse Frontier as a callback: one of six methods in a module that is evaluated.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparse_attention.sparse_frontier.core`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_methods import distributed
from lit_methods.callbacks.sparse_attention.callback import AttentionCallback, Stage
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.sparse_attention.attention import PHASES
from lit_methods.sparse_attention.blocks import Implementation
from lit_methods.sparse_attention.method import SparseAttention
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sparse_frontier",
    title="The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
    arxiv="2504.17768",
    family="sparse_attention",
    form="callback",
    classes=(
        "lit_methods.callbacks.SparseAttentionCallback",
        "lit_methods.callbacks.IsoCostReport",
        "lit_methods.callbacks.VerticalSlash",
        "lit_methods.callbacks.FlexPrefill",
        "lit_methods.callbacks.BlockSparse",
        "lit_methods.callbacks.SnapKV",
        "lit_methods.callbacks.AdaSnapKV",
        "lit_methods.callbacks.Quest",
    ),
    configs=("sparse_frontier.yaml",),
    golden=("vertical_slash", "flexprefill", "block_sparse", "snapkv", "ada_snapkv", "quest", "score", "cost_model"),
    claim="With a quarter of the cache, choosing pages anew for each query (Quest) answers questions that come behind a text more often "
    "than keeping the keys that the text's own end looks at (SnapKV).",
    summary="Puts one of six training-free sparse attentions into a language model, and draws score against cost over many runs.",
)

_LARGEST_PICTURE = 160  # pixels of a side of a head's picture
_HEADS = 4


class SparseAttentionCallback(AttentionCallback):
    """Puts one of six sparse attentions into a module while it is validated, tested or used; nothing is trained for it.

    VerticalSlash, FlexPrefill and BlockSparse choose what a text's own tokens see as it is read. SnapKV and AdaSnapKV cut the cache once
    the text is read. Quest keeps the cache and chooses pages of it for each new token.

    Runs: as :class:`~lit_methods.callbacks.sparse_attention.callback.AttentionCallback`. A prefill method acts wherever a text is read at
    once; the others act where the module goes on with a cache, as ``generate`` and ``LongContextLM`` do.

    Saves: nothing.

    Refuses: as its base.

    Args:
        method: VerticalSlash, FlexPrefill, BlockSparse, SnapKV, AdaSnapKV or Quest, or a :class:`SparseAttention` of one's own; None: full
            attention, to compare with.
        targets: fnmatch patterns on names of attention layers; None: all but those with a sliding window.
        implementation: ``blocked`` gathers the kept keys and computes these; ``flex`` is FlexAttention, for BlockSparse; ``dense`` computes
            everything under a mask, to compare with; ``auto``: ``flex`` on CUDA where it can, else ``blocked``.
        during: Evaluations in which the method is on.

    Raises:
        ValueError: An argument that isn't one of those above.
    """

    prefix: ClassVar[str] = "sparse_frontier"
    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Keys that are kept", "sparse_frontier/kept", note="First layer, first text: a row is a query, a column a key."),
        Curve(
            "Pairs of query and key that aren't computed",
            tuple(f"sparse_frontier/{part}_{phase}_sparsity" for part in ("val", "test") for phase in (*PHASES, "executed")),
            note="As a share of those of full attention; executed: in whole blocks and cells, as a kernel computes a prefill.",
        ),
    )

    def __init__(
        self,
        method: SparseAttention | None = None,
        targets: Sequence[str] | None = None,
        implementation: Implementation = "auto",
        during: Sequence[Stage] = ("validate", "test", "predict"),
    ) -> None:
        super().__init__(targets, implementation, during)
        if method is not None and not isinstance(method, SparseAttention):
            raise ValueError(f"method is a {type(method).__name__}: it must be a SparseAttention, such as Quest()")
        self.method = SparseAttention() if method is None else method
        self.longest = 0  # tokens of the longest text of the last evaluation, over all ranks
        self._media: dict[str, Media] = {}

    def make_method(self) -> SparseAttention:
        """The one that was given."""
        return self.method

    def log_sparsities(self, pl_module: pl.LightningModule, part: str) -> dict[str, float]:
        """Log, and keep what the dashboard shows."""
        found = super().log_sparsities(pl_module, part)
        if self.swap is not None:
            noted = torch.stack(
                [torch.zeros(2, dtype=torch.float64), *(torch.stack([one, torch.ones_like(one)]) for one in self._executed())]
            )
            total, count = distributed.sum_over_ranks(noted.cpu().sum(0)).tolist()
            if count:
                log_global(pl_module, {f"{self.prefix}/{part}_executed_sparsity": total / count})
            self.longest = int(distributed.gather_rows(torch.tensor([self.swap.longest]), with_grad=False).max())
            pictures = {phase: self.swap.picture(phase) for phase in PHASES}
            phase = next((own for own in ("decode", *PHASES) if pictures[own] is not None and found.get(own, 0) != 0), "prefill")
            picture = pictures[phase]
            if picture is not None:
                name = type(self.method).__name__
                self._media = {"sparse_frontier/kept": ImageMedia(kept_picture(picture), f"Keys that {name} keeps, one square per head")}
        return found

    def _executed(self) -> list[Tensor]:
        return [one.double() for one in getattr(self.method, "executed", [])]

    def dashboard_media(self) -> dict[str, Media]:
        """Which keys the heads of the first layer saw."""
        return self._media


def kept_picture(kept: Tensor, heads: int = _HEADS) -> Any:
    """Heads side by side, bright where a key is kept.

    Args:
        kept: (H, rows, keys) bool.
        heads: Heads that are shown, the first ones.

    Returns:
        (h, w, 3) uint8; large masks are averaged over their neighbours.
    """
    shares = kept[:heads].float()[None]
    rows, keys = (min(_LARGEST_PICTURE, side) for side in shares.shape[2:])
    shares = torch.nn.functional.adaptive_avg_pool2d(shares, (rows, keys))[0]
    grow = [max(1, _LARGEST_PICTURE // side) for side in shares.shape[1:]]
    shares = shares.repeat_interleave(min(grow[0], 8), 1).repeat_interleave(min(grow[1], 8), 2)
    tiles = torch.nn.functional.pad(shares, (0, 6, 0, 0), value=-1.0)
    row = torch.cat(list(tiles), 1)[:, :-6]
    dark, bright = torch.tensor([24.0, 32.0, 56.0]), torch.tensor([255.0, 196.0, 64.0])
    colours = dark + row.clamp(min=0)[..., None] * (bright - dark)
    colours = torch.where(row[..., None] < 0, 255.0, colours)
    return np.ascontiguousarray(colours.round().to(torch.uint8).numpy())


__all__ = ["TECHNIQUE", "SparseAttentionCallback", "kept_picture"]
