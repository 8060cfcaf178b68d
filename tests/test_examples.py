"""Every example, found by glob, runs as a script with its shortest setting and refuses bad options."""

import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import optax
import pytest
from flax import nnx

import grouped_newton as gn

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def run_example(request, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [request.param.name, *map(str, arguments)])
        return runpy.run_path(str(request.param), run_name="__main__")

    return run


@pytest.mark.slow
def test_a_short_run_prints_a_table_and_writes_a_picture(run_example, tmp_path, capsys):
    picture = tmp_path / "new folder" / "picture.png"
    run_example("--steps", 12, "--seed", 1, "--out", picture)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("SGD", "Adam", "grouped_newton"))]
    assert [row[0] for row in rows] == ["SGD", "AdamW", "Adam", "grouped_newton"]
    # Losses near or below that of guessing, ln 10.
    assert all(0 < float(loss) < 2.6 for row in rows for loss in row[-5:-3])
    image = matplotlib.image.imread(picture)
    assert image.shape[0] > 400
    assert image.shape[1] > 800


def test_digits_are_evaluated_at_the_average_where_there_is_one():
    (path,) = (path for path in EXAMPLES if path.stem == "digits")
    evaluated = runpy.run_path(str(path))["evaluated"]
    tx, start, params = optax.chain(optax.sgd(0.1), gn.average_params()), jnp.array([1.0]), jnp.array([2.0])
    assert evaluated(tx.init(start), params).tolist() == [1.0]
    assert evaluated(gn.grouped_newton().init(start), params).tolist() == [1.0]
    assert evaluated(optax.adam(1e-3).init(start), params).tolist() == [2.0]


@pytest.mark.slow
def test_digits_draw_the_curvature_along_the_last_step_from_where_it_began():
    """Summed over all layers it is the second derivative along the whole direction."""
    (path,) = (path for path in EXAMPLES if path.stem == "digits")
    digits = runpy.run_path(str(path))
    train_set = tuple(x[:16] for x in digits["load_data"](0)[0])
    graphdef, origin = nnx.split(digits["Network"](nnx.Rngs(0)), nnx.Param)
    direction = jax.tree.map(jnp.cos, origin)
    state = gn.grouped_newton().init(origin)
    newton = optax.tree.get(state, "GroupedNewtonState")._replace(direction=direction)
    run = digits["Run"](*[None] * 7, [state, (newton,)])
    summary, layers = digits["last_summary"](run, train_set, 0)
    assert layers == ("conv1", "conv2", "hidden", "output")

    along = lambda t: digits["loss_of"](graphdef, jax.tree.map(lambda x, u: x + t * u, origin, direction), train_set)
    expected = jax.jvp(jax.grad(along), (0.0,), (1.0,))[1]
    assert jnp.abs(jnp.sum(summary.hbar) - expected) < 1e-3 * jnp.sum(jnp.abs(summary.hbar))


def test_help_names_every_option(run_example, capsys):
    with pytest.raises(SystemExit) as stop:
        run_example("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--steps", "--out", "--seed", "--adamw"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--adamw", "0"), "--adamw takes positive rates, got 0"),
    ],
)
def test_bad_options_are_refused_before_any_work(run_example, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_example(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
