"""Stacks of tangents: one array per value, a row for every group that has reached it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import sharding

_TINY = 1 << 12
_FEW = 8
_ROOM = 1 << 15  # numbers of a stack that may be zeros


class Stack(NamedTuple):
    """Tangents of one value: ``array[i]`` belongs to the group of slot ``slots[i]``; slots ascend."""

    slots: tuple[int, ...]
    array: jax.Array


class Layered(NamedTuple):
    """Tangents of a value's layers: slice k along ``axis`` is of the group of slot ``slots[k]``, or -1: of none."""

    slots: tuple[int, ...]
    array: jax.Array
    axis: int


def map_rows(fn, *stacks):
    """``fn`` of every row, at once; one by one where JAX can't batch one of its equations."""
    if all(len(x) == 1 for x in jax.tree.leaves(stacks)):
        return jax.tree.map(lambda z: z[None], fn(*jax.tree.map(lambda x: x[0], stacks)))
    try:
        return jax.vmap(fn)(*stacks)
    except NotImplementedError:
        return lax.map(lambda rows: fn(*rows), stacks)


def add(x, y):
    """The sum of two stacks, over the union of their slots."""
    if x is None or y is None:
        return y if x is None else x
    if x.slots == y.slots:
        return Stack(x.slots, x.array + y.array)
    slots = tuple(sorted({*x.slots, *y.slots}))
    if len(slots) == len(x.slots) + len(y.slots):
        low, high = (x, y) if x.slots < y.slots else (y, x)
        if low.slots[-1] < high.slots[0]:
            return Stack(slots, jnp.concatenate([low.array, high.array]))
    return Stack(slots, spread(x, slots) + spread(y, slots))


def with_room(slots, size, num_groups):
    """The slots of a stack of small rows: with some that come later, so that few stacks differ in their shape.

    XLA compiles a kernel once for all equal ones; the more rows of zeros are cheaper than another kernel.
    """
    step = _ROOM // max(num_groups * size, 1)
    if len(slots) < 2 or step < 2 or len(slots) != slots[-1] - slots[0] + 1:
        return slots
    rows = min(-(-len(slots) // step) * step, num_groups)
    end = min(slots[0] + rows, num_groups)
    return tuple(range(end - rows, end))


def in_room(stack, slots):
    """The stack with the further slots, if it has not all of them."""
    return stack if set(stack.slots) >= set(slots) else Stack(slots, spread(stack, slots))


def within(stack, slots):
    """The stack without the rows of other slots, which are zero."""
    if isinstance(stack, Layered):
        return stack
    kept = stack and tuple(s for s in stack.slots if s in slots)
    return Stack(kept, select(stack, kept)) if kept else None


def _contiguous(slots, among):
    start = among.index(slots[0])
    return start if among[start : start + len(slots)] == slots else None


def spread(stack, slots):
    """The stack's array with rows of zeros for the slots that it lacks."""
    if stack.slots == slots:
        return stack.array
    if len(stack.slots) == 1 and _is_small(stack.array, len(slots)):
        return jnp.where(_place(stack.slots[0], slots, stack.array), stack.array, 0)
    start = _contiguous(stack.slots, slots)
    if start is not None:
        pad = [(start, len(slots) - start - len(stack.slots), 0)] + [(0, 0, 0)] * (stack.array.ndim - 1)
        return lax.pad(stack.array, jnp.zeros((), stack.array.dtype), pad)
    where = jnp.array([slots.index(s) for s in stack.slots])
    return sharding.zeros_of(jax.typeof(stack.array[0]), rows=len(slots)).at[where].set(stack.array)


def spread_or_zero(stack, slots, v):
    return sharding.zeros_of(v.aval, rows=len(slots)) if stack is None else spread(stack, slots)


def select(stack, slots):
    """The rows of some of the stack's slots."""
    if stack.slots == slots:
        return stack.array
    if len(slots) == 1 and _is_small(stack.array[:1], len(stack.slots)):
        return jnp.sum(jnp.where(_place(slots[0], stack.slots, stack.array), stack.array, 0), axis=0, keepdims=True)
    start = _contiguous(slots, stack.slots)
    if start is not None:
        return lax.slice_in_dim(stack.array, start, start + len(slots))
    return stack.array[jnp.array([stack.slots.index(s) for s in slots])]


def _is_small(row, rows):
    anywhere = not sharding.on_a_mesh(row) and not sharding.varying_axes(jax.typeof(row))
    return anywhere and 2 * rows * row.size <= _ROOM


def _place(slot, slots, array):
    """Where a slot is among others, as an array: a kernel that reads it is the same for all slots."""
    where = np.array([s == slot for s in slots])
    return jnp.asarray(where.reshape(-1, *[1] * (array.ndim - 1)))


def gram(x, y):
    """<x_s, y_t> for all s and t, accumulated in at least float32."""
    dtype = jnp.promote_types(wide(x.dtype), wide(y.dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    if sharding.on_a_mesh(x, y):  # flat, an array that is divided along its inner axes would be gathered
        y, whole = sharding.with_sharding_of(y, jax.typeof(x)), sharding.replicated(x)
    else:
        if len(x) == len(y) == 1 and x.size <= _TINY:
            return inner(x, y)[None]  # as a product of matrices it would be four kernels
        x, y, whole = x.reshape(len(x), -1), y.reshape(len(y), -1), None
    axes = tuple(range(1, x.ndim))
    contracted = ((axes, axes), ((), ()))
    return lax.dot_general(x, y, contracted, precision=lax.Precision.HIGHEST, out_sharding=whole).real


def inner(x, y):
    """<x_s, y_s> for all s, accumulated in at least float32."""
    dtype = jnp.promote_types(wide(x.dtype), wide(y.dtype))
    # Not as a product with ones: XLA of jax 0.10 compiles some of these, of a few thousand numbers, to garbage.
    return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=tuple(range(1, x.ndim))).real


def placed(slots, values, num_groups):
    """Zeros of shape (S,) or (S, S) with the values at the slots, a tuple of them for every axis."""
    everything = tuple(range(num_groups))
    starts = [_contiguous(r, everything) for r in slots]
    if None in starts:
        zero = sharding.pvary(
            jnp.zeros((num_groups,) * len(slots), values.dtype), sharding.varying_axes(jax.typeof(values))
        )
        return zero.at[jnp.ix_(*map(jnp.array, slots))].set(values)
    if all(len(r) == num_groups for r in slots):
        return values
    pad = [(start, num_groups - start - len(r), 0) for start, r in zip(starts, slots, strict=True)]
    return lax.pad(values, jnp.zeros((), values.dtype), pad)


def sum_few(arrays):
    """Their sum, a few at a time: XLA compiles equal sums of a few once, and a sum of hundreds for long."""
    while len(arrays) > 1:
        parts = [functools.reduce(jnp.add, arrays[k : k + _FEW]) for k in range(0, len(arrays), _FEW)]
        arrays = lax.optimization_barrier(parts)
    return arrays[0]


def wide(dtype):
    """The dtype in which to add up; JAX promotes those of eight bits to no other."""
    return jnp.promote_types(jnp.float32, dtype if dtype.itemsize > 1 else jnp.float32)
