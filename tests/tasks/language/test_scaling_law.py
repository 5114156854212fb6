"""The scaling law recovers what made the points."""

import numpy as np
import pytest

from lit_methods.tasks.language.scaling_law import ScalingLaw, fit_scaling_law, held_out_error

TOKENS = np.array([1e8, 3e8, 1e9, 3e9, 1e10, 3e10])


def test_one_model_size():
    true = ScalingLaw(floor=1.8, token_factor=400.0, token_exponent=0.3)
    law = fit_scaling_law(TOKENS, true.predict(TOKENS))
    assert (law.floor, law.token_factor, law.token_exponent) == pytest.approx((1.8, 400.0, 0.3), rel=1e-4)
    assert law.residual < 1e-8
    assert law.predict(1e12) == pytest.approx(true.predict(1e12), rel=1e-4)


def test_sizes_and_tokens():
    true = ScalingLaw(floor=1.7, token_factor=410.0, token_exponent=0.28, size_factor=406.0, size_exponent=0.34)
    tokens, sizes = (grid.ravel() for grid in np.meshgrid(TOKENS, [1e8, 4e8, 1e9, 7e9]))
    law = fit_scaling_law(tokens, true.predict(tokens, sizes), sizes)
    numbers = (law.floor, law.token_factor, law.token_exponent, law.size_factor, law.size_exponent)
    assert numbers == pytest.approx((1.7, 410.0, 0.28, 406.0, 0.34), rel=1e-3)
    with pytest.raises(ValueError, match="give sizes"):
        law.predict(1e9)


def test_the_largest_budget_is_predicted_from_the_others():
    losses = ScalingLaw(1.8, 400.0, 0.3).predict(TOKENS)
    assert held_out_error(TOKENS, losses) < 1e-6
    losses[-1] *= 1.1  # what isn't fitted can be wrong
    assert held_out_error(TOKENS, losses) == pytest.approx(np.log(1.1), rel=1e-4)


def test_noise_moves_the_law_a_little():
    rng = np.random.default_rng(0)
    losses = ScalingLaw(1.8, 400.0, 0.3).predict(TOKENS) * np.exp(0.005 * rng.normal(size=6))
    law = fit_scaling_law(TOKENS, losses)
    assert law.predict(TOKENS) == pytest.approx(losses, rel=0.02)
    assert 0 < law.residual < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1e8, 1e9], [3.0, 2.0]), "at least 3"),
        (([1e8, 1e9, 1e10, 1e11], [3.0, 2.0, 1.9, 1.8], [1e8] * 4), "at least 5"),
        (([1e8, 1e9, -1.0], [3.0, 2.0, 1.0]), "above 0"),
        (([1e8, 1e9, 1e10], [3.0, 2.0]), "equal length"),
    ],
)
def test_what_cannot_be_fitted(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(*arguments)
