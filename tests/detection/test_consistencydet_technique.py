"""ConsistencyDet and DiffusionDet as modules: arguments, noise levels, teacher, skip, ranks, precision, predictions."""

import copy
import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import run_two_processes, tiny_trainer
from lit_methods import CascadedHead, ConsistencyDet, DiffusionDet, SmallDetectionBackbone, TimmPyramid
from lit_methods.datamodules import DetectionDataModule, DetectionShapesDataModule
from lit_methods.detection.consistencydet.core import detection_levels
from lit_methods.detection.consistencydet.sampler import consistency_sample

pytest.importorskip("faster_coco_eval", reason="average precision needs faster-coco-eval")


def parts(channels: int = 8, stages: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    head = CascadedHead(3, channels, stages, 2, 16, 4, bins=3)
    return {"backbone": SmallDetectionBackbone(channels, stride=8), "head": head, "proposals": 6, "learning_rate": 1e-3}


def shapes(**arguments: Any) -> DetectionShapesDataModule:
    return DetectionShapesDataModule(**({"image_size": 32, "num_train": 8, "num_val": 4, "num_test": 4, "batch_size": 4} | arguments))


def train(module: pl.LightningModule, steps: int = 3, **options: Any) -> pl.Trainer:
    trainer = tiny_trainer(max_steps=steps, max_epochs=-1, **({"limit_val_batches": 0} | options))
    trainer.fit(module, datamodule=shapes())
    return trainer


@pytest.mark.parametrize("kind", [ConsistencyDet, DiffusionDet])
def test_it_trains_validates_and_tests(kind: type[Any]):
    module = kind(**parts(), eval_steps=(1, 2))
    trainer = train(module, 2, limit_val_batches=1.0, log_every_n_steps=1)
    logged = trainer.callback_metrics
    assert {"detection/loss", "detection/val_ap_1_step", "detection/val_ap50_2_steps", "detection/val_kept"} <= set(logged)
    assert ("consistencydet/gap" in logged) == ("detection/val_gap" in logged) == (kind is ConsistencyDet)
    assert module.dashboard_media()["detection/boxes"].pixels.ndim == 3
    assert all(value.isfinite() for value in logged.values())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"proposals": 0}, "proposals is 0: give boxes"),
    ({"eval_steps": ()}, "eval_steps is"),
    ({"eval_steps": (41,)}, "give no more steps than levels"),
    ({"num_levels": 1}, "num_levels is 1: give noise levels"),
    ({"levels": "triple"}, "levels is 'triple'"),
    ({"sigma_min": 50.0}, "levels from 50.0 to 40.0"),
    ({"schedule": "multistep"}, "without milestones"),
    ({"milestones": (5, 3)}, "rising numbers"),
    ({"renewal_threshold": 1.5}, "renewal_threshold is 1.5"),
    ({"teacher_checkpoint": "a.ckpt"}, "without a teacher"),
    ({"backbone": nn.Identity()}, "Identity has no out_channels"),
    ({"backbone": SmallDetectionBackbone(16)}, "out_channels=16 and the head channels=8"),
    ({"levels": "single", "teacher": "one"}, "give levels='pair'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str):
    if arguments.get("teacher") == "one":
        arguments = arguments | {"teacher": DiffusionDet(**parts())}
    with pytest.raises(ValueError, match=message):
        ConsistencyDet(**(parts() | arguments))


def test_classes_that_the_data_do_not_have_and_a_missing_table_of_images_are_refused():
    with pytest.raises(ValueError, match="num_classes=3 and the data have 2"):
        tiny_trainer(max_epochs=1).fit(ConsistencyDet(**parts()), datamodule=shapes(num_classes=2))
    with pytest.raises(ValueError, match="needs class_images"):
        tiny_trainer(max_epochs=1).fit(ConsistencyDet(**parts(), federated=2), datamodule=shapes())


def test_the_federated_loss_runs_with_the_counts_of_the_data():
    module = ConsistencyDet(**parts(), federated=2)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=DetectionDataModule(batch_size=4))
    assert trainer.callback_metrics["detection/loss"].isfinite()
    tiny_trainer(limit_val_batches=1).validate(
        ConsistencyDet(**parts(), federated=2), datamodule=shapes(), verbose=False
    )  # no counts needed


