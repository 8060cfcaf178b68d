"""How fast optimizers train: steps and time to the validation loss of a tuned AdamW, on the workloads of workloads.py.

Three phases, each resumes where the results file ends: *run* trains, *time* measures an optimizer's own step, in turns
in one process, *report* prints the tables and draws the picture. A fourth, *rates*, draws the rates of a long run.

The reference is AdamW with warm-up and cosine decay to 0, the best of six rates for every workload and every length: a
quarter, one and four times the workload's own steps. Its final validation loss is the target, the geometric mean over
seeds. The share is after what part of AdamW's steps the validation loss, the geometric mean over seeds, first is at the
target, interpolated between checkpoints; 2 where it isn't within AdamW's steps. The share of time is that times the
time a step over AdamW's, at most 2. Both are averaged geometrically over workloads. An optimizer with a schedule runs
once per length; one without runs once, to the longest, and the parts of that run are its shorter ones. Optimizers are
evaluated at the average of the parameters, where they keep one.

The best of a grid is, per workload and length, the setting with the lowest final validation loss, the geometric mean
over seeds, among the settings with most seeds: seed 0 tries all settings, the other seeds only those that are among
the two best of seed 0 at a length of the run. A loss that isn't finite is infinite in that choice and counts as the
loss at the start in ratios. Ratios of training losses, of a fixed batch, are of the losses plus 1e-4.

Every step draws its batch from (seed, step), so all optimizers see the same ones. ``value_fn`` is the loss on that
batch; on another one for the paper's configuration.

    python benchmarks/training.py --help
"""

import argparse
import collections
import functools
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm
from workloads import CHOOSING, LARGE, REPORTING, Composed, Workload, load

import grouped_newton as gn

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
PICTURE = Path(__file__).parent.parent / "docs" / "training.png"
OFFSET = 1e-4
LENGTHS = (0.25, 1, 4)
NEVER = 2.0
REFERENCE, OURS = "adamw, cosine", "grouped_newton"
PURPOSES = {"choosing": CHOOSING, "reporting": REPORTING, "large": LARGE}


