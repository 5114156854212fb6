"""CoTAP: the fast loss against plain pairs, crops that meet, queues, two processes, resumes, refusals."""

import io

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import CoTAP, ObjectAwareViT, SimilarityRegression
from lit_methods.callbacks import ContinuousAPLoss, ExactResume
from lit_methods.datamodules import NeighbourCropsDataModule, SimilaritiesDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.vision import fake
from lit_methods.datamodules.vision.crops import Crops, blur, cut, draw_boxes, overlaps, recolour, turn_hues
from lit_methods.datamodules.vision.neighbour_crops import mapped, read_class_map, read_neighbours
from lit_methods.self_supervised.cotap.core import (
    aligned_cross_entropy,
    continuous_ap_loss,
    crop_cross_entropy,
    enqueue,
    foreground,
    matches,
    other_images,
    pooled_rows,
    similarity_list,
    sinkhorn,
    spherical_kmeans,
    strongest_patches,
)
from lit_methods.self_supervised.cotap.networks import FeatureQueue
from lit_methods.self_supervised.probe import linear_segmentation, rank_correlation

SMALL = {"patch_prototypes": 6, "cls_prototypes": 5, "head_hidden": 8, "head_width": 4, "patch_queue": 40, "cls_queue": 12}
SMALL |= {"patches_per_step": 16, "bank": 20, "bank_per_step": 4, "pool_sizes": (2, 4), "top_patches": 2, "others": 2}
SMALL |= {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "momentum": (0.9, 0.95)}


def encoder(**kwargs):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 2, "heads": 2, "prototypes": 3}
    return ObjectAwareViT("vit_tiny_patch16_224", pretrained=False, **sizes | kwargs)


def module(**kwargs):
    return CoTAP(encoder(), **SMALL | kwargs)


def data(batch_size=4, **kwargs):
    sizes = {"image_size": 16, "local_size": 8, "local_crops": 1, "num_train": 48, "num_probe": 20, "num_val": 20, "eval_batch_size": 20}
    return NeighbourCropsDataModule(batch_size=batch_size, **sizes | kwargs)


def fit(model, source=None, **kwargs):
    trainer = tiny_trainer(**{"max_steps": 4, "limit_val_batches": 0, "max_epochs": -1} | kwargs)
    trainer.fit(model, source or data())
    return trainer


# ---- the loss ------------------------------------------------------------------------------------------------------------------------


