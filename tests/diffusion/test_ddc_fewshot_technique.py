"""PhasicContentDiffusion and its parts: edges of the maths, what each stage trains, resume, processes, refusals, other people's modules."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import (
    CLIPImageFeatures,
    ContentFusionUNet,
    DigitConvFeatures,
    DirectionalCosine,
    DirectionalDistributionConsistency,
    GramStyle,
    PairwiseSimilarity,
    PhasicContentDiffusion,
    StructureGuidance,
    TranslationSampler,
    VGGMaps,
)
from lit_methods.callbacks import DirectionalConsistency
from lit_methods.datamodules import FewShotDigitsDataModule, TurnedPointsDataModule
from lit_methods.datamodules.generative.few_shot import turned_points
from lit_methods.diffusion.ddc_fewshot import core


class Maps(nn.Module):
    """Two layers of feature maps."""

    def __init__(self, channels=1):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.second = nn.Conv2d(channels, 3, 3), nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, images):
        first = self.first(images).relu()
        return [first, self.second(first).relu()]


SAMPLER = TranslationSampler(steps=3, source_steps=2, guidance=StructureGuidance(factor=2, style_rounds=2))


def made(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = ContentFusionUNet(1, 8, (1, 2), preconditioned=True)
    given = {"consistency": DirectionalDistributionConsistency(), "style": GramStyle(Maps()), "sampler": SAMPLER, "learning_rate": 1e-3}
    return PhasicContentDiffusion(network, **given | {"source_steps": 2, "fusion_steps": 2} | arguments)


def data(**arguments):
    return FewShotDigitsDataModule(**{"image_size": 8, "num_train": 24, "num_val": 4, "batch_size": 4, "val_batch_size": 2} | arguments)


def moved(before, after):
    """Names of what changed."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def fitted(module, steps, **arguments):
    trainer = tiny_trainer(**{"max_steps": steps, "limit_val_batches": 0} | arguments)
    trainer.fit(module, datamodule=data())
    return trainer


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_a_turn_is_nothing_to_likeness_of_pairs_and_something_to_ddc():
    source, turned, target = turned_points(8)
    free = turned.clone().requires_grad_()
    loss = core.pairwise_divergence(free, source).sum()
    assert loss.abs() < 1e-5
    assert torch.autograd.grad(loss, free)[0].abs().max() < 1e-5
    direction = core.domain_direction(source.mean(0), target.mean(0))
    torch.testing.assert_close(turned.mean(0), target.mean(0))
    assert core.ddc_distance(turned, source, direction).mean() > 0.1
    torch.testing.assert_close(core.ddc_distance(target, source, direction), torch.zeros(8), atol=1e-10, rtol=0)
    stretched = source + 3 * direction
    torch.testing.assert_close(core.cosine_distance(stretched, source, direction), torch.zeros(8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_samples_have_no_likeness_to_compare(count):
    free = torch.randn(count, 5, requires_grad=True)
    loss = core.pairwise_divergence(free, torch.randn(count, 5))
    assert loss.shape == (count,)
    loss.sum().backward()
    assert not free.grad.abs().sum()


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (5, 7)])
def test_low_frequencies_keep_a_plane_and_its_mean(size):
    flat = torch.full((1, 2, *size), 0.3, dtype=torch.float64)
    torch.testing.assert_close(core.lowpass(flat, 2), flat)
    torch.testing.assert_close(core.lowpass(flat, 1), flat)
    x = torch.randn(2, 3, *size)
    assert core.lowpass(x, 4).shape == x.shape
    assert core.lowpass(x, 4).var() < x.var()


def test_factors_of_paper_and_code():
    t = torch.tensor([0, 299, 300, 301, 899])
    code, paper = core.phasic_weights(t), core.paper_weights(t, power=2.0)
    assert (code.diffusion > 0).all()
    assert core.phasic_weights(torch.tensor([950])).diffusion < 0
    torch.testing.assert_close(code.adaptation[0], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(paper.diffusion, 1 - (t.double() / 1000) ** 2)
    torch.testing.assert_close(paper.adaptation[2], torch.tensor(0.5 * 0.09, dtype=torch.float64))
    assert paper.adaptation[0] < 1e-100


def test_the_last_step_has_neither_noise_nor_content():
    shares, seen = core.cosine_shares(), []

    def denoise(x, t, content):
        seen.append((int(t[0]), content is not None))
        return x

    drawn = []

    def draw(like):
        drawn.append(like.shape)
        return torch.zeros_like(like)

    core.ddim_from(denoise, torch.zeros(1, 1, 4, 4), core.sampling_times(600, 3), shares, draw, content=torch.zeros(1, 1, 4, 4))
    assert seen == [(599, True), (399, True), (199, False)]
    assert len(drawn) == 2
    assert core.posterior(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0]), shares).variance == 0


