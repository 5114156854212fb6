"""CAST and AdamS: the maths against independent computations, and the callback on modules that aren't ours."""

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos import Transformer
from torch import nn

from helpers import (
    Classifier,
    Images,
    KillAt,
    Killed,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import CAST, AdamS, DynamicSparsity, EMATeacher, NMSparsity, SparsityReport
from lit_methods.callbacks.sparsity.cast import adams, core
from lit_methods.callbacks.sparsity.masks import is_nm, nm_mask
from lit_methods.datamodules.loaders import make_loader

LINEAR = ["network.5"]  # (8, 144) of helpers.small_network


def with_adam(module, lr=1e-2, schedule=True, **settings):
    """The module with AdamW and a cosine."""

    def configure_optimizers():
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, **settings)
        if not schedule:
            return optimizer
        inner = torch.optim.lr_scheduler
        parts = [inner.ConstantLR(optimizer, 1.0), inner.CosineAnnealingLR(optimizer, 10)]
        scheduler = inner.SequentialLR(optimizer, parts, milestones=[2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module.configure_optimizers = configure_optimizers
    return module


def plain(width=16, schedule=False):
    """Without dropout and batch norm, so that batches can be split; the same weights on every call."""
    torch.manual_seed(2)
    layers = [nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    return with_adam(Classifier(nn.Sequential(*layers)), schedule=schedule)


def loader(batch_size=4):
    return torch.utils.data.DataLoader(Images(), batch_size=batch_size)


def ours(**kwargs):
    return CAST(**({"n": 1, "m": 4, "targets": LINEAR, "l1_decay": 0.05, "mask_interval": 3, "probe_interval": 0} | kwargs))


def fit(callbacks, module=None, steps=6, **kwargs):
    module = module or with_adam(Classifier())
    trainer = tiny_trainer(**{"max_steps": steps, "callbacks": callbacks, "log_every_n_steps": 1, **kwargs})
    trainer.fit(module, loader())
    return trainer, module


def traces(module):
    """What could stay behind; Lightning itself leaves ``_hparams`` on the root."""
    return {name: found for name, found in fingerprint(module).items() if name}


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def reference_adams(weight, grads, mask, lr, total, decay, betas=(0.9, 0.999), eps=1e-8, rule="adams"):
    """Entry by entry in Python floats, from Algorithm 1 and AST's update."""
    rows = []
    for index, start in enumerate(weight.tolist()):
        theta, mu, v = start, 0.0, 0.0
        for t, grad in enumerate(grads):
            alpha = t / total
            mu = betas[0] * mu + (1 - betas[0]) * float(grad[index])
            direction = mu
            if not mask[index]:
                sign = (theta > 0) - (theta < 0)
                direction = (1 - alpha) * mu + alpha * decay * sign if rule == "adams" else mu + decay * alpha * theta
            v = betas[1] * v + (1 - betas[1]) * direction**2
            theta -= lr * (direction / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))) ** 0.5 + eps)
        rows.append(theta)
    return torch.tensor(rows, dtype=weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["adams", "ast"])
def test_the_optimiser_is_algorithm_1_entry_by_entry(dtype, rule):
    torch.manual_seed(0)
    start, grads = torch.randn(8, dtype=dtype), torch.randn(7, 8, dtype=dtype)
    start[3] = 0.0  # sign(0) = 0
    mask = torch.tensor([True, False] * 4)
    weight = nn.Parameter(start.clone())
    optimizer = AdamS([weight], lr=0.1, l1_decay=0.3, total_steps=10, ramp_steps=10, rule=rule, sparse=[weight])
    optimizer.set_masks({weight: mask})
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    expected = reference_adams(start, grads, mask, 0.1, 10, 0.3, rule=rule)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_kept_weights_alone_and_dense_weights_are_adam():
    """Kept weights differ from Adam in the second moment, dense ones don't at all."""
    torch.manual_seed(0)
    start, grads = torch.randn(4, 4), torch.randn(5, 4, 4)
    ends = {}
    for name in ("adam", "dense", "sparse"):
        weight = nn.Parameter(start.clone())
        if name == "adam":
            optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
        else:
            optimizer = AdamS([weight], lr=0.1, weight_decay=0.1, total_steps=5, sparse=[weight] if name == "sparse" else [])
        if name == "sparse":
            optimizer.set_masks({weight: torch.ones(4, 4, dtype=torch.bool)})
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        ends[name] = weight.detach()
    torch.testing.assert_close(ends["dense"], ends["adam"])
    assert (ends["sparse"] - ends["adam"]).abs().max() > 1e-2, "v comes from the momentum, not from the gradient"


