"""What optax promises of a transform, on every configuration of ours; optax's wrappers; numbers that go wrong."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import checks
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import assert_equal, assert_finite, at
from jax import lax

import grouped_newton as gn
from grouped_newton.groups import FROZEN

EPS = 2.0**-23
STATIC = ("groups", "direction", "refresh_every", "rates", "delayed", "nonnegative", "method", "max_stack")


class Configuration(NamedTuple):
    make: Callable[..., optax.GradientTransformationExtraArgs]
    options: dict[str, Any]
    before: tuple = ()
    after: tuple = ()

    def chain(self, ours):
        return optax.chain(*self.before, ours, *self.after)


def plain(*before, after=(), **options):
    options = {"rates": gn.edge_rates(1.0), "refresh_every": 1, "internal_damping": 1.0, **options}
    return Configuration(gn.scale_by_grouped_newton, options, before, (optax.scale(-1.0), *after))


def alias(**options):
    return Configuration(gn.grouped_newton, options)


CONFIGURATIONS = {
    "one group": plain(groups=gn.groups.single),
    "cubic rule, per tensor": plain(groups=gn.groups.per_tensor, rates=gn.cubic_rates(), internal_damping=10.0),
    "edge rule, prefix labels": plain(optax.scale_by_adam(), groups={"stem": 0, "head": 1, "tail": 0}),
    "callable, scheduled damping": plain(
        groups=lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "tail", p),
        internal_damping=lambda step: 1.0 + 1.0 / (1.0 + step),
    ),
    # Where rates come from the step before, directions as long as the gradient aren't safe.
    "frozen part, averaged and delayed summary": plain(
        optax.scale_by_adam(),
        groups={"stem": FROZEN, "head": 0, "tail": 1},
        internal_damping=gn.adaptive_damping(),
        summary_memory=0.5,
        delayed=True,
    ),
    "after Adam, adaptive damping, averaged summary": plain(
        optax.scale_by_adam(),
        internal_damping=gn.adaptive_damping(),
        refresh_every=gn.growing_period(20),
        rates=gn.edge_rates(1.8),
        summary_memory=0.3,
    ),
    "before a line search": plain(
        after=(optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),), refresh_every=5
    ),
    "alias": alias(),
    "alias, fixed and without delay and average": alias(
        internal_damping=1.0, delayed=False, averaging=None, refresh_every=5, rates=gn.edge_rates(1.0)
    ),
    "alias, frozen part, averaging": alias(groups={"stem": FROZEN, "head": 0, "tail": 1}, averaging=0.5),
}
# Of these the types alone are looked at.
TRACED = {
    "adapted damping, fixed period": alias(internal_damping=gn.adaptive_damping(2, 1), refresh_every=3),
    "weak rule and schedules": alias(
        refresh_every=lambda count: 2.5,
        internal_damping=gn.AdaptiveDamping(1, lambda damping, error: jnp.asarray(1.0)),
        learning_rate=lambda count: 0.5,
    ),
    "negative rates": alias(rates=gn.cubic_rates(), nonnegative=False, summary_memory=0),
    "another direction": alias(direction=optax.scale_by_lion()),
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
# Where each case compiles a program of its own: a fixed rule with a scheduled damping, and all that adapts.
of_each_kind = pytest.mark.parametrize("name", ["callable, scheduled damping", "alias"])
# Optax's own line search has weak types in its state, so it compiles twice, and refuses keywords.
without_line_search = pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if "line search" not in name])
since_optax_0_2_7 = pytest.mark.skipif(not hasattr(optax, "monitor"), reason="new in optax 0.2.7")


def transform(name):
    configuration = {**CONFIGURATIONS, **TRACED}[name]
    return configuration.chain(configuration.make(**configuration.options))


# --- the battery: types and structures, by tracing alone -----------------------------------------


def sum_of_squares(params):
    return sum(jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2) for x in jax.tree.leaves(params))


def three_modules(dtypes, **more):
    stem, head, tail = dtypes
    return {
        "stem": {"b": jnp.ones(1, stem)},
        "head": {"w": jnp.ones(2, head), **more},
        "tail": {"b": jnp.ones((), tail)},
    }


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def update_with(tx, params, value=1.0, **extra):
    """A function of state: one update along the params, with all that any transform here may ask for."""
    return lambda state: tx.update(params, state, params, value_fn=sum_of_squares, value=value, grad=params, **extra)


def assert_contract(tx, params):
    """Types of the updates and of the state, out of init, update and control flow; unknown keywords are ignored."""
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))

    def step(carry, go):
        state, _ = carry
        updates, after = update_with(tx, params, no_such_argument=object())(state)
        state = lax.cond(go, lambda: after, lambda: state)
        return (state, updates), None

    scan = lambda state: lax.scan(step, (state, params), jnp.array([True, False]))[0]
    after, updates = jax.eval_shape(scan, state)
    assert kinds(after) == kinds(state)
    assert not any(x.weak_type for x in jax.tree.leaves((state, updates)))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(updates)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(params)
    ]


DTYPES = {
    "narrow": ("bfloat16", "bfloat16", "bfloat16"),
    "mixed": ("float16", "bfloat16", "float32"),
    "wide": ("float64", "float32", "float64"),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [*(name for name in CONFIGURATIONS if "line search" not in name), *TRACED])
def test_updates_have_the_directions_dtype_and_the_state_keeps_its_types(name, dtypes):
    """Leaves may be None, too."""
    with jax.enable_x64("float64" in dtypes):
        assert_contract(transform(name), three_modules(map(jnp.dtype, dtypes), nothing=None))


@without_line_search  # which needs a leaf
def test_a_tree_without_leaves_has_no_groups(name):
    empty = {} if name == "alias" else {"a": None, "b": ()}
    tx = transform(name)
    state = tx.init(empty)
    value_fn = lambda p: jnp.float32(1.0)
    update = lambda state: tx.update(empty, state, empty, value_fn=value_fn, value=1.0)
    updates, after = jax.eval_shape(update, state)
    assert updates == empty
    assert kinds(after) == kinds(state)
    assert optax.tree.get(state, "eta").shape == (0,)


@every_configuration
def test_init_takes_shapes_alone(name):
    tx, params = transform(name), three_modules([jnp.bfloat16, jnp.float32, jnp.float32])
    shapes = jax.eval_shape(lambda: params)
    assert kinds(jax.eval_shape(tx.init, shapes)) == kinds(tx.init(params))


@since_optax_0_2_7
def test_optax_line_search_refuses_unknown_keywords():
    tx, params = transform("before a line search"), three_modules([jnp.float32] * 3)
    with pytest.raises(TypeError, match="no_such_argument"):
        jax.eval_shape(update_with(tx, params, no_such_argument=1.0), tx.init(params))


# --- the battery: numbers ------------------------------------------------------------------------


START = {"stem": {"b": jnp.zeros(1)}, "head": {"w": jnp.zeros(1)}, "tail": {"b": jnp.zeros(1)}}
PARABOLA, ROSENBROCK = 1.0, 0.0
MINIMUM = {PARABOLA: (1.0, -1.0), ROSENBROCK: (1.0, 1.0)}


def loss_of(params, mix):
    """Optax's two problems, in one program, in two of the three modules."""
    (x,), (y,), (stem,) = params["head"]["w"], params["tail"]["b"], params["stem"]["b"]
    parabola = (x - 1) ** 2 + (y + 1) ** 2
    return mix * parabola + (1 - mix) * ((1 - x) ** 2 + 100 * (y - x**2) ** 2) + stem**2


