"""The pure cores of all techniques in one place, for a bare PyTorch loop: tensors in, tensors out. Nothing is implemented here.

The names and the modules that hold them stand in ``functional.pyi``; a module is imported when its name is first used.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_HOMES = {
    alias.asname or alias.name: (str(node.module), alias.name)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _HOMES[name]
    globals()[name] = value = getattr(importlib.import_module(module), original)
    return value


def __dir__() -> list[str]:
    return __all__
