"""Losses far above those before, told by the loss of each step.

  mean        running average of the losses          deviation   of their distances from it

Both are over a share of the steps so far. A loss above mean + FAR deviation, or one that isn't finite, is a spike; in
the averages it counts as that limit, so that a loss which stays high is soon the usual one.
"""

from typing import Any

import jax
import jax.numpy as jnp

FAR = 8.0
LEAST = 20.0
SHARE = 0.1
_SETTLED = 10  # steps before which nothing is a spike


def observe(losses: jax.Array, value: Any, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The averages (mean, deviation), (2,), after the loss of step ``count``, and whether that is a spike."""
    mean, deviation = losses
    value = jnp.asarray(value).astype(losses.dtype)
    top = jnp.finfo(losses.dtype).max * 2.0**-40  # sums of a few stay finite
    limit = jnp.minimum(mean + FAR * deviation, top)
    # Losses that were all the same, or none of them finite, tell nothing of deviations.
    spike = (count >= _SETTLED) & (deviation > 0) & ~((value <= limit) & jnp.isfinite(value))
    value = jnp.where(jnp.isfinite(value), jnp.clip(value, -top, top), mean)
    value = jnp.where(spike, limit, value)
    t = count.astype(losses.dtype)
    w = jnp.maximum(1 / (1 + t), 1 / (LEAST + SHARE * t))
    distance = jnp.where(count > 0, jnp.abs(value - mean), 0)
    return losses + w * (jnp.stack([value, distance]) - losses), spike