def test_a_sparse_weight_without_an_aligned_mask_raises():
    weight = nn.Parameter(torch.randn(2, 4))
    weight.grad = torch.ones(2, 4)
    optimizer = AdamS([weight], total_steps=5, sparse=[weight])
    with pytest.raises(RuntimeError, match="no aligned mask"):
        optimizer.step()
    for wrong in (torch.ones(4, 2, dtype=torch.bool), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="bool tensor of the same shape"):
            optimizer.set_masks({weight: wrong})
    optimizer.set_masks({weight: nm_mask(weight, 1, 4)})
    weight.data, weight.grad = torch.randn(4, 4), torch.ones(4, 4)  # the weight changed behind its back
    with pytest.raises(RuntimeError, match="no aligned mask"):
        optimizer.step()
    with pytest.raises(ValueError, match="among the sparse ones"):
        optimizer.set_masks({nn.Parameter(torch.ones(2)): torch.ones(2, dtype=torch.bool)})


def test_what_the_optimiser_refuses():
    half = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="needs float32"):
        AdamS([half], sparse=[half])
    weight = nn.Parameter(torch.ones(2, 4))
    with pytest.raises(ValueError, match="in none of the groups"):
        AdamS([weight], sparse=[nn.Parameter(torch.ones(1))])
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"total_steps": 0}, {"rule": "adam"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdamS([weight], **wrong)
    for old in (torch.optim.Adam([weight], weight_decay=0.1), torch.optim.AdamW([weight], amsgrad=True)):
        with pytest.raises(ValueError, match="can't replace"):
            AdamS.from_adam(old)
    endless = AdamS([weight], sparse=[weight])
    endless.set_masks({weight: nm_mask(weight, 1, 4)})
    weight.grad = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="total_steps"):
        endless.step()
    with pytest.raises(ValueError, match="was 7 and is 9"):
        AdamS([weight], total_steps=9).load_state_dict(AdamS([weight], total_steps=7).state_dict())


def test_many_weights_are_updated_in_parts_of_a_bounded_size(monkeypatch):
    def train():
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(2, 4)) for _ in range(5)]
        optimizer = AdamS(weights, lr=0.1, total_steps=3, l1_decay=0.1, sparse=weights[:4])
        optimizer.set_masks({weight: nm_mask(weight, 1, 4) for weight in weights[:4]})
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(2, 4)
            optimizer.step()
        return torch.stack(weights).detach()

    whole = train()
    for size in (16, 3):
        monkeypatch.setattr(adams, "_AT_ONCE", {"cpu": size})
        assert torch.equal(train(), whole)
    monkeypatch.setattr(adams, "_AT_ONCE", {"cpu": 16})
    small, large, across = (torch.ones(2, 4),), (torch.ones(20),), (torch.ones(5, 4), torch.ones(4, 5).T)
    assert [len(part) for part in adams._chunks([small] * 5)] == [2, 2, 1]
    assert [[piece[0].numel() for piece in part] for part in adams._chunks([large, (torch.ones(1),)])] == [[16], [4, 1]]
    assert [[piece[0].numel() for piece in part] for part in adams._chunks([across, small])] == [[20], [8]], "not in one piece: not cut"
    monkeypatch.setattr(adams, "_AT_ONCE", {})
    assert len(adams._chunks([large] * 3)) == 1, "devices that profit from much at once"


def test_the_decay_starts_at_zero_and_its_budget_adds_up():
    weight = nn.Parameter(torch.randn(2, 4))
    optimizer = AdamS([weight], lr=0.5, total_steps=4, sparse=[weight])
    optimizer.set_masks({weight: nm_mask(weight, 1, 4)})
    seen = []
    for _ in range(5):
        weight.grad = torch.randn(2, 4)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["alpha"])
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert optimizer.param_groups[0]["decay_budget"] == pytest.approx(0.5 * 2.5)
    assert adams.decay_share(9, 4) == 1.0


