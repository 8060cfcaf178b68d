"""The sweep equals the nested definition on a zoo of small losses, one for each thing that a loss may contain."""

import itertools
import math

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same_summary
from interpreter import uncompiled
from jax import lax

import grouped_newton as gn

EPS32, EPS64 = 2.0**-23, 2.0**-52


def normal(*shape, seed=0):
    # The same numbers in single and in double precision.
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), sum(shape) + len(shape)), shape, jnp.float32)


def both(loss, params, groups=gn.groups.per_tensor, compiled=False):
    """The summary along the gradient, compiled or not, and what the definition says; compiling takes the longest."""
    by = lambda method: lambda p, u: gn.summarize(loss, p, u, groups, method=method)
    direction = uncompiled(jax.grad(loss))(params)
    sweep = (jax.jit if compiled else uncompiled)(by("sweep"))
    return sweep(params, direction), uncompiled(by("nested"))(params, direction)


def rows():
    return normal(6, 5)


def mlp(activation):
    params = [normal(5, 7), normal(7) / 5, normal(7, 4), normal(4), normal(4, 3), normal(3)]
    labels = jnp.arange(6) % 3

    def loss(p):
        h = rows().astype(p[0].dtype)
        for i in range(3):
            h = h @ p[2 * i] + p[2 * i + 1][None]
            h = activation(h) if i < 2 else h
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(h), labels[:, None], 1))

    return loss, params


def transformer():
    params = {
        "embed": normal(5, 4),
        "qkv": normal(3, 4, 4) / 2,
        "gain": 1 + normal(4) / 5,
        "shift": normal(4, seed=9) / 5,
        "w": normal(4, 4),
    }
    tokens = jnp.array([0, 3, 1, 1, 4, 2])

    def apply(p, h):
        centred = h - h.mean(-1, keepdims=True)
        z = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["gain"][None] + p["shift"][None]
        q, k, v = (z @ w for w in p["qkv"])
        h = h + jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((6, 6), bool)), q @ k.T / 2, -1e9)) @ v
        return h + jax.nn.gelu(h @ p["w"])

    def loss(p):
        h = apply(p, p["embed"][tokens])
        logits = h @ p["embed"].T  # tied
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], 1))

    return loss, params


def conv_net():
    params = {"a": normal(3, 3, 3, 4), "b": normal(3, 3, 2, 4), "c": normal(4), "scale": 1 + normal(4) / 5}
    x = normal(2, 10, 10, 3)
    dims = ("NHWC", "HWIO", "NHWC")

    def loss(p):
        h = lax.conv_general_dilated(x.astype(p["a"].dtype), p["a"], (2, 2), "SAME", dimension_numbers=dims)
        mean, var = h.mean((0, 1, 2), keepdims=True), h.var((0, 1, 2), keepdims=True)
        h = jnp.tanh((h - mean) * lax.rsqrt(var + 1e-5) * p["scale"][None, None, None])
        h = lax.conv_general_dilated(
            h, p["b"], (1, 1), "SAME", rhs_dilation=(2, 2), feature_group_count=2, dimension_numbers=dims
        )
        h = lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.mean((jnp.sin(h) * p["c"][None, None, None]) ** 2)

    return loss, params


