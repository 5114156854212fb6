"""DSnoT's swaps and the one-shot baselines against plain loops, with the edge cases; statistics that stream and add up."""

import pytest
import torch
from torch import Tensor

from lit_methods.callbacks.sparsity.dsnot.core import dsnot_nm, dsnot_unstructured
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics, input_statistics
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.callbacks.sparsity.one_shot import (
    expected_error,
    initial_score,
    keep_high_scores,
    magnitude_mask,
    parse_pattern,
    sparsegpt,
    wanda_mask,
    wanda_score,
)


def layer(rows: int = 6, columns: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(R, C) weight and (N, T, C) inputs with means of their own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    centre = torch.randn(columns, generator=generator)
    return weight.to(dtype), (torch.randn(4, 10, columns, generator=generator) + centre).to(dtype)


def by_hand(weight: Tensor, x: Tensor, keep: Tensor, cycles: int, threshold: float, same_sign: bool = False) -> Tensor:
    """DSnoT of one row after the other, with lists."""
    s, q = x.sum((0, 1)) / len(x), x.square().sum((0, 1)) / len(x)
    v = torch.stack([sample.var(0, correction=0) for sample in x]).mean(0)
    keep = keep.clone()
    for row in range(len(weight)):
        d = (weight[row] * s).tolist()
        wanda = (weight[row].abs() * q.sqrt()).tolist()
        gone = [c for c in range(len(d)) if not keep[row, c]]
        stays = sorted((c for c in range(len(d)) if keep[row, c]), key=lambda c: wanda[c])
        by_size = sorted(gone, key=lambda c: d[c] / (float(v[c]) + 1e-12))
        lows, highs = [c for c in by_size if d[c] < 0], [c for c in reversed(by_size) if d[c] > 0]
        minus, plus = [c for c in stays if d[c] < 0], [c for c in stays if d[c] > 0]
        error = first = sum(d[c] for c in gone)
        for _ in range(cycles):
            grow, drop = (highs, minus) if error > 0 else (lows, plus)
            if abs(error) <= threshold or not grow or not drop:
                break
            after = error + d[drop[0]] - d[grow[0]]
            if same_sign and (after > 0) != (first > 0):
                break
            keep[row, grow.pop(0)], keep[row, drop.pop(0)] = True, False
            error = after
    return keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cycles", "threshold", "same_sign"), [(5, 0.1, False), (40, 0.0, False), (40, 3.0, True), (0, 0.1, False)])
def test_the_swaps_are_those_of_a_plain_loop(dtype, cycles, threshold, same_sign):
    for seed in range(4):
        weight, x = layer(seed=seed, dtype=dtype)
        statistics = input_statistics(x)
        first = wanda_mask(weight, statistics.square, 0.6)
        found = dsnot_unstructured(weight, statistics, first, cycles, threshold, require_same_sign=same_sign)
        assert torch.equal(found.keep, by_hand(weight, x, first, cycles, threshold, same_sign))
        torch.testing.assert_close(found.error, expected_error(weight, weight * found.keep, statistics), rtol=1e-4, atol=1e-3)
        assert torch.equal(2 * found.swaps, (found.keep != first).sum(1))


def test_a_row_stops_when_its_lists_are_used_up_and_the_sparsity_stays():
    weight, x = layer(columns=8)
    statistics = input_statistics(x)
    first = keep_high_scores(initial_score("magnitude", weight, statistics), 0.5)
    found = dsnot_unstructured(weight, statistics, first, max_cycles=200, update_threshold=0.0)
    assert torch.equal(found.keep.sum(1), first.sum(1))
    assert int(found.swaps.max()) <= 4
    grouped = keep_high_scores(weight.abs(), pattern=(3, 4))
    last = dsnot_nm(weight, statistics, grouped, weight.abs(), (3, 4), max_cycles=200, update_threshold=0.0)
    assert is_nm(weight * last.keep, 1, 4)
    assert torch.equal(last.keep.sum(1), grouped.sum(1))


def test_the_error_falls_and_never_by_more_than_a_swap_beyond_zero():
    weight, x = layer(rows=32, columns=256, seed=3)
    statistics = input_statistics(x)
    first = wanda_mask(weight, statistics.square, 0.5)
    before = expected_error(weight, weight * first, statistics).abs()
    found = dsnot_unstructured(weight, statistics, first, max_cycles=30)
    largest = (weight * statistics.total).abs().amax(1)
    assert (found.error.abs() <= torch.maximum(before, 2 * largest)).all()
    assert found.error.abs().mean() < before.mean() / 3


def test_a_threshold_above_all_errors_and_an_empty_share_change_nothing():
    weight, x = layer()
    statistics = input_statistics(x)
    first = wanda_mask(weight, statistics.square, 0.5)
    assert torch.equal(dsnot_unstructured(weight, statistics, first, update_threshold=1e9).keep, first)
    for share in (0.0, 1.0):
        whole = keep_high_scores(weight.abs(), share)
        assert whole.all() == (share == 0)
        assert torch.equal(dsnot_unstructured(weight, statistics, whole).keep, whole)
    nothing = torch.zeros(0, 8)
    assert dsnot_unstructured(nothing, InputStatistics.of(8), nothing.bool()).keep.shape == (0, 8)


def test_dead_columns_never_come_back():
    weight, x = layer()
    x[..., ::3] = 0
    statistics = input_statistics(x, hessian=True)
    for method in ("wanda", "sparsegpt"):
        first = keep_high_scores(initial_score(method, weight, statistics), 0.5)
        assert not first[:, ::3].any(), "half of the columns go, and the dead third is the cheapest"
        last = dsnot_unstructured(weight, statistics, first, update_threshold=0.0).keep
        assert not last[:, ::3].any()
    new = sparsegpt(weight, statistics.hessian, 0.5)
    assert new.isfinite().all()
    assert not new[:, ::3].any()


def nm_by_hand(weight: Tensor, x: Tensor, keep: Tensor, score: Tensor, m: int, cycles: int, threshold: float) -> Tensor:
    s = x.sum((0, 1)) / len(x)
    v = torch.stack([sample.var(0, correction=0) for sample in x]).mean(0)
    keep = keep.clone()
    for row in range(len(weight)):
        d = (weight[row] * s).tolist()
        gone = [c for c in range(len(d)) if not keep[row, c]]
        free = {c for c in range(len(d)) if keep[row, c]}
        by_size = sorted(gone, key=lambda c: d[c] / (float(v[c]) + 1e-12))
        lows, highs = [c for c in by_size if d[c] < 0], [c for c in reversed(by_size) if d[c] > 0]
        error = first = sum(d[c] for c in gone)
        for _ in range(cycles):
            grow = highs if error > 0 else lows
            if abs(error) <= threshold or not grow:
                break
            group = [c for c in range(grow[0] // m * m, grow[0] // m * m + m) if c in free]
            if not group:
                break
            drop = min(group, key=lambda c: float(score[row, c]))
            after = error + d[drop] - d[grow[0]]
            if (after > 0) != (first > 0):
                break
            keep[row, grow.pop(0)], keep[row, drop] = True, False
            free.discard(drop)
            error = after
    return keep


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 2), (3, 4)])
def test_the_swaps_in_groups_are_those_of_a_plain_loop(pattern):
    changed = 0
    for seed in range(6):
        weight, x = layer(seed=seed, dtype=torch.float64)
        statistics = input_statistics(x)
        score = wanda_score(weight, statistics.square)
        first = keep_high_scores(score, pattern=pattern)
        found = dsnot_nm(weight, statistics, first, score, pattern, max_cycles=30, update_threshold=0.05)
        assert torch.equal(found.keep, nm_by_hand(weight, x, first, score, pattern[1], 30, 0.05))
        assert is_nm(weight * found.keep, pattern[1] - pattern[0], pattern[1])
        changed += int(found.swaps.sum())
    assert changed > 20


