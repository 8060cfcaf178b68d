"""The optimizer: a direction, the transform that scales it, a learning rate and an average of the params."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from grouped_newton import groups as _groups
from grouped_newton import rates as _rates
from grouped_newton import trees
from grouped_newton.averaging import average_params, averaged
from grouped_newton.damping import AdaptiveDamping, adaptive_damping
from grouped_newton.direction import in_float32, of_finite_gradients
from grouped_newton.transform import check_update_arguments, resolve_groups, scale_by_grouped_newton


def grouped_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    groups: _groups.Grouping = _groups.single,
    *,
    direction: optax.GradientTransformation | None = None,
    internal_damping: float | Callable[[jax.Array], Any] | AdaptiveDamping = adaptive_damping(),
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
    direction = in_float32(optax.scale_by_adam(b1=0.9, b2=0.99)) if direction is None else direction
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation such as optax.scale_by_adam(), got {direction!r}"
        )
    transforms = [
        of_finite_gradients(direction),
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
        moving = trees.without_frozen(resolve_groups(groups, params), params)
        return (direction.init(moving), scaling.init(params), *after.init(moving))

    def update(updates, state, params=None, **extra_args):
        check_update_arguments(params, extra_args.get("value_fn"))
        partition = resolve_groups(groups, params)
        moving = trees.without_frozen(partition, params)
        u, first = direction.update(trees.without_frozen(partition, updates, params), state[0], moving, **extra_args)
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
    return jax.tree.unflatten(treedef, [_groups.still(x) if g < 0 else next(new) for x, g in pairs])
