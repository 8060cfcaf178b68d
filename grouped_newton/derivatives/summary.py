"""The summary of the loss along a direction.

theta       params, a pytree of P numbers; u the direction, alike; u_s: u on group s, zero elsewhere
phi(eta)  = L(theta - sum_s eta_s u_s), a function of S numbers
gbar_s    = <grad L, u>_s            = - d phi / d eta_s              (S,)
hbar_st   = u_s^T (hess L) u_t       =   d2 phi / d eta_s d eta_t     (S, S)
third_s   = (D^3 L)[u_s, u_s, u_s]   = - d3 phi / d eta_s^3           (S,)
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton import sharding
from grouped_newton.derivatives.custom_rules import naming_rules
from grouped_newton.derivatives.jaxprs import replaced
from grouped_newton.derivatives.nested import nested
from grouped_newton.derivatives.sweep import sweep

METHODS = ("sweep", "nested")


class Summary(NamedTuple):
    """Derivatives of the loss along a direction, per group and between groups.

    Attributes:
      loss: the loss, shape ().
      gbar: slopes <grad L, u>_s, shape (S,), in loss per rate.
      hbar: curvatures u_s^T (hess L) u_t, shape (S, S), in loss per rate squared.
      third: third derivatives (D^3 L)[u_s, u_s, u_s], shape (S,), in loss per
        rate cubed; their absolute values in a running average.
    """

    loss: jax.Array
    gbar: jax.Array
    hbar: jax.Array
    third: jax.Array


def summarize(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    groups: _groups.Grouping = _groups.per_tensor,
    *,
    method: str = "sweep",
    order: int = 3,
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Summary:
    """Exact first, second and diagonal third derivatives along a direction, by group.

    With phi(eta) = L(theta - sum_s eta_s u_s), at eta = 0::

      gbar_s  = -d phi / d eta_s
      hbar_st =  d2 phi / d eta_s d eta_t
      third_s = -d3 phi / d eta_s^3

    Args:
      value_fn: the loss L, from params to one real number. It may close over a
        batch, dropout keys or statistics. Custom rules are followed: slopes are
        those of ``jax.grad``, and ``jax.custom_vjp`` counts as a ``custom_jvp``
        whose jvp is the transpose of its bwd. Where a rule isn't the derivative
        of its function, hbar and third are those of the rule's jvp; where it is
        no gradient of anything, entry (s, t) of hbar, s <= t, is the derivative
        along s of the slope along t; where bwd isn't linear in the cotangent,
        they are those of its linear part for small ones. docs/refused.md has
        more, and what is refused.
      params: theta, a pytree of real floating-point arrays; dtypes may differ.
      direction: u, of the same structure and shapes, not negated: the gradient,
        for plain descent. It is cast to the dtypes of the params.
      groups: a grouping, see :mod:`grouped_newton.groups`.
      method: ``"sweep"`` (one adjoint pass and one forward pass for all groups)
        or ``"nested"``, the definition above by nested ``jax.jvp``: the same
        numbers, several times slower.
      order: 3, or 2 to leave ``third`` at zero, for half to nine tenths of the time.
      max_stack: the most tangents that the sweep carries at once, at least 2, to
        bound its memory; more time, the same numbers. None carries all S.
      axis_name: under ``shard_map`` or ``pmap``, the axis or axes over whose
        devices the loss is to be averaged: ``value_fn`` is the mean over the
        device's own part of the batch, and all devices get the summary of the
        mean of these losses, by one ``lax.pmean`` of (S + 1)^2 numbers. A
        ``value_fn`` that takes that mean itself gives the same. Under ``jit``
        with sharded arrays there is no axis to name.

    Returns:
      A :class:`Summary` in the widest dtype of the params, at least float32.

    Raises:
      ValueError: if params and direction don't match, ``value_fn`` doesn't
        return a scalar, the grouping doesn't fit, or an option is out of range.
      TypeError: if ``value_fn`` returns something else than one real number, or
        the direction isn't real.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) * p["b"]
      >>> s = summarize(loss, params, jax.grad(loss)(params))
      >>> s.gbar.tolist(), s.hbar.tolist()
      ([180.0, 25.0], [[1080.0, 300.0], [300.0, 0.0]])

    References:
      Pierre Wolinski, Adapting Newton's Method to Neural Networks through a Summary
      of Higher-Order Derivatives, arXiv 2312.03885.
    """
    check_options(method, order, max_stack)
    partition = _groups.resolve(groups, params)
    return summary_of(
        value_fn, params, direction, partition, method=method, order=order, max_stack=max_stack, axis_name=axis_name
    )


def summary_of(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    partition: _groups.Partition,
    *,
    method: str = "sweep",
    order: int = 3,
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    forgiving: bool = False,
) -> Summary:
    """:func:`summarize` by a grouping that is resolved, with options that are checked.

    A ``forgiving`` one, for training, leaves out what is at the head of ``rules.py``.
    """
    names, axes = sharding.axis_names(axis_name), sharding.tracked_axes()
    dtype = summary_dtype(params, partition)
    theta, treedef = jax.tree.flatten(params)
    # Every device differentiates along its own copy: along a common one, adjoints would be added up over the devices.
    theta = [x if g < 0 else sharding.pvary(jnp.asarray(x), axes) for x, g in zip(theta, partition.index, strict=True)]
    u = [
        d if g < 0 else sharding.pvary(sharding.with_sharding_of(d, jax.typeof(x)), axes)
        for d, x, g in zip(matching_leaves(direction, params, partition), theta, partition.index, strict=True)
    ]
    loss_of_leaves = lambda leaves: real_scalar(value_fn(jax.tree.unflatten(treedef, leaves)), dtype)
    moving = [i for i, g in enumerate(partition.index) if g >= 0]
    restricted = lambda values: loss_of_leaves(replaced(theta, moving, values))
    traced = lambda: jax.make_jaxpr(restricted)([theta[i] for i in moving])
    with jax.numpy_dtype_promotion("standard"), naming_rules(traced):  # strict rules let half precision meet nothing
        if method == "nested":
            pieces = partition.in_pieces()
            loss_of_pieces = lambda values: loss_of_leaves(partition.joined(values))
            local = Summary(*nested(loss_of_pieces, partition.cut(theta), partition.cut(u), pieces, dtype, order))
        else:
            own = [partition.groups_of(i) for i in range(len(theta))]
            layer_axes = [layers and layers.axis for layers in partition.layers]
            num_groups = partition.num_groups
            options = dtype, order, max_stack, forgiving
            local = Summary(*sweep(loss_of_leaves, theta, u, own, layer_axes, num_groups, *options))
    return _over_devices(local, names, axes)


def _over_devices(local, names, axes):
    """The summary of the mean of the losses on all devices along the axes ``names``, by one all-reduce."""
    # A loss that doesn't vary over an axis is one function of what is on all its devices, and theirs are its parts.
    shared = [a for a in axes if a not in sharding.varying_axes(jax.typeof(local.loss))]
    over = tuple(dict.fromkeys((*names, *shared)))
    if not over:
        return local
    leaves = [sharding.in_parts(x, axes) for x in local]
    mean = lax.pmean(jnp.concatenate([x.ravel() for x in leaves]), over) * math.prod(map(lax.axis_size, shared))
    bounds = np.cumsum([x.size for x in leaves])[:-1]
    return Summary(*(part.reshape(x.shape) for part, x in zip(jnp.split(mean, bounds), leaves, strict=True)))


def check_options(method: str, order: int, max_stack: int | None) -> None:
    """Raises a ValueError that says which option of :func:`summarize` is out of range."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order!r}")
    if max_stack is None:
        return
    if not isinstance(max_stack, int) or isinstance(max_stack, bool) or max_stack < 2:
        raise ValueError(f"max_stack must be None or an integer of at least 2, got {max_stack!r}")
    if method != "sweep":
        raise ValueError(f'max_stack bounds the tangents of method="sweep", got it with method={method!r}')


