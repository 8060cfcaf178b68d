import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import grouped_newton as gn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import tasks
import training

TWO = ("digits mlp", "sine regression")
FEW = {name: training.OPTIMIZERS[name] for name in ("adam", "schedule-free adamw", "grouped_newton")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "results.jsonl"
    training.sweep(TWO, FEW, [0], path, steps=30, checkpoints=3)
    training.time_steps(TWO[:1], FEW, path, rounds=1, steps=10)
    return path


def test_every_run_is_kept_once(results):
    records = training.read([results])
    training.sweep(TWO, FEW, [0], results, steps=30, checkpoints=3)
    training.time_steps(TWO[:1], FEW, results, rounds=1, steps=10)
    assert training.read([results]) == records
    settings = sum(len(grid) for _, grid in FEW.values())
    assert len([r for r in records if r["kind"] == "run"]) == len(TWO) * settings


def test_runs_begin_alike_and_ours_descends(results):
    runs = [r for r in training.read([results]) if r["kind"] == "run"]
    for name in TWO:
        starts = {r["train"][0] for r in runs if r["task"] == name and r["optimizer"] != "schedule-free adamw"}
        assert len(starts) == 1
        (ours,) = (r for r in runs if r["task"] == name and r["optimizer"] == "grouped_newton")
        assert ours["at"] == [0, 10, 20, 30]
        assert ours["train"][-1] < 0.7 * ours["train"][0]
        assert not ours["diverged"]


def test_a_step_of_gradient_descent_is_that_on_its_batch():
    task, rate = tasks.load("sine regression"), 0.1
    start = task.init(jax.random.key(3))
    gradient = jax.jit(jax.grad(task.loss))(start, task.train)
    (params, _, count), _ = _after_one_step(task, optax.sgd, {"learning_rate": rate}, 3)
    expected = jax.tree.map(lambda p, g: p - rate * g, start, gradient)
    assert int(count) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)


def test_the_curvature_batch_is_another_than_the_gradients():
    def two_losses():
        def update(grads, state, params=None, *, value, value_fn, **_):
            return jax.tree.map(lambda g: 0 * g, grads), (value, value_fn(params))

        return optax.GradientTransformationExtraArgs(lambda params: (0.0, 0.0), update)

    for name, same in (("digits mlp", False), ("sine regression", True)):
        (_, (value, other), _), _ = _after_one_step(tasks.load(name), two_losses, {}, 0)
        assert bool(abs(value - other) < 1e-6 * abs(value)) == same


def test_a_run_that_explodes_says_so_and_stops():
    record = training.run(tasks.load("sine regression"), optax.sgd, {"learning_rate": 1e6}, 0, steps=60, checkpoints=6)
    assert record["diverged"]
    assert record["train"][-1] is None
    assert len(record["train"]) == len(record["test"]) == len(record["at"]) == 7


def test_curves_are_read_log_linearly_and_a_loss_that_is_not_finite_as_the_first():
    record = {"steps": 20, "at": [0, 10, 20], "train": [1.0, 0.01, None]}
    expected = {0.0: 1.0, 0.25: 0.1, 0.5: 0.01, 1.0: 1.0}
    for share, loss in expected.items():
        assert training.loss_at(record, share) == pytest.approx(loss, rel=0.02)  # of the offset


def test_report_compares_with_the_best_adam(results, tmp_path):
    found = training.Results([results])
    name = "sine regression"
    final = {h: training.loss_at(r) for (h, _), r in found.runs[name, "adam"].items()}
    ours = training.loss_at(next(iter(found.runs[name, "grouped_newton"].values())))
    assert found.ratio(name, "grouped_newton") == pytest.approx(ours / min(final.values()), rel=1e-9)
    assert found.ratio(name, "grouped_newton", clock=True) is None
    # A slower optimizer is cut short.
    found.slowdown[name, "grouped_newton"] = 3.0
    after_ten = next(iter(found.runs[name, "grouped_newton"].values()))["train"][1] + training.OFFSET
    expected = after_ten / min(final.values())
    assert found.ratio(name, "grouped_newton", clock=True) == pytest.approx(expected, rel=1e-6)
    assert name in training.table(found)
    assert "grouped_newton" in training.slowdowns(found)
    pytest.importorskip("matplotlib").use("agg")
    training.draw(found, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_module_is_a_group_in_every_small_net():
    for name, groups in (("digits mlp", 3), ("conv net, batch norm", 4), ("mixed scales", 4)):
        params = jax.eval_shape(tasks.load(name).init, jax.random.key(0))
        assert len(gn.groups.names(gn.groups.per_module, params)) == groups


def test_purposes_divide_the_tasks():
    assert len({*tasks.CHOOSING, *tasks.REPORTING}) == len(tasks.CHOOSING) + len(tasks.REPORTING) >= 16


def _after_one_step(task, make, hypers, seed):
    carry, step = training.prepare(task, make, hypers, seed)
    return step(carry), step
