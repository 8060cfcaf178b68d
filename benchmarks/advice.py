"""How good the rates of gn.suggest_learning_rates are: what AdamW with warm-up and cosine comes to with them.

For every workload and seed, at the initial params and after 100 steps of AdamW at 1e-3, 100 batches give the
suggestion, one rate for all params. Beside it: the same without trials, the learning-rate range test as Lightning does
it (100 steps from 1e-8 to 1, the steepest fall of the smoothed loss) and as fastai does it (from 1e-7 to 10, the
"valley"), and 0.01 for everything. AdamW then trains from the initial params with each rate, and its final validation
loss is compared with that of the best of the grid of training.py, geometric means over the seeds.

    python benchmarks/advice.py --help
"""

import argparse
import functools
import itertools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from tqdm import tqdm
from workloads import CHOOSING, REPORTING, load

import grouped_newton as gn

RESULTS = Path(__file__).parent / "results" / "advice.jsonl"
STARTS, SEEDS = (0, 100), (0, 1, 2)
BATCHES = 100
FIRST_RATE, SMOOTHING = 1e-3, 0.98
SWEEPS = {"range test, steepest": (1e-8, 1.0), "range test, valley": (1e-7, 10.0)}
SUGGESTED, WITHOUT_TRIALS, CONSTANT = "suggested", "suggested, without trials", "always 0.01"
METHODS = (SUGGESTED, WITHOUT_TRIALS, *SWEEPS, CONSTANT)


def batches_of(workload, start, seed):
    """What training with that seed sees, from a step on."""
    key = lambda step: jax.random.split(jax.random.fold_in(jax.random.key(seed), step))[0]
    draw = jax.jit(workload.draw)
    return [draw(key(step), workload.train) for step in range(start, start + BATCHES)]


