"""Where a claim is: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Stages done and in all, what runs, time so far, an estimate of the rest.

    Args:
        total: Number of stages.
        jobs: Stages at a time.
        live: Draw a bar; None: on a terminal.
    """

    def __init__(self, total: int, jobs: int, live: bool | None = None) -> None:
        self.total, self.jobs, self.done, self.cached = total, jobs, 0, 0
        self.started = time.monotonic()
        self.took: dict[str, list[float]] = {}  # seconds by kind of stage
        self.live = sys.stdout.isatty() if live is None else live
        if self.live:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.completed}/{task.total} stages"), BarColumn(), TextColumn("{task.fields[state]}"))
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task("", total=total, state="")
            self.bar.start()

    def kept(self) -> None:
        """A stage was there already."""
        self.done, self.cached = self.done + 1, self.cached + 1

    def begins(self, name: str, why: str = "") -> None:
        """A stage starts; ``why``: what makes an older result of it out of date."""
        if why or not self.live:
            self._line(f"[{self.done}/{self.total}] {name} starts{f' again: {why}' if why else ''}")

    def ends(self, name: str, kind: str, seconds: float, rest: Sequence[str]) -> None:
        """A stage is finished; ``rest``: kinds of those to come, running ones included."""
        self.done += 1
        self.took.setdefault(kind, []).append(seconds)
        self._line(f"[{self.done}/{self.total}] {name}: {seconds:.0f} s{self.times(rest)}")

    def _line(self, text: str) -> None:
        if self.live:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def times(self, rest: Sequence[str]) -> str:
        """Time so far, and an estimate of the rest."""
        left = estimate(self.took, rest, self.jobs)
        about = f", about {clock(left)} to go" if left else ""
        return f", {clock(time.monotonic() - self.started)} so far{about}"

    def shows(self, running: Sequence[str], rest: Sequence[str]) -> None:
        """Draw the bar anew, with what runs and an estimate of the rest."""
        if self.live:
            self.bar.update(self.task, completed=self.done, state=f"{', '.join(running) or 'waiting'}{self.times(rest)}")

    def close(self) -> None:
        """Take the bar away."""
        if self.live:
            self.bar.stop()


def estimate(took: Mapping[str, Sequence[float]], rest: Sequence[str], jobs: int) -> float:
    """Seconds until the rest is done: each stage takes the mean of its kind, or of all kinds where none of its kind is done; 0: unknown."""
    means = {kind: sum(values) / len(values) for kind, values in took.items()}
    if not means:
        return 0.0
    overall = sum(means.values()) / len(means)
    return sum(means.get(kind, overall) for kind in rest) / jobs
