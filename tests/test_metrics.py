"""Scalars to log, found in whatever holds the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import grouped_newton as gn

OURS = {"predicted_decrease", "loss", "damping", "model_error", "caution", "status", "refreshes", "rejected", "uphill"}
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}


def loss(params):
    """Quadratic: its model is exact."""
    return jnp.sum(params["a"] ** 2) + 5 * params["b"] ** 2 + params["a"][0] * params["b"] + 1


def test_metrics_are_the_numbers_of_the_step_that_they_describe():
    tx = optax.chain(gn.scale_by_grouped_newton(rates=gn.edge_rates(1.0)), optax.scale_by_learning_rate(0.25))
    names = gn.groups.names(gn.groups.per_tensor, PARAMS)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(loss)(PARAMS)
        updates, state = tx.update(grads, state, PARAMS, value=value, value_fn=loss)
        moved = optax.apply_updates(PARAMS, updates)
        return grads, updates, value - loss(moved), gn.metrics(state, names, learning_rate=0.25), state

    grads, updates, decrease, found, state = step(tx.init(PARAMS))
    assert set(found) == OURS | {"rate/a", "rate/b"}
    assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())
    for name in names:
        np.testing.assert_allclose(-found[f"rate/{name}"] * grads[name], updates[name], rtol=1e-6)
        assert np.all(updates[name] != 0)
    np.testing.assert_allclose(found["predicted_decrease"], decrease, rtol=1e-5)
    assert (float(found["loss"]), int(found["refreshes"])) == (float(loss(PARAMS)), 1)
    assert {"rate/0", "rate/1"} < set(gn.metrics(state))


HOLDERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "several steps": lambda tx: optax.MultiSteps(tx, 2),
    "if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "injected": lambda tx: optax.inject_hyperparams(lambda learning_rate: optax.chain(tx, optax.sgd(learning_rate)))(
        0.1
    ),
    "the optimizer, injected": lambda tx: optax.inject_hyperparams(
        gn.grouped_newton, static_args=("groups", "rates", "refresh_every", "internal_damping")
    )(0.1, gn.groups.per_tensor),
    "a partition": lambda tx: optax.partition({"ours": tx}, lambda params: jax.tree.map(lambda _: "ours", params)),
    "the state alone": lambda tx: tx,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_state_is_found_at_any_depth(holder):
    state = HOLDERS[holder](gn.scale_by_grouped_newton()).init(PARAMS)
    assert set(gn.metrics(state, ["a", "b"])) == OURS | {"rate/a", "rate/b"}


def test_a_scan_over_steps_gives_the_metrics_of_each():
    """With wrappers around; a refresh takes place every second step."""
    ours = gn.scale_by_grouped_newton(rates=gn.edge_rates(0.5), refresh_every=2)
    chain = lambda learning_rate: optax.chain(ours, optax.scale_by_learning_rate(learning_rate))
    tx = optax.inject_hyperparams(chain)(0.5)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), state), gn.metrics(state, ["a", "b"], learning_rate=0.5)

        (_, state), found = jax.lax.scan(step, (params, tx.init(params)), length=4)
        return found, gn.metrics(state, ["a", "b"], learning_rate=0.5)

    found, last = train(PARAMS)
    assert {x.shape for x in found.values()} == {(4,)}
    assert found["refreshes"].tolist() == [1, 1, 2, 2]
    assert found["loss"][0] == loss(PARAMS) > found["loss"][2]
    assert {name: x[-1] for name, x in found.items()} == last


def test_the_state_is_found_in_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gn.grouped_newton(averaging=None), wrt=nnx.Param)
    found = nnx.jit(lambda optimizer: gn.metrics(optimizer.opt_state))(optimizer)
    assert set(found) == OURS | {"rate"}
    assert all(type(x) is type(jnp.zeros(())) for x in found.values())


def test_no_state_several_states_and_wrong_names_are_errors():
    tx = gn.scale_by_grouped_newton()
    with pytest.raises(ValueError, match="holds 0 of GroupedNewtonState"):
        gn.metrics(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="holds 2 of GroupedNewtonState"):
        gn.metrics(optax.chain(tx, tx).init(PARAMS))
    with pytest.raises(ValueError, match="one name for each of the 2 groups in the state, got 3"):
        gn.metrics(tx.init(PARAMS), ["a", "b", "c"])
