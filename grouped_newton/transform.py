"""The optax transform: state and glue. No formula lives here."""

import contextlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import annealing, placement, spikes, stand_ins
from grouped_newton import groups as _groups
from grouped_newton import memory as _memory
from grouped_newton import rates as _rates
from grouped_newton.averaging import average_params, averaged
from grouped_newton.convolutions import caller
from grouped_newton.cubic import CubicStatus, all_finite, total
from grouped_newton.summary import check_options, one_number, summarize, summary_dtype

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
    internal_damping: float | Callable[[jax.Array], Any] | _rates.AdaptiveDamping = 1.0,
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
    adaptive = internal_damping if isinstance(internal_damping, _rates.AdaptiveDamping) else None
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
        partition = _resolve(groups, params)
        dtype = summary_dtype(params, partition)
        integer = lambda value: jnp.array(value, jnp.int32)
        kept = lambda make: _kept(partition, params, make) if delayed else None
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
            start=_root_mean_squares(partition, params, dtype),
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
        _check_update_arguments(params, value_fn)
        partition = _resolve(groups, params)
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
            value = placement.mean(value, axis_name)
            losses, spike = spikes.observe(state.losses, value, state.count)
            # After ten in a row that aren't finite they tell nothing, and gradients may be fine.
            mute = spike & ~jnp.isfinite(value) & (state.caution <= _LEAST_CAUTION)
            spike &= ~mute
            state = state._replace(losses=jnp.where(mute, 0, losses))

        def refresh(state):
            call = caller(lambda: loss_fn(params))
            loss_at = lambda x: placement.mean(call(lambda: loss_fn(x)), axis_name)
            first = state.count == 0
            u, theta = updates, params
            if delayed:
                u = _either(partition, first, updates, state.direction)
                theta = _either(partition, first, params, state.origin)
            summary = _settled(call(lambda: summarize(loss_fn, theta, u, _grouping(groups, params), **options)))
            levelled = averaged_params is not None
            if levelled:
                halfway = _halfway(partition, averaged_params, params)
                progress = annealing.measure(loss_at(averaged_params), loss_at(halfway), loss_at(params))
                progress = annealing.remember(state.progress, progress, state.refreshes + 1)
                state = state._replace(progress=progress)
            lengths = [_root_mean_squares(partition, x, state.eta.dtype, axis_name) for x in (theta, u)]
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
                moved = _moved(partition, theta, partition.scale(used(state.eta), u))
                error = _rates.model_error(summary, used(state.eta), loss_at(moved))
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
            copies = _kept(partition, updates, _zero_nonfinite, params), _kept(partition, params, jnp.copy)
        scaled = partition.scale(arrays.caution * used(arrays.eta), updates)
        scaled = partition.map(_zero_nonfinite, scaled)
        count = optax.safe_increment(state.count)
        return scaled, arrays._replace(count=count, direction=copies[0], origin=copies[1])

    return optax.GradientTransformationExtraArgs(init, update)


