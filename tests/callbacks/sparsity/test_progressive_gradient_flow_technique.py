"""NMSparsity: the maths against independent computations, and the callback on modules that aren't ours."""

import contextlib
import copy
import json
import math
from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
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
from lit_methods.callbacks import DynamicSparsity, EMATeacher, NMSparsity, SparsityReport
from lit_methods.callbacks.sparsity.latent import group_dim, masked_weight
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.callbacks.sparsity.progressive_gradient_flow import core
from lit_methods.runs.folder import run_dir

LINEAR = ["network.5"]  # (8, 144) of helpers.small_network


def loader(batch_size=4):
    return torch.utils.data.DataLoader(Images(), batch_size=batch_size)


def fit(callbacks, module=None, steps=6, **kwargs):
    module = module or Classifier()
    trainer = tiny_trainer(**{"max_steps": steps, "callbacks": callbacks, "log_every_n_steps": 1, **kwargs})
    trainer.fit(module, loader())
    return trainer, module


def traces(module):
    """What could stay behind; Lightning itself leaves ``_hparams`` on the root."""
    return {name: found for name, found in fingerprint(module).items() if name}


def plain(width=16):
    """Without dropout and batch norm, so that batches can be split; the same weights on every call."""
    torch.manual_seed(2)
    layers = [nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    return Classifier(nn.Sequential(*layers))


def exact_nm(weight, n, m, dim=1):
    """Exactly n of every m."""
    groups = (weight != 0).movedim(dim, -1).reshape(-1, m)
    return bool((groups.sum(1) == n).all())


class Watch(pl.Callback):
    """Notes what ``look(trainer, module)`` returns before each step, with the phase of the step set."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(self.look(trainer, pl_module))


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_and_both_gradients_are_those_of_the_formula(dtype):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    arriving = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = core.sparse_mask(weight, 1, 4)
    scale = mask.double() + 0.25 * (~mask).double()
    for gradient, expected in (("ste", arriving), ("exact", (arriving.double() * scale).to(dtype))):
        masked = masked_weight(weight, mask, 0.25, gradient)
        assert masked.dtype == dtype
        torch.testing.assert_close(masked.detach(), (weight.detach().double() * scale).to(dtype))
        torch.testing.assert_close(torch.autograd.grad(masked, weight, arriving)[0], expected)
    decayed = core.decay_pruned(arriving, weight.detach(), mask, 0.5)
    torch.testing.assert_close(decayed, torch.where(mask, arriving, arriving + 0.5 * weight.detach()))


def test_unstructured_counts_truncate_and_ties_are_exact():
    assert int(core.sparse_mask(torch.ones(5, 6), 2, 4, rate=0.9).sum()) == 2  # (1 - 0.9) * 30 is a hair below 3
    assert int(core.sparse_mask(torch.ones(4, 5), 2, 4, rate=0.5).sum()) == 10
    assert core.sparse_mask(torch.ones(3, 8), 1, 4).sum(1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        core.sparse_mask(torch.ones(2, 2), 1, 2, rate=1.5)


def test_groups_run_over_inputs_outputs_and_channels():
    weight = torch.randn(8, 4)
    assert exact_nm(weight * core.sparse_mask(weight, 1, 4, dim=group_dim(2, "output")), 1, 4, dim=0)
    kernel = torch.randn(2, 8, 3, 3)
    assert group_dim(4, "output") == 1  # kernels: always input channels
    assert exact_nm(kernel * core.sparse_mask(kernel, 1, 4, dim=group_dim(4)), 1, 4)
    assert group_dim(4, transposed=True) == 0


@pytest.mark.parametrize(
    ("recipe", "expected"), [("mdgf_linear", [1, 0.5, 0, 0]), ("mdgf_exp", [math.exp(-0.25 * t) for t in (0, 2, 4, 6)]), ("ste", [0] * 4)]
)
def test_flow_factor(recipe, expected):
    assert [core.flow_factor(recipe, t, 0.25) for t in (0, 2, 4, 6)] == expected


def test_schedules_that_the_golden_vectors_lack():
    assert core.sdgf_schedule("densify", 1, 4, 8, stages=3) == [(0, 1, 16), (2, 1, 8), (5, 1, 4)]
    assert core.sdgf_schedule("custom", 1, 4, 10, 2, 2, stages=[(3, 4), (1, 4)]) == [(2, 3, 4), (5, 1, 4)]
    assert core.sdgf_schedule("geometric", 1, 4, 2, stages=4) == [(0, 4, 16), (1, 1, 4)], "of two stages in one epoch the later one counts"
    with pytest.raises(ValueError, match="more than total_epochs"):
        core.sdgf_schedule("stepwise", 1, 4, 3, 2, 2)


def test_phases_in_order():
    def names(recipe, **more):
        return [core.phase_at(e, e - 2, recipe, 1, 4, total_epochs=6, dense_epochs=2, fine_tune_epochs=1, **more).name for e in range(6)]

    assert names("ste") == ["dense", "dense", "sparse", "sparse", "sparse", "fine_tune"]
    assert names("one_shot") == ["dense"] * 5 + ["fine_tune"]
    assert names("dense") == ["dense"] * 6


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [recipe for recipe in get_args(core.Recipe) if recipe not in ("sdgf_custom", "dense")])
def test_every_recipe_ends_exactly_nm_in_an_ordinary_module(recipe):
    module = Classifier()
    before, names = traces(module), list(module.state_dict())
    fit([NMSparsity(1, 4, recipe, LINEAR, stages=2)], module, max_epochs=4, steps=-1)
    assert traces(module) == before
    assert list(module.state_dict()) == names, "the weight stands where it stood"
    assert exact_nm(module.network[5].weight, 1, 4)
    assert not is_nm(module.network[7].weight, 1, 4), "other layers stay dense"


def test_dense_is_training_without_the_callback():
    assert_state_dicts_equal(cloned_state(fit([NMSparsity(recipe="dense", targets=LINEAR)])[1]), cloned_state(fit([])[1]))


def test_the_first_sparse_epoch_starts_beta_and_a_late_mask_changes_nothing_before():
    callback = NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.1, dense_epochs=1, fine_tune_epochs=1)
    watch = Watch(lambda trainer, _: (trainer.global_step, callback._layers["network.5.weight"].flow.phase))
    fit([callback, watch], steps=-1, max_epochs=3)  # 6 steps an epoch
    phases = dict(watch.seen)
    assert [phases[step].name for step in (0, 5, 6, 11, 12, 17)] == ["dense", "dense", "sparse", "sparse", "fine_tune", "fine_tune"]
    assert [phases[step].beta for step in (6, 8, 12)] == [1.0, pytest.approx(math.exp(-0.2)), 0.0]


def test_training_is_a_plain_loop_with_straight_through_weights():
    """An independent loop: SGD with momentum on latent weights, SR-STE's decay on the gradient, beta per step."""
    callback = NMSparsity(1, 4, "srste", LINEAR, srste_decay=0.5)
    pl.seed_everything(3)
    _, module = fit([callback], steps=4)

    pl.seed_everything(3)
    other = Classifier()
    net, layer = other.network, other.network[5]
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for index, (images, labels) in enumerate(loader()):
        if index == 4:
            break
        latent = layer.weight.detach().clone()
        groups = latent.abs().view(8, 36, 4)
        mask = (groups == groups.amax(-1, keepdim=True)).view(8, 144)
        with torch.no_grad():
            layer.weight.mul_(mask)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        with torch.no_grad():
            layer.weight.copy_(latent)
            layer.weight.grad += 0.5 * ~mask * latent
        optimiser.step()
    torch.testing.assert_close(callback.state_dict()["latent"]["network.5.weight"], layer.weight.detach())
    groups = layer.weight.detach().abs().view(8, 36, 4)
    final = layer.weight.detach() * (groups == groups.amax(-1, keepdim=True)).view(8, 144)
    torch.testing.assert_close(module.network[5].weight.detach(), final)


def test_accumulation_leaves_the_decay_of_sr_ste_alone():
    """Two micro-batches of half the size make the same step, so the decay must not be counted twice."""

    def train(batch_size, accumulate):
        module, callback = plain(), NMSparsity(1, 4, "srste", srste_decay=0.5)
        trainer = tiny_trainer(max_steps=3, callbacks=[callback], accumulate_grad_batches=accumulate)
        trainer.fit(module, loader(batch_size))
        assert list(callback.sparsity_masks()) == ["network.3.weight"], "by default the first and the last layer stay dense"
        return callback.state_dict()["latent"]["network.3.weight"]

    torch.testing.assert_close(train(8, 1), train(4, 2))


def test_patterns_by_target_and_the_first_that_fits_counts():
    callback = NMSparsity(targets={"network.5": "1:8", "network.[57]": "2:4"})
    _, module = fit([callback])
    assert exact_nm(module.network[5].weight, 1, 8)
    assert exact_nm(module.network[7].weight, 2, 4)
    assert callback.n is None


def test_unstructured_rate():
    _, module = fit([NMSparsity(recipe="ste", targets=LINEAR, rate=0.9)])
    assert int((module.network[5].weight != 0).sum()) == int((1 - 0.9) * 1152)


@pytest.mark.parametrize("make", [resnet_classifier, compiled_classifier, TwoOptimisers])
def test_modules_that_are_not_ours(make):
    target = {"resnet_classifier": "network.layer2.0.conv1", "compiled_classifier": "network.5", "TwoOptimisers": "network.5"}[
        make.__name__
    ]
    pl.seed_everything(0)
    module = make()
    before = traces(module)
    callback = NMSparsity(1, 4, "srste", [target])
    trainer, _ = fit([callback], module, steps=4)
    weight = module.get_submodule(target.replace("network", "network._orig_mod") if make is compiled_classifier else target).weight
    assert exact_nm(weight.detach(), 1, 4)
    assert traces(module) == before or make is compiled_classifier  # compiling leaves its own traces
    assert trainer.callback_metrics["progressive_gradient_flow/grad_pruned_norm"] > 0


def test_compiled_and_plain_networks_learn_the_same():
    def train(make):
        module = make()
        pl.seed_everything(1)
        fit([NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.3)], module)
        return {name.replace("_orig_mod.", ""): value for name, value in cloned_state(module).items()}

    assert_state_dicts_equal(train(compiled_classifier), train(Classifier), atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "gradient"), [("mdgf_exp", "ste"), ("mdgf_linear", "exact"), ("sdgf_stepwise", "ste"), ("srste", "ste")]
)
def test_a_killed_run_ends_bit_equal(tmp_path, recipe, gradient):
    def build():
        from lit_methods.datamodules.loaders import make_loader

        callback = NMSparsity(1, 4, recipe, decay=0.05, gradient=gradient, dense_epochs=1, total_epochs=4)
        return plain(), make_loader(Images(), batch_size=4, shuffle=True, seed=3), [callback]

    whole, resumed = kill_and_resume(build, steps=20, kill_at=14, tmp_path=tmp_path)  # epochs of 6 steps: in mid-stage
    assert_state_dicts_equal(resumed, whole)
    assert exact_nm(whole["network.3.weight"], 1, 4)


