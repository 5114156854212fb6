"""How far samples are from data: by themselves, and by features that a network finds in them; and the part of a module that asks this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import ImageMedia, Media
from lit_methods.steps import log_global

Kept = TypeVar("Kept")
Purpose = Literal["evaluation", "prediction"]


def sliced_wasserstein(samples: Tensor, data: Tensor, projections: int = 64, seed: int = 0) -> Tensor:
    """Sliced Wasserstein-2 distance: root of the mean squared distance of sorted projections on random directions (arXiv:1804.01947).

    Args:
        samples: (N, D).
        data: (N, D).
        projections: Number of directions.
        seed: Seed of the directions: they are the same on every machine.

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
    gap: Tensor = distance.compute().float()
    return gap


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
        steps: Training steps of Adam, with 128 images each.
        seed: Seed of weights and order.
    """

    def __init__(self, steps: int = 200, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, "training steps", steps=steps)
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

    def training_data(self) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 8, 8) in [-1, 1] and labels (N,)."""
        from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule

        data = GenerativeDigitsDataModule(image_size=8)
        data.setup("fit")
        assert data.train_set is not None
        assert data.train_set.labels is not None
        return data.train_set.images, data.train_set.labels

    def train_once(self) -> None:
        """Train, unless it has been done."""
        if self._trained:
            return
        self._trained = True
        device = self.classes.weight.device
        images, labels = (part.to(device) for part in self.training_data())
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


# ---- the part of a module that evaluates -----------------------------------------------------------------------------------------------


class WholeSetEvaluation(Evaluated, Generic[Kept]):
    """Base of modules whose figures need all of the validation or test data at once.

    Subclasses give :meth:`_evaluate`, which adds to ``_seen`` what it keeps of a batch, and :meth:`compare`, which logs. All of it stays in
    memory until then: limit the data.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Kept] = []

    def compare(self, part: Part, seen: list[Kept]) -> None:
        """Log what all batches of this rank say together."""
        raise NotImplementedError

    def global_batch(self, batch_idx: int) -> int:
        """Number of this rank's batch among those of all ranks: what seeds its random numbers."""
        return batch_idx * self.trainer.world_size + self.global_rank

    def forget(self) -> None:
        """Drop what was kept."""
        self._seen = []

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self.forget()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self.forget()

    def _log_evaluation(self, part: Part) -> None:
        if not self._seen:
            raise ValueError(f"rank {self.global_rank} has seen no data to compare with: take fewer ranks or a smaller batch_size")
        self.compare(part, self._seen)
        self.forget()


Samples = tuple[Tensor, dict[int, Tensor]]


class SampleEvaluation(WholeSetEvaluation[Samples]):
    """Base of modules that draw samples: as many as there are data, compared with them, shown and predicted.

    Subclasses give :meth:`_draw_samples` and set :attr:`prefix`. ``<prefix>/val_sw2`` is the sliced Wasserstein distance of one-step
    samples, ``<prefix>/val_sw2_<n>_steps`` that of longer samplings, ``<prefix>/samples`` the picture.
    """

    prefix: ClassVar[str]
    grid: int = 16  # images in a row of the picture; 0: no picture

    def __init__(self) -> None:
        super().__init__()
        self._pictures: Samples | None = None  # data and samples of the last evaluation

    def _draw_samples(self, batch: dict[str, Tensor], batch_idx: int, purpose: Purpose) -> dict[int, Tensor]:
        """Steps -> as many samples as the batch has, of the same noise each time; other ranks draw other noise."""
        raise NotImplementedError

    def to_images(self, samples: Tensor) -> Tensor:
        """What samples (B, ...) look like."""
        return samples

    def sample_metrics(self, samples: Tensor) -> Mapping[str, Tensor]:
        """Further figures of samples (N, ...): name -> scalar."""
        return {}

    def ending(self, steps: int) -> str:
        """What the names of figures end with, for samples of so many steps."""
        return "" if steps == 1 else f"_{steps}_steps"

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Draw as many samples as there are data, by the weights that ``WeightEMA`` lends: ``<n>_steps`` -> (B, ...)."""
        drawn = self._draw_samples(batch, batch_idx, "evaluation")
        self._seen.append((batch["image"].float().cpu(), {steps: samples.float().cpu() for steps, samples in drawn.items()}))
        return {f"{steps}_steps": samples for steps, samples in drawn.items()}

    def compare(self, part: Part, seen: list[Samples]) -> None:
        """Log how far the samples of all ranks are from the data of all ranks."""
        data = gather_rows(torch.cat([images for images, _ in seen]), with_grad=False)
        every = {steps: gather_rows(torch.cat([drawn[steps] for _, drawn in seen]), with_grad=False) for steps in seen[0][1]}
        for steps, samples in every.items():
            values = {"sw2": sliced_wasserstein(samples.flatten(1), data.flatten(1)), **self.sample_metrics(samples)}
            logs = {f"{self.prefix}/{part}_{name}{self.ending(steps)}": value for name, value in values.items()}
            log_global(self, logs)
        self._pictures = data, every

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``<n>_steps`` -> as many samples as the batch has images; of the batch, shape and conditions are used."""
        drawn = self._draw_samples(batch, batch_idx, "prediction")
        return {f"{steps}_steps": self.to_images(samples) for steps, samples in drawn.items()}

    def dashboard_media(self) -> dict[str, Media]:
        """Samples of the last evaluation: a grid of images, or the density of points in the plane; nothing for other data."""
        if self._pictures is None or not self.grid:
            return {}
        data, every = self._pictures
        steps = ", ".join(map(str, every))
        if data.ndim == 2 and data.shape[1] == 2:
            limit = 1.25 * float(data.abs().max())
            picture = torch.cat([density_picture(points, limit) for points in (data, *every.values())], dim=1)
            words = f"Density of the data on the left; of samples in {steps} steps beside it"
        elif data.ndim == 4:
            shown = [self.to_images(samples[: self.grid]).cpu() for samples in every.values()]
            if shown[0].shape[1] not in (1, 3):
                return {}
            picture, words = sample_rows(shown), f"{len(shown[0])} samples in {steps} steps, one row each"
        else:
            return {}
        return {f"{self.prefix}/samples": ImageMedia(picture.contiguous().numpy(), alt=words)}


def sample_rows(rows: Sequence[Tensor]) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1], a row of the picture for each tensor: (h, w, 3) uint8."""
    images = torch.cat(list(rows)).add(1).div(2).clamp(0, 1)
    return make_grid(images, nrow=len(rows[0]), padding=1).mul(255).round().byte().permute(1, 2, 0)


def density_picture(points: Tensor, limit: float, size: int = 192) -> Tensor:
    """How many points fall into each pixel of a square around 0, bright where there are many; points outside aren't seen.

    Args:
        points: (N, 2).
        limit: Half the side of the square, > 0.
        size: Pixels a side.

    Returns:
        (size, size, 3) uint8, the second coordinate upwards.
    """
    place = ((points + limit) * (size / (2 * limit))).floor()
    place = place[((place >= 0) & (place < size)).all(1)].long()
    counts = torch.bincount((size - 1 - place[:, 1]) * size + place[:, 0], minlength=size**2).view(size, size).float()
    bright = (counts / counts.max().clamp(min=1)).sqrt()[:, :, None]
    low, high = torch.tensor([13.0, 20.0, 33.0]), torch.tensor([240.0, 220.0, 130.0])
    return (low + bright * (high - low)).round().byte()
