"""Small training tasks in plain JAX: half of them to choose defaults by, the other half only to report on.

A task whose ``batch_size`` is None trains on all of ``train`` at every step; the others draw rows. All data come from
scikit-learn's bundled sets or are made here; a task is the same in every process.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from jax import lax

# Settled before anything was tuned.
CHOOSING = (
    "digits mlp",
    "badly scaled mlp",
    "wrong labels",
    "autoencoder",
    "conv net",
    "linear regression",
    "heat equation",
    "transformer, 2 blocks",
)
REPORTING = (
    "elu mlp, 8 layers",
    "tanh mlp, 2 layers",
    "conv net, batch norm",
    "recurrent net",
    "transformer, 6 blocks",
    "transformer, scanned",
    "logistic regression",
    "oscillator",
    "sine regression",
    "mixed scales",
)


class Task(NamedTuple):
    """A training problem.

    Attributes:
      name: as in ``CHOOSING`` or ``REPORTING``.
      purpose: "choosing" or "reporting".
      init: key -> params, a dict of modules.
      loss: (params, batch) -> mean loss, ().
      train: a pytree of arrays with a common leading axis, or of anything that ``loss`` takes if full batch.
      test: as ``train``, never trained on.
      batch_size: rows a step; None for all of ``train``.
      steps: how long a run is.
      evaluated: how many rows of ``train`` and ``test``, from the first, a reported loss is the mean over.
    """

    name: str
    purpose: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    train: Any
    test: Any
    batch_size: int | None
    steps: int
    evaluated: int = 2000


# Modules


def _dense(key, fan_in, fan_out, gain=1.0):
    return {"w": gain * jax.random.normal(key, (fan_in, fan_out)) / math.sqrt(fan_in), "b": jnp.zeros(fan_out)}


def _conv(key, fan_in, fan_out, size=3):
    scale = math.sqrt(2 / (size * size * fan_in))
    return {"w": scale * jax.random.normal(key, (size, size, fan_in, fan_out)), "b": jnp.zeros(fan_out)}


def _affine(p, x):
    return x @ p["w"] + p["b"][None]


def _convolve(p, x):
    z = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return z + p["b"][None, None, None]


def _mean_pool(x):
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4))


def _mlp(widths, activation, gain=1.0):
    """init and apply of dense layers; ``gain`` is one number or one a layer."""
    shapes = list(itertools.pairwise(widths))
    gains = gain if isinstance(gain, tuple) else (gain,) * len(shapes)

    def init(key):
        keys = jax.random.split(key, len(shapes))
        return {f"dense_{i}": _dense(k, *s, g) for i, (k, s, g) in enumerate(zip(keys, shapes, gains, strict=True))}

    def apply(params, x):
        for i in range(len(shapes) - 1):
            x = activation(_affine(params[f"dense_{i}"], x))
        return _affine(params[f"dense_{len(shapes) - 1}"], x)

    return init, apply


def _cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def _classifier(apply):
    return lambda params, batch: _cross_entropy(apply(params, batch["x"]), batch["y"])


def _regressor(apply):
    return lambda params, batch: jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)


# Data


def _split(share, **arrays):
    """Shuffled train and test sets, ``share`` of the rows in the first."""
    rows = len(next(iter(arrays.values())))
    order, cut = np.random.default_rng(0).permutation(rows), int(share * rows)
    return [{name: x[part] for name, x in arrays.items()} for part in (order[:cut], order[cut:])]


def _digits():
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return _split(0.8, x=(x / 16).astype(np.float32), y=y.astype(np.int32))


def _signals(rows=5000, length=40, classes=10):
    """Ten smooth templates, each example one of them shifted, scaled and under noise with a slope."""
    rng = np.random.default_rng(1)
    grid = np.linspace(0, 1, 16)
    waves = np.stack([np.sin(math.pi * (k + 1) * grid) for k in range(6)])
    templates = rng.normal(size=(classes, 6)) @ waves
    y = rng.integers(classes, size=rows)
    x = 0.3 * rng.normal(size=(rows, length)) + 0.3 * rng.normal(size=(rows, 1)) * np.linspace(-1, 1, length)
    for i, start in enumerate(rng.integers(length - 16, size=rows)):
        x[i, start : start + 16] += rng.uniform(0.7, 1.4) * templates[y[i]]
    return _split(0.8, x=x.astype(np.float32), y=y.astype(np.int32))


def _text(length=32):
    """Windows of length + 1 characters from scikit-learn's descriptions of its data, and the number of characters."""
    names = ("digits", "iris", "wine", "breast_cancer", "diabetes", "linnerud")
    text = "".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in names).lower()
    characters, tokens = np.unique(list(text), return_inverse=True)
    cut = int(0.85 * len(tokens))
    windows = [
        np.lib.stride_tricks.sliding_window_view(part, length + 1)[::stride].astype(np.int32)
        for part, stride in ((tokens[:cut], 3), (tokens[cut:], 16))
    ]
    train, test = (np.random.default_rng(0).permutation(w) for w in windows)
    return train, test, len(characters)


