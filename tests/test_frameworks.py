"""Training steps of Flax Linen, with donated states, of Flax NNX, compiled once, and of Equinox."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import grouped_newton as gn

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 16, 3))
BATCHES = X, jnp.sin(X[..., :2])
STEPS = 20


def squared_error(prediction, batch):
    return jnp.mean((prediction - batch[1]) ** 2)


def batch_of(i):
    return jax.tree.map(lambda x: x[i], BATCHES)


class LinenTrainState(TrainState):
    """Hands ``value_fn`` and other extra arguments on to the optimizer, which TrainState doesn't."""

    def apply_gradients(self, *, grads: Any, **extra_args: Any) -> "LinenTrainState":
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(linen.tanh(linen.Dense(4)(x)))


def linen_state(kind):
    model = LinenNet()
    params = model.init(KEY, X[0])["params"]
    return kind.create(apply_fn=model.apply, params=params, tx=gn.grouped_newton())


def test_a_linen_train_state_that_forwards_extra_arguments_trains():
    state = linen_state(LinenTrainState)
    loss_of = lambda params, batch: squared_error(state.apply_fn({"params": params}, batch[0]), batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch_of(0))
        value_fn = lambda params: loss_of(params, batch_of(1))
        return state.apply_gradients(grads=grads, value=loss, value_fn=value_fn)

    state = state.replace(step=jnp.array(state.step))
    start = loss_of(state.params, batch_of(0))
    for _ in range(STEPS):
        state = step(state)
    assert (state.step, optax.tree.get(state.opt_state, "rejected")) == (STEPS, 0)
    assert loss_of(state.params, batch_of(0)) < 0.7 * start


def test_the_plain_linen_train_state_drops_value_fn_and_is_told():
    state = linen_state(TrainState)
    with pytest.raises(ValueError, match=r"update needs value_fn.*A wrapper that drops extra arguments drops it too"):
        state.apply_gradients(grads=state.params)


class NormalizedNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))


@pytest.mark.parametrize("make", [gn.grouped_newton, lambda: optax.sgd(0.0)], ids=["grouped_newton", "plain"])
def test_an_nnx_step_with_batch_norm_and_dropout_writes_to_the_model_once(make):
    """The statistics and the stream of random numbers are those of one call a step."""
    model = NormalizedNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    loss_of, traces = lambda model, batch: squared_error(model(batch[0]), batch), []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(loss_of)(model, batch_of(0))
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        if make is not gn.grouped_newton:
            optimizer.update(model, grads)
            return loss
        value_fn = lambda params: loss_of(nnx.merge(graphdef, params, rest, copy=True), batch_of(1))
        optimizer.update(model, grads, value_fn=value_fn, value=loss)
        return loss

    losses = [step(model, optimizer) for _ in range(STEPS)]
    (count,) = (x for x in jax.tree.leaves(nnx.state(model, nnx.RngCount)) if jnp.ndim(x) == 0)
    assert int(count) == STEPS
    assert len(traces) == 1
    assert np.all(np.isfinite(losses))
    if make is gn.grouped_newton:
        assert optax.tree.get(optimizer.opt_state, "rejected")[...] == 0
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:2])
        assert np.all(model.norm.mean[...] != 0)


def test_an_equinox_module_trains_partitioned():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jax.nn.tanh, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_of = lambda params, batch: squared_error(jax.vmap(eqx.combine(params, static))(batch[0]), batch)
    tx = gn.grouped_newton()

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params, batch_of(0))
        value_fn = lambda params: loss_of(params, batch_of(1))
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn)
        return eqx.apply_updates(params, updates), state

    start, state = loss_of(params, batch_of(0)), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert loss_of(params, batch_of(0)) < 0.7 * start
    assert gn.groups.names(gn.groups.per_module, params) == ("layers/0", "layers/1")
    assert jax.vmap(eqx.combine(gn.eval_params(state, params), static))(X[0]).shape == (16, 2)
