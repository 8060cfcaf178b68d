"""The average of the parameters over the latest part of training, to evaluate at."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grouped_newton import groups as _groups
from grouped_newton.numerics import is_traced


class AverageParamsState(NamedTuple):
    """State of :func:`average_params`.

    Attributes:
      average: averaged parameters, in at least float32; integers as they were
        at ``init``, nothing of leaves that aren't numbers.
      averaged: steps in the average, int32 ().
    """

    average: Any
    averaged: jax.Array


def average_params(fraction: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the parameters over about the last ``fraction`` of all steps.

    It leaves the updates as they are. The last transform of a chain, it sees the
    parameters after step t (from 0), theta = params + updates::

      average <- (1 - w) average + w theta,   w = 1 / (1 + fraction t)

    so no horizon is needed, and the first step replaces the initial parameters.
    :func:`eval_params` finds the average in the state.

    Args:
      fraction: in (0, 1], of the steps so far, without unit.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs ``params``.

    Raises:
      ValueError: if ``fraction`` is out of range, or ``update`` lacks ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = average_params(1.0)
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array(1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(eval_params(state, params))
      (3.0, 2.0)

    References:
      Ohad Shamir and Tong Zhang, Stochastic Gradient Descent for Non-smooth
      Optimization, arXiv 1212.1824 (polynomial-decay averaging).
    """
    if not is_traced(fraction) and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction!r}")

    def init(params):
        return AverageParamsState(jax.tree.map(_start, params), jnp.array(0, jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("average_params needs the current params: tx.update(updates, state, params)")
        w = 1 / (1 + fraction * state.averaged.astype(jnp.float32))

        def mix(average, x, u):
            if _is_masked(average) or not jnp.issubdtype(average.dtype, jnp.inexact):
                return average
            wide = functools.partial(jnp.asarray, dtype=_groups.wider(jnp.result_type(x), jnp.result_type(u)))
            theta = (wide(x) + wide(u)).astype(jnp.result_type(x)).astype(average.dtype)
            return average + w.astype(average.dtype) * (theta - average)

        average = jax.tree.map(mix, state.average, params, updates, is_leaf=_is_masked)
        return updates, AverageParamsState(average, optax.safe_increment(state.averaged))

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: Any, params: Any) -> Any:
    """The averaged parameters in an optimizer's state, to evaluate and deploy.

    Args:
      state: the state of an optimizer with :func:`average_params` in it, at any
        depth, such as that of ``grouped_newton()``; an NNX optimizer's ``opt_state``.
      params: the current parameters; those that aren't averaged are returned as they are.

    Returns:
      The average, with the structure and dtypes of ``params``; a copy, so that it outlives a step
      that donates the state and may itself be donated.

    Raises:
      ValueError: if the state holds no average or several, or of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones(2)}
      >>> tx = optax.chain(optax.sgd(0.1), average_params())
      >>> eval_params(tx.init(params), params)["w"].tolist()
      [1.0, 1.0]
    """
    return jax.tree.map(_copy, averaged(state, params))


def averaged(state: Any, params: Any) -> Any:
    """:func:`eval_params` without a copy."""
    is_state = lambda x: isinstance(x, AverageParamsState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} averages of the params and must hold one: give the state of an optimizer"
            " made with averaging, such as grouped_newton() or optax.chain(..., average_params())"
        )
    average = jax.tree.leaves(found[0].average, is_leaf=_is_masked)
    leaves, treedef = jax.tree.flatten(params)
    fits = lambda a, x: _is_masked(a) or jnp.shape(a) == jnp.shape(x)
    if len(average) != len(leaves) or not all(map(fits, average, leaves)):
        raise ValueError("the average in the state is of other parameters than these; give those of the training step")
    pairs = zip(average, leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [x if _is_masked(a) else jnp.asarray(a).astype(jnp.result_type(x)) for a, x in pairs]
    )


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def _copy(x):
    if not isinstance(x, jax.Array):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # a known key has no copy inside a trace
        return jax.random.wrap_key_data(jax.random.key_data(x).copy(), impl=jax.random.key_impl(x))
    return x.copy()


def _start(x):
    """A copy, so that params and state can both be donated; nothing of what isn't a number."""
    dtype = _groups.dtype_of(x)
    if not _groups.is_numeric(dtype):
        return optax.MaskedNode()
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.array(x, _groups.wider(dtype, jnp.float32) if inexact else dtype, copy=True)
