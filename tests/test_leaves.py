"""Frozen leaves of any kind, wrong kinds with a label, buffers, strict promotion, and wrappers that fix the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grouped_newton as gn
from grouped_newton.groups import FROZEN

MAKE = {"paper": gn.scale_by_grouped_newton, "optimizer": gn.grouped_newton}

# What jax.tree takes for a leaf, what a gradient holds in its place, and the update.
KINDS = {
    "random key": (lambda: jax.random.key(0), lambda x: np.zeros((), jax.dtypes.float0), jnp.zeros((), jnp.int32)),
    "random keys, no gradient": (lambda: jax.random.split(jax.random.key(0), 3), lambda x: None, None),
    "int4": (lambda: jnp.zeros(3, jnp.int4), jnp.zeros_like, jnp.zeros(3, jnp.int4)),
    "float8": (lambda: jnp.zeros(3, jnp.float8_e4m3fn), jnp.zeros_like, jnp.zeros(3, jnp.float8_e4m3fn)),
    "number": (lambda: 7, lambda x: 0, jnp.zeros((), jnp.int32)),
    "string": (lambda: "relu", lambda x: x, "relu"),
    "string, no gradient": (lambda: "relu", lambda x: None, None),
    "function": (lambda: jnp.tanh, lambda x: None, None),
    "object": (object, lambda x: None, None),
}


def loss_of(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(jnp.cos(params["z"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKE)
def test_frozen_leaves_may_be_of_any_kind_and_cost_nothing(make, kind):
    leaf, grad_of, update = KINDS[kind]
    leaf, labels = leaf(), {"w": 0, "x": FROZEN, "z": 1}
    tx, plain = MAKE[make](groups=labels), MAKE[make](groups={"w": 0, "z": 1})
    params = lambda w: {"w": w, "x": leaf, "z": w}

    is_array = isinstance(update, jax.Array)

    def step(w):
        state = tx.init(params(w))
        grads = {"w": w, "x": grad_of(leaf), "z": w}
        updates, after = tx.update(grads, state, params(w), value=1.0, value_fn=loss_of)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        assert is_array or updates["x"] == update
        found = gn.eval_params(after, params(w)) if make == "optimizer" else params(w)
        assert isinstance(leaf, jax.Array) or found["x"] is leaf
        return state, after, updates["x"] if is_array else None

    state, after, of_x = jax.eval_shape(step, jnp.ones(4))
    assert jax.tree.structure(state) == jax.tree.structure(after)
    alone = jax.eval_shape(lambda w: plain.init({"w": w, "z": w}), jnp.ones(4))
    assert jax.tree.leaves(state) == jax.tree.leaves(alone)
    assert not is_array or (of_x.shape, of_x.dtype) == (update.shape, update.dtype)


def test_the_direction_sees_no_frozen_leaf():
    seen = []

    def update(updates, state, params=None):
        seen.append((jax.tree.leaves(updates), jax.tree.leaves(params)))
        return updates, state

    direction = optax.GradientTransformation(lambda params: seen.append(jax.tree.leaves(params)), update)
    tx = gn.grouped_newton(groups={"a": FROZEN, "w": 0}, direction=direction)
    params = {"a": "name", "w": jnp.ones(3)}
    jax.eval_shape(
        lambda w: tx.update({"a": None, "w": w}, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"])),
        jnp.ones(3),
    )
    assert [len(x) for x in (seen[0], *seen[1])] == [1, 1, 1]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: jax.random.key(0), r"parameter x has dtype key<fry>.*label it groups.FROZEN"),
        (lambda: jnp.zeros(3, jnp.float8_e4m3fn), r"float8_e4m3fn.* at least 16 bits .* groups.FROZEN"),
        (lambda: jnp.zeros(3, jnp.int4), r"int4.*groups.FROZEN"),
        (lambda: jnp.tanh, r"not an array; label it groups.FROZEN or .*eqx.filter\(model, eqx.is_inexact_array\)"),
        (lambda: "relu", r"not an array; label it groups.FROZEN"),
    ],
)
def test_a_label_on_a_wrong_kind_is_refused_and_pointed_to_frozen(make, leaf, message):
    with pytest.raises(TypeError, match=message):
        MAKE[make](groups=gn.groups.per_tensor).init({"w": jnp.ones(4), "x": leaf()})


def test_a_whole_equinox_module_is_refused_unless_its_other_leaves_are_frozen():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        gn.grouped_newton().init(model)
    tx = gn.grouped_newton(groups=jax.tree.map(lambda x: 0 if eqx.is_inexact_array(x) else FROZEN, model))
    loss = lambda model: jnp.mean(jax.vmap(model)(jnp.ones((2, 3))) ** 2)

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, model, value_fn=loss, value=value)
        return eqx.apply_updates(model, updates), state

    before, state = loss(model), tx.init(model)
    for _ in range(3):
        model, state = step(model, state)
    assert loss(model) < before
    assert loss(gn.eval_params(state, model)) < before


# --- buffers -------------------------------------------------------------------------------------


def test_what_eval_params_returns_is_the_callers_own():
    """It outlives a step that donates params and state, and may be donated with the state; frozen leaves too."""
    average = optax.masked(gn.average_params(), {"frozen": False, "w": True})
    tx = optax.chain(optax.sgd(0.5), average)
    params = {"frozen": jnp.arange(3.0), "w": jnp.ones(3)}
    state = tx.init(params)

    def step(params, state):
        grads = {**params, "frozen": jnp.zeros(3)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params, state = step(params, state)
    found = gn.eval_params(state, params)
    params, state = step(params, state)
    np.testing.assert_array_equal(found["w"], 0.5)
    np.testing.assert_array_equal(found["frozen"], np.arange(3.0))
    params = gn.eval_params(state, params)
    params, state = step(params, state)
    twice = [gn.eval_params(state, params) for _ in range(2)]
    assert twice[0]["w"].unsafe_buffer_pointer() != twice[1]["w"].unsafe_buffer_pointer()
    step(twice[0], state)


# --- flags of JAX, and wrappers ------------------------------------------------------------------

OPTIMIZERS = {
    "paper": gn.scale_by_grouped_newton,
    "optimizer": gn.grouped_newton,
    "edge": lambda: gn.scale_by_grouped_newton(
        rates=gn.edge_rates(), internal_damping=gn.adaptive_damping(), refresh_every=gn.growing_period(), delayed=True
    ),
    "schedules": lambda: gn.grouped_newton(internal_damping=lambda count: 2.0, learning_rate=lambda count: 0.5),
    "nested": lambda: gn.grouped_newton(method="nested", direction=optax.identity()),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strict_promotion_of_dtypes(name, dtype):
    """Shapes alone: promotions are a matter of tracing."""
    params = {"w": jnp.ones(3), "z": jnp.ones(2, dtype)}
    loss = lambda p: jnp.sum(jnp.tanh(p["w"]) ** 2) + jnp.sum(p["z"].astype(jnp.float32) ** 3)

    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        tx = OPTIMIZERS[name]()
        updates, state = tx.update(grads, tx.init(params), params, value=value, value_fn=loss)
        if name not in ("paper", "edge"):
            gn.eval_params(state, params)
        return updates

    with jax.numpy_dtype_promotion("strict"):
        updates = jax.eval_shape(step, params)
    assert updates["z"].dtype == dtype


def test_a_refresh_may_draw_from_the_gradients_key_again():
    """Dropout: the summary and the losses of a refresh are of the function that the gradient is of."""

    def loss(p, key):
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, (3,)), p["w"], 0) ** 2)

    tx, params = gn.grouped_newton(direction=optax.identity(), averaging=None), {"w": jnp.ones(3)}

    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        return tx.update(grads, state, params, value=value, value_fn=lambda p: loss(p, key))

    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key: loss(params, key) + loss(params, key))(jax.random.key(0))
        updates, _ = jax.jit(step)(params, tx.init(params), jax.random.key(0))
    assert np.any(np.asarray(updates["w"]) < 0)


def test_a_state_keeps_its_structure_and_masks_nothing_where_nothing_is_frozen():
    tx, params = gn.grouped_newton(), {"w": jnp.ones(3)}
    loss = lambda p: jnp.sum((p["w"] - 3.0) ** 2)
    state = tx.init(params)
    after = jax.eval_shape(
        lambda p, s: tx.update(jax.grad(loss)(p), s, p, value_fn=loss, value=loss(p))[1], params, state
    )
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    is_masked = lambda x: isinstance(x, optax.MaskedNode | optax.MaskedState)
    assert not any(map(is_masked, jax.tree.leaves(state, is_leaf=is_masked)))


def test_it_minimises_in_optimistix():
    """Which stops where the first step is zero, and makes pytrees of closures."""
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.OptaxMinimiser(gn.grouped_newton(), rtol=1e-5, atol=1e-5)
    for loss in (lambda p, _: jnp.sum((p - 1.0) ** 2), lambda p, _: jnp.sum((p - 1.0) ** 2) + 0.01 * jnp.sum(p**2.0)):
        solution = optimistix.minimise(loss, solver, jnp.zeros(3), max_steps=1000, throw=False)
        np.testing.assert_allclose(solution.value, 1.0, atol=0.02)