def test_a_large_decay_moves_masked_weights_by_the_learning_rate():
    """Where the decay rules, the displacement per step saturates near lr, whatever lambda is."""
    moved = []
    for decay in (10.0, 1000.0):
        weight = nn.Parameter(torch.full((1, 4), 5.0))
        optimizer = AdamS([weight], lr=0.01, total_steps=1, l1_decay=decay, betas=(0.0, 0.0), sparse=[weight])
        optimizer.set_masks({weight: torch.tensor([[True, False, False, False]])})
        for _ in range(11):
            weight.grad = torch.zeros(1, 4)
            optimizer.step()
        moved.append(5.0 - weight.detach()[0])
    torch.testing.assert_close(moved[0], torch.tensor([0.0, 0.1, 0.1, 0.1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "dim"), [((4, 8), 1), ((8, 4), 0), ((4, 8, 3, 3), 1), ((8, 4, 2, 2), 0)])
def test_scales_belong_to_contiguous_blocks_of_inputs(shape, dim):
    torch.manual_seed(0)
    weight, scale = torch.randn(shape), torch.randn(4, 2)
    scaled = core.scaled_weight(weight, scale, dim)
    for row in range(4):
        for column in range(8):
            place = (row, column) if dim == 1 else (column, row)
            torch.testing.assert_close(scaled[place], weight[place] * scale[row, column // 4])
    mask = nm_mask(weight, 1, 4, dim)
    final = core.finalized_weight(weight, mask, scale, dim)
    assert torch.equal(final != 0, mask)
    torch.testing.assert_close(final[mask], scaled[mask])


def test_the_branch_starts_at_the_mean_of_what_is_removed():
    weight = torch.tensor([[1.0, 5.0, 3.0, 9.0], [4.0, 4.0, 8.0, 2.0]])
    mask = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert core.pruned_block_means(weight, mask, 2).tolist() == [[1.0, 3.0], [0.0, 5.0]]
    assert torch.equal(core.pruned_block_means(weight.T, mask.T, 2, dim=0), core.pruned_block_means(weight, mask, 2))


def test_kl_is_the_sum_over_classes_and_tokens_that_do_not_count_are_left_out_of_both_parts():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    targets = torch.tensor([[0, 1, -100], [4, -100, 2]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    counted = targets != -100
    kl = 4 * (p * (p / q).log()).sum(-1)[counted].mean()
    ce = -student.log_softmax(-1)[counted][torch.arange(4), targets[counted]].mean()
    found = core.distillation_loss(student, teacher, targets, 0.25, temperature=2.0)
    torch.testing.assert_close(torch.stack(found), torch.stack([0.25 * kl + 0.75 * ce, kl, ce]))
    torch.testing.assert_close(core.distillation_loss(student, teacher, targets, 0.25, 2.0, squared=False)[1], kl / 4)
    assert [float(x) for x in core.distillation_loss(student, teacher, torch.full((2, 3), -100))] == [0, 0, 0]


def test_kl_survives_large_logits_removed_classes_and_autocast():
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True), torch.tensor([[0.0, 1e4, -torch.inf]])
    kl = core.kl_to_teacher(student, teacher)
    assert float(kl) == pytest.approx(1e4)
    assert torch.autograd.grad(kl, student)[0].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert core.kl_to_teacher(torch.randn(2, 3).bfloat16(), torch.randn(2, 3)).dtype == torch.float32


def test_statistics_and_refresh_steps():
    weight = torch.tensor([[1.0, -3.0, 5e-5, 0.0], [2.0, 0.5, -4.0, 0.1]])
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    found = {name: float(value) for name, value in core.magnitude_statistics([weight], [mask]).items()}
    expected = (5e-5 + 0.6) / 4
    assert found == pytest.approx(
        {"masked_magnitude": expected, "kept_magnitude": 2.5, "magnitude_ratio": expected / 2.5, "masked_below_1e-4": 0.5}
    )
    assert [step for step in range(9) if core.is_refresh_step(step, 4)] == [0, 4, 8]


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "adam"}, {"scale_groups": 0}, {"distill_weight": 0.0}, {"recipe": "ast"}, {"recipe": "naive"}, {"temperature": 2.0}],
    ids=str,
)
def test_every_arm_ends_exactly_nm_in_an_ordinary_module(options):
    module = with_adam(Classifier())
    before, names = traces(module), list(module.state_dict())
    fit([ours(**options)], module)
    assert traces(module) == before
    assert list(module.state_dict()) == names, "the weight stands where it stood"
    weight = module.network[5].weight
    assert (weight.detach() != 0).view(8, 36, 4).sum(-1).eq(1).all()
    assert not is_nm(module.network[7].weight, 1, 4), "other layers stay dense"


def test_training_is_a_plain_loop():
    """An independent loop of the whole of CAST, with the optimiser that the tests above compare with Algorithm 1."""
    module = plain()
    callback = CAST(1, 4, targets=["network.3"], l1_decay=0.05, mask_interval=2, probe_interval=0, distill_weight=0.25)
    fit([callback], module, steps=5)

    other, teacher = plain(), plain()
    net, layer = other.network, other.network[3]
    scale, bias = nn.Parameter(torch.ones(16, 2)), layer.bias
    latent = nn.Parameter(layer.weight.detach().clone())
    rest = [p for p in net.parameters() if p is not layer.weight]
    optimizer = AdamS([*rest, latent, scale], lr=1e-2, l1_decay=0.05, total_steps=5, sparse=[latent])
    for step, (images, labels) in enumerate(loader()):
        if step == 5:
            break
        if step % 2 == 0:
            mask = nm_mask(latent, 1, 4)
            optimizer.set_masks({latent: mask})
        hidden = net[2](net[1](images.flatten(1)))
        shaped = latent * torch.cat([scale[:, :1].expand(-1, 8), scale[:, 1:].expand(-1, 8)], dim=1)
        logits = net[5](net[4](nn.functional.linear(hidden, shaped, bias)))
        with torch.no_grad():
            target = teacher.network(images).softmax(-1)
        kl = nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        optimizer.zero_grad()
        (0.25 * kl + 0.75 * nn.functional.cross_entropy(logits, labels)).backward()
        optimizer.step()
    final = latent * mask * torch.cat([scale[:, :1].expand(-1, 8), scale[:, 1:].expand(-1, 8)], dim=1)
    torch.testing.assert_close(module.network[3].weight.detach(), final.detach())
    torch.testing.assert_close(module.network[5].weight.detach(), net[5].weight.detach())
    assert torch.equal(callback.store.masks["network.3.weight"], mask), "the last refresh was at step 4, and finalising makes no new one"


def test_only_the_decay_makes_the_prune_free():
    def gap(decay):
        callback = ours(l1_decay=decay, distill_weight=0.0, probe_interval=59)
        torch.manual_seed(0)
        trainer, _ = fit([callback], with_adam(Classifier(), schedule=False), steps=60)
        metrics = trainer.callback_metrics
        return float(metrics["cast/magnitude_ratio"]), float((metrics["cast/loss_pruned"] - metrics["cast/loss_dense"]).abs())

    with_decay, without = gap(0.05), gap(0.0)
    assert with_decay[0] < 0.3 * without[0]
    assert with_decay[1] < 0.5 * without[1]


def test_schedules_go_on_with_the_new_optimiser_and_nobody_warns(recwarn):
    trainer, _ = fit([ours()], steps=8)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, AdamS)
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is optimizer
    expected = 1e-2 * (1 + torch.cos(torch.tensor(torch.pi * 6 / 10))) / 2  # 8 steps, 2 of them before the cosine
    assert optimizer.param_groups[0]["lr"] == pytest.approx(float(expected))
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_masks_are_refreshed_at_the_top_of_a_step_on_its_first_micro_batch():
    seen = []
    callback = ours(mask_interval=2, distill_weight=0.0)
    refresh = callback._refresh

    def note(trainer, pl_module):
        seen.append((trainer.global_step, trainer.fit_loop.batch_idx))
        refresh(trainer, pl_module)

    callback._refresh = note
    fit([callback], steps=5, accumulate_grad_batches=3, max_epochs=5)
    assert seen == [(0, 0), (2, 0), (4, 0)], "6 micro-batches an epoch are 2 steps"


