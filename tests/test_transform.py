"""The transform and the optimizer: one step, the schedule of refreshes, fallbacks, state and composition."""

import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import assert_close, assert_equal, assert_finite, at, only_grouped_newton, shifted
from flax import nnx
from jax import lax
from models import regression_batches, tanh_loss, tanh_params

import grouped_newton as gn
from grouped_newton import annealing, fallbacks, memory, spikes
from grouped_newton.damping import model_error
from grouped_newton.groups import FROZEN

EPS = 2.0**-23


# --- problems -----------------------------------------------------------------------------------


def sum_of_squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def train(tx, loss, params, batches, given=False, averaged=False):
    """Trains by one scan, the curvature on the same batch; the params, state and updates after every step.

    Whether the loss of every step, and the average of the params, are given to the optimizer is for the caller to say.
    """

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        extra = {"value": value} if given else {}
        extra |= {"averaged_params": gn.eval_params(state, params)} if averaged else {}
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, batch), **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, updates)

    return lax.scan(step, (params, tx.init(params)), batches)[1]


def follow(tx, loss, params, directions, batches):
    """Updates and states of a run along given directions in which the params stay where they are."""

    def step(state, direction_and_batch):
        direction, batch = direction_and_batch
        updates, state = tx.update(direction, state, params, value_fn=lambda p: loss(p, batch))
        return state, (updates, state)

    return lax.scan(step, tx.init(params), (directions, batches))[1]


def polynomial(params, batch):
    """c + g p + h p^2 / 2 + t p^3 / 6 of one number: at 0 its summary along u = 1 is the batch."""
    p = params["p"]
    return batch["c"] + batch["g"] * p + batch["h"] / 2 * p**2 + batch["t"] / 6 * p**3


def follow_polynomial(tx, batches, directions):
    updates, state = follow(tx, polynomial, {"p": jnp.zeros(())}, {"p": directions}, batches)
    return updates["p"], state


@jax.jit
def paper_on_polynomial(batches, directions, refresh_every, share):
    # Traced options, so that all tests share one compilation.
    tx = gn.scale_by_grouped_newton(refresh_every=refresh_every, summary_memory=share)
    return follow_polynomial(tx, batches, directions)


def polynomial_batches(**columns):
    """Columns of up to six steps, the last value repeated."""
    columns = {"c": [0.0], "g": [1.0], "h": [2.0], "t": [0.0], **columns}
    return {k: jnp.array(v + v[-1:] * (6 - len(v)), jnp.float32) for k, v in columns.items()}


def run_polynomial(steps, *, refresh_every=10, share=0.0, u=(1.0,) * 6, **columns):
    """Updates and states of the paper's transform; c, g, h, t are the summaries, and the rate is g / h if t = 0."""
    batches, u = polynomial_batches(**columns), jnp.array(u)
    updates, state = paper_on_polynomial(batches, u, refresh_every, share)
    assert_finite((updates, state))
    return updates[:steps], at(state, slice(steps))


# --- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["canonical", "trivial"])
@pytest.mark.parametrize("network", ["mlp", "lenet"])
def test_one_step_agrees_with_the_reference(x64, network, grouping):
    (loss, params, direction), reference = models.reference(network, grouping)
    groups = gn.groups.per_tensor if grouping == "canonical" else gn.groups.single

    # Params are arguments: jaxlib 0.8.1 folds a convolution of constants in float64 to wrong numbers.
    def step(damping, params, direction):
        tx = gn.scale_by_grouped_newton(groups, internal_damping=damping)
        return tx.update(direction, tx.init(params), params, value_fn=loss)

    dampings = ("0.1", "1.0", "10.0")
    steps = jax.jit(jax.vmap(step, in_axes=(0, None, None)))
    updates, state = steps(jnp.array([float(d) for d in dampings]), params, direction)
    np.testing.assert_array_equal(state.refreshes, 1)
    for k, damping in enumerate(dampings):
        eta = reference[f"eta_{damping}"].reshape(-1)
        tolerance = 1e-9 * np.max(np.abs(eta))
        np.testing.assert_allclose(state.eta[k], eta, rtol=0, atol=tolerance)
        rates = np.maximum(np.broadcast_to(eta, len(params)), 0)
        for rate, u, scaled in zip(rates, direction, updates, strict=True):
            np.testing.assert_allclose(scaled[k], rate * u, rtol=0, atol=tolerance * np.max(np.abs(u)))


