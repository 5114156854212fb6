"""How good features are without training them: a linear classifier, and a vote of the nearest neighbours.

Source: "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978), section 3.4, for the weighted vote.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # whose neighbours are looked for at once


def linear_probe(train: Tensor, labels: Tensor, features: Tensor, num_classes: int, l2: float = 1e-3, iterations: int = 200) -> Tensor:
    """Multinomial logistic regression on fixed features, fitted by L-BFGS from zero: the same numbers give the same classifier.

    It minimises mean cross-entropy + l2 / 2 * |W|^2, on features that are standardised by the training features' mean and standard
    deviation.

    Args:
        train: (N, D) floating point.
        labels: (N,) int64 in 0..num_classes-1.
        features: (M, D) to be classified.
        num_classes: C.
        l2: Weight of the penalty, > 0 for a unique solution.
        iterations: Most steps of L-BFGS.

    Returns:
        (M, C) logits, float32 or wider.
    """
    wide = torch.promote_types(train.dtype, torch.float32)
    train, features = train.detach().to(wide), features.detach().to(wide)
    mean, std = train.mean(0), train.std(0, correction=0)
    train, features = ((part - mean) / torch.where(std > 0, std, 1.0) for part in (train, features))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(train.device.type, enabled=False):
        train, labels, features = train.clone(), labels.clone(), features.clone()  # out of inference mode, which knows no gradients
        weight = torch.zeros(num_classes, train.shape[1], dtype=wide, device=train.device, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=wide, device=train.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(train, weight, bias), labels) + l2 / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return F.linear(features, weight, bias).detach()


def nearest_neighbours(
    train: Tensor, labels: Tensor, features: Tensor, num_classes: int, neighbours: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes of the nearest training features by cosine similarity s, each with exp(s / temperature).

    Args:
        train: (N, D) floating point.
        labels: (N,) int64 in 0..num_classes-1.
        features: (M, D) to be classified.
        num_classes: C.
        neighbours: k >= 1; at most all N vote.
        temperature: > 0; a small one lets the nearest decide.

    Returns:
        (M, C) shares of the votes, which sum to 1, float32 or wider.
    """
    with torch.autocast(train.device.type, enabled=False):
        wide = torch.promote_types(train.dtype, torch.float32)
        bank, votes = F.normalize(train.detach().to(wide), dim=1), []
        for rows in F.normalize(features.detach().to(wide), dim=1).split(_ROWS):
            similarity, nearest = (rows @ bank.T).topk(min(neighbours, len(bank)), dim=1)
            weights = (similarity / temperature).softmax(1)
            votes.append(weights.new_zeros(len(rows), num_classes).scatter_add_(1, labels[nearest], weights))
        return torch.cat(votes) if votes else bank.new_zeros(0, num_classes)


__all__ = ["linear_probe", "nearest_neighbours"]
