"""Mask spreading and reliability consistency: the maths against plain loops, and both callbacks in runs."""

import itertools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import LabelStore, PointNetOfCells, WeakPointSegmentor
from lit_methods.callbacks import ExactResume, MaskLabelSpreading, ReliabilityConsistency
from lit_methods.callbacks.lidar.sam3d_weak import core
from lit_methods.callbacks.lidar.sam3d_weak.consistency import clouds_of
from lit_methods.datamodules import RoomsDataModule
from lit_methods.datamodules.indoor.base import unpacked_labels
from lit_methods.lidar.lifting import link_points, masks_at_points, smallest_masks, superpoints
from lit_methods.lidar.point_losses import weighted_cross_entropy

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def plainly_spread(masks, labels, classes, purity, count):
    """Votes by loops over views, masks and points."""
    votes = np.zeros((len(labels), classes), dtype=np.int64)
    for view in masks:
        for mask in set(view.tolist()) - {-1}:
            points = [i for i, m in enumerate(view) if m == mask]
            found = [int(labels[i]) for i in points if labels[i] != 255]
            if len(found) < max(count, 1):
                continue
            best = max(range(classes), key=lambda c: (found.count(c), -c))
            if found.count(best) / len(found) >= purity:
                votes[points, best] += 1
    return votes


@pytest.mark.parametrize(("purity", "count"), [(1.0, 1), (0.6, 3), (0.5, 2)])
def test_votes_are_those_of_plain_loops(purity, count):
    rng = np.random.default_rng(3)
    for points in (1, 7, 60):
        masks = rng.integers(-1, 5, (3, points))
        labels = np.where(rng.random(points) < 0.5, rng.integers(0, 4, points), 255)
        found = core.spread_masks(torch.from_numpy(masks), torch.from_numpy(labels), 4, purity, count)
        votes = plainly_spread(masks, labels, 4, purity, count)
        assert np.array_equal(found.votes.numpy(), votes)
        for i, row in enumerate(votes):
            winners = np.flatnonzero(row == row.max()) if row.max() else []
            assert found.labels[i] == (labels[i] if labels[i] != 255 else winners[0] if len(winners) == 1 else 255)


def test_nothing_to_spread_is_nothing():
    labels = torch.tensor([1, 255, 255])
    for masks in (torch.empty(0, 3, dtype=torch.int64), torch.full((2, 3), -1)):
        assert core.spread_masks(masks, labels, 2).labels.tolist() == [1, 255, 255]
    empty = core.spread_masks(torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 2)
    assert empty.votes.shape == (0, 2)
    with pytest.raises(ValueError, match="label 7: give classes 0 to 1, or 255"):
        core.spread_masks(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([7]), 2)
    with pytest.raises(ValueError, match="one label per point"):
        core.spread_masks(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), 2)


def test_pseudo_labels_change_no_label():
    masks, labels = torch.tensor([[0, 0, 0, 1]]), torch.tensor([1, 255, 255, 255])
    pseudo = torch.tensor([0, 1, 1, 0])
    assert core.spread_pseudo_labels(masks, labels, pseudo, 2, 0.9, 3).tolist() == [255, 1, 1, 255]
    assert core.spread_pseudo_labels(masks, labels, pseudo, 2, 0.9, 1).tolist() == [255, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reliable_and_ambiguous_points_by_hand(dtype):
    sure, unsure = torch.tensor([8.0, 0, 0], dtype=dtype), torch.tensor([0.5, 0.2, 0.1], dtype=dtype)
    views = [torch.stack([sure, unsure + 0.1 * k * torch.eye(3, dtype=dtype)[k]]).requires_grad_() for k in (0, 1, 2)]
    mix = torch.stack([sure / 2, unsure]).requires_grad_()
    found = core.reliability_loss(*views, mix)
    assert found.reliability.selected.tolist() == [True, False]
    hard = -(views[1].log_softmax(1)[0, 0] + views[2].log_softmax(1)[0, 0] + mix.log_softmax(1)[0, 0])
    p = views[0].detach().softmax(1)[1]
    soft = sum((p * (p.log() - view.log_softmax(1)[1])).sum() for view in views[1:])
    torch.testing.assert_close(found.reliable, hard)
    torch.testing.assert_close(found.ambiguous, soft)
    found.total.backward()
    assert views[0].grad is None
    assert mix.grad[1].abs().sum() == 0
    plain = core.consistency_loss_of_views(*views)
    none = core.reliability_loss(*views, mix, tau=1.0)
    assert not none.reliability.selected.any()
    torch.testing.assert_close(none.total, plain)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_a_part_without_points_is_zero(tau):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = core.reliability_loss(logits, logits, logits, logits, tau, kappa=1.0)
    assert found.reliability.selected.all() == (tau == 0)
    assert found.ambiguous == 0, "equal views diverge nowhere"
    assert torch.isfinite(found.total)
    none = core.reliability_loss(*[torch.empty(0, 3)] * 4)
    assert none.total == 0


def test_views_are_deformed_smoothly_and_follow_from_place_and_seed():
    positions = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 4
    sizes = torch.tensor([120, 80])
    before = torch.get_rng_state()
    first = core.deformed_views(positions, sizes, "here", 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, core.deformed_views(positions, sizes, "here", 0), strict=True))
    assert not torch.equal(first.first, core.deformed_views(positions, sizes, "there", 0).first)
    still = core.deformed_views(positions, sizes, "here", 0, core.Deformation(rotation=0, scale=1, shift=0))
    for view in still:
        torch.testing.assert_close(view, positions, atol=1e-5, rtol=0)
    alone = core.deformed_views(positions[:1], torch.tensor([1]), "here", 0)
    assert torch.isfinite(alone.first).all()
    near = positions + 1e-3
    gap = core.deformed_views(torch.cat([positions, near]), torch.tensor([400]), "here", 0).first
    assert (gap[:200] - gap[200:]).norm(dim=1).max() < 0.05, "neighbours stay neighbours"
    low, high = torch.minimum(first.first, first.second), torch.maximum(first.first, first.second)
    assert ((first.mixture >= low - 1e-5) & (first.mixture <= high + 1e-5)).all()