def warmup_cosine(peak, steps):
    """optax.warmup_cosine_decay_schedule(0, peak, max(1, steps // 20), steps), with arguments that may be traced."""
    warmup = jnp.maximum(1, steps // 20)
    decay = lambda count: cosine(steps - warmup)(count - warmup)
    return lambda count: peak * jnp.where(count < warmup, count / warmup, decay(count))


def cosine(steps):
    """From 1 to 0; ``steps`` may be traced."""
    return lambda count: (1 + jnp.cos(jnp.pi * jnp.clip(count / jnp.maximum(1, steps), 0, 1))) / 2


def paper(learning_rate=0.1, internal_damping=1.0):
    """The published configuration."""
    rates = {"internal_damping": internal_damping, "rates": gn.cubic_rates(), "refresh_every": 10}
    off = {"summary_memory": 0.0, "delayed": False, "averaging": None}
    return gn.grouped_newton(learning_rate, gn.groups.per_tensor, direction=optax.trace(0.9), **rates, **off)


class Entry(NamedTuple):
    """An optimizer of the comparison.

    Attributes:
      make: hypers -> an optax transform, the same object between calls, or it compiles anew. One that names ``steps``
        has a schedule and gets the length of the run; floats and ``steps`` come traced.
      settings: the hypers to try.
      lengths: at which it is compared, over the workload's own steps.
      own_batch: whether value_fn is the loss on the gradient's own batch.
    """

    make: Callable
    settings: tuple = ({},)
    lengths: tuple = LENGTHS
    own_batch: bool = True


def _scheduled(make):
    return "steps" in inspect.signature(make).parameters


def _grid(name, *values):
    return tuple({name: value} for value in values)


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OPTIMIZERS = {
    REFERENCE: Entry(lambda steps, peak: optax.adamw(warmup_cosine(peak, steps)), _grid("peak", *RATES)),
    "adam, averaged": Entry(lambda rate: optax.chain(optax.adam(rate), gn.average_params(0.1)), _grid("rate", *RATES)),
    "muon, cosine": Entry(  # Adam on what isn't a matrix, such as kernels of convolutions
        lambda steps, peak: optax.contrib.muon(warmup_cosine(peak, steps)), _grid("peak", *RATES[2:5]), (1,)
    ),
    "schedule-free adamw": Entry(optax.contrib.schedule_free_adamw, _grid("learning_rate", *RATES[1:4]), (0.25, 1)),
    "prodigy, cosine": Entry(lambda steps: optax.contrib.prodigy(cosine(steps)), lengths=(1,)),
    "momo_adam": Entry(optax.contrib.momo_adam, lengths=(0.25, 1)),
    "nadamw, cosine": Entry(lambda steps: optax.nadamw(warmup_cosine(1e-3, steps)), lengths=(1,)),
    "paper": Entry(paper, lengths=(0.25, 1), own_batch=False),
    OURS: Entry(gn.grouped_newton),
}
ONE_SETTING = ("prodigy, cosine", "momo_adam", "nadamw, cosine", "paper")


# Running


@functools.lru_cache(maxsize=16)
def _compiled(loss, draw, make, own_batch):
    """Jitted start, step and several steps; what is traced isn't compiled in, so that a grid compiles once."""

    def optimizer(traced, static):
        return optax.with_extra_args_support(make(**traced, **dict(static)))

    @functools.partial(jax.jit, static_argnames="static")
    def start(params, traced, static):
        return params, optimizer(traced, static).init(params), jnp.array(0)

    def once(carry, seed, traced, train, static):
        params, state, count = carry
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(seed), count))
        batch = draw(key, train)
        value, grads = jax.value_and_grad(loss)(params, batch)
        newton_batch = batch if own_batch else draw(other, train)
        extra = {"value": value, "grad": grads, "value_fn": lambda p: loss(p, newton_batch)}
        if isinstance(loss, Composed):  # for those who ask
            extra |= {"model_fn": lambda p: loss.model(p, newton_batch)}
            extra |= {"loss_fn": lambda z: loss.of_outputs(z, newton_batch)}
        updates, state = optimizer(traced, static).update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, count + 1

    def several(carry, times, seed, traced, train, static):
        return jax.lax.fori_loop(0, times, lambda _, carry: once(carry, seed, traced, train, static), carry)

    options = {"static_argnames": "static", "donate_argnames": "carry"}
    return start, jax.jit(once, **options), jax.jit(several, **options)


def prepare(workload: Workload, make: Callable, hypers: dict, seed: int, horizon: int, own_batch: bool = True):
    """The carry (params, state, count) before the first step; carry -> carry; and (carry, times) -> carry."""
    start, step, several = _compiled(workload.loss, workload.draw, make, own_batch)
    traced = {name: jnp.asarray(value, jnp.float32) for name, value in hypers.items() if isinstance(value, float)}
    static = tuple((name, value) for name, value in hypers.items() if name not in traced)
    if _scheduled(make):
        traced["steps"] = jnp.asarray(horizon, jnp.int32)
    # Donated buffers must not be shared, as those of a state that keeps the first params are.
    carry = jax.tree.map(jnp.copy, start(workload.init(jax.random.key(seed)), traced, static=static))
    common = {"seed": jnp.asarray(seed, jnp.uint32), "traced": traced, "train": workload.train, "static": static}
    return carry, lambda carry: step(carry, **common), lambda carry, times: several(carry, jnp.array(times), **common)