def grouped_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    groups: _groups.Grouping = _groups.single,
    *,
    direction: optax.GradientTransformation | None = None,
    internal_damping: float | Callable[[jax.Array], Any] | _rates.AdaptiveDamping = _rates.adaptive_damping(),
    refresh_every: int | Callable[[jax.Array], Any] = _rates.growing_period(10),
    rates: _rates.RateRule = _rates.edge_rates(1.8),
    summary_memory: float = 0.3,
    delayed: bool = True,
    averaging: float | None = 0.1,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that computes its learning rate, for all parameters or per group of them.

    ``optax.chain(direction, scale_by_grouped_newton(...),
    optax.scale_by_learning_rate(learning_rate), average_params(averaging))``, with the
    defaults that train best untuned: Adam's direction with b1 = 0.9 and b2 = 0.99, one group
    for all parameters, :func:`edge_rates` of summaries on batches that their direction hasn't seen, averaged over
    a share of the training so far, a damping that follows the model's error, and an average of the
    parameters to evaluate at, ``eval_params(state, params)``, which also tells when larger rates are
    no longer worth it. It needs no number of steps: rates fall by themselves when noise is all that is
    left. Pass ``value``, the loss of the step, to ``update``: rates then answer a spike at once.

    Numbers of the gradient that aren't finite, or whose square isn't, count as zeros; where all
    are, the momentum alone makes the step. What a direction makes of all others is kept, so
    it has to stay finite.

    Args:
      learning_rate: a factor on all computed rates, or a schedule of the step;
        the paper's lambda_1. 1 by default.
      groups: a grouping, see :mod:`grouped_newton.groups`; one group by default.
      direction: a transform that makes the direction from the gradient, neither negated
        nor scaled: ``optax.scale_by_adam()``, not ``optax.adam(1e-3)``. By default
        ``optax.scale_by_adam(b1=0.9, b2=0.99)``, its moments in at least float32. Weight decay goes
        inside it, clipping before it. A negated direction gets negative rates: nothing moves unless
        ``nonnegative=False``, and the state's ``uphill`` counts.
      internal_damping: lambda >= 0, without unit, a schedule of the step, or
        :func:`adaptive_damping`, the default.
      refresh_every: steps between two summaries, at least 1, or a schedule of the
        step, by default :func:`growing_period`.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_memory: share of the refreshes so far that summaries are averaged over, see
        :func:`scale_by_grouped_newton`.
      delayed: whether a summary is of the last step's direction, on this step's batch, see
        :func:`scale_by_grouped_newton`. False keeps no copies: for a ``value_fn`` that is the loss on
        another batch than the gradient's, and for losses without noise.
      averaging: fraction of the steps, see :func:`average_params`; None keeps no
        average, which saves one copy of the parameters.
      nonnegative: whether negative rates are clipped to 0 when used.
      method: how the summary is computed, see :func:`summarize`.
      max_stack: bounds the memory of a refresh, see :func:`summarize`.
      axis_name: the axis or axes of ``shard_map`` or ``pmap`` over whose devices
        losses and summary are averaged, see :func:`summarize`. The gradient must
        be averaged already.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs ``params``
      and ``value_fn``, see :func:`scale_by_grouped_newton`.

    Raises:
      ValueError, TypeError: as :func:`scale_by_grouped_newton`, and if
        ``direction`` isn't a gradient transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import grouped_newton as gn
      >>> loss = lambda p: (p["a"] - 3.0) ** 2 + 100 * (p["b"] + 1.0) ** 2
      >>> params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
      >>> tx = gn.grouped_newton()
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grads = jax.value_and_grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(loss(gn.eval_params(state, params)) < 1e-3)
      True

    References:
      Pierre Wolinski, arXiv 2312.03885.
    """
    direction = _in_float32(optax.scale_by_adam(b1=0.9, b2=0.99)) if direction is None else direction
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation such as optax.scale_by_adam(), got {direction!r}"
        )
    transforms = [
        _of_fine_numbers(direction),
        scale_by_grouped_newton(
            groups,
            internal_damping=internal_damping,
            refresh_every=refresh_every,
            rates=rates,
            summary_memory=summary_memory,
            delayed=delayed,
            nonnegative=nonnegative,
            method=method,
            max_stack=max_stack,
            axis_name=axis_name,
        ),
        optax.scale_by_learning_rate(learning_rate),
        *([] if averaging is None else [average_params(averaging)]),
    ]
    direction, scaling, *others = map(optax.with_extra_args_support, transforms)
    after = optax.chain(*others)

    def init(params):
        moving = _moving(_resolve(groups, params), params)
        return (direction.init(moving), scaling.init(params), *after.init(moving))

    def update(updates, state, params=None, **extra_args):
        _check_update_arguments(params, extra_args.get("value_fn"))
        partition = _resolve(groups, params)
        moving = _moving(partition, params)
        u, first = direction.update(_moving(partition, updates, params), state[0], moving, **extra_args)
        if averaging is not None:
            extra_args = {"averaged_params": averaged(state[-1], params), **extra_args}
        u, second = scaling.update(u, state[1], params, **extra_args)
        u, rest = after.update(u, state[2:], moving, **extra_args)
        return _put_back(partition, u, updates), (first, second, *rest)

    return optax.GradientTransformationExtraArgs(init, update)


def _put_back(partition, moved, updates):
    """The updates that ``moved`` has, in the structure of ``updates``, whose frozen leaves stand still."""
    new = iter(jax.tree.leaves(moved))
    leaves, treedef = jax.tree.flatten(updates)
    pairs = zip(leaves, partition.index_in(updates), strict=True)
    return treedef.unflatten([_groups.still(x) if g < 0 else next(new) for x, g in pairs])


def _in_float32(direction):
    """A direction whose state is in at least float32: in half precision Adam's squares stand still or are zero."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(_groups.wider(x.dtype, jnp.float32)), tree)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # Adam's counter is an integer exponent
            u, state = direction.update(wide(updates), state, params)
        return optax.tree.cast_like(u, updates), state

    return optax.GradientTransformation(lambda params: direction.init(wide(params)), update)


def _of_fine_numbers(direction):
    """The direction of a gradient whose bad numbers are zeros; elementwise, so that it costs no pass of its own."""
    direction = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(_without_bad_numbers, updates)
        return direction.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(direction.init, update)


def _without_bad_numbers(x):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    largest = float(jnp.finfo(x.dtype).max) ** 0.5  # an adaptive direction keeps squares
    return jnp.where(jnp.abs(x) <= largest, x, jnp.zeros_like(x))


def _moved(partition, params, steps):
    """``params - steps``."""

    def minus(x, step):
        dtype = jnp.result_type(x)
        x, info = (_wide(x, step) - _wide(step, x)).astype(dtype), jnp.finfo(dtype)
        # XLA may leave half precision unrounded inside the loss; the real step is rounded.
        return lax.reduce_precision(x, info.nexp, info.nmant) if info.bits < 32 else x

    return partition.map(minus, params, steps)