def test_accumulated_micro_batches_equal_one_batch():
    def train(batch_size, accumulate):
        module = plain()
        trainer = tiny_trainer(max_steps=4, callbacks=[ours(targets=["network.3"])], accumulate_grad_batches=accumulate)
        trainer.fit(module, loader(batch_size))
        return cloned_state(module)

    assert_state_dicts_equal(train(4, 2), train(8, 1), atol=1e-6)


def test_bf16_autocast_keeps_float32_weights_and_half_weights_are_refused():
    trainer, module = fit([ours()], precision="bf16-mixed")
    assert module.network[5].weight.dtype == torch.float32
    assert trainer.optimizers[0].state[module.network[5].weight]["exp_avg"].dtype == torch.float32
    with pytest.raises(ValueError, match="use bf16-mixed"):
        fit([ours()], precision="bf16-true")
    with pytest.raises(ValueError, match="needs float32 weights"):
        fit([ours()], with_adam(Classifier().bfloat16()))


def test_sharding_is_refused():
    trainer = tiny_trainer()
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="shards them"):
        ours().setup(trainer, with_adam(Classifier()), "fit")


@pytest.mark.parametrize("make", [resnet_classifier, compiled_classifier])
def test_modules_that_are_not_ours(make):
    target = {"resnet_classifier": "network.layer2.0.conv1", "compiled_classifier": "network.5"}[make.__name__]
    pl.seed_everything(0)
    module = with_adam(make())
    before = traces(module)
    trainer, _ = fit([ours(targets=[target], probe_interval=2)], module, steps=4)
    weight = module.get_submodule(target.replace("network", "network._orig_mod") if make is compiled_classifier else target).weight
    assert is_nm(weight.detach(), 1, 4)
    assert traces(module) == before or make is compiled_classifier  # compiling leaves its own traces
    assert {"cast/kl", "cast/loss_pruned", "cast/alpha"} <= set(trainer.callback_metrics)


