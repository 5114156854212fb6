"""Mask spreading and reliability consistency by a Trainer against the page's loop: labels, their weights, views, losses, batch norm."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lit_methods import LabelStore, PointNetOfCells
from lit_methods.callbacks import MaskLabelSpreading, ReliabilityConsistency
from lit_methods.datamodules.indoor.base import packed_labels, unpacked_labels
from lit_methods.datamodules.indoor.rooms import make_scene
from lit_methods.lidar.point_losses import weighted_cross_entropy
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


class Rooms(Dataset):
    """Scenes with the labels of the moment."""

    def __init__(self, points, store):
        self.points, self.store = points, store

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        labels, weights = unpacked_labels(self.store.current(index))
        return {
            "points": self.points[index],
            "points_per_sample": torch.tensor([len(labels)]),
            "labels": torch.from_numpy(labels).long(),
            "weights": torch.from_numpy(weights),
            "index": torch.tensor([index]),
        }


class Plain(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return weighted_cross_entropy(self.network(batch["points"], batch["points_per_sample"]), batch["labels"], batch["weights"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, tmp_path):
    rng = np.random.default_rng(0)
    scenes = [make_scene(str(k), rng, number=150)[0] for k in range(3)]
    clouds = [torch.from_numpy(scene.points).to(dtype) for scene in scenes]
    masks = [torch.from_numpy(scene.masks).long() for scene in scenes]
    given = [torch.from_numpy(np.where(rng.random(len(scene.labels)) < 0.2, scene.labels, 255)).long() for scene in scenes]
    torch.manual_seed(0)
    network = PointNetOfCells(5, width=8).to(dtype)
    module = Plain(copy.deepcopy(network))
    store = LabelStore.create(tmp_path, [packed_labels(labels.numpy(), labels.numpy() != 255) for labels in given])
    data = Rooms(clouds, store)
    trust = {"tau": 0.3, "kappa": 0.2}
    spreading = MaskLabelSpreading(5, store=store, loader=DataLoader(data, None), masks=lambda k: scenes[k].masks, scale=1.2, **trust)
    consistency = ReliabilityConsistency(scale=1.2, **trust)
    logs = run(module, DataLoader(data, None), [spreading, consistency], max_epochs=5)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    wanted, labels, weights = page_loop("sam3d_weak").train(network, optimizer, clouds, given, masks, 5, 5, scale=1.2, **trust)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    for index in range(3):
        stored = unpacked_labels(store.current(index))
        assert np.array_equal(stored.labels, labels[index].numpy())
        assert np.array_equal(stored.weights, weights[index].float().numpy())
    spread = torch.cat(weights) == 0.5
    assert 10 < int(spread.sum()) < 400, "pseudo-labels were spread"
    assert len({float(entry["reliability/share"]) for entry in wanted} - {0.0, 1.0}) > 3
