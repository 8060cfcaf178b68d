"""Refreshes: the order of things, their schedule, fallbacks, and what is kept out of rates and average."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, assert_finite, at, each, shifted
from interpreter import uncompiled
from jax import lax
from models import regression_batches, tanh_loss, tanh_params
from runs import follow, follow_polynomial, polynomial_batches, sum_of_squares, train

import grouped_newton as gn
from grouped_newton import annealing, fallbacks, memory, spikes
from grouped_newton.damping import model_error

EPS = 2.0**-23


@jax.jit
def paper_on_polynomial(batches, directions, refresh_every, share):
    # Traced options, so that all tests share one compilation.
    tx = gn.scale_by_grouped_newton(refresh_every=refresh_every, summary_memory=share)
    return follow_polynomial(tx, batches, directions)


def run_polynomial(steps, *, refresh_every=10, share=0.0, u=(1.0,) * 6, **columns):
    """Updates and states of the paper's transform; c, g, h, t are the summaries, and the rate is g / h if t = 0."""
    batches, u = polynomial_batches(**columns), jnp.array(u)
    updates, state = paper_on_polynomial(batches, u, refresh_every, share)
    assert_finite((updates, state))
    return updates[:steps], at(state, slice(steps))


# --- loops by hand ------------------------------------------------------------------------------


def look(params, batch, groups=gn.groups.per_module, loss=tanh_loss, along=None):
    """A gradient with its loss, and the summary along it or along another direction."""
    loss = functools.partial(loss, batch=batch)
    value, u = jax.value_and_grad(loss)(params)
    return value, u, gn.summarize(loss, params, u if along is None else along, groups)


def memory_of(state):
    return memory.Memory(state.summary, state.recent)


def walled_loss(params, batch):
    """Steep where the params are small, which no derivative tells before."""
    return tanh_loss(params, batch) + 1e4 * jax.nn.relu(4.55 - sum_of_squares(params)) ** 2