def descent(tx, params, state, mix, steps):
    def step(_, carry):
        params, state = carry
        value, grads = jax.value_and_grad(loss_of)(params, mix)
        value_fn = lambda p: loss_of(p, mix)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return lax.fori_loop(0, steps, step, (params, state))


@functools.cache
def compiled(name):
    """The transform, its training run, and a list that grows by each trace of it."""
    tx, traces = transform(name), []

    @jax.jit
    def run(params, state, mix, steps):
        traces.append(name)
        return descent(tx, params, state, mix, steps)

    return tx, run, traces


close = functools.partial(checks.assert_close, rtol=1e3 * EPS, atol=1e3 * EPS)


@pytest.mark.parametrize("mix", [PARABOLA, ROSENBROCK], ids=["parabola", "rosenbrock"])
@every_configuration
def test_it_converges_on_optax_problems(name, mix):
    tx, run, _ = compiled(name)
    params, state = run(START, tx.init(START), mix, 10_000)
    assert_finite((params, state))
    found = params["head"]["w"][0], params["tail"]["b"][0]
    np.testing.assert_allclose(found, MINIMUM[mix], rtol=0.1, atol=0.1)


@without_line_search
def test_it_compiles_once_and_is_deterministic(name):
    tx, run, traces = compiled(name)
    runs = []
    for _ in range(2):
        first = run(START, tx.init(START), 0.5, 3)
        runs.append(run(*first, 0.5, 3))
    assert len(traces) == 1
    assert_equal(*runs)


