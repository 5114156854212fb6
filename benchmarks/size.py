"""How much code there is: lines without blanks, comments and docstrings, per folder, per family, and for the largest files.

Run ``make size``, or ``python benchmarks/size.py`` with ``--json`` for the figures alone.
"""

import ast
import io
import json
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lit_methods", "callbacks", "datamodules", "benchmarks", "docs", "tests")
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)


def code_lines(text: str) -> int:
    """Lines of Python that hold code: none of blanks, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def measure(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Code lines per folder, per family (second level of the three packages) and per file, largest first."""
    files = {
        path.relative_to(root).as_posix(): code_lines(path.read_text(encoding="utf-8"))
        for name in FOLDERS
        for path in (root / name).rglob("*.py")
    }
    folders: Counter[str] = Counter()
    families: Counter[str] = Counter()
    for path, count in files.items():
        parts = path.split("/")
        folders[parts[0]] += count
        if parts[0] in FOLDERS[:3]:
            families["/".join(parts[: 2 if len(parts) > 2 else 1])] += count
    return {"folders": dict(folders), "families": dict(families.most_common()), "files": dict(Counter(files).most_common())}


def main() -> None:
    """Print the tables."""
    sizes = measure()
    if "--json" in sys.argv:
        print(json.dumps(sizes, indent=1))
        return
    package = sum(sizes["folders"].get(name, 0) for name in FOLDERS[:3])
    for title, rows in (
        ("code lines per folder", {**sizes["folders"], "the three packages": package}),
        ("per family", sizes["families"]),
        ("ten largest files of the packages", dict([item for item in sizes["files"].items() if item[0].split("/")[0] in FOLDERS[:3]][:10])),
    ):
        print(title)
        for name, count in rows.items():
            print(f"  {count:7,d}  {name}")


if __name__ == "__main__":
    main()
