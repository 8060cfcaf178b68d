"""Convolutions in the layout that XLA's CPU compiler runs fast inside branches and loops too.

It has fast code for one order of dimensions (batch, space, features; space, features in, features out) and brings other
convolutions into it, but those of the entry computation alone. In the branch of a refresh the convolutions of a
gradient, whose dimensions are in another order, then take several times as long.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from grouped_newton.rewrites import evaluate, holds, read


def caller(loss: Callable[[], Any]) -> Callable[[Callable[[], Any]], Any]:
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
