"""Tiny releases for generative models: CIFAR-10, ImageNet, latents in files or tar files, folders of two domains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth
from lit_methods.datamodules.generative.shards import write_shard
from lit_methods.datamodules.vision.fake import cifar, imagenet


def latents(root: Path, values: NDArray[np.floating], name: str = "latent_celeba_256", whole: bool = False) -> None:
    """``<name>/<number>.npy``, every second one with a dimension for the batch, or ``<name>.npy``.

    Args:
        root: Folder to write to.
        values: (N, C, H, W).
        name: Name of the folder or file.
        whole: One file.
    """
    (root if whole else root / name).mkdir(parents=True, exist_ok=True)
    if whole:
        np.save(root / f"{name}.npy", values)
        return
    for number, value in enumerate(values):
        np.save(root / name / f"{number:09}.npy", value[None] if number % 2 else value)


def shards(
    root: Path,
    pattern: str = "shard-{}.tar",
    count: int = 2,
    per_shard: int = 5,
    shape: Sequence[int] = (4, 2, 6, 6),
    prompt: tuple[int, int] = (3, 8),
    keys: tuple[str, str] = ("latent.pth", "embed.pth"),
) -> Path:
    """Tar files of latents and embedded prompts; sample n, counted through all of them, is filled with n.

    Args:
        root: Folder to write to.
        pattern: Name of a file, with ``{}`` for its number.
        count: Files.
        per_shard: Samples of each.
        shape: Of a latent.
        prompt: Tokens and width of a prompt.
        keys: Endings of latents and prompts.

    Returns:
        ``root``.
    """
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        samples: list[tuple[str, dict[str, torch.Tensor | str]]] = [
            (
                f"{n:04d}",
                {
                    keys[0]: torch.full(tuple(shape), float(n)).bfloat16(),
                    keys[1]: torch.full(prompt, float(n)),
                    "prompt.txt": "a",
                },
            )
            for n in range(shard * per_shard, (shard + 1) * per_shard)
        ]
        write_shard(root / pattern.format(shard), samples)
    return root


def few_shot(root: Path, *folders: tuple[str, int]) -> None:
    """Smooth pictures ``<folder>/<number>.png``.

    Args:
        root: Folder to write to.
        folders: Names below it, and the number of pictures in each.
    """
    rng = np.random.default_rng(0)
    for name, count in folders:
        for number in range(count):
            picture(root / name / f"{number:05}.png", smooth(rng, (80, 64)))


# ---- what each datamodule gets ---------------------------------------------------------------------------------------------------------


def _cifar(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    cifar(arguments["root"], "cifar10", 20)
    return {"root": arguments["root"]}


def _imagenet(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    class_list = arguments.get("class_list")
    imagenet(arguments["root"], [f"n{k:08d}" for k in range(1, 11)], 4, 2, class_list)
    return {"root": arguments["root"]} | ({} if class_list is None else {"class_list": class_list})


def _latents(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A stack of four channels at an eighth of the image's side, in half precision: ``num_val`` of them and some more."""
    side = max(1, arguments["image_size"] // 8)
    values = np.random.default_rng(0).standard_normal((arguments["num_val"] + 32, 4, side, side), np.float32).astype(np.float16)
    latents(arguments["root"], values, arguments["name"], whole=True)
    return {"root": arguments["root"]}


def _shards(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Videos of two frames of 8 x 8 latent pixels; channels and the width of prompts are the model's where it names them."""
    root, prompt = arguments["root"], (3, sizes.get("text_width", 8))
    pattern = arguments["pattern"].replace("*", "-{}", 1) if "*" in arguments["pattern"] else arguments["pattern"]
    keys = (arguments["latent"], arguments["embedding"] or "embed.pth")
    per_shard = arguments["num_val"] // 2 + 4
    shards(root, pattern, 2, per_shard, (sizes.get("channels", 4), 2, 8, 8), prompt, keys)
    if arguments.get("null_embedding") is None:
        return {"root": root}
    arguments["null_embedding"].parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.ones(prompt), arguments["null_embedding"])
    return {"root": root, "null_embedding": arguments["null_embedding"]}


def _few_shot(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Eight pictures to train on beside those for validation, and as many targets as are asked for, else ten."""
    few_shot(arguments["root"], (arguments["source"], arguments["num_val"] + 8), (arguments["target"], arguments["shots"] or 10))
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {
    "FewShotFoldersDataModule": _few_shot,
    "GenerativeCIFARDataModule": _cifar,
    "GenerativeImageNetDataModule": _imagenet,
    "LatentDataModule": _latents,
    "LatentShardsDataModule": _shards,
}
__all__ = ["FAKES", "few_shot", "latents", "shards"]
