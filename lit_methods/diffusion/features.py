"""Features of images in [-1, 1] from networks that stay as they are: CLIP, VGG, and a small network of digits that is trained here."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least
from lit_methods.consistency_models.evaluation import DigitFeatures
from lit_methods.datamodules.generative.few_shot import DigitStyle, restyle
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD
from lit_methods.hub import fetch, leave_out

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's training images


def _colours(images: Tensor) -> Tensor:
    """Three channels: grey is repeated."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class _Normalised(nn.Module):
    """Images in [-1, 1] -> as a pretrained network wants them."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((_colours(images) + 1) / 2 - self.mean) / self.std


class CLIPImageFeatures(nn.Module):
    """Image features of CLIP by transformers, not normalised; gradients flow to the images.

    Args:
        name_or_path: Folder in the format of transformers, or a name on the hub.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        NotThereError: There is no such model.
    """

    def __init__(self, name_or_path: str = "openai/clip-vit-base-patch32") -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError('CLIPImageFeatures needs transformers: pip install "lit-methods[transformers]"') from error
        kind: Any = transformers.CLIPVisionModelWithProjection
        place = str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path
        self.model: Any = fetch(
            lambda: kind.from_pretrained(place, dtype=torch.float32),
            place,
            given=f"name_or_path={name_or_path!r}",
            instead="give the folder of a CLIP model of transformers",
            blank=lambda: kind(transformers.CLIPVisionConfig(patch_size=32)),
        )
        self.size = int(self.model.config.image_size)
        self.normalised = _Normalised(CLIP_MEAN, CLIP_STD)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] -> (B, D)."""
        resized = F.interpolate(self.normalised(images), (self.size, self.size), mode="bicubic", antialias=True)
        features: Tensor = self.model(pixel_values=resized).image_embeds
        return features


class VGGMaps(nn.Module):
    """Feature maps of VGG-16 behind relu1_2, relu2_2, relu3_3 and relu4_3, with averages in the place of its maxima.

    Args:
        weights: File of torchvision's VGG-16, such as ``vgg16-397923af.pth``.
        size: Side that images are resized to; None: as they are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds other weights.
    """

    def __init__(self, weights: Path, size: int | None = 224) -> None:
        super().__init__()
        at_least(1, "pixels", size=size)
        from torchvision.models import vgg16

        with torch.device("meta"):  # without its classifier, which is larger than all the rest
            layers = vgg16(weights=None).features[:23]
        layers.to_empty(device=torch.get_default_device())
        path = Path(weights).expanduser()
        if not leave_out(f"weights={str(weights)!r}", path):
            if not path.is_file():
                raise FileNotFoundError(f"weights={str(path)!r} is no file: give torchvision's VGG-16, such as vgg16-397923af.pth")
            from lit_methods.runs.checkpoints import read_state_dict

            state = read_state_dict(path)
            own = layers.state_dict()
            found = {name: state.get(f"features.{name}") for name in own}
            wrong = [name for name, value in found.items() if value is None or value.shape != own[name].shape]
            if wrong:
                raise ValueError(f"weights={str(path)!r} lacks features.{wrong[0]}, or has it in another shape: give torchvision's VGG-16")
            layers.load_state_dict(found)
        averaged = [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers]
        parts = ((0, 4), (4, 9), (9, 16), (16, 23))
        self.parts = nn.ModuleList(
            nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in averaged[first:last])) for first, last in parts
        )
        self.size = size
        self.normalised = _Normalised(IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1 or 3, H, W) in [-1, 1] -> four maps (B, C, h, w)."""
        x = self.normalised(images)
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return maps


class DigitConvFeatures(DigitFeatures):
    """64 features, and two layers of feature maps, of a small convolutional classifier of scikit-learn's digits.

    It is trained when it is first used, a second or two. Larger images are averaged down to 8 x 8. Trained on digits in a target's style
    it judges what class a translated digit has.

    Cost: 38 thousand parameters; the first use trains them, a second or two.

    Args:
        style: Style of the digits that it is trained on: ``plain``, or one of ``FewShotDigitsDataModule``.
        steps: Training steps of Adam, with 128 images each.
        seed: Seed of weights and order.
    """

    def __init__(self, style: DigitStyle = "plain", steps: int = 200, seed: int = 0) -> None:
        super().__init__(steps, seed)
        self.style: DigitStyle = style
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
            self.hidden = nn.Sequential(self.first, self.second, nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
            self.classes = nn.Linear(64, 10)

    def training_data(self) -> tuple[Tensor, Tensor]:
        """Digits in the style, made at 16 x 16 and averaged down."""
        from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule

        data = GenerativeDigitsDataModule(image_size=16)
        data.setup("fit")
        assert data.train_set is not None
        assert data.train_set.labels is not None
        return F.adaptive_avg_pool2d(restyle(data.train_set.images, self.style), 8), data.train_set.labels

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 1, S, S) in [-1, 1] -> (B, 16, 8, 8) and (B, 32, 4, 4)."""
        self.train_once()
        first = self.first(F.adaptive_avg_pool2d(images, 8))
        return [first, self.second(first)]


__all__ = ["CLIPImageFeatures", "DigitConvFeatures", "VGGMaps"]
