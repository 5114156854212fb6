"""FLAIR: solving inverse problems with a frozen flow model (arXiv:2506.02680); trains a small prior, calibrates, restores.

Maths and origin: :mod:`lit_methods.inverse_problems.flair.core`; flow models: :mod:`~lit_methods.inverse_problems.flair.priors`. Left out:
prompts of single images, and perceptual metrics.
"""

import csv
import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Part
from lit_methods.files import replacing, write_atomically
from lit_methods.frozen import Frozen
from lit_methods.inverse_problems.flair.core import FlairSettings, largest_pull, time_grid
from lit_methods.inverse_problems.flair.matching import FlowMatchingModule
from lit_methods.inverse_problems.flair.solver import FlowInverseSolver, Method, Restored, Weighting
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="flair",
    short="FLAIR",
    title="Solving Inverse Problems with FLAIR",
    arxiv="2506.02680",
    family="inverse_problems",
    form="module",
    classes=("lit_methods.FLAIR", "lit_methods.FlowMatchingModule", "lit_methods.SD3Flow", "lit_methods.datamodules.RestorationDataModule"),
    configs=("flair.yaml", "flair_mixture.yaml"),
    golden=("calib", "step", "data_term", "solve"),
    claim="With a prior whose velocity is exact, FLAIR restores vectors from six of their sixteen coordinates more closely than it does "
    "without its deterministic trajectory adjustment.",
    summary="Restores images without training for the task: a latent mean is pulled by a frozen flow model and pushed onto the data.",
)

_DEFAULT = FlairSettings()
_FIGURES = ("error", "start_error", "residual", "psnr", "ssim", "seconds")
_STRIP, _SHOWN = 8, 8  # times and images in the pictures


