"""Trains one network on scikit-learn's digits three times: with SGD, with Adam and with grouped_newton.

Prints a table and draws the losses, the rate of every group over time and the
curvature between groups. All three see the same gradient batches; grouped_newton
takes its curvature from other batches of the training set, and is evaluated at
the average of the parameters that it keeps.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import grouped_newton as gn
from grouped_newton import plotting

BATCH = 64
NEWTON = "grouped_newton"
RECORD_EVERY = 10  # steps


class Network(nnx.Module):
    """Two convolutions and two dense layers, for images of 8 by 8 pixels."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.hidden = nnx.Linear(2 * 2 * 32, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = images[..., None]
        for conv in (self.conv1, self.conv2):
            x = nnx.avg_pool(nnx.gelu(conv(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.gelu(self.hidden(x.reshape(len(x), -1)))
        return self.output(x)


class Run(NamedTuple):
    """What one training leaves behind."""

    train_loss: float
    test_accuracy: float
    seconds: float
    compile_seconds: float
    steps: np.ndarray  # (T,)
    losses: np.ndarray  # (T,), on the whole training set
    opt_states: list  # T of them


def load_data(seed):
    """Training images and labels, then held-out ones."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=seed
    )
    return (jnp.asarray(x_train), jnp.asarray(y_train)), (jnp.asarray(x_test), jnp.asarray(y_test))


def evaluated(name, opt_state, params):
    """The params to evaluate at: grouped_newton's average, and as they are with SGD and Adam."""
    return gn.eval_params(opt_state, params) if name == NEWTON else params


def train(name, tx, train_set, test_set, steps, seed):
    """Trains a new network; the seed fixes its weights and all batches."""
    graphdef, params = nnx.split(Network(nnx.Rngs(seed)), nnx.Param)
    tx = optax.with_extra_args_support(tx)  # lets SGD and Adam ignore value and value_fn

    def loss_fn(params, batch):
        images, labels = batch
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, indices, curvature_indices):
        batch, curvature_batch = ((train_set[0][i], train_set[1][i]) for i in (indices, curvature_indices))
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        value_fn = lambda p: loss_fn(p, curvature_batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state

    batches = np.random.default_rng(seed).integers(len(train_set[0]), size=(steps, 2, BATCH))
    opt_state = tx.init(params)
    full_loss = jax.jit(lambda opt_state, params: loss_fn(evaluated(name, opt_state, params), train_set))
    history = [(0, float(full_loss(opt_state, params)), opt_state)]
    seconds = 0.0
    with tqdm(total=steps, desc=f"{name:<22}", unit="step") as bar:
        bar.set_postfix_str("compiling")
        start = time.perf_counter()
        compiled_step = jax.jit(step).lower(params, opt_state, *batches[0]).compile()
        compile_seconds = time.perf_counter() - start
        for first in range(0, steps, RECORD_EVERY):
            chunk = batches[first : first + RECORD_EVERY]
            start = time.perf_counter()
            for indices, curvature_indices in chunk:
                params, opt_state = compiled_step(params, opt_state, indices, curvature_indices)
            jax.block_until_ready(params)
            seconds += time.perf_counter() - start
            history.append((first + len(chunk), float(full_loss(opt_state, params)), opt_state))
            bar.set_postfix_str(f"train loss {history[-1][1]:.4f}", refresh=False)
            bar.update(len(chunk))

    images, labels = test_set
    logits = nnx.merge(graphdef, evaluated(name, opt_state, params))(images)
    accuracy = jnp.mean(logits.argmax(axis=1) == labels)
    at, losses, opt_states = zip(*history, strict=True)
    return Run(losses[-1], float(accuracy), seconds, compile_seconds, np.array(at), np.array(losses), list(opt_states))


def draw(runs, group_names, path):
    """Loss curves, rates and curvature in one PNG."""
    newton = runs[NEWTON]
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplot_mosaic([["losses", "curvature"], ["rates", "curvature"]], width_ratios=[1.25, 1])
    legend_above = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.02, 1),
        "frameon": False,
        "columnspacing": 1,
        "handlelength": 1.7,
    }

    ax = panels["losses"]
    styles = [("0.35", "--"), ("0.6", "-"), ("0.35", ":"), ("0.35", "-."), ("0.75", "--"), ("0.75", "-.")]
    for i, (name, run) in enumerate(runs.items()):
        colour, dashes = ("#4B2A82", "-") if name == NEWTON else styles[i % len(styles)]
        ax.plot(run.steps, run.losses, label=name, color=colour, linestyle=dashes, linewidth=2)
    ax.set(yscale="log", ylabel="loss on the training set")
    ax.legend(ncols=3, **legend_above)

    ax = panels["rates"]
    states = [optax.tree.get(state, "GroupedNewtonState") for state in newton.opt_states]
    eta, scale = np.stack([state.eta for state in states[1:]]), np.stack([state.scale for state in states[1:]])
    plotting.plot_rates(ax, newton.steps[1:], eta, group_names, scale=scale)
    ax.axhline(1e-3, color="0.5", linewidth=1, zorder=0)
    ax.annotate("Adam's default", (0.01, 1e-3), (0, 3), ax.get_yaxis_transform(), "offset points", color="0.35")
    ax.set_ylim(bottom=min(ax.get_ylim()[0], 3e-4))
    ax.sharex(panels["losses"])
    ax.set(ylabel=f"rates by {NEWTON}", xlabel="step (triangles: the rate is 0)" if np.any(eta <= 0) else "step")
    ax.legend(ncols=len(group_names), **legend_above)

    ax = panels["curvature"]
    plotting.plot_curvature(ax, states[-1].hbar, group_names)
    ax.set_title("Curvature between layers at the end", pad=12)
    ax.set_xlabel(r"$\bar{H}_{st}\,/\,\sqrt{|\bar{H}_{ss}\,\bar{H}_{tt}|}$", labelpad=12)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(runs):
    """The results as text, one run a line."""
    width = max(map(len, runs))
    lines = [f"{'optimizer':<{width}}  train loss  test accuracy  seconds  compilation"]
    lines += [
        f"{name:<{width}}  {r.train_loss:10.5f}  {r.test_accuracy:13.1%}  {r.seconds:7.2f}  {r.compile_seconds:11.2f}"
        for name, r in runs.items()
    ]
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps, at least 1 (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="picture (default: out/digits.png)")
    parser.add_argument(
        "--adam", type=float, nargs="+", default=[1e-3], metavar="RATE", help="Adam's rates (default: its own, 1e-3)"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    if min(arguments.adam) <= 0:
        parser.error(f"--adam takes positive rates, got {min(arguments.adam)}")
    return arguments


def main():
    arguments = parse_arguments()
    train_set, test_set = load_data(arguments.seed)
    optimizers = {
        "SGD 0.1, momentum 0.9": optax.sgd(0.1, momentum=0.9),
        **{f"Adam {rate:g}": optax.adam(rate) for rate in arguments.adam},
        NEWTON: gn.grouped_newton(),
    }
    runs = {
        name: train(name, tx, train_set, test_set, arguments.steps, arguments.seed) for name, tx in optimizers.items()
    }
    print(f"\n{arguments.steps} steps of batch {BATCH}, seed {arguments.seed}; compilation is not in the seconds\n")
    print(table(runs))
    group_names = gn.groups.names(gn.groups.per_module, nnx.state(Network(nnx.Rngs(0)), nnx.Param))
    draw(runs, group_names, arguments.out)
    print(f"\nPicture: {arguments.out}")


if __name__ == "__main__":
    main()
