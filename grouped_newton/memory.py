"""The running average of summaries: how long it remembers, and in which units.

  k                  summaries in the average           w_k   weight of the k-th
  gbar, hbar, third  the average, third being |third|   S     groups
  recent (S,)        |hbar_ss| over about the last five summaries

Curvature may fall by orders of magnitude while a net trains. In absolute units the first summaries would then outvote
all later ones. A rule's rates don't change when a summary is multiplied by a number, so before a summary is added the
average is multiplied by c = min(1, recent / its own curvature), both along the present rates. Where curvature rises
instead, the new summary outvotes the old ones and the rates fall at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.summary import Summary, zero_summary
from grouped_newton.numerics import total

LEAST = 10.0  # summaries that an average over a share of them has at least
_RECENT = 0.2


class Memory(NamedTuple):
    """The running average of summaries, ``third`` being |third| and ``loss`` the latest; all zeros before the first."""

    average: Summary
    recent: jax.Array


def empty(num_groups: int, dtype: Any) -> Memory:
    """Nothing seen yet."""
    return Memory(zero_summary(num_groups, dtype), jnp.zeros(num_groups, dtype))


def remember(memory: Memory, new: Summary, count: jax.Array, share: Any, eta: jax.Array) -> Memory:
    """Adds a summary to the average.

    ::

      w = max(1 / count, 1 / (LEAST + share count)),   1 where share is 0
      average <- (1 - w) c average + w new

    so that the memory grows with training, and a share of 0 keeps the latest alone.

    Args:
      memory: of the ``count - 1`` summaries before.
      new: the summary to add.
      count: the number of summaries including ``new``, at least 1.
      share: of the summaries so far, in [0, 1].
      eta: the rates along which curvatures are compared, (S,).

    Returns:
      The new memory.
    """
    dtype = new.gbar.dtype
    k, share = jnp.asarray(count).astype(dtype), jnp.asarray(share, dtype)
    w = jnp.where(share > 0, jnp.maximum(1 / k, 1 / (LEAST + share * k)), 1)
    curvature = jnp.abs(jnp.diag(new.hbar))
    lately = jnp.maximum(1 / k, _RECENT)
    recent = (1 - lately) * memory.recent + lately * curvature

    before = memory.average
    old, now = (total(h * eta * eta) for h in (jnp.abs(jnp.diag(before.hbar)), recent))
    c = jnp.where(now < old, now / jnp.where(old > 0, old, 1), 1)
    mix = lambda old, new: (1 - w) * c * old + w * new
    average = Summary(
        loss=new.loss,
        gbar=mix(before.gbar, new.gbar),
        hbar=mix(before.hbar, new.hbar),
        third=mix(before.third, jnp.abs(new.third)),
    )
    return Memory(average, recent)
