"""Losses far above those before: what counts as one, and that averages stay finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from grouped_newton import spikes

SETTLED = 10
BAD = [math.nan, math.inf, -math.inf]


@jax.jit
def watch(values):
    """The averages after each step of a run, and whether each was a spike."""

    def step(carry, value):
        losses, count = carry
        losses, spike = spikes.observe(losses, value, count)
        return (losses, count + 1), (losses, spike)

    return lax.scan(step, (jnp.zeros(2, jnp.result_type(float)), jnp.int32(0)), values)[1]


def found(values):
    """The steps that were spikes."""
    return np.flatnonzero(watch(jnp.asarray(values, jnp.result_type(float)))[1])


def noisy(steps, seed=0, noise=0.05):
    return 1 + noise * np.random.default_rng(seed).standard_normal(steps)


def test_averages_and_spikes_are_those_of_a_plain_loop(precision):
    values = noisy(200) * np.geomspace(3, 1, 200)
    values[[60, 61, 150]] = [20.0, 30.0, math.nan]
    mean = deviation = 0.0
    expected, spikes_at = [], []
    for t, value in enumerate(values):
        limit = mean + spikes.FAR * deviation
        if t >= SETTLED and not value <= limit:
            spikes_at.append(t)
            value = limit
        w = max(1 / (1 + t), 1 / (spikes.LEAST + spikes.SHARE * t))
        deviation += w * ((abs(value - mean) if t else 0.0) - deviation)
        mean += w * (value - mean)
        expected.append([mean, deviation])
    losses, _ = watch(jnp.asarray(values))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=200 * precision * 10)
    assert found(values).tolist() == spikes_at
    assert {60, 61, 150} <= set(spikes_at)


def test_noise_about_a_constant_or_a_falling_loss_has_no_spikes():
    values = np.random.default_rng(0).standard_normal((200, 2000))
    falling = np.geomspace(10.0, 1.0, 2000) * np.exp(0.1 * values)
    for runs in (values, 3 + 0.01 * values, falling, np.full((1, 2000), 0.5)):
        assert not np.any(jax.vmap(watch)(jnp.asarray(runs, jnp.float32))[1])


@pytest.mark.parametrize("height", [3.0, 1e6, math.nan, math.inf])
def test_one_loss_far_above_is_one_spike_and_forgotten_later(height):
    """The usual deviation comes back, and with it the limit."""
    values = noisy(600)
    values[100] = height
    assert found(values).tolist() == [100]
    undisturbed, (losses, _) = watch(jnp.asarray(noisy(600)))[0], watch(jnp.asarray(values))
    assert losses[100, 1] > 1.2 * undisturbed[100, 1]
    # It counts as the limit, whatever its height.
    assert losses[100, 0] < undisturbed[100, 0] + 0.05
    np.testing.assert_allclose(losses[-1], undisturbed[-1], rtol=0.05)
    values[500] = height
    assert found(values).tolist() == [100, 500]


def test_a_loss_that_stays_high_is_soon_the_usual_one():
    values = noisy(400) + np.where(np.arange(400) < 100, 0, 2.0)
    at = found(values)
    assert at[0] == 100
    assert at[-1] < 130
    assert watch(jnp.asarray(values))[0][-1, 0] == pytest.approx(3.0, abs=0.1)


def test_a_loss_far_below_is_no_spike():
    values = noisy(300)
    values[100:] -= 10
    assert found(values).tolist() == []


def test_before_the_tenth_step_nothing_is_a_spike():
    values = noisy(40, noise=0.01)
    values[[3, 9]] = 9.0
    assert found(values).tolist() == []
    values = noisy(40, noise=0.01)
    values[10] = 9.0
    assert found(values).tolist() == [10]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("steps", [[0], [4], [9, 10, 11], [50], range(20, 30)])
def test_numbers_that_are_not_finite_never_enter_the_averages(bad, steps):
    """Nor do they spoil them: a spike later is still told."""
    values = noisy(400)
    values[list(steps)] = bad
    values[300] = 9.0
    losses, spike = watch(jnp.asarray(values))
    assert np.all(np.isfinite(losses))
    np.testing.assert_array_equal(np.flatnonzero(spike), [*(t for t in steps if t >= SETTLED), 300])
    np.testing.assert_allclose(losses[-1, 0], 1.0, atol=0.2)


def test_the_zero_and_the_unit_of_the_loss_do_not_matter(x64):
    values = noisy(300)
    values[[70, 200]] = [5.0, 8.0]
    expected = found(values)
    assert len(expected) == 2
    for moved in (values - 100.0, 1e-9 * values, 1e9 * values - 1e9):
        assert found(moved).tolist() == expected.tolist()


@pytest.mark.parametrize("size", [1e38, 3e38])
def test_losses_near_the_largest_number_leave_the_averages_finite(size):
    sign = np.where(np.arange(60) % 7 < 3, -1.0, 1.0)
    assert np.all(np.isfinite(watch(jnp.asarray(size * sign, jnp.float32))[0]))


@pytest.mark.parametrize("value", [1, 1.5, np.float64(2.0), np.float16(3.0), "bfloat16", "float32", "float64"])
def test_dtypes_are_kept_and_nothing_is_weak(x64, value):
    loss = jnp.ones((), value) if isinstance(value, str) else value
    for dtype in (jnp.float32, jnp.float64):
        losses, spike = jax.eval_shape(lambda s: spikes.observe(s, loss, jnp.int32(4)), jnp.zeros(2, dtype))
        assert (losses.shape, losses.dtype, losses.weak_type) == ((2,), dtype, False)
        assert (spike.shape, spike.dtype) == ((), bool)