# Tasks


def _digits_mlp():
    init, apply = _mlp((64, 128, 64, 10), jax.nn.relu, math.sqrt(2))
    train, test = _digits()
    return init, _classifier(apply), train, test, 64, 500


def _badly_scaled_mlp():
    init, apply = _mlp((64, *[64] * 5, 10), jnp.tanh, (3.0, 0.3) * 3)
    train, test = _digits()
    return init, _classifier(apply), train, test, 64, 500


def _wrong_labels():
    init, apply = _mlp((64, 100, 100, 100, 10), jax.nn.elu)
    train, test = _digits()
    rng = np.random.default_rng(2)
    wrong = rng.random(len(train["y"])) < 0.2
    shifted = (train["y"] + rng.integers(1, 10, size=len(wrong))) % 10
    train["y"] = np.where(wrong, shifted, train["y"]).astype(np.int32)
    return init, _classifier(apply), train, test, 64, 500


def _autoencoder():
    init, apply = _mlp((64, 48, 24, 8, 24, 48, 64), jnp.tanh)
    train, test = ({"x": part["x"], "y": part["x"]} for part in _digits())
    return init, _regressor(apply), train, test, 64, 500


def _conv_net():
    def init(key):
        keys = jax.random.split(key, 3)
        return {"conv_0": _conv(keys[0], 1, 8), "conv_1": _conv(keys[1], 8, 16), "dense": _dense(keys[2], 64, 10)}

    def apply(params, x):
        h = x.reshape(-1, 8, 8, 1)
        for name in ("conv_0", "conv_1"):
            h = _mean_pool(jax.nn.relu(_convolve(params[name], h)))
        return _affine(params["dense"], h.reshape(len(x), -1))

    train, test = _digits()
    return init, _classifier(apply), train, test, 64, 400


def _conv_net_batch_norm():
    plan = {"conv_0": (1, 8), "conv_1": (8, 16), "conv_2": (16, 16)}

    def init(key):
        keys = jax.random.split(key, 4)
        params = {name: _conv(k, *plan[name]) for name, k in zip(plan, keys[:3], strict=True)}
        for p in params.values():
            p["scale"] = jnp.ones_like(p["b"])
        return params | {"dense": _dense(keys[3], 16, 10)}

    def apply(params, x):
        h = x.reshape(-1, 8, 8, 1)
        for name in plan:
            p = params[name]
            z = _convolve({"w": p["w"], "b": jnp.zeros_like(p["b"])}, h)
            z = z - jnp.mean(z, (0, 1, 2), keepdims=True)
            z = z * lax.rsqrt(jnp.mean(z**2, (0, 1, 2), keepdims=True) + 1e-5)
            h = jax.nn.gelu(z * p["scale"][None, None, None] + p["b"][None, None, None])
            h = _mean_pool(h) if name != "conv_2" else h
        return _affine(params["dense"], jnp.mean(h, (1, 2)))

    train, test = _digits()
    return init, _classifier(apply), train, test, 64, 300


def _linear_regression(rows=2000, size=40):
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    latent = rng.normal(size=(rows, size))
    x = latent * np.logspace(1, -1, size) @ rotation
    y = latent @ rng.normal(size=(size, 1)) / math.sqrt(size) + 0.1 * rng.normal(size=(rows, 1))
    train, test = _split(0.8, x=x.astype(np.float32), y=y.astype(np.float32))
    apply = lambda params, x: _affine(params["linear"], x)
    return lambda key: {"linear": _dense(key, size, 1, 0.1)}, _regressor(apply), train, test, 32, 600


def _logistic_regression():
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    train, test = _split(0.8, x=x.astype(np.float32), y=y.astype(np.int32))
    apply = lambda params, x: _affine(params["linear"], x)
    return lambda key: {"linear": _dense(key, 30, 2)}, _classifier(apply), train, test, 32, 500