def plain_pairs(t, s, match, tau, threshold, unmatched):
    """Pair by pair, as the definition reads."""
    pn, pp = torch.zeros(len(t), dtype=torch.double), torch.zeros(len(t))
    for i in range(len(t)):
        for j in range(len(t)):
            x = float(s[i] - s[j])
            cost = (1 - min(x, tau) / tau) ** 2 if x >= 0 else 1 - 2 * x / tau
            pn[i] += max(float(t[i] - t[j]), 0.0) * cost
            pp[i] += float(s[j] >= s[i] and t[j] >= t[i])
    weight = (t - threshold).clamp(min=0) * torch.tensor([1.0 if one else unmatched for one in match], dtype=torch.double)
    ratio = pn / (1e-5 + pp)
    return (weight * ratio / (1 + ratio)).sum() / (1e-5 + weight.sum()), pn, pp, weight


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16, 33])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_sorted_halves_is_that_of_all_pairs(count, tied):
    generator = torch.Generator().manual_seed(count)
    t, s = (torch.randn(count, generator=generator).double() for _ in range(2))
    if tied:
        t, s = t.round(), (2 * s).round() / 2
    match = torch.rand(count, generator=generator) > 0.5
    found = continuous_ap_loss(t, s, match, tau=0.7)
    for ours, wanted in zip(found, plain_pairs(t, s, match.tolist(), 0.7, -0.2, 0.1), strict=True):
        torch.testing.assert_close(ours, wanted.double(), rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_small_changes_and_sums_to_zero():
    generator = torch.Generator().manual_seed(3)
    t, s = torch.rand(20, generator=generator).double(), torch.randn(20, generator=generator).double().requires_grad_()
    gradient = torch.autograd.grad(continuous_ap_loss(t, s).loss, s)[0]
    assert torch.allclose(gradient.sum(), torch.zeros((), dtype=torch.double), atol=1e-12)
    steps = 1e-6 * torch.eye(20, dtype=torch.double)
    changes = torch.stack([(continuous_ap_loss(t, s + d).loss - continuous_ap_loss(t, s - d).loss) / 2e-6 for d in steps]).detach()
    torch.testing.assert_close(gradient, changes, rtol=1e-5, atol=1e-8)


def test_the_loss_knows_differences_alone_and_is_small_for_well_separated_order():
    t = torch.linspace(0, 1, 12)
    spread, turned = continuous_ap_loss(t, 10 * t).loss, continuous_ap_loss(t, -10 * t).loss
    assert float(spread) == pytest.approx(0, abs=1e-6)
    assert float(turned) > 0.9
    noisy = torch.randn(12)
    torch.testing.assert_close(continuous_ap_loss(t, noisy).loss, continuous_ap_loss(t, noisy + 5).loss)
    assert continuous_ap_loss(t - 2, noisy).loss == 0, "all weights are 0"


def test_binary_targets_give_one_less_the_precision():
    t, s = torch.tensor([1.0, 0, 1, 0]), torch.tensor([4.0, 3, 2, 1]) * 10
    found = continuous_ap_loss(t, s, weight_threshold=0.0, tau=1e-6)
    # the second positive has one negative above it, whose cost is 1 + 2 x 10 / tau: nearly all of PN
    assert found.pp.tolist() == [1, 2, 2, 4]
    assert found.pn[0] == 0
    assert found.pn[2] > 1e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_lists_are_judged_in_float32(dtype):
    t, s = torch.rand(50), torch.randn(50)
    found = continuous_ap_loss(t, s.to(dtype))
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, continuous_ap_loss(t, s.to(dtype).float()).loss)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\), \(4,\).*flatten"):
        continuous_ap_loss(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="tau is 0"):
        continuous_ap_loss(torch.zeros(3), torch.zeros(3), tau=0.0)


# ---- lists, assignments, masks -------------------------------------------------------------------------------------------------------


def test_the_list_holds_an_images_pairs_together():
    rows = nn.functional.normalize(torch.randn(3, 2, 5), dim=-1)
    positives = nn.functional.normalize(torch.randn(3, 2, 5), dim=-1)
    order = other_images(2, 3, torch.rand(2, 3))
    assert (order != torch.arange(3)).all()
    found = similarity_list(rows, positives, order).view(3, 3, 2, 2)
    for b in range(3):
        torch.testing.assert_close(found[b, 0], rows[b] @ positives[b].T)
        torch.testing.assert_close(found[b, 2], rows[b] @ positives[order[1, b]].T)
    match = matches(3, 2, 2).view(3, 3, 4)
    assert match[:, 0].all()
    assert not match[:, 1:].any()


def test_the_strongest_patches_are_taken_from_both_crops():
    masks, maps = torch.zeros(1, 2, 4, 4), torch.randn(1, 2, 7, 4, 4)
    masks[0, 1, 2, 3] = 2
    masks[0, 0, 0, 1] = 1
    places = strongest_patches(masks, 4, 2)
    assert places.tolist() == [[16 + 11, 1]]
    rows = pooled_rows(maps, places, 4)
    torch.testing.assert_close(rows[0, 0], nn.functional.normalize(maps[0, 1, :, 2, 3], dim=0))


def test_assignments_are_balanced_and_do_not_overflow():
    scores = 50 * torch.randn(40, 4)
    found = sinkhorn(scores, 0.05, 50)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    soft = sinkhorn(torch.randn(40, 4), 0.5, 50)
    torch.testing.assert_close(soft.sum(0), torch.full((4,), 10.0), rtol=1e-3, atol=1e-3)


