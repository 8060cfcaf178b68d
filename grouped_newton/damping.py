"""The internal damping lambda, from the error of the quadratic model.

gbar (S,), hbar (S, S)   the summary of one batch      eta (S,)   the rates as they are used
quadratic decrease       gbar^T eta - eta^T hbar eta / 2
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.summary import Summary
from grouped_newton.numerics import is_traced, quadratic_form, total


class AdaptiveDamping(NamedTuple):
    """Made by :func:`adaptive_damping`.

    Attributes:
      initial: the internal damping before the first refresh.
      update: ``(damping, error) -> damping``, error being a :class:`ModelError`.
    """

    initial: Any
    update: Callable[[jax.Array, "ModelError"], jax.Array]


class ModelError(NamedTuple):
    """How far the loss at the new rates is from its quadratic model, on one batch.

    Attributes:
      quotient: ``|actual - quadratic decrease| / (eta^T hbar eta / 2)``, ().
      reliable: whether the quotient is more than rounding, bool ().
      gross: whether the step isn't finite or the loss rises above the model by
        more than the model's own terms, bool ().
    """

    quotient: jax.Array
    reliable: jax.Array
    gross: jax.Array


def model_error(summary: Summary, eta: jax.Array, loss_after: jax.Array) -> ModelError:
    """The error of ``L(theta) - gbar^T eta + eta^T hbar eta / 2`` as a model of the loss at ``theta - eta u``.

    Args:
      summary: at theta, of the batch that ``loss_after`` is of; not an average.
      eta: the rates as they are used, (S,).
      loss_after: L(theta - sum_s eta_s u_s), (), in the loss's own dtype.

    Returns:
      A :class:`ModelError`. The quotient isn't reliable where the curvature term, its
      denominator, or the decrease is within 16 units of rounding of the loss.
    """
    slope = total(summary.gbar * eta)
    curvature = quadratic_form(summary.hbar, eta) / 2
    excess = (slope - curvature) - (summary.loss - loss_after.astype(eta.dtype))
    # A loss in half precision is rounded there, whatever holds it here.
    eps = max(jnp.finfo(loss_after.dtype).eps, jnp.finfo(eta.dtype).eps)
    rounding = 16 * float(eps) * jnp.abs(summary.loss)
    quotient = jnp.abs(excess) / jnp.where(curvature > 0, curvature, 1)
    reliable = (curvature > rounding) & (jnp.abs(slope - curvature) > rounding) & jnp.isfinite(quotient)
    gross = ~(excess <= jnp.abs(slope) + jnp.abs(curvature) + rounding)
    return ModelError(quotient, reliable, gross)


def adaptive_damping(initial: float = 1.0, floor: float = 1.0, ceiling: float = 10.0) -> AdaptiveDamping:
    """An internal damping that follows the error of the quadratic model.

    At each refresh, on its own batch and with the rates about to be used::

      error = |actual - quadratic decrease| / (eta^T hbar eta / 2)

    Above 1/2 the damping doubles, below 1/10 it halves. Where the step is grossly
    worse than the model, or not finite, it is multiplied by 4, the rates are halved, and
    the next step refreshes again. It costs one more evaluation of the loss per refresh.

    The cubic term is of the third order: it can't mend an error that shrinks no faster than the
    curvature term, as that of a loss with kinks, and would rise for ever. So it is bounded, by
    default at 10, the top of the range in which the paper tunes it.

    Args:
      initial: the damping at the start, positive, without unit.
      floor: the least damping, positive.
      ceiling: the largest damping.

    Returns:
      An :class:`AdaptiveDamping`, for ``internal_damping``.

    Raises:
      ValueError: unless 0 < ``floor`` <= ``initial`` <= ``ceiling``, all finite.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = adaptive_damping()
      >>> error = ModelError(jnp.array(0.7), jnp.array(True), jnp.array(False))
      >>> float(rule.update(jnp.array(1.0), error))
      2.0
    """
    options = (floor, initial, ceiling)
    if not any(is_traced(x) for x in options) and not 0 < floor <= initial <= ceiling < float("inf"):
        raise ValueError(
            "adaptive_damping needs 0 < floor <= initial <= ceiling, all finite,"
            f" got floor={floor!r}, initial={initial!r} and ceiling={ceiling!r}"
        )

    def update(damping, error):
        factor = jnp.where(error.quotient > 0.5, 2.0, jnp.where(error.quotient < 0.1, 0.5, 1.0))
        factor = jnp.where(error.gross, 4.0, jnp.where(error.reliable, factor, 1.0))
        return jnp.clip(damping * factor.astype(damping.dtype), floor, ceiling)

    return AdaptiveDamping(initial, update)
