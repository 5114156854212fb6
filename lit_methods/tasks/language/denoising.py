"""Masked diffusion of tokens as pure functions: LLaDA's noise and objective, and the loops of LLaDA and Dream that turn masks into text.

Papers: LLaDA, arXiv:2502.09992 (mem), and Dream, arXiv:2508.15487 (mem). LLaDA's loop is tested by golden vectors of SparseD's authors'
code (INV-WZQ/SparseD@52155b4 models/LLaDA/generate.py); Dream's is written from a description and has no vectors.

A denoiser is any function (B, L) tokens -> (B, L, V) logits of what stands at each position. One that was adapted from a causal model, as
Dream's, predicts the token that follows: put :func:`shifted_right` behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks

Confidence = Literal["maskgit_plus", "topk_margin", "entropy"]
LEAST_RATE = 1e-3  # of masking: the weight 1 / p stays finite (mem)


@dataclass(frozen=True)
class DenoisingStep:
    """A run of the model in a generation.

    Attributes:
        index: Its number, from 0.
        steps: How many there are in all.
        tokens: (B, L) int64, what goes into the model: prompt, and answer with its masks.
        new_tokens: Tokens of the answer, at the end.
    """

    index: int
    steps: int
    tokens: Tensor
    new_tokens: int


Denoiser = Callable[[Tensor], Tensor]
Announce = Callable[[DenoisingStep], None]

# ---- the objective ---------------------------------------------------------------------------------------------------------------------


def masking_rates(uniform: Tensor) -> Tensor:
    """P = (1 - eps) t + eps with eps = 1e-3: how likely each token of a sequence is masked.

    Args:
        uniform: (B,) t in [0, 1).

    Returns:
        (B,) in [eps, 1).
    """
    return (1 - LEAST_RATE) * uniform + LEAST_RATE


def mask_tokens(tokens: Tensor, rates: Tensor, uniform: Tensor, mask_token: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Each token becomes the mask with its sequence's probability, independently of the others.

    Args:
        tokens: (B, L) int64.
        rates: (B,) p, from :func:`masking_rates`.
        uniform: (B, L) random numbers in [0, 1).
        mask_token: The token that stands for a mask.
        start: Tokens at the front that are never masked: the prompt.

    Returns:
        (B, L) int64 tokens with masks, and (B, L) bool: where they are.
    """
    masked = uniform < rates[:, None]
    masked[:, :start] = False
    return tokens.masked_fill(masked, mask_token), masked


def masked_diffusion_loss(logits: Tensor, tokens: Tensor, masked: Tensor, rates: Tensor, length: int) -> Tensor:
    """Sum over the masked tokens of cross-entropy / p, per sequence and token: a bound of the negative log-likelihood of a token.

    Args:
        logits: (B, L, V) of what stands at each position.
        tokens: (B, L) int64, the text.
        masked: (B, L) bool, where the model saw a mask.
        rates: (B,) p of each sequence.
        length: Tokens of a sequence that could be masked, >= 1.

    Returns:
        Scalar in nats, float32 or wider; 0 where nothing is masked.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(wide.transpose(1, 2), tokens, reduction="none")
        return (losses * masked / rates[:, None]).sum() / (len(tokens) * length)


# ---- choosing tokens -------------------------------------------------------------------------------------------------------------------


def shifted_right(logits: Tensor) -> Tensor:
    """Logits of a model that predicts what follows, moved to the position that they are about; the first stays.

    Args:
        logits: (B, L, V).

    Returns:
        (B, L, V): position j has what the model said at j - 1.
    """
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def gumbel_scores(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """exp(logits) / (-log U)^temperature in float64, whose largest entry is the sampled token; the logits themselves at temperature 0.

    Args:
        logits: (..., V).
        temperature: >= 0.
        uniform: (..., V) float64 random numbers in [0, 1); not used at temperature 0.
    """
    if temperature == 0:
        return logits
    if uniform is None:
        raise ValueError(f"temperature is {temperature}, which needs random numbers: pass a generator, or set it to 0")
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Only the most likely tokens that together have the probability ``top_p`` keep their logits; the first always does.

    Args:
        logits: (..., V).
        top_p: In (0, 1]; 1 keeps all.

    Returns:
        (..., V), -inf elsewhere.
    """
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what the likelier tokens have
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
    return logits.masked_fill(dropped, -torch.inf)


