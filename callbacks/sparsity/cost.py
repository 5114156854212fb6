"""What a sparse network costs: FLOPs and bytes in theory, seconds and memory as measured. The two never mix.

Formulas: the common rules of sparse training (RigL, arXiv:1911.11134), see :mod:`~lit_methods.callbacks.sparsity.flops`.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_methods.callbacks.run.step_cost import peak_memory
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.flops import Macs, training_flops


@dataclass(frozen=True)
class Cost:
    """Theoretical cost of one forward pass, 2 FLOPs per MAC.

    Attributes:
        macs_dense: Weight -> MACs.
        macs_sparse: Weight -> MACs if only kept weights are multiplied.
        attention_macs: Products in which no weight takes part, such as attention scores and values. Sparse weights don't reduce them.
    """

    macs_dense: dict[str, float]
    macs_sparse: dict[str, float]
    attention_macs: float

    @property
    def flops_dense(self) -> float:
        """All of it, with dense weights."""
        return 2 * (sum(self.macs_dense.values()) + self.attention_macs)

    @property
    def flops_sparse(self) -> float:
        """All of it, with kept weights only."""
        return 2 * (sum(self.macs_sparse.values()) + self.attention_macs)

    @property
    def ratio(self) -> float:
        """Sparse / dense, attention included; 1 where nothing is counted. This is theory, no speed."""
        return self.flops_sparse / self.flops_dense if self.flops_dense else 1.0

    def figures(self) -> dict[str, float]:
        """FLOPs, their ratios, and the products without a weight, by name."""
        flops = {"flops_dense": self.flops_dense, "flops_sparse": self.flops_sparse, "flops_ratio": self.ratio}
        return flops | {"flops_ratio_without_attention": self.ratio_without_attention, "attention_macs": self.attention_macs}

    @property
    def ratio_without_attention(self) -> float:
        """Sparse / dense of the weights alone; 1 where nothing is counted."""
        dense = sum(self.macs_dense.values())
        return sum(self.macs_sparse.values()) / dense if dense else 1.0


def theoretical_cost(macs: Macs, density: Mapping[str, float], samples: int = 1) -> Cost:
    """Cost per sample at given layer densities.

    Args:
        macs: As counted.
        density: Weight -> kept share; weights that aren't named are dense.
        samples: How many samples were counted.
    """
    dense = {name: count / samples for name, count in macs.per_weight.items()}
    return Cost(dense, {name: count * density.get(name, 1.0) for name, count in dense.items()}, macs.other / samples)


def training_cost(cost: Cost, cards: Mapping[str, SparsityCard]) -> float:
    """FLOPs to train on one sample: each weight by the regime of the method that masks it, all else dense.

    Args:
        cost: Cost of a forward pass, per sample.
        cards: Weight -> card of the method that masks it.
    """
    dense = SparsityCard("during", "dense_to_dense", "static")  # where nothing is masked, sparse and dense cost are the same
    priced = [(cards.get(name, dense), 2 * macs, 2 * cost.macs_sparse[name]) for name, macs in cost.macs_dense.items()]
    return sum((training_flops(card.cost, a, b, card.update_interval) for card, a, b in priced), 6 * cost.attention_macs)


def size_in_bytes(shape: Sequence[int], kept: int, itemsize: int, two_four: bool = False) -> dict[str, int]:
    """Bytes of one weight in several formats.

    Args:
        shape: Shape of the weight; a kernel counts as a matrix (outputs, everything else).
        kept: Weights that are not 0.
        itemsize: Bytes of one value.
        two_four: Also 2:4, whose metadata are 2 bits per kept value; two of four values are stored.

    Returns:
        ``dense``; ``csr`` with int32 columns and row pointers; ``bitmask``: values and one bit per position; ``2:4`` if asked for.
    """
    number = math.prod(shape)
    sizes = {
        "dense": number * itemsize,
        "csr": kept * (itemsize + 4) + 4 * (shape[0] + 1),
        "bitmask": kept * itemsize + math.ceil(number / 8),
    }
    if two_four:
        sizes["2:4"] = number // 2 * itemsize + math.ceil(number // 2 * 2 / 8)
    return sizes


@dataclass(frozen=True)
class Timing:
    """What was measured, and with what.

    Attributes:
        seconds: Median of one call.
        repeats: Calls that were timed.
        peak_mib: Highest memory during them; what it means is in ``memory``, as in
            :class:`~lit_methods.callbacks.StepCost`.
        memory: ``cuda``, ``resident`` or ``resident, above the earlier peak``.
        kernel: How zeros are treated, such as ``dense-masked`` (they are multiplied like any number), ``csr``, ``2:4``, ``compacted``.
        device: Such as ``cpu`` or the GPU's name.
        batch_size: Samples per call.
    """

    seconds: float
    repeats: int
    peak_mib: float
    memory: str
    kernel: str
    device: str
    batch_size: int


def measure(call: Callable[[], Any], device: torch.device, kernel: str, batch_size: int, repeats: int = 20, warmup: int = 5) -> Timing:
    """Time a call on the device where it runs, without gradients.

    Args:
        call: One forward pass.
        device: On CUDA each call is waited for.
        kernel: How zeros are treated, such as ``dense-masked``.
        batch_size: Samples per call.
        repeats: Timed calls, at least 20.
        warmup: Calls before them.

    Raises:
        ValueError: Fewer than 20 repeats: their median says too little.
    """
    if repeats < 20:
        raise ValueError(f"repeats is {repeats}: give at least 20, or the median says too little")
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    seconds = []
    with torch.no_grad():
        for _ in range(warmup):
            call()
        wait()
        peak = peak_memory(device)
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - start)
    highest, memory = peak()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return Timing(statistics.median(seconds), repeats, round(highest / 2**20, 1), memory, kernel, name, batch_size)


def speedup(dense: Timing, sparse: Timing) -> float:
    """How much faster ``sparse`` is than ``dense``: from timings alone, never from FLOPs (guard 1).

    Raises:
        TypeError: Something that wasn't measured.
        ValueError: Timings on other devices or batch sizes.
    """
    if not isinstance(dense, Timing) or not isinstance(sparse, Timing):
        raise TypeError("a speed-up is a ratio of two timings: pass what measure() returns; a ratio of FLOPs is called flops_ratio")
    if (dense.device, dense.batch_size) != (sparse.device, sparse.batch_size):
        both = f"timings of {dense.device}, batch {dense.batch_size} and of {sparse.device}, batch {sparse.batch_size}"
        raise ValueError(f"{both} don't compare: measure both in the same way")
    return dense.seconds / sparse.seconds
