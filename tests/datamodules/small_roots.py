"""A tiny root of every benchmark, written by the tests that look at all readers."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_nuscenes import write_release

from lit_methods import datamodules
from lit_methods.datamodules.generative.shards import write_shard

RNG = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def cifar(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, 2))


def few_labels(root: Path) -> None:
    cifar(root)
    text(root / "labels.txt", "0", "3")


def imagenet(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            picture(root / part / name / "a.JPEG")
    text(root / "classes.txt", "n01", "n02")


def svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir()
    for part in ("train", "test"):
        savemat(root / f"{part}_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]])})


def stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    text(folder / "class_names.txt", *"abcdefghij")
    for part in ("train", "test", "unlabeled"):
        (folder / f"{part}_X.bin").write_bytes(bytes(2 * 3 * 96 * 96))
    for part in ("train", "test"):
        (folder / f"{part}_y.bin").write_bytes(b"\1\12")


PAIRS = [(u, i) for u in range(6) for i in range(u, u + 4)]


def movielens(root: Path) -> None:
    text(root / "ratings.dat", *(f"{u + 1}::{i + 1}::3::978300760" for u, i in PAIRS))


def recbole(root: Path) -> None:
    text(root / "a.inter", "user_id:token\titem_id:token\trating:float", *(f"{u}\t{i}\t3" for u, i in PAIRS))


def lightgcn(root: Path) -> None:
    text(root / "a.train", "0 3", "0 4", "1 3", "2 5")
    text(root / "a.test", "0 6", "1 4")


def ages(root: Path) -> None:
    lines = [f"{20 + k},faces/{part}{k}.jpg,{part}" for part in ("train", "val", "test") for k in range(2)]
    text(root / "agedb.csv", "age,path,split", *lines)
    for line in lines:
        picture(root / line.split(",")[1])


def depths(root: Path) -> None:
    for part, kind in (("train", np.uint8), ("test", np.uint16)):
        picture(root / f"nyu2_{part}" / "a.jpg", (320, 240))
        Image.fromarray(np.full((240, 320), 100, kind)).save(root / f"nyu2_{part}" / "a.png")
        text(root / f"nyu2_{part}.csv", f"data/nyu2_{part}/a.jpg,data/nyu2_{part}/a.png")
    np.save(root / "test_balanced_mask.npy", np.ones((1, 228, 304), np.uint8))


def sentences(root: Path) -> None:
    for part in ("train", "dev", "test"):
        text(root / f"{part}_new.tsv", "index\tsentence1\tsentence2\tscore", "0\tA dog.\tA cat.\t2.5", "1\tA man.\tA hen.\t1.0")


def texts(root: Path) -> None:
    for part in ("train", "valid", "test"):
        text(root / f"{part}.txt", "some words that are read " * 4)


def tokens(root: Path) -> None:
    text(root / "meta.json", json.dumps({"vocab_size": 50, "dtype": "uint16"}))
    for part in ("train", "val"):
        (root / f"{part}.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())


def super_resolution(root: Path) -> None:
    for folder in (root / "DIV2K", root / "benchmark" / "Set5"):
        picture(folder / "HR" / "a.png", (24, 20))
        picture(folder / "LR_bicubic" / "X2" / "ax2.png", (12, 10))


def voc(root: Path) -> None:
    for name in ("a", "b"):
        picture(root / "JPEGImages" / f"{name}.jpg")
        for folder in ("SegmentationClass", "masks"):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(RNG.integers(0, 21, (20, 24), dtype=np.uint8)).save(root / folder / f"{name}.png")
    text(root / "ImageSets" / "Segmentation" / "trainaug.txt", "a")
    text(root / "ImageSets" / "Segmentation" / "val.txt", "b")


def synapse(root: Path) -> None:
    import h5py

    (root / "train_npz").mkdir(parents=True)
    (root / "test_vol_h5").mkdir()
    np.savez(root / "train_npz" / "case0001_slice001.npz", image=np.zeros((8, 8), np.float32), label=np.ones((8, 8)))
    with h5py.File(root / "test_vol_h5" / "case0002.npy.h5", "w") as file:
        file["image"], file["label"] = np.zeros((2, 8, 8), np.float32), np.ones((2, 8, 8))
    text(root / "train.txt", "case0001_slice001")


def acdc(root: Path) -> None:
    import h5py

    for folder, shape, ending in (("ACDC_training_slices", (8, 8), "_slice_1"), ("ACDC_training_volumes", (2, 8, 8), "")):
        (root / folder).mkdir(parents=True)
        for patient in range(1, 11):
            with h5py.File(root / folder / f"patient{patient:03d}_frame01{ending}.h5", "w") as file:
                file["image"], file["label"] = np.zeros(shape, np.float32), np.ones(shape)


def eurosat(root: Path) -> None:
    rows = [[f"{name}/{k}.jpg", label, name] for label, name in enumerate(("River", "Sea")) for k in range(2)]
    text(root / "split_zhou_EuroSAT.json", json.dumps({part: rows for part in ("train", "val", "test")}))
    for path, *_ in rows:
        picture(root / "2750" / path)
    text(root / "words.json", json.dumps({"River": ["water that flows"], "Sea": ["much water"]}))


def aircraft(root: Path) -> None:
    picture(root / "images" / "001.jpg")
    text(root / "variants.txt", "707-320", "DC-10 30")
    for part in ("train", "test"):
        text(root / f"images_variant_{part}.txt", "001 DC-10 30", "001 707-320")


def few_shot_imagenet(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            picture(root / "images" / part / name / "a.JPEG")
    text(root / "classnames.txt", "n01 great white shark", "n02 hen")


def cub(root: Path) -> None:
    kinds = [99, 100, 101, 102]
    text(root / "images.txt", *(f"{k} {label:03d}.Bird/{k}.jpg" for k, label in enumerate(kinds, 1)))
    text(root / "image_class_labels.txt", *(f"{k} {label}" for k, label in enumerate(kinds, 1)))
    for k, label in enumerate(kinds, 1):
        picture(root / "images" / f"{label:03d}.Bird" / f"{k}.jpg")


def cars(root: Path) -> None:
    from scipy.io import savemat

    table = np.zeros((1, 4), dtype=[("relative_im_path", object), ("class", object)])
    for k, kind in enumerate((97, 98, 99, 100)):
        picture(root / "car_ims" / f"{k}.jpg")
        table[0, k] = (f"car_ims/{k}.jpg", kind)
    savemat(root / "cars_annos.mat", {"annotations": table})


def sop(root: Path) -> None:
    for part, kinds in (("train", (1, 2)), ("test", (3, 4))):
        text(root / f"Ebay_{part}.txt", "image_id class_id super_class_id path", *(f"{k} {k} 1 chair/{k}.JPG" for k in kinds))
        for k in kinds:
            picture(root / "chair" / f"{k}.JPG")


def inat(root: Path) -> None:
    for part, kinds in (("train", (1, 2)), ("test", (3, 4))):
        text(root / "Inat_dataset_splits" / f"Inaturalist_{part}_set1.txt", *(f"train_val2018/Birds/{k}/a.jpg" for k in kinds))
        for k in kinds:
            picture(root / "train_val2018" / "Birds" / str(k) / "a.jpg")


def latents(root: Path) -> None:
    (root / "latent_celeba_256").mkdir(parents=True)
    for k in range(4):
        np.save(root / "latent_celeba_256" / f"{k:09d}.npy", RNG.normal(size=(4, 2, 2)).astype(np.float32))
    np.save(root / "latent_celeba_256_stat.npy", np.ones((2, 4, 1, 1), np.float32))


def latents_whole(root: Path) -> None:
    root.mkdir()
    np.save(root / "latent_celeba_256.npy", RNG.normal(size=(4, 4, 2, 2)).astype(np.float32))


def shards(root: Path) -> None:
    root.mkdir()
    for k in range(2):
        samples = [(f"{k}{j}", {"latent.pth": torch.ones(2, 1, 2, 2), "embed.pth": torch.ones(3, 4)}) for j in range(2)]
        write_shard(root / f"shard-{k}.tar", samples)
    buffer = io.BytesIO()
    torch.save(torch.ones(3, 4), buffer)
    (root / "negative.pt").write_bytes(buffer.getvalue())


def kitti(root: Path) -> None:
    for sequence in ("00", "08"):
        folder = root / "sequences" / sequence
        for name in ("velodyne", "labels"):
            (folder / name).mkdir(parents=True)
        for k in range(2):
            (folder / "velodyne" / f"{k:06d}.bin").write_bytes(RNG.normal(size=(5, 4)).astype("<f4").tobytes())
            (folder / "labels" / f"{k:06d}.label").write_bytes(np.full(5, 40, "<u4").tobytes())
        text(folder / "poses.txt", *["1 0 0 0 0 1 0 0 0 0 1 0"] * 2)
        text(folder / "calib.txt", "Tr: 1 0 0 0 0 1 0 0 0 0 1 0")


def nuscenes(root: Path) -> None:
    write_release(root, frames=2, points=20)


Make = Callable[[Path], Any]
D = datamodules
ROOTS: dict[str, tuple[Callable[[Path], None], Make]] = {
    "cifar": (cifar, lambda root: D.CIFARDataModule(root)),
    "generative cifar": (cifar, lambda root: D.GenerativeCIFARDataModule(root)),
    "semi": (
        few_labels,
        lambda root: D.SemiSupervisedDataModule(D.CIFARDataModule(root), label_list=root / "labels.txt", batch_size=1, ratio=1),
    ),
    "imagenet": (imagenet, lambda root: D.ImageNetDataModule(root, root / "classes.txt", image_size=16)),
    "generative imagenet": (imagenet, lambda root: D.GenerativeImageNetDataModule(root, image_size=16)),
    "svhn": (svhn, lambda root: D.SVHNDataModule(root)),
    "stl10": (stl10, lambda root: D.STL10DataModule(root)),
    "movielens": (movielens, lambda root: D.RatingsDataModule(root, mode="neumf", num_negatives=2)),
    "recbole": (recbole, lambda root: D.RatingsDataModule(root)),
    "lightgcn": (lightgcn, lambda root: D.RatingsDataModule(root)),
    "ages": (ages, lambda root: D.AgeDataModule(root, image_size=16)),
    "depths": (depths, lambda root: D.NYUD2DataModule(root)),
    "sentences": (sentences, lambda root: D.SentencePairsDataModule(root)),
    "texts": (texts, lambda root: D.TextDataModule(root, block_size=8)),
    "tokens": (tokens, lambda root: D.TextDataModule(root, block_size=8)),
    "super-resolution": (
        super_resolution,
        lambda root: D.SuperResolutionDataModule(root, train=["DIV2K"], test=["Set5"], patch_size=8),
    ),
    "voc": (voc, lambda root: D.NoisyMasksDataModule(root, root / "masks", crop=16, clean=root / "masks")),
    "synapse": (synapse, lambda root: D.OrganSlicesDataModule(root, "synapse", train_list=root / "train.txt")),
    "acdc": (acdc, lambda root: D.OrganSlicesDataModule(root, "acdc")),
    "eurosat": (eurosat, lambda root: D.FewShotDataModule(root, "eurosat", image_size=16, descriptions=root / "words.json")),
    "aircraft": (aircraft, lambda root: D.FewShotDataModule(root, "fgvc_aircraft", image_size=16)),
    "few-shot imagenet": (few_shot_imagenet, lambda root: D.FewShotDataModule(root, "imagenet", image_size=16)),
    **{
        name: (write, lambda root, name=name: D.RetrievalImagesDataModule(root, name, image_size=16, classes_per_batch=2))
        for name, write in (("cub", cub), ("cars", cars), ("sop", sop), ("inat", inat))
    },
    "latents": (latents, lambda root: D.LatentDataModule(root, num_val=1)),
    "latents in one file": (latents_whole, lambda root: D.LatentDataModule(root, num_val=1)),
    "shards": (shards, lambda root: D.LatentShardsDataModule(root, "*.tar", num_val=1, null_embedding=root / "negative.pt")),
    "kitti": (kitti, lambda root: D.KittiStyleDataModule(root, train_sequences=["00"], neighbours=1)),
    "nuscenes": (nuscenes, lambda root: D.NuScenesDataModule(root, "v1.0-mini", image_size=(18, 32))),
    "nuscenes segmented": (nuscenes, lambda root: D.NuScenesDataModule(root, "v1.0-mini", "segment")),
}


def everything(module: Any) -> dict[str, list[Any]]:
    """All samples of all parts."""
    module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    parts = {name: getattr(module, f"{name}_set", None) for name in ("train", "val", "test", "labelled", "unlabelled")}
    found = {}
    for name, part in parts.items():
        sets = part if isinstance(part, list) else [] if part is None else [part]
        found[name] = [[one[k] for k in range(len(one))] for one in sets]
    return found
