"""Execute the notebooks in place: ``python notebooks/execute.py`` for all of them, or with the numbers or names of some (``01 04``).

Each notebook runs from top to bottom in a fresh kernel of this Python, started in the folder of the notebooks. Outputs are written back
only when every cell succeeded, without what differs from machine to machine: paths, host names, execution times.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 600


def notebooks(names: list[str] | None = None) -> list[Path]:
    """The notebooks in order; with ``names`` those whose file name begins with one of them.

    Raises:
        ValueError: A name fits no notebook.
    """
    found = sorted(HERE.glob("*.ipynb"))
    for name in names or []:
        if not any(path.name.startswith(Path(name).name) for path in found):
            raise ValueError(f"no notebook begins with {name!r}: there are {', '.join(path.name for path in found)}")
    return [path for path in found if not names or any(path.name.startswith(Path(name).name) for name in names)]


def execute(path: Path, folder: Path = HERE) -> tuple[Any, float]:
    """Run a notebook and tidy its outputs.

    Args:
        path: The notebook; it is not changed.
        folder: Current folder of the kernel.

    Returns:
        The notebook with its new outputs, and the seconds that it took, start of the kernel included.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    seconds = time.monotonic() - started
    tidy(notebook)
    return notebook, seconds


def tidy(notebook: Any) -> None:
    """Join pieces of one stream, and drop execution times, the interpreter's version and machine paths, in place."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        joined: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if output.output_type == "stream":
                output.text = scrub(output.text)
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = scrub(content)
        cell.outputs = joined


def scrub(text: str) -> str:
    """``text`` without terminal colours and without paths of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    folders = {str(HERE.parent): "<repository>", sys.prefix: "<python>", str(Path.home()): "~", tempfile.gettempdir(): "<tmp>"}
    for folder, name in sorted(folders.items(), key=lambda item: -len(item[0])):
        if len(folder) > 1:
            text = re.sub(rf"(?:/private)?{re.escape(folder)}(?=/|\b)", name, text)
    return text


def main(words: list[str] | None = None) -> int:
    """Execute notebooks and write them back."""
    parser = argparse.ArgumentParser(description="Execute the notebooks in place.")
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 01; none: all")
    os.environ.setdefault("PYTHONHASHSEED", "0")
    for path in notebooks(parser.parse_args(words).names):
        print(f"{path.name} ...", end=" ", flush=True)
        notebook, seconds = execute(path)
        nbformat.write(notebook, path)
        print(f"{seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
