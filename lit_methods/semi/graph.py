"""Graph consistency: labels and similarities of one view, read through the edges of another (SimMatchV2, arXiv:2308.06692, section 3).

Nodes are images with a class distribution and an embedding, edges are similarities of embeddings. Golden vectors come from
mingkai-zheng/SimMatchV2@f0e054c (models/simmatchv2.py, main.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to a similarity that must not count: large enough to vanish in the softmax, small enough for float32.
_NEVER = -1e9


def edges(embedding: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Similarity distribution over a bank.

    Args:
        embedding: (..., D) unit vectors.
        bank: (K, D) unit vectors.
        temperature: t > 0.

    Returns:
        (..., K), rows sum to 1.
    """
    return (embedding @ bank.T / temperature).softmax(dim=-1)


@torch.no_grad()
def propagate(
    probability: Tensor, embedding: Tensor, bank: Tensor, bank_labels: Tensor, neighbours: int, temperature: float, alpha: float
) -> Tensor:
    """Pseudo labels by label propagation on the graph of each image and its nearest labelled ones (edge-node consistency).

    With A the row-wise softmax of the similarities / t, without self-loops, and Y the class distributions: the first row of
    (1 - alpha) (I - alpha A)^-1 Y.

    Args:
        probability: (B, C) of the images.
        embedding: (B, D) unit vectors of the images.
        bank: (N, D) unit vectors of the labelled images.
        bank_labels: (N, C) one-hot, or (N,) int64.
        neighbours: Nearest labelled images in each graph, 1..N.
        temperature: t > 0.
        alpha: In [0, 1): how far labels travel.

    Returns:
        (B, C), rows sum to 1, in the dtype of ``probability``.

    Raises:
        ValueError: More neighbours than the bank has entries.
    """
    if neighbours > len(bank):
        raise ValueError(f"{neighbours} neighbours of a bank of {len(bank)} labelled images: give as many as there are, or fewer")
    if bank_labels.ndim == 1:
        bank_labels = F.one_hot(bank_labels, probability.shape[1]).to(probability.dtype)
    nearest = (embedding @ bank.T).topk(neighbours, dim=1).indices
    features = torch.cat([embedding[:, None], bank[nearest]], dim=1)  # (B, n, D)
    labels = torch.cat([probability[:, None], bank_labels[nearest].to(probability.dtype)], dim=1)  # (B, n, C)
    identity = torch.eye(neighbours + 1, dtype=features.dtype, device=features.device)
    transition = (features @ features.mT / temperature + _NEVER * identity).softmax(dim=-1)
    first = identity[:1].mT.expand(len(features), -1, -1)  # the first row of an inverse is a solution with its transpose
    shares = (1 - alpha) * torch.linalg.solve((identity - alpha * transition).mT, first)
    return (shares.to(labels.dtype) * labels).sum(dim=1)


def node_node_loss(logits: Tensor, target: Tensor, certain: Tensor) -> Tensor:
    """Cross-entropy of every strong view with the pseudo label, over certain rows, divided by all rows of all views.

    Args:
        logits: (S, B, C) of S strong views.
        target: (B, C) pseudo labels, no gradient.
        certain: (B,) bool.
    """
    return (-(target * logits.log_softmax(dim=-1)).sum(dim=-1) * certain).mean()


def edge_edge_loss(strong: Tensor, weak: Tensor) -> Tensor:
    """Cross-entropy of edges: -sum_k e_w log e_s, mean over images and views.

    Args:
        strong: (S, B, K) edges of the strong views.
        weak: (B, K) edges of the weak view, no gradient.
    """
    return -(weak * strong.log()).sum(dim=-1).mean()


def node_edge_loss(strong: Tensor, bank_probability: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of the class distribution that the strong view's edges read from the bank: -sum_c p log(e_s Q)_c, mean.

    Infinite where the bank knows nothing of a class: see :func:`finite_or_zero`.

    Args:
        strong: (S, B, K) edges of the strong views.
        bank_probability: Q, (K, C): class distributions of the bank; rows of 0 are empty slots.
        probability: (B, C) of the weak view, no gradient.
    """
    return -(probability * (strong @ bank_probability).log()).sum(dim=-1).mean()


def finite_or_zero(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``loss(x)``, or 0 without a gradient where that isn't finite. Nothing waits for the device, and backward runs in any case.

    Setting the loss to 0 isn't enough: on the way back 0 meets the infinity that it came from, which makes NaN.

    Args:
        loss: (...) -> scalar.
        x: What the gradient flows to.
    """
    branch = x.view_as(x)
    found = loss(branch)
    finite = found.isfinite()
    if branch.requires_grad:
        branch.register_hook(lambda grad: torch.where(finite, grad, torch.zeros_like(grad)))
    return torch.where(finite, found, torch.zeros_like(found))
