"""Random small programs: the sweep is the definition, its slopes are the gradient's, and both are finite differences.

A program is a list of operations on a few vectors of three numbers, drawn with a seed: jax.numpy, lax and nn functions,
linear algebra, and around shorter programs scans, conds, jit, vmap, remat and custom rules. ``python tests/test_fuzz.py
2000 --seed 1`` tries as many.
"""

import argparse
import collections
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import grouped_newton as gn

N, GROUPS = 3, 3  # every vector has N numbers, every program GROUPS vectors as params


class Operation(NamedTuple):
    name: str
    arity: int
    fn: object
    smooth: bool = True  # else finite differences may cross a kink, or a rule is not the derivative


class Program(NamedTuple):
    inputs: int
    steps: list  # of operations and the numbers of the values that they read

    def __call__(self, *values):
        values = list(values)
        for operation, reads in self.steps:
            values.append(operation.fn(*(values[i] for i in reads)))
        return values[-1]

    def __str__(self):
        return ", ".join(f"{o.name}{tuple(reads)}" for o, reads in self.steps)

    @property
    def smooth(self):
        return all(o.smooth for o, _ in self.steps)


# A rule that takes the jvp of a custom_vjp: JAX itself has that in reverse mode alone.
REFUSED = re.compile(r"custom_jvp, mixing\[custom_vjp")


def positive(x):
    return 1 + x * x


def kernel(x):
    """A positive definite matrix."""
    return 2 * jnp.eye(N) + x[:, None] * x[None] / positive(jnp.sum(x * x))


UNARY = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "exp": lambda x: jnp.exp(jnp.sin(x)),
    "square": lambda x: jnp.tanh(x) ** 2,
    "reciprocal": lambda x: 1 / positive(x),
    "log": lambda x: jnp.log1p(x * x),
    "sqrt": lambda x: jnp.sqrt(positive(x)),
    "power": lambda x: positive(x) ** 0.3,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "erf": jax.scipy.special.erf,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "standardise": jax.nn.standardize,
    "logsumexp": lambda x: x - jax.nn.logsumexp(x),
    "norm": lambda x: x / jnp.linalg.norm(jnp.append(x, 1.0)),
    "cumsum": lambda x: jnp.tanh(jnp.cumsum(x)),
    "prod": lambda x: jnp.roll(x, 1) * jnp.prod(jnp.cos(x)),
    "reverse and pad": lambda x: jnp.pad(x[::-1][1:], (0, 1), constant_values=0.5),
    "gather": lambda x: x[jnp.array([2, 0, 0])],
    "scatter": lambda x: jnp.zeros(N).at[jnp.array([1, 1, 2])].add(x * x),
    "dynamic slice": lambda x: lax.dynamic_slice(jnp.concatenate([jnp.sin(x), x]), (jnp.argmax(x),), (N,)),
    "cholesky": lambda x: jnp.linalg.cholesky(kernel(x))[:, 1],
    "inverse": lambda x: jnp.linalg.inv(kernel(x))[0],
    "fft": lambda x: jnp.abs(jnp.fft.fft(x) + 3),
    "stop_gradient": lambda x: x * lax.stop_gradient(0.5),
    "einsum": lambda x: jnp.tanh(jnp.einsum("i,j,k->j", x, jnp.sin(x), x)),
}
KINKED = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "sort": lambda x: jnp.sort(x) * jnp.arange(1.0, N + 1),
    "maximum": lambda x: jnp.tanh(x) + jnp.max(x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "where": lambda x: jnp.where(x > 0.2, jnp.sin(x), x * x),
    "round": lambda x: x + jnp.round(x),
}
BINARY = {
    "add": jnp.add,
    "multiply": lambda x, y: jnp.sin(x) * y,
    "divide": lambda x, y: x / positive(y),
    "power of two": lambda x, y: positive(jnp.tanh(x)) ** jnp.tanh(y),
    "arctan2": lambda x, y: jnp.arctan2(x, positive(y)),
    "logaddexp": jnp.logaddexp,
    "matrix and vector": lambda x, y: (x[:, None] * jnp.cos(x)[None]) @ jnp.tanh(y),
    "two matrices": lambda x, y: jnp.tanh((x[:, None] * jnp.ones((1, N))) @ (y[:, None] * jnp.ones((1, N)))).sum(0),
    "solve": lambda x, y: jnp.linalg.solve(kernel(x), y),
    "triangular": lambda x, y: jax.scipy.linalg.solve_triangular(jnp.tril(kernel(x)), y, lower=True),
    "convolve": lambda x, y: jnp.convolve(x, jnp.tanh(y), "same"),
    "attention": lambda x, y: jax.nn.softmax(x[:, None] * y[None]) @ jnp.tanh(y),
    "solve by a rule": lambda x, y: lax.custom_linear_solve(
        lambda v: kernel(x) @ v, y, lambda _, b: jnp.linalg.solve(kernel(x), b), symmetric=True
    ),
}
KINKED_BINARY = {
    "larger": jnp.maximum,
    "choose": lambda x, y: jnp.where(x > y, jnp.sin(x), y),
}


