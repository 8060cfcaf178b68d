"""The error of the cubic model, and the damping that follows it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_finite
from jax import lax

from grouped_newton import ModelError, Summary, adaptive_damping, scale_by_grouped_newton
from grouped_newton.damping import model_error

S = 4


def summary(gbar, hbar, third, loss=0.0):
    return Summary(*(jnp.asarray(x, float) for x in (loss, gbar, hbar, third)))


def test_error_is_that_of_the_quadratic_model_over_its_curvature_term(precision):
    rng = np.random.default_rng(8)
    for _ in range(10):
        g, eta, root = rng.normal(size=S), rng.uniform(0, 1, S), rng.normal(size=(S, S))
        H, change = root @ root.T, rng.normal()
        some = summary(g, H, np.full(S, 7.0), loss=3.0)
        error = model_error(some, jnp.asarray(eta, float), jnp.asarray(3.0 + change, float))
        curvature = eta @ H @ eta / 2
        expected = abs(-change - (g @ eta - curvature)) / curvature
        np.testing.assert_allclose(error.quotient, expected, rtol=0, atol=100 * precision / curvature)
        assert error.reliable
        assert error.gross == (change + g @ eta - curvature > abs(g @ eta) + curvature)


def one_group(loss, slope, curvature, after, eta=1.0):
    some = summary([slope], [[2 * curvature]], [1.0], loss)
    return model_error(some, jnp.array([eta]), jnp.asarray(after, float))


def test_error_is_not_reliable_without_positive_curvature_or_within_rounding_of_the_loss(precision):
    fine = {"loss": 1.0, "slope": 0.5, "curvature": 0.25, "after": 0.8}
    unit = precision * 100.0
    for change, reliable in (
        ({}, True),
        ({"curvature": 0.0}, False),
        ({"curvature": -0.25}, False),
        ({"eta": 0.0}, False),
        ({"loss": -100.0, "slope": 40 * unit, "curvature": 20 * unit}, True),
        ({"loss": -100.0, "slope": 32 * unit, "curvature": 20 * unit}, False),
        ({"loss": 100.0, "slope": 32 * unit, "curvature": 35 * unit}, False),
        # The decrease is visible and the quotient's denominator isn't.
        ({"loss": -100.0, "slope": 40 * unit, "curvature": 12 * unit}, False),
        ({"after": math.nan}, False),
        ({"after": math.inf}, False),
        ({"loss": math.nan}, False),
    ):
        assert one_group(**{**fine, **change}).reliable == reliable, change


def test_error_is_gross_where_the_loss_rises_above_the_model_by_more_than_its_terms():
    # The model falls by 1/2 - 1/4; a loss 3/4 above it is at the limit.
    fine = {"loss": 1.0, "slope": 0.5, "curvature": 0.25}
    for after, gross in ((0.75, False), (1.49, False), (1.51, True), (-5.0, False), (math.nan, True), (math.inf, True)):
        assert one_group(after=after, **fine).gross == gross, after
    assert not one_group(after=-math.inf, **fine).reliable
    # A step that moves nothing isn't, by whatever rounding.
    assert not one_group(100.0, 0.0, 0.0, 100.0 * (1 + 4 * 2.0**-23), eta=0.0).gross


def test_damping_doubles_halves_or_quadruples_between_its_floor_and_its_ceiling(precision):
    rule = adaptive_damping(initial=2.0, floor=0.3, ceiling=7.0)
    assert rule.initial == 2.0

    @jax.jit
    def after(damping, quotient, reliable, gross):
        error = ModelError(*map(jnp.asarray, (quotient, reliable, gross)))
        return rule.update(jnp.asarray(damping, float), error)

    for damping, quotient, reliable, gross, expected in (
        (1.0, 0.51, True, False, 2.0),
        (1.0, 0.49, True, False, 1.0),
        (1.0, 0.11, True, False, 1.0),
        (1.0, 0.09, True, False, 0.5),
        (0.5, 0.0, True, False, 0.3),
        (1.0, 0.9, False, False, 1.0),
        (1.0, 0.0, False, False, 1.0),
        (1.0, math.nan, False, False, 1.0),
        (1.0, math.nan, False, True, 4.0),
        (1.0, 0.05, True, True, 4.0),
        (2.0, 0.05, True, True, 7.0),
        (4.0, 0.9, True, False, 7.0),
        (7.0, 0.9, True, True, 7.0),
    ):
        np.testing.assert_allclose(after(damping, quotient, reliable, gross), expected, rtol=4 * precision)


@pytest.mark.parametrize(
    "options",
    [
        {"floor": 0.0},
        {"floor": -1.0},
        {"initial": 0.05},
        {"initial": math.inf},
        {"floor": math.nan},
        {"floor": 2.0},
        {"initial": 11.0},
        {"ceiling": 0.9},
        {"ceiling": math.inf},
        {"ceiling": math.nan},
    ],
)
def test_a_damping_out_of_range_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"adaptive_damping needs 0 < floor <= initial <= ceiling, .*{name}={value}"):
        adaptive_damping(**options)


def test_traced_dampings_are_not_judged(x64):
    def update(quotient, *options):
        return adaptive_damping(*options).update(jnp.float32(1.0), ModelError(jnp.float32(quotient), True, False))

    for quotient, floor, ceiling, expected in ((0, 0.25, 5.0, 0.5), (0, 0.75, 5.0, 0.75), (1, 0.25, 1.5, 1.5)):
        assert jax.jit(update)(quotient, 1.0, floor, ceiling) == expected


@functools.partial(jax.jit, static_argnames="steps")
def adapt(coefficients, steps, ceiling):
    """States of a run of the paper's transform along u = 1 on a polynomial of one number that stays at 0."""

    def loss(p):
        c = coefficients
        inside = p ** c["power"] * c["q"]
        value = c["c"] + c["g"] * p + c["h"] / 2 * p**2 + c["t"] / 6 * p**3 + inside
        return jnp.where(p < c["wall"], jnp.nan, value)

    tx = scale_by_grouped_newton(internal_damping=adaptive_damping(1.0, 0.1, ceiling), refresh_every=1)
    step = lambda state, _: (tx.update(jnp.ones(()), state, jnp.zeros(()), value_fn=loss)[1],) * 2
    return lax.scan(step, tx.init(jnp.zeros(())), length=steps)[1]


