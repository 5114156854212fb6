"""The network that holds all candidate cells at once: DARTS' space, with layers that have scores."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_methods.architecture_search.dass.core import derive_cell, mixed_operation
from lit_methods.architecture_search.genotype import Genotype
from lit_methods.architecture_search.layers import SparseConv2d, SparseLinear
from lit_methods.architecture_search.space import OPERATIONS, FactorizedReduce, make_operation, reduction_cells, relu_conv_norm
from lit_methods.checks import at_least


class _MixedEdge(nn.Module):
    """All operations between two nodes, weighed by shares."""

    def __init__(self, operations: Sequence[str], channels: int, stride: int) -> None:
        super().__init__()
        made = {name: make_operation(name, channels, stride, affine=False, pool_norm=True, conv=SparseConv2d) for name in operations}
        self.names = tuple(operations)
        self.operations = nn.ModuleDict({name: operation for name, operation in made.items() if operation is not None})

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / stride, W / stride)."""
        return mixed_operation(shares, [self.operations[name](x) if name in self.operations else None for name in self.names])


class _SearchCell(nn.Module):
    def __init__(
        self, operations: Sequence[str], nodes: int, two_back: int, one_back: int, channels: int, reduces: bool, after_reduction: bool
    ) -> None:
        super().__init__()
        first = FactorizedReduce if after_reduction else relu_conv_norm
        self.first = first(two_back, channels, False, SparseConv2d)
        self.second = relu_conv_norm(one_back, channels, False, SparseConv2d)
        self.nodes, self.reduces = nodes, reduces
        self.edges = nn.ModuleList(
            _MixedEdge(operations, channels, 2 if reduces and source < 2 else 1) for node in range(nodes) for source in range(2 + node)
        )

    def forward(self, two_back: Tensor, one_back: Tensor, shares: Tensor) -> Tensor:
        states, start = [self.first(two_back), self.second(one_back)], 0
        for _ in range(self.nodes):
            into = range(start, start + len(states))
            edges = [self.edges[edge](state, shares[edge]) for edge, state in zip(into, states, strict=True)]
            start += len(states)
            states.append(sum(edges[1:], start=edges[0]))
        return torch.cat(states[2:], dim=1)


class SearchNetwork(nn.Module):
    """Cells in a row, in which every edge is a mixture of all operations with shares softmax(alpha).

    Every convolution and the classifier have scores (``SparseConv2d``, ``SparseLinear``). Cells at a third and at two thirds halve the size
    and double the channels; they share ``alpha_reduce``, the others ``alpha_normal``, both (edges, operations), at first 1e-3 N(0, 1).
    Norms have neither scale nor shift, but that of the stem.

    Cost: 3.9 million parameters with the defaults, half of them scores.

    Args:
        channels: C of the first cell, before it is doubled.
        cells: Number of cells, 3 or more.
        nodes: Nodes of a cell, each of which has an edge from both inputs and from all nodes before.
        operations: What edges choose from, names of ``OPERATIONS``; at least one that isn't ``none``.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Width of the output.
        stem_multiplier: Channels of the stem, as a multiple of ``channels``.

    Raises:
        ValueError: A number below its least, an unknown operation, or one that stands twice.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        operations: Sequence[str] = OPERATIONS,
        in_channels: int = 3,
        num_classes: int = 10,
        stem_multiplier: int = 3,
    ) -> None:
        super().__init__()
        at_least(2, channels=channels, num_classes=num_classes)
        at_least(1, nodes=nodes, in_channels=in_channels, stem_multiplier=stem_multiplier)
        if len(set(operations)) < len(operations) or not set(operations) - {"none"}:
            raise ValueError(f"operations are {list(operations)}: give different ones, and at least one that isn't 'none'")
        self.operations, self.node_count = tuple(operations), nodes
        stem = stem_multiplier * channels
        self.stem = nn.Sequential(SparseConv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem))
        self.cells = nn.ModuleList()
        two_back, one_back, width, after = stem, stem, channels, False
        for index in range(cells):
            reduces = index in reduction_cells(cells)
            width *= 2 if reduces else 1
            self.cells.append(_SearchCell(operations, nodes, two_back, one_back, width, reduces, after))
            two_back, one_back, after = one_back, nodes * width, reduces
        reduction_cells(cells)
        self.classifier = SparseLinear(one_back, num_classes)
        edges = nodes * (nodes + 3) // 2
        self.alpha_normal = nn.Parameter(1e-3 * torch.randn(edges, len(operations)))
        self.alpha_reduce = nn.Parameter(1e-3 * torch.randn(edges, len(operations)))

    def alphas(self) -> dict[str, nn.Parameter]:
        """The architecture, by the names of its parameters."""
        return {"alpha_normal": self.alpha_normal, "alpha_reduce": self.alpha_reduce}

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes) logits."""
        shares = {True: self.alpha_reduce.softmax(-1), False: self.alpha_normal.softmax(-1)}
        two_back = one_back = self.stem(images)
        for cell in self.cells:
            two_back, one_back = one_back, cell(two_back, one_back, shares[bool(cell.reduces)])
        return self.classifier(one_back.mean((2, 3)))  # type: ignore[no-any-return]

    def genotype(self) -> Genotype:
        """The cells that alpha means now."""
        none = self.operations.index("none") if "none" in self.operations else None
        found = {}
        for kind, alpha in (("normal", self.alpha_normal), ("reduce", self.alpha_reduce)):
            rows = derive_cell(alpha, self.node_count, none).tolist()
            found[kind] = tuple((self.operations[operation], source) for operation, source in rows)
        concat = tuple(range(2, 2 + self.node_count))
        return Genotype(found["normal"], found["reduce"], concat, concat)


__all__ = ["SearchNetwork"]
