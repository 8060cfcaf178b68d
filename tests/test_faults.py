"""Training through faults, and on noise for ever."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import at, each
from jax import lax
from models import tanh_loss, tanh_params

import grouped_newton as gn

pytestmark = pytest.mark.slow
EPS = 2.0**-23


# --- faults of many kinds at steps of all kinds -------------------------------------------------


STEPS = 400


class Fault(NamedTuple):
    """What is done to one step's numbers; the identity by default."""

    value: float = 0.0  # added to the value
    gradient: float = 0.0  # added to one number of the gradient
    curvature: float = 0.0  # added to one number of the curvature batch
    keep: float = 1.0  # factor on the gradient of the first layer
    scale: float = 1.0  # factor on both batches
    sign: float = 1.0  # factor on the curvature loss
    shift: float = 0.0  # added to the curvature batch's targets


FAULTS = {
    "none": Fault(),
    "value NaN": Fault(value=math.nan),
    "value inf": Fault(value=math.inf),
    "gradient NaN": Fault(gradient=math.nan),
    "gradient inf": Fault(gradient=math.inf),
    "curvature NaN": Fault(curvature=math.nan),
    "curvature inf": Fault(curvature=math.inf),
    "everything NaN": Fault(math.nan, math.nan, math.nan),
    "a layer's direction zero": Fault(keep=0.0),
    "huge batch": Fault(scale=1e30),
    "denormal batch": Fault(scale=1e-40),
    "no minimiser": Fault(sign=-1.0),
    "another curvature loss": Fault(shift=5.0),
}


SEEDS = 6


def regression_loss(params, batch):
    x, y = batch
    return jnp.mean((models.apply_dense(params, x) - y) ** 2)


def faulty_run(fault, seed):
    """Final loss, whether all was finite at every step, final state, faults that fell on refreshes."""
    tx = gn.grouped_newton()
    w = jax.random.split(jax.random.key(seed), 4)
    shape = lambda k, m, n: {"bias": jnp.zeros(n), "kernel": jax.random.normal(w[k], (m, n)) / math.sqrt(m)}
    params = {"Dense_0": shape(0, 3, 8), "Dense_1": shape(1, 8, 2)}
    draw = lambda key, n: jax.random.normal(key, (n, 3))
    target = lambda x: jnp.stack([jnp.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 0]], axis=-1)

    def step(carry, key):
        params, state, hits = carry
        ours = state[1]
        due = ours.count >= ours.next_refresh
        # The first step, two in a row between refreshes, and two late refreshes.
        k = ours.count
        faulty = (k == 0) | (k == 38) | (k == 39) | (due & ((k // 20 == 4) | (k // 20 == 8)))
        f = jax.tree.map(lambda bad, fine: jnp.where(faulty, bad, fine), fault, Fault())
        x, z = (draw(k, 16) for k in jax.random.split(key))
        value, grads = jax.value_and_grad(regression_loss)(params, (f.scale * x, f.scale * target(x)))
        first = jax.tree.map(lambda g: f.keep * g, grads["Dense_0"])
        grads = {**grads, "Dense_0": {**first, "bias": first["bias"].at[0].add(f.gradient)}}
        curvature = f.scale * z.at[0, 0].add(f.curvature), f.scale * (target(z) + f.shift)
        value_fn = lambda p: f.sign * regression_loss(p, curvature)
        updates, state = tx.update(grads, state, params, value=value + f.value, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((params, updates, state))]).all()
        return (params, state, hits + (due & faulty)), finite

    start = params, tx.init(params), jnp.int32(0)
    (params, state, hits), finite = lax.scan(step, start, jax.random.split(w[2], STEPS))
    x = draw(w[3], 512)
    return regression_loss(params, (x, target(x))), jnp.all(finite), state[1], hits


@functools.cache
def faulty_runs():
    kinds = [*FAULTS.values(), *[Fault()] * (SEEDS - 1)]
    faults = jax.tree.map(lambda *xs: jnp.array(xs), *kinds)
    seeds = jnp.array([0] * len(FAULTS) + list(range(1, SEEDS)))
    return each(jax.jit(faulty_run), faults, seeds)


@pytest.mark.parametrize("kind", FAULTS)
def test_training_survives_faults_counts_them_and_ends_as_well(kind):
    losses, finite, states, hits = faulty_runs()
    k, clean = list(FAULTS).index(kind), np.array([0, *range(len(FAULTS), len(FAULTS) + SEEDS - 1)])
    state, hits = at(states, k), int(hits[k])
    assert bool(finite[k])
    # Clean runs of other seeds show what noise does.
    assert losses[k] < 1.5 * np.max(losses[clean])
    assert hits >= 3
    not_finite = ("curvature NaN", "curvature inf", "everything NaN", "huge batch")
    if kind in not_finite:
        assert hits - 1 <= int(state.rejected) <= hits + 3
    elif kind == "no minimiser":
        assert int(state.uphill) >= hits - 1
    elif kind in ("none", "value NaN", "value inf", "gradient NaN", "gradient inf", "another curvature loss"):
        assert int(state.rejected) == 0


# --- one fault each, from step FAULT on; and noise for ever -------------------------------------


FAULT, LAST = 150, 600


KINDS = ("none", "a loss a thousand times larger", "params three times as large", "ten batches that aren't numbers")


def noisy_map(key, rows):
    """Inputs, and targets with noise of variance 0.09 of a smooth map; and those without."""
    x = jax.random.normal(key, (rows, 3))
    y = jnp.stack([jnp.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 0]], axis=-1)
    return (x, y + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), y.shape)), (x, y)


