"""On every model of the benchmarks, made small: the sweep is the definition, and finite differences of the loss."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import uncompiled
from scripts import imported

import grouped_newton as gn
from grouped_newton.groups import resolve

EPS32, EPS64 = 2.0**-23, 2.0**-52
POOL = "pool"

SIZES = {
    "mlp": {"widths": (7, 9, 6, 5, 4), "batch": 8},
    "mlp, a group a layer": {"widths": (7, 9, 6, 5, 4), "batch": 8},
    "lenet": {"channels": (2, 3, 5, 4), "size": 16, "batch": 3},
    "mlp 20 x 1024": {"widths": (7, *[6] * 7, 4), "batch": 8},
    "vgg-11": {"plan": (2, POOL, 3, 3, POOL, 4, 4, POOL), "size": 8, "batch": 3},
    "transformer, 4 blocks": {"layers": 2, "d": 8, "heads": 2, "vocabulary": 7, "batch": 2, "length": 4},
    "transformer, 4 scanned": {"layers": 2, "d": 8, "heads": 2, "vocabulary": 7, "batch": 2, "length": 4},
    "transformer, 12 scanned": {"layers": 2, "d": 8, "heads": 2, "vocabulary": 7, "batch": 2, "length": 4},
    "resnet-18, batch norm": {"channels": (2, 3), "size": 8, "batch": 3},
}
# Made small, these are another one again, but for its groups, or have no layer that another one lacks.
SAME = ("mlp, a group a layer", "transformer, 12 scanned", "vgg-11")


models, costs = imported("models", "summary")


def small(name):
    """A model, and its gradient with every array of length one."""
    model = models.MODELS[name](**SIZES[name])
    gradient = uncompiled(jax.grad(model.loss))(model.params)
    return model, jax.tree.map(lambda g: g / jnp.linalg.norm(g), gradient)


def jit(f):
    """Compiled without LLVM's optimisations, which take longer here than everything else."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def swept(name, double):
    with jax.enable_x64(double):
        model, direction = small(name)
        return jax.tree.map(np.asarray, uncompiled(costs.summary(model))(model.params, direction))


def assert_same(found, expected, tol):
    """To ``tol`` of the largest slope, of the largest curvatures in the same row and column, of the largest third."""
    top = np.sqrt(np.max(np.abs(expected.hbar), axis=1))
    scales = (np.abs(expected.loss), np.max(np.abs(expected.gbar)), np.outer(top, top), np.max(np.abs(expected.third)))
    for field, a, b, scale in zip(expected._fields, found, expected, scales, strict=True):
        error = np.max(np.abs(a - b) / scale)
        assert error <= tol, f"{field} is off by {error:.1e}"


def jets(model, direction, along, at):
    """phi(t v) and its first three derivatives in t, by nested jvps; for pairs of v in ``along`` and t in ``at``."""
    partition = resolve(model.groups, model.params)
    d = lambda f: lambda t: jax.jvp(f, (t,), (1.0,))  # and f itself

    def jet(v, t):
        phi = lambda t: model.loss(jax.tree.map(jnp.subtract, model.params, partition.scale(t * v, direction)))
        ((value, first), (_, second)), (_, (_, third)) = d(d(d(phi)))(t)
        return jnp.stack([value, first, second, third])

    return uncompiled(jax.vmap(jet))(along, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIZES if name not in SAME])
def test_the_sweep_is_the_definition_and_finite_differences(x64, name):
    model, direction = small(name)
    found = swept(name, True)
    assert found.hbar.dtype == jnp.float64
    S = len(found.gbar)
    e, pairs = np.eye(S), list(itertools.combinations(range(S), 2))
    some = np.concatenate([e, np.random.default_rng(0).choice([-1.0, 1.0], (6, S)) / np.sqrt(S)])
    h = 1e-6  # so small that no kink of relu, of max-pooling or of the derivative of elu is met
    steps = h * np.array([-2, -1, 1, 2])
    along = np.concatenate([some, *(e[s : s + 1] + e[t] for s, t in pairs), np.repeat(some, len(steps), axis=0)])
    at = np.concatenate([np.zeros(len(some) + len(pairs)), np.tile(steps, len(some))])
    here, around = np.split(jets(model, direction, along, at), [len(some) + len(pairs)])

    phi, first, second, third = here[: len(some)].T
    hbar = np.diag(second[:S])
    for (s, t), along_both in zip(pairs, here[len(some) :, 2], strict=True):
        hbar[s, t] = hbar[t, s] = (along_both - second[s] - second[t]) / 2
    # Two orders of summation, some thousand terms.
    assert_same(found, gn.Summary(phi[0], -first[:S], hbar, -third[:S]), 4096 * EPS64)

    # Each derivative against differences of the one before, in whose values some hundred eps are lost.
    differences = np.einsum("p,vpk->kv", np.array([1, -8, 8, -1]) / (12 * h), around.reshape(len(some), len(steps), 4))
    from_sweep = -some @ found.gbar, np.einsum("vs,st,vt->v", some, found.hbar, some), -found.third
    for k, got in enumerate(from_sweep):
        rounding = 256 * EPS64 / h * np.max(np.abs(here[:, k]))
        np.testing.assert_allclose(got, differences[k, : len(got)], rtol=0, atol=rounding, err_msg=f"order {k + 1}")
        assert rounding < 1e-5 * np.max(np.abs(got)), "the differences are too coarse to show anything"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "transformer, 4 scanned"])
def test_the_sweep_in_single_precision_is_that_in_double_to_rounding(name):
    """Convolutions have this in tests/derivatives/test_sweep.py."""
    found = swept(name, False)
    assert found.hbar.dtype == jnp.float32
    assert_same(found, swept(name, True), 64 * EPS32)


def test_no_model_is_left_out():
    assert list(SIZES) == list(models.MODELS)


def test_the_table_of_costs_has_a_figure_for_every_method(monkeypatch, capsys):
    tiny = functools.partial(models.mlp, widths=(60, 128, 10), groups=gn.groups.per_module, batch=64)
    monkeypatch.setattr(costs, "MODELS", {"tiny": tiny})
    rows = []
    for options in ([], ["--limit", "0"]):
        monkeypatch.setattr(sys, "argv", ["summary.py", "--seconds", "0", "--batch", "40", *options])
        costs.main()
        header, _, row = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
        rows.append(dict(zip(header, row, strict=True)))
    everything, nothing = rows
    assert (everything["model"], everything["S"]) == ("tiny", "2")
    for method in costs.METHODS:
        assert float(everything[method]) > 0
        assert nothing[method] == "–"


def test_multiplications_are_those_of_the_products_that_count():
    model = models.mlp((60, 128, 10), gn.groups.per_module, batch=40)
    found = costs.multiplications(jax.value_and_grad(model.loss), (model.params,))
    # The first layer, its weight's gradient, the adjoint of its output; other products have less than 64 x 64 results.
    assert found == 40 * 60 * 128 * 2 + 40 * 128 * 10