@pytest.mark.parametrize(
    "options",
    [
        {"nonnegative": False, "internal_damping": 10.0},
        {"rates": gn.edge_rates(), "summary_memory": 0.5},
        {"rates": gn.edge_rates(), "summary_memory": 0.5, "delayed": True},
    ],
    ids=["paper", "edge", "edge, delayed"],
)
def test_training_is_invariant_under_the_scale_of_each_group(options):
    """theta_s = a_s theta~_s with u = gradient, in float32 with a_s up to 2^10: eta_s = a_s^2 eta~_s."""
    params, batches = tanh_params(), regression_batches(9)
    tx = optax.chain(gn.scale_by_grouped_newton(refresh_every=4, **options), optax.scale(-0.1))

    def run(scale):
        loss = lambda p, batch: tanh_loss(jax.tree.map(jnp.multiply, scale, p), batch)
        start = jax.tree.map(jnp.divide, params, scale)
        trained, state, _ = train(tx, loss, start, batches)
        return jax.vmap(lambda p: jax.tree.map(jnp.multiply, scale, p))(trained), state[0].eta

    exponents = {"hidden": {"w": [0, 10, -3], "b": [0, -9, 10]}, "out": {"w": [0, -10, 1], "b": [0, 3, 5]}}
    scales = jax.tree.map(lambda e: 2.0 ** jnp.array(e), exponents, is_leaf=lambda x: isinstance(x, list))
    trained, eta = jax.jit(jax.vmap(run))(scales)
    a = jnp.stack(jax.tree.leaves(scales), axis=-1)
    eta = eta * a[:, None] ** 2
    # Powers of two commute with rounding, so only the order of sums may differ; nine steps amplify that.
    tolerance = 1e3 * EPS
    for k in (1, 2):
        assert_close(at(trained, k), at(trained, 0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(eta[k], eta[0], rtol=tolerance, atol=tolerance * np.max(np.abs(eta[0])))
    first, last = trained["out"]["w"][0, 0], trained["out"]["w"][0, -1]
    assert not np.allclose(first, last, rtol=1e-2)


def test_updates_keep_sign_dtype_and_structure():
    """Also where dtypes differ within the tree, and between direction and params."""
    params = {
        "a": (jnp.array([1.0, -2.0], jnp.bfloat16), [jnp.array(3.0, jnp.float16)]),
        "b": None,
        "c": jnp.array([[-1.0, 2.0]], jnp.float32),
        "d": jnp.array([0.5], jnp.bfloat16),
    }
    direction = jax.tree.map(lambda p: (2 * p.astype(jnp.float32)).astype(p.dtype), params)
    direction["d"] = direction["d"].astype(jnp.float32)
    loss = lambda p: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p))
    tx = gn.scale_by_grouped_newton()
    updates, state = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    assert jax.tree.structure(updates) == jax.tree.structure(direction)
    jax.tree.map(lambda u, d: np.testing.assert_equal((u.dtype, u.shape), (d.dtype, d.shape)), updates, direction)
    np.testing.assert_allclose(state.eta, 0.5, rtol=8 * EPS)
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        eps = float(max(jnp.finfo(p.dtype).eps, jnp.finfo(u.dtype).eps))
        np.testing.assert_allclose(np.asarray(u, np.float64), np.asarray(p, np.float64), rtol=2 * eps)


def test_float64_params_have_float64_rates_and_updates(x64):
    tx, params = gn.scale_by_grouped_newton(), {"w": jnp.array([1.0, 2.0])}
    loss = lambda p: jnp.sum(p["w"] ** 2)
    updates, state = jax.jit(lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss))(params)
    assert {updates["w"].dtype, state.eta.dtype, state.summary.hbar.dtype} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(updates["w"], params["w"], rtol=8 * 2.0**-52)


def test_a_group_without_numbers_has_rate_zero():
    params = {"empty": jnp.zeros((0, 3)), "w": jnp.array([1.0, -2.0])}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["empty"])
    for tx in (gn.scale_by_grouped_newton(), gn.grouped_newton(groups=gn.groups.per_tensor)):
        update = lambda p, tx=tx: tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss)
        updates, state = jax.jit(update)(params)
        assert_finite((tx.init(params), updates, state))
        assert only_grouped_newton((state,)).eta[0] == 0
        assert np.all(updates["w"] != 0)


def constant_rule(*eta):
    return lambda summary, damping: gn.CubicSolution(jnp.array(eta), jnp.zeros(()), jnp.int32(gn.CubicStatus.SOLVED))


@pytest.mark.parametrize(("nonnegative", "used"), [(True, 0.0), (False, -1.0)])
def test_negative_rates_are_clipped_at_use_only(nonnegative, used):
    tx = gn.scale_by_grouped_newton(rates=constant_rule(-1.0, 2.0), nonnegative=nonnegative)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    direction = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.array([-3.0, 4.0])}
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"])
    updates, state = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    np.testing.assert_array_equal(state.eta, [-1.0, 2.0])
    assert_equal(updates, {"a": used * direction["a"], "b": 2 * direction["b"]})


def test_frozen_leaves_get_a_zero_update_whatever_their_dtype_and_direction():
    params = {"count": jnp.arange(3), "stuck": jnp.ones(2), "w": jnp.array([1.0, -2.0])}
    direction = {"count": jnp.arange(3), "stuck": jnp.array([jnp.nan, jnp.inf]), "w": 2 * params["w"]}
    groups = {"count": FROZEN, "stuck": FROZEN, "w": 0}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["stuck"]) * jnp.sum(p["count"])
    tx = gn.scale_by_grouped_newton(groups)
    updates, state = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    assert_equal(updates["count"], np.zeros(3, np.int32))
    assert_equal(updates["stuck"], np.zeros(2, np.float32))
    assert updates["count"].dtype == params["count"].dtype
    np.testing.assert_allclose(updates["w"], params["w"], rtol=8 * EPS)
    assert state.eta.shape == (1,)


# --- refreshes -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("refresh_every", "share", "damping"),
    [(1, 0.0, 10.0), (3, 0.5, lambda step: 1.0 + step)],
    ids=["every step", "every third, averaged, scheduled damping"],
)
def test_rates_equal_those_of_a_hand_written_loop(refresh_every, share, damping):
    steps, params, batches = 8, tanh_params(), regression_batches(8)
    tx = gn.scale_by_grouped_newton(
        gn.groups.per_module,
        internal_damping=damping,
        refresh_every=refresh_every,
        rates=gn.edge_rates(1.2),
        summary_memory=share,
    )
    descent = optax.chain(tx, optax.scale(-1.0))
    trained, (state, _), updates = jax.jit(functools.partial(train, descent, tanh_loss))(params, batches)
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
            lam = damping(k) if callable(damping) else damping
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