# Around shorter programs. The derivatives of a function f of two vectors are those of ``rule(f)``, which are its own
# where the flag says so.


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), jax.jvp(f, primals, tangents)[1]))
    return g


def custom_jvp_for_symbolic_zeros(f):
    def rule(primals, tangents):
        zero = lambda t: jnp.zeros(t.shape, t.dtype) if isinstance(t, SymbolicZero) else t
        constant = all(isinstance(t, SymbolicZero) for t in tangents)
        dz = jnp.zeros(N) if constant else jax.jvp(f, primals, tuple(map(zero, tangents)))[1]
        return f(*primals), dz

    g = jax.custom_jvp(f)
    g.defjvp(rule, symbolic_zeros=True)
    return g


def custom_jvp_that_mixes(f):
    def rule(primals, tangents):
        dz = jax.jvp(f, primals, tangents)[1]
        return g(*primals), dz - dz.mean()

    g = jax.custom_jvp(f)
    g.defjvp(rule)
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *xs: (g(*xs), xs), lambda xs, ct: jax.vjp(f, *xs)[1](ct))
    return g


def custom_vjp_behind_stop_gradient(f):
    g = jax.custom_vjp(lambda *xs: lax.stop_gradient(f(*xs)))
    g.defvjp(lambda *xs: (lax.stop_gradient(f(*xs)), xs), lambda xs, ct: jax.vjp(f, *xs)[1](ct))
    return g


def custom_vjp_with_another_rule(f):
    """Straight through for one operand, a surrogate for the other."""
    g = jax.custom_vjp(lambda x, y: jnp.round(4 * f(x, y)) / 4)
    g.defvjp(lambda x, y: (g(x, y), (x, y)), lambda xy, ct: (ct, ct[::-1] / positive(xy[0] * xy[1])))
    return g


def scanned(f):
    return lambda x, y: lax.scan(lambda h, k: (f(h, x * k), h), y, jnp.arange(1.0, 4.0) / 4)[0]


def scanned_over(f):
    return lambda x, y: lax.scan(lambda h, xy: (jnp.tanh(h + f(x, y) * xy), h), jnp.zeros(N), jnp.stack([x, y]))[1][1]


def looped(f):
    return lambda x, y: lax.fori_loop(0, 3, lambda i, h: f(h, y) + h * i / 4, x)


def in_cond(f):
    return lambda x, y: lax.cond(jnp.sum(x) > jnp.sum(y), f, lambda x, y: f(y, jnp.sin(x)), x, y)


def in_switch(f):
    return lambda x, y: lax.switch(jnp.argmax(x), [f, lambda x, y: x * y, lambda x, y: f(y, x)], x, y)


def mapped(f):
    return lambda x, y: jax.vmap(f)(jnp.stack([x, y]), jnp.stack([y, x * x])).sum(0)


AROUND = {
    "jit": (jax.jit, True),
    "remat": (jax.checkpoint, True),
    "vmap": (mapped, True),
    "scan": (scanned, True),
    "scan over": (scanned_over, True),
    "fori_loop": (looped, True),
    "cond": (in_cond, False),
    "switch": (in_switch, False),
    "custom_jvp": (custom_jvp, True),
    "custom_jvp, symbolic zeros": (custom_jvp_for_symbolic_zeros, True),
    "custom_jvp, mixing": (custom_jvp_that_mixes, False),
    "custom_vjp": (custom_vjp, True),
    "custom_vjp, stop_gradient": (custom_vjp_behind_stop_gradient, False),
    "custom_vjp, another rule": (custom_vjp_with_another_rule, False),
}


