"""What stands in for numbers of a summary that aren't finite, and for rates that no rule gives.

  fine (S,)      whether a group's slope and curvature, gbar_s and hbar_ss, are finite in this summary
  known (2, S)   whether these have been finite before, and whether third_s has
  out (S,)       the groups that the rate rule knows nothing of

*The rule.* A summary whose loss isn't finite, or without any fine group, is left out: the rates stay. Of any other,
what is finite is used. A group that isn't fine stays as the average has it; a third derivative too, in the units of
the present curvature. One that has never been finite counts as hbar_ss^2 / |gbar_s|, with which the curvature changes
by itself along the group's own Newton step. A coupling counts as zero until it is finite. A group that has never been
fine is out, and while there are no rates that the rule gave to all, so is one that neither curvature nor third
derivative bounds. The rule sees zeros there, and these groups move, while their slope is positive or unknown, by
``SHARE`` of the root mean square of their own numbers, now or at the start, a group of zeros (less than ``SMALL`` of
the largest) as the least of the others, or by ``FIRST`` if all are zero; and no further than the others, whose rates
are the rule's, do on average. So nothing stands still while directions are finite and lead downhill. All of it is
equivariant: scaling the direction of a group changes no step.

*Before it*, a summary for training leaves out what it can, so that one bad number doesn't spoil its group, with one
group everything (``derivatives/rules.py``): what doesn't move, such as unused rows of a table whose norms are
penalised, has no derivative along the direction; a local second derivative that is NaN counts as zero, and makes the
third of all groups upstream not finite.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.summary import Summary
from grouped_newton.memory import Memory
from grouped_newton.numerics import folded, norm, total

SHARE = 2.0**-7
FIRST = 2.0**-10
SMALL = 1e-3


def fine_groups(summary: Summary) -> jax.Array:
    """Whether slope and curvature of each group are finite, (S,)."""
    return jnp.isfinite(summary.gbar) & jnp.isfinite(jnp.diag(summary.hbar))


def complete(memory: Memory, known: jax.Array, new: Summary) -> tuple[Memory, Summary, jax.Array]:
    """Memory and summary without gaps: what is missing in one is as in the other, zero where it is in both.

    Args:
      memory: of the summaries before.
      known: what has been finite in them, (2, S).
      new: a summary, of which anything may not be finite.

    Returns:
      Memory, summary, with |third|, and what has been finite in any.
    """
    known_fine, known_third = known
    fine = fine_groups(new)
    fine_third = fine & jnp.isfinite(new.third)
    pairs = lambda x: x[:, None] & x[None]
    fine_pairs = pairs(fine) & jnp.isfinite(new.hbar)
    before = memory.average
    # The length of a direction may have changed since, and curvature is its square.
    diagonal = jnp.diag(before.hbar)
    now = jnp.where(fine, jnp.diag(new.hbar), diagonal)
    scale = jnp.sqrt(jnp.abs(now) / jnp.where(diagonal == 0, 1, jnp.abs(diagonal)))
    scale = jnp.where((diagonal == 0) | ~jnp.isfinite(scale), 1, scale)
    summary = Summary(
        loss=jnp.where(jnp.isfinite(new.loss), new.loss, before.loss),
        gbar=jnp.where(fine, new.gbar, before.gbar),
        hbar=jnp.where(fine_pairs, new.hbar, before.hbar * scale[:, None] * scale[None]),
        third=jnp.where(fine_third, jnp.abs(new.third), before.third * scale * scale * scale),
    )
    average = Summary(
        loss=before.loss,
        gbar=jnp.where(known_fine, before.gbar, summary.gbar),
        hbar=jnp.where(pairs(known_fine), before.hbar, summary.hbar),
        third=jnp.where(known_third, before.third, summary.third),
    )
    memory = Memory(average, jnp.where(known_fine, memory.recent, jnp.abs(now)))
    return memory, summary, known | jnp.stack([fine, fine_third])


def for_the_rule(average: Summary, known: jax.Array) -> tuple[Summary, jax.Array]:
    """The average with third derivatives that were never finite filled in, and which groups are out of it."""
    known_fine, known_third = known
    g, h = jnp.abs(average.gbar), jnp.abs(jnp.diag(average.hbar))
    steady = h * (h / jnp.where(g == 0, 1, g))
    out = ~known_fine | (~known_third & ((g == 0) | (h == 0) | ~jnp.isfinite(steady)))
    filled = average._replace(third=jnp.where(known_third, average.third, steady))
    return without(filled, out), out


def without(summary: Summary, out: jax.Array) -> Summary:
    """The summary with zeros for the groups that are out."""
    return Summary(
        summary.loss,
        jnp.where(out, 0, summary.gbar),
        jnp.where(out[:, None] | out[None], 0, summary.hbar),
        jnp.where(out, 0, summary.third),
    )


def unbounded(summary: Summary, damping: jax.Array) -> jax.Array:
    """The groups that neither curvature nor third derivative bounds, (S,)."""
    undamped = damping / 2 < jnp.finfo(damping.dtype).tiny
    return (jnp.diag(summary.hbar) <= 0) & ((summary.third == 0) | undamped) & (summary.gbar != 0)


def rates(eta: jax.Array, out: jax.Array, slope: jax.Array, params: Any, start: Any, direction: Any) -> jax.Array:
    """The rates, those of groups that are out by the length of their steps, see the head of the module.

    Args:
      eta: the rates, (S,).
      out: the groups whose rate isn't the rule's, (S,).
      slope: of this summary; may not be finite, (S,).
      params: root of the mean square of each group, (S,).
      start: the same at ``init``, (S,).
      direction: the same of the direction, (S,).
    """
    own = SHARE * jnp.maximum(params, start)
    own = jnp.where(jnp.isfinite(own), own, 0)
    large = (own > 0) & (own >= SMALL * folded(jnp.maximum, own, 0))
    least = folded(jnp.minimum, jnp.where(large, own, jnp.inf), jnp.inf)
    length = jnp.where(large, own, jnp.where(jnp.isfinite(least), least, FIRST))
    has_length = (direction > 0) & jnp.isfinite(direction)
    moving = ~out & (eta > 0) & has_length
    count = total(moving.astype(eta.dtype))
    usual = norm(jnp.where(moving, eta * jnp.where(has_length, direction, 0), 0)) / jnp.sqrt(jnp.maximum(count, 1))
    length = jnp.where(count > 0, jnp.minimum(length, usual), length)
    downhill = ~jnp.isfinite(slope) | (slope > 0)
    rate = jnp.where(has_length & downhill, length / jnp.where(has_length, direction, 1), 0)
    return jnp.where(out, rate, eta).astype(eta.dtype)


def revived(eta: jax.Array, out: jax.Array, by_rule: jax.Array, gbar: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Present rates, with those that are zero or stood in for by the rule, once it gives one; and which are still out.

    The rule's are brought to the level of the present ones: to where they promise as much for groups that have both.
    """
    both = ~out & (eta > 0) & (by_rule > 0)
    promise = lambda x: total(jnp.where(both, jnp.abs(gbar) * x, 0))
    now, then = promise(eta), promise(by_rule)
    level = jnp.minimum(now / jnp.where(then > 0, then, 1), 1)
    back = (out | (eta == 0)) & (by_rule > 0) & (level > 0)
    return jnp.where(back, level * by_rule, eta), out & ~back
