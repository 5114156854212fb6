"""Points that nothing but a term moves: what losses of generators do by themselves."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.datamodules.generative.few_shot import turned_points
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.steps import log_global


class PointGenerator(nn.Module):
    """A generator whose answers are free parameters.

    Args:
        start: (N, D) where they start.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(start)

    def forward(self, index: Tensor) -> Tensor:
        """Numbers (B,) int64 -> (B, D)."""
        return self.points[index]


class FreePoints(Evaluated):
    """Points in the plane, which start as the source turned around 0; the loss is 0, so only attached terms move them.

    The target is the source moved, not turned, by as much as the turn moves its mean. So the turned points have the target's mean and the
    source's distances and angles, and are still wrong.

    Runs: batches of ``TurnedPointsDataModule`` with the same numbers. Plain gradient descent.

    Saves: the points.

    Args:
        count: Points.
        degrees: Angle of the turn.
        learning_rate: Of gradient descent.
        seed: Seed of the source points.

    Raises:
        ValueError: A number outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Points", "points/plane", note="Grey: where they belong. Blue: where they are."),
        Curve("Distance from where they belong", ("points/val_error", "points/test_error"), goal="min"),
    )

    def __init__(self, count: int = 8, degrees: float = 60.0, learning_rate: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(3, "points", count=count)
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, seed=seed)
        self.save_hyperparameters()
        self.generator = PointGenerator(turned_points(count, degrees, seed)[1])
        self._gaps: list[Tensor] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def forward(self, index: Tensor) -> Tensor:
        """Numbers (B,) int64 -> points (B, 2)."""
        return self.generator(index)  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Nothing."""
        return self(batch["index"]).sum() * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``points`` (B, 2)."""
        return {"points": self(batch["index"])}

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        made = self(batch["index"]).detach()
        self._gaps.append((made - batch["target"]).norm(dim=1))
        self._drawn.append((made.cpu(), batch["target"].cpu()))

    def _log_evaluation(self, part: Part) -> None:
        log_global(self, {f"points/{part}_error": torch.cat(self._gaps).mean()})
        made, target = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
        self._media = {"points/plane": ImageMedia(_plane(made, target).numpy(), alt="points of the generator, and where they belong")}
        self._gaps, self._drawn = [], []


def _plane(made: Tensor, target: Tensor, side: int = 160) -> Tensor:
    """Points and targets in [-8, 8]^2 as squares: (side, side, 3) uint8."""
    picture = torch.full((side, side, 3), 255, dtype=torch.uint8)
    for points, colour, reach in ((target, (170, 170, 170), 3), (made, (40, 90, 200), 2)):
        place = ((points.float() + 8) / 16 * side).clamp(reach, side - reach - 1).long()
        offsets = torch.cartesian_prod(torch.arange(-reach, reach + 1), torch.arange(-reach, reach + 1))
        x, y = (place[:, None] + offsets).flatten(0, 1).unbind(1)
        picture[side - 1 - y, x] = torch.tensor(colour, dtype=torch.uint8)
    return picture


__all__ = ["FreePoints", "PointGenerator"]