def test_rates_equal_those_of_a_hand_written_loop():
    """Every third step, averaged, with a scheduled damping."""
    refresh_every, share, damping = 3, 0.5, lambda step: 1.0 + step
    steps, params, batches = 8, tanh_params(), regression_batches(8)
    tx = gn.scale_by_grouped_newton(
        gn.groups.per_module,
        internal_damping=damping,
        refresh_every=refresh_every,
        rates=gn.edge_rates(1.2),
        summary_memory=share,
    )
    descent = optax.chain(tx, optax.scale(-1.0))
    trained, (state, _), updates = uncompiled(functools.partial(train, descent, tanh_loss))(params, batches)
    before = shifted(params, trained)

    @jax.jit
    def renewed(kept, summary, refreshes, eta, lam):
        kept = memory.remember(kept, summary, refreshes, share, eta)
        return kept, gn.edge_rates(1.2)(kept.average, lam).eta

    kept, refreshes, eta, looked = memory.empty(2, jnp.float32), 0, jnp.zeros(2), jax.jit(look)
    for k in range(steps):
        _, u, summary = looked(at(before, k), at(batches, k))
        if k % refresh_every == 0:
            refreshes += 1
            lam = damping(k)
            kept, eta = renewed(kept, summary, refreshes, eta, lam)
        now = at(state, k)
        # The same numbers from two differently fused programs.
        tolerance = 1e3 * EPS
        np.testing.assert_allclose(now.eta, eta, rtol=tolerance)
        assert_close(memory_of(now), kept, rtol=tolerance, atol=tolerance)
        assert (now.count, now.refreshes, now.damping) == (k + 1, refreshes, lam)
        assert (now.rejected, now.uphill) == (0, 0)
        expected = {name: jax.tree.map(lambda x, r=r: -r * x, u[name]) for name, r in zip(u, eta, strict=True)}
        assert_close(at(updates, k), expected, rtol=tolerance, atol=tolerance)
    assert len(np.unique(state.eta[:, 0])) == math.ceil(steps / refresh_every)
    assert np.all(state.eta > 0)
    assert np.all(state.summary.third >= 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "groups", "rates", "delayed", "learning_rate"),
    [
        (tanh_loss, gn.groups.per_module, gn.edge_rates(1.8), True, 0.5),
        (walled_loss, gn.groups.per_tensor, gn.cubic_rates(), False, 0.05),
    ],
    ids=["edge, delayed", "cubic"],
)
def test_the_order_of_things_at_a_refresh_is_that_of_a_hand_written_loop(loss, groups, rates, delayed, learning_rate):
    """The losses given and an average kept; the targets jump and losses spike, and steps into the wall are gross."""
    steps, share, damping = 26, 0.3, gn.adaptive_damping(1.0, 0.2)
    params, (x, y) = tanh_params(), regression_batches(steps)
    jumps = jnp.where(jnp.arange(steps) < 8, 1.0, 2.0) * jnp.where(jnp.arange(steps) == 21, 20.0, 1.0)
    batches = (x, y * jumps[:, None, None])
    schedule = gn.growing_period(5)
    options = {"internal_damping": damping, "refresh_every": schedule, "rates": rates, "summary_memory": share}
    tx = gn.grouped_newton(learning_rate, groups, direction=optax.identity(), delayed=delayed, **options)
    run = jax.jit(functools.partial(train, tx, loss, given=True))
    trained, states, updates = run(params, batches)
    state = states[1]
    before = shifted(params, trained)
    averages = shifted(params, jax.vmap(gn.eval_params)(states, trained))
    index = gn.groups.resolve(groups, params).index
    S = state.eta.shape[1]

    def lengths(leaves):
        """The root of the mean square of each group."""
        of_group = lambda s: jnp.concatenate([x.ravel() for x, g in zip(leaves, index, strict=True) if g == s])
        return jnp.sqrt(jnp.array([jnp.mean(of_group(s) ** 2) for s in range(S)]))

    @jax.jit
    def refresh(kept, new, counts, lam, progress, eta, here, average, theta, u, batch):
        (n, k, last_refresh), loss_at = counts, lambda p: loss(p, batch)
        halfway = jax.tree.map(lambda a, b: (a + b) / 2, average, here)
        progress = annealing.remember(progress, annealing.measure(*map(loss_at, (average, halfway, here))), n)
        kept = memory.remember(kept, new, n, share, eta)
        grown = eta * annealing.growth(kept.average, eta, progress, k - last_refresh, k)
        settled = (k >= annealing.START) & (progress[1] > 0) & jnp.any(eta != 0)
        eta = jnp.where(settled, grown, rates(kept.average, lam).eta)
        theta, treedef = jax.tree.flatten(theta)
        u = jax.tree.leaves(u)
        eta = annealing.trusted(eta, lengths(theta), lengths(jax.tree.leaves(params)), lengths(u))
        used = jnp.maximum(eta, 0)
        moved = [p - used[g] * v for p, v, g in zip(theta, u, index, strict=True)]
        error = model_error(new, used, loss_at(treedef.unflatten(moved)))
        return kept, progress, jnp.where(error.gross, eta / 2, eta), damping.update(lam, error), error, settled

    kept, eta, progress, losses = memory.empty(S, jnp.float32), jnp.zeros(S), jnp.zeros(2), jnp.zeros(2)
    lam, caution, refreshes, due, last_refresh, last = jnp.array(1.0), 1.0, 0, 0, 0, None
    looked = jax.jit(functools.partial(look, groups=groups, loss=loss))
    tolerance = 1e3 * EPS  # the same numbers from two differently fused programs
    seen = {"gross": 0, "spikes": 0, "settled": 0}
    for k in range(steps):
        here, batch = at(before, k), at(batches, k)
        value, u, new = looked(here, batch)
        renewed = caution
        losses, spike = spikes.observe(losses, value, jnp.int32(k))
        if k >= due or not np.any(eta):
            theta, along = here, u
            if delayed and k > 0:
                theta, along = at(before, k - 1), last
                new = looked(theta, batch, along=along)[2]
            counts = jnp.int32(refreshes + 1), jnp.int32(k), jnp.int32(last_refresh)
            kept, progress, eta, lam, error, settled = refresh(
                kept, new, counts, lam, progress, eta, here, at(averages, k), theta, along, batch
            )
            refreshes += not (delayed and k == 0)
            due = k + 1 if error.gross else k + int(schedule(k))
            renewed, last_refresh = min(2 * caution, 1.0), k
            seen["gross"] += bool(error.gross)
            seen["settled"] += bool(settled)
        if spike:
            renewed, due, seen["spikes"] = caution / 2, k + 1, seen["spikes"] + 1
        caution = renewed
        last, now = u, at(state, k)
        assert (now.refreshes, now.next_refresh, now.last_refresh) == (refreshes, due, last_refresh)
        assert_close((now.eta, now.damping), (eta, lam), rtol=tolerance, atol=tolerance * np.max(np.abs(eta)))
        # Differences of losses.
        np.testing.assert_allclose(now.progress, progress, rtol=0.01, atol=tolerance * float(value))
        np.testing.assert_allclose(now.losses, losses, rtol=tolerance)
        np.testing.assert_allclose(now.model_error, jnp.where(error.reliable, error.quotient, 0), rtol=0.01, atol=1e-3)
        assert now.caution == caution
        factor = learning_rate * caution * np.maximum(eta, 0)
        for g, v, scaled in zip(index, jax.tree.leaves(u), jax.tree.leaves(at(updates, k)), strict=True):
            np.testing.assert_allclose(scaled, -factor[g] * v, rtol=tolerance, atol=tolerance * np.max(np.abs(v)))
    assert (seen["settled"] > 0) == (loss is tanh_loss)  # the wall's rounding hides the average's gain
    assert seen["spikes"] > 0
    assert (seen["gross"] > 0) == (loss is walled_loss)
    assert len(np.unique(state.damping)) > 2
    assert groups is gn.groups.per_module or np.any(state.eta < 0)