def overlapping_pool():
    params = {"w": normal(3, 3, 1, 2), "v": normal(2)}
    x = normal(2, 9, 9, 1)

    def loss(p):
        h = lax.conv_general_dilated(
            x.astype(p["w"].dtype), p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jnp.tanh(h)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jnp.sum((h @ p["v"]) ** 3)

    return loss, params


def vectors():
    return {"a": normal(4), "b": 1 + normal(4, seed=1) ** 2}


def rnn(reverse):
    params = {"h": normal(3, 4), "w": normal(5, 4, 4) / 2, "b": normal(5, 4), "shared": normal(4, 4) / 3}

    def loss(p):
        def step(h, wb):
            h = jnp.tanh(h @ wb[0] + wb[1][None]) + h @ p["shared"]
            return h, jnp.sum(jnp.sin(h) * wb[1][None])

        h, ys = lax.scan(step, p["h"], (p["w"], p["b"]), reverse=reverse)
        return jnp.mean(h**2) + jnp.sum(jnp.exp(ys / 10))

    return loss, params


def nested_scan():
    params = {"w": normal(5, 4, 4) / 2, "b": normal(5, 4)}

    def loss(p):
        def step(carry, w):
            i, h = carry
            h = jax.checkpoint(lambda h, w: jnp.sin(h @ w))(h, w)
            h, _ = lax.scan(lambda h, b: (h + jnp.tanh(h * b[None]), None), h, p["b"])
            return (i + 1, h), h[0]

        (i, h), ys = lax.scan(step, (0, rows()[:, :4].astype(p["b"].dtype)), p["w"])
        return jnp.mean(h**3) * i + jnp.sum(ys**3)

    return loss, params


@jax.custom_jvp
def halved_gradient(x):
    return jnp.sin(x)


@halved_gradient.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return halved_gradient(x), 0.5 * jnp.cos(x) * dx  # the function itself, so that higher orders follow the rule


def smooth_norm(p):
    safe = jnp.where(p["b"] > 1, p["b"], 1.0)
    return jnp.sum(jnp.where(p["b"] > 1, jnp.log(safe) ** 2, p["a"]) * p["a"])


ZOO = {
    **{f"mlp {f.__name__}": mlp(f) for f in (jnp.tanh, jax.nn.relu, jax.nn.gelu)},
    "transformer, tied embedding, gather": transformer(),
    "convolutions, batch norm, max-pool": conv_net(),
    "overlapping max-pool with padding": overlapping_pool(),
    "scan": rnn(False),
    "scan in reverse": rnn(True),
    "scan in scan, remat, integer carry": nested_scan(),
    "fori_loop": (
        lambda p: jnp.sum(
            lax.fori_loop(0, 4, lambda i, c: jnp.sin(c @ p["w"]) * p["b"][i], rows().astype(p["b"].dtype)) ** 2
        ),
        {"w": normal(5, 5), "b": normal(4)},
    ),
    "mean over micro-batches": (
        lambda p: jnp.mean(lax.map(lambda x: jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2, normal(3, 6, 4))),
        {"a": normal(4, 4), "b": normal(4)},
    ),
    "sort, cumsum, prod": (
        lambda p: jnp.sum(jnp.sort(p["a"]) * jnp.cumsum(p["b"]) ** 2) * jnp.prod(p["b"]),
        vectors(),
    ),
    "cond": (
        lambda p: lax.cond(
            p["a"].sum() > 0, lambda q: jnp.sum(jnp.sin(q["a"]) * q["b"]), lambda q: jnp.sum(q["a"] ** 3 * q["b"]), p
        ),
        vectors(),
    ),
    "where with safe branches": (smooth_norm, vectors()),
    "power of two operands, quotient, norm": (
        lambda p: jnp.sum(p["b"] ** p["a"]) / jnp.linalg.norm(p["a"]) + jnp.sum(p["a"] / p["b"]),
        vectors(),
    ),
    "dynamic slices, concatenation, padding": (
        lambda p: (
            jnp.sum(
                lax.dynamic_update_slice(
                    jnp.concatenate([p["a"], p["b"] ** 2]), lax.dynamic_slice(p["b"], (1,), (2,)), (3,)
                )
                ** 3
            )
            + jnp.sum(jnp.pad(p["a"], 2, constant_values=1.0) ** 3)
        ),
        vectors(),
    ),
    "linear solve": (
        lambda p: jnp.sum(jnp.linalg.solve(p["w"] + 3 * jnp.eye(4), p["b"]) ** 2),
        {"w": normal(4, 4), "b": normal(4)},
    ),
    "cholesky, eigh": (
        lambda p: (
            jnp.sum(jnp.linalg.cholesky(p["w"] @ p["w"].T + jnp.eye(4)) @ p["b"])
            + jnp.sum(jnp.linalg.eigvalsh(p["w"] @ p["w"].T) ** 1.5)
        ),
        {"w": normal(4, 4), "b": normal(4)},
    ),
    "fft, complex intermediates": (
        lambda p: jnp.sum(p["a"] * jnp.sin(jnp.abs(jnp.fft.fft(p["b"]) * jnp.exp(1j * p["a"])))),
        vectors(),
    ),
    "custom_jvp that is not the derivative": (lambda p: jnp.sum(halved_gradient(p["a"] * p["b"]) * p["a"]), vectors()),
    "integers, stop_gradient, rounding": (
        lambda p: (
            jnp.sum(p["a"] * jnp.round(p["b"]) * lax.stop_gradient(p["b"]) * jnp.argmax(p["b"]) * jnp.sign(p["a"]))
            + jnp.sum(p["b"] ** 3)
        ),
        vectors(),
    ),
    "group with tensors at different depths": (mlp(jnp.tanh)[0], mlp(jnp.tanh)[1], ["x", "y", "z", "x", "y", "z"]),
    "one group": (*mlp(jnp.tanh), gn.groups.single),
    "frozen part": (*mlp(jnp.tanh), ["x", gn.groups.FROZEN, "z", "x", gn.groups.FROZEN, "z"]),
    "unused and constant": (lambda p: jnp.sum(p["a"] ** 4) + 0 * jnp.sum(p["b"]), {**vectors(), "unused": jnp.ones(3)}),
    "reversed order of groups": (*mlp(jnp.tanh), ["f", "e", "d", "c", "b", "a"]),
}


# These are compared with the definition in single precision. In double precision scanned transformers and networks with
# convolutions are in tests/benchmarks/test_models.py.
SINGLE = ("mlp tanh", "convolutions, batch norm, max-pool", "scan", "where with safe branches")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("transformer", "mlp")) else [])
        for name in ZOO
        if name not in SINGLE[:3]
    ],
)
def test_equals_the_definition_in_double_precision(x64, name):
    loss, params, *groups = ZOO[name]
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    assert_same_summary(*both(loss, params, *groups), tol=1e-10)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@pytest.mark.parametrize(("network", "grouping"), [("mlp", "canonical"), ("mlp", "trivial"), ("lenet", "canonical")])
def test_the_reference_is_reproduced(x64, network, grouping):
    (loss, params, direction), values = models.reference(network, grouping)
    groups = {"canonical": gn.groups.per_tensor, "trivial": gn.groups.single}[grouping]
    got = jax.jit(lambda p, u: gn.summarize(loss, p, u, groups, method="sweep"))(params, direction)
    expected = gn.Summary(loss(params), *(jnp.asarray(values[name]) for name in ("gbar", "hbar", "third")))
    assert_same_summary(got, expected, 1e-9)


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_equals_the_definition_in_single_precision(name):
    # Entries are sums of some hundred products; the sweep and the definition round them in another order.
    assert_same_summary(*both(*ZOO[name], compiled=True), tol=256 * EPS32)


