"""The transformer of Wan 2.1: value and tangent layer by layer against torch.func.jvp of the whole, sharded weights, in rCM."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, run_two_processes, tiny_trainer
from lit_methods.consistency_models.rcm.module import RCM
from lit_methods.consistency_models.rcm.trigflow import rectified_flow
from lit_methods.consistency_models.rcm.wan import Dual, WanTransformer, along, rotary_angles, rotate

DOUBLE = torch.float64


def network(dtype: torch.dtype = DOUBLE, **settings) -> WanTransformer:
    torch.manual_seed(0)
    sizes = {"channels": 4, "width": 24, "hidden": 32, "heads": 2, "depth": 2, "text_width": 16, "time_width": 8}
    return WanTransformer(**(sizes | settings)).to(dtype)


def inputs(dtype: torch.dtype = DOUBLE) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Latents and times, prompt, tangents."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(2, 4, 2, 4, 6, generator=generator, dtype=DOUBLE).to(dtype) for _ in range(2))
    prompt = torch.randn(2, 6, 16, generator=generator, dtype=DOUBLE).to(dtype)
    return (x, torch.tensor([100.0, 640.0], dtype=dtype)), prompt, (dx, torch.tensor([3.0, -2.0], dtype=dtype))


def test_value_and_tangent_are_those_of_func_jvp_through_plain_attention():
    net, (at, prompt, directions) = network(), inputs()
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(lambda x, time: net(x, time, prompt), at, directions)
    with torch.no_grad():
        found = net(*at, prompt, tangents=directions)
    torch.testing.assert_close(found[0], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], tangent, rtol=1e-9, atol=1e-10)
    assert tangent.abs().max() > 1e-3


@pytest.mark.parametrize("which", [0, 1], ids=["x", "time"])
def test_the_tangent_is_the_limit_of_differences(which):
    net, (at, prompt, directions) = network(), inputs()
    alone = tuple(one if index == which else torch.zeros_like(one) for index, one in enumerate(directions))
    with torch.no_grad():
        found = net(*at, prompt, tangents=alone)[1]
        h = 1e-5
        ahead, behind = (net(*(x + sign * h * d for x, d in zip(at, alone, strict=True)), prompt) for sign in (1, -1))
    assert (found - (ahead - behind) / (2 * h)).abs().max() < 1e-6 * found.abs().max()


def test_the_wrapper_asks_the_network_for_its_tangent():
    """Through the scalings of rectified flow too: the same as torch.func.jvp around all of it."""
    net, (at, prompt, (dx, _)) = network(), inputs()
    time, dt = torch.tensor([0.4, 1.2], dtype=DOUBLE), torch.tensor([0.3, 0.5], dtype=DOUBLE)
    wrapped = rectified_flow(net, DOUBLE, prompt)
    with torch.no_grad():
        here, moved = wrapped.with_tangent(at[0], time, dx, dt)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(wrapped, (at[0], time), (dx, dt))
    for mine, theirs in zip((*here, *moved), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_function_of_a_missing_tangent():
    x, y = Dual(torch.tensor([2.0]), torch.tensor([1.0])), Dual(torch.tensor([3.0]))
    assert along(torch.mul, x, y) == (torch.tensor([6.0]), torch.tensor([3.0]))
    assert along(torch.mul, y, y) == (torch.tensor([9.0]), None)


def test_rotation_makes_scores_depend_on_distances_alone():
    angles = rotary_angles((4, 5, 6), 12, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(12, generator=generator, dtype=DOUBLE).expand(1, 1, 120, 12) for _ in range(2))
    scores = (rotate(q, angles) @ rotate(k, angles).mT).view(4, 5, 6, 4, 5, 6)
    torch.testing.assert_close(scores[0, 1, 2, 1, 2, 0], scores[2, 3, 5, 3, 4, 3])
    torch.testing.assert_close(scores[0, 0, 0, 0, 0, 0], (q @ k.mT)[0, 0, 0, 0])
    assert (scores[0, 0, 0, 0, 0, 1] - scores[0, 0, 0, 0, 1, 0]).abs() > 1e-3


def test_computing_blocks_again_changes_neither_value_nor_gradient():
    (at, prompt, _), found = inputs(), []
    for again in (False, True):
        net = network(checkpoint_blocks=again)
        value = net(*at, prompt)
        value.square().sum().backward()
        found.append([value.detach(), *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(found[0], found[1])
    assert all(gradient is not None for gradient in found[1]), "a weight that nothing uses"


def test_odd_latents_and_widths_are_refused():
    with pytest.raises(ValueError, match="even H and W"):
        network()(torch.zeros(1, 4, 2, 5, 6), torch.zeros(1), torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match="even width"):
        network(width=27)


def sharded() -> tuple[list[Tensor], list[Tensor]]:
    """Value and tangent, and the gradients, with the weights of each block on two processes."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, (at, prompt, directions) = network(), inputs()
    mesh = init_device_mesh("cpu", (2,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    with torch.no_grad():
        both = net(*at, prompt, tangents=directions)
    net(*at, prompt).square().sum().backward()
    return list(both), [parameter.grad.full_tensor() for parameter in net.parameters()]


def test_sharded_weights_give_the_same_value_tangent_and_gradient():
    net, (at, prompt, directions) = network(), inputs()
    with torch.no_grad():
        expected = list(net(*at, prompt, tangents=directions))
    net(*at, prompt).square().sum().backward()
    for both, gradients in run_two_processes(sharded):
        torch.testing.assert_close(both, expected)
        torch.testing.assert_close(gradients, [parameter.grad for parameter in net.parameters()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_rcm_distils_it(tmp_path, precision):
    teacher = network(torch.float32)
    nn.init.normal_(teacher.head.head.weight, std=0.5)
    weights = tmp_path / "wan.pth"
    torch.save(teacher.state_dict(), weights)
    generator = torch.Generator().manual_seed(0)
    samples = [{"image": torch.randn(4, 2, 4, 4, generator=generator), "prompt": torch.randn(6, 16, generator=generator)} for _ in range(4)]
    other = network(torch.float32)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
    settings = {"condition": "prompt", "guidance": 5.0, "tangent_warmup": 1, "student_every": 2, "sample_steps": (1,)}
    model = RCM(other, teacher_weights=str(weights), learning_rate=1e-3, **settings)
    assert_state_dicts_equal(model.student.state_dict(), teacher.state_dict())
    assert_state_dicts_equal(model.teacher.module.state_dict(), teacher.state_dict())
    before = cloned_state(model)
    trainer = tiny_trainer(max_steps=4, limit_val_batches=0, log_every_n_steps=1, precision=precision)
    trainer.fit(model, DataLoader(samples, batch_size=2))
    after = cloned_state(model)
    for name in ("student", "critic"):
        assert any(not torch.equal(before[key], value) for key, value in after.items() if key.startswith(name))
    assert trainer.callback_metrics["rcm/bad_gradients"] == 0
    assert all(value.isfinite().all() for value in after.values())