def _heat_equation():
    """u_t = u_xx / 10 on the unit square, u = sin(pi x) + sin(3 pi x) / 2 at the start, 0 at both ends."""
    init, apply = _mlp((2, 24, 24, 24, 1), jnp.tanh)

    def points(seed):
        rng = np.random.default_rng(seed)
        x, ends = rng.uniform(size=40), np.arange(40) % 2
        start = np.sin(math.pi * x) + 0.5 * np.sin(3 * math.pi * x)
        sides = np.concatenate([np.stack([0 * x, x], 1), np.stack([rng.uniform(size=40), ends], 1)])
        data = {"inside": rng.uniform(size=(200, 2)), "sides": sides, "u": np.concatenate([start, 0 * start])}
        return jax.tree.map(np.float32, data)

    def loss(params, batch):
        u = lambda t, x: apply(params, jnp.stack([t, x], -1))[:, 0]
        t, x = batch["inside"][:, 0], batch["inside"][:, 1]
        one = jnp.ones_like(t)
        u_t = jax.jvp(lambda t: u(t, x), (t,), (one,))[1]
        u_x = lambda x: jax.jvp(lambda x: u(t, x), (x,), (one,))[1]
        u_xx = jax.jvp(u_x, (x,), (one,))[1]
        at_sides = u(batch["sides"][:, 0], batch["sides"][:, 1])
        return jnp.mean((u_t - 0.1 * u_xx) ** 2) + 2 * jnp.mean((at_sides - batch["u"]) ** 2)

    return init, loss, points(4), points(5), None, 600


def _oscillator(frequency=10.0, damping=2.0):
    """u'' + 2 damping u' + frequency^2 u = 0 on [0, 1], divided by frequency^2; u(0) = 1, u'(0) = 0."""
    init, apply = _mlp((1, 32, 32, 32, 1), jnp.tanh)

    def loss(params, t):
        u = lambda t: apply(params, t[:, None])[:, 0]
        velocity = lambda t: jax.jvp(u, (t,), (jnp.ones_like(t),))
        (at, v), (_, acceleration) = jax.jvp(velocity, (t,), (jnp.ones_like(t),))
        residual = (acceleration + 2 * damping * v) / frequency**2 + at
        start, start_velocity = velocity(jnp.zeros(1))
        return jnp.mean(residual**2) + jnp.mean((start - 1) ** 2) + jnp.mean((start_velocity / frequency) ** 2)

    grid = np.linspace(0, 1, 80, dtype=np.float32)
    return init, loss, grid, (grid[1:] + grid[:-1]) / 2, None, 600


def _sine_regression():
    init, apply = _mlp((1, 32, 32, 1), jnp.tanh)
    x = np.linspace(-1, 1, 201, dtype=np.float32)[:, None]
    data = {"x": x, "y": np.sin(3 * math.pi * x)}
    train, test = ({name: a[start::2] for name, a in data.items()} for start in (0, 1))
    return init, _regressor(apply), train, test, None, 600


def _elu_mlp_8():
    init, apply = _mlp((40, *[384] * 7, 10), jax.nn.elu)
    train, test = _signals()
    return init, _classifier(apply), train, test, 128, 300


def _tanh_mlp_2():
    init, apply = _mlp((40, 200, 10), jnp.tanh)
    train, test = _signals()
    return init, _classifier(apply), train, test, 64, 600


