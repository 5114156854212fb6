"""SparseD: block selection, the whole pattern, the schedule, LLaDA's loop."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.sparse_attention.sparsed.core import attention_block_mask, selection_step, sparsed_pattern, step_modes
from lit_methods.tasks.language.denoising import DenoisingStep, llada_generate, transfer_counts


def block_selection(case: GoldenCase) -> dict[str, Tensor]:
    mask = attention_block_mask(case.tensor("in_attention_weights"), case.hp("block_size"), case.hp("keep_ratio"))
    return {"out_block_mask": mask, "out_kept_per_query_block": mask.sum(-1)}


def schedule(case: GoldenCase) -> dict[str, Tensor]:
    return {"out_mode_per_step": step_modes(case.hp("whole_steps"), case.hp("skip"))}


def llada_sampler(case: GoldenCase) -> dict[str, Tensor]:
    token, position, context = (case.tensor(f"in_{name}_table") for name in ("token", "position", "context"))
    prompt, seen, steps = case.tensor("in_prompt"), list[Tensor](), list[int]()

    def denoiser(tokens: Tensor) -> Tensor:
        return token[tokens] + position[: tokens.shape[1]] + context[tokens].mean(1, keepdim=True)

    def announce(step: DenoisingStep) -> None:
        steps.append(step.index)
        seen.append(step.tokens[0])

    sizes = (case.hp("mask_id"), case.hp("gen_length"), case.hp("block_length"), case.hp("steps"))
    found = llada_generate(denoiser, prompt, *sizes, announce=announce)
    each = case.hp("steps") * case.hp("block_length") // case.hp("gen_length")
    first = transfer_counts(torch.ones(len(prompt), case.hp("block_length"), dtype=torch.bool), each)
    return {
        "out_tokens": found,
        "out_model_inputs_per_step": torch.stack(seen),
        "out_now_step": torch.tensor(steps),
        "out_num_transfer_tokens_first_block": first,
    }


def pattern(case: GoldenCase) -> dict[str, Tensor | int]:
    q, k, v, q_next, k_next, v_next = (case.tensor(f"in_{name}") for name in ("q", "k", "v", "q_next", "k_next", "v_next"))
    size = case.hp("block_size")
    mask, first = sparsed_pattern(q, k, size, case.hp("select"), case.hp("new_generation"))
    tokens = mask.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., : q.shape[2], : k.shape[2]]
    attend = torch.nn.functional.scaled_dot_product_attention
    return {
        "out_end_step": selection_step(case.hp("whole_steps"), case.hp("skip")),
        "out_first_generation_block": first,
        "out_block_mask": mask,
        "out_attention_at_end_step": attend(q, k, v),
        "out_sparse_attention_next_step": attend(q_next, k_next, v_next, attn_mask=tokens),
    }


test_golden = golden_test(
    "sparsed",
    {
        "block_selection": Kind(block_selection),
        "llada_sampler": Kind(llada_sampler),
        "pattern": Kind(pattern, atol=1e-4),
        "schedule": Kind(schedule),
    },
)