@pytest.mark.parametrize(
    ("loss", "groups", "rates", "delayed", "learning_rate", "noise"),
    [
        (tanh_loss, gn.groups.per_module, gn.edge_rates(1.8), True, 0.5, True),
        (walled_loss, gn.groups.per_tensor, gn.cubic_rates(), False, 0.05, True),
        (tanh_loss, gn.groups.per_module, gn.edge_rates(1.8), False, 1.0, False),
    ],
    ids=["edge, delayed", "cubic", "full batch"],
)
def test_the_order_of_things_at_a_refresh_is_that_of_a_hand_written_loop(
    loss, groups, rates, delayed, learning_rate, noise
):
    """The losses given and an average kept; the targets jump and losses spike, and steps into the wall are gross."""
    steps, share, damping = 26, 0.3, gn.adaptive_damping(1.0, 0.2)
    params, (x, y) = tanh_params(), regression_batches(steps)
    jumps = jnp.where(jnp.arange(steps) < 8, 1.0, 2.0) * jnp.where(jnp.arange(steps) == 21, 20.0, 1.0)
    batches = (x, y * jumps[:, None, None])
    if not noise:
        batches = jax.tree.map(lambda b: jnp.broadcast_to(b[:1], b.shape), (x, y))
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
    assert (seen["spikes"] > 0) == noise
    assert (seen["gross"] > 0) == (loss is walled_loss)
    assert len(np.unique(state.damping)) > 2
    assert groups is gn.groups.per_module or np.any(state.eta < 0)


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
    @jax.vmap
    def run(table):
        tx = gn.scale_by_grouped_newton(refresh_every=lambda count: table[count])
        return follow_polynomial(tx, batches, jnp.ones(20))[1].refreshes

    tables = jnp.stack([x.astype(float) for x in schedules.values()])
    for steps, refreshes in zip(schedules, run(tables), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(np.diff(refreshes, prepend=0)), steps)


def test_without_any_rate_of_the_rule_the_next_step_refreshes_and_the_schedule_counts_from_there():
    tx = gn.scale_by_grouped_newton(refresh_every=lambda count: 3)
    batches = polynomial_batches(h=[-1.0, 2.0, 4.0])
    updates, state = jax.jit(functools.partial(follow_polynomial, tx))(batches, jnp.ones(6))
    np.testing.assert_allclose(updates, [2.0**-10, 0.5, 0.5, 0.5, 0.25, 0.25], rtol=8 * EPS)
    np.testing.assert_array_equal(state.next_refresh, [1, 4, 4, 4, 7, 7])
    np.testing.assert_array_equal(state.refreshes, [1, 2, 2, 2, 3, 3])


def test_without_an_adaptive_damping_the_losses_are_not_looked_at():
    trace_update(sum_of_squares, value=math.nan)


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


# --- fallbacks -----------------------------------------------------------------------------------


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
    updates, state = jax.jit(run)(directions, jnp.array([1.0, 1.0, 3.0]))
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
    updates, state = jax.jit(functools.partial(follow_polynomial, tx))(polynomial_batches(t=[1.0]), jnp.ones(6))
    np.testing.assert_array_equal(state.damping, [1, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(state.rejected, [0, 1, 1, 1, 1, 1])
    assert updates[0] == updates[1] > updates[2] > updates[3] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_of_a_direction_that_are_not_finite_make_no_step(bad):
    """At a refresh (0, 4) and between (2); numbers beside it make their step between refreshes."""
    updates, state = run_polynomial(6, refresh_every=4, u=[bad, 1.0, bad, 1.0, bad, 1.0])
    np.testing.assert_allclose(updates, [0, 0.5, 0, 0.5, 0, 0.5], rtol=8 * EPS)
    np.testing.assert_array_equal(state.rejected, [1, 1, 1, 1, 2, 2])
    loss, tx = lambda p: jnp.sum(p**2), gn.scale_by_grouped_newton(gn.groups.single)
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, value_fn=loss)
    updates, _ = tx.update(jnp.array([bad, 1.0]), state, params, value_fn=loss)
    np.testing.assert_allclose(updates, [0, 1], rtol=8 * EPS)


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


def test_numbers_whose_product_overflows_stay_and_others_move():
    tx = gn.scale_by_grouped_newton(rates=constant_rule(1e3))
    params = jnp.zeros(2, jnp.float16)
    loss = lambda p: jnp.sum(p.astype(jnp.float32))
    step = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss)[0])
    np.testing.assert_array_equal(step(jnp.array([1.0, 100.0], jnp.float16)), [1e3, 0])
    np.testing.assert_array_equal(step(jnp.array([1.0, 10.0], jnp.float16)), [1e3, 1e4])


def test_a_loss_beyond_the_range_of_the_state_is_kept_out(x64):
    params = jnp.ones(2, jnp.float32)
    loss = lambda p: 1e300 + jnp.sum(p.astype(jnp.float64))
    tx = gn.scale_by_grouped_newton()
    updates, state = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(params)
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
    @jax.vmap
    def run(*answer):
        tx = gn.scale_by_grouped_newton(rates=rule(*answer), refresh_every=1)
        return follow_polynomial(tx, polynomial_batches(c=[1.0, -1.0, 1.0], g=[0.25, 1.0, 0.75]), jnp.ones(6))

    answers = [(gn.CubicStatus.UNBOUNDED, 7.0), (gn.CubicStatus.NOT_FINITE, 7.0), (gn.CubicStatus.SOLVED, math.nan)]
    updates, state = run(*map(jnp.array, zip(*answers, strict=True)))
    np.testing.assert_array_equal(updates[:, :3], [[0.25, 0.25, 0.75]] * 3)
    np.testing.assert_array_equal(state.rejected[:, :3], [[0, 1, 1]] * 3)
    np.testing.assert_array_equal(state.status[:, 0], gn.CubicStatus.HARD_CASE)


# --- training ------------------------------------------------------------------------------------


OPTIMIZERS = {
    "paper": lambda: optax.chain(
        optax.trace(0.9), gn.scale_by_grouped_newton(internal_damping=10.0), optax.scale_by_learning_rate(0.03)
    ),
    "recipe": gn.grouped_newton,
}


def zero_last_layer():
    params = tanh_params()
    return {**params, "out": jax.tree.map(jnp.zeros_like, params["out"])}, tanh_loss


def unused_parameter():
    return {**tanh_params(), "idle": {"w": jnp.ones((2, 2))}}, tanh_loss


def relu_with_squared_loss():
    def loss(params, batch):
        x, y = batch
        hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
        return jnp.mean((hidden @ params["out"]["w"] + params["out"]["b"][None] - y) ** 2)

    return tanh_params(), loss


