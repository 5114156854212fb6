"""SuperFlow and its baselines as a LightningModule: learning, ablations, resume, two processes, precision."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("spconv", reason="spconv is not installed: pip install 'lit-methods[lidar]'")
from lightning.pytorch import seed_everything

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import DINOv2, MinkUNet, PatchStatistics, SuperFlow
from lit_methods.callbacks import DenseToSparse
from lit_methods.datamodules import NuScenesDataModule
from lit_methods.lidar.minkunet import VoxelFeatures
from lit_methods.lidar.superpixels import agree_on_superpixels


def data(root: Path, **kwargs) -> NuScenesDataModule:
    options = {"version": "v1.0-mini", "image_size": (32, 64), "batch_size": 1, "pretrain_split": "train", "cameras": 2}
    return NuScenesDataModule(root=root, **(options | kwargs))


def small_unet() -> MinkUNet:
    return MinkUNet(18, stem_channels=4, planes=(4, 4, 8, 8, 8, 8, 4, 4), voxel_size=(1.0, 10.0, 1.0))


class Pointwise(nn.Module):
    """Somebody's own 3D network, without batch statistics and without spconv."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, points, points_per_sample):
        rows = torch.arange(len(points))
        return VoxelFeatures(self.layers(points / torch.tensor([20.0, 20, 5, 100])), rows, rows)


def module(backbone=small_unet, **kwargs) -> SuperFlow:
    torch.manual_seed(1)
    return SuperFlow(backbone(), PatchStatistics(8), **({"embed_dim": 8} | kwargs))


def one_batch(root: Path, **kwargs):
    source = data(root, **kwargs)
    source.prepare_data()
    source.setup("fit")
    return next(iter(source.train_dataloader()))


def fit(model, source, **kwargs):
    seed_everything(0, verbose=False)
    trainer = tiny_trainer(**({"max_steps": 2, "limit_val_batches": 1} | kwargs))
    trainer.fit(model, datamodule=source)
    return trainer


def test_the_loss_falls_and_the_teacher_stays_out_of_everything(release):
    model, batch = module(), one_batch(release)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = model._superpixel_contrast(batch)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not [name for name in model.state_dict() if "teacher" in name]


def test_a_batch_can_be_used_twice(release):
    model, batch = module().eval(), one_batch(release, batch_size=2)
    before = copy.deepcopy(batch)
    first, second = (model._superpixel_contrast(batch)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(batch[view][key], before[view][key]) for view in ("cur", "dense") for key in before[view])


@pytest.mark.parametrize(
    ("options", "data_options", "terms"),
    [
        ({}, {}, {"spatial", "d2s", "temporal"}),
        ({"use_d2s": False, "use_temporal": False, "spatial_neighbours": False}, {"frames": 1, "num_sweeps": 0}, {"spatial"}),
        ({"view_consistency": False}, {}, {"spatial", "d2s", "temporal"}),
        ({"d2s_mode": "cosine", "use_temporal": False}, {"frames": 2}, {"spatial", "d2s"}),
        ({"contrast": "pixel", "num_pixel_pairs": 64}, {"frames": 1}, {"spatial"}),
    ],
    ids=["full", "spatial-only", "no-view-consistency", "cosine-two-frames", "ppkt"],
)
def test_ablations_and_baselines_train(release, options, data_options, terms):
    trainer = fit(module(**options), data(release, **data_options))
    logged = {name.removeprefix("superflow/loss_") for name in trainer.callback_metrics if name.startswith("superflow/loss_")}
    assert logged == terms
    assert trainer.callback_metrics["superflow/loss"].isfinite()
    assert 0 <= trainer.callback_metrics["superflow/top1_spatial"] <= 1


def test_slidr_on_slic_superpixels(release, tmp_path):
    options = {"view_consistency": False, "use_d2s": False, "use_temporal": False, "spatial_neighbours": False, "num_superpixels": 20}
    source = data(release, superpixels="slic", num_superpixels=20, superpixel_root=tmp_path / "slic", frames=1, num_sweeps=0)
    trainer = fit(module(**options), source)
    assert trainer.callback_metrics["superflow/num_groups"] > 2


def test_d2s_without_a_dense_cloud_is_explained(release):
    batch = one_batch(release)
    del batch["dense"]
    with pytest.raises(ValueError, match="num_sweeps"):
        module()._superpixel_contrast(batch)


@pytest.mark.parametrize("options", [{}, {"contrast": "pixel", "num_pixel_pairs": 64}], ids=["superflow", "ppkt"])
def test_a_killed_run_ends_like_an_uninterrupted_one(release, tmp_path, options):
    """Killed in mid-epoch (3 steps per epoch); PPKT draws its pairs from the global generator."""
    from lit_methods.callbacks import ExactResume

    def build():
        return module(**options), data(release), [ExactResume()]

    whole, resumed = kill_and_resume(build, 5, 2, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def train_accumulating(root: Path, batches: int) -> dict[str, torch.Tensor]:
    model = module()
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    extra = {"devices": 2, "strategy": "ddp"} if ranks == 2 else {"accumulate_grad_batches": 2}
    fit(model, data(root), limit_val_batches=0, max_steps=batches, max_epochs=-1, **extra)
    return {name: value for name, value in cloned_state(model).items() if "running" not in name and "tracked" not in name}


def test_two_processes_equal_one_that_accumulates(release):
    """Local negatives and local batch norm, as the authors: a rank is a micro-batch."""
    alone = train_accumulating(release, 2)
    first, second = run_two_processes(train_accumulating, release, 2)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, alone, atol=1e-5)


