"""CoPrompt against the authors' code; see tests/golden/data/coprompt/README.md for the origin of each kind."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.optim import warmup_cosine_rate
from lit_methods.prompting.coprompt.core import coprompt_loss
from lit_methods.prompting.towers import ResidualBlock, run_prompted_blocks


def loss(case: GoldenCase) -> dict[str, Tensor]:
    names = ["image_feat", "text_feat", *(f"adapter_{tower}_{weight}" for tower in ("image", "text") for weight in ("w1", "w2"))]
    leaves = {name: case.tensor(f"in_{name}").requires_grad_() for name in names}
    found = coprompt_loss(
        leaves["image_feat"],
        leaves["text_feat"],
        case.tensor("in_teacher_image_feat"),
        case.tensor("in_teacher_text_feat"),
        case.tensor("in_label"),
        logit_scale=case.hp("logit_scale"),
        consistency_weight=case.hp("lambda"),
        criterion=case.hp("criterion"),
        image_adapter=(leaves["adapter_image_w1"], leaves["adapter_image_w2"]),
        text_adapter=(leaves["adapter_text_w1"], leaves["adapter_text_w2"]),
        image_mix=case.hp("image_adapter_mix"),
        text_mix=case.hp("text_adapter_mix"),
    )
    grads = torch.autograd.grad(found.total, list(leaves.values()), materialize_grads=True)
    outputs = {"logits": found.logits, "loss_ce": found.cross_entropy, "loss_consistency": found.consistency, "loss_total": found.total}
    return {f"out_{name}": value for name, value in outputs.items()} | {
        f"out_grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def prompt_transformer(case: GoldenCase) -> dict[str, Tensor]:
    tokens, prompts = case.tensor("in_tokens").requires_grad_(), case.tensor("in_deep_prompts").requires_grad_()
    text = bool(case.hp("is_text"))
    blocks = []
    for layer in range(case.hp("num_layers")):
        block = ResidualBlock(tokens.shape[2], case.hp("num_heads"), causal=text).to(tokens.dtype)
        names = ("attn_in_proj", "attn_out_proj", "ln_1", "ln_2", "mlp_c_fc", "mlp_c_proj")
        block.load_state_dict({f"{n}.{part}": case.tensor(f"in_{n}_{part}")[layer] for n in names for part in ("weight", "bias")})
        blocks.append(block)
    out = run_prompted_blocks(blocks, tokens.transpose(0, 1), prompts, "after_first" if text else "end").transpose(0, 1)
    grads = torch.autograd.grad(out, [tokens, prompts], case.tensor("in_output_weight"), allow_unused=True, materialize_grads=True)
    return {"out_tokens": out, "out_grad_tokens": grads[0], "out_grad_deep_prompts": grads[1]}


def lr_schedule(case: GoldenCase) -> dict[str, Tensor]:
    hp = [case.hp(name) for name in ("base_lr", "max_epoch", "warmup_epochs", "warmup_lr")]
    return {"out_lr": torch.tensor([warmup_cosine_rate(int(epoch), *hp) for epoch in case.arrays["in_epoch"]], dtype=torch.float64)}


test_golden = golden_test(
    "coprompt",
    {
        "loss": Kind(loss, rtol=1e-6, atol=1e-8),
        "prompt_transformer": Kind(prompt_transformer, rtol=1e-6, atol=1e-8),
        "lr_schedule": Kind(lr_schedule, rtol=1e-6, atol=1e-9),
    },
)
