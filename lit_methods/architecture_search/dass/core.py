"""DASS, Differentiable Architecture Search for Sparse neural networks (arXiv:2207.06968): gradient of the architecture, and derived cells.

The objective has two levels: min over alpha of L_val(w*(alpha) M, alpha), with w* = argmin over w of L_train(w M, alpha), where the masks M
are part of both losses. Sources of the golden vectors: HERO-MDH/DASS-Differentiable-Architecture-Search-for-Sparse-Neural-Networks@0aab24e,
DASS/model_search.py (Network.genotype); the gradients by the equations of DARTS (arXiv:1806.09055), as the released code needs CUDA. Masks
and scores: :mod:`lit_methods.callbacks.sparsity.score_masks`. Left out: partial channels and pruned operations of other searches.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods.checks import one_of

Values = dict[str, Tensor]
Loss = Callable[[Values, Values], Tensor]
Average = Callable[[Values], Values]
Order = Literal["first", "second", "exact"]


class ArchitectureGradient(NamedTuple):
    """What :func:`architecture_gradient` finds.

    Attributes:
        gradient: Name -> gradient of an architecture parameter, its shape.
        loss: The held-out loss, a scalar: of the present weights (``first``), else of those one step later.
    """

    gradient: Values
    loss: Tensor


def mixed_operation(shares: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
    """Output of a mixed operation: sum over o of shares[o] * outputs[o].

    Args:
        shares: (K,), softmax of an edge's alpha.
        outputs: K tensors of one shape; None: the operation ``none``, whose output is 0. At least one is a tensor.
    """
    terms = [share * output for share, output in zip(shares.unbind(), outputs, strict=True) if output is not None]
    return sum(terms[1:], start=terms[0])


def _leaves(values: Values) -> Values:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _gradients(loss: Tensor, values: Values, create_graph: bool = False) -> Values:
    found = torch.autograd.grad(loss, list(values.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def architecture_gradient(
    train_loss: Loss,
    val_loss: Loss,
    alphas: Values,
    weights: Values,
    *,
    rate: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    buffers: Values | None = None,
    radius: float = 0.01,
    order: Order = "second",
    average: Average | None = None,
) -> ArchitectureGradient:
    """Gradient of the held-out loss by the architecture, through one step of the weights.

    With w' = w - eta (mu b + grad_w L_train(w, alpha) + lambda w), v = grad_w' L_val(w', alpha) and R = ``radius`` / |v|:
    g = grad_alpha L_val(w', alpha) - eta [grad_alpha L_train(w + R v, alpha) - grad_alpha L_train(w - R v, alpha)] / (2 R). These are four
    evaluations; the step of the weights that follows is the fifth. All of them must see the same keep ratio, so the losses hold it.

    Args:
        train_loss: (alphas, weights) -> mean loss of a training batch, a scalar; no side effects.
        val_loss: The same of a held-out batch.
        alphas: Name -> architecture parameter.
        weights: Name -> weight that the training moves; nothing else is unrolled.
        rate: eta, learning rate of the weights' next step, >= 0.
        weight_decay: lambda.
        momentum: mu.
        buffers: Name -> b, the optimiser's momentum buffer; None, and where a name is missing: 0.
        radius: Length of the step of the finite differences.
        order: ``first``: grad_alpha L_val(w, alpha). ``second``: as above. ``exact``: the derivative that ``second`` approximates, by
            differentiating twice.
        average: Gradients -> their mean over all processes, so that each of them goes on with the same; None: as they are.

    Returns:
        Gradients without a graph, and the held-out loss. Under autocast all is computed without it: in half precision the finite
        differences would be noise.

    Raises:
        ValueError: ``order`` is unknown.
    """
    one_of(Order, order=order)
    mean = average if average is not None else lambda values: values
    device = next(iter(alphas.values())).device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        free = _leaves(alphas)
        if order == "first":
            loss = val_loss(free, weights)
            return ArchitectureGradient(mean(_gradients(loss, free)), loss.detach())
        start = _leaves(weights)
        exact = order == "exact"
        inner = mean(_gradients(train_loss(free if exact else alphas, start), start, create_graph=exact))
        known = buffers or {}
        steps = {name: inner[name] + weight_decay * weight for name, weight in start.items()}
        steps |= {name: step + momentum * known[name] for name, step in steps.items() if name in known}
        moved = {name: weight - rate * steps[name] for name, weight in start.items()}
        if exact:
            loss = val_loss(free, moved)
            return ArchitectureGradient(mean(_gradients(loss, free)), loss.detach())
        moved = _leaves(moved)
        loss = val_loss(free, moved)
        both = _gradients(loss, free | {f"w'{name}": weight for name, weight in moved.items()})
        outer = {name: both[name] for name in free}
        slope = mean({name: both[f"w'{name}"] for name in moved})
        length = torch.nn.utils.get_total_norm(list(slope.values()))
        step = radius / length.clamp(min=torch.finfo(length.dtype).tiny)
        sides = []
        for sign in (1, -1):
            beside = {name: weights[name].detach() + sign * step * slope[name] for name in moved}
            sides.append(_gradients(train_loss(free, beside), free))
        gradient = {name: outer[name] - rate * (sides[0][name] - sides[1][name]) / (2 * step) for name in free}
    return ArchitectureGradient(mean(gradient), loss.detach())


def derive_cell(alpha: Tensor, nodes: int, none: int | None = 0) -> Tensor:
    """The cell that an architecture parameter means: two inputs for each node, and what happens on the way.

    An edge is as strong as the largest share, softmax over the operations, that one of its operations other than ``none`` has. Each node
    keeps its two strongest edges, the strongest first, with that operation. Of equal ones the first counts.

    Args:
        alpha: (E, K) with an edge for each pair of node and predecessor: node j has 2 + j of them, one behind the other, so that
            E = 2 + 3 + ... + (nodes + 1). Predecessors 0 and 1 are the cell's inputs, 2 is the first node.
        nodes: Nodes between inputs and output, >= 1.
        none: Index of the operation that is never kept; None: there is none such.

    Returns:
        (2 nodes, 2) int64, rows (operation, predecessor), two for each node.

    Raises:
        ValueError: ``alpha`` has another number of edges, or nothing but ``none``.
    """
    edges = nodes * (nodes + 3) // 2
    if alpha.ndim != 2 or alpha.shape[0] != edges:
        raise ValueError(f"alpha is {tuple(alpha.shape)}: {nodes} nodes have {edges} edges, so give ({edges}, operations)")
    kept = [operation for operation in range(alpha.shape[1]) if operation != none]
    if not kept:
        raise ValueError("alpha has no operation but 'none': give more operations")
    shares = alpha.detach().softmax(dim=-1)[:, kept]
    strength, order = shares.sort(dim=-1, descending=True, stable=True)
    operations = torch.tensor(kept, device=alpha.device)[order[:, 0]]
    rows, start = [], 0
    for node in range(nodes):
        inputs = strength[start : start + 2 + node, 0].sort(descending=True, stable=True).indices[:2]
        rows.append(torch.stack([operations[start + inputs], inputs], dim=1))
        start += 2 + node
    return torch.cat(rows)


__all__ = ["architecture_gradient", "derive_cell", "mixed_operation"]