@pytest.mark.parametrize("name", ["one group", "after Adam, adaptive damping, averaged summary", "alias"])
def test_it_stays_finite_long_past_convergence(name):
    """The gradient is exactly zero at this start, which is the parabola's minimum: all rates are."""
    tx, run, _ = compiled(name)
    minimum = {**START, "head": {"w": jnp.ones(1)}, "tail": {"b": -jnp.ones(1)}}
    for start in (START, minimum):
        params, state = run(start, tx.init(start), PARABOLA, 30_000)
        assert_finite((params, state))
        close(params, minimum, rtol=1e-3, atol=1e-3)


def test_vmap_over_starts_equals_a_loop():
    tx, run, _ = compiled("alias")
    starts = jax.tree.map(lambda x: x[None] + jnp.array([[0.1], [0.3], [-0.4]]), START)
    one = lambda params: descent(tx, params, tx.init(params), 0.5, 8)
    together = jax.jit(jax.vmap(one))(starts)
    for k in range(3):
        start = at(starts, k)
        close(at(together[0], k), run(start, tx.init(start), 0.5, 8)[0])


@of_each_kind
def test_injected_hyperparameters_give_the_same_steps(name):
    tx, run, _ = compiled(name)
    configuration = CONFIGURATIONS[name]
    static = [option for option in STATIC if option in inspect.signature(configuration.make).parameters]
    injected = optax.inject_hyperparams(configuration.make, static_args=static)(**configuration.options)
    injected = configuration.chain(injected)
    trained, state = jax.jit(lambda p: descent(injected, p, injected.init(p), 0.5, 8))(START)
    close(trained, run(START, tx.init(START), 0.5, 8)[0])
    numbers = {k for k, v in configuration.options.items() if k not in STATIC and isinstance(v, float)}
    assert numbers <= set(optax.tree.get(state, "hyperparams"))


# A number of steps means those that it divides, a schedule counts from the last refresh: the same without extra ones,
# which a fixed damping and a group a tensor keep away.
SCHEDULED = {"learning_rate": 0.5, "internal_damping": 2.0, "refresh_every": 3}
INJECTED = {"summary_memory": 0.5, "averaging": 0.25}