def test_parts_that_gather_their_sums_are_balanced_as_one():
    scores = torch.randn(30, 4).double()
    whole = sinkhorn(scores, 0.3)
    logs = [part / 0.3 for part in scores.split([10, 20])]
    for _ in range(3):  # two processes in lockstep
        totals = torch.stack([part.logsumexp(0) for part in logs]).logsumexp(0)
        logs = [(part - totals).log_softmax(1) for part in logs]
    torch.testing.assert_close(torch.cat(logs).softmax(1), whole)
    seen = []
    sinkhorn(scores[:10], 0.3, gather=lambda rows: seen.append(rows.shape) or torch.cat([rows, rows]))
    assert seen == [(1, 4)] * 3


def test_the_foreground_holds_the_mass_with_the_fewest_patches():
    attention = torch.zeros(2, 3, 8, 8)
    attention[0, :, 2:4, 2:4], attention[1] = 1.0, 1.0
    found = foreground(attention, 0.6)
    assert found[0, 2:4, 2:4].all()
    assert found[0].sum() <= 6
    assert 0.55 * 64 < found[1].sum() < 0.65 * 64


def test_kmeans_finds_directions_and_ignores_lengths():
    directions = torch.eye(3)
    samples = (directions.repeat(20, 1) + 0.05 * torch.randn(60, 3)) * torch.rand(60, 1).add(0.1)
    found = spherical_kmeans(samples, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert spherical_kmeans(samples[:2], 5, torch.Generator().manual_seed(0)).shape == (5, 3)


def test_a_queue_keeps_the_newest():
    queue = FeatureQueue(5, (1,))
    queue.push(torch.arange(3.0)[:, None])
    assert queue.values().flatten().tolist() == [0, 1, 2]
    queue.push(torch.arange(10.0, 14)[:, None])
    assert queue.values().flatten().tolist() == [10, 11, 12, 13, 0]
    assert queue.full
    again = FeatureQueue(5, (1,))
    again.load_state_dict(queue.state_dict())
    assert len(again) == 5
    assert enqueue(torch.zeros(2, 1), torch.ones(3, 1)).tolist() == [[1], [1]]


def test_crops_that_agree_cost_less():
    assigned = torch.softmax(5 * torch.randn(2, 1, 6), -1).expand(2, 2, 6)
    same = crop_cross_entropy(assigned, assigned[:, :1].log().expand(2, 3, 6), 1.0)
    torch.testing.assert_close(same, -(assigned * assigned.log()).sum(-1).mean())
    assert same < crop_cross_entropy(assigned, torch.randn(2, 3, 6), 1.0)
    boxes = torch.tensor([0.0, 0, 4, 4]).expand(2, 2, 2, 2, 4)
    maps = torch.softmax(5 * torch.randn(2, 1, 6, 4, 4), 2).expand(2, 2, 6, 4, 4)
    none = torch.zeros(2, 0, 6, 2, 2)
    told = aligned_cross_entropy(maps, maps.log(), none, torch.ones(2, 2, 4, 4), boxes, 1.0)
    wrong = aligned_cross_entropy(maps, maps.log().roll(1, 2), none, torch.ones(2, 2, 4, 4), boxes, 1.0)
    assert told < wrong
    assert aligned_cross_entropy(maps, maps.log(), none, torch.zeros(2, 2, 4, 4), boxes, 1.0) == 0, "nothing counts"


def test_a_linear_segmentation_reads_what_patches_hold():
    masks = torch.randint(3, (6, 4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    features = nn.functional.one_hot(masks[:, ::2, ::2], 3).permute(0, 3, 1, 2).float()
    features = features + 0.05 * torch.randn(features.shape)
    assert linear_segmentation(features[:4], masks[:4], features[4:], masks[4:]) > 0.7
    assert linear_segmentation(features[:4], masks[:4], torch.randn(2, 3, 4, 4), masks[4:]) < 0.5
    assert rank_correlation(torch.tensor([1.0, 5, 3]), torch.tensor([10.0, 30, 20])) == pytest.approx(1)


# ---- crops ---------------------------------------------------------------------------------------------------------------------------


def test_boxes_of_overlaps_show_the_same_pixels():
    ramp = torch.stack([torch.arange(60.0).expand(40, 60), torch.arange(40.0)[:, None].expand(40, 60), torch.zeros(40, 60)]) / 60
    crops = Crops(2, 2, 24, 12, (0.3, 0.9), (0.1, 0.2))
    for seed in range(5):
        boxes = draw_boxes(40, 60, crops, np.random.default_rng(seed))
        large, small = cut(ramp, boxes[:2], 24), cut(ramp, boxes[2:], 12)
        common = overlaps(boxes, crops)
        for v, (crop, side) in enumerate([(large[0], 24), (large[1], 24), (small[0], 12), (small[1], 12)]):
            seen = [cut(image, box[None].astype(float), 4) for image, box in ((large[0], common[0, v, 0]), (crop, common[0, v, 1]))]
            assert (common[0, v, 1] >= -1e-3).all()
            assert (common[0, v, 1] <= side + 1e-3).all()
            torch.testing.assert_close(*seen, rtol=0, atol=0.03)


def test_hues_turn_round_and_blur_keeps_the_mean_colour():
    images = torch.rand(3, 3, 9, 9)
    torch.testing.assert_close(turn_hues(images, torch.ones(3)), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn_hues(images, torch.full((3,), 1 / 3)), images[:, [2, 0, 1]], rtol=1e-4, atol=1e-4)
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, torch.tensor([1.5])), flat)
    new = recolour(images.repeat(20, 1, 1, 1), np.random.default_rng(0))
    assert new.min() >= 0
    assert new.max() <= 1
    assert 0.1 < (new[:, 0] == new[:, 1]).flatten(1).all(1).float().mean() < 0.35, "a fifth is grey"


# ---- runs ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_clusters_once_and_moves_the_teacher():
    model = module()
    before = cloned_state(model)
    fit(model)
    assert model.bank.clustered
    assert len(model.patch_queue) == 40
    for name, value in cloned_state(model).items():
        if name.startswith(("student.encoder.vit.blocks", "teacher.cls_head", "student.encoder.prototypes", "student.patch_head")):
            assert not torch.equal(before[name], value), name


def test_a_killed_run_ends_like_a_whole_one_with_queues_and_bank(tmp_path):
    whole, resumed = kill_and_resume(lambda: (module(), data(), [ExactResume()]), 6, 3, tmp_path, max_epochs=1, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    assert whole["bank.done"]
    assert whole["patch_queue.filled"] == 40


def trained(devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = module(total_steps=4).double()
    trainer = fit(model, data(4 // devices), precision="64-true", **kwargs)
    return cloned_state(model), float(trainer.callback_metrics["cotap/rank"])


def test_two_processes_end_like_one():
    torch.set_num_threads(1)
    one, loss = trained(1)
    for state, theirs in run_two_processes(trained, 2):
        assert_state_dicts_equal(state, one, atol=1e-6, rtol=1e-5)
        assert theirs == pytest.approx(loss, rel=1e-6)


def test_a_second_fit_goes_on(tmp_path):
    model = module(total_steps=4)
    fit(model, max_steps=2)
    filled = len(model.cls_queue)
    fit(model, max_steps=2)
    assert filled == len(model.cls_queue) == 12


def test_features_are_judged_by_images_that_are_not_fitted():
    trainer = fit(module(), limit_val_batches=1.0, max_steps=1, val_check_interval=1, check_val_every_n_epoch=None)
    assert {"cotap/val_miou", "cotap/val_linear", "cotap/val_neighbours"} <= set(trainer.callback_metrics)


def test_bf16_and_accumulation_train():
    model = module()
    fit(model, precision="bf16-mixed", accumulate_grad_batches=2, max_steps=2)
    assert all(torch.isfinite(value).all() for value in cloned_state(model).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau is 0"),
        ({"momentum": (0.9, 1.1)}, r"momentum\[1\] is 1.1"),
        ({"pool_sizes": ()}, "one side at least"),
        ({"patch_queue": 0}, "patch_queue is 0"),
        ({"rank_weight": -1.0}, "rank_weight is -1"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        module(**wrong)


def test_encoders_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"without width and patch_size and prototypes.*ObjectAwareViT"):
        CoTAP(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kernel is 2"):
        encoder(kernel=2)
    with pytest.raises(ValueError, match="multiples of the patches' 4 pixels"):
        encoder()(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="plain vision transformer"):
        ObjectAwareViT("vit_small_patch14_reg4_dinov2", pretrained=False, image_size=28, depth=2)


def test_batches_without_crops_are_refused():
    with pytest.raises(ValueError, match="NeighbourCropsDataModule"):
        tiny_trainer(max_steps=1).fit(module(total_steps=1), DataLoader([{"image": torch.zeros(3, 16, 16)}]))


# ---- the loss on any module ----------------------------------------------------------------------------------------------------------


def lists(**kwargs):
    return SimilaritiesDataModule(num_train=24, num_val=20, batch_size=8, **kwargs)


def test_alone_the_ranking_takes_the_place_of_the_modules_loss():
    ends = {}
    for name, callbacks in {"squared": [], "alone": [ContinuousAPLoss(alone=True)], "beside": [ContinuousAPLoss()]}.items():
        pl.seed_everything(0)
        model = SimilarityRegression()
        tiny_trainer(max_steps=3, callbacks=callbacks).fit(model, lists())
        ends[name] = cloned_state(model)["network.0.weight"]
    assert not torch.equal(ends["squared"], ends["alone"])
    assert not torch.equal(ends["beside"], ends["alone"])


def test_it_leaves_nothing_behind():
    assert not left_behind(lambda: SimilarityRegression(), ContinuousAPLoss(), lists())


class TwoTowers(pl.LightningModule):
    """A module whose student and teacher are submodules with lists of similarities."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 4), nn.Linear(3, 4)

    def training_step(self, batch, batch_idx):
        self.teacher(batch["x"])
        return 0 * self.student(batch["x"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_targets_may_come_from_a_submodule_which_is_not_trained():
    torch.manual_seed(0)
    model = TwoTowers()
    before = cloned_state(model)
    batches = DataLoader([{"x": torch.randn(3), "kind": torch.ones(4)} for _ in range(8)], batch_size=4)
    callback = ContinuousAPLoss("student", teacher_module="teacher", match="kind")
    tiny_trainer(max_steps=2, callbacks=[callback]).fit(model, batches)
    after = cloned_state(model)
    assert torch.equal(before["teacher.weight"], after["teacher.weight"])
    assert not torch.equal(before["student.weight"], after["student.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": "network.0"}, "puts out 256 similarities and there are 8 targets"),
        ({"teacher": "input"}, "puts out 8 similarities and there are 128 targets"),
        ({"teacher": "nothing"}, "has no 'nothing'"),
    ],
)
def test_lists_of_different_lengths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(max_steps=1, callbacks=[ContinuousAPLoss(**arguments)]).fit(SimilarityRegression(), lists())
    with pytest.raises(ValueError, match="both name the targets"):
        ContinuousAPLoss(teacher="target", teacher_module="network")


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def test_neighbours_are_read_without_the_image_itself(tmp_path):
    path = tmp_path / "nns.npz"
    np.savez(path, nns=np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1]]))
    assert read_neighbours(path, 3, 2).tolist() == [[1, 2], [2, 0], [0, 1]]
    for wrong, message in (
        (np.zeros((2, 3), int), r"expected \(3, k\)"),
        (np.full((3, 3), 7), "from 7 to 7, expected 0 to 2"),
        (np.full((3, 3), 0.5), "nns"),
        (np.array([[0], [1], [2]]), "0 neighbours an image"),
    ):
        np.savez(path, nns=wrong)
        with pytest.raises(BrokenRecordError, match=message):
            read_neighbours(path, 3, 2)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(BrokenRecordError, match="got None"):
        read_neighbours(path, 3, 2)
    path.write_bytes(b"no archive")
    with pytest.raises(BrokenRecordError, match=r"nns\.npz"):
        read_neighbours(path, 3, 2)
    with pytest.raises(BrokenRecordError, match="lit neighbours"):
        read_neighbours(tmp_path / "none.npz", 3, 2)


def test_masks_are_mapped_and_unknown_ids_named(tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"3": 0, "4": -1}')
    table = read_class_map(path)
    assert mapped(np.array([[3, 4, 255]]), table, path).tolist() == [[0, -1, -1]]
    with pytest.raises(BrokenRecordError, match="id 9"):
        mapped(np.array([[9]]), table, path)
    for text in ("[]", '{"a": 1}', '{"1": 0.5}', '{"1": -3}'):
        path.write_text(text)
        with pytest.raises(BrokenRecordError, match="object of ids and classes"):
            read_class_map(path)


def test_a_folder_without_its_neighbours_is_refused(tmp_path):
    for part in ("train2017", "val2017", "stuffthingmaps"):
        (tmp_path / part).mkdir()
    with pytest.raises(WrongRootError, match="lit neighbours"):
        NeighbourCropsDataModule(root=tmp_path).setup("fit")
    with pytest.raises(WrongRootError, match="holds no image"):
        NeighbourCropsDataModule(root=tmp_path, nearest=tmp_path / "x.npz").setup("fit")
    with pytest.raises(WrongRootError, match="without the folder"):
        NeighbourCropsDataModule(nearest=tmp_path / "x.npz").setup("fit")
    with pytest.raises(WrongRootError, match="has no train2017"):
        NeighbourCropsDataModule(root=tmp_path / "elsewhere").setup("fit")


def test_broken_files_are_named_when_they_are_read(tmp_path):
    fake.coco(tmp_path, 3, 2)
    fake.nearest(tmp_path / "nearest.npz", 3, 1)

    def samples():
        read = NeighbourCropsDataModule(tmp_path, nearest=tmp_path / "nearest.npz", neighbours=1, image_size=16, local_size=8)
        read.setup("fit")
        return read

    assert len(samples().val_set) == 5
    assert {int(samples().val_set[k]["mask"].min()) for k in range(5)} == {-1}, "255 doesn't count"
    mask = tmp_path / "stuffthingmaps" / "val2017" / "000000000001.png"
    whole = mask.read_bytes()
    for content, message in (
        (fake_mask(np.zeros((5, 5), np.uint8)), r"is \(5, 5\) pixels and its image"),
        (fake_mask(np.zeros((36, 45, 3), np.uint8)), "one channel"),
        (whole[:60], r"000000000001\.png"),
        (b"", r"000000000001\.png"),
    ):
        mask.write_bytes(content)
        with pytest.raises(BrokenRecordError, match=message):
            [samples().val_set[k] for k in range(5)]
    mask.unlink()
    with pytest.raises(BrokenRecordError, match="no such file"):
        [samples().val_set[k] for k in range(5)]
    (tmp_path / "train2017" / "000000000001.jpg").write_bytes(b"no image")
    with pytest.raises(BrokenRecordError, match=r"000000000001\.jpg"):
        [samples().train_set[k] for k in range(3)]


def fake_mask(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
