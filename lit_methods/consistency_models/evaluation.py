"""How far samples are from data: by themselves, and by features that a network finds in them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sliced_wasserstein(samples: Tensor, data: Tensor, projections: int = 64, seed: int = 0) -> Tensor:
    """Sliced Wasserstein-2 distance: root of the mean squared distance of sorted projections on random directions (arXiv:1804.01947).

    Args:
        samples: (N, D).
        data: (N, D).
        projections: Number of directions.
        seed: Of the directions: the same on every machine.

    Returns:
        Scalar >= 0; 0 if both are the same set.

    Raises:
        ValueError: Shapes that differ.
    """
    if samples.shape != data.shape:
        raise ValueError(f"{tuple(samples.shape)} samples don't fit {tuple(data.shape)} data: give as many of the same size")
    directions = torch.randn(data.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(data)
    gaps = (samples @ directions).sort(dim=0).values - (data @ directions).sort(dim=0).values
    return gaps.square().mean().sqrt()


class _AsTheyAre(nn.Module):
    """Features that have been computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(samples: Tensor, data: Tensor) -> Tensor:
    """Frechet distance of two Gaussians fitted to features (arXiv:1706.08500, Eq. 6), by torchmetrics; with Inception's features it is FID.

    It is biased: it depends on the number of samples. Compare figures of the same features and the same numbers alone.

    Args:
        samples: (N, D) features, N >= 2.
        data: (M, D), M >= 2.

    Returns:
        Scalar float32 >= 0, but for rounding.

    Raises:
        ValueError: Too few, or different D.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_features(samples, data)
    # of this process alone: callers have gathered the features of all
    distance = FrechetInceptionDistance(_AsTheyAre(samples.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    distance.update(data.cpu().double(), real=True)
    distance.update(samples.cpu().double(), real=False)
    found: Tensor = distance.compute().float()
    return found


def _check_features(samples: Tensor, data: Tensor) -> None:
    if samples.ndim != 2 or data.ndim != 2 or samples.shape[1] != data.shape[1] or min(len(samples), len(data)) < 2:
        raise ValueError(f"features are {tuple(samples.shape)} and {tuple(data.shape)}: give (N, D) and (M, D) with at least 2 each")


def _reach(features: Tensor, neighbours: int, chunk: int) -> Tensor:
    """(N,) distance of each to its k-th nearest other."""
    # rank k + 1: the nearest of all is the point itself
    return torch.cat([torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(chunk)])


def _covered(points: Tensor, features: Tensor, reach: Tensor, chunk: int) -> Tensor:
    """Share of the points that lie within reach of at least one of the features."""
    inside = [(torch.cdist(part, features) <= reach).any(1) for part in points.split(chunk)]
    return torch.cat(inside).float().mean()


def precision_recall(samples: Tensor, data: Tensor, neighbours: int = 3, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (arXiv:1904.06991): how many samples look like data, and how much of the data samples can look like.

    A set is the union of balls around its points, each as large as the distance to its k-th nearest neighbour.

    Args:
        samples: (N, D) features, N > ``neighbours``.
        data: (M, D), M > ``neighbours``.
        neighbours: k, 3 in the paper.
        chunk: Rows at a time: memory is ``chunk`` times the larger number.

    Returns:
        Share of the samples inside the data's set, and share of the data inside the samples' set; scalars in [0, 1].

    Raises:
        ValueError: Too few, or different D.
    """
    _check_features(samples, data)
    if min(len(samples), len(data)) <= neighbours or neighbours < 1:
        raise ValueError(
            f"{len(samples)} samples and {len(data)} data don't have {neighbours} neighbours each: give more, or fewer neighbours"
        )
    wide = torch.promote_types(samples.dtype, torch.float32)
    samples, data = samples.to(wide), data.to(samples.device, wide)
    precision = _covered(samples, data, _reach(data, neighbours, chunk), chunk)
    return precision, _covered(data, samples, _reach(samples, neighbours, chunk), chunk)


# ---- features --------------------------------------------------------------------------------------------------------------------------


class ScriptedFeatures(nn.Module):
    """Features of a network that is stored as TorchScript, such as the Inception network of StyleGAN's FID.

    Args:
        path: File; its network maps (B, 3, H, W) images to (B, D) features. Loading it runs its code: take it from whom you trust.
        as_bytes: Give it uint8 images in 0..255, as that Inception network wants them; False: float32 in [-1, 1].

    Raises:
        FileNotFoundError: No such file.
    """

    def __init__(self, path: Path, as_bytes: bool = True) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"path={str(path)!r} is no file: give a TorchScript network, such as inception-2015-12-05.pt")
        self.model = torch.jit.load(str(path), map_location="cpu")
        self.as_bytes = as_bytes

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] -> (B, D)."""
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if not self.as_bytes:
            features: Tensor = self.model(images)
            return features
        pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        features = self.model(pixels, return_features=True)
        return features


class DigitFeatures(nn.Module):
    """64 features of a small classifier of scikit-learn's digits. Distances in them aren't comparable with anybody's FID.

    The classifier is trained on the first 1,500 of ``DigitsDataModule``, at 8 x 8 pixels, when it is first used: a second or so. The global
    random number generators aren't touched. Larger images are averaged down to 8 x 8.

    Cost: 17 thousand parameters; the first use trains them, a second or so.

    Args:
        steps: Of Adam, with 128 images each.
        seed: Of weights and order.
    """

    def __init__(self, steps: int = 200, seed: int = 0) -> None:
        super().__init__()
        self.steps, self.seed = steps, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
            self.classes = nn.Linear(64, 10)
        self._trained = False

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) in [-1, 1] -> (B, 64)."""
        self.train_once()
        features: Tensor = self.hidden(F.adaptive_avg_pool2d(images, 8))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) in [-1, 1] -> (B, 10)."""
        answer: Tensor = self.classes(self(images))
        return answer

    def train_once(self) -> None:
        """Train, unless it has been done."""
        if self._trained:
            return
        self._trained = True
        from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule

        data = GenerativeDigitsDataModule(image_size=8)
        data.setup("fit")
        assert data.train_set is not None
        assert data.train_set.labels is not None
        device = self.classes.weight.device
        images, labels = data.train_set.images.to(device), data.train_set.labels.to(device)
        frozen = {name: not parameter.requires_grad for name, parameter in self.named_parameters()}
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.enable_grad():
            optimizer = torch.optim.Adam(self.requires_grad_(True).parameters(), lr=3e-3)
            for _ in range(self.steps):
                some = torch.randint(len(images), (128,), generator=generator).to(device)
                loss = F.cross_entropy(self.classes(self.hidden(images[some])), labels[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen[name])
            parameter.grad = None