def test_diversity_is_that_inside_clusters():
    points = torch.tensor([[0.0], [2.0], [10.0], [16.0], [30.0]])
    nearest = torch.tensor([0, 0, 1, 1, 2])
    assert core.intra_cluster_distance(torch.cdist(points, points), nearest, 4) == 4  # mean of 2 and 6
    assert core.intra_cluster_distance(torch.zeros(1, 1), torch.tensor([0]), 1) == 0


def test_style_is_the_mean_over_the_targets():
    style, targets, images = GramStyle(Maps()), torch.randn(5, 1, 8, 8), torch.randn(3, 1, 8, 8)
    style.fit_samples([{"image": targets[:2]}, {"image": targets[2:]}], torch.device("cpu"))
    grams = [core.gram_matrix(layer) for layer in style.network.module(targets)]
    one_by_one = [core.gram_distance(style.grams(images), [layer[n : n + 1] for layer in grams]) for n in range(5)]
    torch.testing.assert_close(style(images), torch.stack(one_by_one).mean(0))


# ---- stages, resume, processes ---------------------------------------------------------------------------------------------------------


def test_each_stage_trains_its_own():
    states = {steps: (module := made(), fitted(module, steps))[0] for steps in (2, 4, 5, 6)}
    start = cloned_state(made().network)
    after = {steps: cloned_state(module.network) for steps, module in states.items()}
    fuse = {name for name in start if name.startswith("fuse.")}
    assert moved(start, after[2]) == set(start) - fuse
    assert moved(after[2], after[4]) == fuse
    assert moved(after[4], after[5]) >= fuse | {"inp.weight", "out.weight"}
    assert_state_dicts_equal(cloned_state(states[6].source), after[4])
    assert states[6].trainer.callback_metrics.keys() >= {"ddc/consistency", "ddc/style", "ddc/target_loss", "ddc/detail_loss", "ddc/weight"}
    assert "ddc/detail_loss" not in states[5].trainer.callback_metrics, "the first step has no pass on details"


def test_plain_fine_tuning_leaves_the_fusion_alone():
    module = made(consistency=None, style=None, weighting="none", source_steps=0, fusion_steps=0)
    start = cloned_state(module.network)
    fitted(module, 2)
    changed = moved(start, cloned_state(module.network))
    assert changed
    assert not any(name.startswith("fuse.") for name in changed)


@pytest.mark.parametrize("kill_at", [2, 4, 5])
def test_a_killed_run_ends_bit_equal_at_a_switch_and_between(kill_at, tmp_path):
    whole, resumed = kill_and_resume(lambda: (made(), data(), []), 7, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def test_a_second_fit_begins_anew_with_the_means_of_its_own_data():
    module = made()
    fitted(module, 5)
    first = module.consistency.mu_target.clone()
    tiny_trainer(max_steps=3, limit_val_batches=0).fit(module, datamodule=data(style="negative"))
    assert not torch.equal(first, module.consistency.mu_target)
    torch.testing.assert_close(first, -module.consistency.mu_target)


def in_processes(batch_size, **devices):
    module = made(source_steps=1, fusion_steps=1).double()
    trainer = tiny_trainer(max_steps=4, limit_val_batches=0, precision="64-true", **devices)
    module.consistency.fit(torch.zeros(2, 64), torch.ones(2, 64))  # the same bits in any number of processes
    trainer.fit(module, datamodule=data(batch_size=batch_size))
    found = DirectionalDistributionConsistency()
    found.fit_samples(*trainer.datamodule.banks().values())
    return cloned_state(module), found.direction


def in_one_of_two(batch_size):
    return in_processes(batch_size, devices=2, strategy="ddp")


def test_two_processes_train_like_one():
    (first, direction), (second, _) = run_two_processes(in_one_of_two, 2)
    assert_state_dicts_equal(first, second)
    alone, wanted = in_processes(4)
    torch.testing.assert_close(direction, wanted)
    assert_state_dicts_equal(first, alone, atol=1e-5)  # biases in front of norms have no gradient but rounding, which Adam enlarges
    start = {f"network.{name}": value.double() for name, value in made().network.state_dict().items()}
    assert moved(start, alone) == set(start)


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}],
    ids=str,
)
def test_precision_accumulation_and_clipping(settings):
    module = made(source_steps=1, fusion_steps=1)
    fitted(module, 4, **settings)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert module.consistency.mu_source.dtype == torch.float32, settings


