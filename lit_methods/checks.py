"""Arguments checked in one line each, with messages that say what was given, what was expected, and what to do."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin, get_type_hints


def within(interval: str, /, what: str = "a number", **given: float | None) -> None:
    """Raise unless every number lies in an interval.

    Args:
        interval: As in maths: ``[`` and ``]`` include the end, ``(`` and ``)`` exclude it, ``inf`` is infinity, such as ``"(0, 1]"``.
        what: What the number is, for the message: ``"a share"``, ``"optimiser steps"``.
        **given: Argument's name -> its value; None (not given) passes.

    Raises:
        ValueError: The first value outside, NaN included; the message has its name, itself and the interval.

    Example:
        >>> within("(0, 1]", "a share", density=0.5)
        >>> within("[1, inf)", "optimiser steps", interval=0)
        Traceback (most recent call last):
        ...
        ValueError: interval is 0: give optimiser steps in [1, inf)
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in given.items():
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} is {value}: give {what} in {interval}")


def positive(**given: float | None) -> None:
    """Raise unless every number is above 0 and finite: :func:`within` of ``(0, inf)``.

    Example:
        >>> positive(learning_rate=1e-3, temperature=None)
    """
    within("(0, inf)", "a number", **given)


def share(**given: float | None) -> None:
    """Raise unless every number is a share, 0 to 1: :func:`within` of ``[0, 1]``.

    Example:
        >>> share(ema_decay=0.999)
    """
    within("[0, 1]", "a number", **given)


def at_least(least: int, /, what: str = "a number", **given: float | None) -> None:
    """Raise unless every number is ``least`` or more: :func:`within` of ``[least, inf)``.

    Example:
        >>> at_least(1, "optimiser steps", interval=100)
    """
    within(f"[{least}, inf)", what, **given)


def betas(**given: tuple[float, float]) -> None:
    """Raise unless every pair is Adam's: two decay rates in [0, 1).

    Example:
        >>> betas(betas=(0.9, 0.999))
    """
    for name, pair in given.items():
        if len(pair) != 2:
            raise ValueError(f"{name} is {tuple(pair)}: give two numbers in [0, 1)")
        for number, value in enumerate(pair):
            within("[0, 1)", "a decay rate", **{f"{name}[{number}]": value})


def one_of(choices: Any, /, **given: str | None) -> None:
    """Raise unless every value is one of the choices.

    Args:
        choices: A ``Literal`` type, or the values themselves.
        **given: Argument's name -> its value; None (not given) passes.

    Raises:
        ValueError: The first value that isn't; the message lists all choices.

    Example:
        >>> one_of(("cosine", "linear"), schedule="cosine")
    """
    known: Iterable[str] = get_args(choices) or choices
    for name, value in given.items():
        if value is not None and value not in known:
            raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(str, known))}")


def literals(owner: type, given: Mapping[str, Any], /) -> None:
    """Raise unless every argument of a constructor that is annotated with a ``Literal`` is one of its choices: :func:`one_of` for each.

    Args:
        owner: The class whose ``__init__`` has the annotations.
        given: Argument's name -> its value: ``locals()`` at the head of ``__init__``.

    Example:
        >>> class Model:
        ...     def __init__(self, size: Literal["small", "large"] = "small", depth: int = 3) -> None:
        ...         literals(Model, locals())
        >>> Model(size="huge")
        Traceback (most recent call last):
        ...
        ValueError: size is 'huge': give one of small, large
    """
    for name, hint in get_type_hints(owner.__init__).items():  # type: ignore[misc]
        kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        if name in given and kinds:
            one_of(kinds[0], **{name: given[name]})


def patterns(**given: Any) -> None:
    """Raise if a list of name patterns is a single string, whose letters would each count as a pattern.

    Raises:
        ValueError: Such a string; the message shows the list to write.

    Example:
        >>> patterns(targets=["encoder.*"], skip=[])
    """
    for name, value in given.items():
        if isinstance(value, str):
            raise ValueError(f"{name} is the string {value!r}: give a list of patterns, [{value!r}]")


@contextmanager
def naming(who: str) -> Iterator[None]:
    """Inside, a refusal says who refuses: helpers that several classes share know the mistake, and not whose argument it is.

    Args:
        who: Name that opens the message of a ``ValueError`` or ``TypeError`` which doesn't have it.

    Example:
        >>> with naming("TCM"):
        ...     within("(0, 1]", "a share", density=2.0)
        Traceback (most recent call last):
        ...
        ValueError: TCM: density is 2.0: give a share in (0, 1]
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if type(error) in (ValueError, TypeError) and who not in str(error).replace("-", ""):
            error.args = (f"{who}: {error}",)
        raise


__all__ = ["at_least", "betas", "literals", "naming", "one_of", "patterns", "positive", "share", "within"]
