"""How well optimizers train untuned: losses after equal steps and after equal wall-clock, on the tasks of tasks.py.

Three phases, each resumes where the results file ends: *run* trains, *time* measures every optimizer's own step, in
turns in one process, *report* prints the table and draws the picture.

Every step draws its batch from (seed, step), so all optimizers see the same ones; ``value_fn`` is the loss on another
batch of the same size, for grouped_newton on the same batch. Losses are of the whole training set, at most its first
``Task.evaluated`` rows, at about 20 checkpoints. A figure is (loss + 1e-4) / (loss of the best Adam + 1e-4), averaged
geometrically over seeds; the best of a grid is, per task, the setting with the lowest final training loss. A loss that
is not finite counts as the loss at the start.

Equal wall-clock: the budget is what Adam takes for all its steps. A slower optimizer is read off its curve where that
time ends, log-losses being interpolated linearly between checkpoints; a faster one gets no more steps.

    python benchmarks/training.py --help
"""

import argparse
import collections
import functools
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import CHOOSING, REPORTING, Task, load
from tqdm import tqdm

import grouped_newton as gn

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
PICTURE = Path(__file__).parent.parent / "docs" / "training.png"
OFFSET = 1e-4


def paper(learning_rate=0.1, internal_damping=1.0):
    """The published configuration."""
    return gn.grouped_newton(
        learning_rate,
        gn.groups.per_tensor,
        direction=optax.trace(0.9),
        internal_damping=internal_damping,
        refresh_every=10,
        rates=gn.cubic_rates(),
        summary_decay=0.0,
        scale_rule=None,
        averaging=None,
    )


def adamw_cosine(steps, peak=1e-3):
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps))


def _rates(*values):
    return [{"learning_rate": value} for value in values]