def test_the_paper_s_weighting_and_clean_content_train():
    module = made(weighting="paper", content_noised=False, source_steps=0, fusion_steps=0, largest_step=1000)
    fitted(module, 3)
    assert module.trainer.callback_metrics["ddc/weight"] < 1


def test_means_of_any_width_come_back_from_a_checkpoint(tmp_path):
    ddc = DirectionalDistributionConsistency()
    ddc.fit(torch.randn(9, 5), torch.randn(3, 5))
    fresh = DirectionalDistributionConsistency()
    fresh.load_state_dict(ddc.state_dict())
    assert_state_dicts_equal(fresh.state_dict(), ddc.state_dict())
    np.save(tmp_path / "bank.npy", np.arange(6.0).reshape(3, 2))
    stored = DirectionalDistributionConsistency(source_bank=tmp_path / "bank.npy")
    stored.fit_samples([], [{"image": torch.ones(4, 2)}])
    torch.testing.assert_close(stored.direction, torch.tensor([[-1.0, -2.0]]))


# ---- translation -----------------------------------------------------------------------------------------------------------------------


def test_predictions_follow_from_the_seed_and_may_start_from_noise():
    module, given = made(), data()
    given.setup("predict")
    trainer = tiny_trainer()
    first, again = (trainer.predict(module, datamodule=given) for _ in range(2))
    assert {name: value.shape for name, value in first[0].items()} == {"source": (2, 1, 8, 8), "translation": (2, 1, 8, 8)}
    torch.testing.assert_close(first[1]["translation"], again[1]["translation"])
    drawn = trainer.predict(made(from_noise=True), datamodule=given)
    assert not torch.equal(drawn[0]["source"], first[0]["source"])


def test_evaluations_judge_and_show():
    module = made(judge=DigitConvFeatures("bold", steps=2))
    tiny_trainer().test(module, datamodule=data(), verbose=False)
    assert {"ddc/test_class_kept", "ddc/test_diversity", "ddc/test_error"} <= set(module.trainer.callback_metrics)
    assert module.dashboard_media()["ddc/translations"].pixels.shape == (3 * 9 + 1, 4 * 9 + 1, 3)


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made(largest_step=901), "give at most 900, or weighting='paper'"),
        (lambda: made(largest_step=300), "largest_step is 300"),
        (lambda: made(timesteps=500, largest_step=400), "start_step is 600, and timesteps 500"),
        (lambda: PhasicContentDiffusion(nn.Linear(2, 2)), "Linear has no encode"),
        (lambda: ContentFusionUNet(1, 12), "channels is 12: give a multiple of 8"),
        (lambda: StructureGuidance(factor=0), "factor is 0"),
        (lambda: TranslationSampler(eta=1.5), "eta is 1.5"),
        (lambda: DirectionalDistributionConsistency().direction, "fit\\(bank_a, bank_b\\)"),
        (lambda: DirectionalDistributionConsistency().fit(torch.zeros(3, 2), torch.zeros(0, 2)), "the target has no samples"),
        (lambda: DirectionalDistributionConsistency().fit(torch.zeros(3, 2), torch.zeros(2, 4)), "2 entries and target features 4"),
        (lambda: GramStyle(nn.Flatten()).grams(torch.zeros(1, 1, 4, 4)), "no list of feature maps"),
        (lambda: GramStyle(Maps()).fit_samples([], torch.device("cpu")), "the target has no images"),
        (lambda: PairwiseSimilarity(nn.Identity()).embed(torch.zeros(1, 1, 4, 4)), "one row of features"),
        (lambda: ContentFusionUNet(4, 8)(torch.zeros(1, 9, 8, 8), torch.tensor([0])), "images have 9 channels"),
        (lambda: ContentFusionUNet(1, 8)(torch.zeros(1, 1, 12, 8), torch.tensor([0])), "multiples of 8"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_data_without_banks_or_keys_are_refused_before_the_first_step():
    batch = {"source": torch.zeros(2, 1, 8, 8), "target": torch.zeros(2, 1, 8, 8), "detail": torch.zeros(2, 1, 8, 8)}
    loader = DataLoader([batch], batch_size=None)
    with pytest.raises(ValueError, match=r"DirectionalDistributionConsistency and GramStyle must see all images .* no datamodule"):
        tiny_trainer(max_steps=1).fit(made(), loader)
    module = made(consistency=None, style=None)
    with pytest.raises(ValueError, match="no target and no detail"):
        tiny_trainer(max_steps=1).fit(module, DataLoader([{"source": batch["source"]}], batch_size=None))
    tiny_trainer(max_steps=1, limit_val_batches=0).fit(module, loader)


def test_features_of_files_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="give torchvision's VGG-16"):
        VGGMaps(tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"lacks features\.0"):
        VGGMaps(tmp_path / "vgg.pth")
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    with pytest.raises(ValueError, match="expected features"):
        DirectionalCosine(target_bank=tmp_path / "empty.npy")
    with pytest.raises(ValueError, match="give the folder of a CLIP model"):
        CLIPImageFeatures(str(tmp_path / "clip"))


