"""Views, label choice, alignment, shrinking and graph losses by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_methods.datamodules import CIFARDataModule, DigitsDataModule, SemiSupervisedDataModule
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.vision.semi import labelled_subset, read_label_list
from lit_methods.datamodules.vision.views import affine, cut_out, make_views
from lit_methods.optim import seven_sixteenths_cosine, warmup_then_epoch_cosine
from lit_methods.semi.alignment import MarginalQueue, align
from lit_methods.semi.fixmatch import FixMatch
from lit_methods.semi.shrinkmatch.core import shrink, shrunk_loss
from lit_methods.semi.simmatchv2.core import finite_or_zero, propagate


def test_alignment_undoes_a_skew():
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    torch.testing.assert_close(align(p, torch.tensor([0.75, 0.25])), torch.tensor([[1 / 3, 2 / 3], [0.75, 0.25]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alignment_of_a_class_that_nobody_has_predicted(dtype):
    p = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]], dtype=dtype)
    aligned = align(p, torch.tensor([0.5, 0.5, 0.0], dtype=dtype))
    tolerance = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(aligned[:2], p[:2], **tolerance)  # not 0 / 0
    torch.testing.assert_close(aligned[2], torch.tensor([0.0, 0.0, 1.0], dtype=dtype), **tolerance)  # the limit, not inf / inf
    torch.testing.assert_close(align(p, torch.zeros(3, dtype=dtype)), p, **tolerance)  # an empty queue


def test_a_class_without_predictions_trains_on():
    module = FixMatch(nn.Identity(), 2, 3, distribution_alignment="queue", queue_length=4)
    logits = torch.tensor([[5.0, 1.0, -200.0], [1.0, 4.0, -200.0]])
    for _ in range(6):  # the queue is filled and goes round
        p = module.weak_prediction(logits)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(2))
        assert p[:, 2].tolist() == [0, 0]


def test_the_queue_forgets_the_oldest_and_is_saved():
    queue = MarginalQueue(2, 2)
    for value in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
        marginal = queue.push(torch.tensor(value))
    assert marginal.tolist() == [0.25, 0.75]
    other = MarginalQueue(2, 2)
    other.load_state_dict(queue.state_dict())
    assert other.push(torch.tensor([1.0, 0.0])).tolist() == [0.75, 0.25]


def shrunk_by_loop(p: list[float], threshold: float) -> tuple[list[int], int, bool]:
    order = sorted(range(len(p)), key=lambda c: -p[c])
    for cut in range(2, len(p)):
        left = sum(p[c] for c in order[cut:])
        if p[order[0]] / (p[order[0]] + left) >= threshold:
            return order, cut, True
    return order, len(p) - 1, False


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_shrinking_is_that_of_the_loop(threshold):
    p = torch.rand(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(3)
    p = p / p.sum(1, keepdim=True)
    found = shrink(p, threshold)
    for row, order, cut, reached in zip(p.tolist(), found.order.tolist(), found.cut.tolist(), found.reached.tolist(), strict=True):
        assert (order, cut, reached) == shrunk_by_loop(row, threshold)


def test_the_shrunk_loss_leaves_the_removed_classes_alone():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    found = shrink(p, 0.9)
    assert found.cut.tolist() == [3]  # 0.5 / (0.5 + 0.05) is enough, 0.5 / (0.5 + 0.2) isn't
    logits = torch.tensor([[1.0, 5.0, -2.0, 0.5]], requires_grad=True)
    loss = shrunk_loss(logits, found)
    torch.testing.assert_close(loss, torch.tensor([math.log(math.exp(1.0) + math.exp(0.5)) - 1.0]))
    loss.sum().backward()
    assert logits.grad[0, 1:3].tolist() == [0.0, 0.0]
    assert logits.grad[0, 0] < 0 < logits.grad[0, 3]


def test_propagation_is_the_closed_form():
    generator = torch.Generator().manual_seed(2)
    bank, z = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for n in (6, 3))
    p, classes = torch.rand(3, 4, generator=generator, dtype=torch.float64).softmax(1), torch.tensor([0, 1, 2, 3, 1, 0])
    found = propagate(p, z, bank, classes, 4, 0.2, 0.3)
    for row in range(3):
        nearest = (bank @ z[row]).argsort(descending=True)[:4]
        nodes = torch.cat([z[row : row + 1], bank[nearest]])
        similar = (nodes @ nodes.T / 0.2).exp()
        similar.fill_diagonal_(0)
        a = similar / similar.sum(1, keepdim=True)
        labels = torch.cat([p[row : row + 1], torch.eye(4, dtype=torch.float64)[classes[nearest]]])
        torch.testing.assert_close(found[row], (0.7 * torch.linalg.inv(torch.eye(5) - 0.3 * a) @ labels)[0])
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(propagate(p, z, bank, classes, 4, 0.2, 0.0), p)
    with pytest.raises(ValueError, match="bank of 6"):
        propagate(p, z, bank, classes, 7, 0.2, 0.3)


def test_an_infinite_loss_is_zero_and_leaves_no_trace():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = finite_or_zero(lambda v: -v.log().sum(), x)
    assert loss == 0
    (loss + x.sum()).backward()
    assert x.grad.tolist() == [1.0, 1.0]
    y = torch.tensor([0.5, 1.0], requires_grad=True)
    finite_or_zero(lambda v: -v.log().sum(), y).backward()
    assert y.grad.tolist() == [-2.0, -1.0]


def test_schedules_start_full_and_fall():
    assert seven_sixteenths_cosine(0, 100) == 1
    assert seven_sixteenths_cosine(100, 100) == pytest.approx(math.cos(7 * math.pi / 16))
    assert seven_sixteenths_cosine(5, 100, 10) == 0.5
    assert [warmup_then_epoch_cosine(step, 2, 4, 2) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5])


def test_the_labelled_images_are_equally_many_of_each_class_and_follow_from_the_seed():
    labels = np.array([0, 1, 2] * 20)
    chosen = labelled_subset(labels, 3, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 3]
    assert np.array_equal(chosen, labelled_subset(labels, 3, seed=5))
    assert not np.array_equal(chosen, labelled_subset(labels, 3, seed=6))
    with pytest.raises(ValueError, match="only 20 images"):
        labelled_subset(labels, 21, seed=0)


def test_an_affine_map_moves_what_it_says():
    image = torch.zeros(1, 9, 9)
    image[0, 4, 6] = 1  # two pixels to the right of the middle
    assert torch.nonzero(affine(image, math.pi / 2, 1.0, (0.0, 0.0))[0] > 0.9).tolist() == [[2, 4]]  # a quarter turn: above it
    assert torch.nonzero(affine(image, 0.0, 1.0, (1.0, 2.0))[0] > 0.9).tolist() == [[6, 7]]
    assert affine(image, 0.0, 2.0, (0.0, 0.0))[0, 4, 8] > 0.9
    assert torch.equal(affine(image, 0.0, 1.0, (0.0, 0.0)), image)


def test_a_hole_has_its_size_and_leaves_the_original_whole():
    image = torch.ones(1, 16, 16)
    sizes = {int((cut_out(image, 4, np.random.default_rng(seed)) == 0).sum()) for seed in range(60)}
    assert max(sizes) == 16
    assert min(sizes) < 16  # at a border
    assert image.min() == 1


@pytest.mark.parametrize(
    ("policy", "stored"),
    [
        ("small_grey", torch.linspace(0, 1, 8).outer(torch.linspace(0, 1, 8))[None]),
        ("small_colour", torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)),
        ("imagenet", Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))),
    ],
)
def test_views_follow_from_the_draw_alone(policy, stored):
    weak, (strong, second) = make_views(policy, 2)
    state = torch.get_rng_state()
    for view in (weak, strong, second):
        first = view(stored, (0, 1, 2))
        assert first.dtype == torch.float32
        assert first.ndim == 3
        assert torch.equal(first, view(stored, (0, 1, 2)))
        assert not torch.equal(first, view(stored, (0, 2, 2)))
    assert torch.equal(state, torch.get_rng_state())
    if policy != "imagenet":
        gap = [sum(float((view(stored, (0, k, 2)) - weak(stored, (1, k, 2))).abs().mean()) for k in range(10)) for view in (weak, strong)]
        assert gap[0] < gap[1]  # strong views lie further away


def data(**kwargs):
    digits = DigitsDataModule(num_train=200, batch_size=100)
    return SemiSupervisedDataModule(digits, **{"labels_per_class": 2, "batch_size": 8, "ratio": 3, "policy": "small_grey", **kwargs})


def test_batches_of_labelled_and_unlabelled_images():
    module = data(strong_views=2)
    module.setup("fit")
    assert module.labelled_classes.bincount().tolist() == [2] * 10
    batches = [batch for batch, *_ in module.train_dataloader()]
    assert len(batches) == 200 // 24
    labelled, unlabelled = batches[0]["labelled"], batches[0]["unlabelled"]
    assert labelled["image"].shape == (8, 1, 8, 8)
    assert unlabelled["weak"].shape == (24, 1, 8, 8)
    assert [view.shape for view in unlabelled["strong"]] == [(24, 1, 8, 8)] * 2
    assert not torch.equal(*unlabelled["strong"])
    assert torch.equal(labelled["label"], module.labelled_classes[labelled["index"]])
    seen = torch.cat([batch["unlabelled"]["index"] for batch in batches])
    assert len(seen.unique()) == len(seen)
    assert {int(i) for batch in batches for i in batch["labelled"]["index"]} == set(range(20))  # the short loader starts again
    assert len(module.val_dataloader().dataset) == 1597


def test_few_labels_fill_a_large_batch_and_may_be_left_out_of_the_rest():
    module = data(labels_per_class=1, batch_size=64, ratio=1, include_labelled=False)
    module.setup("fit")
    assert len(module.unlabelled_set) == 190
    assert not set(module.labelled) & set(module.unlabelled)
    batch = next(iter(module.train_dataloader()))[0]["labelled"]
    assert batch["image"].shape[0] == 64
    twins = batch["image"][batch["index"] == batch["index"].mode().values]
    assert len(twins) > 1
    assert not torch.equal(twins[0], twins[1])  # in views of their own


def test_a_colour_data_set_is_normalised_as_it_says():
    module = SemiSupervisedDataModule(CIFARDataModule(mean=(0.5,) * 3, std=(0.25,) * 3), labels_per_class=1, batch_size=4, ratio=1)
    module.setup("fit")
    weak = module.unlabelled_set[(0, 3)]["weak"]
    assert weak.shape == (3, 32, 32)
    assert -2 <= weak.min() < weak.max() <= 2


def test_a_list_of_labelled_images(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("7\n3\n11\n")
    assert read_label_list(path, 12).tolist() == [3, 7, 11]
    module = data(label_list=path)
    module.setup("fit")
    assert len(module.labelled) == 3
    path.write_text("n01_7.JPEG\nn02_1.JPEG\n")  # SimCLR's form
    assert read_label_list(path, 3, ["n01/n01_3.JPEG", "n01/n01_7.JPEG", "n02/n02_1.JPEG"]).tolist() == [1, 2]
    for text, says in (("7\n12\n", "line 2.*'12' is no position in 0..11"), ("1\n1\n", "twice"), ("", "empty")):
        path.write_text(text)
        with pytest.raises(BrokenRecordError, match=says):
            read_label_list(path, 12)
    with pytest.raises(BrokenRecordError, match="no such file"):
        read_label_list(tmp_path / "none.txt", 12)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"ratio": 0}, "ratio is 0: give a number in .1, inf."), ({"strong_views": 0}, "strong_views"), ({"policy": "large"}, "small_grey")],
)
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        data(**wrong)
