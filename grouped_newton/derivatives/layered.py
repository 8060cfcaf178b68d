"""Tangents of parameters that hold all layers of a model, where every layer is a group of its own.

  x (.., L, ..)   ``Layered``: the tangents of all L layers in one array. Those of group slots[k] are slice k of it, and
                  zero elsewhere: a stack of them would be L arrays of L layers, nearly all of it zeros.

It stays one array through equations that only move its numbers (casts, transposes, a layer taken out), up to a scan
over the layers. In step k of that scan it is the tangent of one group, slots[k]. Which one isn't known where the body
is traced, so that there it is a group more, *own*, whose slot is behind all others:

  enter   the rows of group slots[k], in stacks that have any, become those of own
  leave   the rows of own become those of group slots[k]; of the sums too

So every layer costs one tangent of its weights, as it does by itself. Any other equation gets the stack.
"""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from grouped_newton import sharding
from grouped_newton.derivatives.program import ELEMENTWISE
from grouped_newton.derivatives.stacks import Layered, Stack, select, spread_or_zero, within

_NOWHERE = -1


def as_stack(x: Layered) -> Stack | None:
    """The stack of the groups that are in this pass."""
    slots = reached(x)
    if not slots:
        return None
    if len(x.slots) == 1:
        return Stack(slots, x.array[None])
    own = np.equal.outer(slots, x.slots).reshape([len(slots), *_along(x.axis, len(x.slots), x.array.ndim)])
    aval = jax.typeof(x.array)
    rows = sharding.with_sharding_of(jnp.broadcast_to(x.array[None], (len(slots), *x.array.shape)), aval)
    return Stack(slots, jnp.where(sharding.with_sharding_of(jnp.broadcast_to(own, rows.shape), aval), rows, 0))


def reached(x: Stack | Layered) -> tuple[int, ...]:
    """The slots of the groups that have tangents here, ascending."""
    return tuple(sorted({s for s in x.slots if s >= 0}))


def sums_of_layers(x: Layered, values: jax.Array) -> Stack:
    """One number per layer, added up over each group."""
    slots = reached(x)
    own = np.equal.outer(slots, x.slots)
    return Stack(slots, jnp.sum(jnp.where(own, values[None], 0), axis=1))


def _along(axis, length, ndim):
    return [length if d == axis else 1 for d in range(ndim)]


# --- Equations that only move numbers ---------------------------------------------------------------------------------


def moved(node, env, x: Layered) -> tuple[bool, Layered | Stack | None]:
    """Whether a node of one operand keeps layers apart, and its tangents then."""
    if node.kind != "linear" or len(node.active) > 1 or len(node.outs) > 1:
        return False, None
    (v,), (out,), rest = node.active, node.outs, [env[i] for i in node.inactive]
    traced = jax.make_jaxpr(lambda y, rest: node.fn([y], rest))(v.aval, [i.aval for i in node.inactive])
    found = _layers_of_output(traced.jaxpr, x)
    if found is None:
        return False, None
    axis, slots = found
    array = jax.jvp(lambda y: node.fn([y], rest)[0], (env[v],), (x.array,))[1]
    array = sharding.with_sharding_of(array, out.aval)
    if axis is not None:
        return True, Layered(slots, array, axis)
    return True, Stack(slots, array[None]) if slots[0] >= 0 else None


def _layers_of_output(jaxpr, x):
    """Along which axis the output has which layers; None for the axis where it is of one layer, or at all."""
    places = {jaxpr.invars[0]: (x.axis, x.slots)}
    for eqn in jaxpr.eqns:
        read = [v for v in eqn.invars if not isinstance(v, jex.Literal) and v in places]
        if not read:
            continue
        place = _moved_by(eqn, read[0].aval.shape, *places[read[0]]) if len({places[v] for v in read}) == 1 else None
        if place is None:
            return None
        places.update((v, place) for v in eqn.outvars)
    return places.get(jaxpr.outvars[0])


def _moved_by(eqn, shape, axis, slots):
    """Axis and slots after an equation."""
    name, params, after = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if axis is None or (name in ELEMENTWISE and after == shape):
        return axis, slots
    if name == "transpose":
        return params["permutation"].index(axis), slots
    if name == "squeeze":
        here = axis not in params["dimensions"]
        return axis - sum(d < axis for d in params["dimensions"]) if here else None, slots
    if name == "broadcast_in_dim":
        at = params["broadcast_dimensions"][axis]
        return (at, slots) if after[at] == len(slots) else None
    if name == "reshape":
        before = lambda shape, d: int(np.prod(shape[:d]))
        fits = [d for d, n in enumerate(after) if n == len(slots) and before(after, d) == before(shape, axis)]
        return (fits[0], slots) if fits else None
    if name == "rev":
        return axis, slots[::-1] if axis in params["dimensions"] else slots
    if name == "slice":
        start, limit, step = (params[k] and params[k][axis] for k in ("start_indices", "limit_indices", "strides"))
        return axis, slots[start:limit:step]
    return None


