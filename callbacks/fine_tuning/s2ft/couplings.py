"""Which layers of a model belong together: heads of attentions, channels of MLPs. Nothing here knows Lightning."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.layers import PlacedLayer, Slice, is_linear, matrix_of
from lit_methods.callbacks.targets import plain_modules

Unit = Literal["head", "channel"]


@dataclass(frozen=True)
class Coupling:
    """Layers whose units may be permuted together, by patterns of names.

    Attributes:
        consumer: Name of the layer that consumes the units by its columns; each ``*`` stands for some text, such as ``layers.*.down_proj``.
        producers: Names of the layers that produce them by their rows, each ``*`` the consumer's text in its place. Rows of the first one
            can be trained: the values of an attention, the up projection of an MLP.
        heads: Heads of an attention, or groups of heads that share keys and values; null: each column of the consumer is a channel.
        sections: Blocks of one producer that each have all units, one behind the other: 3 for q, k and v in one weight. Rows of the last
            one can be trained.
    """

    consumer: str
    producers: list[str]
    heads: int | None = None
    sections: int = 1


class Group(NamedTuple):
    """One coupling in a model: names of layers, and how many units they share."""

    unit: Unit
    consumer: str
    producers: tuple[str, ...]
    units: int
    sections: int


# parts of an attention or MLP: producers (values or up projection first), consumer, sections of the producer
_ATTENTIONS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("v_proj", "q_proj", "k_proj"), "o_proj", 1),
    (("v_proj", "q_proj", "k_proj"), "out_proj", 1),
    (("self.value", "self.query", "self.key"), "output.dense", 1),
    (("attention.value", "attention.query", "attention.key"), "output.dense", 1),
    (("c_attn",), "c_proj", 3),
    (("qkv",), "proj", 3),
)
_MLPS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("up_proj", "gate_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("up", "gate"), "down", 1),
    (("fc1_x", "fc1_g"), "fc2", 1),
    (("fc1",), "fc2", 1),
    (("c_fc",), "c_proj", 1),
    (("intermediate.dense",), "output.dense", 1),
)


def _head_size(attention: nn.Module, width: int) -> int | None:
    """Channels of a head."""
    places: list[Any] = [attention, *attention.children()]
    for place in places:
        for name in ("head_dim", "attention_head_size"):
            if isinstance(size := getattr(place, name, None), int):
                return size
    for place in [*places, *(getattr(place, "config", None) for place in places)]:
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(heads := getattr(place, name, None), int) and heads and width % heads == 0:
                return width // heads
    return None


def _in_the_way(block: nn.Module, layers: Sequence[str], size: int) -> str | None:
    """A parameter of an attention that may belong to single heads, so that a permutation would mix them up."""
    for name, parameter in block.named_parameters():
        known = any(name.startswith(f"{layer}.") for layer in layers)
        if not known and name.rpartition(".")[0] in ("", "self", "attention", "q_norm", "k_norm", "norm") and parameter.numel() != size:
            return name
    return None


def found_groups(root: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """Couplings of blocks as LLaMA, GPT-2, ViT, BERT and their like have them.

    Args:
        root: Any module.

    Returns:
        Groups in the order of ``named_modules()``; and block -> why it is left out.
    """
    groups: list[Group] = []
    left: dict[str, str] = {}
    taken: set[str] = set()
    modules = plain_modules(root)
    for name, block in modules.items():
        prefix = f"{name}." if name else ""
        for unit, producers, consumer, sections in _known():
            layers = [modules.get(prefix + part) for part in (*producers, consumer)]
            linear = [layer for layer in layers if layer is not None and is_linear(layer)]
            if len(linear) < len(layers) or prefix + consumer in taken:
                continue
            rows, columns = len(matrix_of(linear[0])), matrix_of(linear[-1]).shape[1]
            units, why = columns, None
            if unit == "head":
                size = _head_size(block, columns)
                units = 0 if size is None or rows % (size * sections) else rows // size // sections
                why = "its heads can't be counted" if not units else _in_the_way(block, (*producers, consumer), size or 0)
                if units and why is not None:
                    why = f"{why} may belong to single heads"
            elif isinstance(norm := getattr(block, "norm", None), nn.Module) and list(norm.parameters()) and "fc1" in producers[0]:
                why = "a norm stands between its layers"
            group = Group(unit, prefix + consumer, tuple(prefix + part for part in producers), units, sections)
            why = why or _misfit(group, modules)
            taken.add(prefix + consumer)
            if why is None:
                groups.append(group)
            else:
                left[name] = why
    return groups, left


def _known() -> Iterator[tuple[Unit, tuple[str, ...], str, int]]:
    for producers, consumer, sections in _ATTENTIONS:
        yield "head", producers, consumer, sections
    for producers, consumer, sections in _MLPS:
        yield "channel", producers, consumer, sections


def _misfit(group: Group, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the layers of a group can't share its units."""
    columns = matrix_of(modules[group.consumer]).shape[1]
    if not group.units or columns % group.units:
        return f"{group.consumer} has {columns} inputs, which {group.units} units don't divide"
    for name in group.producers:
        rows = len(matrix_of(modules[name]))
        if rows % (group.units * group.sections):
            return f"{name} has {rows} outputs, which {group.units} units in {group.sections} sections don't divide"
    return None


