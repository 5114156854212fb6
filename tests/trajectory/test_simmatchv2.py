"""SimMatchV2 by a Trainer against the page's loop: warm-up, banks that fill and go round, the averaged network, two strong views."""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_methods import SimMatchV2
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run

CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


class Points(pl.LightningDataModule):
    """Three batches of SemiSupervisedDataModule's form."""

    labelled_classes = CLASSES

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(3):
            index = torch.randperm(6, generator=generator)[:3]
            views = [torch.randn(4, 5, generator=generator) for _ in range(3)]
            self.batches.append(
                {
                    "labelled": {"image": torch.randn(3, 5, generator=generator), "label": CLASSES[index], "index": index},
                    "unlabelled": {"weak": views[0], "strong": views[1:]},
                }
            )

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def test_a_run_is_the_loop():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    settings = {"embedding_dim": 6, "bank_size": 8, "neighbours": 3, "threshold": 0.4, "ema_decay": 0.997, "warmup_epochs": 1}
    module, data = SimMatchV2(backbone, 8, 3, 6, learning_rate=0.05, **settings), Points()
    student, teacher, graph = copy.deepcopy((module._student(), module.teacher, module.graph))
    graph.label_bank_class.copy_(CLASSES)
    logs = run(module, data, max_epochs=3)

    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    loop = page_loop("simmatchv2")
    wanted = loop.train(student, teacher, graph, optimizer, data.batches, 3, ema_decay=0.997, warmup_epochs=1)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module._student(), student), (module.teacher, teacher), (module.graph, graph)):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])
    assert wanted[-1]["semi/ne_loss"] > 0, "the queue has been filled"