def test_both_levels_have_a_gradient_and_a_single_one_is_another_training():
    both, single = ConsistencyDet(**parts()), ConsistencyDet(**parts(), levels="single")
    before = copy.deepcopy(both.state_dict())
    for module in (both, single):
        train(module)
    weight = "head.stages.1.deltas.weight"
    assert not torch.equal(both.state_dict()[weight], before[weight])
    assert not torch.equal(both.state_dict()[weight], single.state_dict()[weight])


def test_a_second_fit_goes_on_and_an_accumulated_one_steps_less():
    module = ConsistencyDet(**parts())
    train(module, 1)
    first = copy.deepcopy(module.state_dict())
    train(module, 1)
    assert not torch.equal(module.state_dict()["head.stages.0.deltas.weight"], first["head.stages.0.deltas.weight"])
    assert train(ConsistencyDet(**parts()), 2, accumulate_grad_batches=2).global_step == 2


def test_narrow_numbers_keep_boxes_and_losses_wide():
    module = ConsistencyDet(**parts())
    trainer = train(module, 2, precision="bf16-mixed")
    assert trainer.callback_metrics["detection/loss"].isfinite()
    assert trainer.callback_metrics["detection/loss"].dtype == torch.float32
    with pytest.raises(ValueError, match="bf16-true rounds the boxes"):
        train(ConsistencyDet(**parts()), 1, precision="bf16-true")


def test_images_without_truth_train_alone_and_among_others():
    batch = {
        "image": torch.rand(2, 3, 32, 40),
        "size": torch.tensor([[40.0, 32.0], [30.0, 32.0]]),
        "boxes": torch.tensor([[[5.0, 5, 15, 20]], [[0.0, 0, 0, 0]]]),
        "label": torch.tensor([[1], [-1]]),
        "ignore": torch.zeros(2, 1, dtype=torch.bool),
        "index": torch.arange(2),
    }
    none = batch | {"label": torch.full((2, 1), -1)}
    module = ConsistencyDet(**parts())
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, DataLoader([none, batch, none], batch_size=None))  # type: ignore[arg-type]
    assert trainer.callback_metrics["detection/loss_giou"] == 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_skip_leaves_the_boxes_where_the_noise_ends():
    torch.manual_seed(0)
    module = ConsistencyDet(**parts(), skip=True)
    features, size = module.features(torch.rand(1, 3, 32, 32)), torch.tensor([[32.0, 32.0]])
    x = torch.tensor([[[0.0, 0.0, 0.5, 0.5]] * 6])  # the middle half of the image, three quarters of it wide
    least = module.levels[-2:-1].float()
    _, boxes = module.answer(features, x, least, torch.tensor([39]), size)
    torch.testing.assert_close(boxes[-1], torch.tensor([[4.0, 4, 28, 28]]).expand(1, 6, 4), atol=1e-3, rtol=0)


def test_a_teacher_leads_to_the_lower_level_and_is_neither_trained_nor_saved():
    teacher = DiffusionDet(**parts())
    before = copy.deepcopy(teacher.state_dict())
    plain, led = ConsistencyDet(**parts()), ConsistencyDet(**parts(), teacher=teacher)
    for module in (plain, led):
        train(module, 2)
    assert set(plain.state_dict()) == set(led.state_dict())
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(plain.state_dict()["head.stages.0.deltas.weight"], led.state_dict()["head.stages.0.deltas.weight"])


