"""What a SuperFlow++ pretraining step costs: the parts one by one, the step as a whole, Lightning's share, and memory.

    python benchmarks/lidar.py [--steps 5] [--repeats 3] [--device cpu|cuda] [--threads N] [--json FILE]
    python benchmarks/lidar.py --contrast --threads 1      # table 5 alone

Everything is measured on the built-in driving world at the settings of ``configs/superflow.yaml``; some minutes on two CPU cores,
and the making of the world where it isn't cached yet. Times are medians after a warm-up. ``wall`` is what a clock on the wall shows,
``cpu`` the time that all threads of this process were busy: when other programs use the cores, wall grows and cpu less so; two
runs whose wall times differ and whose cpu times agree did the same. On CUDA the clock is read after a synchronisation, which also makes
Lightning's Python time visible that a free-running step would hide behind the kernels.

How to read the five tables:

1. Throughput. Each row is our function; the rows under it do the same work as one might write it at first, in turn with ours in this run,
   and their results are checked to agree. ``ratio`` is their time over ours, by wall and by cpu: above 1 ours is faster. Projection is
   part of the data path and always runs on the CPU; points count once although there are six cameras. Pooling counts the points of a
   step's four clouds, and includes pooling the images' pixels, forward and backward. The data path is the training loader, reading
   included. The lines of Python that run for N and for twice as many points say whether anything loops over points: then they would
   double.
2. Where a step's time goes. ``training_step`` runs as it is, but its embeddings are cut from the graph, so that each network's backward
   pass runs and is timed on its own (same sums in another order; the gradients are checked against an uncut step). ``3D`` includes the
   voxelisation in the step, ``loss and pooling`` everything between embeddings and loss, ``diagnostics`` what is only logged. ``data`` is
   the time that the loop waits for the loader of the config; ``read one batch`` in table 1 is what is hidden behind the step by workers.
3. Lightning against a plain loop. Same weights at the start, same batches in the same order, fits in turn; the weights at the end are
   checked to be equal. Both sides are timed by the same stamps, made when a batch is handed out. Lightning runs with what the ``lit``
   command adds (run folder, CSV log, dashboard, random state, progress as plain lines), without checkpoints. The ratio of each step to
   the same step of the plain loop in the same repetition is taken, and the median over all; 1.05 is the target. ``plain / plain`` is the
   same figure for two repetitions of the plain loop: the noise of the machine, to be kept in mind with the ratio. ``outside steps`` is
   the time before the first batch and behind the last: paid once per run.
4. Peak memory of two training steps, each side in a process of its own. ``step`` is the growth from before the first step to the peak (on
   CUDA: the peak that torch allocated). The config's teacher has no weights, so freezing is shown with DINOv2-S at random weights:
   frozen, and with its gradients kept (which also means kept activations), without counting an optimiser for it.
5. InfoNCE, forward and backward, of 3,000 rows of 64 numbers beside the plain formulation: the mask's rows, their products divided by the
   temperature, ``cross_entropy``. ``ratio`` is plain / ours by wall and by cpu, ``memory`` plain / ours of the largest sum of what was
   allocated at a time. Losses and gradients are checked to agree.
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods.callbacks import Dashboard, ExactResume, ThroughputProgressBar
from lit_methods.catalog import configs_folder, public_names
from lit_methods.datamodules import NuScenesDataModule
from lit_methods.datamodules.driving.common import read_points
from lit_methods.datamodules.driving.nuscenes import project_into_cameras
from lit_methods.datamodules.driving.nuscenes_tables import CAMERAS, NuScenesTables
from lit_methods.lidar.superflow import core
from lit_methods.lidar.superflow import module as superflow_module
from lit_methods.lidar.superflow.module import SuperFlow
from lit_methods.lidar.teachers import DINOv2
from lit_methods.runs.folder import RunFolder

Batch = dict[str, Any]
CLOUDS = ("cur", "prev", "next", "dense")
MEMORY_SIDES = ("config", "vit-frozen", "vit-gradients")
TARGET_OVERHEAD = 1.05

# ----------------------------------------------------------------------------------------------------------------------- config and clock


def read_config() -> dict[str, Any]:
    """The shipped ``configs/superflow.yaml``."""
    return dict(yaml.safe_load((configs_folder() / "superflow.yaml").read_text(encoding="utf-8")))


def build(section: Any) -> Any:
    """The object that a ``{class_path, init_args}`` section of our own classes describes; anything else as it is."""
    if not isinstance(section, dict) or "class_path" not in section:
        return section
    name = section["class_path"]
    kind = getattr(importlib.import_module(public_names()[name]), name)
    return kind(**{key: build(value) for key, value in section.get("init_args", {}).items()})


def make_module(config: dict[str, Any], device: torch.device) -> SuperFlow:
    """The config's module with the config's initial weights."""
    torch.manual_seed(config["seed_everything"])
    module: SuperFlow = build(config["model"])
    return module.to(device).train()


def silence(module: SuperFlow) -> None:
    """Let what the module logs go nowhere: there is no trainer."""
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *arguments, **options: None)


def make_data(config: dict[str, Any], num_workers: int) -> NuScenesDataModule:
    """The config's datamodule, ready to fit."""
    arguments = {**config["data"]["init_args"], "num_workers": num_workers}
    data: NuScenesDataModule = build({**config["data"], "init_args": arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def batches_of(loader: Any) -> Iterator[Batch]:
    """Batches without end, epoch after epoch."""
    while True:
        yield from loader


def num_points(batch: Batch) -> int:
    """Points of all clouds of a batch."""
    return sum(len(batch[name]["points"]) for name in CLOUDS if name in batch)


class Seconds(NamedTuple):
    """Wall time, and time that this process kept processors busy (all threads)."""

    wall: float
    cpu: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def now(device: torch.device) -> Seconds:
    """Both clocks, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def median(laps: Sequence[Seconds]) -> Seconds:
    """Median of each clock on its own."""
    return Seconds(statistics.median(lap.wall for lap in laps), statistics.median(lap.cpu for lap in laps))


def total(laps: Sequence[Seconds]) -> Seconds:
    """Sum of each clock."""
    return Seconds(sum(lap.wall for lap in laps), sum(lap.cpu for lap in laps))


def time_in_turn(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Seconds]:
    """Median time of every side: one call of each to warm up, then ``rounds`` times one after the other."""
    for call in sides.values():
        call()
    laps: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = now(device)
            call()
            laps[name].append(now(device) - start)
    return {name: median(values) for name, values in laps.items()}


def python_lines(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs in this thread, the libraries' included; every turn of a Python loop counts."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
    return count


# ----------------------------------------------------------------------------------------------------------------------------- throughput


def throughput_row(times: dict[str, Seconds], points: int, lines: tuple[int, int] | None = None, **counts: int) -> dict[str, Any]:
    """Result of one function (the first of ``times``) and its alternatives (the others)."""
    (_, ours), *others = times.items()
    row: dict[str, Any] = {
        "points": points,
        **counts,
        "seconds": ours.wall,
        "cpu_seconds": ours.cpu,
        "points_per_second": points / ours.wall,
    }
    row["alternatives"] = {
        name: {"seconds": t.wall, "cpu_seconds": t.cpu, "ratio": t.wall / ours.wall, "cpu_ratio": t.cpu / ours.cpu} for name, t in others
    }
    if lines is not None:
        row["python_lines"], row["python_lines_at_twice_the_points"] = lines
    return row


def project_stepwise(
    tables: NuScenesTables, points: NDArray[np.float32], key: int, cameras: Sequence[int], size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Projection camera by camera, every camera through all six motions from the LiDAR on, in numpy and float64."""
    lidar, height, width = tables.sensor[key], *size
    rows, pixels = [], []
    for camera, record in enumerate(cameras):
        sensor = tables.sensor[record]
        seen = points[:, :3].astype(np.float64)
        seen = seen @ tables.sensor_rotation[lidar].T + tables.sensor_translation[lidar]
        seen = seen @ tables.ego_rotation[key].T + tables.ego_translation[key]
        seen = (seen - tables.ego_translation[record]) @ tables.ego_rotation[record]
        seen = (seen - tables.sensor_translation[sensor]) @ tables.sensor_rotation[sensor]
        image = seen @ tables.intrinsic[sensor].T
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = image[:, 0] / image[:, 2], image[:, 1] / image[:, 2]
        kept = np.flatnonzero((seen[:, 2] > 1.0) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1))
        rows.append(kept)
        pixels.append(np.stack([np.full(len(kept), camera), np.round(v[kept]), np.round(u[kept])], axis=1).astype(np.int64))
    return np.concatenate(rows), np.concatenate(pixels)


def bench_projection(data: NuScenesDataModule, rounds: int) -> dict[str, Any]:
    """All six cameras of eight training scans."""
    tables, frames = data._tables(), data._frames("slidr600")[::8][:8]
    keys = [int(tables.lidar[frame]) for frame in frames]
    cameras = [tables.cameras[frame].tolist() for frame in frames]
    scans = [read_points(tables.path(key), columns=5) for key in keys]
    with Image.open(tables.path(cameras[0][0])) as image:
        size = (image.height, image.width)
    work = list(zip(scans, keys, cameras, strict=True))

    def ours(copies: int = 1) -> list[Any]:
        return [project_into_cameras(tables, scan.repeat(copies, 1), key, records, size) for scan, key, records in work]

    def stepwise() -> list[Any]:
        return [project_stepwise(tables, scan.numpy(), key, records, size) for scan, key, records in work]

    for (ours_rows, ours_pixels), (their_rows, their_pixels) in zip(ours(), stepwise(), strict=True):
        same = {*map(tuple, np.column_stack([ours_rows, ours_pixels]).tolist())}
        theirs = {*map(tuple, np.column_stack([their_rows, their_pixels]).tolist())}
        # float32 between the motions, as the reference has it, moves a pixel in ten thousand across a border
        if len(same & theirs) < 0.998 * len(same | theirs):
            raise AssertionError(f"projections disagree: {len(same & theirs)} equal pairs of {len(same | theirs)}")
    times = time_in_turn({"ours": ours, "numpy, all motions per camera": stepwise}, rounds, torch.device("cpu"))
    lines = python_lines(lambda: ours(1)), python_lines(lambda: ours(2))
    return throughput_row(times, sum(map(len, scans)), lines, cameras=len(CAMERAS))


def samples_of(cloud: Batch) -> Tensor:
    """(N,) sample of each point."""
    counts = cloud["points_per_sample"]
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def voxelize_by_rows(points: Tensor, sample: Tensor, voxel_size: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Cylinder voxels by unique rows: (V, 4) sample and cell, and (N,) voxel of each point."""
    rho, phi = torch.hypot(points[:, 0], points[:, 1]), torch.rad2deg(torch.atan2(points[:, 1], points[:, 0]))
    size = torch.tensor(voxel_size, device=points.device)
    cell = torch.round(torch.stack([rho, phi, points[:, 2]], dim=1) / size).long()
    for index in range(int(sample.max()) + 1):
        cell[sample == index] -= cell[sample == index].amin(dim=0)
    return torch.unique(torch.cat([sample[:, None], cell], dim=1), dim=0, return_inverse=True)  # type: ignore[no-any-return]


def bench_voxels(config: dict[str, Any], batch: Batch, rounds: int, device: torch.device) -> dict[str, Any]:
    """The four clouds of a batch."""
    network = config["model"]["init_args"]["backbone_3d"]["init_args"]
    size = network["voxel_size"]
    work = [(batch[name]["points"], samples_of(batch[name]), len(batch[name]["points_per_sample"])) for name in CLOUDS]

    def ours(copies: int = 1) -> list[core.Voxels]:
        return [core.voxelize(p.repeat(copies, 1), sample.repeat(copies), size, network["voxel_type"], b) for p, sample, b in work]

    def by_rows() -> list[tuple[Tensor, Tensor]]:
        return [voxelize_by_rows(points, sample, size) for points, sample, _ in work]

    for mine, (theirs, _) in zip(ours(), by_rows(), strict=True):
        # hypot may round the last bit in another way: a handful of points change the voxel
        if abs(len(mine.coords) - len(theirs)) > 0.001 * len(theirs):
            raise AssertionError(f"voxelisations disagree: {len(mine.coords)} and {len(theirs)} voxels")
    times = time_in_turn({"ours": ours, "torch.unique(dim=0)": by_rows}, rounds, device)
    lines = python_lines(lambda: ours(1)), python_lines(lambda: ours(2))
    return throughput_row(times, sum(len(p) for p, *_ in work), lines, voxels=sum(len(v.coords) for v in ours()))


def one_hot_mean(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean of each group by a product with the one-hot matrix of the groups."""
    member = F.one_hot(groups, num_groups).to(rows.dtype)
    return member.T @ rows / (member.sum(0)[:, None] + 1e-6)


def looped_mean(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean of each group, group by group."""
    return torch.stack([rows[groups == group].sum(0) / ((groups == group).sum() + 1e-6) for group in range(num_groups)])


class PoolingWork(NamedTuple):
    """One cloud, and images, to be pooled: embeddings (V, D) and (n, D, H, W), and the groups of pairs and pixels."""

    voxels: Tensor
    pair_voxel: Tensor
    pair_group: Tensor
    pixels: Tensor | None
    pixel_group: Tensor
    num_groups: int

    def run(self, mean: Callable[[Tensor, Tensor, int], Tensor] | None = None) -> tuple[Tensor, ...]:
        """Pooled points and pixels and their gradients; ``mean`` None: our functions."""
        inputs = [self.voxels] if self.pixels is None else [self.voxels, self.pixels]
        if mean is None:
            outputs = [core.pool_points(self.voxels, self.pair_voxel, self.pair_group, self.num_groups)[0]]
            outputs += [] if self.pixels is None else [core.pool_pixels(self.pixels, self.pixel_group, self.num_groups)]
        else:
            outputs = [mean(F.normalize(self.voxels, dim=1)[self.pair_voxel], self.pair_group, self.num_groups)]
            if self.pixels is not None:
                rows = F.normalize(self.pixels, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
                outputs.append(mean(rows, self.pixel_group.flatten(), self.num_groups))
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o) for o in outputs]
        return (*outputs, *torch.autograd.grad(outputs, inputs, weights))

    def doubled(self) -> "PoolingWork":
        """Twice as many pairs and pixels."""
        pixels = None if self.pixels is None else self.pixels.detach().repeat(2, 1, 1, 1).requires_grad_()
        voxel, group, pixel = (torch.cat([ids, ids]) for ids in (self.pair_voxel, self.pair_group, self.pixel_group))
        return self._replace(pair_voxel=voxel, pair_group=group, pixels=pixels, pixel_group=pixel)


def pooling_work(config: dict[str, Any], batch: Batch) -> list[PoolingWork]:
    """Pooling of a step's four clouds and the images of three, with random embeddings in place of the networks'."""
    model = config["model"]["init_args"]
    network, width, ids = model["backbone_3d"]["init_args"], model["embed_dim"], model["num_superpixels"]
    device = batch["cur"]["points"].device
    result = []
    for name in CLOUDS:
        cloud = batch[name]
        shown = batch["cur" if name == "dense" else name]["superpixels"]
        groups = core.superpixel_groups(shown, ids, model["view_consistency"])
        num_groups = ids * shown.shape[0] * (1 if model["view_consistency"] else shown.shape[1])
        voxels = core.voxelize(cloud["points"], samples_of(cloud), network["voxel_size"], network["voxel_type"], shown.shape[0])
        pairs = core.Pairs(cloud["pairing_points"], cloud["pairing_images"], cloud["pairs_per_sample"])
        pair_voxel, pair_group = core.look_up_pairs(pairs, voxels.point2voxel, cloud["points_per_sample"], groups)
        features = torch.randn(len(voxels.coords), width, device=device, requires_grad=True)
        pixels = None
        if name != "dense":
            pixels = torch.randn(groups.shape[0] * groups.shape[1], width, *groups.shape[2:], device=device, requires_grad=True)
        result.append(PoolingWork(features, pair_voxel, pair_group, pixels, groups.flatten(0, 1), num_groups))
    return result


def bench_pooling(config: dict[str, Any], batch: Batch, rounds: int, device: torch.device) -> dict[str, Any]:
    """All pooling of a step, forward and backward."""
    work = pooling_work(config, batch)
    means = {"one-hot product": one_hot_mean, "loop over groups": looped_mean}
    for mean in means.values():
        for item in work:
            for mine, theirs in zip(item.run(), item.run(mean), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)

    def side(mean: Callable[[Tensor, Tensor, int], Tensor] | None) -> Callable[[], object]:
        return lambda: [item.run(mean) for item in work]

    times = time_in_turn({"ours": side(None), **{name: side(mean) for name, mean in means.items()}}, rounds, device)
    twice = [item.doubled() for item in work]
    lines = python_lines(side(None)), python_lines(lambda: [item.run() for item in twice])
    pixels = sum(item.pixel_group.numel() for item in work if item.pixels is not None)
    return throughput_row(times, num_points(batch), lines, pairs=sum(len(item.pair_voxel) for item in work), pixels=pixels)


def plain_info_nce(a: Tensor, b: Tensor, temperature: float, mask: Tensor) -> Tensor:
    """InfoNCE of the mask's rows in its plainest form."""
    a, b = a[mask], b[mask]
    return F.cross_entropy(torch.mm(a, b.T) / temperature, torch.arange(len(a), device=a.device))


def allocated_peak(call: Callable[[], object]) -> int:
    """Most bytes that tensors made during a call held at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def bench_contrast(rounds: int, device: torch.device, rows: int = 3000, width: int = 64) -> dict[str, dict[str, float]]:
    """InfoNCE with its gradients for three shares of rows that take part."""
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(device).requires_grad_() for _ in range(2))
    draw, result = torch.rand(rows, generator=generator).to(device), {}
    for share in (0.4, 0.7, 1.0):

        def side(loss: Callable[..., Tensor], mask: Tensor = draw < share) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: (value := loss(a, b, 0.07, mask), *torch.autograd.grad(value, (a, b)))

        sides = {"ours": side(core.info_nce), "plain": side(plain_info_nce)}
        torch.testing.assert_close(sides["ours"](), sides["plain"](), rtol=2e-5, atol=1e-7)
        times = time_in_turn(dict(sides), rounds, device)
        memory = {name: allocated_peak(call) for name, call in sides.items()}
        ours, plain = times["ours"], times["plain"]
        result[f"{share:.0%} of the rows"] = {
            "seconds": ours.wall,
            "cpu_seconds": ours.cpu,
            "ratio": plain.wall / ours.wall,
            "cpu_ratio": plain.cpu / ours.cpu,
            "peak": memory["ours"],
            "memory_ratio": memory["plain"] / memory["ours"],
        }
    return result


def bench_data(config: dict[str, Any], workers: int, count: int) -> dict[str, Any]:
    """The training loader on its own: reading, projecting, augmenting, collating; batches taken as fast as they come."""
    data = make_data(config, workers)
    source, laps, points = batches_of(data.train_dataloader()), [], []
    next(source)  # workers start here
    for _ in range(count):
        start = now(torch.device("cpu"))
        points.append(num_points(next(source)))
        laps.append(now(torch.device("cpu")) - start)
    time_per_batch = total(laps).wall / count if workers else median(laps).wall  # batches of several workers arrive in bursts
    row: dict[str, Any] = {"workers": workers, "seconds": time_per_batch, "samples_per_second": data.batch_size / time_per_batch}
    row |= {"points": statistics.mean(points), "points_per_second": statistics.mean(points) / time_per_batch}
    if workers == 0:
        row["cpu_seconds"] = median(laps).cpu
        dataset = data.train_set
        assert dataset is not None
        sample = dataset[0]
        row["python_lines"], row["points_of_the_sample"] = python_lines(lambda: dataset[0]), num_points(sample)
    return row


# ----------------------------------------------------------------------------------------------------------------------- split of the step


class SplitStep:
    """Runs a module's own ``training_step`` with both embeddings cut from the graph, and times every part.

    The embeddings that the step sees are leaves. So the loss's backward pass ends at them, and each network's backward pass can be run and
    timed afterwards, with the gradients that arrived there.

    Args:
        module: A ``SuperFlow``.
        device: Where it lies.
    """

    def __init__(self, module: SuperFlow, device: torch.device) -> None:
        self.module, self.device = module, device
        self.parts: dict[str, list[Seconds]] = {}
        self.cuts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = now(self.device)
        result = call(*arguments)
        self.parts.setdefault(part, []).append(now(self.device) - start)
        return result

    def _cut(self, part: str, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self.cuts.setdefault(part, []).append((output, leaf))
        return leaf

    def _backward(self, part: str) -> None:
        pairs = [(output, leaf.grad) for output, leaf in self.cuts[part] if leaf.grad is not None]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def run(self, batch: Batch) -> dict[str, Seconds]:
        """Forward and backward of one step; gradients lie in the module's parameters afterwards.

        Returns:
            Time of ``3D``, ``2D``, ``diagnostics`` and ``loss and pooling``.
        """
        self.parts, self.cuts = {}, {}
        embed_points, embed_images, report = self.module.embed_points, self.module.embed_images, superflow_module.contrast_report

        def points(cloud: Batch) -> Any:
            voxels = self._timed("3D", embed_points, cloud)
            return voxels._replace(features=self._cut("3D", voxels.features))

        def images(values: Tensor) -> Tensor:
            return self._cut("2D", self._timed("2D", embed_images, values))

        def diagnostics(*arguments: Any) -> Any:
            return self._timed("diagnostics", report, *arguments)

        with (
            mock.patch.object(self.module, "embed_points", points),
            mock.patch.object(self.module, "embed_images", images),
            mock.patch.object(superflow_module, "contrast_report", diagnostics),
        ):
            start = now(self.device)
            self.module.training_step(batch, 0).backward()
            whole = now(self.device) - start
        between = whole - total([lap for laps in self.parts.values() for lap in laps])
        for part in ("3D", "2D"):
            self._timed(part, self._backward, part)
        return {**{part: total(laps) for part, laps in self.parts.items()}, "loss and pooling": between}


def check_split(module: SuperFlow, batch: Batch, device: torch.device) -> None:
    """The cut step leaves the gradients of the whole one."""
    gradients = []
    for backward in (lambda: module.training_step(batch, 0).backward(), lambda: SplitStep(module, device).run(batch)):
        module.zero_grad()
        backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    module.zero_grad()
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    if not error < 1e-3:
        raise AssertionError(f"the gradients of the cut step differ by {float(error):.2g} of their norm from those of the whole step")


def bench_split(config: dict[str, Any], steps: int, device: torch.device) -> dict[str, Any]:
    """Shares of a training step, fed by the config's own loader."""
    module = make_module(config, device)
    silence(module)
    optimizer, scheduler = plain_optimizer(module, steps + 2)
    split = SplitStep(module, device)
    source = batches_of(make_data(config, config["data"]["init_args"]["num_workers"]).train_dataloader())
    check_split(module, move_data_to_device(next(source), device), device)
    laps: dict[str, list[Seconds]] = {}
    for step in range(steps + 1):
        start = now(device)
        batch = move_data_to_device(next(source), device)
        parts = {"data": now(device) - start}
        parts |= split.run(batch)
        start = now(device)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        parts["optimiser"] = now(device) - start
        for name, lap in parts.items() if step else ():  # the first step warms up
            laps.setdefault(name, []).append(lap)
    medians = {name: median(values) for name, values in laps.items()}
    whole = total(list(medians.values()))
    shares = {
        name: {"seconds": t.wall, "cpu_seconds": t.cpu, "share": t.wall / whole.wall, "cpu_share": t.cpu / whole.cpu}
        for name, t in medians.items()
    }
    return {"seconds": whole.wall, "cpu_seconds": whole.cpu, "parts": shares}


def bound_sentence(split: dict[str, Any], data_alone: dict[str, Any], workers: int) -> str:
    """What bounds the step, from the measured shares."""
    name, part = max(split["parts"].items(), key=lambda item: item[1]["share"])
    wait, read = split["parts"]["data"]["seconds"], data_alone["seconds"]
    named = {"3D": "the 3D network (with its voxelisation)", "2D": "the image branch", "data": "waiting for data"}.get(name, name)
    return (
        f"{named} bounds the step: {part['share']:.0%} of {split['seconds']:.3f} s. Reading one batch takes {read:.3f} s of one process, "
        f"{read / split['seconds']:.0%} of a step; with {workers} worker(s) {wait:.3f} s of it are waited for."
    )


# --------------------------------------------------------------------------------------------------------------------- Lightning overhead


class StampedBatches:
    """Batches in memory that note the time when each is handed out; ``end`` notes the end of the last step.

    Args:
        batches: On the device.
        device: Synchronised before each stamp.
    """

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stamps: list[Seconds] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.stamps.append(now(self.device))
            yield batch

    def end(self) -> None:
        """All steps are done."""
        self.stamps.append(now(self.device))

    def steps(self) -> list[Seconds]:
        """Time of every step: from each batch to the next, from the last to the end."""
        return [after - before for before, after in itertools.pairwise(self.stamps)]


def plain_optimizer(module: SuperFlow, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The module's own AdamW and schedule for a loop of ``steps`` steps without a trainer."""
    with mock.patch.object(LightningModule, "trainer", SimpleNamespace(estimated_stepping_batches=steps)):
        recipe: dict[str, Any] = dict(module.configure_optimizers())
    return recipe["optimizer"], recipe["lr_scheduler"]["scheduler"]


class EndOfSteps(Callback):
    """Tells the batches that the trainer's last step is done; as the first callback, before any other closes the epoch."""

    def __init__(self, source: StampedBatches) -> None:
        self.source = source

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.source.end()


def fit_plain(module: SuperFlow, source: StampedBatches) -> None:
    """One pass in a loop of our own, nothing logged."""
    silence(module)
    optimizer, scheduler = plain_optimizer(module, len(source))
    for index, batch in enumerate(source):
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    source.end()


def fit_lightning(module: SuperFlow, source: StampedBatches, log_every_n_steps: int) -> None:
    """One pass by the trainer, with what ``lit fit`` adds to it except checkpoints."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="gpu" if source.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=folder,
            logger=CSVLogger(folder, name="csv", version=""),
            callbacks=[
                EndOfSteps(source),
                RunFolder(folder, {"model": "SuperFlow"}),
                ThroughputProgressBar(plain=True),
                ExactResume(),
                Dashboard(offline_without_login=False),
            ],
            log_every_n_steps=log_every_n_steps,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train_dataloaders=source)


def weights_of(module: SuperFlow) -> Tensor:
    """All floating-point weights and statistics in one vector."""
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values() if value.is_floating_point()])


def bench_overhead(config: dict[str, Any], batches: list[Batch], repeats: int, device: torch.device) -> dict[str, Any]:
    """Plain loop and trainer in turn, from the same weights over the same batches."""
    initial = make_module(config, device)
    every = config["trainer"]["log_every_n_steps"]
    fits: dict[str, Callable[[SuperFlow, StampedBatches], None]] = {
        "plain": fit_plain,
        "lightning": lambda module, source: fit_lightning(module, source, every),
    }
    laps: dict[str, list[list[Seconds]]] = {name: [] for name in fits}
    outside: dict[str, list[float]] = {name: [] for name in fits}
    ends: dict[str, Tensor] = {}
    for repeat in range(-1, repeats):  # -1 warms up, with few steps
        for name, fit in fits.items():
            module, source = copy.deepcopy(initial), StampedBatches(batches[:2] if repeat < 0 else batches, device)
            start = now(device)
            fit(module, source)
            whole = now(device) - start
            if repeat >= 0:
                laps[name].append(source.steps())
                outside[name].append(whole.wall - total(source.steps()).wall)
                ends[name] = weights_of(module.to(device))
    moved = (ends["plain"] - weights_of(initial)).norm()
    difference = float((ends["plain"] - ends["lightning"]).norm() / moved)
    # on CUDA, and now and then with several CPU threads, sums come out in another order, and Adam's first steps enlarge
    # what is near zero
    exact = device.type == "cpu" and torch.get_num_threads() == 1
    if not difference <= (1e-5 if exact else 0.1):
        raise AssertionError(f"the two sides did not do the same: their weights differ by {difference:.2g} of the way they moved")
    plain, by_lightning = laps["plain"], laps["lightning"]
    pairs = [(a, b) for one, other in zip(plain, by_lightning, strict=True) for a, b in zip(one, other, strict=True)]
    again = [(a, b) for one, other in itertools.pairwise(plain) for a, b in zip(one, other, strict=True)]
    ratios = [b.wall / a.wall for a, b in pairs]
    result: dict[str, Any] = {
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(b.cpu / a.cpu for a, b in pairs),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "ratio_of_whole_passes": statistics.median(total(b).wall / total(a).wall for a, b in zip(plain, by_lightning, strict=True)),
        "target": TARGET_OVERHEAD,
        "steps": len(pairs),
        "weights_difference": difference,
    }
    if again:
        result["plain_against_plain"] = {
            "ratio": statistics.median(b.wall / a.wall for a, b in again),
            "cpu_ratio": statistics.median(b.cpu / a.cpu for a, b in again),
        }
    for name, values in laps.items():
        step = median([lap for one in values for lap in one])
        result[name] = {"seconds_per_step": step.wall, "cpu_seconds_per_step": step.cpu, "outside_steps": statistics.median(outside[name])}
    return result


# --------------------------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: resident memory of this process, or what torch allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss starts at the size of the parent process
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_side(config: dict[str, Any], side: str, device: torch.device) -> dict[str, int]:
    """Two training steps in this process, which has done nothing else yet."""
    if side != "config":
        height, width = (-(-n // DINOv2.stride) * DINOv2.stride for n in config["data"]["init_args"]["image_size"])
        config["data"]["init_args"]["image_size"] = [height, width]  # whole patches
        config["model"]["init_args"]["backbone_2d"] = DINOv2("small", weights="random", image_size=(height, width))
    module = make_module(config, device)
    if side == "vit-gradients":
        module.teacher = module.teacher.module.requires_grad_(True)  # type: ignore[assignment]  # no longer under no_grad
    silence(module)
    parameters = [p for name, p in module.named_parameters() if not name.startswith("teacher.")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batch = move_data_to_device(next(iter(make_data(config, 0).train_dataloader())), device)
    before = peak_bytes(device)
    for _ in range(2):  # the optimiser's state is there from the second step on
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    learns = side == "vit-gradients"
    has_gradients = any(p.grad is not None for p in (module.teacher if learns else module.teacher.module).parameters())  # type: ignore[union-attr]
    if has_gradients != learns:
        raise AssertionError(f"side {side!r}: the teacher {'has' if has_gradients else 'has no'} gradients")
    return {"before": before, "peak": peak_bytes(device), "step": peak_bytes(device) - before}


def bench_memory(device: torch.device, threads: int) -> dict[str, Any]:
    """Every side in a process of its own: the peak of a process never falls."""
    command = [sys.executable, __file__, "--device", device.type, "--threads", str(threads), "--memory-side"]
    sides = {}
    for side in MEMORY_SIDES:
        done = subprocess.run([*command, side], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the memory measurement {side!r} failed:\n{done.stderr[-2000:]}")
        sides[side] = json.loads(done.stdout.splitlines()[-1])
    kept, frozen = sides["vit-gradients"], sides["vit-frozen"]
    return {"sides": sides, "step_ratio": kept["step"] / frozen["step"], "peak_ratio": kept["peak"] / frozen["peak"]}


# --------------------------------------------------------------------------------------------------------------------------------- report


def describe(config: dict[str, Any], device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured on what."""
    return {
        "config": config,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
    }


def print_throughput(name: str, row: dict[str, Any]) -> None:
    """A row of table 1 and, under it, its alternatives."""
    cpu = f"{row['cpu_seconds'] * 1e3:9.1f}" if "cpu_seconds" in row else f"{'':9}"
    print(f"{name:42}{row['points_per_second'] / 1e6:11.3f}{row['seconds'] * 1e3:9.1f}{cpu}", end="")
    print(f"   {row['samples_per_second']:.2f} samples/s" if "samples_per_second" in row else "")
    for other, values in row.get("alternatives", {}).items():
        speed = row["points"] / values["seconds"] / 1e6
        print(f"   {other:39}{speed:11.3f}{values['seconds'] * 1e3:9.1f}{values['cpu_seconds'] * 1e3:9.1f}", end="")
        print(f"   ratio {values['ratio']:.2f} (cpu {values['cpu_ratio']:.2f})")


def print_loops(throughput: dict[str, Any]) -> bool:
    """Whether twice the points take more lines of Python, function by function.

    Returns:
        True when nothing loops over points.
    """
    print("\nLines of Python (points -> lines):", end="")
    free = True
    for name in ("projection", "voxelisation", "pooling"):
        row = throughput[name]
        once, twice = row["python_lines"], row["python_lines_at_twice_the_points"]
        free &= twice == once
        print(f"  {name} {row['points']} -> {once}, {2 * row['points']} -> {twice};", end="")
    row = throughput["data, 0 workers"]
    free &= row["python_lines"] < row["points_of_the_sample"] / 2
    print(f"  a data sample {row['points_of_the_sample']} -> {row['python_lines']}")
    print("No Python loop over points." if free else "SOMETHING LOOPS OVER POINTS IN PYTHON.")
    return free


def print_split(split: dict[str, Any]) -> None:
    """Table 2."""
    print(f"\n2. Split of a step{'':26}{'wall ms':>9}{'cpu ms':>9}{'share':>9}{'cpu share':>11}")
    for name, part in split["parts"].items():
        shown = f"{part['seconds'] * 1e3:9.1f}{part['cpu_seconds'] * 1e3:9.1f}{part['share']:9.1%}{part['cpu_share']:11.1%}"
        print(f"   {name:41}{shown}")
    print(f"   {'whole step':41}{split['seconds'] * 1e3:9.1f}{split['cpu_seconds'] * 1e3:9.1f}")
    print(f"   {split['bound']}")


def print_overhead(o: dict[str, Any]) -> None:
    """Table 3."""
    print(f"\n3. Lightning against a plain loop{'':11}{'wall ms':>9}{'cpu ms':>9}   outside steps")
    for name in ("plain", "lightning"):
        side = o[name]
        shown = f"{side['seconds_per_step'] * 1e3:9.1f}{side['cpu_seconds_per_step'] * 1e3:9.1f}   {side['outside_steps']:.2f} s"
        print(f"   {name + ', per step':41}{shown}")
    verdict = "within" if o["ratio"] <= TARGET_OVERHEAD else "ABOVE"
    low, high = o["quartiles"]
    print(f"   ratio {o['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}), {verdict} the target of {TARGET_OVERHEAD}")
    print(f"   cpu ratio {o['cpu_ratio']:.3f}; ratio of whole passes {o['ratio_of_whole_passes']:.3f}; {o['steps']} steps a side")
    if "plain_against_plain" in o:
        again = o["plain_against_plain"]
        print(f"   noise: plain / plain {again['ratio']:.3f} (cpu {again['cpu_ratio']:.3f})")
    print(f"   weights at the end differ by {o['weights_difference']:.1e} of the way they moved")


def print_memory(memory: dict[str, Any]) -> None:
    """Table 4."""
    print(f"\n4. Peak memory{'':30}{'peak MiB':>9}{'step MiB':>9}")
    labels = {"config": "teacher of the config", "vit-frozen": "DINOv2-S, frozen", "vit-gradients": "DINOv2-S, gradients kept"}
    for name, side in memory["sides"].items():
        print(f"   {labels[name]:41}{side['peak'] / 2**20:9.0f}{side['step'] / 2**20:9.0f}")
    print(f"   gradients kept / frozen: peak {memory['peak_ratio']:.2f}, step {memory['step_ratio']:.2f}")


def print_contrast(contrast: dict[str, dict[str, float]]) -> None:
    """Table 5."""
    print(f"\n5. InfoNCE, forward and backward{'':12}{'wall ms':>9}{'cpu ms':>9}{'MiB':>9}   plain / ours")
    for name, row in contrast.items():
        shown = f"{row['seconds'] * 1e3:9.1f}{row['cpu_seconds'] * 1e3:9.1f}{row['peak'] / 2**20:9.1f}"
        print(f"   {name:41}{shown}   ratio {row['ratio']:.2f} (cpu {row['cpu_ratio']:.2f}), memory {row['memory_ratio']:.2f}")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Cost of a SuperFlow++ pretraining step. The file's docstring says how to read the tables."
    )
    parser.add_argument("--steps", type=int, default=5, help="Training steps per measurement, 2 or more.")
    parser.add_argument(
        "--repeats", type=int, default=3, help="Repetitions of the Lightning comparison; projection and voxelisation run 3 times as often."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=available_cores(), help="Threads of torch; default: all cores.")
    parser.add_argument("--json", type=Path, default=None, help="Also write all figures to this file.")
    parser.add_argument("--contrast", action="store_true", help="Table 5 alone.")
    parser.add_argument("--memory-side", choices=MEMORY_SIDES, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--steps must be 2 or more, --repeats and --threads 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave the option out for the CPU")
    return arguments


def main() -> None:
    """Measure, print, and write the figures down."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    device, config = torch.device(arguments.device), read_config()
    if arguments.memory_side:
        print(json.dumps(memory_side(config, arguments.memory_side, device)))
        return
    started, rounds = time.perf_counter(), 3 * arguments.repeats
    if arguments.contrast:
        print_contrast(bench_contrast(rounds, device))
        return
    results = describe(config, device, arguments)
    print(f"{results['device']}, {results['threads']} threads of {results['cores']} cores, load {results['load_before']:.1f}; ", end="")
    print(f"torch {results['torch']}, lightning {results['lightning']}; settings of configs/superflow.yaml")
    data = make_data(config, 0)
    source = iter(data.train_dataloader())
    on_device = [move_data_to_device(next(source), device) for _ in range(min(arguments.steps, len(data.train_dataloader())))]

    print(f"\n1. Throughput{'':29}{'Mpoints/s':>11}{'wall ms':>9}{'cpu ms':>9}")
    throughput: dict[str, Any] = {}
    measurements: tuple[tuple[str, str, Callable[[], dict[str, Any]]], ...] = (
        ("projection", "projection, 6 cameras, 8 scans", lambda: bench_projection(data, rounds)),
        ("voxelisation", "voxelisation, 4 clouds of a batch", lambda: bench_voxels(config, on_device[0], rounds, device)),
        ("pooling", "superpixel pooling, forward and backward", lambda: bench_pooling(config, on_device[0], arguments.repeats, device)),
        ("data, 0 workers", "read one batch, in this process", lambda: bench_data(config, 0, arguments.steps)),
        ("data, 1 worker", "read one batch, 1 worker", lambda: bench_data(config, 1, arguments.steps)),
    )
    for key, label, measure in measurements:
        throughput[key] = measure()
        print_throughput(label, throughput[key])
    results["throughput"] = throughput
    results["no_python_loop_over_points"] = print_loops(throughput)

    results["split"] = bench_split(config, arguments.steps, device)
    workers = config["data"]["init_args"]["num_workers"]
    results["split"]["bound"] = bound_sentence(results["split"], throughput["data, 0 workers"], workers)
    print_split(results["split"])
    results["overhead"] = bench_overhead(config, on_device, arguments.repeats, device)
    print_overhead(results["overhead"])
    results["memory"] = bench_memory(device, arguments.threads)
    print_memory(results["memory"])
    results["contrast"] = bench_contrast(rounds, device)
    print_contrast(results["contrast"])
    results["seconds_in_total"] = time.perf_counter() - started
    print(f"\n{results['seconds_in_total']:.0f} s in total")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
