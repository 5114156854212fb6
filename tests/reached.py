"""Which of our own functions run: what ``tests/test_reachability.py`` compares."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lit_methods.catalog import package_folder

PACKAGES = ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules")


@contextmanager
def reached_functions() -> Iterator[set[str]]:
    """Collect the functions of the project that this thread calls meanwhile, as ``callbacks/sparsity/masks.py:12 nm_mask``.

    The set is filled when the block ends. Lambdas, comprehensions and class bodies are left out: they have no name that one could call.
    """
    codes: set[CodeType] = set()

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        codes.add(frame.f_code)  # no trace function comes back, so lines aren't traced

    reached: set[str] = set()
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield reached
    finally:
        sys.settrace(before)
        reached |= {name for code in codes if (name := _name(code))}


def _name(code: CodeType) -> str | None:
    if code.co_name.startswith("<") or not code.co_flags & 0x2:  # CO_NEWLOCALS: a class body has none
        return None
    path = Path(code.co_filename)
    for package in PACKAGES:
        folder = package_folder(package)
        if path.is_relative_to(folder):
            return f"{folder.name}/{path.relative_to(folder).as_posix()}:{code.co_firstlineno} {code.co_name}"
    return None
