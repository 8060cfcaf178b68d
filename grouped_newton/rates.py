"""Rate rules: from an averaged summary and a damping to one rate per group.

  gbar (S,), hbar (S, S), third (S,)   the averaged summary, third being |third|
  d = |third|^(1/3)  (S,)              lam  the internal damping

A rule is a function ``(summary, lam) -> CubicSolution``; anyone can write one. Beside
it a rule for the damping, from the model's error, and one for the time between refreshes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grouped_newton.cubic import CubicSolution, CubicStatus, all_finite, norm, solve_cubic, solve_decoupled, total
from grouped_newton.summary import Summary

RateRule = Callable[[Summary, Any], CubicSolution]


def cubic_rates() -> RateRule:
    """The paper's rule: the global minimiser of the cubic model.

    ::

      eta = (hbar + (lambda/2) ||D eta|| D^2)^-1 gbar,  D = diag(|third|^(1/3))

    Returns:
      A rate rule, ``(summary, internal_damping) -> CubicSolution``.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_newton import Summary
      >>> one = jnp.ones(1)
      >>> cubic_rates()(Summary(jnp.array(1.0), 3 * one, jnp.eye(1), 8 * one), 1.0).eta.round(2).tolist()
      [0.75]

    References:
      Pierre Wolinski, arXiv 2312.03885, equation for eta*.
    """
    return lambda summary, lam: solve_cubic(summary.gbar, summary.hbar, _scale_of_cubic(summary), lam)


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeRates:
    """Made by :func:`edge_rates`: a rate rule."""

    factor: Any

    def __call__(self, summary: Summary, lam: Any) -> CubicSolution:
        gbar, hbar, d = summary.gbar, summary.hbar, _scale_of_cubic(summary)
        shape = solve_decoupled(gbar, jnp.diag(hbar), d, lam)
        e = jnp.maximum(shape.eta, 0)
        radius = norm(d * e)
        sigma, kappa = jnp.asarray(self.factor, e.dtype), jnp.asarray(lam, e.dtype) / 2
        # The model along the ray, stretched: its derivative at alpha is -a1 + a2 alpha + a3 alpha^2.
        a1 = total(gbar * e)
        a2 = _quadratic_form(hbar, e) / sigma
        a3 = kappa / sigma**2 * radius * radius * radius  # from the left: radius^3 overflows first
        alpha, bounded = _positive_root(a1, a2, a3)
        eta = alpha * e
        numbers_fine = all_finite(hbar) & (shape.status != CubicStatus.NOT_FINITE)
        bounded = bounded & (shape.status != CubicStatus.UNBOUNDED) & all_finite(eta)
        status = jnp.where(bounded, shape.status, CubicStatus.UNBOUNDED)
        status = jnp.where(numbers_fine, status, CubicStatus.NOT_FINITE)
        found = status < CubicStatus.UNBOUNDED
        return CubicSolution(jnp.where(found, eta, 0), jnp.where(found, alpha * radius, 0), status.astype(jnp.int32))


def edge_rates(factor: float = 1.8) -> EdgeRates:
    """Decoupled rates, scaled jointly to ``factor`` times the model's minimum along them.

    The ratios of the rates come from the cubic model without the coupling
    between groups, so that every group keeps moving; the common scale comes from
    the whole model::

      e     = minimiser of the cubic model with diag(hbar) for hbar, clipped at 0
      alpha = argmin over alpha >= 0 of the cubic model with hbar at alpha e
      eta   = factor * alpha * e

    With D = 0 and factor 2 the quadratic model predicts no decrease at all: the
    edge of stability. Factor 1 is the greedy step.

    Args:
      factor: in (0, 2), without unit; 1.8 by default.

    Returns:
      A rate rule, ``(summary, internal_damping) -> CubicSolution``. Its rates are
      never negative. The solution is UNBOUNDED where the model falls for ever along e.

    Raises:
      ValueError: if ``factor`` isn't in (0, 2).

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_newton import Summary
      >>> hbar = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> quadratic = Summary(jnp.array(1.0), jnp.ones(2), hbar, jnp.zeros(2))
      >>> [f"{x:.4f}" for x in edge_rates(factor=1.0)(quadratic, 1.0).eta]
      ['0.3333', '0.3333']
    """
    if not isinstance(factor, jax.core.Tracer) and not 0 < factor < 2:
        raise ValueError(f"factor must be in (0, 2), got {factor!r}; 1 is the greedy step, 2 the edge of stability")
    return EdgeRates(factor)


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
    curvature = _quadratic_form(summary.hbar, eta) / 2
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
    if not any(isinstance(x, jax.core.Tracer) for x in options) and not 0 < floor <= initial <= ceiling < float("inf"):
        raise ValueError(
            "adaptive_damping needs 0 < floor <= initial <= ceiling, all finite,"
            f" got floor={floor!r}, initial={initial!r} and ceiling={ceiling!r}"
        )

    def update(damping, error):
        factor = jnp.where(error.quotient > 0.5, 2.0, jnp.where(error.quotient < 0.1, 0.5, 1.0))
        factor = jnp.where(error.gross, 4.0, jnp.where(error.reliable, factor, 1.0))
        return jnp.clip(damping * factor.astype(damping.dtype), floor, ceiling)

    return AdaptiveDamping(initial, update)


def growing_period(longest: int = 10) -> Callable[[jax.Array], jax.Array]:
    """Steps to the next refresh: few at the start, where rates change fastest, then ``longest``.

    ::

      period(count) = min(1 + count // 10, longest)

    Args:
      longest: at least 1.

    Returns:
      A schedule, for ``refresh_every``.

    Raises:
      ValueError: if ``longest`` isn't an integer of at least 1.

    Example:
      >>> [int(growing_period()(count)) for count in (0, 10, 50, 100)]
      [1, 2, 6, 10]
    """
    check_period("longest", longest)
    return lambda count: jnp.minimum(1 + count // 10, longest)


def check_period(name, period):
    # optax.inject_hyperparams traces numbers.
    if not isinstance(period, jax.core.Tracer) and not (1 <= period < float("inf") and period == int(period)):
        raise ValueError(f"{name} must be an integer of at least 1, got {period!r}")


def _positive_root(a1, a2, a3):
    """The root alpha > 0 of a1 = a2 alpha + a3 alpha^2 (a3 >= 0), 0 if a1 <= 0; and whether there is one."""
    largest = jnp.maximum(jnp.maximum(jnp.abs(a1), jnp.abs(a2)), a3)
    a1, a2, a3 = (a / jnp.where(largest > 0, largest, 1) for a in (a1, a2, a3))
    descends = a1 > 0
    bounded = ~descends | (a2 > 0) | (a3 > 0)
    root = jnp.sqrt(jnp.maximum(a2 * a2 + 4 * a3 * a1, 0))
    # Each form where nothing cancels.
    from_below = 2 * a1 / jnp.where(a2 > 0, a2 + root, 1)
    from_above = (root - a2) / jnp.where(a3 > 0, 2 * a3, 1)
    alpha = jnp.where(a2 > 0, from_below, from_above)
    return jnp.where(descends & bounded, alpha, 0), bounded


def _quadratic_form(hbar, eta):
    return total(hbar * eta[:, None] * eta[None])


def _scale_of_cubic(summary):
    return jnp.cbrt(jnp.abs(summary.third))