def adapt_to(steps, ceiling=1e9, **changes):
    fine = {"c": 0.0, "g": 1.0, "h": 1.0, "t": 0.0, "q": 0.0, "power": 4, "wall": -math.inf}
    return adapt({k: jnp.asarray(v) for k, v in {**fine, **changes}.items()}, steps, ceiling)


def test_damping_rises_where_the_cubic_model_is_wrong():
    """A quartic term and no third order: the model is sure of a step on which it is wrong, whatever the damping."""
    state = adapt_to(12, q=0.3)
    # eta = 1: the error is 0.3 eta^4 over eta^2 / 2.
    np.testing.assert_allclose(state.model_error, 0.6, rtol=1e-5)
    np.testing.assert_array_equal(state.damping, 2.0 ** np.arange(1, 13))
    np.testing.assert_allclose(state.eta, 1.0, rtol=1e-5)
    bounded = adapt_to(12, ceiling=10.0, q=0.3).damping
    np.testing.assert_array_equal(bounded, np.minimum(2.0 ** np.arange(1, 13), 10))


def test_damping_rises_until_the_error_is_fair_and_stays():
    state = adapt_to(12, q=0.5, t=0.5)
    error, damping = np.asarray(state.model_error), np.asarray(state.damping)
    assert error[0] > 0.5
    assert np.all(error[-4:] < 0.5)
    assert damping[-1] == damping[-4] > 1.0
    assert state.eta[-1, 0] < state.eta[0, 0]
    # The error is of the rates of the same refresh.
    eta = np.asarray(state.eta[:, 0], float)
    np.testing.assert_allclose(error, abs(-0.5 / 6 * eta**3 + 0.5 * eta**4) / (eta**2 / 2), rtol=1e-4)


def test_damping_falls_to_its_floor_on_a_quadratic():
    state = adapt_to(12, c=2.0, h=3.0)
    np.testing.assert_allclose(state.damping, np.maximum(0.5 ** np.arange(1, 13), 0.1), rtol=1e-6)


def test_damping_stays_put_under_the_rounding_of_the_loss():
    """The decrease of 1/2 and an error of 6/10 are invisible beside a loss of 2^24."""
    for c in (2.0**24, -(2.0**24)):
        state = adapt_to(12, c=c, q=0.3)
        np.testing.assert_array_equal(state.damping, 1.0)
        np.testing.assert_array_equal(state.model_error, 0.0)


def test_damping_stays_put_under_the_rounding_of_a_loss_in_half_precision():
    """The decrease of 1/2 is invisible beside a loss of 256 in bfloat16, and not in the state's float32."""
    loss = lambda p: (256.0 + p + p**2 / 2).astype(jnp.bfloat16)
    tx = scale_by_grouped_newton(internal_damping=adaptive_damping(1.0, 0.1), refresh_every=1)
    step = lambda state, _: (tx.update(jnp.ones(()), state, jnp.zeros(()), value_fn=loss)[1],) * 2
    state = lax.scan(step, tx.init(jnp.zeros(())), length=5)[1]
    np.testing.assert_array_equal(state.damping, 1.0)
    np.testing.assert_array_equal(state.model_error, 0.0)


def test_damping_stays_at_its_floor_while_a_descent_on_a_quadratic_converges_to_rounding():
    scales = jnp.array([1.0, 3.0, 10.0])
    loss = lambda p: 5.0 + jnp.sum(scales * (p - 1 / 3) ** 2)
    tx = scale_by_grouped_newton(internal_damping=adaptive_damping(floor=0.1), refresh_every=1)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p, value_fn=loss)
        return (p - updates, state), (state.damping, loss(p))

    start = jnp.zeros(3)
    dampings, losses = jax.jit(lambda: lax.scan(step, (start, tx.init(start)), length=200)[1])()
    assert losses[-1] == pytest.approx(5.0, abs=1e-5)
    np.testing.assert_array_equal(dampings[5:], jnp.float32(0.1))


def test_damping_quadruples_where_the_loss_after_the_step_is_not_a_number_or_far_above():
    for changes in ({"wall": -0.5}, {"q": 10.0}):
        state = adapt_to(5, **changes)
        np.testing.assert_array_equal(state.damping, 4.0 ** np.arange(1, 6))
        assert_finite(state)
    np.testing.assert_array_equal(adapt_to(5, wall=-0.5).model_error, 0.0)
