"""The verdict's arithmetic."""

import math

import pytest
from scipy import stats

from lit_methods.claims import judge
from lit_methods.claims.verdict import t_interval


def test_a_clear_advantage_holds_and_the_gate_counts() -> None:
    verdict = judge([0.30, 0.32, 0.28], [0.08, 0.09, 0.07], gate=0.1)
    assert verdict.verdict == "holds"
    assert verdict.better == 3
    assert verdict.mean == pytest.approx(0.22)
    assert verdict.low < verdict.mean < verdict.high
    assert judge([0.30, 0.32, 0.28], [0.08, 0.09, 0.07], gate=0.25).verdict == "does not hold"


def test_noise_is_undecided_and_a_loss_does_not_hold() -> None:
    assert judge([0.3, 0.1, 0.2], [0.2, 0.2, 0.19]).verdict == "undecided"
    assert judge([0.1, 0.11, 0.1], [0.2, 0.21, 0.2]).verdict == "does not hold"


def test_where_lower_is_better_the_signs_are_those_of_the_metric() -> None:
    verdict = judge([0.1, 0.11, 0.1], [0.2, 0.22, 0.2], higher=False, gate=0.05)
    assert verdict.verdict == "holds"
    assert verdict.low < verdict.mean < verdict.high < 0
    assert verdict.better == 3
    assert judge([0.2, 0.22, 0.2], [0.1, 0.11, 0.1], higher=False).verdict == "does not hold"


def test_the_interval_is_student_t_of_the_paired_differences() -> None:
    method, baseline = [1.0, 2.5, 3.0, 2.0], [0.5, 1.0, 2.0, 2.5]
    verdict = judge(method, baseline)
    expected = stats.ttest_rel(method, baseline).confidence_interval(0.95)
    assert (verdict.low, verdict.high) == pytest.approx((expected.low, expected.high))
    assert verdict.verdict == "undecided"


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert judge([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).verdict == "holds"
    same = judge([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.verdict, same.mean, same.low, same.high, same.better) == ("undecided", 0.0, 0.0, 0.0, 0)


def test_too_few_seeds_and_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        judge([1, 2], [0, 0])
    with pytest.raises(ValueError, match="at least 3"):
        judge([1, 2, 3], [0, 0])
    with pytest.raises(ValueError, match="finite"):
        judge([1.0, math.nan, 2.0], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])
