import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_close_by_largest
from flax import nnx
from jax import lax
from jax.extend import core as jex
from jax.flatten_util import ravel_pytree

import grouped_newton as gn
from grouped_newton import Summary, groups
from grouped_newton.groups import FROZEN, per_module, per_tensor, single

EPS32, EPS64 = 2.0**-23, 2.0**-52

summarize = functools.partial(gn.summarize, method="nested")  # the definition; the sweep is compared with it


@functools.partial(jax.jit, static_argnums=(0, 3))
def jitted(loss, params, direction, grouping=per_tensor):
    return summarize(loss, params, direction, grouping)


@functools.cache
def mlp_of_dtype(_):
    return models.tanh_mlp()


def mlp():
    """One loss for many tests: ``jitted`` compiles its summary once per precision and grouping."""
    return mlp_of_dtype(jnp.result_type(float))


# Published numbers


@pytest.mark.parametrize(("network", "grouping"), [("mlp", "canonical"), ("mlp", "trivial"), ("lenet", "canonical")])
def test_the_reference_is_reproduced(network, grouping, x64):
    (loss, params, direction), values = models.reference(network, grouping)
    summary = jitted(loss, params, direction, {"canonical": per_tensor, "trivial": single}[grouping])
    expected = Summary(loss(params), values["gbar"], values["hbar"], values["third"])
    assert_close_by_largest(summary, expected, 1e-9)
    if "third_full" in values:
        np.testing.assert_allclose(summary.third, np.einsum("sss->s", values["third_full"]), rtol=1e-9)


# Finite differences


class Case(NamedTuple):
    problem: models.Problem
    grouping: object


def two_leaves(rng, m, n):
    return {"w": jnp.asarray(rng.standard_normal((m, n))), "b": jnp.asarray(rng.standard_normal(n))}


