"""What the summary costs, in gradients: time, first call and memory of each method, on the models of models.py.

All times are medians of calls made in turns in one process, after a warm-up, as multiples of the jitted value and
gradient of the same loss. *matmuls* are the matrix products and convolutions of the sweep alone, on data of the same
shapes: what a perfect fusion of everything else would leave. *memory* is XLA's temporary buffers and outputs (for a
gradient, mostly its outputs), as a multiple of the gradient's. *hessian* is ``jax.hessian`` of phi and nested jvps for
the third order, without anything of ours. Other methods are measured if they are named: *gauss-newton*, on perceptrons,
and all derivative tensors up to an order. A dash stands for a method that is skipped because a call would take longer
than the limit, by its multiplications at the gradient's rate.

With --first-calls, another table: seconds of the first call, tracing, lowering, compiling and running, of the gradient,
the summary and a whole step of ``gn.grouped_newton``, with the loss's groups and with one, on losses that are long to
write down. They are the processor's seconds, of all threads, which other work on the machine hardly changes; *clock* is
the same on the clock, *gradients* the multiple of the gradient's, *peak memory* the host's. Every row is of a process
of its own.

    python benchmarks/summary.py --help
"""

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from models import A_GROUP_A_BLOCK, FIRST_CALLS, MODELS
from tqdm import tqdm

import grouped_newton as gn
from grouped_newton.groups import resolve

METHODS = ("sweep", "order 2", "nested", "hessian", "matmuls")
OTHERS = ("gauss-newton", "tensors to 2", "tensors to 3", "tensors to 4")


def summary(model, **options):
    return lambda params, u: gn.summarize(model.loss, params, u, model.groups, **options)


def tensors(model, order):
    return lambda params, u: gn.derivative_tensors(model.loss, params, u, model.groups, order)


def hessian(model):
    """gbar, hbar and third as one would write them down with jax.grad and jax.hessian."""
    partition = resolve(model.groups, model.params)
    S = partition.num_groups

    def derivatives(params, u):
        def phi(eta):
            step = partition.scale(eta, u)
            return model.loss(jax.tree.map(jnp.subtract, params, step))

        def third(e):
            d = lambda f: lambda t: jax.jvp(f, (t,), (1.0,))[1]
            return d(d(d(lambda t: phi(t * e))))(0.0)

        zero = jnp.zeros(S)
        return jax.grad(phi)(zero), jax.hessian(phi)(zero), jax.vmap(third)(jnp.eye(S))

    return derivatives


def matmuls(model):
    """A function that runs the sweep's products on arrays of ones, and those arrays."""
    traced = jax.make_jaxpr(summary(model))(model.params, model.params)
    products = list(_products(traced.jaxpr, 1))

    def run(operands):
        outs = []
        for eqn, values in zip(products, operands, strict=True):
            outs += (
                eqn.primitive.bind(*values, **eqn.params)
                if eqn.primitive.multiple_results
                else [eqn.primitive.bind(*values, **eqn.params)]
            )
        return outs

    return run, [[jnp.ones(v.aval.shape, v.aval.dtype) for v in eqn.invars] for eqn in products]


def _products(jaxpr, times):
    """The products of a program that are used, each once; those of a scan as often as it runs."""
    needed, seen, kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}, set(), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            kept.append(eqn)
    for eqn in reversed(kept):
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for body in eqn.params.values():
            if isinstance(body, (jex.Jaxpr, jex.ClosedJaxpr)):
                yield from _products(getattr(body, "jaxpr", body), inner)
        product = eqn.primitive.name in {"dot_general", "conv_general_dilated"}
        key = str(eqn.params), *map(id, eqn.invars)
        if product and key not in seen and eqn.outvars[0].aval.size > 64 * 64:  # a Gram matrix of S rows is no product
            seen.add(key)
            yield from [eqn] * times


def multiplications(function, arguments):
    """Those in the products of a function, each product counted once."""
    total = 0
    for eqn in _products(jax.make_jaxpr(function)(*arguments).jaxpr, 1):
        out, operand = eqn.outvars[0].aval, eqn.invars[1].aval
        if eqn.primitive.name == "dot_general":
            (_, contracted), _ = eqn.params["dimension_numbers"]
            total += out.size * math.prod(operand.shape[i] for i in contracted)
        else:
            total += out.size * operand.size // operand.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return total


def functions_of(model, u):
    """Name -> (function, arguments) of the gradient and every method, each made when it is asked for."""
    gradient = jax.value_and_grad(model.loss)
    at = model.params, u
    return {
        "gradient": lambda: (lambda params, u: gradient(params), at),
        "sweep": lambda: (summary(model), at),
        "order 2": lambda: (summary(model, order=2), at),
        "nested": lambda: (summary(model, method="nested"), at),
        "hessian": lambda: (hessian(model), at),
        "gauss-newton": lambda: (lambda p, u: gn.gauss_newton_summary(*model.parts, p, u, model.groups), at),
        **{name: lambda order=int(name[-1]): (tensors(model, order), at) for name in OTHERS[1:]},
        "matmuls": lambda: (lambda run, operands: (run, (operands,)))(*matmuls(model)),
    }


