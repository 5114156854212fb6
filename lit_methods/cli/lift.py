"""``lit lift``: masks of images as masks of points, for MaskLabelSpreading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError

SOURCES = ("files", "sam2", "geometric")


def lift(argv: list[str]) -> int:
    """``lit lift <root>``: write ``lifted/<scene>.npz`` for the training scenes of ScanNetDataModule."""
    parser = Parser(
        prog="lit lift",
        description="Write the mask of each point in each view, mask_ids (views, points), for each scene of a prepared data set. The masks "
        "are files <masks>/<scene>/<frame>.png (a number a pixel, 0: none), made by SAM 2 of transformers and kept there, or superpoints "
        "of the points' geometry, which need no frames.",
    )
    parser.add_argument("root", help="folder with train/<scene>/coord.npy and the others")
    parser.add_argument("--part", default="train", help="folder of scenes below root (default train; Area_1 and so on for S3DIS)")
    parser.add_argument("--source", default="files", help=f"{', '.join(SOURCES)} (default files)")
    parser.add_argument("--frames", help="folder of <scene>.sens or of exported frames <scene>/ (default root/frames)")
    parser.add_argument("--masks", help="folder of the masks (default root/masks)")
    parser.add_argument("--out", help="folder to write to (default root/lifted)")
    parser.add_argument("--every", type=int, default=20, help="take every n-th frame (default 20)")
    parser.add_argument("--views", type=int, default=50, help="frames of a scene at most (default 50)")
    parser.add_argument("--delta", type=float, default=0.05, help="largest difference of depths of a visible point, metres (default 0.05)")
    parser.add_argument("--depth-scale", type=float, default=1000.0, help="units of exported depth images in a metre (default 1000)")
    parser.add_argument("--model", default="facebook/sam2.1-hiera-tiny", help="SAM 2 on the hub, or a folder")
    parser.add_argument("--untrained", action="store_true", help="random weights: to try it")
    parser.add_argument("--grid", type=int, default=16, help="points along each side of an image that ask SAM 2 for masks (default 16)")
    parser.add_argument("--score", type=float, default=0.7, help="least overlap that SAM 2 expects of a mask (default 0.7)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--force", action="store_true", help="make anew what is there")
    options = parsed(parser, argv)
    if options is None:
        return 0
    root = Path(options.root).expanduser()
    if not (root / options.part).is_dir():
        raise CommandError(f"{root} has no folder {options.part}: give the root of prepared scenes, and --part")
    if options.source not in SOURCES:
        raise CommandError(f"--source is {options.source!r}: give one of {', '.join(SOURCES)}")
    if min(options.every, options.views, options.grid) < 1 or min(options.delta, options.depth_scale) <= 0 or not 0 <= options.score <= 1:
        raise CommandError("--every, --views and --grid must be 1 or more, --delta and --depth-scale above 0, --score in 0 to 1")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    try:
        with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn()) as bar:
            task = bar.add_task(options.part, total=None)
            done: Callable[[int, int], None] = lambda taken, total: bar.update(task, completed=taken, total=total)  # noqa: E731
            scenes, kept = lift_all(root, options, done)
    except (ValueError, OSError, ImportError) as error:  # BrokenRecordError is a ValueError
        raise CommandError(str(error), exit_code=1) from error
    print(f"{_folder(options.out, root, 'lifted')}: masks of {scenes} scenes, and {kept} that were there")
    return 0


def _folder(given: str | None, root: Path, name: str) -> Path:
    return root / name if given is None else Path(given).expanduser()


def lift_all(root: Path, options: Any, done: Callable[[int, int], None]) -> tuple[int, int]:
    """Lift the masks of all scenes of a part.

    Args:
        root: Folder of the prepared scenes.
        options: Those of the command.
        done: Gets the number of scenes that are through, and of all.

    Returns:
        Scenes that were written, and those that were there.

    Raises:
        ValueError: There is no scene, or SAM 2 can't be had.
        BrokenRecordError: A file can't be right; the message names it.
    """
    import numpy as np
    import torch

    from lit_methods.datamodules.folders import listed
    from lit_methods.datamodules.indoor.frames import chosen_views, lift_scene, open_frames, read_masks
    from lit_methods.datamodules.reading import finite, read_npy
    from lit_methods.files import replacing
    from lit_methods.lidar.image_masks import image_masks, sam2_network
    from lit_methods.lidar.lifting import superpoints

    folders = [folder for folder in listed(root / options.part) if (folder / "coord.npy").is_file()]
    if not folders:
        raise ValueError(f"{root / options.part} has no scenes: expected folders with coord.npy")
    frames_folder, masks_folder, out = (
        _folder(given, root, name) for given, name in ((options.frames, "frames"), (options.masks, "masks"), (options.out, "lifted"))
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    network = sam2_network(options.model, options.untrained).to(device) if options.source == "sam2" else None
    out.mkdir(parents=True, exist_ok=True)
    kept = 0
    for number, folder in enumerate(folders):
        done(number, len(folders))
        scene = f"{folder.parent.name}-{folder.name}" if options.part.startswith("Area_") else folder.name
        path = out / f"{scene}.npz"
        if path.exists() and not options.force:
            kept += 1
            continue
        coord = finite(read_npy(folder / "coord.npy", "coord"), folder / "coord.npy", "coord")
        if options.source == "geometric":
            normal = finite(read_npy(folder / "normal.npy", "normal"), folder / "normal.npy", "normal")
            found = superpoints(coord, normal)[None].astype(np.int32)
        else:
            frames = open_frames(frames_folder, scene, options.depth_scale)
            pictures = masks_folder / scene

            def masks(view: str, size: tuple[int, int], pictures: Path = pictures, frames: Any = frames) -> Any:
                file = pictures / f"{view}.png"
                if network is not None and (options.force or not file.exists()):
                    made = image_masks(network, frames.picture(view), size, options.grid, options.score)
                    _write(file, (made + 1).numpy().astype(np.uint16))
                return read_masks(file, size)

            if network is None:  # the views that have masks
                names = [name for name in frames.names if (pictures / f"{name}.png").exists()]
                if not names:
                    raise ValueError(f"{pictures} has no masks of a frame of {scene}: give --masks, or make some by --source sam2")
                names = chosen_views(names, 1, options.views)
            else:
                names = chosen_views(frames.names, options.every, options.views)
            found = lift_scene(coord, frames, names, masks, options.delta)
        with replacing(path) as partial, partial.open("wb") as file:  # by its name, NumPy would add an ending
            np.savez_compressed(file, mask_ids=found)
    done(len(folders), len(folders))
    return len(folders) - kept, kept


def _write(path: Path, pixels: Any) -> None:
    from PIL import Image

    from lit_methods.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")


__all__ = ["lift", "lift_all"]
