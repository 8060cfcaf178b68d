"""The optax transform: state and glue. No formula lives here."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton import rates as _rates
from grouped_newton.cubic import CubicStatus
from grouped_newton.summary import Summary, check_options, running_average, summarize, summary_dtype, zeros


class GroupedNewtonState(NamedTuple):
    """State of :func:`scale_by_grouped_newton`; everything in it is finite.

    Attributes:
      count: steps taken, int32 ().
      eta: the rule's rates, unclipped, before the learning rate, (S,).
      damping: the internal damping of the last refresh, ().
      loss: the loss at the last refresh, ().
      gbar, hbar, third: running averages of the summary, third being |third|,
        (S,), (S, S), (S,).
      status: outcome of the last refresh, int32 (), names in ``CubicStatus``.
      refreshes: summaries in the average, int32 ().
      rejected: refreshes that changed no rate, for want of finite numbers or of
        a minimiser, int32 ().
      uphill: refreshes whose direction pointed uphill, sum(gbar) < 0, int32 ().
    """

    count: jax.Array
    eta: jax.Array
    damping: jax.Array
    loss: jax.Array
    gbar: jax.Array
    hbar: jax.Array
    third: jax.Array
    status: jax.Array
    refreshes: jax.Array
    rejected: jax.Array
    uphill: jax.Array


def scale_by_grouped_newton(
    groups: _groups.Grouping = _groups.per_tensor,
    *,
    internal_damping: float | Callable[[jax.Array], Any] = 1.0,
    refresh_every: int = 10,
    rates: _rates.RateRule = _rates.cubic_rates(),
    summary_decay: float = 0.0,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each group of the incoming direction by its own Newton rate.

    The updates u that come in are a direction, not negated: the gradient, or
    what ``optax.scale_by_adam`` makes of it. What goes out is, on group s::

      max(eta_s, 0) u_s,   eta = rates(average of the summaries along u, lambda)

    Every ``refresh_every`` steps, the first included, the summary of
    ``value_fn`` along u is taken and eta renewed; in between nothing but the
    product is computed. The defaults are the paper's; :func:`grouped_newton` is
    the optimizer with the defaults that train best.

    When a refresh finds no minimiser or a number that isn't finite, the last
    rates stay. Before there are any, the edge rule steps in for a rule without
    minimiser, and if that has none either the step is zero and the next one
    refreshes again; so it does while all rates are zero. A direction that isn't
    finite gives a zero step.

    ``update`` takes ``params`` and ``value_fn``, a function from params to one real
    number. Extra arguments named in its signature are passed to it, others are
    ignored. Close over the batch inside the jitted step; another batch than the
    gradient's gives slopes without that batch's noise.

    Args:
      groups: a grouping, see :mod:`grouped_newton.groups`; per tensor by default.
      internal_damping: lambda >= 0, without unit, or a schedule of the step.
      refresh_every: steps between two summaries, at least 1.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_decay: weight in [0, 1) of the past in the bias-corrected average,
        per refresh; 0 uses the latest summary alone.
      nonnegative: whether negative rates are clipped to 0 when used.
      method: how the summary is computed, see :func:`summarize`.
      max_stack: bounds the memory of a refresh, see :func:`summarize`.

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
      P. Wolinski, Adapting Newton's Method to Neural Networks through a Summary
      of Higher-Order Derivatives, arXiv 2312.03885.
    """
    _check_arguments(internal_damping, refresh_every, rates, summary_decay)
    check_options(method, 3, max_stack)
    damping_at = internal_damping if callable(internal_damping) else lambda _: internal_damping

    def init(params):
        partition = _resolve(groups, params)
        dtype = summary_dtype(params, partition)
        integer = lambda value: jnp.array(value, jnp.int32)
        # No two fields share a buffer, so that the state can be donated.
        return GroupedNewtonState(
            count=integer(0),
            eta=jnp.zeros(partition.num_groups, dtype),
            damping=jnp.zeros((), dtype),
            status=integer(CubicStatus.SOLVED),
            refreshes=integer(0),
            rejected=integer(0),
            uphill=integer(0),
            **zeros(partition.num_groups, dtype)._asdict(),
        )

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        _check_update_arguments(params, value_fn)
        partition = _resolve(groups, params)
        if state.eta.shape != (partition.num_groups,):
            raise ValueError(
                f"the state has {state.eta.shape[0]} rates and the grouping makes {partition.num_groups} groups of"
                " these params; call init with the params and grouping that are used in update"
            )
        loss_fn = _with_arguments(value_fn, extra_args)

        def refresh(state):
            summary = summarize(loss_fn, params, updates, groups, method=method, max_stack=max_stack)
            return _refreshed(state, summary, damping_at(state.count), rates, summary_decay)

        due = (state.count % refresh_every == 0) | jnp.all(state.eta == 0)
        state = lax.cond(due, refresh, lambda state: state, state)
        eta = jnp.maximum(state.eta, 0) if nonnegative else state.eta
        scaled = partition.scale(eta, updates)
        finite = _all_finite(scaled)
        scaled = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), scaled)
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def grouped_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    groups: _groups.Grouping = _groups.per_module,
    *,
    direction: optax.GradientTransformation | None = None,
    internal_damping: float | Callable[[jax.Array], Any] = 1.0,
    refresh_every: int = 10,
    rates: _rates.RateRule = _rates.edge_rates(1.5),
    summary_decay: float = 0.8,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that computes its learning rates, one per group of parameters.

    ``optax.chain(direction, scale_by_grouped_newton(...),
    optax.scale_by_learning_rate(learning_rate))``, with the defaults that train
    best untuned: Adam's direction, a group a module, a summary every 10 steps,
    averaged over about 50, and :func:`edge_rates`.

    Args:
      learning_rate: a factor on all computed rates, or a schedule of the step;
        the paper's lambda_1. 1 by default.
      groups: a grouping, see :mod:`grouped_newton.groups`; per module by default.
      direction: a transform that makes the direction from the gradient, neither
        negated nor scaled: ``optax.scale_by_adam()`` (the default), not
        ``optax.adam(1e-3)``. Weight decay goes inside it, clipping before it. A
        negated direction gets negative rates: nothing moves unless
        ``nonnegative=False``, and the state's ``uphill`` counts.
      internal_damping: lambda >= 0, without unit, or a schedule of the step.
      refresh_every: steps between two summaries, at least 1.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_decay: weight in [0, 1) of the past in the average, per refresh.
      nonnegative: whether negative rates are clipped to 0 when used.
      method: how the summary is computed, see :func:`summarize`.
      max_stack: bounds the memory of a refresh, see :func:`summarize`.

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
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 1e-3)
      True

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    direction = optax.scale_by_adam() if direction is None else direction
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation such as optax.scale_by_adam(), got {direction!r}"
        )
    return optax.chain(
        direction,
        scale_by_grouped_newton(
            groups,
            internal_damping=internal_damping,
            refresh_every=refresh_every,
            rates=rates,
            summary_decay=summary_decay,
            nonnegative=nonnegative,
            method=method,
            max_stack=max_stack,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _refreshed(state, summary, damping, rates, summary_decay):
    """The state after a summary, if its numbers are fine; with counters that say so if not."""
    dtype = state.eta.dtype
    damping = jnp.asarray(damping).astype(dtype)
    before = Summary(state.loss, state.gbar, state.hbar, state.third)
    summary = jax.tree.map(lambda x, old: x.astype(old.dtype), summary, before)
    finite = _all_finite((summary, damping))
    refreshes = state.refreshes + finite.astype(jnp.int32)
    after = running_average(before, summary, summary_decay, jnp.maximum(refreshes, 1))
    average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

    solution = rates(average, damping)
    no_rates_yet = jnp.all(state.eta == 0)
    edge = _rates.edge_rates()(average, damping)
    fall_back = no_rates_yet & (solution.status == CubicStatus.UNBOUNDED) & (edge.status < CubicStatus.UNBOUNDED)
    eta = jnp.where(fall_back, edge.eta, solution.eta).astype(dtype)
    found = fall_back | (solution.status < CubicStatus.UNBOUNDED)
    accepted = finite & found & _all_finite(eta)
    status = jnp.where(finite, solution.status, CubicStatus.NOT_FINITE)
    return state._replace(
        eta=jnp.where(accepted, eta, state.eta),
        damping=jnp.where(jnp.isfinite(damping), damping, state.damping),
        status=status.astype(jnp.int32),
        refreshes=refreshes,
        rejected=state.rejected + ~accepted,
        uphill=state.uphill + (finite & (jnp.sum(summary.gbar) < 0)),
        **average._asdict(),
    )


def _all_finite(tree):
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)] or [jnp.array(True)]).all()


