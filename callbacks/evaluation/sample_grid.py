"""Samples that ``predict_step`` returns, as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.distributed import gather_rows
from lit_methods.runs.folder import run_dir


class SampleGrid(BasePredictionWriter):
    """Writes the samples of ``lit predict`` as one PNG grid for each kind that ``predict_step`` returns; videos as a grid that moves.

    For any module whose ``predict_step`` returns {name: (B, 1 or 3, H, W) samples in [-1, 1]}, such as ``1_steps`` and ``2_steps``, or
    videos (B, F, 1 or 3, H, W), which are written as ``<name>.webp``, 8 frames a second. The
    grid ``<name>.png`` shows the first samples in order, of all ranks; ``samples.pt`` holds {name: (N, ...) float32}, whatever their
    shape, so that points in the plane are kept, too.

    Runs: after each predict batch and at the end of predict.
    Saves: nothing in checkpoints.
    Refuses: a ``predict_step`` that returns something else.

    Args:
        output: Folder of the files; null: ``samples/`` in the run's folder.
        columns: Images in a row.
        max_images: Images in a grid.

    Raises:
        ValueError: A number is below 1, or ``predict_step`` returns something else.
    """

    def __init__(self, output: Path | None = None, columns: int = 8, max_images: int = 64) -> None:
        super().__init__(write_interval="batch")
        at_least(1, columns=columns, max_images=max_images)
        self.output = None if output is None else Path(output)
        self.columns, self.max_images = columns, max_images
        self._samples: dict[str, list[Tensor]] = {}

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._samples = {}

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the samples."""
        if not isinstance(prediction, Mapping) or not all(isinstance(value, Tensor) for value in prediction.values()):
            raise ValueError(
                f"{type(pl_module).__name__}.predict_step must return a dict of tensors for SampleGrid, got {type(prediction).__name__}"
            )
        for name, samples in prediction.items():
            self._samples.setdefault(name, []).append(samples.detach().float().cpu())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files, on rank 0."""
        folder = run_dir(trainer) / "samples" if self.output is None else self.output
        samples = {name: gather_rows(torch.cat(parts), with_grad=False) for name, parts in self._samples.items()}
        self._samples = {}
        if not trainer.is_global_zero:
            return
        from torchvision.utils import save_image

        folder.mkdir(parents=True, exist_ok=True)
        torch.save(samples, folder / "samples.pt")
        for name, images in samples.items():
            if images.ndim == 4 and images.shape[1] in (1, 3):
                shown = images[: self.max_images].add(1).div(2).clamp(0, 1)
                save_image(shown, folder / f"{name}.png", nrow=self.columns, padding=1)
            elif images.ndim == 5 and images.shape[2] in (1, 3):
                _save_animation(images[: self.max_images], folder / f"{name}.webp", self.columns)
        rank_zero_info(f"samples are in {folder}")


def _save_animation(videos: Tensor, path: Path, columns: int) -> None:
    """Videos (N, F, 1 or 3, H, W) in [-1, 1] as one that shows them beside each other, again and again."""
    from PIL import Image
    from torchvision.utils import make_grid

    frames = videos.add(1).div(2).clamp(0, 1).transpose(0, 1)
    grids = [make_grid(frame, nrow=columns, padding=1).mul(255).round().byte().permute(1, 2, 0).numpy() for frame in frames]
    first, *rest = [Image.fromarray(grid) for grid in grids]
    first.save(path, save_all=True, append_images=rest, duration=125, loop=0, lossless=True)
