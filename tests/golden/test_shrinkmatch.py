"""ShrinkMatch against the authors' code; see tests/golden/data/shrinkmatch/README.md for the origin of each kind."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.optim import seven_sixteenths_cosine
from lit_methods.semi.alignment import MarginalQueue, align, moving_marginal
from lit_methods.semi.fixmatch import certain_loss
from lit_methods.semi.shrinkmatch.core import shrink, uncertain_loss


def loss(case: GoldenCase) -> dict[str, Any]:
    p = case.tensor("in_prob_weak")
    strong, auxiliary = (case.tensor(f"in_logits_{name}").requires_grad_() for name in ("strong", "strong_aux"))
    certain = p.amax(dim=1) >= case.hp("threshold")
    shrunk = shrink(p, case.hp("threshold"))
    ratio = moving_marginal(
        torch.tensor(case.hp("certain_ratio_ema_prev"), dtype=p.dtype), certain.to(p.dtype).mean(), case.hp("ema_decay")
    )
    soft, extra = certain_loss(strong, p, certain), uncertain_loss(auxiliary, p, certain, shrunk)
    total = soft + ratio * extra
    grads = torch.autograd.grad(total, [strong, auxiliary], allow_unused=True, materialize_grads=True)
    return {
        "out_mask": certain.to(p.dtype),
        "out_loss_certain": soft,
        "out_loss_certain_hard_label": certain_loss(strong, p, certain, hard=True),
        "out_loss_shrink": extra,
        "out_certain_ratio_ema": ratio,
        "out_loss_unlabeled_total": total,
        "out_cut_index": torch.where(certain, -1, shrunk.cut),
        "out_grad_logits_strong": grads[0],
        "out_grad_logits_strong_aux": grads[1],
    }


def loss_logits_variant(case: GoldenCase) -> dict[str, Any]:
    raw = case.tensor("in_logits_weak").softmax(dim=1)
    strong, auxiliary = (case.tensor(f"in_logits_{name}").requires_grad_() for name in ("strong", "strong_aux"))
    marginal, p = case.tensor("in_p_model_prev"), raw
    if case.hp("use_da"):
        marginal = moving_marginal(marginal if len(marginal) else None, raw.mean(dim=0))
        p = align(raw, marginal)
    certain = p.amax(dim=1) >= case.hp("threshold")
    shrunk = shrink(raw, case.hp("threshold"))
    hard, extra = certain_loss(strong, p, certain, hard=True), uncertain_loss(auxiliary, p, certain, shrunk)
    grads = torch.autograd.grad(hard + extra, [strong, auxiliary], allow_unused=True, materialize_grads=True)
    uncertain = ~certain
    count = uncertain.sum() + 1e-5
    return {
        "out_loss_certain": hard,
        "out_mask_ratio": certain.to(p.dtype).mean(),
        "out_loss_shrink": extra,
        "out_mean_cut_index": (shrunk.cut.clamp(min=0) * uncertain).sum().double() / count,
        "out_mean_uncertain_conf": (p.amax(dim=1) * uncertain).sum() / count,
        "out_p_model": marginal,
        "out_grad_logits_strong": grads[0],
        "out_grad_logits_strong_aux": grads[1],
    }


def distribution_alignment(case: GoldenCase) -> dict[str, Any]:
    steps = case.tensor("in_prob_weak_steps")
    queue = MarginalQueue(case.hp("queue_len"), steps.shape[2]).to(steps.dtype)
    aligned = [align(step, queue.push(step.mean(dim=0))) for step in steps]
    return {"out_prob_aligned_steps": torch.stack(aligned), "out_queue": queue.queue, "out_ptr": queue.pointer}


def lr_schedule(case: GoldenCase) -> dict[str, Any]:
    factors = [seven_sixteenths_cosine(int(step), case.hp("total_steps"), case.hp("warmup_steps")) for step in case.arrays["in_step"]]
    return {"out_lr": case.hp("base_lr") * torch.tensor(factors, dtype=torch.float64)}


test_golden = golden_test(
    "shrinkmatch",
    {
        "loss": Kind(loss, rtol=1e-6, atol=1e-8),
        "loss_logits_variant": Kind(loss_logits_variant, rtol=1e-6, atol=1e-8, overrides={"out_mask_ratio": (1e-6, 1e-6)}),
        "distribution_alignment": Kind(distribution_alignment, rtol=1e-6, atol=1e-8),
        "lr_schedule": Kind(lr_schedule, rtol=1e-6, atol=1e-8),
    },
)
