"""Custom rules for reverse mode in a form that forward mode follows.

A ``custom_vjp`` has a function z = f(x) and a rule, which is what the user trains with: (z, r) = fwd(x), and the
cotangent of x is bwd(r, ct), linear in ct. Its derivatives here are those of the rule. The jvp that a rule implies is

  dz = bwd(r, .)^T dx,     the vjp of the vjp,

and higher derivatives are those of dz, in dx and through r in x. Where the rule reads the output z, as many do, it
reads f(x) and not what fwd computed: so z has derivatives by the rule there too, even if fwd found it by rounding, or
by a solver behind ``stop_gradient``. A custom_vjp becomes a custom_jvp with that jvp, which is traced when it is asked
for, as fwd may call f. JAX's own forward mode refuses a custom_vjp.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from grouped_newton import sharding
from grouped_newton.derivatives.jaxprs import (
    CALLS,
    CUSTOM_JVP,
    CUSTOM_VJP,
    REMAT,
    bodies,
    body,
    equations,
    evaluate,
    holds,
    is_float,
    is_jaxpr,
    kind,
    live_equations,
    read,
    replaced,
)

# Where the vjp of a scan looks for what is the same in every step, older versions put the function of a custom_jvp in its
# place, and lose the rule for the next derivative.
_OPENS_SCANS = jax.__version_info__ < (0, 12)


def by_rule(closed: Any) -> Any:
    """The function of a closed jaxpr with a custom_jvp for every custom_vjp that forward mode would meet."""
    if not holds(closed, CUSTOM_VJP):
        return closed
    return _opened(closed)


def in_forward_mode(fn: Callable[[list], Any], args: list) -> Callable[[list], list] | None:
    """``fn`` of a list of arrays by the rules of its custom_vjps, so that jvps can be nested; None if it has none.

    It returns a list of the leaves of what ``fn`` does.
    """
    closed = jax.make_jaxpr(fn)(args)
    run = jex.jaxpr_as_fun(by_rule(closed))
    jvp = jax.make_jaxpr(lambda xs: jax.jvp(run, xs, xs))(args)
    if holds(jvp, CUSTOM_VJP):  # in the rules of its custom_jvps
        run = followed(run)
    elif not holds(closed, CUSTOM_VJP):
        return None
    return lambda args: run(*args)


def followed(fn: Callable[..., Sequence]) -> Callable[..., Sequence]:
    """``fn`` as a custom_jvp whose rule is its own jvp, without the custom_vjps that this holds."""
    return _with_rule(fn, jax.jvp, output_is_itself=False)


@contextlib.contextmanager
def naming_rules(trace: Callable[[], Any]):
    """Adds the names of the custom_vjps in a traced loss to errors, which may come from their derivatives."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):
            eqns = [e for e in equations(trace()) if kind(e) in CUSTOM_VJP]
            if found := dict.fromkeys(str(body(e).debug_info.func_src_info) for e in eqns):
                error.add_note(
                    f"The loss has a custom_vjp: {', '.join(found)}. Second and third derivatives are those of its"
                    " rule, so its fwd and bwd must be differentiable themselves, in forward mode too."
                )
        raise


def _transposed(f, at, along):
    """The outputs of a custom_vjp and their tangents by its rule."""
    z, pull = jax.vjp(f, *at)
    # For a linear map any cotangent will do. One that is linear only near zero, as clipping is, has a derivative next
    # to it; at zero itself a norm has none.
    small = [sharding.zeros_of(jax.typeof(x)) + float(jnp.finfo(x.dtype).tiny) ** 0.25 for x in z]
    return z, jax.vjp(pull, small)[1](along)[0]