def tied():
    """A kernel used twice, once transposed."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((4, 5)))

    def loss(p):
        hidden = jnp.tanh(x @ p["w"] + p["b"][None])
        return jnp.mean((hidden @ p["w"].T - x) ** 2)

    return Case(models.Problem(loss, two_leaves(rng, 5, 3), two_leaves(rng, 5, 3)), per_tensor)


def unused():
    rng = np.random.default_rng(2)
    params, direction = ({"used": two_leaves(rng, 3, 2), "spare": jnp.ones(4)} for _ in range(2))
    x = jnp.asarray(rng.standard_normal((6, 3)))
    loss = lambda p: jnp.mean(jnp.exp(jnp.sin(x @ p["used"]["w"] + p["used"]["b"][None])))
    return Case(models.Problem(loss, params, direction), per_tensor)


def scanned():
    """Stacked layers under scan, remat, cond and jit, with residuals and a norm."""
    rng = np.random.default_rng(3)
    draw = lambda: {"w": jnp.asarray(0.5 * rng.standard_normal((3, 4, 4))), "gain": jnp.asarray(rng.standard_normal(4))}
    x = jnp.asarray(rng.standard_normal((5, 4)))

    def loss(p):
        def body(h, w):
            h = lax.cond(jnp.sum(w) > 0, jnp.tanh, jnp.sin, h @ w) + h
            return h / jnp.sqrt(1 + jnp.mean(h**2, axis=1, keepdims=True)), None

        h, _ = lax.scan(jax.checkpoint(body), x, p["w"])
        return jnp.mean(jax.nn.softplus(h * p["gain"][None]) ** 2)

    return Case(models.Problem(jax.jit(loss), draw(), draw()), per_tensor)


def grouped_across_layers():
    """Groups that span layers, in another order than the forward pass, and a frozen leaf."""
    labels = {
        "Dense_0": {"bias": "x", "kernel": "y"},
        "Dense_1": {"bias": FROZEN, "kernel": "x"},
        "Dense_2": {"bias": "z", "kernel": "y"},
    }
    return Case(models.tanh_mlp((4, 5, 4, 3), seed=3), lambda _: labels)


CASES = [tied, unused, scanned, grouped_across_layers, lambda: Case(mlp(), per_tensor)]


def phi(case):
    """eta -> L(theta - sum_s eta_s u_s) for a batch of eta (N, S)."""
    loss, params, direction = case.problem
    index = groups.resolve(case.grouping, params).index
    leaves, treedef = jax.tree.flatten(params)
    u = jax.tree.leaves(direction)

    def one(eta):
        rates = [0 if g < 0 else eta[g] for g in index]
        return loss(treedef.unflatten([p - r * d for p, r, d in zip(leaves, rates, u, strict=True)]))

    return jax.jit(jax.vmap(one))


def central_differences(value, S, order, h):
    """Differences of phi along each e_s (orders 1, 3) or each pair e_s, e_t (order 2), all of O(h^2)."""
    e = np.eye(S)
    if order == 1:
        stencil = [(0.5, e), (-0.5, -e)]
    elif order == 2:
        p, q = np.repeat(e, S, axis=0), np.tile(e, (S, 1))
        stencil = [(0.25, p + q), (-0.25, p - q), (-0.25, q - p), (0.25, -p - q)]
    else:
        stencil = [(0.5, 2 * e), (-1.0, e), (1.0, -e), (-0.5, -2 * e)]
    values = np.asarray(value(jnp.asarray(h * np.concatenate([points for _, points in stencil]))))
    total = np.tensordot([c for c, _ in stencil], values.reshape(len(stencil), -1), axes=1)
    rounding = 8 * EPS64 * sum(abs(c) for c, _ in stencil) * np.max(np.abs(values)) / h**order
    return total.reshape((S, S) if order == 2 else S) / h**order, rounding


@pytest.mark.parametrize("make_case", CASES, ids=["tied", "unused", "scanned", "across layers", "mlp"])
def test_the_summary_is_the_finite_differences_of_phi(make_case, x64):
    case = make_case()
    summary = jitted(*case.problem, case.grouping)
    value, S = phi(case), len(summary.gbar)
    assert float(summary.loss) == pytest.approx(float(value(jnp.zeros((1, S)))[0]), rel=32 * EPS64)
    for order, derivative in ((1, -summary.gbar), (2, summary.hbar), (3, -summary.third)):
        h = EPS64 ** (1 / (order + 2))  # truncation h^2 and rounding eps / h^order in balance
        coarse, _ = central_differences(value, S, order, 2 * h)
        fine, rounding = central_differences(value, S, order, h)
        # The error of the fine difference is a third of what halving h took away, to leading order.
        tolerance = np.abs(coarse - fine) + rounding
        assert np.all(np.abs(fine - derivative) <= tolerance)
        assert np.max(tolerance) < 1e-4 * np.max(np.abs(derivative)), "the differences are too coarse to tell anything"


def test_an_unused_parameter_has_a_row_of_zeros(x64):
    case = unused()
    summary = jitted(*case.problem)
    s = groups.names(per_tensor, case.problem.params).index("spare")
    assert np.all(summary.hbar[s] == 0)
    assert np.all(summary.hbar[:, s] == 0)
    assert (summary.gbar[s], summary.third[s]) == (0, 0)


# Identities


def test_curvature_of_single_groups_polarises_to_the_off_diagonal(x64):
    loss, params, direction = mlp()
    leaves, treedef = jax.tree.flatten(direction)
    S = len(leaves)

    @jax.jit
    @jax.vmap
    def curvature(factors):
        u = treedef.unflatten([f * leaf for f, leaf in zip(factors, leaves, strict=True)])
        return summarize(loss, params, u, single).hbar[0, 0]

    e = np.eye(S)
    p, q = np.repeat(e, S, axis=0), np.tile(e, (S, 1))
    polarised = (curvature(jnp.asarray(p + q)) - curvature(jnp.asarray(p - q))).reshape(S, S) / 4
    hbar = jitted(loss, params, direction).hbar
    np.testing.assert_allclose(hbar, polarised, rtol=0, atol=64 * EPS64 * np.max(np.abs(hbar)))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomials_have_their_closed_form(degree, precision):
    rng = np.random.default_rng(degree)
    draw = lambda: {"a": rng.standard_normal((2, 2)), "b": [rng.standard_normal(3), rng.standard_normal(())], "c": 0.7}
    labels = {"a": "x", "b": ["y", FROZEN], "c": "x"}
    params, direction = (jax.tree.map(lambda x: jnp.asarray(x, float), draw()) for _ in range(2))
    theta = ravel_pytree(params)[0]
    P, is_x, is_y = 9, np.arange(9) < 4, (np.arange(9) >= 4) & (np.arange(9) < 7)
    is_x[8] = True
    u = np.asarray(ravel_pytree(direction)[0])
    U = np.stack([u * is_x, u * is_y], axis=1)
    b, A, C = rng.standard_normal(P), rng.standard_normal((P, P)), rng.standard_normal((P, P, P))
    A = (A + A.T) * (degree >= 2)
    C = sum(C.transpose(axes) for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))
    C = C * (degree >= 3)

    def loss(p):
        x = ravel_pytree(p)[0]
        cubic = jnp.einsum("ijk,i,j,k", jnp.asarray(C, x.dtype), x, x, x) / 6
        return 2 + jnp.asarray(b, x.dtype) @ x + x @ jnp.asarray(A, x.dtype) @ x / 2 + cubic

    x = np.asarray(theta, np.float64)
    gradient, hessian = b + A @ x + np.einsum("ijk,j,k->i", C, x, x) / 2, A + C @ x
    third = np.einsum("ijk,is,js,ks->s", C, U, U, U)
    summary = jitted(loss, params, direction, lambda _: labels)
    tolerance = 64 * precision
    close = lambda a, e, size: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.max(size))
    close(summary.gbar, U.T @ gradient, np.abs(U.T) @ np.abs(gradient))
    close(summary.hbar, U.T @ hessian @ U, np.abs(U.T) @ np.abs(hessian) @ np.abs(U))
    close(summary.third, third, np.einsum("ijk,is,js,ks->s", np.abs(C), *[np.abs(U)] * 3))
    if degree < 3:
        assert np.all(third == 0)
    if degree < 2:
        assert np.all(hessian == 0)


def test_the_summary_is_homogeneous_in_the_direction_of_each_group(x64):
    loss, params, direction = mlp()
    a = jnp.array([3.0, -0.5, 1e-3, -20.0])
    leaves, treedef = jax.tree.flatten(direction)
    scaled = treedef.unflatten([f * leaf for f, leaf in zip(a, leaves, strict=True)])
    before, after = jitted(loss, params, direction), jitted(loss, params, scaled)
    rtol = 1e4 * EPS64  # entries, not the largest one: some of them come from cancelling sums
    np.testing.assert_allclose(after.gbar, a * before.gbar, rtol=rtol)
    np.testing.assert_allclose(after.hbar, jnp.outer(a, a) * before.hbar, rtol=rtol)
    np.testing.assert_allclose(after.third, a**3 * before.third, rtol=rtol)
    assert after.loss == before.loss


@pytest.mark.parametrize("coarser", [single, per_module, {"Dense_0": "a", "Dense_1": {"bias": "b", "kernel": "a"}}])
def test_coarsening_sums_slopes_and_curvatures_but_not_thirds(coarser, x64):
    loss, params, direction = mlp()
    fine = jitted(loss, params, direction)
    grouping = coarser if callable(coarser) else lambda _: coarser
    coarse = jitted(loss, params, direction, grouping)
    into = np.eye(len(coarse.gbar))[:, groups.resolve(grouping, params).index]
    np.testing.assert_allclose(coarse.gbar, into @ fine.gbar, rtol=1e3 * EPS64)
    np.testing.assert_allclose(coarse.hbar, into @ fine.hbar @ into.T, rtol=1e3 * EPS64)
    merged = into.sum(axis=1) > 1
    assert np.all(np.abs(coarse.third - into @ fine.third)[merged] > 1e-3), "these leaves do interact"


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0, 3, 1]])
def test_permuting_the_leaves_permutes_the_summary(order, x64):
    """Leaf order that opposes the forward pass exercises other triangles."""
    problem = mlp()
    leaves, treedef = jax.tree.flatten(problem.params)
    u = jax.tree.leaves(problem.direction)
    back = np.argsort(order)
    loss = lambda permuted: problem.loss(treedef.unflatten([permuted[i] for i in back]))
    permuted = jitted(loss, [leaves[i] for i in order], [u[i] for i in order])
    loss, gbar, hbar, third = jitted(*problem)
    assert_close_by_largest(
        permuted, Summary(loss, gbar[(order,)], hbar[np.ix_(order, order)], third[(order,)]), 64 * EPS64
    )


def test_renaming_labels_changes_nothing(x64):
    problem = mlp()
    labels = {"Dense_0": {"bias": "z", "kernel": "y"}, "Dense_1": {"bias": "y", "kernel": "x"}}
    renamed = jax.tree.map({"x": 3, "y": -1, "z": 0}.get, labels)
    named, numbered = jitted(*problem, lambda _: labels), jitted(*problem, lambda _: renamed)
    assert jax.tree.all(jax.tree.map(np.array_equal, named, numbered))


def test_hbar_is_symmetric_to_the_last_bit():
    hbar = jitted(*mlp()).hbar
    assert np.array_equal(hbar, hbar.T)
    assert np.all(hbar != 0)


# Dtypes


def wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("float32 bfloat16 float16", "float32"),
        ("bfloat16 float16", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16 float64 float32", "float64"),
    ],
)
def test_mixed_dtypes_give_the_widest_and_at_least_float32(dtypes, expected, x64):
    dtypes = dtypes.split()
    # Quarters up to 2: all products and sums are exact in every dtype.
    theta, u = np.random.default_rng(0).integers(-8, 9, size=(2, len(dtypes), 5)) / 4
    params, direction = ([jnp.asarray(x, t) for x, t in zip(xs, dtypes, strict=True)] for xs in (theta, u))
    loss = lambda p: sum(jnp.sum(wide(x) ** 3) for x in p)
    summary = jitted(loss, params, direction)
    assert {x.dtype for x in summary} == {jnp.dtype(expected)}
    np.testing.assert_array_equal(summary.gbar, 3 * np.sum(theta**2 * u, axis=1))
    np.testing.assert_array_equal(summary.hbar, 6 * np.diag(np.sum(theta * u**2, axis=1)))
    np.testing.assert_array_equal(summary.third, 6 * np.sum(u**3, axis=1))


@pytest.mark.parametrize("data", ["float64", "bfloat16"])
def test_the_dtype_of_the_data_does_not_decide(data, x64):
    scale = jnp.asarray([1, 2, 3], data)
    params = {"w": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    loss = lambda p: jnp.sum(scale * (p["w"] + p["b"]).astype(data) ** 3)
    summary = jitted(loss, params, params)
    assert {x.dtype for x in summary} == {jnp.dtype("float32")}
    assert (summary.gbar.tolist(), summary.hbar.tolist()) == ([72, 72], [[72, 72], [72, 72]])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])  # XLA skips some roundings
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_contracted_in_float32(dtype, transform):
    # 33/32 * 17/16 needs ten bits, more than bfloat16 has; the sums need 23, more than either has and float32's all.
    n = 14_001
    slope, u = jnp.full(n, 33 / 32, dtype), jnp.full(n, 17 / 16, dtype)
    loss = lambda p: jnp.sum(wide(slope) * wide(p) + wide(p) ** 2 / 2)
    summary = transform(functools.partial(summarize, loss))(jnp.zeros(n, dtype), u)
    assert summary.gbar.tolist() == [n * 561 / 512]
    assert summary.hbar.tolist() == [[n * 289 / 256]]


def test_a_direction_in_another_dtype_is_cast_to_that_of_the_params():
    loss, params, direction = mlp()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    cast = jax.tree.map(lambda u: u.astype(jnp.bfloat16), direction)
    given, expected = jitted(loss, half, direction), jitted(loss, half, cast)
    assert jax.tree.all(jax.tree.map(np.array_equal, given, expected))
    assert not np.array_equal(given.gbar, jitted(loss, params, direction).gbar)


def test_python_numbers_and_numpy_arrays_are_params_too():
    loss = lambda p: p["a"] ** 3 * jnp.sum(p["b"] ** 2)
    summary = summarize(loss, {"a": 2.0, "b": np.float32([1, 2])}, {"a": 1, "b": np.float32([1, 0])})
    # In (a, b): gradient (3 a^2 |b|^2, 2 a^3 b), and so on.
    assert summary.gbar.tolist() == [60, 16]
    assert summary.hbar.tolist() == [[60, 24], [24, 16]]
    assert summary.third.tolist() == [30, 0]
    assert float(summary.loss) == 40


def test_double_precision_agrees_with_single_to_rounding():
    single_precision = jitted(*mlp())
    with jax.enable_x64(True):
        double_precision = jitted(*mlp())
    assert single_precision.gbar.dtype == jnp.float32
    assert double_precision.gbar.dtype == jnp.float64
    assert_close_by_largest(single_precision, double_precision, 64 * EPS32)


# Transformations


def test_compiled_and_not_agree_to_rounding():
    assert_close_by_largest(summarize(*mlp(), per_module), jitted(*mlp(), per_module), 64 * EPS32)


def noisy_loss(params, x, y, key, mean):
    """Dropout, and an activation centred by running statistics that the batch has moved a little."""

    def between(h):
        centred = h - 0.9 * mean[None] - 0.1 * jnp.mean(h, axis=0, keepdims=True)
        return jnp.tanh(jnp.where(jax.random.bernoulli(key, 0.7, h.shape), centred / 0.7, 0))

    return models.nll(models.apply_dense(params, x, between), y)


def batches(count):
    rng = np.random.default_rng(5)
    x, y = jnp.asarray(rng.standard_normal((count, 6, 4))), jnp.asarray(rng.integers(3, size=(count, 6)))
    return x, y, jax.random.split(jax.random.key(0), count), jnp.asarray(rng.standard_normal((count, 5)))


def test_vmap_over_batches_keys_and_statistics_is_a_loop(x64):
    params, direction = models.dense_params((4, 5, 3), seed=1), models.dense_params((4, 5, 3), seed=2)
    one = lambda *batch: summarize(lambda p: noisy_loss(p, *batch), params, direction, per_module)
    together, compiled = jax.jit(jax.vmap(one))(*batches(4)), jax.jit(one)
    alone = [compiled(*(x[i] for x in batches(4))) for i in range(4)]
    assert_close_by_largest(together, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), 64 * EPS64)
    assert len(np.unique(together.loss)) == 4


def test_vmap_over_params_and_directions_is_a_loop():
    loss = mlp().loss
    seeds = [tuple(models.dense_params((4, 5, 3), seed=i + k) for k in (0, 10)) for i in range(3)]
    params, direction = jax.tree.map(lambda *xs: jnp.stack(xs), *seeds)
    together = jax.jit(jax.vmap(functools.partial(summarize, loss)))(params, direction)
    alone = [jitted(loss, *seed) for seed in seeds]
    assert_close_by_largest(together, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), 64 * EPS32)


def test_what_value_fn_closes_over_is_constant():
    """The summary of a loss whose key, batch and statistics are traced is that of a loss with them written in."""
    params, direction = models.dense_params((4, 5, 3), seed=1), models.dense_params((4, 5, 3), seed=2)
    batch = tuple(x[0] for x in batches(1))
    traced = jax.jit(lambda batch: summarize(lambda p: noisy_loss(p, *batch), params, direction, single))(batch)
    assert_close_by_largest(traced, jitted(lambda p: noisy_loss(p, *batch), params, direction, single), 64 * EPS32)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def test_an_nnx_model_with_batch_norm_and_dropout_keeps_its_state():
    model = Noisy(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4))), jnp.arange(8) % 3

    def loss(p):
        return models.nll(nnx.merge(graph, p, rest, copy=True)(x), y)

    gradient = jax.jit(jax.grad(loss))(params)
    before = jax.tree.map(jnp.array, nnx.state(model))
    summary = jitted(loss, params, gradient, per_module)
    again = jitted(loss, params, gradient, per_module)
    assert jax.tree.all(jax.tree.map(np.array_equal, summary, again))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, nnx.state(model)))
    assert groups.names(per_module, params) == ("hidden", "norm", "out")
    squares = {name: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient[name])) for name in ("hidden", "norm", "out")}
    np.testing.assert_allclose(summary.gbar, list(squares.values()), rtol=256 * EPS32)


# Frozen leaves


def test_frozen_leaves_are_constants_of_any_kind(x64):
    loss, params, direction = mlp()
    extra = {"steps": jnp.arange(3), "key": jax.random.key(3), "phase": 0.5 + 1j, "act": jnp.tanh, "off": 2.0}

    def loss_of_all(p):
        net, extra = p["net"], p["extra"]
        noise = 1 + jax.random.uniform(extra["key"]) * jnp.sum(extra["steps"]) * extra["off"] * abs(extra["phase"])
        return loss(net) * noise + extra["act"](extra["off"])

    labels = {"net": {name: {k: f"{name}/{k}" for k in layer} for name, layer in params.items()}, "extra": FROZEN}
    loss_of_net = lambda p: loss_of_all({"net": p, "extra": extra})
    expected = jitted(loss_of_net, params, direction)
    # Whatever stands at a frozen leaf of the direction, as float0 does in a gradient with integers allowed.
    for u in (extra, {**extra, "steps": np.zeros(3, jax.dtypes.float0), "key": 0.0, "off": jnp.nan}):
        one = lambda p, v, u=u: summarize(loss_of_all, {"net": p, "extra": extra}, {"net": v, "extra": u}, labels)
        assert_close_by_largest(jax.jit(one)(params, direction), expected, 64 * EPS64)


def test_a_tree_without_leaves_has_an_empty_summary():
    summary = summarize(lambda p: 3.0, {}, {})
    assert summary.loss == 3
    assert [x.shape for x in summary] == [(), (0,), (0, 0), (0,)]


# Cost


def sizes_of_intermediates(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)):
            if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
                yield from sizes_of_intermediates(getattr(inner, "jaxpr", inner))


def test_no_array_is_larger_than_the_largest_parameter():
    """Let alone S times P numbers, or S times those of one tensor."""
    loss, params, direction = models.tanh_mlp((20,) * 9, batch=3)
    largest = max(x.size for x in jax.tree.leaves(params))

    def dense(params, direction):
        """All rows at once, as a check of the check."""
        leaves, treedef = jax.tree.flatten(params)
        u = jax.tree.leaves(direction)
        move = lambda eta: treedef.unflatten([p - e * d for p, e, d in zip(leaves, eta, u, strict=True)])
        return jax.hessian(lambda eta: loss(move(eta)))(jnp.zeros(len(leaves)))

    size = lambda f: max(sizes_of_intermediates(jax.make_jaxpr(f)(params, direction).jaxpr))
    assert size(functools.partial(summarize, loss)) <= largest
    assert size(dense) >= len(jax.tree.leaves(params)) * largest


def test_nothing_upstream_of_a_group_is_differentiated():
    """Row s of hbar and third_s touch what lies behind group s only: the triangle, not the square."""
    calls = collections.Counter()

    def probe(i):
        @jax.custom_jvp
        def identity(x):
            return x

        @identity.defjvp
        def _(primals, tangents):
            calls[i] += 1
            return identity(*primals), tangents[0]

        return identity

    layers = 5
    params, x = models.dense_params((3,) * (layers + 1)), jnp.ones((2, 3))

    def probed(p):
        h = x
        for i, layer in enumerate(p.values()):
            h = probe(i)(jnp.tanh(h @ layer["kernel"] + layer["bias"][None]))
        return jnp.sum(h**2)

    jax.make_jaxpr(lambda p: summarize(probed, p, p, per_module))(params)
    assert calls[0] > 0
    at_the_door = 1  # a look for custom rules
    each = calls[0] - at_the_door
    assert [calls[i] for i in range(layers)] == [each * (i + 1) + at_the_door for i in range(layers)]


# Errors


def two():
    return {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda p: (jnp.sum(p["a"]), 1.0), TypeError, r"the loss alone, .*got PyTreeDef\(\(\*, \*\)\); drop auxiliary"),
        (lambda p: {"loss": jnp.sum(p["a"])}, TypeError, "the loss alone, .*drop auxiliary outputs"),
        (lambda p: None, TypeError, "the loss alone, .*got PyTreeDef.None"),
        (lambda p: p["a"], ValueError, r"one real number, got an array of shape \(2,\); take its mean or sum"),
        (lambda p: jnp.sum(p["a"])[None], ValueError, r"got an array of shape \(1,\); take its mean"),
        (lambda p: jnp.sum(p["a"] > 0), TypeError, "a real floating-point number, got dtype int32"),
        (lambda p: jnp.all(p["a"] > 0), TypeError, "a real floating-point number, got dtype bool"),
        (lambda p: jnp.sum(p["a"]) + 0j, TypeError, "a real floating-point number, got dtype complex64"),
    ],
)
def test_a_value_fn_that_does_not_return_one_real_number_is_refused(value, error, message, transform):
    with pytest.raises(error, match="value_fn must return .*" + message):
        transform(lambda p: summarize(value, p, p))(two())


@pytest.mark.parametrize(
    ("direction", "error", "message"),
    [
        ({"a": jnp.ones(2)}, ValueError, "direction has 1 arrays and the params have 2; only one of them has b/c"),
        (None, ValueError, "direction has 0 arrays and the params have 2; only one of them has a"),
        ({**two(), "d": jnp.ones(2)}, ValueError, "3 arrays and .* 2; only one of them has d. The direction must have"),
        ({"a": jnp.ones(2), "b": {"d": jnp.ones(3)}}, ValueError, "only one of them has b/c"),
        (collections.OrderedDict(b=two()["b"], a=jnp.ones(2)), ValueError, "2; they come in another order"),
        ({**two(), "a": jnp.ones(3)}, ValueError, r"shape \(3,\) at parameter a, which has shape \(2,\); it must have"),
        ({**two(), "a": jnp.ones(())}, ValueError, r"shape \(\) at parameter a, which has shape \(2,\)"),
        ({**two(), "b": {"c": jnp.ones((1, 3))}}, ValueError, r"shape \(1, 3\) at parameter b/c, which has"),
        ({**two(), "a": jnp.ones(2) * 1j}, TypeError, "dtype complex64 at parameter a, .* float32; it must be real"),
    ],
)
def test_a_direction_that_does_not_match_is_refused(direction, error, message):
    with pytest.raises(error, match=message):
        summarize(lambda p: jnp.sum(p["a"]) * jnp.sum(p["b"]["c"]), two(), direction)


def test_a_grouping_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no label for parameter b/c"):
        summarize(lambda p: jnp.sum(p["a"]), two(), two(), {"a": "x"})


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of \(.*'nested'.*\), got 'bogus'"):
        summarize(lambda p: jnp.sum(p["a"]), two(), two(), method="bogus")