def test_a_few_thousand_numbers_a_row_in_single_precision():
    """Sums of this length were compiled to garbage, of which no smaller loss has any."""
    blocks, batch = 4, 256
    keys = iter(jax.random.split(jax.random.key(0), 2 * blocks + 2))
    layer = lambda m, n: {"w": jax.random.normal(next(keys), (m, n)) / m**0.5, "b": jnp.zeros(n)}
    params = {"embed": layer(8, 16), "head": layer(16, 3)}
    params |= {"blocks": [{"down": layer(16, 16), "up": layer(16, 16)} for _ in range(blocks)]}
    x, labels = jax.random.normal(jax.random.key(3), (batch, 8)), jax.nn.one_hot(jnp.arange(batch) % 3, 3)
    dense = lambda p, x: x @ p["w"] + p["b"][None]

    def loss(params):
        h = dense(params["embed"], x)
        for block in params["blocks"]:
            h = h + dense(block["down"], jnp.tanh(dense(block["up"], h))) / 2
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(dense(params["head"], h)) * labels, axis=1))

    direction = jax.tree.map(jnp.sign, jax.grad(loss)(params))
    by = lambda method: lambda p, u: gn.summarize(loss, p, u, method=method)
    found, expected = jax.jit(by("sweep"))(params, direction), uncompiled(by("nested"))(params, direction)
    assert_same_summary(found, expected, 256 * EPS32)


