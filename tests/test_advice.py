"""Suggested rates: exact where the answer is known, free of the direction's scale, and fit for optax.partition."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import grouped_newton as gn
from grouped_newton.advice import _edge, _problem, _vertex, _Walk, _walk_on
from grouped_newton.derivatives.summary import zero_summary

ONE = gn.groups.single
SCALES = {"a": np.array([1.0, 4.0, 9.0]), "b": np.array([2.0, 5.0])}


def quadratic(params, batch):
    """Half the squared distance from the batch, stretched."""
    return sum(jnp.sum(jnp.asarray(SCALES[k], x.dtype) * (x - batch) ** 2) / 2 for k, x in params.items())


def start():
    return {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([3.0, 1.0])}


def suggest(loss=quadratic, batches=(0.0, 0.0), **options):
    options = {"groups": ONE, "direction": optax.identity(), "progress": False, "trials": False} | options
    return gn.suggest_learning_rates(loss, start(), [jnp.asarray(b) for b in batches], **options)


def expected(b_0, b_1, momentum=0.0, factor=1.8, decrease=False):
    """factor * <g, u> / <u, H u> or <g, u>^2 / (2 <u, H u>), g on the second batch and u from the first."""
    theta, stretch = (np.concatenate([x[k] for k in "ab"]) for x in (jax.tree.map(np.asarray, start()), SCALES))
    u = stretch * (theta - b_0) + 0.9 * momentum
    slope, curvature = (stretch * (theta - b_1)) @ u, u @ (stretch * u)
    return slope**2 / curvature / 2 if decrease else factor * slope / curvature


@pytest.mark.parametrize(("double", "batches"), [(True, (0.0, 0.0)), (False, (0.25, -0.5))])
def test_two_batches_of_a_quadratic_give_its_edge(double, batches):
    """With noise, the slope is that of the second batch. The peak falls with the cube root of the run's length."""
    with jax.enable_x64(double):
        found = suggest(batches=batches, steps=24_000)
    assert math.isclose(found.edge, expected(*batches), rel_tol=1e-14 if double else 1e-5)
    assert math.isclose(found.peak, found.edge / 2)
    assert math.isclose(found.rates[0], found.peak, rel_tol=1e-6)
    assert found.low == found.high
    assert math.isclose(found.decrease[0], expected(*batches, decrease=True), rel_tol=1e-14 if double else 1e-5)
    assert (found.summaries, found.gradients, found.trials) == (1, 1, {})


def test_a_step_off_a_cliff_is_not_taken():
    """From 1 the greedy step leads to 0, behind the wall at 0.2: measured again from 1."""
    cliff = lambda params, batch: jnp.sum(params["w"] ** 2 / 2 + 1e3 * jnp.maximum(0.2 - params["w"], 0) ** 2)
    options = {"direction": optax.identity(), "trials": False, "progress": False}
    found = gn.suggest_learning_rates(cliff, {"w": jnp.ones(1)}, [0.0, 0.0, 0.0], groups=ONE, **options)
    assert math.isclose(found.edge, 1.8, rel_tol=1e-6)


def test_a_batch_without_curvature_does_not_outweigh_the_others():
    """Slopes a b, curvatures 1, 1 and 1e-6: over their own sizes the last batch's alone would count, and rise."""
    slopes, curvatures = np.array([1.0, 1.0, -0.1]), np.array([1.0, 1.0, 1e-6])
    n = len(slopes)
    summaries = gn.Summary(np.ones(n), slopes[:, None], curvatures[:, None, None], np.zeros((n, 1)))
    edge, _ = _edge(1.8, summaries)
    assert math.isclose(edge[0], 1.8 * 1.9 / 2.000001, rel_tol=1e-5)


def test_a_batch_without_curvature_does_not_stop_the_walk():
    """Over their own sizes the slopes 1 and -0.3 / 1e-6 have a negative mean: the rate of 1 would fall to a third."""
    change = lambda w: w - jax.lax.stop_gradient(w)
    loss = lambda params, batch: jnp.sum(batch[0] * params["w"] + batch[1] * change(params["w"]) ** 2 / 2)
    params, constant = {"w": jnp.zeros(1)}, optax.stateless(lambda updates, params: {"w": jnp.ones(1)})
    problem, number = _problem(loss, params, ONE, constant, 1.8), jnp.zeros(())
    walk = _Walk(params, constant.init(params), number, zero_summary(1, jnp.float32), number, number)
    rates = []
    for unseen in ((1.0, 1.0), (-0.3, 1e-6)):
        walk, _, _ = _walk_on(problem, walk, jnp.ones(2), jnp.asarray(unseen))
        rates.append(float(walk.rate))
    assert np.allclose(rates, [1.0, (1 - 0.6) / 1], rtol=1e-5)


