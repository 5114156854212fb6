"""Semi-supervised video detection: its masks by NumPy, networks, figures, the module's wiring and the callback on other modules."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import (
    CompactVideoDetector,
    MixMatchVideoDetector,
    PseudoLabelVideoDetector,
    SemiSupervisedVideoDetector,
    VideoCapsuleNet,
)
from lit_methods.callbacks import ClipConsistency, ExactResume
from lit_methods.datamodules import MovingShapesDataModule
from lit_methods.video.video_action_detection.capsules import I3DTrunk, capsule_mask, em_routing
from lit_methods.video.video_action_detection.core import (
    confident_pixels,
    exp_rampup,
    gradient_mask,
    mask_consistency,
    mask_loss,
    sharpened,
    spread_loss,
    variance_masks,
)
from lit_methods.video.video_action_detection.metrics import (
    Tube,
    average_precision,
    box_iou,
    frame_map,
    frame_overlaps,
    tube_iou,
    video_map,
    video_scores,
)
from lit_methods.video.video_action_detection.pictures import outline

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def by_numpy(output, other, n_frames):
    """The attention of temporal coherency, clip by clip and place by place."""
    found = []
    for first, second in zip(output[:, 0], other[:, 0], strict=True):
        frames = len(first)
        cycle = np.concatenate([first, second[::-1][1:-1]])
        length, half = len(cycle), n_frames // 2
        variance = np.stack([np.var([cycle[(t + o) % length] for o in range(-half, half + 1)], axis=0) for t in range(length)])
        folded = np.stack([variance[t] + variance[(length - t) % length if 0 < t < frames - 1 else t] for t in range(frames)])
        folded = folded - folded.min()
        found.append(folded / (folded.max() + 1e-7))
    return np.stack(found)[:, None]


@pytest.mark.parametrize(("frames", "n_frames"), [(8, 5), (8, 3), (4, 3), (2, 1), (5, 7), (2, 5), (3, 5)])
def test_the_variance_is_numpys_for_any_length(frames, n_frames):
    generator = torch.Generator().manual_seed(0)
    output, other = torch.randn(2, 3, 1, frames, 3, 2, generator=generator, dtype=torch.float64)
    forward, backward = variance_masks(output, other, n_frames)
    np.testing.assert_allclose(forward, by_numpy(output.numpy(), other.numpy(), n_frames), rtol=1e-9, atol=1e-9)
    reversed_ = by_numpy(output.flip(2).numpy(), other.flip(2).numpy(), n_frames)
    np.testing.assert_allclose(backward, reversed_[:, :, ::-1], rtol=1e-9, atol=1e-9)


def test_large_logits_keep_their_variance_in_float32():
    x = torch.randn(1, 1, 8, 4, 4, dtype=torch.float64)
    exact = variance_masks(x + 1000, x + 1000)[0]
    torch.testing.assert_close(variance_masks((x + 1000).float(), (x + 1000).float())[0].double(), exact, rtol=0, atol=0.02)


def test_what_stands_still_gets_no_coherency_and_middle_smoothness():
    x = torch.randn(1, 1, 1, 4, 4).expand(1, 1, 8, 4, 4).clone()
    assert variance_masks(x, x)[0].abs().max() < 1e-6
    x[0, 0, :, 0, 0] = torch.tensor([0.0, 0, 0, 4, 0, 0, 0, 0])
    mask = gradient_mask(x)[0]
    still = mask[:, 1:, 1:]
    assert 0.2 < still.min() <= still.max() < 0.9, "zero curvature is in the middle"
    assert mask.min() == 0
    assert mask.max() == pytest.approx(1)
    assert gradient_mask(torch.zeros(2, 1, 8, 3, 3)).abs().max() == 0


def test_masks_carry_no_gradient_and_views_that_agree_cost_nothing():
    output = torch.randn(2, 1, 8, 4, 6, requires_grad=True)
    for mode in ("l2", "bv", "gv", "bv+gv"):
        assert mask_consistency(output, output.flip(4), mode).loss == 0
        found = mask_consistency(output, torch.randn(2, 1, 8, 4, 6), mode, ramp=0.5)
        assert found.loss > 0
        assert found.attention is None or not found.attention.requires_grad
    with pytest.raises(ValueError, match="same shape"):
        mask_consistency(output, output[:1])
    with pytest.raises(ValueError, match="give one of l2, bv, gv"):
        mask_consistency(output, output, "var")
    with pytest.raises(ValueError, match="odd number from 1 to 29"):
        mask_consistency(output, output, "bv", n_frames=4)


def test_the_slip_is_the_mean_of_all_pairs():
    output, other = torch.randn(2, 3, 1, 8, 4, 4, dtype=torch.float64)
    squares, mask = (output - other.flip(4)).square(), gradient_mask(output)
    theirs = (squares * mask).mean()  # (3, 1, ...) times (3, ...)
    assert mask_consistency(output, other, "gv", gv_cross_batch=True).loss == pytest.approx(float(theirs))
    one = mask_consistency(output[:1], other[:1], "gv"), mask_consistency(output[:1], other[:1], "gv", gv_cross_batch=True)
    assert one[0].loss == one[1].loss


def test_ramp_and_small_pieces():
    assert [exp_rampup(e, 10) for e in (10, 11)] == [1.0, 1.0]
    assert exp_rampup(-3, 10) == pytest.approx(math.exp(-5))
    assert exp_rampup(1, 0) == 1
    right = torch.tensor([[0.0, 1.0]])
    assert spread_loss(right, torch.tensor([1])) == pytest.approx(0, abs=1e-7)
    assert spread_loss(right, torch.tensor([0])) == pytest.approx(1.2**2)
    empty = mask_loss(torch.full((1, 1, 2, 2, 2), -50.0), torch.zeros(1, 1, 2, 2, 2))
    assert empty.dice == pytest.approx(0)
    assert empty.bce == pytest.approx(0)
    labels, sure = confident_pixels(torch.tensor([-5.0, -0.1, 0.0, 5.0]).view(1, 1, 4, 1, 1), 0.9)
    assert labels.flatten().tolist() == [0, 0, 1, 1]
    assert sure.flatten().tolist() == [1, 0, 0, 1]
    p = torch.tensor([0.0, 0.2, 0.5, 1.0])
    torch.testing.assert_close(sharpened(p, 0.5), p**2 / (p**2 + (1 - p) ** 2), rtol=0, atol=1e-5)


# ---- networks --------------------------------------------------------------------------------------------------------------------------


def test_capsules_whose_votes_agree_are_active():
    generator = torch.Generator().manual_seed(0)
    votes = torch.randn(2, 12, 3, 4, generator=generator)
    votes[:, :, 1] = 0.05 * votes[:, :, 1] + torch.tensor([1.0, -1.0, 0.5, 0.0])
    activation = torch.full((2, 12), 0.9)
    pose, active = em_routing(votes, activation, torch.zeros(3, 4), torch.zeros(3))
    assert (active.argmax(dim=1) == 1).all()
    torch.testing.assert_close(pose[:, 1], torch.tensor([1.0, -1.0, 0.5, 0.0]).expand(2, 4), rtol=0, atol=0.05)
    activation[:, :6] = 0
    votes[:, :6, 1] = 100.0
    silent, _ = em_routing(votes, activation, torch.zeros(3, 4), torch.zeros(3))
    torch.testing.assert_close(silent[:, 1], torch.tensor([1.0, -1.0, 0.5, 0.0]).expand(2, 4), rtol=0, atol=0.05)


def test_poses_are_masked_by_label_by_guess_or_not():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.6]])
    labels = torch.tensor([0, -1, -1])
    assert capsule_mask(scores, labels, pseudo=False).tolist() == [[1, 0], [1, 1], [1, 1]]
    assert capsule_mask(scores, labels, pseudo=True).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert capsule_mask(scores).tolist() == [[0, 1], [1, 0], [0, 1]]


def small_capsules(**kwargs):
    return VideoCapsuleNet(3, capsule_types=2, pose=2, kernel=3, decoder=2, width=0.03, dropout=0.0, **kwargs)


def test_the_capsule_network_decodes_the_class_that_it_is_shown():
    torch.manual_seed(0)
    network = small_capsules().eval()
    clip = torch.rand(2, 3, 8, 24, 32)
    with torch.no_grad():
        nn.init.normal_(network.up_eighth.weight)
        found = network(clip)
        known = network(clip, found.scores.argmax(dim=1))
        torch.testing.assert_close(known.logits, found.logits)
        other = network(clip, (found.scores.argmax(dim=1) + 1) % 3)
    assert found.logits.shape == (2, 1, 8, 24, 32)
    assert found.scores.shape == (2, 3)
    assert 0 <= found.scores.min() <= found.scores.max() <= 1
    assert not torch.allclose(other.logits, found.logits)
    for wrong in (torch.rand(1, 3, 4, 24, 32), torch.rand(1, 3, 8, 20, 32), torch.rand(1, 3, 8, 16, 32)):
        with pytest.raises(ValueError, match="VideoCapsuleNet needs"):
            network(wrong)


def test_i3d_has_the_papers_sizes_and_takes_its_weights(tmp_path):
    with torch.device("meta"):
        trunk = I3DTrunk()
        half, quarter, eighth = trunk(torch.empty(1, 3, 8, 224, 224))
    assert half.shape == (1, 64, 4, 112, 112)
    assert quarter.shape == (1, 192, 2, 56, 56)
    assert eighth.shape == (1, 832, 1, 28, 28)
    torch.manual_seed(1)
    given = small_capsules()
    state = {name.removeprefix("trunk."): value for name, value in given.state_dict().items() if name.startswith("trunk.")}
    torch.save({**state, "logits.conv3d.weight": torch.zeros(2)}, tmp_path / "i3d.pt")
    torch.manual_seed(2)
    assert_state_dicts_equal(small_capsules(weights=tmp_path / "i3d.pt").trunk.state_dict(), given.trunk.state_dict())
    torch.save({"Conv3d_1a_7x7.conv3d.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="tensors of I3D up to Mixed_4f"):
        small_capsules(weights=tmp_path / "other.pt")


# ---- figures ---------------------------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    mask = torch.zeros(3, 1, 2, 2, 2)
    mask[0, 0, 0, 0] = mask[1, 0, :, 0] = 1  # the second frame of the first clip is empty; video 7 has two clips
    logits = torch.full_like(mask, -1.0)
    logits[0, 0, 0, 0] = logits[1, 0, 0, 0, 0] = logits[1, 0, 1] = 1.0
    logits[2] = 1.0
    overlaps = frame_overlaps(logits, mask)
    assert overlaps[0].tolist() == [[2, 0], [1, 2], [0, 0]]
    assert overlaps[1].tolist() == [[2, 0], [2, 4], [4, 4]]
    video, label = torch.tensor([7, 7, 2]), torch.tensor([1, 1, 0])
    scores = torch.tensor([[0.1, 0.9], [0.4, 0.3], [0.9, 0.1]])
    found = video_scores(video, label, scores, *overlaps)
    assert found.accuracy == 1
    assert found.iou == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found.f_map == {0.2: 1.0, 0.5: 1.0}
    assert found.v_map[0.5] == 1, "5 of 8 pixels"
    wrong = video_scores(video, label, scores.flip(1), *overlaps)
    assert wrong.f_map[0.5] == 0
    assert wrong.f_localisation[0.5] == 1
    nothing = video_scores(video[2:], label[2:], scores[2:], *(part[2:] for part in overlaps))
    assert math.isnan(nothing.f_map[0.5])
    with pytest.raises(ValueError, match="different labels"):
        video_scores(video, torch.tensor([1, 0, 0]), scores, *overlaps)


def test_average_precision_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([True, False, True, False]), 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision(scores, np.array([False, True, True, True]), 3) == pytest.approx(0.75), "the best at a higher recall counts"
    assert math.isnan(average_precision(scores, np.zeros(4, dtype=bool), 0))
    assert average_precision(np.zeros(0), np.zeros(0, dtype=bool), 3) == 0
    assert box_iou(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [5, 5, 5, 9]])).tolist() == pytest.approx([1 / 3, 0])


def tube(video, label, start, boxes, score=1.0):
    return Tube(video, label, start + np.arange(len(boxes)), np.array(boxes, dtype=np.float64), score)


def test_a_second_box_on_the_same_truth_is_wrong():
    truth = [tube("a", 0, 0, [[0, 0, 4, 4]] * 4), tube("b", 1, 2, [[0, 0, 2, 2]] * 2)]
    assert frame_map(truth, truth) == video_map(truth, truth) == 1
    twice = [*truth, tube("a", 0, 0, [[0, 0, 4, 4]] * 4, score=2.0)]
    assert frame_map(twice, truth) == 1, "what comes behind the last hit costs nothing"
    worse = [*truth, tube("a", 0, 0, [[9, 9, 12, 12]] * 4, score=2.0)]
    assert frame_map(worse, truth) == pytest.approx((0.5 + 1) / 2)
    assert video_map(worse, truth) == pytest.approx((0.5 + 1) / 2)
    late = tube("a", 0, 2, [[0, 0, 4, 4]] * 4)
    assert tube_iou(late, truth[0]) == pytest.approx(2 / 6)
    assert video_map([late, truth[1]], truth, 0.5) == pytest.approx(0.5)
    assert video_map([late, truth[1]], truth, 0.2) == 1
    assert frame_map([], truth) == 0
    with pytest.raises(ValueError, match="don't rise"):
        Tube("a", 0, np.array([1, 1]), np.zeros((2, 4)))


def test_an_outline_is_the_border():
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 1:4, 1:4] = True
    assert outline(mask)[0].sum() == 8
    assert not outline(mask)[0, 2, 2]


# ---- the module ------------------------------------------------------------------------------------------------------------------------


def shapes(**kwargs):
    sizes = {"image_size": 16, "num_labelled": 8, "num_unlabelled": 8, "num_val": 4, "batch_size": 2, "eval_batch_size": 2}
    return MovingShapesDataModule(**(sizes | kwargs))


def detector(kind=SemiSupervisedVideoDetector, seed=0, classes=4, **kwargs):
    torch.manual_seed(seed)
    options = {"learning_rate": 1e-2} | kwargs
    return kind(CompactVideoDetector(classes, channels=2, levels=1), classes, **options)


KINDS = [
    *((SemiSupervisedVideoDetector, {"consistency": mode}) for mode in ("none", "l2", "bv", "gv", "bv+gv")),
    (SemiSupervisedVideoDetector, {"feature_weight": 0.1}),
    (PseudoLabelVideoDetector, {"threshold": 0.6}),
    (MixMatchVideoDetector, {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_trains_and_judges(kind, options):
    module = detector(kind, **options)
    before = copy.deepcopy(module.state_dict())
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=2)
    trainer.fit(module, datamodule=shapes())
    found = trainer.callback_metrics
    assert {"video_detector/loss", "video_detector/val_iou", "video_detector/val_f_map_50", "video_detector/epoch_loss"} <= set(found)
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert {"network.mask_head.weight", "network.class_head.weight"} <= set(changed)
    if options.get("consistency") != "none":
        plain = detector(SemiSupervisedVideoDetector, consistency="none")
        tiny_trainer(max_epochs=1, limit_val_batches=0).fit(plain, datamodule=shapes())
        assert not torch.equal(plain.network.mask_head.weight, module.network.mask_head.weight), "the term matters"


def test_unlabelled_clips_count_only_by_consistency():
    """Other unlabelled clips change nothing for the labelled clips alone, and something for bv."""
    for consistency, same in (("none", True), ("bv", False)):
        ends = []
        for change in (False, True):
            module, data = detector(consistency=consistency), shapes()
            data.setup("fit")
            batches = [batch for batch, *_ in data.train_dataloader()]
            if change:
                for batch in batches:
                    batch["unlabelled"]["clip"] = 1 - batch["unlabelled"]["clip"]
            tiny_trainer(max_epochs=1, limit_val_batches=0).fit(module, DataLoader(batches, batch_size=None))
            ends.append(module.network.mask_head.weight.detach())
        assert torch.equal(*ends) == same


def test_capsules_see_labels_in_training_and_all_classes_first():
    seen = []

    class Watched(VideoCapsuleNet):
        def forward(self, clip, labels=None, pseudo=True):
            seen.append((None if labels is None else labels.tolist(), pseudo))
            return super().forward(clip, labels, pseudo)

    torch.manual_seed(0)
    network = Watched(4, capsule_types=2, pose=2, kernel=2, decoder=2, width=0.02)
    module = SemiSupervisedVideoDetector(network, 4, "l2", pseudo_epoch=2)
    data = shapes(num_labelled=2, num_unlabelled=2, num_val=2)
    tiny_trainer(max_epochs=2, limit_val_batches=1, num_sanity_val_steps=0).fit(module, datamodule=data)
    trained = [entry for entry in seen if entry[0] is not None]
    assert [pseudo for _, pseudo in trained] == [False, True]
    assert all(labels[2:4] == labels[6:] == [-1, -1] and labels[:2] == labels[4:6] for labels, _ in trained)
    assert (None, True) in seen, "evaluation knows no label"


def test_the_ramp_counts_epochs_also_where_the_training_is_given_in_steps():
    for options, wanted in (({"max_epochs": 6}, 6), ({"max_epochs": -1, "max_steps": 7}, 2)):
        module = detector()
        tiny_trainer(**options, limit_val_batches=0, limit_train_batches=4).fit(module, datamodule=shapes())
        assert module._ramp_epochs == wanted
    assert module.ramp == pytest.approx(1.0)
    module = detector(ramp_epochs=3)
    tiny_trainer(max_epochs=1, limit_val_batches=0).fit(module, datamodule=shapes())
    assert module._ramp_epochs == 3


def test_the_learning_rate_falls_where_the_loss_does_not():
    module = detector(learning_rate=1e-7 * 10, plateau_patience=0)
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=shapes())
    scheduler = trainer.lr_scheduler_configs[0]
    assert (scheduler.monitor, scheduler.interval) == ("video_detector/epoch_loss", "epoch")
    assert scheduler.scheduler.min_lrs == [1e-7]
    module = detector(plateau_patience=None)
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=shapes())
    assert not trainer.lr_scheduler_configs


def test_bfloat16_has_losses_in_float32():
    module = detector(consistency="bv+gv")
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=1, precision="bf16-mixed")
    trainer.fit(module, datamodule=shapes())
    assert trainer.callback_metrics["video_detector/consistency"].dtype == torch.float32


def test_all_videos_labelled_and_prediction():
    module = detector(consistency="none")
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=1)
    data = shapes(num_unlabelled=0)
    trainer.fit(module, datamodule=data)
    found = trainer.predict(module, datamodule=data)[0]
    assert found["probability"].shape == (2, 1, 8, 16, 16)
    assert found["video"].shape == (2, 8, 3, 16, 16)
    assert -1 <= found["video"].min() <= found["video"].max() <= 1
    consistent = detector()  # of labelled clips alone
    tiny_trainer(max_epochs=1, limit_val_batches=0).fit(consistent, datamodule=shapes(num_unlabelled=0))
    with pytest.raises(ValueError, match="learns from unlabelled clips"):
        tiny_trainer(max_epochs=1, limit_val_batches=0).fit(detector(MixMatchVideoDetector), datamodule=shapes(num_unlabelled=0))


@pytest.mark.parametrize("kind", [SemiSupervisedVideoDetector, MixMatchVideoDetector])
def test_a_killed_run_ends_like_a_whole_one(kind, tmp_path):
    whole, resumed = kill_and_resume(lambda: (detector(kind), shapes(), [ExactResume()]), steps=8, kill_at=5, tmp_path=tmp_path)
    assert_state_dicts_equal(resumed, whole)


def judged(devices):
    module = detector()
    strategy = "ddp" if devices == 2 else "auto"
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=0, devices=devices, strategy=strategy)
    trainer.fit(module, datamodule=shapes(batch_size=1, num_unlabelled=4))
    same = {name: value.clone() for name, value in module.state_dict().items()}
    other = detector(seed=3)
    trainer = tiny_trainer(devices=devices, strategy=strategy)
    return same, trainer.test(other, datamodule=shapes(num_val=5), verbose=False)[0]


def test_two_processes_have_the_same_weights_and_the_figures_of_one():
    (first, figures), (second, others) = run_two_processes(judged, 2)
    assert_state_dicts_equal(first, second)
    alone = judged(1)[1]
    assert figures == others == pytest.approx(alone, rel=1e-5)


def test_bad_arguments_and_batches():
    for options, said in (
        ({"n_frames": 4}, "odd number"),
        ({"consistency": "var"}, "give one of none, l2"),
        ({"lower": 1.5}, "lower is 1.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            detector(**options)
    module = detector()
    with pytest.raises(ValueError, match=r"no mask and label, it has \['clip'\]"):
        module.training_step({"labelled": {"clip": torch.rand(1, 3, 8, 16, 16)}}, 0)
    with pytest.raises(ValueError, match="no labelled"):
        module.training_step({"clip": torch.rand(1, 3, 8, 16, 16)}, 0)
    with pytest.raises(ValueError, match="divisible by 2"):
        module.detect(torch.rand(1, 3, 8, 15, 16))
    wrong = SemiSupervisedVideoDetector(nn.Conv3d(3, 1, 1), 4)
    with pytest.raises(ValueError, match="expected a tuple of logits"):
        wrong.detect(torch.rand(1, 3, 8, 16, 16))


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class Segmenter(pl.LightningModule):
    """Masks of clips, by a network that isn't ours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.masks = nn.Conv3d(3, 1, 3, padding=1), _Named()

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self.network(batch["clip"]), batch["mask"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv3d(3, 1, 3, padding=1)

    def forward(self, clip, *, scale=1.0):
        return {"out": self.body(clip).squeeze(1) * scale, "aux": clip.mean()}


class NamedSegmenter(Segmenter):
    """Masks (B, T, H, W) in a dictionary, from a call with a keyword."""

    def training_step(self, batch, batch_idx):
        out = self.masks(batch["clip"], scale=2.0)["out"]
        return nn.functional.binary_cross_entropy_with_logits(out, batch["mask"][:, 0])


def clip_loader(n=8):
    generator = torch.Generator().manual_seed(1)
    clips = torch.rand(n, 3, 8, 6, 6, generator=generator)
    return DataLoader([{"clip": clip, "mask": (clip[:1] > 0.5).float()} for clip in clips], batch_size=4)


@pytest.mark.parametrize("mode", ["l2", "bv", "gv", "bv+gv"])
def test_the_callback_adds_what_the_core_says(mode):
    module, batch = NamedSegmenter(), next(iter(clip_loader()))
    expected = copy.deepcopy(module)
    callback = ClipConsistency("masks", output="out", consistency=mode, ramp_epochs=4, weight=0.5)
    trainer = tiny_trainer(max_epochs=1, limit_train_batches=1, callbacks=[callback])
    trainer.fit(module, clip_loader())
    first, second = (expected.masks(view, scale=2.0)["out"].unsqueeze(1) for view in (batch["clip"], batch["clip"].flip(4)))
    loss = nn.functional.binary_cross_entropy_with_logits(first, batch["mask"])
    found = mask_consistency(first, second, mode, ramp=exp_rampup(1, 4))
    (loss + 0.5 * found.loss).backward()
    with torch.no_grad():
        for parameter in expected.masks.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(module.masks.body.weight, expected.masks.body.weight)
    assert trainer.callback_metrics["clip_consistency/loss"] == pytest.approx(float(found.loss), rel=1e-5)


def test_the_callback_leaves_nothing_and_refuses_what_it_can_not_use():
    assert not left_behind(Segmenter, lambda: ClipConsistency("network"), clip_loader())
    for target, output, said in (
        ("masks", "masks", "has no 'masks'"),
        ("masks", "aux", "expected logits"),
        ("nothing", None, "nothing"),
    ):
        with pytest.raises(ValueError, match=said):
            tiny_trainer(max_epochs=1, callbacks=[ClipConsistency(target, output=output)]).fit(NamedSegmenter(), clip_loader())
    with pytest.raises(ValueError, match="odd"):
        ClipConsistency(n_frames=2)
    endless = tiny_trainer(max_epochs=-1, max_steps=-1, callbacks=[ClipConsistency("network")])
    with pytest.raises(ValueError, match="needs an end"):
        endless.fit(Segmenter(), clip_loader())
