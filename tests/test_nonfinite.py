"""Summaries that aren't finite everywhere, losses without a minimiser: training moves, and says what it replaced."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_finite, only_grouped_newton
from interpreter import uncompiled
from jax import lax

import grouped_newton as gn
from grouped_newton import fallbacks, memory
from grouped_newton.derivatives.summary import summary_of
from grouped_newton.groups import FROZEN

EPS = 2.0**-23
PARTLY, NOT_FINITE, UNBOUNDED = gn.CubicStatus.PARTLY_FINITE, gn.CubicStatus.NOT_FINITE, gn.CubicStatus.UNBOUNDED

# --- the rule ------------------------------------------------------------------------------------


def first_step(loss, params, direction, groups=gn.groups.per_tensor, **options):
    tx = gn.scale_by_grouped_newton(groups, **options)
    update = lambda u: tx.update(u, tx.init(params), params, value_fn=loss)
    updates, state = uncompiled(update)(direction)
    assert_finite((updates, state))
    return updates, state


def test_a_third_derivative_that_is_not_finite_counts_as_a_change_of_the_curvature_by_itself():
    """h eta + lambda (h^2 / g) eta^2 / 2 = g with g = 1, h = 2; the power has the third derivative NaN at 0."""
    _, state = first_step(lambda p: p + p**2.0, jnp.zeros(()), jnp.ones(()))
    np.testing.assert_allclose(state.eta, (math.sqrt(3) - 1) / 2, rtol=16 * EPS)
    assert (state.status, state.rejected, state.replaced[0], state.summary.third[0]) == (PARTLY, 0, False, 0)
    np.testing.assert_array_equal(state.known[:, 0], [True, False])


def quadratic_and_root(p):
    """The curvature of the power is infinite at 0."""
    return jnp.sum(p["a"] + p["a"] ** 2) + jnp.sum(p["b"] + jnp.abs(p["b"]) ** 1.5)


@pytest.mark.parametrize("a", [1.0, 1e-3], ids=["its length", "the others' steps"])
def test_a_group_whose_curvature_is_not_finite_moves_by_a_share_of_the_least_length(a):
    """b, which is zero, goes as far as a's length or steps allow, whatever the length of its direction."""
    params = {"a": jnp.full(3, a), "b": jnp.zeros(2)}
    for scale in (1.0, 2.0**10):
        direction = {"a": jnp.full(3, 1e-4), "b": jnp.array([scale, scale])}
        updates, state = first_step(quadratic_and_root, params, direction)
        own, steps = a * fallbacks.SHARE, 1e-4 * state.eta[0]
        np.testing.assert_allclose(updates["b"], min(own, float(steps)), rtol=16 * EPS)
        np.testing.assert_array_equal(state.replaced, [False, True])
        assert (state.status, state.rejected, state.refreshes) == (PARTLY, 0, 1)


def test_rates_are_equivariant_whatever_is_not_finite():
    """Random summaries with holes, three in a row, in units of each group that are powers of two."""
    rng = np.random.default_rng(0)
    S, N = 4, 64

    def holes(shape):
        return np.where(rng.random(shape) < 0.15, rng.choice([np.nan, np.inf, -np.inf], shape), 0)

    def draw():
        factor = rng.standard_normal((N, S, S))
        gbar, hbar = np.abs(rng.standard_normal((N, S))), factor @ factor.transpose(0, 2, 1)
        third = rng.standard_normal((N, S))
        hbar = hbar + holes(hbar.shape)
        with np.errstate(invalid="ignore"):  # opposite infinities
            hbar = (hbar + hbar.transpose(0, 2, 1)) / 2
        summary = gn.Summary(np.ones(N), gbar + holes(gbar.shape), hbar, third + holes(gbar.shape))
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), summary)

    summaries = [draw() for _ in range(3)]
    lengths = jnp.asarray(np.abs(rng.standard_normal((3, N, S))), jnp.float32)
    a = 2.0 ** jnp.asarray(rng.integers(-10, 10, (N, S)), jnp.float32)

    @uncompiled
    @jax.vmap
    def run(summaries, params, start, direction):
        kept, known, eta = memory.empty(S, jnp.float32), jnp.zeros((2, S), bool), jnp.zeros(S)
        etas = []
        for k, new in enumerate(summaries):
            before, new_filled, known = fallbacks.complete(kept, known, new)
            kept = memory.remember(before, new_filled, jnp.int32(k + 1), 0.5, eta)
            average, out = fallbacks.for_the_rule(kept.average, known)
            eta = fallbacks.rates(gn.edge_rates()(average, 1.0).eta, out, new.gbar, params, start, direction)
            etas.append(eta)
        return jnp.stack(etas)

    def scaled(s):
        return gn.Summary(s.loss, s.gbar * a, s.hbar * a[:, :, None] * a[:, None], s.third * a**3)

    plain = run(summaries, *lengths)
    other = run([scaled(s) for s in summaries], lengths[0], lengths[1], lengths[2] * a)
    assert_finite(plain)
    assert np.mean(plain > 0) > 0.4
    # Cube roots and what is ill-conditioned in the rule round differently.
    np.testing.assert_allclose(other * a[:, None], plain, rtol=1e-3)