def draw(rng, inputs, length, depth):
    steps = []
    for k in range(length):
        if depth and rng.random() < 0.3:
            name = rng.choice(list(AROUND))
            around, smooth = AROUND[name]
            inner = draw(rng, 2, rng.integers(1, 3), depth - 1)
            operation = Operation(f"{name}[{inner}]", 2, around(lambda *xs, f=inner: f(*xs)), smooth and inner.smooth)
        else:
            arity = rng.integers(1, 3)
            smooth = rng.random() < 0.9
            table = ((KINKED, UNARY), (KINKED_BINARY, BINARY))[arity - 1][int(smooth)]
            name = rng.choice(list(table))
            operation = Operation(name, arity, table[name], smooth)
        known = inputs + k
        # Mostly the newest value, so that programs are deep, and everything now and then.
        reads = [known - 1 if rng.random() < 0.5 else int(rng.integers(known)) for _ in range(operation.arity)]
        steps.append((operation, reads))
    return Program(inputs, steps)


def example(seed):
    rng = np.random.default_rng(seed)
    program = draw(rng, GROUPS, rng.integers(2, 6), depth=2)
    params = list(map(jnp.asarray, rng.normal(size=(GROUPS, N))))
    weights = jnp.asarray(rng.normal(size=N))
    loss = lambda p: jnp.sum(weights * program(*p)) + jnp.sum(jnp.sin(p[0] * p[1]))
    return program, loss, params, list(map(jnp.asarray, rng.normal(size=(GROUPS, N))))


def assert_close(name, got, expected, tol):
    size = np.max(np.abs(expected), initial=1e-3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * size, err_msg=name)


def check(seed):
    """Compares everything on one program; whether finite differences could be compared too."""
    program, loss, params, direction = example(seed)
    gradient = jax.grad(loss)(params)
    slopes = [jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True)]
    summaries = [lambda m=m: gn.summarize(loss, params, direction, method=m) for m in ("sweep", "nested")]
    if REFUSED.search(str(program)):
        for summary in summaries:
            with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
                summary()
        return False
    try:
        sweep, nested = (summary() for summary in summaries)
    except TypeError as error:  # docs/refused.md: older versions don't reach all custom_vjps in a scan
        if jax.__version_info__ < (0, 12) and "to a custom_vjp" in str(error):
            return False
        raise
    assert np.all(np.isfinite(nested.hbar)), "the grammar is to keep values small"
    assert_close("slopes", sweep.gbar, slopes, 1e-9)
    for name, a, b in zip(sweep._fields, sweep, nested, strict=True):
        assert_close(name, a, b, 1e-9)
    if program.smooth:
        assert_close("along all groups", *finite_differences(loss, params, direction, sweep), 1e-5)
    return program.smooth


def finite_differences(loss, params, direction, summary):
    """The sum of hbar and the third derivative of group 0, and both by a polynomial through values of the loss."""
    degree, radius = 10, 0.04 / np.max(np.abs(direction))
    points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    move = lambda eta: [p - e * d for p, e, d in zip(params, eta, direction, strict=True)]
    along = lambda e: jax.vmap(lambda t: loss(move(t * jnp.asarray(e))))(radius * points)
    fits = [np.polynomial.Polynomial.fit(points, along(e), degree, domain=[-1, 1]) for e in (np.ones(3), np.eye(3)[0])]
    return [summary.hbar.sum(), -summary.third[0]], [
        f.deriv(k)(0) / radius**k for f, k in zip(fits, (2, 3), strict=True)
    ]


@pytest.mark.parametrize("first", [0, 22])
def test_random_programs(x64, first):
    for seed in range(first, first + 5):
        try:
            check(seed)
        except Exception as error:
            error.add_note(f"seed {seed}: {example(seed)[0]}")
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found = collections.Counter()
    for seed in range(options.seed, options.seed + options.programs):
        try:
            found["with finite differences" if check(seed) else "without"] += 1
        except Exception as error:
            found["failed"] += 1
            print(f"seed {seed}: {example(seed)[0]}\n  {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if (seed + 1 - options.seed) % 10 == 0:
            print(seed + 1 - options.seed, dict(found), flush=True)
    print(dict(found))


if __name__ == "__main__":
    main()