def test_checkpoints_hold_what_the_forward_pass_used_and_load_in_a_plain_module(tmp_path):
    callback, path = NMSparsity(1, 4, "ste", LINEAR), tmp_path / "half.ckpt"
    with contextlib.suppress(Killed):
        fit([callback, KillAt(3, path)])
    content = torch.load(path, weights_only=True)
    assert set(content["state_dict"]) == set(Classifier().state_dict())
    assert exact_nm(content["state_dict"]["network.5.weight"], 1, 4)
    (latent,) = [state["latent"]["network.5.weight"] for state in content["callbacks"].values() if "latent" in state]
    assert not is_nm(latent, 1, 4)
    kept = content["state_dict"]["network.5.weight"] != 0
    torch.testing.assert_close(content["state_dict"]["network.5.weight"][kept], latent[kept], rtol=0, atol=0)
    fresh = Classifier()
    before = traces(fresh)
    tiny_trainer(limit_val_batches=1, callbacks=[NMSparsity(1, 4, "ste", LINEAR)]).validate(fresh, loader(), ckpt_path=path, verbose=False)
    torch.testing.assert_close(fresh.network[5].weight.detach(), content["state_dict"]["network.5.weight"])
    assert traces(fresh) == before


def test_the_last_validation_sees_the_final_weights_and_training_can_go_on(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(pl_module.network[5].weight.detach().clone())

    def run(epochs, callback, ckpt_path=None):
        module = Classifier()
        trainer = tiny_trainer(max_epochs=epochs, limit_val_batches=1, callbacks=[callback, Look()])
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer, module

    callback = NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.05)
    trainer, module = run(2, callback)
    assert not is_nm(seen[0], 1, 4)
    assert exact_nm(seen[1], 1, 4)
    torch.testing.assert_close(seen[1], module.network[5].weight.detach(), rtol=0, atol=0)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.05)
    watch = Watch(lambda *_: again._layers["network.5.weight"].flow.phase.beta)
    tiny = tiny_trainer(max_epochs=3, callbacks=[again, watch])
    tiny.fit(Classifier(), loader(), ckpt_path=tmp_path / "after.ckpt")
    assert watch.seen[0] == pytest.approx(math.exp(-0.05 * 12)), "it goes on with beta, and with latent weights"


