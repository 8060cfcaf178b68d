"""What each default of grouped_newton is worth: one change at a time, on tasks for choosing, against the best Adam.

    python benchmarks/ablations.py --help

Prints, for every variant, the training loss over the best Adam's at equal steps (geometric mean over seeds; then over
tasks, and the worst task). Adam's runs are read from the file of training.py.
"""

import argparse
import functools
from pathlib import Path

import jax.numpy as jnp
import optax
import training
from tasks import CHOOSING

import grouped_newton as gn

RESULTS = Path(__file__).parent / "results" / "ablations.jsonl"
# The two others of CHOOSING take most of the time and hardly tell one variant from another.
TASKS = [task for task in CHOOSING if task not in ("wrong labels", "transformer, 2 blocks")]


def edge_of(change, factor=1.8):
    """The edge rule on a changed summary."""
    return lambda summary, lam: gn.edge_rates(factor)(change(summary), lam)


def without_coupling(s):
    return s._replace(hbar=jnp.diag(jnp.diag(s.hbar)))


def coupled(summary, lam):
    """The edge rule along the solution with the coupling, instead of the one without."""
    d = jnp.cbrt(summary.third)
    solution = gn.solve_cubic(summary.gbar, summary.hbar, d, lam)
    e = jnp.maximum(solution.eta, 0)
    along = gn.Summary(
        summary.loss, (summary.gbar @ e)[None], (e @ summary.hbar @ e)[None, None], jnp.sum((d * e) ** 2)[None] ** 1.5
    )
    alpha = gn.edge_rates()(along, lam)
    return gn.CubicSolution(alpha.eta * e, alpha.radius, jnp.maximum(solution.status, alpha.status))


def third_from_second(s):
    return s._replace(third=jnp.maximum(jnp.diag(s.hbar), 0) ** 1.5)


def no_value(**options):
    tx = gn.grouped_newton(**options)
    return optax.GradientTransformationExtraArgs(tx.init, lambda *a, value=None, **kw: tx.update(*a, **kw))


def to_zero(steps, **options):
    return gn.grouped_newton(optax.cosine_decay_schedule(1.0, steps), **options)


def limited_growth(factor):
    """Rates that grow by at most ``factor`` a step, from their first values on."""
    tx, last = gn.grouped_newton(averaging=None), gn.average_params(0.1)

    def init(params):
        newton = tx.init(params)
        return newton, jnp.zeros_like(newton[1].eta), last.init(params)

    def update(updates, state, params, **extra_args):
        updates, newton = tx.update(updates, state[0], params, **extra_args)
        eta = newton[1].eta
        allowed = jnp.where(state[1] > 0, jnp.minimum(eta, factor * state[1]), eta)
        partition = gn.groups.resolve(gn.groups.per_module, params)
        updates = partition.scale(jnp.where(eta > 0, allowed / eta, 0), updates)
        updates, average = last.update(updates, state[2], params)
        return updates, (newton, allowed, average)

    return optax.GradientTransformationExtraArgs(init, update)


class Variant:
    """gn.grouped_newton with some options; ``curvature`` as in training.run: the gradient's own batch by default."""

    def __init__(self, make=gn.grouped_newton, curvature=0, **options):
        self.make, self.curvature = functools.partial(make, **options), curvature


def directed(b1, b2, **options):
    return Variant(direction=optax.scale_by_adam(b1=b1, b2=b2, **options))


def adaptive(b1, b2):
    return Variant(direction=gn.scale_by_adaptive_momentum(b1, b2))