def _kept(partition, tree, make, like=None):
    """``make`` of every leaf with a group, of the type of ``like``; nothing of the others."""

    def kept(x, kind):
        kind = jax.typeof(kind)
        return placement.laid_out(jnp.array(make(x), kind.dtype), kind)  # not weakly typed

    pairs = partition.map(lambda kind, x: kept(x, kind), tree if like is None else like, tree)
    return _moving(partition, pairs)


def _moving(partition, tree, like=None):
    """The tree without the frozen leaves; where some are missing already, in the structure of ``like``."""
    leaves, treedef = jax.tree.flatten(tree)
    if len(leaves) != len(partition.index):
        leaves, treedef = partition.leaves(tree), jax.tree.structure(like)
    pairs = zip(leaves, partition.index, strict=True)
    return treedef.unflatten([optax.MaskedNode() if g < 0 else x for x, g in pairs])


def _root_mean_squares(partition, tree, dtype, axis_name=None):
    """Of the numbers of each group, (S,)."""
    leaves = partition.leaves(tree)
    squares = partition.sums([x if x is None else jnp.sum(jnp.square(jnp.asarray(x, dtype))) for x in leaves], dtype)
    sizes = partition.sums([x if x is None else jnp.asarray(jnp.size(x), dtype) for x in leaves], dtype)
    return jnp.sqrt(placement.mean(squares, axis_name) / jnp.maximum(sizes, 1))


def _either(partition, condition, tree, kept):
    """``tree`` where the condition is true, and what was kept of it elsewhere."""

    def choose(x, y):
        return jnp.where(condition, placement.laid_out(jnp.asarray(x).astype(y.dtype), jax.typeof(y)), y)

    return partition.map(choose, tree, kept)


def _halfway(partition, a, b):
    return partition.map(lambda b, a: (_wide(a, b) + (_wide(b, a) - _wide(a, b)) / 2).astype(jnp.result_type(b)), b, a)


def _wide(x, other):
    """``x`` in the wider of both dtypes, without a promotion that strict rules refuse."""
    return jnp.asarray(x, _groups.wider(jnp.result_type(x), jnp.result_type(other)))


def _zero_nonfinite(x):
    x = jnp.asarray(x)
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _refreshed(state, summary, damping, rates, share, own, levelled, lengths):
    """The state after a summary, with counters that say what was found; and the summary without gaps.

    A summary of the direction's own batch is used, and forgotten at the next. Where rates are ``levelled``, only the
    first are the rule's. ``lengths`` are those of params and direction, of which rates are made that no rule gives.
    """
    dtype = state.eta.dtype
    damping = jnp.asarray(damping).astype(dtype)
    before = _memory.Memory(*(getattr(state, name) for name in _memory.Memory._fields))
    summary = jax.tree.map(lambda x, old: x.astype(old.dtype), summary, before.average)
    fine, slope = stand_ins.fine_groups(summary), summary.gbar
    usable = all_finite(summary.loss, damping) & (jnp.any(fine) if fine.size else True)
    whole = usable & all_finite(*summary)
    before, summary, known = stand_ins.complete(before, state.known, summary)
    own_part = lambda x: jnp.where(fine, x, 0)
    zero = _all_zero(own_part(summary.gbar)) & _all_zero(own_part(jnp.diag(summary.hbar)))
    learnt = usable & ~zero  # a zero direction tells nothing
    choose = lambda new, old: jax.tree.map(lambda x, y: jnp.where(learnt, x, y), new, old)
    count = state.refreshes + 1
    memory = _memory.remember(before, summary, count, share, state.eta)
    memory = _settled(choose(memory, _memory.Memory(*(getattr(state, name) for name in _memory.Memory._fields))))

    average, out = stand_ins.for_the_rule(memory.average, jnp.where(usable, known, state.known))
    without_rates = _all_zero(state.eta) | _all_replaced(state)
    unbounded = stand_ins.unbounded(average, damping) & (without_rates | jnp.any(state.replaced))
    bounded, bounded_out = _settled((stand_ins.without(average, unbounded), out | unbounded))
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
        level, still_out = stand_ins.revived(state.eta, state.replaced, by_rule, average.gbar)
        eta, found = jnp.where(settled, growth * level, eta), found | settled
        out = jnp.where(settled, still_out, out)
    accepted = usable & found & all_finite(eta)
    replaced = jnp.where(accepted, out, state.replaced | without_rates)
    eta = jnp.where(accepted, eta, state.eta)
    stood_in = stand_ins.rates(eta, replaced, slope, lengths[0], state.start, lengths[1])
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


def _resolve(groups, params):
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


def _check_update_arguments(params, value_fn):
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

    fixed = not callable(internal_damping) and not isinstance(internal_damping, _rates.AdaptiveDamping)
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