# --- Scans over layers ------------------------------------------------------------------------------------------------


def fit_for(node, x1: list) -> list:
    """Tangents of the operands of a node, as stacks unless it scans over their layers."""
    kept: list[tuple] = []

    def fit(i, x):
        if not isinstance(x, Layered):
            return x
        scanned = node.kind == "scan" and node.scan.is_scanned(node.scan.operands[i]) and x.axis == 0
        # Two groups of one step that may be the same one can't both have a slot of their own.
        if not scanned or any(k != x.slots and {*k}.intersection(reached(x)) for k in kept):
            return as_stack(x)
        kept.append(x.slots)
        return x

    return [fit(i, x) for i, x in enumerate(x1)]


def steps_first(x: Stack | Layered) -> jax.Array:
    """The tangents of a scanned operand by step, each as the array of a stack."""
    return x.array[:, None] if isinstance(x, Layered) else jnp.moveaxis(x.array, 1, 0)


class Steps:
    """What is called own in the steps of a scan, given the tangents of its operands."""

    def __init__(self, stacks, num_groups):
        layered = dict.fromkeys(x.slots for x in stacks if isinstance(x, Layered))
        others = {s for x in stacks if not isinstance(x, Layered) for s in x.slots}
        self.own = {slots: num_groups + a for a, slots in enumerate(layered)}
        self.num_groups = num_groups + len(self.own)
        # Groups that first come in here have no rows before their own step.
        here = {slots: [s for s in slots if s >= 0] for slots in layered}
        self.late = {k for k, slots in here.items() if len({*slots}) < len(slots) or others.intersection(slots)}

    def inside(self, slots):
        """The slots of a stack within a step."""
        return {*slots, *(self.own[layers] for layers in self._there_before(slots))}

    def _there_before(self, slots):
        return [layers for layers in self.own if layers in self.late and {*layers}.intersection(slots)]

    def outside(self, slots):
        """Those of the same stack after it."""
        everything = [s for layers, own in self.own.items() if own in slots for s in layers if s >= 0]
        return {*slots}.difference(self.own.values()).union(everything)

    def numbers(self, length):
        """Those of the steps, where there is an own."""
        return jnp.arange(length) if self.own else None

    def given(self, x):
        """The slots that an operand has between the steps."""
        return (self.own[x.slots],) if isinstance(x, Layered) else x.slots

    def enter(self, stack, k):
        """A stack as it is within step k."""
        for layers in self._there_before(stack.slots):
            slots, array = stack
            here = _in_step(layers, slots, k, array)
            row = jnp.sum(jnp.where(here, array, 0), axis=0, keepdims=True)
            array = jnp.concatenate([jnp.where(here, 0, array), row])
            stack = Stack((*slots, self.own[layers]), array)
        return stack

    def leave(self, stack, slots, v, k):
        """The array of a stack of these slots after step k; of zeros where there is none."""
        array = spread_or_zero(within(stack, slots), slots, v)
        for layers, own in self.own.items():
            if stack is not None and own in stack.slots:
                array = jnp.where(_in_step(layers, slots, k, array), select(stack, (own,)), array)
        return array

    def totals(self, hbar, third, k):
        """Sums over the groups and own, as sums over the groups."""
        for layers in reversed(self.own):
            n = len(third) - 1
            row, here = (jnp.asarray(x) for x in (hbar[n, :n], _in_step(layers, range(n), k, third)))
            column, both = hbar[:n, n], here[:, None] & here[None]
            crossed = jnp.where(here[:, None], row[None], 0) + jnp.where(here[None], column[:, None], 0)
            hbar = hbar[:n, :n] + crossed + jnp.where(both, hbar[n, n], 0)
            third = third[:n] + jnp.where(here, third[n], 0)
        return hbar, third


def _in_step(layers, slots, k, array):
    """Where the group of layer k is among the slots, to be broadcast to the array."""
    slots = list(slots)
    places = np.array([slots.index(s) if s in slots else _NOWHERE for s in layers], np.int32)
    here = np.arange(len(slots), dtype=np.int32) == jnp.asarray(places)[k]
    return here.reshape(-1, *[1] * (array.ndim - 1))
