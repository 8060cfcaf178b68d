"""The same function by other equations: calls opened, max-pooling by comparisons, convolutions in a fast layout."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from grouped_newton.derivatives.jaxprs import (
    CALLS,
    body,
    evaluate,
    holds,
    is_half,
    kind,
    named_in_errors,
    read,
    variable,
    with_a_ref,
)

# They would be found out too, but late: a value read only by them would get tangents, and chains would end there.
CONSTANT = {"stop_gradient", "sign", "floor", "ceil", "round"}
_REFS = (
    "refs (jax.new_ref, jax.array_ref) can't be swept: the loss writes values that depend on params to one. Carry them"
    ' as values, as lax.scan does, or use method="nested"'
)


def open_calls(closed, active=None):
    """The same function without calls, and with x / y as x * (1 / y), which is bilinear, where y may be active."""

    def opened(jaxpr, consts, args, active):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        reached = {v for v, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
        for eqn in jaxpr.eqns:
            values = [read(env, v) for v in eqn.invars]
            flags = [variable(v) in reached for v in eqn.invars]
            if kind(eqn) in CALLS and (inner := body(eqn)) is not None:
                closed = inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())
                outs, out_flags = opened(closed.jaxpr, closed.consts, values, flags)
            else:
                moves = any(flags) and eqn.primitive.name not in CONSTANT
                if moves and (culprit := with_a_ref(eqn)):
                    with named_in_errors([culprit]):
                        raise NotImplementedError(_REFS)
                out_flags = [moves] * len(eqn.outvars)
                # 1 / y leaves the range of half precision where x / y doesn't.
                if eqn.primitive.name == "div" and flags[1] and not is_half(eqn.outvars[0].aval):
                    outs = [values[0] * lax.integer_pow(values[1], -1)]
                else:
                    outs = evaluate(eqn, jaxpr, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            reached.update(v for v, is_active in zip(eqn.outvars, out_flags, strict=True) if is_active)
        return [read(env, v) for v in jaxpr.outvars], [variable(v) in reached for v in jaxpr.outvars]

    active = [False] * len(closed.in_avals) if active is None else active
    return jax.make_jaxpr(lambda *args: opened(closed.jaxpr, closed.consts, args, active)[0])(*closed.in_avals)


def max_over_windows(window_dimensions, window_strides, padding, base_dilation, window_dilation):
    """Max-pooling by comparing slices, one per place in the window; None where it has too many.

    The same function with the same choice among equals, the first; a jvp of the primitive itself sorts pairs of
    numbers for every tangent.
    """
    places = list(itertools.product(*map(range, window_dimensions)))
    if len(places) > 16 or any(b != 1 for b in base_dilation):
        return None

    def pooled(x):
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(low, high, 0) for low, high in padding])
        span = [(w - 1) * r + 1 for w, r in zip(window_dimensions, window_dilation, strict=True)]
        result = None
        for place in places:
            start = [k * r for k, r in zip(place, window_dilation, strict=True)]
            limit = [k + n - m + 1 for k, n, m in zip(start, x.shape, span, strict=True)]
            part = lax.slice(x, start, limit, window_strides)
            result = part if result is None else lax.select(part > result, part, result)
        return [result]

    return pooled


# --- Convolutions -----------------------------------------------------------------------------------------------------
#
# XLA's CPU compiler has fast code for one order of dimensions (batch, space, features; space, features in, features
# out) and brings other convolutions into it, but those of the entry computation alone. In the branch of a refresh the
# convolutions of a gradient, whose dimensions are in another order, then take several times as long. This can go once
# XLA does the same inside branches and loops (jax 0.8 to 0.12 don't).


def canonical_where_needed(loss: Callable[[], Any]) -> Callable[[Callable[[], Any]], Any]:
    """What calls functions made of ``loss()``: on the CPU, if that has convolutions, with all of theirs canonical."""
    needed = jax.default_backend() == "cpu" and holds(jax.make_jaxpr(loss)().jaxpr, {"conv_general_dilated"})
    return canonical if needed else lambda fn: fn()


def canonical(fn: Callable[[], Any]) -> Any:
    """``fn()``, with its convolutions in that layout."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shape), _run(closed.jaxpr, closed.consts, []))


def _run(jaxpr, consts, args):
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        if eqn.primitive.name == "conv_general_dilated":
            outs = [_convolve(*values, **eqn.params)]
        elif eqn.primitive.name in ("jit", "pjit"):
            body = eqn.params["jaxpr"]
            outs = _run(body.jaxpr, body.consts, values)
        else:
            outs = evaluate(eqn, jaxpr, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def _convolve(lhs, rhs, *, dimension_numbers, out_sharding=None, **params):
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")
    params = {k: params[k] for k in (*names, "precision", "preferred_element_type")}
    of_lhs, of_rhs, of_out = dimension_numbers
    space = range(len(of_lhs) - 2)
    last, kernel = (0, len(of_lhs) - 1, *(i + 1 for i in space)), (len(of_rhs) - 1, len(of_rhs) - 2, *space)
    features_last = lambda spec: (spec[0], *spec[2:], spec[1])
    order = features_last(of_out)
    if out_sharding is not None:
        spec = PartitionSpec(*(out_sharding.spec[d] for d in order))
        params["out_sharding"] = NamedSharding(out_sharding.mesh, spec)
    out = lax.conv_general_dilated(
        lax.transpose(lhs, features_last(of_lhs)),
        lax.transpose(rhs, (*of_rhs[2:], of_rhs[1], of_rhs[0])),
        dimension_numbers=lax.ConvDimensionNumbers(last, kernel, last),
        **params,
    )
    return lax.transpose(out, sorted(range(len(order)), key=order.__getitem__))
