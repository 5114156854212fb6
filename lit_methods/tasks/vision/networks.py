"""Networks for image classification: (B, C, H, W) float images -> (B, num_classes) logits."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least, share
from lit_methods.hub import timm_network


def _dropped(x: Tensor, module: nn.Module, rate: float) -> Tensor:
    """``x`` with a share of its values at 0 while ``module`` trains; no submodule, so that names and indices stay what they are."""
    return F.dropout(x, rate, module.training) if rate else x


class MLP(nn.Module):
    """Linear layers with ReLU between them, on flattened input.

    Submodules: ``layers.0`` to ``layers.k``, all ``nn.Linear``; the last one gives the logits; ``norms.i`` with ``batch_norm``.

    Cost: 19 thousand parameters with the widths [64, 256, 10].

    Args:
        widths: Number of inputs, hidden widths, number of classes; at least two numbers, such as [64, 256, 10].
        bias: All layers have a bias.
        relu_last: ReLU behind the last layer, too: features like those of a convolutional network, none below 0.
        dropout: Share of the hidden values that is dropped in training, behind each hidden layer's ReLU.
        batch_norm: Batch norm behind each hidden layer, before its ReLU.

    Raises:
        ValueError: Fewer than two widths, or one below 1; or ``dropout`` is no share.
    """

    def __init__(
        self, widths: Sequence[int], bias: bool = True, relu_last: bool = False, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        share(dropout=dropout)
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}: give the number of inputs, hidden widths and the number of classes, each 1 or more")
        self.widths, self.relu_last, self.dropout = tuple(widths), relu_last, dropout
        self.layers = nn.ModuleList(nn.Linear(inside, outside, bias) for inside, outside in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:-1]) if batch_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) with ``widths[0]`` values per sample -> (B, widths[-1])."""
        x = images.flatten(1)
        for index, layer in enumerate(self.layers[:-1]):
            x = layer(x) if self.norms is None else self.norms[index](layer(x))
            x = _dropped(F.relu(x), self, self.dropout)
        x = self.layers[-1](x)
        return F.relu(x) if self.relu_last else x