def test_the_teacher_sees_the_step_of_the_diffusion_that_is_as_noisy():
    teacher = DiffusionDet(**parts())
    seen: list[tuple[Tensor, Tensor]] = []
    answer = teacher.answer
    teacher.answer = lambda features, x, time, size: seen.append((x, time)) or answer(features, x, time, size)  # type: ignore[func-returns-value,method-assign]
    x0, noise, sigma = torch.rand(1, 6, 4) * 2 - 1, torch.randn(1, 6, 4), torch.tensor([0.7])
    teacher.clean(torch.rand(1, 3, 32, 32), torch.tensor([[32.0, 32.0]]), x0 + sigma * noise, sigma)
    x, time = seen[0]
    share = teacher.shares[time].float()
    torch.testing.assert_close(x, (share.sqrt() * 2 * x0 + (1 - share).sqrt() * noise), rtol=2e-2, atol=2e-2)


def test_a_sampling_of_few_steps_tells_the_head_the_nearest_level_and_renews():
    asked: list[tuple[float, int]] = []

    def predict(x: Tensor, sigma: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((float(sigma[0]), int(index[0])))
        logits = torch.full((2, 3, 1), -9.0)
        logits[0, 1] = 9.0
        return logits, torch.tensor([10.0, 10, 20, 20]).expand(2, 3, 4)

    levels, training = detection_levels(4).float(), detection_levels(40)[:-1].float()
    answers = consistency_sample(predict, torch.randn(4, 2, 3, 4), torch.full((2, 2), 32.0), levels, training)
    assert [index for _, index in asked] == [0, 13, 26, 39]
    assert [round(sigma, 3) for sigma, _ in asked] == [round(float(level), 3) for level in levels[:-1]]
    assert [answer.kept.tolist() for answer in answers[:1]] == [[pytest.approx(1 / 3), 0.0]]
    assert answers[-1].kept.tolist() == [1.0, 1.0]


def test_the_same_boxes_are_found_in_batches_of_any_size(tmp_path: Any):
    module = ConsistencyDet(**parts(), eval_steps=(2,)).eval()
    found = []
    for size in (4, 1):
        data = shapes(eval_batch_size=size)
        outputs = tiny_trainer(default_root_dir=tmp_path / str(size)).predict(module, datamodule=data)
        assert outputs is not None
        found.append([box for batch in outputs for box in batch["boxes"]])  # type: ignore[call-overload,index]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_predict_writes_boxes_of_a_folder_of_images(tmp_path: Any):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name, size in (("a", (50, 30)), ("b", (64, 64))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    module = ConsistencyDet(**parts(), eval_steps=(1,))
    data = DetectionDataModule(predict=tmp_path / "pictures", eval_side=32)
    trainer = tiny_trainer(default_root_dir=tmp_path / "run")
    trainer.predict(module, datamodule=data)
    (file,) = (tmp_path / "run").rglob("detections.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a", "b"]
    assert lines[0]["boxes"]
    assert max(box[2] for box in lines[0]["boxes"]) <= 50.01
    assert sorted(path.name for path in (tmp_path / "run").rglob("*.png")) == ["a.png", "b.png"]


def test_a_network_of_timm_has_frozen_parts_and_a_pyramid():
    backbone = TimmPyramid("resnet18", pretrained=False, out_channels=8, frozen=["conv1", "layer1"])
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(one.shape) for one in maps] == [(1, 8, 64 // stride, 96 // stride) for stride in backbone.strides]
    assert backbone.strides == [4, 8, 16, 32]
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not any("layer1" in name or "conv1.weight" in name.split("body.")[-1][:12] for name in trained)
    assert any("layer2" in name for name in trained)
    with pytest.raises(ValueError, match="begins with 'layer9'"):
        TimmPyramid("resnet18", pretrained=False, frozen=["layer9"])


def _two_ranks(root: str) -> list[float]:
    module = ConsistencyDet(**parts(), eval_steps=(1,))
    trainer = tiny_trainer(max_steps=2, max_epochs=-1, devices=2, strategy="ddp", use_distributed_sampler=False, default_root_dir=root)
    trainer.fit(module, datamodule=shapes(batch_size=2, num_val=5))
    return [float(value) for _, value in sorted(trainer.callback_metrics.items()) if "val" in _]


def test_two_processes_agree_on_their_figures(tmp_path: Any):
    first, second = run_two_processes(_two_ranks, str(tmp_path))
    assert first == second