# --- the schedule -------------------------------------------------------------------------------


def test_a_schedule_says_after_how_many_steps_the_next_refresh_is():
    """Rounded down, and at least one."""
    counts = jnp.arange(20)
    schedules = {
        (*range(11), 12, 14, 16, 18): gn.growing_period(5)(counts),
        (0, 1, 2, 3, 10, 17): jnp.where(counts < 3, 1, 7),
        (0, 6, 12, 18): 6.9 + 0 * counts,
        tuple(range(20)): 0 * counts,
    }
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (20,)), polynomial_batches())

    @jax.jit
    def run(table):
        tx = gn.scale_by_grouped_newton(refresh_every=lambda count: table[count])
        return follow_polynomial(tx, batches, jnp.ones(20))[1].refreshes

    tables = jnp.stack([x.astype(float) for x in schedules.values()])
    for steps, refreshes in zip(schedules, each(run, tables), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(np.diff(refreshes, prepend=0)), steps)


def test_without_any_rate_of_the_rule_the_next_step_refreshes_and_the_schedule_counts_from_there():
    tx = gn.scale_by_grouped_newton(refresh_every=lambda count: 3)
    batches = polynomial_batches(h=[-1.0, 2.0, 4.0])
    updates, state = uncompiled(functools.partial(follow_polynomial, tx))(batches, jnp.ones(6))
    np.testing.assert_allclose(updates, [2.0**-10, 0.5, 0.5, 0.5, 0.25, 0.25], rtol=8 * EPS)
    np.testing.assert_array_equal(state.next_refresh, [1, 4, 4, 4, 7, 7])
    np.testing.assert_array_equal(state.refreshes, [1, 2, 2, 2, 3, 3])


def test_between_refreshes_the_loss_is_not_looked_at():
    """Its NaNs there change nothing, and outside the branch there is no solve."""
    updates, state = run_polynomial(4, refresh_every=3, c=[0.0, math.nan, math.nan, 0.0], h=[2.0, 2.0, 2.0, 4.0])
    np.testing.assert_allclose(updates, [0.5, 0.5, 0.5, 0.25], rtol=8 * EPS)
    np.testing.assert_array_equal(state.refreshes, [1, 1, 1, 2])
    np.testing.assert_array_equal(state.rejected, 0)

    tx, params = gn.scale_by_grouped_newton(), {"p": jnp.zeros(())}
    step = lambda u, state: tx.update(u, state, params, value_fn=sum_of_squares)
    outside = {eqn.primitive.name for eqn in jax.make_jaxpr(step)(params, tx.init(params)).jaxpr.eqns}
    assert "cond" in outside
    assert outside.isdisjoint({"cholesky", "eigh", "triangular_solve", "while", "scan"})


# --- fallbacks ----------------------------------------------------------------------------------


