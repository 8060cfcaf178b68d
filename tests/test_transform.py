"""The transform: one step, the arguments of update, what is refused, the state."""

import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import assert_close, assert_equal, assert_finite, at, each, only_grouped_newton
from interpreter import uncompiled
from jax import lax
from models import regression_batches, tanh_loss, tanh_params
from runs import constant_rule, sum_of_squares, train

import grouped_newton as gn
from grouped_newton.groups import FROZEN

EPS = 2.0**-23


# --- one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["canonical", "trivial"])
def test_one_step_agrees_with_the_reference(x64, grouping):
    (loss, params, direction), reference = models.reference("mlp", grouping)
    groups = gn.groups.per_tensor if grouping == "canonical" else gn.groups.single

    def step(damping, params, direction):
        tx = gn.scale_by_grouped_newton(groups, internal_damping=damping)
        return tx.update(direction, tx.init(params), params, value_fn=loss)

    dampings = ("0.1", "1.0", "10.0")
    step = jax.jit(step)
    updates, state = each(lambda damping: step(damping, params, direction), np.array([float(d) for d in dampings]))
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
        {"rates": gn.edge_rates(), "summary_memory": 0.5, "delayed": True},
    ],
    ids=["paper", "edge, delayed"],
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
    trained, eta = each(jax.jit(run), scales)
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
    updates, state = uncompiled(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    assert jax.tree.structure(updates) == jax.tree.structure(direction)
    jax.tree.map(lambda u, d: np.testing.assert_equal((u.dtype, u.shape), (d.dtype, d.shape)), updates, direction)
    np.testing.assert_allclose(state.eta, 0.5, rtol=8 * EPS)
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        eps = float(max(jnp.finfo(p.dtype).eps, jnp.finfo(u.dtype).eps))
        np.testing.assert_allclose(np.asarray(u, np.float64), np.asarray(p, np.float64), rtol=2 * eps)


def test_float64_params_have_float64_rates_and_updates(x64):
    tx, params = gn.scale_by_grouped_newton(), {"w": jnp.array([1.0, 2.0])}
    loss = lambda p: jnp.sum(p["w"] ** 2)
    updates, state = uncompiled(lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss))(params)
    assert {updates["w"].dtype, state.eta.dtype, state.summary.hbar.dtype} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(updates["w"], params["w"], rtol=8 * 2.0**-52)


def test_a_group_without_numbers_has_rate_zero():
    params = {"empty": jnp.zeros((0, 3)), "w": jnp.array([1.0, -2.0])}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["empty"])
    for tx in (gn.scale_by_grouped_newton(), gn.grouped_newton(groups=gn.groups.per_tensor)):
        update = lambda p, tx=tx: tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss)
        updates, state = uncompiled(update)(params)
        assert_finite((tx.init(params), updates, state))
        assert only_grouped_newton((state,)).eta[0] == 0
        assert np.all(updates["w"] != 0)


@pytest.mark.parametrize(("nonnegative", "used"), [(True, 0.0), (False, -1.0)])
def test_negative_rates_are_clipped_at_use_only(nonnegative, used):
    tx = gn.scale_by_grouped_newton(rates=constant_rule(-1.0, 2.0), nonnegative=nonnegative)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    direction = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.array([-3.0, 4.0])}
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"])
    updates, state = uncompiled(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    np.testing.assert_array_equal(state.eta, [-1.0, 2.0])
    assert_equal(updates, {"a": used * direction["a"], "b": 2 * direction["b"]})


def test_frozen_leaves_get_a_zero_update_whatever_their_dtype_and_direction():
    params = {"count": jnp.arange(3), "stuck": jnp.ones(2), "w": jnp.array([1.0, -2.0])}
    direction = {"count": jnp.arange(3), "stuck": jnp.array([jnp.nan, jnp.inf]), "w": 2 * params["w"]}
    groups = {"count": FROZEN, "stuck": FROZEN, "w": 0}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["stuck"]) * jnp.sum(p["count"])
    tx = gn.scale_by_grouped_newton(groups)
    updates, state = uncompiled(lambda u: tx.update(u, tx.init(params), params, value_fn=loss))(direction)
    assert_equal(updates["count"], np.zeros(3, np.int32))
    assert_equal(updates["stuck"], np.zeros(2, np.float32))
    assert updates["count"].dtype == params["count"].dtype
    np.testing.assert_allclose(updates["w"], params["w"], rtol=8 * EPS)
    assert state.eta.shape == (1,)


