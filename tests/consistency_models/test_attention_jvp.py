"""Attention with tangent: against torch.func.jvp on plain attention, against its gradients, in linear memory, and as a Triton kernel."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent, blockwise_attention, plain_attention

SELF, CROSS = (2, 3, 17, 17, 8, 8), (1, 2, 9, 22, 4, 6)  # B, H, S, S_kv, D, D_v


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    """q, k, v and their tangents."""
    b, h, s, s_kv, d, d_v = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, s, d), (b, h, s_kv, d), (b, h, s_kv, d_v)]
    return [size * torch.randn(one, generator=generator, dtype=torch.float64).to(dtype) for one in (*shapes, *shapes)]


def reference(tensors: list[Tensor], scale: float | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (o, lse), (to, tlse) = torch.func.jvp(lambda q, k, v: plain_attention(q, k, v, scale), tuple(tensors[:3]), tuple(tensors[3:]))
    return o, to, lse, tlse


@pytest.mark.parametrize("shape", [SELF, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 1000])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_derivative_of_plain_attention(shape, block_size, scale):
    tensors = drawn(shape)
    o, to, lse, _ = reference(tensors, scale)
    ours = attention_with_tangent(*tensors, scale=scale, block_size=block_size)
    for mine, theirs in zip(ours, (o, to, lse), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 3, 16, 1000])
def test_func_jvp_goes_through_the_blockwise_form(block_size):
    tensors = drawn(CROSS)
    expected = reference(tensors)
    found = torch.func.jvp(lambda *x: blockwise_attention(*x, block_size=block_size), tuple(tensors[:3]), tuple(tensors[3:]))
    ours = found[0][0], found[1][0], found[0][1], found[1][1]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_tangent_of_one_input_alone():
    q, k, v, tq, _, _ = drawn(SELF)
    ours = torch.func.jvp(lambda q: blockwise_attention(q, k, v, block_size=5)[0], (q,), (tq,))[1]
    theirs = torch.func.jvp(lambda q: plain_attention(q, k, v)[0], (q,), (tq,))[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 3, 16, 1000])
def test_gradients_are_those_of_plain_attention(block_size):
    leaves = [tensor.requires_grad_() for tensor in drawn(CROSS)]
    direction = torch.randn(1, 2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = attention_with_tangent(*leaves, block_size=block_size)
    assert not ours.tangent.requires_grad
    assert not ours.lse.requires_grad
    plain = plain_attention(*leaves[:3])
    found = torch.autograd.grad(ours.output, leaves[:3], direction)
    for mine, theirs in zip(found, torch.autograd.grad(plain[0], leaves[:3], direction), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_both_results_of_the_blockwise_form_have_gradients():
    leaves = [tensor.requires_grad_() for tensor in drawn(CROSS)[:3]]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((1, 2, 9, 6), (1, 2, 9))]
    ours, plain = blockwise_attention(*leaves, block_size=4), plain_attention(*leaves)
    for mine, theirs in zip(*(torch.autograd.grad(results, leaves, weights) for results in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_huge_scores_neither_overflow_nor_vanish():
    tensors = drawn(SELF, size=60.0)
    ours, theirs = attention_with_tangent(*tensors, block_size=4), reference(tensors)
    assert ours.lse.amax() > 800, "exp of these scores overflows"
    torch.testing.assert_close(ours.output, theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.tangent, theirs[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_is_summed_in_float32_also_under_autocast(dtype, limit):
    tensors = drawn((1, 2, 64, 64, 16, 16), dtype)
    exact = reference([tensor.double() for tensor in tensors])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention_with_tangent(*tensors, block_size=16)
    assert ours.lse.dtype == torch.float32
    torch.testing.assert_close(ours.lse.double(), exact[2], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours[:2], exact[:2], strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= limit * theirs.abs().max()


class Block(nn.Module):
    """A transformer block of one head, with attention of one's choice."""

    def __init__(self, attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, dim=-1)
        return x + self.out(torch.tanh(self.attention(q, k, v)[0][:, 0]))


