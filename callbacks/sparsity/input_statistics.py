"""What a layer's inputs look like over calibration samples: sums, squares, variances and the Hessian, taken up call by call."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class InputStatistics:
    """Statistics of the inputs X[n, t, c] of one linear layer: N samples of T tokens with C columns.

    Attributes:
        total: (C,) sum over tokens, averaged over samples: s_c = (1/N) sum_{n,t} X[n,t,c]. Zeros before the first call.
        square: (C,) the same of the squares: q_c.
        variance: (C,) token-weighted mean over samples of the population variance over a sample's tokens: v_c. What the samples' means
            differ by isn't in it.
        hessian: (C, C) (2/N) sum_{n,t} X X^T; None where nobody needs it.
        samples: N.
        tokens: Tokens of all samples together.
    """

    total: Tensor
    square: Tensor
    variance: Tensor
    hessian: Tensor | None
    samples: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls, columns: int, hessian: bool = False, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> "InputStatistics":
        """Statistics of no sample yet.

        Args:
            columns: C.
            hessian: Keep the (C, C) Hessian as well.
            device: Where they lie.
            dtype: float32 or float64.
        """

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(zeros(columns), zeros(columns), zeros(columns), zeros(columns, columns) if hessian else None, zeros(), zeros())

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Take up one call of the layer.

        Args:
            inputs: (B, ..., C): B samples, whose middle dimensions are their tokens; (T, C) or (C,): the tokens of one sample. Any floating
                dtype; the sums are in the statistics' own.

        Raises:
            ValueError: Another number of columns.
        """
        if inputs.ndim < 1 or inputs.shape[-1] != len(self.total):
            raise ValueError(f"inputs are {tuple(inputs.shape)}, but the layer has {len(self.total)} columns")
        if not inputs.numel():
            return
        columns = inputs.shape[-1]
        x = inputs.detach().to(self.total.device, self.total.dtype).reshape(inputs.shape[0] if inputs.ndim > 2 else 1, -1, columns)
        samples, tokens = x.shape[:2]
        before, after = self.samples, self.samples + samples
        self.total = self.total * (before / after) + x.sum((0, 1)) / after
        self.square = self.square * (before / after) + x.square().sum((0, 1)) / after
        if self.hessian is not None:
            flat = x.flatten(0, 1).T * (2 / after).sqrt()
            self.hessian = self.hessian * (before / after) + flat @ flat.T
        spread = x.var(dim=1, correction=0).mean(0)
        seen = self.tokens + samples * tokens
        self.variance = (self.variance * self.tokens + spread * (samples * tokens)) / seen
        self.samples, self.tokens = after, seen

    def summed(self) -> list[Tensor]:
        """Sums that add up over processes: pass their sums to :meth:`from_sums`."""
        hessian = [] if self.hessian is None else [self.hessian * self.samples]
        means = [self.total * self.samples, self.square * self.samples, self.variance * self.tokens]
        return [*means, self.samples, self.tokens, *hessian]

    @classmethod
    def from_sums(cls, sums: list[Tensor]) -> "InputStatistics":
        """Statistics of all samples whose :meth:`summed` were added up."""
        total, square, variance, samples, tokens, *hessian = sums
        n, t = samples.clamp(min=1), tokens.clamp(min=1)
        return cls(total / n, square / n, variance / t, hessian[0] / n if hessian else None, samples, tokens)

    def bytes(self) -> int:
        """Memory that they take."""
        held = [getattr(self, one.name) for one in fields(self)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def input_statistics(samples: Tensor, hessian: bool = False) -> InputStatistics:
    """Statistics of samples, taken up one by one as a layer that is called once per sample would.

    Args:
        samples: (N, T, C) floating point.
        hessian: Keep the Hessian as well.
    """
    found = InputStatistics.of(samples.shape[-1], hessian, samples.device, torch.promote_types(samples.dtype, torch.float32))
    for sample in samples:
        found.add(sample)
    return found


__all__ = ["InputStatistics", "input_statistics"]
