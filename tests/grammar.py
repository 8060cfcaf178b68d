"""Random small losses: a list of operations, each of one or two earlier values, of a few small arrays.

Values are numbers, vectors of three and matrices of two by three; an operation takes any, and gives any. Some are made
of shorter programs: scans, conds, calls, custom rules. All are bounded, or nearly so, that programs stay finite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

import grouped_newton as gn

SHAPES = (), (3,), (3,), (2, 3), (2, 3)


class Operation(NamedTuple):
    name: str
    arity: int
    fn: object
    exact: bool = True  # else a rule in it is not the derivative
    holds: frozenset = frozenset()  # names of the operations that it is made of


class Program(NamedTuple):
    steps: list  # of operations and the numbers of the values that they read

    def __call__(self, *values):
        values = list(values)
        for operation, reads in self.steps:
            values.append(operation.fn(*(values[i] for i in reads)))
        return values[-1]

    def __str__(self):
        return ", ".join(f"{o.name}({' '.join(map(str, reads))})" for o, reads in self.steps)

    @property
    def exact(self):
        return all(o.exact for o, _ in self.steps)

    @property
    def holds(self):
        return frozenset().union(*({o.name} | o.holds for o, _ in self.steps))


# Values in other shapes


def like(y, x):
    """y in the shape of x."""
    if y.shape == x.shape:
        return y
    if y.ndim < x.ndim:
        return jnp.broadcast_to(y, x.shape)
    return y.mean(tuple(range(y.ndim - x.ndim)))


def vector(x):
    return x * jnp.array([1.0, -0.5, 2.0]) if x.ndim == 0 else x if x.ndim == 1 else x[0] - x[1]


def matrix(x):
    return x if x.ndim == 2 else jnp.stack([vector(x), 1 - vector(x)[::-1]])


def above(x):
    """At least 1."""
    return 1 + x * x


def definite(x):
    x = vector(x)
    return 2 * jnp.eye(3) + x[:, None] * x[None] / above(jnp.sum(x * x))


def square(x):
    """Neither symmetric nor near a singular one."""
    x = vector(x)
    return jnp.diag(jnp.array([2.0, 3.0, 5.0])) + jnp.sin(x)[:, None] * jnp.cos(2 * x)[None]


# Operations of one value. The first table has what JAX does to every number by itself.

ELEMENTWISE = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "exp": lambda x: jnp.exp(jnp.sin(x)),
    "x*x": lambda x: x * x / 2,
    "cube": lambda x: jnp.tanh(x) ** 3,
    "one over": lambda x: 1 / above(x),
    "power -2": lambda x: lax.integer_pow(2 + jnp.sin(x), -2),
    "log1p": lambda x: jnp.log1p(x * x),
    "sqrt": lambda x: jnp.sqrt(above(x)),
    "rsqrt": lambda x: lax.rsqrt(above(x)),
    "cbrt": lambda x: jnp.cbrt(above(x)),
    "power 0.3": lambda x: above(x) ** 0.3,
    "power of a constant": lambda x: jnp.array(2.0) ** jnp.sin(x),
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "expm1": lambda x: jnp.expm1(-x * x),
    "sinc": lambda x: jnp.sinc(x / 3 + 1.5),
    "erf": jax.scipy.special.erf,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "log_sigmoid": jax.nn.log_sigmoid,
    "xlogy": lambda x: jax.scipy.special.xlogy(above(x), 2 + jnp.sin(x)),
    "lgamma": lambda x: lax.lgamma(above(x)) / 4,
    "affine": lambda x: 0.7 * x - 0.3,
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "hard_tanh": jax.nn.hard_tanh,
    "abs": lambda x: jnp.abs(x) * x,
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "where": lambda x: jnp.where(x > 0.2, jnp.sin(x), x * x),
    "double where": lambda x: jnp.where(x > 0.1, jnp.sqrt(jnp.where(x > 0.1, x, 1)), 0),
    "round": lambda x: x + jnp.round(x) / 8,
    "modulo": lambda x: jnp.mod(x, 0.9) * x,
    "complex": lambda x: jnp.real(jnp.exp(lax.complex(jnp.sin(x), x)) * (1 + 2j)),
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(7), 0.6, x.shape), x / 0.6, 0),
    "noise": lambda x: x + 0.1 * jnp.sin(x) * jax.random.normal(jax.random.key(8), x.shape, x.dtype),
}
MIXING = {
    "softmax": lambda x: jax.nn.softmax(x[None])[0] if x.ndim else jax.nn.sigmoid(x),
    "log_softmax": lambda x: jax.nn.log_softmax(vector(x)),
    "standardise": lambda x: jax.nn.standardize(vector(x), epsilon=0.1),
    "layer norm": lambda x: (x - x.mean()) * lax.rsqrt(jnp.var(x) + 0.1),
    "logsumexp": lambda x: x - jax.nn.logsumexp(x),
    "softmax by hand": lambda x: (lambda e: e / e.sum())(jnp.exp(vector(x) - lax.stop_gradient(vector(x).max()))),
    "norm": lambda x: x / jnp.linalg.norm(jnp.append(x.ravel(), 1.0)),
    "cumsum": lambda x: jnp.tanh(jnp.cumsum(vector(x))),
    "cumprod": lambda x: jnp.cumprod(jnp.cos(matrix(x)), axis=1),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(vector(x), reverse=True),
    "cummax": lambda x: jnp.tanh(lax.cummax(vector(x))),
    "prod": lambda x: x * jnp.prod(jnp.cos(x)),
    "sum": lambda x: jnp.sum(jnp.tanh(x)),
    "rows": lambda x: matrix(x).sum(0),
    "variance": jnp.var,
    "max": lambda x: jnp.tanh(x) + jnp.max(x),
    "argmax": lambda x: x * x.ravel()[jnp.argmax(x)],
    "sort": lambda x: jnp.sort(vector(x)) * jnp.arange(1.0, 4.0),
    "argsort": lambda x: jnp.take_along_axis(matrix(x), jnp.argsort(-matrix(x), axis=1), axis=1) * matrix(x),
    "top_k": lambda x: jnp.sum(lax.top_k(jnp.sin(vector(x)), 2)[0] ** 2) * x,
    "reverse and pad": lambda x: jnp.pad(vector(x)[::-1][1:], (0, 1), constant_values=0.5),
    "interior pad": lambda x: lax.pad(jnp.sin(vector(x)[:2]), 0.5, [(0, 0, 1)]),
    "roll": lambda x: jnp.roll(x, 1) * x if x.ndim else x,
    "transpose": lambda x: matrix(x).T.reshape(2, 3),
    "outer": lambda x: jnp.tanh(vector(x)[:2, None] * vector(x)[None]),
    "gather": lambda x: vector(x)[jnp.array([2, 0, 0])] * vector(x),
    "scatter add": lambda x: jnp.zeros(3).at[jnp.array([1, 1, 2])].add(vector(x) ** 2 / 2),
    "scatter set": lambda x: jnp.sin(vector(x)).at[1].set(vector(x)[0] * vector(x)[2]),
    "segment_sum": lambda x: jax.ops.segment_sum(jnp.sin(vector(x)), jnp.array([0, 2, 0]), 3),
    "dynamic slice": lambda x: lax.dynamic_slice(jnp.tile(jnp.sin(vector(x)), 2), (jnp.argmax(vector(x)),), (3,)),
    "dynamic update": lambda x: lax.dynamic_update_slice(matrix(x), jnp.sin(matrix(x))[:1], (1, 0)),
    "interpolate": lambda x: jnp.interp(vector(x), jnp.array([-1.0, 0.3, 1.0]), jnp.array([0.5, -1.0, 2.0])),
    "pool max": lambda x: lax.reduce_window(matrix(x), -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    "pool sum": lambda x: lax.reduce_window(jnp.sin(matrix(x)), 0.0, lax.add, (2, 2), (1, 1), "SAME"),
    "nothing": lambda x: x + jnp.sum(jnp.sin(x.ravel()[:0])) + jnp.zeros((0, 3)).sum(),
    "fft": lambda x: jnp.abs(jnp.fft.fft(vector(x)) + 3),
    "rfft": lambda x: jnp.fft.irfft(jnp.fft.rfft(matrix(x)) * (1 + 0.5j), 3) * matrix(x),
    "stop_gradient": lambda x: x * lax.stop_gradient(0.5),
    "einsum": lambda x: jnp.tanh(jnp.einsum("i,j,k->j", vector(x), jnp.sin(vector(x)), vector(x)) / 3),
    "polyval": lambda x: jnp.tanh(jnp.polyval(vector(x), jnp.array(0.4)) * x),
    "associative scan": lambda x: lax.associative_scan(lambda a, b: jnp.sin(a) * b + a, vector(x)),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x),
}
LINEAR_ALGEBRA = {
    "cholesky": lambda x: jnp.linalg.cholesky(definite(x))[1:],
    "inverse": lambda x: jnp.linalg.inv(square(x))[0],
    "determinant": lambda x: jnp.tanh(x) * jnp.linalg.slogdet(square(x))[1],
    "eigenvalues": lambda x: jnp.linalg.eigvalsh(square(x) + square(x).T) / 5,
    "qr": lambda x: jnp.linalg.qr(square(x))[1][1],
    "matrix power": lambda x: jnp.linalg.matrix_power(square(x) / 4, 3) @ vector(x),
    "implicit": lambda x: implicit(vector(x)),
    "lgamma": lambda x: lax.digamma(above(x)),
}
ELEMENTWISE_BINARY = {
    "add": lambda x, y: x + like(y, x),
    "subtract": lambda x, y: like(y, x) - x,
    "multiply": lambda x, y: x * like(y, x) / 2,
    "sin times": lambda x, y: jnp.sin(x) * like(y, x),
    "divide": lambda x, y: like(y, x) / above(x),
    "power of two": lambda x, y: above(jnp.tanh(x)) ** jnp.tanh(like(y, x)),
    "arctan2": lambda x, y: jnp.arctan2(x, above(like(y, x))),
    "hypot": lambda x, y: jnp.hypot(above(x), like(y, x)),
    "logaddexp": lambda x, y: jnp.logaddexp(x, like(y, x)),
    "larger": lambda x, y: jnp.maximum(x, like(y, x)),
    "choose": lambda x, y: jnp.where(x > like(y, x), jnp.sin(x), like(y, x)),
    "clamp": lambda x, y: lax.clamp(-above(like(y, x)), 2 * x, above(jnp.sin(like(y, x)))),
    "squared difference": lambda x, y: (x - like(y, x)) ** 2 / 4,
    "complex product": lambda x, y: jnp.imag(lax.complex(x, like(y, x)) ** 2 / (2 + lax.complex(y, y).mean() ** 2 / 9)),
    "gate": lambda x, y: jax.nn.glu(jnp.stack([x, like(y, x)]), axis=0)[0],
}
CONTRACTING = {
    "dot": lambda x, y: x * jnp.tanh(jnp.vdot(vector(x), vector(y))),
    "matrix and vector": lambda x, y: (vector(x)[:, None] * jnp.cos(vector(x))[None]) @ jnp.tanh(vector(y)),
    "two matrices": lambda x, y: jnp.tanh(matrix(x) @ matrix(y).T / 2) @ matrix(y),
    "batched": lambda x, y: jnp.einsum("bi,bj->ij", matrix(x), jnp.tanh(matrix(y)))[:2],
    "layer": lambda x, y: jnp.tanh(matrix(x) @ square(y) / 3 + vector(y)[None]),
    "bilinear": lambda x, y: (
        jnp.einsum("i,ijk,k->j", vector(x), jnp.cos(jnp.arange(27.0)).reshape(3, 3, 3), vector(y)) / 5
    ),
    "convolve": lambda x, y: jnp.convolve(vector(x), jnp.tanh(vector(y)), "same"),
    "convolution": lambda x, y: lax.conv_general_dilated(
        matrix(x)[None], jnp.tanh(matrix(y))[None], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
    )[0, 0],
    "attention": lambda x, y: jax.nn.softmax(vector(x)[:, None] * vector(y)[None]) @ jnp.tanh(vector(y)),
    "append": lambda x, y: jnp.append(vector(x), jnp.sin(vector(y)))[1:5:2].sum() * x,
    "scatter": lambda x, y: jnp.sin(matrix(x)).at[:, 1].multiply(vector(y)[:2], unique_indices=True),
    "outer sum": lambda x, y: jnp.tanh(vector(x)[:2, None] + vector(y)[None]),
    "distance": lambda x, y: jnp.sqrt(1 + jnp.sum((matrix(x)[:, None] - matrix(y)[None]) ** 2, -1)).sum() * y,
    "cross": lambda x, y: jnp.cross(vector(x), jnp.sin(vector(y))),
    "cosine": lambda x, y: (
        x * (lambda a, b: jnp.vdot(a, b) / jnp.sqrt(above(a @ a) * above(b @ b)))(vector(x), vector(y))
    ),
    "cross entropy": lambda x, y: -jnp.sum(jax.nn.softmax(vector(y)) * jax.nn.log_softmax(vector(x))) * x,
}
SOLVING = {
    "solve": lambda x, y: jnp.linalg.solve(square(x), vector(y)),
    "triangular": lambda x, y: jax.scipy.linalg.solve_triangular(jnp.tril(definite(x)), vector(y), lower=True),
    "cho_solve": lambda x, y: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(definite(x)), True), vector(y)),
    "solve by a rule": lambda x, y: lax.custom_linear_solve(
        lambda v: definite(x) @ v, vector(y), lambda _, b: jnp.linalg.solve(definite(x), b), symmetric=True
    ),
    "ragged": lambda x, y: lax.ragged_dot(matrix(x), jnp.stack([square(y) / 4, jnp.eye(3)]), jnp.array([1, 1])),
    "log density": lambda x, y: jax.scipy.stats.multivariate_normal.logpdf(vector(x), vector(y), definite(y)) * x / 5,
}


def implicit(x):
    """z with z - sin(z) / 2 = x."""
    solve = lambda f, z: lax.fori_loop(0, 60, lambda _, z: z - f(z), z)
    return lax.custom_root(
        lambda z: z - jnp.sin(z) / 2 - x, x, solve, lambda g, y: jnp.linalg.solve(jax.jacobian(g)(jnp.zeros(3)), y)
    )


# Rules that aren't the derivative of their function: of one value each


def straight_through(x):
    return x + lax.stop_gradient(jnp.round(2 * x) / 2 - x)


@jax.custom_jvp
def spike(x):
    return (x > 0.1).astype(x.dtype)


spike.defjvp(lambda primals, tangents: (spike(*primals), tangents[0] / above(3 * primals[0])))


@jax.custom_vjp
def rounded(x):
    return jnp.round(2 * x) / 2


rounded.defvjp(lambda x: (rounded(x), x), lambda x, ct: (ct * jnp.cos(x / 4),))


@jax.custom_vjp
def turned(x):
    return x + 0.0


turned.defvjp(lambda x: (x + 0.0, None), lambda _, ct: (-ct,))

INEXACT = {
    "straight through": straight_through,
    "spike": lambda x: spike(x) * x,
    "rounded": rounded,
    "turned": turned,
    "partly stopped": lambda x: x * lax.stop_gradient(jnp.sin(x)),
    "in single precision": lambda x: jnp.sin(x.astype(jnp.float32)).astype(x.dtype),
}


# Around shorter programs f(x, y). Whether the derivatives of the whole are the function's, if f's are.


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), jax.jvp(f, primals, tangents)[1]))
    return g


def custom_jvp_by_operand(f):
    g = jax.custom_jvp(f)
    along = lambda i: lambda dx, z, *xs: jax.jvp(lambda x: f(*xs[:i], x, *xs[i + 1 :]), (xs[i],), (dx,))[1]
    g.defjvps(along(0), along(1))
    return g


def custom_jvp_for_symbolic_zeros(f):
    def rule(primals, tangents):
        moved = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def of_moved(*xs):
            values = list(primals)
            for i, x in zip(moved, xs, strict=True):
                values[i] = x
            return f(*values)

        z = f(*primals)
        if not moved:
            return z, jnp.zeros_like(z)
        return z, jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])[1]

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


def custom_jvp_of_two_outputs(f):
    g = jax.custom_jvp(lambda x, y: {"z": f(x, y), "sign": jnp.sign(x)})

    def rule(primals, tangents):
        outs = g(*primals)
        return outs, {"z": jax.jvp(f, primals, tangents)[1], "sign": jnp.zeros_like(outs["sign"])}

    g.defjvp(rule)
    return lambda x, y: (lambda outs: outs["z"] * jnp.mean(outs["sign"] + 2))(g(x, y))


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *xs: (g(*xs), xs), lambda xs, ct: jax.vjp(f, *xs)[1](ct))
    return g


def custom_vjp_that_keeps_the_pullback(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *xs: jax.vjp(f, *xs), lambda pull, ct: pull(ct))
    return g


def custom_vjp_that_keeps_its_output(f):
    g = jax.custom_vjp(lambda x, y: jnp.exp(jnp.tanh(f(x, y))))

    def fwd(x, y):
        z = g(x, y)
        return z, (z, jax.vjp(lambda x, y: jnp.tanh(f(x, y)), x, y)[1])

    g.defvjp(fwd, lambda kept, ct: kept[1](kept[0] * ct))
    return g


def custom_vjp_for_symbolic_zeros(f):
    g = jax.custom_vjp(f)
    fwd = lambda x, y: (f(x.value, y.value), (x.value, y.value))
    g.defvjp(fwd, lambda xs, ct: jax.vjp(f, *xs)[1](like_array(ct)), symbolic_zeros=True)
    return g


def like_array(ct):
    return jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, SymbolicZero) else ct


def custom_vjp_of_two_outputs(f):
    both = lambda x, y: (f(x, y), {"other": jnp.sin(y), "index": jnp.argmax(y)})
    g = jax.custom_vjp(both)
    floats = lambda x, y: (f(x, y), jnp.sin(y))
    g.defvjp(lambda *xs: (g(*xs), xs), lambda xs, ct: jax.vjp(floats, *xs)[1]((ct[0], ct[1]["other"])))
    return lambda x, y: (lambda z, rest: z * jnp.mean(rest["other"]) + rest["index"] / 2)(*g(x, y))


def custom_vjp_behind_stop_gradient(f):
    g = jax.custom_vjp(lambda *xs: lax.stop_gradient(f(*xs)))
    g.defvjp(lambda *xs: (lax.stop_gradient(f(*xs)), xs), lambda xs, ct: jax.vjp(f, *xs)[1](ct))
    return g


def custom_vjp_with_another_rule(f):
    """Straight through for one operand, a surrogate for the other."""
    g = jax.custom_vjp(lambda x, y: jnp.round(4 * like(f(x, y), x)) / 4)
    g.defvjp(lambda x, y: (g(x, y), (x, y)), lambda xy, ct: (ct, like(ct / above(xy[0]), xy[1]) * jnp.cos(xy[1])))
    return g


def custom_gradient(f):
    def g(x, y):
        z, pull = jax.vjp(f, x, y)
        return z, pull

    return jax.custom_gradient(g)


def scanned(f):
    return lambda x, y: lax.scan(lambda h, k: (like(f(h, x * k), h), h), y, jnp.arange(1.0, 4.0) / 4)[0]


def scanned_back(f):
    step = lambda h, xy: (jnp.tanh(h + like(f(*xy), h)), h * jnp.sum(xy[0]))
    return lambda x, y: lax.scan(step, like(x, y), (jnp.stack([x, x * x]), jnp.stack([y, -y])), reverse=True)[1][0]


def scanned_over(f):
    step = lambda h, xy: (jnp.tanh(h + like(f(h, xy), h)), h)
    return lambda x, y: lax.scan(step, jnp.zeros_like(x), jnp.stack([x, jnp.sin(like(y, x))]))[1][1]


def scanned_with_constants(f):
    def outer(x, y):
        def step(carry, _):
            h, g, k = carry
            return (jnp.tanh(g + like(f(x, h), h)), h * k, k + 1), jnp.sum(g) * x

        (h, g, _), ys = lax.scan(step, (y, jnp.ones_like(y), 0), length=2, unroll=2)
        return ys.sum(0) / 4 + like(h * g, x)

    return outer


def scanned_twice(f):
    inner = lambda h, x, y: lax.scan(lambda h, k: (like(f(h * k, y), h), None), h, jnp.array([0.5, 1.0]))[0]
    return lambda x, y: lax.scan(lambda h, k: (inner(h, x, y), h * k), x, jnp.array([1.0, 0.7]))[1].sum(0)


def cond_in_a_scan(f):
    def step(h, k):
        h = lax.cond(k % 2 == 0, lambda h: like(f(h, h), h), jnp.sin, h)
        return h, h.sum()

    return lambda x, y: (lambda h, s: h * jnp.tanh(s.sum()))(*lax.scan(step, x, jnp.arange(3)))


def mapped_in_turn(f):
    return lambda x, y: lax.map(lambda x: f(x, y), jnp.stack([x, x * x / 2])).sum(0)


def looped(f):
    return lambda x, y: lax.fori_loop(0, 3, lambda i, h: like(f(h, y), h) / 2 + h * i / 4, x)


def after_a_loop(f):
    """A loop over constants: how many times differs, and what comes out scales the rest."""
    return lambda x, y: f(x, y * lax.while_loop(lambda c: c < 2, lambda c: c * 1.3, jnp.array(1.0)))


def in_cond(f):
    other = lambda x, y: like(f(jnp.sin(x), y), x) * x
    return lambda x, y: lax.cond(jnp.sum(x) > jnp.sum(y), lambda x, y: like(f(x, y), x), other, x, y)


def in_cond_by_constant(f):
    return lambda x, y: lax.cond(jnp.arange(2)[1] > 0, lambda: like(f(x, y), x), lambda: x)


def in_switch(f):
    branches = [lambda x, y: like(f(x, y), x), lambda x, y: x * like(y, x), lambda x, y: like(f(y, x), x)]
    return lambda x, y: lax.switch(jnp.argmax(vector(x)), branches, x, y)


def mapped(f):
    return lambda x, y: jax.vmap(f, (0, None))(jnp.stack([x, jnp.cos(x)]), y).sum(0)


def mapped_over_both(f):
    averaged = lambda x, y: lax.pmean(f(x, y), "rows") * jnp.sum(x)
    return lambda x, y: jax.vmap(averaged, axis_name="rows")(jnp.stack([x, x * x]), jnp.stack([y, -y])).sum(0) / 4


def remat_with_policy(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)


def gradient_of(f):
    return lambda x, y: jnp.tanh(jax.grad(lambda x: jnp.sum(jnp.sin(f(x, y))))(x))


def tangent_of(f):
    return lambda x, y: jnp.tanh(jax.jvp(lambda x: f(x, y), (x,), (like(y, x),))[1])


def twice(f):
    return lambda x, y: f(f(x, y), y)


AROUND = {
    "jit": (jax.jit, True),
    "twice": (twice, True),
    "remat": (jax.checkpoint, True),
    "remat, policy": (remat_with_policy, True),
    "vmap": (mapped, True),
    "vmap, pmean": (mapped_over_both, True),
    "scan": (scanned, True),
    "scan, back": (scanned_back, True),
    "scan, over": (scanned_over, True),
    "scan, constants": (scanned_with_constants, True),
    "scan in scan": (scanned_twice, True),
    "cond in scan": (cond_in_a_scan, True),
    "map": (mapped_in_turn, True),
    "fori_loop": (looped, True),
    "while": (after_a_loop, True),
    "cond": (in_cond, True),
    "cond, constant": (in_cond_by_constant, True),
    "switch": (in_switch, True),
    "gradient": (gradient_of, True),
    "tangent": (tangent_of, True),
    "custom_jvp": (custom_jvp, True),
    "custom_jvp, by operand": (custom_jvp_by_operand, True),
    "custom_jvp, symbolic zeros": (custom_jvp_for_symbolic_zeros, True),
    "custom_jvp, mixing": (custom_jvp_that_mixes, False),
    "custom_jvp, two": (custom_jvp_of_two_outputs, True),
    "custom_vjp": (custom_vjp, True),
    "custom_vjp, pullback": (custom_vjp_that_keeps_the_pullback, True),
    "custom_vjp, output": (custom_vjp_that_keeps_its_output, True),
    "custom_vjp, symbolic zeros": (custom_vjp_for_symbolic_zeros, True),
    "custom_vjp, two": (custom_vjp_of_two_outputs, True),
    "custom_vjp, stop_gradient": (custom_vjp_behind_stop_gradient, False),
    "custom_vjp, another rule": (custom_vjp_with_another_rule, False),
    "custom_gradient": (custom_gradient, True),
}
LOOPS = {name for name in AROUND if "scan" in name or name in ("map", "fori_loop")}
# JAX has no jvp of a custom_vjp: these take one.
FORWARD = {name for name in AROUND if name.startswith("custom_jvp")} | {"tangent"}
REVERSE = {name for name in AROUND if name.startswith("custom_vjp")} | {"custom_gradient", "rounded", "turned"}

# Tables by how often they are drawn from.
ONE = [(0.62, ELEMENTWISE), (0.28, MIXING), (0.04, LINEAR_ALGEBRA), (0.06, INEXACT)]
TWO = [(0.47, ELEMENTWISE_BINARY), (0.48, CONTRACTING), (0.05, SOLVING)]


def _chosen(rng, tables):
    table = tables[rng.choice(len(tables), p=[p for p, _ in tables])][1]
    name = rng.choice(list(table))
    return name, table[name], table is not INEXACT


def _plain(rng, forward):
    arity = int(rng.choice([1, 2], p=[0.6, 0.4]))
    while True:
        name, fn, exact = _chosen(rng, ONE if arity == 1 else TWO)
        if not (forward and name in REVERSE):
            return Operation(name, arity, fn, exact)


def _around(rng, depth, forward):
    name = str(rng.choice([n for n in AROUND if not (forward and n in REVERSE)]))
    around, exact = AROUND[name]
    inner = draw(rng, 2, rng.integers(1, 3), 0.2 if depth > 1 else 0, depth - 1, forward or name in FORWARD)
    fn = around(lambda *xs: inner(*xs))
    return Operation(f"{name}[{inner}]", 2, fn, exact and inner.exact, inner.holds | {name})


def draw(rng, inputs, length, share, depth, forward=False):
    """A program, a ``share`` of its operations around others; with ``forward`` one that forward mode can take."""
    steps = []
    for known in range(inputs, inputs + length):
        operation = _around(rng, depth, forward) if rng.random() < share else _plain(rng, forward)
        # Mostly the newest value, so that programs are deep, and everything now and then.
        reads = [known - 1 if rng.random() < 0.6 else int(rng.integers(known)) for _ in range(operation.arity)]
        steps.append((operation, reads))
    return Program(steps)


ENDS = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "sum of squares": lambda x: jnp.sum(x**2) / 2,
    "logsumexp": jax.nn.logsumexp,
    "weighted": lambda x: jnp.sum(jnp.cos(jnp.arange(1.0, x.size + 1)) * x.ravel()),
    "entry": lambda x: x.ravel()[x.size // 2] * 2,
}


class Example(NamedTuple):
    program: Program
    end: str
    params: list
    direction: list
    grouping: object
    options: dict

    def loss(self, params):
        return ENDS[self.end](self.program(*params))

    def __str__(self):
        shapes = [x.shape for x in self.params]
        return f"{self.program}, {self.end} of {shapes} in groups {self.grouping(self.params)} {self.options}"


def labels(names):
    return lambda params: list(names)


def example(seed):
    """The program of a seed, its parameters, a direction, a grouping and the sweep's options."""
    rng = np.random.default_rng(seed)
    inputs = 2 + int(rng.random() < 0.3)
    length, share = (rng.integers(2, 5), 0.0) if rng.random() < 0.45 else (rng.integers(1, 3), 0.7)
    program = draw(rng, inputs, length, share, depth=2)
    shapes = [SHAPES[rng.integers(len(SHAPES))] for _ in range(inputs)]
    array = lambda shape, scale: np.asarray(scale * rng.normal(size=shape))
    params, direction = [array(s, 0.8) for s in shapes], [array(s, 1.0) for s in shapes]
    names = [str(k) for k in range(inputs)]
    how = rng.random()
    if how < 0.15:
        names[-1] = names[0]
    elif how < 0.2:
        names[0] = gn.groups.FROZEN
    options = {"max_stack": 2} if rng.random() < 0.1 else {"order": 2} if rng.random() < 0.05 else {}
    return Example(program, str(rng.choice(list(ENDS))), params, direction, labels(names), options)