def test_frozen_leaves_of_kinds_without_arithmetic_are_left_alone():
    """Where the damping evaluates the loss at moved params."""
    params = {"mask": jnp.array([True, False]), "key": jax.random.key(0), "w": jnp.array([1.0, -2.0])}
    groups = {"mask": FROZEN, "key": FROZEN, "w": 0}
    loss = lambda p: jnp.sum(jnp.where(p["mask"], p["w"], 2 * p["w"]) ** 2) + 0 * jax.random.uniform(p["key"])
    tx = gn.scale_by_grouped_newton(groups, internal_damping=gn.adaptive_damping(floor=0.1), refresh_every=1)
    direction = {"mask": jnp.zeros(2, bool), "key": np.zeros((), jax.dtypes.float0), "w": params["w"]}
    damping = jax.jit(lambda w: tx.update({**direction, "w": w}, tx.init(params), params, value_fn=loss)[1].damping)
    assert damping(params["w"]) == 0.5


def test_numbers_whose_product_overflows_stay_and_others_move():
    tx = gn.scale_by_grouped_newton(rates=constant_rule(1e3))
    params = jnp.zeros(2, jnp.float16)
    loss = lambda p: jnp.sum(p.astype(jnp.float32))
    step = jax.jit(lambda u: tx.update(u, tx.init(params), params, value_fn=loss)[0])
    np.testing.assert_array_equal(step(jnp.array([1.0, 100.0], jnp.float16)), [1e3, 0])
    np.testing.assert_array_equal(step(jnp.array([1.0, 10.0], jnp.float16)), [1e3, 1e4])


# --- arguments of update ------------------------------------------------------------------------


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


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gn.scale_by_grouped_newton, gn.grouped_newton])
def test_how_a_summary_is_computed_is_handed_on(make):
    """Numbers are the same, programs aren't."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    loss = lambda p: jnp.sum(jnp.sin(p["a"] * p["b"]) * p["c"])

    def program(**options):
        tx = make(groups=gn.groups.per_tensor, **options)
        return str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p, value_fn=loss)[1])(params))

    plain = program()
    assert program(method="sweep", max_stack=None) == plain
    assert len({plain, program(method="nested"), program(max_stack=2)}) == 3


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


def test_masked_params_are_refused():
    """What masking wrappers hand on; that the wrappers are refused tests/test_contract.py has."""
    masked = {"p": jnp.ones(3), "q": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"some params are optax\.MaskedNode"):
        trace_update(sum_of_squares, params=masked, state=gn.scale_by_grouped_newton().init({"p": jnp.ones(3)}))


# --- state --------------------------------------------------------------------------------------


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


def test_weak_types_from_a_rule_and_from_a_schedule_do_not_reach_the_state():
    rule = lambda summary, damping: gn.CubicSolution(jnp.broadcast_to(jnp.asarray(1.0), (4,)), 0, 0 * damping)
    assert rule(None, 1.0).eta.weak_type
    for schedule in (lambda step: step, lambda step: 1.0, lambda step: 2):
        assert_state_is_kept(gn.scale_by_grouped_newton(rates=rule, internal_damping=schedule), tanh_params())


def test_state_fields_have_names_of_their_own():
    """Optax finds fields by name in the whole state, and its wrappers use some names themselves."""
    state = gn.grouped_newton().init(tanh_params())
    fields = set(gn.GroupedNewtonState._fields)
    assert fields.isdisjoint({"value", "grad", "learning_rate", "internal_damping"})
    for name in fields - {"count"}:  # Adam counts too
        assert optax.tree.get(state, name) is getattr(only_grouped_newton(state), name)
    assert optax.tree.get(gn.scale_by_grouped_newton().init(tanh_params()), "count") == 0
