"""Rate rules: from an averaged summary and a damping to one rate per group.

  gbar (S,), hbar (S, S), third (S,)   the averaged summary, third being |third|
  d = |third|^(1/3)  (S,)              lam  the internal damping

A rule is a function ``(summary, lam) -> CubicSolution``; anyone can write one. Beside
them the time between two refreshes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grouped_newton.cubic import CubicSolution, CubicStatus, solve_cubic, solve_decoupled
from grouped_newton.derivatives.summary import Summary
from grouped_newton.numerics import all_finite, is_traced, norm, quadratic_form, total

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
        a2 = quadratic_form(hbar, e) / sigma
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
    if not is_traced(factor) and not 0 < factor < 2:
        raise ValueError(f"factor must be in (0, 2), got {factor!r}; 1 is the greedy step, 2 the edge of stability")
    return EdgeRates(factor)


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
    if not is_traced(period) and not (1 <= period < float("inf") and period == int(period)):
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


def _scale_of_cubic(summary):
    return jnp.cbrt(jnp.abs(summary.third))
