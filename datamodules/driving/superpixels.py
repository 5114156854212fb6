"""Superpixels: one PNG of ids per camera image, read from a release or computed with SLIC.

A superpixel file is called ``<sample_data token of the image>.png``, has the image's native size, and holds one id per pixel. What an id
means depends on how the files were made: the class-id superpixels of SuperFlow (arXiv:2407.06190) use one id for one category in all
cameras, SLIC numbers the segments of each image.
"""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods.datamodules.driving.common import read_image, write_bytes
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.pictures import open_indices
from lit_methods.datamodules.reading import plain_file_name
from lit_methods.import_path import CHILD_PREFIX

_SLIC_SIDE = 512  # longer side at which SLIC runs: training resizes images to 448 columns anyway


def read_superpixels(path: Path, native_size: tuple[int, int], num_superpixels: int) -> Tensor:
    """Read one file of superpixel ids.

    Args:
        path: PNG of one channel, 8 or 16 bits.
        native_size: (height, width) of the image that it belongs to.
        num_superpixels: Ids must lie in 0..num_superpixels-1.

    Returns:
        (height, width), uint8 where the ids fit, else int64.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Undecodable, more than one channel, another size than the image, or an id out of range.
    """
    missing = "give superpixel_root the folder of <sample_data token>.png files, or set superpixels=slic to compute them"
    ids = open_indices(path, "superpixels", missing)
    if ids.shape != native_size:
        raise BrokenRecordError(
            path,
            "superpixels",
            f"is {ids.shape[1]} x {ids.shape[0]} pixels, its image is {native_size[1]} x {native_size[0]}: they don't belong together",
        )
    if (largest := int(ids.max())) >= num_superpixels:
        raise BrokenRecordError(
            path, "superpixels", f"holds id {largest}, but num_superpixels={num_superpixels} allows 0..{num_superpixels - 1}: raise it"
        )
    return torch.from_numpy(ids if ids.dtype == np.uint8 else ids.astype(np.int64))


def write_superpixels(path: Path, ids: NDArray[np.integer]) -> None:
    """Write ids as a PNG of 8 bits (16 where an id exceeds 255); the file appears whole or not at all."""
    buffer = BytesIO()
    Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16)).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def slic_superpixels(image: NDArray[np.uint8], num_superpixels: int) -> NDArray[np.int64]:
    """SLIC segments of one image, at most ``num_superpixels`` of them (PPKT and SLidR, arXiv:2203.16258, ask for 150).

    Args:
        image: (H, W, 3) uint8 RGB.
        num_superpixels: Upper bound, >= 1. SLIC starts from a grid, so fewer segments come out.

    Returns:
        (H, W) int64 ids 0..n-1 without gaps.
    """
    from skimage.segmentation import slic

    wanted = num_superpixels
    while True:
        segments = slic(image, n_segments=wanted, compactness=6, sigma=1.0, start_label=0, channel_axis=-1)
        ids, dense = np.unique(segments, return_inverse=True)
        if len(ids) <= num_superpixels:
            return dense.reshape(segments.shape).astype(np.int64)
        wanted = max(1, min(wanted - 1, int(wanted * num_superpixels / len(ids))))  # the grid can give a few more than asked for


def write_slic(source: Path, target: Path, num_superpixels: int) -> None:
    """Compute the SLIC superpixels of an image file, at 512 pixels on its longer side, and write them at the image's native size.

    Raises:
        BrokenRecordError: The image is missing or broken.
    """
    small, (height, width) = read_image(source, _SLIC_SIDE)
    ids = slic_superpixels(small.permute(1, 2, 0).numpy(), num_superpixels)
    rows, columns = np.arange(height) * ids.shape[0] // height, np.arange(width) * ids.shape[1] // width
    write_superpixels(target, ids[rows[:, None], columns])


def compute_slic(images: Sequence[tuple[str, Path]], folder: Path, num_superpixels: int, num_processes: int | None = None) -> int:
    """Compute and cache the SLIC superpixels of many images; files that exist are kept, so that a killed run goes on where it stopped.

    Args:
        images: (token, path) of each image.
        folder: Where ``<token>.png`` goes.
        num_superpixels: Upper bound of segments per image.
        num_processes: Worker processes; None: one per available CPU core, fewer for few images. 1 or less computes in this process.

    Returns:
        Number of files that were computed.

    Raises:
        BrokenRecordError: An image is missing or broken.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    jobs = [(path, folder / f"{plain_file_name(token, folder, 'token')}.png") for token, path in images]
    jobs = [job for job in jobs if not job[1].is_file()]
    if not jobs:
        return 0
    if num_processes is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_processes = min(available, len(jobs) // 100)  # a process takes seconds to start, an image a fifth of one
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("SLIC superpixels", total=len(jobs))
        for _ in (
            map(lambda job: write_slic(job[0], job[1], num_superpixels), jobs)
            if num_processes <= 1
            else _in_workers(jobs, num_superpixels, num_processes)
        ):
            progress.advance(task)
    return len(jobs)


def _in_workers(jobs: list[tuple[Path, Path]], num_superpixels: int, num_processes: int) -> Iterator[None]:
    # Plain child processes, because multiprocessing would run the user's script again in each where it lacks a __main__ guard.
    waiting: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
    command = [sys.executable, "-c", f"{CHILD_PREFIX}from {__name__} import _serve; _serve()"]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(num_processes)]
    for worker in workers:
        waiting.put(worker)

    def run(job: tuple[Path, Path]) -> None:
        worker = waiting.get()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(json.dumps([str(job[0]), str(job[1]), num_superpixels]) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        finally:
            waiting.put(worker)
        if not reply:
            raise RuntimeError(f"a worker process died while computing the superpixels of {job[0]}: its message stands above")
        if problem := json.loads(reply):
            raise BrokenRecordError(*problem)

    try:
        with ThreadPoolExecutor(num_processes) as threads:
            try:
                yield from threads.map(run, jobs)
            finally:
                threads.shutdown(cancel_futures=True)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _serve() -> None:
    for line in sys.stdin:
        source, target, num_superpixels = json.loads(line)
        try:
            write_slic(Path(source), Path(target), num_superpixels)
        except BrokenRecordError as problem:
            print(json.dumps([problem.file, problem.field, problem.problem]), flush=True)
        else:
            print("null", flush=True)
