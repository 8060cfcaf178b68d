"""The optax transform: state and glue. No formula lives here."""

import contextlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import annealing, fallbacks, sharding, spikes, trees
from grouped_newton import groups as _groups
from grouped_newton import memory as _memory
from grouped_newton import rates as _rates
from grouped_newton.cubic import CubicStatus
from grouped_newton.damping import AdaptiveDamping, model_error
from grouped_newton.derivatives.rewrites import caller
from grouped_newton.derivatives.summary import check_options, one_number, summarize, summary_dtype
from grouped_newton.numerics import all_finite, total, zero_nonfinite

_LEAST_CAUTION = 2.0**-10


class GroupedNewtonState(NamedTuple):
    """State of :func:`scale_by_grouped_newton`; everything in it is finite.

    Attributes:
      count: steps taken, int32 ().
      next_refresh: the step at which the next refresh is due, int32 ().
      last_refresh: the step of the last one, int32 ().
      eta: the rates, unclipped, before caution and the learning rate, (S,).
      caution: factor on all rates, 1 but after a spike in the loss, ().
      damping: the internal damping, of the last refresh or, where it adapts, for
        the next one, ().
      model_error: quotient of the last refresh where the damping adapts, see
        ``adaptive_damping``; 0 otherwise and where it isn't reliable, ().
      loss: the loss at the last refresh, ().
      gbar: running average of the summaries' slopes, (S,).
      hbar: of their curvatures, (S, S).
      third: of the size of their third derivatives, (S,).
      recent: size of hbar_ss, of about the last five summaries, (S,).
      progress: slope and curvature from the averaged params to the params, zeros
        where no average is given, (2,).
      start: root of the mean square of each group at ``init``, (S,).
      losses: mean and deviation of the steps' losses, where they are given, (2,).
      known: whether slope and curvature of each group have been finite, and whether its third
        derivative has; the averages hold zeros of others, bool (2, S).
      replaced: the groups whose rate isn't the rule's, for want of finite numbers or of a minimiser, bool (S,).
      status: outcome of the last refresh, int32 (), names in ``CubicStatus``.
      refreshes: summaries in the average, int32 ().
      rejected: refreshes without rates of the rule's, for want of finite numbers or of a
        minimiser: those before stayed, or were replaced, int32 ().
      uphill: refreshes whose direction pointed uphill, sum(gbar) < 0, int32 ().
      direction: where summaries are delayed, the last step's direction, like the params.
      origin: where summaries are delayed, the params where that step began.
    """

    count: jax.Array
    next_refresh: jax.Array
    last_refresh: jax.Array
    eta: jax.Array
    caution: jax.Array
    damping: jax.Array
    model_error: jax.Array
    loss: jax.Array
    gbar: jax.Array
    hbar: jax.Array
    third: jax.Array
    recent: jax.Array
    progress: jax.Array
    start: jax.Array
    losses: jax.Array
    known: jax.Array
    replaced: jax.Array
    status: jax.Array
    refreshes: jax.Array
    rejected: jax.Array
    uphill: jax.Array
    direction: Any
    origin: Any