@pytest.mark.parametrize("options", [SCHEDULED, INJECTED], ids=["schedules", "injected"])
def test_constant_schedules_equal_the_constants(options):
    """optax.inject_hyperparams makes schedules of the scalars that aren't ones themselves."""
    make = gn.grouped_newton
    if options is INJECTED:
        make = optax.inject_hyperparams(make, static_args=(*STATIC, "internal_damping"))
    fixed = {"groups": gn.groups.per_tensor} if options is SCHEDULED else {}
    schedules = {name: lambda step, value=value: jnp.asarray(value) for name, value in options.items()}
    pair = gn.grouped_newton(**fixed, **options), make(**fixed, **schedules)
    by_number, by_schedule = (jax.jit(lambda p, tx=tx: descent(tx, p, tx.init(p), ROSENBROCK, 8))(START) for tx in pair)
    close(by_schedule[0], by_number[0])
    averages = [gn.eval_params(state, START) for _, state in (by_number, by_schedule)]
    close(*averages)


@pytest.mark.parametrize("make", [gn.scale_by_grouped_newton, gn.grouped_newton])
def test_complex_params_are_refused_at_init_and_pointed_to_real_ones(make):
    params = {"p": jnp.ones(2, complex)}
    with pytest.raises(TypeError, match=r"p has dtype complex64.*real and imaginary parts as two real arrays"):
        make().init(params)
    with pytest.raises(TypeError, match="parameter p has dtype complex64"):
        jax.eval_shape(make().init, params)


# --- wrappers ------------------------------------------------------------------------------------


def quick(**options):
    """Small to compile."""
    return gn.grouped_newton(**{"groups": gn.groups.single, "refresh_every": 2, "averaging": None, **options})


def follow(tx, mixes, start=START, **extra):
    """The params, states and updates of a training run with a loss of its own at every step."""

    def step(carry, mix):
        params, state = carry
        value, grads = jax.value_and_grad(loss_of)(params, mix)
        value_fn = lambda p: loss_of(p, mix)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, value=value, grad=grads, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, updates)

    return jax.jit(lambda p: lax.scan(step, (p, tx.init(p)), mixes)[1])(start)


MIXES = jnp.array([0.9, 0.5, 0.7, 0.8, 0.6, 0.9, 0.4, 0.7])


@functools.cache
def quick_run():
    return follow(quick(), MIXES)


def test_named_chain():
    """By its types alone: what it hands on is what a chain does."""
    ours = gn.scale_by_grouped_newton(gn.groups.single, refresh_every=2)
    assert_contract(optax.named_chain(("direction", optax.scale_by_adam()), ("ours", ours)), START)


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


@pytest.mark.parametrize("wrapper", [optax.conditionally_mask, optax.conditionally_transform])
def test_conditional_wrappers(wrapper):
    """Where the condition doesn't hold the state stays, and the updates are zero or the gradient."""
    params, state, updates = follow(wrapper(quick(), lambda step: step != 2), MIXES)
    expected = quick_run()
    close(at(params, 1), at(expected[0], 1))
    assert_equal(at(state.inner_state, 2), at(state.inner_state, 1))
    zero = wrapper is optax.conditionally_mask
    gradient = jax.grad(loss_of)(at(params, 1), MIXES[2])
    close(at(updates, 2), jax.tree.map(jnp.zeros_like, gradient) if zero else gradient)


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
    losses = jax.vmap(loss_of)(params, mix)
    assert np.all(np.diff(losses) <= 1e-6)
    assert losses[-1] < 0.8 * loss_of(START, 0.5)
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
    u = jax.jit(lambda g: direction().update(g, direction().init(MATRIX), MATRIX)[0])(curvature * MATRIX)
    rate = jnp.sum(curvature * MATRIX * u) / jnp.sum(curvature * u * u)
    updates, state = step(MATRIX)
    np.testing.assert_allclose(optax.tree.get(state, "eta"), [rate], rtol=1e3 * EPS)
    np.testing.assert_allclose(updates, rate * u, rtol=1e3 * EPS, atol=1e3 * EPS)


def test_reduce_on_plateau_after_ours():
    tx = optax.chain(quick(), optax.contrib.reduce_on_plateau(patience=1, factor=0.5, rtol=1.0))
    _, state, updates = follow(tx, MIXES)
    first, expected = at(updates, 0), at(quick_run()[2], 0)
    close(first, jax.tree.map(lambda x: state[1].scale[0] * x, expected))
    assert state[1].scale[-1] < state[1].scale[0]