def test_a_run_that_raises_leaves_nothing_behind():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module = Broken()
    before = traces(module)
    with pytest.raises(RuntimeError, match="broken"):
        fit([NMSparsity(1, 4, targets=LINEAR)], module)
    assert traces(module) == before


def _train_on_ranks(processes):
    rank = torch.distributed.get_rank() if processes == 2 else 0
    share = 8 // processes
    order = [batch * 8 + rank * share + i for batch in range(3) for i in range(share)]
    data = torch.utils.data.DataLoader(torch.utils.data.Subset(Images(), order), batch_size=share)
    kwargs = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if processes == 2 else {}
    module, callback = plain(), NMSparsity(1, 4, "srste", srste_decay=0.1, dense_epochs=1)
    tiny_trainer(max_epochs=2, callbacks=[callback], **kwargs).fit(module, data)
    return cloned_state(module)


def test_two_processes_end_like_one():
    one, ranks = _train_on_ranks(1), run_two_processes(_train_on_ranks, 2)
    assert_state_dicts_equal(ranks[0], ranks[1])
    assert_state_dicts_equal(ranks[0], one, atol=1e-6, rtol=1e-5)
    assert exact_nm(one["network.3.weight"], 1, 4)


def test_bf16_masks_come_from_the_float32_weight():
    callback = NMSparsity(1, 4, "ste", LINEAR)
    watch = Watch(lambda _, module: (module.network[5].weight.dtype, exact_nm(module.network[5].weight.detach(), 1, 4)))
    fit([callback, watch], precision="bf16-mixed")
    assert set(watch.seen) == {(torch.float32, True)}


