"""A closed terminal, a pipe that nobody reads or a full disk behind the output never ends a run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Steady:
    """A text stream that goes on without its reader: what can't be written is dropped, and the first time is told.

    Everything else is the stream's own.

    Args:
        stream: Standard output or standard error.
        told: Where to say that the stream is lost; None: nowhere.
    """

    def __init__(self, stream: Any, told: Any = None) -> None:
        self._stream, self._told, self._lost = stream, told, False

    def write(self, text: str) -> int:
        """Write what can be written."""
        if not self._lost:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:  # an ASCII terminal, or a file name that isn't UTF-8
                return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        with contextlib.suppress(OSError, ValueError):  # no file of the system's, or closed: what is buffered must go somewhere
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        if self._told is not None:
            with contextlib.suppress(OSError, ValueError):
                said = getattr(error, "strerror", None) or error
                print(f"the output can't be written any more ({said}): lit goes on without it", file=self._told, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output(tell: bool) -> Iterator[None]:
    """Let the block go on when standard output or standard error can't be written.

    A descriptor that is closed from the start (``>&-``) is opened on nothing, or the next file that is opened, a checkpoint perhaps,
    would get its number and with it what libraries print.

    Args:
        tell: Say on standard error that standard output is lost; False for a command whose reader may have had enough, as ``head`` has.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    before = sys.stdout, sys.stderr
    sys.stderr = Steady(_there(sys.stderr))  # type: ignore[assignment]
    sys.stdout = Steady(_there(sys.stdout), sys.stderr if tell else None)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _there(stream: Any) -> Any:
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream
