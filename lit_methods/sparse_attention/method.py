"""What a method of sparse attention answers: which keys, in each of the four places where attention is computed."""

from dataclasses import dataclass

from torch import Tensor

from lit_methods.sparse_attention.blocks import KeptBlocks


@dataclass(frozen=True)
class AttentionCall:
    """Where a question comes from.

    Attributes:
        layer: Number of the layer, from 0. Samples of one batch that are padded differently are asked for one after the other, as
            ``part`` 0, 1, ...: what a method keeps from one call to the next it keeps by (layer, part).
        scale: Factor of the products of queries and keys, such as 1 / sqrt(d).
        part: See ``layer``.
    """

    layer: int
    scale: float
    part: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """(layer, part)."""
        return self.layer, self.part


class SparseAttention:
    """Subclass it, and override the places that the method is about; the others stay dense.

    A method chooses, and :class:`~lit_methods.sparse_attention.attention.AttentionSwap` computes. Queries are (B, Hq, n, d), keys
    (B, Hkv, m, d), turned by their positions already and without padding. None means all keys.
    """

    def start(self) -> None:
        """Forget everything kept from calls before: a model was given, or taken away."""

    def prefill(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks | None:
        """Keys of each block of queries, as a whole text is read by causal attention (n = m)."""
        return None

    def compress(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor | None:
        """Keys that are kept when the text has been read (n = m): (B, Hkv, K) int64, negative: none. The others are never seen again."""
        return None

    def decode(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor | None:
        """Keys of one new query (n = 1), of m with itself: (B, H, K) int64, negative: none; H is Hq or Hkv.

        Not asked where :meth:`compress` has cut the cache: a new query then sees what is left and what came since.
        """
        return None

    def denoise(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks | None:
        """Keys of each block of queries, in attention that looks both ways (n = m)."""
        return None


__all__ = ["AttentionCall", "SparseAttention"]
