"""Stacks of tangents: one array per value, a row for every group that has reached it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grouped_newton import placement

_SHORT = 1 << 15


class Stack(NamedTuple):
    """Tangents of one value: ``array[i]`` belongs to the group of rank ``ranks[i]``; ranks ascend."""

    ranks: tuple[int, ...]
    array: jax.Array


def map_rows(fn, *stacks):
    """``fn`` of every row, at once; one by one where JAX can't batch one of its equations."""
    if all(len(x) == 1 for x in jax.tree.leaves(stacks)):
        return jax.tree.map(lambda z: z[None], fn(*jax.tree.map(lambda x: x[0], stacks)))
    try:
        return jax.vmap(fn)(*stacks)
    except NotImplementedError:
        return lax.map(lambda rows: fn(*rows), stacks)


def push_rows(fn, stack, outs):
    if stack is None:
        return [None] * len(outs)
    rows = map_rows(fn, stack.array)
    return [Stack(stack.ranks, placement.laid_out(z, v.aval)) for z, v in zip(rows, outs, strict=True)]


def add(x, y):
    """The sum of two stacks, over the union of their ranks."""
    if x is None or y is None:
        return y if x is None else x
    if x.ranks == y.ranks:
        return Stack(x.ranks, x.array + y.array)
    ranks = tuple(sorted({*x.ranks, *y.ranks}))
    if len(ranks) == len(x.ranks) + len(y.ranks):
        low, high = (x, y) if x.ranks < y.ranks else (y, x)
        if low.ranks[-1] < high.ranks[0]:
            return Stack(ranks, jnp.concatenate([low.array, high.array]))
    return Stack(ranks, spread(x, ranks) + spread(y, ranks))


def _contiguous(ranks, among):
    start = among.index(ranks[0])
    return start if among[start : start + len(ranks)] == ranks else None


def spread(stack, ranks):
    """The stack's array with rows of zeros for the ranks that it lacks."""
    if stack.ranks == ranks:
        return stack.array
    start = _contiguous(stack.ranks, ranks)
    if start is not None:
        pad = [(start, len(ranks) - start - len(stack.ranks), 0)] + [(0, 0, 0)] * (stack.array.ndim - 1)
        return lax.pad(stack.array, jnp.zeros((), stack.array.dtype), pad)
    where = jnp.array([ranks.index(s) for s in stack.ranks])
    return placement.zeros(jax.typeof(stack.array[0]), rows=len(ranks)).at[where].set(stack.array)


def spread_or_zero(stack, ranks, v):
    return placement.zeros(v.aval, rows=len(ranks)) if stack is None else spread(stack, ranks)


def select(stack, ranks):
    """The rows of some of the stack's ranks."""
    if stack.ranks == ranks:
        return stack.array
    start = _contiguous(ranks, stack.ranks)
    if start is not None:
        return lax.slice_in_dim(stack.array, start, start + len(ranks))
    return stack.array[jnp.array([stack.ranks.index(s) for s in ranks])]


def gram(x, y):
    """<x_s, y_t> for all s and t, accumulated in at least float32."""
    dtype = jnp.promote_types(wide(x.dtype), wide(y.dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    if placement.on_a_mesh(x, y):  # flat, an array that is divided along its inner axes would be gathered
        y, whole = placement.laid_out(y, jax.typeof(x)), placement.whole(x)
    else:
        x, y, whole = x.reshape(len(x), -1), y.reshape(len(y), -1), None
    axes = tuple(range(1, x.ndim))
    contracted = ((axes, axes), ((), ()))
    return lax.dot_general(x, y, contracted, precision=lax.Precision.HIGHEST, out_sharding=whole).real


def inner(x, y):
    """<x_s, y_s> for all s, accumulated in at least float32."""
    dtype = jnp.promote_types(wide(x.dtype), wide(y.dtype))
    products = x.astype(dtype) * y.astype(dtype)
    if products.size <= _SHORT and not placement.on_a_mesh(x, y):
        # On the CPU XLA pays for each reduction at every call, see cubic.folded. One row by one column would be one.
        ones = jnp.ones((math.prod(x.shape[1:]), 2), dtype)
        return jnp.matmul(products.reshape(len(x), len(ones)), ones, precision=lax.Precision.HIGHEST)[:, 0].real
    return jnp.sum(products, axis=tuple(range(1, x.ndim))).real


def placed(stack, num_groups, dtype):
    return spread(Stack(stack.ranks, stack.array.astype(dtype)), tuple(range(num_groups)))


def placed_block(rows, columns, block, num_groups):
    everything = tuple(range(num_groups))
    block = spread(Stack(rows, block), everything)
    return spread(Stack(columns, block.T), everything).T


def wide(dtype):
    """The dtype in which to add up; JAX promotes those of eight bits to no other."""
    return jnp.promote_types(jnp.float32, dtype if dtype.itemsize > 1 else jnp.float32)