VARIANTS = {
    "the defaults": Variant(),
    "edge factor 1.0": Variant(rates=gn.edge_rates(1.0)),
    "edge factor 1.5": Variant(rates=gn.edge_rates(1.5)),
    "edge factor 1.95": Variant(rates=gn.edge_rates(1.95)),
    "cosine to 0, edge factor 1.8": Variant(to_zero),
    "cosine to 0, edge factor 1.95": Variant(to_zero, rates=gn.edge_rates(1.95)),
    "the paper's rule, `cubic_rates()`": Variant(rates=gn.cubic_rates()),
    "no coupling between groups": Variant(rates=edge_of(without_coupling)),
    "coupling for the ratios too": Variant(rates=coupled),
    "the latest summary alone": Variant(summary_decay=0.0),
    "`summary_decay` 0.7": Variant(summary_decay=0.7),
    "`summary_decay` 0.95": Variant(summary_decay=0.95),
    "a refresh every 20 from the start": Variant(refresh_every=20),
    "`growing_period(10)`": Variant(refresh_every=gn.growing_period(10)),
    "`growing_period(40)`": Variant(refresh_every=gn.growing_period(40)),
    "curvature on another batch": Variant(curvature=1),
    "curvature on four other batches": Variant(curvature=4),
    "a group a tensor": Variant(groups=gn.groups.per_tensor),
    "one group": Variant(groups=gn.groups.single),
    "at most 2 groups": Variant(groups=functools.partial(gn.groups.per_module, max_groups=2)),
    "damping fixed at 1": Variant(internal_damping=1.0),
    "damping fixed at 10": Variant(internal_damping=10.0),
    "damping with floor 0.1": Variant(internal_damping=gn.adaptive_damping(floor=0.1)),
    "no third order": Variant(internal_damping=0.0),
    "third order replaced by hbar^1.5": Variant(rates=edge_of(third_from_second)),
    "rates grow by at most 5 % a step": Variant(functools.partial(limited_growth, 1.05)),
    "no scale rule": Variant(scale_rule=None),
    "no `value` passed": Variant(no_value),
    "no averaging": Variant(averaging=None),
    "b1 = 0.5, b2 = 0.6 under noise": adaptive(0.5, 0.6),
    "b1 = 0.6, b2 = 0.8 under noise": adaptive(0.6, 0.8),
    "b1 = 0.7, b2 = 0.9 under noise": adaptive(0.7, 0.9),
    "b1 = 0.8, b2 = 0.8 under noise": adaptive(0.8, 0.8),
    "b1 = 0.8, b2 = 0.95 under noise": adaptive(0.8, 0.95),
    "b1 = 0.7, b2 = 0.8 always": directed(0.7, 0.8),
    "b1 = 0.8, b2 = 0.95 always": directed(0.8, 0.95),
    "b1 = 0.9, b2 = 0.999 always, Adam's own": directed(0.9, 0.999),
    "b1 = 0.95, b2 = 0.95 always": directed(0.95, 0.95),
    "b1 = 0.7, b2 = 0.8 always, Nesterov": directed(0.7, 0.8, nesterov=True),
    "Muon's direction for matrices": Variant(direction=optax.chain(optax.contrib.muon(1.0), optax.scale(-1.0))),
    "Lion's direction": Variant(direction=optax.scale_by_lion()),
    "SGD's direction, momentum 0.9": Variant(direction=optax.trace(0.9)),
    "the plain gradient": Variant(direction=optax.identity()),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=CHOOSING, metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    parser.add_argument("--adam", type=Path, default=training.RESULTS, metavar="PATH", help="Adam's runs")
    arguments = parser.parse_args()
    training.sweep(arguments.tasks, {"adam": training.OPTIMIZERS["adam"]}, arguments.seeds, arguments.adam)
    for task in arguments.tasks:
        for name in arguments.variants:
            variant = VARIANTS[name]
            table = {name: (variant.make, {})}
            training.sweep([task], table, arguments.seeds, arguments.results, curvature=variant.curvature)
    print(rows(training.Results([arguments.adam, arguments.results]), arguments.tasks, arguments.variants))


def rows(results, tasks, variants) -> str:
    """The table in Markdown."""
    lines = ["| variant | " + " | ".join(tasks) + " | geometric mean | worst |", "|" + " --- |" * (len(tasks) + 3)]
    for name in variants:
        ratios = [results.ratio(task, name) for task in tasks]
        cells = [f"{x:.2g}" for x in (*ratios, training.geometric_mean(ratios), max(ratios))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