def train_gathering(root: Path) -> dict[str, torch.Tensor]:
    model = module(Pointwise, gather_negatives=True)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    extra = {"devices": 2, "strategy": "ddp"} if ranks == 2 else {}
    fit(model, data(root, batch_size=2 // ranks), limit_val_batches=0, max_steps=3, max_epochs=-1, **extra)
    return cloned_state(model)


def test_gathered_negatives_make_two_processes_equal_one(release):
    alone = train_gathering(release)
    first, second = run_two_processes(train_gathering, release)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, alone, atol=1e-5)
    local = module(Pointwise)
    fit(local, data(release, batch_size=1), limit_val_batches=0, max_steps=3, max_epochs=-1, accumulate_grad_batches=2)
    difference = max((alone[name] - value).abs().max() for name, value in local.state_dict().items())
    assert difference > 1e-4, "with local negatives the result differs: gathering matters"


def test_bf16_autocast_keeps_the_contrast_in_float32(release):
    plain = fit(module(), data(release), max_steps=1).callback_metrics
    half = fit(module(), data(release), max_steps=1, precision="bf16-mixed").callback_metrics
    assert half["superflow/loss"].dtype == torch.float32
    torch.testing.assert_close(half["superflow/loss"], plain["superflow/loss"], rtol=0.05, atol=0)
    assert not torch.equal(half["superflow/loss"], plain["superflow/loss"]), "the 2D head did run in bf16"


def test_prediction_yields_an_embedding_for_every_point(release):
    model, source = module(), data(release)
    (output, *_) = tiny_trainer(limit_predict_batches=1).predict(model, datamodule=source)
    assert output["embeddings"][0].shape[1] == 8
    torch.testing.assert_close(output["embeddings"][0].norm(dim=1), torch.ones(len(output["embeddings"][0])))


def test_dinov2_gives_the_tokens_before_the_final_norm():
    teacher = DINOv2("small", weights="random", image_size=(28, 56))
    images = torch.rand(2, 3, 28, 56)
    features = teacher(images)
    assert features.shape == (2, 384, 2, 4)
    tokens = features.flatten(2).transpose(1, 2)
    normed = teacher.vit.forward_features((images - teacher.mean) / teacher.std)[:, 1:]
    torch.testing.assert_close(teacher.vit.norm(tokens), normed, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(tokens, normed, atol=1e-3)


def test_teachers_name_what_they_can_not_use(tmp_path):
    with pytest.raises(ValueError, match="multiples of 14"):
        DINOv2("small", weights="random", image_size=(30, 56))
    with pytest.raises(FileNotFoundError, match=r"vits\.pth"):
        DINOv2("small", weights=tmp_path / "vits.pth")
    with pytest.raises(ValueError, match="stride=8"):
        PatchStatistics(8)(torch.zeros(1, 3, 20, 16))


def test_dinov2_reads_a_local_file(tmp_path):
    torch.manual_seed(3)
    original = DINOv2("small", weights="random", image_size=(28, 28))
    torch.save(original.vit.state_dict(), tmp_path / "vits.pth")
    assert_state_dicts_equal(
        DINOv2("small", weights=tmp_path / "vits.pth", image_size=(28, 28)).vit.state_dict(), original.vit.state_dict()
    )


def test_dinov2_reads_its_file_itself_and_runs_nothing_in_it(tmp_path, monkeypatch):
    import timm.models

    def unpickling(*_, **__):
        raise AssertionError("some versions of timm read this with pickle")

    monkeypatch.setattr(timm.models._builder, "load_state_dict", unpickling)
    original = DINOv2("small", weights="random", image_size=(28, 28))
    for name, write in (("a.pth", torch.save), ("a.safetensors", save_file)):
        write(original.vit.state_dict(), tmp_path / name)
        found = DINOv2("small", weights=tmp_path / name, image_size=(28, 28))
        assert_state_dicts_equal(found.vit.state_dict(), original.vit.state_dict())
    (tmp_path / "a.pth").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a\.pth can't be read as a checkpoint|a\.pth holds more than tensors"):
        DINOv2("small", weights=tmp_path / "a.pth", image_size=(28, 28))
    assert not Path("ran").exists()
    torch.save({"another.weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"weights='.*a\.pth' holds other weights than those of vit_small_patch14_dinov2"):
        DINOv2("small", weights=tmp_path / "a.pth", image_size=(28, 28))


def test_data_and_method_agree_on_the_number_of_superpixels():
    trainer = SimpleNamespace(datamodule=NuScenesDataModule(superpixels="slic"))
    flow = SuperFlow(small_unet(), PatchStatistics(8), embed_dim=8)
    flow._trainer = trainer
    with pytest.raises(ValueError, match="num_superpixels is 17 of SuperFlow and 150 of NuScenesDataModule"):
        flow.setup("fit")
    with pytest.raises(ValueError, match="17 of DenseToSparse and 150"):
        DenseToSparse().setup(trainer, flow, "fit")
    agree_on_superpixels(trainer, 150, "SuperFlow")
    agree_on_superpixels(SimpleNamespace(datamodule=None), 17, "SuperFlow")
