"""Custom rules, and equations with rules of their own: the summary is of the function that ``jax.grad`` differentiates.

Its slopes are those of the gradient; the sweep is the definition; where the rule is the derivative of a plain function,
both are that function's.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_same_summary, only_grouped_newton
from interpreter import uncompiled
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.scipy.sparse import linalg
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import grouped_newton as gn

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "refused.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("x64")


def params():
    return {"a": jnp.array([0.3, 0.9, -1.4]), "b": jnp.array([1.2, 2.0, 1.5])}


def assert_follows_the_gradient(loss, p=None, plain=None, tol=1e-9, slopes_alone=False, run_by=uncompiled):
    """Sweep, definition and the gradient's slopes agree, and with a plain loss of the same derivatives."""
    p = params() if p is None else p
    u = jax.tree.map(lambda x: jnp.cos(3 * x), p)
    gradient = jax.jit(jax.grad(loss))(p)
    methods = [("sweep", loss)] + [("nested", loss)] * (not slopes_alone) + [("nested", plain)] * (plain is not None)
    run = run_by(lambda p, u: [gn.summarize(f, p, u, method=method) for method, f in methods])
    got, *others = run(p, u)
    slopes = [jnp.vdot(gradient[k], u[k]) for k in sorted(p)]
    np.testing.assert_allclose(got.gbar, slopes, rtol=tol, atol=tol)
    for other in others:
        assert_same_summary(got, other, tol)
    return got


# A custom_jvp is as its rule is


def with_rule(f, tangent):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangent(*primals, *tangents)))
    return g


