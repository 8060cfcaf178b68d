"""The optax transform: state and glue. No formula lives here."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton import memory as _memory
from grouped_newton import rates as _rates
from grouped_newton import sharding, spikes, trees
from grouped_newton.cubic import CubicStatus
from grouped_newton.damping import AdaptiveDamping
from grouped_newton.derivatives.summary import Summary, check_options, one_number, summary_dtype, summary_of
from grouped_newton.numerics import all_zero, is_traced, zero_nonfinite
from grouped_newton.refresh import GroupedNewtonState, Settings, refresh

_LEAST_CAUTION = 2.0**-10


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

    Another curvature: with ``summary_fn``, a function ``(params, direction, groups) -> Summary``, in ``update``, a
    refresh takes that instead of ``functools.partial(summarize, value_fn)`` with ``method``, ``max_stack`` and
    ``axis_name``: ``functools.partial(gauss_newton_summary, model_fn, loss_fn)``, for one.

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
    settings = Settings(
        rates=rates,
        damping=internal_damping,
        next_refresh=_next_refresh(refresh_every),
        summary_memory=summary_memory,
        delayed=delayed,
        nonnegative=nonnegative,
        axis_name=axis_name,
        options={"method": method, "max_stack": max_stack},
    )

    def init(params):
        return _initial(settings, resolve_groups(groups, params), params)

    def update(updates, state, params=None, *, value_fn=None, summary_fn=None, averaged_params=None, **extra_args):
        check_update_arguments(params, value_fn)
        partition = resolve_groups(groups, params)
        if state.eta.shape != (partition.num_groups,):
            raise ValueError(
                f"the state has {state.eta.shape[0]} rates and the grouping makes {partition.num_groups} groups of"
                " these params; call init with the params and grouping that are used in update"
            )
        loss_fn = _with_arguments(value_fn, extra_args)
        summary_at = functools.partial(
            summary_of, loss_fn, partition=partition, axis_name=axis_name, forgiving=True, **settings.options
        )
        if summary_fn is not None:
            summary_at = _checked(summary_fn, _grouping(groups, params), partition.num_groups)
        spike = None
        if extra_args.get("value") is not None:
            value = one_number("value must be", extra_args["value"], "tx.update(..., value=value[0])")
            if settings.adaptive:
                state, spike = _watched(state, sharding.mean(value, axis_name))

        due = (state.count >= state.next_refresh) | all_zero(state.eta)
        new = state._replace(direction=None, origin=None)
        new = lax.cond(
            due,
            lambda: refresh(settings, partition, loss_fn, summary_at, state, updates, params, averaged_params),
            lambda: new,
        )
        if spike is not None:
            new = new._replace(
                caution=jnp.where(spike, jnp.maximum(state.caution / 2, _LEAST_CAUTION), new.caution),
                next_refresh=jnp.where(spike, state.count + 1, new.next_refresh),
            )
        new = new._replace(count=optax.safe_increment(state.count), rates=new.caution * settings.clipped(new.eta))
        if delayed:
            new = new._replace(
                direction=trees.copies(partition, updates, zero_nonfinite, params),
                origin=trees.copies(partition, params, jnp.copy),
            )
        return partition.map(zero_nonfinite, partition.scale(new.rates, updates)), new

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(settings, partition, params):
    dtype = summary_dtype(params, partition)
    integer = lambda value: jnp.array(value, jnp.int32)
    copies = lambda make: trees.copies(partition, params, make) if settings.delayed else None
    S = partition.num_groups
    memory = _memory.empty(S, dtype)
    # No two fields share a buffer, so that the state can be donated.
    return GroupedNewtonState(
        count=integer(0),
        rates=jnp.zeros(S, dtype),
        caution=jnp.ones((), dtype),
        losses=jnp.zeros(2, dtype),
        direction=copies(jnp.zeros_like),
        origin=copies(jnp.copy),
        next_refresh=integer(0),
        last_refresh=integer(0),
        eta=jnp.zeros(S, dtype),
        damping=jnp.array(settings.adaptive.initial if settings.adaptive else 0.0, dtype),
        model_error=jnp.zeros((), dtype),
        summary=memory.average,
        recent=memory.recent,
        progress=jnp.zeros(2, dtype),
        known=jnp.zeros((2, S), bool),
        replaced=jnp.zeros(S, bool),
        status=integer(CubicStatus.SOLVED),
        refreshes=integer(0),
        rejected=integer(0),
        uphill=integer(0),
        start=trees.root_mean_squares(partition, params, dtype),
    )


def _watched(state, value):
    """The state with the loss of this step in its averages; and whether it is a spike."""
    losses, spike = spikes.observe(state.losses, value, state.count)
    # After ten in a row that aren't finite they tell nothing, and gradients may be fine.
    mute = spike & ~jnp.isfinite(value) & (state.caution <= _LEAST_CAUTION)
    return state._replace(losses=jnp.where(mute, 0, losses)), spike & ~mute


def _next_refresh(refresh_every):
    """From the step of a refresh to that of the next."""
    if callable(refresh_every):
        return lambda count: count + jnp.maximum(refresh_every(count), 1).astype(jnp.int32)
    return lambda count: (count // refresh_every + 1) * refresh_every


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
            value_of = lambda p: value_fn(p, **known)
            drawn_once = jax.config.jax_debug_key_reuse  # type: ignore[attr-defined]
            return _with_clones_of_keys(value_of, params) if drawn_once else value_of(params)

    return loss_fn


def _with_clones_of_keys(value_of, params):
    """``value_of(params)`` with clones of the random keys that it holds: a refresh draws the same again on purpose."""
    closed, shape = jax.make_jaxpr(value_of, return_shape=True)(params)
    is_key = lambda x: jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key)
    consts = [jax.random.clone(x) if is_key(x) else x for x in closed.consts]
    found = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(params))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _checked(summary_fn, groups, S):
    """A caller's summary function, with an error where it returns something else than a summary of S groups."""
    if not callable(summary_fn):
        raise TypeError(f"summary_fn must be a function (params, direction, groups) -> Summary, got {summary_fn!r}")

    def summary_at(params, direction):
        summary = summary_fn(params, direction, groups)
        shapes = jax.tree.map(jnp.shape, summary)
        if not isinstance(summary, Summary) or tuple(shapes) != ((), (S,), (S, S), (S,)):
            raise ValueError(
                f"summary_fn must return a Summary of {S} groups, got {shapes} as the shapes; pass on the groups that"
                " it is given, as functools.partial(summarize, loss) does"
            )
        return summary

    return summary_at


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
    fixed = not callable(internal_damping) and not isinstance(internal_damping, AdaptiveDamping)
    if fixed and not is_traced(internal_damping) and not 0 <= internal_damping < float("inf"):
        raise ValueError(f"internal_damping must be finite and at least 0, got {internal_damping!r}")
    if not callable(refresh_every):
        _rates.check_period("refresh_every", refresh_every)
    if not is_traced(summary_memory) and (callable(summary_memory) or not 0 <= summary_memory <= 1):
        raise ValueError(f"summary_memory must be a share of the refreshes, in [0, 1], got {summary_memory!r}")
    if not callable(rates):
        raise TypeError(
            f"rates must be a function (summary, damping) -> CubicSolution, such as edge_rates(), got {rates!r}"
        )