def token_confidence(probabilities: Tensor, chosen: Tensor, kind: Confidence) -> Tensor:
    """How sure the model is of the tokens that it chose.

    Args:
        probabilities: (..., V).
        chosen: (...) int64, the tokens.
        kind: ``maskgit_plus``: their probability; ``topk_margin``: the largest probability less the second; ``entropy``: the negative
            entropy, in nats.

    Returns:
        (...), larger: surer.
    """
    checks.one_of(Confidence, kind=kind)
    if kind == "topk_margin":
        best = probabilities.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    if kind == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    return probabilities.gather(-1, chosen[..., None])[..., 0]


def reveal(tokens: Tensor, chosen: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """The surest positions of each sequence get the tokens that were chosen for them.

    Args:
        tokens: (B, L) int64.
        chosen: (B, L) int64.
        confidence: (B, L), -inf where nothing may be revealed.
        counts: (B,) int64, positions to reveal; those with -inf are left as they are.

    Returns:
        (B, L) int64, a new tensor.
    """
    most = min(int(counts.max()), tokens.shape[1])
    best = confidence.topk(most, dim=1)
    taken = (torch.arange(most, device=tokens.device) < counts[:, None]) & (best.values > -torch.inf)
    places = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, best.indices, taken)
    return torch.where(places, chosen, tokens)


# ---- LLaDA's loop ----------------------------------------------------------------------------------------------------------------------


def transfer_counts(masked: Tensor, steps: int) -> Tensor:
    """How many tokens each step of a block reveals: as many in each, and one more in the first steps where that doesn't come out even.

    Args:
        masked: (B, n) bool, the masks of the block.
        steps: Steps for the block, >= 1.

    Returns:
        (B, steps) int64.
    """
    number = masked.sum(1, keepdim=True)
    return number // steps + (torch.arange(steps, device=masked.device) < number % steps)


def llada_schedule(steps: int, new_tokens: int, block_length: int) -> tuple[int, int]:
    """Blocks of the answer, and steps for each.

    Args:
        steps: S, of the whole generation.
        new_tokens: Tokens of the answer, >= 1.
        block_length: Tokens of a block.

    Raises:
        ValueError: The answer is no whole number of blocks, or the steps no whole number per block.
    """
    checks.at_least(1, steps=steps, new_tokens=new_tokens, block_length=block_length)
    if new_tokens % block_length:
        raise ValueError(f"block_length is {block_length}: give a divisor of the answer's {new_tokens} tokens")
    blocks = new_tokens // block_length
    if steps % blocks:
        raise ValueError(f"steps is {steps}: give a multiple of the {blocks} blocks ({new_tokens} tokens, {block_length} in a block)")
    return blocks, steps // blocks


