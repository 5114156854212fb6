"""S2FT against the authors' code; see tests/golden/data/s2ft/README.md for the origin."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.couplings import Coupling, given_groups, placed_layers

NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nn.Module):
    """The README's toy block: attention and gated MLP, without norms."""

    def __init__(self, case: GoldenCase) -> None:
        super().__init__()
        self.heads = case.hp("n_heads")
        for name in NAMES:
            weight = case.tensor(f"in_{name}_proj_weight")
            layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self, name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def s2ft_block(case: GoldenCase) -> dict[str, Tensor | int]:
    block, x, target = Block(case), case.tensor("in_x"), case.tensor("in_target")
    groups = given_groups(block, [Coupling("o", ["v", "q", "k"], heads=block.heads), Coupling("down", ["up", "gate"])])
    chosen = {
        "o": (case.tensor("in_selected_v_heads"), case.tensor("in_selected_o_heads")),
        "down": (case.tensor("in_selected_up_channels"), case.tensor("in_selected_down_channels")),
    }
    y_before = block(x)
    layers = placed_layers(block, groups, chosen)
    for layer in layers.values():
        layer.attach()
    trained = [layer.values for layer in layers.values() if layer.slice is not None]
    losses = []
    for _ in range(case.hp("steps")):
        loss = (block(x) - target).square().mean()
        losses.append(loss.detach())
        if trained:
            grads = torch.autograd.grad(loss, trained)
            with torch.no_grad():
                for delta, grad in zip(trained, grads, strict=True):
                    delta -= case.hp("lr") * grad
    for layer in layers.values():
        layer.detach()
    fused = {f"out_{name}_proj_weight": getattr(block, name).weight for name in ("up", "down", "v", "o")}
    shown = {"out_y_before": y_before, "out_losses": torch.stack(losses) if losses else torch.zeros(0), "out_y_after": block(x)}
    return {**shown, "out_n_trainable": sum(delta.numel() for delta in trained), **fused}


def s2_linear(case: GoldenCase) -> dict[str, Tensor]:
    x, delta = case.tensor("in_x").requires_grad_(), case.tensor("in_delta").requires_grad_()
    weight, start = case.tensor("in_weight"), case.hp("start")
    y = core.s2_linear(x, weight, delta, start, case.hp("type"))
    grads = torch.autograd.grad(y, (x, delta), case.tensor("in_cotangent"))
    fused = core.fused_weight(weight, delta, start, case.hp("type"))
    return {"out_y": y, "out_grad_x": grads[0], "out_grad_delta": grads[1], "out_fused_weight": fused}


test_golden = golden_test("s2ft", {"s2ft_block": Kind(s2ft_block, rtol=1e-9, atol=1e-12), "s2_linear": Kind(s2_linear, rtol=1e-9)})
