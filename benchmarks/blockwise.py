"""Rates by kind of layer on transformers against one rate, each at its best multiple, and the order of these rates.

The kinds are those of Wang et al., arXiv 2502.19002: embedding, query and key, value and output, feed-forward, norms;
and the head. AdamW with warm-up and cosine trains with one rate, with the rates of gn.suggest_learning_rates by kind,
with half their distance from the single one in the logarithm, and with the ratios of that paper; each at 1/4 to 4 times
what is suggested, the paper's so that its feed-forward rate is the single one and its head's the embedding's, as where
they are tied. That paper's sharpness, the Hessian's mean diagonal, is that along random signs u over their number::

  E[u_s^T (hess L) u_s] = trace of the block s

    python benchmarks/blockwise.py --help
"""

import argparse
import functools
import itertools
import statistics
from collections import Counter
from pathlib import Path

import advice
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from tqdm import tqdm
from workloads import load

import grouped_newton as gn

RESULTS = Path(__file__).parent / "results" / "blockwise.jsonl"
WORKLOADS = ("gpt text", "vision transformer")
STARTS = (0, 100)
MULTIPLES = (1.0, 0.5, 2.0, 0.25, 4.0)
# Patterns in the order in which they are tried.
KINDS = {
    "norm$": "norms",
    "^embedding": "embedding",
    "^head": "head",
    "qk$": "query and key",
    r"attention.*(/|\b)(v|out)$": "value and output",
    "^mlp": "feed-forward",
}
NAMES = tuple(KINDS.values())
GROUPS = gn.groups.by_path(KINDS)
# Over the norms' rate, as tuned in that paper.
PUBLISHED = dict(zip(NAMES, (1, 10, 10, 8, 4, 6), strict=True))
ONE, BY_KIND, HALF, PAPER = "one rate", "by kind", "by kind, half way", "ratios of 2502.19002"
METHODS = (ONE, BY_KIND, HALF, PAPER)
DRAWS = 24


