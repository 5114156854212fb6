"""Documents, queries and judgements in the layouts of BEIR and TREC."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.broken import Broken, OnBroken
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.reading import file_size, read_text
from lit_methods.datamodules.tables import plain
from lit_methods.datamodules.text.text import made_up_text

Ints = NDArray[np.int64]
LAYOUTS = "BEIR's corpus.jsonl, queries.jsonl and qrels/<split>.tsv, or TREC's doc-text.trec, query-text.trec and qrels"


class Texts(Sequence[str]):
    """Strings in one block of bytes: millions take little more room than their letters, and worker processes share them.

    Args:
        texts: The strings; what UTF-8 can't hold becomes a question mark.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode("utf-8", errors="replace") for text in texts]
        self.starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self.block = b"".join(parts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        place = index % len(self)
        return self.block[self.starts[place] : self.starts[place + 1]].decode("utf-8")


@dataclass(frozen=True)
class Collection:
    """A collection, in memory.

    Attributes:
        document_names: Names of the N documents; their place is their number.
        titles: N titles, "" where there is none.
        bodies: N texts without their titles.
        query_names: Names of the Q queries.
        queries: Q texts.
        judgements: Split -> (J, 3): query, document, grade.
    """

    document_names: list[str]
    titles: Texts
    bodies: Texts
    query_names: list[str]
    queries: Texts
    judgements: dict[str, Ints]

    def document(self, number: int) -> str:
        """Title, a blank, and text, as BEIR has it."""
        return f"{self.titles[number]} {self.bodies[number]}".strip()


def made_collection(documents: int = 60, splits: Sequence[str] = ("train", "dev", "test")) -> Collection:
    """Documents of three sentences of a small grammar; the first is the title, and the second, as a question, is a query for it."""
    lines = made_up_text(3 * documents).splitlines()
    titles, first, second = (lines[place::3] for place in range(3))
    bodies = [" ".join(both) for both in zip(first, second, strict=True)]
    names, asked = ([f"{letter}{k}" for k in range(documents)] for letter in "dq")
    numbers = np.arange(documents)
    judgements = np.stack([numbers, numbers, np.ones_like(numbers)], axis=1)
    each = {split: judgements[place :: len(splits)] for place, split in enumerate(splits)}
    return Collection(names, Texts(titles), Texts(bodies), asked, Texts(line.rstrip(".") + "?" for line in first), each)


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def lines_of(file: Path, broken: Broken) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and text of the lines that aren't blank.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no file, or may not be read.
    """
    file_size(file, "file", "unpack the data set again")
    with file.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                broken.say(file, f"line {number}", f"byte {error.start} isn't UTF-8: convert the file, or set on_broken to skip")
                continue
            if text.strip():
                yield number, text


def records_of(file: Path, broken: Broken) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file with a JSON object in each line."""
    for number, text in lines_of(file, broken):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
            broken.say(file, f"line {number}", f"is no JSON ({error}): the file is damaged, or has more than one object in a line")
            continue
        if not isinstance(record, dict):
            broken.say(file, f"line {number}", f"is a {type(record).__name__}, expected an object such as {{'_id': ..., 'text': ...}}")
            continue
        yield number, record


def _named_texts(file: Path, broken: Broken, what: str) -> tuple[list[str], list[str], list[str]]:
    """Names, titles and texts of ``corpus.jsonl`` or ``queries.jsonl``."""
    names, titles, texts, known = [], [], [], set()
    for number, record in records_of(file, broken):
        name, title, text = record.get("_id"), record.get("title") or "", record.get("text")
        place = f"line {number}"
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            broken.say(file, f"{place}, _id", f"{name!r}, expected a name")
            continue
        name = str(name)
        if text is None and not title:
            broken.say(file, f"{place}, text", f"{what} {name!r} has none: found {', '.join(sorted(record)) or 'nothing'}")
            continue
        text = "" if text is None else text
        if not isinstance(text, str) or not isinstance(title, str):
            wrong = "title" if isinstance(text, str) else "text"
            broken.say(file, f"{place}, {wrong}", f"is a {type(record[wrong]).__name__} in {what} {name!r}, expected a string")
        elif re.search(r"\s", name):
            broken.say(file, f"{place}, _id", f"{name!r} has a blank in it, which no run file can hold: rename the {what}")
        elif name in known:
            broken.say(file, f"{place}, _id", f"{name!r} stands twice: names are unique")
        elif not (title + text).strip():
            broken.say(file, f"{place}, text", f"{what} {name!r} is empty: leave it out, or set on_broken to skip")
        else:
            known.add(name)
            names.append(name)
            titles.append(title.strip())
            texts.append(text.strip())
    if not names:
        raise BrokenRecordError(file, "lines", f"the file has no {what}: unpack the data set again")
    return names, titles, texts


class _Judgements:
    """Collects (query, document, grade) by names."""

    def __init__(self, queries: Sequence[str], documents: Sequence[str], broken: Broken) -> None:
        self._queries, self._documents = ({name: place for place, name in enumerate(names)} for names in (queries, documents))
        self._broken = broken

    def read(self, file: Path, rows: Iterable[tuple[int, str, str, str]]) -> Ints:
        """(J, 3) of line number, query, document and grade."""
        found: dict[tuple[int, int], int] = {}
        for line, query, document, grade in rows:
            place = f"line {line}"
            try:
                value = float(grade)
                worth = int(value)
            except (ValueError, OverflowError):
                value, worth = 0.5, 0
            if query not in self._queries:
                self._broken.say(file, f"{place}, query", f"{query!r} is no query of the collection: download both again, or skip it")
            elif document not in self._documents:
                self._broken.say(
                    file, f"{place}, document", f"{document!r} is no document of the collection: download both again, or skip it"
                )
            elif value != worth or abs(worth) >= 1 << 31:
                self._broken.say(file, f"{place}, score", f"{grade[:40]!r}, expected a whole number of 32 bits")
            else:
                pair = self._queries[query], self._documents[document]
                if found.setdefault(pair, worth) != worth:
                    self._broken.say(
                        file, f"{place}, score", f"{query} {document} is graded {found[pair]} in a line before, and {worth} here"
                    )
        if not any(grade > 0 for grade in found.values()):
            raise BrokenRecordError(file, "lines", "no document is relevant for a query: unpack the data set again")
        return np.array([(*pair, grade) for pair, grade in found.items()], dtype=np.int64)


def _qrels_rows(file: Path, broken: Broken) -> Iterator[tuple[int, str, str, str]]:
    """Rows of BEIR's ``qrels/<split>.tsv``."""
    places: list[int] | None = None
    wanted = ("query-id", "corpus-id", "score")
    for number, text in lines_of(file, broken):
        cells = text.rstrip("\r\n").split("\t")
        if places is None:
            names = [plain(cell) for cell in cells]
            missing = [name for name in wanted if plain(name) not in names]
            if missing:
                raise BrokenRecordError(
                    file, "header", f"the column {missing[0]} is missing: found {', '.join(map(repr, cells))}, expected {', '.join(wanted)}"
                )
            places = [names.index(plain(name)) for name in wanted]
        elif len(cells) <= max(places):
            broken.say(file, f"line {number}", f"has {len(cells)} columns, expected {', '.join(wanted)} with tabs between them")
        else:
            query, document, grade = (cells[place].strip() for place in places)
            yield number, query, document, grade


def read_beir(root: Path, broken: Broken) -> Collection:
    """A data set in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

    Args:
        root: Its folder.
        broken: What is done with records that can't be used.

    Raises:
        WrongRootError: A file is missing.
        BrokenRecordError: A record that can't be used; a file without any record; a header without a column that is needed.
    """
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (root / name).is_file():
            raise WrongRootError(f"root={str(root)!r} has no {name}: give a folder with {LAYOUTS}")
    names, titles, bodies = _named_texts(root / "corpus.jsonl", broken, "document")
    query_names, _, queries = _named_texts(root / "queries.jsonl", broken, "query")
    judged = _Judgements(query_names, names, broken)
    files = listed(root / "qrels", "*.tsv") if (root / "qrels").is_dir() else []
    judgements = {file.stem: judged.read(file, _qrels_rows(file, broken)) for file in files}
    # many corpora repeat the title at the head of the text
    bodies = [body[len(title) :].strip() or body if body.startswith(title) else body for title, body in zip(titles, bodies, strict=True)]
    return Collection(names, Texts(titles), Texts(bodies), query_names, Texts(queries), judgements)


def _tagged(file: Path, outer: str, name: str, broken: Broken) -> Iterator[tuple[str, str]]:
    """Name and text of the elements of a TREC file; ``name`` is the tag of the name."""
    text = read_text(file)
    known: set[str] = set()
    for match in re.finditer(rf"<{outer}>(.*?)(</{outer}>|(?=<{outer}>)|\Z)", text, flags=re.S | re.I):
        line = text.count("\n", 0, match.start()) + 1
        found = re.search(rf"<{name}>\s*(?:Number:)?\s*([^<\s]+)\s*(?:</{name}>)?(.*)", match[1], flags=re.S | re.I)
        if not match[2]:
            broken.say(file, f"line {line}", f"<{outer}> isn't closed: the file is truncated")
        elif found is None:
            broken.say(file, f"line {line}, {name}", f"this <{outer}> has no <{name}>")
        else:
            words = " ".join(re.sub(r"<[^>]*>", " ", found[2]).split())
            if found[1] in known:
                broken.say(file, f"line {line}, {name}", f"{found[1]!r} stands twice: names are unique")
            elif not words:
                broken.say(file, f"line {line}, text", f"{found[1]!r} is empty: leave it out, or set on_broken to skip")
            else:
                known.add(found[1])
                yield found[1], words
    if not known:
        raise BrokenRecordError(file, f"<{outer}>", "the file has none that can be used: give TREC's format")


def _trec_rows(file: Path, broken: Broken) -> Iterator[tuple[int, str, str, str]]:
    for number, text in lines_of(file, broken):
        cells = text.split()
        if len(cells) != 4:
            broken.say(file, f"line {number}", f"has {len(cells)} columns, expected query, 0, document, grade")
        else:
            yield number, cells[0], cells[2], cells[3]


def read_trec(root: Path, broken: Broken) -> Collection:
    """A data set in TREC's layout, as Terrier gives Vaswani: ``doc-text.trec``, ``query-text.trec`` and ``qrels``, which are for test.

    Args:
        root: Its folder.
        broken: What is done with records that can't be used.

    Raises:
        WrongRootError: A file is missing.
        BrokenRecordError: A record that can't be used.
    """
    for name in ("doc-text.trec", "query-text.trec", "qrels"):
        if not (root / name).is_file():
            raise WrongRootError(f"root={str(root)!r} has no {name}: give a folder with {LAYOUTS}")
    documents = list(_tagged(root / "doc-text.trec", "DOC", "DOCNO", broken))
    queries = list(_tagged(root / "query-text.trec", "top", "num", broken))
    names, query_names = [name for name, _ in documents], [name for name, _ in queries]
    judgements = _Judgements(query_names, names, broken).read(root / "qrels", _trec_rows(root / "qrels", broken))
    bodies, texts = Texts(text for _, text in documents), Texts(text for _, text in queries)
    return Collection(names, Texts([""] * len(names)), bodies, query_names, texts, {"test": judgements})


def read_collection(root: Path, broken: Broken) -> Collection:
    """A data set in BEIR's or TREC's layout, whichever files are there.

    Raises:
        WrongRootError: Neither is there.
    """
    if (root / "corpus.jsonl").is_file():
        return read_beir(root, broken)
    if (root / "doc-text.trec").is_file():
        return read_trec(root, broken)
    raise WrongRootError(f"root={str(root)!r} is no collection: give a folder with {LAYOUTS}")


__all__ = [
    "Broken", "Collection", "OnBroken", "Texts", "lines_of", "made_collection", "read_beir", "read_collection", "read_trec", "records_of",
]  # fmt: skip
