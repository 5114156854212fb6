"""The detector by a Trainer against the page's loop: weights and losses through the ramp, for bv, gv and both."""

import copy

import pytest
import torch

from lit_methods import CompactVideoDetector, SemiSupervisedVideoDetector
from lit_methods.datamodules import MovingShapesDataModule
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

EPOCHS = 2


@pytest.mark.parametrize("mode", ["bv", "gv", "bv+gv", "l2"])
@pytest.mark.parametrize("dtype", both_dtypes)
def test_a_run_is_the_loop(dtype, mode):
    torch.manual_seed(0)
    network = CompactVideoDetector(4, channels=2, levels=1).to(dtype)
    module = SemiSupervisedVideoDetector(network, 4, mode, learning_rate=1e-2, plateau_patience=None)
    own = copy.deepcopy(network)
    data = MovingShapesDataModule(image_size=16, num_labelled=4, num_unlabelled=4, num_val=1, batch_size=2)
    data.setup("fit")
    batches = [
        {part: {name: value.to(dtype) if value.is_floating_point() else value for name, value in of.items()} for part, of in batch.items()}
        for batch, *_ in data.train_dataloader()
    ]
    logs = run(module, batches, max_epochs=EPOCHS)
    optimizer = torch.optim.Adam(own.parameters(), 1e-2, eps=1e-6)
    wanted = page_loop("video_action_detection").train(own, optimizer, [batches] * EPOCHS, mode)
    assert len(batches) * EPOCHS == 4
    tolerance = 100 * TOLERANCE[dtype]  # Adam enlarges rounding
    assert_same_logs(logs, wanted, tolerance)
    assert_same_state(module.network, own, tolerance)