@functools.cache
def separated(name):
    """The workload with query and key in one leaf and value in another."""
    workload = load(name)

    def apart(module):
        if "qkv" not in module:
            return module
        qk, v = jnp.split(module["qkv"], [module["qkv"].shape[1] * 2 // 3], 1)
        return {key: x for key, x in module.items() if key != "qkv"} | {"qk": qk, "v": v}

    def joined(params):
        join = lambda p: p | {"qkv": jnp.concatenate([p["qk"], p["v"]], 1)} if "qk" in p else p
        return {name: join(module) for name, module in params.items()}

    return workload._replace(
        init=lambda key: {name: apart(module) for name, module in workload.init(key).items()},
        loss=lambda params, batch: workload.loss(joined(params), batch),
        validate=lambda params, data: workload.validate(joined(params), data),
    )


@functools.cache
def adamw_by_kind(name):
    """(steps, **rates) -> AdamW with a rate a kind."""
    labels = GROUPS(jax.eval_shape(separated(name).init, jax.random.key(0)))

    def make(steps, **rates):
        scheduled = {kind: optax.adamw(training.warmup_cosine(rate, steps)) for kind, rate in rates.items()}
        return optax.partition(scheduled, labels)

    return make


def rates_of(found, method, multiple):
    """Kind -> rate."""
    peak = found["peak"]
    base = {
        ONE: dict.fromkeys(NAMES, peak),
        BY_KIND: found["rates"],
        HALF: {kind: (peak * rate) ** 0.5 for kind, rate in found["rates"].items()},
        PAPER: {kind: peak * ratio / PUBLISHED["feed-forward"] for kind, ratio in PUBLISHED.items()},
    }[method]
    return {kind: float(multiple * base[kind]) for kind in NAMES}


def suggest(name, start, seed):
    workload = separated(name)
    params, state = advice.beginning(workload, start, seed)
    batches = advice.batches_of(workload, start, seed)
    options = {"groups": GROUPS, "state": state if start else None, "progress": False}
    found = gn.suggest_learning_rates(workload.loss, params, batches, steps=workload.steps, **options)
    low, high = (dict(zip(found.names, x.tolist(), strict=True)) for x in (found.low, found.high))
    return {"peak": found.peak, "edge": found.edge, "rates": found.by_group, "low": low, "high": high}


def train(name, rates, seed):
    run = training.run(separated(name), adamw_by_kind(name), rates, seed)
    return {"steps": run["steps"], "validation": run["validation"]}


def sharpness(name, start, seed):
    """Kind -> mean of the Hessian's diagonal."""
    workload = separated(name)
    params, _ = advice.beginning(workload, start, seed)
    names = gn.groups.names(GROUPS, params)

    @jax.jit
    def diagonal(key, batch):
        signs = optax.tree.random_like(key, params, jax.random.rademacher)
        summary = gn.summarize(lambda params: workload.loss(params, batch), params, signs, GROUPS, order=2)
        return jnp.diagonal(summary.hbar)

    keys = jax.random.split(jax.random.key(seed), DRAWS)
    traces = [diagonal(*at) for at in zip(keys, advice.batches_of(workload, start, seed), strict=False)]
    size = Counter()
    jax.tree.map(lambda x, kind: size.update({kind: x.size}), params, GROUPS(params))
    mean = dict(zip(names, jnp.mean(jnp.stack(traces), 0).tolist(), strict=True))
    return {"sharpness": {kind: mean[kind] / size[kind] for kind in names}}


def study(names, methods, starts, seeds, path):
    """Suggests and trains what the file doesn't have yet."""
    records = training.read([path])
    done = {key_of(r): r for r in records}

    def found(make, **head):
        if key_of(head) not in done:
            done[key_of(head)] = head | make()
            training.append(path, done[key_of(head)])
        return done[key_of(head)]

    for name in names:
        heads = [
            {"workload": name, "seed": seed, "start": start}
            for seed, start in itertools.product(seeds, dict.fromkeys((0, *starts)))
        ]
        for head in heads:
            found(functools.partial(suggest, *head.values()), kind="suggest", **head)
        for multiple, seed, method in (bar := tqdm([*itertools.product(MULTIPLES, seeds, methods)], disable=None)):
            bar.set_description(f"{name}, seed {seed}: {multiple:g} times {method}")
            suggested = done[key_of({"kind": "suggest", "workload": name, "seed": seed, "start": 0})]
            make = functools.partial(train, name, rates_of(suggested, method, multiple), seed)
            found(make, kind="train", workload=name, seed=seed, method=method, multiple=multiple)
        for head in heads:
            found(functools.partial(sharpness, *head.values()), kind="sharpness", **head)


def key_of(record):
    return tuple(record.get(name) for name in ("kind", "workload", "seed", "start", "method", "multiple"))


def report(records):
    """Per workload: the ratios, and the final validation losses by method and multiple, in Markdown."""
    parts = []
    for name in dict.fromkeys(r["workload"] for r in records):
        here = [r for r in records if r["workload"] == name]
        parts += [f"### {name}", ratios(here), losses(here)]
    return "\n\n".join(parts)


def _known(suggested, name):
    """Whether the rates of the kind and of the norms are their own, and not the single one for those lost in noise."""
    return min(suggested["low"][name], suggested["low"]["norms"]) > 0


def ratios(records):
    """Rates over that of the norms, geometric means over seeds where neither is lost in noise; sharpness over theirs.

    Sharpness is a plain mean, as it may be negative.
    """
    head = ["over the norms'", *NAMES]
    lines = [training.row(head), training.row(["---"] * len(head))]
    for start in STARTS:
        found = [r for r in records if r["kind"] == "suggest" and r["start"] == start]
        if found:
            known = {name: [r["rates"][name] / r["rates"]["norms"] for r in found if _known(r, name)] for name in NAMES}
            cells = [f"{training.geometric_mean(x):.2g} ({len(x)})" if x else "–" for x in known.values()]
            lines.append(training.row([f"rates, after {start} steps (seeds)", *cells]))
    for start in STARTS:
        found = [r["sharpness"] for r in records if r["kind"] == "sharpness" and r["start"] == start]
        if found:
            mean = {name: statistics.fmean(r[name] for r in found) for name in NAMES}
            cells = [f"{mean[name] / mean['norms']:.2g} ({len(found)})" for name in NAMES]
            lines.append(training.row([f"sharpness, after {start} steps (seeds)", *cells]))
    lines.append(training.row(["rates, 2502.19002", *map(str, PUBLISHED.values())]))
    return "\n".join(lines)


def losses(records):
    """Final validation losses, geometric means over seeds, and the shares of the steps to two of the best single rate.

    The first share is to its final loss, the second to that after half of its steps, where less is overfitted.
    """
    runs = {}
    for r in records:
        if r["kind"] == "train":
            runs.setdefault((r["method"], r["multiple"]), []).append(r)
    curves = {key: training.mean_curve([r | {"lengths": [1]} for r in found], 1) for key, found in runs.items()}
    final = {key: float(losses[-1]) for key, (_, losses) in curves.items()}
    multiples = sorted(MULTIPLES)
    best_of = lambda method: min((m for m in final if m[0] == method), key=final.get)
    at, reference = curves[best_of(ONE)]
    targets = reference[-1], np.interp(0.5, at, reference)
    head = ["", *(f"{x:g} times" for x in multiples), "share to its end", "share to its middle"]
    lines = [training.row(head), training.row(["---"] * len(head))]
    for method in METHODS:
        tried = [x for x in multiples if (method, x) in final]
        if tried:
            shares = [training.share_until(*curves[best_of(method)], target) for target in targets]
            cells = [f"{final[method, x]:.4g} ({len(runs[method, x])})" if x in tried else "–" for x in multiples]
            lines.append(
                training.row([method, *cells, *("never" if share == np.inf else f"{share:.2f}" for share in shares)])
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help="of run, report (default: both)")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--starts", nargs="+", type=int, default=STARTS, metavar="N", help="(default: 0 100)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    arguments = parser.parse_args()
    phases = arguments.phases or ["run", "report"]
    if "run" in phases:
        study(arguments.workloads, arguments.methods, arguments.starts, arguments.seeds, arguments.results)
    if "report" in phases:
        print(report(training.read([arguments.results])))


if __name__ == "__main__":
    main()
