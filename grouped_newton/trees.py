"""Arithmetic on trees like the params, by the groups of a :class:`groups.Partition`; frozen leaves stay out of it."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import groups, sharding


def subtract(partition, params, steps):
    """``params - steps``."""

    def minus(x, step):
        dtype = jnp.result_type(x)
        x, info = (_wide(x, step) - _wide(step, x)).astype(dtype), jnp.finfo(dtype)
        # XLA may leave half precision unrounded inside the loss; the real step is rounded.
        return lax.reduce_precision(x, info.nexp, info.nmant) if info.bits < 32 else x

    return partition.map(minus, params, steps)


def copies(partition, tree, make, like=None):
    """``make`` of every leaf with a group, of the type of ``like``; nothing of the others."""

    def kept(x, kind):
        kind = jax.typeof(kind)
        return sharding.with_sharding_of(jnp.array(make(x), kind.dtype), kind)  # not weakly typed

    pairs = partition.map(lambda kind, x: kept(x, kind), tree if like is None else like, tree)
    return without_frozen(partition, pairs)


def without_frozen(partition, tree, like=None):
    """The tree without the frozen leaves; where some are missing already, in the structure of ``like``."""
    leaves, treedef = jax.tree.flatten(tree)
    if len(leaves) != len(partition.index):
        leaves, treedef = partition.leaves(tree), jax.tree.structure(like)
    pairs = zip(leaves, partition.index, strict=True)
    return jax.tree.unflatten(treedef, [optax.MaskedNode() if g < 0 else x for x, g in pairs])


def root_mean_squares(partition, tree, dtype, axis_name=None):
    """Of the numbers of each group, (S,)."""
    leaves = partition.leaves(tree)
    squares = partition.sums([x if x is None else jnp.sum(jnp.square(jnp.asarray(x, dtype))) for x in leaves], dtype)
    sizes = partition.sums([x if x is None else jnp.asarray(jnp.size(x), dtype) for x in leaves], dtype)
    return jnp.sqrt(sharding.mean(squares, axis_name) / jnp.maximum(sizes, 1))


def either(partition, condition, tree, kept):
    """``tree`` where the condition is true, and what was kept of it elsewhere."""

    def choose(x, y):
        return jnp.where(condition, sharding.with_sharding_of(jnp.asarray(x).astype(y.dtype), jax.typeof(y)), y)

    return partition.map(choose, tree, kept)


def halfway(partition, a, b):
    return partition.map(lambda b, a: (_wide(a, b) + (_wide(b, a) - _wide(a, b)) / 2).astype(jnp.result_type(b)), b, a)


def _wide(x, other):
    """``x`` in the wider of both dtypes, without a promotion that strict rules refuse."""
    return jnp.asarray(x, groups.wider(jnp.result_type(x), jnp.result_type(other)))
