"""The optax transform: state and glue. No formula lives here."""

import contextlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from grouped_newton import groups as _groups
from grouped_newton import placement
from grouped_newton import progress as _progress
from grouped_newton import rates as _rates
from grouped_newton.averaging import average_params
from grouped_newton.convolutions import caller
from grouped_newton.cubic import CubicStatus, all_finite, total
from grouped_newton.direction import scale_by_adaptive_momentum
from grouped_newton.summary import Summary, check_options, running_average, summarize, summary_dtype, zeros

_MOST_HALVINGS = 10
_NOISELESS_DECAY = 4  # without noise an average needs no more than a quarter of the summaries


class GroupedNewtonState(NamedTuple):
    """State of :func:`scale_by_grouped_newton`; everything in it is finite.

    Attributes:
      count: steps taken, int32 ().
      next_refresh: the step at which the next refresh is due, int32 ().
      eta: the rule's rates, unclipped, before scale and learning rate, (S,);
        halved where the loss showed at once that they were grossly too large.
      scale: factor on all rates, 1 without a scale rule, ().
      damping: the internal damping, of the last refresh or, where it adapts, for
        the next one, ().
      model_error: quotient of the last refresh where the damping adapts, see
        ``adaptive_damping``; 0 otherwise and where it isn't reliable, ().
      loss: the loss at the last refresh, ().
      gbar, hbar, third: running averages of the summary, third being |third|,
        (S,), (S, S), (S,).
      status: outcome of the last refresh, int32 (), names in ``CubicStatus``.
      refreshes: summaries in the average, int32 ().
      rejected: refreshes that changed no rate, for want of finite numbers or of
        a minimiser, int32 ().
      uphill: refreshes whose direction pointed uphill, sum(gbar) < 0, int32 ().
      window: sum, spread, count, peak, last mean and deviation of the losses that
        the scale rule judges by, the loss predicted for the next step and how often
        lately it came true, see :mod:`grouped_newton.progress`, (8,).
    """

    count: jax.Array
    next_refresh: jax.Array
    eta: jax.Array
    scale: jax.Array
    damping: jax.Array
    model_error: jax.Array
    loss: jax.Array
    gbar: jax.Array
    hbar: jax.Array
    third: jax.Array
    status: jax.Array
    refreshes: jax.Array
    rejected: jax.Array
    uphill: jax.Array
    window: jax.Array

    @property
    def noiseless(self) -> jax.Array:
        """Whether the losses of the steps are those that the refreshes before them found, bool ()."""
        return _progress.noiseless(self.window[..., -1])