def test_lightnings_demo_transformer():
    class Language(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = Transformer(vocab_size=20, ninp=8, nhead=2, nhid=16, nlayers=1, dropout=0.0)

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return nn.functional.nll_loss(self.model(inputs, target), target.view(-1))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    tokens = torch.randint(0, 20, (8, 9), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4)
    module = Language()
    trainer = tiny_trainer(max_steps=4, callbacks=[CAST(2, 4, skip=["model.decoder"])])
    trainer.fit(module, data)
    assert is_nm(module.model.transformer.encoder.layers[0].linear1.weight, 2, 4)
    assert is_nm(module.model.transformer.decoder.layers[0].multihead_attn.in_proj_weight, 2, 4)
    assert trainer.callback_metrics["cast/kl"] > 0


def test_manual_optimisation_without_distillation():
    class TwoAdams(TwoOptimisers):
        def configure_optimizers(self):
            return [torch.optim.Adam(self.network[:5].parameters()), torch.optim.Adam(self.network[5:].parameters())]

    module = TwoAdams()
    callback = ours(targets=["network.0", "network.5"], m=3, distill_weight=0.0, total_steps=3, scale_groups=0)
    trainer, _ = fit([callback], module, steps=6)  # three of each
    assert [group["alpha"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == [2 / 3, 2 / 3]
    assert is_nm(module.network[5].weight, 1, 3)
    assert is_nm(module.network[0].weight, 1, 3)
    with pytest.raises(ValueError, match="distill_weight to 0"):
        fit([ours()], TwoAdams())
    with pytest.raises(ValueError, match="trained by SGD"):
        fit([ours(distill_weight=0.0)], TwoOptimisers())


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"recipe": "ast", "slorb_block": 8}, {"recipe": "naive"}, {"save_teacher": False, "probe_interval": 4}], ids=str
)
def test_a_killed_run_ends_bit_equal(tmp_path, options):
    def build():
        callback = ours(targets=["network.3"], **options)
        return plain(schedule=True), make_loader(Images(), batch_size=4, shuffle=True, seed=3), [callback]

    whole, resumed = kill_and_resume(build, steps=14, kill_at=8, tmp_path=tmp_path)  # between two refreshes, in mid-epoch
    assert_state_dicts_equal(resumed, whole)
    assert is_nm(whole["network.3.weight"], 1, 4) or "slorb_block" in options


