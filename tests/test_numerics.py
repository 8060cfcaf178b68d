"""Small sums."""

import jax.numpy as jnp
import pytest

from grouped_newton.numerics import folded


@pytest.mark.parametrize("n", range(6))
def test_folding_takes_every_number_and_the_identity_once(n):
    x = 1 + jnp.arange(float(n))
    assert folded(jnp.add, x, 0) == n * (n + 1) / 2
    assert folded(jnp.maximum, -x, 0) == 0
    assert folded(jnp.maximum, x, 0) == n
    assert folded(jnp.minimum, x, 3) == min(3, *x) if n else folded(jnp.minimum, x, 3) == 3
