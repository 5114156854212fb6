"""Docstrings as Markdown: the few marks of reStructuredText in them, which Python's own tools understand, become Markdown's."""

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Roles such as ``:class:`X``` become ``X`` as code, ``::`` before an indented block becomes ``:``, ``<k, q>`` is no HTML tag."""
    parts = re.split(r"(::\n\n(?: {4}.*(?:\n|$)|\n)+)", text)
    return "".join(part[1:] if part.startswith("::") else _prose(part) for part in parts)


def _prose(text: str) -> str:
    text = re.sub(r":(?:class|mod|func|meth|attr|exc|data|obj):`~?([^`]+)`", r"`\1`", text)
    return "".join(part if part.startswith("`") else re.sub(r"<(?=[A-Za-z/!])", "&lt;", part) for part in re.split(r"(`+[^`]*`+)", text))


class MarkdownDocstrings(griffe.Extension):
    """Applies :func:`to_markdown` to every docstring that griffe finds."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
