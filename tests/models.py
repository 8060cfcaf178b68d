"""Small losses with params and a direction, shared by the tests."""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import grouped_newton as gn

_REFERENCE = pathlib.Path(__file__).parent / "data" / "reference_summary.npz"


class Problem(NamedTuple):
    loss: Callable[[Any], jax.Array]
    params: Any
    direction: Any


def nll(logits, labels):
    """Mean negative log-likelihood."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def reference_mlp(params, x, y):
    """5-7-4-3, tanh, weights (out, in); params is the list W1, b1, W2, b2, W3, b3."""
    return nll(_dense_layers(params, x), y)


def reference_lenet(params, x, y):
    """Two valid 5x5 convolutions, each with tanh and 2x2 max-pool, on 1x32x32 in NCHW; then 75-8-6-4."""
    for kernel, bias in (params[:2], params[2:4]):
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "VALID") + bias[None, :, None, None])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return nll(_dense_layers(params[4:], x.reshape(len(x), -1)), y)


def _dense_layers(params, x):
    layers = list(zip(params[::2], params[1::2], strict=True))
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight.T + bias[None])
    weight, bias = layers[-1]
    return x @ weight.T + bias[None]


def reference(network, grouping):
    """The problem ``mlp`` or ``lenet``, ``canonical`` or ``trivial``, and what the reference gave for it; float64."""
    with np.load(_REFERENCE) as data:
        prefix = f"{network}/{grouping}/"
        values = {name.removeprefix(prefix): data[name] for name in data.files if name.startswith(prefix)}
    count = sum(name.startswith("param") for name in values)
    params, direction = ([jnp.asarray(values[f"{kind}{i}"]) for i in range(count)] for kind in ("param", "direction"))
    loss = {"mlp": reference_mlp, "lenet": reference_lenet}[network]
    return Problem(functools.partial(loss, x=values["x"], y=values["y"]), params, direction), values


def dense_params(sizes, seed=0, scale=1.0):
    """Params of a perceptron, named as Flax names them; the last layer has the last name in leaf order too."""
    rng = np.random.default_rng(seed)
    shapes = [{"bias": (n,), "kernel": (m, n)} for m, n in itertools.pairwise(sizes)]
    draw = lambda shape: jnp.asarray(scale * rng.standard_normal(shape) / np.sqrt(shape[0]))
    return {f"Dense_{i}": {k: draw(v) for k, v in layer.items()} for i, layer in enumerate(shapes)}


def apply_dense(params, x, between=jnp.tanh):
    """The perceptron of ``dense_params`` (fewer than eleven layers), with a function between its layers."""
    for i, name in enumerate(sorted(params)):
        x = (between(x) if i else x) @ params[name]["kernel"] + params[name]["bias"][None]
    return x


def tanh_mlp(sizes=(4, 5, 3), batch=6, seed=0):
    """Mean NLL of a tanh perceptron on noise, along a direction that is not the gradient."""
    rng = np.random.default_rng(seed)
    x, y = jnp.asarray(rng.standard_normal((batch, sizes[0]))), rng.integers(sizes[-1], size=batch)
    params, direction = dense_params(sizes, seed=seed + 1), dense_params(sizes, seed=seed + 2)
    return Problem(lambda p: nll(apply_dense(p, x), y), params, direction)


def tanh_loss(params, batch):
    """Mean squared error of a two-layer tanh network."""
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return jnp.mean((hidden @ params["out"]["w"] + params["out"]["b"][None] - y) ** 2)


def tanh_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.5, dtype)
    return {"hidden": {"w": normal(3, 4), "b": normal(4)}, "out": {"w": normal(4, 2), "b": normal(2)}}


def regression_batches(steps, seed=0, dtype=jnp.float32):
    """Inputs and targets of a fixed smooth map, one batch of 16 per step."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(steps, 16, 3))
    y = np.stack([np.sin(x[..., 0]) + x[..., 1], x[..., 2] * x[..., 0]], axis=-1)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


# Optax's two problems in one program, in two of three modules.
START = {"stem": {"b": jnp.zeros(1)}, "head": {"w": jnp.zeros(1)}, "tail": {"b": jnp.zeros(1)}}
PARABOLA, ROSENBROCK = 1.0, 0.0


def valleys(params, mix):
    """Of ``PARABOLA`` and ``ROSENBROCK``."""
    (x,), (y,), (stem,) = params["head"]["w"], params["tail"]["b"], params["stem"]["b"]
    parabola = (x - 1) ** 2 + (y + 1) ** 2
    return mix * parabola + (1 - mix) * ((1 - x) ** 2 + 100 * (y - x**2) ** 2) + stem**2


@jax.custom_vjp
def sine(x):
    """Differentiable by its rule alone."""
    return lax.stop_gradient(jnp.sin(x))


sine.defvjp(lambda x: (sine(x), x), lambda x, ct: (jnp.cos(x) * ct,))


def custom_rule_problem():
    """Two groups across leaves in another order than the forward pass, a frozen leaf and a custom rule."""
    problem = tanh_mlp((3, 4, 2), seed=3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)))
    loss = lambda p: jnp.mean(jnp.exp(apply_dense(p, x, sine)))
    labels = {"Dense_0": {"bias": "y", "kernel": "x"}, "Dense_1": {"bias": gn.groups.FROZEN, "kernel": "y"}}
    return loss, problem.params, problem.direction, labels
