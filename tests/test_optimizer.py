"""The optimizer: its recipe and its arguments, training from bad starts, and a gradient that isn't finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, assert_equal, assert_finite, at, each, only_grouped_newton
from interpreter import uncompiled
from jax import lax
from models import regression_batches, tanh_loss, tanh_params
from runs import sum_of_squares, train

import grouped_newton as gn
from grouped_newton.groups import FROZEN

EPS = 2.0**-23


# --- the recipe ---------------------------------------------------------------------------------


BATCHES = regression_batches(20)


@functools.cache
def recipe_run():
    return uncompiled(functools.partial(train, gn.grouped_newton(), tanh_loss))(tanh_params(), BATCHES)


@pytest.mark.slow
def test_the_optimizer_equals_the_chain_made_by_hand():
    """Its defaults are the recipe; updates are equal to the bit."""
    transform = gn.scale_by_grouped_newton(
        gn.groups.single,
        internal_damping=gn.adaptive_damping(),
        refresh_every=gn.growing_period(10),
        rates=gn.edge_rates(1.8),
        summary_memory=0.3,
        delayed=True,
    )
    last = optax.scale_by_learning_rate(1.0), gn.average_params(0.1)
    by_hand = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), transform, *last)
    expected = uncompiled(functools.partial(train, by_hand, tanh_loss, averaged=True))(tanh_params(), BATCHES)
    trained, state, updates = recipe_run()
    assert np.any(state[1].progress[-1] != 0)
    close = functools.partial(assert_close, rtol=1e3 * EPS, atol=1e3 * EPS)  # two differently fused programs
    close((trained, updates), (expected[0], expected[2]))
    ours, by_hand = state[1], expected[1][1]
    for name in ("model_error", "progress"):  # differences of losses
        assert_close(getattr(ours, name), getattr(by_hand, name), rtol=0.01, atol=1e3 * EPS)
    differences = {"model_error": None, "progress": None}
    close(ours._replace(**differences), by_hand._replace(**differences))
    close((state[0].mu, state[0].nu), (expected[1][0].mu, expected[1][0].nu))
    close(gn.eval_params(state, trained), gn.eval_params(expected[1], trained))


@pytest.mark.slow
def test_the_optimizer_hands_every_argument_on():
    schedule = optax.linear_schedule(0.5, 0.1, 6)
    options = {
        "internal_damping": lambda step: 5.0 + step,
        "refresh_every": 2,
        "rates": gn.cubic_rates(),
        "summary_memory": 0.5,
        "delayed": True,
        "nonnegative": False,
        "method": "nested",
    }
    groups = gn.groups.by_path({"b$": "biases", "hidden": FROZEN})
    tx = gn.grouped_newton(schedule, groups, direction=optax.trace(0.5), averaging=None, **options)
    transform = gn.scale_by_grouped_newton(groups, **options)
    by_hand = optax.chain(optax.trace(0.5), transform, optax.scale_by_learning_rate(schedule))
    params, batches = tanh_params(), regression_batches(6)
    run = lambda tx: uncompiled(functools.partial(train, tx, tanh_loss))(params, batches)
    trained, state, updates = run(tx)
    expected = run(by_hand)  # but for the direction's state, which has nothing of frozen leaves
    # Two programs, whose kernels XLA may fuse in two ways.
    found, expected = (trained, state[1:], updates), (expected[0], expected[1][1:], expected[2])
    assert_close(found, expected, rtol=32 * EPS, atol=32 * EPS)
    # And the schedule is one of the step, a factor on all rates.
    velocity, rate = state[0].trace["out"]["b"], state[1].eta[:, 0]
    factor = jnp.array([schedule(k) for k in range(6)])
    np.testing.assert_allclose(updates["out"]["b"], -(factor * rate)[:, None] * velocity, rtol=8 * EPS)


def test_float32_training_has_the_same_types_with_x64_on():
    def kinds():
        run = functools.partial(train, gn.grouped_newton(), tanh_loss)
        return jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, tanh_params(), BATCHES))

    expected = kinds()
    with jax.enable_x64(True):
        assert kinds() == expected


STATIC = ("groups", "direction", "refresh_every", "rates", "delayed", "nonnegative", "method")


def test_hyperparameters_can_be_injected():
    """tests/test_contract.py has a run of them."""
    inject = optax.inject_hyperparams(gn.grouped_newton, static_args=STATIC)
    names = lambda **options: set(inject(**options).init(tanh_params()).hyperparams)
    always = {"learning_rate", "summary_memory", "averaging"}
    assert names() == names(averaging=0.2) == always
    assert names(internal_damping=1.0) == always | {"internal_damping"}


def test_injected_hyperparameters_may_change_between_steps():
    tx = optax.inject_hyperparams(gn.grouped_newton, static_args=STATIC)(
        groups=gn.groups.single,
        internal_damping=1.0,
        refresh_every=1,
        rates=lambda s, damping: gn.CubicSolution(damping[None], damping, 0),
        averaging=None,
    )
    params = {"p": jnp.ones(3)}
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=sum_of_squares))
    state = tx.init(params)
    state.hyperparams.update(learning_rate=jnp.array(0.5), internal_damping=jnp.array(4.0))
    updates, state = step(state)
    np.testing.assert_allclose(updates["p"], -2 * params["p"], rtol=1e2 * EPS)  # Adam's first direction is the sign
    assert only_grouped_newton(state).damping == 4.0


@pytest.mark.slow
def test_clipping_and_weight_decay_belong_in_the_direction_and_plateaus_after_the_optimizer():
    direction = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    ours = gn.grouped_newton(groups=gn.groups.per_module, direction=direction)
    tx = optax.chain(ours, optax.contrib.reduce_on_plateau(patience=1, rtol=1.0))
    params, batches = tanh_params(), regression_batches(6)

    def step(carry, batch):
        params, state, alone = carry
        loss, grads = jax.value_and_grad(tanh_loss)(params, batch)
        u, alone = direction.update(grads, alone, params)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: tanh_loss(p, batch), value=loss)
        carry = optax.apply_updates(params, updates), state, alone
        ours = only_grouped_newton(state)
        return carry, (u, updates, ours.eta, state[1].scale)

    run = lambda p: lax.scan(step, (p, tx.init(p), direction.init(p)), batches)[1]
    u, updates, eta, factor = uncompiled(run)(params)
    assert factor[-1] < factor[0]
    for g, layer in enumerate(("hidden", "out")):
        rate = (factor * eta[:, g])[:, None]
        np.testing.assert_allclose(updates[layer]["b"], -rate * u[layer]["b"], rtol=1e2 * EPS, atol=EPS)


def test_wrappers_that_trace_more_accept_the_optimizer():
    """Accumulated gradients, and injected options that the static arguments don't name."""
    inject = optax.inject_hyperparams(gn.grouped_newton, static_args=("groups", "direction", "rates"))
    for tx in (optax.MultiSteps(gn.grouped_newton(), 2), inject()):
        jax.eval_shape(functools.partial(train, tx, tanh_loss), tanh_params(), regression_batches(2))