def test_anchors_are_far_from_each_other():
    positions = torch.rand(90, 3, generator=torch.Generator().manual_seed(1))
    sample = core.per_point(torch.tensor([50, 40]), 90)
    found = core.farthest_points(positions, sample, 2, 4)
    for cloud, start in enumerate((0, 50)):
        points = positions[sample == cloud]
        chosen = [0]
        for _ in range(3):
            distance = torch.cdist(points, points[chosen]).amin(1)
            chosen.append(int(distance.argmax()))
        assert (found[cloud] - start).tolist() == chosen


def test_batch_norm_is_frozen_and_thaws():
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    norm[2].eval()
    x, before = torch.randn(8, 3), cloned_state(norm)
    with core.frozen_batch_norm(norm):
        frozen = norm(x)
    with pytest.raises(RuntimeError), core.frozen_batch_norm(norm):  # a batch of another width
        norm(torch.randn(8, 5))
    assert_state_dicts_equal(norm.state_dict(), before)
    torch.testing.assert_close(norm(x), frozen)
    assert norm[0].num_batches_tracked == 1
    assert [part.track_running_stats for part in norm] == [True, False, True]


def test_weighted_cross_entropy():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 255, 1])
    each = nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    found = weighted_cross_entropy(logits, labels, torch.tensor([1.0, 0.5, 7.0, 0.0]))
    torch.testing.assert_close(found, (each[0] + 0.5 * each[1]) / 1.5)
    none = weighted_cross_entropy(logits, torch.full((4,), 255))
    none.backward()
    assert none == 0
    assert (logits.grad == 0).all()


# ---- lifting ---------------------------------------------------------------------------------------------------------------------------


