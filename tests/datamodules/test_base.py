"""Every datamodule with built-in data: a plain DataLoader and a plain index work, and the loaders' rules hold."""

import ast
import functools
import inspect
import pickle
import re
import textwrap
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import _log_hyperparams
from small_roots import ROOTS
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from helpers import tiny_trainer
from lit_methods import datamodules
from lit_methods.callbacks.wrapping import attach
from lit_methods.datamodules.base import Batches, LoaderDataModule

SMALL = {
    "AgeDataModule": {"image_size": 32, "views": 1},
    "BarsDataModule": {"views": 2},
    "GenerativeImageNetDataModule": {"image_size": 32},
    "ImageNetDataModule": {"image_size": 32},
    "NYUD2DataModule": {"reweight": "inverse"},
    "NeighbourCropsDataModule": {"image_size": 16, "local_size": 8, "num_train": 40, "num_val": 10},
    "RetrievalImagesDataModule": {"image_size": 32},
    "RoomsDataModule": {"num_train": 3, "num_val": 2, "num_points": 120},
    "SemiSupervisedDataModule": {"data": None, "policy": "small_grey", "strong_views": 2},
}
DRIVING = {"KittiStyleDataModule", "NuScenesDataModule", "RoomsDataModule", "S3DISDataModule", "ScanNetDataModule"}
# clouds of different sizes need the datamodule's collate function
NOT_FOR_TRAINING = {"VideoPromptsDataModule"}  # texts alone, for test and predict
FILMS = {"JHMDBActionsDataModule", "UCF101ActionsDataModule", "YouTubeVOSDataModule"}  # no built-in sample: test_action_clips.py
NAMES = sorted(set(datamodules.__all__) - DRIVING - NOT_FOR_TRAINING - FILMS)
PAIRS = {"SemiSupervisedDataModule", "MovingShapesDataModule"}  # of batches, labelled ones and others


@functools.cache
def prepared(name: str, **arguments):
    """A datamodule that is set up, for all tests that only look at it."""
    arguments = SMALL.get(name, {}) | arguments
    if name == "SemiSupervisedDataModule":
        arguments["data"] = datamodules.DigitsDataModule()
    module = getattr(datamodules, name)(**arguments)
    module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    return module


def two_at_a_time(name: str) -> dict[str, int]:
    return {"batch_size": 2} if "batch_size" in inspect.signature(getattr(datamodules, name)).parameters else {}


def tensors(sample) -> list[Tensor]:
    if isinstance(sample, dict):
        return [tensor for key in sorted(sample) for tensor in tensors(sample[key])]
    if isinstance(sample, list):
        return [tensor for part in sample for tensor in tensors(part)]
    return [sample] if isinstance(sample, Tensor) else []


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_index_is_epoch_0_and_a_plain_loader_works(name):
    module = prepared(name, **two_at_a_time(name))
    parts = [module.labelled_set, module.unlabelled_set] if name == "SemiSupervisedDataModule" else [module.train_set]
    held_out = module.test_set[0] if isinstance(module.test_set, list) else module.test_set
    parts += [] if held_out is None else [held_out]
    for part in parts:
        last = len(part) - 1
        second = min(1, last)  # a whole problem is one sample
        for plain, full in ((part[second], part[0, second]), (part[-1], part[0, last])):
            assert tensors(plain)
            torch.testing.assert_close(tensors(plain), tensors(full), rtol=0, atol=0)
        with pytest.raises(IndexError, match=f"index {last + 1} of a data set of {last + 1} samples"):
            part[last + 1]
        batch = next(iter(DataLoader(part, batch_size=1 if part.batch_size else 2)))
        stacked = [torch.stack(column) for column in zip(*([tensors(part[k]) for k in range(1 if part.batch_size else 2)]), strict=True)]
        for found in stacked:
            assert any(torch.equal(found, one) for one in tensors(batch))


