"""Random search as a baseline for sparse architecture search (arXiv:2403.08265): nodes are removed at random, the best start is kept.

No code of the author is public, and only the abstract and the first page could be read: golden vectors come from an independent script of
the equations (tests/golden/data/random_search/README.md), and what the paper leaves open is our completion, named on the technique's page.
Which tensors a node takes up is found in :mod:`lit_methods.callbacks.sparsity.channels`; runs are compared by
:func:`lit_methods.claims.verdict.welch`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_methods import checks

Masks = Mapping[str, Tensor]


def kept_nodes(width: int, sparsity: float) -> int:
    """Nodes that stay in a layer: max(1, width - round(sparsity * width)), halves rounded to even.

    Args:
        width: Nodes of the layer, >= 1.
        sparsity: Share that goes, in [0, 1].
    """
    checks.share(sparsity=sparsity)
    return max(1, width - round(sparsity * width))


def random_nodes(width: int, sparsity: float, generator: torch.Generator) -> Tensor:
    """A subset of a layer's nodes, all of its size equally likely.

    Returns:
        (width,) bool on the CPU, True for each of the :func:`kept_nodes`.
    """
    keep = torch.zeros(width, dtype=torch.bool)
    keep[torch.randperm(width, generator=generator)[: kept_nodes(width, sparsity)]] = True
    return keep


def candidate_scores(weights: Masks, candidates: Iterable[Masks], score: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """What each candidate is worth with the weights of the start, which no candidate changes.

    Args:
        weights: Name -> weight.
        candidates: Each name -> bool mask of its shape; weights without one stay whole.
        score: Masked weights by name -> scalar, lower is better, such as the mean cross-entropy of a batch.

    Returns:
        (T,), no graph.
    """
    masked = ({name: weight * masks[name] if name in masks else weight for name, weight in weights.items()} for masks in candidates)
    return torch.stack([score(values).detach() for values in masked])


def best_so_far(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The course of a search: lowest score up to each candidate, and whose it is; of equal ones the earliest.

    Args:
        scores: (T,), T >= 1, no NaN.

    Returns:
        (T,) scores and (T,) int64 indices; the last index is the winner.
    """
    lowest = scores.cummin(0).values
    better = torch.cat([scores.new_ones(1, dtype=torch.bool), scores[1:] < lowest[:-1]])
    places = torch.arange(len(scores), device=scores.device)
    return lowest, torch.where(better, places, 0).cummax(0).values


def effective_parameters(masks: Iterable[Tensor], biases: Iterable[Tensor] = ()) -> int:
    """Parameters of a network whose nodes were removed: its kept weights, and the biases of nodes that stay.

    Args:
        masks: bool masks of the weights.
        biases: For each bias, (width,) bool: which nodes stay.
    """
    return int(sum(int(mask.sum()) for mask in (*masks, *biases)))


def fewer(scores: Tensor, places: Sequence[int]) -> list[int]:
    """A round of successive halving: the better half of the candidates, rounded up, in their order; of equal ones the earlier.

    Args:
        scores: (T,) of all candidates.
        places: Those that are still in the race, rising.
    """
    order = scores[torch.tensor(places)].argsort(stable=True)[: (len(places) + 1) // 2]
    return sorted(places[index] for index in order.tolist())
