"""ADELE and MultiScaleConsistency by a Trainer against the page's loop: histories, fitted curves, corrected labels, scale weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_methods import LabelStore
from lit_methods.callbacks import ADELE, MultiScaleConsistency
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


class Masks(Dataset):
    """Images with the labels of the moment."""

    def __init__(self, images, store):
        self.images, self.store = images, store

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        now, first = (torch.from_numpy(np.asarray(read(index))).long() for read in (self.store.current, self.store.original))
        return {"image": self.images[index], "label": now, "label_original": first, "index": index}


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    clean = torch.zeros(8, 12, 12, dtype=torch.int64)
    clean[:, 3:9, 3:9], clean[::2, 3:6, 3:9] = 1, 2
    images = (clean[:, None] + 0.3 * torch.randn(8, 1, 12, 12, generator=generator)).to(dtype)
    noisy = clean.roll(1, dims=1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).to(dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    store = LabelStore.create(tmp_path, noisy.numpy().astype(np.uint8))
    data = Masks(images, store)
    settings = {"eval_interval": 1, "threshold": 0.05, "confidence": 0.5}
    adele = ADELE(num_classes=3, store=store, loader=DataLoader(data, batch_size=8), **settings)
    consistency = MultiScaleConsistency()
    logs = run(module, DataLoader(data, batch_size=4), [consistency, adele], max_epochs=5)

    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    places = [torch.arange(4), torch.arange(4, 8)]
    wanted, labels, scale_weights = page_loop("adele").train(network, optimizer, images, noisy, places, 5, 3, **settings)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert np.array_equal(np.stack([store.current(index) for index in range(8)]), labels.numpy())
    torch.testing.assert_close(consistency.scale_weights.detach(), scale_weights, rtol=1e-6, atol=1e-6)
    assert 2 <= max(adele.triggered) <= 4, "corrected in the middle of the run"
    assert (labels != noisy).sum() > 20