def scale_by_grouped_newton(
    groups: _groups.Grouping = _groups.per_tensor,
    *,
    internal_damping: float | Callable[[jax.Array], Any] | AdaptiveDamping = 1.0,
    refresh_every: int | Callable[[jax.Array], Any] = 10,
    rates: _rates.RateRule = _rates.cubic_rates(),
    summary_memory: float = 0.0,
    delayed: bool = False,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each group of the incoming direction by its own Newton rate.

    The updates u that come in are a direction, not negated: the gradient, or
    what ``optax.scale_by_adam`` makes of it. What goes out is, on group s::

      max(eta_s, 0) u_s,   eta = rates(average of the summaries along u, lambda)

    Every ``refresh_every`` steps, the first included, a summary is taken and eta renewed; in
    between nothing but the product is computed. The defaults are the paper's;
    :func:`grouped_newton` is the optimizer with the defaults that train best.

    *Whose batch.* A direction has seen the batch that its gradient is of: along it that batch's
    slope is larger than any other's, and rates come out too large. Either pass another batch in
    ``value_fn``, as the paper does, or set ``delayed``: a summary is then that of the *last* step's
    direction, from where that step began, on this step's batch, which is new to both. That costs a
    copy of the direction and one of the params in the state; frozen leaves cost nothing. The first
    summary of all, which has no step before it, is of the first direction itself, and the second
    takes its place.

    *Without a minimiser, or without finite numbers.* A refresh without minimiser leaves the rates as they
    are; before there are any, the edge rule steps in. A loss that isn't finite, or no finite slope and
    curvature at all, leaves them too, and the next step refreshes. Of other summaries what is finite is
    used: a group whose slope or curvature isn't, stays as the average has it, and a third derivative that
    never was is taken as that with which the curvature changes by itself along the group's own Newton
    step. A group about which nothing has ever been finite, or that nothing bounds while there are no other
    rates, moves by 1/128 of its own length, and in the root of the mean square no further than the others
    do; a group of zeros as the least of the others, or, if all are zero, by 1/1024. ``replaced`` in the state
    names these groups and ``status`` is ``PARTLY_FINITE`` where something was replaced. So the first
    step moves already, whatever the loss is, unless the direction is zero, not finite, or leads uphill.
    Numbers of the direction that aren't finite make no step. While all rates are zero every step refreshes.

    ``update`` takes ``params`` and ``value_fn``, a function from params to one real number. Extra
    arguments named in its signature are passed to it, others are ignored. Close over the batch
    inside the jitted step. Two more arguments are optional: with ``value``, the loss of each step, and
    an adaptive damping, a loss far above those before halves the rates at once and makes the next step
    refresh them; with ``averaged_params``, the average that :func:`average_params` keeps, only the first rates are the
    rule's: later their ratios stay, and their size follows what that average gains by them, see
    :mod:`grouped_newton.annealing`. That evaluates the loss three times more per refresh.

    Args:
      groups: a grouping, see :mod:`grouped_newton.groups`; per tensor by default.
      internal_damping: lambda >= 0, without unit, a schedule of the step, or
        :func:`adaptive_damping`, which evaluates the loss once more per refresh, and
        halves rates that are grossly too large.
      refresh_every: steps between two summaries, at least 1, or a schedule of the
        step such as :func:`growing_period`.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_memory: share in [0, 1] of the refreshes so far that summaries are averaged over,
        and at least ten, see :mod:`grouped_newton.memory`. 0 uses the latest summary alone.
      delayed: whether a summary is of the last step's direction, see above. The rates are then those of
        the step before: for a direction whose length doesn't depend on the gradient's, such as Adam's.
      nonnegative: whether negative rates are clipped to 0 when used.
      method: how the summary is computed, see :func:`summarize`.
      max_stack: bounds the memory of a refresh, see :func:`summarize`.
      axis_name: the axis or axes of ``shard_map`` or ``pmap`` over whose devices
        losses and summary are averaged, see :func:`summarize`. The gradient must
        be averaged already.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: if an argument is out of range, the grouping doesn't fit the
        params, or ``update`` lacks ``params`` or ``value_fn``.
      TypeError: if a labelled parameter isn't real floating-point, ``rates`` or
        ``value_fn`` isn't callable, or ``value_fn`` doesn't return one number.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import grouped_newton as gn
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 50 * p["b"] ** 2
      >>> params = {"a": jnp.ones(3), "b": jnp.array(1.0)}
      >>> tx = optax.chain(gn.scale_by_grouped_newton(), optax.scale_by_learning_rate(1.0))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      >>> optax.apply_updates(params, updates)["a"].tolist()
      [0.0, 0.0, 0.0]

    References:
      Pierre Wolinski, Adapting Newton's Method to Neural Networks through a Summary
      of Higher-Order Derivatives, arXiv 2312.03885.
    """
    _check_arguments(internal_damping, refresh_every, rates, summary_memory)
    check_options(method, 3, max_stack)
    adaptive = internal_damping if isinstance(internal_damping, AdaptiveDamping) else None
    options = {"method": method, "max_stack": max_stack, "axis_name": axis_name}

    def damping_at(state):
        if adaptive:
            return state.damping
        return internal_damping(state.count) if callable(internal_damping) else internal_damping

    def refresh_after(count):
        if callable(refresh_every):
            return count + jnp.maximum(refresh_every(count), 1).astype(jnp.int32)
        return (count // refresh_every + 1) * refresh_every

    def used(eta):
        return jnp.maximum(eta, 0) if nonnegative else eta

    def init(params):
        partition = resolve_groups(groups, params)
        dtype = summary_dtype(params, partition)
        integer = lambda value: jnp.array(value, jnp.int32)
        kept = lambda make: trees.copies(partition, params, make) if delayed else None
        # No two fields share a buffer, so that the state can be donated.
        return GroupedNewtonState(
            count=integer(0),
            next_refresh=integer(0),
            last_refresh=integer(0),
            eta=jnp.zeros(partition.num_groups, dtype),
            caution=jnp.ones((), dtype),
            damping=jnp.array(adaptive.initial if adaptive else 0.0, dtype),
            model_error=jnp.zeros((), dtype),
            **_memory.empty(partition.num_groups, dtype)._asdict(),
            progress=jnp.zeros(2, dtype),
            start=trees.root_mean_squares(partition, params, dtype),
            losses=jnp.zeros(2, dtype),
            known=jnp.zeros((2, partition.num_groups), bool),
            replaced=jnp.zeros(partition.num_groups, bool),
            status=integer(CubicStatus.SOLVED),
            refreshes=integer(0),
            rejected=integer(0),
            uphill=integer(0),
            direction=kept(jnp.zeros_like),
            origin=kept(jnp.copy),
        )

    def update(updates, state, params=None, *, value_fn=None, averaged_params=None, **extra_args):
        check_update_arguments(params, value_fn)
        partition = resolve_groups(groups, params)
        if state.eta.shape != (partition.num_groups,):
            raise ValueError(
                f"the state has {state.eta.shape[0]} rates and the grouping makes {partition.num_groups} groups of"
                " these params; call init with the params and grouping that are used in update"
            )
        loss_fn = _with_arguments(value_fn, extra_args)
        value = extra_args.get("value")
        if value is not None:
            value = one_number("value must be", value, "tx.update(..., value=value[0])")
        if not adaptive:
            value = None
        if value is not None:
            value = sharding.mean(value, axis_name)
            losses, spike = spikes.observe(state.losses, value, state.count)
            # After ten in a row that aren't finite they tell nothing, and gradients may be fine.
            mute = spike & ~jnp.isfinite(value) & (state.caution <= _LEAST_CAUTION)
            spike &= ~mute
            state = state._replace(losses=jnp.where(mute, 0, losses))

        def refresh(state):
            call = caller(lambda: loss_fn(params))
            loss_at = lambda x: sharding.mean(call(lambda: loss_fn(x)), axis_name)
            first = state.count == 0
            u, theta = updates, params
            if delayed:
                u = trees.either(partition, first, updates, state.direction)
                theta = trees.either(partition, first, params, state.origin)
            summary = _settled(call(lambda: summarize(loss_fn, theta, u, _grouping(groups, params), **options)))
            levelled = averaged_params is not None
            if levelled:
                halfway = trees.halfway(partition, averaged_params, params)
                progress = annealing.measure(loss_at(averaged_params), loss_at(halfway), loss_at(params))
                progress = annealing.remember(state.progress, progress, state.refreshes + 1)
                state = state._replace(progress=progress)
            lengths = [trees.root_mean_squares(partition, x, state.eta.dtype, axis_name) for x in (theta, u)]
            state = state._replace(direction=None, origin=None)
            state, summary = _settled(
                _refreshed(state, summary, damping_at(state), rates, summary_memory, first & delayed, levelled, lengths)
            )
            if levelled:
                eta = annealing.trusted(state.eta, lengths[0], state.start, lengths[1])
                state = state._replace(eta=_settled(eta))
            later = jnp.asarray(refresh_after(state.count), jnp.int32)
            # Without any rate of the rule's, seldom, so that a loss that gives none isn't slow for ever.
            soon = jnp.where(_all_replaced(state), state.count // 10, 0)
            again = (state.status == CubicStatus.NOT_FINITE) | _all_replaced(state)
            if adaptive:
                moved = trees.subtract(partition, theta, partition.scale(used(state.eta), u))
                error = model_error(summary, used(state.eta), loss_at(moved))
                # Without a finite summary nothing is known of the rates.
                judged = state.status != CubicStatus.NOT_FINITE
                error = error._replace(reliable=error.reliable & judged, gross=error.gross & judged)
                again |= error.gross
                state = state._replace(
                    eta=jnp.where(error.gross, state.eta / 2, state.eta),
                    damping=adaptive.update(state.damping, error).astype(state.eta.dtype),
                    model_error=jnp.where(error.reliable, error.quotient, 0),
                )
            return state._replace(
                next_refresh=jnp.where(again, jnp.minimum(later, state.count + 1 + soon), later),
                last_refresh=state.count,
                caution=jnp.minimum(2 * state.caution, 1),
            )

        due = (state.count >= state.next_refresh) | _all_zero(state.eta)
        arrays, copies = state._replace(direction=None, origin=None), (state.direction, state.origin)
        arrays = lax.cond(due, lambda: refresh(state)._replace(direction=None, origin=None), lambda: arrays)
        if value is not None:
            arrays = arrays._replace(
                caution=jnp.where(spike, jnp.maximum(state.caution / 2, _LEAST_CAUTION), arrays.caution),
                next_refresh=jnp.where(spike, arrays.count + 1, arrays.next_refresh),
            )
        if delayed:
            copies = trees.copies(partition, updates, zero_nonfinite, params), trees.copies(partition, params, jnp.copy)
        scaled = partition.scale(arrays.caution * used(arrays.eta), updates)
        scaled = partition.map(zero_nonfinite, scaled)
        count = optax.safe_increment(state.count)
        return scaled, arrays._replace(count=count, direction=copies[0], origin=copies[1])

    return optax.GradientTransformationExtraArgs(init, update)


def _refreshed(state, summary, damping, rates, share, own, levelled, lengths):
    """The state after a summary, with counters that say what was found; and the summary without gaps.

    A summary of the direction's own batch is used, and forgotten at the next. Where rates are ``levelled``, only the
    first are the rule's. ``lengths`` are those of params and direction, of which rates are made that no rule gives.
    """
    dtype = state.eta.dtype
    damping = jnp.asarray(damping).astype(dtype)
    before = _memory.Memory(*(getattr(state, name) for name in _memory.Memory._fields))
    summary = jax.tree.map(lambda x, old: x.astype(old.dtype), summary, before.average)
    fine, slope = fallbacks.fine_groups(summary), summary.gbar
    usable = all_finite(summary.loss, damping) & (jnp.any(fine) if fine.size else True)
    whole = usable & all_finite(*summary)
    before, summary, known = fallbacks.complete(before, state.known, summary)
    own_part = lambda x: jnp.where(fine, x, 0)
    zero = _all_zero(own_part(summary.gbar)) & _all_zero(own_part(jnp.diag(summary.hbar)))
    learnt = usable & ~zero  # a zero direction tells nothing
    choose = lambda new, old: jax.tree.map(lambda x, y: jnp.where(learnt, x, y), new, old)
    count = state.refreshes + 1
    memory = _memory.remember(before, summary, count, share, state.eta)
    memory = _settled(choose(memory, _memory.Memory(*(getattr(state, name) for name in _memory.Memory._fields))))

    average, out = fallbacks.for_the_rule(memory.average, jnp.where(usable, known, state.known))
    without_rates = _all_zero(state.eta) | _all_replaced(state)
    unbounded = fallbacks.unbounded(average, damping) & (without_rates | jnp.any(state.replaced))
    bounded, bounded_out = _settled((fallbacks.without(average, unbounded), out | unbounded))
    outcome = lambda solution: (jnp.asarray(solution.eta).astype(dtype), solution.status < CubicStatus.UNBOUNDED)
    if isinstance(rates, _rates.EdgeRates):
        solution, out = _settled(rates(bounded, damping)), bounded_out
        eta, found = outcome(solution)
        solution = solution._replace(
            status=jnp.where(found & jnp.any(unbounded), CubicStatus.UNBOUNDED, solution.status)
        )
    else:
        solution = _settled(rates(average, damping))
        eta, found = outcome(solution)
        by_edge = lambda: (*outcome(_rates.edge_rates()(bounded, damping)), bounded_out)
        fall_back = (without_rates | jnp.any(state.replaced)) & (solution.status == CubicStatus.UNBOUNDED)
        eta, found, out = lax.cond(fall_back, by_edge, lambda: (eta, found, out))
    found &= ~jnp.all(out) if out.size else True
    settled = jnp.zeros((), bool)
    if levelled:
        steps = state.count - state.last_refresh
        growth = annealing.growth(memory.average, state.eta, state.progress, steps, state.count)
        settled = (state.count >= annealing.START) & (state.progress[1] > 0) & ~_all_zero(state.eta)
        by_rule = jnp.where(found & ~out, eta, 0)
        level, still_out = fallbacks.revived(state.eta, state.replaced, by_rule, average.gbar)
        eta, found = jnp.where(settled, growth * level, eta), found | settled
        out = jnp.where(settled, still_out, out)
    accepted = usable & found & all_finite(eta)
    replaced = jnp.where(accepted, out, state.replaced | without_rates)
    eta = jnp.where(accepted, eta, state.eta)
    stood_in = fallbacks.rates(eta, replaced, slope, lengths[0], state.start, lengths[1])
    eta = jnp.where((accepted & ~settled) | (~accepted & without_rates), stood_in, eta)
    partly = (solution.status < CubicStatus.UNBOUNDED) & (~whole | jnp.any(out))
    status = jnp.where(usable, jnp.where(partly, CubicStatus.PARTLY_FINITE, solution.status), CubicStatus.NOT_FINITE)
    state = state._replace(
        eta=eta,
        damping=jnp.where(jnp.isfinite(damping), damping, state.damping),
        known=jnp.where(learnt, known, state.known),
        replaced=replaced,
        status=status.astype(jnp.int32),
        refreshes=jnp.where(learnt & ~own, count, state.refreshes),
        rejected=state.rejected + (~accepted).astype(jnp.int32),
        uphill=state.uphill + (usable & (total(own_part(summary.gbar)) < 0)).astype(jnp.int32),
        **memory._asdict(),
    )
    return state, summary


def _settled(numbers):
    """The same numbers, computed here once: XLA fuses a chain of small operations into each of its readers.

    Every leaf that is scaled by a rate would compute the whole rule anew, in a kernel of its own to be compiled.
    """
    return lax.optimization_barrier(numbers)


def _all_zero(x):
    return total(jnp.abs(x)) == 0


def _all_replaced(state):
    """Whether there are rates, and none is the rule's."""
    return ~_all_zero(state.eta) & _all_zero(jnp.where(state.replaced, 0, state.eta))


def resolve_groups(groups, params):
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "some params are optax.MaskedNode: the transform is inside optax.masked or optax.partition, where"
            " value_fn can't be called. Put it outside and label the parameters that it must leave alone"
            " grouped_newton.groups.FROZEN"
        )
    with _flat_params_explained(params):
        return _groups.resolve(_grouping(groups, params), params)