def test_clip_passes_gradients_to_the_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"patch_size": 8, "image_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, projection_dim=6)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    ddc = DirectionalDistributionConsistency(CLIPImageFeatures(str(tmp_path)))
    images = torch.rand(2, 1, 12, 12, requires_grad=True)
    assert ddc.embed(images).shape == (2, 6)
    ddc.embed(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not list(ddc.parameters()), "the network is frozen, and not registered"


# ---- the callback, on modules that aren't ours -----------------------------------------------------------------------------------------


class Translator(pl.LightningModule):
    """Somebody's generator of images."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch["source"]).mean() - batch["target"].mean()).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tuples(Translator):
    """Another's, whose batches are tuples, and who calls the generator twice."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean() + self.net(-batch[0]).mean()


def term(consistency=None, **arguments):
    given = DirectionalDistributionConsistency() if consistency is None else consistency
    return DirectionalConsistency(**{"generator": "net", "consistency": given} | arguments)


@pytest.mark.parametrize("kind", [DirectionalDistributionConsistency, DirectionalCosine, PairwiseSimilarity])
def test_the_term_trains_another_module_and_leaves_it_clean(kind):
    alone, with_it = Translator(), Translator()
    for module, callbacks in ((alone, []), (with_it, [term(kind())])):
        tiny_trainer(max_steps=3, limit_val_batches=0, callbacks=callbacks).fit(module, datamodule=data())
    assert with_it.trainer.callback_metrics["directional_consistency/loss"] > 0
    assert moved(cloned_state(alone), cloned_state(with_it))
    known = kind()
    if known.needs_banks:
        known.fit(torch.zeros(2, 64), torch.ones(2, 64))
    loader = DataLoader([{"source": torch.randn(3, 1, 8, 8), "target": torch.zeros(3, 1, 8, 8)}], batch_size=None)
    assert not left_behind(Translator, term(known), loader)


def test_the_term_takes_tuples_and_several_calls():
    known = DirectionalDistributionConsistency()
    known.fit(torch.zeros(2, 64), torch.ones(2, 64))
    module, images = Tuples(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        made_of = [known(known.embed(copy.deepcopy(module).net(x)), known.embed(images)).mean() for x in (images, -images)]
    tiny_trainer(max_steps=1, callbacks=[term(known)]).fit(module, DataLoader([(images, images)], batch_size=None))
    torch.testing.assert_close(module.trainer.callback_metrics["directional_consistency/loss"], torch.stack(made_of).mean())


def test_a_killed_run_with_the_term_ends_bit_equal(tmp_path):
    whole, resumed = kill_and_resume(lambda: (Translator(), data(), [term()]), 4, 2, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def test_the_term_refuses_what_it_can_t_compare():
    known = DirectionalDistributionConsistency()
    known.fit(torch.zeros(2, 64), torch.ones(2, 64))
    loader = DataLoader([{"source": torch.randn(3, 1, 8, 8), "target": torch.zeros(3, 1, 8, 8)}], batch_size=None)
    with pytest.raises(ValueError, match="no 'picture'"):
        tiny_trainer(max_steps=1, callbacks=[term(known, source="picture")]).fit(Translator(), loader)
    with pytest.raises(ValueError, match="must see all images of both domains"):
        tiny_trainer(max_steps=1, callbacks=[term()]).fit(Translator(), loader)
    with pytest.raises(ValueError, match="weight is -1"):
        term(weight=-1.0)


def test_points_go_back_with_ddc_and_stay_turned_with_pairs():
    from lit_methods import FreePoints

    errors = {}
    for kind in (DirectionalDistributionConsistency, PairwiseSimilarity):
        trainer = tiny_trainer(max_steps=60, callbacks=[DirectionalConsistency("generator", kind())])
        module = FreePoints()
        trainer.fit(module, datamodule=TurnedPointsDataModule(steps=60))
        errors[kind.__name__] = float(trainer.callback_metrics["points/val_error"])
    assert errors["DirectionalDistributionConsistency"] < 0.01
    assert errors["PairwiseSimilarity"] > 0.5
