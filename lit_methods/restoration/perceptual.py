"""Perceptual distances of images in [-1, 1] for losses and evaluations; their networks are frozen, gradients pass through them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.metrics import perceptual
from lit_methods.frozen import Frozen
from lit_methods.hub import leave_out

Backbone = Literal["alex", "vgg", "squeeze"]
EXTRA = 'pip install "lit-methods[lpips]"'


class RandomFeatures(nn.Module):
    """Features of a small convolutional network that nobody trained: a stand-in where no weights of a trained one are at hand.

    The weights follow from ``seed`` alone. Each stage halves the image, so a side needs 2^(stages - 1) pixels or more.

    Args:
        in_channels: Channels of the images.
        widths: Channels of each stage.
        seed: Seed of the weights.
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64), seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels, widths=min(widths))
        checks.at_least(0, seed=seed)
        self.stages = nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        for number, width in enumerate(widths):
            conv = nn.Conv2d(in_channels, width, 3, padding=1, stride=1 if number == 0 else 2)
            with torch.no_grad():
                drawn = torch.randn(conv.weight.shape, generator=generator)
                conv.weight.copy_(drawn * (2 / (9 * in_channels)) ** 0.5)
                conv.bias.zero_()  # type: ignore[union-attr]
            self.stages.append(conv)
            in_channels = width

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> a tensor (B, width, h, w) a stage."""
        layers = []
        for stage in self.stages:
            images = torch.relu(stage(images))
            layers.append(images)
        return layers


class FeatureDistance(nn.Module):
    """Distance of images in the features of a frozen network, in the form of LPIPS (arXiv:1801.03924, Eq. 1).

    Saves: nothing; the network is :class:`~lit_methods.frozen.Frozen`.

    Args:
        network: Images (B, C, H, W) -> one tensor (B, D, ...), or a list of them, one a layer.
        layers: Names of submodules of ``network`` whose outputs count, instead of what it returns.

    Raises:
        ValueError: There is no such submodule.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        super().__init__()
        checks.patterns(layers=layers)
        known = dict(network.named_modules())
        if missing := [name for name in layers if name not in known or not name]:
            raise ValueError(
                f"layers has {missing}, which {type(network).__name__} hasn't: give some of {', '.join(list(known)[1:9])}, ..."
            )
        self.frozen, self.layers = Frozen(network), tuple(layers)

    def features(self, images: Tensor) -> list[Tensor]:
        """The layers that count, of images (B, C, H, W)."""
        network = self.frozen.module
        if not self.layers:
            found = network(images)
            return [found] if isinstance(found, Tensor) else list(found)
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Any:
            return lambda module, args, output: caught.__setitem__(name, output)

        hooks = [network.get_submodule(name).register_forward_hook(catch(name)) for name in self.layers]
        try:
            network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [caught[name] for name in self.layers]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B,)."""
        return perceptual(a, b, self.features)


class LPIPSDistance(nn.Module):
    """LPIPS (arXiv:1801.03924) by the ``lpips`` package, of images in [-1, 1].

    Its weights of the layers come with the package. Those of the backbone are torchvision's, trained on ImageNet.

    Saves: nothing; the network is :class:`~lit_methods.frozen.Frozen`.

    Args:
        weights: File of torchvision's backbone, such as ``vgg16-397923af.pth``; None: torchvision's own, which it downloads into its cache.
        backbone: ``vgg``, as losses take it, ``alex``, as evaluations do, or ``squeeze``.

    Raises:
        ImportError: ``lpips`` is not installed; the message names the extra.
        FileNotFoundError: There is no such file.
        ValueError: It holds other weights.
    """

    def __init__(self, weights: Path | None = None, backbone: Backbone = "vgg") -> None:
        super().__init__()
        checks.one_of(Backbone, backbone=backbone)
        try:
            import lpips
        except ImportError as error:
            raise ImportError(f"LPIPSDistance needs lpips: {EXTRA}") from error
        path = None if weights is None else Path(weights).expanduser()
        name = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[backbone]
        blank = leave_out(f"weights={weights}", path if path is not None else f"torchvision's {name}")
        if path is not None and not blank and not path.is_file():
            raise FileNotFoundError(f"weights={str(path)!r} is no file: give torchvision's {name}, or null to download it")
        network = lpips.LPIPS(net=backbone, pnet_rand=path is not None or blank, verbose=False)
        if path is not None and not blank:
            _load_backbone(network, path, name)
        self.frozen = Frozen(network)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,); images of one channel count as grey."""
        colours = [images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images for images in (a, b)]
        distance: Tensor = self.frozen.module(*colours)
        return distance.flatten()


def _load_backbone(network: Any, path: Path, name: str) -> None:
    from lit_methods.runs.checkpoints import read_state_dict

    # the package cuts torchvision's ``features`` into slices and keeps each layer's number as its name
    given = {key.removeprefix("features."): value for key, value in read_state_dict(path).items() if key.startswith("features.")}
    state = network.net.state_dict()
    loaded = {key: given.get(key.split(".", 1)[1]) for key in state}
    wrong = [key for key, value in loaded.items() if value is None or value.shape != state[key].shape]
    if wrong:
        raise ValueError(f"weights={str(path)!r} lacks {', '.join(wrong[:3])}, or has them in other shapes: give torchvision's {name}")
    network.net.load_state_dict(loaded)


__all__ = ["FeatureDistance", "LPIPSDistance", "RandomFeatures"]