def declared(name: str) -> dict[str, tuple[int, str]]:
    """Key -> number of dimensions and dtype, of the tensors in the docstring's line ``Batch: {...}``."""
    docstring = ast.get_docstring(ast.parse(textwrap.dedent(inspect.getsource(getattr(datamodules, name)))).body[0])
    (line,) = (line for line in docstring.splitlines() if line.startswith("Batch: {"))
    assert line.endswith("}")
    found = re.findall(r'"(\w+)": \(([^)]*)\) (\w+)', line)
    return {key: (len([side for side in shape.split(",") if side.strip()]), dtype) for key, shape, dtype in found}


@pytest.mark.parametrize("name", sorted(set(datamodules.__all__) - DRIVING - FILMS - PAIRS))
def test_the_docstring_tells_the_keys_of_a_batch(name):
    without = {"AgeDataModule": {"views": 0}, "BarsDataModule": {"views": 0}, "NYUD2DataModule": {"reweight": "none"}}
    arguments = without.get(name, {"views": 1} if name == "OrganSlicesDataModule" else {})
    data = prepared(name, **arguments, **two_at_a_time(name))
    batch = next(iter(data.test_dataloader() if name in NOT_FOR_TRAINING else data.train_dataloader()))
    assert declared(name) == {key: (part.ndim, str(part.dtype)[6:]) for key, part in batch.items() if isinstance(part, Tensor)}


@pytest.mark.parametrize("name", sorted(DRIVING | FILMS | PAIRS))
def test_every_docstring_has_one_line_on_batches(name):
    assert declared(name)


class Squares(Batches):
    def __len__(self):
        return 10

    def batch(self, epochs, index):
        return {"image": torch.from_numpy(100 * epochs + index**2)}


class SquaresDataModule(LoaderDataModule):
    root = None

    def setup(self, stage: str) -> None:
        self.train_set = Squares()
        self.test_set = [Squares(), Squares()]


def squares(batch_size=4, **arguments):
    return SquaresDataModule(batch_size=batch_size, **({"num_workers": 0, "seed": 0} | arguments))


def test_batches_are_fetched_whole_by_our_loaders_and_one_by_one_by_others():
    assert Squares()[2, 3] == {"image": 209}
    assert Squares().__getitems__([(0, 3), (1, 2)])["image"].tolist() == [9, 104]
    assert [batch["image"].tolist() for batch in DataLoader(Squares(), 5)] == [[0, 1, 4, 9, 16], [25, 36, 49, 64, 81]]


def test_an_incomplete_batch_is_dropped_in_training_unless_it_is_the_only_one():
    module = squares()
    module.setup("fit")
    assert [len(batch["image"]) for batch in module.train_dataloader()] == [4, 4]
    few = squares(16)
    few.setup("fit")
    assert [len(batch["image"]) for batch in few.train_dataloader()] == [10]
    evaluation = squares(eval_batch_size=3)
    evaluation.setup("test")
    for loader in (*evaluation.test_dataloader(), *evaluation.predict_dataloader()):
        assert [batch["image"].tolist() for batch in loader] == [[0, 1, 4], [9, 16, 25], [36, 49, 64], [81]]