def given_groups(root: nn.Module, couplings: Sequence[Coupling]) -> list[Group]:
    """Couplings by their patterns.

    Raises:
        ValueError: A pattern matches nothing, or layers don't fit together.
    """
    modules, groups = plain_modules(root), list[Group]()
    for coupling in couplings:
        pattern = re.compile("(.+)".join(map(re.escape, coupling.consumer.split("*"))))
        matches = [(name, found) for name in modules if (found := pattern.fullmatch(name))]
        if not matches:
            first = ", ".join([name for name, module in modules.items() if is_linear(module)][:8])
            raise ValueError(f"the consumer {coupling.consumer!r} matches no submodule of {type(root).__name__}; linear ones are {first}")
        for consumer, found in matches:
            producers = []
            for template in coupling.producers:
                texts = iter(found.groups())
                producers.append(re.sub(r"\*", lambda _, texts=texts: next(texts, "*"), template))  # type: ignore[misc]
            for name in (consumer, *producers):
                if name not in modules or not is_linear(modules[name]):
                    what = type(modules[name]).__name__ if name in modules else "missing"
                    raise ValueError(f"{name!r}, of the coupling of {coupling.consumer!r}, is {what}: name linear layers")
            units = coupling.heads or matrix_of(modules[consumer]).shape[1]
            group = Group("head" if coupling.heads else "channel", consumer, tuple(producers), units, coupling.sections)
            if why := _misfit(group, modules):
                raise ValueError(f"{why}: correct the coupling of {coupling.consumer!r}")
            groups.append(group)
    return groups


def placed_layers(root: nn.Module, groups: Sequence[Group], chosen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, PlacedLayer]:
    """Orders and slices of all layers that take part.

    Args:
        root: Where the groups were found.
        groups: Couplings.
        chosen: Consumer -> units whose producing rows, and units whose consuming columns are trained.

    Returns:
        Name -> layer, not attached yet.

    Raises:
        ValueError: Two slices of one layer would have to be trained.
    """
    modules = plain_modules(root)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    slices: dict[str, Slice] = {}

    def train(name: str, part: Slice) -> None:
        if part.width and name in slices:
            raise ValueError(f"rows and columns of {name!r} were both chosen: train one of them, by ratios or couplings")
        if part.width:
            slices[name] = part

    for group in groups:
        column, row = chosen[group.consumer]
        if not len(column) + len(row):
            continue
        order, (c0, c1), (r0, r1) = core.unit_layout(group.units, column, row)
        width = matrix_of(modules[group.consumer]).shape[1] // group.units
        if group.consumer in columns or any(name in rows for name in group.producers):
            raise ValueError(f"a layer of the coupling of {group.consumer!r} is permuted by another coupling, too: leave one of them out")
        columns[group.consumer] = core.expanded(order, width)
        train(group.consumer, Slice("row", r0 * width, (r1 - r0) * width))
        for number, name in enumerate(group.producers):
            size = len(matrix_of(modules[name])) // group.units // group.sections
            rows[name] = core.expanded(order, size, group.sections)
            if number == 0:
                start = (group.sections - 1) * group.units * size
                train(name, Slice("column", start + c0 * size, (c1 - c0) * size))
    names = [name for name in modules if name in rows or name in columns]
    return {name: PlacedLayer(modules[name], rows.get(name), columns.get(name), slices.get(name)) for name in names}


def scored(group: Group, modules: Mapping[str, nn.Module], strategy: str, kind: core.Kind, of: Mapping[str, Tensor]) -> Tensor:
    """Score of each unit.

    Args:
        group: A coupling.
        modules: By name.
        strategy: ``W``: norm of the weight; ``A``: of the activation; ``S``: product of the two; ``G``: of the gradient.
        kind: ``column``: rows of the first producer; ``row``: columns of the consumer.
        of: For ``A`` and ``S``: layer -> squared activations, summed, of its outputs (producer) or inputs (consumer); for ``G``: layer ->
            gradient (out, in).
    """
    name = group.producers[0] if kind == "column" else group.consumer

    def norms(matrix: Tensor) -> Tensor:
        if kind == "row":
            return core.column_norms(matrix, group.units)
        return core.row_norms(matrix.chunk(group.sections)[-1], group.units)

    if strategy == "G":
        return norms(of[name])
    score = torch.ones(group.units)
    if strategy in "WS":
        score = norms(matrix_of(modules[name])).cpu()
    if strategy in "AS":
        squared = of[name] if kind == "row" else of[name].chunk(group.sections)[-1]
        score = score * squared.reshape(group.units, -1).sum(1).sqrt().cpu()
    return score


__all__ = ["Coupling", "Group", "found_groups", "given_groups", "placed_layers", "scored"]