@pytest.mark.parametrize("problem", [zero_last_layer, unused_parameter, relu_with_squared_loss])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_starts_and_goes_on(problem, make):
    tx, (params, loss) = make(), problem()
    batches = regression_batches(60)
    everything = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batches)

    @jax.jit
    def run(params):
        trained, states, _ = train(tx, loss, params, batches)
        evaluated = jax.vmap(gn.eval_params)(states, trained) if make is gn.grouped_newton else trained
        return states, jax.vmap(lambda p: loss(p, everything))(evaluated), loss(params, everything), trained

    states, losses, start, trained = run(params)
    assert_finite((states, losses, trained))
    # Means of ten steps: at the edge of stability single ones are noisy.
    assert np.mean(losses[20:30]) < 0.9 * start
    assert np.mean(losses[50:]) < np.mean(losses[20:30])
    if "idle" in params:
        np.testing.assert_array_equal(trained["idle"]["w"], 1)


# --- safety --------------------------------------------------------------------------------------


@jax.jit
def run_with_one_number_of_the_gradient(params, batches, at_step, number):
    """The recipe from start to end; the number is 0 or another one."""
    tx = gn.grouped_newton()

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(tanh_loss)(params, batch)
        own = grads["out"]["w"][1, 0]
        there = state[1].count == at_step
        grads["out"]["w"] = grads["out"]["w"].at[1, 0].set(jnp.where(there, number, own))
        updates, state = tx.update(grads, state, params, value_fn=lambda p: tanh_loss(p, batch), value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return lax.scan(step, (params, tx.init(params)), batches)[1]


@pytest.mark.parametrize("k", [0, 5, 21], ids=["first step", "at a refresh", "between"])
def test_a_number_of_the_gradient_that_is_not_finite_or_has_no_square_counts_as_zero(k):
    batches = regression_batches(40)
    run = lambda number: run_with_one_number_of_the_gradient(tanh_params(), batches, k, number)
    expected = run(0.0)
    for bad in (math.nan, math.inf, -math.inf, 2e19):
        assert_equal(run(bad), expected)
    assert_finite(expected)
    assert k == 0 or (expected[1][1].next_refresh[k - 1] > k) == (k == 21)
    assert not np.array_equal(run(1e19)[0]["out"]["w"][k], expected[0]["out"]["w"][k])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squares_that_the_direction_keeps_are_finite_in_the_gradients_own_dtype(dtype):
    tx, params = gn.grouped_newton(), jnp.ones(2, dtype)
    grads = jnp.array([jnp.finfo(dtype).max, 1], dtype)
    _, state = jax.jit(lambda g: tx.update(g, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2)))(grads)
    assert_finite(state)
    assert state[0].nu[0] == 0 < state[0].nu[1]


def test_a_frozen_leaf_whose_gradient_is_not_finite_changes_nothing():
    params = {"stuck": jnp.ones(2), "w": jnp.array([1.0, -2.0])}
    tx = gn.grouped_newton(groups={"stuck": FROZEN, "w": 0})
    loss = lambda p, target: jnp.sum((p["w"] - target) ** 4)

    def run(stuck):
        def step(carry, target):
            params, state = carry
            grads = {**jax.grad(loss)(params, target), "stuck": jnp.full(2, stuck)}
            updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, target))
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state[1], state[0].mu["w"])

        return lax.scan(step, (params, tx.init(params)), jnp.arange(4.0))[1]

    both = jax.jit(jax.vmap(run))(jnp.array([0.0, jnp.nan]))
    assert_equal(at(both, 0), at(both, 1))
    assert np.any(both[2][1, -1] != 0)


def test_frozen_leaves_of_kinds_without_arithmetic_are_left_alone():
    """Where the damping evaluates the loss at moved params."""
    params = {"mask": jnp.array([True, False]), "key": jax.random.key(0), "w": jnp.array([1.0, -2.0])}
    groups = {"mask": FROZEN, "key": FROZEN, "w": 0}
    loss = lambda p: jnp.sum(jnp.where(p["mask"], p["w"], 2 * p["w"]) ** 2) + 0 * jax.random.uniform(p["key"])
    tx = gn.scale_by_grouped_newton(groups, internal_damping=gn.adaptive_damping(floor=0.1), refresh_every=1)
    direction = {"mask": jnp.zeros(2, bool), "key": np.zeros((), jax.dtypes.float0), "w": params["w"]}
    damping = jax.jit(lambda w: tx.update({**direction, "w": w}, tx.init(params), params, value_fn=loss)[1].damping)
    assert damping(params["w"]) == 0.5


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
    _, (updates, states) = jax.jit(lambda: lax.scan(keep, tx.init(jnp.zeros(())), length=5))()
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
    states = jax.jit(lambda: lax.scan(step, tx.init(jnp.zeros(())), factors)[1])()
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

        return jax.jit(lambda: lax.scan(step, tx.init(jnp.zeros(())), values)[1])()

    for refresh_every, due in ((8, [8] * 8 + [16] * 4 + [13, 16, 16, 16]), (3, [3] * 3 + [6] * 3 + [9] * 3 + [12] * 3)):
        updates, states = run(gn.adaptive_damping(), refresh_every)
        np.testing.assert_allclose(updates, [1.0] * 12 + [0.5, 1.0, 1.0, 0.5], rtol=8 * EPS)
        np.testing.assert_allclose(states.eta, 1.0, rtol=8 * EPS)
        np.testing.assert_array_equal(states.next_refresh[: len(due)], due)
        assert_finite(states)
    updates, states = run(1.0, 8)
    np.testing.assert_allclose(updates, 1.0, rtol=8 * EPS)
    np.testing.assert_array_equal(states.losses, 0)


def log_cosh(params):
    """Flat far out, where the cubic model knows of no end: Newton's steps grow exponentially there."""
    z = jnp.array([1.0, 2.0, 4.0, 8.0]) * params["x"]
    return jnp.mean(jnp.logaddexp(z, -z)) - jnp.log(2.0)