def _grouping(groups, params):
    # optax.tree.map_params inits with a placeholder without leaves, which fits no label tree.
    return groups if jax.tree.leaves(params) else _groups.single


@contextlib.contextmanager
def _flat_params_explained(params):
    try:
        yield
    except Exception as error:
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)) and jnp.ndim(params) == 1:
            error.add_note(
                "The params are one vector, as they are inside optax.flatten, where neither labels nor value_fn fit."
                " Flatten the direction alone: grouped_newton(direction=optax.flatten(optax.scale_by_adam()))"
            )
        raise


def _with_arguments(value_fn, extra_args):
    """``value_fn`` with the extra arguments that its signature names after the params."""
    names = list(inspect.signature(value_fn).parameters)[1:]
    known = {name: value for name, value in extra_args.items() if name in names}

    def loss_fn(params):
        with _flat_params_explained(params):
            return value_fn(params, **known)

    return loss_fn


def check_update_arguments(params, value_fn):
    if params is None:
        raise ValueError("update needs the current params: tx.update(grads, state, params, value_fn=...)")
    if value_fn is None:
        raise ValueError(
            "update needs value_fn, a function from params to the loss: tx.update(grads, state, params,"
            " value_fn=lambda p: loss(p, batch)). A wrapper that drops extra arguments drops it too"
        )
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function from params to the loss, got {value_fn!r}")


def _check_arguments(internal_damping, refresh_every, rates, summary_memory):
    def known(value):
        return not isinstance(value, jax.core.Tracer)

    fixed = not callable(internal_damping) and not isinstance(internal_damping, AdaptiveDamping)
    if fixed and known(internal_damping) and not 0 <= internal_damping < float("inf"):
        raise ValueError(f"internal_damping must be finite and at least 0, got {internal_damping!r}")
    if not callable(refresh_every):
        _rates.check_period("refresh_every", refresh_every)
    if known(summary_memory) and (callable(summary_memory) or not 0 <= summary_memory <= 1):
        raise ValueError(f"summary_memory must be a share of the refreshes, in [0, 1], got {summary_memory!r}")
    if not callable(rates):
        raise TypeError(
            f"rates must be a function (summary, damping) -> CubicSolution, such as edge_rates(), got {rates!r}"
        )