def test_what_was_never_finite_is_not_in_the_averages_and_the_first_finite_one_stands_for_all():
    nan, S = jnp.nan, 2
    summary = lambda g, h, t: gn.Summary(
        jnp.array(1.0), jnp.array([1.0, g]), jnp.array([[2.0, h / 4], [h / 4, h]]), jnp.array([0.5, t])
    )
    kept, known = memory.empty(S, jnp.float32), jnp.zeros((2, S), bool)
    seen = [(nan, 3.0, 1.0), (1.0, nan, 1.0), (4.0, 8.0, nan), (8.0, 8.0, -6.0), (nan, 8.0, 6.0), (4.0, 16.0, 6.0)]
    averages, knowns = [], []
    for k, numbers in enumerate(seen):
        before, new, known = fallbacks.complete(kept, known, summary(*numbers))
        kept = memory.remember(before, new, jnp.int32(k + 1), 0.5, jnp.zeros(S))
        assert_finite(kept)
        averages.append([kept.average.gbar[1], kept.average.hbar[1, 1], kept.average.hbar[0, 1], kept.average.third[1]])
        knowns.append(known[:, 1].tolist())
    assert knowns == [[False, False]] * 2 + [[True, False]] + [[True, True]] * 3
    # Weights 1 / k: of three, of four, of five with the average for the missing, of six.
    expected = [[0, 0, 0, 0]] * 2 + [[4, 8, 2, 0], [5, 8, 2, 6], [5, 8, 2, 6], [29 / 6, 56 / 6, 14 / 6, 6]]
    np.testing.assert_allclose(averages, expected, rtol=16 * EPS)
    np.testing.assert_allclose(
        [kept.average.gbar[0], kept.average.hbar[0, 0], kept.average.third[0]], [1, 2, 0.5], rtol=16 * EPS
    )


def test_a_group_without_rate_gets_the_rules_once_there_is_one_at_the_level_of_the_others():
    eta, rule = jnp.array([0.5, 0.0, 0.25, 0.0]), jnp.array([2.0, 4.0, 8.0, 0.0])
    out = jnp.array([False, False, True, True])
    new, still_out = fallbacks.revived(eta, out, rule, jnp.ones(4))
    np.testing.assert_allclose(new, [0.5, 1.0, 2.0, 0.0])
    np.testing.assert_array_equal(still_out, [False, False, False, True])
    np.testing.assert_array_equal(fallbacks.revived(eta, out, 0 * rule, jnp.ones(4))[0], eta)


# --- what is left out --------------------------------------------------------------------------------


def power(x, exponent):
    """By a traced exponent, as of a learnt one: JAX's derivatives at 0 are not those of a constant exponent."""
    return x ** jnp.asarray(exponent, x.dtype)


def rows(p):
    return jnp.stack([p["still"], p["moving"]])


# What is added to sin(moving)^2; and what that is without the numbers that aren't finite.
NOT_FINITE_SOMEWHERE = {
    "a power of what relu cuts off": (lambda p: power(jax.nn.relu(p["moving"]), 1.5), lambda p: p["moving"][1:] ** 1.5),
    "a norm of each row": (
        lambda p: jnp.linalg.norm(rows(p), axis=1),
        lambda p: jnp.linalg.norm(p["moving"]),
    ),
    "in a scan": (
        lambda p: lax.scan(lambda h, x: (h * jnp.cos(jnp.linalg.norm(x)), None), p["moving"][1], rows(p))[0],
        lambda p: p["moving"][1] * jnp.cos(jnp.linalg.norm(p["moving"])),
    ),
    "in a cond": (lambda p: lax.cond(p["moving"][1] > 0, jnp.sqrt, jnp.sin, p["still"]), lambda p: 0.0),
    "equal singular values": (
        lambda p: jnp.linalg.svd(jnp.mean(p["moving"]) * jnp.eye(2), compute_uv=False),
        lambda p: 2 * jnp.mean(p["moving"]),
    ),
}