# name -> (factory, settings to try). A factory that names `steps` gets the length of the run.
OPTIMIZERS = {
    "sgd": (functools.partial(optax.sgd, momentum=0.9), _rates(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "adam": (optax.adam, _rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "adamw, cosine": (adamw_cosine, [{}]),
    "schedule-free adamw": (optax.contrib.schedule_free_adamw, [{}]),
    "prodigy": (optax.contrib.prodigy, [{}]),
    "momo_adam": (optax.contrib.momo_adam, [{}]),
    "dowg": (optax.contrib.dowg, [{}]),
    "lbfgs": (optax.lbfgs, [{}]),
    "paper": (
        paper,
        [{"internal_damping": lam, "learning_rate": rate} for lam in (1.0, 10.0) for rate in (0.03, 0.1, 0.3)],
    ),
    "grouped_newton": (gn.grouped_newton, [{}]),
}
FULL_BATCH_ONLY = {"lbfgs"}
# value_fn is the loss on the gradient's own batch; on another one of the same size for all others.
OWN_BATCH = {"grouped_newton"}
WITHOUT_RATE = ("schedule-free adamw", "prodigy", "momo_adam", "dowg")
# One setting of a grid, shown beside its best.
SINGLED_OUT = {
    "adam 1e-3": ("adam", {"learning_rate": 1e-3}),
    "paper 1, 0.1": ("paper", {"internal_damping": 1.0, "learning_rate": 0.1}),
}


# Running


@functools.lru_cache(maxsize=32)
def _compiled(loss, make, batch_size, curvature):
    """Jitted start and step; hyperparameters that are floats are traced, so that a grid compiles once."""

    def optimizer(traced, static):
        return optax.with_extra_args_support(make(**traced, **dict(static)))

    def draw(key, data, times=1):
        if batch_size is None:
            return data
        rows = jax.random.randint(key, (times * batch_size,), 0, len(jax.tree.leaves(data)[0]))
        return jax.tree.map(lambda x: x[rows], data)

    @functools.partial(jax.jit, static_argnames="static")
    def start(params, traced, static):
        return params, optimizer(traced, static).init(params), jnp.array(0)

    @functools.partial(jax.jit, static_argnames="static", donate_argnums=0)
    def step(carry, seed, traced, data, static):
        params, state, count = carry
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(seed), count))
        batch = draw(key, data)
        value, grads = jax.value_and_grad(loss)(params, batch)
        value_fn = lambda p: loss(p, draw(other, data, curvature) if curvature else batch)
        updates, state = optimizer(traced, static).update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, count + 1

    return start, step


def prepare(task: Task, make: Callable, hypers: dict, seed: int, steps: int | None = None, curvature: int = 1):
    """The carry (params, state, count) before the first step, and carry -> carry, compiled at the first call."""
    start, step = _compiled(task.loss, make, task.batch_size, curvature)
    if "steps" in inspect.signature(make).parameters:
        hypers = hypers | {"steps": steps or task.steps}
    traced = {name: jnp.asarray(value, jnp.float32) for name, value in hypers.items() if isinstance(value, float)}
    static = tuple((name, value) for name, value in hypers.items() if name not in traced)
    # Donated buffers must not be shared, as those of a state that keeps the first params are.
    carry = jax.tree.map(jnp.copy, start(task.init(jax.random.key(seed)), traced, static=static))
    seed = jnp.asarray(seed, jnp.uint32)
    return carry, lambda carry: step(carry, seed, traced, task.train, static=static)


def default_eval_params(state, params):
    """The params to evaluate at: the average where the optimizer keeps one."""
    if isinstance(state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(state, params)
    is_average = lambda x: isinstance(x, gn.AverageParamsState)
    averages = any(map(is_average, jax.tree.leaves(state, is_leaf=is_average)))
    return gn.eval_params(state, params) if averages else params


def run(
    task: Task,
    make: Callable,
    hypers: dict,
    seed: int,
    *,
    steps: int | None = None,
    checkpoints: int = 20,
    curvature: int = 1,
    eval_params: Callable = default_eval_params,
) -> dict[str, Any]:
    """Trains once.

    Args:
      task: from ``tasks.load``.
      make: hypers -> an optax transform; keep the same object between calls, or it compiles anew.
      hypers: its keyword arguments.
      seed: of the initialisation and the batches.
      steps: the task's by default.
      checkpoints: how often both losses are taken, besides at the start.
      curvature: the size of value_fn's batch over the gradient's; 0 for the gradient's own batch.
      eval_params: (state, params) -> the params that are evaluated.

    Returns:
      steps, the curves ``at``, ``train`` and ``test`` (None where not finite), and whether it ``diverged``: ended
      with a loss that isn't finite or is above the first. It stops once the loss isn't finite.
    """
    steps = steps or task.steps
    evaluate = jax.jit(task.loss)
    rows = (lambda data: data) if task.batch_size is None else _first_rows(task.evaluated)
    data = rows(task.train), rows(task.test)
    carry, step = prepare(task, make, hypers, seed, steps, curvature)
    at = sorted({round(steps * k / checkpoints) for k in range(checkpoints + 1)})
    losses, done = [], 0
    for stop in at:
        for _ in range(stop - done):
            carry = step(carry)
        done, params = stop, eval_params(carry[1], carry[0])
        losses.append([float(evaluate(params, part)) for part in data])
        if not math.isfinite(losses[-1][0]):
            break
    losses += [[math.nan, math.nan]] * (len(at) - len(losses))
    train, test = (
        [float(f"{x:.6g}") if math.isfinite(x) else None for x in curve] for curve in zip(*losses, strict=True)
    )
    diverged = train[-1] is None or (train[0] is not None and train[-1] > train[0])
    return {"steps": steps, "at": at, "train": train, "test": test, "diverged": diverged}


def _first_rows(rows):
    return lambda data: jax.tree.map(lambda x: x[:rows], data)


def sweep(
    tasks: Iterable[str],
    optimizers: dict[str, tuple[Callable, Any]],
    seeds: Iterable[int] = (0, 1, 2),
    path: Path | str = RESULTS,
    *,
    label: str = "",
    **options,
) -> None:
    """Runs what the file at ``path`` doesn't have yet and appends it, a JSON object a line.

    Args:
      tasks: names.
      optimizers: name -> (factory, settings), settings being a dict of hyperparameters or a list of such.
      seeds: of the runs.
      path: of the results; made if missing.
      label: of the version of the optimizers; other labels' runs are made again, and a report takes the latest.
      **options: for :func:`run`.
    """
    done = {_key(record) for record in read([path]) if record["kind"] == "run"}
    todo = []
    for name in tasks:
        task = load(name)
        for optimizer, (make, settings) in optimizers.items():
            if optimizer in FULL_BATCH_ONLY and task.batch_size is not None:
                continue
            for hypers in [settings] if isinstance(settings, dict) else settings:
                for seed in seeds:
                    head = {"kind": "run", "label": label, "task": name, "optimizer": optimizer}
                    head |= {"hypers": hypers, "seed": seed, "steps": options.get("steps") or task.steps}
                    if _key(head) not in done:
                        todo.append((task, make, head))
    with tqdm(todo, disable=None) as bar:
        for task, make, head in bar:
            bar.set_description(f"{task.name}: {head['optimizer']}")
            own = {"curvature": 0} if head["optimizer"] in OWN_BATCH else {}
            _append(path, head | run(task, make, head["hypers"], head["seed"], **(own | options)))


def _key(record):
    return tuple(json.dumps(record[k]) for k in ("label", "task", "optimizer", "hypers", "seed", "steps"))


def read(paths: Iterable[Path | str]) -> list[dict]:
    """All records of the files that exist."""
    lines = [line for path in map(Path, paths) if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def _append(path, record):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


# Timing


def measure(task: Task, optimizers: dict[str, tuple[Callable, Any]], rounds: int = 3, steps: int | None = None):
    """Median seconds a step of each optimizer's first setting over a whole run, and of the bare gradient, in turns.

    Whole runs, because what a step costs may depend on how far the run is. ``steps`` are the task's by default.
    """
    steps = steps or task.steps
    batch = task.train if task.batch_size is None else _first_rows(task.batch_size)(task.train)
    gradient = jax.jit(jax.value_and_grad(task.loss))
    params = task.init(jax.random.key(0))
    begin = {"gradient": lambda: (None, lambda _: gradient(params, batch))}
    for name, (make, settings) in optimizers.items():
        if name in FULL_BATCH_ONLY and task.batch_size is not None:
            continue
        hypers = settings if isinstance(settings, dict) else settings[0]
        curvature = 0 if name in OWN_BATCH else 1
        begin[name] = functools.partial(prepare, task, make, hypers, 0, curvature=curvature)
    times = collections.defaultdict(list)
    for _ in range(rounds + 1):  # the first round compiles
        for name in begin:
            carry, step = begin[name]()
            jax.block_until_ready(carry)
            start = time.perf_counter()
            for _ in range(steps):
                carry = step(carry)
            jax.block_until_ready(carry)
            times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_steps(
    tasks: Iterable[str],
    optimizers: dict[str, tuple[Callable, Any]],
    path: Path | str = RESULTS,
    *,
    label: str = "",
    **options,
) -> None:
    """Appends each task's seconds a step to the file at ``path``, unless they are all there under that label.

    An optimizer's time is used as a multiple of Adam's from the same call: ``optimizers`` should hold "adam".
    """
    done = {
        (r["task"], name) for r in read([path]) if r["kind"] == "time" and r["label"] == label for name in r["seconds"]
    }
    with tqdm(list(tasks), disable=None) as bar:
        for name in bar:
            bar.set_description(f"time, {name}")
            task = load(name)
            wanted = {n for n in optimizers if n not in FULL_BATCH_ONLY or task.batch_size is None}
            if {(name, n) for n in wanted} - done:
                seconds = measure(task, optimizers, **options)
                _append(path, {"kind": "time", "label": label, "task": name, "seconds": seconds})


# Reporting


class Results:
    """What the files say, latest records first; losses by (task, column), a column being one optimizer in the table."""

    def __init__(self, paths):
        self.runs = collections.defaultdict(dict)  # (task, optimizer) -> {(hypers, seed): record}
        self.slowdown, self.gradient = {}, {}  # (task, optimizer) -> multiple of Adam's time a step; task -> seconds
        for record in read(paths):
            task = record["task"]
            if record["kind"] == "run":
                self.runs[task, record["optimizer"]][json.dumps(record["hypers"]), record["seed"]] = record
            else:
                seconds = record["seconds"]
                self.gradient[task] = seconds["gradient"]
                if "adam" in seconds:
                    self.slowdown |= {(task, name): value / seconds["adam"] for name, value in seconds.items()}
        self.tasks = [task for task in CHOOSING + REPORTING if (task, "adam") in self.runs]
        found = {optimizer for _, optimizer in self.runs}
        names = [n for n in OPTIMIZERS if n in found] + sorted(found - set(OPTIMIZERS))
        self.columns = {}  # column -> (optimizer, its one setting or None for the best)
        for name in names:
            of_name = [{h for h, _ in runs} for (_, optimizer), runs in self.runs.items() if optimizer == name]
            is_grid = any(len(settings) > 1 for settings in of_name)
            self.columns[f"best {name}" if is_grid else name] = name, None
            if is_grid:
                singled = {c: (n, json.dumps(h)) for c, (n, h) in SINGLED_OUT.items() if n == name}
                self.columns |= singled
        self.reference = "best adam" if "best adam" in self.columns else "adam"

    def chosen(self, task, column):
        """seed -> record of the column's setting, the best final training loss where it has several; {} if none."""
        optimizer, setting = self.columns[column]
        by_setting = collections.defaultdict(dict)
        for (hypers, seed), record in self.runs.get((task, optimizer), {}).items():
            by_setting[hypers][seed] = record
        if setting is not None:
            return by_setting.get(setting, {})
        most = max(map(len, by_setting.values()), default=0)
        complete = [records for records in by_setting.values() if len(records) == most]
        return min(complete, key=lambda r: geometric_mean(map(loss_at, r.values())), default={})

    def losses(self, task, column, clock=False, curve="train"):
        """seed -> loss plus OFFSET at equal steps or wall-clock; {} where there is no run or no time."""
        slowdown = self.slowdown.get((task, self.columns[column][0])) if clock else 1.0
        if slowdown is None:
            return {}
        return {s: loss_at(r, 1 / max(slowdown, 1.0), curve) for s, r in self.chosen(task, column).items()}

    def ratio(self, task, column, clock=False, curve="train"):
        """The losses over the reference's, their geometric mean over seeds that both have; None if there is none."""
        ours, reference = self.losses(task, column, clock, curve), self.losses(task, self.reference, False, curve)
        seeds = ours.keys() & reference.keys()
        return geometric_mean(ours[s] / reference[s] for s in seeds) if seeds else None


def loss_at(record, share=1.0, curve="train"):
    """The loss plus OFFSET after a share of a run's steps; log-linear between checkpoints."""
    values = np.array([math.nan if x is None else x for x in record[curve]])
    values = np.where(np.isfinite(values), values, values[0]) + OFFSET
    return math.exp(np.interp(share * record["steps"], record["at"], np.log(values)))


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def _show(value):
    return (
        "–" if value is None else f"{value:.2g}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"
    )


def table(results: Results) -> str:
    """The table in Markdown: ratios to the reference at equal steps, at equal wall-clock in brackets."""
    ratios = {c: functools.partial(results.ratio, column=c) for c in results.columns if c != results.reference}
    without_rate = [ratios[column] for column in WITHOUT_RATE if column in ratios]
    if without_rate:
        ratios["best without rate"] = lambda task, **options: _of_known(
            min, [ratio(task, **options) for ratio in without_rate]
        )
    head = ["task", "gradient, ms", "setting", "loss", *ratios]
    lines = [_row(head), _row(["---"] * len(head))]

    def summary(title, pick, tasks, **options):
        def cell(ratio):
            figures = [_of_known(pick, [ratio(t, clock=clock, **options) for t in tasks]) for clock in (False, True)]
            return _show(figures[0]) + (f" ({_show(figures[1])})" if figures[1] is not None else "")

        return [title, "", "", "", *map(cell, ratios.values())]

    for purpose, names in (("choosing", CHOOSING), ("reporting", REPORTING)):
        tasks = [task for task in results.tasks if task in names]
        for task in tasks:
            cells = summary(task, max, [task])
            chosen = results.chosen(task, results.reference)
            loss = geometric_mean(results.losses(task, results.reference).values()) - OFFSET
            cells[1:4] = [
                _show(1e3 * results.gradient[task] if task in results.gradient else None),
                str(next(iter(chosen.values()))["hypers"].get("learning_rate", "")),
                f"{loss:.2g}",
            ]
            lines.append(_row(cells))
        if tasks:
            runs = lambda column, tasks=tasks: [r for t in tasks for r in results.chosen(t, column).values()]
            diverged = [f"{sum(r['diverged'] for r in runs(c))}/{len(runs(c))}" for c in ratios if c in results.columns]
            lines += [
                _row(summary(f"**{purpose}**: geometric mean", geometric_mean, tasks)),
                _row(summary(f"**{purpose}**: worst", max, tasks)),
                _row(summary(f"**{purpose}**: test loss, geometric mean", geometric_mean, tasks, curve="test")),
                _row([f"**{purpose}**: diverged", "", "", "", *diverged]),
            ]
    return "\n".join(lines)


def _of_known(pick, values):
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def slowdowns(results: Results) -> str:
    """Each optimizer's time a step over Adam's, in Markdown."""
    names = list(dict.fromkeys(name for _, name in results.slowdown if name != "adam"))
    lines = [_row(["time a step over Adam's", *names]), _row(["---"] * (len(names) + 1))]
    for task in results.tasks:
        lines.append(_row([task, *(_show(results.slowdown.get((task, name))) for name in names)]))
    return "\n".join(lines)


def draw(results: Results, path: Path | str) -> None:
    """The performance profile: share of tasks within a factor of the best optimizer's loss."""
    import matplotlib.pyplot as plt

    factors = np.geomspace(1, 100, 400)
    panels = [False, True] if results.slowdown else [False]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, clock in zip(axes[0], panels, strict=True):
        losses = {
            (task, column): geometric_mean(values.values())
            for task in results.tasks
            for column in results.columns
            if (values := results.losses(task, column, clock))
        }
        best = {task: min(loss for (t, _), loss in losses.items() if t == task) for task, _ in losses}
        for i, column in enumerate(results.columns):
            over = np.array(
                [losses[task, column] / best[task] if (task, column) in losses else np.inf for task in best]
            )
            share = np.mean(over[:, None] <= factors, 0)
            ours = column == "grouped_newton"
            axis.step(
                factors,
                share,
                where="post",
                label=column,
                color="black" if ours else f"C{i % 10}",
                linewidth=2.5 if ours else 1.2,
                linestyle="-" if ours or i < 10 else "--",
            )
        axis.set(xscale="log", xlim=(1, 100), ylim=(0, 1.02), xlabel="factor over the best training loss")
        axis.set(ylabel="share of tasks", title="equal wall-clock" if clock else "equal steps")
    axes[0, -1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = CHOOSING + REPORTING
    parser.add_argument("phases", nargs="*", metavar="PHASE", help="of run, time, report (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {'; '.join(names)} (default: all)")
    parser.add_argument("--purpose", choices=["choosing", "reporting"], help="only tasks of this purpose")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help=f"of {'; '.join(OPTIMIZERS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, help="of a run (default: the task's)")
    parser.add_argument("--label", default="", help="of the version under test; the latest runs are reported")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help=f"(default: {RESULTS.name})")
    parser.add_argument("--also", nargs="+", type=Path, default=[], metavar="PATH", help="more results to report")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH", help="(default: docs/training.png)")
    arguments = parser.parse_args()
    phases = arguments.phases or ["run", "time", "report"]
    chosen = arguments.tasks or [n for n in names if arguments.purpose in (None, load(n).purpose)]
    optimizers = arguments.optimizers or list(OPTIMIZERS)
    for kind, asked, known in (
        ("phase", phases, ("run", "time", "report")),
        ("task", chosen, names),
        ("optimizer", optimizers, OPTIMIZERS),
    ):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"no {kind} called {', '.join(unknown)}; there are {'; '.join(known)}")

    table_of = {name: OPTIMIZERS[name] for name in optimizers}
    if "run" in phases:
        steps = {"steps": arguments.steps} if arguments.steps else {}
        sweep(chosen, table_of, arguments.seeds, arguments.results, label=arguments.label, **steps)
    if "time" in phases:
        time_steps(chosen, {"adam": OPTIMIZERS["adam"]} | table_of, arguments.results, label=arguments.label)
    if "report" in phases:
        results = Results([*arguments.also, arguments.results])
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n\n{table(results)}\n\n{slowdowns(results)}")
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
