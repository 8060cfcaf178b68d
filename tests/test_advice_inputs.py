"""Suggested rates whatever holds the params, the state and the batches: the same numbers, or an error that says why."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import grouped_newton as gn
from grouped_newton.advice import _bar
from grouped_newton.groups import FROZEN

MOMENTUM = optax.trace(0.9)
W = np.array([[3.0], [-1.0], [2.0]], np.float32)


def mean_square(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


def of_dict(params, batch):
    return mean_square(batch[0] @ params["kernel"] + params["bias"][None], batch)


@functools.cache
def problem():
    """Params and two batches."""
    x = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
    return {"kernel": jnp.asarray(W), "bias": jnp.zeros(1)}, [(jnp.asarray(a), jnp.sin(a[:, :1])) for a in x]


def suggest(loss, params, batches, **options):
    options = {"groups": gn.groups.per_tensor, "trials": False, "progress": False} | options
    return gn.suggest_learning_rates(loss, params, batches, **options)


@functools.cache
def expected():
    """With momentum that has gone over the first batch, from the params all the same."""
    params, batches = problem()
    momentum = optax.TraceState(jax.grad(of_dict)(params, batches[0]))
    return suggest(of_dict, params, batches, direction=MOMENTUM, state=momentum)


def assert_as_expected(found, eps=2.0**-23):
    assert (found.names, found.rates.dtype) == (("bias", "kernel"), np.float32)
    np.testing.assert_allclose(found.rates, expected().rates, rtol=64 * eps)
    np.testing.assert_allclose(found.high, expected().high, rtol=64 * eps)


def test_an_nnx_model_with_the_state_of_its_optimizer_and_a_jitted_loss():
    params, batches = problem()
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.State(jax.tree.map(nnx.Param, params)))
    graphdef, begin, rest = nnx.split(model, nnx.Param, ...)
    loss = jax.jit(lambda p, batch: mean_square(nnx.merge(graphdef, p, rest)(batch[0]), batch))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    grads = jax.grad(loss)(begin, batches[0])
    optimizer.update(nnx.clone(model), grads)
    found = suggest(loss, begin, batches, direction=MOMENTUM, state=optimizer.opt_state[0])
    assert_as_expected(found)
    # The labels and transforms are those that its optimizer takes.
    tx = optax.partition(found.transforms(optax.sgd), found.labels)
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads)
    for rate, name in zip(found.rates, found.names, strict=True):
        moved = params[name] - nnx.state(model, nnx.Param)[name][...]
        np.testing.assert_allclose(moved, rate * grads[name][...], rtol=1e-3, atol=1e-6)


def test_an_equinox_module_without_its_other_leaves():
    eqx = pytest.importorskip("equinox")
    params, batches = problem()
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.bias), model, (params["kernel"].T, params["bias"]))
    begin, rest = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda p, batch: mean_square(jax.vmap(eqx.combine(p, rest))(batch[0]), batch)
    grads = jax.grad(loss)(begin, batches[0])
    found = suggest(loss, begin, batches, direction=MOMENTUM, state=optax.TraceState(grads))
    assert found.by_group == pytest.approx({"weight": expected().rates[1], "bias": expected().rates[0]}, rel=1e-5)
    assert jax.tree.leaves(found.labels) == ["weight", "bias"]


def test_float32_params_have_float32_rates_with_x64_on():
    params, batches = problem()
    with jax.enable_x64(True):
        momentum = optax.TraceState(jax.grad(of_dict)(params, batches[0]))
        assert_as_expected(suggest(of_dict, params, batches, direction=MOMENTUM, state=momentum))


def test_half_precision_under_strict_promotion():
    """Params, activations and the state in bfloat16; walk and trials alike."""
    params, batches = problem()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss(params, batch):
        return mean_square(of(params, batch[0].astype(jnp.bfloat16)).astype(jnp.float32), batch)

    of = lambda params, x: x @ params["kernel"] + params["bias"][None]
    with jax.numpy_dtype_promotion("strict"):
        adam = optax.scale_by_adam().init(half)
        found = suggest(loss, half, batches, state=adam, groups=gn.groups.single, trials=True)
    assert found.rates.dtype == np.float32
    # Adam's first direction is the gradient's sign, up to rounding.
    assert found.edge == pytest.approx(edge_along_the_sign(), rel=0.02)
    assert np.isfinite([*found.trials.values()]).all()


def edge_along_the_sign():
    """1.8 <g, u> / <u, H u> on the second batch, u the sign of the first one's gradient."""
    params, (seen, (x, y)) = problem()
    u = jax.tree.map(np.sign, jax.grad(of_dict)(params, seen))
    error, moved = x @ params["kernel"] - y, x @ u["kernel"] + u["bias"][None]
    return 1.8 * float(jnp.mean(error * moved) / jnp.mean(moved**2))