def test_a_forgiving_sweep_keeps_all_that_is_finite(x64):
    """One group for all, so that one bad number would spoil everything. What is dropped leaves third unknown."""
    params = {"still": jnp.zeros(3), "moving": jnp.array([-1.0, 1.5, 0.5])}
    direction = {"still": jnp.zeros(3), "moving": jnp.array([0.3, 0.2, 0.5])}

    def summary(f):
        loss = lambda p: jnp.sum(jnp.sin(p["moving"]) ** 2) + jnp.sum(f(p))
        return summary_of(loss, params, direction, gn.groups.resolve(gn.groups.single, params), forgiving=True)

    def expected(f):
        moved = lambda t: params["moving"] + t * direction["moving"]
        phi = lambda t: jnp.sum(jnp.sin(moved(t)) ** 2) + jnp.sum(f({"moving": moved(t)}))
        return [d(0.0) for d in (jax.grad(phi), jax.hessian(phi), jax.jacfwd(jax.hessian(phi)))]

    found = uncompiled(lambda: {n: (summary(f), expected(g)) for n, (f, g) in NOT_FINITE_SOMEWHERE.items()})()
    exact = []
    for name, (got, (g, h, t)) in found.items():
        np.testing.assert_allclose([got.gbar[0], got.hbar[0, 0]], [g, h], rtol=1e-12, err_msg=name)
        if np.isfinite(got.third[0]):
            np.testing.assert_allclose(got.third[0], t, rtol=1e-12, err_msg=name)
            exact.append(name)
    assert exact == ["a norm of each row", "in a scan"]


# --- training ------------------------------------------------------------------------------------

X = np.random.default_rng(1).standard_normal((32, 4)).astype(np.float32)
Y = (X @ np.array([[1.0], [-2.0], [0.5], [0.0]], np.float32) + 3.0)[:, 0]


def start():
    return {"net": {"b": jnp.zeros(1), "w": jnp.full(4, 0.5)}, "other": {"m": jnp.eye(2)}}


def error(p, of=jnp.square):
    return jnp.mean(of(X @ p["net"]["w"] + p["net"]["b"][0] - Y))


LOSSES = {
    "powers at 0": lambda p: error(p) + 1e-3 * sum(jnp.sum(q**2.0) for q in jax.tree.leaves(p)),
    "roots of a power at 0": lambda p: error(p) + 1e-3 * jnp.sum(jnp.abs(p["net"]["b"]) ** 1.5),
    "equal singular values": lambda p: error(p) + 1e-3 * jnp.sum(jnp.linalg.svd(p["other"]["m"], compute_uv=False)),
    "absolute error": lambda p: error(p, jnp.abs),
    "hinges": lambda p: error(p, lambda x: jax.nn.relu(jnp.abs(x) - 0.1)),
    "a constant that isn't finite": lambda p: error(p) + jnp.inf,
}
NEVER_FINITE = {"equal singular values"}  # they stay equal: a number of the only group is bad at every step
# Without curvature or a loss, by 1/128 of the length.
SLOW = {"absolute error": UNBOUNDED, "hinges": UNBOUNDED, "a constant that isn't finite": NOT_FINITE}
MAKE = {
    "paper": lambda: optax.chain(gn.scale_by_grouped_newton(), optax.scale(-1.0)),
    "optimizer": functools.partial(gn.grouped_newton, groups=gn.groups.per_module),
    "one group": gn.grouped_newton,
}


def train(tx, loss, params, steps, value=None, run_by=uncompiled):
    def step(carry, _):
        params, state = carry
        given, grads = jax.value_and_grad(loss)(params)
        given = given if value is None else value
        updates, state = tx.update(grads, state, params, value_fn=loss, value=given)
        params = optax.apply_updates(params, updates)
        moved = jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)]).any()
        ours = only_grouped_newton(state)
        return (params, state), (params, moved, ours.replaced, ours.caution, ours.status)

    return run_by(lambda params: lax.scan(step, (params, tx.init(params)), length=steps))(params)