def test_without_minimiser_the_last_good_rates_stay():
    updates, state = run_polynomial(4, refresh_every=1, h=[2.0, -1.0, -1.0, 4.0])
    np.testing.assert_allclose(updates, [0.5, 0.5, 0.5, 0.25], rtol=8 * EPS)
    np.testing.assert_array_equal(state.rejected, [0, 1, 2, 2])
    np.testing.assert_array_equal(state.refreshes, [1, 2, 3, 4])
    solved, unbounded = gn.CubicStatus.SOLVED, gn.CubicStatus.UNBOUNDED
    np.testing.assert_array_equal(state.status, [solved, unbounded, unbounded, solved])


def test_before_there_are_rates_the_edge_rule_steps_in():
    """Without third order and with H = [[1, 2], [2, 1]] only the edge rule has an answer; later it is not asked."""
    quadratic = lambda a, b: a + b + a**2 / 2 + b**2 / 2 + 2 * a * b
    loss = lambda p, scale: scale * quadratic(**p)
    params, directions = ({"a": x, "b": x} for x in (jnp.zeros(()), jnp.ones(3)))
    run = functools.partial(follow, gn.scale_by_grouped_newton(refresh_every=2), loss, params)
    updates, state = uncompiled(run)(directions, jnp.array([1.0, 1.0, 3.0]))
    # e = (1, 1), and alpha e with alpha = 1.8 (g e) / (e H e) is 6/10 for both.
    np.testing.assert_allclose(state.eta, np.full((3, 2), 0.6), rtol=8 * EPS)
    assert_close(updates, {"a": state.eta[:, 0], "b": state.eta[:, 1]}, rtol=8 * EPS)
    np.testing.assert_array_equal(state.rejected, [0, 0, 1])
    np.testing.assert_array_equal(state.status, gn.CubicStatus.UNBOUNDED)