def test_the_batches_whose_numbers_are_not_finite_are_named():
    bad = [0.0, math.nan, *8 * [0.0]]
    with pytest.raises(ValueError, match=r"aren't finite on batches 0 and 1 \(from 0\), after 0 steps"):
        suggest(batches=bad)
    with pytest.raises(ValueError, match="finite on batches 7 and 8"):
        suggest(batches=bad[::-1])


def test_a_best_trial_at_the_end_is_said_to_be_there():
    found = suggest(trials=True)
    beyond = dataclasses.replace(found, trials={0.1: 2.0, 0.3: 3.0})
    assert ("may lie beyond" in str(found), "may lie beyond" in str(beyond)) == (False, True)


def test_a_group_whose_slope_is_lost_in_noise_has_the_single_rate():
    """On the second batch the loss rises along the direction of b; along that of a it is 1.8 over the curvature."""
    loss = lambda params, batch: quadratic({"a": params["a"]}, 0.0) + quadratic({"b": params["b"]}, batch)
    found = suggest(loss, (0.0, 3.2), groups=gn.groups.per_tensor)
    u = SCALES["a"] * np.asarray(start()["a"])
    assert math.isclose(found.by_group["a"], 1.8 * (u @ u) / (u @ (SCALES["a"] * u)), rel_tol=1e-5)
    assert found.by_group["b"] == np.float32(found.peak)
    assert found.low.tolist() == [found.by_group["a"], 0]
    assert str(found).count("lost in noise") == 1


def test_the_state_of_the_direction_is_where_it_goes_on(x64):
    state = optax.TraceState(jax.tree.map(jnp.ones_like, start()))
    found = suggest(direction=optax.trace(0.9), state=state, factor=1.0)
    assert math.isclose(found.peak, expected(0.0, 0.0, momentum=1.0, factor=1.0), rel_tol=1e-12)


