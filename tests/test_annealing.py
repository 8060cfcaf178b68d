"""How large rates are by what the averaged params gain: the parabola, its running average, the growth."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from grouped_newton import Summary
from grouped_newton.annealing import GAIN, RHO, SMALL, TRUST, growth, measure, remember, trusted

SETTLED = 10


@jax.jit
def averages(pairs):
    """The running average after each pair (slope, curvature)."""

    def step(carry, new):
        progress, count = carry
        progress = remember(progress, new, count)
        return (progress, count + 1), progress

    return lax.scan(step, (jnp.zeros(2, pairs.dtype), jnp.int32(1)), pairs)[1]


def pairs(slopes, curvatures):
    return jnp.asarray(np.stack(np.broadcast_arrays(slopes, curvatures), 1), jnp.result_type(float))


# --- the parabola ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "c"), [(3.0, -2.0, 1.0), (-1.0, 0.5, -4.0), (0.0, -1.0, 0.25), (1e-3, 0.0, 2.0)])
def test_slope_and_curvature_are_those_of_the_parabola(precision, a, b, c):
    ell = lambda t: jnp.asarray(a + b * t + c * t**2 / 2)
    found = measure(ell(0.0), ell(0.5), ell(1.0))
    np.testing.assert_allclose(found, [-b, abs(c)], rtol=0, atol=16 * precision * (abs(a) + abs(b) + abs(c)))
    assert found.dtype == jnp.result_type(float)


@pytest.mark.parametrize("loss", [1.0, -300.0, 2.0**20])
def test_within_rounding_of_the_loss_nothing_is_known(precision, loss):
    """The curvature's limit is 64 units; rounding of the three losses is at most sixteen."""
    unit = precision * abs(loss)
    ell = lambda a, b, c: measure(*(jnp.asarray(loss + x * unit) for x in (a, b, c)))
    for a, b, c in ((0, 0, 0), (1, -1, 1), (2, -2, 2), (0, 4, 8)):
        np.testing.assert_array_equal(ell(a, b, c), 0)
    assert ell(16, -16, 16)[1] > 0
    # In half precision the rounding is that of its own.
    half = [jnp.asarray(x, jnp.bfloat16) for x in (256.0, 258.0, 256.0)]
    np.testing.assert_array_equal(measure(*half), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", range(3))
def test_a_loss_that_is_not_finite_changes_nothing(k, bad):
    losses = [jnp.asarray(x) for x in (1.0, 0.5, 1.0)]
    losses[k] = jnp.asarray(bad)
    before = jnp.array([0.3, 2.0])
    np.testing.assert_array_equal(remember(before, measure(*losses), jnp.int32(30)), before)


def test_losses_near_the_largest_number_leave_the_average_finite(x64):
    """Also of float64 where the state is float32."""
    far = (("float32", (1e38, 0.0, 0.0)), ("float64", (1e300, 0.0, 1e300)), ("float64", (1e38, 1.0, 9e38)))
    for dtype, losses in far:
        new = measure(*(jnp.asarray(x, dtype) for x in losses))
        progress = remember(jnp.ones(2, jnp.float32), new, jnp.int32(30))
        assert np.all(np.isfinite(progress)), losses


# --- the running average ---------------------------------------------------------------------------


def plain_averages(new):
    """In float64, with lists."""
    progress, history = np.zeros(2), []
    for count, (slope, curvature) in enumerate(np.asarray(new, np.float64), 1):
        if count > SETTLED and curvature > 0:
            k = count - SETTLED
            w = max(1 / k, 1 / (5 + 0.15 * count))
            c = max(curvature / progress[1], 0.8) if curvature < progress[1] else 1.0
            progress = (1 - w) * c * progress + w * np.array([slope, curvature])
        history.append(progress)
    return np.array(history)


def test_the_average_is_that_of_a_plain_loop(precision):
    rng = np.random.default_rng(0)
    curvatures = np.exp(2 * np.sin(np.arange(80) / 9) + 0.5 * rng.standard_normal(80))
    new = pairs(0.2 * curvatures * (1 + rng.standard_normal(80)), curvatures)
    new = new.at[jnp.array([14, 40])].set(0)  # nothing known
    found = averages(new)
    np.testing.assert_allclose(found, plain_averages(new), rtol=0, atol=80 * precision * np.max(np.abs(new)))
    np.testing.assert_array_equal(found[:SETTLED], 0)
    np.testing.assert_array_equal(found[SETTLED], new[SETTLED])
    for k in (14, 40):
        np.testing.assert_array_equal(found[k], found[k - 1])


def test_a_fall_of_both_by_any_number_keeps_their_quotient(precision):
    """Early ones are scaled down with the curvature, by a fifth at a time; as it rises the latest outvote them."""
    for a in (2.0**-30, 2.0**-3, 2.0**5):
        later = np.where(np.arange(100) < 40, 1.0, a)
        found = averages(pairs(0.3 * later, later))[SETTLED:]
        np.testing.assert_allclose(found[:, 0] / found[:, 1], 0.3, rtol=100 * precision)
    quotients = np.where(np.arange(200) < 40, 0.1, 0.5)
    later = np.where(np.arange(200) < 40, 1.0, 2.0**-10)
    found = averages(pairs(quotients * later, later))
    in_absolute_units = np.average(quotients[10:], weights=later[10:])
    assert in_absolute_units < 0.11
    assert found[-1, 0] / found[-1, 1] > 0.45


# --- the growth --------------------------------------------------------------------------------------

S = 3


def problem(seed=0):
    """An average, positive rates, and a progress."""
    rng = np.random.default_rng(seed)
    root, draw = rng.standard_normal((S, S)), lambda *shape: jnp.asarray(rng.uniform(0.5, 2, shape))
    hbar = jnp.asarray(root @ root.T + np.eye(S))
    return Summary(jnp.zeros(()), draw(S), hbar, draw(S)), draw(S), jnp.array([0.1, 1.0]) * draw(2)


def plain_growth(average, eta, progress, steps, count):
    g, H, eta, (slope, curvature) = (np.asarray(x, float) for x in (average.gbar, average.hbar, eta, progress))
    a, b = g @ eta, eta @ H @ eta
    wanted = np.clip(slope / curvature / RHO - 1, -1, 0.5) + 2 * a / b - 1
    return np.exp(np.clip(GAIN * steps / (count + 10) * np.clip(wanted, -1, 0.25), -0.5, 0.5))


def test_growth_is_that_of_the_formula_and_one_where_both_quotients_are_as_wanted(precision):
    for seed in range(5):
        average, eta, progress = problem(seed)
        for steps, count in ((1, 20), (10, 100), (10, 40)):
            found = growth(average, eta, progress, jnp.int32(steps), jnp.int32(count))
            np.testing.assert_allclose(found, plain_growth(average, eta, progress, steps, count), rtol=64 * precision)
            assert (found.shape, found.dtype) == ((), eta.dtype)
    average, eta, _ = problem()
    half = average._replace(gbar=average.hbar @ eta / 2)  # a step's slope in equilibrium
    still = growth(half, eta, jnp.array([RHO, 1.0]), jnp.int32(10), jnp.int32(50))
    np.testing.assert_allclose(still, 1.0, rtol=64 * precision)


def test_growth_is_one_before_anything_is_known():
    average, eta, progress = problem()
    for unknown in (
        (average, eta, 0 * progress),
        (average, 0 * eta, progress),
        (average, -eta, progress),
        (jax.tree.map(jnp.zeros_like, average), eta, progress),
    ):
        assert growth(*unknown, jnp.int32(10), jnp.int32(50)) == 1


def test_growth_is_bounded_for_any_numbers():
    average, eta, _ = problem()
    extremes = [-1e30, -1.0, 0.0, 1e-30, 1.0, 1e30]
    for slope in extremes:
        for g in extremes:
            for steps, count in ((1, 20), (10, 20), (1000, 1000)):
                progress = jnp.array([slope, 1.0])
                found = growth(average._replace(gbar=g + 0 * eta), eta, progress, jnp.int32(steps), jnp.int32(count))
                bound = min(0.5, GAIN * steps / (count + 10))
                assert abs(math.log(found)) <= bound + 1e-5


def test_rates_grow_with_either_quotient(precision):
    average, eta, progress = problem()
    at = lambda slope, g: growth(
        average._replace(gbar=g * average.gbar), eta, jnp.stack([slope, progress[1]]), jnp.int32(1), jnp.int32(50)
    )
    values = jnp.linspace(0.0, 1.0, 50)
    for found in (jax.vmap(lambda v: at(v, 1.0))(values), jax.vmap(lambda v: at(progress[0], v))(values)):
        assert np.all(np.diff(found) >= -4 * precision)
        assert found[-1] > found[0]


def test_growth_depends_on_no_unit(precision):
    """Neither of the loss, in the summaries or on the way to the average, nor of a group's direction."""
    average, eta, progress = problem()
    expected = growth(average, eta, progress, jnp.int32(5), jnp.int32(50))
    a, aa = (a := 2.0 ** jnp.array([-8.0, 0.0, 5.0]), a[:, None] * a[None])
    for other in (
        (jax.tree.map(lambda x: 2.0**9 * x, average), eta, progress),
        (average, eta, 2.0**-12 * progress),
        (average._replace(gbar=average.gbar * a, hbar=average.hbar * aa), eta / a, progress),
    ):
        np.testing.assert_allclose(growth(*other, jnp.int32(5), jnp.int32(50)), expected, rtol=32 * precision)


def test_no_group_is_trusted_further_than_a_share_of_its_length_now_or_at_the_start(precision):
    """Unless it started close to zero; nor are rates changed that are smaller, or negative, or of no direction."""
    cases = {  # eta, params, start, direction: expected
        (1.0, 2.0, 0.5, 3.0): TRUST * 2 / 3,
        (1.0, 0.0, 0.5, 3.0): TRUST * 0.5 / 3,
        (1e-3, 2.0, 0.5, 3.0): 1e-3,
        (-1.0, 2.0, 0.5, 3.0): -1.0,
        (1.0, 2.0, 0.5, 0.0): 1.0,
        (1.0, 2.0, 0.0, 3.0): 1.0,
        (1.0, 2.0, SMALL / 2, 3.0): 1.0,
        (1.0, 2.0, 2 * SMALL, 3.0): TRUST * 2 / 3,
    }
    found = trusted(*map(jnp.array, zip(*cases, strict=True)))
    np.testing.assert_allclose(found, list(cases.values()), rtol=4 * precision)
    far = jnp.array([0.0, 1e-30, 1.0, jnp.finfo(found.dtype).max, jnp.inf])
    for direction in far:
        assert np.all(np.isfinite(trusted(jnp.ones(5), far, jnp.ones(5), jnp.broadcast_to(direction, 5))))


def test_the_way_to_the_average_alone_doesnt_make_steps_grow_that_overshoot(precision):
    average, eta, _ = problem()
    short = average._replace(gbar=average.hbar @ eta / 5)
    assert growth(short, eta, jnp.array([1e6, 1.0]), jnp.int32(10), jnp.int32(50)) < 1


def test_rates_follow_a_power_of_the_steps_whatever_the_period(x64):
    """A hundred times the steps at the limit are a hundredth to the power of the gain, in steps of any size."""
    average, eta, progress = problem()
    average, progress = average._replace(gbar=1e-3 * average.gbar), progress.at[0].set(0)
    for period in (1, 10, 50):
        counts = jnp.arange(200, 20_000, period)
        each = jax.vmap(lambda c, p=period: growth(average, eta, progress, jnp.int32(p), c))(counts)
        assert np.prod(each) == pytest.approx((20_010 / 210) ** -GAIN, rel=2 * period / 210)


def test_dtypes_are_kept_and_nothing_is_weak(x64):
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    for dtype in (jnp.float32, jnp.float64):
        average, eta, _ = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), problem())
        for of_losses in (jnp.bfloat16, jnp.float32, jnp.float64):
            new = jax.eval_shape(measure, *[jax.ShapeDtypeStruct((), of_losses)] * 3)
            after = jax.eval_shape(remember, jnp.zeros(2, dtype), new, jnp.int32(3))
            assert kind(after) == ((2,), dtype, False)
            grown = jax.eval_shape(growth, average, eta, after, jnp.int32(1), jnp.int32(3))
            assert kind(grown) == ((), dtype, False)