class GatedMLP(nn.Module):
    """Residual blocks with a gated MLP, as transformers have them between their attentions, on flattened input.

    Each block is x + down(silu(gate(n)) * up(n)) with n = LayerNorm(x). Submodules: ``blocks.i.norm``, ``.gate``, ``.up``, ``.down``,
    ``norm``, ``head``; linear layers without biases.

    Cost: 149 thousand parameters with the defaults.

    Args:
        width: Values of a sample, and width of the blocks.
        hidden: Channels inside a block.
        depth: Blocks.
        num_classes: Width of the output.
    """

    def __init__(self, width: int = 64, hidden: int = 256, depth: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        at_least(1, width=width, hidden=hidden, depth=depth, num_classes=num_classes)
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        blocks = [{name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()} for _ in range(depth)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(width), **block}) for block in blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) with ``width`` values per sample -> (B, num_classes)."""
        x = images.flatten(1)
        for block in self.blocks:
            parts: Any = block
            inside = parts["norm"](x)
            x = x + parts["down"](F.silu(parts["gate"](inside)) * parts["up"](inside))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class SmallConvNet(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, one 2x2 max pooling after the second, global mean, linear.

    Submodules: ``convs.i`` (no bias), ``norms.i``, ``head``.

    Cost: 4.4 thousand parameters with the defaults.

    Args:
        channels: Output channels of the convolutions, two or more of them.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Width of the output; 0: no ``head``, the output is the mean of the last channels.
        dropout: Share of the last channels' means that is dropped in training.

    Raises:
        ValueError: Fewer than two convolutions, or ``dropout`` is no share.
    """

    def __init__(self, channels: Sequence[int] = (12, 16, 16), in_channels: int = 1, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        share(dropout=dropout)
        self.dropout = dropout
        if len(channels) < 2:
            raise ValueError(f"channels={list(channels)}: give two or more, one for each convolution")
        pairs = list(zip([in_channels, *channels[:-1]], channels, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(inside, outside, 3, padding=1, bias=False) for inside, outside in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for outside in channels)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W), H and W >= 2 -> (B, num_classes), or (B, channels[-1]) without a head."""
        x = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if index == 1:
                x = self.pool(x)
        return self.head(_dropped(x.mean(dim=(2, 3)), self, self.dropout))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm (``projection``, He et al.'s option B) or every second pixel
    with zeros for the new channels, half of them on either side (option A, without weights).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.downsample: nn.Module | None = None
        if projection and (stride > 1 or in_channels != channels):
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        elif new := y.shape[1] - x.shape[1]:  # read off the tensors: the widths may have been scaled
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, new // 2, new - new // 2))
        elif self.stride > 1:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + shortcut)


def _stage(in_channels: int, channels: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
    first = _BasicBlock(in_channels, channels, stride, projection)
    return nn.Sequential(first, *(_BasicBlock(channels, channels, 1, projection) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    """Kaiming normal, fan-out, for the convolutions: He et al. 2015."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Conv2d):
            nn.init.kaiming_normal_(submodule.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110 for 32x32 images: He et al. 2015 (arXiv:1512.03385), section 4.2, shortcuts without weights.

    Submodules: ``conv1``, ``bn1``, ``layer1`` to ``layer3``, each a sequence of blocks ``layer2.0`` with ``conv1``, ``bn1``, ``conv2``,
    ``bn2``; ``linear``: the names of widespread CIFAR checkpoints, which put ``module.`` in front.

    Cost: 0.27 million parameters with the defaults.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...
        width: Channels of the first stage; the others have two and four times as many.
        num_classes: Width of the output.
        in_channels: 3 for colour, 1 for grey images.
        dropout: Share of the last channels' means that is dropped in training.

    Raises:
        ValueError: ``depth`` isn't 6n + 2, or ``dropout`` is no share.
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        share(dropout=dropout)
        self.dropout = dropout
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2: give 20, 32, 44, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1, projection=False)
        self.layer2 = _stage(width, 2 * width, blocks, 2, projection=False)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, projection=False)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(_dropped(x.mean(dim=(2, 3)), self, self.dropout))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling, four stages of two blocks, 1x1 convolutions as shortcuts.

    Submodules are named as in torchvision: ``conv1``, ``bn1``, ``layer1`` to ``layer4`` with ``downsample``, ``fc``.

    Cost: 11 million parameters with the defaults.

    Args:
        width_factor: Factor of the widths 64, 128, 256, 512; the products are truncated.
        num_classes: Width of the output.
        in_channels: 3 for colour, 1 for grey images.
        dropout: Share of the last channels' means that is dropped in training.

    Raises:
        ValueError: The first stage has no channel left, or ``dropout`` is no share.
    """

    def __init__(self, width_factor: float = 1.0, num_classes: int = 100, in_channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        share(dropout=dropout)
        self.dropout = dropout
        widths = [int(width * width_factor) for width in (64, 128, 256, 512)]
        if widths[0] < 1:
            raise ValueError(f"width_factor={width_factor} leaves {widths[0]} channels in the first stage: give 1/64 or more")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], 2, 1, projection=True)
        self.layer2 = _stage(widths[0], widths[1], 2, 2, projection=True)
        self.layer3 = _stage(widths[1], widths[2], 2, 2, projection=True)
        self.layer4 = _stage(widths[2], widths[3], 2, 2, projection=True)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(_dropped(x.mean(dim=(2, 3)), self, self.dropout))


class _PreActivation(nn.Module):
    """Norm, leaky ReLU, 3x3 convolution, twice, around a shortcut; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.bn1(x), 0.1)
        # where the shape changes, the shortcut starts from the activation, too
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        inner = _dropped(F.leaky_relu(self.bn2(self.conv1(active)), 0.1), self, self.dropout)
        return shortcut + self.conv2(inner)


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images (arXiv:1605.07146), with the leaky ReLU of semi-supervised work.

    Submodules: ``conv1``, ``layer1`` to ``layer3`` (or ``layer4``), ``bn``, ``fc``.

    Cost: 1.5 million parameters with the defaults.

    Args:
        depth: 6n + 4: 28, 40, ...; with four stages 8n + 5: 37.
        width: Factor of the channels 16, 32, 64, 128.
        num_classes: Width of the output; 0: no ``fc``, the output is the mean of the last channels, 64 * width or 128 * width.
        in_channels: 3 for colour, 1 for grey images.
        stages: 3, or 4 for larger images such as STL-10's (mem).
        dropout: Share of the values that is dropped in training between the two convolutions of each block, as in the paper (mem).

    Raises:
        ValueError: ``depth`` doesn't fit the stages, or ``dropout`` is no share.
    """

    def __init__(
        self, depth: int = 28, width: int = 2, num_classes: int = 10, in_channels: int = 3, stages: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        share(dropout=dropout)
        if stages not in (3, 4):
            raise ValueError(f"stages={stages}: give 3 or 4")
        blocks_a_stage, left = divmod(depth - stages - 1, 2 * stages)
        if left or blocks_a_stage < 1:
            wanted = "6n + 4: give 10, 16, 22, 28, 34 or 40" if stages == 3 else "8n + 5: give 13, 21, 29 or 37"
            raise ValueError(f"depth={depth} is not {wanted}")
        self.stages = stages
        widths = [16, *(16 * 2**stage * width for stage in range(stages))]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        for number, (inside, outside) in enumerate(pairwise(widths), start=1):
            blocks = [_PreActivation(inside, outside, 1 if number == 1 else 2, dropout)]
            blocks += [_PreActivation(outside, outside, 1, dropout) for _ in range(blocks_a_stage - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes), or the mean of the last channels without ``fc``."""
        x = self.conv1(images)
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(F.leaky_relu(self.bn(x), 0.1).mean(dim=(2, 3)))


class TimmNetwork(nn.Module):
    """Any network of timm, such as ``vit_base_patch16_224``, ``resnet50`` or ``resnet18``; its submodules stand under ``model.``.

    Args:
        name: Name in timm.
        num_classes: Width of the output.
        pretrained: Load timm's weights; they are downloaded once, if they aren't there yet.
        options: Further arguments of ``timm.create_model``, such as ``{drop_path_rate: 0.1, img_size: 64}``.

    Raises:
        ValueError: timm has no such network (the message names similar ones), or its weights can't be had.
    """

    def __init__(self, name: str, num_classes: int = 1000, pretrained: bool = False, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = timm_network(name, pretrained, num_classes=num_classes, **(options or {}))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm keeps out of weight decay, such as position embeddings."""
        listed: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in listed}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.model(images)


__all__ = ["MLP", "CifarResNet", "CifarResNet18", "GatedMLP", "SmallConvNet", "TimmNetwork"]