@pytest.mark.parametrize("teacher_first", [True, False])
def test_an_ema_teacher_averages_latent_weights_and_is_sparse_itself(teacher_first, tmp_path):
    def build():
        ema, sparse = EMATeacher(decay=0.9, buffers="average"), NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.2)
        return Classifier(), loader(), [ema, sparse] if teacher_first else [sparse, ema]

    module, data, callbacks = build()
    tiny_trainer(max_steps=6, callbacks=callbacks).fit(module, data)
    teacher = next(callback for callback in callbacks if isinstance(callback, EMATeacher)).teacher.module
    assert exact_nm(teacher.network[5].weight, 1, 4)
    assert set(teacher.state_dict()) == set(module.state_dict())
    assert not torch.equal(teacher.network[5].weight, module.network[5].weight)
    assert not is_nm(teacher.network[5].parametrizations.weight.original, 1, 4)


def test_the_sparsity_report_reads_masks_and_has_no_objection(tmp_path):
    report = SparsityReport(strict=True, mask_check_every_n=0)
    callback = NMSparsity(1, 4, "mdgf_exp", LINEAR, decay=0.2)
    trainer, _ = fit([report, callback], steps=-1, max_epochs=2, default_root_dir=tmp_path)
    content = json.loads((run_dir(trainer) / "sparsity.json").read_text())
    (row,) = [row for row in content["layers"] if row["masked"]]
    assert (row["name"], row["kept"], row["nonzero"]) == ("network.5.weight", 288, 288)
    assert trainer.callback_metrics["progressive_gradient_flow/density"] == 0.25
    assert trainer.callback_metrics["progressive_gradient_flow/train_flops"] == 1.0


def test_masks_that_move_between_two_events_are_no_alarm(tmp_path):
    fit([SparsityReport(strict=True, mask_check_every_n=1), NMSparsity(1, 4, "ste", LINEAR)], steps=5, default_root_dir=tmp_path)