@since_optax_0_2_7
def test_monitor_after_ours():
    measured = {"norm": optax.tree.norm}
    tx = optax.chain(quick(), optax.monitor(measured))
    params, state = START, tx.init(START)
    grads = jax.grad(loss_of)(params, 0.5)
    updates, state = jax.jit(lambda s: tx.update(grads, s, params, value_fn=lambda p: loss_of(p, 0.5)))(state)
    close(optax.tree.get(state, "norm"), optax.tree.norm(updates))


def test_optax_tree_gets_and_sets_fields_of_the_state():
    state = gn.grouped_newton().init(START)
    changed = optax.tree.set(state, damping=jnp.float32(7.0), next_refresh=jnp.int32(5))
    assert (optax.tree.get(changed, "damping"), optax.tree.get(changed, "next_refresh")) == (7.0, 5)
    assert jax.tree.structure(changed) == jax.tree.structure(state)


def test_tree_map_params_maps_what_is_like_the_params_alone():
    """The direction's moments, the average, the last direction and where it began; none of them of frozen leaves."""
    tx = gn.grouped_newton(groups={"stem": FROZEN, "head": 0, "tail": 0})
    state = tx.init(START)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    for name in ("average", "mu", "direction", "origin"):
        copy = optax.tree.get(mapped, name)
        assert_equal(jax.tree.leaves(copy), [START["head"]["w"] + 1, START["tail"]["b"] + 1])
    for name in set(gn.GroupedNewtonState._fields) - {"count", "direction", "origin"}:
        assert_equal(optax.tree.get(mapped, name), optax.tree.get(state, name))


TURNED_AWAY = {
    "masked": lambda tx: optax.masked(tx, {"stem": False, "head": True, "tail": True}),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"stem": "b", "head": "a", "tail": "a"}),
}


@pytest.mark.parametrize("wrapper", TURNED_AWAY.values(), ids=TURNED_AWAY)
@pytest.mark.parametrize("make", [gn.scale_by_grouped_newton, gn.grouped_newton])
def test_wrappers_that_hide_params_are_refused_and_pointed_to_frozen(make, wrapper):
    with pytest.raises(ValueError, match=r"inside optax\.masked or optax\.partition.*grouped_newton\.groups\.FROZEN"):
        wrapper(make()).init(START)


def test_a_wrapper_that_drops_extra_arguments_is_named():
    inner = gn.grouped_newton()
    wrapped = optax.GradientTransformation(inner.init, lambda u, s, p=None: inner.update(u, s, p))
    chained = optax.chain(wrapped)
    with pytest.raises(ValueError, match=r"update needs value_fn.*A wrapper that drops extra arguments drops it too"):
        chained.update(START, chained.init(START), START, value_fn=lambda p: loss_of(p, 0.5))


@pytest.mark.parametrize("groups", [gn.groups.per_module, {"stem": 0, "head": 1, "tail": 1}], ids=["default", "labels"])
def test_flatten_around_ours_is_named_and_around_the_direction_is_the_right_order(groups):
    wrong = optax.flatten(gn.grouped_newton(groups=groups))
    value_fn = lambda p: loss_of(p, 0.5)
    with pytest.raises((TypeError, ValueError, IndexError), match=r"optax\.flatten.*direction"):
        jax.eval_shape(lambda: wrong.update(START, wrong.init(START), START, value_fn=value_fn))
    right = gn.grouped_newton(groups=groups, direction=optax.flatten(optax.scale_by_adam()))
    jax.eval_shape(lambda: right.update(START, right.init(START), START, value_fn=value_fn))


# --- faults --------------------------------------------------------------------------------------

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
    return checks.each(jax.jit(faulty_run), faults, seeds)


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