def _with_rule(fn, jvp, output_is_itself):
    """``fn``, from arrays to a list of arrays, as a custom_jvp.

    ``jvp(f, xs, dxs)`` gives its outputs and tangents, for f of the operands that move to the outputs that can; here it
    is traced and rewritten, and its outputs replaced by those of the custom_jvp itself, if so desired.
    """

    def ruled(fn):
        ruled_fn = jax.custom_jvp(fn)
        ruled_fn.defjvp(rule, symbolic_zeros=True)
        return ruled_fn

    def rule(primals, tangents):
        moved = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and is_float(jax.typeof(t))]

        def outputs_and_tangents(primals, along):
            def f(*xs):
                return [z for z in fn(*replaced(primals, moved, xs)) if is_float(jax.typeof(z))]

            return jvp(f, tuple(primals[i] for i in moved), along)

        along = tuple(tangents[i] for i in moved)
        closed = _opened(jax.make_jaxpr(outputs_and_tangents)(primals, along), deep=True)
        outs = list(outer(*primals))
        real = [o for o, z in enumerate(outs) if is_float(jax.typeof(z))]
        makes = {v for eqn in closed.jaxpr.eqns for v in eqn.outvars}
        names = zip(closed.jaxpr.outvars, (outs[o] for o in real), strict=False)
        known = {v: z for v, z in names if not isinstance(v, jex.Literal) and v in makes} if output_is_itself else {}
        found = _run(closed.jaxpr, closed.consts, [*primals, *along], known)
        dz = [zero_from_primal(z) for z in outs]
        for o, z, dz_o in zip(real, found[: len(real)], found[len(real) :], strict=True):
            outs[o], dz[o] = outs[o] if output_is_itself else z, dz_o
        return outs, dz

    outer = ruled(_never_opened(ruled(fn)) if _OPENS_SCANS else fn)
    return outer


def _never_opened(fn):
    """``fn`` as a branch whose index is not known before the operands are: partial evaluation leaves such as they are."""
    return lambda *xs: lax.cond(lax.optimization_barrier((True, xs))[0], fn, fn, *xs)


def _opened(closed, deep=False):
    return jax.make_jaxpr(lambda *args: _run(closed.jaxpr, closed.consts, args, (), deep))(*closed.in_avals)


def _run(jaxpr, consts, args, known=(), deep=False):
    """The outputs, given the values of some variables; calls are opened, but for remat.

    ``deep`` also follows the custom_vjps in the rules of custom_jvps; ``program.py`` looks for them where it needs to.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)) | dict(known)
    for eqn in live_equations(jaxpr, known):
        outs = _evaluated(eqn, jaxpr, [read(env, v) for v in eqn.invars], deep)
        env.update((v, z) for v, z in zip(eqn.outvars, outs, strict=True) if v not in known)
    return [read(env, v) for v in jaxpr.outvars]


def _evaluated(eqn, jaxpr, values, deep):
    name, inner = kind(eqn), body(eqn)
    itself = lambda *xs: evaluate(eqn, jaxpr, xs)
    inside = lambda *xs: _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), xs, (), deep)
    if name in CUSTOM_VJP:
        return _with_rule(itself, _transposed, output_is_itself=True)(*values)
    if name in CUSTOM_JVP:  # whose function is not differentiated
        return (followed(itself) if deep else itself)(*values)
    if name in CALLS - REMAT and inner is not None:
        return inside(*values)
    if not any(holds(b, CUSTOM_VJP | CUSTOM_JVP if deep else CUSTOM_VJP) for b in bodies(eqn)):
        return itself(*values)
    if name in REMAT:
        params = getattr(eqn.params.get("_prim"), "params", eqn.params)
        prevent_cse = params["prevent_cse"]
        prevent_cse = prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse)
        return jax.checkpoint(inside, prevent_cse=prevent_cse, policy=params["policy"])(*values)
    if name == "shard_map":
        p = eqn.params
        specs = {"mesh": p["mesh"], "in_specs": p["in_specs"], "out_specs": list(p["out_specs"])}
        return jax.shard_map(inside, **specs, axis_names=p["newly_manual_axes"], check_vma=p["check_vma"])(*values)
    held = {k: p for k, p in eqn.params.items() if any(map(is_jaxpr, jax.tree.leaves(p, is_leaf=is_jaxpr)))}
    rewritten = jax.tree.map(lambda x: _opened(x, deep) if is_jaxpr(x) else x, held, is_leaf=is_jaxpr)
    return evaluate(eqn.replace(params=eqn.params | rewritten), jaxpr, values)
