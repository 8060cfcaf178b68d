"""Random small programs: the sweep is the definition, its slopes are the gradient's, and both are finite differences.

grammar.py draws the programs, one for each seed. Everything about one is traced and then evaluated by NumPy, see
interpreter.py: to compile it takes several times as long. Thousands of others:

  FUZZ=2000 FUZZ_SEED=1000 python -m pytest tests/test_fuzz.py -k random
"""

import collections
import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grammar import LOOPS, example
from interpreter import run
from numpy.polynomial import chebyshev

import grouped_newton as gn

pytestmark = pytest.mark.usefixtures("x64")

FIRST, PROGRAMS = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ", "200"))
CHUNK = 25
DEGREE = 11  # of the polynomials that stand for finite differences of every order
LARGE = 1e6  # numbers above are noise
OLD = jax.__version_info__ < (0, 12)  # docs/refused.md: reverse mode, then forward, loses the rules in a scan


def check(example):
    """Compares everything on one program; says how far that went."""
    params, direction, loss, options = example.params, example.direction, example.loss, example.options
    index = gn.groups.resolve(example.grouping, params).index
    order = options.get("order", 3)

    def everything(p):
        products = [jnp.vdot(d, u) for d, u in zip(jax.grad(loss)(p), direction, strict=True)]
        slopes = [sum(d for g, d in zip(index, products, strict=True) if g == s) for s in range(max(index) + 1)]
        sweep = gn.summarize(loss, p, direction, example.grouping, **options)
        return (
            jnp.stack(slopes),
            sweep,
            gn.summarize(loss, p, direction, example.grouping, method="nested", order=order),
        )

    closed, shape = jax.make_jaxpr(everything, return_shape=True)(params)
    slopes, sweep, nested = jax.tree.unflatten(jax.tree.structure(shape), run(closed, *params))
    if not all(np.all(np.abs(x) < LARGE) for x in nested):
        return "large"
    tol = 1e-3 if "in single precision" in example.program.holds else 1e-9
    assert_close("slopes", sweep.gbar, slopes, tol)
    lost = OLD and not example.program.exact and example.program.holds & LOOPS
    for name, a, b in zip(sweep._fields, sweep, nested, strict=True):
        if not (lost and name == "hbar"):
            assert_close(name, a, b, tol)
    return compared_with_differences(example, index, sweep) if example.program.exact else "with the definition"


def assert_close(name, got, expected, tol, size=1e-3):
    size = np.max(np.abs(expected), initial=size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * size, err_msg=name)


def compared_with_differences(example, index, summary):
    """Derivatives of a polynomial through values of the loss, along every group and along all at once."""
    value = jax.make_jaxpr(example.loss)(example.params)
    S = len(summary.gbar)
    for s, eta in enumerate([*np.eye(S), np.cos(np.arange(S) + 1.0)]):
        fit, radius = polynomial(value, example, [0.0 if g < 0 else eta[g] for g in index])
        size = np.max(np.abs(fit))
        if not np.max(np.abs(fit[-3:])) < 1e-12 * size:  # or else it is no polynomial, nor near one
            return "near a kink"
        first, second, third = (chebyshev.chebval(0, chebyshev.chebder(fit, k)) / radius**k for k in (1, 2, 3))
        assert_close(f"slope along {eta}", -summary.gbar @ eta, first, 1e-8, size)
        assert_close(f"curvature along {eta}", eta @ summary.hbar @ eta, second, 1e-7, size)
        if s < S and example.options.get("order", 3) == 3:
            assert_close(f"third derivative of {s}", -summary.third[s], third, 1e-5, size)
    return "with differences"


def polynomial(value, example, eta):
    """The loss at params - t radius eta direction, t from -1 to 1, in Chebyshev's basis; and the radius."""
    radius = 0.05 / max(np.max(np.abs(u)) for u in example.direction)
    at = lambda t: [p - t * radius * e * u for p, e, u in zip(example.params, eta, example.direction, strict=True)]
    nodes = np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))
    return chebyshev.chebfit(nodes, [run(value, *at(t))[0] for t in nodes], DEGREE), radius


def end_of(seed):
    drawn = example(seed)
    try:
        return check(drawn)
    except Exception as error:
        if OLD and isinstance(error, TypeError) and "to a custom_vjp" in str(error):
            return "refused"
        error.add_note(f"seed {seed}: {drawn}")
        raise


@pytest.fixture
def no_collection():
    """Tracing makes many small objects: looking for garbage among them takes a quarter of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("first", range(FIRST, FIRST + PROGRAMS, CHUNK))
def test_random_programs(first, no_collection):
    seeds = range(first, min(first + CHUNK, FIRST + PROGRAMS))
    ends = collections.Counter(map(end_of, seeds))
    print(dict(ends))
    compared = ends["with differences"] + ends["with the definition"]
    assert compared >= 0.6 * len(seeds), f"the grammar is to draw programs that can be compared, got {dict(ends)}"


def test_the_interpreter_agrees_with_compiled_programs():
    examples = [example(seed) for seed in range(12)]
    gradients = [jax.value_and_grad(e.loss) for e in examples]
    compiled = jax.jit(lambda every: [f(p) for f, p in zip(gradients, every, strict=True)])(
        [e.params for e in examples]
    )
    for f, e, expected in zip(gradients, examples, compiled, strict=True):
        got = run(jax.make_jaxpr(f)(e.params), *e.params)
        for a, b in zip(got, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=str(e))