def _resolve(groups, params):
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "some params are optax.MaskedNode: the transform is inside optax.masked or optax.partition, where"
            " value_fn can't be called. Put it outside and label the parameters that it must leave alone"
            " grouped_newton.groups.FROZEN"
        )
    # optax.tree.map_params inits with a placeholder without leaves, which fits no label tree.
    return _groups.resolve(groups if jax.tree.leaves(params) else _groups.single, params)


def _with_arguments(value_fn, extra_args):
    """``value_fn`` with the extra arguments that its signature names after the params."""
    names = list(inspect.signature(value_fn).parameters)[1:]
    known = {name: value for name, value in extra_args.items() if name in names}
    return lambda params: value_fn(params, **known)


def _check_update_arguments(params, value_fn):
    if params is None:
        raise ValueError("update needs the current params: tx.update(grads, state, params, value_fn=...)")
    if value_fn is None:
        raise ValueError(
            "update needs value_fn, a function from params to the loss: tx.update(grads, state, params,"
            " value_fn=lambda p: loss(p, curvature_batch)). A wrapper that drops extra arguments drops it too"
        )
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function from params to the loss, got {value_fn!r}")


def _check_arguments(internal_damping, refresh_every, rates, summary_decay):
    def known(value):  # optax.inject_hyperparams traces numbers
        return not isinstance(value, jax.core.Tracer)

    if not callable(internal_damping) and known(internal_damping) and not 0 <= internal_damping < float("inf"):
        raise ValueError(f"internal_damping must be finite and at least 0, got {internal_damping!r}")
    if known(refresh_every) and (refresh_every != int(refresh_every) or refresh_every < 1):
        raise ValueError(f"refresh_every must be an integer of at least 1, got {refresh_every!r}")
    if known(summary_decay) and not 0 <= summary_decay < 1:
        raise ValueError(f"summary_decay must be in [0, 1), got {summary_decay!r}")
    if not callable(rates):
        raise TypeError(
            f"rates must be a function (summary, damping) -> CubicSolution, such as edge_rates(), got {rates!r}"
        )
