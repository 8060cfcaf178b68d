"""What the losses of the steps tell: a scale on all rates, from windows of their values, and whether they have noise.

  v_k           losses of a window of steps, or of one refresh where no losses are given
  window_mean   mean of the last window that closed      deviation  mean |v_k - window_mean| over it
  scale         in (0, 1], a factor on all rates

A window closes at a refresh. A value over window_mean + 8 deviation is a spike: it
counts as that limit, and the scale shrinks at once if it is the highest of its window.
A value that isn't finite is above all others; before there is a deviation it doesn't
count, and a window without values doesn't close.

  predicted     the loss after a refresh's step, as the refresh found it on its own batch
  agreed        how often the loss of the next step was that, forgotten faster than learnt

Where the batch is always the same, nothing is between the two but rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ScaleRule = Callable[[Any, Any], jax.Array]

SPIKE = 8.0
LEAST_WINDOW = 5
AGREEMENT = 0.01


class Progress(NamedTuple):
    """Scalars of one dtype; what isn't known is the largest number, or the least for ``window_peak``."""

    scale: jax.Array
    window_sum: jax.Array
    window_spread: jax.Array
    window_count: jax.Array
    window_peak: jax.Array
    window_mean: jax.Array
    deviation: jax.Array
    predicted: jax.Array
    agreed: jax.Array


def success_rule(shrink: float = 0.7, grow: float = 1.2, floor: float = 1e-3) -> Callable[[Any, Any], jax.Array]:
    """A scale on all rates: up while the loss falls, down when it doesn't.

    ::

      scale <- clip(scale * (grow if the loss fell else shrink), floor, 1)

    A summary describes single steps and a sample of them; oscillations that
    build up over many steps, and spikes between two refreshes, show in the loss
    alone. With the defaults the scale stays at 1 while two windows of three are
    better than the one before.

    Args:
      shrink: in (0, 1).
      grow: above 1.
      floor: the least scale, in (0, 1].

    Returns:
      A function ``(scale, fell) -> scale``, for ``scale_rule``.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> rule = success_rule()
      >>> float(rule(1.0, True)), round(float(rule(1.0, False)), 3)
      (1.0, 0.7)
    """
    if not (0 < shrink < 1 < grow < float("inf") and 0 < floor <= 1):
        raise ValueError(
            "success_rule needs 0 < shrink < 1 < grow and 0 < floor <= 1,"
            f" got shrink={shrink!r}, grow={grow!r}, floor={floor!r}"
        )
    return lambda scale, fell: jnp.clip(scale * jnp.where(fell, grow, shrink), floor, 1)


def start(dtype: Any) -> Progress:
    """Nothing seen yet."""
    number = lambda value: jnp.array(value, dtype)
    largest = jnp.finfo(dtype).max
    return Progress(
        scale=number(1),
        window_sum=number(0),
        window_spread=number(0),
        window_count=number(0),
        window_peak=number(-largest),
        window_mean=number(largest),
        deviation=number(0),
        predicted=number(largest),
        agreed=number(0),
    )


def unpack(scale: jax.Array, window: jax.Array) -> Progress:
    """From the fields of the optimizer's state: an array there costs about a microsecond a step."""
    return Progress(scale, *window)


def pack(progress: Progress) -> dict[str, jax.Array]:
    """The fields of the optimizer's state."""
    return {"scale": progress.scale, "window": jnp.stack(progress[1:])}


