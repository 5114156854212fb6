"""AbsTopK's view of sparse autoencoders as pure functions: activations as proximal maps, features with two signs, steering.

Paper: "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features", arXiv:2510.00404. Golden vectors: the paper's lemma and
equations, and the first author's code (xzAscC/sae@7ed106a src/sae.py, xzAscC/sae@0d21691 src/Top_AbsoluteK/sae.py).

The autoencoder's own step is that of the family, in ``lit_methods.sparse_autoencoders``; here is what this paper adds.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.sparse_autoencoders.activations import abstopk, topk
from lit_methods.sparse_autoencoders.dictionary import dense
from lit_methods.sparse_autoencoders.recovery import max_cosine

# ---- activations as proximal maps ------------------------------------------------------------------------------------------------------

Regulariser = Literal["l1_nonnegative", "l0_nonnegative", "k_sparse_nonnegative", "k_sparse", "l1", "l0"]


class Proximal(NamedTuple):
    """One row of the paper's table: z = prox of R at u = W^T x + b_e.

    Attributes:
        activation: The autoencoder whose activation it is.
        operator: (u, lambda, k) -> the minimiser z of 1/2 ||z - u||^2 + lambda R(z), with the shape of u.
        penalty: z (B, h) -> lambda's factor R(z), (B,), without the indicators.
        nonnegative: R is infinite where an entry is negative.
        k_sparse: R is infinite where more than k entries aren't 0.
    """

    activation: str
    operator: Callable[[Tensor, float, int], Tensor]
    penalty: Callable[[Tensor], Tensor]
    nonnegative: bool = False
    k_sparse: bool = False


def _above(u: Tensor, size: Tensor, threshold: float) -> Tensor:
    return torch.where(size > threshold, u, torch.zeros_like(u))


def _l1(z: Tensor) -> Tensor:
    return z.abs().sum(-1)


def _l0(z: Tensor) -> Tensor:
    return (z != 0).sum(-1).to(z.dtype)


def _nothing(z: Tensor) -> Tensor:
    return z.new_zeros(z.shape[:-1])


PROXIMAL: Mapping[str, Proximal] = {
    "l1_nonnegative": Proximal("relu", lambda u, lambda_, k: (u - lambda_).relu(), _l1, nonnegative=True),
    "l0_nonnegative": Proximal("jumprelu", lambda u, lambda_, k: _above(u, u, (2 * lambda_) ** 0.5), _l0, nonnegative=True),
    "k_sparse_nonnegative": Proximal("topk", lambda u, lambda_, k: dense(topk(u, k)), _nothing, nonnegative=True, k_sparse=True),
    "k_sparse": Proximal("abstopk", lambda u, lambda_, k: dense(abstopk(u, k)), _nothing, k_sparse=True),
    "l1": Proximal("soft_threshold", lambda u, lambda_, k: u.sign() * (u.abs() - lambda_).relu(), _l1),
    "l0": Proximal("two_sided_jumprelu", lambda u, lambda_, k: _above(u, u.abs(), (2 * lambda_) ** 0.5), _l0),
}


def proximal_map(u: Tensor, regulariser: Regulariser, lambda_: float = 0.0, k: int = 1) -> Tensor:
    """The z that makes 1/2 ||z - u||^2 + lambda R(z) smallest: one proximal-gradient step of sparse coding, which is an SAE's encoder.

    Args:
        u: (B, h) pre-activations, floating point.
        regulariser: R: ``l1_nonnegative`` gives ReLU, ``l0_nonnegative`` JumpReLU with the threshold sqrt(2 lambda),
            ``k_sparse_nonnegative`` TopK, ``k_sparse`` AbsTopK, ``l1`` the soft threshold, ``l0`` the two-sided JumpReLU.
        lambda_: Weight of R, >= 0; the k-sparse ones don't use it.
        k: Entries that a row may have; k >= h keeps all. The others don't use it.

    Returns:
        (B, h) in the dtype of ``u``.

    Raises:
        ValueError: An unknown regulariser, or a number outside its range.
    """
    checks.one_of(PROXIMAL, regulariser=regulariser)
    checks.at_least(0, lambda_=lambda_)
    return PROXIMAL[regulariser].operator(u, lambda_, k)


def proximal_objective(z: Tensor, u: Tensor, regulariser: Regulariser, lambda_: float = 0.0, k: int = 1) -> Tensor:
    """1/2 ||z - u||^2 + lambda R(z) of each row, which :func:`proximal_map` makes smallest.

    Args:
        z: (B, h) a code.
        u: (B, h) pre-activations.
        regulariser: R, as in :func:`proximal_map`.
        lambda_: Weight of R, >= 0.
        k: Entries that a row of a k-sparse code may have.

    Returns:
        (B,); infinite where R forbids the code.
    """
    checks.one_of(PROXIMAL, regulariser=regulariser)
    chosen = PROXIMAL[regulariser]
    value = (z - u).square().sum(-1) / 2 + lambda_ * chosen.penalty(z)
    if chosen.nonnegative:
        value = value.masked_fill((z < 0).any(-1), torch.inf)
    if chosen.k_sparse:
        value = value.masked_fill(_l0(z) > k, torch.inf)
    return value


# ---- features with two signs -----------------------------------------------------------------------------------------------------------


def sign_counts(code: Tensor) -> tuple[Tensor, Tensor]:
    """In how many rows each feature is positive, and in how many negative.

    Args:
        code: (B, h) signed activations.

    Returns:
        Two (h,) int64.
    """
    return (code > 0).sum(0), (code < 0).sum(0)


def two_signed_share(positive: Tensor, negative: Tensor, minority: float = 0.0) -> Tensor:
    """Share of the features in use that are active with both signs.

    Args:
        positive: (h,) rows in which each feature is positive.
        negative: (h,) rows in which each feature is negative.
        minority: The rarer sign must make up more than this share of a feature's active rows; 0: appear at all.

    Returns:
        Scalar in [0, 1], float32; 0 when no feature is in use.
    """
    active = positive + negative
    both = torch.minimum(positive, negative) > minority * active
    return both.sum() / (active > 0).sum().clamp(min=1)


def opposite_pairs(directions: Tensor, limit: float = -0.9) -> Tensor:
    """Whether each feature has an opposite: another one whose direction has a cosine below ``limit`` with its own.

    A concept with two poles takes two such features where codes can't be negative.

    Args:
        directions: (h, d) decoder directions, any length.
        limit: Cosine in [-1, 0).

    Returns:
        (h,) bool. The (h, h) cosines are made in pieces.
    """
    return max_cosine(-directions, directions) > -limit


# ---- steering --------------------------------------------------------------------------------------------------------------------------


def clamp_feature(code: Tensor, feature: int, value: float | Tensor) -> Tensor:
    """C_{i,c}: the code with one feature set to a value in every row. c < 0 moves to the opposite pole, 0 ablates.

    Args:
        code: (B, h).
        feature: i in [0, h).
        value: c, a number, or (B,).

    Returns:
        (B, h), a new tensor.

    Raises:
        ValueError: There is no such feature.
    """
    checks.within(f"[0, {code.shape[-1]})", "the number of a feature", feature=feature)
    clamped = code.clone()
    clamped[..., feature] = value
    return clamped


def steer_by_clamping(x: Tensor, code: Tensor, feature: int, value: float | Tensor, directions: Tensor) -> Tensor:
    """Clamping, x + D (z' - z) with z' = C_{i,c}(z): the steered activation keeps what the autoencoder can't reconstruct.

    Args:
        x: (B, d) activations.
        code: (B, h) z, their code.
        feature: i in [0, h).
        value: c, a number, or (B,).
        directions: (h, d) decoder directions; one row of them is used.

    Returns:
        (B, d).

    Raises:
        ValueError: There is no such feature.
    """
    checks.within(f"[0, {code.shape[-1]})", "the number of a feature", feature=feature)
    return x + (value - code[..., feature])[..., None] * directions[feature]


def difference_in_means(positive: Tensor, negative: Tensor) -> Tensor:
    """v: mean of the activations with the concept, less the mean of those without it.

    Args:
        positive: (n1, d), n1 >= 1.
        negative: (n0, d), n0 >= 1.

    Returns:
        (d,).

    Raises:
        ValueError: No rows on one side.
    """
    if not len(positive) or not len(negative):
        raise ValueError(f"difference in means needs rows with and without the concept, got {len(positive)} and {len(negative)}")
    return positive.mean(0) - negative.mean(0)


def add_direction(x: Tensor, direction: Tensor, alpha: float) -> Tensor:
    """Steering along a direction: x + alpha v.

    Args:
        x: (B, d).
        direction: (d,) v, as long as it is.
        alpha: Strength; negative moves to the other side.

    Returns:
        (B, d).
    """
    return x + alpha * direction


def ablate_direction(x: Tensor, direction: Tensor) -> Tensor:
    """Directional ablation, x - (x . v/||v||) v/||v||: nothing is left along v.

    Args:
        x: (B, d).
        direction: (d,) v, any length; a zero direction changes nothing.

    Returns:
        (B, d).
    """
    unit = torch.nn.functional.normalize(direction, dim=0)
    return x - (x @ unit)[:, None] * unit


def concept_score(x: Tensor, positive_mean: Tensor, negative_mean: Tensor) -> Tensor:
    """Where activations lie between the two means: ((x - m0) . v) / ||v||^2 with v = m1 - m0.

    Args:
        x: (B, d).
        positive_mean: (d,) m1, mean of the activations with the concept.
        negative_mean: (d,) m0, mean of those without it.

    Returns:
        (B,): 0 at the mean without the concept, 1 at the mean with it; NaN where the means are equal.
    """
    direction = positive_mean - negative_mean
    return (x - negative_mean) @ direction / direction.square().sum()


__all__ = [
    "ablate_direction",
    "add_direction",
    "clamp_feature",
    "concept_score",
    "difference_in_means",
    "opposite_pairs",
    "proximal_map",
    "proximal_objective",
    "sign_counts",
    "steer_by_clamping",
    "two_signed_share",
]
