"""``lit neighbours``: each image's nearest ones by the features of a network, for data that come with neighbours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError


def neighbours(argv: list[str]) -> int:
    """``lit neighbours <folder> <out.npz>``: make the file that ``nearest`` and ``cls_nearest`` of NeighbourCropsDataModule name."""
    parser = Parser(
        prog="lit neighbours",
        description="Write the nearest images of each image of a folder, by cosine between features of a network of timm. The images are "
        "those of the folder itself, sorted by name, or, where it has none, those of its class folders.",
    )
    parser.add_argument("folder", help="train2017 of COCO, train of ImageNet, or any folder of images")
    parser.add_argument("out", help="the .npz file to write: nns (images, number), nearest first, without the image itself")
    parser.add_argument(
        "--model", default="vit_base_patch16_224.dino", help="network of timm (default vit_base_patch16_224.dino, the authors')"
    )
    parser.add_argument("--untrained", action="store_true", help="random weights: to try it without a download")
    parser.add_argument("--number", type=int, default=7, help="neighbours of an image (default 7)")
    parser.add_argument("--batch-size", type=int, default=128, help="images that go through the network at once (default 128)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default 0: this one)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--force", action="store_true", help="overwrite out")
    options = parsed(parser, argv)
    if options is None:
        return 0
    folder, out = Path(options.folder).expanduser(), Path(options.out).expanduser()
    if not folder.is_dir():
        raise CommandError(f"{folder} is no folder: give one with images, such as train2017 of COCO")
    if out.suffix != ".npz":
        raise CommandError(f"{out} isn't called .npz: give a name with that ending")
    if out.exists() and not options.force:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    if options.number < 1 or options.batch_size < 1 or options.workers < 0:
        raise CommandError("--number and --batch-size must be 1 or more, --workers 0 or more")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    try:
        with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn()) as bar:
            task = bar.add_task(folder.name, total=None)
            done: Callable[[int, int], None] = lambda taken, total: bar.update(task, completed=taken, total=total)  # noqa: E731
            number = write_neighbours(folder, out, options, done)
    except (ValueError, OSError) as error:  # BrokenRecordError is a ValueError
        raise CommandError(str(error), exit_code=1) from error
    print(
        f"{out}: {options.number} neighbours of each of {number:,} images, by {options.model}{' (untrained)' if options.untrained else ''}"
    )
    return 0


def images_of(folder: Path) -> list[Path]:
    """Image files in the order of their neighbours' file: of the folder, or of its class folders by class and name.

    Raises:
        ValueError: There is none.
    """
    from lit_methods.datamodules.folders import listed
    from lit_methods.datamodules.vision.imagenet import class_folders, list_images
    from lit_methods.datamodules.vision.neighbour_crops import ENDINGS

    files = listed(folder, endings=ENDINGS)
    if files:
        return files
    return [folder / name for name in list_images(folder, class_folders(folder))[0]]


def write_neighbours(folder: Path, out: Path, options: Any, done: Callable[[int, int], None]) -> int:
    """Features of all images, their nearest ones by scikit-learn, and the file.

    Args:
        folder: Holds the images.
        out: The file to write, whole or not at all.
        options: Those of the command.
        done: Gets the number of images that are through, and of all.

    Returns:
        Number of images.

    Raises:
        ValueError: Too few images, or a network that can't be had.
        BrokenRecordError: An image can't be read; the message names it.
    """
    import numpy as np
    import torch
    from sklearn.neighbors import NearestNeighbors
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader

    from lit_methods.files import replacing
    from lit_methods.hub import timm_network

    files = images_of(folder)
    if len(files) <= options.number:
        raise ValueError(f"{folder} has {len(files)} images: {options.number} neighbours of each need more, lower --number")
    model = timm_network(options.model, not options.untrained, instead="--untrained, to try it without", num_classes=0).eval()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    model.to(device)
    dataset = _Pictures(files, create_transform(**resolve_model_data_config(model)))
    rows, through = [], 0
    with torch.inference_mode():
        for batch in DataLoader(dataset, options.batch_size, num_workers=options.workers):  # type: ignore[arg-type]
            rows.append(torch.nn.functional.normalize(model(batch.to(device)).float(), dim=1).cpu())
            through += len(batch)
            done(through, len(files))
    features = torch.cat(rows).numpy()
    search = NearestNeighbors(n_neighbors=options.number, metric="cosine", algorithm="brute").fit(features)
    found = search.kneighbors(return_distance=False)  # of the fitted rows: without the row itself
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as path, path.open("wb") as file:  # by its name, NumPy would add an ending
        np.savez(file, nns=found.astype(np.int32))
    return len(files)


class _Pictures:
    """Images by index, as the network takes them."""

    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from lit_methods.datamodules.pictures import open_picture

        return self.transform(open_picture(self.files[index]))


__all__ = ["images_of", "neighbours", "write_neighbours"]
