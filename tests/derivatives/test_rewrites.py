"""Convolutions in another layout: the same numbers, and in the branch of a refresh none that XLA's CPU runs slowly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from interpreter import uncompiled
from jax import lax

import grouped_newton as gn
from grouped_newton.derivatives.rewrites import canonical

EPS64 = 2.0**-52
CONVOLUTIONS = {
    "channels last": ((4, 9, 8, 3), (3, 2, 3, 5), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
    "channels first": ((4, 3, 9, 8), (5, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {"padding": "VALID"}),
    "one dimension, mixed": ((3, 4, 10), (2, 5, 3), ("CNW", "WOI", "WNC"), {"padding": [(1, 2)]}),
    "three dimensions": ((2, 4, 5, 6, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {"padding": "SAME"}),
    "strides, dilations": (
        (4, 3, 9, 8),
        (5, 3, 3, 2),
        ("NCHW", "OIHW", "NHWC"),
        {"padding": [(1, 0), (2, 1)], "window_strides": (2, 1), "rhs_dilation": (1, 2), "lhs_dilation": (1, 2)},
    ),
    "groups": ((4, 6, 9, 8), (8, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {"padding": "SAME", "feature_group_count": 2}),
}


def all_convolutions(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for part in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from all_convolutions(inner)


def is_canonical(eqn):
    lhs, rhs, out = eqn.params["dimension_numbers"]
    n = len(lhs) - 2
    last, kernel = (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n))
    return (tuple(lhs), tuple(rhs), tuple(out)) == (last, kernel, last)


@pytest.fixture(params=CONVOLUTIONS)
def problem(request):
    of_lhs, of_rhs, names, options = CONVOLUTIONS[request.param]
    options = {"window_strides": (1,) * (len(of_lhs) - 2)} | options
    keys = jax.random.split(jax.random.key(0), 3)
    x, params = jax.random.normal(keys[0], of_lhs), {"w": jax.random.normal(keys[1], of_rhs), "b": jnp.ones(())}

    @jax.jit
    def loss(params):
        z = lax.conv_general_dilated(x, params["w"], dimension_numbers=names, **options)
        return jnp.mean(jnp.tanh(z + params["b"]) ** 2)

    return loss, params


def test_values_gradients_and_summaries_are_the_same(problem, x64):
    loss, params = problem

    @jax.jit
    def run(params):
        fns = loss, jax.grad(loss), lambda p: gn.summarize(loss, p, jax.grad(loss)(p))
        return [(canonical(lambda fn=fn: fn(params)), fn(params)) for fn in fns]

    for found, expected in run(params):
        assert_close(found, expected, rtol=2e3 * EPS64, atol=2e2 * EPS64)


def convolutions_of_a_step(loss, params):
    tx = gn.grouped_newton()
    step = lambda grads, state: tx.update(grads, state, params, value_fn=loss)
    return list(all_convolutions(jax.make_jaxpr(step)(params, tx.init(params)).jaxpr))


def test_in_a_refresh_all_are_canonical(problem):
    found = convolutions_of_a_step(*problem)
    assert len(found) > 2
    assert all(map(is_canonical, found))


def test_those_of_the_adjoints_are_too():
    """In the order that XLA's CPU likes two layers are; the adjoint of what is between them is not."""
    x, params = jnp.ones((2, 6, 6, 3)), [jnp.ones((3, 3, 3, 4)), jnp.ones((3, 3, 4, 2))]

    def loss(params):
        h = x
        for w in params:
            h = jnp.tanh(lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return jnp.mean(h)

    outside = list(all_convolutions(jax.make_jaxpr(lambda p: gn.summarize(loss, p, p))(params).jaxpr))
    assert not all(map(is_canonical, outside))
    inside = convolutions_of_a_step(loss, params)
    assert len(inside) > len(outside)
    assert all(map(is_canonical, inside))


def test_a_vmapped_optimizer_is_a_loop_over_it():
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
    loss = lambda w, x: jnp.mean(jnp.tanh(lax.conv(x[None], w, (1, 1), "SAME")) ** 2)
    tx, ws = gn.grouped_newton(), jax.random.normal(jax.random.key(1), (2, 2, 4, 3, 2))

    def train(w, x):
        def step(carry, _):
            w, state = carry
            value, grad = jax.value_and_grad(loss)(w, x)
            updates, state = tx.update(grad, state, w, value=value, value_fn=lambda w: loss(w, x))
            return (w + updates, state), value

        return lax.scan(step, (w, tx.init(w)), length=4)[1]

    together = uncompiled(jax.vmap(train))(ws, x)
    alone = np.stack([uncompiled(train)(w, b) for w, b in zip(ws, x, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert np.all(together[:, -1] < together[:, 0])
