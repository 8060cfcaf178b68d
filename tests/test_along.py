import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grouped_newton as gn

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5, jnp.bfloat16), "c": jnp.array([3.0])}
DIRECTION = {"a": jnp.array([0.5, 1.0]), "b": jnp.array(1.0), "c": jnp.array([-1.0])}
FROZEN = {"a": "one", "b": "two", "c": gn.groups.FROZEN}


def loss(params):
    return jnp.sum(params["a"] ** 4) * params["b"].astype(jnp.float32) ** 2 + params["c"][0] ** 3


def test_each_row_moves_its_group_alone_and_starts_with_the_summary():
    etas = np.array([[0.0, 0.5, -1.0], [0.0, 0.25, 2.0]])
    losses = jax.jit(lambda p, u, etas: gn.losses_along(loss, p, u, etas, FROZEN))(PARAMS, DIRECTION, etas)
    assert losses.dtype == jnp.float32
    for s, name in enumerate(("a", "b")):
        for eta, value in zip(etas[s], losses[s], strict=True):
            moved = PARAMS | {name: (PARAMS[name] - eta * DIRECTION[name]).astype(PARAMS[name].dtype)}
            assert value == pytest.approx(float(loss(moved)), rel=1e-6)


def test_one_row_of_rates_is_for_all_groups():
    etas = jnp.array([0.0, 0.5])
    assert jnp.array_equal(
        gn.losses_along(loss, PARAMS, DIRECTION, etas, FROZEN),
        gn.losses_along(loss, PARAMS, DIRECTION, jnp.stack([etas, etas]), FROZEN),
    )


@pytest.mark.parametrize("etas", [1.0, np.ones((3, 2)), np.ones((2, 2, 2))])
def test_rates_of_another_shape_are_refused(etas):
    with pytest.raises(ValueError, match=r"\(2, N\) for 2 groups"):
        gn.losses_along(loss, PARAMS, DIRECTION, etas, FROZEN)


def test_a_direction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="the direction has shape"):
        gn.losses_along(loss, PARAMS, DIRECTION | {"a": jnp.ones(3)}, [0.0], FROZEN)
