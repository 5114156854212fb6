"""The sparse retriever against the authors' code; the README beside the vectors tells their origin."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.retrieval.ranking import margin_mse, pair_scores, ranking_info_nce, ranking_kl
from lit_methods.retrieval.sparse_retriever.core import (
    document_weights,
    ensemble_scores,
    flops_penalty,
    quadratic_ramp,
    query_weights,
)


def optional(value: Any) -> Any:
    """The cases write -1 for what isn't given."""
    return None if value < 0 else value


def encode_doc(case: GoldenCase) -> dict[str, Any]:
    logits = case.tensor("in_mlm_logits").requires_grad_()
    ratio = optional(case.hp("prune_ratio"))
    weights = document_weights(logits, case.tensor("in_attention_mask"), bool(case.hp("double_log")), ratio)
    (gradient,) = torch.autograd.grad((weights * case.tensor("in_output_weight")).sum(), logits)
    return {"out_rep": weights, "out_grad_mlm_logits": gradient}


def encode_query(case: GoldenCase) -> dict[str, Any]:
    return {"out_rep": query_weights(case.tensor("in_token_ids"), case.tensor("in_idf"), case.tensor("hp_special_token_ids"))}


def flops(case: GoldenCase) -> dict[str, Any]:
    weights, idf, group = case.tensor("in_doc_rep").requires_grad_(), case.tensor("in_idf"), case.hp("docs_per_query")
    value = flops_penalty(weights, group, optional(case.hp("l0_threshold")))
    factor = quadratic_ramp(case.hp("global_step"), case.hp("lambda"), case.hp("lambda_ramp_steps"))
    (gradient,) = torch.autograd.grad(factor * value, weights)
    return {
        "out_flops": value,
        "out_lambda": factor,
        "out_weighted": factor * value,
        "out_grad_doc_rep": gradient,
        "out_idf_flops_of_effective": flops_penalty(idf * weights, group, idf=idf),
    }


def ensemble(case: GoldenCase) -> dict[str, Any]:
    teachers = range(case.hp("num_teachers"))
    queries, documents = ([case.tensor(f"in_teacher{k}_{part}") for k in teachers] for part in ("query", "docs"))
    in_batch = bool(case.hp("use_in_batch_negatives"))
    return {"out_scores": ensemble_scores(queries, documents, in_batch, case.hp("score_scale"), case.hp("eps"))}


def loss(case: GoldenCase) -> dict[str, Any]:
    documents, teacher = case.tensor("in_doc_rep").requires_grad_(), case.tensor("in_teacher_scores")
    scores = pair_scores(case.tensor("in_query_rep"), documents, bool(case.hp("use_in_batch_negatives")))
    kind, temperature = case.hp("loss"), case.hp("temperature")
    if kind == "kldiv":
        value = ranking_kl(scores, teacher, temperature)
    elif kind == "infonce":
        value = ranking_info_nce(scores, case.hp("docs_per_query"), temperature)
    else:
        value = margin_mse(scores, teacher)
    value = case.hp("weight") * value
    return {"out_loss": value, "out_grad_doc_rep": torch.autograd.grad(value, documents)[0]}


test_golden = golden_test(
    "sparse_retriever",
    {
        kind: Kind(adapter, rtol=1e-6, atol=1e-8)
        for kind, adapter in {
            "encode_doc": encode_doc,
            "encode_query": encode_query,
            "flops": flops,
            "ensemble_scores": ensemble,
            "loss": loss,
        }.items()
    },
)