@pytest.mark.parametrize(
    ("make", "name"),
    [("one group" if name in NEVER_FINITE else "optimizer", name) for name in LOSSES]
    + [("paper", "powers at 0"), ("paper", "absolute error")],
)
def test_training_moves_at_once_and_goes_on(make, name):
    run_by = jax.jit if make == "paper" else uncompiled  # which refreshes at every step here, and is small
    (params, state), (_, moved, _, _, status) = train(MAKE[make](), LOSSES[name], start(), 100, run_by=run_by)
    assert_finite((params, state))
    assert np.all(moved)
    measure = functools.partial(error, of=jnp.abs)
    assert measure(params) < (0.99 if name in SLOW else 0.5) * measure(start())
    assert status[0] == SLOW.get(name, PARTLY)


@pytest.mark.parametrize("make", ["paper", "optimizer"])
def test_a_linear_loss_moves_at_every_step(make):
    _, (_, moved, replaced, _, status) = train(
        MAKE[make](), lambda p: sum(map(jnp.sum, jax.tree.leaves(p))), start(), 30
    )
    assert np.all(moved)
    assert np.all(replaced)
    assert np.all(status == UNBOUNDED)


def test_a_group_whose_gradient_is_not_finite_holds_no_other_up():
    """The norm at 0 has no gradient in JAX."""
    loss = lambda p: error(p) + 1e-3 * jnp.linalg.norm(p["other"]["m"] - jnp.eye(2))
    (params, _), _ = train(gn.grouped_newton(), loss, start(), 100)
    assert error(params) < 0.5 * error(start())
    assert_finite(params)


def test_losses_that_are_never_finite_do_not_keep_the_steps_small():
    """The value given is NaN at all steps; or from some step on, which halves them ten times and then no more."""
    tx, params = gn.scale_by_grouped_newton(internal_damping=gn.adaptive_damping(), refresh_every=2), jnp.zeros(())
    loss = lambda p: p + p**2 / 2

    @jax.jit
    @jax.vmap
    def cautions(values):
        def step(state, value):
            state = tx.update(jnp.ones(()), state, params, value_fn=loss, value=value)[1]
            return state, state.caution

        return lax.scan(step, tx.init(params), values)[1]

    wave = 1 + 0.01 * jnp.cos(jnp.arange(60.0))
    found = cautions(jnp.stack([jnp.full(60, jnp.nan), jnp.where(jnp.arange(60) < 15, wave, jnp.nan), jnp.ones(60)]))
    np.testing.assert_array_equal(found[0], 1)
    np.testing.assert_array_equal(found[1, 15:25], 0.5 ** np.arange(1, 11))
    assert found[1, -1] == 1
    np.testing.assert_array_equal(found[2], 1)


def test_a_late_summary_that_is_not_finite_in_one_group_changes_only_that_group():
    """From step 2 on the curvature of b is NaN: a follows its own, b keeps its rate."""

    def loss(p, k):
        a, b = p["a"], p["b"]
        return a + (k + 1) * a**2 / 2 + b + jnp.where(k < 2, b**2 / 2, jnp.abs(b) ** 1.5)

    tx, params = gn.scale_by_grouped_newton(refresh_every=1), {"a": jnp.zeros(()), "b": jnp.zeros(())}

    def step(state, k):
        _, state = tx.update({"a": jnp.ones(()), "b": jnp.ones(())}, state, params, value_fn=lambda p: loss(p, k))
        return state, (state.eta, state.status, state.rejected)

    eta, status, rejected = uncompiled(lambda: lax.scan(step, tx.init(params), jnp.arange(4.0))[1])()
    np.testing.assert_allclose(eta, [[1, 1], [1 / 2, 1], [1 / 3, 1], [1 / 4, 1]], rtol=16 * EPS)
    np.testing.assert_array_equal(status, [0, 0, PARTLY, PARTLY])
    np.testing.assert_array_equal(rejected, 0)


def test_frozen_leaves_are_no_length():
    params = {"a": jnp.zeros(2), "frozen": jnp.full(3, 100.0)}
    updates, _ = first_step(
        lambda p: jnp.sum(p["a"]), params, {"a": jnp.ones(2), "frozen": jnp.ones(3)}, {"a": 0, "frozen": FROZEN}
    )
    np.testing.assert_allclose(updates["a"], fallbacks.FIRST, rtol=8 * EPS)