MIXING = {
    "centred": with_rule(jnp.tanh, lambda x, dx: (1 - jnp.tanh(x) ** 2) * (dx - dx.mean())),
    "reversed": with_rule(jnp.sin, lambda x, dx: (jnp.cos(x) * dx)[::-1]),
    "normalised": with_rule(jnp.exp, lambda x, dx: jnp.exp(x) * dx / jnp.sum(jnp.exp(x))),
    "elementwise, then not": with_rule(
        lambda x: x**3, lambda x, dx: with_rule(jnp.sin, lambda x, dx: dx * jnp.mean(x))(x) * dx
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_rule_that_is_not_elementwise_is_followed_though_its_function_is(name):
    assert_follows_the_gradient(lambda p: jnp.sum(MIXING[name](jnp.sin(p["a"]) * p["b"]) ** 3))


# Operands that move, together


def for_symbolic_zeros(f, rule):
    g = jax.custom_jvp(f)
    g.defjvp(rule, symbolic_zeros=True)
    return g


def constant(t):
    return isinstance(t, SymbolicZero)


def dense(t):
    return jnp.zeros(t.shape, t.dtype) if constant(t) else t


LOOKING = {
    "constant unless both move": for_symbolic_zeros(
        lambda x, y: y,
        lambda xs, ts: (xs[1], jnp.zeros(3) if any(map(constant, ts)) else ts[1]),
    ),
    "another tangent if one moves": for_symbolic_zeros(
        lambda x, y: x * y,
        lambda xs, ts: (xs[0] * xs[1], (1 + sum(map(constant, ts))) * (dense(ts[0]) * xs[1] + xs[0] * dense(ts[1]))),
    ),
}
LOOKING["curved, in a cond"] = lambda x, y: lax.cond(
    x[0] > -9, lambda x, y: LOOKING["another tangent if one moves"](x, y) ** 2, lambda x, y: x, x, y
)


@pytest.mark.parametrize("name", LOOKING)
def test_operands_that_move_are_moved_together_where_a_rule_may_look(name):
    f = LOOKING[name]
    # Both operands move with every group; the definition takes groups alone.
    operands = lambda x: (x[::-1], jnp.cumsum(jnp.sin(x)))
    assert_follows_the_gradient(lambda p: jnp.sum(f(*operands(p["a"] * p["b"])) ** 3))


def test_an_operand_that_does_not_move_is_seen_as_constant():
    f = LOOKING["another tangent if one moves"]
    assert_follows_the_gradient(lambda p: jnp.sum(f(jnp.sin(p["a"]) * p["b"], jnp.arange(3.0)) ** 3))


# Linear solves


def matrix(p):
    return 3 * jnp.eye(3) + jnp.outer(p["a"], p["b"])


def by_hand(A, b):
    solve = lambda _, b: jnp.linalg.solve(A, b)
    return lax.custom_linear_solve(lambda v: A @ v, b, solve, lambda _, b: jnp.linalg.solve(A.T, b))


def root(p):
    f = lambda x: jnp.tanh(0.4 * x * p["a"] + 0.3 * p["b"]) - x
    solve = lambda f, x: lax.fori_loop(0, 60, lambda _, x: x + f(x), x)
    return lax.custom_root(f, jnp.ones(3), solve, lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y))


def unrolled(p):
    return lax.fori_loop(0, 60, lambda _, x: jnp.tanh(0.4 * x * p["a"] + 0.3 * p["b"]), jnp.ones(3))


@pytest.mark.parametrize("solver", [linalg.cg, linalg.bicgstab, by_hand], ids=lambda f: f.__name__)
def test_linear_solvers(solver):
    A = lambda p: matrix(p) @ matrix(p).T if solver is linalg.cg else matrix(p)
    given = lambda p: solver(A(p), p["b"]) if solver is by_hand else solver(lambda v: A(p) @ v, p["b"], tol=1e-14)[0]
    loss = lambda solve: lambda p: jnp.sum(solve(p) ** 3)
    plain = loss(lambda p: jnp.linalg.solve(A(p), p["b"]))
    assert_follows_the_gradient(loss(given), plain=plain, tol=1e-8, run_by=jax.jit)


def test_a_root():
    loss = lambda solve: lambda p: jnp.sum(solve(p) ** 3)
    assert_follows_the_gradient(loss(root), plain=loss(unrolled), tol=1e-8)


# A custom_vjp is as its rule is


def vjp(f, fwd, bwd, **options):
    g = jax.custom_vjp(f)
    g.defvjp(fwd, bwd, **options)
    return g


straight_through = vjp(lambda x: jnp.round(x * 16) / 16, lambda x: (jnp.round(x * 16) / 16, None), lambda _, ct: (ct,))
calls_itself = vjp(lambda x: jnp.round(x), lambda x: (calls_itself(x), None), lambda _, ct: (ct,))
spike = vjp(
    lambda v: (v > 0).astype(v.dtype), lambda v: (spike(v), v), lambda v, ct: (ct / (1 + 10 * jnp.abs(v)) ** 2,)
)
output_in_bwd = vjp(  # tanh of what is rounded, by tanh's own derivative
    lambda x: jnp.round(64 * jnp.tanh(x)) / 64,
    lambda x: (z := jnp.round(64 * jnp.tanh(x)) / 64, z),
    lambda z, ct: (ct * (1 - z**2),),
)
reversed_gradient = vjp(lambda x: x, lambda x: (x, None), lambda _, ct: (-ct,))
scaled_by_value = vjp(lambda x: x, lambda x: (x, x), lambda x, ct: (ct * jnp.cos(x),))
nothing = vjp(jnp.sin, lambda x: (jnp.sin(x), None), lambda _, ct: (None,))
mixing = vjp(jnp.tanh, lambda x: (jnp.tanh(x), x), lambda x, ct: ((ct - ct.mean()) * (1 - jnp.tanh(x) ** 2),))

RULES = {
    "straight through": straight_through,
    "straight through, fwd calls the function": calls_itself,
    "surrogate of a spike": spike,
    "output kept for bwd": output_in_bwd,
    "reversed": reversed_gradient,
    "identity whose rule depends on the value": scaled_by_value,
    "no gradient at all": nothing,
    "rule that is not elementwise": mixing,
}


@pytest.mark.parametrize("name", RULES)
def test_a_custom_vjp_has_the_derivatives_of_its_rule(name):
    f = RULES[name]
    assert_follows_the_gradient(lambda p: jnp.sum(jnp.sin(f(p["a"] * p["b"]) * p["b"])))


def test_straight_through_is_as_if_the_function_were_the_identity_in_its_derivatives():
    # At weights on the grid rounding changes nothing.
    p = {"a": jnp.array([0.25, 0.5, -1.5]), "b": jnp.array([1.25, 2.0, 1.5])}
    loss = lambda f: lambda p: jnp.sum(jnp.tanh(f(p["a"]) * p["b"]) ** 2)
    got = assert_follows_the_gradient(loss(straight_through), p, plain=loss(lambda x: x))
    assert np.all(got.gbar != 0)
    assert np.all(np.diag(got.hbar) != 0)


clipped = vjp(lambda x: x, lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.5, 0.5),))
clipped_by_norm = vjp(lambda x: x, lambda x: (x, None), lambda _, ct: (ct * jnp.minimum(1, 0.1 / jnp.linalg.norm(ct)),))
decayed = vjp(lambda x: x, lambda x: (x, x), lambda x, ct: (ct + 0.1 * x,))


