"""Masks, densities, schedules and mask updates against slow, plain computations."""

import math

import pytest
import torch

from lit_methods.callbacks.sparsity.density import exact_counts, layer_density
from lit_methods.callbacks.sparsity.drop_grow import drop_below_threshold, drop_smallest, grow, target_count, update_mask
from lit_methods.callbacks.sparsity.masks import is_nm, keep_largest, nm_mask, random_mask
from lit_methods.callbacks.sparsity.schedules import cosine_drop, cubic_sparsity, exponential_drop, is_update_step

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_sorting(values: list[float], count: int) -> list[bool]:
    """The ``count`` largest, of equals the first: Python's sort is stable."""
    kept = sorted(range(len(values)), key=lambda index: -values[index])[:count]
    return [index in kept for index in range(len(values))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_keep_largest_is_exact_with_ties(dtype, count):
    score = torch.tensor([3, 1, 3, 0, 2, 2, 2, 5, 0, 0, 1, -math.inf], dtype=dtype).view(3, 4)
    assert keep_largest(score, count).flatten().tolist() == by_sorting(score.flatten().tolist(), count)


def test_keep_largest_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="count is 5"):
        keep_largest(torch.zeros(2, 2), 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 8), (1, 16), (5, 16), (1, 32), (0, 4), (4, 4), (1, 2)])
def test_nm_mask_keeps_the_largest_of_each_group_and_the_first_of_equals(n, m, dtype):
    weight = torch.randint(-3, 4, (5, 64), generator=torch.Generator().manual_seed(n * m)).to(dtype)  # many ties
    mask = nm_mask(weight, n, m)
    for row, kept in zip(weight.float().abs().tolist(), mask.tolist(), strict=True):
        for start in range(0, 64, m):
            assert kept[start : start + m] == by_sorting(row[start : start + m], n)
    assert is_nm(weight * mask, n, m)
    assert is_nm(weight, n, m) == bool(mask.logical_or(weight == 0).all())


def test_nm_mask_runs_over_outputs_and_over_input_channels():
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    rows = nm_mask(weight, 2, 4)
    assert (rows.view(8, 4, 4, 3, 3).sum(2) == 2).all()
    torch.testing.assert_close(rows, nm_mask(weight.permute(0, 2, 3, 1).reshape(-1, 16), 2, 4).view(8, 3, 3, 16).permute(0, 3, 1, 2))
    assert (nm_mask(weight, 1, 8, dim=0).sum(0) == 1).all()
    equal = nm_mask(torch.ones(2, 8), 2, 4)
    assert equal.tolist() == [[True, True, False, False] * 2] * 2


def test_groups_never_cross_rows():
    with pytest.raises(ValueError, match="dimension 1 has 6 entries"):
        nm_mask(torch.zeros(4, 6), 2, 4)
    with pytest.raises(ValueError, match="5:4"):
        nm_mask(torch.zeros(4, 4), 5, 4)
    assert not is_nm(torch.ones(4, 6), 2, 4)


def test_random_masks():
    draw = [random_mask((200, 50), 0.3, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*draw)
    assert abs(draw[0].float().mean() - 0.3) < 4 * math.sqrt(0.21 / 10_000)
    assert random_mask((200, 50), 0.3, torch.Generator().manual_seed(4), exact=True).sum() == 3000
    with pytest.raises(ValueError, match=r"density is 1\.2"):
        random_mask((2, 2), 1.2, torch.Generator())


SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", ["uniform", "er", "erk", "erk_plus", "uniform_plus"])
def test_every_distribution_spends_the_budget(method, density):
    sizes = [math.prod(shape) for shape in SHAPES]
    if method.endswith("_plus") and density < 0.1:  # the fixed layers need more than that
        with pytest.raises(ValueError, match=r"leaves layer \d of shape .* no weight"):
            layer_density(SHAPES, density, method)
        return
    shares = layer_density(SHAPES, density, method)
    assert all(0 <= share <= 1 for share in shares)
    if not (method == "uniform_plus" and density == 1.0):
        assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-9)
    assert sum(exact_counts(sizes, shares)) == round(sum(share * size for share, size in zip(shares, sizes, strict=True)))


def test_erk_favours_small_layers_and_caps_them():
    shares = layer_density(SHAPES, 0.1, "erk")
    assert shares[0] > shares[1] > shares[2]
    ratio = [sum(shape) / math.prod(shape) for shape in SHAPES]
    assert shares[3] == 1.0
    assert [share / shares[2] for share in shares[:3]] == pytest.approx([r / ratio[2] for r in ratio[:3]])
    assert layer_density(SHAPES, 0.5, "erk")[0] == 1.0
    assert layer_density([(8, 8), (8, 8)], 0.4, "erk") == pytest.approx([0.4, 0.4])
    with pytest.raises(ValueError, match="method is 'ERQ'"):
        layer_density(SHAPES, 0.1, "ERQ")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density is 0"):
        layer_density(SHAPES, 0, "erk")


