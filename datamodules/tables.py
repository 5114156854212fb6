"""Tables in text files: columns go by the names in the header, never by their place, and what is wrong is said with file and line.

Official files without a header are read by place. A first line is a header if none of its cells is a number.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import read_text


def plain(name: str) -> str:
    """A column's name in small letters and digits alone, without RecBole's ``:type``: ``User-ID`` and ``user_id:token`` are ``userid``."""
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())


def is_number(cell: str) -> bool:
    """Whether a cell can be read as a number, in quotation marks or without."""
    try:
        float(cell.strip().strip('"'))
    except ValueError:
        return False
    return True


def is_header(cells: Sequence[str]) -> bool:
    """Whether the cells of a first line are names: none of them is a number."""
    return bool(cells) and not any(map(is_number, cells))


def find_columns(file: Path, header: Sequence[str], wanted: Mapping[str, Sequence[str]], optional: Sequence[str] = ()) -> dict[str, int]:
    """Where the wanted columns stand.

    Args:
        file: The table, for the message.
        header: Cells of its first line.
        wanted: What is wanted -> names that it may have, as :func:`plain` writes them.
        optional: What may be missing.

    Returns:
        What is wanted -> place from 0; without what is optional and missing.

    Raises:
        BrokenRecordError: A column is missing, or two have a fitting name; the message tells what was found and what was expected.
    """
    names, found = [plain(name) for name in header], {}
    shown = ", ".join(repr(name.strip()) for name in header) or "none"
    for want, fitting in wanted.items():
        places = [place for place, name in enumerate(names) if name in fitting]
        if len(places) > 1:
            raise BrokenRecordError(file, "header", f"several columns may be {want} in {shown}: leave one")
        if not places and want not in optional:
            also = f" (also called {', '.join(name for name in fitting if name != plain(want))})" if len(fitting) > 1 else ""
            raise BrokenRecordError(file, "header", f"the column {want} is missing{also}: found {shown}, expected {', '.join(wanted)}")
        if places:
            found[want] = places[0]
    return found


def text_of(file: Path, missing: str, field: str = "file") -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Args:
        file: Any text file.
        missing: What to do where there is no such file, for the message.
        field: What the file is to the data set, for messages.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It isn't UTF-8, no file, or may not be read.
    """
    return read_text(file, field, missing)


def rows_of(file: Path, missing: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1 and cells of a table, empty lines left out.

    Args:
        file: The table.
        missing: What to do where there is no such file, for the message.
        delimiter: What stands between cells.
        quoting: Of the module ``csv``.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no text, or a line can't be split.
    """
    reader = csv.reader(text_of(file, missing).splitlines(keepends=True), delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as problem:
        raise BrokenRecordError(file, f"line {reader.line_num}", f"can't be split into cells ({problem}): copy the file again") from problem


def named_rows(
    file: Path, columns: Sequence[str], missing: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the cells of the named columns, in the order of ``columns``; a cell that a line lacks is empty.

    Args:
        file: A table whose first line names its columns.
        columns: Their names; upper and lower case and signs don't count.
        missing: What to do where there is no such file, for the message.
        delimiter: What stands between cells.
        quoting: Of the module ``csv``.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A column is missing, or a line can't be split.
    """
    places: list[int] | None = None
    for line, row in rows_of(file, missing, delimiter, quoting):
        if places is None:
            found = find_columns(file, row, {name: (plain(name),) for name in columns})
            places = [found[name] for name in columns]
        else:
            yield line, [row[place] if place < len(row) else "" for place in places]
    if places is None:
        raise BrokenRecordError(file, "header", f"the file is empty, expected the columns {', '.join(columns)}: copy it again")


__all__ = ["find_columns", "is_header", "is_number", "named_rows", "plain", "rows_of", "text_of"]
