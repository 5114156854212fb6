"""What CoPrompt trains: vectors in front of the words and patches, and an adapter behind each tower."""

import torch
from torch import Tensor, nn

from lit_methods.prompting.coprompt.core import Adapter


class FeatureAdapter(nn.Module):
    """A of :func:`~lit_methods.prompting.losses.adapter_features`: D -> D / 4 -> D without biases, a ReLU behind each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, max(1, width // 4), bias=False), nn.Linear(max(1, width // 4), width, bias=False)

    @property
    def weights(self) -> Adapter:
        """W1 and W2."""
        return self.down.weight, self.up.weight


class Prompts(nn.Module):
    """The trained vectors: of the text tower free ones, of the image tower linear maps of these, a map for each depth (MaPLe).

    Args:
        first: (n, Wt), how the first text prompt starts.
        depth: J >= 1, the first included.
        image_width: Wi; None: no prompts in the image tower.
    """

    def __init__(self, first: Tensor, depth: int, image_width: int | None) -> None:
        super().__init__()
        number, width = first.shape
        self.context = nn.Parameter(first.clone())
        self.deep = nn.Parameter(0.02 * torch.randn(depth - 1, number, width)) if depth > 1 else None
        self.project = None if image_width is None else nn.Linear(width, image_width)
        self.deep_project: nn.ModuleList | None = None
        if image_width is not None and depth > 1:
            one = nn.Linear(width, image_width)
            self.deep_project = nn.ModuleList(nn.Linear(width, image_width) for _ in range(depth - 1))
            for layer in self.deep_project:
                layer.load_state_dict(one.state_dict())

    def of_image(self) -> tuple[Tensor | None, Tensor | None]:
        """(n, Wi) and (J - 1, n, Wi)."""
        if self.project is None:
            return None, None
        if self.deep is None or self.deep_project is None:
            return self.project(self.context), None
        return self.project(self.context), torch.stack([layer(own) for layer, own in zip(self.deep_project, self.deep, strict=True)])