def run_on_fresh_batches(params, seed, kind, given, steps, rows=16):
    """The recipe; of every step the loss at the average, rates, caution, damping, and whether all is finite."""
    tx, validation = gn.grouped_newton(), noisy_map(jax.random.key(1000), 512)[1]
    faulty = lambda name: kind == KINDS.index(name)

    def step(carry, key):
        params, state = carry
        k = state[1].count
        x, y = noisy_map(key, rows)[0]
        kicked = faulty(KINDS[2]) & (k == FAULT)
        params = jax.tree.map(lambda p: jnp.where(kicked, 3.0, 1.0) * p, params)
        y = jnp.where(faulty(KINDS[3]) & (k >= FAULT) & (k < FAULT + 10), jnp.nan, y)
        factor = jnp.where(faulty(KINDS[1]) & (k == FAULT), 1e3, 1.0)
        value_fn = lambda p: factor * tanh_loss(p, (x, y))
        value, grads = jax.value_and_grad(value_fn)(params)
        extra = {"value": value} if given else {}
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **extra)
        params = optax.apply_updates(params, updates)
        finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((params, state))]).all()
        average, ours = gn.eval_params(state, params), state[1]
        seen = tanh_loss(average, validation), ours.eta, ours.caution, ours.damping, finite
        return (params, state), seen

    return lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(seed), steps))[1]


@functools.cache
def runs_with_a_fault(given):
    """By kind and seed."""
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tanh_params, range(3)))
    run = jax.jit(lambda params, seed, kind: run_on_fresh_batches(params, seed, kind, given, LAST))
    of_seeds = lambda kind: each(lambda params, seed: run(params, seed, kind), params, jnp.arange(3))
    return each(of_seeds, jnp.arange(len(KINDS)))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("given", [True, False], ids=["losses given", "losses not given"])
def test_rates_answer_a_fault_and_training_recovers(kind, given):
    losses, eta, caution, damping, finite = (x[KINDS.index(kind)] for x in runs_with_a_fault(given))
    assert np.all(finite)
    assert np.all((damping >= 1) & (damping <= 10))
    # At once where the losses are given, and for every bad batch; back to 1 in the end.
    row = 0.5 ** np.arange(1, 11) if kind == KINDS[3] else np.array([0.5])
    np.testing.assert_array_equal(
        caution[:, FAULT : FAULT + len(row)], np.broadcast_to(row if given else 1, (3, len(row)))
    )
    np.testing.assert_array_equal(caution[:, [FAULT - 1, -1]], 1)
    if kind == KINDS[1]:  # a curvature that is larger, too
        assert np.all(np.min(eta[:, FAULT : FAULT + 20], 1) < 0.7 * eta[:, FAULT - 1])
    undisturbed = runs_with_a_fault(given)[0][0]
    assert np.all(losses[:, -1] < 3 * undisturbed[:, -1])


def test_on_endless_noise_rates_settle_and_the_validation_loss_keeps_falling():
    """Two seeds; fresh batches of 32 for 3,000 steps."""
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tanh_params, range(2)))
    run = functools.partial(run_on_fresh_batches, kind=0, given=True, steps=3000, rows=32)
    losses, eta, caution, damping, finite = each(jax.jit(run), params, jnp.arange(2))
    assert np.all(finite)
    assert np.all((damping >= 1) & (damping <= 10))
    assert np.all(caution >= 0.5)
    validation = losses[:, [100, 1000, 2999]]
    assert np.all(validation[:, 1:] < 0.95 * validation[:, :-1])
    later = eta[:, 500:] / eta[:, 500:501]
    assert np.min(later) > 0.02
    assert np.max(later) < 2