def test_compiled_or_not_it_is_the_same():
    loss, params = ZOO["cond"]
    direction = jax.jit(jax.grad(loss))(params)
    eager = gn.summarize(loss, params, direction)
    compiled = jax.jit(lambda p, u: gn.summarize(loss, p, u))(params, direction)
    assert_same_summary(compiled, eager, 256 * EPS32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mlp tanh", jnp.bfloat16),
        ("convolutions, batch norm, max-pool", jnp.bfloat16),
    ],
)
def test_half_precision_params_and_activations_stay_close(name, dtype):
    loss, params = ZOO[name]
    half = cast(params, dtype)
    assert jax.eval_shape(loss, half).dtype == dtype

    @jax.jit
    def run(half):
        params = cast(half, jnp.float32)
        direction = cast(cast(jax.grad(loss)(params), dtype), jnp.float32)
        return [gn.summarize(loss, p, direction) for p in (half, params)]

    got, expected = run(half)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float32)}
    # Each of some ten layers of elementwise equations rounds values, adjoints and tangents.
    assert_same_summary(got, expected, 48 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "scan"])
def test_adjoints_of_half_precision_add_up_in_single(loop):
    # The adjoint of h is 1 + 64/256: in bfloat16, 1 + 1/256 is 1 again. Not compiled: XLA skips roundings.
    terms = jnp.concatenate([jnp.full(64, 1 / 256), jnp.ones(1)]).astype(jnp.bfloat16)[:, None] * jnp.ones(
        (1, 3), jnp.bfloat16
    )

    def loss(p):
        h = jnp.sin(p) + p * p
        term = lambda v: jnp.dot(h, v).astype(jnp.float32)
        if loop:
            return lax.scan(lambda c, v: (c + term(v), None), jnp.float32(0), terms, reverse=True)[0]
        return sum(term(v) for v in terms)

    p = jnp.zeros(3, jnp.bfloat16)
    got = gn.summarize(loss, p, jnp.ones(3))
    assert got.hbar.tolist() == [[6 * 1.25]]
    assert got.third.tolist() == [-3 * 1.25]


def test_slopes_through_half_precision_in_a_loops_body_are_within_a_share_of_eps():
    """By tangents, as nothing outside is half; along what is orthogonal to the gradient, where errors stand alone."""
    weights, x = normal(3, 8, 8) / 3, normal(4, 8)

    def loss(w, dtype=jnp.bfloat16):
        layer = lambda h, w: (h + jnp.tanh(h.astype(dtype) @ w.astype(dtype)).astype(h.dtype), None)
        return jnp.mean(jnp.cos(lax.scan(layer, x, w)[0]))

    @jax.jit
    def slopes(w):
        exact = jax.grad(lambda w: loss(w, jnp.float32))(w)
        u = weights[::-1] - jnp.vdot(weights[::-1], exact) / jnp.vdot(exact, exact) * exact
        size = jnp.linalg.norm(u) * jnp.linalg.norm(exact)
        found = gn.summarize(loss, w, u, gn.groups.single).gbar[0], jnp.vdot(jax.grad(loss)(w), u)
        return jnp.stack([slope / size for slope in found])

    by_tangents, by_gradient = np.abs(slopes(weights))
    assert min(by_tangents, by_gradient) > 0  # half precision is used
    assert max(by_tangents, by_gradient) < float(jnp.finfo(jnp.bfloat16).eps) / 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_contractions_of_half_precision_add_up_in_single(dtype):
    n = 10_007  # not representable in either, and a running sum in bfloat16 would stop at 256
    u = jnp.ones(n)

    def loss(p):
        h = p["w"] * p["v"] + p["w"] ** 2
        return jnp.sum(h.astype(jnp.float32))

    params = {"v": jnp.zeros(n, dtype), "w": jnp.zeros(n, dtype)}
    got = gn.summarize(loss, params, {"v": u, "w": u})
    assert got.hbar.tolist() == [[0, n], [n, 2 * n]]


