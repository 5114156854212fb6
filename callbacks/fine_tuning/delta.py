"""What fine-tuning has changed in a few weights: saved, loaded, added to a base model and taken off it. Nothing here knows Lightning."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.callbacks.targets import plain_parameters
from lit_methods.datamodules.reading import read_text
from lit_methods.files import replacing, write_json

FORMAT = "lit-methods delta 1"


@dataclass(frozen=True)
class Entry:
    """The change of one weight.

    Attributes:
        index: (k,) int64, ascending, in the order of the base model: rows, columns or positions.
        values: What is added there: (k, in) for rows, (out, k) for columns, (k,) for positions.
        dim: Dimension of the stored weight that ``index`` counts along; None: positions in the flattened weight.
        transposed: The stored weight is (in, out), as GPT-2's; ``values`` are not.
        replaces: ``values`` are the new weights themselves and not what is added, so that they come back bit for bit.
    """

    index: Tensor
    values: Tensor
    dim: int | None = None
    transposed: bool = False
    replaces: bool = False

    def _stored(self) -> Tensor:
        return self.values.T if self.transposed else self.values

    def read(self, weight: Tensor) -> Tensor:
        """Today's values of the places that change."""
        index = self.index.to(weight.device)
        return weight.detach().flatten()[index] if self.dim is None else weight.detach().index_select(self.dim, index)

    @torch.no_grad()
    def write(self, weight: Tensor, values: Tensor) -> None:
        """Put values there, in place."""
        index, values = self.index.to(weight.device), values.to(weight)
        if self.dim is None:
            weight.put_(index, values)
        else:
            weight.index_copy_(self.dim, index, values)

    def change(self, base: Tensor) -> Tensor:
        """What is added to ``base``, the values of the places that change."""
        values = self._stored().to(base.device)
        return values - base.to(values.dtype) if self.replaces else values


