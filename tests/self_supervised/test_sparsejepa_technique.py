"""I-JEPA and SparseJEPA: masks, order of the blocks, target encoder, sparse maps, refusals, runs."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import IJEPA, SparseJEPA, ViTEncoder
from lit_methods.callbacks import ExactResume, GroupSparsity
from lit_methods.datamodules import DigitsDataModule
from lit_methods.self_supervised.jepa import jepa_targets, repeat_per_context, take_patches
from lit_methods.self_supervised.masks import block_size, draw_block_masks, first_patches
from lit_methods.self_supervised.sparsejepa.core import group_maps, kl_to_standard_normal, multi_information, sparse_terms


def encoder(**kwargs):
    torch.manual_seed(0)
    return ViTEncoder(**{"image_size": 8, "patch_size": 1, "channels": 1, "width": 8, "depth": 1, "heads": 2} | kwargs)


def module(kind=SparseJEPA, **kwargs):
    small = {"predictor_width": 8, "predictor_depth": 1, "min_keep": 4, "warmup_epochs": 0, "learning_rate": 1e-2, "momentum": 0.9}
    sparse = {"groups": 2, "latents": 3, "map_width": 2, "sparsity": 20.0} if kind is SparseJEPA else {}
    return kind(encoder(), **small | sparse | kwargs)


def digits(batch_size=6):
    return DigitsDataModule(num_train=36, batch_size=batch_size)


def fit(model, data=None, **kwargs):
    trainer = tiny_trainer(**{"max_steps": 3, "limit_val_batches": 0} | kwargs)
    trainer.fit(model, data or digits())
    return trainer


def generators(seed=0):
    return [torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)]


# ---- masks -----------------------------------------------------------------------------------------------------------------------------


def as_grids(masks, rows, columns):
    grids = torch.zeros(*masks.shape[:-1], rows * columns, dtype=torch.bool).scatter_(-1, masks, True)
    return grids.unflatten(-1, (rows, columns))


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_targets_are_blocks_of_one_size_and_contexts_leave_them_out(grid):
    shapes = set()
    for seed in range(20):
        context, targets = draw_block_masks(5, grid, *generators(seed), min_keep=4)
        assert context.shape[:2] == (1, 5)
        assert targets.shape[:2] == (4, 5)
        blocks = as_grids(targets, *grid)
        heights, widths = blocks.any(-1).sum(-1), blocks.any(-2).sum(-1)
        assert len(heights.unique()) == len(widths.unique()) == 1
        assert (heights * widths == targets.shape[2]).all(), "each is a full block"
        assert not (as_grids(context, *grid) & blocks.any(0)).any()
        assert context.shape[2] > 4
        shapes.add((int(heights[0, 0]), int(widths[0, 0])))
    assert len(shapes) > 1, "sizes are drawn"
    assert not torch.equal(targets[:, 0], targets[:, 1]), "each image has places of its own"


def test_a_context_that_targets_would_leave_too_little_of_overlaps_with_the_last_of_them():
    options = {"target_scale": (0.5, 0.5), "target_aspect": (1.0, 1.0), "context_scale": (0.9, 0.9), "target_blocks": 2}
    for seed in range(10):
        context, targets = draw_block_masks(4, (6, 6), *generators(seed), min_keep=8, **options)
        assert context.shape[2] > 8
        first = as_grids(targets, 6, 6)[0]
        # a 5 x 5 context always keeps 9 of its patches beside one 4 x 4 block
        assert not (as_grids(context, 6, 6)[0] & first).any()
    alone, _ = draw_block_masks(4, (6, 6), *generators(), min_keep=24, **options)
    assert alone.shape[2] == 25, "beside no block it is whole"


def test_masks_are_cut_to_the_shortest():
    masks = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]).bool()
    assert first_patches(masks).tolist() == [[1, 2], [0, 3]]


def test_a_block_is_smaller_than_the_grid():
    assert block_size((4, 4), (1.0, 1.0), (1.0, 1.0), 0.5, 0.5) == (3, 3)
    assert block_size((2, 9), (0.9, 0.9), (0.5, 0.5), 0.0, 0.0) == (1, 6)


# ---- order -----------------------------------------------------------------------------------------------------------------------------


def test_blocks_come_mask_after_mask_and_as_often_as_there_are_contexts():
    features, masks = torch.arange(2 * 5).view(2, 5, 1).float(), torch.tensor([[[0, 1], [2, 3]], [[3, 4], [0, 4]]])
    taken = take_patches(features, masks)[..., 0].tolist()
    assert taken == [[0, 1], [7, 8], [3, 4], [5, 9]]
    assert repeat_per_context(torch.tensor([1, 2, 3, 4]), 2, 3).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    with pytest.raises(ValueError, match=r"masks are \(2, 2, 2\), expected \(number, 3, patches\)"):
        take_patches(torch.zeros(3, 5, 1), masks)


def test_targets_are_normalised_over_features_and_give_no_gradient():
    features = (3 * torch.randn(2, 6, 4) + 1).requires_grad_()
    targets = jepa_targets(features, torch.tensor([[[0, 5], [1, 2]]]))
    assert not targets.requires_grad
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.std(-1, correction=0), torch.ones(2, 2), atol=1e-3, rtol=0)


def test_an_encoder_that_sees_all_patches_in_order_gives_what_it_gives_without_masks():
    model, images = encoder(), torch.randn(3, 1, 8, 8)
    everything = torch.arange(64).expand(1, 3, 64)
    torch.testing.assert_close(model(images, everything), model(images))
    some = torch.tensor([[[0, 9, 20]] * 3])
    changed = images.clone()
    changed[:, :, 7, 7] += 5
    assert torch.equal(model(images, some), model(changed, some)), "what is hidden isn't seen"
    with pytest.raises(ValueError, match="expected 8 x 8: set image_size"):
        model(torch.zeros(1, 1, 9, 9))


# ---- the sparse module -----------------------------------------------------------------------------------------------------------------


def test_kl_and_maps_equal_torch():
    mean, std = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_to_standard_normal(mean, std), expected)
    maps = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(group_maps(mean, maps), torch.stack([mean @ w for w in maps], dim=1))
    terms = sparse_terms(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 1))
    assert (float(terms.reconstruction), float(terms.kl)) == (3.0, 0.0)


def test_multi_information_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    rho = 0.8
    pair = torch.stack([x[:, 0], rho * x[:, 0] + (1 - rho**2) ** 0.5 * x[:, 1]], dim=1)
    torch.testing.assert_close(
        multi_information(pair), torch.tensor(-0.5, dtype=torch.float64) * torch.tensor(1 - rho**2).log(), atol=5e-3, rtol=0
    )
    assert multi_information(x) < 1e-3
    assert multi_information(torch.cat([pair, torch.ones(len(x), 1)], dim=1)) == pytest.approx(float(multi_information(pair)))
    assert multi_information(pair[:, :1].expand(-1, 2)) == float("inf") or multi_information(pair[:, :1].expand(-1, 2)) > 10
    with pytest.raises(ValueError, match="samples >= 2"):
        multi_information(x[:1])


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_target_encoder_follows_after_each_optimiser_step(accumulate):
    class Watch(pl.Callback):
        students, targets = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.students.append(cloned_state(pl_module.encoder))
            self.targets.append(cloned_state(pl_module.target_encoder))

    watch = Watch()
    watch.students, watch.targets = [], []
    model = module(IJEPA)
    average = cloned_state(model.encoder)
    assert_state_dicts_equal(average, cloned_state(model.target_encoder))
    fit(model, max_steps=3, accumulate_grad_batches=accumulate, callbacks=[watch])
    for place, targets in enumerate(watch.targets):
        if (place + 1) % accumulate == 0:
            m = 0.9 + 0.1 * (place // accumulate) / 3
            average = {name: m * value + (1 - m) * watch.students[place][name] for name, value in average.items()}
        assert_state_dicts_equal(targets, average, atol=1e-6)
    assert not model.target_encoder.training
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())


def test_weight_decay_rises_and_leaves_biases_norms_and_maps_alone():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])

    model = module()
    trainer = fit(model, callbacks=[Watch()])
    assert [bare for _, bare in seen] == [0.0] * 3
    assert 0.04 < seen[0][0] < seen[1][0] < seen[2][0] == pytest.approx(0.4)
    bare = {id(parameter) for parameter in trainer.optimizers[0].param_groups[1]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in bare}
    assert {"sparse.maps.weight", "encoder.norm.weight", "sparse.out_bias", "encoder.patch_embed.proj.bias"} <= names
    assert not {"predictor.mask_token", "encoder.patch_embed.proj.weight", "sparse.out_weight"} & names


def test_with_lambda_columns_become_exactly_zero_and_without_none():
    shares = {sparsity: fit(module(sparsity=sparsity), max_steps=6).callback_metrics for sparsity in (0.0, 200.0)}
    assert float(shares[0.0].get("sparsejepa/zero_groups", 0)) == 0
    model = module(sparsity=200.0)
    fit(model, max_steps=6)
    norms = model.sparse.maps.weight.norm(dim=-1)
    assert (norms == 0).any()
    assert model.dashboard_media()["sparsejepa/maps"].pixels.shape == (32, 48, 3)


def test_the_sparse_terms_reach_the_encoder_and_not_the_target():
    with_terms, without = module(sparsity=0.0, momentum=1.0), module(sparsity=0.0, momentum=1.0, sparse_weight=0.0)
    start = cloned_state(with_terms.target_encoder)
    fit(with_terms)
    fit(without)
    assert not torch.equal(with_terms.encoder.norm.weight, without.encoder.norm.weight)
    assert_state_dicts_equal(cloned_state(with_terms.target_encoder), start)


@pytest.mark.parametrize("embedding", ["mean", "tokens"])
def test_either_embedding_trains_and_measures(embedding):
    trainer = fit(module(embedding=embedding), max_steps=6, limit_val_batches=2)
    figures = trainer.callback_metrics
    assert all(figures[name].isfinite() for name in ("jepa/val_loss", "sparsejepa/val_multi_information", "sparsejepa/kl"))
    samples = trainer.predict(trainer.lightning_module, DataLoader([{"image": torch.zeros(1, 8, 8)}] * 3, batch_size=3))
    assert samples[0]["feature"].shape == (3, 8)
    assert samples[0]["latent"].shape == (3, 3)


@pytest.mark.parametrize("kind", [IJEPA, SparseJEPA])
def test_a_killed_run_ends_like_an_uninterrupted_one(kind, tmp_path):
    whole, resumed = kill_and_resume(lambda: (module(kind), digits(), [ExactResume()]), 8, 5, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def two(devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = module(sparsity=50.0)
    trainer = fit(model, max_steps=3 * 2, max_epochs=2, limit_val_batches=1.0, **kwargs)
    return cloned_state(model), {name: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}


def test_two_processes_agree():
    torch.set_num_threads(1)
    (one, figures), (other, other_figures) = run_two_processes(two, 2)
    assert_state_dicts_equal(one, other)
    assert figures == other_figures
    assert set(figures) == {"jepa/val_loss", "sparsejepa/val_multi_information"}
    assert (one["sparse.maps.weight"].norm(dim=-1) == 0).any()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(precision):
    model = module(sparsity=200.0)
    trainer = fit(model, precision=precision, max_steps=6)
    assert trainer.callback_metrics["jepa/loss"].dtype == torch.float32
    assert trainer.callback_metrics["jepa/loss"].isfinite()
    assert (model.sparse.maps.weight.norm(dim=-1) == 0).any()


def test_a_second_fit_begins_its_schedules_anew():
    model = module()
    fit(model)
    trainer = fit(model, max_steps=5)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(0.4)
    assert sum(isinstance(callback, GroupSparsity) for callback in trainer.callbacks) == 1


def test_a_group_lasso_of_the_users_goes_together_with_the_modules_own():
    figures = fit(module(), callbacks=[GroupSparsity(["predictor.predictor_embed"], weight=1e3)], log_every_n_steps=1).callback_metrics
    assert float(figures["group_sparsity/zero_groups"]) == 1
    assert float(figures["sparsejepa/zero_groups"]) < 1


def test_masks_follow_from_the_seed_and_the_step_alone():
    model, other = module(), module(seed=1)
    torch.rand(3)
    a, b = model.draw_masks(4, "step 3 batch 3"), module().draw_masks(4, "step 3 batch 3")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[1], model.draw_masks(4, "step 4 batch 4")[1][..., : a[1].shape[2]]) or a[0].shape != b[0].shape
    drawn = [[one.draw_masks(4, f"step {step}")[1].shape[2] for step in range(12)] for one in (model, other)]
    assert drawn[0] != drawn[1]


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"groups": 3}, "groups=3 must divide the encoder's width=8"),
        ({"mode": "soft"}, "mode"),
        ({"embedding": "class"}, "embedding"),
        ({"distance": "l1"}, "distance"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"sparsity": -1.0}, "sparsity is -1.0"),
        ({"latents": 0}, "latents is 0"),
        ({"target_scale": (0.0, 0.2)}, r"target_scale\[0\] is 0.0"),
        ({"min_keep": 60}, "more than min_keep=60"),
        ({"target_scale": (0.001, 0.001)}, "expected at least 1"),
        ({"predictor_width": 6}, "predictor_width=6 with predictor_heads=2|multiple of 4"),
    ],
)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        module(**wrong)


def test_an_encoder_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="encoder is a Linear without grid and width: expected an encoder of patches"):
        IJEPA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="image_size=10 with patch_size=3"):
        ViTEncoder(image_size=10, patch_size=3, width=8, heads=2)


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="the schedule of I-JEPA needs an end"):
        fit(module(IJEPA), max_steps=-1, max_epochs=-1)
