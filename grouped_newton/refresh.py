"""A refresh: a summary along the direction, and what becomes of the rates by it.

summary   of the loss on this step's batch                                   derivatives
learn     the summary joins the average, without what isn't finite           memory, fallbacks
solve     the rate rule; where it finds nothing, the edge rule                rates
level     after the first steps, the size of the rates by the average params  annealing
accept    finite rates take the place of those before                        fallbacks
try       the loss at the new rates gives the next damping                    damping
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grouped_newton import annealing, fallbacks, sharding, trees
from grouped_newton import memory as _memory
from grouped_newton.cubic import CubicStatus
from grouped_newton.damping import AdaptiveDamping, model_error
from grouped_newton.derivatives.rewrites import canonical_where_needed
from grouped_newton.derivatives.summary import Summary, summary_of
from grouped_newton.groups import Partition
from grouped_newton.numerics import all_finite, all_zero, computed_once, total
from grouped_newton.rates import EdgeRates, RateRule, edge_rates


class GroupedNewtonState(NamedTuple):
    """State of :func:`scale_by_grouped_newton`; everything in it is finite.

    Attributes:
      count: steps taken, int32 ().
      rates: what the last update multiplied each group of the direction by, (S,): eta without its negative
        numbers, times ``caution``. A learning rate that follows comes on top.
      caution: factor on all rates, 1 but after a spike in the loss, ().
      losses: mean and deviation of the steps' losses, where they are given, (2,).
      direction: where summaries are delayed, the last step's direction, like the params.
      origin: where summaries are delayed, the params where that step began.
      next_refresh: the step at which the next refresh is due, int32 ().
      last_refresh: the step of the last one, int32 ().
      eta: the rates of the last refresh, unclipped, before caution and the learning rate, (S,).
      damping: the internal damping, of the last refresh or, where it adapts, for
        the next one, ().
      model_error: quotient of the last refresh where the damping adapts, see
        ``adaptive_damping``; 0 otherwise and where it isn't reliable, ().
      summary: running average of the summaries, its loss the latest, its third that of their sizes.
      recent: size of hbar_ss, of about the last five summaries, (S,).
      progress: slope and curvature from the averaged params to the params, zeros
        where no average is given, (2,).
      known: whether slope and curvature of each group have been finite, and whether its third
        derivative has; the averages hold zeros of others, bool (2, S).
      replaced: the groups whose rate isn't the rule's, for want of finite numbers or of a minimiser, bool (S,).
      status: outcome of the last refresh, int32 (), names in ``CubicStatus``.
      refreshes: summaries in the average, int32 ().
      rejected: refreshes without rates of the rule's, for want of finite numbers or of a
        minimiser: those before stayed, or were replaced, int32 ().
      uphill: refreshes whose direction pointed uphill, sum(gbar) < 0, int32 ().
      start: root of the mean square of each group at ``init``, (S,).
    """

    # Of every step.
    count: jax.Array  # type: ignore[assignment]  # a tuple's own count() is not needed
    rates: jax.Array
    caution: jax.Array
    losses: jax.Array
    direction: Any
    origin: Any
    # Of a refresh.
    next_refresh: jax.Array
    last_refresh: jax.Array
    eta: jax.Array
    damping: jax.Array
    model_error: jax.Array
    summary: Summary
    recent: jax.Array
    progress: jax.Array
    known: jax.Array
    replaced: jax.Array
    status: jax.Array
    refreshes: jax.Array
    rejected: jax.Array
    uphill: jax.Array
    # Of the start.
    start: jax.Array


class Settings(NamedTuple):
    """What the transform was made with, as far as a refresh needs it."""

    rates: RateRule
    damping: Any  # a number, a schedule of the step, or an AdaptiveDamping
    next_refresh: Callable[[jax.Array], jax.Array]  # from the step of a refresh
    summary_memory: Any
    delayed: bool
    nonnegative: bool
    axis_name: Any
    options: dict  # of the summary

    @property
    def adaptive(self) -> AdaptiveDamping | None:
        return self.damping if isinstance(self.damping, AdaptiveDamping) else None

    def damping_of(self, state: GroupedNewtonState) -> Any:
        if self.adaptive:
            return state.damping
        return self.damping(state.count) if callable(self.damping) else self.damping

    def clipped(self, eta: jax.Array) -> jax.Array:
        return jnp.maximum(eta, 0) if self.nonnegative else eta


class Observation(NamedTuple):
    """What one summary says, and what the average then is."""

    summary: Summary  # without gaps
    slope: jax.Array  # as it came, (S,)
    usable: jax.Array  # whether there is anything finite in it, ()
    whole: jax.Array  # whether all of it was finite, ()
    known: jax.Array  # as in the state, (2, S)


class Proposal(NamedTuple):
    """Rates, before they are accepted."""

    eta: jax.Array  # (S,)
    found: jax.Array  # whether these are rates at all, ()
    out: jax.Array  # groups that the rule says nothing of, (S,)
    status: jax.Array
    settled: jax.Array  # whether they have been levelled, ()


def refresh(
    settings: Settings,
    partition: Partition,
    loss_fn: Callable[[Any], jax.Array],
    state: GroupedNewtonState,
    updates: Any,
    params: Any,
    averaged_params: Any,
) -> GroupedNewtonState:
    """The state after a refresh, without its copies of direction and params."""
    run = canonical_where_needed(lambda: loss_fn(params))
    loss_at = lambda x: sharding.mean(run(lambda: loss_fn(x)), settings.axis_name)
    first = state.count == 0
    u, theta = updates, params
    if settings.delayed:
        u = trees.either(partition, first, updates, state.direction)
        theta = trees.either(partition, first, params, state.origin)
    state = state._replace(direction=None, origin=None)
    of_loss = lambda: summary_of(
        loss_fn, theta, u, partition, axis_name=settings.axis_name, forgiving=True, **settings.options
    )
    summary = computed_once(run(of_loss))
    levelled = averaged_params is not None
    if levelled:
        halfway = trees.halfway(partition, averaged_params, params)
        progress = annealing.measure(loss_at(averaged_params), loss_at(halfway), loss_at(params))
        progress = annealing.remember(state.progress, progress, state.refreshes + 1)
        state = state._replace(progress=progress)
    sizes = [trees.root_mean_squares(partition, x, state.eta.dtype, settings.axis_name) for x in (theta, u)]
    own = first & settings.delayed
    state, summary = computed_once(_renewed(settings, state, summary, own, levelled, sizes))
    if levelled:
        eta = annealing.trusted(state.eta, sizes[0], state.start, sizes[1])
        state = state._replace(eta=computed_once(eta))
    later = jnp.asarray(settings.next_refresh(state.count), jnp.int32)
    # Without any rate of the rule's, seldom, so that a loss that gives none isn't slow for ever.
    soon = jnp.where(_all_replaced(state), state.count // 10, 0)
    again = (state.status == CubicStatus.NOT_FINITE) | _all_replaced(state)
    if settings.adaptive:
        eta = settings.clipped(state.eta)
        moved = trees.subtract(partition, theta, partition.scale(eta, u))
        state, gross = _tried(settings.adaptive, state, summary, eta, loss_at(moved))
        again |= gross
    return state._replace(
        next_refresh=jnp.where(again, jnp.minimum(later, state.count + 1 + soon), later),
        last_refresh=state.count,
        caution=jnp.minimum(2 * state.caution, 1),
    )


def _renewed(settings, state, summary, own, levelled, sizes):
    """The state with the rates that follow from a summary, and the summary without gaps.

    A summary of the direction's own batch is used, and forgotten at the next. Where rates are ``levelled``, only the
    first are the rule's. ``sizes`` are those of params and direction, of which rates are made that no rule gives.
    """
    damping = jnp.asarray(settings.damping_of(state)).astype(state.eta.dtype)
    state, seen = _learned(state, summary, damping, settings.summary_memory, own)
    average, out = fallbacks.for_the_rule(state.summary, seen.known)
    proposal = _solved(settings.rates, state, average, damping, out)
    if levelled:
        proposal = _levelled(state, average, proposal)
    return _accepted(state, seen, proposal, damping, sizes), seen.summary


def _learned(state, summary, damping, share, own):
    before = _memory.Memory(state.summary, state.recent)
    summary = jax.tree.map(lambda x, old: x.astype(old.dtype), summary, before.average)
    slope, fine = summary.gbar, fallbacks.fine_groups(summary)
    usable = all_finite(summary.loss, damping) & (jnp.any(fine) if fine.size else True)
    whole = usable & all_finite(*summary)
    complete, summary, known = fallbacks.complete(before, state.known, summary)
    of_fine = lambda x: jnp.where(fine, x, 0)
    learnt = usable & ~(all_zero(of_fine(summary.gbar)) & all_zero(of_fine(jnp.diag(summary.hbar))))
    count = state.refreshes + 1
    memory = _memory.remember(complete, summary, count, share, state.eta)
    memory = computed_once(jax.tree.map(lambda new, old: jnp.where(learnt, new, old), memory, before))
    seen = Observation(summary, slope, usable, whole, jnp.where(usable, known, state.known))
    state = state._replace(
        summary=memory.average,
        recent=memory.recent,
        known=jnp.where(learnt, known, state.known),  # a zero direction tells nothing
        refreshes=jnp.where(learnt & ~own, count, state.refreshes),
        uphill=state.uphill + (usable & (total(of_fine(summary.gbar)) < 0)).astype(jnp.int32),
    )
    return state, seen


def _solved(rule, state, average, damping, out):
    """What the rule proposes; the edge rule where there are no other rates and the rule finds no minimiser."""
    falls_back = all_zero(state.eta) | _all_replaced(state) | jnp.any(state.replaced)
    unbounded = fallbacks.unbounded(average, damping) & falls_back
    bounded, bounded_out = computed_once((fallbacks.without(average, unbounded), out | unbounded))

    def outcome(solution):
        return jnp.asarray(solution.eta).astype(state.eta.dtype), solution.status < CubicStatus.UNBOUNDED

    if isinstance(rule, EdgeRates):
        solution, out = computed_once(rule(bounded, damping)), bounded_out
        eta, found = outcome(solution)
        status = jnp.where(found & jnp.any(unbounded), CubicStatus.UNBOUNDED, solution.status)
    else:
        solution = computed_once(rule(average, damping))
        eta, found = outcome(solution)
        status = solution.status
        by_edge = lambda: (*outcome(edge_rates()(bounded, damping)), bounded_out)
        eta, found, out = lax.cond(falls_back & (status == CubicStatus.UNBOUNDED), by_edge, lambda: (eta, found, out))
    found &= ~jnp.all(out) if out.size else True
    return Proposal(eta, found, out, status, jnp.zeros((), bool))


def _levelled(state, average, proposal):
    """Present rates, all longer or shorter, and the rule's for groups that had none."""
    steps = state.count - state.last_refresh
    growth = annealing.growth(state.summary, state.eta, state.progress, steps, state.count)
    settled = (state.count >= annealing.START) & (state.progress[1] > 0) & ~all_zero(state.eta)
    by_rule = jnp.where(proposal.found & ~proposal.out, proposal.eta, 0)
    level, out = fallbacks.revived(state.eta, state.replaced, by_rule, average.gbar)
    return proposal._replace(
        eta=jnp.where(settled, growth * level, proposal.eta),
        found=proposal.found | settled,
        out=jnp.where(settled, out, proposal.out),
        settled=settled,
    )