def beginning(workload, start, seed):
    """Params and Adam's state after some steps of AdamW at 1e-3."""
    tx = optax.adamw(FIRST_RATE)
    params = workload.init(jax.random.key(seed))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(workload.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches_of(workload, 0, seed)[:start]:
        params, state = step(params, state, batch)
    return params, state[0]


def suggest(workload, start, seed):
    """Rates by gn.suggest_learning_rates, and what they cost."""
    params, state = beginning(workload, start, seed)
    begin = time.process_time()
    options = {"groups": gn.groups.single, "state": state if start else None, "progress": False}
    found = gn.suggest_learning_rates(
        workload.loss, params, batches_of(workload, start, seed), steps=workload.steps, **options
    )
    return {
        "peak": found.peak,
        "range": [found.peak_low, found.peak_high],
        "edge": found.edge,
        "slope_error": found.slope_error,
        "trials": [[float(f"{rate:.4g}"), float(f"{loss:.5g}")] for rate, loss in found.trials.items()],
        "gradients": found.gradients,
        "summaries": found.summaries,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


@functools.cache
def _range_step(loss):
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)

    @jax.jit
    def step(params, state, batch, rate):
        state.hyperparams["learning_rate"] = rate
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def range_test(workload, start, seed, low, high):
    """Rates and smoothed losses of a run whose rate grows exponentially, until four times the least loss."""
    params, _ = beginning(workload, start, seed)
    tx, step = _range_step(workload.loss)
    state, average, rates, losses = tx.init(params), 0.0, [], []
    for i, batch in enumerate(batches_of(workload, start, seed)):
        rate = low * (high / low) ** (i / (BATCHES - 1))
        params, state, value = step(params, state, batch, jnp.asarray(rate, jnp.float32))
        average = SMOOTHING * average + (1 - SMOOTHING) * float(value)
        smooth = average / (1 - SMOOTHING ** (i + 1))
        if not math.isfinite(smooth) or (losses and smooth > 4 * min(losses)):
            break
        rates.append(rate)
        losses.append(smooth)
    return rates, losses


def steepest(rates, losses):
    """Lightning's: where the loss falls fastest, without the first ten and the last."""
    kept = slice(10, -1)
    return rates[kept][int(np.argmin(np.gradient(losses[kept])))]


def valley(rates, losses):
    """fastai's: half way along the longest falling subsequence, without the first tenth and the last five."""
    rates, losses = rates[BATCHES // 10 : -5], losses[BATCHES // 10 : -5]
    lengths = []  # of the longest that ends at each loss
    for loss in losses:
        lengths.append(1 + max((n for n, before in zip(lengths, losses, strict=False) if before > loss), default=0))
    longest = max(lengths)
    third = longest / 3
    return rates[lengths.index(longest) - longest + int(third) + int(third / 2)]


def by_range_test(workload, start, seed):
    """Range-test name -> rate."""
    pick = {"range test, steepest": steepest, "range test, valley": valley}
    return {name: pick[name](*range_test(workload, start, seed, *SWEEPS[name])) for name in SWEEPS}


def find(names, starts, seeds, path):
    """Suggests and tests what the file doesn't have yet."""
    done = {(r["kind"], r["workload"], r["start"], r["seed"]) for r in training.read([path]) if "start" in r}
    for name, start, seed in (bar := tqdm([*itertools.product(names, starts, seeds)], disable=None)):
        bar.set_description(f"{name}, start {start}, seed {seed}")
        for kind, method in (("suggest", suggest), ("range", by_range_test)):
            if (kind, name, start, seed) not in done:
                record = {"kind": kind, "workload": name, "start": start, "seed": seed}
                training.append(path, record | method(load(name), start, seed))


def rates_of(records):
    """(method, start) -> (workload, seed) -> rate."""
    rates = {}
    for r in (r for r in records if "start" in r):
        found = {SUGGESTED: r["peak"], WITHOUT_TRIALS: r["edge"], CONSTANT: 0.01} if r["kind"] == "suggest" else r
        for method in METHODS:
            if method in found:
                rates.setdefault((method, r["start"]), {})[r["workload"], r["seed"]] = found[method]
    return rates


def train(names, methods, starts, seeds, path):
    """Trains with the rates that were found, and with those of the grid that training.py has not trained with."""
    records = training.read([path])
    done = {(r["workload"], r["seed"], r["peak"]) for r in records if r["kind"] == "train"}
    rates = rates_of(records)
    wanted = [(name, seed, peak) for name, seed in itertools.product(names, seeds) for peak in training.RATES]
    done |= {(name, seed, peak) for name in names for peak, losses in grid(name).items() for seed in losses}
    for name, method, start, seed in itertools.product(names, methods, starts, seeds):
        wanted.append((name, seed, rates.get((method, start), {}).get((name, seed))))
    make = training.OPTIMIZERS[training.REFERENCE].make
    jobs = [job for job in dict.fromkeys(wanted) if job not in done and job[2] is not None]
    for name, seed, peak in tqdm(jobs, disable=None):
        ends = training.run(load(name), make, {"peak": peak}, seed)["validation"]
        training.append(
            path, {"kind": "train", "workload": name, "seed": seed, "peak": peak, "validation": [ends[0], ends[-1]]}
        )


@functools.cache
def grid(workload):
    """Rate -> seed -> first and final validation loss, of training.py."""
    found = {}
    for r in training.read([training.RESULTS]):
        if r["kind"] == "run" and (r["workload"], r["optimizer"], r["lengths"]) == (workload, training.REFERENCE, [1]):
            found.setdefault(r["hypers"]["peak"], {})[r["seed"]] = [r["validation"][0], r["validation"][-1]]
    return found


def trained_with(records):
    """(workload, seed, rate) -> first and final validation loss, of this file and of training.py."""
    recorded = {
        (name, seed, rate): ends
        for name in (*CHOOSING, *REPORTING)
        for rate, by_seed in grid(name).items()
        for seed, ends in by_seed.items()
    }
    return recorded | {(r["workload"], r["seed"], r["peak"]): r["validation"] for r in records if r["kind"] == "train"}


def mean_loss(ends):
    """The geometric mean of the final losses, of the first where training diverged."""
    return training.geometric_mean(first if final is None else final for first, final in ends)


def best_of_grid(workload, trained):
    """Rate and loss of the best of the grid's rates, and the second best's loss, among those with all seeds."""
    ends = {rate: [trained.get((workload, seed, rate)) for seed in SEEDS] for rate in training.RATES}
    complete = {rate: mean_loss(x) for rate, x in ends.items() if None not in x}
    best, second = sorted(complete, key=complete.get)[:2]
    return best, complete[best], complete[second]


def table(records, start):
    """One start in Markdown: per method the rate and, in brackets, the final validation loss over the grid's best.

    Rates and losses are geometric means over seeds; where training diverged the loss is that at its start.
    """
    trained = trained_with(records)
    methods = {method: rates for (method, at), rates in rates_of(records).items() if at == start}
    lines = [training.row(["", "best of the grid", *METHODS]), training.row(["---"] * (len(METHODS) + 2))]
    for purpose, names in (("choosing", CHOOSING), ("reporting", REPORTING)):
        ratios = {method: [] for method in METHODS}
        for name in names:
            best, loss, second = best_of_grid(name, trained)
            cells = [name, f"{best:g}"]
            for method in METHODS:
                rates = {seed: rate for (of, seed), rate in methods.get(method, {}).items() if of == name}
                ends = [trained[name, seed, rate] for seed, rate in rates.items() if (name, seed, rate) in trained]
                if not ends:
                    cells.append("–")
                    continue
                reached, seeds = mean_loss(ends), f", {len(ends)} seeds" if len(ends) < len(SEEDS) else ""
                ratios[method].append((reached / loss, reached / second))
                cells.append(f"{training.geometric_mean(rates.values()):.2g} ({reached / loss:.2f}{seeds})")
            lines.append(training.row(cells))
        figures = {
            "within 5 % of the best": lambda pairs: f"{sum(best <= 1.05 for best, _ in pairs)}/{len(pairs)}",
            "within 10 % of the second best": lambda pairs: f"{sum(x <= 1.1 for _, x in pairs)}/{len(pairs)}",
            "geometric mean of the ratio": lambda pairs: f"{training.geometric_mean(best for best, _ in pairs):.2f}",
        }
        for figure, of in figures.items():
            cells = [of(ratios[method]) if ratios[method] else "–" for method in METHODS]
            lines.append(training.row([f"**{purpose}**: {figure}", "", *cells]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help="of find, train, report (default: all)")
    parser.add_argument("--workloads", nargs="+", default=[*CHOOSING, *REPORTING], metavar="NAME")
    parser.add_argument("--starts", nargs="+", type=int, default=STARTS, metavar="N", help="(default: 0 100)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help="to train with (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help=f"(default: {RESULTS.name})")
    arguments = parser.parse_args()
    phases = arguments.phases or ["find", "train", "report"]
    where = arguments.starts, arguments.seeds, arguments.results
    if "find" in phases:
        find(arguments.workloads, *where)
    if "train" in phases:
        train(arguments.workloads, arguments.methods, *where)
    if "report" in phases:
        for start in arguments.starts:
            print(f"\nstart: {start} steps\n\n{table(training.read([arguments.results]), start)}")


if __name__ == "__main__":
    main()