def test_flops_and_stages_of_sdgf():
    callback = NMSparsity(1, 4, "sdgf_stepwise", LINEAR)  # 3:4, 2:4, 1:4, two epochs each
    masks = []

    class Listen(pl.Callback):
        def on_mask_updated(self, trainer, pl_module, source):
            masks.append(source.sparsity_masks()["network.5.weight"].float().mean().item())

    trainer, _ = fit([callback, Listen()], steps=-1, max_epochs=6)
    assert trainer.callback_metrics["progressive_gradient_flow/train_flops"] == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    assert sorted(set(masks), reverse=True) == [0.75, 0.5, 0.25]
    assert 0 <= trainer.callback_metrics["progressive_gradient_flow/mask_flip_rate"] < 0.5


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [NMSparsity(1, 5, targets=LINEAR)], r"network\.5\.weight: 1:5 doesn't fit .* 144 entries"),
        (lambda: [NMSparsity(1, 8, "sdgf_geometric", LINEAR, total_epochs=9)], "8:64 doesn't fit"),
        (lambda: [NMSparsity(2, 4, "sdgf_stepwise", LINEAR)], "give total_epochs"),
        (lambda: [NMSparsity(targets=LINEAR), DynamicSparsity(0.5, targets=LINEAR)], "both mask"),
        (lambda: [DynamicSparsity(0.5, targets=LINEAR), NMSparsity(targets=LINEAR)], "both mask"),
        (lambda: [NMSparsity(targets=["nothing"])], "matches no submodule"),
        (lambda: [NMSparsity(targets=LINEAR), EMAWeightAveraging()], "can't be used together"),
        (lambda: [StochasticWeightAveraging(0.1), NMSparsity(targets=LINEAR)], "can't be used together"),
    ],
)
def test_what_cannot_work_is_refused(callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(callbacks())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "mdgf"}, "give one of mdgf_exp"),
        ({"n": 5, "m": 4}, "pattern of 5:4"),
        ({"targets": "network"}, r"give a list of patterns, \['network'\]"),
        ({"targets": {"network": "two of four"}}, "no N:M pattern"),
        ({"recipe": "sdgf_custom"}, "a list of patterns"),
        ({"recipe": "sdgf_stepwise", "rate": 0.5}, "leave one of them out"),
        ({"decay": -1.0}, "decay is -1"),
        ({"rate": 1.0}, "rate is 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        NMSparsity(**arguments)


def test_tied_weights_are_refused():
    first, second = nn.Linear(192, 192), nn.Linear(192, 192)
    second.weight = first.weight
    module = Classifier(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Linear(192, 4)))
    with pytest.raises(ValueError, match="one tied weight"):
        fit([NMSparsity(targets=["network.1"])], module)


def test_semi_structured_export_asks_for_a_gpu():
    with pytest.raises(ValueError, match="no linear layer with a 2:4 weight"):
        core.to_semi_structured(nn.Sequential(nn.Linear(8, 8)))
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.mul_(core.sparse_mask(layer.weight, 2, 4))
    with pytest.raises(RuntimeError, match=r"0\.weight is on cpu"):
        core.to_semi_structured(nn.Sequential(layer))


def test_the_mask_that_is_kept_in_evaluation_follows_every_change_of_the_weight():
    """In place, through ``.data``, by another tensor, in a copy, and of beta and pattern."""
    from lit_methods.callbacks.sparsity.parametrized import ParametrizedWeight
    from lit_methods.callbacks.sparsity.progressive_gradient_flow.callback import MaskedForward, Phase, _Flow

    torch.manual_seed(0)
    layer, flow = nn.Linear(16, 8), _Flow(1, 4, 0.0, "ste")
    flow.set(Phase("sparse", 0.0, 1, 4))
    parametrised = ParametrizedWeight(layer, "weight", MaskedForward(flow, 1))
    parametrised.attach()
    latent = parametrised.latent

    def expected(weight):
        return weight * core.sparse_mask(weight, flow.phase.n, flow.phase.m) if flow.phase.beta == 0 else None

    def holds(module, weight):
        return all(torch.equal(module.weight, expected(weight)) for _ in range(2))

    layer.eval()
    with torch.no_grad():
        assert holds(layer, latent)
        latent.mul_(torch.randn(8, 16))
        assert holds(layer, latent)
        latent.data.copy_(latent.data.flip(1))
        assert holds(layer, latent), "a permutation, through .data"
        latent.data = torch.randn(8, 16)
        assert holds(layer, latent)
        copied = copy.deepcopy(layer)
        copied.parametrizations.weight.original.data.add_(torch.randn(8, 16))
        assert holds(copied, copied.parametrizations.weight.original)
        assert holds(layer, latent)
        flow.set(Phase("sparse", 0.0, 2, 4))
        assert holds(layer, latent), "another pattern"
        flow.set(Phase("sparse", 0.5, 2, 4))
        kept = core.sparse_mask(latent, 2, 4)
        torch.testing.assert_close(layer.weight, torch.where(kept, latent, 0.5 * latent), rtol=0, atol=0)
        flow.set(Phase("sparse", 0.0, 2, 4))
        before = layer.parametrizations.weight[0]._last
        assert before is not None
        assert holds(layer, latent)
        assert layer.parametrizations.weight[0]._last is before, "nothing changed, so it was kept"
    layer.train()
    assert torch.equal(layer.weight, expected(latent))
    assert layer.parametrizations.weight[0]._last is None, "training holds no copies of weights"
