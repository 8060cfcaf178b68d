"""Tangents of parameters that hold all layers of a model, where every layer is a group of its own.

  x (.., L, ..)   ``Layered``: the tangents of all L layers in one array. Those of group slots[k] are slice k of it, and
                  zero elsewhere: a stack of them would be L arrays of L layers, nearly all of it zeros.

It stays one array through equations that keep layers apart: those that move its numbers (casts, transposes, a layer
taken out), elementwise ones, products and sums within a layer; up to a scan over the layers. What moves in one layer's
slice is of that layer's group alone, so that hbar has no local terms between two of them. A sum over layers is that of
the terms of each. In step k of that scan it is the tangent of one group, slots[k]. Which one isn't known where the body
is traced, so that there it is a group more, *own*, whose slot is behind all others:

  enter   the rows of group slots[k], in stacks that have any, become those of own
  leave   the rows of own become those of group slots[k]; of the sums too

So every layer costs one tangent of its weights, as it does by itself. Any other equation gets the stack.
"""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import sharding
from grouped_newton.derivatives.program import ELEMENTWISE
from grouped_newton.derivatives.rules import restricted, unary
from grouped_newton.derivatives.stacks import Layered, Stack, inner, select, spread, spread_or_zero, within
from grouped_newton.derivatives.sums import Sums

_NOWHERE = -1
_PIECES = 4  # of a scan at most
_WORTH = 1 << 20  # numbers of tangents carried through all steps, for every piece


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
    """``values[k]`` of every layer k, added up over each group."""
    slots = reached(x)
    own = np.equal.outer(slots, x.slots).reshape(len(slots), -1, *[1] * (values.ndim - 1))
    return Stack(slots, jnp.sum(jnp.where(own, values[None], 0), axis=1))


def _along(axis, length, ndim):
    return [length if d == axis else 1 for d in range(ndim)]


# --- Equations that keep layers apart ---------------------------------------------------------------------------------


def by_layer(node, env, ct, x1, x2, sums, order):
    """First and second tangents of the outputs of a node that keeps layers apart, as layers; None where they meet.

    Rows that are zero but for one layer need no more than that layer. Sums over layers alone are taken too, as stacks.
    """
    moving = [i for i, x in enumerate(x1) if x is not None]
    x1, x2 = ([stacks[i] for i in moving] for stacks in (x1, x2))
    alike = all(isinstance(x, Layered) and x.slots == x1[0].slots for x in x1)
    if not alike or node.kind in ("scan", "general") or node.joint or len(node.outs) > 1:
        return None
    if node.kind == "unary":
        return _unary_by_layer(node, env, ct, x1[0], x2[0], sums, order)
    fn, at = restricted(node, env, moving), tuple(env[node.active[i]] for i in moving)
    traced = jax.make_jaxpr(lambda xs: fn(xs)[0])(at).jaxpr
    found = _layers_of_output(traced, x1)
    if found is None:
        return _summed_over_layers(traced, x1[0], x2[0]) if len(moving) == 1 and node.kind == "linear" else None
    axis, slots = found
    if max(slots) < 0:
        return [None], [None]

    def pushed(stacks):
        if all(x is None for x in stacks):
            return None
        along = tuple(
            sharding.zeros_of(jax.typeof(y)) if x is None else x.array for x, y in zip(stacks, at, strict=True)
        )
        return placed(jax.jvp(lambda *xs: fn(xs)[0], at, along)[1])

    def placed(array):
        array = sharding.with_sharding_of(array, node.outs[0].aval)
        return Stack(slots, array[None]) if axis is None else Layered(slots, array, axis)

    z1, z2 = pushed(x1), pushed(x2)
    if node.kind == "linear" or len(moving) == 1:
        return [z1], [z2]
    if axis is None:
        return None

    def cross(x, y):
        of_second = lambda a: jax.jvp(lambda b: fn([a, b])[0], at[1:], (y.array,))[1]
        return jax.jvp(of_second, at[:1], (x.array,))[1]

    def term(z):
        layers = (jnp.moveaxis(array, axis, 0) for array in (ct[node.outs[0]], z))
        return sums_of_layers(z1, inner(*layers))

    product = 2 * cross(*x1)
    _add_hbar(sums, term(product))
    if order > 2:
        z2 = placed(product if z2 is None else z2.array + product)
        for x, y in ((x2[0], x1[1]), (x1[0], x2[1])):
            if x is not None and y is not None:
                sums.add_third(*term(3 * cross(x, y)))
    return [z1], [z2]


def _unary_by_layer(node, env, ct, x1, x2, sums, order):
    (out,), axis = node.outs, x1.axis

    def rule(x1, x2, ct, derivatives):
        local = Sums(1, sums.dtype, sums.axes)
        first, second = ([x if x is None else Stack((0,), x[None])] for x in (x1, x2))
        outs = unary(node, {(out, "derivatives"): derivatives}, {out: ct}, first, second, local, order)
        _, hbar, third = local.totals()
        return [z and z.array[0] for (z,) in outs], hbar[0, 0], third[0]

    along = x1.array, x2 and x2.array, ct[out], env[out, "derivatives"]
    arrays, hbar, third = jax.vmap(rule, axis, (axis, 0, 0))(*along)
    _add_hbar(sums, sums_of_layers(x1, hbar))
    if order > 2:
        sums.add_third(*sums_of_layers(x1, third))
    z1, z2 = ([z if z is None else Layered(x1.slots, z, axis)] for z in arrays)
    return z1, z2


