"""What a run is watched by: scalars out of an optimizer's state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grouped_newton.numerics import quadratic_form, total
from grouped_newton.refresh import GroupedNewtonState

_AS_THEY_ARE = ("damping", "model_error", "caution", "status", "refreshes", "rejected", "uphill")


def metrics(state: Any, names: Sequence[str] | None = None, *, learning_rate: Any = 1.0) -> dict[str, jax.Array]:
    """Scalars to log, out of an optimizer's state; under ``jit`` too.

    With gbar and hbar the averages in the state::

      rate               = eta = learning_rate * the state's rates, those of the last update
      predicted_decrease = gbar^T eta - eta^T hbar eta / 2

    Beside them ``loss``, that of the last refresh, and ``damping``, ``model_error``, ``caution``, ``status``,
    ``refreshes``, ``rejected`` and ``uphill`` as they are in :class:`GroupedNewtonState`.

    Args:
      state: the state of an optimizer with one :func:`scale_by_grouped_newton` in it, at any depth, such
        as that of :func:`grouped_newton`; an NNX optimizer's ``opt_state``.
      names: the group names, of length S, as ``groups.names`` gives them; numbers by default.
      learning_rate: the optimizer's, as a number, (); 1 by default. Of a schedule give its value.

    Returns:
      A flat dict of arrays of shape (). The rates are ``rate/NAME``; without names, ``rate/0``,
      ``rate/1``, ..., or ``rate`` where there is one group.

    Raises:
      ValueError: if the state holds none or several of :class:`GroupedNewtonState`, or the number of
        names isn't that of the groups.

    Example:
      >>> import grouped_newton as gn
      >>> params = {"hidden": {"w": jnp.ones(2)}, "output": {"w": jnp.ones(2)}}
      >>> tx = gn.grouped_newton(groups=gn.groups.per_module)
      >>> found = metrics(tx.init(params), gn.groups.names(gn.groups.per_module, params))
      >>> [name for name in found if name.startswith("rate")], float(found["caution"])
      (['rate/hidden', 'rate/output'], 1.0)
    """
    newton = _the_one(state)
    eta = learning_rate * jnp.asarray(newton.rates)  # an NNX variable in an NNX optimizer, as all fields are
    loss, gbar, hbar, _ = map(jnp.asarray, newton.summary)
    S = eta.shape[0]
    if names is None:
        labels = ["rate"] if S == 1 else [f"rate/{s}" for s in range(S)]
    elif len(names) == S:
        labels = [f"rate/{name}" for name in names]
    else:
        raise ValueError(f"names must have one name for each of the {S} groups in the state, got {len(names)}")
    return {
        **dict(zip(labels, eta, strict=True)),
        "predicted_decrease": total(gbar * eta) - quadratic_form(hbar, eta) / 2,
        "loss": loss,
        **{name: jnp.asarray(getattr(newton, name)) for name in _AS_THEY_ARE},
    }


def _the_one(state):
    """The state of the only transform of ours in it."""
    found = [newton for _, newton in optax.tree.get_all_with_path(state, GroupedNewtonState.__name__)]
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} of GroupedNewtonState and must hold one: give the state of an optimizer made"
            " with grouped_newton() or scale_by_grouped_newton(); of one with several, a part"
        )
    return found[0]
