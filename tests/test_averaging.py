"""The averaged parameters: the formula, dtypes, and finding them in any optimizer's state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, assert_equal
from flax import nnx
from jax import lax

import grouped_newton as gn
from grouped_newton.groups import FROZEN


def shifts(steps, shape=(3,), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((steps, *shape)))


def walk(tx, params, updates):
    """Params and states along given updates, by scan."""

    def step(carry, u):
        params, state = carry
        u, state = tx.update(u, state, params)
        params = optax.apply_updates(params, u)
        return (params, state), (params, state, u)

    return lax.scan(step, (params, tx.init(params)), updates)[1]


def squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.1, 1.0])
def test_average_is_that_of_a_plain_loop_and_updates_pass_unchanged(precision, fraction):
    updates = {"w": shifts(30), "b": shifts(30, (), 1)}
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    trained, state, out = jax.jit(lambda p: walk(gn.average_params(fraction), p, updates))(params)
    assert_equal(out, updates)
    np.testing.assert_array_equal(state.averaged, np.arange(1, 31))
    for name in params:
        theta, average = np.asarray(trained[name], float), np.asarray(params[name], float)
        for t in range(30):
            w = 1 / (1 + fraction * t)
            average = (1 - w) * average + w * theta[t]
            # Thirty roundings of numbers up to 10; the weights are float32 in both.
            np.testing.assert_allclose(state.average[name][t], average, rtol=0, atol=300 * 2.0**-23)
        assert state.average[name].dtype == params[name].dtype


def test_the_first_step_replaces_the_initial_params_and_fraction_one_is_the_plain_mean():
    params = jnp.full(3, 1e6)
    trained, state, _ = walk(gn.average_params(1.0), params, shifts(8) - jnp.where(jnp.arange(8) == 0, 1e6, 0)[:, None])
    np.testing.assert_allclose(state.average[0], trained[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(state.average[-1], np.mean(trained, axis=0), rtol=0, atol=1e-5)


def test_average_is_over_about_the_last_fraction_of_all_steps(x64):
    """At any time: the mean age of what is in it is fraction / (1 + fraction) of the steps so far."""
    for fraction in (0.1, 0.3):
        # The params after step t are t, so that the average gives the age.
        _, state, _ = walk(gn.average_params(fraction), jnp.array(-1.0), jnp.ones(4000))
        for t in (400, 1200, 3999):
            age = (t - float(state.average[t])) / t
            assert age == pytest.approx(fraction / (1 + fraction), rel=0.05)


def test_average_has_the_precision_of_float32_where_params_are_short():
    """Ten thousand steps between neighbouring bfloat16: their middle is no bfloat16."""
    for dtype in (jnp.bfloat16, jnp.float16):
        step = float(jnp.finfo(dtype).eps)
        updates = jnp.where(jnp.arange(10_000) % 2 == 0, step, -step).astype(dtype)
        params = jnp.ones((), dtype)
        trained, state, _ = jax.jit(functools.partial(walk, gn.average_params(1.0)))(params, updates)
        assert trained.dtype == dtype
        assert state.average.dtype == jnp.float32
        assert float(state.average[-1]) == pytest.approx(1 + step / 2, abs=step / 100)
        assert gn.eval_params(jax.tree.map(lambda x: x[-1], state), params).dtype == dtype


def test_average_is_of_params_as_they_are_rounded():
    """An update too small for bfloat16 moves neither the params nor their average."""
    tx, params = gn.average_params(), jnp.ones((), jnp.bfloat16)
    _, state = tx.update(jnp.array(1e-4, jnp.float32), tx.init(params), params)
    assert state.average == 1.0


def test_leaves_that_are_not_floating_point_stay_as_they_were():
    params = {"n": jnp.arange(3), "flag": jnp.array([True, False]), "w": jnp.ones(2), "none": None}
    updates = {"n": jnp.ones(3, jnp.int32), "flag": jnp.array([False, False]), "w": jnp.ones(2), "none": None}
    tx = gn.average_params()
    _, state = jax.jit(tx.update)(updates, tx.init(params), params)
    averaged = gn.eval_params(state, params)
    assert jax.tree.map(lambda x: x.dtype, averaged) == jax.tree.map(lambda x: x.dtype, params)
    assert_equal(averaged, {**params, "w": 2 * params["w"]})


def test_params_may_be_numbers():
    tx, params = gn.average_params(), {"a": 1.0, "b": np.float32(2.0)}
    _, state = tx.update({"a": jnp.array(0.5), "b": jnp.array(0.5)}, tx.init(params), params)
    assert gn.eval_params(state, params) == {"a": 1.5, "b": 2.5}


# --- in an optimizer -------------------------------------------------------------------------------


def train(tx, params, steps=6):
    """Six steps on the squares; the final params and state and the average by a plain loop."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(squares)(params), state, params, value_fn=squares)
        return optax.apply_updates(params, updates), state

    state, average = tx.init(params), params
    for t in range(steps):
        params, state = step(params, state)
        w = 1 / (1 + 0.1 * t)
        average = jax.tree.map(lambda a, p, w=w: (1 - w) * a + w * p, average, params)
    return params, state, average


def averaged_sgd(learning_rate=0.1):
    return optax.chain(optax.scale_by_learning_rate(learning_rate), gn.average_params())