def test_what_a_camera_doesnt_see():
    depth = torch.full((1, 4, 6), 2.0)
    depth[0, 1, 1] = 0
    points = torch.tensor([[0.0, 0, 2], [0, 0, 2.2], [0, 0, -2], [99, 0, 2], [-2, -2, 2], [0, 0, 0]])
    intrinsic = torch.tensor([[1.0, 0, 2], [0, 1, 2], [0, 0, 1]])
    link = link_points(points, intrinsic, torch.eye(3)[None], torch.zeros(1, 3), depth, delta=0.1)
    assert link.tolist() == [[[2, 2, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]  # seen, behind it, ..., a hole, in it
    masks = torch.full((1, 4, 6), -1)
    masks[0, 2, 2], masks[0, 0, 0] = 5, 3
    assert masks_at_points(link, masks).tolist() == [[5, -1, -1, -1, -1, -1]]


def test_the_smallest_mask_covers():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, :, :2], masks[1, 0, 0], masks[2, 0, :2] = True, True, True
    assert smallest_masks(masks).tolist() == [[1, 2, -1], [0, 0, -1]]
    assert smallest_masks(masks[:0]).tolist() == [[-1] * 3] * 2


def test_superpoints_are_surfaces():
    rng = np.random.default_rng(0)
    floor, wall = rng.random((200, 3)) * [1, 1, 0], rng.random((200, 3)) * [1, 0, 1] + [0, 0, 0.01]
    normals = np.repeat([[0.0, 0, 1], [0, 1, 0]], 200, axis=0)
    found = superpoints(np.concatenate([floor, wall]), normals)
    assert set(found[:200]) & set(found[200:]) == set()
    assert np.bincount(found).max() >= 190
    assert superpoints(np.empty((0, 3)), np.empty((0, 3))).shape == (0,)


def test_rooms_have_labelled_points_of_many_things_and_wrong_pixels_cost_precision():
    precision = []
    for noise in (0.0, 0.3):
        rooms = RoomsDataModule(num_train=2, num_val=1, num_points=800, mask_noise=noise)
        rooms.setup("fit")
        right = new = 0
        for index in range(2):
            given = unpacked_labels(rooms.label_store.original(index)).labels.astype(np.int64)
            assert (given != 255).sum() == 10
            assert len({rooms._owners[index][i] for i in rooms.labelled(index)}) >= 9
            found = core.spread_masks(torch.from_numpy(rooms.point_masks(index)), torch.from_numpy(given), 5).labels.numpy()
            spread = (found != 255) & (given == 255)
            right, new = right + (found == rooms.clean_labels(index))[spread].sum(), new + spread.sum()
        precision.append(right / new)
    assert precision[0] > 0.95
    assert precision[1] < precision[0] - 0.05


# ---- runs ------------------------------------------------------------------------------------------------------------------------------

VIEWS = {"scale": 1.2, "shift": 0.05, "tau": 0.3, "kappa": 0.2}


def rooms(folder=None, **arguments):
    return RoomsDataModule(**({"num_train": 4, "num_val": 2, "num_points": 200, "labels_folder": folder} | arguments))


def segmentor(**arguments):
    torch.manual_seed(0)
    return WeakPointSegmentor(PointNetOfCells(5, width=8), 5, **({"optimizer": "adamw", "learning_rate": 0.02} | arguments))


def callbacks():
    return [MaskLabelSpreading(5, **VIEWS), ReliabilityConsistency(**VIEWS)]


def labels_of(store):
    return [store.current(index) for index in range(len(store))]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    made = []

    def build():
        made.append(rooms(tmp_path / f"labels{len(made)}"))
        return segmentor(), made[-1], [*callbacks(), ExactResume()]

    whole, resumed = kill_and_resume(build, 8, 5, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    one, _, other = (labels_of(data.label_store) for data in made)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert any((labels[1] == 50).any() for labels in one), "pseudo-labels were spread"


def parameters(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def two_ranks(folder):
    """Parameters and labels after a run whose labels are spread once, and after one where pseudo-labels are spread, too."""
    found = []
    for epochs, respread in ((1, False), (2, True)):
        pl.seed_everything(0, verbose=False)
        module, data = segmentor(), rooms(f"{folder}{epochs}", batch_size=1)
        both = [MaskLabelSpreading(5, respread=respread, **VIEWS), ReliabilityConsistency(**VIEWS)]
        trainer = tiny_trainer(callbacks=both, max_epochs=epochs, limit_val_batches=0, devices=2, strategy="ddp")
        trainer.fit(module, data)
        found.append((parameters(module), labels_of(data.label_store)))
    return found


def test_two_processes_agree_and_equal_one_that_accumulates(tmp_path):
    ours, theirs = run_two_processes(two_ranks, str(tmp_path / "two"))
    for (state, labels), (other, others) in zip(ours, theirs, strict=True):
        assert_state_dicts_equal(other, state)
        assert all(np.array_equal(a, b) for a, b in zip(labels, others, strict=True))
    assert any((labels[1] == 50).any() for labels in ours[1][1]), "pseudo-labels were spread"
    pl.seed_everything(0, verbose=False)
    module, data = segmentor(), rooms(tmp_path / "one", batch_size=1)
    both = [MaskLabelSpreading(5, respread=False, **VIEWS), ReliabilityConsistency(**VIEWS)]
    tiny_trainer(callbacks=both, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2).fit(module, data)
    assert_state_dicts_equal(parameters(module), ours[0][0], atol=1e-5, rtol=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(labels_of(data.label_store), ours[0][1], strict=True))


def test_labels_are_given_back_in_a_second_fit_and_nothing_is_left(tmp_path):
    both, data = callbacks(), rooms(tmp_path)
    found = []
    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        module = segmentor()
        tiny_trainer(callbacks=both, max_epochs=2, limit_val_batches=0).fit(module, data)
        found.append((cloned_state(module), labels_of(data.label_store)))
    assert_state_dicts_equal(found[0][0], found[1][0])
    assert all(np.array_equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    data.setup("fit")
    assert not left_behind(segmentor, ReliabilityConsistency(**VIEWS), data.train_dataloader())


@pytest.mark.parametrize("options", [{"mode": "plain"}, {"checkpoint": True}, {}], ids=str)
def test_the_term_alone_in_bf16_leaves_running_means_to_the_step(options, tmp_path):
    states = []
    for term in ([], [ReliabilityConsistency(weight=0.0, **VIEWS, **options)]):
        module = segmentor()
        trainer = tiny_trainer(callbacks=term, max_epochs=1, limit_val_batches=0, precision="bf16-mixed")
        trainer.fit(module, rooms(tmp_path))
        states.append(cloned_state(module))
    assert_state_dicts_equal(states[1], states[0])
    assert 0 < trainer.callback_metrics["reliability/loss"] < 100


def test_checkpointing_changes_no_gradient(tmp_path):
    found = []
    for checkpoint in (False, True):
        module = segmentor()
        term = ReliabilityConsistency(checkpoint=checkpoint, **VIEWS)
        tiny_trainer(callbacks=[term], max_epochs=1, limit_val_batches=0).fit(module, rooms(tmp_path))
        found.append(cloned_state(module))
    assert_state_dicts_equal(found[1], found[0])


class Dense(pl.LightningModule):
    """Somebody else's: clouds of one size, (B, N, 6), convolutions with logits (B, C, N) or linear layers with (B, N, C)."""

    def __init__(self, channels_first):
        super().__init__()
        self.channels_first = channels_first
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.head = nn.Identity() if not channels_first else _Turned()
        self.model = nn.Sequential(self.net, self.head)

    def training_step(self, batch, batch_idx):
        points, labels = batch
        logits = self.model(points)
        logits = logits if self.channels_first else logits.mT
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Turned(nn.Module):
    def forward(self, x):
        return x.mT


@pytest.mark.parametrize("channels_first", [False, True])
def test_dense_clouds_of_a_module_that_isnt_ours(channels_first, tmp_path):
    torch.manual_seed(0)
    data = [(torch.randn(20, 6), torch.randint(3, (20,))) for _ in range(4)]
    module = Dense(channels_first)
    store = LabelStore.create(tmp_path, [np.stack([np.where(np.arange(20) < 6, labels, 255), np.full(20, 100)]) for _, labels in data])
    scenes = [{"points": data[k][0], "points_per_sample": torch.tensor([20]), "index": torch.tensor([k])} for k in range(4)]
    masks = np.arange(20)[None] % 4
    options = {"store": store, "loader": scenes, "masks": lambda index: masks, "min_purity": 0.5, "spread_start": 0.0, "spread_purity": 0.0}
    spreading = MaskLabelSpreading(3, "model", dense=True, spread_count=1, **options, **VIEWS | {"tau": 0.0})
    trainer = tiny_trainer(callbacks=[ReliabilityConsistency("model", **VIEWS), spreading], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, DataLoader(data, 2))
    assert trainer.callback_metrics["reliability/loss"] > 0
    assert trainer.callback_metrics["mask_spreading/reliable"] > 0
    assert store.generation >= 2


def test_what_is_refused(tmp_path):
    def fit(callback, module=None, data=None):
        tiny_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(module or segmentor(), data or rooms(tmp_path / "labels"))

    with pytest.raises(ValueError, match=r"ReliabilityConsistency: no submodule|matches no"):
        fit(ReliabilityConsistency("nowhere"))
    with pytest.raises(ValueError, match="expected a row of logits for each point"):
        fit(ReliabilityConsistency("net.0"), _Pools(), DataLoader([torch.randn(20, 6)] * 2, 2))
    with pytest.raises(ValueError, match="8 integers for as many points: expected the size of each cloud"):
        clouds_of(nn.Identity(), (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)), {})
    with pytest.raises(ValueError, match=r"first argument is \(8, 2\).*expected points"):
        clouds_of(nn.Identity(), (torch.randn(8, 2),), {})
    with pytest.raises(ValueError, match=r"MaskLabelSpreading.*no label store"):
        fit(MaskLabelSpreading(5), data=DataLoader([0]))
    store = LabelStore.create(tmp_path / "store", [np.zeros((2, 9), dtype=np.uint8)])
    with pytest.raises(ValueError, match=r"there are none: give masks="):
        fit(MaskLabelSpreading(5, store=store, loader=[]), data=DataLoader([0]))
    with pytest.raises(ValueError, match=r"masks of scene 0 are \(1, 4\), and it has 9 points"):
        fit(MaskLabelSpreading(5, store=store, loader=[], masks=lambda index: np.zeros((1, 4))), data=DataLoader([0]))
    with pytest.raises(ValueError, match="network"):
        fit(MaskLabelSpreading(5, network="nowhere"))
    for wrong, cls in itertools.product(({"kappa": 0}, {"tau": 2}, {"scale": 0.5}, {"anchors": 0}, {"seed": -1}), (0, 1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            (ReliabilityConsistency, MaskLabelSpreading)[cls](**({"num_classes": 5} if cls else {}), **wrong)
    with pytest.raises(ValueError, match="class_names has 2 names"):
        MaskLabelSpreading(5, class_names=["a", "b"])


class _Pools(Dense):
    def __init__(self):
        super().__init__(False)
        self.net = nn.Sequential(_Mean(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)
