"""The default direction: Adam's with a momentum that may change from step to step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import grouped_newton as gn


def gradients(steps, dtype=None):
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (steps, 3, 2), dtype), "b": 1 + jax.random.normal(key, (steps, 2), dtype)}


def run(tx, grads, noiseless=None):
    """The directions of every step; ``noiseless`` of every step where it is given."""
    tx = optax.with_extra_args_support(tx)

    def step(state, at):
        g, flag = at
        u, state = tx.update(g, state, **({} if noiseless is None else {"noiseless": flag}))
        return state, u

    flags = jnp.zeros(len(grads["b"]), bool) if noiseless is None else jnp.asarray(noiseless)
    return lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), (grads, flags))


@pytest.mark.parametrize(("flag", "b1"), [(None, 0.7), (False, 0.7), (True, 0.9)])
def test_with_one_momentum_it_is_adam(precision, flag, b1):
    grads = gradients(30)
    tx = gn.scale_by_adaptive_momentum(0.7, 0.9, 0.95, 1e-6)
    flags = None if flag is None else [flag] * 30
    adam_state, adam = run(optax.scale_by_adam(b1, 0.95, 1e-6), grads)
    state, ours = run(tx, grads, flags)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=300 * precision), ours, adam)
    for moment in ("mu", "nu"):
        pair = (getattr(s, moment) for s in (state, adam_state))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=100 * precision, atol=precision), *pair)


def test_where_the_momentum_changes_the_average_is_still_one_of_weight_one(precision):
    """The weights of all gradients, written down: 1 - b of its own step times b of all later ones, over their sum."""
    flags = np.array([False, False, True, True, False, True])
    b = np.where(flags, 0.95, 0.8)
    weights = np.array([(1 - b[k]) * np.prod(b[k + 1 :]) for k in range(6)])
    squares = 0.05 * 0.95 ** np.arange(6)[::-1]
    grads = gradients(6)
    _, ours = run(gn.scale_by_adaptive_momentum(eps=0.0), grads, flags)
    for name, g in grads.items():
        mean = np.tensordot(weights / weights.sum(), g, 1)
        square = np.tensordot(squares / squares.sum(), g**2, 1)
        np.testing.assert_allclose(ours[name][-1], mean / np.sqrt(square), rtol=300 * precision, atol=30 * precision)


def test_the_state_keeps_dtypes_structure_and_buffers_of_its_own():
    params = {"half": jnp.ones(3, jnp.bfloat16), "none": None, "full": jnp.ones(())}
    tx = gn.scale_by_adaptive_momentum()
    state = tx.init(params)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    updates, after = jax.jit(tx.update)(params, state, params, noiseless=True, value=1.0)
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(params)
    leaves = jax.tree.leaves(state)
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@pytest.mark.parametrize("name", ["b1", "b1_noiseless", "b2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got {value}"):
        gn.scale_by_adaptive_momentum(**{name: value})


@pytest.mark.parametrize("eps", [-1e-8, math.inf, math.nan])
def test_an_eps_out_of_range_is_refused(eps):
    with pytest.raises(ValueError, match=rf"^eps must be finite and at least 0, got {eps}"):
        gn.scale_by_adaptive_momentum(eps=eps)


def test_hyperparameters_can_be_injected():
    grads = gradients(5)
    tx = optax.inject_hyperparams(gn.scale_by_adaptive_momentum)(b1=0.6)
    expected = run(gn.scale_by_adaptive_momentum(b1=0.6), grads)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(tx, grads)[1], expected)


def least_squares(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2)


@pytest.mark.parametrize(
    ("learning_rate", "batches", "given", "flag"),
    [(1.0, 1, True, True), (1.0, 2, True, False), (0.5, 1, True, False), (1.0, 1, False, False)],
    ids=["full batch", "two batches", "another learning rate", "no losses given"],
)
def test_the_optimizer_says_whether_there_is_noise(learning_rate, batches, given, flag):
    keys = jax.random.split(jax.random.key(0), 4)
    data = jax.random.normal(keys[0], (2, 30, 4)), jax.random.normal(keys[1], (2, 30))
    params = {"w": 0.5 * jax.random.normal(keys[2], (4, 8)), "v": 0.5 * jax.random.normal(keys[3], (8,))}
    tx, steps = gn.grouped_newton(learning_rate), 12

    def step(carry, k):
        params, state = carry
        batch = jax.tree.map(lambda x: x[k % batches], data)
        value, grads = jax.value_and_grad(least_squares)(params, batch)
        value = {"value": value} if given else {}
        updates, state = tx.update(grads, state, params, value_fn=lambda p: least_squares(p, batch), **value)
        return (optax.apply_updates(params, updates), state), (state[1].noiseless, state[0].decay_products)

    _, (flags, products) = lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    # Refreshes at the first two steps; each is compared at the step after it, and the direction hears at the next.
    np.testing.assert_array_equal(flags, [False, False] + [flag] * (steps - 2))
    b1 = np.where([False] * 3 + [flag] * (steps - 3), 0.95, 0.8)
    np.testing.assert_allclose(products, np.stack([np.cumprod(b1), 0.95 ** np.arange(1, steps + 1)], 1), rtol=1e-5)
