"""What the summary costs, in gradients: time, first call and memory of each method, on the models of models.py.

All times are medians of calls made in turns in one process, after a warm-up, as multiples of the jitted value and
gradient of the same loss. *matmuls* are the matrix products and convolutions of the sweep alone, on data of the same
shapes: what a perfect fusion of everything else would leave. *memory* is XLA's temporary buffers and outputs (for a
gradient, mostly its outputs), as a multiple of the gradient's. *hessian* is ``jax.hessian`` of phi and nested jvps for
the third order, without anything of ours.

    python benchmarks/summary.py --help
"""

import argparse
import statistics
import time

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from models import MODELS
from tqdm import tqdm

import grouped_newton as gn
from grouped_newton.groups import resolve


def summary(model, **options):
    return lambda params, u: gn.summarize(model.loss, params, u, model.groups, **options)


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
        return jax.grad(phi)(zero), jax.hessian(phi)(zero), jnp.stack([third(e) for e in jnp.eye(S)])

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


def measure(model, methods, seconds):
    """For each method: median seconds, seconds of the first call, bytes of temporaries and outputs."""
    gradient = jax.value_and_grad(model.loss)
    functions = {"gradient": (lambda params, u: gradient(params), (model.params, model.params))}
    u = jax.jit(gradient)(model.params)[1]
    for method in methods:
        if method == "matmuls":
            run, operands = matmuls(model)
            functions[method] = run, (operands,)
        elif method == "hessian":
            functions[method] = hessian(model), (model.params, u)
        else:
            options = {"order": 2, "method": "sweep"} if method == "order 2" else {"method": method}
            functions[method] = summary(model, **options), (model.params, u)
    first, memory, compiled = {}, {}, {}
    for name, (function, arguments) in functions.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*arguments).compile()
        jax.block_until_ready(compiled[name](*arguments))
        first[name] = time.perf_counter() - start
        analysis = compiled[name].memory_analysis()
        memory[name] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    times = {name: [] for name in functions}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["gradient"]) < 3:
        for name, (_, arguments) in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times[name]), first[name], memory[name]) for name in functions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["sweep", "order 2", "nested", "matmuls"],
        choices=["sweep", "order 2", "nested", "hessian", "matmuls"],
        help="what to measure (default: all but hessian, which takes minutes to compile with many groups)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, a model (default: 10)")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"no model called {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")

    head = ["model", "S", "gradient, ms", *arguments.methods, "first call, s: gradient", "sweep", "memory"]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for name in tqdm(arguments.models, disable=None, leave=False):
        model = MODELS[name]()
        found = measure(model, arguments.methods, arguments.seconds)
        base, base_first, base_memory = found["gradient"]
        _, first, memory = found.get("sweep", found["gradient"])
        cells = [name, str(resolve(model.groups, model.params).num_groups), f"{base * 1e3:.2f}"]
        cells += [f"{found[method][0] / base:.2f}" for method in arguments.methods]
        cells += [f"{base_first:.1f}", f"{first:.1f}", f"{memory / max(base_memory, 1):.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
