"""Graph consistency: labels and similarities of one view, read through the edges of another (SimMatchV2, arXiv:2308.06692, section 3).

Nodes are images with a class distribution and an embedding, edges are similarities of embeddings. Golden vectors come from
mingkai-zheng/SimMatchV2@f0e054c (models/simmatchv2.py, main.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.seeds import own_seed
from lit_methods.semi.alignment import align, moving_marginal

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
    value = loss(branch)
    finite = value.isfinite()
    if branch.requires_grad:
        branch.register_hook(lambda grad: torch.where(finite, grad, torch.zeros_like(grad)))
    return torch.where(finite, value, torch.zeros_like(value))


class GraphLosses(NamedTuple):
    """What :class:`GraphConsistency` finds for a batch.

    Attributes:
        nn: Node-node loss, scalar.
        ee: Edge-edge loss, scalar; 0 where it isn't finite.
        ne: Node-edge loss, scalar; 0 where it isn't finite, as with an empty bank.
        probability: (B, C) of the weak view after alignment.
        pseudo_label: (B, C) after propagation.
        certain: (B,) bool: the largest probability (not pseudo label) reaches the threshold.
    """

    nn: Tensor
    ee: Tensor
    ne: Tensor
    probability: Tensor
    pseudo_label: Tensor
    certain: Tensor


class GraphConsistency(nn.Module):
    """The banks and the three losses of SimMatchV2. All its state is saved: banks, pointer and marginal.

    Args:
        labelled: N, number of labelled images: one entry of the label bank each.
        bank_size: K, entries of the bank of unlabelled images; a multiple of the unlabelled images of all ranks in a step.
        num_classes: C.
        embedding_dim: D.
        temperature: t of all similarities.
        alpha: How far labels travel in the propagation, in [0, 1).
        neighbours: Labelled neighbours in each graph, 1..N.
        threshold: tau of the node-node loss.
        distribution_alignment: Align the weak view's predictions.
        alignment_momentum: Momentum of the marginal.
        seed: Seed of the random unit vectors that the banks start with; the same on all ranks.

    Raises:
        ValueError: An argument outside its range.
    """

    label_bank: Tensor
    label_bank_class: Tensor
    bank: Tensor
    bank_probability: Tensor
    pointer: Tensor
    marginal: Tensor

    def __init__(
        self,
        labelled: int,
        bank_size: int,
        num_classes: int,
        embedding_dim: int = 128,
        temperature: float = 0.1,
        alpha: float = 0.1,
        neighbours: int = 128,
        threshold: float = 0.7,
        distribution_alignment: bool = True,
        alignment_momentum: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= neighbours <= labelled:
            raise ValueError(f"neighbours={neighbours} of {labelled} labelled images: give 1 to {labelled}")
        checks.within("[0, 1)", alpha=alpha)
        checks.positive(temperature=temperature)
        self.temperature, self.alpha, self.neighbours, self.threshold = temperature, alpha, neighbours, threshold
        self.distribution_alignment, self.alignment_momentum = distribution_alignment, alignment_momentum
        generator = torch.Generator().manual_seed(own_seed("GraphConsistency", seed))
        self.register_buffer("label_bank", F.normalize(torch.randn(labelled, embedding_dim, generator=generator), dim=1))
        self.register_buffer("label_bank_class", torch.zeros(labelled, dtype=torch.int64))
        self.register_buffer("bank", F.normalize(torch.randn(bank_size, embedding_dim, generator=generator), dim=1))
        self.register_buffer("bank_probability", torch.zeros(bank_size, num_classes))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("marginal", torch.full((num_classes,), 1 / num_classes))

    def forward(self, weak_logits: Tensor, weak: Tensor, strong_logits: Tensor, strong: Tensor) -> GraphLosses:
        """Losses of a batch, by the banks of the step before; the marginal advances.

        Args:
            weak_logits: (B, C) of the weak views, by the averaged network.
            weak: (B, D) unit vectors of the weak views, by the averaged network.
            strong_logits: (S, B, C) of S strong views, by the trained network.
            strong: (S, B, D) unit vectors of the strong views, by the trained network.
        """
        with torch.no_grad():
            raw = weak_logits.softmax(dim=1)
            probability = raw
            if self.distribution_alignment:
                probability = align(raw, self.marginal.to(raw.dtype))
                everyone = gather_rows(raw, with_grad=False).mean(dim=0).to(self.marginal.dtype)
                self.marginal.copy_(moving_marginal(self.marginal, everyone, self.alignment_momentum))
            pseudo_label = propagate(
                probability, weak, self.label_bank, self.label_bank_class, self.neighbours, self.temperature, self.alpha
            )
            certain = probability.amax(dim=1) >= self.threshold
            weak_edges = edges(weak, self.bank, self.temperature)
        ee = finite_or_zero(lambda z: edge_edge_loss(edges(z, self.bank, self.temperature), weak_edges), strong)
        ne = finite_or_zero(lambda z: node_edge_loss(edges(z, self.bank, self.temperature), self.bank_probability, probability), strong)
        return GraphLosses(node_node_loss(strong_logits, pseudo_label, certain), ee, ne, probability, pseudo_label, certain)

    @torch.no_grad()
    def store(self, index: Tensor, labelled: Tensor, weak: Tensor, losses: GraphLosses) -> None:
        """Take the embeddings of all ranks into the banks, in place: after the losses and their backward pass.

        Args:
            index: (B_x,) int64, rows of the label bank.
            labelled: (B_x, D) unit vectors of the labelled images, by the averaged network.
            weak: (B, D) unit vectors of the weak views, by the averaged network.
            losses: The losses of these images.
        """
        index, labelled = gather_rows(index, with_grad=False), gather_rows(labelled, with_grad=False)
        weak, probability = gather_rows(weak, with_grad=False), gather_rows(losses.probability, with_grad=False)
        size = len(self.bank)
        if size % len(weak):
            raise ValueError(f"bank_size={size} is no multiple of the {len(weak)} unlabelled images of a step: give one that is")
        rows = (self.pointer + torch.arange(len(weak), device=weak.device)) % size
        self.label_bank.index_copy_(0, index, labelled.to(self.label_bank.dtype))
        self.bank.index_copy_(0, rows, weak.to(self.bank.dtype))
        self.bank_probability.index_copy_(0, rows, probability.to(self.bank_probability.dtype))
        self.pointer.add_(len(weak)).remainder_(size)


__all__ = ["GraphConsistency", "GraphLosses", "edge_edge_loss", "finite_or_zero", "node_edge_loss", "node_node_loss", "propagate"]