def test_a_state_of_all_params_goes_on_without_the_frozen_ones():
    """By hand: half the squared distance from the batch, in one number that is 1, times 1.8."""
    params = {"a": jnp.array(1.0), "b": jnp.array(5.0), "steps": jnp.array(3)}
    loss = lambda p, batch: (p["a"] - batch) ** 2 / 2 + p["b"] ** 2
    groups = {"a": "a", "b": FROZEN, "steps": FROZEN}
    state = optax.TraceState({"a": jnp.array(2.0), "b": jnp.array(7.0), "steps": jnp.array(0)})
    found = suggest(loss, params, [0.0, 0.0], groups=groups, direction=MOMENTUM, state=state)
    assert found.peak == pytest.approx(1.8 / (1 + 0.9 * 2))
    assert found.labels == groups
    assert set(found.transforms()) == {"a", FROZEN}


class Bar:
    """What tqdm's bar has, and the totals that it had."""

    def __init__(self, total, **_):
        self.total, self.n, self.totals, self.closed = total, 0, [total], False
        bars.append(self)

    def update(self):
        self.n += 1
        self.totals.append(self.total)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


bars: list[Bar] = []


def test_batches_of_a_generator_move_a_bar(monkeypatch):
    """From a twentieth of the best rate there are more trials than three, and the bar becomes longer."""
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    bars.clear()
    left = (jnp.asarray(float(k)) for k in range(10))
    loss = lambda p, batch: (p["w"] - 100 + batch / 10) ** 2 / 2
    options = {"groups": gn.groups.single, "direction": optax.identity(), "trials": True, "factor": 0.05}
    found = suggest(loss, {"w": jnp.array(0.0)}, left, progress=True, max_batches=6, **options)
    assert (float(next(left)), found.summaries) == (6, 5)
    assert len(found.trials) > 3
    (bar,) = bars
    assert bar.closed
    assert bar.totals[0] == 5 + 3 * 6
    assert bar.totals[-1] == bar.total == bar.n == found.summaries + 6 * len(found.trials)


@pytest.mark.parametrize(("there", "progress"), [(False, True), (True, False)])
def test_without_tqdm_or_the_wish_there_is_no_bar(monkeypatch, capfd, there, progress):
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar) if there else None)
    bars.clear()
    with _bar(progress, 4, trials=True) as bar:
        bar.update()
    assert not bars
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (lambda b: [*b, {"x": b[0]}], {}, ValueError, r"all batches must be alike, got .*'x'.* as batch 2"),
        (lambda b: [b[0]] * 3, {"max_batches": 1}, ValueError, "at least 2 batches"),
        (
            lambda b: b,
            {"state": optax.adamw(optax.constant_schedule(0.1))},
            ValueError,
            "5 arrays of their shapes, got 6 .*opt_state",
        ),
        (lambda b: b, {"state": optax.trace(0.9)}, ValueError, "5 arrays of their shapes, got 2 arrays"),
    ],
)
def test_batches_and_states_that_do_not_fit_are_named(batches, options, error, message):
    params, given = problem()
    if "state" in options:
        options = {"state": options["state"].init(params)}
    with pytest.raises(error, match=message):
        suggest(of_dict, params, batches(given), **options)