def test_the_recipe_trains_on_the_whole_data_from_far_out():
    starts = {"x": 2 * jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)}

    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(log_cosh)(params)
            updates, state = tx.update(grads, state, params, value_fn=log_cosh, value=value)
            return (optax.apply_updates(params, updates), state), value

        tx = gn.grouped_newton()
        return lax.scan(step, (params, tx.init(params)), length=200)[1]

    losses = jax.jit(jax.vmap(run))(starts)
    assert np.max(losses[:, -1] / losses[:, 0]) < 0.05


# Faults of one kind each, from step FAULT on; and noise for ever.

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
def faulty_runs(given):
    """By kind and seed."""
    kinds, seeds = jnp.arange(len(KINDS)), jnp.arange(3)
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tanh_params, range(3)))
    run = lambda params, seed, kind: run_on_fresh_batches(params, seed, kind, given, LAST)
    of_seeds = jax.vmap(run, in_axes=(0, 0, None))
    return jax.device_get(jax.jit(jax.vmap(of_seeds, in_axes=(None, None, 0)))(params, seeds, kinds))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("given", [True, False], ids=["losses given", "losses not given"])
def test_rates_answer_a_fault_and_training_recovers(kind, given):
    losses, eta, caution, damping, finite = (x[KINDS.index(kind)] for x in faulty_runs(given))
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
    undisturbed = faulty_runs(given)[0][0]
    assert np.all(losses[:, -1] < 3 * undisturbed[:, -1])


def test_on_endless_noise_rates_settle_and_the_validation_loss_keeps_falling():
    """Two seeds; fresh batches of 32 for 3,000 steps."""
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tanh_params, range(2)))
    run = functools.partial(run_on_fresh_batches, kind=0, given=True, steps=3000, rows=32)
    losses, eta, caution, damping, finite = jax.device_get(jax.jit(jax.vmap(run))(params, jnp.arange(2)))
    assert np.all(finite)
    assert np.all((damping >= 1) & (damping <= 10))
    assert np.all(caution >= 0.5)
    validation = losses[:, [100, 1000, 2999]]
    assert np.all(validation[:, 1:] < 0.95 * validation[:, :-1])
    later = eta[:, 500:] / eta[:, 500:501]
    assert np.min(later) > 0.02
    assert np.max(later) < 2


def test_a_negated_direction_is_counted_as_uphill_and_moves_nothing():
    """All rates would be negative and are clipped, so every step refreshes."""
    tx = gn.grouped_newton(direction=optax.adam(1e-3))
    run = jax.jit(functools.partial(train, tx, tanh_loss))
    trained, state, updates = run(tanh_params(), regression_batches(12))
    assert_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    assert_equal(at(trained, -1), tanh_params())
    ours = only_grouped_newton(state)
    np.testing.assert_array_equal(ours.uphill, np.arange(1, 13))
    np.testing.assert_array_equal(ours.refreshes, np.arange(12))  # the first is of its direction's own batch
    np.testing.assert_array_equal(ours.rejected, 0)
    assert_finite(state)


def test_a_negated_direction_trains_where_negative_rates_are_allowed():
    tx = gn.grouped_newton(
        groups=gn.groups.single, direction=optax.adam(1e-3), rates=gn.cubic_rates(), nonnegative=False
    )
    batches = regression_batches(40)
    trained, state, _ = jax.jit(functools.partial(train, tx, tanh_loss))(tanh_params(), batches)
    start, end = (tanh_loss(p, at(batches, -1)) for p in (tanh_params(), at(trained, -1)))
    assert end < 0.7 * start
    assert only_grouped_newton(state).uphill[-1] > 0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_training_step_compiles_once(make):
    tx, traces = make(), []

    @jax.jit
    def step(params, state, batch, curvature_batch):
        traces.append(1)
        value, grads = jax.value_and_grad(tanh_loss)(params, batch)
        value_fn = lambda p: tanh_loss(p, curvature_batch)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, value=value)
        return optax.apply_updates(params, updates), state

    params, batches, others = tanh_params(), regression_batches(4), regression_batches(4, seed=1)
    state = tx.init(params)
    for k in range(4):
        params, state = step(params, state, at(batches, k), at(others, k))
    assert len(traces) == 1
    assert only_grouped_newton(state).count == 4
    assert tanh_loss(params, at(batches, 0)) < tanh_loss(tanh_params(), at(batches, 0))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_training_step_of_an_nnx_optimizer_compiles_once(make):
    model, traces = Net(nnx.Rngs(0)), []
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    def loss(model, batch):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer, batch, curvature_batch):
        traces.append(1)
        value, grads = nnx.value_and_grad(loss)(model, batch)
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        value_fn = lambda params: loss(nnx.merge(graphdef, params, rest, copy=True), curvature_batch)
        optimizer.update(model, grads, value_fn=value_fn, value=value)
        return value

    batches, others = regression_batches(12), regression_batches(12, seed=1)
    start = loss(model, at(batches, 0))
    for k in range(12):
        step(model, optimizer, at(batches, k), at(others, k))
    assert len(traces) == 1
    assert loss(model, at(batches, 0)) < start


# --- state ---------------------------------------------------------------------------------------


CONFIGURATIONS = {
    "adapted damping, fixed period": {"internal_damping": gn.adaptive_damping(2, 1), "refresh_every": 3},
    "fixed damping, no delay, no average": {"internal_damping": 1, "delayed": False, "averaging": None},
    "weak rule and schedules": {
        "refresh_every": lambda count: 2.5,
        "internal_damping": gn.AdaptiveDamping(1, lambda damping, error: jnp.asarray(1.0)),
        "learning_rate": lambda count: 0.5,
    },
    "negative rates": {"rates": gn.cubic_rates(), "nonnegative": False, "summary_memory": 0},
    "another direction": {"direction": optax.scale_by_lion()},
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *CONFIGURATIONS])
def test_update_keeps_shapes_dtypes_and_weak_types_of_the_state(precision, name):
    tx = OPTIMIZERS[name]() if name in OPTIMIZERS else gn.grouped_newton(**CONFIGURATIONS[name])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64)[: 2 + (precision < EPS)]:
        for extra in ({}, {"value": 1.0}):
            assert_state_is_kept(tx, tanh_params(dtype=dtype), **extra)


