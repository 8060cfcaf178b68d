"""Custom rules for reverse mode in a form that forward mode follows.

A ``custom_vjp`` has a function z = f(x) and a rule, which is what the user trains with: (z, r) = fwd(x), and the
cotangent of x is bwd(r, ct), linear in ct. Its derivatives here are those of the rule. The jvp that a rule implies is

  dz = bwd(r, .)^T dx,     the vjp of the vjp,

and higher derivatives are those of dz, in dx and through r in x. Where the rule reads the output z, as many do, it
reads f(x) and not what fwd computed: so z has derivatives by the rule there too, even if fwd found it by rounding, or
by a solver behind ``stop_gradient``. A custom_vjp becomes a custom_jvp with that jvp, which is traced when it is asked
for, as fwd may call f. JAX's own forward mode refuses a custom_vjp.

A bwd that loops over the cotangent until something has happened has no transpose. Then the custom_vjp is *kept*: in
reverse mode it is its rule, in forward mode alone f, and who uses both has to compare them.
"""

import contextlib
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

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
    variable,
)

# Where the vjp of a scan looks for what is the same in every step, older versions put the function of a custom_jvp in
# its place, and lose the rule for the next derivative.
_OPENS_SCANS = jax.__version_info__ < (0, 12)


class _How(NamedTuple):
    """How to rewrite a function; the custom_vjps in the rules of its custom_jvps are followed too if it is ``deep``.

    ``program.py`` looks for those where it needs to. The ``kept`` are left as they are. Where ``failed`` is given, a
    custom_vjp whose bwd has no transpose has the jvp of its function. Both are ids of equations.
    """

    deep: bool = False
    kept: Container[int] = ()
    failed: set[int] | None = None


def by_rule(closed: Any) -> Any:
    """The function of a closed jaxpr; a custom_jvp for every custom_vjp that forward mode would meet, unless kept."""
    if not holds(closed, CUSTOM_VJP):
        return closed
    failed: set[int] = set()
    trial = _How(failed=failed)
    run = jex.jaxpr_as_fun(_opened(closed, trial))
    jax.make_jaxpr(lambda *xs: jax.jvp(run, xs, xs))(*closed.in_avals)
    return _opened(closed, _How(kept=failed))


def keeps(eqns: Sequence) -> bool:
    """Whether forward mode would meet a custom_vjp in these equations, where all that can be are by their rules."""
    met = (e for e in eqns if kind(e) not in CUSTOM_JVP)
    return any(kind(e) in CUSTOM_VJP or any(keeps(b.eqns) for b in bodies(e)) for e in met)