def _recurrent_net(rows=2500, length=12, width=32):
    """The sum of the two marked numbers of a sequence."""
    rng = np.random.default_rng(6)
    values = rng.uniform(size=(rows, length))
    marks = np.zeros((rows, length))
    for i, half in itertools.product(range(rows), (0, length // 2)):
        marks[i, half + rng.integers(length // 2)] = 1
    y = np.sum(values * marks, 1, keepdims=True) - 1
    train, test = _split(0.8, x=np.stack([values, marks], -1).astype(np.float32), y=y.astype(np.float32))

    def init(key):
        keys = jax.random.split(key, 3)
        recurrent = _dense(keys[0], width, width) | {"w_in": _dense(keys[1], 2, width)["w"]}
        return {"recurrent": recurrent, "dense": _dense(keys[2], width, 1)}

    def apply(params, x):
        p = params["recurrent"]
        step = lambda h, x: (jnp.tanh(_affine(p, h) + x @ p["w_in"]), None)
        h, _ = lax.scan(step, jnp.zeros((len(x), width)), jnp.swapaxes(x, 0, 1))
        return _affine(params["dense"], h)

    return init, _regressor(apply), train, test, 64, 600


def _transformer(blocks, steps, scanned=False, d=32, heads=2, length=32):
    train, test, vocabulary = _text(length)
    mask = np.tril(np.ones((length, length), bool))[None, None]

    def block(key):
        k = jax.random.split(key, 4)
        return {
            "norm_1": jnp.ones(d),
            "qkv": _dense(k[0], d, 3 * d)["w"],
            "out": _dense(k[1], d, d)["w"],
            "norm_2": jnp.ones(d),
            "w_1": _dense(k[2], d, 4 * d)["w"],
            "b_1": jnp.zeros(4 * d),
            "w_2": _dense(k[3], 4 * d, d)["w"],
        }

    def init(key):
        k = jax.random.split(key, 3 + blocks)
        embed = {"tokens": jax.random.normal(k[0], (vocabulary, d)), "positions": jax.random.normal(k[1], (length, d))}
        head = {"norm": jnp.ones(d), "w": _dense(k[2], d, vocabulary)["w"]}
        if scanned:
            return {"embed": embed, "blocks": jax.vmap(block)(k[3:]), "head": head}
        return {"embed": embed, **{f"block_{i}": block(k[3 + i]) for i in range(blocks)}, "head": head}

    def norm(h, gain):
        h = h - jnp.mean(h, -1, keepdims=True)
        return h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * gain[None, None]

    def apply(p, h):
        q, k, v = (x.reshape(*h.shape[:2], heads, -1) for x in jnp.split(norm(h, p["norm_1"]) @ p["qkv"], 3, -1))
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(d // heads)
        attention = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        h = h + jnp.einsum("bhqk,bkhc->bqhc", attention, v).reshape(h.shape) @ p["out"]
        return h + jax.nn.gelu(norm(h, p["norm_2"]) @ p["w_1"] + p["b_1"][None, None]) @ p["w_2"]

    def loss(params, tokens):
        h = params["embed"]["tokens"][tokens[:, :-1]] + params["embed"]["positions"][None]
        if scanned:
            h, _ = lax.scan(lambda h, p: (apply(p, h), None), h, params["blocks"])
        else:
            for i in range(blocks):
                h = apply(params[f"block_{i}"], h)
        return _cross_entropy(norm(h, params["head"]["norm"]) @ params["head"]["w"], tokens[:, 1:])

    return init, loss, train, test, 16, steps, 256


def _mixed_scales(rows=2500):
    """Two regressions on one trunk, 1e3 and 1e-3 times a mean square, in units such that answering 0 costs 1 each."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, 8))
    hidden = np.tanh(x @ rng.normal(size=(8, 16)) / 2)
    targets = hidden @ rng.normal(size=(16, 2)) / 2
    small, large = 1e3**-0.5 * targets[:, :1], 1e3**0.5 * targets[:, 1:]
    arrays = {"x": x, "small": small, "large": large}
    train, test = _split(0.8, **{name: a.astype(np.float32) for name, a in arrays.items()})
    init_trunk, trunk = _mlp((8, 48, 48), jnp.tanh)

    def init(key):
        keys = jax.random.split(key, 3)
        return init_trunk(keys[0]) | {"small": _dense(keys[1], 48, 1), "large": _dense(keys[2], 48, 1)}

    def loss(params, batch):
        h = jnp.tanh(trunk(params, batch["x"]))
        error = {name: jnp.mean((_affine(params[name], h) - batch[name]) ** 2) for name in ("small", "large")}
        return 1e3 * error["small"] + 1e-3 * error["large"]

    return init, loss, train, test, 64, 600


_MAKERS = {
    "digits mlp": _digits_mlp,
    "badly scaled mlp": _badly_scaled_mlp,
    "wrong labels": _wrong_labels,
    "autoencoder": _autoencoder,
    "conv net": _conv_net,
    "linear regression": _linear_regression,
    "heat equation": _heat_equation,
    "transformer, 2 blocks": lambda: _transformer(2, 400),
    "elu mlp, 8 layers": _elu_mlp_8,
    "tanh mlp, 2 layers": _tanh_mlp_2,
    "conv net, batch norm": _conv_net_batch_norm,
    "recurrent net": _recurrent_net,
    "transformer, 6 blocks": lambda: _transformer(6, 300),
    "transformer, scanned": lambda: _transformer(4, 300, scanned=True),
    "logistic regression": _logistic_regression,
    "oscillator": _oscillator,
    "sine regression": _sine_regression,
    "mixed scales": _mixed_scales,
}


@functools.cache
def load(name: str) -> Task:
    """The task of that name; the same object at every call, so that what is compiled for it is found again."""
    init, loss, train, test, *rest = _MAKERS[name]()
    on_device = jax.tree.map(jnp.asarray, (train, test))
    return Task(name, "choosing" if name in CHOOSING else "reporting", init, loss, *on_device, *rest)
