"""Summaries of the last step's direction on a fresh batch: whatever stands around the transform.

Every step has a batch of its own. With ``summary_memory=0`` the state holds the summary as it is, and it has to be

  gn.summarize(loss on this step's batch, the params at the last step, the direction at the last step)

where a step is one that the transform took: wrappers may leave some out. Directions are gradients, which the tests
take anew from the params and the batches that they were given.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import assert_close, assert_equal, assert_finite, at, only_grouped_newton, shifted
from interpreter import uncompiled
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_newton as gn
from grouped_newton.groups import FROZEN

pytestmark = pytest.mark.slow

EPS = 2.0**-23
STEPS = 9
descent = optax.scale(-0.5)
GROUPS = gn.groups.per_module


# A refresh at every step, rates by the summary alone; small to compile.
OPTIONS = {"groups": GROUPS, "rates": gn.edge_rates(1.0), "refresh_every": 1, "delayed": True}


def ours(**options):
    return gn.scale_by_grouped_newton(**OPTIONS | options)


def train(tx, loss, params, batches, change=lambda params: params):
    """Trains by one scan, a batch a step; params, gradients and states of every step, the params before it.

    ``change`` is what the caller does to the params after each step.
    """

    def step(carry, batch):
        params, state = carry
        value_fn = lambda p: loss(p, batch)
        value, grads = jax.value_and_grad(value_fn, allow_int=True)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        after = change(optax.apply_updates(params, updates))
        return (after, state), (params, grads, only_grouped_newton(state))

    return lax.scan(step, (params, tx.init(params)), batches)[1]


def summaries_of(loss, groups=GROUPS):
    """(params, directions, batches) -> the summary of each."""
    summary = lambda p, u, batch: gn.summarize(lambda q: loss(q, batch), p, u, groups)
    return uncompiled(jax.vmap(summary))


tanh_summaries = summaries_of(models.tanh_loss)


@functools.cache
def trained_plainly():
    """Params, gradients and states with nothing around."""
    train_descending = functools.partial(train, optax.chain(ours(), descent), models.tanh_loss)
    return uncompiled(train_descending)(models.tanh_params(), models.regression_batches(STEPS))


def recorded(state):
    return state.summary


def assert_summaries(found, expected, eps=EPS):
    """To rounding: every field within some units of its largest number."""
    expected = expected._replace(third=jnp.abs(expected.third))
    for name, a, b in zip(gn.Summary._fields, found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=256 * eps * np.max(np.abs(b)), err_msg=name)


def check(loss, params, directions, states, batches, *, taken=range(STEPS), summaries=None, eps=EPS):
    """Every summary in the states is that of the step taken before, on the batch of its own step."""
    taken = np.array(taken)
    before, now = taken[:-1], taken[1:]
    summaries = summaries or summaries_of(loss)
    expected = summaries(at(params, before), at(directions, before), at(batches, now))
    assert_summaries(recorded(at(states, now)), expected, eps)
    np.testing.assert_array_equal(states.count[taken], np.arange(1, len(taken) + 1))
    np.testing.assert_array_equal(states.refreshes[taken], np.arange(len(taken)))
    # And isn't that of the direction's own batch, by far.
    own = summaries(at(params, now), at(directions, now), at(batches, now))
    assert np.max(np.abs(own.gbar - states.summary.gbar[now])) > 0.1 * np.max(np.abs(states.summary.gbar[now]))
    assert np.all(np.isfinite(states.eta))


# --- transforms and wrappers around -----------------------------------------------------------------


class Around(NamedTuple):
    """What is around or after ours, which steps it lets ours take, and what the caller does."""

    make: Callable
    taken: Callable = lambda step: True
    change: Callable = lambda params: params
    bad: int | None = None  # a step whose gradient isn't finite
    accumulated: int = 1


def after(*transforms):
    return lambda tx: optax.chain(tx, *transforms)


EVEN = lambda step: step % 2 == 0
AROUND = {
    "weight decay after ours": Around(after(optax.add_decayed_weights(0.3), descent)),
    "a line search after ours": Around(after(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(8))),
    "params changed by the caller": Around(
        after(descent), change=lambda p: jax.tree.map(lambda x: jnp.clip(x, -0.4, 0.4), p)
    ),
    "injected hyperparameters": Around(
        lambda tx: optax.chain(
            optax.inject_hyperparams(gn.scale_by_grouped_newton, static_args=tuple(OPTIONS))(**OPTIONS), descent
        )
    ),
    "accumulated gradients": Around(
        lambda tx: optax.MultiSteps(optax.chain(tx, descent), 2), taken=lambda k: k % 2 == 1, accumulated=2
    ),
    "a step that isn't finite": Around(
        lambda tx: optax.apply_if_finite(optax.chain(tx, descent), 3), taken=lambda k: k != 4, bad=4
    ),
    "steps by the gradient": Around(
        lambda tx: optax.chain(
            optax.conditionally_transform(optax.chain(tx, optax.scale(5.0)), EVEN), optax.scale(-0.1)
        ),
        taken=EVEN,
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_summary_is_of_the_last_step_taken_on_this_batch(name):
    around = AROUND[name]
    batches = models.regression_batches(STEPS)
    given = batches if around.bad is None else (batches[0].at[around.bad].set(jnp.nan), batches[1])
    run = uncompiled(functools.partial(train, around.make(ours()), models.tanh_loss, change=around.change))
    params, directions, states = run(models.tanh_params(), given)
    if around.accumulated > 1:
        directions = jax.tree.map(lambda g: (g + shifted(g[0], g)) / around.accumulated, directions)
    taken = [k for k in range(STEPS) if around.taken(k)]
    check(models.tanh_loss, params, directions, states, batches, taken=taken, summaries=tanh_summaries)
    # The copies are of the last step that was taken, to the bit.
    assert_equal(at(states.origin, taken[-1]), at(params, taken[-1]))
    assert_close(at(states.direction, taken[-1]), at(directions, taken[-1]), rtol=16 * EPS, atol=16 * EPS)
    for k in set(range(1, STEPS)) - set(taken):
        assert_equal(at(states, k), at(states, k - 1))


def test_steps_compiled_one_by_one_take_the_same_summaries():
    """With donated params and states."""
    tx, alone, batches = optax.chain(ours(), descent), models.tanh_params(), models.regression_batches(STEPS)
    together = trained_plainly()
    check(models.tanh_loss, *together, batches, summaries=tanh_summaries)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value_fn = lambda p: models.tanh_loss(p, batch)
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(alone)
    for k in range(STEPS):
        given, before = (alone, state), at(together[0], k)
        assert_close(alone, before, rtol=1e3 * EPS, atol=1e3 * EPS)
        alone, state = step(alone, state, at(batches, k))
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert_close(recorded(state[0]), recorded(at(together[2], -1)), rtol=1e3 * EPS, atol=1e3 * EPS)


# --- the first summary ------------------------------------------------------------------------------


def test_the_first_summary_is_of_the_first_direction_itself_and_forgotten_at_the_second():
    params, batches = models.tanh_params(), models.regression_batches(3)
    tx = optax.chain(ours(summary_memory=0.5), descent)
    trained, directions, states = uncompiled(functools.partial(train, tx, models.tanh_loss))(params, batches)
    np.testing.assert_array_equal(states.refreshes, [0, 1, 2])
    own = tanh_summaries(at(trained, slice(1)), at(directions, slice(1)), at(batches, slice(1)))
    assert_summaries(recorded(at(states, slice(1))), own)
    assert np.any(states.eta[0] > 0)
    first, second = at(states, 0), at(states, 1)
    delayed = tanh_summaries(at(trained, slice(1)), at(directions, slice(1)), at(batches, slice(1, 2)))
    assert_summaries(recorded(at(states, slice(1, 2))), delayed)
    assert_equal(second.recent, jnp.abs(jnp.diag(second.summary.hbar)))
    assert np.all(first.recent != second.recent)
    # From the third on it is an average of what counts.
    third = tanh_summaries(at(trained, slice(1, 2)), at(directions, slice(1, 2)), at(batches, slice(2, 3)))
    assert np.any(np.abs(states.summary.gbar[2] - third.gbar[0]) > 0.01 * np.max(np.abs(third.gbar)))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_first_direction_that_tells_nothing_is_made_up_for_by_the_second(bad):
    """It makes no step, and there is no summary of it at the second either; from the third all is as usual."""
    params, batches = models.tanh_params(), models.regression_batches(4)
    tx = ours()

    def step(state, at_step):
        batch, k = at_step
        value_fn = lambda p: models.tanh_loss(p, batch)
        grads = jax.tree.map(lambda g: jnp.where(k == 0, bad, g), jax.grad(value_fn)(params))
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return state, (grads, updates, state)

    grads, updates, states = uncompiled(lambda: lax.scan(step, tx.init(params), (batches, jnp.arange(4)))[1])()
    assert_finite(states)
    assert_equal(at(updates, slice(2)), jax.tree.map(jnp.zeros_like, at(updates, slice(2))))
    np.testing.assert_array_equal(states.refreshes, [0, 0, 1, 2])
    there = jax.tree.map(lambda p: jnp.broadcast_to(p, (2, *p.shape)), params)
    expected = tanh_summaries(there, at(grads, slice(1, 3)), at(batches, slice(2, 4)))
    assert_summaries(recorded(at(states, slice(2, 4))), expected)


# --- what for: a slope that isn't too large -------------------------------------------------------------


def test_slopes_on_a_fresh_batch_are_those_of_the_whole_and_those_on_the_directions_own_are_too_large(x64):
    """At fixed params, the loss (p - x)^2 / 2 with x of mean 0 and variance 9: slopes p^2 and p^2 + 9 in the mean."""
    p, count = jnp.array([2.0]), 4000
    x = 3 * jax.random.normal(jax.random.key(0), (count,))

    def slopes(delayed):
        tx = ours(groups=gn.groups.single, delayed=delayed)

        def step(state, x):
            value_fn = lambda p: jnp.sum((p - x) ** 2) / 2
            state = tx.update(jax.grad(value_fn)(p), state, p, value_fn=value_fn)[1]
            return state, state.summary.gbar[0]

        return jax.jit(lambda: lax.scan(step, tx.init(p), x)[1])()[1:]

    for delayed, mean in ((True, 4.0), (False, 13.0)):
        found = slopes(delayed)
        assert np.mean(found) == pytest.approx(mean, abs=float(4 * np.std(found) / math.sqrt(count)))


# --- dtypes and kinds of leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_copies_have_the_dtypes_of_the_params(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, batches = models.tanh_params(dtype=dtype), models.regression_batches(STEPS, dtype="float32")
        wide = lambda p: jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), p)
        loss = lambda p, batch: models.tanh_loss(wide(p), batch)
        tx = optax.chain(ours(), descent)
        run = uncompiled(functools.partial(train, tx, loss))
        trained, directions, states = run(params, batches)
        start = tx.init(params)[0]
        for copy in (start.direction, start.origin, states.direction, states.origin):
            assert {x.dtype for x in jax.tree.leaves(copy)} == {jnp.dtype(dtype)}
        assert states.summary.gbar.dtype == jnp.promote_types(dtype, jnp.float32)
        check(loss, trained, directions, states, batches)


def test_a_wide_direction_of_narrow_params_is_kept_as_it_is_summarized():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models.tanh_params())
    direction = jax.tree.map(lambda x: jnp.cos(x.astype(jnp.float32)), params)
    tx, (batch, other) = ours(), (at(models.regression_batches(2), k) for k in range(2))
    update = lambda state, batch: tx.update(direction, state, params, value_fn=lambda p: models.tanh_loss(p, batch))
    updates, state = uncompiled(lambda: update(update(tx.init(params), batch)[1], other))()
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    assert_equal(state.direction, jax.tree.map(lambda x: x.astype(jnp.bfloat16), direction))
    summary_on = lambda batch: gn.summarize(lambda p: models.tanh_loss(p, batch), params, direction, GROUPS)
    expected = uncompiled(summary_on)(other)
    assert_summaries(recorded(state), expected)


def test_leaves_without_a_group_of_any_kind_are_not_copied():
    """The loss uses them; a table of integers, a random key, a mask and frozen weights, all larger than the rest."""
    big = 1000
    params = {
        "w": jnp.array([1.0, -2.0, 0.5]),
        "table": jnp.arange(big) % 3,
        "key": jax.random.split(jax.random.key(0), big),
        "mask": jnp.arange(big) % 2 == 0,
        "stuck": jnp.linspace(0.5, 1.5, big),
        "none": None,
    }
    groups = {name: 0 if name == "w" else FROZEN for name in params if name != "none"} | {"none": None}

    def loss(p, x):
        weights = p["stuck"][:3] * jnp.where(p["mask"][:3], 1.0, 2.0) * (1 + p["table"][:3])
        return jnp.sum(weights * (p["w"] - x) ** 4) + 0 * jax.random.uniform(p["key"][0])

    tx = ours(groups=groups)
    state = tx.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves((state.direction, state.origin))) == 2 * params["w"].nbytes
    without = ours(groups=groups, delayed=False).init(params)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert bytes_of(state) - bytes_of(without) == 2 * params["w"].nbytes

    x = jax.random.normal(jax.random.key(1), (4, 3))
    float0 = lambda p: np.zeros(np.shape(p), jax.dtypes.float0)

    @uncompiled
    def run(w):
        def step(carry, x):
            w, state = carry
            now = {**params, "w": w}
            value_fn = lambda p: loss(p, x)
            g = jax.grad(lambda w: value_fn({**now, "w": w}))(w)
            grads = {**jax.tree.map(float0, now), "mask": jnp.zeros(big, bool), "stuck": jnp.full(big, jnp.nan), "w": g}
            updates, state = tx.update(grads, state, now, value_fn=value_fn)
            return (w - 0.2 * updates["w"], state), (w, g, state)

        return lax.scan(step, (w, state), x)[1]

    trained, directions, states = run(params["w"])

    def summary(w, direction, x):
        directions = {**jax.tree.map(float0, params), "w": direction}
        return gn.summarize(lambda p: loss(p, x), {**params, "w": w}, directions, groups)

    expected = uncompiled(jax.vmap(summary))(trained[:-1], directions[:-1], x[1:])
    assert_summaries(recorded(at(states, slice(1, None))), expected)
    assert_equal(states.origin["w"], trained)
    assert isinstance(states.origin["key"], optax.MaskedNode)


def test_without_delay_no_copies_are_kept():
    state = ours(delayed=False).init(models.tanh_params())
    assert (state.direction, state.origin) == (None, None)


@pytest.mark.parametrize("kind", ["weak", "numpy", "python"])
def test_copies_are_arrays_of_their_own_and_not_weak(kind):
    make = {"weak": jnp.asarray, "numpy": np.float32, "python": float}[kind]
    params = {"a": make(1.0), "b": make(2.0)}
    state = ours(groups=gn.groups.single).init(params)
    leaves = jax.tree.leaves((state.direction, state.origin))
    assert [(type(x) is type(jnp.ones(())), x.dtype, x.weak_type) for x in leaves] == [(True, jnp.float32, False)] * 4


# --- losses that change from step to step beside the batch --------------------------------------------------


def test_dropout_keys_and_running_statistics_of_this_step_are_used():
    """The loss closes over a key and over the running mean and variance as they are at its step."""
    x, y = models.regression_batches(STEPS)
    keys = jax.random.split(jax.random.key(0), STEPS)

    def loss(params, given):
        x, y, key, (mean, variance) = given
        h = x @ params["hidden"]["w"] + params["hidden"]["b"][None]
        h = jnp.tanh((h - mean[None]) * lax.rsqrt(variance + 0.1)[None])
        h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0)
        return jnp.mean((h @ params["out"]["w"] + params["out"]["b"][None] - y) ** 2)

    tx, params = optax.chain(ours(), descent), models.tanh_params()

    def step(carry, batch):
        params, state, statistics = carry
        given = (*batch, statistics)
        value_fn = lambda p: loss(p, given)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        h = batch[0] @ params["hidden"]["w"]
        statistics = tuple(0.5 * s + 0.5 * f(h, 0) for s, f in zip(statistics, (jnp.mean, jnp.var), strict=True))
        return (optax.apply_updates(params, updates), state, statistics), (params, grads, state[0], given)

    start = params, tx.init(params), (jnp.zeros(4), jnp.ones(4))
    trained, directions, states, given = uncompiled(lambda c: lax.scan(step, c, (x, y, keys))[1])(start)
    check(loss, trained, directions, states, given)


# --- many devices -------------------------------------------------------------------------------------------


def mesh(number=4, axis_type=AxisType.Auto):
    return Mesh(np.array(jax.devices("cpu")[:number]), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map_summaries_are_of_the_whole_batch(check_vma):
    params, batches = models.tanh_params(), models.regression_batches(STEPS)
    tx = optax.chain(ours(axis_name="data"), descent)

    def step(carry, batch):
        params, state = carry
        value_fn = lambda p: models.tanh_loss(p, batch)
        grads = jax.grad(lambda p: lax.pmean(value_fn(p), "data"))(params)
        if not check_vma:  # there the transpose of a sum over devices is a sum over devices
            grads = lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), (params, grads, state[0])

    run = lambda params, *batches: lax.scan(step, (params, tx.init(params)), batches)[1]
    specs = P(), P(None, "data"), P(None, "data")
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check_vma)
    trained, directions, states = jax.device_get(jax.jit(mapped)(params, *batches))
    check(models.tanh_loss, trained, directions, states, batches, summaries=tanh_summaries)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_copies_are_divided_as_the_params_are(axis_type):
    """Out of init and of a donated step; the summaries are those of one device."""
    on = mesh(axis_type=axis_type)
    with jax.set_mesh(on):
        specs = {"hidden": {"w": P(None, "data"), "b": P("data")}, "out": {"w": P("data"), "b": P()}}
        places = jax.tree.map(lambda s: NamedSharding(on, s), specs, is_leaf=lambda x: isinstance(x, P))
        params, batches = jax.device_put(models.tanh_params(), places), models.regression_batches(3)
        tx = optax.chain(ours(), descent)
        explicit = axis_type is AxisType.Explicit

        def loss(params, batch):
            if explicit:  # a product over a divided axis has to say what it becomes
                params = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)
            return models.tanh_loss(params, batch)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            grads = jax.grad(lambda p: loss(p, batch))(params)
            updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))
            return optax.apply_updates(params, updates), state

        def assert_divided(state):
            for copy in (state[0].direction, state[0].origin):
                same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), copy, places)
                assert all(jax.tree.leaves(same))

        state = tx.init(params)
        assert_divided(state)
        for k in range(3):
            params, state = step(params, state, jax.device_put(at(batches, k), NamedSharding(on, P())))
            assert_divided(state)
    assert_close(
        jax.device_get(recorded(state[0])), recorded(at(trained_plainly()[2], 2)), rtol=1e3 * EPS, atol=1e3 * EPS
    )


def test_a_direction_laid_out_otherwise_than_the_params_is_kept_as_they_are():
    on = mesh(axis_type=AxisType.Explicit)
    with jax.set_mesh(on):
        divided, whole = (NamedSharding(on, spec) for spec in (P("data"), P()))
        params, direction = jax.device_put(jnp.ones(8), divided), jax.device_put(2 * jnp.ones(8), whole)
        tx = ours(groups=gn.groups.single)
        update = lambda u, state, p: tx.update(u, state, p, value_fn=lambda p: jnp.sum(p**2))
        updates, state = jax.jit(lambda u, p: update(u, update(u, tx.init(p), p)[1], p))(direction, params)
        np.testing.assert_allclose(updates, params, rtol=8 * EPS)
        assert updates.sharding.is_equivalent_to(whole, 1)
        assert state.direction.sharding.is_equivalent_to(divided, 1)


# --- the optimizer --------------------------------------------------------------------------------------------


def test_the_optimizer_delays_by_default_and_the_transform_does_not():
    """The optimizer's directions are those of Adam alone; with losses given, an average and a moving damping."""
    params, batches = models.tanh_params(), models.regression_batches(14)
    tx = gn.grouped_newton(groups=gn.groups.per_module, summary_memory=0.0)
    adam = optax.scale_by_adam(b1=0.9, b2=0.99)
    trained, grads, states = uncompiled(functools.partial(train, tx, models.tanh_loss))(params, batches)
    directions = lax.scan(lambda s, g: adam.update(g, s)[::-1], adam.init(params), grads)[1]
    due = np.flatnonzero(np.diff(states.refreshes, prepend=0))
    assert len(due) >= 10
    expected = tanh_summaries(at(trained, due - 1), at(directions, due - 1), at(batches, due))
    assert_summaries(recorded(at(states, due)), expected)
    assert gn.scale_by_grouped_newton().init(params).origin is None
