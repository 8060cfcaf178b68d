"""What each part of grouped_newton is worth: one change at a time, on the workloads for choosing.

    python benchmarks/ablations.py --help

Prints, for every variant, the final validation loss over that of AdamW + cosine at its best rate, per workload (the
geometric mean over seeds; a dash where it has no run, as Gauss-Newton where model and loss don't come apart), and the
geometric means of these ratios and of the shares of AdamW's steps. AdamW's runs are read from the file of training.py.
"""

import argparse
import contextlib
import functools
from pathlib import Path

import optax
import training
from workloads import CHOOSING, REPORTING, Composed, load

import grouped_newton as gn
from grouped_newton import annealing

RESULTS = Path(__file__).parent / "results" / "ablations.jsonl"


@contextlib.contextmanager
def constants(**values):
    """The constants of annealing.py changed for a while: they are read when a step is traced."""
    before = {name: getattr(annealing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(annealing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(annealing, name, value)


def annealed_with(**values):
    """gn.grouped_newton with other constants."""
    tx = gn.grouped_newton()

    def update(*args, **extra_args):
        with constants(**values):
            return tx.update(*args, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def without_value():
    tx = gn.grouped_newton()
    return optax.GradientTransformationExtraArgs(tx.init, lambda *a, value=None, **kw: tx.update(*a, **kw))


def rates_of_the_rule(**options):
    """The rule's rates at every refresh, and an average of the parameters that has no say."""
    return optax.chain(gn.grouped_newton(averaging=None, **options), gn.average_params(0.1))


def options(**values):
    return functools.partial(gn.grouped_newton, **values)


def directed(b1, b2, **values):
    return options(direction=optax.scale_by_adam(b1=b1, b2=b2, **values))


def summarised(summary_of, **options):
    """Another summary: ``summary_of(extra_args)`` is the function of (params, direction, groups)."""
    tx = gn.grouped_newton(**options)

    def update(*args, **extra_args):
        return tx.update(*args, **extra_args, summary_fn=summary_of(extra_args))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def diagonal(extra_args):
    return lambda *at: gn.diagonal(gn.summarize(extra_args["value_fn"], *at))


def order_2(extra_args):
    return functools.partial(gn.summarize, extra_args["value_fn"], order=2)


def gauss_newton(extra_args):
    return functools.partial(gn.gauss_newton_summary, extra_args["model_fn"], extra_args["loss_fn"])


VARIANTS = {
    "the defaults": gn.grouped_newton,
    "slopes on the gradient's own batch": options(delayed=False),
    "the rule's rates at every refresh": rates_of_the_rule,
    "the same on the gradient's own batch": functools.partial(rates_of_the_rule, delayed=False),
    "a group a module": options(groups=gn.groups.per_module),
    "a group a module, the rule's rates at every refresh": functools.partial(
        rates_of_the_rule, groups=gn.groups.per_module
    ),
    "rho = 0.05": functools.partial(annealed_with, RHO=0.05),
    "rho = 0.2": functools.partial(annealed_with, RHO=0.2),
    "gain 1": functools.partial(annealed_with, GAIN=1.0),
    "gain 3": functools.partial(annealed_with, GAIN=3.0),
    "no bound by the length of the parameters": functools.partial(annealed_with, TRUST=1e9),
    "averaging 0.05": options(averaging=0.05),
    "averaging 0.2": options(averaging=0.2),
    "`summary_memory` 0.1": options(summary_memory=0.1),
    "`summary_memory` 1": options(summary_memory=1.0),
    "`growing_period(20)`": options(refresh_every=gn.growing_period(20)),
    "damping fixed at 1": options(internal_damping=1.0),
    "no third order": options(internal_damping=0.0),
    "order 2": functools.partial(summarised, order_2),
    "Gauss-Newton": functools.partial(summarised, gauss_newton),
    "a group a module, diagonal": functools.partial(summarised, diagonal, groups=gn.groups.per_module),
    "a group a module, Gauss-Newton": functools.partial(summarised, gauss_newton, groups=gn.groups.per_module),
    "no `value` passed": without_value,
    "Adam (0.9, 0.999)": directed(0.9, 0.999),
    "Muon's direction for matrices": options(direction=optax.chain(optax.contrib.muon(1.0), optax.scale(-1.0))),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--workloads", nargs="+", default=CHOOSING, choices=[*CHOOSING, *REPORTING], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    parser.add_argument("--reference", type=Path, default=training.RESULTS, metavar="PATH", help="AdamW's runs")
    arguments = parser.parse_args()
    for workload in arguments.workloads:
        fits = [
            name for name in arguments.variants if "Newton" not in name or isinstance(load(workload).loss, Composed)
        ]
        table = {name: training.Entry(VARIANTS[name], lengths=(1,)) for name in fits}
        training.sweep([workload], table, arguments.seeds, arguments.results, lengths=(1,))
    print(rows(training.Results([arguments.reference, arguments.results]), arguments.workloads, arguments.variants))


def rows(results, workloads, variants) -> str:
    """The table in Markdown."""
    lines = ["| variant | " + " | ".join(workloads) + " | loss | steps |", "|" + " --- |" * (len(workloads) + 3)]
    for name in variants:
        ratios = [results.ratio(workload, name, 1) for workload in workloads]
        shares = [results.share(workload, name, 1) for workload in workloads]
        means = [None if None in found else training.geometric_mean(found) for found in (ratios, shares)]
        lines.append(f"| {name} | " + " | ".join(training.show(x) for x in (*ratios, *means)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
