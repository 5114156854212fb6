"""DLoRAL: retrieval, schedules and tiles by hand; the module in training, checkpoints, predict; the callback elsewhere."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import (
    CrossFrameRetrieval,
    DualLoRAVSRModule,
    FixedStage,
    OneStepPretraining,
    PixelBlocks,
    SmallBackbone,
    StageSchedule,
    StepUNet,
)
from lit_methods.callbacks import AlternatingLoRAStages, ExactResume
from lit_methods.datamodules import VideoRestorationDataModule
from lit_methods.diffusion import lora
from lit_methods.restoration.dloral.core import (
    cross_frame_attention,
    csd_loss,
    empty_rows,
    frame_difference_mask,
    has_csd,
    in_tiles,
    tile_starts,
    tile_weights,
)

SHORT = StageSchedule(1, 3, 2, 1, 1.0, 0.1, 0.01, 5.0)  # steps 0, 1: consistency; 2, 3: detail; 4, 5: consistency; then detail


def tiny(schedule=SHORT, seed=0, **kwargs):
    backbone = SmallBackbone(StepUNetOf(seed), seed=seed)
    torch.manual_seed(seed)
    retrieval = CrossFrameRetrieval(12, 2, 4, 10.0)
    return DualLoRAVSRModule(backbone, retrieval, schedule, **{"rank": 2, "learning_rate": 1e-2, "seed": seed, **kwargs})


def StepUNetOf(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StepUNet(12, channels=8, multipliers=(1, 1))
        nn.init.normal_(network.out[-1].weight, std=0.1)
        return network


def data(**kwargs):
    return VideoRestorationDataModule(**{"size": 16, "eval_frames": 3, "per_clip": 8, "num_eval": 2, "batch_size": 2, **kwargs})


def named(module, *patterns):
    return {name: value for name, value in cloned_state(module).items() if any(part in name for part in patterns)}


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def asked(n=20, heads=3, width=4, batch=2):
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, n, width, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return query, key, value, torch.randn(batch, heads, n, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("chunk", [1, 7, 19, 20, 50])
@pytest.mark.parametrize("topk", [None, 3])
def test_retrieval_in_chunks_is_the_dense_one_with_its_gradients(chunk, topk):
    results = []
    for size in (None, chunk):
        given = asked()
        out = cross_frame_attention(*given, 5.0, topk, size)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense)


def test_retrieval_by_hand_and_the_k_highest():
    query, key, value, threshold = asked(n=6, heads=1, batch=1)
    similarity = query[0, 0] @ key[0, 0].T / 2
    wanted = ((similarity - threshold[0, 0, :, None]) / 3).clamp(min=0)
    torch.testing.assert_close(cross_frame_attention(query, key, value, threshold, 3.0)[0, 0], wanted @ value[0, 0])
    first = similarity.argmax(1)
    wanted = wanted[torch.arange(6), first][:, None] * value[0, 0][first]
    torch.testing.assert_close(cross_frame_attention(query, key, value, threshold, 3.0, topk=1)[0, 0], wanted)
    for topk in (6, 100):
        whole = cross_frame_attention(query, key, value, threshold, 3.0)
        assert torch.equal(cross_frame_attention(query, key, value, threshold, 3.0, topk), whole)


def test_equal_similarities_all_count():
    query, key, value = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    out = cross_frame_attention(query, key, value, torch.zeros(1, 1, 2), 1.0, topk=1)
    assert torch.allclose(out, torch.full_like(out, 6.0))  # 3 keys of similarity 2


def test_rows_without_a_match_are_counted_and_give_nothing():
    query, key, value, threshold = asked()
    assert torch.equal(cross_frame_attention(query, key, value, threshold + 100, 1.0), torch.zeros(2, 3, 20, 4).double())
    assert empty_rows(query, key, threshold + 100) == 1
    assert empty_rows(query, key, threshold - 100, chunk=7) == 0
    assert torch.equal(empty_rows(query, key, threshold, chunk=7), empty_rows(query, key, threshold))


def test_similarities_stay_in_float32_under_autocast():
    query, key, value, threshold = (part.float() for part in asked())
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_frame_attention(query, key, value, threshold, 1.0, chunk=6)
    torch.testing.assert_close(found, cross_frame_attention(query, key, value, threshold, 1.0))


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"latents are \(1, 9, 4, 4\).*made for 4 channels"):
        CrossFrameRetrieval(4, 1, 4)(torch.zeros(1, 9, 4, 4), torch.zeros(1, 9, 4, 4), torch.zeros(1, 2, 4, 4))


def test_schedules():
    assert [SHORT.at(step).stage for step in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert not any(has_csd(SHORT.at(step)) for step in (0, 1, 4, 5))
    assert has_csd(SHORT.at(2))
    assert StageSchedule(2, 4, 2, 0).at(3) == StageSchedule(2, 4, 2, 0).at(4)  # no transition
    assert FixedStage("consistency", 1, 2, 3, 4).at(9) == (0, 1, 0.04, 0.0, 8)
    assert FixedStage("detail", 1, 2, 3, 4).at(0) == (1, 1, 2, 3, 4)
    assert FixedStage().at(0).stage == 2
    with pytest.raises(ValueError, match="before quality_iter"):
        StageSchedule(10, 5)
    with pytest.raises(ValueError, match="lambda_csd"):
        StageSchedule(lambda_csd=-1)
    with pytest.raises(ValueError, match="kind is 'both'"):
        FixedStage("both")


def test_score_distillation_pulls_from_the_negative_to_the_guided_and_no_gradient_enters_the_teacher():
    weight = torch.tensor(2.0, requires_grad=True)
    z = torch.randn(2, 3, 2, 2, requires_grad=True)
    noise, t, shares = torch.randn(2, 3, 2, 2), torch.tensor([5, 9]), torch.tensor([0.9, 0.5])
    loss = csd_loss(z, noise, t, shares, lambda x, t, c: weight * x * c, 0.3, 0.1, cfg=3.0)
    gradient = torch.autograd.grad(loss, z)[0]
    noisy = 0.9**0.5 * z + 0.1**0.5 * noise
    toward = -(0.1**0.5) / 0.9**0.5 * (2 * noisy * (0.1 + 3 * 0.2) - 2 * noisy * 0.1)  # x0 of the guided minus x0 of the negative
    ratio = gradient[0] / -toward[0]
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)
    assert ratio.mean() > 0
    assert torch.equal(csd_loss(z, noise, t, shares, lambda x, t, c: c * x, 0.2, 0.2), torch.tensor(0.0))
    still = torch.zeros(1, 1, 2, 2, requires_grad=True)  # z is x0 already: 0 / 0
    nothing = csd_loss(still, still.detach(), t[:1], shares[:1], lambda x, t, c: x, 0, 0)
    assert torch.equal(torch.autograd.grad(nothing, still)[0], torch.zeros(1, 1, 2, 2))


def test_masks_of_one_frame_and_of_a_still_clip_are_empty():
    assert not frame_difference_mask(torch.rand(1, 1, 3, 4)).any()
    assert not frame_difference_mask(torch.ones(4, 1, 3, 4)).any()
    clip = torch.zeros(3, 1, 2, 2)
    clip[1, 0, 1, 0] = 1
    assert torch.equal(frame_difference_mask(clip), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (21, 13), (9, 30)])
def test_tiles_of_a_function_of_pixels_are_the_whole(height, width):
    x, y = torch.randn(2, 3, height, width), torch.randn(2, 1, height, width)
    found = in_tiles(lambda a, b: a * b + 1, (x, y), tile=8, overlap=3)
    torch.testing.assert_close(found, x * y + 1)


def test_tiles_cover_a_side_and_weigh_the_middle_most():
    assert tile_starts(8, 8, 2) == [0]
    assert tile_starts(20, 8, 2) == [0, 6, 12]
    assert tile_starts(21, 8, 2) == [0, 6, 12, 13]
    weights = tile_weights(5, 7)
    assert weights.argmax() == 2 * 7 + 3
    torch.testing.assert_close(weights, weights.flip(0).flip(1))
    with pytest.raises(ValueError, match="fewer pixels than a tile has"):
        tile_starts(20, 8, 8)


# ---- stages ----------------------------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """The weights behind each step, and the batches' names."""

    def __init__(self):
        self.states, self.names = [], []

    def on_train_start(self, trainer, pl_module):
        self.states.append(cloned_state(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(cloned_state(pl_module))
        self.names.append(batch["name"][0])


def test_each_stage_moves_its_own_part_alone_and_takes_its_own_data():
    module, watch = tiny(weight_decay=0.1), Watch()
    frozen = {
        name: value.clone() for name, value in module.unet.network.named_parameters() if "lora_" not in name and "widened" not in name
    }
    trainer = tiny_trainer(max_steps=8, callbacks=[watch], limit_val_batches=0)
    trainer.fit(module, datamodule=data())
    for step, (before, after) in enumerate(zip(watch.states, watch.states[1:], strict=False)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        other, own = ("quality", "consistency") if SHORT.at(step).stage == 0 else ("consistency", "quality")
        assert not [name for name in moved if f".{other}." in name], f"step {step} moved the adapter of the other stage"
        assert any(f".{own}." in name for name in moved)
        assert any("widened" in name for name in moved)
        assert any(name.startswith("retrieval") for name in moved) == (own == "consistency")
    assert [name[:4] for name in watch.names] == ["clip", "clip", "stil", "stil", "clip", "clip", "stil", "stil"]
    now = dict(module.unet.network.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    assert all(parameter.requires_grad for parameter in lora.adapter_parameters(module.unet, "quality"))
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)  # a second fit begins anew
    trainer.fit(module, datamodule=data())
    assert trainer.callback_metrics["dloral/stage"] == 0


@pytest.mark.parametrize(("kind", "rests"), [("consistency", ["quality"]), ("detail", ["consistency", "retrieval"]), ("joint", [])])
def test_baselines_of_one_stage(kind, rests):
    module = tiny(FixedStage(kind, 1.0, 0.1, 0.01, 5.0))
    before = cloned_state(module)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data())
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert ("dloral/csd" in trainer.callback_metrics) == (kind != "consistency")
    for part in ("quality", "consistency", "retrieval"):
        assert any(part in name for name in moved) == (part not in rests)


@pytest.mark.parametrize("fusion", ["none", "per_frame"])
def test_other_fusions_leave_out_what_they_say(fusion):
    module = tiny(fusion=fusion).eval()
    current, previous = torch.randn(2, 1, 12, 4, 4)
    flow, cond = torch.zeros(1, 2, 4, 4), torch.zeros(1, dtype=torch.int64)
    found = module.restore(previous, current, flow, cond)
    aligned = current if fusion == "per_frame" else previous
    with torch.no_grad():
        wanted = current - module.unet(torch.cat([aligned, current], 1), cond)
    torch.testing.assert_close(found.latents, wanted)
    measured = module.restore(previous, current, flow, cond, measure=True)
    assert (measured.empty is None) == (fusion == "per_frame")
    tiny_trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data())


def test_the_teacher_is_the_frozen_network():
    network = StepUNetOf(0)
    module = tiny()
    for parameter in lora.adapter_parameters(module.unet, "quality"):
        nn.init.normal_(parameter)
    x, t, cond = torch.randn(2, 12, 4, 4), torch.tensor([3, 400]), torch.tensor([0, 1])
    torch.testing.assert_close(module.unet.teacher(x, t, cond), network(x, t, cond))


# ---- checkpoints, merging --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_trained_and_meets_its_own_base_alone(tmp_path):
    module = tiny()
    trainer = tiny_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or ".widened." in name or name.startswith("retrieval.") for name in saved)
    again = tiny(seed=0)
    tiny_trainer().validate(again, datamodule=data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert_state_dicts_equal(again.state_dict(), module.state_dict())
    with pytest.raises(ValueError, match="trained on another frozen model"):
        tiny_trainer().validate(tiny(seed=1), datamodule=data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    with pytest.raises(ValueError, match="has rank 2, and here it is 3"):
        tiny_trainer().validate(tiny(rank=3), datamodule=data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)


def test_merged_predictions_are_the_unmerged_ones_and_nothing_stays_merged():
    module = tiny(color_fix="adain")
    tiny_trainer(max_steps=3, limit_val_batches=0).fit(module, datamodule=data())
    found = tiny_trainer().predict(module, datamodule=data())
    assert all(layer.original is None for _, layer in lora.adapter_layers(module))
    made = data()
    made.setup("predict")
    with torch.no_grad():
        for index in (0, 1, 4):
            pair = made.predict_set[index]
            wanted, _ = module.restore_frame(pair["lq"][None, 0], pair["lq"][None, 1], {})
            torch.testing.assert_close(found[index]["image"], wanted, rtol=1e-4, atol=1e-5)
            assert found[index]["name"] == [pair["name"]]
    module.hparams["inference"] = "consistency"
    other = tiny_trainer().predict(module, datamodule=data())
    assert not torch.equal(other[1]["image"], found[1]["image"])


def test_tiles_and_odd_sizes_in_predict(tmp_path):
    module = tiny(tile=6, tile_overlap=2, output=tmp_path / "out", color_fix="none")
    frames = torch.rand(1, 2, 3, 18, 27) * 2 - 1
    tiny_trainer().predict(module, torch.utils.data.DataLoader([{"lq": frames[0], "name": "a/0"}, {"lq": frames[0], "name": "a/1"}]))
    assert [file.name for file in sorted((tmp_path / "out").rglob("*.png"))] == ["0.png", "1.png"]
    with pytest.raises(ValueError, match="outside output"):
        tiny_trainer().predict(module, torch.utils.data.DataLoader([{"lq": frames[0], "name": "../../x"}]))


@pytest.mark.parametrize("kill_at", [1, 2, 5])
def test_a_killed_run_ends_like_the_whole_one(kill_at, tmp_path):
    """At a switch, on an odd step, and where both data sets are in use."""

    def build():
        return tiny(), data(), [ExactResume()]

    whole, resumed = kill_and_resume(build, 7, kill_at, tmp_path, max_epochs=3, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def _fit_two(batch_size: int, devices: int) -> dict:
    module = tiny(color_fix="none")
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    tiny_trainer(max_steps=4, limit_val_batches=0, use_distributed_sampler=False, precision="64-true", **options).fit(
        module, datamodule=data(batch_size=batch_size)
    )
    return cloned_state(module)


def _fit_in_pair() -> dict:
    return _fit_two(1, 2)


def test_two_processes_end_like_one():
    first, second = run_two_processes(_fit_in_pair)
    assert_state_dicts_equal(second, first)
    assert_state_dicts_equal(first, _fit_two(2, 1), atol=1e-4, rtol=1e-3)  # in float64: the flow magnifies what is rounded


def test_half_precision_and_accumulation():
    module = tiny()
    trainer = tiny_trainer(max_steps=3, precision="bf16-mixed", accumulate_grad_batches=2, limit_val_batches=1)
    trainer.fit(module, datamodule=data())
    assert trainer.global_step == 3
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert trainer.callback_metrics["dloral/stage"] == 1


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


def test_bad_arguments_and_batches():
    with pytest.raises(ValueError, match="fusion is 'all'"):
        tiny(fusion="all")
    with pytest.raises(ValueError, match="csd_range"):
        tiny(csd_range=(500, 20))
    with pytest.raises(ValueError, match="timestep is 1000"):
        tiny(timestep=1000)
    with pytest.raises(ValueError, match="tile_overlap is 8 and tile 8"):
        tiny(tile=8, tile_overlap=8)
    with pytest.raises(ValueError, match="retrieval is for 4 channels, and the backbone's latents have 12"):
        DualLoRAVSRModule(SmallBackbone(), CrossFrameRetrieval(4, 1, 4))
    with pytest.raises(ValueError, match="takes 9 channels, and the autoencoder's latents have 12"):
        DualLoRAVSRModule(SmallBackbone(StepUNet(9)), CrossFrameRetrieval(12, 1, 4))
    with pytest.raises(ValueError, match="conv_in='first' is no convolution"):
        DualLoRAVSRModule(SmallBackbone(conv_in="first"), CrossFrameRetrieval(12, 1, 4))
    with pytest.raises(TypeError, match="without encode and decode"):
        SmallBackbone(autoencoder=nn.Identity())
    module = tiny()
    with pytest.raises(ValueError, match="got 9 channels: give latents of 12"):
        module.unet(torch.zeros(1, 9, 4, 4), torch.zeros(1, dtype=torch.int64))

    def fit(batch):
        tiny_trainer(max_steps=1).fit(tiny(), torch.utils.data.DataLoader([batch], batch_size=None))

    clip = torch.zeros(1, 3, 3, 8, 8)
    for batch, message in (
        ({"image": clip}, "no lq"),
        ({"lq": clip[:, :2], "gt": clip[:, :2]}, "of 3 frames or more"),
        ({"lq": clip[:, :, :1], "gt": clip[:, :, :1]}, r"give clips \(B, T, 3, H, W\)"),
        ({"lq": clip, "gt": clip[..., :4]}, "enlarge the degraded frames"),
        ({"lq": clip, "gt": clip, "prompt": ["a", "b"]}, "2 texts for 1 clips"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(batch)


# ---- the callback on modules that aren't ours ------------------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """A linear model with two adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        lora.add_adapters(self.layer, ["*"], {"consistency": 2, "quality": 2})

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


def plain_callback(**kwargs):
    given = {"consistency": ["*.consistency.*"], "detail": ["*.quality.*"], "schedule": StageSchedule(0, 1, 1, 1), **kwargs}
    return AlternatingLoRAStages(**given)


def test_the_callback_on_a_plain_module():
    module, watch = Plain(), Watch()
    watch.on_train_batch_end = lambda trainer, pl_module, *_: watch.states.append(cloned_state(pl_module))
    trainer = tiny_trainer(max_steps=4, callbacks=[plain_callback(), watch])
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in zip(watch.states, watch.states[1:], strict=False)]
    assert [any("consistency" in name for name in names) for names in moved] == [True, False, True, False]
    assert [any("quality" in name for name in names) for names in moved] == [False, True, False, True]
    assert all(parameter.requires_grad == ("base_layer" not in name) for name, parameter in module.named_parameters())


def test_the_callback_refuses_what_it_cant_work_with():
    loader = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)
    for callback, message in (
        (plain_callback(detail=["*.details.*"]), r"detail has '\*\.details\.\*', which matches no parameter of Plain"),
        (plain_callback(schedule=None), "Plain has no schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(max_steps=1, callbacks=[callback]).fit(Plain(), loader)
    with pytest.raises(ValueError, match=r"give a list of patterns, \['\*'\]"):
        plain_callback(detail="*")
    with pytest.raises(ValueError, match="both need patterns"):
        plain_callback(detail=[])
    module = Plain()
    module.configure_optimizers = lambda: torch.optim.SGD(lora.adapter_parameters(module, "quality"), lr=0.1)
    with pytest.raises(ValueError, match="4 of 8 parameters are in no optimiser"):
        tiny_trainer(max_steps=1, callbacks=[plain_callback()]).fit(module, loader)


# ---- the small base --------------------------------------------------------------------------------------------------------------------


def test_the_base_learns_and_its_checkpoint_is_read(tmp_path):
    module = OneStepPretraining(SmallBackbone(StepUNetOf(0)), learning_rate=1e-2)
    before = copy.deepcopy(module.backbone.network.state_dict())
    trainer = tiny_trainer(max_steps=3)
    trainer.fit(module, datamodule=data())
    assert not torch.equal(before["inp.weight"], module.backbone.network.inp.weight)
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    read = SmallBackbone(StepUNetOf(1), pretrained=tmp_path / "base.ckpt")
    assert_state_dicts_equal(read.network.state_dict(), module.backbone.network.state_dict())
    with pytest.raises(ValueError, match="of another architecture"):
        SmallBackbone(pretrained=tmp_path / "base.ckpt")
    assert trainer.predict(module, datamodule=data())[0]["video"].shape == (1, 2, 3, 16, 16)


def test_pixel_blocks_lose_nothing():
    images = torch.randn(2, 3, 6, 8)
    for factor in (1, 2):
        assert torch.equal(PixelBlocks(factor).decode(PixelBlocks(factor).encode(images)), images)
    assert SmallBackbone(autoencoder=PixelBlocks(1)).channels == 3