def timed(compiled, arguments):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def measure(model, methods, seconds, limit=math.inf):
    """For each method within the limit: median seconds, seconds of the first call, bytes of temporaries and outputs."""
    u = jax.jit(jax.grad(model.loss))(model.params)
    calls, first, memory = {}, {}, {}
    for name, make in functions_of(model, u).items():
        if name not in ("gradient", *methods):
            continue
        function, arguments = make()
        work = multiplications(function, arguments)
        if name == "gradient":
            gradient_work = work
        elif work * timed(*calls["gradient"]) > limit * gradient_work:
            continue
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        calls[name] = compiled, arguments
        timed(*calls[name])
        first[name] = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        memory[name] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    times = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["gradient"]) < 3:
        for name, call in calls.items():
            if name == "gradient" or not times[name] or times[name][0] < seconds / 3:  # a slow one is called once
                times[name].append(timed(*call))
    return {name: (statistics.median(times[name]), first[name], memory[name]) for name in calls}


def whole_step(model, groups, options):
    """A step of the default optimizer, gradient included, and its arguments."""
    tx = gn.grouped_newton(groups=groups, **options)

    def step(params, state):
        value, grads = jax.value_and_grad(model.loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=model.loss)
        return jax.tree.map(jnp.add, params, updates), state

    return step, (model.params, tx.init(model.params))


WHATS = {
    "gradient": lambda model, options: (jax.value_and_grad(model.loss), (model.params,)),
    "summary": lambda model, options: (summary(model, **options), (model.params, model.params)),
    "step": lambda model, options: whole_step(model, model.groups, options),
    "step, one group": lambda model, options: whole_step(model, gn.groups.single, {}),
}


def first_call(name, what):
    """Of tracing, lowering, compiling, running: the processor's and the clock's seconds; bytes at the peak."""
    make, options = FIRST_CALLS[name]
    function, arguments = WHATS[what](make(), options)
    jax.block_until_ready(jax.jit(jnp.sin)(1.0))
    cpu, clock = [time.process_time()], [time.perf_counter()]
    stage = jax.jit(function)
    for advance in (
        lambda f: f.trace(*arguments),
        lambda traced: traced.lower(),
        lambda lowered: lowered.compile(),
        lambda compiled: jax.block_until_ready(compiled(*arguments)),
    ):
        stage = advance(stage)
        cpu.append(time.process_time())
        clock.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return *([b - a for a, b in itertools.pairwise(times)] for times in (cpu, clock)), peak


def first_calls(names, whats):
    """The table, every row of a process of its own."""
    columns = ["trace", "lower", "compile", "run", "CPU, s", "gradients", "clock, s", "peak memory, MB"]
    print(f"jax {jax.__version__}\n\n| loss | what | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 2))
    for name in tqdm(names, disable=None, leave=False):
        base = math.nan
        for what in whats:
            command = [sys.executable, __file__, "--first-call", name, what]
            cpu, clock, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            if what == "gradient":
                base = sum(cpu)
            cells = [*(f"{x:.2f}" for x in (*cpu, sum(cpu))), f"{sum(cpu) / base:.1f}", f"{sum(clock):.2f}"]
            print("| " + " | ".join([name, what, *cells, f"{peak / 1e6:.0f}"]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = MODELS | A_GROUP_A_BLOCK
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help=f"of {'; '.join(models)}")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        choices=METHODS + OTHERS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all these), {', '.join(OTHERS)}",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, a model (default: 10)")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="skip a method above it, seconds a call (default: 60)"
    )
    parser.add_argument("--batch", type=int, help="instead of 100, for transformers 16")
    parser.add_argument("--dtype", default="float32", help="of parameters and data (default: float32)")
    parser.add_argument(
        "--first-calls", nargs="*", metavar="LOSS", help=f"the other table, of {'; '.join(FIRST_CALLS)} (default: all)"
    )
    parser.add_argument(
        "--whats", nargs="+", default=list(WHATS), choices=WHATS, metavar="WHAT", help=f"of {'; '.join(WHATS)}"
    )
    parser.add_argument("--first-call", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_call:
        return print(json.dumps(first_call(*arguments.first_call)))
    if arguments.first_calls is not None:
        return first_calls(arguments.first_calls or FIRST_CALLS, arguments.whats)
    if unknown := set(arguments.models) - set(models):
        parser.error(f"no model called {', '.join(sorted(unknown))}; there are {'; '.join(models)}")

    head = ["model", "S", "gradient, ms", *arguments.methods, "first call, s: gradient", "sweep", "memory"]
    options = {} if arguments.batch is None else {"batch": arguments.batch}
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.dtype}\n")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for name in tqdm(arguments.models, disable=None, leave=False):
        model = models[name](dtype=jnp.dtype(arguments.dtype), **options)
        found = measure(model, arguments.methods, arguments.seconds, arguments.limit)
        base, base_first, base_memory = found["gradient"]
        cells = [name, str(resolve(model.groups, model.params).num_groups), f"{base * 1e3:.2f}"]
        cells += [f"{found[method][0] / base:.2f}" if method in found else "–" for method in arguments.methods]
        _, first, memory = found.get("sweep", (None, None, None))
        cells += [
            f"{base_first:.1f}",
            *(["–"] * 2 if first is None else [f"{first:.1f}", f"{memory / base_memory:.1f}"]),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
