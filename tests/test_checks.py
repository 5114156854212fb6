"""Argument checks: what passes, what is refused, and with which words."""

import math
from typing import Literal

import pytest

from lit_methods import checks


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 1, 0.5), (-1e-9, 1 + 1e-9, math.nan, math.inf)),
        ("(0, 1]", (1e-9, 1), (0, 2)),
        ("[1, inf)", (1, 10**9), (0, math.inf)),
        ("(-inf, 0)", (-5,), (0, -math.inf)),
    ],
)
def test_the_ends_of_an_interval_count_as_written(interval: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    checks.within(interval, **{f"x{i}": value for i, value in enumerate(inside)}, none=None)
    for value in outside:
        with pytest.raises(ValueError) as error:
            checks.within(interval, "a share", fine=inside[0], density=value)
        assert str(error.value) == f"density is {value}: give a share in {interval}"


def test_the_short_forms() -> None:
    checks.positive(a=1e-12, b=None)
    checks.share(a=0.0, b=1.0)
    checks.at_least(2, a=2)
    for check, value in ((checks.positive, 0.0), (checks.positive, math.inf), (checks.share, 1.1)):
        with pytest.raises(ValueError, match=f"^rate is {value}: give a number in"):
            check(rate=value)
    with pytest.raises(ValueError, match=r"^k is 1: give a number in \[2, inf\)$"):
        checks.at_least(2, k=1)


def test_choices_come_from_a_literal_or_a_list() -> None:
    mode = Literal["adam", "sgd"]
    checks.one_of(mode, optimizer="adam", other=None)
    for choices in (mode, ("adam", "sgd")):
        with pytest.raises(ValueError, match=r"^optimizer is 'adm': give one of adam, sgd$"):
            checks.one_of(choices, optimizer="adm")


def test_a_string_is_no_list_of_patterns() -> None:
    checks.patterns(targets=["a"], skip=())
    with pytest.raises(ValueError, match=r"^skip is the string 'a.\*': give a list of patterns, \['a.\*'\]$"):
        checks.patterns(targets=["a"], skip="a.*")


def test_a_refusal_says_who_refuses() -> None:
    with pytest.raises(ValueError, match=r"^TCM: rate is 0: give a number"), checks.naming("TCM"):
        checks.positive(rate=0)
    with pytest.raises(TypeError, match=r"^TCM needs classes$"), checks.naming("TCM"):
        raise TypeError("TCM needs classes")
    with pytest.raises(UnicodeDecodeError), checks.naming("TCM"):
        b"\xff".decode()
    with pytest.raises(KeyError, match=r"^'rate'$"), checks.naming("TCM"):
        raise KeyError("rate")
