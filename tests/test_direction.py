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


@pytest.mark.parametrize(("flag", "decays"), [(None, (0.6, 0.8)), (False, (0.6, 0.8)), (True, (0.9, 0.95))])
def test_with_one_memory_it_is_adam(precision, flag, decays):
    grads = gradients(30)
    tx = gn.scale_by_adaptive_momentum(0.6, 0.8, 1e-6, b1_noiseless=0.9, b2_noiseless=0.95)
    flags = None if flag is None else [flag] * 30
    adam_state, adam = run(optax.scale_by_adam(*decays, 1e-6), grads)
    state, ours = run(tx, grads, flags)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=300 * precision), ours, adam)
    for moment in ("mu", "nu"):
        pair = (getattr(s, moment) for s in (state, adam_state))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=100 * precision, atol=precision), *pair)


def test_where_the_memory_changes_the_averages_are_still_of_weight_one(precision):
    """The weights of all gradients, written down: 1 - d of its own step times d of all later ones, over their sum."""
    flags = np.array([False, False, True, True, False, True])
    grads = gradients(6)
    _, ours = run(gn.scale_by_adaptive_momentum(eps=1e-30), grads, flags)

    def weights(d):
        w = np.array([(1 - d[k]) * np.prod(d[k + 1 :]) for k in range(6)])
        return w / w.sum()

    for name, g in grads.items():
        mean = np.tensordot(weights(np.where(flags, 0.95, 0.7)), g, 1)
        square = np.tensordot(weights(np.where(flags, 0.95, 0.8)), g**2, 1)
        np.testing.assert_allclose(ours[name][-1], mean / np.sqrt(square), rtol=300 * precision, atol=30 * precision)


def test_the_state_keeps_dtypes_structure_and_buffers_of_its_own():
    params = {"half": jnp.ones(3, jnp.bfloat16), "none": None, "full": jnp.ones(()), "weak": jnp.asarray(1.0)}
    tx = gn.scale_by_adaptive_momentum()
    state = tx.init(params)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    updates, after = jax.jit(tx.update)(params, state, params, noiseless=True, value=1.0)
    assert kinds(after) == kinds(state)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
    leaves = jax.tree.leaves(state)
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@pytest.mark.parametrize("name", ["b1", "b2", "b1_noiseless", "b2_noiseless"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got {value}"):
        gn.scale_by_adaptive_momentum(**{name: value})


@pytest.mark.parametrize("eps", [0.0, -1e-8, math.inf, math.nan])
def test_an_eps_out_of_range_is_refused(eps):
    with pytest.raises(ValueError, match=rf"^eps must be positive and finite, got {eps}"):
        gn.scale_by_adaptive_momentum(eps=eps)


def test_hyperparameters_can_be_injected():
    grads = gradients(5)
    tx = optax.inject_hyperparams(gn.scale_by_adaptive_momentum)(b1=0.6)
    expected = run(gn.scale_by_adaptive_momentum(b1=0.6), grads)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(tx, grads)[1], expected)


def least_squares(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2)


def noise_free_step(tx, data, batches=1, given=True):
    def step(carry, k):
        params, state = carry
        batch = jax.tree.map(lambda x: x[k % batches], data)
        value, grads = jax.value_and_grad(least_squares)(params, batch)
        value = {"value": value} if given else {}
        updates, state = tx.update(grads, state, params, value_fn=lambda p: least_squares(p, batch), **value)
        return (optax.apply_updates(params, updates), state), state

    return step


@pytest.mark.parametrize(
    ("learning_rate", "batches", "given", "dtype", "flag"),
    [
        (1.0, 1, True, "float32", True),
        (1.0, 1, True, "bfloat16", True),
        (1.0, 2, True, "float32", False),
        (0.5, 1, True, "float32", False),
        (1.0, 1, False, "float32", False),
    ],
    ids=["full batch", "half precision", "two batches", "another learning rate", "no losses given"],
)
def test_the_optimizer_says_whether_there_is_noise(learning_rate, batches, given, dtype, flag):
    keys = jax.random.split(jax.random.key(0), 4)
    data = jax.random.normal(keys[0], (2, 30, 4)), jax.random.normal(keys[1], (2, 30))
    params = {"w": jax.random.normal(keys[2], (4, 8), dtype) / 2, "v": jax.random.normal(keys[3], (8,), dtype) / 2}
    tx, steps = gn.grouped_newton(learning_rate), 12
    step = noise_free_step(tx, data, batches, given)
    _, states = lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    # Refreshes at the first two steps; each is compared at the step after it, and the direction hears at the next.
    np.testing.assert_array_equal(states[1].noiseless, [False, False] + [flag] * (steps - 2))
    decays = np.where(([False] * 3 + [flag] * (steps - 3),), [[0.95], [0.95]], [[0.7], [0.8]])
    np.testing.assert_allclose(states[0].decay_products, np.cumprod(decays, 1).T, rtol=1e-5)
    history = states[1]._replace(window=states[1].window[:8])  # as many states as numbers
    np.testing.assert_array_equal(history.noiseless, states[1].noiseless[:8])


def test_the_directions_noiseless_is_not_an_argument_of_value_fn_and_may_be_given():
    tx, params = gn.grouped_newton(), jnp.ones(3)

    def value_fn(params, noiseless=False):
        assert noiseless is False or noiseless is True
        return jnp.sum(params**2)

    products = lambda **told: tx.update(params, tx.init(params), params, value_fn=value_fn, **told)[1][0].decay_products
    np.testing.assert_allclose(products(), [0.7, 0.8], rtol=1e-6)
    np.testing.assert_allclose(products(noiseless=True), [0.95, 0.95], rtol=1e-6)


def test_gradients_of_frozen_leaves_leave_the_state_finite():
    params = {"table": jnp.arange(2), "frozen": jnp.ones(2), "w": jnp.ones(2)}
    tx = gn.grouped_newton(groups={"table": gn.groups.FROZEN, "frozen": gn.groups.FROZEN, "w": 0})
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["table"])
    grads = jax.grad(loss, allow_int=True)(params) | {"frozen": jnp.array([jnp.nan, 1e30])}
    updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after["table"], params["table"])
    np.testing.assert_array_equal(after["frozen"], params["frozen"])


def test_float16_trains_with_an_input_that_is_always_zero():
    """Squares of its gradients, and eps, are 0 there in float16."""
    inputs = jax.random.normal(jax.random.key(0), (64, 3), jnp.float16).at[:, 0].set(0)
    loss = lambda w: jnp.mean((inputs @ w - 1.0 - inputs[:, 1]) ** 2)
    tx, w = gn.grouped_newton(), jnp.zeros(3, jnp.float16)

    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w, value=value, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    (after, state), _ = lax.scan(step, (w, tx.init(w)), length=60)
    assert state[1].rejected == 0
    assert loss(after) < 0.7 * loss(w)
