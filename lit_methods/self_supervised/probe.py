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


def linear_segmentation(
    train: Tensor, train_masks: Tensor, features: Tensor, masks: Tensor, l2: float = 1e-3, iterations: int = 100
) -> Tensor:
    """Mean IoU of a linear classifier of patches: fitted to each patch's most frequent class, its logits enlarged to the masks' pixels.

    Args:
        train: (N, D, h, w) floating point.
        train_masks: (N, H, W) integer classes; below 0: not known.
        features: (M, D, h, w) of other images.
        masks: (M, H, W) their classes; below 0: doesn't count.
        l2: Weight of the penalty of :func:`linear_probe`.
        iterations: Most steps of its fit.

    Returns:
        Scalar in [0, 1], mean over the classes that occur in ``masks`` or are predicted there.
    """
    classes = int(max(train_masks.max(), masks.max())) + 1
    labels = torch.cat([_most_frequent(part, train.shape[2:], classes) for part in train_masks.split(64)]).flatten()
    rows = train.permute(0, 2, 3, 1).flatten(0, 2)
    asked = features.permute(0, 2, 3, 1).flatten(0, 2)
    logits = linear_probe(rows[labels >= 0], labels[labels >= 0], asked, classes, l2, iterations)
    maps = logits.unflatten(0, (len(features), *features.shape[2:])).permute(0, 3, 1, 2)
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=masks.device)
    for some, truth in zip(maps.split(8), masks.split(8), strict=True):
        predicted = F.interpolate(some, size=truth.shape[1:], mode="bilinear").argmax(1)
        known = truth >= 0
        counts += torch.bincount((truth * classes + predicted)[known], minlength=classes * classes)
    table = counts.unflatten(0, (classes, classes)).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return (table.diagonal() / union.clamp(min=1)).sum() / (union > 0).sum().clamp(min=1)


def _most_frequent(masks: Tensor, grid: torch.Size, classes: int) -> Tensor:
    """(B, H, W) -> (B, h, w) most frequent class of each cell of the grid; -1 where none is known."""
    number, cells = len(masks), grid[0] * grid[1]
    rows, columns = (torch.arange(side, device=masks.device) * parts // side for side, parts in zip(masks.shape[1:], grid, strict=True))
    cell = torch.arange(number, device=masks.device)[:, None, None] * cells + rows[:, None] * grid[1] + columns
    counts = torch.bincount((cell * classes + masks)[masks >= 0], minlength=number * cells * classes).unflatten(0, (number, *grid, classes))
    return torch.where(counts.amax(3) > 0, counts.argmax(3), -1)


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of two lists (n,); equal values are ranked as they stand, so many of them blur it. NaN for n < 2."""
    ranks = [values.argsort().argsort().float() for values in (one, other)]
    return torch.corrcoef(torch.stack(ranks))[0, 1]


__all__ = ["linear_probe", "linear_segmentation", "nearest_neighbours", "rank_correlation"]