def test_a_missing_part_is_named():
    module = squares()
    with pytest.raises(RuntimeError, match=r"SquaresDataModule has no train data: call setup\(\) first"):
        module.train_dataloader()
    module.setup("fit")
    with pytest.raises(RuntimeError, match="has no val data: root='None' has none, or setup"):
        module.val_dataloader()
    for wrong in ({"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            squares(**wrong)


class Takes(BoringModel):
    """Any batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(str([tensor.tolist() for tensor in tensors(batch)]))
        return self.layer(torch.ones(1, 32)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


@pytest.mark.parametrize("name", [*NAMES, "kitti", "nuscenes", "nuscenes segmented", "RoomsDataModule", "scannet"])
def test_overfitting_a_few_batches_works_with_every_datamodule(name, tmp_path):
    """What configs/debug/overfit.yaml sets."""
    if name in ROOTS:
        ROOTS[name][0](tmp_path / "root")
        module = ROOTS[name][1](tmp_path / "root")
    else:
        arguments = SMALL.get(name, {}) | two_at_a_time(name)
        module = getattr(datamodules, name)(**(arguments | ({"data": datamodules.DigitsDataModule()} if "data" in arguments else {})))
    model = Takes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_trainer(overfit_batches=2, max_epochs=2).fit(model, datamodule=module)
    half = len(model.seen) // 2
    assert half in (1, 2)
    assert len(model.seen) == 2 * half


def test_overfitting_a_few_batches_works_with_data_that_come_in_batches():
    seen = []

    class Keeps(BoringModel):
        def training_step(self, batch, batch_idx):
            seen.append(batch["image"].tolist())
            return self.layer(torch.ones(1, 32)).sum()

        def validation_step(self, batch, batch_idx):
            pass

    module = squares()
    module.val_set = Squares()
    with pytest.warns(UserWarning, match="overfit"):
        tiny_trainer(overfit_batches=2, max_epochs=2).fit(Keeps(), datamodule=module)
    assert seen == [[0, 1, 4, 9], [16, 25, 36, 49]] * 2


class Seeded(BoringModel):
    """A module with arguments that data have, too."""

    def __init__(self, seed: int = 0, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        return self.layer(torch.zeros(1, 32)).sum()


def built(name, root):
    """One of the cases of :func:`test_overfitting_a_few_batches_works_with_every_datamodule`."""
    if name in ROOTS:
        ROOTS[name][0](root)
        return ROOTS[name][1](root)
    arguments = SMALL.get(name, {})
    return getattr(datamodules, name)(**(arguments | ({"data": datamodules.DigitsDataModule()} if "data" in arguments else {})))


@pytest.mark.parametrize("name", [*NAMES, "kitti", "nuscenes", "nuscenes segmented", "RoomsDataModule", "scannet"])
def test_what_a_spawned_worker_gets_can_be_pickled(name, tmp_path):
    """As on macOS and Windows, and with ``multiprocessing_context: spawn``, also while a callback stands around a method of the module."""
    data, module = built(name, tmp_path / "root"), Takes()
    attach(module, lambda output, batch: output)
    data.trainer = tiny_trainer()
    data.trainer.strategy._lightning_module, data.trainer.datamodule = module, data
    data.prepare_data()
    data.setup("fit")
    loaders = data.train_dataloader()
    for loader in [loaders] if hasattr(loaders, "dataset") else tree_leaves(loaders.iterables):
        dataset, _, _ = pickle.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        positions = next(iter(sampler))
        fetched = [
            one.__getitems__(positions) if hasattr(one, "__getitems__") else [one[position] for position in positions]
            for one in (loader.dataset, dataset)
        ]
        for one, other in zip(*map(tree_leaves, fetched), strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Contrary(BoringModel):
    """A module that has every argument of some data, with other values."""

    def __init__(self, **arguments):
        super().__init__()
        self.save_hyperparameters({key: f"not {value!r}" for key, value in arguments.items()})


@pytest.mark.parametrize("name", [*NAMES, "kitti", "nuscenes", "nuscenes segmented", "RoomsDataModule", "scannet"])
def test_no_argument_of_data_collides_with_the_modules(name, tmp_path):
    data = built(name, tmp_path / "root")
    module = Contrary(**data.hparams)
    trainer = tiny_trainer(logger=CSVLogger(tmp_path / "logs"))
    data.trainer = trainer
    trainer.strategy._lightning_module, trainer.datamodule = module, data
    _log_hyperparams(trainer)  # raises where the two differ
    logged = trainer.loggers[0].experiment.hparams
    assert {key: logged[key] for key in data.hparams} == {key: module.hparams[key] for key in data.hparams}


def test_module_and_data_may_have_two_seeds(tmp_path):
    """Lightning refuses such a pair as soon as there is a logger."""
    logger = CSVLogger(tmp_path)
    data = datamodules.DigitsDataModule(seed=1, batch_size=4)
    tiny_trainer(max_steps=1, limit_val_batches=0, logger=logger).fit(Seeded(seed=0), datamodule=data)
    logged = yaml.safe_load((tmp_path / "lightning_logs/version_0/hparams.yaml").read_text())
    assert (logged["seed"], logged["batch_size"]) == (0, 4)
    assert "num_workers" in logged, "what only the data have"
    assert data.hparams["seed"] == 1