def scale_by_grouped_newton(
    groups: _groups.Grouping = _groups.per_tensor,
    *,
    internal_damping: float | Callable[[jax.Array], Any] | _rates.AdaptiveDamping = 1.0,
    refresh_every: int | Callable[[jax.Array], Any] = 10,
    rates: _rates.RateRule = _rates.cubic_rates(),
    summary_decay: float = 0.0,
    scale_rule: _progress.ScaleRule | None = None,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each group of the incoming direction by its own Newton rate.

    The updates u that come in are a direction, not negated: the gradient, or
    what ``optax.scale_by_adam`` makes of it. What goes out is, on group s::

      scale max(eta_s, 0) u_s,   eta = rates(average of the summaries along u, lambda)

    Every ``refresh_every`` steps, the first included, the summary of
    ``value_fn`` along u is taken and eta renewed; in between nothing but the
    product is computed. ``scale`` is 1 unless there is a ``scale_rule``. The defaults
    are the paper's; :func:`grouped_newton` is the optimizer with the defaults that
    train best.

    When a refresh finds no minimiser or a number that isn't finite, the last
    rates stay. Before there are any, the edge rule steps in for a rule without
    minimiser, and if that has none either the step is zero and the next one
    refreshes again; so it does while all rates are zero. Numbers of the direction
    that aren't finite make no step; at a refresh they leave the rates as they were.

    ``update`` takes ``params`` and ``value_fn``, a function from params to one real
    number. A scale rule judges by ``value``, the loss of each step, if it is given, and
    by the losses at refreshes if not, which is less sure and later. With an adaptive
    damping and ``value``, a step's loss that is what the refresh before it found, to a
    hundredth of the decrease, shows that there is no noise: where that came true twice at
    least and lately, the state's ``noiseless`` is True, and the average decays with the
    fourth power of ``summary_decay``. Extra arguments named in ``value_fn``'s signature
    are passed to it, others are ignored. Close over the batch inside the jitted step;
    another batch than the gradient's gives slopes without that batch's noise.

    Args:
      groups: a grouping, see :mod:`grouped_newton.groups`; per tensor by default.
      internal_damping: lambda >= 0, without unit, a schedule of the step, or
        :func:`adaptive_damping`, which evaluates the loss once more per refresh, and
        halves rates at once that are grossly too large.
      refresh_every: steps between two summaries, at least 1, or a schedule of the
        step such as :func:`growing_period`.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_decay: weight in [0, 1) of the past in the bias-corrected average,
        per refresh, without noise its fourth power; 0 uses the latest summary alone.
      scale_rule: ``(scale, whether the loss fell) -> scale``, such as
        :func:`success_rule`; None keeps the scale at 1.
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
      P. Wolinski, Adapting Newton's Method to Neural Networks through a Summary
      of Higher-Order Derivatives, arXiv 2312.03885.
    """
    _check_arguments(internal_damping, refresh_every, rates, summary_decay, scale_rule)
    check_options(method, 3, max_stack)
    adaptive = internal_damping if isinstance(internal_damping, _rates.AdaptiveDamping) else None

    def damping_at(state):
        if adaptive:
            return state.damping
        return internal_damping(state.count) if callable(internal_damping) else internal_damping

    def refresh_after(count):
        if callable(refresh_every):
            return count + jnp.maximum(refresh_every(count), 1).astype(jnp.int32)
        return (count // refresh_every + 1) * refresh_every

    def used(eta, scale):
        return scale * (jnp.maximum(eta, 0) if nonnegative else eta)

    def init(params):
        partition = _resolve(groups, params)
        dtype = summary_dtype(params, partition)
        integer = lambda value: jnp.array(value, jnp.int32)
        # No two fields share a buffer, so that the state can be donated.
        return GroupedNewtonState(
            count=integer(0),
            next_refresh=integer(0),
            eta=jnp.zeros(partition.num_groups, dtype),
            damping=jnp.array(adaptive.initial if adaptive else 0.0, dtype),
            model_error=jnp.zeros((), dtype),
            status=integer(CubicStatus.SOLVED),
            refreshes=integer(0),
            rejected=integer(0),
            uphill=integer(0),
            **zeros(partition.num_groups, dtype)._asdict(),
            **_progress.pack(_progress.start(dtype)),
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
        value = extra_args.get("value")
        value = None if value is None else placement.mean(value, axis_name)
        progress = _progress.unpack(state.scale, state.window)
        if adaptive and value is not None:
            progress = _progress.compare(progress, value, state.loss)
        if scale_rule and value is not None:
            progress = _progress.observe(progress, value, scale_rule)

        def refresh(state):
            call = caller(lambda: loss_fn(params))
            summary = call(
                lambda: summarize(
                    loss_fn,
                    params,
                    updates,
                    _grouping(groups, params),
                    method=method,
                    max_stack=max_stack,
                    axis_name=axis_name,
                )
            )
            decay = jnp.where(state.noiseless, summary_decay**_NOISELESS_DECAY, summary_decay)
            state = _refreshed(state, summary, damping_at(state), rates, decay)
            progress = _progress.unpack(state.scale, state.window)
            if scale_rule and value is not None:
                progress = _progress.close_window(progress, scale_rule)
            elif scale_rule:
                progress = _progress.judge_refresh(progress, summary.loss, scale_rule)
            if adaptive:
                # Without a finite summary nothing is known of the rates.
                judged = state.status != CubicStatus.NOT_FINITE

                def trial(eta, scale):
                    eta = used(eta, scale)
                    moved = _moved(partition, params, partition.scale(eta, updates))
                    after = placement.mean(call(lambda: loss_fn(moved)), axis_name)
                    error = _rates.model_error(summary, eta, after)
                    return error._replace(reliable=error.reliable & judged, gross=error.gross & judged), after

                def halve_if_gross(loop):
                    trials, eta, scale, _, first, _ = loop
                    error, after = trial(eta, scale)
                    first = jax.tree.map(lambda x, e: jnp.where(trials == 0, e, x), first, error)
                    if scale_rule:
                        shrunk = scale_rule(scale, False).astype(scale.dtype)
                        scale = jnp.where(error.gross & (trials == 0), shrunk, scale)
                    return trials + 1, jnp.where(error.gross, eta / 2, eta), scale, error.gross, first, after

                kinds = jax.eval_shape(trial, state.eta, progress.scale)
                unknown = jax.tree.map(placement.zeros, kinds)
                _, eta, scale, gross, error, after = lax.while_loop(
                    lambda loop: loop[3] & (loop[0] < _MOST_HALVINGS),
                    halve_if_gross,
                    (0, state.eta, progress.scale, jnp.array(True), *unknown),
                )
                after = jnp.where(judged & ~gross, after, jnp.nan)
                progress = _progress.predict(progress._replace(scale=scale), after)
                state = state._replace(
                    eta=eta,
                    damping=adaptive.update(state.damping, error).astype(eta.dtype),
                    model_error=jnp.where(error.reliable, error.quotient, 0),
                )
            next_refresh = jnp.asarray(refresh_after(state.count), jnp.int32)
            return state._replace(next_refresh=next_refresh, **_progress.pack(progress))

        due = (state.count >= state.next_refresh) | _all_zero(state.eta)
        state = lax.cond(due, refresh, lambda state: state, state._replace(**_progress.pack(progress)))
        scaled = partition.scale(used(state.eta, state.scale), updates)
        scaled = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), scaled)
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def grouped_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    groups: _groups.Grouping = _groups.per_module,
    *,
    direction: optax.GradientTransformation | None = None,
    internal_damping: float | Callable[[jax.Array], Any] | _rates.AdaptiveDamping = _rates.adaptive_damping(),
    refresh_every: int | Callable[[jax.Array], Any] = _rates.growing_period(20),
    rates: _rates.RateRule = _rates.edge_rates(1.8),
    summary_decay: float = 0.85,
    scale_rule: _progress.ScaleRule | None = _progress.success_rule(),
    averaging: float | None = 0.1,
    nonnegative: bool = True,
    method: str = "sweep",
    max_stack: int | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that computes its learning rates, one per group of parameters.

    ``optax.chain(direction, scale_by_grouped_newton(...),
    optax.scale_by_learning_rate(learning_rate), average_params(averaging))``, with the
    defaults that train best untuned: Adam's direction with a short memory,
    :func:`scale_by_adaptive_momentum`, a group a module, :func:`edge_rates` of a summary
    every 20 steps averaged over about 130, a damping that follows the model's error, a
    scale that follows the loss, and an average of the parameters to evaluate at,
    ``eval_params(state, params)``. Pass ``value``, the loss of the step, to ``update``:
    the scale reacts sooner and to spikes. From it the optimizer also sees where there is
    no noise, as on the full batch: the loss after a refresh's step is then the one that
    the refresh found. The direction's ``update`` is told so, ``noiseless=True`` (one
    given to ``update`` is handed on instead), and the default one has a longer memory;
    the average of the summaries has a shorter one, ``summary_decay`` to the fourth power.
    It can't be seen where ``value`` isn't passed, the learning rate isn't 1 or the
    damping doesn't adapt, where noise is assumed, nor on a batch that is used for several
    steps in a row, which looks noiseless.

    Numbers of the gradient that aren't finite, or whose square isn't, count as zeros; where all
    are, the momentum alone makes the step. What a direction makes of all others is kept, so
    it has to stay finite.

    Args:
      learning_rate: a factor on all computed rates, or a schedule of the step;
        the paper's lambda_1. 1 by default.
      groups: a grouping, see :mod:`grouped_newton.groups`; per module by default.
      direction: a transform that makes the direction from the gradient, neither negated
        nor scaled: ``scale_by_adaptive_momentum()`` (the default) or
        ``optax.scale_by_adam()``, not ``optax.adam(1e-3)``. Weight decay goes inside it,
        clipping before it. A negated direction gets negative rates: nothing moves unless
        ``nonnegative=False``, and the state's ``uphill`` counts.
      internal_damping: lambda >= 0, without unit, a schedule of the step, or
        :func:`adaptive_damping`, the default.
      refresh_every: steps between two summaries, at least 1, or a schedule of the
        step, by default :func:`growing_period`.
      rates: a rate rule, ``(Summary, lambda) -> CubicSolution``.
      summary_decay: weight in [0, 1) of the past in the average, per refresh; without noise
        its fourth power.
      scale_rule: see :func:`scale_by_grouped_newton`; :func:`success_rule` by default.
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
      P. Wolinski, arXiv 2312.03885.
    """
    direction = scale_by_adaptive_momentum() if direction is None else direction
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation such as optax.scale_by_adam(), got {direction!r}"
        )
    direction = _of_fine_numbers(direction)
    transforms = [
        scale_by_grouped_newton(
            groups,
            internal_damping=internal_damping,
            refresh_every=refresh_every,
            rates=rates,
            summary_decay=summary_decay,
            scale_rule=scale_rule,
            nonnegative=nonnegative,
            method=method,
            max_stack=max_stack,
            axis_name=axis_name,
        ),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if averaging is not None:
        transforms.append(optax.masked(average_params(averaging), lambda params: _in_a_group(groups, params)))
    rest = optax.chain(*transforms)

    def update(updates, state, params=None, **extra_args):
        told = {"noiseless": state[1].noiseless} | extra_args
        updates, of_direction = direction.update(updates, state[0], params, **told)
        updates, of_rest = rest.update(updates, state[1:], params, **extra_args)
        return updates, (of_direction, *of_rest)

    return optax.GradientTransformationExtraArgs(lambda params: (direction.init(params), *rest.init(params)), update)


def _of_fine_numbers(direction):
    """The direction of a gradient whose bad numbers are zeros; elementwise, so that it costs no pass of its own."""
    direction = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(_without_bad_numbers, updates)
        return direction.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(direction.init, update)


def _without_bad_numbers(x):
    if jnp.result_type(x) == jax.dtypes.float0:
        return jnp.zeros(jnp.shape(x), jnp.int32)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    largest = jnp.finfo(x.dtype).max ** 0.5  # an adaptive direction keeps squares
    return jnp.where(jnp.abs(x) <= largest, x, jnp.zeros_like(x))


def _in_a_group(groups, params):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([g >= 0 for g in _resolve(groups, params).index]) if leaves else params


def _moved(partition, params, steps):
    """``params - steps``; leaves without a group may be of a kind that can't be subtracted."""
    theta, treedef = jax.tree.flatten(params)

    def minus(x, step):
        dtype = jnp.result_type(x)
        x, info = (x - step).astype(dtype), jnp.finfo(dtype)
        # XLA may leave half precision unrounded inside the loss; the real step is rounded.
        return lax.reduce_precision(x, info.nexp, info.nmant) if info.bits < 32 else x

    pairs = zip(theta, jax.tree.leaves(steps), partition.index, strict=True)
    return treedef.unflatten([x if g < 0 else minus(x, step) for x, step, g in pairs])


def _refreshed(state, summary, damping, rates, summary_decay):
    """The state after a summary, if its numbers are fine; with counters that say so if not."""
    dtype = state.eta.dtype
    damping = jnp.asarray(damping).astype(dtype)
    before = Summary(state.loss, state.gbar, state.hbar, state.third)
    summary = jax.tree.map(lambda x, old: x.astype(old.dtype), summary, before)
    finite = all_finite(*summary, damping)
    refreshes = state.refreshes + finite.astype(jnp.int32)
    after = running_average(before, summary, summary_decay, jnp.maximum(refreshes, 1))
    average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

    solution = rates(average, damping)
    outcome = lambda solution: (jnp.asarray(solution.eta).astype(dtype), solution.status < CubicStatus.UNBOUNDED)
    eta, found = outcome(solution)
    if not isinstance(rates, _rates.EdgeRates):
        fall_back = _all_zero(state.eta) & (solution.status == CubicStatus.UNBOUNDED)
        edge = lambda: outcome(_rates.edge_rates()(average, damping))
        eta, found = lax.cond(fall_back, edge, lambda: (eta, found))
    accepted = finite & found & all_finite(eta)
    status = jnp.where(finite, solution.status, CubicStatus.NOT_FINITE)
    return state._replace(
        eta=jnp.where(accepted, eta, state.eta),
        damping=jnp.where(jnp.isfinite(damping), damping, state.damping),
        status=status.astype(jnp.int32),
        refreshes=refreshes,
        rejected=state.rejected + ~accepted,
        uphill=state.uphill + (finite & (total(summary.gbar) < 0)),
        **average._asdict(),
    )


def _all_zero(eta):
    return total(jnp.abs(eta)) == 0


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
                " Flatten the direction alone: grouped_newton(direction=optax.flatten(scale_by_adaptive_momentum()))"
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
            " value_fn=lambda p: loss(p, curvature_batch)). A wrapper that drops extra arguments drops it too"
        )
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function from params to the loss, got {value_fn!r}")


def _check_arguments(internal_damping, refresh_every, rates, summary_decay, scale_rule):
    def known(value):
        return not isinstance(value, jax.core.Tracer)

    fixed = not callable(internal_damping) and not isinstance(internal_damping, _rates.AdaptiveDamping)
    if fixed and known(internal_damping) and not 0 <= internal_damping < float("inf"):
        raise ValueError(f"internal_damping must be finite and at least 0, got {internal_damping!r}")
    if not callable(refresh_every):
        _rates.check_period("refresh_every", refresh_every)
    if scale_rule is not None and not callable(scale_rule):
        raise TypeError(
            f"scale_rule must be None or a function (scale, fell) -> scale, such as success_rule(), got {scale_rule!r}"
        )
    if known(summary_decay) and (callable(summary_decay) or not 0 <= summary_decay < 1):
        raise ValueError(f"summary_decay must be in [0, 1), got {summary_decay!r}")
    if not callable(rates):
        raise TypeError(
            f"rates must be a function (summary, damping) -> CubicSolution, such as edge_rates(), got {rates!r}"
        )
