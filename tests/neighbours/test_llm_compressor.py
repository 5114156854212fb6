"""llm-compressor itself: Wanda's and SparseGPT's masks are those of ours, and so are SparseGPT's weights.

    pip install accelerate datasets compressed-tensors loguru && pip install --no-deps llmcompressor

It isn't in the extra "peers", as its releases ask for older torch and transformers than other peers do. Tried with 0.14.0.1.
"""

import pytest
import torch
from torch import Tensor, nn

from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.one_shot import parse_pattern, sparsegpt, wanda_mask

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: see the head of this file")
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

pytestmark = pytest.mark.slow
CASES = [(0.5, None), (0.6, None), (0.5, "2:4"), (0.5, "4:8")]


def drawn(seed: int = 0) -> tuple[nn.Linear, list[Tensor]]:
    """A layer of 256 inputs, more than one of SparseGPT's blocks, and calls of four windows with inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 256, generator=draw))
    mix = torch.randn(256, 256, generator=draw) / 16 + torch.eye(256)
    return layer, [torch.randn(4, 96, 256, generator=draw) @ mix for _ in range(3)]


def measured(calls: list[Tensor]) -> InputStatistics:
    statistics = InputStatistics.of(256, hessian=True)
    for inputs in calls:
        statistics.add(inputs)
    return statistics


@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_wanda_keeps_the_same_weights(sparsity: float, pattern: str | None) -> None:
    layer, calls = drawn()
    scalars, seen = wanda_sparsify.make_empty_row_scalars(layer), 0
    for inputs in calls:
        scalars, seen = wanda_sparsify.accumulate_row_scalars(inputs, layer, scalars, seen)
    n, m = parse_pattern(pattern) or (0, 0)
    theirs = wanda_sparsify.sparsify_weight(layer, {layer: scalars}, sparsity, n, m) != 0
    ours = wanda_mask(layer.weight.detach(), measured(calls).square, sparsity, parse_pattern(pattern))
    assert torch.equal(ours, theirs)
    assert ours.float().mean() == pytest.approx(1 - sparsity, abs=0.005)


@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_sparsegpt_keeps_the_same_weights_and_moves_them_alike(sparsity: float, pattern: str | None) -> None:
    layer, calls = drawn()
    hessian, seen = sgpt_sparsify.make_empty_hessian(layer), 0
    for inputs in calls:
        hessian, seen = sgpt_sparsify.accumulate_hessian(inputs, layer, hessian, seen)
    n, m = parse_pattern(pattern) or (0, 0)
    _, theirs = sgpt_sparsify.sparsify_weight(layer, {layer: hessian}, sparsity, n, m, 128, 0.01, False)
    statistics = measured(calls)
    assert statistics.hessian is not None
    ours = sparsegpt(layer.weight.detach(), statistics.hessian, sparsity, parse_pattern(pattern))
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)