def zero_summary(num_groups: int, dtype: Any) -> Summary:
    """A summary of zeros."""
    z = lambda *shape: jnp.zeros(shape, dtype)
    return Summary(z(), z(num_groups), z(num_groups, num_groups), z(num_groups))


def summary_dtype(params: Any, partition: _groups.Partition) -> np.dtype:
    """The widest dtype of the parameters that have a group, at least float32."""
    leaves = zip(jax.tree.leaves(params), partition.index, strict=True)
    return functools.reduce(_groups.wider, (jnp.result_type(x) for x, g in leaves if g >= 0), np.dtype(np.float32))


def matching_leaves(direction: Any, params: Any, partition: _groups.Partition) -> list:
    """The leaves of the direction, checked against the params and cast to their dtypes; None for frozen ones."""
    partition.check(direction)
    theta, u = jax.tree.leaves(params), partition.leaves(direction)
    matched = []
    for path, g, p, d in zip(partition.paths, partition.index, theta, u, strict=True):
        if g >= 0 and jnp.shape(p) != jnp.shape(d):
            raise ValueError(
                f"the direction has shape {jnp.shape(d)} at parameter {path}, which has shape {jnp.shape(p)};"
                " it must have the shapes of the params, as gradients do"
            )
        if g >= 0 and jnp.issubdtype(jnp.result_type(d), jnp.complexfloating):
            raise TypeError(
                f"the direction has dtype {jnp.result_type(d)} at parameter {path}, which has dtype"
                f" {jnp.result_type(p)}; it must be real"
            )
        matched.append(d if g < 0 else jnp.asarray(d).astype(jnp.result_type(p)))
    return matched


class Pieces(NamedTuple):
    """The parameters that have a group; a leaf that holds several layers as a slice for each of them.

    Attributes:
      theta: the parameters, a list of arrays.
      u: their direction.
      group: the number of the group of each.
      params: from a list like ``theta`` to params.
    """

    theta: list
    u: list
    group: list[int]
    params: Callable[[Sequence], Any]


def pieces_of(params: Any, direction: Any, partition: _groups.Partition) -> Pieces:
    """The pieces of params and a direction, which is checked against them."""
    leaves, treedef = jax.tree.flatten(params)
    theta, u = partition.cut(leaves), partition.cut(matching_leaves(direction, params, partition))
    group = partition.in_pieces().index
    moving = [i for i, g in enumerate(group) if g >= 0]
    whole = lambda values: jax.tree.unflatten(treedef, partition.joined(replaced(theta, moving, values)))
    return Pieces([jnp.asarray(theta[i]) for i in moving], [u[i] for i in moving], [group[i] for i in moving], whole)


def real_scalar(value: Any, dtype: Any) -> jax.Array:
    """The value of the loss in at least ``dtype``, or an error that says what came instead."""
    value = one_number("value_fn must return", value, "value_fn=lambda params: loss_fn(params)[0]")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"value_fn must return a real floating-point number, got dtype {value.dtype}")
    return value.astype(_groups.wider(value.dtype, dtype))


def one_number(whose: str, value: Any, fix: str) -> jax.Array:
    """The value as an array, or an error that says what is wrong with it and how to drop auxiliary outputs."""
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(
            f"{whose} the loss alone, one real number, got {jax.tree.structure(value)}; drop auxiliary outputs, as in"
            f" {fix}"
        )
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"{whose} one real number, got an array of shape {value.shape}; take its mean or sum")
    return value
