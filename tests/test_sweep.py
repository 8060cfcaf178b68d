"""The sweep equals the nested definition on a zoo of small losses, one for each thing that a loss may contain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import grouped_newton as gn


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), sum(shape) + len(shape)), shape)


def both(loss, params, groups=gn.groups.per_tensor, **kwargs):
    direction = jax.grad(loss)(params)
    run = lambda method: jax.jit(
        lambda p, u: gn.summarize(loss, p, u, groups, method=method, **(kwargs if method == "sweep" else {}))
    )(params, direction)
    return run("sweep"), run("nested")


def assert_same_summary(got, expected, tol):
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tol * (1e-30 + np.max(np.abs(b), initial=0)), rtol=0, err_msg=name)


def rows():
    return normal(6, 5)


def mlp(activation):
    params = [normal(5, 7), normal(7) / 5, normal(7, 4), normal(4), normal(4, 3), normal(3)]
    labels = jnp.arange(6) % 3

    def loss(p):
        h = rows()
        for i in range(3):
            h = h @ p[2 * i] + p[2 * i + 1][None]
            h = activation(h) if i < 2 else h
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(h), labels[:, None], 1))

    return loss, params


def transformer(scanned):
    block = lambda seed: {
        "qkv": normal(3, 4, 4, seed=seed) / 2,
        "gain": 1 + normal(4, seed=seed) / 5,
        "shift": normal(4, seed=seed + 9) / 5,
        "w": normal(4, 4, seed=seed),
    }
    blocks = [block(0), block(1)]
    params = {"embed": normal(5, 4), "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks) if scanned else blocks}
    tokens = jnp.array([0, 3, 1, 1, 4, 2])

    def apply(p, h):
        centred = h - h.mean(-1, keepdims=True)
        z = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["gain"][None] + p["shift"][None]
        q, k, v = (z @ w for w in p["qkv"])
        h = h + jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((6, 6), bool)), q @ k.T / 2, -1e9)) @ v
        return h + jax.nn.gelu(h @ p["w"])

    def loss(p):
        h = p["embed"][tokens]
        if scanned:
            h, _ = lax.scan(lambda h, b: (jax.checkpoint(apply)(b, h), None), h, p["blocks"])
        else:
            for b in p["blocks"]:
                h = apply(b, h)
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

        (i, h), ys = lax.scan(step, (0, rows()[:, :4]), p["w"])
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
    **{f"mlp {f.__name__}": mlp(f) for f in (jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.elu, jax.nn.softplus)},
    "transformer, tied embedding, gather": transformer(False),
    "transformer, scanned with remat": transformer(True),
    "convolutions, batch norm, max-pool": conv_net(),
    "overlapping max-pool with padding": overlapping_pool(),
    "scan": rnn(False),
    "scan in reverse": rnn(True),
    "scan in scan, remat, integer carry": nested_scan(),
    "fori_loop": (
        lambda p: jnp.sum(lax.fori_loop(0, 4, lambda i, c: jnp.sin(c @ p["w"]) * p["b"][i], rows()) ** 2),
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


@pytest.mark.parametrize("name", ZOO)
def test_equals_the_definition_in_double_precision(x64, name):
    loss, params, *groups = ZOO[name]
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    assert_same_summary(*both(loss, params, *groups), tol=1e-10)
