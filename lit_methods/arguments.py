"""Arguments that a subclass hands on to its base."""

import inspect
from collections.abc import Mapping
from typing import Any


def handed_on(base: type, given: Mapping[str, Any], /, **own: Any) -> dict[str, Any]:
    """The arguments of a constructor that its base's has, too, by name: ``super().__init__(**handed_on(Base, locals()))``.

    A subclass names all of its arguments itself, with types and defaults of its own, since ``--help``, the checks of YAML and ``lit info``
    read them from its signature and docstring. This hands them on without a second list, from which one could be missing.

    Args:
        base: The base class.
        given: Argument's name -> its value: ``locals()`` at the head of ``__init__``.
        **own: What the base gets in place of these, or besides.

    Example:
        >>> class Base:
        ...     def __init__(self, size: int, depth: int = 3, kind: str = "plain") -> None:
        ...         self.given = (size, depth, kind)
        >>> class Model(Base):
        ...     def __init__(self, size: int, depth: int = 5, share: float = 0.5) -> None:
        ...         super().__init__(**handed_on(Base, locals(), kind="fancy"))
        >>> Model(2).given
        (2, 5, 'fancy')
    """
    names = list(inspect.signature(base.__init__).parameters)[1:]  # type: ignore[misc]
    return {name: given[name] for name in names if name in given} | own


__all__ = ["handed_on"]