@pytest.mark.parametrize("f", [clipped, clipped_by_norm, decayed], ids=["value", "norm", "decay"])
def test_where_bwd_is_not_linear_slopes_are_the_gradients_and_curvatures_those_of_its_linear_part(f):
    loss = lambda f: lambda p: 3 * jnp.sum(jnp.sin(f(p["a"] * p["b"])))
    got = assert_follows_the_gradient(loss(f))
    plain = gn.summarize(loss(lambda x: x), params(), jax.tree.map(lambda x: jnp.cos(3 * x), params()))
    assert_same_summary(got._replace(gbar=plain.gbar), plain, 1e-9)
    assert np.all(np.abs(got.gbar - plain.gbar) > 0.01)


# Its operands, outputs and options


def product(x, n, y):
    return jnp.sin(x) * y, n + 1, x * y * y


product_by_rule = vjp(
    product,
    lambda x, n, y: (product(x, n, y), (x, n, y)),
    lambda r, ct: (
        ct[0] * jnp.cos(r[0]) * r[2] + ct[2] * r[2] ** 2,
        None,
        ct[0] * jnp.sin(r[0]) + 2 * ct[2] * r[0] * r[2],
    ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def scaled_map(f, x, factor):
    return f(x) * factor


scaled_map.defvjp(
    lambda f, x, factor: (scaled_map(f, x, factor), x),
    lambda f, factor, x, ct: (ct * factor * jax.vmap(jax.grad(f))(x),),
)


def looking_bwd(r, ct):
    if isinstance(ct, SymbolicZero):
        return None, None
    return None if r[1] is None else ct * jnp.cos(r[0]) * r[1], ct * jnp.sin(r[0])


def looking_fwd(x, y):
    return jnp.sin(x.value) * y.value, (x.value, y.value if x.perturbed else None)


looking = vjp(lambda x, y: jnp.sin(x) * y, looking_fwd, looking_bwd, symbolic_zeros=True)
# The rule of the one and the function of the other call another custom_vjp.
times_x = vjp(lambda x: curved(x) * x, lambda x: (times_x(x), x), lambda x, ct: (ct * (curved(x) + x * slope(x)),))


def curved_plain(x):
    return x * jnp.sin(x)


def slope(x):
    return jnp.sin(x) + x * jnp.cos(x)


curved = vjp(curved_plain, lambda x: (curved(x), x), lambda x, ct: (ct * slope(x),))


def in_both(f, plain):
    return lambda loss: (loss(f), loss(plain))


OPERANDS = {
    "integer operands and outputs, several outputs": in_both(product_by_rule, product)(
        lambda f: (
            lambda p: (
                jnp.sum(f(p["a"], 3, p["b"])[0] ** 2 * f(p["a"], jnp.argmax(p["a"]), p["b"])[2])
                * f(p["a"], 3, p["b"])[1]
            )
        )
    ),
    "nondiff_argnums": in_both(scaled_map, lambda f, x, factor: f(x) * factor)(
        lambda f: lambda p: jnp.sum(f(jnp.sin, p["a"] * p["b"], 3) ** 2)
    ),
    "symbolic zeros": in_both(looking, lambda x, y: jnp.sin(x) * y)(
        lambda f: lambda p: jnp.sum(f(p["a"], p["b"]) ** 3 + f(p["a"], jnp.full(3, 2.0)))
    ),
    "complex": in_both(vjp(lambda z: z * z, lambda z: (z * z, z), lambda z, ct: (2 * z * ct,)), lambda z: z * z)(
        lambda f: lambda p: jnp.sum(jnp.abs(f(p["a"] + 1j * p["b"])) ** 3)
    ),
    "fwd and bwd call another": in_both(times_x, lambda x: curved_plain(x) * x)(
        lambda f: lambda p: jnp.sum(f(p["a"] * p["b"]) ** 2)
    ),
    "matrix product": in_both(
        vjp(lambda x, w: x @ w, lambda x, w: (x @ w, (x, w)), lambda r, ct: (ct @ r[1].T, r[0].T @ ct)), jnp.matmul
    )(
        lambda f: (
            lambda p: jnp.sum(
                jnp.sin(f(jnp.tanh(f(jnp.ones((2, 3)), jnp.outer(p["a"], p["b"]))), jnp.outer(p["b"], p["a"])))
            )
        )
    ),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_and_outputs_of_a_custom_vjp(name):
    by_rule, plain = OPERANDS[name]
    assert_follows_the_gradient(by_rule, plain=plain)


# At any depth


def in_shard_map(f):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(lambda x: f(x) * 2, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)


def in_rule_of_custom_jvp(f):
    """x^2 whose rule uses f, where f is only known to have the derivative of ``curved_plain``."""
    return with_rule(lambda x: x**2, lambda x, dx: (2 * x + f(x) - lax.stop_gradient(f(x))) * dx)


def in_body_of_custom_jvp(f):
    return with_rule(lambda x: f(x) ** 2, lambda x, dx: 2 * curved_plain(x) * slope(x) * dx)


DEPTHS = {
    "vmap": lambda f: jax.vmap(lambda x: f(x * 2)),
    "jit of remat": lambda f: jax.jit(jax.checkpoint(lambda x: jnp.sin(f(x)))),
    "remat with a policy": lambda f: jax.checkpoint(
        lambda x: jnp.sin(f(x)), policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    ),
    "cond of scan": lambda f: (
        lambda x: lax.cond(
            x[0] > -9, lambda h: lax.scan(lambda h, k: (f(h * k), None), h, jnp.arange(1.0, 4.0))[0], jnp.sin, x
        )
    ),
    "scan of cond": lambda f: (
        lambda x: lax.scan(lambda h, k: (lax.cond(k > 1.5, f, jnp.cos, h * k), h), x, jnp.arange(1.0, 4.0))[0]
    ),
    "scan of remat": lambda f: (
        lambda x: lax.scan(jax.checkpoint(lambda h, k: (f(h * k), h)), x, jnp.arange(1.0, 4.0))[0]
    ),
    "switch of remat": lambda f: (
        lambda x: lax.switch(jnp.argmax(x), [jnp.sin, jax.checkpoint(lambda x: f(f(x))), jax.jit(f)], x)
    ),
    "shard_map": in_shard_map,
    "rule of a custom_jvp": in_rule_of_custom_jvp,
    "rule of a custom_jvp, in cond": lambda f: lambda x: lax.cond(x[0] > -9, in_rule_of_custom_jvp(f), jnp.sin, x),
    "function of a custom_jvp": in_body_of_custom_jvp,
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_custom_vjp_is_found_at_any_depth(name):
    loss = lambda f: lambda p: jnp.sum(DEPTHS[name](f)(p["a"] * p["b"]) ** 2)
    run_by = jax.jit if name == "shard_map" else uncompiled
    assert_follows_the_gradient(loss(curved), plain=loss(curved_plain), run_by=run_by)


@pytest.mark.parametrize("flag", ["jax_custom_vjp3", "jax_remat3"])
def test_with_the_primitives_of_the_next_jax(flag):
    """The sweep at several depths at once; the flags are of jax 0.12, where these are classes instead of primitives."""
    if flag not in jax.config.values:
        pytest.skip(f"this jax has no {flag}")
    depths = ("jit of remat", "scan of cond", "rule of a custom_jvp")
    before = jax.config.values[flag]
    jax.config.update(flag, True)
    try:
        g = vjp(curved_plain, lambda x: (g(x), x), lambda x, ct: (ct * slope(x),))
        loss = lambda f: lambda p: sum(jnp.sum(DEPTHS[d](f)(p["a"] * p["b"]) ** 2) for d in depths)
        p = params()
        got, expected = jax.jit(lambda: (gn.summarize(loss(g), p, p), gn.summarize(loss(curved_plain), p, p)))()
    finally:
        jax.config.update(flag, before)
    assert_same_summary(got, expected, 1e-9)


def test_in_a_loop_that_is_the_function_of_a_custom_jvp():
    def loop(f):
        return lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]

    plain = lambda x: curved_plain(curved_plain(curved_plain(x)))
    g = jax.custom_jvp(loop(curved))
    g.defjvp(lambda primals, tangents: (g(*primals), jax.jvp(plain, primals, tangents)[1]))
    loss = lambda f: lambda p: jnp.sum(f(0.5 * p["a"]) ** 2)
    assert_follows_the_gradient(loss(g), plain=loss(plain))


# Solvers behind a rule


def step_of(p, x):
    return jnp.tanh(0.4 * x * p["a"] + 0.3 * p["b"])


def implicit(solve):
    """The fixed point of ``step_of`` by its implicit derivative; fwd has none to speak of."""

    def bwd(r, ct):
        p, z = r
        w = jnp.linalg.solve(jnp.eye(3) - jax.jacobian(lambda x: step_of(p, x))(z).T, ct)
        return jax.vjp(lambda p: step_of(p, z), p)[1](w)

    return vjp(solve, lambda p: (z := solve(p), (p, z)), bwd)


def until_it_converges(p):
    moves = lambda c: jnp.max(jnp.abs(c[0] - c[1])) > 1e-15
    return lax.while_loop(moves, lambda c: (c[1], step_of(p, c[1])), (jnp.ones(3), step_of(p, jnp.ones(3))))[1]


@pytest.mark.parametrize("solve", [until_it_converges, lambda p: lax.stop_gradient(unrolled(p))], ids=["while", "stop"])
def test_an_implicit_layer_has_the_derivatives_of_its_solution(solve):
    loss = lambda f: lambda p: jnp.sum(f(p) ** 3)
    assert_follows_the_gradient(loss(implicit(solve)), plain=loss(unrolled), tol=1e-8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_point(f, a, x):
    moves = lambda c: jnp.max(jnp.abs(c[0] - c[1])) > 1e-13
    return lax.while_loop(moves, lambda c: (c[1], f(a, c[1])), (x, f(a, x)))[1]


def fixed_point_bwd(f, r, ct):
    a, x = r
    adjoint_step = lambda r, w: r[2] + jax.vjp(lambda x: f(r[0], x), r[1])[1](w)[0]
    w = fixed_point(adjoint_step, (a, x, ct), ct)
    return jax.vjp(lambda a: f(a, x), a)[1](w)[0], jnp.zeros_like(x)


fixed_point.defvjp(lambda f, a, x: (z := fixed_point(f, a, x), (a, z)), fixed_point_bwd)


# A bwd that is a loop without a transpose: its vjp by the rule, its jvps by the function, compared


def growth(h, x):
    return h + jnp.sin(h) * x / 3


def grown(x):
    return growth(growth(growth(x, x), x), x)


def in_a_loop(factor=1.0):
    """``grown`` by loops that keep what they need in a buffer, as Equinox's and diffrax's do."""

    def fwd(x):
        step = lambda c: (c[0] + 1, c[1].at[c[0] + 1].set(growth(c[1][c[0]], x)))
        kept = lax.while_loop(lambda c: c[0] < 3, step, (0, jnp.zeros((4, *x.shape)).at[0].set(x)))[1]
        return kept[3], (x, kept)

    def bwd(r, ct):
        def back(c):
            k, ct_h, ct_x = c
            dh, dx = jax.vjp(growth, r[1][k], r[0])[1](ct_h)
            return k - 1, dh, ct_x + dx

        _, ct_h, ct_x = lax.while_loop(lambda c: c[0] >= 0, back, (2, ct, jnp.zeros_like(ct)))
        return (factor * (ct_h + ct_x),)

    return vjp(lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, growth(c[1], x)), (0, x))[1], fwd, bwd)


LOOPS = {
    "alone": lambda f: lambda x: jnp.sin(f(x)),
    "in scan and cond": lambda f: (
        lambda x: lax.scan(lambda h, k: (f(lax.cond(k > 1.5, f, jnp.cos, h * k)), None), x, jnp.arange(1.0, 3.0))[0]
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_bwd_that_is_a_loop(name):
    loss = lambda f: lambda p: jnp.sum(LOOPS[name](f)(jnp.sin(p["a"]) * p["b"]) * p["b"])
    assert_follows_the_gradient(loss(in_a_loop()), plain=loss(grown))


def test_a_bwd_that_loops_over_the_cotangent_until_it_converges():
    loss = lambda solve: lambda p: jnp.sum(solve(p) ** 3)
    assert_follows_the_gradient(loss(lambda p: fixed_point(step_of, p, jnp.ones(3))), plain=loss(unrolled), tol=1e-8)


def after_a_wrong_loop(p):
    return jnp.sum((in_a_loop(factor=1.01)(p["a"]) * jnp.sin(p["b"])) ** 2)


def test_a_bwd_in_a_loop_that_is_not_the_derivative_has_no_curvature():
    summaries = lambda p: [gn.summarize(after_a_wrong_loop, p, p, method=method) for method in ("sweep", "nested")]
    gradient, both = jax.jit(lambda p: (jax.grad(after_a_wrong_loop)(p), summaries(p)))(params())
    for got in both:
        np.testing.assert_allclose(got.gbar, [jnp.vdot(gradient[k], params()[k]) for k in "ab"], rtol=1e-12)
        # The second group comes after it.
        np.testing.assert_array_equal(np.isnan(got.hbar), [[True, True], [True, False]])
        np.testing.assert_array_equal(np.isnan(got.third), [True, False])


def test_the_status_says_that_a_bwd_is_not_the_derivative():
    tx = gn.grouped_newton(groups=gn.groups.per_tensor, delayed=False, averaging=None)
    step = jax.jit(lambda p, s: tx.update(jax.grad(after_a_wrong_loop)(p), s, p, value_fn=after_a_wrong_loop))
    updates, state = step(params(), tx.init(params()))
    assert only_grouped_newton(state).status == gn.CubicStatus.PARTLY_FINITE
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in updates.values())


# What is refused


def test_a_rule_without_second_derivatives_is_refused_by_name():
    host = lambda x: jax.pure_callback(np.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    from_the_host = vjp(jnp.sin, lambda x: (jnp.sin(x), host(x)), lambda r, ct: (ct * r,))

    def loss(p):
        return jnp.sum(from_the_host(p["a"]) ** 2 * p["b"])

    assert jax.grad(loss)(params())["a"].shape == (3,)
    for method in ("sweep", "nested"):
        with pytest.raises(ValueError, match="callback") as error:
            gn.summarize(loss, params(), params(), method=method)
        assert any("custom_vjp" in note and "fwd and bwd" in note for note in error.value.__notes__)


new_ref = getattr(jax, "new_ref", None) or getattr(jax, "array_ref", None)


def through_a_ref(x):
    ref = new_ref(jnp.zeros(3))
    ref[...] = jnp.sin(x)
    return ref[...]


def from_a_ref(x):
    return new_ref(jnp.sin(x))[...]


REFS = {
    "written": through_a_ref,
    "new": from_a_ref,
    "in jit and scan": jax.jit(lambda x: lax.scan(lambda h, _: (through_a_ref(h), None), x, None, length=2)[0]),
    "in cond": lambda x: lax.cond(x[0] > -9, through_a_ref, jnp.sin, x),
}


@pytest.mark.skipif(new_ref is None, reason="this jax has no refs")
@pytest.mark.parametrize("name", REFS)
def test_refs_are_refused(name):
    with pytest.raises(NotImplementedError, match=r"refs .* can't be swept"):
        gn.summarize(lambda p: jnp.sum(REFS[name](p["a"]) ** 2 * p["b"]), params(), params())


@pytest.mark.skipif(new_ref is None, reason="this jax has no refs")
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax.grad itself fails")
def test_refs_of_what_does_not_depend_on_params_are_let_be():
    def loss(p):
        ref = new_ref(jnp.zeros(3))
        ref[...] = lax.stop_gradient(p["a"]) + jnp.arange(3.0)
        return jnp.sum(jnp.sin(p["a"] * p["b"])) * jnp.sum(ref[...])

    plain = lambda p: jnp.sum(jnp.sin(p["a"] * p["b"])) * jnp.sum(lax.stop_gradient(p["a"]) + jnp.arange(3.0))
    assert_follows_the_gradient(loss, plain=plain, slopes_alone=True)


# Rows one by one


def ragged(p):
    sizes = jnp.array([1, 2], jnp.int32)
    h = jnp.sin(jnp.outer(p["a"], p["b"]))
    return jnp.sum(jnp.tanh(lax.ragged_dot(h, jnp.stack([jnp.outer(p["b"], p["a"]), h]), sizes)) ** 2)


def unbatched(x, y):
    """x * y by a primitive whose rows JAX can't take together."""
    return jax.custom_derivatives.linear_call(lambda y, x: x * y, lambda y, ct: ct * y, y, x)


UNBATCHED = {
    "ragged_dot": (ragged, None),
    "linear_call": in_both(unbatched, jnp.multiply)(
        lambda f: lambda p: jnp.sum(jnp.sin(f(jnp.sin(p["a"] * p["b"]), jnp.arange(1.0, 4.0))) ** 3)
    ),
    "linear_call, in a general node": in_both(unbatched, jnp.multiply)(
        lambda f: (
            lambda p: jnp.sum(
                lax.cond(p["a"][0] > -9, lambda x: f(jnp.sin(x), jnp.arange(1.0, 4.0)) ** 2, jnp.cos, p["a"] * p["b"])
            )
        )
    ),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_rows_of_a_stack_one_by_one_where_jax_cannot_batch(name):
    loss, plain = UNBATCHED[name]
    assert_follows_the_gradient(loss, plain=plain)


def differentiated_on_the_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


REFUSED = {
    "Reverse-mode": lambda x: lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: 2 * x, 1 + x**2),
    "Pure callbacks": differentiated_on_the_host,
    "scatter_mul": lambda x: x.at[jnp.array([0, 0])].multiply(x[:2]),
    "Differentiation rule": lambda x: jax.scipy.special.gammainc(1 + x**2, 2.0),
    "refs": through_a_ref,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_docs_say_is_refused_is_refused_with_that_error(name):
    documented = re.search(rf"\| `({name}[^|]*)` \|", DOCS)[1]
    with pytest.raises((NotImplementedError, ValueError), match=re.escape(documented)):
        gn.summarize(lambda p: jnp.sum(REFUSED[name](p["a"]) ** 2), params(), params())


def test_products_of_eight_bits():
    narrow = lambda x: x.astype(jnp.float8_e4m3fn)

    def loss(p):
        h = lax.dot(narrow(jnp.sin(p["w"])), narrow(p["w"].T), preferred_element_type=jnp.float32)
        return jnp.mean(jnp.tanh(h) ** 2) + jnp.sum(jnp.tanh(narrow(p["v"]).astype(jnp.float32)) ** 2)

    p = {"v": jnp.linspace(0.3, 1, 5, dtype=jnp.float32), "w": jnp.linspace(-0.4, 1, 12, dtype=jnp.float32)}
    p["w"] = p["w"].reshape(4, 3)
    # Tangents have the rounding of eight bits, 1/16, here or there.
    assert_follows_the_gradient(loss, p, tol=0.1, run_by=jax.jit)


# Training


def test_two_players_train_with_a_loss_each():
    """player^2 / 2 + player adversary - adversary^2 / 2, and fourth powers: lowered by the one, raised by the other."""

    def loss(p):
        a, b = p["player"], p["adversary"]
        return jnp.sum(a**2 / 2 + a * b - b**2 / 2 + (a**4 - b**4) / 20)

    start = {"player": jnp.array([1.0, -0.5]), "adversary": jnp.array([-0.8, 0.6])}
    mine = lambda name: lambda params: {k: k if k == name else gn.groups.FROZEN for k in params}
    options = {"direction": optax.identity(), "averaging": None, "delayed": False}
    lower, higher = (gn.grouped_newton(groups=mine(name), **options) for name in ("player", "adversary"))

    def step(carry, _):
        p, state, other = carry
        gradient = jax.grad(loss)(p)
        updates, state = lower.update(gradient, state, p, value_fn=loss)
        turned = jax.tree.map(jnp.negative, gradient)
        against, other = higher.update(turned, other, p, value_fn=lambda p: -loss(p))
        return (optax.apply_updates(optax.apply_updates(p, updates), against), state, other), None

    (end, *_), _ = jax.jit(lambda p: lax.scan(step, (p, lower.init(p), higher.init(p)), length=40))(start)
    for name in start:
        assert jnp.linalg.norm(end[name]) < 0.1 * jnp.linalg.norm(start[name])