def test_mixed_dtypes_give_the_widest(x64):
    loss = lambda p: jnp.sum(jnp.tanh(p["a"].astype(float) * p["b"]) * p["c"].astype(float)) * p["d"].astype(float)
    params = {"a": normal(5), "b": normal(5), "c": normal(5), "d": jnp.asarray(2.0)}
    params = {
        k: v.astype(t) for (k, v), t in zip(params.items(), ("bfloat16", "float64", "float32", "float16"), strict=True)
    }

    @uncompiled
    def run(params):
        direction = jax.grad(loss)(params)
        narrow, wide = cast(params, jnp.bfloat16), cast((params, direction), jnp.float64)
        return gn.summarize(loss, params, direction), gn.summarize(loss, *wide), gn.summarize(loss, narrow, narrow)

    got, expected, narrow = run(params)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float64)}
    # Tangents of the narrow parameters are as narrow until they meet a wide value.
    assert_same_summary(got, expected, 4 * float(jnp.finfo("float32").eps))
    assert narrow.hbar.dtype == jnp.float32


# Transformations


def test_the_mean_over_micro_batches_is_the_summary_of_the_whole(x64):
    params = cast(mlp(jnp.tanh)[1][:4], jnp.float64)
    x, y = jax.random.normal(jax.random.key(3), (10, 5)), jax.random.normal(jax.random.key(4), (10, 4))
    per_example = lambda p, x, y: jnp.sum((jnp.tanh(x @ p[0] + p[1][None]) @ p[2] + p[3][None] - y) ** 4, axis=1)
    # 10 examples as 4 + 4 + 2: the last batch is padded, its weights are zero there.
    weights = jnp.array([1.0] * 10 + [0.0] * 2).reshape(3, 4)
    xs, ys = (jnp.pad(a, ((0, 2), (0, 0)), constant_values=7.0).reshape(3, 4, -1) for a in (x, y))

    part = lambda p: lambda batch: jnp.sum(batch[0] * per_example(p, *batch[1:]))

    def scanned(p):
        step = lambda c, batch: (c + part(p)(batch), None)
        return lax.scan(step, 0.0, (weights, xs, ys))[0] / jnp.sum(weights)

    mapped = lambda p: jnp.sum(lax.map(part(p), (weights, xs, ys))) / jnp.sum(weights)
    whole = lambda p: jnp.mean(per_example(p, x, y))
    by_scan, by_map, expected = uncompiled(lambda p: [gn.summarize(f, p, p) for f in (scanned, mapped, whole)])(params)
    assert_same_summary(by_scan, expected, 1e-12)
    assert_same_summary(by_map, expected, 1e-12)


# Rules and primitives that cannot be differentiated


