"""Errors of the datamodules: each names the file, the field and the way out."""

from pathlib import Path


class BrokenRecordError(ValueError):
    """A record on disk that can't be used: truncated, out of range, of the wrong size.

    Args:
        file: The file.
        field: The part of it that is wrong, such as ``points`` or ``labels``.
        problem: What was found, what was expected and what to do, in one sentence.
    """

    def __init__(self, file: Path | str, field: str, problem: str) -> None:
        super().__init__(f"{file}: {field}: {problem}")
        self.file, self.field, self.problem = str(file), field, problem

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Cross the border of a worker process whole."""
        return type(self), (self.file, self.field, self.problem)


class MissingFileError(BrokenRecordError, FileNotFoundError):
    """A file that the data set names and that is not there."""


class WrongRootError(FileNotFoundError):
    """The given root is not the expected data set: the message says what was expected and where to get it."""
