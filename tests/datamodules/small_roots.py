"""A tiny root of every benchmark, by the packaged writers, for the tests that look at all readers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_methods import datamodules
from lit_methods.datamodules.activations.fake import shards as activation_shards
from lit_methods.datamodules.detection import fake as detection
from lit_methods.datamodules.driving import fake as driving
from lit_methods.datamodules.fake import text
from lit_methods.datamodules.fewshot import fake as few_shot
from lit_methods.datamodules.generative import fake as generative
from lit_methods.datamodules.indoor import fake as indoor
from lit_methods.datamodules.metric_learning.fake import LAYOUTS as RETRIEVAL
from lit_methods.datamodules.recommendation import fake as recommendation
from lit_methods.datamodules.regression import fake as regression
from lit_methods.datamodules.retrieval import fake as collections
from lit_methods.datamodules.segmentation import fake as segmentation
from lit_methods.datamodules.superres import fake as superres
from lit_methods.datamodules.text import fake as corpora
from lit_methods.datamodules.vision import fake as vision

cifar = partial(vision.cifar, number=2)


def few_labels(root: Path) -> None:
    cifar(root)
    text(root / "labels.txt", "0", "3")


def imagenet(root: Path) -> None:
    vision.imagenet(root, ("n01", "n02"), 1, class_list=root / "classes.txt")


def crops(root: Path) -> None:
    vision.coco(root, 3, 2)
    vision.nearest(root / "nearest.npz", 3, 1)


def two_domains(root: Path) -> None:
    generative.few_shot(root, ("source", 3), ("target", 2))


def ages(root: Path) -> None:
    regression.faces(root, "agedb", dict.fromkeys(("train", "val", "test"), (20, 21)))


def sentences(root: Path) -> None:
    regression.sentences(root, dict.fromkeys(("train", "dev", "test"), (("A dog.", "A cat.", "2.5"), ("A man.", "A hen.", "1.0"))))


def super_resolution(root: Path) -> None:
    superres.pairs(root, ["DIV2K", "benchmark/Set5"], 2, (24, 20))


def voc(root: Path) -> None:
    segmentation.voc(root, root / "masks", ["a"], ["b"])


def synapse(root: Path) -> None:
    segmentation.synapse(root, 1, 8)
    text(root / "train.txt", "case0005_slice000")


def eurosat(root: Path) -> None:
    few_shot.listed_split(root, classes=("River", "Sea"), per_class=3)
    few_shot.descriptions(root / "words.json", ("River", "Sea"))


aircraft = partial(few_shot.aircraft, variants=("707-320", "DC-10 30"), per_class=1)
few_shot_imagenet = partial(few_shot.imagenet, classes={"n01": "great white shark", "n02": "hen"})
depths = partial(regression.rooms, number=1, size=(320, 240))


def kitti(root: Path) -> None:
    driving.sequences(root / "sequences", frames=2, points=5)


def latents(root: Path) -> None:
    generative.latents(root, np.random.default_rng(0).normal(size=(4, 4, 2, 2)).astype(np.float32))
    np.save(root / "latent_celeba_256_stat.npy", np.ones((2, 4, 1, 1), np.float32))


def latents_whole(root: Path) -> None:
    generative.latents(root, np.random.default_rng(0).normal(size=(4, 4, 2, 2)).astype(np.float32), whole=True)


def shards(root: Path) -> None:
    generative.shards(root, per_shard=2, shape=(2, 1, 2, 2), prompt=(3, 4))
    torch.save(torch.ones(3, 4), root / "negative.pt")


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
    "crops": (
        crops,
        lambda root: D.NeighbourCropsDataModule(root, nearest=root / "nearest.npz", neighbours=1, image_size=16, local_size=8),
    ),
    "detection": (
        partial(detection.coco, splits=("train2017", "val2017"), number=2, classes=3),
        lambda root: D.DetectionDataModule(root),
    ),
    "detection voc": (
        partial(detection.voc, splits=("trainval", "test"), class_names=("cat", "dog", "hen"), number=2),
        lambda root: D.DetectionDataModule(root, "voc", class_names=("cat", "dog", "hen")),
    ),
    "svhn": (partial(vision.svhn, train=2, test=2), lambda root: D.SVHNDataModule(root)),
    "stl10": (partial(vision.stl10, train=2, test=2, unlabelled=2), lambda root: D.STL10DataModule(root)),
    "movielens": (partial(recommendation.ratings, value="3"), lambda root: D.RatingsDataModule(root, mode="neumf", num_negatives=2)),
    "recbole": (partial(recommendation.ratings, file="fake.inter", value="3"), lambda root: D.RatingsDataModule(root)),
    "lightgcn": (recommendation.lightgcn, lambda root: D.RatingsDataModule(root)),
    "ages": (ages, lambda root: D.AgeDataModule(root, image_size=16)),
    "depths": (depths, lambda root: D.NYUD2DataModule(root)),
    "sentences": (sentences, lambda root: D.SentencePairsDataModule(root)),
    "collection": (partial(collections.beir, documents=9), lambda root: D.SearchDataModule(root)),
    "collection of TREC": (partial(collections.trec, documents=9), lambda root: D.SearchDataModule(root, train_from="judgements")),
    **{
        name: (
            partial(write, number=number),
            lambda root, name=name: D.FashionRetrievalDataModule(root, name, categories=["dress"], image_size=16, batch_size=2),
        )
        for name, write, number in (
            ("fashioniq", partial(collections.fashioniq, categories=("dress",)), 3),
            ("shoes", collections.shoes, 3),
            ("fashion200k", collections.fashion200k, 6),
        )
    },
    "texts": (partial(corpora.texts, words=20), lambda root: D.TextDataModule(root, block_size=8)),
    "tokens": (corpora.tokens, lambda root: D.TextDataModule(root, block_size=8)),
    "super-resolution": (
        super_resolution,
        lambda root: D.SuperResolutionDataModule(root, train=["DIV2K"], test=["Set5"], patch_size=8),
    ),
    "voc": (voc, lambda root: D.NoisyMasksDataModule(root, root / "masks", crop=16, clean=root / "masks")),
    "synapse": (synapse, lambda root: D.OrganSlicesDataModule(root, "synapse", train_list=root / "train.txt")),
    "acdc": (partial(segmentation.acdc, slices=1), lambda root: D.OrganSlicesDataModule(root, "acdc")),
    "eurosat": (eurosat, lambda root: D.FewShotDataModule(root, "eurosat", image_size=16, descriptions=root / "words.json")),
    "aircraft": (
        aircraft,
        lambda root: D.FewShotDataModule(root, "fgvc_aircraft", image_size=16),
    ),
    "few-shot imagenet": (
        few_shot_imagenet,
        lambda root: D.FewShotDataModule(root, "imagenet", image_size=16),
    ),
    **{
        name: (
            partial(write, per_class=1),
            lambda root, name=name: D.RetrievalImagesDataModule(root, name, image_size=16, classes_per_batch=2),
        )
        for name, write in RETRIEVAL.items()
    },
    "latents": (latents, lambda root: D.LatentDataModule(root, num_val=1)),
    "two domains": (two_domains, lambda root: D.FewShotFoldersDataModule(root, num_val=1, image_size=16)),
    "latents in one file": (latents_whole, lambda root: D.LatentDataModule(root, num_val=1)),
    "shards": (shards, lambda root: D.LatentShardsDataModule(root, "*.tar", num_val=1, null_embedding=root / "negative.pt")),
    "activations": (partial(activation_shards, rows=12, width=4), lambda root: D.HarvestedActivations(root, batch_size=4)),
    "scannet": (
        partial(indoor.scannet, points=60, lifted=False),
        lambda root: D.ScanNetDataModule(root, labelled_share=0.2, batch_size=2),
    ),
    "s3dis": (
        partial(indoor.s3dis, points=60, rooms=("office_1",), lifted=False),
        lambda root: D.S3DISDataModule(root, labelled_share=0.2, batch_size=2),
    ),
    "kitti": (
        kitti,
        lambda root: D.KittiStyleDataModule(root, train_sequences=["00"], neighbours=1),
    ),
    "nuscenes": (partial(driving.nuscenes, frames=2, points=20), lambda root: D.NuScenesDataModule(root, "v1.0-mini", image_size=(18, 32))),
    "nuscenes segmented": (partial(driving.nuscenes, frames=2, points=20), lambda root: D.NuScenesDataModule(root, "v1.0-mini", "segment")),
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
