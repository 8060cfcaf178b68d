"""What optax promises of a transform, on every configuration of ours."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_equal, assert_finite, at
from interpreter import uncompiled
from jax import lax
from models import PARABOLA, ROSENBROCK, START, valleys

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


MINIMUM = {PARABOLA: (1.0, -1.0), ROSENBROCK: (1.0, 1.0)}


def descent(tx, params, state, mix, steps):
    def step(_, carry):
        params, state = carry
        value, grads = jax.value_and_grad(valleys)(params, mix)
        value_fn = lambda p: valleys(p, mix)
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


@pytest.mark.slow
@pytest.mark.parametrize("mix", [PARABOLA, ROSENBROCK], ids=["parabola", "rosenbrock"])
@every_configuration
def test_it_converges_on_optax_problems(name, mix):
    tx, run, _ = compiled(name)
    params, state = run(START, tx.init(START), mix, 10_000)
    assert_finite((params, state))
    found = params["head"]["w"][0], params["tail"]["b"][0]
    np.testing.assert_allclose(found, MINIMUM[mix], rtol=0.1, atol=0.1)


@pytest.mark.slow
@without_line_search
def test_it_compiles_once_and_is_deterministic(name):
    tx, run, traces = compiled(name)
    runs = []
    for _ in range(2):
        first = run(START, tx.init(START), 0.5, 3)
        runs.append(run(*first, 0.5, 3))
    assert len(traces) == 1
    assert_equal(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one group", "after Adam, adaptive damping, averaged summary", "alias"])
def test_it_stays_finite_long_past_convergence(name):
    """The gradient is exactly zero at this start, which is the parabola's minimum: all rates are."""
    tx, run, _ = compiled(name)
    minimum = {**START, "head": {"w": jnp.ones(1)}, "tail": {"b": -jnp.ones(1)}}
    for start in (START, minimum):
        params, state = run(start, tx.init(start), PARABOLA, 30_000)
        assert_finite((params, state))
        close(params, minimum, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_vmap_over_starts_equals_a_loop():
    tx, run, _ = compiled("alias")
    starts = jax.tree.map(lambda x: x[None] + jnp.array([[0.1], [0.3], [-0.4]]), START)
    one = lambda params: descent(tx, params, tx.init(params), 0.5, 8)
    together = uncompiled(jax.vmap(one))(starts)
    for k in range(3):
        start = at(starts, k)
        close(at(together[0], k), run(start, tx.init(start), 0.5, 8)[0])


@pytest.mark.slow
@of_each_kind
def test_injected_hyperparameters_give_the_same_steps(name):
    tx, run, _ = compiled(name)
    configuration = CONFIGURATIONS[name]
    static = [option for option in STATIC if option in inspect.signature(configuration.make).parameters]
    injected = optax.inject_hyperparams(configuration.make, static_args=static)(**configuration.options)
    injected = configuration.chain(injected)
    trained, state = uncompiled(lambda p: descent(injected, p, injected.init(p), 0.5, 8))(START)
    close(trained, run(START, tx.init(START), 0.5, 8)[0])
    numbers = {k for k, v in configuration.options.items() if k not in STATIC and isinstance(v, float)}
    assert numbers <= set(optax.tree.get(state, "hyperparams"))


# A number of steps means those that it divides, a schedule counts from the last refresh: the same without extra ones,
# which a fixed damping and a group a tensor keep away.
SCHEDULED = {"learning_rate": 0.5, "internal_damping": 2.0, "refresh_every": 3}
INJECTED = {"summary_memory": 0.5, "averaging": 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("options", [SCHEDULED, INJECTED], ids=["schedules", "injected"])
def test_constant_schedules_equal_the_constants(options):
    """optax.inject_hyperparams makes schedules of the scalars that aren't ones themselves."""
    make = gn.grouped_newton
    if options is INJECTED:
        make = optax.inject_hyperparams(make, static_args=(*STATIC, "internal_damping"))
    fixed = {"groups": gn.groups.per_tensor} if options is SCHEDULED else {}
    schedules = {name: lambda step, value=value: jnp.asarray(value) for name, value in options.items()}
    pair = gn.grouped_newton(**fixed, **options), make(**fixed, **schedules)
    by_number, by_schedule = (
        uncompiled(lambda p, tx=tx: descent(tx, p, tx.init(p), ROSENBROCK, 8))(START) for tx in pair
    )
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


# --- wrappers, by their types and by what is refused --------------------------------------------


def test_named_chain():
    """By its types alone: what it hands on is what a chain does."""
    ours = gn.scale_by_grouped_newton(gn.groups.single, refresh_every=2)
    assert_contract(optax.named_chain(("direction", optax.scale_by_adam()), ("ours", ours)), START)


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
        chained.update(START, chained.init(START), START, value_fn=lambda p: valleys(p, 0.5))


@pytest.mark.parametrize("groups", [gn.groups.per_module, {"stem": 0, "head": 1, "tail": 1}], ids=["default", "labels"])
def test_flatten_around_ours_is_named_and_around_the_direction_is_the_right_order(groups):
    wrong = optax.flatten(gn.grouped_newton(groups=groups))
    value_fn = lambda p: valleys(p, 0.5)
    with pytest.raises((TypeError, ValueError, IndexError), match=r"optax\.flatten.*direction"):
        jax.eval_shape(lambda: wrong.update(START, wrong.init(START), START, value_fn=value_fn))
    right = gn.grouped_newton(groups=groups, direction=optax.flatten(optax.scale_by_adam()))
    jax.eval_shape(lambda: right.update(START, right.init(START), START, value_fn=value_fn))