@pytest.mark.parametrize("direction", [0.1, optax.adam])
def test_a_direction_that_is_no_transformation_is_refused(direction):
    with pytest.raises(TypeError, match=r"direction must be .* such as optax.scale_by_adam\(\), got "):
        gn.grouped_newton(direction=direction)


# --- training -----------------------------------------------------------------------------------


OPTIMIZERS = {
    "paper": lambda: optax.chain(
        optax.trace(0.9), gn.scale_by_grouped_newton(internal_damping=10.0), optax.scale_by_learning_rate(0.03)
    ),
    "recipe": gn.grouped_newton,
}


def zero_last_layer_and_unused_parameter():
    params = tanh_params()
    return {**params, "out": jax.tree.map(jnp.zeros_like, params["out"]), "idle": {"w": jnp.ones((2, 2))}}, tanh_loss


def relu_with_squared_loss():
    def loss(params, batch):
        x, y = batch
        hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
        return jnp.mean((hidden @ params["out"]["w"] + params["out"]["b"][None] - y) ** 2)

    return tanh_params(), loss


@pytest.mark.slow
@pytest.mark.parametrize("problem", [zero_last_layer_and_unused_parameter, relu_with_squared_loss])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_starts_and_goes_on(problem, make):
    tx, (params, loss) = make(), problem()
    batches = regression_batches(60)
    everything = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batches)

    @jax.jit
    def run(params):
        trained, states, _ = train(tx, loss, params, batches)
        evaluated = jax.vmap(gn.eval_params)(states, trained) if make is gn.grouped_newton else trained
        return states, jax.vmap(lambda p: loss(p, everything))(evaluated), loss(params, everything), trained

    states, losses, start, trained = run(params)
    assert_finite((states, losses, trained))
    # Means of ten steps: at the edge of stability single ones are noisy.
    assert np.mean(losses[20:30]) < 0.9 * start
    assert np.mean(losses[50:]) < np.mean(losses[20:30])
    if "idle" in params:
        np.testing.assert_array_equal(trained["idle"]["w"], 1)


def log_cosh(params):
    """Flat far out, where the cubic model knows of no end: Newton's steps grow exponentially there."""
    z = jnp.array([1.0, 2.0, 4.0, 8.0]) * params["x"]
    return jnp.mean(jnp.logaddexp(z, -z)) - jnp.log(2.0)