def callback(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


NOT_DIFFERENTIABLE = {
    "while": lambda p: jnp.sum(lax.while_loop(lambda c: jnp.sum(c) < 100, lambda c: 2 * c, 1 + p["b"] ** 2)),
    "while, scanned": lambda p: jnp.sum(
        lax.scan(
            lambda h, b: (lax.while_loop(lambda c: jnp.sum(c) < 100, lambda c: 1 + 2 * jnp.abs(c), h * b), None),
            p["a"],
            p["b"],
        )[0]
    ),
    "callback": lambda p: jnp.sum(callback(p["a"])),
    "callback, times zero": lambda p: jnp.sum(p["b"] ** 3) + 0 * jnp.sum(callback(p["a"])),
    "callback, in cond": lambda p: lax.cond(p["a"][0] > 0, lambda a: jnp.sum(callback(a)), jnp.sum, p["a"]),
    "scatter of products": lambda p: jnp.sum(p["a"].at[jnp.array([0, 0])].multiply(p["b"][:2])),
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_what_has_no_derivative_raises_as_the_gradient_does(name):
    loss = NOT_DIFFERENTIABLE[name]
    with pytest.raises(Exception, match=r"not work|not support|only implemented") as by_grad:
        jax.grad(loss)(vectors())
    with pytest.raises(by_grad.type, match=r"not work|not support|only implemented"):
        gn.summarize(loss, vectors(), vectors())


def test_a_third_derivative_that_does_not_exist_raises_as_the_definition_does():
    loss = lambda p: jnp.sum(jax.scipy.special.gammainc(1 + p["a"] ** 2, p["b"]))
    assert jax.eval_shape(jax.grad(loss), vectors())["a"].shape == (4,)
    for method in ("sweep", "nested"):
        with pytest.raises(NotImplementedError, match="igamma_grad_a"):
            gn.summarize(loss, vectors(), vectors(), method=method)


def doubled(start, p):
    return jnp.sum(p["a"] ** 3) * lax.while_loop(lambda c: c < 100, lambda c: 2 * c, start)


def reported(p):
    jax.debug.callback(lambda _: None, jnp.sum(p["a"]))
    return jnp.sum(p["a"] ** 3 * p["b"])


NOT_ACTIVE = {
    "while over integers": lambda p: doubled(jnp.int32(3), p),
    "while over floats": lambda p: doubled(3.0, p),
    "while from an integer that depends on params": lambda p: doubled(jnp.argmax(p["b"]) + 1, p),
    "while behind stop_gradient": lambda p: doubled(lax.stop_gradient(1 + p["b"][0] ** 2), p),
    "callback behind stop_gradient": lambda p: jnp.sum(p["a"] ** 3 * callback(lax.stop_gradient(p["b"]))),
    "debugging": reported,
    "switch on an integer": lambda p: jnp.sum(lax.switch(jnp.argmax(p["b"]), [jnp.sin, jnp.cos, jnp.exp], p["a"]) ** 2),
    "booleans": lambda p: jnp.sum((p["a"] ** 3) * ((p["b"] > 1) & ~(p["a"] > p["b"]))),
    "dropout": lambda p: jnp.sum(
        jnp.where(jax.random.bernoulli(jax.random.fold_in(jax.random.key(7), 1), 0.5, (4,)), p["a"], 0) ** 3 * p["b"]
    ),
    "scatter and segments": lambda p: jnp.sum(
        jax.ops.segment_sum(p["a"] * p["b"], jnp.array([0, 1, 0, 2]), 3) ** 3 + p["a"].at[1].set(p["b"][2])[:3] ** 2
    ),
    "associative scan": lambda p: jnp.sum(lax.associative_scan(jnp.multiply, p["a"]) ** 2 * p["b"]),
    "top k": lambda p: jnp.sum(lax.top_k(p["a"] * p["b"], 2)[0] ** 3),
    "ties": lambda p: jnp.sum(jnp.maximum(p["a"], p["a"] * 1.0) ** 3) * jnp.max(jnp.stack([p["b"][0], p["b"][0]])),
    "product of three": lambda p: jnp.einsum("i,i,i", p["a"], p["b"], p["a"]) ** 2,
}


@pytest.mark.parametrize("name", NOT_ACTIVE)
def test_values_without_a_tangent_are_constants(x64, name):
    got, expected = both(NOT_ACTIVE[name], cast(vectors(), jnp.float64))
    assert_same_summary(got, expected, 1e-11)
    assert np.any(got.third != 0)


# Odd losses and params


ODD = {
    "constant": (lambda p: jnp.float32(3), vectors()),
    "a Python number": (lambda p: 3.0, vectors()),
    "ignores its params": (lambda p: jnp.sum(rows() ** 2), vectors()),
    "behind stop_gradient": (lambda p: jnp.sum(lax.stop_gradient(p["a"]) ** 2), vectors()),
    "the parameter itself": (lambda p: p["x"], {"x": jnp.float32(2)}),
    "scalars": (lambda p: p["x"] ** 3 * jnp.exp(p["y"]), {"x": jnp.float32(2), "y": jnp.float32(0.5)}),
    "a size of zero": (
        lambda p: jnp.sum(p["x"] ** 2) + jnp.sum(p["y"] ** 3),
        {"x": jnp.ones((0, 3)), "y": jnp.ones(2)},
    ),
    "no params": (lambda p: 3.0, {}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_losses_and_params(name):
    loss, params = ODD[name]
    got, expected = uncompiled(lambda p: [gn.summarize(loss, p, p, method=m) for m in ("sweep", "nested")])(params)
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert_same_summary(got, expected, 8 * EPS32)


def test_leaves_that_are_frozen_may_be_of_any_kind():
    params = {"a": normal(4), "n": jnp.int32(3), "key": jax.random.key(0), "act": jnp.tanh}
    labels = {"a": "x", "n": gn.groups.FROZEN, "key": gn.groups.FROZEN, "act": gn.groups.FROZEN}
    loss = lambda p: jnp.sum(p["act"](p["a"]) ** 3) * p["n"] * jax.random.uniform(p["key"])
    given, direction = params | {"n": 0}, params | {"n": 0, "key": 0}
    frozen = {k: v for k, v in params.items() if k != "a"}
    got = gn.summarize(loss, given | {"n": params["n"]}, direction, labels)
    expected = gn.summarize(lambda p: loss(frozen | p), {"a": params["a"]}, {"a": params["a"]}, method="nested")
    assert_same_summary(got, expected, 64 * EPS32)


# Options


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp gelu", "scan in scan, remat, integer carry", "linear solve"])
def test_order_two_leaves_only_the_third_derivatives_out(x64, name):
    loss, params = ZOO[name]
    params = cast(params, jnp.float64)
    methods = ("sweep", "nested") if name == "mlp gelu" else ("sweep",)

    @uncompiled
    def run(p):
        return gn.summarize(loss, p, p), [gn.summarize(loss, p, p, order=2, method=method) for method in methods]

    full, without = run(params)
    assert np.any(full.third != 0)
    for got in without:
        assert_same_summary(got, full._replace(third=jnp.zeros_like(full.third)), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mlp tanh", (3,)), ("scan", (2,)), ("group with tensors at different depths", (2,))],
)
def test_max_stack_changes_nothing_but_the_stack(x64, name, sizes):
    loss, params, *groups = ZOO[name]
    params = cast(params, jnp.float64)
    summarize = lambda p, **options: gn.summarize(loss, p, p, *groups, **options)

    @uncompiled
    def run(p):
        by_order = summarize(p, max_stack=2, order=2) if name == "scan" else None
        return summarize(p), [summarize(p, max_stack=size) for size in sizes], by_order

    whole, parts, of_order_two = run(params)
    for part in parts:
        assert_same_summary(part, whole, 1e-12)
    if name == "scan":
        assert_same_summary(of_order_two, whole._replace(third=jnp.zeros_like(whole.third)), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be 2 or 3, got 4"),
        ({"order": 1, "method": "nested"}, "order must be 2 or 3, got 1"),
        ({"max_stack": 1}, "max_stack must be None or an integer of at least 2, got 1"),
        ({"max_stack": True}, "max_stack must be .*, got True"),
        ({"max_stack": 2.5}, "max_stack must be .*, got 2.5"),
        ({"max_stack": 4, "method": "nested"}, 'max_stack bounds the tangents of method="sweep", got it with .*nested'),
        ({"method": "forward"}, r"method must be one of \('sweep', 'nested'\), got 'forward'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gn.summarize(lambda p: jnp.sum(p["a"] ** 3), vectors(), vectors(), **options)


# Cost, as the traced program shows it


def inner_jaxprs(eqn):
    is_jaxpr = lambda x: isinstance(x, (jex.Jaxpr, jex.ClosedJaxpr))
    found = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)]
    return [getattr(x, "jaxpr", x) for x in found]


def equations(jaxpr, live_only=False):
    """All equations of a jaxpr and of those in it; of the outer one only those that an output needs, if asked."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if live_only and not needed.intersection(eqn.outvars):
            continue
        needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner, live_only)


def traced(loss, params, groups=gn.groups.per_tensor, **options):
    return jax.make_jaxpr(lambda p, u: gn.summarize(loss, p, u, groups, **options))(params, params).jaxpr


@pytest.mark.parametrize("remat", [False, True])
def test_the_program_has_the_same_size_for_3_and_30_scanned_layers(remat):
    def loss(p):
        layer = lambda h, w: jnp.tanh(h @ w) + h
        layer = jax.checkpoint(layer) if remat else layer
        return jnp.mean(lax.scan(lambda h, w: (layer(h, w), None), rows() @ p["in"], p["w"])[0] ** 2)

    sizes = [
        len(list(equations(traced(loss, {"in": jnp.ones((5, 4)), "w": jnp.ones((layers, 4, 4))}))))
        for layers in (3, 30)
    ]
    assert sizes[0] == sizes[1] > 50


WIDTHS, BATCH = (11, 7, 13, 5, 9, 3), 1700  # rows that are too large to have room for later groups


def matmul_work(jaxpr):
    """Multiplications in all matrix products but Gram matrices, which contract whole values and are S x S at most."""
    total, values = 0, {m * n for m, n in [*itertools.pairwise(WIDTHS), *((BATCH, width) for width in WIDTHS)]}
    for eqn in equations(jaxpr, live_only=True):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            if size not in values or eqn.outvars[0].aval.size > (len(WIDTHS) - 1) ** 2:
                total += eqn.outvars[0].aval.size * size
    return total


def perceptron(p):
    h = jnp.sin(jnp.ones((BATCH, WIDTHS[0])) @ jnp.ones((WIDTHS[0], WIDTHS[0])))  # preprocessing
    for w, b in p:
        h = jnp.tanh(h @ w + b[None])
    return jnp.mean(h**2)


def perceptron_params():
    return [(jnp.ones((m, n)), jnp.ones(n)) for m, n in itertools.pairwise(WIDTHS)]


@pytest.mark.parametrize("order", [2, 3])
def test_the_matrix_products_are_those_of_the_derivation_and_no_more(order):
    """A weight has one tangent, its input those of the groups upstream, and none of them is padded."""
    labels = [(f"layer {i}",) * 2 for i in range(len(WIDTHS) - 1)]
    jaxpr = traced(perceptron, perceptron_params(), labels, order=order)
    products = [BATCH * m * n for m, n in itertools.pairwise(WIDTHS)]
    expected = BATCH * WIDTHS[0] ** 2 + 2 * products[0]  # preprocessing; the first layer: primal, its own tangent
    for upstream, product in enumerate(products[1:], start=1):
        # Primal, adjoint, pull of the weight's tangent, the tangent itself; first, second tangents of the input.
        expected += (4 + (order - 1) * upstream) * product
    assert matmul_work(jaxpr) == expected
    assert matmul_work(traced(perceptron, perceptron_params(), labels, order=order, method="nested")) > 1.5 * expected


def test_no_stack_is_deeper_than_the_groups_upstream():
    labels = [(f"layer {i}",) * 2 for i in range(len(WIDTHS) - 1)]
    depths = {n: set() for n in WIDTHS}
    for eqn in equations(traced(perceptron, perceptron_params(), labels), live_only=True):
        for v in eqn.outvars:
            if len(getattr(v.aval, "shape", ())) == 3 and v.aval.shape[1] == BATCH:
                depths[v.aval.shape[2]].add(v.aval.shape[0])
    deepest = {n: max(found, default=0) for n, found in depths.items()}
    assert deepest == {n: upstream for upstream, n in enumerate(WIDTHS)}, "and the inputs have no tangents"
