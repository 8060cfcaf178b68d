"""Wrappers of optax around the optimizer, what comes before it, and what after.

More are in test_delayed.py, by what is remembered of the steps that they leave out; clipping, decay and plateaus are in
test_optimizer.py.
"""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_finite, at
from interpreter import uncompiled
from jax import lax
from models import START, valleys

import grouped_newton as gn

pytestmark = pytest.mark.slow
EPS = 2.0**-23


close = functools.partial(checks.assert_close, rtol=1e3 * EPS, atol=1e3 * EPS)


def quick(**options):
    """Small to compile."""
    return gn.grouped_newton(**{"groups": gn.groups.single, "refresh_every": 2, "averaging": None, **options})


def follow(tx, mixes, start=START, **extra):
    """The params, states and updates of a training run with a loss of its own at every step."""

    def step(carry, mix):
        params, state = carry
        value, grads = jax.value_and_grad(valleys)(params, mix)
        value_fn = lambda p: valleys(p, mix)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, value=value, grad=grads, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, updates)

    return uncompiled(lambda p: lax.scan(step, (p, tx.init(p)), mixes)[1])(start)


MIXES = jnp.array([0.9, 0.5, 0.7, 0.8, 0.6, 0.9, 0.4, 0.7])


def counting_rates(calls):
    def rates(summary, damping):
        jax.debug.callback(lambda: calls.append(1))
        return gn.edge_rates()(summary, damping)

    return rates


def test_multi_steps_gives_the_right_steps_and_takes_summaries_that_it_throws_away():
    """conditionally_mask behind an accumulator gives the same steps, and one summary where MultiSteps takes k."""
    every = 2
    calls = {"MultiSteps": [], "conditionally_mask": []}
    wasteful, thrifty = (quick(rates=counting_rates(c), refresh_every=1) for c in calls.values())
    accumulated = optax.chain(
        optax.MultiSteps(optax.identity(), every).gradient_transformation(),
        optax.conditionally_mask(thrifty, lambda step: step % every == every - 1),
    )
    runs = [follow(tx, MIXES) for tx in (optax.MultiSteps(wasteful, every), accumulated)]
    jax.effects_barrier()
    close(runs[0][0], runs[1][0])
    for _, state, updates in runs:
        # The first is of its direction's own batch and isn't counted.
        np.testing.assert_array_equal(optax.tree.get(state, "refreshes"), [0, 0, 0, 1, 1, 2, 2, 3])
        assert not np.any(updates["head"]["w"][::every])
        assert np.all(updates["head"]["w"][1::every])
    assert len(calls["MultiSteps"]) == len(MIXES)
    assert len(calls["conditionally_mask"]) == len(MIXES) // every


def test_apply_if_finite_around_the_whole():
    wrapped = follow(optax.apply_if_finite(quick(), 3), MIXES.at[3].set(jnp.nan))
    assert_finite(wrapped)
    without = follow(quick(), jnp.delete(MIXES, 3))
    close(at(wrapped[0], -1), at(without[0], -1))
    np.testing.assert_array_equal(wrapped[1].total_notfinite, [0, 0, 0, 1, 1, 1, 1, 1])


SEARCHES = {
    "backtracking": functools.partial(optax.scale_by_backtracking_linesearch, 20, max_learning_rate=1.0),
    "zoom": functools.partial(optax.scale_by_zoom_linesearch, 20, max_learning_rate=1.0),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_line_search_after_ours_shares_its_value_fn(search):
    """So the curvature is on the gradient's batch, and no step of it goes up."""
    tx = optax.chain(quick(direction=optax.identity()), search())
    mix = jnp.full(12, 0.5)
    params, state, _ = follow(tx, mix)
    losses = jax.vmap(valleys)(params, mix)
    assert np.all(np.diff(losses) <= 1e-6)
    assert losses[-1] < 0.8 * valleys(START, 0.5)
    np.testing.assert_allclose(optax.tree.get(state[1], "value"), losses, rtol=1e-5)


MATRIX = jnp.array([[1.0, 2.0], [0.5, -1.0]])


DIRECTIONS = {
    "lbfgs": optax.scale_by_lbfgs,
    "adam": optax.scale_by_adam,
    "muon": lambda: optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()),
}


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_before_ours_get_the_newton_rate_of_their_own(direction):
    """Along u on a quadratic with one group: the rate g u / u H u."""
    tx = optax.chain(direction(), gn.scale_by_grouped_newton(gn.groups.single))
    curvature = jnp.array([[1.0, 10.0], [3.0, 2.0]])
    loss = lambda p: jnp.sum(curvature * p**2) / 2
    step = jax.jit(lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p, value=loss(p), value_fn=loss))
    u = uncompiled(lambda g: direction().update(g, direction().init(MATRIX), MATRIX)[0])(curvature * MATRIX)
    rate = jnp.sum(curvature * MATRIX * u) / jnp.sum(curvature * u * u)
    updates, state = step(MATRIX)
    np.testing.assert_allclose(optax.tree.get(state, "eta"), [rate], rtol=1e3 * EPS)
    np.testing.assert_allclose(updates, rate * u, rtol=1e3 * EPS, atol=1e3 * EPS)


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="new in optax 0.2.7")
def test_monitor_after_ours():
    measured = {"norm": optax.tree.norm}
    tx = optax.chain(quick(), optax.monitor(measured))
    params, state = START, tx.init(START)
    grads = jax.grad(valleys)(params, 0.5)
    updates, state = uncompiled(lambda s: tx.update(grads, s, params, value_fn=lambda p: valleys(p, 0.5)))(state)
    close(optax.tree.get(state, "norm"), optax.tree.norm(updates))
