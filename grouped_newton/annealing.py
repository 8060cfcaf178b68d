"""How large the rates are, once training has settled: by what becomes of the averaged parameters.

  theta        the parameters         mean    their running average
  ell(t)     = L(mean + t (theta - mean)), t in [0, 1], on a batch that neither has seen
  slope      = -ell'(0)    what the average gains by moving on: progress
  curvature  =  ell''      what theta loses by noise and oscillations, which the average is free of
  rho        = slope / curvature
  a = gbar^T eta, b = eta^T hbar eta     slope and curvature of one step, from the averaged summary

Where the loss doesn't fall from step to step because theta moves about a valley, a is about b / 2 at any rates, of any
group: a step's own slope tells nothing about their size, nor about their ratios. rho does: it falls as rates rise. In
the second half of runs at Adam's best constant rate, 0.01 or 0.03, it was 0.06 to 0.09 on four tasks, and 0.01 on a
fifth with endless data (docs/training.md). So after the first steps, when slopes are signal, the ratios of the rates
stay, and their size follows both

  d log eta / d log step = GAIN clip( clip(rho / RHO - 1, -1, 1/2) + 2 a / b - 1, -1, 1/4)

Both terms are linear in what a batch is noise to: the logarithm of a noisy quotient is too low in the mean, and rates
would fall for the noise alone. While the average lags behind at the start rho is large: the first term is bounded so
that it can't make steps grow that overshoot already, and growth as a whole since a / b is known late.

A loss that doesn't see the length of some parameters, as with BatchNorm, sets no bound to their rates: large steps
make them longer and are then small in proportion, for good. So no group goes further in a step than TRUST of its length
now or at the start. One that starts at zero or close to it, below SMALL in the root of its mean square, has to grow
and goes as far as it likes.
"""

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.summary import Summary
from grouped_newton.numerics import all_finite, total

RHO = 0.1
GAIN = 2.0
TRUST = 0.05
SMALL = 1e-3
START = 20  # steps in which the rates are the rate rule's
_SUMMARIES = 5.0
_SHARE = 0.15
_SETTLED = 10


def measure(loss_average: jax.Array, loss_between: jax.Array, loss_params: jax.Array) -> jax.Array:
    """slope and |curvature| of the parabola through ell(0), ell(1/2), ell(1), (2,); zeros where that is rounding."""
    slope = 3 * loss_average - 4 * loss_between + loss_params
    curvature = jnp.abs(4 * (loss_average - 2 * loss_between + loss_params))
    eps = jnp.finfo(loss_params.dtype).eps
    known = curvature > 64 * float(eps) * jnp.abs(loss_params)
    return jnp.where(known, jnp.stack([slope, curvature]), 0)


def remember(progress: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """The running average of slope and curvature after ``count`` refreshes, in the units of the latest curvature.

    As curvatures fall, the earlier ones are scaled down with them, by a fifth at a time. The first ten refreshes,
    where the average is hardly one, tell nothing.
    """
    k = jnp.maximum(count - _SETTLED, 1).astype(progress.dtype)
    w = jnp.maximum(1 / k, 1 / (_SUMMARIES + _SHARE * count.astype(progress.dtype)))
    new = new.astype(progress.dtype)
    new = jnp.where(all_finite(new), new, 0)
    old, now = progress[1], new[1]
    c = jnp.where(now < old, jnp.maximum(now / jnp.where(old > 0, old, 1), 0.8), 1)
    return jnp.where((now > 0) & (count > _SETTLED), (1 - w) * c * progress + w * new, progress)


def trusted(eta: jax.Array, params: jax.Array, start: jax.Array, direction: jax.Array) -> jax.Array:
    """The rates, at most ``TRUST max(params, start) / direction``; unlimited where ``start`` is below ``SMALL``.

    Args:
      eta: the rates, (S,).
      params: root of the mean square of each group, (S,).
      start: the same at ``init``, (S,).
      direction: the same of the direction, (S,).
    """
    limited = (start >= SMALL) & (direction > 0) & jnp.isfinite(params) & jnp.isfinite(direction)
    limit = TRUST * jnp.maximum(params, start) / jnp.where(limited, direction, 1)
    return jnp.where(limited, jnp.minimum(eta, limit.astype(eta.dtype)), eta)


def growth(average: Summary, eta: jax.Array, progress: jax.Array, steps: jax.Array, count: jax.Array) -> jax.Array:
    """What the rates are to be multiplied by after so many ``steps`` of ``count``; 1 before rho is known.

    Args:
      average: of the summaries.
      eta: the present rates, (S,).
      progress: slope and curvature, (2,), as :func:`remember` gives them.
      steps: since the last refresh.
      count: of all steps.

    Returns:
      A number between exp(-1/2) and exp(1/2).
    """
    dtype = eta.dtype
    eta = jnp.maximum(eta, 0)
    a = total(average.gbar * eta)
    b = total(average.hbar * eta[:, None] * eta[None])
    b = jnp.maximum(b, 0.1 * total(jnp.abs(jnp.diag(average.hbar)) * eta * eta))
    slope, curvature = progress
    known = (curvature > 0) & (b > 0)
    ratio = lambda x, y: x / jnp.where(y > 0, y, 1)
    by_average = jnp.clip(ratio(slope, curvature) / RHO - 1, -1, 0.5)
    by_step = 2 * ratio(a, b) - 1
    pace = GAIN * steps.astype(dtype) / (count.astype(dtype) + 10)
    change = pace * jnp.clip(by_average + by_step, -1, 0.25)
    return jnp.where(known, jnp.exp(jnp.clip(change, -0.5, 0.5)), 1).astype(dtype)