@pytest.mark.parametrize("fixed", [None, 0.3])
@pytest.mark.parametrize("method", ["uniform", "er", "erk", "erk_plus", "uniform_plus"])
def test_a_density_that_cuts_the_network_is_refused_and_the_smallest_one_told(method, fixed):
    sizes = [math.prod(shape) for shape in SHAPES]
    with pytest.raises(ValueError, match=r"density 1e-05 leaves (\w+) of shape \(.*\) no weight by") as caught:
        layer_density(SHAPES, 1e-5, method, last_density=fixed, names=["one", "two", "three", "four"])
    smallest = float(str(caught.value).split("at least ")[1])
    counts = exact_counts(sizes, layer_density(SHAPES, smallest, method, last_density=fixed))
    assert min(counts) >= 1
    with pytest.raises(ValueError, match="no weight"):
        layer_density(SHAPES, smallest - 2e-6, method, last_density=fixed)


def test_a_budget_that_the_fixed_layers_eat_up_is_refused():
    shapes = [(20, 10), (20, 20), (5, 20)]
    for density in (100 / 700, 100.5 / 700):  # what the dense classifier takes, and half a weight more
        with pytest.raises(ValueError, match=r"leaves layer 0 of shape \(20, 10\)"):
            layer_density(shapes, density, "erk_plus")
    with pytest.raises(ValueError, match="no density does: change last_density"):
        layer_density([(20, 10), (1, 2)], 0.5, "erk_plus", last_density=0.4)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(48, 48), (48, 48, 3)])
def test_all_ways_to_an_nm_mask_are_equal_ties_included(shape, dim):
    weight = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(2)).float()
    for m in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        for n in {0, 1, 2, m // 2, m - 1, m} & set(range(m + 1)):
            groups = weight.abs().movedim(dim, -1).unflatten(-1, (-1, m))
            order = groups.argsort(dim=-1, descending=True, stable=True)
            expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(-2).movedim(-1, dim)
            assert torch.equal(nm_mask(weight, n, m, dim), expected), (n, m)


@pytest.mark.parametrize("high", [3, 10**6])
def test_the_largest_are_kept_with_and_without_ties(high):
    score = torch.randint(0, high, (40, 50), generator=torch.Generator().manual_seed(3)).float()
    for count in (0, 1, 7, 1000, 1999, 2000):
        expected = torch.zeros(2000, dtype=torch.bool)
        expected[score.flatten().argsort(descending=True, stable=True)[:count]] = True
        assert torch.equal(keep_largest(score, count).flatten(), expected)


def test_exact_counts_round_to_the_total():
    assert exact_counts([3, 3, 3], [0.5, 0.5, 0.5]) == [2, 1, 1]
    assert exact_counts([10, 4], [0.3, 1.0]) == [3, 4]


def test_schedules():
    assert [cubic_sparsity(step, 10, 20, 0.2, 0.8) for step in (0, 10, 20, 30)] == [0.2, 0.2, 0.8, 0.8]
    assert cubic_sparsity(15, 10, 20, 0.0, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic_sparsity(5, 5, 5, 0.1, 0.7) == 0.7
    assert cosine_drop(0, 0.5, 0, 100) == 0.5
    assert cosine_drop(50, 0.5, 0, 100, floor=0.1) == pytest.approx(0.3)
    assert cosine_drop(150, 0.5, 0, 100) == 0
    assert exponential_drop(50, 0.5, 0, 100, 2.0) == pytest.approx(0.5 / math.e)
    assert [step for step in range(1, 12) if is_update_step(step, 2, 2, 10)] == [4, 6, 8]


def test_growth_is_never_wasted_on_active_positions():
    mask = torch.tensor([True, False, True, False, False])
    grown = grow(mask, torch.tensor([9.0, 0.0, 9.0, 0.0, 1.0]), 2)
    assert grown.tolist() == [True, True, True, False, True]
    assert grow(mask, torch.zeros(5), 99).all()


def test_active_zeros_stay_before_inactive_ones():
    weight = torch.tensor([0.0, 0.0, 2.0, -1.0])
    mask = torch.tensor([False, True, True, True])
    assert drop_smallest(weight, mask, 0.34).tolist() == [False, False, True, True]
    assert drop_smallest(weight, mask, 0.0).tolist() == mask.tolist()
    assert drop_below_threshold(weight, mask, 0.5).tolist() == [False, False, True, False]
    assert drop_below_threshold(weight, mask, 0.0) is mask


def test_an_update_keeps_the_count_and_may_regrow():
    generator = torch.Generator().manual_seed(1)
    mask = keep_largest(torch.rand(20, 30, generator=generator), 60)
    weight = torch.randn(20, 30, generator=generator) * mask
    score = torch.rand(20, 30, generator=generator)
    new = update_mask(weight, mask, score, 0.3, 60)
    assert new.sum() == 60
    kept = drop_smallest(weight, mask, 0.3)
    assert (new & kept).sum() == 60 - 18
    expected = by_sorting(score.masked_fill(kept, -1).flatten().tolist(), 18)
    assert (new & ~kept).flatten().tolist() == expected
    assert target_count(600, 0.9) == 60
