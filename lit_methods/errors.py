"""The one way in which the ``lit`` command tells a user what went wrong."""

import difflib
from collections.abc import Iterable


class CommandError(Exception):
    """A mistake in what the user gave: printed as one short message, without a traceback.

    Args:
        message: What was given, what was expected, what to do; the first line alone must say the reason.
        exit_code: 2 for a mistake in the command or a config, 1 for bad data or a missing library.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` candidates most like ``name``, best first, upper and lower case alike; [] when none is near."""
    spelled = {candidate.lower(): candidate for candidate in sorted(candidates)}
    return [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=count, cutoff=0.55)]


def suggest(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """A second line for a message: the nearest names, or all of them when they are few, or ``otherwise``."""
    names = sorted(set(candidates))
    near = nearest(name, names)
    if near:
        return "\n  nearest: " + ", ".join(near)
    if 0 < len(names) <= 12:
        return "\n  known: " + ", ".join(names)
    return f"\n  {otherwise}" if otherwise else ""
