"""A tiny file of prompts."""

from collections.abc import Mapping
from typing import Any

from lit_methods.datamodules.fake import Arguments, Writer, text


def _prompts(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    lines = ("a boat on a lake | a boat in the rain | a boat at night", "a horse stands | a horse walks | a horse gallops")
    text(arguments["root"] / "prompts.txt", *lines)
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"VideoPromptsDataModule": _prompts}
