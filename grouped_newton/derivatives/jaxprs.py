"""Reading and evaluating jaxprs, by the equation."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

JAXPRS = (jex.Jaxpr, jex.ClosedJaxpr)
REMAT = {"remat", "remat2", "checkpoint"}
CUSTOM_JVP, CUSTOM_VJP = {"custom_jvp_call"}, {"custom_vjp_call", "custom_vjp_call_jaxpr"}
CALLS = {"jit", "pjit", "closed_call", *REMAT}
# How JAX spells these where they are classes instead of primitives, as with the flags jax_custom_vjp3 and jax_remat3.
_SPELLINGS = {"RematTraced": "remat", "CustomJVPTraced": "custom_jvp_call", "CustomVJPTraced": "custom_vjp_call"}
_NOTE = "In the equation"
_OTHERS = (pathlib.Path(jax.__file__).parent, pathlib.Path(__file__).parents[1])  # whose lines are not the loss's


def kind(eqn):
    """The name of the equation's primitive, in one spelling."""
    return _SPELLINGS.get(type(eqn.params.get("_prim")).__name__, eqn.primitive.name)


def body(eqn):
    """The function that a call or a custom rule wraps; None where there is none."""
    return next(iter(bodies(eqn)), None)


def bodies(eqn):
    """The jaxprs that an equation holds."""
    prim = eqn.params.get("_prim")
    params = eqn.params if prim is None else [*prim.params.values(), getattr(prim.params.get("traced"), "jaxpr", None)]
    return [x for x in jax.tree.leaves(params, is_leaf=is_jaxpr) if is_jaxpr(x)]


def equations(jaxpr):
    """All equations of a jaxpr and of those in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in bodies(eqn):
            yield from equations(inner)


def holds(jaxpr, names):
    return any(kind(eqn) in names for eqn in equations(jaxpr))


def is_jaxpr(x):
    return isinstance(x, JAXPRS)


def with_a_ref(eqn):
    """The equation, or the first in it, that has a mutable array among its operands and results; None without."""
    if kind(eqn) == "pallas_call":  # a kernel's own
        return None
    inside = (e for b in bodies(eqn) for e in equations(b))
    has_ref = lambda e: any("Ref" in type(v.aval).__name__ for v in (*e.invars, *e.outvars))
    return next(filter(has_ref, (*inside, eqn)), None)


def evaluate(eqn, jaxpr, values):
    """The outputs of one equation, by a jaxpr that has no other."""
    names = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
    given = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jex.Literal)}
    return function_of(jaxpr, [eqn], names, eqn.outvars)(*(given[v] for v in names))


def function_of(jaxpr, eqns, invars, outvars):
    part = jaxpr.replace(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        debug_info=_debug_info(jaxpr, invars, outvars),
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))


def _debug_info(jaxpr, invars, outvars):
    info = jaxpr.debug_info
    return info._replace(arg_names=("",) * len(invars), result_paths=("",) * len(outvars))


def likeness(eqns: Sequence, invars: Sequence, outvars: Sequence) -> Any:
    """What equations have in common with others that are the same function; None where that can't be told."""
    number = {v: k for k, v in enumerate(invars)}
    parts = []
    for eqn in eqns:
        if eqn.effects or bodies(eqn):
            return None
        operands = [_literal(v) if isinstance(v, jex.Literal) else number[v] for v in eqn.invars]
        for v in eqn.outvars:
            number.setdefault(v, len(number))
        params = tuple(sorted(eqn.params.items()))
        parts.append((eqn.primitive, params, eqn.ctx, tuple(operands), tuple(v.aval for v in eqn.outvars)))
    key = tuple(parts), tuple(v.aval for v in invars), tuple(number[v] for v in outvars)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _literal(v):
    value = np.asarray(v.val)
    return v.aval, value.dtype, value.tobytes()


@contextlib.contextmanager
def named_in_errors(eqns: Sequence):
    """Adds to an error which equation it comes from, and from which line of the loss."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_NOTE} {'; '.join(map(_described, eqns[:3]))}")
        raise


def _described(eqn):
    types = lambda variables: ", ".join(v.aval.str_short() for v in variables)
    return f"{kind(eqn)}({types(eqn.invars)}) -> {types(eqn.outvars)}{_source_line(eqn)}"


def _source_line(eqn):
    """Where the loss makes an equation: the innermost line that is neither JAX's nor ours; nothing where it is lost."""
    with contextlib.suppress(Exception):  # there is no public reader of source information
        traceback = eqn.source_info.traceback.as_python_traceback()
        lines = []
        while traceback is not None:
            code = traceback.tb_frame.f_code
            lines.append((code.co_filename, traceback.tb_lineno, code.co_name))
            traceback = traceback.tb_next
        for file, line, function in reversed(lines):
            if not any(pathlib.Path(file).is_relative_to(room) for room in _OTHERS):
                return f", {file}:{line} ({function})"
    return ""


def live_equations(jaxpr, given=()):
    """Those that an output needs, and those with effects, where some variables are given."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}.difference(given)
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal) and v not in given)
    return kept[::-1]


def read(env, v):
    return v.val if isinstance(v, jex.Literal) else env[v]


def variable(v):
    """None for a literal, which no table of variables holds."""
    return None if isinstance(v, jex.Literal) else v


def is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def is_half(aval):
    return is_float(aval) and jnp.finfo(aval.dtype).bits < 32


def replaced(values, where, by):
    values = list(values)
    for i, x in zip(where, by, strict=True):
        values[i] = x
    return values