def observe(progress: Progress, value: Any, rule: ScaleRule) -> Progress:
    """Adds the loss of a step to the open window, and shrinks the scale at once if it is a spike that rises."""
    dtype = progress.scale.dtype
    value = jnp.asarray(value).astype(dtype)
    top = jnp.finfo(dtype).max * 2.0**-40  # sums of many stay finite
    value = jnp.where(jnp.isfinite(value), jnp.clip(value, -top, top), value)
    known = progress.deviation > 0
    limit = progress.window_mean + SPIKE * progress.deviation
    finite = jnp.isfinite(value)
    spike = ~finite | (known & (value > limit))
    counts = finite | known
    height = jnp.where(finite, value, jnp.finfo(dtype).max)
    rises = spike & (height > progress.window_peak)
    value = jnp.where(spike, limit, value)
    distance = jnp.abs(value - progress.window_mean)
    add = lambda total, x: total + jnp.where(counts, x, 0)
    return progress._replace(
        scale=jnp.where(rises, rule(progress.scale, False), progress.scale).astype(dtype),
        window_sum=add(progress.window_sum, value),
        window_spread=add(progress.window_spread, jnp.where(_any_closed(progress), distance, 0)),
        window_count=progress.window_count + counts.astype(dtype),
        window_peak=jnp.where(rises, height, progress.window_peak),
    )


def close_window(progress: Progress, rule: ScaleRule) -> Progress:
    """Compares the open window's mean with the last one's and starts anew, once it has a few values."""
    due = progress.window_count >= LEAST_WINDOW
    count = jnp.maximum(progress.window_count, 1)
    mean = progress.window_sum / count
    closed = progress._replace(
        scale=rule(progress.scale, mean <= progress.window_mean).astype(mean.dtype),
        window_sum=jnp.zeros_like(mean),
        window_spread=jnp.zeros_like(mean),
        window_count=jnp.zeros_like(progress.window_count),
        window_peak=jnp.full_like(mean, -jnp.finfo(mean.dtype).max),
        window_mean=mean,
        deviation=progress.window_spread / count,
    )
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), closed, progress)


def judge_refresh(progress: Progress, loss: Any, rule: ScaleRule) -> Progress:
    """As :func:`close_window` where no values are given: compares a refresh's loss with an average of those before."""
    mean = progress.window_mean
    average = jnp.where(_any_closed(progress), mean + 0.3 * (loss - mean), loss)
    return progress._replace(
        scale=rule(progress.scale, loss <= mean).astype(mean.dtype),
        window_mean=jnp.where(jnp.isfinite(average), average, mean).astype(mean.dtype),
    )


def predict(progress: Progress, loss_after: jax.Array) -> Progress:
    """Keeps the loss that a refresh found after its step, if it is finite, for :func:`compare`."""
    none = jnp.finfo(progress.predicted.dtype).max
    loss_after = loss_after.astype(progress.predicted.dtype)
    return progress._replace(predicted=jnp.where(jnp.isfinite(loss_after), loss_after, none))


def compare(progress: Progress, value: Any, loss: jax.Array) -> Progress:
    """Compares the loss of a step with the one predicted, if the step before was a refresh, which had ``loss``.

    They agree within a hundredth of the decrease between the two; where that is within rounding, nothing is learnt.
    """
    predicted, agreed = progress.predicted, progress.agreed
    value = jnp.asarray(value)
    # A loss in half precision is rounded there.
    kinds = [x.dtype for x in (value, predicted) if jnp.issubdtype(x.dtype, jnp.floating)]
    eps = max(float(jnp.finfo(kind).eps) for kind in kinds)
    none = jnp.finfo(predicted.dtype).max
    allowed = AGREEMENT * jnp.abs(loss - predicted)
    reliable = (predicted < none) & (allowed > 4 * eps * jnp.abs(loss))
    agrees = jnp.abs(value.astype(predicted.dtype) - predicted) <= allowed
    seen = jnp.where(agrees, jnp.minimum(agreed + 1, 4), jnp.maximum(agreed - 2, 0))
    return progress._replace(predicted=jnp.full_like(predicted, none), agreed=jnp.where(reliable, seen, agreed))


def noiseless(agreed: jax.Array) -> jax.Array:
    """Whether the losses agreed with those predicted, twice at least and lately."""
    return agreed >= 2


def _any_closed(progress):
    return progress.window_mean < jnp.finfo(progress.window_mean.dtype).max