def net(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["w"])
    return jnp.mean((hidden @ params["out"]["w"] + params["out"]["b"][None] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def noisy():
    """A small net with its batches, and what is suggested for a group a module, one of them frozen."""
    rng = np.random.default_rng(0)
    w = {"hidden": {"w": rng.normal(size=(3, 4))}, "out": {"w": rng.normal(size=(4, 1)), "b": np.zeros(1)}}
    params = jax.tree.map(jnp.float32, {**w, "unused": {"w": np.ones(2)}})
    x = rng.normal(size=(16, 64, 3)).astype(np.float32)
    noise = rng.normal(size=(16, 64, 1)).astype(np.float32)
    batches = [{"x": a, "y": np.sin(2 * a[:, :1]) + 0.1 * b} for a, b in zip(x, noise, strict=True)]
    groups = gn.groups.by_path({"^hidden": "hidden", "^out": "out", "^unused": gn.groups.FROZEN})
    before = jax.tree.map(np.asarray, params)

    def found(loss=net, direction=None):
        options = {"groups": groups, "direction": direction, "progress": False}
        return gn.suggest_learning_rates(loss, params, batches, **options)

    suggested = found()
    jax.tree.map(np.testing.assert_array_equal, before, params)
    return params, batches, found, suggested


def test_a_group_has_its_name_its_rate_and_a_range_about_it(noisy):
    *_, found = noisy
    assert found.names == ("hidden", "out")
    assert found.by_group == dict(zip(found.names, found.rates.tolist(), strict=True))
    assert np.all(found.rates > 0)
    assert found.low.max() > 0
    assert np.all(found.low < found.high)
    assert np.all((found.low == 0) | ((found.low <= found.rates) & (found.rates <= found.high)))
    assert found.peak_low < found.peak < found.peak_high
    assert min(found.decrease) > 0
    assert 0 < found.slope_error < 1
    assert found.summaries == 15 + 8
    assert found.gradients == 15 + 8 + 16 * len(found.trials)


def test_the_peak_is_beside_the_best_trial(noisy):
    *_, found = noisy
    rates, losses = map(np.array, zip(*found.trials.items(), strict=True))
    assert np.allclose(rates[1:] / rates[:-1], 3)
    best = losses.argmin()
    assert 0 < best < len(losses) - 1 or len(losses) > 4
    assert abs(math.log(found.peak / rates[best], 3)) <= 0.5
    assert any(math.isclose(rate, found.edge) for rate in rates)


def test_rates_do_not_depend_on_the_units_of_loss_and_direction(noisy):
    """Adam's direction has no unit, so that the loss's factor of 4 is only in the decrease."""
    _, _, suggested, plain = noisy
    halved = optax.chain(optax.scale_by_adam(0.9, 0.999), optax.scale(0.5))
    other = suggested(loss=lambda p, b: 4 * net(p, b), direction=halved)
    np.testing.assert_allclose(other.rates, 2 * plain.rates, rtol=1e-2)
    assert math.isclose(other.peak, 2 * plain.peak, rel_tol=1e-2)
    assert math.isclose(other.decrease[1], 4 * plain.decrease[1], rel_tol=1e-2)
    assert math.isclose(other.slope_error, plain.slope_error, rel_tol=1e-2)


def test_a_partition_of_the_readers_own_optimizer_trains(noisy):
    params, batches, _, found = noisy
    tx = optax.partition(found.transforms(lambda rate: optax.adamw(rate)), found.labels)
    state, theta = tx.init(params), params

    @jax.jit
    def step(theta, state, batch):
        value, grads = jax.value_and_grad(net)(theta, batch)
        updates, state = tx.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state, value

    losses = []
    for batch in 3 * batches:
        theta, state, value = step(theta, state, batch)
        losses.append(float(value))
    assert np.mean(losses[-16:]) < 0.5 * np.mean(losses[:4])
    assert np.array_equal(theta["unused"]["w"], params["unused"]["w"])


def test_it_prints_as_a_table_and_draws_itself(noisy):
    *_, found = noisy
    text = str(found)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert f"{found.peak:.2g}" in rows["one rate"]
    assert f"{found.rates[1]:.2g}" in rows["out"]
    assert "3000 steps" in text
    assert f"over {50} steps" in str(dataclasses.replace(found, steps=50))
    ax = found.plot(Figure().subplots())
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["hidden", "out"]
    dots = ax.collections[-1].get_offsets()
    assert dots[:, 0].tolist() == found.rates.tolist()
    assert [found.peak] * 2 in [list(line.get_xdata()) for line in ax.lines]


@pytest.mark.parametrize(
    ("left", "right", "vertex"),
    [(1.0, 1.0, 0.0), (3.0, 1.0, 0.25), (0.0, 1.0, -0.5), (math.inf, 1.0, 0.5), (1.0, math.inf, -0.5), (0.0, 0.0, 0.0)],
)
def test_the_vertex_of_a_parabola_is_within_half_a_spacing(left, right, vertex):
    assert _vertex(left, right) == vertex


def not_a_number(params, batch):
    return jnp.nan * quadratic(params, batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": [0.0]}, ValueError, "at least 2 batches, better 50 to 100, got 1"),
        ({"direction": optax.sgd(0.1)}, ValueError, r"leads uphill.*not optax.adam\(1e-3\)"),
        ({"loss": not_a_number}, ValueError, "the loss of the params on the first batch is nan"),
        ({"loss": lambda p, b: (quadratic(p, b), 1)}, TypeError, r"loss_fn must return.*\[0\]"),
        ({"loss": lambda p, b: jnp.sum(p["b"])}, ValueError, "no rate was found"),
        ({"direction": 1e-3}, TypeError, "must be an optax.GradientTransformation"),
        ({"factor": 2.5}, ValueError, "factor must be in"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"groups": gn.groups.by_path({"": gn.groups.FROZEN})}, ValueError, "all 2 parameters are frozen"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        suggest(**options)


def test_a_leaf_may_hold_a_group_a_layer():
    """Its rates are those of the same numbers in leaves of their own; optax.partition can't have them."""
    grouping = gn.groups.stacked("^a", others=gn.groups.by_path({"b": "b"}))
    found = suggest(batches=(0.0, 0.5, -0.5, 0.25), groups=grouping)
    assert found.names == ("a/0", "a/1", "a/2", "b")
    of_list = lambda params, batch: quadratic({"a": jnp.stack(params["a"]), "b": params["b"]}, batch)
    params = {"a": list(start()["a"]), "b": start()["b"]}
    options = {"direction": optax.identity(), "progress": False, "trials": False}
    batches = [jnp.asarray(b) for b in (0.0, 0.5, -0.5, 0.25)]
    labels = {"a": ["a/0", "a/1", "a/2"], "b": "b"}
    expected = gn.suggest_learning_rates(of_list, params, batches, groups=labels, **options)
    np.testing.assert_allclose(found.rates, expected.rates, rtol=1e-5)
    assert isinstance(expected.transforms(), dict)
    with pytest.raises(ValueError, match=r"several of the groups a/0, a/1, a/2, b, .* groups\.by_path"):
        found.transforms()
