"""All derivative tensors of the loss along a direction, up to an order.

  theta       params; u the direction, alike; u_s: u on group s, zero elsewhere
  psi(eps)  = L(theta + sum_s eps_s u_s), a function of S numbers
  T_k[s_1, ..., s_k] = (D^k L)[u_s_1, ..., u_s_k] = d^k psi / d eps_s_1 ... d eps_s_k at 0      (S,) * k

T_k is symmetric, so k - 1 of its indices are taken in order, s_1 <= ... <= s_(k-1): that makes N = C(S + k - 2, k - 1)
rows, each the gradient in eps, of S numbers, of k - 1 nested jvps along unit vectors. The reverse pass costs two
evaluations more where forward mode would have to nest once more for each of S numbers. Rows are computed one after
another: the program is as long, and the memory as large, for one row as for all.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton.derivatives.custom_rules import in_forward_mode, naming_rules
from grouped_newton.derivatives.summary import pieces_of, real_scalar, summary_dtype


def derivative_tensors(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    groups: _groups.Grouping = _groups.per_tensor,
    order: int = 3,
) -> tuple[jax.Array, ...]:
    """All derivatives of the loss along the groups of a direction, exact, up to an order.

    With u_s the direction on group s and zero elsewhere, and k from 1 to ``order``::

      T_k[s_1, ..., s_k] = (D^k L)[u_s_1, ..., u_s_k]

    in the signs of a :class:`Summary`: T_1 is its ``gbar``, T_2 its ``hbar``, the diagonal of T_3 its
    ``third``. Derivatives in the rates eta of L(theta - sum_s eta_s u_s) are (-1)^k T_k.

    T_k is symmetric: C(S + k - 2, k - 1) rows of it are computed, one after another, each the gradient of
    k - 1 nested jvps, at some 2^(k-1) gradients. So T_2 costs about 2 S gradients, T_3 2 S (S + 1), T_4
    4 S (S + 1) (S + 2) / 3; docs/guides/curvature.md has measurements. The memory is that of one row. It
    is for looking at a loss: :func:`summarize` is far cheaper for what a rate needs.

    Args:
      value_fn: the loss L, from params to one real number. ``jax.custom_vjp`` is followed as
        :func:`summarize` does with ``method="nested"``.
      params: theta, a pytree of real floating-point arrays.
      direction: u, of the same structure and shapes, not negated; cast to the dtypes of the params.
      groups: a grouping, see :mod:`grouped_newton.groups`; per tensor by default.
      order: the highest order, at least 1; 3 by default.

    Returns:
      A tuple of ``order`` arrays, the k-th of shape (S,) * k in loss per rate^k, symmetric to the last
      bit, in the widest dtype of the params, at least float32.

    Raises:
      ValueError: if ``order`` isn't an integer of at least 1, params and direction don't match,
        ``value_fn`` doesn't return a scalar, or the grouping doesn't fit.
      TypeError: if ``value_fn`` returns something else than one real number, or the direction isn't
        real.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array(1.0), "b": jnp.array(3.0)}
      >>> loss = lambda p: p["a"] ** 2 * p["b"]
      >>> slopes, curvatures, thirds = derivative_tensors(loss, params, {"a": 1.0, "b": 1.0})
      >>> slopes.tolist(), curvatures.tolist(), thirds[0].tolist()
      ([6.0, 1.0], [[6.0, 2.0], [2.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]])

    References:
      Pierre Wolinski, Adapting Newton's Method to Neural Networks through a Summary of Higher-Order
      Derivatives, arXiv 2312.03885.
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order!r}")
    partition = _groups.resolve(groups, params)
    dtype = summary_dtype(params, partition)
    at, u, group, params_of = pieces_of(params, direction, partition)
    loss = lambda values: real_scalar(value_fn(params_of(values)), dtype)

    def along(loss):
        """psi of a loss of the leaves that have a group."""

        def moved(x, dx, eps):
            wide = _groups.wider(x.dtype, dtype)
            return (x.astype(wide) + eps.astype(wide) * dx.astype(wide)).astype(x.dtype)

        pieces = list(zip(at, u, group, strict=True))
        return lambda eps: loss([moved(x, dx, eps[g]) for x, dx, g in pieces]).astype(dtype)

    with jax.numpy_dtype_promotion("standard"), naming_rules(lambda: jax.make_jaxpr(loss)(at)):
        first = _tensor(along(loss), partition.num_groups, 1, dtype)  # by the rules of reverse mode alone
        by_rule = in_forward_mode(loss, at) if order > 1 else None
        smooth = along(loss if by_rule is None else lambda values: by_rule(values)[0])
        return first, *(_tensor(smooth, partition.num_groups, k, dtype) for k in range(2, order + 1))


def _tensor(psi, S, k, dtype):
    """T_k."""
    ordered = list(itertools.combinations_with_replacement(range(S), k - 1))
    unit = jnp.eye(S, dtype=dtype)

    def row(indices):
        derivative = psi
        for s in indices:
            derivative = _derivative(derivative, unit[s])
        return jax.grad(derivative)(jnp.zeros(S, dtype))

    rows = lax.map(row, np.array(ordered, np.int32).reshape(len(ordered), k - 1))
    # Every entry is that of its indices in order, of which all but the last name the row.
    indices = np.sort(np.indices((S,) * k).reshape(k, -1), axis=0)
    number = {of_row: n for n, of_row in enumerate(ordered)}
    chosen = np.array([number[of_row] for of_row in zip(*indices[:-1].tolist(), strict=True)] if k > 1 else 0, np.int32)
    return rows[chosen, indices[-1]].reshape((S,) * k)


def _derivative(f, along):
    return lambda eps: jax.jvp(f, (eps,), (along,))[1]
