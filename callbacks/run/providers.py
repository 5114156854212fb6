"""What modules and callbacks show on a dashboard: their panels, media and artifacts, asked for and checked."""

import hashlib
import re
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lit_methods.catalog import techniques_in
from lit_methods.files import replacing
from lit_methods.panels import Curve, Media, Panel
from lit_methods.reports.page import Section


class ProviderError(Exception):
    """A module or callback couldn't say what it shows; the message names it and what it raised."""


def gather_panels(candidates: list[Any]) -> tuple[list[Any], list[Section]]:
    """Those of the modules and callbacks that declare panels, and a section for each; one that only repeats another's curves has none.

    Raises:
        TypeError: ``panels`` holds something else beside panels.
    """
    kinds = get_args(Panel)
    providers: list[Any] = []
    sections: list[Section] = []
    shown: set[Curve] = set()
    present = techniques_in(type(candidate).__name__ for candidate in candidates)
    for candidate in candidates:
        panels = getattr(candidate, "panels", ())
        if not isinstance(panels, (tuple, list)) or not any(isinstance(panel, kinds) for panel in panels):
            continue  # somebody else's attribute of that name
        for index, panel in enumerate(panels):
            if not isinstance(panel, kinds):
                names = ", ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{type(candidate).__name__}.panels[{index}] is a {type(panel).__name__}, expected one of {names}")
        new = tuple(panel for panel in panels if not isinstance(panel, Curve) or panel not in shown)
        shown.update(panel for panel in new if isinstance(panel, Curve))
        if not new:
            continue
        name = type(candidate).__name__
        count = sum(type(other) is type(candidate) for other in providers)
        technique = next((entry for entry in present if name in entry.names), None)
        summary = technique.summary if technique and all(technique.summary != section.summary for section in sections) else ""  # once
        url = f"https://arxiv.org/abs/{technique.arxiv}" if summary and technique and technique.arxiv else ""
        sections.append(Section(f"{name} {count + 1}" if count else name, new, {}, summary, url))
        providers.append(candidate)
    return providers, sections


def ask_for_media(provider: Any, panels: tuple[Panel, ...]) -> dict[str, Media]:
    """``provider.dashboard_media()``, checked against what it declares; {} where it has no such method.

    Raises:
        TypeError: A panel's medium is of another type than the panel shows.
        ValueError: A key that no panel declares.
        ProviderError: ``dashboard_media()`` itself raises.
    """
    if not hasattr(provider, "dashboard_media"):
        return {}
    media: dict[str, Media] = _asked(provider, "dashboard_media")
    declared = {panel.key: panel for panel in panels if not isinstance(panel, Curve)}
    where = f"{type(provider).__name__}.dashboard_media()"
    for key, item in media.items():
        if key not in declared:
            raise ValueError(f"{where} returned {key!r}, which no panel declares; declared keys: {', '.join(sorted(declared)) or 'none'}")
        if not isinstance(item, declared[key].media):
            expected = declared[key].media.__name__
            raise TypeError(f"{where}[{key!r}] is a {type(item).__name__}, but {type(declared[key]).__name__} shows a {expected}")
    return media


def ask_for_artifacts(providers: list[Any]) -> dict[str, dict[str, Tensor]]:
    """What the providers' ``dashboard_artifacts()`` return, by name; names checked.

    Raises:
        TypeError: Something else than a dict of tensors.
        ValueError: A name that can't be a file's, or that two providers use.
        ProviderError: ``dashboard_artifacts()`` itself raises.
    """
    artifacts: dict[str, dict[str, Tensor]] = {}
    for provider in providers:
        where = f"{type(provider).__name__}.dashboard_artifacts()"
        for name, tensors in _asked(provider, "dashboard_artifacts").items():
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
                raise ValueError(f"{where} returned the name {name!r}: use letters, digits, '.', '_' and '-', as it names a file")
            if name in artifacts:
                raise ValueError(f"{where} returned {name!r}, which another callback or the module returns, too: choose another name")
            if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
                raise TypeError(f"{where}[{name!r}] must be a dict of tensors, got {type(tensors).__name__}")
            artifacts[name] = tensors
    return artifacts


def _asked(provider: Any, method: str) -> dict[str, Any]:
    try:
        return getattr(provider, method)()  # type: ignore[no-any-return]
    except Exception as error:
        raise ProviderError(f"{type(provider).__name__}.{method}() raised {type(error).__name__}: {error}") from error


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values; one tensor at a time comes to the CPU."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a ``.pt`` file that ``torch.load(path, weights_only=True)`` reads on any machine, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, partial)  # clone: a view drags its base
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(f"{path}: {error}") from error


__all__ = ["ProviderError", "ask_for_artifacts", "ask_for_media", "gather_panels", "save_tensors", "tensors_digest"]