def test_weak_types_from_a_rule_and_from_a_schedule_do_not_reach_the_state():
    rule = lambda summary, damping: gn.CubicSolution(jnp.broadcast_to(jnp.asarray(1.0), (4,)), 0, 0 * damping)
    assert rule(None, 1.0).eta.weak_type
    for schedule in (lambda step: step, lambda step: 1.0, lambda step: 2):
        assert_state_is_kept(gn.scale_by_grouped_newton(rates=rule, internal_damping=schedule), tanh_params())


def assert_state_is_kept(tx, params, **extra):
    batch = at(regression_batches(1), 0)
    loss = lambda p: tanh_loss(p, batch)
    step = lambda p, state: tx.update(jax.grad(loss)(p), state, p, value_fn=loss, **extra)[1]
    state = tx.init(params)
    after = jax.eval_shape(step, params, state)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    jax.eval_shape(lambda go, p, s: lax.cond(go, step, lambda _, s: s, p, s), True, params, state)


def test_state_fields_have_names_of_their_own():
    """Optax finds fields by name in the whole state, and its wrappers use some names themselves."""
    state = gn.grouped_newton().init(tanh_params())
    fields = set(gn.GroupedNewtonState._fields)
    assert fields.isdisjoint({"value", "grad", "learning_rate", "internal_damping"})
    for name in fields - {"count"}:  # Adam counts too
        assert optax.tree.get(state, name) is getattr(only_grouped_newton(state), name)
    assert optax.tree.get(gn.scale_by_grouped_newton().init(tanh_params()), "count") == 0


def test_the_state_can_be_donated():
    tx, params, batch = gn.grouped_newton(), tanh_params(), at(regression_batches(1), 0)
    loss = lambda p: tanh_loss(p, batch)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)
    for _ in range(3):
        carry = jax.jit(step, donate_argnums=(0, 1))(*carry)
    assert only_grouped_newton(carry[1]).count == 3


def test_optax_maps_over_the_parameters_in_the_state():
    tx = gn.grouped_newton(groups={"hidden": 0, "out": FROZEN})
    state = tx.init(tanh_params())
    mapped = optax.tree.map_params(tx, lambda _: "params", state)
    ours, before = only_grouped_newton(mapped), only_grouped_newton(state)
    copies = {"direction": None, "origin": None}
    assert_equal(ours._replace(**copies), before._replace(**copies))
    assert jax.tree.leaves((ours.direction, ours.origin)) == ["params"] * 4  # of what isn't frozen


recipe_run = jax.jit(lambda params, batches: train(gn.grouped_newton(), tanh_loss, params, batches))


def test_vmap_over_seeds_equals_a_loop():
    seeds = range(3)
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    params = [tanh_params(seed) for seed in seeds]
    batches = [regression_batches(12, seed) for seed in seeds]
    together = jax.jit(jax.vmap(functools.partial(train, gn.grouped_newton(), tanh_loss)))(
        *map(stack, (params, batches))
    )
    for seed in seeds:
        trained, state, _ = recipe_run(params[seed], batches[seed])
        assert_close(at(together[0], seed), trained, rtol=1e3 * EPS, atol=1e3 * EPS)
        ours, alone = only_grouped_newton(at(together[1], seed)), only_grouped_newton(state)
        np.testing.assert_array_equal(ours.refreshes, alone.refreshes)
        np.testing.assert_allclose(ours.eta, alone.eta, rtol=1e3 * EPS)


def test_float32_training_is_the_same_with_x64_on():
    params, batches = tanh_params(), regression_batches(12)
    trained, state, _ = recipe_run(params, batches)
    with jax.enable_x64(True):
        trained_x64, state_x64, _ = recipe_run(params, batches)
    kind = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, state_x64)
    assert_close(trained, trained_x64, rtol=1e3 * EPS, atol=1e3 * EPS)
    assert_close(only_grouped_newton(state).eta, only_grouped_newton(state_x64).eta, rtol=1e3 * EPS)


# --- arguments of update -------------------------------------------------------------------------


def trace_update(value_fn=None, *, tx=None, params="default", state=None, direction=None, **extra):
    """Traces one update without running it."""
    fine = {"p": jnp.ones(3)}
    params = fine if isinstance(params, str) else params
    tx = gn.scale_by_grouped_newton() if tx is None else tx
    state = tx.init(fine if params is None else params) if state is None else state
    direction = (fine if params is None else params) if direction is None else direction
    return jax.eval_shape(lambda u: tx.update(u, state, params, value_fn=value_fn, **extra), direction)


def test_extra_arguments_in_the_signature_of_value_fn_are_passed_on_and_others_ignored():
    seen = set()

    def value_fn(value, batch, *, scale=1.0, rest="default"):
        seen.add((batch, scale, rest))
        return sum_of_squares(value)

    # `value` is what value_fn calls its params, and no extra argument for it.
    trace_update(value_fn, batch="batch", scale=2.0, value=3.0, grad=4.0, other=5.0)
    assert seen == {("batch", 2.0, "default")}


def test_value_fn_may_be_a_partial_a_jitted_function_or_a_bound_method():
    def loss(offset, params, scale=1.0):
        return offset + scale * sum_of_squares(params)

    class Task:
        offset = 1.0

        def loss(self, params, *, scale=1.0):
            return loss(self.offset, params, scale)

        def __call__(self, params, scale):
            return loss(self.offset, params, scale)

    callables = [
        functools.partial(loss, 1.0),
        functools.partial(Task().loss, scale=7.0),
        jax.jit(lambda params, scale: loss(1.0, params, scale)),
        Task().loss,
        Task(),
    ]
    tx, params = gn.scale_by_grouped_newton(), {"p": jnp.ones(3)}
    losses = jax.jit(
        lambda scale: [
            tx.update(params, tx.init(params), params, value_fn=f, scale=scale, unknown=0)[1].summary.loss
            for f in callables
        ]
    )(2.0)
    assert losses == [7.0] * len(callables)


