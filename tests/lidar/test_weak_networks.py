"""Networks and host of weakly labelled points: PointNetOfCells, SparseUNet, WeakPointSegmentor."""

import pytest
import torch

from helpers import tiny_trainer
from lit_methods import PointNetOfCells, SparseUNet, WeakPointSegmentor
from lit_methods.datamodules import RoomsDataModule
from lit_methods.lidar.point_net import cells_of


def clouds(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(90, 9, generator=generator).to(dtype), torch.tensor([50, 40])


def test_cells_of_two_clouds_are_apart():
    place, sample = torch.tensor([[0.1, 0, 0], [0.2, 0, 0], [0.4, 0, 0], [0.1, 0, 0]]), torch.tensor([0, 0, 0, 1])
    index, number = cells_of(place, sample, 0.3)
    assert index.tolist() == [0, 0, 1, 2]
    assert number == 3
    assert cells_of(place[:0], sample[:0], 0.3)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_see_their_own_cloud_alone_whatever_their_order(dtype):
    torch.manual_seed(0)
    network = PointNetOfCells(4, width=8).to(dtype).eval()
    points, sizes = clouds(dtype)
    both = network(points, sizes)
    assert both.shape == (90, 4)
    alone = torch.cat([network(part, torch.tensor([len(part)])) for part in points.split(sizes.tolist())])
    torch.testing.assert_close(alone, both, atol=1e-5, rtol=1e-4)
    order = torch.cat([torch.randperm(50), 50 + torch.randperm(40)])
    torch.testing.assert_close(network(points[order], sizes), both[order], atol=1e-5, rtol=1e-4)


@pytest.mark.thorough
def test_sparse_unet_gives_each_point_the_logits_of_its_voxel():
    pytest.importorskip("spconv")
    torch.manual_seed(0)
    network = SparseUNet(3, stem_channels=4, planes=[4, 4, 6, 6, 6, 4, 4, 4], voxel_size=0.25)
    points, sizes = clouds()
    points[1] = points[0]
    found = network(points, sizes)
    assert found.shape == (90, 3)
    assert torch.equal(found[0], found[1])
    assert len(found.unique(dim=0)) > 30
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_room_is_learned_and_its_labels_predicted():
    rooms = RoomsDataModule(num_train=2, num_val=1, num_points=300, batch_size=1, supervision="full")
    torch.manual_seed(0)
    module = WeakPointSegmentor(PointNetOfCells(5, width=16), 5, optimizer="sgd", learning_rate=0.3)
    trainer = tiny_trainer(max_epochs=10)
    trainer.fit(module, rooms)
    assert trainer.callback_metrics["segmentor/val_miou"] > 0.3
    (predicted,) = trainer.predict(module, rooms)
    assert len(predicted["labels"][0]) == 300
    with pytest.raises(ValueError, match="a class of num_classes=5: give another number, such as 255"):
        WeakPointSegmentor(PointNetOfCells(5), 5, ignore_index=4)
    with pytest.raises(ValueError, match="optimizer is 'lion': give one of sgd, adamw"):
        WeakPointSegmentor(PointNetOfCells(5), 5, optimizer="lion")