NESTINGS = {
    "ours": gn.grouped_newton,
    "last in a chain": averaged_sgd,
    "chain of chains": lambda: optax.chain(optax.clip(10.0), optax.chain(averaged_sgd())),
    "named chain": lambda: optax.named_chain(("clip", optax.clip(10.0)), ("sgd", averaged_sgd())),
    "injected": lambda: optax.inject_hyperparams(averaged_sgd)(),
    "injected fraction": lambda: optax.chain(optax.sgd(0.1), optax.inject_hyperparams(gn.average_params)()),
    "accumulated": lambda: optax.MultiSteps(averaged_sgd(), 1),
    "masked": lambda: optax.chain(optax.sgd(0.1), optax.masked(gn.average_params(), {"a": True, "b": True})),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_average_is_found_in_any_nesting(name):
    params = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([[2.0]])}
    final, state, average = train(NESTINGS[name](), params)
    found = gn.eval_params(state, final)
    assert_close(found, average, rtol=0, atol=1e-5)
    assert not np.allclose(found["a"], final["a"], rtol=0, atol=1e-4)


def test_average_is_found_in_the_state_of_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gn.grouped_newton(direction=optax.identity()), wrt=nnx.Param)
    x = shifts(8)

    def loss(model):
        return jnp.mean((model(x) - 1.0) ** 2)

    @nnx.jit
    def step(model, optimizer):
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        value_fn = lambda params: loss(nnx.merge(graphdef, params, rest, copy=True))
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value_fn=value_fn, value=value)

    average = nnx.state(model, nnx.Param)
    for t in range(4):
        step(model, optimizer)
        w, now = 1 / (1 + 0.1 * t), nnx.state(model, nnx.Param)
        average = jax.tree.map(lambda a, p, w=w: (1 - w) * a + w * p, average, now)
    params = nnx.state(model, nnx.Param)
    found = gn.eval_params(optimizer.opt_state, params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert_close(found, average, rtol=0, atol=1e-6)
    nnx.update(model, found)
    np.testing.assert_array_equal(loss(model), loss(nnx.merge(nnx.graphdef(model), found)))


def test_frozen_leaves_are_not_averaged_and_come_back_as_they_are_now():
    params = {"n": jnp.arange(3), "stuck": jnp.ones(2), "w": jnp.array([1.0, -2.0])}
    tx = gn.grouped_newton(groups={"n": FROZEN, "stuck": FROZEN, "w": 0})
    loss = lambda p: jnp.sum(p["w"] ** 2 * p["stuck"])
    state = tx.init(params)
    copies = [optax.tree.get(state, name) for name in ("average", "direction", "origin")]
    assert [x.shape for x in jax.tree.leaves(copies)] == [(2,)] * 3
    direction = {"n": jnp.zeros(3, jnp.int32), "stuck": jnp.zeros(2), "w": 2 * params["w"]}
    updates, state = jax.jit(lambda u, s: tx.update(u, s, params, value_fn=loss))(direction, state)
    now = {**params, "stuck": jnp.full(2, 5.0), "n": params["n"] + 1}
    found = gn.eval_params(state, now)
    np.testing.assert_array_equal(found["stuck"], 5.0)
    np.testing.assert_array_equal(found["n"], [1, 2, 3])
    np.testing.assert_allclose(found["w"], params["w"] + updates["w"], rtol=1e-6)


def test_without_averaging_there_is_no_average_and_one_copy_less():
    params = {"w": jnp.ones(1000)}
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(params)))
    assert size(gn.grouped_newton()) - size(gn.grouped_newton(averaging=None)) == 1001
    with pytest.raises(ValueError, match="holds 0 averages of the params and must hold one"):
        gn.eval_params(gn.grouped_newton(averaging=None).init(params), params)


# --- transforms and checkpoints ----------------------------------------------------------------------


def test_params_and_state_can_both_be_donated():
    tx = gn.average_params()
    params = {"w": jnp.ones(3), "n": jnp.arange(3)}
    updates = {"w": jnp.full(3, 0.5), "n": jnp.zeros(3, jnp.int32)}
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        u, state = tx.update(updates, state, params)
        return optax.apply_updates(params, u), state

    for _ in range(2):
        params, state = step(params, state)
    np.testing.assert_allclose(gn.eval_params(state, params)["w"], 1.5 + 0.5 / 1.1, rtol=1e-6)


def test_update_keeps_shapes_dtypes_and_weak_types(precision):
    tx = gn.average_params()
    params = {"w": jnp.ones(2), "short": jnp.ones((), jnp.bfloat16), "weak": jnp.asarray(1.0), "n": jnp.arange(2)}
    assert params["weak"].weak_type
    state = tx.init(params)
    after = jax.eval_shape(lambda s: tx.update(params, s, params)[1], state)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    assert not any(x.weak_type for x in jax.tree.leaves(state))


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(fraction):
    for make in (gn.average_params, lambda fraction: gn.grouped_newton(averaging=fraction)):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got "):
            make(fraction)


def test_update_without_params_is_refused():
    tx = gn.average_params()
    with pytest.raises(ValueError, match=r"average_params needs the current params: tx\.update\("):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("state", "params", "message"),
    [
        (optax.adam(1e-3).init(jnp.ones(2)), jnp.ones(2), r"holds 0 averages .* such as grouped_newton\(\)"),
        ((gn.average_params().init(jnp.ones(2)),) * 2, jnp.ones(2), "holds 2 averages"),
        (gn.average_params().init(jnp.ones(2)), jnp.ones(3), "is of other parameters than these"),
        (gn.average_params().init(jnp.ones(2)), (jnp.ones(2), jnp.ones(2)), "is of other parameters than these"),
        (gn.average_params().init((jnp.ones(2), jnp.ones(2))), jnp.ones(2), "is of other parameters than these"),
    ],
)
def test_a_state_without_one_average_of_these_params_is_refused(state, params, message):
    with pytest.raises(ValueError, match=message):
        gn.eval_params(state, params)