@dataclass(frozen=True)
class Delta:
    """What a fine-tuning changed, of a base model that is known by its hash.

    Attributes:
        entries: Name of a parameter in the base model -> its change.
        base: :func:`base_hash` of the base model.
        technique: What made it, such as ``s2ft``.
        notes: Further numbers and words about it.
    """

    entries: Mapping[str, Entry]
    base: str
    technique: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Trained values."""
        return sum(entry.values.numel() for entry in self.entries.values())


def hash_of(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in float32 or wider, so that a model has one hash whether it is loaded in bfloat16 or float32.

    Args:
        parameters: By name, in any order.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        value = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32)).contiguous()
        found.update(f"{name} {tuple(value.shape)} ".encode())
        found.update(value.numpy().data)
    return found.hexdigest()


def base_hash(model: nn.Module) -> str:
    """:func:`hash_of` all parameters of a model; a tied one counts once."""
    return hash_of(plain_parameters(model))


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def save_delta(delta: Delta, path: Path | str) -> Path:
    """Write ``<path>``, safetensors with ``<parameter>.index`` and ``<parameter>.values``, and ``<path>.json`` that says what they are.

    Args:
        delta: What to write.
        path: A file's name; its folder is made.

    Returns:
        The path.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.index": entry.index.cpu().contiguous() for name, entry in delta.entries.items()}
    tensors |= {f"{name}.values": entry.values.cpu().contiguous() for name, entry in delta.entries.items()}
    entries = {name: {"dim": e.dim, "transposed": e.transposed, "replaces": e.replaces} for name, e in delta.entries.items()}
    with replacing(path) as partial:
        save_file(tensors, partial)
    about = {"format": FORMAT, "technique": delta.technique, "base_sha256": delta.base, "notes": dict(delta.notes), "entries": entries}
    write_json(_sidecar(path), about)
    return path


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def load_delta(path: Path | str) -> Delta:
    """Read what :func:`save_delta` wrote.

    Raises:
        FileNotFoundError: One of the two files isn't there.
        ValueError: They aren't of this format, or don't belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    for file in (path, _sidecar(path)):
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(file)!r} does not exist: a delta is a safetensors file and a JSON file of the same name beside it"
            )
    try:
        about = json.loads(read_text(_sidecar(path)))
        tensors = load_file(path)
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as a delta ({error}): save it again with save_delta") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{_sidecar(path)} isn't the description of a delta: its format must be {FORMAT!r}")
    if missing := [key for key in ("entries", "base_sha256", "technique", "notes") if key not in about]:
        raise ValueError(f"{_sidecar(path)} lacks {', '.join(missing)}: it is damaged, save the delta again with save_delta")
    if not isinstance(about["entries"], dict) or not all(isinstance(kind, dict) for kind in about["entries"].values()):
        raise ValueError(f"{_sidecar(path)}: entries must name the shape and dtype of each parameter: save the delta again with save_delta")
    if set(tensors) != {f"{name}.{part}" for name in about["entries"] for part in ("index", "values")}:
        raise ValueError(f"{path} and {_sidecar(path).name} name other parameters: they are of two deltas; save it again")
    entries = {name: Entry(tensors[f"{name}.index"], tensors[f"{name}.values"], **kind) for name, kind in about["entries"].items()}
    return Delta(entries, about["base_sha256"], about["technique"], about["notes"])


# ---- on a model ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """What :func:`fuse` has put into a model, and what it has put aside."""

    kept: Mapping[str, list[tuple[Entry, Tensor]]]


def check_base(model: nn.Module, *deltas: Delta) -> None:
    """Raise unless deltas are of this model.

    Raises:
        ValueError: They were made from another base model, or name a parameter that it lacks.
    """
    parameters = plain_parameters(model)
    for delta in deltas:
        for name, entry in delta.entries.items():
            lacks = f"{type(model).__name__} has no parameter {name!r} of this delta"
            if name not in parameters:
                raise ValueError(f"{lacks}: give the submodule that it was saved for")
            shape = parameters[name].shape
            size = parameters[name].numel() if entry.dim is None else shape[entry.dim]
            if len(entry.index) and int(entry.index.max()) >= size:
                raise ValueError(f"{lacks} of its size, but one of {tuple(shape)}: give the base model of the delta")
    own = base_hash(model)
    for delta in deltas:
        if delta.base != own:
            raise ValueError(
                f"the delta is of another base model: its SHA-256 is {delta.base[:12]}..., {type(model).__name__} has {own[:12]}...; "
                "load the weights that the fine-tuning started from, and unfuse other deltas first"
            )


@torch.no_grad()
def fuse(model: nn.Module, *deltas: Delta, weights: Sequence[float] | None = None, check: bool = True) -> Fused:
    """Add deltas to the weights of their base model, in place.

    Args:
        model: The base model.
        deltas: One, or several that are added up.
        weights: Factor of each delta; None: 1.
        check: Compare the hash of the base model, which reads all of its weights.

    Returns:
        For :func:`unfuse`, which gives the base model back bit for bit.

    Raises:
        ValueError: The deltas are of another base model, or ``weights`` are more or fewer.
    """
    factors = [1.0] * len(deltas) if weights is None else list(weights)
    if len(factors) != len(deltas):
        raise ValueError(f"weights has {len(factors)} numbers for {len(deltas)} deltas: give one each")
    if check:
        check_base(model, *deltas)
    parameters = plain_parameters(model)
    kept: dict[str, list[tuple[Entry, Tensor]]] = {}
    for delta in deltas:
        for name, entry in delta.entries.items():
            kept.setdefault(name, []).append((entry, entry.read(parameters[name]).clone()))  # the base's, before anything is added
    turn: dict[str, int] = {}
    for delta, factor in zip(deltas, factors, strict=True):
        for name, entry in delta.entries.items():
            number = turn.get(name, 0)
            turn[name] = number + 1
            base = kept[name][number][1]
            if entry.replaces and factor == 1 and len(kept[name]) == 1:
                entry.write(parameters[name], entry.values)
                continue
            now = entry.read(parameters[name])
            change = factor * entry.change(base)
            entry.write(parameters[name], now + change.to(now.dtype))
    return Fused(kept)


@torch.no_grad()
def unfuse(model: nn.Module, fused: Fused) -> None:
    """Take deltas off again, in place: what they had changed becomes what it was, bit for bit."""
    parameters = plain_parameters(model)
    for name, entries in fused.kept.items():
        for entry, base in entries:
            entry.write(parameters[name], base)


def switch(model: nn.Module, fused: Fused, *deltas: Delta, weights: Sequence[float] | None = None, check: bool = False) -> Fused:
    """Take deltas off and put others on: :func:`unfuse` and :func:`fuse`.

    Args:
        model: The model with deltas.
        fused: What :func:`fuse` gave.
        deltas: The others, of the same base model.
        weights: Factor of each.
        check: Compare the hash of the base model.

    Returns:
        For the next one.
    """
    unfuse(model, fused)
    return fuse(model, *deltas, weights=weights, check=check)


__all__ = ["Delta", "Entry", "Fused", "base_hash", "check_base", "fuse", "hash_of", "load_delta", "save_delta", "switch", "unfuse"]
