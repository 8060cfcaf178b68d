"""How good the rates of gn.suggest_learning_rates are: what AdamW with warm-up and cosine comes to with them.

For every workload, at its initial params and after 100 steps of AdamW at 1e-3, 100 batches give the suggestion, one
rate for all params. Beside it: the same without trials, the learning-rate range test as Lightning does it (100 steps
from 1e-8 to 1, the steepest fall of the smoothed loss) and as fastai does it (from 1e-7 to 10, the "valley"), and 0.01
for everything. The final validation losses at the rates of the grid of training.py are known, of seed 0; that at a
suggested one is interpolated between them, linear in the logarithms, and held beyond them. *train* trains with them.

    python benchmarks/advice.py --help
"""

import argparse
import functools
import json
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
STARTS = (0, 100)
BATCHES = 100
FIRST_RATE = 1e-3
SWEEPS = {"range test, steepest": (1e-8, 1.0), "range test, valley": (1e-7, 10.0)}
SUGGESTED, WITHOUT_TRIALS, CONSTANT = "suggested", "suggested, without trials", "always 0.01"


def batches_of(workload, start, seed=0):
    """What training with that seed sees, from a step on."""
    key = lambda step: jax.random.split(jax.random.fold_in(jax.random.key(seed), step))[0]
    draw = jax.jit(workload.draw)
    return [draw(key(step), workload.train) for step in range(start, start + BATCHES)]


def beginning(workload, start, seed=0):
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