@torch.no_grad()
def llada_generate(
    denoiser: Denoiser,
    prompt: Tensor,
    mask_token: int,
    new_tokens: int,
    block_length: int,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    announce: Announce | None = None,
) -> Tensor:
    """LLaDA's sampling: block after block from left to right, and within one the surest tokens first (low-confidence remasking).

    Args:
        denoiser: (B, L) int64 -> (B, L, V) logits.
        prompt: (B, P) int64.
        mask_token: The token that stands for a mask.
        new_tokens: Tokens of the answer, which follows the prompt.
        block_length: Tokens of a block; divides ``new_tokens``.
        steps: S, runs of the model in all; a multiple of the number of blocks.
        temperature: 0: the likeliest token; else Gumbel noise in float64.
        generator: For temperatures above 0.
        announce: Called before each run of the model.

    Returns:
        (B, P + new_tokens) int64.

    Raises:
        ValueError: Numbers that don't fit.
    """
    blocks, each = llada_schedule(steps, new_tokens, block_length)
    checks.at_least(0, temperature=temperature)
    start = prompt.shape[1]
    tokens = F.pad(prompt, (0, new_tokens), value=mask_token)
    for block in range(blocks):
        begin, end = start + block * block_length, start + (block + 1) * block_length
        counts = transfer_counts(tokens[:, begin:end] == mask_token, each)
        for i in range(each):
            if announce is not None:
                announce(DenoisingStep(i + block * each, steps, tokens, new_tokens))
            logits = denoiser(tokens)
            masked = tokens == mask_token
            noise = None if temperature == 0 or generator is None else _uniform(logits, generator)
            chosen = gumbel_scores(logits, temperature, noise).argmax(-1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            confidence = token_confidence(logits.to(wide).softmax(-1), chosen, "maskgit_plus")
            confidence[:, end:] = -torch.inf
            tokens = reveal(tokens, chosen, confidence.masked_fill(~masked, -torch.inf), counts[:, i])
    return tokens


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, dtype=torch.float64, generator=generator, device=generator.device).to(like.device)


# ---- Dream's loop ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dream_generate(
    denoiser: Denoiser,
    prompt: Tensor,
    mask_token: int,
    new_tokens: int,
    steps: int,
    temperature: float = 0.05,
    top_p: float = 0.95,
    confidence: Confidence = "maskgit_plus",
    last_time: float = 1e-3,
    generator: torch.Generator | None = None,
    announce: Announce | None = None,
) -> Tensor:
    """Dream's sampling: the whole answer at once, the surest tokens first.

    t falls from 1 to ``last_time`` in equal steps. A step from t to s reveals int(n (1 - s / t)) of the n masks that are left, the last
    step all of them.

    Args:
        denoiser: (B, L) int64 -> (B, L, V) logits of what stands at each position; around Dream's own model, :func:`shifted_right`.
        prompt: (B, P) int64.
        mask_token: The token that stands for a mask.
        new_tokens: Tokens of the answer, which follows the prompt.
        steps: S, runs of the model.
        temperature: The logits are divided by it; 0: the likeliest token.
        top_p: Share of the probability that is sampled from.
        confidence: Which tokens go first, as in :func:`token_confidence`.
        last_time: t at the end, in (0, 1).
        generator: For temperatures above 0.
        announce: Called before each run of the model.

    Returns:
        (B, P + new_tokens) int64.

    Raises:
        ValueError: Numbers outside their range.
    """
    checks.at_least(1, steps=steps, new_tokens=new_tokens)
    checks.at_least(0, temperature=temperature)
    checks.within("(0, 1]", "a share", top_p=top_p)
    checks.within("(0, 1)", "a time", last_time=last_time)
    tokens = F.pad(prompt, (0, new_tokens), value=mask_token)
    times = torch.linspace(1, last_time, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        if announce is not None:
            announce(DenoisingStep(i, steps, tokens, new_tokens))
        logits = denoiser(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        masked = tokens == mask_token
        probabilities = nucleus(logits / temperature if temperature > 0 else logits, top_p).softmax(-1)
        if temperature > 0:
            if generator is None:
                raise ValueError(f"temperature is {temperature}, which needs random numbers: pass a generator, or set it to 0")
            # the largest p / E with exponential E is a draw from p
            chosen = (probabilities / -_uniform(probabilities, generator).clamp(min=1e-30).log()).argmax(-1)
        else:
            chosen = probabilities.argmax(-1)
        sure = token_confidence(probabilities, chosen, confidence).masked_fill(~masked, -torch.inf)
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1.0
        tokens = reveal(tokens, chosen, sure, (masked.sum(1) * share).long())
    return tokens


__all__ = [
    "DenoisingStep",
    "dream_generate",
    "gumbel_scores",
    "llada_generate",
    "llada_schedule",
    "mask_tokens",
    "masked_diffusion_loss",
    "masking_rates",
    "nucleus",
    "reveal",
    "shifted_right",
    "token_confidence",
    "transfer_counts",
]
