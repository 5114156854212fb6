"""MaskedBNSparsity by a Trainer against the page's loop: all three stages, each from the checkpoint of the one before."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_methods.callbacks import MaskedBNSparsity
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, labelled, page_loop, run

pytest.importorskip("torch_pruning")


class SaveAtTheEnd(pl.Callback):
    """Leaves the checkpoint that the next stage starts from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class Residual(nn.Module):
    """Convolutions with batch norm, and a sum that ties two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            for norm in (self.norm, self.norm1, self.norm2):
                norm.weight.uniform_(0.5, 1.5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("penalty", ["l1", "smooth_l1"])
def test_a_run_is_the_loop(penalty, tmp_path):
    torch.manual_seed(0)
    dtype = torch.float32
    network, batches, loop = Residual(), labelled(3, dtype, 4, (3, 6, 6)), page_loop("masksparsity")
    module, image = PlainClassifier(copy.deepcopy(network), sgd), batches[0]["image"][:4]

    def stage(name, **options):
        callback = MaskedBNSparsity(name, lambda_=0.05, penalty=penalty, criterion="ratio", ratio=0.5, forward="network", **options)
        saved = tmp_path / f"{name}.ckpt"
        return run(module, batches, [callback, SaveAtTheEnd(saved)]), saved

    logs, first = stage("global_sparsity")
    groups, _ = loop.choose_channels(network, image)
    assert_same_logs(logs, loop.train(network, sgd, batches, groups, None, penalty, 0.05), TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])

    module = PlainClassifier(copy.deepcopy(network), sgd)
    logs, second = stage("mask_sparsity", mask=first)
    groups, keep = loop.choose_channels(network, image, 0.5)
    assert_same_logs(logs, loop.train(network, sgd, batches, groups, keep, penalty, 0.05), TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])

    module = PlainClassifier(Residual(), sgd)
    logs, _ = stage("finetune", weights=second)
    loop.cut(network, groups, keep)
    assert_same_logs(logs, loop.train(network, sgd, batches), TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert len(network.conv1.weight) == 4, "half of the channels are gone"
