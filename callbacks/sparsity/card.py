"""The sparsity card: what a run says of its sparse training, for other runs to be compared with."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class SparsityCard:
    """What kind of sparsity a method makes. A callback or module declares it as its attribute ``sparsity_card``.

    Attributes:
        stage: When weights are chosen: ``before``, ``during`` or ``post`` training.
        regime: Course of the training: ``dense_to_sparse`` starts dense, ``sparse_to_sparse`` never is, and so on.
        mask: Whether the choice is made once (``static``) or changes (``dynamic``).
        granularity: What is removed as one.
        object: What becomes sparse.
        forward_dense: The forward pass uses dense weights (at some time other than the start or end).
        backward_dense: Gradients are computed for all weights at every step. Not: RigL, which needs them at updates alone.
        optimizer_dense: The optimiser's state of removed weights is kept.
        weights_touched: Weights are trained; False: only masked, as after training.
        layerwise: How density is spread over layers.
        criterion: By what weights are chosen.
        cost: Regime of :func:`~lit_methods.callbacks.sparsity.flops.training_flops`. Gradual pruning is ``static``: its density is
            followed over time.
        update_interval: Steps between two updates, for ``cost: rigl``.

    Raises:
        ValueError: A value that isn't among the choices, or two that contradict each other.
    """

    stage: Literal["before", "during", "post"]
    regime: Literal["dense_to_sparse", "sparse_to_sparse", "dense_to_dense", "sparse_to_dense"]
    mask: Literal["static", "dynamic"]
    granularity: Literal["unstructured", "n:m", "block", "channel", "head", "layer"] = "unstructured"
    object: Literal["weights", "activations", "gradients", "attention", "tokens"] = "weights"
    forward_dense: bool = False
    backward_dense: bool = False
    optimizer_dense: bool = False
    weights_touched: bool = True
    layerwise: Literal["uniform", "uniform_plus", "er", "erk", "erk_plus", "snip", "grasp", "global", "learned"] = "uniform"
    criterion: Literal["random", "magnitude", "gradient", "activation", "learned", "other"] = "other"
    cost: Literal["dense", "static", "set", "rigl", "sparse_momentum", "ste"] = "static"
    update_interval: int = 100

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SparsityCard).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise ValueError(f"SparsityCard.{name} is {value!r}: give one of {', '.join(choices)}")
        if self.regime == "sparse_to_sparse" and self.forward_dense:
            raise ValueError("SparsityCard: a sparse_to_sparse method has no dense forward pass; correct regime or forward_dense")
