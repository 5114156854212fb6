"""Networks out of a genotype, with ordinary layers: whatever prunes or exports networks takes them as any other."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.architecture_search.genotype import Genotype, read_genotype
from lit_methods.architecture_search.space import FactorizedReduce, make_operation, reduction_cells, relu_conv_norm
from lit_methods.checks import at_least, literals, within

Size = Literal["tiny", "small", "medium", "large"]
SIZES: dict[str, tuple[int, int]] = {"tiny": (30, 16), "small": (36, 20), "medium": (86, 12), "large": (108, 14)}
"""Size -> channels of the first cell, cells."""
_LEAST_AUXILIARY = 5  # pixels of a side that the auxiliary head's pooling needs


def drop_path(x: Tensor, rate: Tensor) -> Tensor:
    """Some samples' whole output at 0, the others' divided by what stays: stochastic depth along one path.

    Args:
        x: (B, C, H, W).
        rate: Scalar, share of the samples that is dropped, in [0, 1).
    """
    kept = 1 - rate
    return x * torch.bernoulli(kept.to(x.dtype).expand(len(x), 1, 1, 1)) / kept


class _Cell(nn.Module):
    def __init__(self, genotype: Genotype, two_back: int, one_back: int, channels: int, reduces: bool, after_reduction: bool) -> None:
        super().__init__()
        self.first = (FactorizedReduce if after_reduction else relu_conv_norm)(two_back, channels)
        self.second = relu_conv_norm(one_back, channels)
        edges, self.concat = (genotype.reduce, genotype.reduce_concat) if reduces else (genotype.normal, genotype.normal_concat)
        self.sources = tuple(source for _, source in edges)
        made = [make_operation(name, channels, 2 if reduces and source < 2 else 1) for name, source in edges]
        self.operations = nn.ModuleList(operation for operation in made if operation is not None)

    def forward(self, two_back: Tensor, one_back: Tensor, rate: Tensor | None) -> Tensor:
        states = [self.first(two_back), self.second(one_back)]
        for node in range(len(self.sources) // 2):
            parts = []
            for place in (2 * node, 2 * node + 1):
                operation = self.operations[place]
                part = operation(states[self.sources[place]])
                parts.append(part if rate is None or isinstance(operation, nn.Identity) else drop_path(part, rate))
            states.append(parts[0] + parts[1])
        return torch.cat([states[place] for place in self.concat], dim=1)


class _AuxiliaryHead(nn.Sequential):
    """A classifier at two thirds of the network, from features of 8 x 8 pixels."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(_LEAST_AUXILIARY, stride=3, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


class GenotypeNetwork(nn.Module):
    """The network of a genotype: its two cells, stacked.

    Submodules: ``stem``, ``cells.i`` (``first``, ``second``, ``operations.j``), ``classifier``, and ``auxiliary`` where one is asked for.

    Cost: 2.3 million parameters in the size ``tiny`` with the cells ``dass_10``.

    Args:
        genotype: A file ``genotype.json`` or a checkpoint of a search, or ``dass_10`` or ``dass_5``, the authors' cells.
        size: ``tiny``, ``small``, ``medium`` or ``large``: 30, 36, 86, 108 channels and 16, 20, 12, 14 cells; None: as said next.
        channels: C of the first cell, before it is doubled.
        cells: Number of cells, 3 or more; at a third and at two thirds they reduce the size and double the channels.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Width of the output.
        auxiliary: With a second classifier behind the second reducing cell, for training; images of 32 x 32 pixels have 8 x 8 there.
        stem: ``small``: a 3x3 convolution. ``imagenet``: convolutions that bring 224 x 224 pixels to 28 x 28.

    Attributes:
        drop_rate: Share of the samples whose path is dropped in training, a scalar tensor; whoever trains sets it.

    Raises:
        BrokenRecordError: The file is no genotype.
        ValueError: A number below its least.
    """

    drop_rate: Tensor

    def __init__(
        self,
        genotype: str | Path = "dass_10",
        size: Size | None = None,
        channels: int = 16,
        cells: int = 8,
        in_channels: int = 3,
        num_classes: int = 10,
        auxiliary: bool = False,
        stem: Literal["small", "imagenet"] = "small",
    ) -> None:
        super().__init__()
        literals(GenotypeNetwork, locals())
        at_least(2, channels=channels, num_classes=num_classes)
        at_least(1, in_channels=in_channels)
        channels, cells = SIZES[size] if size is not None else (channels, cells)
        self.genotype = read_genotype(genotype)
        reducing = reduction_cells(cells)
        width, after = channels, stem == "imagenet"
        self.small = stem == "small"
        if self.small:
            two_back = one_back = 3 * channels
            self.stem = nn.Sequential(nn.Conv2d(in_channels, one_back, 3, padding=1, bias=False), nn.BatchNorm2d(one_back))
        else:
            two_back = one_back = channels
            half = channels // 2
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
                nn.Conv2d(half, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels),
            )  # fmt: skip
            self.stem_again = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        self.auxiliary: nn.Module | None = None
        for index in range(cells):
            reduces = index in reducing
            width *= 2 if reduces else 1
            self.cells.append(_Cell(self.genotype, two_back, one_back, width, reduces, after))
            nodes = len(self.genotype.reduce_concat if reduces else self.genotype.normal_concat)
            two_back, one_back, after = one_back, nodes * width, reduces
            if auxiliary and index == reducing[1]:
                self.auxiliary = _AuxiliaryHead(one_back, num_classes)
        self.auxiliary_at = reducing[1]
        self.classifier = nn.Linear(one_back, num_classes)
        self.register_buffer("drop_rate", torch.zeros(()), persistent=False)
        self.drops_paths = False

    def both(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, in_channels, H, W) -> (B, num_classes) logits, and those of the auxiliary head in training, where there is one.

        Raises:
            ValueError: The images are too small for the auxiliary head.
        """
        one_back = self.stem(images)
        two_back, beside = one_back, None
        if not self.small:
            one_back = self.stem_again(one_back)
        rate = self.drop_rate if self.training and self.drops_paths else None
        for index, cell in enumerate(self.cells):
            two_back, one_back = one_back, cell(two_back, one_back, rate)
            if self.auxiliary is not None and self.training and index == self.auxiliary_at:
                if min(one_back.shape[2:]) < _LEAST_AUXILIARY:
                    seen = f"{one_back.shape[2]} x {one_back.shape[3]}"
                    raise ValueError(
                        f"the auxiliary head needs 5 x 5 pixels or more, got {seen}: set auxiliary=false, or use larger images"
                    )
                beside = self.auxiliary(one_back)
        return self.classifier(F.adaptive_avg_pool2d(one_back, 1).flatten(1)), beside

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes) logits."""
        return self.both(images)[0]

    def set_drop_rate(self, rate: float) -> None:
        """Share of the samples whose path is dropped from now on, in [0, 1)."""
        within("[0, 1)", "a share", rate=rate)
        self.drops_paths = rate > 0
        self.drop_rate.fill_(rate)


__all__ = ["SIZES", "GenotypeNetwork", "drop_path"]