def forward_only(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` of arrays for forward mode alone, where no custom_vjp is kept."""

    def forward(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outs = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args), _How(failed=set()))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return forward


def in_forward_mode(fn: Callable[[list], Any], args: list, alone: bool = False) -> Callable[[list], list] | None:
    """``fn`` of a list of arrays by the rules of its custom_vjps, so that jvps can be nested; None if it has none.

    It returns a list of the leaves of what ``fn`` does. Where it keeps a custom_vjp, its gradient is right, and so is
    ``forward_only`` of that; ``alone``, it keeps none.
    """
    closed = jax.make_jaxpr(fn)(args)
    rewritten = by_rule(closed)
    run = jex.jaxpr_as_fun(rewritten)
    if keeps(rewritten.jaxpr.eqns):
        run = forward_only(run) if alone else run
    elif keeps(jax.make_jaxpr(lambda xs: jax.jvp(run, xs, xs))(args).eqns):  # in the rules of its custom_jvps
        run = followed(run)
    elif not holds(closed, CUSTOM_VJP):
        return None
    return lambda args: run(*args)


def same_slopes(forward: jax.Array, reverse: jax.Array, size: jax.Array, eps: float) -> jax.Array:
    """Whether slopes by both modes are the same but for the rounding of long loops; ``size`` is that of their terms."""
    return jnp.abs(forward - reverse) <= eps**0.4 * size


def followed(fn: Callable[..., Sequence]) -> Callable[..., Sequence]:
    """``fn`` as a custom_jvp whose rule is its own jvp, without the custom_vjps that this holds."""
    return _with_rule(fn, lambda restricted, *at_and_along: jax.jvp(restricted(fn), *at_and_along), _How())


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


def _loops_by_rule(f, at):
    """Whether bwd hands the cotangent to a loop that is a custom_vjp itself, whose transpose would have none."""
    z, pull = jax.vjp(f, *at)
    jaxpr = jax.make_jaxpr(pull)(z).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(variable(v) in reached for v in eqn.invars):
            inside = (e for b in bodies(eqn) for e in equations(b))
            if any(kind(e) in CUSTOM_VJP and holds(body(e), {"while"}) for e in (eqn, *inside)):
                return True
            reached.update(eqn.outvars)
    return False


def _with_rule(fn, jvp, how, output_is_itself=False):
    """``fn``, from arrays to a list of arrays, as a custom_jvp.

    ``jvp(restricted, xs, dxs)`` gives its outputs and tangents, ``restricted(fn)`` being a function of the operands
    that move to the outputs that can; here it is traced and rewritten, and its outputs replaced by those of the
    custom_jvp itself, if so desired.
    """

    def ruled(fn):
        ruled_fn = jax.custom_jvp(fn)
        ruled_fn.defjvp(rule, symbolic_zeros=True)
        return ruled_fn

    def rule(primals, tangents):
        moved = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and is_float(jax.typeof(t))]

        def outputs_and_tangents(primals, along):
            def restricted(fn):
                return lambda *xs: [z for z in fn(*replaced(primals, moved, xs)) if is_float(jax.typeof(z))]

            return jvp(restricted, tuple(primals[i] for i in moved), along)

        along = tuple(tangents[i] for i in moved)
        closed = _opened(jax.make_jaxpr(outputs_and_tangents)(primals, along), how._replace(deep=True))
        outs = list(outer(*primals))
        real = [o for o, z in enumerate(outs) if is_float(jax.typeof(z))]
        makes = {v for eqn in closed.jaxpr.eqns for v in eqn.outvars}
        names = zip(closed.jaxpr.outvars, (outs[o] for o in real), strict=False)
        known = {v: z for v, z in names if not isinstance(v, jex.Literal) and v in makes} if output_is_itself else {}
        found = _run(closed.jaxpr, closed.consts, [*primals, *along], _How(), known)
        dz = [zero_from_primal(z) for z in outs]
        for o, z, dz_o in zip(real, found[: len(real)], found[len(real) :], strict=True):
            outs[o], dz[o] = outs[o] if output_is_itself else z, dz_o
        return outs, dz

    outer = ruled(_never_opened(ruled(fn)) if _OPENS_SCANS else fn)
    return outer


def _never_opened(fn):
    """``fn`` as a branch whose index is not known before the operands: partial evaluation leaves those alone."""
    return lambda *xs: lax.cond(lax.optimization_barrier((True, xs))[0], fn, fn, *xs)


def _opened(closed, how):
    return jax.make_jaxpr(lambda *args: _run(closed.jaxpr, closed.consts, args, how))(*closed.in_avals)


def _run(jaxpr, consts, args, how, known=()):
    """The outputs, given the values of some variables; calls are opened, but for remat."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)) | dict(known)
    for eqn in live_equations(jaxpr, known):
        outs = _evaluated(eqn, jaxpr, [read(env, v) for v in eqn.invars], how)
        env.update((v, z) for v, z in zip(eqn.outvars, outs, strict=True) if v not in known)
    return [read(env, v) for v in jaxpr.outvars]


def _evaluated(eqn, jaxpr, values, how):
    name, inner = kind(eqn), body(eqn)
    itself = lambda *xs: evaluate(eqn, jaxpr, xs)
    inside = lambda *xs: _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), xs, how)
    if name in CUSTOM_VJP:
        if id(eqn) in how.kept:
            return itself(*values)

        def jvp(restricted, *at_and_along):
            if how.failed is None:
                return _transposed(restricted(itself), *at_and_along)
            with contextlib.suppress(Exception):
                if not _loops_by_rule(restricted(itself), at_and_along[0]):
                    return _transposed(restricted(itself), *at_and_along)
            how.failed.add(id(eqn))
            return jax.jvp(restricted(inside), *at_and_along)

        return _with_rule(itself, jvp, how, output_is_itself=True)(*values)
    if name in CUSTOM_JVP:  # whose function is not differentiated
        return (followed(itself) if how.deep else itself)(*values)
    if name in CALLS - REMAT and inner is not None:
        return inside(*values)
    if not any(holds(b, CUSTOM_VJP | CUSTOM_JVP if how.deep else CUSTOM_VJP) for b in bodies(eqn)):
        return itself(*values)
    if name in REMAT:
        params = getattr(eqn.params.get("_prim"), "params", eqn.params)
        prevent_cse = params.get("prevent_cse", True)
        prevent_cse = prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse)
        return jax.checkpoint(inside, prevent_cse=prevent_cse, policy=params.get("policy"))(*values)
    if name == "shard_map":
        p = eqn.params
        specs = {"mesh": p["mesh"], "in_specs": p["in_specs"], "out_specs": list(p["out_specs"])}
        axes = p["newly_manual_axes" if "newly_manual_axes" in p else "manual_axes"]  # jax 0.8
        return jax.shard_map(inside, **specs, axis_names=axes, check_vma=p["check_vma"])(*values)
    held = {k: p for k, p in eqn.params.items() if any(map(is_jaxpr, jax.tree.leaves(p, is_leaf=is_jaxpr)))}
    rewritten = jax.tree.map(lambda x: _opened(x, how) if is_jaxpr(x) else x, held, is_leaf=is_jaxpr)
    return evaluate(eqn.replace(params=eqn.params | rewritten), jaxpr, values)