def test_without_any_rates_the_step_is_short_and_the_next_one_refreshes():
    updates, state = run_polynomial(5, refresh_every=4, h=[-1.0, -1.0, 2.0, 4.0, 4.0])
    np.testing.assert_allclose(updates, [fallbacks.FIRST, fallbacks.FIRST, 0.5, 0.5, 0.25], rtol=8 * EPS)
    np.testing.assert_array_equal(state.replaced[:, 0], [True, True, False, False, False])
    np.testing.assert_array_equal(state.rejected, [1, 2, 2, 2, 2])
    np.testing.assert_array_equal(state.refreshes, [1, 2, 3, 3, 4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", ["c", "g", "h", "t"])
def test_numbers_that_are_not_finite_are_kept_out_of_rates_and_average(column, bad):
    fine = {"c": 3.0, "g": 1.0, "h": 2.0, "t": -0.5}
    columns = {k: [v] * 5 for k, v in fine.items()}
    columns[column][0] = columns[column][2] = bad
    updates, state = run_polynomial(5, refresh_every=1, share=0.5, **columns)
    eta = 2 * (math.sqrt(5) - 2)  # of h eta + |t| eta^2 / 2 = g
    np.testing.assert_allclose(updates, [fallbacks.FIRST, eta, eta, eta, eta], rtol=32 * EPS)
    np.testing.assert_array_equal(state.rejected, [1, 1, 2, 2, 2])
    np.testing.assert_array_equal(state.refreshes, [0, 1, 1, 2, 3])
    not_finite, solved = gn.CubicStatus.NOT_FINITE, gn.CubicStatus.SOLVED
    np.testing.assert_array_equal(state.status, [not_finite, solved, not_finite, solved, solved])
    average = np.stack(
        [state.summary.loss, state.summary.gbar[:, 0], state.summary.hbar[:, 0, 0], state.summary.third[:, 0]], axis=-1
    )
    np.testing.assert_allclose(average[1:], [[3.0, 1.0, 2.0, 0.5]] * 4, rtol=8 * EPS)


def test_a_damping_that_is_not_finite_is_kept_out():
    schedule = lambda step: jnp.where(step == 1, jnp.nan, 1.0 + step)
    tx = gn.scale_by_grouped_newton(internal_damping=schedule, refresh_every=1)
    updates, state = uncompiled(functools.partial(follow_polynomial, tx))(polynomial_batches(t=[1.0]), jnp.ones(6))
    np.testing.assert_array_equal(state.damping, [1, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(state.rejected, [0, 1, 1, 1, 1, 1])
    assert updates[0] == updates[1] > updates[2] > updates[3] > 0


def test_numbers_of_a_direction_that_are_not_finite_make_no_step():
    """At a refresh (0, 4) and between (2); numbers beside it make their step between refreshes."""

    @jax.jit
    def beside_a_number(bad):
        loss, tx, params = lambda p: jnp.sum(p**2), gn.scale_by_grouped_newton(gn.groups.single), jnp.ones(2)
        _, state = tx.update(params, tx.init(params), params, value_fn=loss)
        return tx.update(jnp.stack([bad, 1.0]), state, params, value_fn=loss)[0]

    for bad in (math.nan, math.inf, -math.inf):
        updates, state = run_polynomial(6, refresh_every=4, u=[bad, 1.0, bad, 1.0, bad, 1.0])
        np.testing.assert_allclose(updates, [0, 0.5, 0, 0.5, 0, 0.5], rtol=8 * EPS)
        np.testing.assert_array_equal(state.rejected, [1, 1, 1, 1, 2, 2])
        np.testing.assert_allclose(beside_a_number(bad), [0, 1], rtol=8 * EPS)


def test_a_zero_direction_gives_a_zero_step_and_a_refresh_at_the_next():
    updates, state = run_polynomial(4, u=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(updates, [0, 0, 0.5, 0], rtol=8 * EPS)
    # A zero direction tells nothing, so the first summary is that of the third step.
    np.testing.assert_array_equal(state.refreshes, [0, 0, 1, 1])
    np.testing.assert_array_equal(state.rejected, 0)


def test_an_uphill_direction_is_counted_at_each_refresh():
    """By its own slope, whatever the average says."""
    updates, state = run_polynomial(5, refresh_every=2, share=0.5, g=[-1.0, 9.0, -1.0, 9.0, 0.5])
    np.testing.assert_array_equal(state.uphill, [1, 1, 2, 2, 2])
    assert np.all(state.eta < 0)
    np.testing.assert_array_equal(updates, 0)


def test_a_loss_beyond_the_range_of_the_state_is_kept_out(x64):
    params = jnp.ones(2, jnp.float32)
    loss = lambda p: 1e300 + jnp.sum(p.astype(jnp.float64))
    tx = gn.scale_by_grouped_newton()
    updates, state = uncompiled(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(params)
    assert_finite((updates, state))
    assert (state.rejected, state.refreshes) == (1, 0)


def test_the_status_and_rates_of_a_custom_rule_are_judged():
    """A rule that answers gbar; where the loss is negative it says that it failed, or answers NaN."""

    def rule(status, eta):
        def rates(summary, damping):
            fails = summary.loss < 0
            chosen = jnp.where(fails, status, gn.CubicStatus.HARD_CASE)
            return gn.CubicSolution(jnp.where(fails, eta, summary.gbar), damping, chosen.astype(jnp.int32))

        return rates

    @jax.jit
    def run(*answer):
        tx = gn.scale_by_grouped_newton(rates=rule(*answer), refresh_every=1)
        return follow_polynomial(tx, polynomial_batches(c=[1.0, -1.0, 1.0], g=[0.25, 1.0, 0.75]), jnp.ones(6))

    answers = [(gn.CubicStatus.UNBOUNDED, 7.0), (gn.CubicStatus.NOT_FINITE, 7.0), (gn.CubicStatus.SOLVED, math.nan)]
    updates, state = each(run, *map(jnp.array, zip(*answers, strict=True)))
    np.testing.assert_array_equal(updates[:, :3], [[0.25, 0.25, 0.75]] * 3)
    np.testing.assert_array_equal(state.rejected[:, :3], [[0, 1, 1]] * 3)
    np.testing.assert_array_equal(state.status[:, 0], gn.CubicStatus.HARD_CASE)


# --- gross steps and spikes ---------------------------------------------------------------------


def test_a_refresh_whose_step_would_be_gross_halves_its_rates_and_the_next_step_refreshes():
    """The loss has no value beyond -0.8, and the rate is 1."""
    loss = lambda p: jnp.where(p < -0.8, jnp.nan, p + p**2 / 2)
    tx = gn.scale_by_grouped_newton(internal_damping=gn.adaptive_damping(), refresh_every=4)
    update = jax.jit(lambda u: tx.update(u, tx.init(jnp.zeros(())), jnp.zeros(()), value_fn=loss))
    step, state = update(jnp.ones(()))
    assert (state.damping, state.next_refresh, state.model_error, state.rejected) == (4, 1, 0, 0)
    np.testing.assert_allclose([step, state.eta[0]], 0.5, rtol=8 * EPS)
    # Of a direction that isn't finite there is no summary, and so nothing to judge.
    nothing = update(jnp.full((), jnp.nan))[1]
    assert (nothing.damping, nothing.next_refresh, nothing.eta[0], nothing.rejected) == (1, 1, 0, 1)


def test_gross_rates_are_refreshed_until_the_damping_keeps_them_from_it():
    """Rates by h eta + lambda |t| eta^2 / 2 = g with lambda = 1, 4, 10; the loss has no value beyond -0.6."""
    loss = lambda p: jnp.where(p < -0.6, jnp.nan, p + p**2 / 2 + p**3 / 12)
    tx = gn.scale_by_grouped_newton(internal_damping=gn.adaptive_damping(), refresh_every=4)
    step = lambda state, _: tx.update(jnp.ones(()), state, jnp.zeros(()), value_fn=loss)[::-1]
    keep = lambda state, _: (lambda state, u: (state, (u, state)))(*step(state, None))
    _, (updates, states) = uncompiled(lambda: lax.scan(keep, tx.init(jnp.zeros(())), length=5))()
    eta = [(math.sqrt(1 + lam) - 1) / (lam / 2) for lam in (1, 4, 10, 5)]
    np.testing.assert_allclose(updates, [eta[0] / 2, eta[1] / 2, eta[2], eta[2], eta[3]], rtol=16 * EPS)
    np.testing.assert_array_equal(states.damping, [4, 10, 5, 5, 2.5])
    np.testing.assert_array_equal(states.next_refresh, [1, 2, 4, 4, 8])


def test_a_summary_that_is_not_finite_leaves_rates_and_damping_as_they_were():
    tx = gn.scale_by_grouped_newton(internal_damping=gn.adaptive_damping(), refresh_every=4)
    loss = lambda p, factor: factor * (p + p**2 / 2)

    def step(state, factor):
        state = tx.update(jnp.ones(()), state, jnp.zeros(()), value_fn=lambda p: loss(p, factor), value=0.0)[1]
        return state, state

    factors = jnp.array([1.0, 1.0, 1.0, 1.0, jnp.nan, jnp.inf, jnp.nan, 1.0])
    states = uncompiled(lambda: lax.scan(step, tx.init(jnp.zeros(())), factors)[1])()
    np.testing.assert_array_equal(states.rejected, [0, 0, 0, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(states.next_refresh, [4, 4, 4, 4, 5, 6, 7, 8])  # until there is one
    for field in (states.eta[:, 0], states.damping):
        np.testing.assert_array_equal(field, 1.0)


def test_a_spike_of_the_given_losses_halves_the_steps_and_the_next_step_refreshes():
    """Whether or not its own step is a refresh; without an adaptive damping nobody looks."""
    loss = lambda p: p + p**2 / 2
    values = jnp.ones(16).at[jnp.array([12, 15])].set(jnp.array([50.0, jnp.nan])) + 0.01 * jnp.cos(jnp.arange(16.0))

    def run(damping, refresh_every):
        tx = gn.scale_by_grouped_newton(internal_damping=damping, refresh_every=refresh_every)

        def step(state, value):
            update, state = tx.update(jnp.ones(()), state, jnp.zeros(()), value_fn=loss, value=value)
            return state, (update, state)

        return lax.scan(step, tx.init(jnp.zeros(())), values)[1]

    adapted = jax.jit(functools.partial(run, gn.adaptive_damping()))
    for refresh_every, due in ((8, [8] * 8 + [16] * 4 + [13, 16, 16, 16]), (3, [3] * 3 + [6] * 3 + [9] * 3 + [12] * 3)):
        updates, states = adapted(refresh_every)
        np.testing.assert_allclose(updates, [1.0] * 12 + [0.5, 1.0, 1.0, 0.5], rtol=8 * EPS)
        np.testing.assert_allclose(states.eta, 1.0, rtol=8 * EPS)
        np.testing.assert_array_equal(states.next_refresh[: len(due)], due)
        assert_finite(states)
    updates, states = jax.jit(functools.partial(run, 1.0))(8)
    np.testing.assert_allclose(updates, 1.0, rtol=8 * EPS)
    np.testing.assert_array_equal(states.losses, 0)
