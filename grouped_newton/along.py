"""The loss itself along each group's part of a direction, to hold its models against.

theta       params, a pytree; u the direction, alike; u_s: u on group s, zero elsewhere
phi_s(eta)  = L(theta - eta u_s)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton import trees
from grouped_newton.derivatives.summary import matching_leaves, real_scalar, summary_dtype


def losses_along(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    etas: Any,
    groups: _groups.Grouping = _groups.per_tensor,
) -> jax.Array:
    """The loss at several rates of each group by itself.

    ::

      losses_sk = L(theta - etas_sk u_s)

    It costs S N evaluations of the loss, one after the other, in the memory of one.

    Args:
      value_fn: the loss L, from params to one real number.
      params: theta, a pytree of real floating-point arrays.
      direction: u, of the same structure and shapes, not negated.
      etas: the rates, shape (S, N), or (N,) for all groups the same.
      groups: a grouping, see :mod:`grouped_newton.groups`.

    Returns:
      The losses, shape (S, N), in the widest dtype of params and loss, at least float32.
      ``plotting.plot_models`` draws a row with the models of a :class:`Summary` over it.

    Raises:
      ValueError: if params and direction don't match, ``value_fn`` doesn't return a scalar, or the
        grouping or ``etas`` doesn't fit.
      TypeError: if ``value_fn`` returns something else than one real number, or the direction isn't real.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + p["b"] ** 2
      >>> losses_along(loss, params, params, [0.0, 1.0, 2.0]).tolist()
      [[14.0, 9.0, 14.0], [14.0, 5.0, 14.0]]
    """
    partition = _groups.resolve(groups, params)
    matching_leaves(direction, params, partition)
    dtype, S = summary_dtype(params, partition), partition.num_groups
    etas = jnp.asarray(etas, dtype)
    if etas.ndim not in (1, 2) or (etas.ndim == 2 and len(etas) != S):
        raise ValueError(f"etas must be of shape (N,), or ({S}, N) for {S} groups, got {etas.shape}")
    etas = jnp.broadcast_to(etas, (S, etas.shape[-1]))

    def loss_at(point):
        group, eta = point
        rates = jnp.where(jnp.arange(S) == group, eta, 0)
        moved = trees.subtract(partition, params, partition.scale(rates, direction))
        return real_scalar(value_fn(moved), dtype)

    group = jnp.broadcast_to(jnp.arange(S)[:, None], etas.shape)
    return lax.map(loss_at, (group.ravel(), etas.ravel())).reshape(etas.shape)
