"""Arguments that a subclass hands on reach the base, each under its name."""

import doctest
import inspect
from typing import Any
from unittest import mock

import pytest

from lit_methods import IJEPA, AbsTopK, SparseAutoencoder, SparseJEPA, TopAFA, arguments
from lit_methods.arguments import handed_on
from lit_methods.callbacks import DSnoT, Magnitude
from lit_methods.callbacks.sparsity.post_training import PostTrainingPruning


def test_the_example_of_its_docstring() -> None:
    assert doctest.testmod(arguments).failed == 0


class Base:
    def __init__(self, size: int, depth: int = 3) -> None:
        self.given = (size, depth)


class Forgetful(Base):
    def __init__(self, depth: int = 5) -> None:
        super().__init__(**handed_on(Base, locals()))


def test_what_the_base_must_have_is_missed() -> None:
    with pytest.raises(TypeError, match="size"):
        Forgetful()


OTHER = {  # every argument, with another value than its default
    "predictor_width": 12, "predictor_depth": 1, "predictor_heads": 2, "target_blocks": 2, "target_scale": (0.1, 0.3),
    "target_aspect": (0.9, 1.1), "context_scale": (0.9, 1.0), "min_keep": 1, "distance": "mse", "momentum": 0.5, "learning_rate": 0.1,
    "start_learning_rate": 0.01, "final_learning_rate": 0.001, "warmup_epochs": 3, "weight_decay": 0.3, "final_weight_decay": 0.2,
    "total_steps": 7, "seed": 9, "normalize": "norm_1", "loss": "sum", "aux_coeff": 0.5, "aux_features": 3, "dead_after": 2,
    "betas": (0.5, 0.6), "encoder_start": "decoder", "groups": 4, "latents": 3, "map_width": 2, "embedding": "tokens",
    "sparse_weight": 0.2, "kl_weight": 0.4, "sparsity": 0.6, "mode": "penalty", "prox_step": 0.7, "per_batch": True,
    "encoder_bias": True, "afa_coeff": 0.3, "l1_coeff": 0.8, "pattern": "2:4", "samples": 5, "blocks": "layers", "forward": "run",
    "at_step": 4, "targets": ("a",), "skip": ("b",), "mask_gradients": False, "mask_optimizer_state": False, "initial": "magnitude",
    "max_cycles": 3, "update_threshold": 0.9, "variance_power": 2.0, "require_same_sign": True, "untuned": ("c",),
}  # fmt: skip


class Reached(Exception):
    """The base's constructor was called."""


@pytest.mark.parametrize(
    ("kind", "base", "given", "own"),
    [
        (SparseJEPA, IJEPA, {"encoder": None}, {}),
        (AbsTopK, SparseAutoencoder, {"width": 4, "features": 8, "k": 2}, {"encoder_bias": "learned", "centre": False}),
        (TopAFA, SparseAutoencoder, {"width": 4, "features": 8}, {"penalties": {"afa": 0.3, "l1": 0.8}}),
        (Magnitude, PostTrainingPruning, {}, {}),
        (DSnoT, PostTrainingPruning, {}, {}),
    ],
)
def test_every_argument_reaches_the_base(kind: type, base: type, given: dict[str, Any], own: dict[str, Any]) -> None:
    given = given | {name: OTHER[name] for name in inspect.signature(kind).parameters if name not in given}
    shared = {name: value for name, value in given.items() if name in inspect.signature(base).parameters}
    with mock.patch.object(base, "__init__", autospec=True, side_effect=Reached) as constructor, pytest.raises(Reached):
        kind(**given)
    reached = constructor.call_args.kwargs
    assert len(shared) > 5
    assert shared | own == {name: reached[name] for name in shared | own}
    assert reached.keys() <= inspect.signature(base).parameters.keys()
