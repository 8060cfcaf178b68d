import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cubic_model, minimise_cubic, minimise_on_ray

from grouped_newton import (
    CubicSolution,
    CubicStatus,
    Summary,
    cubic_rates,
    edge_rates,
    growing_period,
    scale_by_grouped_newton,
    solve_cubic,
)

SOLVED, HARD_CASE, UNBOUNDED, NOT_FINITE, _ = CubicStatus
S, N = 4, 300
FACTOR = 1.5

edge = jax.jit(edge_rates(FACTOR))
cubic = jax.jit(cubic_rates())
edges_at = jax.jit(jax.vmap(lambda factor, *problem: edge_rates(factor)(*problem), (None, 0, 0)))
edges = functools.partial(edges_at, FACTOR)


def summary(gbar, hbar, third):
    dtype = jnp.result_type(float)
    return Summary(jnp.zeros(np.shape(gbar)[:-1], dtype), *(jnp.asarray(x, dtype) for x in (gbar, hbar, third)))


def problems(seed, definite=False):
    """N summaries with slopes of either sign and coupled groups, and their dampings."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(N, S, S))
    hbar = root @ root.swapaxes(1, 2) / S if definite else root + root.swapaxes(1, 2)
    third = rng.normal(size=(N, S)) * 10 ** rng.uniform(-2, 2, (N, S))
    lam = 10 ** rng.uniform(-2, 1, N)
    return summary(rng.normal(size=(N, S)), hbar, third), jnp.asarray(lam, jnp.result_type(float))


def host(summary, lam, i=...):
    """One problem (g, H, d, lam) in float64."""
    _, g, H, third = (np.asarray(x[i], float) for x in summary)
    return g, H, np.cbrt(abs(third)), float(lam[i])


def test_cubic_rates_are_the_minimiser_of_the_cubic_model(x64):
    by_hand = lambda some, lam: solve_cubic(some.gbar, some.hbar, jnp.cbrt(jnp.abs(some.third)), lam)
    rates, solution = jax.jit(jax.vmap(lambda *problem: (cubic_rates()(*problem), by_hand(*problem))))(*problems(0))
    assert np.mean(solution.status == SOLVED) > 0.9
    for a, b in zip(rates, solution, strict=True):
        np.testing.assert_array_equal(a, b)


def test_quadratic_is_minimised_exactly_on_its_ray_by_factor_one(precision):
    some, lam = problems(1, definite=True)
    some = some._replace(third=0 * some.third)
    solution = edges_at(1.0, some, lam)
    assert np.all(solution.status == SOLVED)
    for i in np.flatnonzero(np.any(some.gbar > 0, axis=1))[::30]:
        g, H, d, _ = host(some, lam, i)
        eta = np.asarray(solution.eta[i], float)
        error = minimise_on_ray(g, H, d, 0.0, eta) - 1
        assert abs(error) < 4 * S * precision * condition_on_ray(g, H, d, 0.0, eta)
        np.testing.assert_allclose(eta / max(eta), clipped(g / np.diag(H)), rtol=16 * precision)


def clipped(eta):
    eta = np.maximum(eta, 0)
    return eta / max(eta)


def condition_on_ray(g, H, d, lam, eta):
    """Of the minimum of the model on the ray: the sizes of the terms of its slope over its curvature."""
    cube = lam / 2 * np.linalg.norm(d * eta) ** 3
    return (abs(g) @ abs(eta) + abs(eta) @ abs(H) @ abs(eta) + cube) / abs(eta @ H @ eta + 2 * cube)


def test_cubic_model_is_minimised_on_its_ray_but_for_the_factor(precision):
    some, lam = problems(2)
    solution = edges(some, lam)
    compared = 0
    for i in range(0, N, 15):
        problem, eta = host(some, lam, i), np.asarray(solution.eta[i], float)
        if not np.any(eta):
            continue
        t = minimise_on_ray(*problem, eta)
        allowed = 4 * S * precision * condition_on_ray(*problem, eta / FACTOR)
        assert abs(FACTOR * t - 1) < allowed
        np.testing.assert_allclose(float(solution.radius[i]), np.linalg.norm(problem[2] * eta), rtol=16 * precision)
        compared += allowed < 1000 * S * precision
    assert compared >= 15


def test_ratios_are_those_without_coupling(precision):
    some, lam = problems(3)
    solution = edges(some, lam)
    moving = np.flatnonzero(np.any(solution.eta > 0, axis=1))[::20]
    for i in moving:
        g, H, d, damping = host(some, lam, i)
        exact = minimise_cubic(g, np.diag(np.diag(H)), d, damping)
        eta = np.asarray(solution.eta[i], float)
        # 1000: M is a difference on the diagonal where H is negative
        np.testing.assert_allclose(eta / max(eta), clipped(exact.eta), rtol=1000 * precision)
    assert len(moving) >= 10


@pytest.mark.parametrize("factor", [0.25, 1.75])
def test_quadratic_predicts_the_decrease_that_the_factor_leaves(factor, x64):
    some, lam = problems(4, definite=True)
    some = some._replace(third=0 * some.third)
    value = lambda factor: float(cubic_model(*host(some, lam, 0), np.asarray(edges_at(factor, some, lam).eta[0])))
    assert value(1.0) < 0
    assert value(factor) == pytest.approx(factor * (2 - factor) * value(1.0), rel=1e-12)


def test_one_group_gets_the_factor_times_newton_and_an_unused_one_nothing(precision):
    solution = edge(summary([3.0, 0.0], [[2.0, 0.0], [0.0, 0.0]], [0.0, 0.0]), 1.0)
    np.testing.assert_allclose(solution.eta, [FACTOR * 1.5, 0], rtol=4 * precision)
    assert solution.radius == 0


def test_rates_are_never_negative_nor_nan(precision):
    some, lam = problems(5)
    some = some._replace(third=jnp.where(jnp.arange(N)[:, None] % 3 == 0, 0, some.third))
    solution = edges(some, lam)
    assert np.all(solution.eta >= 0)
    assert np.all(solution.radius >= 0)
    assert {SOLVED, UNBOUNDED} <= set(np.unique(solution.status))
    assert np.all(np.asarray(solution.eta)[solution.status == UNBOUNDED] == 0)


def test_rescaled_groups_give_the_same_bits_but_for_the_cube_root(precision):
    some, lam = problems(6)
    a = 2.0 ** np.random.default_rng(6).integers(-20, 21, (N, S))
    a = jnp.asarray(a, jnp.result_type(float))
    rescaled = Summary(some.loss, some.gbar * a, some.hbar * a[:, :, None] * a[:, None, :], some.third * a**3)
    solution, again = edges(some, lam), edges(rescaled, lam)
    np.testing.assert_array_equal(again.status, solution.status)
    np.testing.assert_allclose(again.eta * a, solution.eta, rtol=1000 * precision)
    np.testing.assert_allclose(again.radius, solution.radius, rtol=1000 * precision)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_scale_of_the_loss_does_not_matter(scale, precision):
    some, lam = problems(7)
    solution, again = edges(some, lam), edges(jax.tree.map(lambda x: x * scale, some), lam)
    decided = np.asarray(solution.status) < UNBOUNDED
    assert np.mean(decided) > 0.9
    np.testing.assert_array_equal(again.status, solution.status)
    np.testing.assert_allclose(again.eta[decided], solution.eta[decided], rtol=1e4 * precision)


def test_cube_of_a_large_radius_does_not_overflow():
    solution = edge(summary([1e8, 0.0], [[1e-6, 0.0], [0.0, 1.0]], [1.0, 1.0]), 0.0)
    np.testing.assert_allclose(solution.eta, [FACTOR * 1e14, 0], rtol=1e-6)
    np.testing.assert_allclose(solution.radius, FACTOR * 1e14, rtol=1e-6)
    assert solution.status == SOLVED


@pytest.mark.parametrize("coupling", [-1.0, -2.0])
def test_model_that_falls_for_ever_is_told(coupling, precision):
    hbar = [[1.0, coupling], [coupling, 1.0]]
    for third, lam in (([0.0, 0.0], 1.0), ([1.0, 1.0], 0.0)):
        solution = edge(summary([1.0, 1.0], hbar, third), lam)
        assert solution.status == UNBOUNDED
        assert np.all(solution.eta == 0)
        assert solution.radius == 0
    bounded = edge(summary([1.0, 1.0], hbar, [1e-3, 1e-3]), 1.0)
    assert bounded.status == SOLVED
    assert np.all(bounded.eta > 0)


def test_group_without_bound_is_told(precision):
    assert edge(summary([1.0, 1.0], [[1.0, 0.0], [0.0, -1.0]], [1.0, 0.0]), 1.0).status == UNBOUNDED


def test_no_group_goes_downhill_is_no_step(precision):
    solution = edge(summary([-1.0, 0.0], [[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0]), 1.0)
    assert solution.status == SOLVED
    assert np.all(solution.eta == 0)
    assert solution.radius == 0


def test_group_that_goes_uphill_stays_and_the_other_moves(precision):
    solution = edge(summary([-1.0, 2.0], [[2.0, 1.0], [1.0, 4.0]], [0.0, 0.0]), 1.0)
    np.testing.assert_allclose(solution.eta, [0, FACTOR / 2], rtol=8 * precision)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gbar", "diagonal", "upper", "lower", "third", "damping"])
@pytest.mark.parametrize("rule", [edge, cubic], ids=["edge", "cubic"])
def test_not_finite_input_is_told(rule, where, bad):
    gbar, hbar, third, lam = np.ones(2), 2 * np.eye(2), np.ones(2), 1.0
    if where == "damping":
        lam = bad
    else:
        array, index = {
            "gbar": (gbar, 1),
            "diagonal": (hbar, (1, 1)),
            "upper": (hbar, (0, 1)),
            "lower": (hbar, (1, 0)),
            "third": (third, 0),
        }[where]
        array[index] = bad
    solution = rule(summary(gbar, hbar, third), lam)
    assert solution.status == NOT_FINITE
    assert np.all(solution.eta == 0)
    assert solution.radius == 0


def test_sign_of_third_does_not_matter():
    some = summary([1.0, 1.0], [[2.0, 1.0], [1.0, 2.0]], [1.0, -8.0])
    for rule in (edge, cubic):
        np.testing.assert_array_equal(rule(some, 1.0).eta, rule(some._replace(third=-some.third), 1.0).eta)


@pytest.mark.parametrize("factor", [0, 2, -1.0, 2.5, float("nan"), float("inf")])
def test_factor_out_of_range_is_refused(factor):
    with pytest.raises(ValueError, match=r"factor must be in \(0, 2\), got .*1 is the greedy step"):
        edge_rates(factor)


@pytest.mark.parametrize("rule", [cubic_rates(), edge_rates(), edge_rates(np.float64(1.5))])
@pytest.mark.parametrize("damping", [1.0, np.float64(1), "float32", "float64"])
def test_dtype_is_that_of_the_summary(rule, damping, x64):
    lam = jnp.ones((), damping) if isinstance(damping, str) else damping
    for dtype, expected in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        some = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), summary([1.0], [[1.0]], [1.0]))
        solution = jax.eval_shape(rule, some, lam)
        assert solution.eta.dtype == solution.radius.dtype == expected
        assert solution.status.dtype == jnp.int32


def test_a_function_is_a_rule():
    halved = lambda summary, lam: CubicSolution(
        summary.gbar / jnp.diag(summary.hbar) / 2, jnp.zeros(()), jnp.int32(SOLVED)
    )
    tx = scale_by_grouped_newton(rates=halved)
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    loss = lambda p: jnp.sum(p["a"] ** 2) + 5 * p["b"] ** 2
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(update, param / 2, rtol=1e-6)


# --- the period ----------------------------------------------------------------------------------


def test_period_grows_by_a_tenth_of_the_steps_up_to_the_longest():
    period = growing_period(7)
    counts = jnp.arange(80)
    np.testing.assert_array_equal(jax.jit(period)(counts), np.minimum(1 + np.arange(80) // 10, 7))
    np.testing.assert_array_equal(growing_period(1)(counts), 1)
    assert growing_period()(jnp.int32(1000)) == 10


@pytest.mark.parametrize("longest", [0, -3, 2.5])
def test_a_longest_period_out_of_range_is_refused(longest):
    with pytest.raises(ValueError, match=f"longest must be an integer of at least 1, got {longest}"):
        growing_period(longest)