@pytest.mark.slow
def test_the_recipe_trains_on_the_whole_data_from_far_out():
    starts = {"x": 2 * jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)}

    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(log_cosh)(params)
            updates, state = tx.update(grads, state, params, value_fn=log_cosh, value=value)
            return (optax.apply_updates(params, updates), state), value

        tx = gn.grouped_newton()
        return lax.scan(step, (params, tx.init(params)), length=200)[1]

    losses = each(jax.jit(run), starts)
    assert np.max(losses[:, -1] / losses[:, 0]) < 0.05


@pytest.mark.slow
def test_a_negated_direction_is_counted_as_uphill_and_moves_nothing():
    """All rates would be negative and are clipped, so every step refreshes."""
    tx = gn.grouped_newton(direction=optax.adam(1e-3))
    run = uncompiled(functools.partial(train, tx, tanh_loss))
    trained, state, updates = run(tanh_params(), regression_batches(12))
    assert_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    assert_equal(at(trained, -1), tanh_params())
    ours = only_grouped_newton(state)
    np.testing.assert_array_equal(ours.uphill, np.arange(1, 13))
    np.testing.assert_array_equal(ours.refreshes, np.arange(12))  # the first is of its direction's own batch
    np.testing.assert_array_equal(ours.rejected, 0)
    assert_finite(state)


@pytest.mark.slow
def test_a_negated_direction_trains_where_negative_rates_are_allowed():
    tx = gn.grouped_newton(
        groups=gn.groups.single, direction=optax.adam(1e-3), rates=gn.cubic_rates(), nonnegative=False
    )
    batches = regression_batches(40)
    trained, state, _ = uncompiled(functools.partial(train, tx, tanh_loss))(tanh_params(), batches)
    start, end = (tanh_loss(p, at(batches, -1)) for p in (tanh_params(), at(trained, -1)))
    assert end < 0.7 * start
    assert only_grouped_newton(state).uphill[-1] > 0


# --- numbers that go wrong ----------------------------------------------------------------------


@jax.jit
def run_with_one_number_of_the_gradient(params, batches, at_step, number):
    """The recipe from start to end; the number is 0 or another one."""
    tx = gn.grouped_newton()

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(tanh_loss)(params, batch)
        own = grads["out"]["w"][1, 0]
        there = state[1].count == at_step
        grads["out"]["w"] = grads["out"]["w"].at[1, 0].set(jnp.where(there, number, own))
        updates, state = tx.update(grads, state, params, value_fn=lambda p: tanh_loss(p, batch), value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return lax.scan(step, (params, tx.init(params)), batches)[1]


@pytest.mark.parametrize("k", [0, 5, 21], ids=["first step", "at a refresh", "between"])
def test_a_number_of_the_gradient_that_is_not_finite_or_has_no_square_counts_as_zero(k):
    batches = regression_batches(40)
    run = lambda number: run_with_one_number_of_the_gradient(tanh_params(), batches, k, number)
    expected = run(0.0)
    for bad in (math.nan, math.inf, -math.inf, 2e19):
        assert_equal(run(bad), expected)
    assert_finite(expected)
    assert k == 0 or (expected[1][1].next_refresh[k - 1] > k) == (k == 21)
    assert not np.array_equal(run(1e19)[0]["out"]["w"][k], expected[0]["out"]["w"][k])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squares_that_the_direction_keeps_are_finite_in_the_gradients_own_dtype(dtype):
    tx, params = gn.grouped_newton(), jnp.ones(2, dtype)
    grads = jnp.array([jnp.finfo(dtype).max, 1], dtype)
    update = lambda g: tx.update(g, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    adam = uncompiled(lambda g: update(g)[1][0])(grads)
    assert_finite(adam)
    assert adam.nu[0] == 0 < adam.nu[1]


@pytest.mark.slow
def test_a_frozen_leaf_whose_gradient_is_not_finite_changes_nothing():
    params = {"stuck": jnp.ones(2), "w": jnp.array([1.0, -2.0])}
    tx = gn.grouped_newton(groups={"stuck": FROZEN, "w": 0})
    loss = lambda p, target: jnp.sum((p["w"] - target) ** 4)

    def run(stuck):
        def step(carry, target):
            params, state = carry
            grads = {**jax.grad(loss)(params, target), "stuck": jnp.full(2, stuck)}
            updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, target))
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state[1], state[0].mu["w"])

        return lax.scan(step, (params, tx.init(params)), jnp.arange(4.0))[1]

    both = each(jax.jit(run), jnp.array([0.0, jnp.nan]))
    assert_equal(at(both, 0), at(both, 1))
    assert np.any(both[2][1, -1] != 0)
