"""What logging adds to a training step: Dashboard with W&B offline against no logger at all, in one process, in turns.

    python benchmarks/logging_cost.py [--steps 40] [--repeats 5] [--every 10] [--json FILE]

The model is a ResNet-18 on batches of 16 random images of 64 x 64 pixels, on the CPU with one thread: a step of about a tenth of a second,
shorter than most real ones, so that the share is rather too large than too small. It logs five declared metrics with ``self.log``, and
Lightning hands them on every ``--every`` steps. Media are logged at validation ends only, so there are none here.

Each repeat trains the two sides one after the other, the first of them in turns, and takes the mean over the steps of a fit, from the
start of one batch to the start of the next: logging happens in some steps only, so a median would miss it. The first five steps are left
out. A ratio is with / without of one repeat. Two clocks:

- ``cpu``: processor time of the training thread (``time.thread_time``), which a busy machine disturbs little. It holds everything that
  blocks the step and computes; W&B's own process and threads run beside it.
- ``wall``: the time that passes, which on a busy machine says as much about the other programs.

Target: a median ``cpu`` ratio of at most 1.02. The script fails when it is missed, or when a side ends with other weights.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchvision.models import resnet18

from lit_methods.callbacks.run.dashboard import Dashboard
from lit_methods.panels import Curve, Panel
from lit_methods.runs.wandb import finish_runs

WARM_UP = 5
TARGET = 1.02


class Images(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """``count`` random images with random labels."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(64, 3, 64, 64, generator=generator)
        self.labels = torch.randint(0, 10, (64,), generator=generator)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % 64], self.labels[index % 64]


class Classifier(pl.LightningModule):
    """A ResNet-18 that logs five metrics."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("bench/loss",), goal="min"),
        Curve("Accuracy", ("bench/top1", "bench/top5"), goal="max"),
        Curve("Confidence", ("bench/confidence", "bench/entropy")),
    )

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet18(num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.network(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        with torch.no_grad():
            probabilities = logits.softmax(1)
            hits = logits.topk(5).indices == batch[1][:, None]
            self.log_dict(
                {
                    "bench/loss": loss,
                    "bench/top1": hits[:, 0].float().mean(),
                    "bench/top5": hits.any(1).float().mean(),
                    "bench/confidence": probabilities.amax(1).mean(),
                    "bench/entropy": -(probabilities * probabilities.log()).sum(1).mean(),
                }
            )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Both clocks at the start of each batch."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append((time.thread_time(), time.perf_counter()))

    def means(self) -> dict[str, float]:
        """Seconds per step by clock."""
        (cpu_0, wall_0), (cpu_1, wall_1) = self.times[WARM_UP], self.times[-1]
        steps = len(self.times) - 1 - WARM_UP
        return {"cpu": (cpu_1 - cpu_0) / steps, "wall": (wall_1 - wall_0) / steps}


def train(steps: int, every: int, logged: bool, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Seconds per step by clock, and the weights at the end as one vector."""
    pl.seed_everything(0, verbose=False)
    clock = Clock()
    logger = WandbLogger(project="benchmark", save_dir=folder) if logged else False
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + WARM_UP + 1,
        logger=logger,
        log_every_n_steps=every,
        callbacks=[clock, Dashboard()] if logged else [clock],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader(Images((steps + WARM_UP + 1) * 16), batch_size=16))
    if logged:
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == (steps + WARM_UP + 1) // every, f"{len(rows)} rows were logged"
    finish_runs(trainer.loggers)
    return clock.means(), torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value, that value."""
    return (values[0],) * 3 if len(values) == 1 else tuple(statistics.quantiles(values, n=4, method="inclusive"))  # type: ignore[return-value]


def main() -> int:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each fit (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of fits (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="log_every_n_steps (default: %(default)s; Lightning's own is 50)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sides: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as root:
        for repeat in range(options.repeats):
            ends = []
            for logged in (False, True) if repeat % 2 else (True, False):
                seconds, weights = train(options.steps, options.every, logged, Path(root) / f"{repeat}-{logged}")
                sides[logged].append(seconds)
                ends.append(weights)
            assert torch.equal(*ends), "logging has changed the training"
    figures: dict[str, Any] = {"steps": options.steps, "repeats": options.repeats, "every": options.every}
    print(f"ResNet-18, {options.steps} steps a fit, {options.repeats} pairs of fits, metrics every {options.every} steps")
    print(f"{'clock':6}{'without, ms':>13}{'with, ms':>11}{'ratio: lower quartile, median, upper':>40}")
    for clock in ("cpu", "wall"):
        without, logged_times = ([side[clock] for side in sides[logged]] for logged in (False, True))
        ratios = quartiles([b / a for a, b in zip(without, logged_times, strict=True)])
        middle = statistics.median(without) * 1e3, statistics.median(logged_times) * 1e3
        figures[clock] = {"without_ms": middle[0], "with_ms": middle[1], "ratio_quartiles": ratios}
        print(f"{clock:6}{middle[0]:13.2f}{middle[1]:11.2f}{'   '.join(f'{ratio:.4f}' for ratio in ratios):>40}")
    met = figures["cpu"]["ratio_quartiles"][1] <= TARGET
    print(f"target: median cpu ratio <= {TARGET}: {'met' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