def test_a_whole_network_with_blockwise_attention():
    ours, plain = Block(functools.partial(blockwise_attention, block_size=4)).double(), Block(plain_attention).double()
    x, t = (torch.randn(2, 11, 8, dtype=torch.float64) for _ in range(2))
    for mine, theirs in zip(*(torch.func.jvp(net, (x,), (t,)) for net in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    peaks = []
    for tokens in (256, 1024):
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                found = func(*args, **(kwargs or {}))
                if isinstance(found, Tensor):
                    largest = max(largest, found.numel())
                return found

        tensors = drawn((1, 1, tokens, tokens, 8, 8), torch.float32)
        with Watch():
            attention_with_tangent(*tensors, block_size=32)
        peaks.append(largest)
    assert peaks[1] <= 4 * peaks[0], f"the largest tensors have {peaks} numbers"
    assert peaks[1] < 1024 * 1024


def test_misfits_are_refused():
    tensors = drawn(SELF)
    with pytest.raises(ValueError, match="don't fit"):
        blockwise_attention(tensors[0], tensors[1][..., :4], tensors[2])
    with pytest.raises(ValueError, match="at least one key"):
        blockwise_attention(tensors[0], tensors[1][:, :, :0], tensors[2][:, :, :0])
    with pytest.raises(ValueError, match="tangent_k"):
        attention_with_tangent(*tensors[:4], tensors[4][:1], tensors[5])
    with pytest.raises(ValueError, match="block_size"):
        blockwise_attention(*tensors[:3], block_size=0)
    with pytest.raises(ValueError, match="backend"):
        blockwise_attention(*tensors[:3], backend="cuda")  # type: ignore[arg-type]


INTERPRETED = """
import torch
from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent, blockwise_attention, plain_attention

for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 5e-3)):
    for s, s_kv, d in ((40, 40, 16), (7, 45, 32)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 2, s, d), (1, 2, s_kv, d), (1, 2, s_kv, d)]
        q, k, v, *tangents = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes * 2)
        exact = [x.double() for x in (q, k, v)], [x.double() for x in tangents]
        (o, lse), (to, tlse) = torch.func.jvp(plain_attention, tuple(exact[0]), tuple(exact[1]))
        leaf = q.clone().requires_grad_()
        found = attention_with_tangent(leaf, k, v, *tangents, backend="triton")
        for name, mine, theirs in (("o", found.output, o), ("to", found.tangent, to), ("lse", found.lse, lse)):
            error = (mine.double() - theirs).abs().max() / theirs.abs().max()
            assert error < limit, (dtype, s, name, error)
        (gradient,) = torch.autograd.grad(found.output.float().sum(), leaf)
        wanted = torch.func.grad(lambda x: plain_attention(x, *exact[0][1:])[0].sum())(exact[0][0])
        assert (gradient.double() - wanted).abs().max() < 10 * limit * max(1, wanted.abs().max()), (dtype, s, "gradient")
        through = torch.func.jvp(lambda *x: blockwise_attention(*x, backend="triton"), (q, k, v), tuple(tangents))
        assert (through[1][1].double() - tlse).abs().max() < limit * tlse.abs().max(), (dtype, s, "tangent of lse")
print("the kernel agrees")
"""


def test_the_triton_kernel_in_its_interpreter(tmp_path):
    pytest.importorskip("triton", reason="Triton isn't installed")
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    import os

    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the kernel agrees" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_triton_kernel_on_a_gpu():
    tensors = [tensor.cuda() for tensor in drawn((2, 3, 300, 200, 64, 64), torch.float16)]
    exact = reference([tensor.double() for tensor in tensors])
    for mine, theirs in zip(attention_with_tangent(*tensors, backend="triton"), exact, strict=False):
        assert (mine.double() - theirs).abs().max() < 1e-2 * theirs.abs().max()
