"""What is done with records that can't be used: an error at the first one, or they are left out and counted."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_methods.datamodules.errors import BrokenRecordError

OnBroken = Literal["raise", "skip"]


@dataclass
class Broken:
    """What is done with records that can't be used: the first one raises, or they are counted and left out.

    Attributes:
        on_broken: ``raise`` or ``skip``.
        counts: File -> records that were left out.
        first: Message of the first of them.
    """

    on_broken: OnBroken = "raise"
    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def say(self, file: Path, place: str, problem: str) -> None:
        """Raise, or count.

        Raises:
            BrokenRecordError: With ``on_broken='raise'``.
        """
        error = BrokenRecordError(file, place, problem)
        if self.on_broken == "raise":
            raise error
        self.first = self.first or str(error)
        self.counts[str(file)] += 1

    def report(self) -> None:
        """Warn of what was left out."""
        if self.counts:
            each = ", ".join(f"{number} in {file}" for file, number in self.counts.items())
            rank_zero_warn(f"{sum(self.counts.values())} records are left out: {each}; the first: {self.first}")


__all__ = ["Broken", "OnBroken"]