def _accepted(state, seen, proposal, damping, sizes):
    """The state with the proposed rates, or with those before; with rates by their steps' lengths for the rest."""
    out, status, settled = proposal.out, proposal.status, proposal.settled
    without_rates = all_zero(state.eta) | _all_replaced(state)
    accepted = seen.usable & proposal.found & all_finite(proposal.eta)
    replaced = jnp.where(accepted, out, state.replaced | without_rates)
    eta = jnp.where(accepted, proposal.eta, state.eta)
    stood_in = fallbacks.rates(eta, replaced, seen.slope, sizes[0], state.start, sizes[1])
    eta = jnp.where((accepted & ~settled) | (~accepted & without_rates), stood_in, eta)
    partly = (status < CubicStatus.UNBOUNDED) & (~seen.whole | jnp.any(out))
    status = jnp.where(seen.usable, jnp.where(partly, CubicStatus.PARTLY_FINITE, status), CubicStatus.NOT_FINITE)
    return state._replace(
        eta=eta,
        damping=jnp.where(jnp.isfinite(damping), damping, state.damping),
        replaced=replaced,
        status=status.astype(jnp.int32),
        rejected=state.rejected + (~accepted).astype(jnp.int32),
    )


def _tried(adaptive, state, summary, eta, loss_after):
    """The state with the damping that the loss at the new rates calls for; and whether the model is grossly off."""
    error = model_error(summary, eta, loss_after)
    judged = state.status != CubicStatus.NOT_FINITE  # without a finite summary nothing is known of the rates
    error = error._replace(reliable=error.reliable & judged, gross=error.gross & judged)
    state = state._replace(
        eta=jnp.where(error.gross, state.eta / 2, state.eta),
        damping=adaptive.update(state.damping, error).astype(state.eta.dtype),
        model_error=jnp.where(error.reliable, error.quotient, 0),
    )
    return state, error.gross


def _all_replaced(state):
    """Whether there are rates, and none is the rule's."""
    return ~all_zero(state.eta) & all_zero(jnp.where(state.replaced, 0, state.eta))