# --- the optimizer -------------------------------------------------------------------------------


def test_the_optimizer_equals_the_chain_made_by_hand():
    """Its defaults are the recipe; updates are equal to the bit."""
    transform = gn.scale_by_grouped_newton(
        gn.groups.single,
        internal_damping=gn.adaptive_damping(),
        refresh_every=gn.growing_period(10),
        rates=gn.edge_rates(1.8),
        summary_memory=0.3,
        delayed=True,
    )
    last = optax.scale_by_learning_rate(1.0), gn.average_params(0.1)
    by_hand = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), transform, *last)
    params, batches = tanh_params(), regression_batches(20)
    expected = jax.jit(functools.partial(train, by_hand, tanh_loss, averaged=True))(params, batches)
    trained, state, updates = recipe_run(params, batches)
    assert np.any(state[1].progress[-1] != 0)
    close = functools.partial(assert_close, rtol=1e3 * EPS, atol=1e3 * EPS)  # two differently fused programs
    close((trained, updates), (expected[0], expected[2]))
    ours, by_hand = state[1], expected[1][1]
    for name in ("model_error", "progress"):  # differences of losses
        assert_close(getattr(ours, name), getattr(by_hand, name), rtol=0.01, atol=1e3 * EPS)
    differences = {"model_error": None, "progress": None}
    close(ours._replace(**differences), by_hand._replace(**differences))
    close((state[0].mu, state[0].nu), (expected[1][0].mu, expected[1][0].nu))
    close(gn.eval_params(state, trained), gn.eval_params(expected[1], trained))


def test_the_optimizer_hands_every_argument_on():
    schedule = optax.linear_schedule(0.5, 0.1, 6)
    options = {
        "internal_damping": lambda step: 5.0 + step,
        "refresh_every": 2,
        "rates": gn.cubic_rates(),
        "summary_memory": 0.5,
        "delayed": True,
        "nonnegative": False,
        "method": "nested",
    }
    groups = gn.groups.by_path({"b$": "biases", "hidden": FROZEN})
    tx = gn.grouped_newton(schedule, groups, direction=optax.trace(0.5), averaging=None, **options)
    transform = gn.scale_by_grouped_newton(groups, **options)
    by_hand = optax.chain(optax.trace(0.5), transform, optax.scale_by_learning_rate(schedule))
    params, batches = tanh_params(), regression_batches(6)
    run = lambda tx: jax.jit(functools.partial(train, tx, tanh_loss))(params, batches)
    trained, state, updates = run(tx)
    expected = run(by_hand)  # but for the direction's state, which has nothing of frozen leaves
    # Two programs, whose kernels XLA may fuse in two ways.
    found, expected = (trained, state[1:], updates), (expected[0], expected[1][1:], expected[2])
    assert_close(found, expected, rtol=32 * EPS, atol=32 * EPS)
    # And the schedule is one of the step, a factor on all rates.
    velocity, rate = state[0].trace["out"]["b"], state[1].eta[:, 0]
    factor = jnp.array([schedule(k) for k in range(6)])
    np.testing.assert_allclose(updates["out"]["b"], -(factor * rate)[:, None] * velocity, rtol=8 * EPS)


STATIC = ("groups", "direction", "refresh_every", "rates", "delayed", "nonnegative", "method")


def test_hyperparameters_can_be_injected():
    inject = optax.inject_hyperparams(gn.grouped_newton, static_args=STATIC)
    tx = inject(averaging=0.1)
    params, batches = tanh_params(), regression_batches(12)
    trained, state, _ = jax.jit(functools.partial(train, tx, tanh_loss))(params, batches)
    assert_close(trained, recipe_run(params, batches)[0], rtol=1e3 * EPS, atol=1e3 * EPS)
    assert set(state.hyperparams) == {"learning_rate", "summary_memory", "averaging"}
    assert "internal_damping" in inject(internal_damping=1.0).init(params).hyperparams


def test_injected_hyperparameters_may_change_between_steps():
    tx = optax.inject_hyperparams(gn.grouped_newton, static_args=STATIC)(
        groups=gn.groups.single,
        internal_damping=1.0,
        refresh_every=1,
        rates=lambda s, damping: gn.CubicSolution(damping[None], damping, 0),
        averaging=None,
    )
    params = {"p": jnp.ones(3)}
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=sum_of_squares))
    state = tx.init(params)
    state.hyperparams.update(learning_rate=jnp.array(0.5), internal_damping=jnp.array(4.0))
    updates, state = step(state)
    np.testing.assert_allclose(updates["p"], -2 * params["p"], rtol=1e2 * EPS)  # Adam's first direction is the sign
    assert only_grouped_newton(state).damping == 4.0


def test_clipping_and_weight_decay_belong_in_the_direction_and_plateaus_after_the_optimizer():
    direction = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    tx = optax.chain(gn.grouped_newton(direction=direction), optax.contrib.reduce_on_plateau(patience=1, rtol=1.0))
    params, batches = tanh_params(), regression_batches(6)

    def step(carry, batch):
        params, state, alone = carry
        loss, grads = jax.value_and_grad(tanh_loss)(params, batch)
        u, alone = direction.update(grads, alone, params)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: tanh_loss(p, batch), value=loss)
        carry = optax.apply_updates(params, updates), state, alone
        ours = only_grouped_newton(state)
        return carry, (u, updates, ours.eta, state[1].scale)

    u, updates, eta, factor = jax.jit(lambda p: lax.scan(step, (p, tx.init(p), direction.init(p)), batches)[1])(params)
    assert factor[-1] < factor[0]
    for g, layer in enumerate(("hidden", "out")):
        rate = (factor * eta[:, g])[:, None]
        np.testing.assert_allclose(updates[layer]["b"], -rate * u[layer]["b"], rtol=1e2 * EPS, atol=EPS)


