"""Traced functions evaluated by NumPy, one equation at a time: where a program runs once, compiling it costs the most.

What has no entry in the tables is run by JAX itself, which compiles an operation once for each shape.
"""

import jax
import jax.extend.core as jex
import numpy as np
import scipy.special


def uncompiled(fn):
    """``fn`` of pytrees of arrays, in place of ``jax.jit(fn)`` where it is called once."""

    def evaluated(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), run(closed, *jax.tree.leaves(args)))

    return evaluated


def run(closed, *args):
    """The outputs of a closed jaxpr, as NumPy arrays."""
    return _run(closed.jaxpr, closed.consts, [x if _is_key(x) else np.asarray(x) for x in args])


def _run(jaxpr, consts, args):
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: np.asarray(v.val, v.aval.dtype) if isinstance(v, jex.Literal) else env[v]
    with np.errstate(all="ignore"):
        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, _outs(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _outs(eqn, values):
    name = eqn.primitive.name
    if name in NUMPY:
        return [_as_promised(eqn, NUMPY[name](*values))]
    if name in CONTROL:
        return CONTROL[name](eqn, values)
    if name in WITH_PARAMS and (out := WITH_PARAMS[name](values, **eqn.params)) is not NotImplemented:
        return [_as_promised(eqn, out)]
    outs = eqn.primitive.bind(*values, **eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return [z if _is_key(z) else np.asarray(z) for z in outs]


def _as_promised(eqn, out):
    """In JAX's dtype: NumPy takes powers of single precision by integers, and adds integers up, in double."""
    dtype = eqn.outvars[0].aval.dtype
    return out if out.dtype == dtype else out.astype(dtype)


def _is_key(x):
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _same(x):
    return x


def _is_integer(x):
    return not np.issubdtype(x.dtype, np.inexact)


NUMPY = {
    **{name: getattr(np, name) for name in "sqrt exp exp2 expm1 log log1p sin cos tan sinh cosh tanh".split()},  # noqa: SIM905
    **{name: getattr(np, name) for name in "sign floor ceil cbrt square real imag conj".split()},  # noqa: SIM905
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("sin", "cos", "tan", "tan2", "sinh", "cosh", "tanh")},
    **{name: getattr(scipy.special, name) for name in ("erf", "erfc")},
    **dict.fromkeys(("copy", "copy_p", "stop_gradient"), _same),
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "rem": np.fmod,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "logistic": scipy.special.expit,
    "is_finite": np.isfinite,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "complex": lambda x, y: x + 1j * y,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases) if which.ndim else cases[int(which)],
}


# Functions of the operands and the params: an array, or what says that JAX is to do it


def _div(values):
    return NotImplemented if _is_integer(values[0]) else np.divide(*values)


def _convert(values, new_dtype, **_):
    (x,) = values
    to_real = np.iscomplexobj(x) and not np.issubdtype(new_dtype, np.complexfloating)
    return (x.real if to_real else x).astype(new_dtype)


def _broadcast(values, shape, broadcast_dimensions, **_):
    (x,) = values
    inner = [1] * len(shape)
    for k, n in zip(broadcast_dimensions, x.shape, strict=True):
        inner[k] = n
    return np.broadcast_to(x.reshape(inner), shape)


def _reshape(values, new_sizes, dimensions, **_):
    return (values[0] if dimensions is None else np.transpose(values[0], dimensions)).reshape(new_sizes)


def _pad(values, padding_config):
    x, fill = values
    if any(low < 0 or high < 0 or between for low, high, between in padding_config):
        return NotImplemented
    return np.pad(x, [(low, high) for low, high, _ in padding_config], constant_values=fill)


def _slice(values, start_indices, limit_indices, strides):
    strides = strides or [1] * len(start_indices)
    return values[0][tuple(map(slice, start_indices, limit_indices, strides))]


def _dynamic_slice(values, slice_sizes, **_):
    x, *starts = values
    starts = [min(max(int(i), 0), n - k) for i, n, k in zip(starts, x.shape, slice_sizes, strict=True)]
    return x[tuple(slice(i, i + k) for i, k in zip(starts, slice_sizes, strict=True))]


def _iota(values, dtype, shape, dimension, **_):
    return np.broadcast_to(np.expand_dims(np.arange(shape[dimension], dtype=dtype), _others(shape, dimension)), shape)


def _others(shape, dimension):
    return [k for k in range(len(shape)) if k != dimension]


def _dot(values, dimension_numbers, **_):
    (contracted, batched), (x, y) = dimension_numbers, values
    left, right = list(range(x.ndim)), [x.ndim + k for k in range(y.ndim)]
    for i, j in (*zip(*contracted, strict=True), *zip(*batched, strict=True)):
        right[j] = left[i]
    free = [k for i, k in enumerate(left) if i not in (*contracted[0], *batched[0])]
    free += [k for j, k in enumerate(right) if j not in (*contracted[1], *batched[1])]
    return np.einsum(x, left, y, right, [left[i] for i in batched[0]] + free)


