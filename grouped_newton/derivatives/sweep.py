"""The exact summary in one sweep: one adjoint pass, then one forward pass of stacked tangents.

With psi(eta) = L(theta + sum_s eta_s u_s), for the value z of every equation z = f(x, y, ...) of the loss:

  ct_z  = dL/dz                        its cotangent
  z1_s  = d z / d eta_s                its first tangents, a stack over the groups s that have reached it
  z2_s  = d2 z / d eta_s^2             its second tangents, alike

A parameter of group s starts with z1_s = u_s and no z2. By the chain rule, summed over all equations,

  gbar_s  = L1_s
  hbar_st = sum  ct_z . f''[x1_s, x1_t]
  third_s = sum  ct_z . ( f'''[x1_s, x1_s, x1_s] + 3 f''[x1_s, x2_s] )

so an affine equation adds nothing, a bilinear one only the product of its two operands, and a stack is as deep as
the number of groups upstream. ``program.py`` makes nodes of the equations, ``passes.py`` has the three passes over
them, ``rules.py`` what a node does to tangents, by its kind.

The *slot* of a group is its number in the order in which the loss first uses a parameter of it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import sharding
from grouped_newton.derivatives.custom_rules import by_rule, keeps
from grouped_newton.derivatives.jaxprs import is_half, read
from grouped_newton.derivatives.layered import sums_of_layers
from grouped_newton.derivatives.passes import adjoint, primal, tangent
from grouped_newton.derivatives.program import build
from grouped_newton.derivatives.stacks import Layered, Stack, inner
from grouped_newton.derivatives.sums import Sums
from grouped_newton.numerics import zero_nonfinite


def sweep(
    loss: Callable,
    theta: list,
    u: list,
    groups: Sequence[tuple[int, ...]],
    layer_axes: Sequence[int | None],
    num_groups: int,
    dtype: Any,
    order: int = 3,
    max_stack: int | None = None,
    forgiving: bool = False,
):
    """(loss, gbar, hbar, third) of a function of a list of leaves, along the list ``u``.

    ``groups`` has the group of every leaf; where it has ``layer_axes``, the group of each index of that axis; of a
    frozen one, which may be anything, none. Order 2 leaves third at zero. ``max_stack`` bounds the tangents that are
    carried at once: with fewer than S, the groups go in chunks of half as many, every pair of chunks once. What a
    ``forgiving`` sweep leaves out is at the head of ``rules.py``.
    """
    moving = [i for i, own in enumerate(groups) if own]
    at, u = ([x[i] for i in moving] for x in (theta, u))
    groups, layer_axes = [groups[i] for i in moving], [layer_axes[i] for i in moving]
    restricted = lambda values: loss([dict(zip(moving, values, strict=True)).get(i, x) for i, x in enumerate(theta)])
    closed = jax.make_jaxpr(restricted)(at)
    followed = by_rule(closed)
    options = num_groups, dtype, order, max_stack, forgiving
    value, gbar, hbar, third = _sweep(followed, at, u, groups, layer_axes, *options)
    if followed is not closed:  # the slopes of the gradient itself, also where a rule is not linear in the cotangent
        gradient = jax.grad(lambda *xs: jex.jaxpr_as_fun(closed)(*xs)[0], range(len(at)))(*at)
        sums = Sums(num_groups, dtype, sharding.tracked_axes())
        for own, axis, dx, x in zip(groups, layer_axes, gradient, u, strict=True):
            sums.add_gbar(_slopes(zero_nonfinite(dx) if forgiving else dx, _along(x, own, axis)))
        gbar, _, _ = sums.totals()
    if keeps(followed.jaxpr.eqns):  # what else of a group whose forward and reverse mode differ is of neither
        unknown = jnp.isnan(jnp.diagonal(hbar))
        hbar = jnp.where(unknown[:, None] | unknown[None], jnp.nan, hbar)
    return value, gbar, hbar, third


def _along(u, slots, axis):
    """The tangents of a parameter: of its group, or of those of its layers along an axis."""
    return Stack(slots, u[None]) if axis is None else Layered(slots, u, axis)


def _slopes(ct, x1):
    """<ct, x1_s> for all groups s."""
    if isinstance(x1, Stack):
        return Stack(x1.slots, inner(ct[None], x1.array))
    return sums_of_layers(x1, inner(*(jnp.moveaxis(array, x1.axis, 0) for array in (ct, x1.array))))


def _sweep(closed, at, u, groups, layer_axes, num_groups, dtype, order, max_stack, forgiving):
    program = build(closed, [True] * len(at), forgiving=forgiving)
    slot = _slots_by_first_use(program, groups, num_groups)
    env = primal(program, at)
    (out,) = program.jaxpr.outvars
    value = jnp.asarray(read(env, out))
    # A tangent through half precision has its rounding; the adjoints of the parameters let it average out.
    half = any(is_half(v.aval) for eqn in program.jaxpr.eqns for v in eqn.outvars)
    wanted = frozenset(program.jaxpr.invars if half else ())
    axes = sharding.tracked_axes()
    seed = sharding.pvary(jnp.ones((), value.dtype), sharding.varying_axes(jax.typeof(value)))
    ct = adjoint(program, env, [(out, seed)], wanted) if program.active_outs[0] else {}

    def one_pass(slots, order, u):
        """The sums of the groups of these slots, which are numbered anew: passes over as many groups look alike."""
        place = {r: k for k, r in enumerate(slots)}
        start = {}
        for v, x, own, axis in zip(program.jaxpr.invars, u, groups, layer_axes, strict=True):
            here = tuple(place.get(slot[g], -1) for g in own)
            if max(here) >= 0:
                start[v] = _along(x, here, axis)
        sums = Sums(len(place), dtype, axes)
        first, _ = tangent(program, env, ct, start, {}, sums, order)
        for v, x in start.items():
            if half and v in ct:
                sums.add_gbar(_slopes(ct[v], x))
        if not half and _is_active(first, out):
            sums.add_gbar(first[out])
        if len(place) == num_groups:
            return sums.totals()
        at = jnp.array([place.get(r, 0) for r in range(num_groups)], jnp.int32)
        slopes, hbar, third = sums.totals()
        return slopes[at], hbar[at][:, at], third[at]

    found = Sums(num_groups, dtype, axes).totals()
    covered: set[int] = set()
    for slots in _passes(num_groups, max_stack):
        # The barrier keeps the tangents of two passes from living at the same time.
        u, found = lax.optimization_barrier((u, found))
        here = np.isin(np.arange(num_groups), slots)
        new = not covered.issuperset(slots)
        slopes, hbar, third = one_pass(slots, order if new else 2, u)
        covered.update(slots)
        found = (
            jnp.where(here, slopes, found[0]),
            jnp.where(here[:, None] & here[None], hbar, found[1]),
            jnp.where(here, third, found[2]) if new else found[2],
        )
    gbar, hbar, third = found
    in_order = jnp.array(slot, jnp.int32)
    hbar = hbar[in_order][:, in_order]
    hbar = jnp.tril(hbar) + jnp.tril(hbar, -1).T  # as the definition where a custom rule is no gradient of anything
    return value.astype(dtype), gbar[in_order], hbar, third[in_order]


def _passes(num_groups, max_stack):
    """The sets of slots to carry together, so that every pair of groups is in one of them."""
    if max_stack is None or max_stack >= num_groups:
        return [range(num_groups)]
    size = max_stack // 2
    chunks = [range(k, min(k + size, num_groups)) for k in range(0, num_groups, size)]
    return [[*a, *b] for a, b in itertools.combinations(chunks, 2)]


def _slots_by_first_use(program, groups, num_groups):
    """A number for every group, in the order in which the program first reads one of its parameters."""
    groups_of = dict(zip(program.jaxpr.invars, groups, strict=True))
    seen = dict.fromkeys(g for node in program.nodes for v in node.active for g in groups_of.get(v, ()))
    seen.update(dict.fromkeys(range(num_groups)))
    slot = [0] * num_groups
    for r, g in enumerate(seen):
        slot[g] = r
    return slot


def _is_active(stacks, v):
    return not isinstance(v, jex.Literal) and v in stacks