def default_eval_params(state, params):
    """The params to evaluate at: the average where the optimizer keeps one."""
    if isinstance(state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(state, params)
    is_average = lambda x: isinstance(x, gn.AverageParamsState)
    averages = any(map(is_average, jax.tree.leaves(state, is_leaf=is_average)))
    return gn.eval_params(state, params) if averages else params


def checkpoints(steps: int, lengths: Iterable[float]) -> list[int]:
    """The steps at which a run that gives these lengths is evaluated: 40 a length, 20 a quarter, each to its end."""
    at, previous = set(), 0.0
    for length in sorted(lengths):
        parts = max(1, min(40, round(80 * length)))
        at |= {round(steps * length * k / parts) for k in range(parts + 1) if length * k / parts >= previous}
        previous = length
    return sorted(at)


def run(
    workload: Workload,
    make: Callable,
    hypers: dict,
    seed: int,
    *,
    steps: int | None = None,
    lengths: Iterable[float] = (1,),
    own_batch: bool = True,
    eval_params: Callable = default_eval_params,
) -> dict[str, Any]:
    """Trains once, to the greatest of ``lengths`` times ``steps``.

    ``make(**hypers)`` and ``own_batch`` are as in :class:`Entry`, ``seed`` is that of the initialisation and the
    batches, ``steps`` are the workload's own by default, ``eval_params(state, params)`` is evaluated.

    Returns:
      ``steps``, ``lengths``, the ``horizon``, and the losses at ``checkpoints(steps, lengths)``: ``train``, of the
      probe, and ``validation``. Once one isn't finite, it stops, and they are None.
    """
    steps, lengths = steps or workload.steps, list(lengths)
    at = checkpoints(steps, lengths)
    evaluations = (jax.jit(workload.loss), workload.probe), (jax.jit(workload.validate), workload.validation)
    carry, step, several = prepare(workload, make, hypers, seed, at[-1], own_batch)
    losses, done = [], 0
    for stop in at:
        if workload.convolutional:  # XLA's CPU runs convolutions slowly within loops
            for _ in range(stop - done):
                carry = step(carry)
        elif stop > done:
            carry = several(carry, stop - done)
        done, params = stop, eval_params(carry[1], carry[0])
        found = [float(loss(params, data)) for loss, data in evaluations]
        if not all(map(math.isfinite, found)):
            break
        losses.append([float(f"{x:.5g}") for x in found])
    losses += [[None, None]] * (len(at) - len(losses))
    train, validation = map(list, zip(*losses, strict=True))
    return {"steps": steps, "lengths": lengths, "horizon": at[-1], "train": train, "validation": validation}


def sweep(
    workload_names: Iterable[str],
    table: dict[str, Entry],
    seeds: Iterable[int] = (0, 1, 2),
    path: Path | str = RESULTS,
    *,
    label: str = "",
    steps: int | None = None,
    lengths: Iterable[float] = LENGTHS,
) -> None:
    """Runs what the file at ``path`` doesn't have yet and appends it, a JSON object a line.

    Once seed 0 has all settings of a grid, other seeds get those that are among its two best at a length of the run.

    Args:
      workload_names: of ``workloads.load``.
      table: name -> optimizer.
      seeds: of the runs, in this order.
      path: of the results; made if missing.
      label: of the version of the optimizers; other labels' runs are made again, and a report takes the latest.
      steps: the workloads' own by default.
      lengths: a run without a schedule goes to the greatest and gives the optimizer's shorter ones too.
    """
    lengths = tuple(lengths)
    done = {_key(record): record for record in read([path]) if record["kind"] == "run"}
    pairs = [(name, optimizer, seed) for name in workload_names for optimizer in table for seed in seeds]
    with tqdm(pairs, disable=None) as bar:
        for name, optimizer, seed in bar:
            bar.set_description(f"{name}: {optimizer}, seed {seed}")
            workload, entry = load(name), table[optimizer]
            head = {"kind": "run", "label": label, "workload": name, "optimizer": optimizer, "seed": seed}
            head["steps"] = steps or workload.steps
            for job in _plan(done, head, entry, lengths):
                options = {"steps": job["steps"], "lengths": job["lengths"], "own_batch": entry.own_batch}
                done[_key(job)] = job | run(workload, entry.make, job["hypers"], seed, **options)
                append(path, done[_key(job)])


def _plan(done, head, entry, lengths):
    """The runs of one workload, optimizer and seed that are to be made."""
    if _scheduled(entry.make):
        spans = [[length] for length in entry.lengths if length in lengths]
    else:
        span = [length for length in entry.lengths if length <= max(lengths)]
        spans = [span] if span else []
    for span in spans:
        horizon = {"lengths": span, "horizon": checkpoints(head["steps"], span)[-1]}
        jobs = [head | horizon | {"hypers": hypers} for hypers in entry.settings]
        first = [done.get(_key(job | {"seed": 0})) for job in jobs]
        if head["seed"] != 0 and all(first):
            order = [sorted(range(len(jobs)), key=lambda i: final(first[i], length)) for length in span]
            jobs = [jobs[i] for i in sorted({i for best in order for i in best[:2]})]
        yield from (job for job in jobs if _key(job) not in done)


def _key(record):
    names = ("label", "workload", "optimizer", "hypers", "seed", "steps", "horizon")
    return tuple(json.dumps(record[name]) for name in names)


def read(paths: Iterable[Path | str]) -> list[dict]:
    """All records of the files that exist."""
    lines = [line for path in map(Path, paths) if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def append(path, record):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


# Timing


def measure(workload: Workload, table: dict[str, Entry], rounds: int = 3, steps: int | None = None):
    """Median seconds a step of each optimizer and of the bare gradient, over runs of the same steps, in turns.

    Runs start anew, as what a step costs may depend on how far the run is, and are of ``steps``, the workload's by
    default, but at most 600 and about six seconds of AdamW's.
    """
    steps = min(steps or workload.steps, 600)
    gradient = jax.jit(jax.value_and_grad(workload.loss))
    params, batch = workload.init(jax.random.key(0)), workload.draw(jax.random.key(0), workload.train)
    begin = {"gradient": lambda: (None, lambda _: gradient(params, batch), None)}
    for name, (make, settings, _, own_batch) in table.items():
        hypers = settings[len(settings) // 2]
        begin[name] = functools.partial(prepare, workload, make, hypers, 0, steps, own_batch)

    def seconds(name, steps):
        carry, step, _ = begin[name]()
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(steps):
            carry = step(carry)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    for name in begin:
        seconds(name, 1)  # compiles
    pace = seconds(REFERENCE if REFERENCE in table else "gradient", min(steps, 20))
    steps = min(steps, max(20, int(6 / pace)))
    times = [{name: seconds(name, steps) for name in begin} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(found[name] for found in times) for name in begin}


def time_steps(
    workload_names: Iterable[str], table: dict[str, Entry], path: Path | str = RESULTS, *, label: str = "", **options
) -> None:
    """Appends each workload's seconds a step to the file at ``path``, unless they are all there under that label.

    An optimizer's time is used as a multiple of AdamW's from the same call: ``table`` should hold the reference.
    """
    done = collections.defaultdict(set)
    for record in read([path]):
        if record["kind"] == "time" and record["label"] == label:
            done[record["workload"]] |= record["seconds"].keys()
    with tqdm(list(workload_names), disable=None) as bar:
        for name in bar:
            bar.set_description(f"time, {name}")
            if table.keys() - done[name]:
                seconds = {n: float(f"{x:.4g}") for n, x in measure(load(name), table, **options).items()}
                append(path, {"kind": "time", "label": label, "workload": name, "seconds": seconds})


# Reporting


class Results:
    """What the files say: of a workload the runs of the latest steps, of an optimizer on it those of the latest label.

    Attributes:
      runs: (workload, optimizer, length) -> {(hypers, seed): record}.
      slowdown: (workload, optimizer) -> time a step over AdamW's.
      gradient: workload -> seconds.
      workloads: that AdamW has run on.
      optimizers: that have run.
    """

    def __init__(self, paths: Iterable[Path | str]):
        self.runs, self.slowdown, self.gradient = collections.defaultdict(dict), {}, {}
        records = read(paths)
        trained = [record for record in records if record["kind"] == "run"]
        steps = {r["workload"]: r["steps"] for r in trained}
        label = {(r["workload"], r["optimizer"]): r["label"] for r in trained}
        for r in trained:
            name, optimizer = pair = r["workload"], r["optimizer"]
            if r["steps"] == steps[name] and r["label"] == label[pair]:
                for length in r["lengths"]:
                    self.runs[name, optimizer, length][json.dumps(r["hypers"]), r["seed"]] = r
        for name, seconds in ((r["workload"], r["seconds"]) for r in records if r["kind"] == "time"):
            self.gradient[name] = seconds["gradient"]
            if REFERENCE in seconds:
                self.slowdown |= {(name, n): value / seconds[REFERENCE] for n, value in seconds.items()}
        of_reference = {name for name, optimizer in label if optimizer == REFERENCE}
        self.workloads = [name for names in PURPOSES.values() for name in names if name in of_reference]
        found = {optimizer for _, optimizer in label}
        self.optimizers = [n for n in OPTIMIZERS if n in found] + sorted(found - set(OPTIMIZERS))

    def chosen(self, workload: str, optimizer: str, length: float) -> dict[int, dict]:
        """seed -> record of the best setting; {} if there is none."""
        by_setting = collections.defaultdict(dict)
        for (hypers, seed), record in self.runs.get((workload, optimizer, length), {}).items():
            by_setting[hypers][seed] = record
        most = max(map(len, by_setting.values()), default=0)
        complete = [records for records in by_setting.values() if len(records) == most]
        return min(complete, key=lambda r: geometric_mean(final(x, length) for x in r.values()), default={})

    def loss(self, workload: str, optimizer: str, length: float, curve: str = "validation") -> float | None:
        """The final loss of the best setting."""
        records = self.chosen(workload, optimizer, length).values()
        ends = [end if math.isfinite(end := final(r, length, curve)) else r[curve][0] for r in records]
        return geometric_mean(x + (OFFSET if curve == "train" else 0) for x in ends) if ends else None

    def ratio(self, workload: str, optimizer: str, length: float, curve: str = "validation") -> float | None:
        """That loss over AdamW's."""
        ours, reference = (self.loss(workload, name, length, curve) for name in (optimizer, REFERENCE))
        return None if ours is None or reference is None else ours / reference

    def share(self, workload: str, optimizer: str, length: float, clock: bool = False) -> float | None:
        """Of AdamW's steps or time, until its final validation loss; None if there is no run or no time."""
        target, records = self.loss(workload, REFERENCE, length), self.chosen(workload, optimizer, length).values()
        slowdown = self.slowdown.get((workload, optimizer)) if clock else 1.0
        if target is None or slowdown is None or not records:
            return None
        return min(NEVER, slowdown * share_until(*mean_curve(records, length), target))

    def diverged(self, workload: str, optimizer: str, length: float) -> list[bool]:
        """Whether each run of the best setting ended with a loss that isn't finite or is above the first."""
        records = self.chosen(workload, optimizer, length).values()
        return [r["validation"][0] is None or not final(r, length) <= r["validation"][0] for r in records]


def curve_of(record: dict, length: float, curve: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """The share of the steps of ``length``, up to 1, and the losses there, infinite where they aren't finite."""
    at = np.array(checkpoints(record["steps"], record["lengths"]))
    end = checkpoints(record["steps"], [length])[-1]
    losses = np.array([math.inf if x is None else x for x in record[curve]])
    return at[at <= end] / max(1, end), losses[at <= end]


def final(record: dict, length: float, curve: str = "validation") -> float:
    """The loss at the end of ``length``, infinite where it isn't finite."""
    return float(curve_of(record, length, curve)[1][-1])


def mean_curve(records: Iterable[dict], length: float, curve: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """:func:`curve_of` of several seeds, the geometric mean of their losses."""
    curves = [curve_of(record, length, curve) for record in records]
    return curves[0][0], np.array([geometric_mean(losses) for losses in zip(*(c for _, c in curves), strict=True)])


def share_until(at: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The share of the steps until the loss first is at the target, infinite where it isn't."""
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return math.inf
    i = max(1, reached[0])
    before, after = losses[i - 1], losses[i]
    part = np.clip((before - target) / (before - after), 0, 1) if before > after else 0.0
    return float(max(at[i - 1] + part * (at[i] - at[i - 1]), at[1] / 10))


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(value, 1e-30)) for value in values))


def summary(results: Results, workloads: list[str], optimizer: str, length: float) -> dict[str, str]:
    """Figure -> its value over the workloads that have it."""

    def over(figure, pick=geometric_mean, name=optimizer, **options):
        values = [figure(workload, name, length, **options) for workload in workloads]
        known = [value for value in values if value is not None]
        return show(pick(known) if known else None)

    def over_best_other(workload, name, length):
        ours = results.share(workload, name, length)
        others = [results.share(workload, other, length) for other in ONE_SETTING]
        known = [value for value in others if value is not None]
        return ours / min(known) if known and ours is not None and name not in ONE_SETTING else None

    diverged = [x for workload in workloads for x in results.diverged(workload, optimizer, length)]
    return {
        "share of steps": over(results.share),
        "share of time": over(results.share, clock=True),
        "validation loss": over(results.ratio),
        "validation loss, worst": over(results.ratio, max),
        "training loss": over(results.ratio, curve="train"),
        "share of steps over the best of one setting": over(over_best_other),
        "diverged": f"{sum(diverged)}/{len(diverged)}",
    }


def table(results: Results, length: float) -> str:
    """One length in Markdown: shares of AdamW's steps and time, the ratio of final validation losses in brackets."""
    has_run = {optimizer for _, optimizer, found in results.runs if found == length}
    names = [name for name in results.optimizers if name in has_run]
    lines = [row(["", "AdamW's rate", "its loss", *names]), row(["---"] * (len(names) + 3))]
    for purpose, workloads in _by_purpose(results, length):
        for workload in workloads:
            (hypers, *_) = (r["hypers"] for r in results.chosen(workload, REFERENCE, length).values())
            cells = [f"{hypers.get('peak', 0):g}", f"{results.loss(workload, REFERENCE, length):.3g}"]
            for name in names:
                shares = [results.share(workload, name, length, clock) for clock in (False, True)]
                known = ", ".join(show(share) for share in shares if share is not None)
                cells.append(f"{known} ({show(results.ratio(workload, name, length))})" if known else "–")
            lines.append(row([workload, *cells]))
        figures = [summary(results, workloads, name, length) for name in names]
        for figure in figures[0]:
            lines.append(row([f"**{purpose}**: {figure}", "", "", *(found[figure] for found in figures)]))
    return "\n".join(lines)


def lengths_table(results: Results, names: Iterable[str] = ("adam, averaged", OURS)) -> str:
    """The summaries of some optimizers at all lengths, in Markdown."""
    rows = []
    for name, length in itertools.product(names, LENGTHS):
        for purpose, workloads in _by_purpose(results, length):
            if any(results.chosen(workload, name, length) for workload in workloads):
                rows.append(([name, f"{length:g}", purpose], summary(results, workloads, name, length)))
    head = ["", "length", "workloads", *(rows[0][1] if rows else ())]
    return "\n".join([row(head), row(["---"] * len(head)), *(row([*cells, *f.values()]) for cells, f in rows)])


def slowdowns(results: Results) -> str:
    """Each optimizer's time a step over AdamW's and the gradient's milliseconds, in Markdown."""
    names = [name for name in results.optimizers if any(n == name for _, n in results.slowdown) and name != REFERENCE]
    head = ["time a step over AdamW's", "gradient, ms", "gradient", *names]
    lines = [row(head), row(["---"] * len(head))]
    for workload in results.gradient:
        cells = [show(results.slowdown.get((workload, name))) for name in ("gradient", *names)]
        lines.append(row([workload, f"{1e3 * results.gradient[workload]:.3g}", *cells]))
    return "\n".join(lines)


def _by_purpose(results, length):
    for purpose, names in PURPOSES.items():
        workloads = [w for w in results.workloads if w in names and results.chosen(w, REFERENCE, length)]
        if workloads:
            yield purpose, workloads


def show(value):
    return "–" if value is None else f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.2g}"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def draw_picture(results: Results, path: Path | str) -> None:
    """Validation losses over steps on four workloads, and how many workloads are done by which share of AdamW's."""
    import matplotlib.pyplot as plt

    workloads = [w for w in results.workloads if results.chosen(w, REFERENCE, 1)]
    compared = [w for w in workloads if w in REPORTING] or workloads
    shown = [compared[i] for i in sorted({round(x) for x in np.linspace(0, len(compared) - 1, 4)})]
    mosaic = [["a", "b", "profile"], ["c", "d", "profile"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(12, 5.6), width_ratios=[1, 1, 1.4], layout="constrained")
    styles = {name: {"color": f"C{i}", "linewidth": 1.3} for i, name in enumerate(results.optimizers)}
    styles |= {REFERENCE: {"color": "C0", "linewidth": 2.2}, OURS: {"color": "black", "linewidth": 3, "zorder": 5}}
    for key, workload in zip("abcd", shown, strict=False):
        _draw_curves(axes[key], results, workload, styles)
    for key in "abcd"[len(shown) :]:
        axes[key].remove()
    _draw_profile(axes["profile"], results, compared, styles)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_rates(path: Path | str, name: str = "noisy regression, slow", steps: int = 20_000, seed: int = 0) -> None:
    """The rate of grouped_newton over a long run on endless noisy data, and its validation loss."""
    import matplotlib.pyplot as plt

    from grouped_newton import plotting

    workload = load(name)
    carry, _, several = prepare(workload, gn.grouped_newton, {}, seed, steps)
    validate = jax.jit(lambda state, params: workload.validate(gn.eval_params(state, params), workload.validation))
    at, etas, losses = np.arange(1, 101) * (steps // 100), [], []
    for _ in at:
        carry = several(carry, steps // 100)
        etas.append(np.asarray(optax.tree.get(carry[1], "GroupedNewtonState").eta))
        losses.append(float(validate(carry[1], carry[0])))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    plotting.plot_rates(left, at, etas, gn.groups.names(gn.groups.single, carry[0]))
    left.set(xscale="log", title=f"{name}: rate")
    left.legend()
    right.plot(at, losses, color="black")
    right.set(xscale="log", yscale="log", xlabel="step", title="validation loss")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_curves(axis, results, workload, styles):
    tops = []
    for name in (REFERENCE, "adam, averaged", "muon, cosine", "schedule-free adamw", OURS):
        if records := results.chosen(workload, name, 1).values():
            at, losses = mean_curve(records, 1)
            axis.plot(at, np.where(np.isfinite(losses), losses, np.nan), **styles[name])
            tops.append(losses[0])
    axis.axhline(results.loss(workload, REFERENCE, 1), color="C0", linestyle="--", linewidth=1)
    axis.set(yscale="log", xlim=(0, 1), title=workload, xlabel="share of AdamW's steps", ylabel="validation loss")
    axis.set_ylim(top=1.1 * max(tops))  # whatever it first rises to
    _plain_ticks(axis.yaxis)


def _draw_profile(axis, results, workloads, styles):
    timed = all((w, n) in results.slowdown for w, n, length in results.runs if length == 1 and w in workloads)
    shares = np.geomspace(0.1, NEVER, 400)
    for name in results.optimizers:
        found = [results.share(workload, name, 1, clock=timed) for workload in workloads]
        found = np.array([value for value in found if value is not None])
        if name == REFERENCE:
            axis.axvline(1, label=name, **styles[name])
        elif len(found) == len(workloads):  # the others can't be compared
            done = np.mean((found[:, None] <= shares) & (found[:, None] < NEVER), 0)
            axis.step(shares, done, where="post", label=name, **styles[name])
    clock = "time" if timed else "steps"
    axis.set(xscale="log", xlim=(0.1, NEVER), ylim=(0, 1.02), xlabel=f"share of AdamW's {clock}")
    axis.set(ylabel="share of workloads", title="Workloads at AdamW's final validation loss")
    axis.legend(fontsize="small", loc="upper left")
    _plain_ticks(axis.xaxis)


def _plain_ticks(axis):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CHOOSING, *REPORTING, *LARGE]
    parser.add_argument(
        "phases", nargs="*", metavar="PHASE", help="of run, time, report, rates (default: all but rates)"
    )
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"of {'; '.join(names)} (default: all)")
    parser.add_argument("--purpose", choices=list(PURPOSES), help="only workloads of this purpose")
    optimizers = f"of {'; '.join(OPTIMIZERS)} (default: all; to be timed: {REFERENCE}; {OURS})"
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help=optimizers)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--lengths", nargs="+", type=float, default=LENGTHS, metavar="X", help="(default: 0.25 1 4)")
    parser.add_argument("--steps", type=int, help="instead of a workload's own steps")
    parser.add_argument("--label", default="", help="of the version under test; the latest runs are reported")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help=f"(default: {RESULTS.name})")
    parser.add_argument("--also", nargs="+", type=Path, default=[], metavar="PATH", help="more results to report")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH", help="(default: docs/training.png)")
    arguments = parser.parse_args()
    phases = arguments.phases or ["run", "time", "report"]
    of_purpose = PURPOSES.get(arguments.purpose, [*CHOOSING, *REPORTING])
    chosen = arguments.workloads or of_purpose
    if arguments.purpose:
        chosen = [name for name in chosen if name in of_purpose or name not in names]
    optimizers = arguments.optimizers or list(OPTIMIZERS)
    for kind, asked, known in (
        ("phase", phases, ("run", "time", "report", "rates")),
        ("workload", chosen, names),
        ("optimizer", optimizers, OPTIMIZERS),
        ("length", arguments.lengths, LENGTHS),
    ):
        if unknown := [str(name) for name in asked if name not in known]:
            parser.error(f"no {kind} called {', '.join(unknown)}; there are {'; '.join(map(str, known))}")

    if "run" in phases:
        options = {"label": arguments.label, "steps": arguments.steps, "lengths": arguments.lengths}
        sweep(chosen, {n: OPTIMIZERS[n] for n in optimizers}, arguments.seeds, arguments.results, **options)
    if "time" in phases:
        timed = dict.fromkeys([REFERENCE, *(arguments.optimizers or [OURS])])
        options = {"label": arguments.label, "steps": arguments.steps}
        time_steps(chosen, {n: OPTIMIZERS[n] for n in timed}, arguments.results, **options)
    if "report" in phases:
        results = Results([*arguments.also, arguments.results])
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
        for length in LENGTHS:
            if any(found == length for _, _, found in results.runs):
                print(f"\n{length:g} of the workload's own steps\n\n{table(results, length)}")
        print(f"\n{lengths_table(results)}\n\n{slowdowns(results)}")
        if results.runs:
            draw_picture(results, arguments.picture)
    if "rates" in phases:
        draw_rates(arguments.picture.with_name("rates.png"))


if __name__ == "__main__":
    main()
