"""Other curvatures than the whole of the loss's: Gauss-Newton's, and the diagonal of any.

  z = f(theta)      outputs of the model          L(theta) = l(f(theta)), l the loss of outputs
  u_s               the direction on group s      dz_s = (D f)[u_s], its tangents, S of them

The Gauss-Newton summary is that of the loss of the model's linearisation, a function of S numbers,

  e -> l(z + sum_s e_s dz_s):   gbar_s = <grad l, dz_s>,   hbar_st = dz_s^T (hess l) dz_t,   third_s = (D^3 l)[dz_s]^3

whose slopes are the loss's own, and whose hbar is positive semi-definite where l is convex. Each tangent is a jvp along
one group alone, so that nothing upstream of it is differentiated; the model is evaluated once, as XLA merges the rest.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from grouped_newton import groups as _groups
from grouped_newton.derivatives.custom_rules import in_forward_mode, naming_rules
from grouped_newton.derivatives.jaxprs import is_float, replaced
from grouped_newton.derivatives.summary import Summary, pieces_of, summarize, summary_dtype


def gauss_newton_summary(
    model_fn: Callable[[Any], Any],
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    groups: _groups.Grouping = _groups.per_tensor,
    *,
    order: int = 3,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Summary:
    """The summary of a loss whose model is linearised at the params: Gauss-Newton's curvature.

    With the loss l(f(theta)), J the Jacobian of f at theta, and u_s the direction on group s::

      gbar_s  = <grad l, J u_s>
      hbar_st = (J u_s)^T (hess l) (J u_t)
      third_s = (D^3 l)[J u_s, J u_s, J u_s]

    ``gbar`` is that of :func:`summarize`; ``hbar`` leaves out the curvature of f and is positive
    semi-definite for a convex l; ``third`` is 0 for a quadratic l. It costs one evaluation of the model,
    S jvps, each through what is downstream of its group alone, and a summary of l in S numbers. There is
    no reverse pass through the model. It keeps S tangents of the outputs.

    Args:
      model_fn: f, from params to outputs, an array or a pytree of them.
      loss_fn: l, from outputs to one real number.
      params: theta, a pytree of real floating-point arrays.
      direction: u, of the same structure and shapes, not negated.
      groups: a grouping, see :mod:`grouped_newton.groups`; per tensor by default.
      order: 3, or 2 to leave ``third`` at zero.
      axis_name: as in :func:`summarize`, ``loss_fn`` being the mean over the device's own part.

    Returns:
      A :class:`Summary` in the widest dtype of the params, at least float32.

    Raises:
      ValueError, TypeError: as :func:`summarize`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = lambda p: jnp.array([1.0, 2.0]) * p["a"] * p["b"]
      >>> loss = lambda outputs: jnp.sum((outputs - 1.0) ** 2)
      >>> params, direction = {"a": jnp.array(1.0), "b": jnp.array(2.0)}, {"a": 1.0, "b": 1.0}
      >>> gauss_newton_summary(model, loss, params, direction).hbar.tolist()
      [[40.0, 20.0], [20.0, 10.0]]
      >>> summarize(lambda p: loss(model(p)), params, direction).hbar.tolist()
      [[40.0, 34.0], [34.0, 10.0]]

    References:
      Nicol N. Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent, 2002.
    """
    partition = _groups.resolve(groups, params)
    dtype = summary_dtype(params, partition)
    at, u, group, params_of = pieces_of(params, direction, partition)
    model = lambda values: model_fn(params_of(values))
    with jax.numpy_dtype_promotion("standard"), naming_rules(lambda: jax.make_jaxpr(model)(at)):
        structure = jax.tree.structure(jax.eval_shape(model, at))
        smooth = in_forward_mode(model, at, alone=True) or (lambda values: jax.tree.leaves(model(values)))
        z, tangents = smooth(at), []
        for s in range(partition.num_groups):
            own = [k for k, g in enumerate(group) if g == s]
            outputs = lambda values, own=own: smooth(replaced(at, own, values))
            tangents.append(jax.jvp(outputs, ([at[k] for k in own],), ([u[k] for k in own],))[1])

    along = list(zip(*tangents, strict=True)) or [()] * len(z)

    def linearised(e):
        return loss_fn(jax.tree.unflatten(structure, [_moved(x, e, dx) for x, dx in zip(z, along, strict=True)]))

    zero, one = ([jnp.full((), value, dtype)] * partition.num_groups for value in (0, 1))
    return summarize(linearised, zero, one, _groups.per_tensor, order=order, axis_name=axis_name)


def _moved(x, e, along):
    """x + sum_s e_s dx_s; what isn't real stays."""
    if not is_float(jax.typeof(x)):
        return x
    return x + sum(e_s.astype(x.dtype) * dx for e_s, dx in zip(e, along, strict=True))


def diagonal(summary: Summary) -> Summary:
    """A summary without curvature between groups: each group as if it moved alone.

    ::

      hbar_st  ->  hbar_ss where s = t, 0 elsewhere

    Args:
      summary: a :class:`Summary` of S groups.

    Returns:
      The same with zeros in ``hbar``, (S, S), off its diagonal.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_newton import Summary
      >>> hbar = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> diagonal(Summary(jnp.array(1.0), jnp.ones(2), hbar, jnp.zeros(2))).hbar.tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    return summary._replace(hbar=jnp.diag(jnp.diag(summary.hbar)))
