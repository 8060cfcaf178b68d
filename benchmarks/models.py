"""Losses to measure on: name -> a function that makes (loss of params, params, grouping). Plain JAX, random data.

Their keywords shrink them: the same function, only smaller, for tests. The same numbers in single and double precision.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

import grouped_newton as gn


class Model(NamedTuple):
    """A loss of the params, where to take it, its groups; if it comes apart, params to outputs and outputs to loss."""

    loss: Callable
    params: Any
    groups: Any
    parts: tuple[Callable, ...] = ()


class _Init:
    """Makes parameters with the usual scale, one key after another."""

    def __init__(self, seed, dtype):
        self.key, self.count, self.dtype = jax.random.key(seed), 0, dtype

    def __call__(self, *shape, fan_in=None, scale=1.0):
        self.count += 1
        key = jax.random.fold_in(self.key, self.count)
        drawn = scale * jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in or math.prod(shape[:-1]))
        return drawn.astype(self.dtype)


def _cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def mlp(widths, groups, batch=100, seed=0, dtype=float):
    """tanh layers of the given widths."""
    init = _Init(seed, dtype)
    x, y = init(batch, widths[0], fan_in=1), jnp.arange(batch) % widths[-1]
    shapes = list(itertools.pairwise(widths))
    params = {f"layer_{i}": {"w": init(a, b), "b": init(b, scale=0.1)} for i, (a, b) in enumerate(shapes)}

    def logits(params):
        h = x
        for i in range(len(shapes)):
            h = h @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"][None]
            h = jnp.tanh(h) if i + 1 < len(shapes) else h
        return h

    return Model(lambda p: _cross_entropy(logits(p), y), params, groups, (logits, lambda z: _cross_entropy(z, y)))


def _conv(x, w, stride=1, padding="SAME"):
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def lenet(batch=100, channels=(6, 16, 120, 84), size=32, seed=0, dtype=float):
    """Two convolutions and three dense layers on size x size x 3, tanh."""
    init = _Init(seed, dtype)
    x, y = init(batch, size, size, 3, fan_in=1), jnp.arange(batch) % 10
    places = (((size - 4) // 2 - 4) // 2) ** 2
    params = {}
    for i, (a, b) in enumerate(itertools.pairwise([3, *channels[:2]])):
        params[f"conv_{i}"] = {"w": init(5, 5, a, b), "b": init(b)}
    for i, (a, b) in enumerate(itertools.pairwise([places * channels[1], *channels[2:], 10])):
        params[f"dense_{i}"] = {"w": init(a, b), "b": init(b)}

    def loss(params):
        h = x
        for i in range(2):
            p = params[f"conv_{i}"]
            h = _max_pool(jnp.tanh(_conv(h, p["w"], padding="VALID") + p["b"][None, None, None]))
        h = h.reshape(batch, -1)
        for i in range(3):
            p = params[f"dense_{i}"]
            h = h @ p["w"] + p["b"][None]
            h = jnp.tanh(h) if i < 2 else h
        return _cross_entropy(h, y)

    return Model(loss, params, gn.groups.per_tensor)


VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def vgg11(batch=100, plan=VGG11, size=32, seed=0, dtype=float):
    """VGG-11 with one dense layer and ELU, on size x size x 3; the plan has the channels of its convolutions."""
    init = _Init(seed, dtype)
    x, y = init(batch, size, size, 3, fan_in=1), jnp.arange(batch) % 10
    widths = [3, *(c for c in plan if c != "pool")]
    places = (size >> plan.count("pool")) ** 2
    params = {
        f"conv_{i}": {"w": init(3, 3, a, b), "b": init(b, scale=0.1)}
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }
    params["dense"] = {"w": init(places * widths[-1], 10), "b": init(10)}

    def loss(params):
        h, i = x, 0
        for step in plan:
            if step == "pool":
                h = _max_pool(h)
            else:
                p = params[f"conv_{i}"]
                h, i = jax.nn.elu(_conv(h, p["w"]) + p["b"][None, None, None]), i + 1
        return _cross_entropy(h.reshape(batch, -1) @ params["dense"]["w"] + params["dense"]["b"][None], y)

    return Model(loss, params, gn.groups.per_tensor)


def resnet18(batch=100, channels=(16, 16, 32, 32, 64, 64, 128, 128), size=32, seed=0, dtype=float):
    """ResNet-18 with the given channels of its blocks, BatchNorm in training mode, on size x size x 3."""
    init = _Init(seed, dtype)
    x, y = init(batch, size, size, 3, fan_in=1), jnp.arange(batch) % 10

    def conv_bn(a, b, size=3):
        return {"w": init(size, size, a, b), "scale": 1 + init(b, scale=0.1), "bias": init(b, scale=0.1)}

    params = {"stem": conv_bn(3, channels[0])}
    for k, (a, b) in enumerate(itertools.pairwise([channels[0], *channels])):
        shortcut = {} if a == b else {"shortcut": conv_bn(a, b, 1)}
        params[f"block_{k}"] = {"first": conv_bn(a, b), "second": conv_bn(b, b)} | shortcut
    params["dense"] = {"w": init(channels[-1], 10), "b": init(10)}

    def apply(p, h, stride=1):
        h = _conv(h, p["w"], stride)
        mean = jnp.mean(h, (0, 1, 2), keepdims=True)
        variance = jnp.mean((h - mean) ** 2, (0, 1, 2), keepdims=True)
        return (h - mean) * lax.rsqrt(variance + 1e-5) * p["scale"][None, None, None] + p["bias"][None, None, None]

    def loss(params):
        h = jax.nn.relu(apply(params["stem"], x))
        for k in range(len(channels)):
            p = params[f"block_{k}"]
            stride = 2 if "shortcut" in p else 1
            z = apply(p["second"], jax.nn.relu(apply(p["first"], h, stride)))
            h = jax.nn.relu(z + (apply(p["shortcut"], h, stride) if "shortcut" in p else h))
        return _cross_entropy(jnp.mean(h, (1, 2)) @ params["dense"]["w"] + params["dense"]["b"][None], y)

    return Model(loss, params, gn.groups.per_module)


def transformer(
    layers=4, d=64, heads=4, vocabulary=64, batch=16, length=32, scanned=False, groups=None, seed=0, dtype=float
):
    """A causal language model; with a group a block by default, or a tensor where stacked layers are scanned."""
    init = _Init(seed, dtype)
    tokens = jax.random.randint(jax.random.key(seed + 1), (batch, length + 1), 0, vocabulary, jnp.int32)
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    block = lambda: {
        "norm_1": 1 + init(d, scale=0.1),
        "qkv": init(d, 3 * d),
        "out": init(d, d),
        "norm_2": 1 + init(d, scale=0.1),
        "w_1": init(d, 4 * d),
        "b_1": init(4 * d, scale=0.1),
        "w_2": init(4 * d, d),
    }
    params = {"embed": {"tokens": init(vocabulary, d, fan_in=1), "positions": init(length, d, fan_in=1)}}
    blocks = [block() for _ in range(layers)]
    params |= (
        {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
        if scanned
        else {f"block_{i}": b for i, b in enumerate(blocks)}
    )
    params["head"] = {"norm": 1 + init(d, scale=0.1), "w": init(d, vocabulary)}

    def norm(h, gain):
        centred = h - jnp.mean(h, -1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * gain[None, None]

    def apply(p, h):
        q, k, v = jnp.split(norm(h, p["norm_1"]) @ p["qkv"], 3, -1)
        q, k, v = (x.reshape(batch, length, heads, d // heads) for x in (q, k, v))
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(d // heads)
        attention = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        h = h + jnp.einsum("bhqk,bkhc->bqhc", attention, v).reshape(batch, length, d) @ p["out"]
        return h + jax.nn.gelu(norm(h, p["norm_2"]) @ p["w_1"] + p["b_1"][None, None]) @ p["w_2"]

    def loss(params):
        h = params["embed"]["tokens"][tokens[:, :-1]] + params["embed"]["positions"][None]
        if scanned:
            h, _ = lax.scan(lambda h, p: (apply(p, h), None), h, params["blocks"])
        else:
            for i in range(layers):
                h = apply(params[f"block_{i}"], h)
        return _cross_entropy(norm(h, params["head"]["norm"]) @ params["head"]["w"], tokens[:, 1:])

    return Model(loss, params, groups or (gn.groups.per_tensor if scanned else gn.groups.per_module))


MODELS = {
    "mlp": functools.partial(mlp, widths=(784, 1024, 200, 100, 10), groups=gn.groups.per_tensor),
    "mlp, a group a layer": functools.partial(mlp, widths=(784, 1024, 200, 100, 10), groups=gn.groups.per_module),
    "lenet": lenet,
    "mlp 20 x 1024": functools.partial(mlp, widths=(3072, *[1024] * 20, 10), groups=gn.groups.per_tensor),
    "vgg-11": vgg11,
    "transformer, 4 blocks": transformer,
    "transformer, 4 scanned": functools.partial(transformer, scanned=True),
    "transformer, 12 scanned": functools.partial(transformer, layers=12, scanned=True),
    "resnet-18, batch norm": resnet18,
}
# The same groups, one a block, with the blocks written out and scanned.
A_GROUP_A_BLOCK = {
    "transformer, 12 blocks": functools.partial(transformer, layers=12),
    "transformer, 12 blocks scanned": functools.partial(
        transformer, layers=12, scanned=True, groups=gn.groups.stacked("^blocks")
    ),
}


# --- Losses that are long to write down: what the first call costs --------------------------------------------------


def unrolled(n, width=16, batch=4, max_groups=16):
    """n residual layers, written out."""
    init = _Init(0, float)
    params = {f"layer_{i}": {"w": init(width, width), "b": init(width, scale=0.1)} for i in range(n)}
    x = init(batch, width, fan_in=1)

    def loss(params):
        h = x
        for i in range(n):
            h = h + jnp.tanh(h @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"][None]) / n
        return jnp.mean(h**2)

    return Model(loss, params, gn.groups.per_module(max_groups=max_groups))


def leaves(n):
    """n leaves, ten a module, none of which meets another before the sum."""
    init = _Init(0, float)
    params = {f"module_{i}": {f"leaf_{j}": init(8) for j in range(10)} for i in range(n // 10)}
    return Model(lambda p: sum(jnp.sum(jnp.tanh(x) ** 2) for x in jax.tree.leaves(p)), params, gn.groups.per_module)


def raveled(n):
    """n leaves as one vector, one group."""
    init = _Init(0, float)
    params = {f"leaf_{i}": init(8) for i in range(n)}
    return Model(lambda p: jnp.sum(jnp.tanh(ravel_pytree(p)[0]) ** 2), params, gn.groups.single)


def sines(n):
    """n steps of x + sin(3 x) / 20, written out."""
    init = _Init(0, float)
    params = {"x": init(4, 16), "gain": init(16)}

    def loss(params):
        x = params["x"] * params["gain"][None]
        for _ in range(n):
            x = x + 0.05 * jnp.sin(3 * x)
        return jnp.mean(x**2)

    return Model(loss, params, gn.groups.per_tensor)


# Name -> (a function that makes the model, options of the summary).
FIRST_CALLS = {
    **{f"{n} layers": (functools.partial(unrolled, n), {}) for n in (2, 10, 50, 100, 200, 400)},
    "1,000 leaves": (functools.partial(leaves, 1000), {}),
    **{f"ravel_pytree of {n}": (functools.partial(raveled, n), {}) for n in (50, 100, 200, 400)},
    **{f"{n} steps of a sine": (functools.partial(sines, n), {}) for n in (10, 40)},
    "60 groups": (functools.partial(unrolled, 60, max_groups=60), {}),
    "60 groups, max_stack=16": (functools.partial(unrolled, 60, max_groups=60), {"max_stack": 16}),
}
