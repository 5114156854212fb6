"""SimMatchV2 against the authors' code; see tests/golden/data/simmatchv2/README.md for the origin of each kind."""

from typing import Any

import torch
import torch.nn.functional as F

from golden import GoldenCase, Kind, golden_test
from lit_methods.averages import ema_update
from lit_methods.optim import warmup_then_epoch_cosine
from lit_methods.semi.simmatchv2.core import GraphConsistency


def losses(case: GoldenCase) -> dict[str, Any]:
    graph = GraphConsistency(
        labelled=len(case.arrays["in_label_bank"]),
        bank_size=len(case.arrays["in_unlabeled_bank"]),
        num_classes=case.arrays["in_da"].shape[1],
        embedding_dim=case.arrays["in_label_bank"].shape[1],
        temperature=case.hp("temperature"),
        alpha=case.hp("alpha"),
        neighbours=case.hp("topn"),
        threshold=case.hp("threshold"),
        distribution_alignment=bool(case.hp("use_da")),
        alignment_momentum=case.hp("da_momentum"),
    ).double()
    classes, bank_classes = case.arrays["in_da"].shape[1], case.tensor("in_label_bank_class")
    graph.load_state_dict(
        {
            "label_bank": case.tensor("in_label_bank"),
            "label_bank_class": bank_classes,
            "bank": case.tensor("in_unlabeled_bank"),
            "bank_probability": case.tensor("in_unlabeled_bank_prob"),
            "pointer": torch.tensor([int(case.arrays["in_bank_ptr"])]),
            "marginal": case.tensor("in_da").view(classes),
        }
    )
    labelled, strong, embedding = (
        case.tensor(f"in_{name}").requires_grad_() for name in ("logits_labeled", "logits_strong", "feat_strong")
    )
    found = graph(case.tensor("in_ema_logits_weak"), case.tensor("in_ema_feat_weak"), strong, embedding)
    supervised = F.cross_entropy(labelled, case.tensor("in_target_labeled"))
    total = supervised
    for name in ("nn", "ee", "ne"):
        total = total + case.hp(f"lambda_{name}") * getattr(found, name)
    grads = torch.autograd.grad(total, [labelled, strong, embedding], allow_unused=True, materialize_grads=True)
    graph.store(case.tensor("in_index_labeled"), case.tensor("in_ema_feat_labeled"), case.tensor("in_ema_feat_weak"), found)
    return {
        "out_prob_weak": found.probability,
        "out_pseudo_label": found.pseudo_label,
        "out_mask": found.certain.double(),
        "out_loss_sup": supervised,
        "out_loss_nn": found.nn,
        "out_loss_ee": found.ee,
        "out_loss_ne": found.ne,
        "out_loss_total": total,
        "out_da": graph.marginal[None],
        "out_label_bank": graph.label_bank,
        "out_unlabeled_bank": graph.bank,
        "out_unlabeled_bank_prob": graph.bank_probability,
        "out_bank_ptr": graph.pointer,
        "out_grad_logits_labeled": grads[0],
        "out_grad_logits_strong": grads[1],
        "out_grad_feat_strong": grads[2],
    }


def lr_schedule(case: GoldenCase) -> dict[str, Any]:
    recipe = (case.hp("steps_per_epoch"), case.hp("epochs"), case.hp("warmup_epochs"))
    factors = [warmup_then_epoch_cosine(int(step), *recipe) for step in case.arrays["in_step"]]
    return {"out_lr": case.hp("base_lr") * torch.tensor(factors, dtype=torch.float64)}


def ema_step(case: GoldenCase) -> dict[str, Any]:
    average = case.tensor("in_weight_ema")
    ema_update([average], [case.tensor("in_weight_online")], case.hp("momentum"))
    return {"out_weight_ema": average}


test_golden = golden_test(
    "simmatchv2",
    {
        "losses": Kind(losses, rtol=1e-6, atol=1e-8),
        "lr_schedule": Kind(lr_schedule, rtol=1e-6, atol=1e-8),
        "ema_update": Kind(ema_step, rtol=1e-6, atol=1e-8),
    },
)