def suggest(workload, start):
    """Rates by gn.suggest_learning_rates, and what they cost."""
    params, state = beginning(workload, start)
    begin = time.process_time()
    options = {"groups": gn.groups.single, "state": state if start else None, "progress": False}
    found = gn.suggest_learning_rates(
        workload.loss, params, batches_of(workload, start), steps=workload.steps, **options
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


def range_test(workload, start, low, high, smoothing=0.98):
    """Rates and smoothed losses of a run whose rate grows exponentially, until four times the least loss."""
    params, _ = beginning(workload, start)
    tx, step = _range_step(workload.loss)
    state, average, rates, losses = tx.init(params), 0.0, [], []
    for i, batch in enumerate(batches_of(workload, start)):
        rate = low * (high / low) ** (i / (BATCHES - 1))
        params, state, value = step(params, state, batch, jnp.asarray(rate, jnp.float32))
        average = smoothing * average + (1 - smoothing) * float(value)
        smooth = average / (1 - smoothing ** (i + 1))
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
    """fastai's: the middle of the longest falling subsequence, without the first tenth and the last five."""
    rates, losses = rates[BATCHES // 10 : -5], losses[BATCHES // 10 : -5]
    lengths, end, start = [1] * len(losses), 0, 0
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[end] < lengths[i]:
                end, start = i, i - lengths[i]
    section = (end - start) / 3
    return rates[start + int(section) + int(section / 2)]


def by_range_test(workload, start):
    """Range-test name -> rate."""
    pick = {"range test, steepest": steepest, "range test, valley": valley}
    return {name: pick[name](*range_test(workload, start, *SWEEPS[name])) for name in SWEEPS}


def find(names, starts, path):
    """Suggests and tests what the file doesn't have yet."""
    done = {(r["kind"], r["workload"], r["start"]) for r in training.read([path]) if "start" in r}
    for start in starts:
        for name in (bar := tqdm(names, disable=None)):
            bar.set_description(f"{name}, start {start}")
            for kind, method in (("suggest", suggest), ("range", by_range_test)):
                if (kind, name, start) not in done:
                    record = {"kind": kind, "workload": name, "start": start}
                    append(path, record | method(load(name), start))


def rates_of(records):
    """(method, start) -> workload -> peak."""
    rates = {}
    for r in records:
        if r["kind"] == "suggest":
            rates.setdefault((SUGGESTED, r["start"]), {})[r["workload"]] = r["peak"]
            rates.setdefault((WITHOUT_TRIALS, r["start"]), {})[r["workload"]] = r["edge"]
            rates.setdefault((CONSTANT, r["start"]), {})[r["workload"]] = 0.01
        if r["kind"] == "range":
            for name in SWEEPS:
                rates.setdefault((name, r["start"]), {})[r["workload"]] = r[name]
    return rates


@functools.cache
def grid():
    """Workload -> rate -> final validation loss of AdamW with warm-up and cosine, seed 0, the workload's own steps."""
    found = {}
    for r in training.read([training.RESULTS]):
        if r["kind"] == "run" and (r["optimizer"], r["seed"], r["lengths"]) == (training.REFERENCE, 0, [1]):
            found.setdefault(r["workload"], {})[r["hypers"]["peak"]] = training.final(r, 1)
    return found


def interpolated(workload, rate):
    """The final validation loss at a rate."""
    rates, losses = zip(*sorted(grid()[workload].items()), strict=True)
    return math.exp(np.interp(math.log(rate), np.log(rates), np.log(losses)))


def train(names, methods, starts, path):
    """Trains with the rates that were found, seed 0."""
    records = training.read([path])
    done = {(r["workload"], r["peak"]) for r in records if r["kind"] == "train"}
    make = training.OPTIMIZERS[training.REFERENCE].make
    jobs = [(n, rates[n]) for (m, s), rates in rates_of(records).items() if m in methods and s in starts for n in names]
    for name, peak in tqdm([job for job in jobs if job not in done], disable=None):
        run = training.run(load(name), make, {"peak": peak}, 0)
        append(path, {"kind": "train", "workload": name, "peak": peak, "validation": run["validation"][-1]})


def table(records, start):
    """One start in Markdown: per method the rate and, in brackets, the final validation loss over the grid's best."""
    trained = {(r["workload"], r["peak"]): r["validation"] for r in records if r["kind"] == "train"}
    methods = {method: rates for (method, at), rates in rates_of(records).items() if at == start}
    order = [SUGGESTED, WITHOUT_TRIALS, *SWEEPS, CONSTANT]
    lines = [training._row(["", "best of the grid", *order]), training._row(["---"] * (len(order) + 2))]
    for purpose, names in (("choosing", CHOOSING), ("reporting", REPORTING)):
        ratios = {method: [] for method in order}
        for name in (n for n in names if n in methods.get(SUGGESTED, {})):
            losses = sorted(grid()[name].values())
            cells = [name, f"{min(grid()[name], key=grid()[name].get):g}"]
            for method in order:
                rate = methods[method].get(name)
                loss = trained.get((name, rate))
                mark = "" if loss is None else "*"
                loss = interpolated(name, rate) if loss is None else loss
                ratios[method].append((loss / losses[0], loss / losses[1]))
                cells.append(f"{rate:.2g} ({loss / losses[0]:.2f}{mark})")
            lines.append(training._row(cells))
        figures = {
            "within 5 % of the best": lambda pairs: f"{sum(best <= 1.05 for best, _ in pairs)}/{len(pairs)}",
            "within 10 % of the second best": lambda pairs: f"{sum(x <= 1.1 for _, x in pairs)}/{len(pairs)}",
            "geometric mean of the ratio": lambda pairs: f"{training.geometric_mean(best for best, _ in pairs):.2f}",
        }
        for figure, of in figures.items():
            if all(ratios.values()):
                lines.append(training._row([f"**{purpose}**: {figure}", "", *(of(ratios[m]) for m in order)]))
    return "\n".join(lines)


def append(path, record):
    """Adds a line to the results."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help="of find, train, report (default: find, report)")
    parser.add_argument("--workloads", nargs="+", default=[*CHOOSING, *REPORTING], metavar="NAME")
    parser.add_argument("--starts", nargs="+", type=int, default=STARTS, metavar="N", help="(default: 0 100)")
    parser.add_argument("--methods", nargs="+", default=[SUGGESTED], metavar="NAME", help="to train with")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help=f"(default: {RESULTS.name})")
    arguments = parser.parse_args()
    phases = arguments.phases or ["find", "report"]
    if "find" in phases:
        find(arguments.workloads, arguments.starts, arguments.results)
    if "train" in phases:
        train(arguments.workloads, arguments.methods, arguments.starts, arguments.results)
    if "report" in phases:
        for start in arguments.starts:
            print(f"\nstart: {start} steps\n\n{table(training.read([arguments.results]), start)}")


if __name__ == "__main__":
    main()