def test_another_length_or_another_teacher_is_refused(tmp_path):
    path = tmp_path / "half.ckpt"

    with contextlib.suppress(Killed):
        fit([ours(targets=["network.3"], save_teacher=False), KillAt(3, path)], plain(), steps=6)
    trainer = tiny_trainer(max_steps=9, callbacks=[ours(targets=["network.3"], save_teacher=False)])
    with pytest.raises(ValueError, match="take 6 optimiser steps and is now to take 9"):
        trainer.fit(plain(), loader(), ckpt_path=path)
    other = plain()
    with torch.no_grad():
        other.network[1].weight.mul_(2.0)
    with pytest.raises(ValueError, match="starts with other weights"):
        tiny_trainer(max_steps=6, callbacks=[ours(targets=["network.3"], save_teacher=False)]).fit(other, loader(), ckpt_path=path)
    wrong = ours(targets=["network.3"], save_teacher=False, scale_groups=0)
    with pytest.raises(ValueError, match="same arguments of the callback, its recipe say"):
        tiny_trainer(max_steps=6, callbacks=[wrong]).fit(plain(), loader(), ckpt_path=path)


def test_both_ends_are_written_and_load_in_a_plain_module(tmp_path):
    module = with_adam(Classifier())
    seen = {}

    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen[trainer.global_step] = is_nm(pl_module.network[5].weight, 1, 4)

    callback = ours()
    kwargs = {"callbacks": [callback, Look()], "enable_checkpointing": True, "limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = tiny_trainer(max_epochs=2, **kwargs)
    trainer.fit(module, loader(), loader())
    assert seen == {6: False, 12: True}, "the last validation is of the sparse network"
    (before,), (after,) = tmp_path.rglob("cast/unfinalized.ckpt"), tmp_path.rglob("cast/finalized.ckpt")
    (last,) = [path for path in tmp_path.rglob("*.ckpt") if path.parent.name == "checkpoints"]
    dense, sparse = (torch.load(path, weights_only=True) for path in (before, after))
    assert set(dense["state_dict"]) == set(Classifier().state_dict())
    assert not is_nm(dense["state_dict"]["network.5.weight"], 1, 4)
    for content in (sparse, torch.load(last, weights_only=True)):
        fresh = Classifier()
        fresh.load_state_dict(content["state_dict"])
        assert_state_dicts_equal(cloned_state(fresh), cloned_state(module))
    (state,) = [state for key, state in dense["callbacks"].items() if key.startswith("CAST")]
    kept = state["masks"]["network.5.weight"]
    expected = torch.where(kept, dense["state_dict"]["network.5.weight"], 0.0)
    torch.testing.assert_close(sparse["state_dict"]["network.5.weight"], expected, rtol=0, atol=0)
    assert callback.finalized


def test_finalize_false_leaves_the_dense_weights():
    _, module = fit([ours(finalize=False)])
    assert not is_nm(module.network[5].weight, 1, 4)


def test_a_run_that_is_stopped_early_is_finalised_with_a_warning():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    with pytest.warns(UserWarning, match="removes weights that are not small"):
        _, module = fit([ours(), Stop()], steps=12, min_epochs=0)
    assert is_nm(module.network[5].weight, 1, 4)


def test_the_low_rank_branch_adds_to_an_nm_weight():
    callback = ours(recipe="ast", slorb_block=12)
    _, module = fit([callback])
    parts = callback.parts()["network.5.weight"]
    assert is_nm(parts["latent"], 1, 4)
    assert parts["branch"].shape == (8, 12)
    whole = parts["latent"] + parts["branch"].repeat_interleave(12, dim=1)
    torch.testing.assert_close(module.network[5].weight.detach(), whole)
    assert callback.sparsity_masks() == {}, "the sum isn't sparse"


# ---- neighbours ------------------------------------------------------------------------------------------------------------------------


def _train_on_ranks(processes):
    rank = torch.distributed.get_rank() if processes == 2 else 0
    share = 8 // processes
    order = [batch * 8 + rank * share + i for batch in range(3) for i in range(share)]
    data = torch.utils.data.DataLoader(torch.utils.data.Subset(Images(), order), batch_size=share)
    kwargs = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if processes == 2 else {}
    module = plain()
    tiny_trainer(max_epochs=2, callbacks=[ours(targets=["network.3"], probe_interval=2)], **kwargs).fit(module, data)
    return cloned_state(module)


def test_two_processes_end_like_one():
    one, ranks = _train_on_ranks(1), run_two_processes(_train_on_ranks, 2)
    assert_state_dicts_equal(ranks[0], ranks[1])
    assert_state_dicts_equal(ranks[0], one, atol=1e-5, rtol=1e-4)
    assert is_nm(one["network.3.weight"], 1, 4)


@pytest.mark.parametrize("teacher_first", [True, False])
def test_an_ema_teacher_averages_latent_weights_and_is_sparse_in_the_end(teacher_first):
    ema, sparse = EMATeacher(decay=0.9), ours()
    fit([ema, sparse] if teacher_first else [sparse, ema])
    assert is_nm(ema.teacher.module.network[5].weight, 1, 4)
    assert set(ema.teacher.module.state_dict()) == set(Classifier().state_dict())


@pytest.mark.parametrize("recipe", ["cast", "ast"])
def test_the_sparsity_report_has_no_objection(recipe, tmp_path):
    report = SparsityReport(strict=True, mask_check_every_n=1)
    trainer, _ = fit([report, ours(recipe=recipe)], steps=7, default_root_dir=tmp_path, logger=True)
    assert trainer.callback_metrics["sparsity/density"] < 1 or recipe == "cast"
    (row,) = [row for row in report._report["layers"] if row["masked"]]
    assert (row["kept"], row["nonzero"]) == (288, 288)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [ours(m=5)], r"network\.5\.weight: m=5 doesn't divide its 144 inputs"),
        (lambda: [ours(scale_groups=7)], "scale_groups=7 doesn't divide"),
        (lambda: [ours(recipe="ast", targets=["network.0"], m=3, slorb_block=3)], "slorb_block is for linear layers"),
        (lambda: [ours(), DynamicSparsity(0.5, targets=LINEAR)], "both mask"),
        (lambda: [ours(), NMSparsity(1, 4, targets=LINEAR)], "parametrised already"),
        (lambda: [ours(), EMAWeightAveraging()], "can't be used together"),
        (lambda: [ours(targets=["nothing"])], "matches no submodule"),
        (lambda: [ours(distill="network.0")], None),
        (lambda: [ours(labels="labels")], "the batch has no 'labels', it has 2 parts: name the key"),
    ],
)
def test_what_cannot_work_is_refused(callbacks, message):
    if message is None:
        fit(callbacks())  # any submodule that is called may be distilled
        return
    with pytest.raises(ValueError, match=message):
        fit(callbacks())


def test_a_submodule_that_is_not_called_cannot_teach():
    module = with_adam(Classifier())
    module.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has 2 with parameters"):
        fit([ours()], module)
    before = traces(module)
    with pytest.raises(ValueError, match="didn't call 'spare'"):
        fit([ours(distill="spare")], module)
    assert traces(module) == before, "nothing stays behind after an error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "srste"}, "give one of cast, ast, naive"),
        ({"update": "sgd"}, "give one of adams"),
        ({"n": 5, "m": 4}, "pattern of 5:4"),
        ({"mask_interval": 0}, "mask_interval is 0"),
        ({"distill_weight": 1.5}, r"distill_weight is 1.5: give .* in \[0, 1\]"),
        ({"l1_decay": -1.0}, "l1_decay is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"slorb_block": 64}, "masked forward pass"),
        ({"targets": "network"}, r"give a list of patterns, \['network'\]"),
        ({"teacher_dtype": "float16"}, "teacher_dtype"),
        ({"total_steps": 0}, "total_steps is 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        CAST(**arguments)
