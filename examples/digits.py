"""Trains one network on scikit-learn's digits with SGD, AdamW, Adam and grouped_newton, on the same batches.

AdamW warms up for 5 % of the steps and falls to 0 by a cosine. Adam has a constant
rate; it and grouped_newton are evaluated at an average of their parameters. Prints
a table and draws the losses on the test set, the rate that grouped_newton computes
over time, and the curvature between the layers along its last direction.
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
    test_loss: float
    test_accuracy: float
    seconds: float
    compile_seconds: float
    steps: np.ndarray  # (T,)
    losses: np.ndarray  # (T,), on the test set
    opt_states: list  # T of them


def loss_of(graphdef, params, batch):
    """Cross-entropy of a network."""
    images, labels = batch
    logits = nnx.merge(graphdef, params)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def load_data(seed):
    """Training images and labels, then held-out ones."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=seed
    )
    return (jnp.asarray(x_train), jnp.asarray(y_train)), (jnp.asarray(x_test), jnp.asarray(y_test))


def make_optimizers(adamw_rates, steps):
    """What is compared, by name."""
    optimizers = {"SGD 0.1, momentum 0.9": optax.sgd(0.1, momentum=0.9)}
    for rate in adamw_rates:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 20, decay_steps=steps)
        optimizers[f"AdamW {rate:g}, cosine"] = optax.adamw(schedule)
        optimizers[f"Adam {rate:g}, averaged"] = optax.chain(optax.adam(rate), gn.average_params())
    return optimizers | {NEWTON: gn.grouped_newton()}


def evaluated(opt_state, params):
    """The params to evaluate at: their average where the optimizer keeps one."""
    averages = optax.tree.get(opt_state, "AverageParamsState") is not None
    return gn.eval_params(opt_state, params) if averages else params


def train(name, tx, train_set, test_set, steps, seed):
    """Trains a new network; the seed fixes its weights and all batches."""
    graphdef, params = nnx.split(Network(nnx.Rngs(seed)), nnx.Param)
    tx = optax.with_extra_args_support(tx)  # lets the others ignore value and value_fn
    loss_fn = lambda params, batch: loss_of(graphdef, params, batch)

    def step(params, opt_state, indices):
        batch = train_set[0][indices], train_set[1][indices]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        value_fn = lambda p: loss_fn(p, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state

    batches = np.random.default_rng(seed).integers(len(train_set[0]), size=(steps, BATCH))
    opt_state = tx.init(params)
    test_loss = jax.jit(lambda opt_state, params: loss_fn(evaluated(opt_state, params), test_set))
    history = [(0, float(test_loss(opt_state, params)), opt_state)]
    seconds = 0.0
    with tqdm(total=steps, desc=f"{name:<22}", unit="step") as bar:
        bar.set_postfix_str("compiling")
        start = time.perf_counter()
        compiled_step = jax.jit(step).lower(params, opt_state, batches[0]).compile()
        compile_seconds = time.perf_counter() - start
        for first in range(0, steps, RECORD_EVERY):
            chunk = batches[first : first + RECORD_EVERY]
            start = time.perf_counter()
            for indices in chunk:
                params, opt_state = compiled_step(params, opt_state, indices)
            jax.block_until_ready(params)
            seconds += time.perf_counter() - start
            history.append((first + len(chunk), float(test_loss(opt_state, params)), opt_state))
            bar.set_postfix_str(f"test loss {history[-1][1]:.4f}", refresh=False)
            bar.update(len(chunk))

    images, labels = test_set
    params = evaluated(opt_state, params)
    accuracy = float(jnp.mean(nnx.merge(graphdef, params)(images).argmax(axis=1) == labels))
    at, losses, opt_states = zip(*history, strict=True)
    results = float(loss_fn(params, train_set)), losses[-1], accuracy, seconds, compile_seconds
    return Run(*results, np.array(at), np.array(losses), list(opt_states))


def last_summary(run, train_set, seed):
    """Derivatives by layer along the run's last direction, from where that step began, over all training images."""
    state = optax.tree.get(run.opt_states[-1], "GroupedNewtonState")
    graphdef = nnx.graphdef(Network(nnx.Rngs(seed)))
    value_fn = lambda params: loss_of(graphdef, params, train_set)
    names = gn.groups.names(gn.groups.per_module, state.origin)
    summarize = jax.jit(lambda params, direction: gn.summarize(value_fn, params, direction, gn.groups.per_module))
    return summarize(state.origin, state.direction), names


def draw(runs, summary, layers, path):
    """Loss curves, the rate over time and the curvature between layers in one PNG."""
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
    ax.set(yscale="log", ylabel="loss on the test set")
    ax.legend(ncols=2, **legend_above)

    ax = panels["rates"]
    states = [optax.tree.get(state, "GroupedNewtonState") for state in newton.opt_states]
    rates = np.stack([state.rates for state in states[1:]])
    (line,) = plotting.plot_rates(ax, newton.steps[1:], rates, ["all parameters"])
    line.set_color("#4B2A82")
    ax.axhline(1e-3, color="0.5", linewidth=1, zorder=0)
    ax.annotate("Adam's default", (0.01, 1e-3), (0, 3), ax.get_yaxis_transform(), "offset points", color="0.35")
    ax.set_ylim(bottom=min(ax.get_ylim()[0], 3e-4))
    ax.sharex(panels["losses"])
    ax.set(ylabel=f"rate by {NEWTON}", xlabel="step (triangles: the rate is 0)" if np.any(rates <= 0) else "step")

    ax = panels["curvature"]
    plotting.plot_curvature(ax, summary.hbar, layers)
    ax.set_title("Curvature between layers at the end", pad=12)
    ax.set_xlabel(r"$\bar{H}_{st}\,/\,\sqrt{|\bar{H}_{ss}\,\bar{H}_{tt}|}$", labelpad=12)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(runs):
    """The results as text, one run a line."""
    width = max(map(len, runs))
    lines = [f"{'optimizer':<{width}}  train loss  test loss  test accuracy  seconds  compilation"]
    for name, r in runs.items():
        results = f"{r.train_loss:10.5f}  {r.test_loss:9.4f}  {r.test_accuracy:13.1%}"
        lines.append(f"{name:<{width}}  {results}  {r.seconds:7.2f}  {r.compile_seconds:11.2f}")
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps, at least 1 (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="picture (default: out/digits.png)")
    parser.add_argument(
        "--adamw", type=float, nargs="+", default=[1e-2], metavar="RATE", help="of AdamW and Adam (default: 1e-2)"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    if min(arguments.adamw) <= 0:
        parser.error(f"--adamw takes positive rates, got {min(arguments.adamw)}")
    return arguments


def main():
    arguments = parse_arguments()
    train_set, test_set = load_data(arguments.seed)
    optimizers = make_optimizers(arguments.adamw, arguments.steps)
    runs = {
        name: train(name, tx, train_set, test_set, arguments.steps, arguments.seed) for name, tx in optimizers.items()
    }
    print(f"\n{arguments.steps} steps of batch {BATCH}, seed {arguments.seed}; compilation is not in the seconds\n")
    print(table(runs))
    draw(runs, *last_summary(runs[NEWTON], train_set, arguments.seed), arguments.out)
    print(f"\nPicture: {arguments.out}")


if __name__ == "__main__":
    main()