def _triangular_solve(values, left_side, lower, transpose_a, conjugate_a, unit_diagonal):
    a, b = values
    if conjugate_a:
        return NotImplemented
    a = np.tril(a) if lower else np.triu(a)
    if unit_diagonal:
        a = a - a * np.eye(a.shape[-1]) + np.eye(a.shape[-1])
    turned = lambda x: np.swapaxes(x, -1, -2)
    a = turned(a) if transpose_a else a
    return np.linalg.solve(a, b) if left_side else turned(np.linalg.solve(turned(a), turned(b)))


def _cholesky(values, **_):
    try:
        return np.linalg.cholesky(values[0])
    except np.linalg.LinAlgError:  # JAX has NaN there
        return NotImplemented


def _reduced(fn):
    return lambda values, axes, **_: fn(values[0], axis=tuple(axes))


def _cumulated(fn):
    def cumulated(values, axis, reverse):
        turned = lambda x: np.flip(x, axis) if reverse else x
        return turned(fn(turned(values[0]), axis=axis))

    return cumulated


WITH_PARAMS = {
    "div": _div,
    "integer_pow": lambda values, y: values[0] ** y,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": lambda values, dimensions: np.squeeze(values[0], tuple(dimensions)),
    "expand_dims": lambda values, dimensions: np.expand_dims(values[0], dimensions),
    "transpose": lambda values, permutation: np.transpose(values[0], permutation),
    "rev": lambda values, dimensions: np.flip(values[0], dimensions),
    "concatenate": lambda values, dimension: np.concatenate(values, dimension),
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "iota": _iota,
    "dot_general": _dot,
    "triangular_solve": _triangular_solve,
    "cholesky": _cholesky,
    "argmax": lambda values, axes, index_dtype: np.argmax(values[0], *axes).astype(index_dtype),
    "stack": lambda values, axis: np.stack(values, axis),
    "reduce_sum": _reduced(np.sum),
    "reduce_prod": _reduced(np.prod),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_and": _reduced(np.all),
    "cumsum": _cumulated(np.cumsum),
    "cumprod": _cumulated(np.cumprod),
    "cummax": _cumulated(np.maximum.accumulate),
    "cummin": _cumulated(np.minimum.accumulate),
}


# Functions of an equation and its operands: a list of arrays


def _call(eqn, values):
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
    return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)


def _cond(eqn, values):
    branches = eqn.params["branches"]
    return run(branches[min(max(int(values[0]), 0), len(branches) - 1)], *values[1:])


def _while(eqn, values):
    p = eqn.params
    of_cond, rest = values[: p["cond_nconsts"]], values[p["cond_nconsts"] :]
    of_body, carry = rest[: p["body_nconsts"]], rest[p["body_nconsts"] :]
    while np.any(going := run(p["cond_jaxpr"], *of_cond, *carry)[0]):
        after = run(p["body_jaxpr"], *of_body, *carry)
        # Under vmap each goes on by itself.
        carry = [np.where(_among_axes_of(going, x), x, y) for x, y in zip(after, carry, strict=True)]
    return carry


def _among_axes_of(which, x):
    return which.reshape(which.shape + (1,) * (np.ndim(x) - which.ndim))


def _scan(eqn, values):
    # Which operands and outputs are scanned is told by their shapes: the names of these params change with the version.
    closed, length = eqn.params["jaxpr"], eqn.params["length"]
    alike = lambda outer, inner: sum(v.aval.ndim == w.aval.ndim for v, w in zip(outer, inner, strict=True))
    given, carried = alike(eqn.invars, closed.jaxpr.invars), alike(eqn.outvars, closed.jaxpr.outvars)
    consts, carry, xs = values[: given - carried], values[given - carried : given], values[given:]
    ys = [np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[carried:]]
    for k in reversed(range(length)) if eqn.params["reverse"] else range(length):
        outs = run(closed, *consts, *carry, *(x[k] for x in xs))
        carry = outs[:carried]
        for y, row in zip(ys, outs[carried:], strict=True):
            y[k] = row
    return [*carry, *ys]


def _linear_solve(eqn, values):
    sizes, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    start = sizes.matvec + sizes.vecmat
    end = start + sizes.solve
    return run(jaxprs.solve, *values[start:end], *values[end + sizes.transpose_solve :])


CONTROL = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _call),
    "optimization_barrier": lambda _, values: values,
    "split": lambda eqn, values: np.split(values[0], np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"]),
    "unstack": lambda eqn, values: list(np.moveaxis(values[0], eqn.params["axis"], 0)),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "custom_linear_solve": _linear_solve,
}
