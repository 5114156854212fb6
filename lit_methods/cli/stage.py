"""What a claim runs in processes of their own: one stage through the ordinary ``lit`` command, or the resolving of configs.

``python -m lit_methods.cli.stage run <sources.json> fit --config ...`` is ``lit fit --config ...``, and writes at its end which source
files the run has imported, with their SHA-256; where it ends because data or a library isn't there, it writes ``missing.json`` beside it.
``python -m lit_methods.cli.stage resolve <file.json>`` replaces a list of argument lists
by what ``--print_config`` says to each.
"""

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    from lit_methods.import_path import current_folder_last

    current_folder_last()  # before a library is imported

from lit_methods.claims.sources import imported_sources
from lit_methods.files import load_yaml, write_json


def run(record: Path, words: list[str]) -> int:
    """Run one ``lit`` command; its exit status."""
    from lit_methods.cli.main import main

    started = time.time()
    missing: list[str] = []
    status = main(words, functools.partial(_note, missing))
    if any(missing):
        write_json(record.with_name("missing.json"), {"missing": missing[0]})
    if status == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        write_json(record, imported_sources(started))
    return status


def what_is_missing(error: BaseException | None) -> str:
    """The message of the missing file or library that an error is about, or was caused by; "" for any other error."""
    while error is not None:
        if isinstance(error, FileNotFoundError | ImportError):
            return str(error).strip() or type(error).__name__
        error = error.__cause__
    return ""


def _note(found: list[str], error: Exception) -> None:
    found.append(what_is_missing(error))


def resolve(file: Path) -> int:
    """Replace argument lists by ``{"config": ...}``, or ``{"error": message}``; ``{checkpoint}`` stays what it is.

    Where a library is missing, ``missing`` beside the error says which.
    """
    from lit_methods.cli.main import main

    answers = []
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "upstream.ckpt"  # keys that want a file that exists get one
        stand_in.touch()
        for words in json.loads(file.read_text(encoding="utf-8")):
            out, err = io.StringIO(), io.StringIO()
            missing: list[str] = []
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                given = [word.replace("{checkpoint}", str(stand_in)) for word in words]
                status = main([*given, "--print_config"], functools.partial(_note, missing))
            text = out.getvalue()
            if status == 0 and "seed_everything:" in text:
                text = text[max(text.find("# lightning"), 0) :]  # behind a word about W&B
                answers.append({"config": load_yaml(text.replace(str(stand_in), "'{checkpoint}'"))})
            else:
                answers.append({"error": err.getvalue().strip() or text[-2000:], "missing": "".join(missing)})
    write_json(file, answers)
    return 0


if __name__ == "__main__":
    task, path, *arguments = sys.argv[1:]
    raise SystemExit(resolve(Path(path)) if task == "resolve" else run(Path(path), arguments))