def test_wrappers_that_trace_more_accept_the_optimizer():
    """Accumulated gradients, and injected options that the static arguments don't name."""
    inject = optax.inject_hyperparams(gn.grouped_newton, static_args=("groups", "direction", "rates"))
    for tx in (optax.MultiSteps(gn.grouped_newton(), 2), inject()):
        jax.eval_shape(functools.partial(train, tx, tanh_loss), tanh_params(), regression_batches(2))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gn.scale_by_grouped_newton, gn.grouped_newton])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"refresh_every": 0}, ValueError, "refresh_every must be an integer of at least 1, got 0"),
        ({"refresh_every": -10}, ValueError, "refresh_every must be an integer of at least 1, got -10"),
        ({"refresh_every": 2.5}, ValueError, r"refresh_every must be an integer of at least 1, got 2\.5"),
        ({"internal_damping": -1.0}, ValueError, r"internal_damping must be finite and at least 0, got -1\.0"),
        ({"internal_damping": math.nan}, ValueError, "internal_damping must be finite and at least 0, got nan"),
        ({"internal_damping": math.inf}, ValueError, "internal_damping must be finite and at least 0, got inf"),
        ({"summary_memory": 1.1}, ValueError, r"summary_memory must be a share of .*, in \[0, 1\], got 1\.1"),
        ({"summary_memory": -0.1}, ValueError, r"summary_memory must be a share of .*, in \[0, 1\], got -0\.1"),
        ({"summary_memory": math.nan}, ValueError, r"summary_memory must be a share of .*, in \[0, 1\], got nan"),
        ({"summary_memory": lambda step: 0.5}, ValueError, "summary_memory must be a share of .* got <function"),
        ({"method": "swap"}, ValueError, r"method must be one of .*nested.*, got 'swap'"),
        ({"refresh_every": math.nan}, ValueError, "refresh_every must be an integer of at least 1, got nan"),
        ({"refresh_every": math.inf}, ValueError, "refresh_every must be an integer of at least 1, got inf"),
        ({"rates": 0.1}, TypeError, r"rates must be a function .* such as edge_rates\(\), got 0\.1"),
    ],
)
def test_options_out_of_range_are_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("direction", [0.1, optax.adam])
def test_a_direction_that_is_no_transformation_is_refused(direction):
    with pytest.raises(TypeError, match=r"direction must be .* such as optax.scale_by_adam\(\), got "):
        gn.grouped_newton(direction=direction)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value_fn": None}, ValueError, r"update needs value_fn, .*value_fn=lambda p: loss\(p, batch\)"),
        ({"value_fn": 3.0}, TypeError, r"value_fn must be a function from params to the loss, got 3\.0"),
        ({"value_fn": lambda p: (sum_of_squares(p), {})}, TypeError, r"one real number, got .*loss_fn\(params\)\[0\]"),
        (
            {"value_fn": lambda p: p["p"] ** 2},
            ValueError,
            r"one real number, got an array of shape \(3,\); take its mean",
        ),
        (
            {"value_fn": lambda p: 1j * sum_of_squares(p)},
            TypeError,
            "must return a real floating-point number, got dtype complex64",
        ),
        ({"value": (jnp.ones(()), {"aux": 1.0})}, TypeError, r"value must be the loss alone, .*drop auxiliary outputs"),
        ({"value": jnp.ones(3)}, ValueError, r"value must be one real number, got an array of shape \(3,\)"),
        ({"params": None}, ValueError, r"update needs the current params: tx.update\(grads, state, params, value_fn"),
        ({"params": {"p": jnp.ones(3, complex)}}, TypeError, "parameter p has dtype complex64"),
        ({"params": {"p": jnp.arange(3)}}, TypeError, r"parameter p has dtype int32.*FROZEN"),
        ({"tx": gn.scale_by_grouped_newton({"q": 0})}, ValueError, "label tree has no label for parameter p"),
        ({"tx": gn.scale_by_grouped_newton({"p": FROZEN})}, ValueError, "all 1 parameters are frozen"),
        ({"direction": {}}, ValueError, "the direction has 0 arrays and the params have 1"),
        ({"direction": {"p": jnp.ones(2)}}, ValueError, r"the direction has shape \(2,\) at parameter p, which has"),
    ],
)
def test_bad_arguments_of_update_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        trace_update(**{"value_fn": sum_of_squares, **arguments})


def test_a_grouping_that_does_not_fit_later_params_is_refused():
    tx = gn.scale_by_grouped_newton({"p": 0})
    with pytest.raises(ValueError, match="label tree has no label for parameter q"):
        trace_update(sum_of_squares, tx=tx, state=tx.init({"p": jnp.ones(3)}), params={"q": jnp.ones(3)})


def test_a_state_of_another_grouping_is_refused():
    params = {"p": jnp.ones(3), "q": jnp.ones(2)}
    state = gn.scale_by_grouped_newton(gn.groups.single).init(params)
    with pytest.raises(ValueError, match=r"the state has 1 rates and the grouping makes 2 groups .*; call init with"):
        trace_update(sum_of_squares, state=state, params=params)


def test_masking_wrappers_are_refused_and_pointed_to_frozen():
    params = {"p": jnp.ones(3), "q": jnp.ones(2)}
    tx = gn.scale_by_grouped_newton()
    wrapped = [
        optax.masked(tx, {"p": True, "q": False}),
        optax.partition({"newton": tx, "sgd": optax.sgd(0.1)}, {"p": "newton", "q": "sgd"}),
    ]
    for outer in wrapped:
        with pytest.raises(ValueError, match=r"inside optax.masked or optax.partition.*grouped_newton.groups.FROZEN"):
            outer.init(params)
    masked = {"p": jnp.ones(3), "q": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"some params are optax\.MaskedNode"):
        trace_update(sum_of_squares, params=masked, state=tx.init({"p": jnp.ones(3)}))