class FLAIR(FlowMatchingModule):
    """Restores images from y = A x + noise with a flow model as prior, without training for A.

    A latent mean mu is optimised along falling times t: the prior pulls it, mu -= w(t) (v - u), where v is the model's velocity at mu with
    noise that the model itself predicted before (trajectory adjustment), and u = noise - mu; then gradient steps push A(D(mu)) onto y (hard
    data consistency). w(t) is the inverse of the model's measured error at t.

    Runs: ``fit`` trains the prior by flow matching if it has weights to train, else its steps do nothing. Validation measures the model's
    error at each time on clean images, and restores some of them. ``test`` and ``predict`` restore all. Batches have ``image`` (B, C, H, W)
    in [-1, 1], and ``index`` (B,) and ``name`` where they are from ``RestorationDataModule``: all noise follows from seed and index, so
    results don't depend on batches and ranks. Each rank restores its own images. The model runs in its own type or under autocast, mu in
    float32.

    Saves: the network, and the curve of errors, from which the weights follow.

    Refuses: images outside [-1, 1]; an operator whose adjoint isn't one; restoring with calibrated weights that nobody measured. Warns
    where a step would overshoot.

    Args:
        prior: Flow model: ``LatentFlow``, ``SD3Flow``, ``GaussianMixtureFlow``.
        operator: A: an operator of ours or of deepinv.
        settings: How mu is optimised; the samplers among the baselines take ``steps``, ``lr_data`` and ``data_steps``.
        method: ``flair``, or a baseline: ``red_diff``, ``flow_dps``, ``flow_chef``, ``dps``.
        noise: Standard deviation of what is added to A x.
        degraded: The images of ``predict`` are measurements already, such as small or blurred ones; of an inpainting's what is masked
            doesn't count. Without it they are degraded first.
        weighting: w(t): ``calibrated``; ``linear``: ``weight`` t; ``constant``: ``weight`` times ``ts_min``, RED-diff's.
        weight: The largest w(t) / t of ``linear`` and ``constant``.
        weights: File (.npy) of a curve of errors at linspace(1, 0, N), or of weights, if its name has ``reg_weight`` in it.
        calibration_times: N of the curve that is measured: so many passes of the model in validation.
        reg_shift: Added to calibrated weights of mean 1; null: the last one is taken off.
        regularizer_weight: Factor of calibrated weights; null: such that w(t) / t is at most 1.
        start: mu begins at E(A+ y), ``pseudo_inverse``, or at ``noise``.
        eta: Share of fresh noise in FlowDPS.
        features: Network of images (B, C, H, W) -> (B, D); ``test`` then logs the Frechet distance of restored and clean images in its
            features, for two images and more. Null: none.
        val_images: Images that each validation restores.
        output: Folder for what ``predict`` restores, as PNG with a table. Images that are there are not restored again.
        learning_rate: AdamW's, for a prior that is trained.
        weight_decay: AdamW's.
        seed: Seed of all noise.

    Raises:
        TypeError: ``prior`` is no flow model, or ``operator`` no operator.
        ValueError: A number outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Restored images", "flair/images", note="Rows: pseudo-inverse of what was measured, restored, clean."),
        ImagePanel("One image over time", "flair/strip", note="D(mu) from t near 1 on the left to the end on the right."),
        *FlowMatchingModule.panels,
        Curve("Restored against clean images", ("flair/val_psnr",), note="Peak signal-to-noise ratio in dB.", goal="max"),
        Curve("What is left of the measurements", ("flair/val_residual",), note="Mean square of A x - y; noise^2 is enough.", goal="min"),
        Curve("Largest pull", ("flair/pull",), note="max w(t) / t: above 2 a step of the regulariser diverges."),
        TablePanel("Over time", "flair/times", note="Means over the images of the last evaluation."),
    )

    def __init__(
        self,
        prior: nn.Module,
        operator: nn.Module,
        settings: FlairSettings = _DEFAULT,
        method: Method = "flair",
        noise: float = 0.01,
        degraded: bool = False,
        weighting: Weighting = "calibrated",
        weight: float = 0.8,
        weights: Path | None = None,
        calibration_times: int = 100,
        reg_shift: float | None = 0.0,
        regularizer_weight: float | None = 0.5,
        start: Literal["pseudo_inverse", "noise"] = "pseudo_inverse",
        eta: float = 0.5,
        features: nn.Module | None = None,
        val_images: int = 8,
        output: Path | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(prior, learning_rate, weight_decay, seed)
        checks.at_least(0, noise=noise)
        checks.at_least(1, val_images=val_images)
        with checks.naming("FLAIR"):
            self.solver = FlowInverseSolver(
                self.prior, operator, settings, method, weighting, weight, weights, calibration_times, reg_shift, regularizer_weight, start,
                eta, seed,
            )  # fmt: skip
        self.save_hyperparameters(ignore=["prior", "operator", "settings", "features", "weights", "output"])
        self.features = None if features is None else Frozen(features)
        self.noise, self.degraded, self.val_images = noise, degraded, val_images
        self.output = None if output is None else Path(output).expanduser()
        self._forget()
        self._media: dict[str, Media] = {}

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._errors: list[Tensor] = []  # (B, 1 + N) number and error of each image
        self._kept: list[tuple[list[int], Tensor]] = []  # numbers and images that validation restores
        self._rows: list[Tensor] = []  # (B, 1 + figures)
        self._features: list[Tensor] = []  # (B, 1 + 2 D) number, features of restored and clean images
        self._weights: list[float] = []  # w(t) at each time; none on a rank without images
        self._times: list[Tensor] = []  # (B, times, 4)
        self._shown: tuple[Tensor, Restored] | None = None
        self._checked = False
        self._names: dict[int, str] = {}  # of the images, by number
        self._made: str | None = None

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._forget()

    def on_predict_epoch_start(self) -> None:
        """Forget what an interrupted prediction left."""
        self._forget()

    def _read(self, batch: dict[str, Any], batch_idx: int) -> tuple[Tensor, list[int]]:
        """Images as ordinary tensors, and their numbers."""
        images = self.images(batch).clone()  # made by a loader under inference mode, they couldn't be part of a graph
        index = batch.get("index")
        first = (batch_idx * self.trainer.world_size + self.global_rank) * len(images)
        numbers = index.tolist() if isinstance(index, Tensor) else list(range(first, first + len(images)))
        self._names |= dict(zip(numbers, map(str, batch.get("name", ())), strict=False))
        self._tell(numbers)
        return images, numbers

    def _tell(self, numbers: list[int]) -> None:
        """Let the prior know which images the next calls are about."""
        self.prior.about([self._names.get(number, "") for number in numbers])

    def _measure(self, images: Tensor, numbers: list[int], degraded: bool = False) -> Tensor:
        if not self._checked and not degraded:
            self.solver.check(images)
            self._checked = True
        return self.solver.measure(images, numbers, self.noise, degraded)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure the model's error for clean images; keep the first ones, to restore them when all is measured."""
        with torch.inference_mode(False), torch.no_grad():
            images, numbers = self._read(batch, batch_idx)
            errors = self.solver.errors(images, numbers)
            self._errors.append(torch.cat([errors.new_tensor(numbers)[:, None], errors], 1))
            left = self.val_images - sum(len(kept) for kept, _ in self._kept)
            if left > 0:
                self._kept.append((numbers[:left], images[:left]))

    def on_validation_epoch_end(self) -> None:
        """Take over the curve that all ranks measured, and restore some images with its weights."""
        errors = _in_order(self._errors, 1 + len(self.solver.error), self.device)
        if not len(errors):
            return
        self.solver.error.copy_(errors[:, 1:].mean(0))
        kept = [(number, image) for numbers, images in self._kept for number, image in zip(numbers, images, strict=True)]
        numbers = torch.tensor([[number] for number, _ in kept], dtype=torch.float64, device=self.device).reshape(-1, 1)
        chosen = set(gather_rows(numbers, with_grad=False).flatten().sort().values[: self.val_images].tolist())
        if own := [(number, image) for number, image in kept if number in chosen]:
            with torch.inference_mode(False):
                self._restore(torch.stack([image for _, image in own]), [number for number, _ in own])
        pull = largest_pull(self.solver.curve_weights(), self.solver.settings.ts_min)
        log_global(self, {"flow/val_loss": self.solver.error.mean().float(), "flair/pull": pull.float()})
        self._log("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Degrade and restore a batch."""
        with torch.inference_mode(False), torch.no_grad():
            images, numbers = self._read(batch, batch_idx)
            restored = self._restore(images, numbers).images
            if self.features is not None:
                pair = [self.features(part.clamp(-1, 1).float()).double() for part in (restored, images)]
                self._features.append(torch.cat([pair[0].new_tensor(numbers)[:, None], *pair], 1))

    def on_test_epoch_end(self) -> None:
        """Log figures over all images of all ranks."""
        if self.features is not None:
            from lit_methods.consistency_models.evaluation import frechet_distance

            width = gather_rows(torch.tensor([[self._features[0].shape[1] if self._features else 0]], device=self.device)).max()
            restored, clean = _in_order(self._features, int(width), self.device)[:, 1:].chunk(2, 1)
            log_global(self, {"flair/test_frechet": frechet_distance(restored, clean)})
        self._log("test")

    def _restore(self, images: Tensor, numbers: list[int]) -> Restored:
        self._tell(numbers)
        y = self._measure(images, numbers)
        found = self.solver.restore(y, numbers)
        self._rows.append(torch.cat([found.images.new_tensor(numbers)[:, None].double(), self._figures(found, images)], 1))
        columns = [torch.stack([trace.residual, trace.gap, trace.steps.to(trace.residual)], 1) for trace in found.traces]
        self._times.append(torch.stack(columns, 1).double().flatten(1))
        self._weights = [trace.weight for trace in found.traces]
        if self._shown is None:
            self._shown = images, found
        return found

    def _figures(self, found: Restored, clean: Tensor) -> Tensor:
        """(B, 6) float64: squared distance of restored image and of the start to the clean one, residual, PSNR, SSIM, seconds."""

        def distance(images: Tensor) -> Tensor:
            return (images.double() - clean.double()).flatten(1).square().sum(1)

        cut = found.images.clamp(-1, 1) if self.prior.bounded else found.images
        psnr = -10 * ((cut.double() - clean.double()).flatten(1).square().mean(1).clamp(min=1e-12) / 4).log10()
        ssim = torch.full_like(psnr, torch.nan)
        if self.prior.bounded and min(clean.shape[-2:]) >= 11:
            from torchmetrics.functional.image import structural_similarity_index_measure

            ssim = structural_similarity_index_measure(cut.float(), clean.float(), data_range=2.0, reduction="none").double()  # type: ignore[union-attr]
        return torch.stack(
            [
                distance(found.images),
                distance(found.start),
                found.residual.double(),
                psnr,
                ssim.reshape(-1),
                torch.full_like(psnr, found.seconds),
            ],
            1,
        )

    def _log(self, part: Part) -> None:
        rows = _in_order(self._rows, 1 + len(_FIGURES), self.device)
        times = gather_rows(torch.cat(self._times) if self._times else rows.new_zeros(0, 3 * self.solver.settings.steps), with_grad=False)
        means = dict(zip(_FIGURES, rows[:, 1:].mean(0).float(), strict=True))
        if part == "val":
            del means["seconds"]  # the first validation's are not those of a run
        log_global(self, {f"flair/{part}_{name}": value for name, value in means.items() if not (name == "ssim" and value.isnan())})
        self._media |= self._pictures()
        if self._weights:
            self._media["flair/times"] = self._table(times.mean(0).view(-1, 3))
        self._forget()

    # ---- what is shown -------------------------------------------------------------------------------------------------------------------

    def dashboard_media(self) -> dict[str, Media]:
        """Images and figures over time of the last evaluation."""
        return self._media

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The curve of errors, once it is known."""
        return {"flair_calibration": {"error": self.solver.error.cpu()}} if self.solver.calibrated else {}

    def _table(self, means: Tensor) -> TableMedia:
        if self.solver.method in ("flair", "red_diff"):
            times = time_grid(self.solver.settings.steps, self.solver.settings.ts_min).tolist()
        else:
            times = torch.linspace(1, 0, len(means) + 1).tolist()[:-1]
        values = [[None if value != value else float(f"{value:.4g}") for value in row] for row in means.tolist()]
        rows = tuple((round(t, 4), round(w, 4), *row) for t, w, row in zip(times, self._weights, values, strict=True))
        return TableMedia(("t", "w(t)", "residual", "|v - u|", "data steps"), rows)

    def _pictures(self) -> dict[str, Media]:
        if self._shown is None:
            return {}
        clean, found = self._shown
        rows = [part[:_SHOWN].float().cpu() for part in (found.start, found.images, clean)]
        picked = [found.traces[place] for place in torch.linspace(0, len(found.traces) - 1, _STRIP).round().long().tolist()]
        with torch.no_grad():
            strip = [self.prior.decode(trace.mu[:1]).float().cpu() for trace in picked]
        words = f"{len(rows[0])} images, one a column: pseudo-inverse of what was measured, restored, clean"
        media: dict[str, Media] = {"flair/images": ImageMedia(_picture(rows), words)}
        media["flair/strip"] = ImageMedia(_picture([torch.cat(strip)]), f"an image at {_STRIP} times from the start to the end")
        return media

    # ---- a folder of images --------------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Restore a batch, but for images that lie in ``output`` already.

        Returns:
            ``image`` (B, C, H, W) in [-1, 1], ``index`` (B,), ``name`` (list), ``residual`` (B,) of those that were restored.
        """
        with torch.inference_mode(False), torch.no_grad():
            images, numbers = self._read(batch, batch_idx)
            names = [str(name) for name in batch["name"]] if "name" in batch else [f"{number:05d}" for number in numbers]
            chosen = [place for place, name in enumerate(names) if not self._is_there(name)]
            images, numbers, names = images[chosen], [numbers[place] for place in chosen], [names[place] for place in chosen]
            index = torch.tensor(numbers, device=images.device)
            if not chosen:
                return {"image": images, "index": index, "name": names, "residual": images.new_zeros(0)}
            self._tell(numbers)
            found = self.solver.restore(self._measure(images, numbers, self.degraded), numbers)
            figures = self._figures(found, found.images if self.degraded else images)
            if self.output is not None:
                for name, image, row in zip(names, found.images, figures.tolist(), strict=True):
                    self._write(name, image, dict(zip(_FIGURES, row, strict=True)))
        return {"image": found.images, "index": index, "name": names, "residual": found.residual}

    def on_predict_epoch_end(self) -> None:
        """Write the table of all images in ``output``."""
        if self.output is None:
            return
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            kept = ["residual", "seconds"] if self.degraded else [name for name in _FIGURES if name != "start_error"]
            said = io.StringIO()
            table = csv.writer(said, lineterminator="\n")
            table.writerow(["name", *kept])
            for file in sorted(self.output.glob("*.png")):
                if (figures := _said_by(file)) is not None:
                    table.writerow([file.stem, *(f"{figures['figures'][name]:.6g}" for name in kept)])
            write_atomically(self.output / "table.csv", said.getvalue())
        rank_zero_info(f"restored images and table.csv are in {self.output}")

    def _recipe(self) -> str:
        """What an image's pixels follow from, as far as it is known here; made once a run."""
        if self._made is None:
            solver = self.solver
            weights = [solver.curve_weights()] if solver.method == "flair" else []
            made = {name: getattr(solver, name) for name in ("method", "weighting", "weight", "start", "eta", "seed")}
            made |= {"operator": repr(solver.operator), "tensors": _digest([*solver.operator.buffers(), *weights])}
            made |= {"noise": self.noise, "degraded": self.degraded} | ({"prior": self.prior.told} if self.prior.told else {})
            self._made = json.dumps(asdict(solver.settings) | made, sort_keys=True)
        return self._made

    def _is_there(self, name: str) -> bool:
        if self.output is None or not (self.output / f"{name}.png").is_file():
            return False
        said = _said_by(self.output / f"{name}.png")
        if said is None or said["recipe"] != self._recipe():
            raise ValueError(f"output={str(self.output)!r} has a {name}.png of another run or other settings: give an empty folder")
        return True

    def _write(self, name: str, image: Tensor, figures: dict[str, float]) -> None:
        assert self.output is not None
        if not name or Path(name).name != name:
            raise ValueError(f"an image is called {name!r}, which is no file name: rename it")
        self.output.mkdir(parents=True, exist_ok=True)
        pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
        said = PngImagePlugin.PngInfo()
        said.add_text("flair", json.dumps({"recipe": self._recipe(), "figures": figures}))
        with replacing(self.output / f"{name}.png") as file:
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG", pnginfo=said)


def _in_order(parts: list[Tensor], width: int, device: torch.device) -> Tensor:
    """Rows of all ranks, (N, width) float64, by the image's number in their first column."""
    own = torch.cat(parts).double() if parts else torch.zeros(0, width, dtype=torch.float64, device=device)
    rows = gather_rows(own.to(device), with_grad=False)
    return rows[rows[:, 0].argsort(stable=True)]


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _said_by(file: Path) -> dict[str, Any] | None:
    """What a PNG of ours says of itself; None: it isn't ours."""
    with Image.open(file, formats=["PNG"]) as picture:
        said = picture.info.get("flair")
    try:
        found = json.loads(said) if isinstance(said, str) else None
    except json.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) and {"recipe", "figures"} <= found.keys() else None


def _picture(rows: list[Tensor]) -> Any:
    """Rows of images (n, C, h, w) in [-1, 1] -> (H, W, 3) uint8, at least 64 pixels an image; wider ranges are scaled."""
    largest = max(1.0, *(float(row.abs().max()) for row in rows)) if rows[0].shape[-1] < 8 else 1.0
    tiles = torch.cat([torch.cat(list(torch.nn.functional.pad(row, (1, 1, 1, 1), value=-largest)), dim=-1) for row in rows], dim=-2)
    tiles = tiles.expand(3, -1, -1) if tiles.shape[0] == 1 else tiles[:3]
    scale = max(1, 64 // rows[0].shape[-1])
    pixels = ((tiles / largest).clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().movedim(0, -1).repeat_interleave(scale, 0).repeat_interleave(scale, 1).contiguous().numpy()


__all__ = ["FLAIR"]