def _add_hbar(sums, stack):
    sums.add_hbar(stack.slots, stack.slots, jnp.diag(stack.array))


def _summed_over_layers(jaxpr, x1, x2):
    """The stacks of a sum over layers, by sums over the other axes; None for other equations."""
    eqn = jaxpr.eqns[0]
    if len(jaxpr.eqns) > 1 or eqn.primitive.name != "reduce_sum":
        return None
    others = [d for d in eqn.params["axes"] if d != x1.axis]

    def summed(x):
        if x is None:
            return None
        by_layer = jnp.sum(jnp.moveaxis(x.array, x.axis, 0), [d + (d < x.axis) for d in others])
        return sums_of_layers(x, by_layer)

    return [summed(x1)], [summed(x2)]


def _layers_of_output(jaxpr, stacks):
    """Along which axis the output has which layers; None for the axis where it is of one layer, or at all."""
    places = {v: (x.axis, x.slots) for v, x in zip(jaxpr.invars, stacks, strict=True)}
    for eqn in jaxpr.eqns:
        read = [k for k, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and v in places]
        after = {_place_after(eqn, k, *places[eqn.invars[k]]) for k in read}
        if len(after) > 1 or None in after:
            return None
        places.update((v, place) for place in after for v in eqn.outvars)
    return places.get(jaxpr.outvars[0])


def _place_after(eqn, operand, axis, slots):
    """Axis and slots after an equation."""
    name, params, after = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    shape = eqn.invars[operand].aval.shape
    if axis is None:
        return axis, slots
    if name in ELEMENTWISE:
        return (axis, slots) if len(after) == len(shape) and after[axis] == shape[axis] else None
    if name == "transpose":
        return params["permutation"].index(axis), slots
    if name == "squeeze":
        here = axis not in params["dimensions"]
        return axis - sum(d < axis for d in params["dimensions"]) if here else None, slots
    if name == "reduce_sum" and axis not in params["axes"]:
        return axis - sum(d < axis for d in params["axes"]), slots
    if name == "dot_general":
        contracted, batch = (dims[operand] for dims in params["dimension_numbers"])
        free = [d for d in range(len(shape)) if d not in (*contracted, *batch)]
        if axis in batch:
            return batch.index(axis), slots
        if axis in free:
            return (len(batch) if operand == 0 else len(after) - len(free)) + free.index(axis), slots
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


def fit_for(node, x1: list, x2: list) -> tuple[list, list]:
    """Both tangents of the operands of a node, as stacks unless it scans over their layers."""
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

    fitted = [fit(i, x) for i, x in enumerate(x1)]
    as_first = lambda x, like: as_stack(x) if isinstance(x, Layered) and isinstance(like, Stack) else x
    return fitted, [as_first(x, like) for x, like in zip(x2, fitted, strict=True)]


def steps_first(x: Stack | Layered) -> jax.Array:
    """The tangents of a scanned operand by step, each as the array of a stack."""
    return x.array[:, None] if isinstance(x, Layered) else jnp.moveaxis(x.array, 1, 0)


def pieces(scan, stacks, num_groups):
    """The steps of a scan cut into spans, in the order in which they are taken; given the tangents of its operands.

    A body carries the tangents of all groups that come in with any of its steps. In one piece that is a square where a
    triangle would do, in n pieces (n + 1) / (2 n) of it; but every piece is a body to compile.
    """
    layered, others = (
        {s for x in stacks if isinstance(x, Layered) == here for s in reached(x)} for here in (True, False)
    )
    carry = sum(v.aval.size for v in scan.body.jaxpr.outvars[: scan.num_carry])
    worth = carry * num_groups * scan.length // _WORTH
    count = max(min(_PIECES, worth, len(layered - others) // 2, scan.length // 2), 1)
    ends = [scan.length * k // count for k in range(count + 1)]
    spans = list(itertools.pairwise(ends))
    return spans[::-1] if scan.reverse else spans


def steps_of(x, begin, end):
    """The tangents of a scanned operand in some of the steps; None where they have none."""
    if isinstance(x, Stack):
        return Stack(x.slots, lax.slice_in_dim(x.array, begin, end, axis=1))
    x = Layered(x.slots[begin:end], lax.slice_in_dim(x.array, begin, end), 0)
    return x if reached(x) else None


def joined(parts, v):
    """The tangents of an output of all steps, from those of spans that begin at some of them."""
    if len(parts) == 1 and parts[0][1].array.shape[1:] == v.aval.shape:
        return parts[0][1]
    if not parts:
        return None
    slots = tuple(sorted({s for _, x in parts for s in x.slots}))
    whole = sharding.zeros_of(v.aval, rows=len(slots))
    for begin, x in parts:
        whole = lax.dynamic_update_slice_in_dim(whole, spread(x, slots), begin, axis=1)
    return Stack(slots, whole)


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