def test_statistics_stream_in_any_batches_and_add_up_over_processes():
    x = layer(dtype=torch.float64)[1]
    whole, joint = input_statistics(x, hessian=True), InputStatistics.of(48, True, dtype=torch.float64)
    joint.add(x[:3])
    joint.add(x[3:].reshape(1, 2, 5, 48))  # tokens in two dimensions
    joint.add(x[:0])
    parts = [input_statistics(part, hessian=True) for part in (x[:1], x[1:])]
    added = InputStatistics.from_sums([sum(pair) for pair in zip(*(part.summed() for part in parts), strict=True)])
    wanted = (x.sum((0, 1)) / 4, x.square().sum((0, 1)) / 4, torch.stack([one.var(0, correction=0) for one in x]).mean(0))
    for found in (whole, joint, added):
        for value, want in zip((found.total, found.square, found.variance), wanted, strict=True):
            torch.testing.assert_close(value, want)
        torch.testing.assert_close(found.hessian, 2 / 4 * torch.einsum("ntc,ntd->cd", x, x))
        assert (int(found.samples), int(found.tokens)) == (4, 40)
    half = InputStatistics.of(48)
    half.add(x.bfloat16())
    assert half.total.dtype == torch.float32
    rows = InputStatistics.of(48)
    rows.add(x[0].float())
    assert (int(rows.samples), int(rows.tokens)) == (1, 10), "(B, C): the tokens of one sample"
    with pytest.raises(ValueError, match="48 columns"):
        half.add(torch.zeros(2, 47))


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_magnitude():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(300, 300, generator=generator, dtype=torch.float64) / 10
    x = torch.randn(8, 100, 300, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(10, 300, generator=generator, dtype=torch.float64)
    statistics = input_statistics(x, hessian=True)
    for pattern in (None, (2, 4)):
        new = sparsegpt(weight, statistics.hessian, 0.5, pattern)
        losses = [
            (x @ (weight - other).T).square().mean()
            for other in (
                new,
                weight * wanda_mask(weight, statistics.square, 0.5, pattern),
                weight * magnitude_mask(weight, 0.5, pattern),
            )
        ]
        assert losses[0] < 0.8 * min(losses[1:])
        assert abs((new == 0).double().mean() - 0.5) < 0.005
        assert pattern is None or is_nm(new, 2, 4)


def test_magnitude_takes_one_more_than_the_share_and_ties_go_together():
    weight = torch.arange(1.0, 13).reshape(3, 4)
    assert int((~magnitude_mask(weight, 0.5)).sum()) == 7
    assert not magnitude_mask(torch.ones(3, 4), 0.5).any()
    assert not magnitude_mask(weight, 1.0).any()
    assert torch.equal(keep_high_scores(torch.ones(1, 4), 0.5), torch.tensor([[False, False, True, True]]))


def test_what_does_not_fit_is_refused():
    weight, x = layer(columns=10)
    statistics = input_statistics(x)
    for act in (
        lambda: keep_high_scores(weight, pattern=(2, 4)),
        lambda: magnitude_mask(weight, pattern=(2, 4)),
        lambda: sparsegpt(weight, torch.eye(10), pattern=(2, 4)),
        lambda: dsnot_nm(weight, statistics, weight > 0, weight, (2, 4)),
    ):
        with pytest.raises(ValueError, match="2:4 doesn't fit a layer of 10 inputs"):
            act()
    with pytest.raises(ValueError, match="needs the Hessian"):
        initial_score("sparsegpt", weight, statistics)
    with pytest.raises(ValueError, match="max_cycles"):
        dsnot_unstructured(weight, statistics, weight > 0, max_cycles=-1)
    with pytest.raises(ValueError, match="can't be inverted"):
        sparsegpt(weight, -torch.eye(10))
    for text in ("2", "4:4", "0:4", "a:b"):
        with pytest.raises(ValueError, match="pattern is"):
            parse_pattern(text)
