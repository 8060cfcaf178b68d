"""What a node does to tangents: the first and second ones of its outputs from those of its operands, by its kind.

  linear     z1 = f'[x1],  z2 = f'[x2]
  unary      f', f'', f''' are arrays, computed once
  bilinear   f(x1, y), f(x, y1) and their like
  general    jax.jvp and jax.vjp of the node itself; with a custom_vjp that is kept these are of two functions, and
             where <ct, z1_s> isn't <vjp of ct, x1_s> hbar_ss and third_s are NaN

Every rule adds the local terms of hbar and third to ``sums``; ct is the cotangent of the node's output.

A *forgiving* node keeps what isn't finite from spoiling the rest: what doesn't move has no derivative along, whatever
f' and f'' are there; and a second derivative that is NaN, which JAX makes of 0 inf where the true one is finite, as of
relu(x)^1.5 at 0 and of singular values that are equal, is left out of hbar and leaves NaN in third. An infinite one of
what moves stays infinite.
"""

import jax
import jax.numpy as jnp

from grouped_newton import sharding
from grouped_newton.derivatives.custom_rules import forward_only, same_slopes
from grouped_newton.derivatives.jaxprs import replaced
from grouped_newton.derivatives.stacks import Stack, add, gram, inner, map_rows, select, spread_or_zero


def linear(node, env, ct, x1, x2, sums, order):
    return _pushed(node, env, x1), _pushed(node, env, x2)


def _pushed(node, env, stacks):
    """The first tangents of the outputs, by jvps with respect to operands that are moved together."""
    outs = [None] * len(node.outs)
    for targets in _together(node, stacks):
        slots = tuple(sorted({s for i in targets if stacks[i] is not None for s in stacks[i].slots}))
        at = tuple(env[node.active[i]] for i in targets)
        fn = restricted(node, env, targets)
        X = [spread_or_zero(stacks[i], slots, node.active[i]) for i in targets]
        rows = map_rows(lambda *dx, fn=fn, at=at: jax.jvp(lambda *xs: fn(xs), at, dx)[1], *X)
        pushed = [Stack(slots, sharding.with_sharding_of(z, v.aval)) for z, v in zip(rows, node.outs, strict=True)]
        outs = [add(z, dz) for z, dz in zip(outs, pushed, strict=True)]
    return outs


def _together(node, stacks):
    """The operands to be moved at once: those with the same slots, or all where that takes no more than the outputs."""
    moving = [i for i, x in enumerate(stacks) if x is not None]
    if not moving:
        return []
    if node.joint:
        return [range(len(node.active))]
    alike: dict[tuple, list] = {}
    for i in moving:
        alike.setdefault(stacks[i].slots, []).append(i)
    small = sum(v.aval.size for v in node.active) <= sum(v.aval.size for v in node.outs)
    return [moving] if len(alike) > 2 and small else list(alike.values())


def unary(node, env, ct, x1, x2, sums, order):
    # z1 = f' x1,  z2 = f'' x1^2 + f' x2;  with w2 = ct f'', w3 = ct f''':
    # hbar_st += <x1_s, w2 x1_t>,  third_s += <x1_s, w3 x1_s^2 + 3 w2 x2_s>
    (x1,), (x2,), out = x1, x2, node.outs[0]
    derivatives = env[out, "derivatives"]
    f1, f2 = derivatives[:2]
    times = _forgiving_times if node.forgiving else jnp.multiply
    w2 = times(ct[out], f2)
    X = x1.array.astype(w2.dtype)
    weighted = times(X, (_unless_nan(w2) if node.forgiving else w2)[None])
    sums.add_hbar(x1.slots, x1.slots, gram(weighted, X))
    z1 = Stack(x1.slots, times(X, f1[None]).astype(out.aval.dtype))
    if order == 2:
        return [z1], [None]
    w3 = times(ct[out], derivatives[2])
    if node.forgiving:
        w3 = w3 + 0 * w2
    local = w3[None] * X * X
    curved = times(X, f2[None] * X)
    if x2 is not None and x2.slots == x1.slots:
        X2 = x2.array.astype(w2.dtype)
        local = local + 3 * w2[None] * X2
        z2 = Stack(x1.slots, (curved + times(X2, f1[None])).astype(out.aval.dtype))
    else:
        z2 = Stack(x1.slots, curved.astype(out.aval.dtype))
        if x2 is not None:
            z2 = add(z2, Stack(x2.slots, times(x2.array.astype(f1.dtype), f1[None]).astype(out.aval.dtype)))
            sums.add_third(x2.slots, 3 * inner(select(Stack(x1.slots, weighted), x2.slots), x2.array))
    sums.add_third(x1.slots, inner(X, _where_moving(X, local) if node.forgiving else local))
    return [z1], [z2]


def bilinear(node, env, ct, x1, x2, sums, order):
    # z1 = f(x1, y) + f(x, y1);  z2 = f(x2, y) + f(x, y2) + 2 f(x1, y1)
    # hbar_st += ct.f(x1_s, y1_t) + ct.f(x1_t, y1_s);  third_s += 3 ct.(f(x2_s, y1_s) + f(x1_s, y2_s))
    (z1,), (z2,) = linear(node, env, ct, x1, x2, sums, order)
    if x1[0] is None or x1[1] is None:
        return [z1], [z2]
    out = node.outs[0]
    cotangent = ct[out].astype(out.aval.dtype)
    # Contract ct with the operand that has fewer tangents (or is larger), the rest is inner products.
    cost = [(len(x1[i].slots), -node.active[i].aval.size) for i in (0, 1)]
    a, b = (1, 0) if cost[0] < cost[1] else (0, 1)  # pull the tangents of b onto a
    x, y = env[node.active[a]], env[node.active[b]]
    fn = restricted(node, env, [a, b])
    f = lambda x, y: fn([x, y])[0]
    cross = lambda dx, dy: jax.jvp(lambda x: jax.jvp(lambda y: f(x, y), (y,), (dy,))[1], (x,), (dx,))[1]
    pull = lambda dy: jax.vjp(lambda x: jax.jvp(lambda y: f(x, y), (y,), (dy,))[1], x)[1](cotangent)[0]
    pulled = Stack(x1[b].slots, map_rows(pull, x1[b].array))
    block = gram(x1[a].array, pulled.array)
    sums.add_hbar(x1[a].slots, x1[b].slots, block)
    sums.add_hbar(x1[b].slots, x1[a].slots, block.T)
    shared = tuple(s for s in x1[a].slots if s in x1[b].slots)
    if order == 2 or not shared:
        return [z1], [z2]
    product = map_rows(cross, select(x1[a], shared), select(x1[b], shared))
    z2 = add(z2, Stack(shared, 2 * product))
    both = lambda p, q: tuple(s for s in p if s in q)
    if x2[a] is not None and (slots := both(x2[a].slots, x1[b].slots)):
        sums.add_third(slots, 3 * inner(select(x2[a], slots), select(pulled, slots)))
    if x2[b] is not None and (slots := both(x2[b].slots, x1[a].slots)):
        push = lambda dx, dy: inner(cotangent[None], cross(dx, dy)[None])[0]
        sums.add_third(slots, 3 * map_rows(push, select(x1[a], slots), select(x2[b], slots)))
    return [z1], [z2]


def general(node, env, ct, x1, x2, sums, order):
    # hbar_st += <x1_s, d/dt of the node's vjp at ct>; z1, z2 and third by nested jvps of the node itself.
    slots = tuple(sorted({s for x in x1 if x is not None for s in x.slots}))
    at = tuple(env[v] for v in node.active)
    fn, forward = (restricted(node, env, range(len(at)), of) for of in (node.fn, node.forward or node.fn))
    cotangents = [ct[v].astype(v.aval.dtype) for v in node.outs]
    X1 = tuple(spread_or_zero(x, slots, v) for x, v in zip(x1, node.active, strict=True))
    gradient = lambda *xs: jax.vjp(lambda *xs: fn(xs), *xs)[1](cotangents)
    if kept := node.forward is not None:
        gradient = forward_only(gradient)
    both = lambda *dx: jax.jvp(gradient, at, dx)
    pulled, turned = map_rows(both, *X1) if kept else (None, map_rows(lambda *dx: both(*dx)[1], *X1))
    block = sum(gram(p, q) for p, q in zip(X1, turned, strict=True))
    d1 = lambda x, dx: jax.jvp(lambda *xs: forward(xs), x, dx)[1]
    d2 = lambda x, dx, ddx: jax.jvp(d1, (x, dx), (dx, ddx))
    zero = tuple(sharding.zeros_of(v.aval) for v in node.active)

    def derivatives(dx, ddx):
        (z1, z2), (_, z3) = jax.jvp(d2, (at, dx, ddx), (dx, ddx, zero))
        return z1, z2, sum(inner(c[None], z[None])[0] for c, z in zip(cotangents, z3, strict=True))

    if order == 2:
        z1, third = map_rows(lambda *dx: d1(at, dx), *X1), jnp.zeros(len(slots), block.dtype)
        Z2: list[Stack | None] = [None] * len(node.outs)
    else:
        X2 = tuple(spread_or_zero(x, slots, v) for x, v in zip(x2, node.active, strict=True))
        z1, z2, third = map_rows(derivatives, X1, X2)
        Z2 = [Stack(slots, z) for z in z2]
    if kept:
        unknown = jnp.where(_agree(X1, pulled, z1, cotangents), 0, jnp.nan).astype(block.dtype)
    if node.forgiving:
        third, block, z1 = third + 0 * jnp.diagonal(block), _unless_nan(block), [_unless_nan(z) for z in z1]
    if kept:
        third, block = third + unknown, block + jnp.diag(unknown)
    sums.add_hbar(slots, slots, block)
    if order > 2:
        sums.add_third(slots, third)
    return [Stack(slots, z) for z in z1], Z2


def _agree(x1, pulled, z1, ct):
    """Whether <ct, z1_s> = <vjp of ct, x1_s>, for all s."""
    sides = list(zip(x1, pulled, strict=True)), [(z, c[None]) for z, c in zip(z1, ct, strict=True)]
    forward, reverse = (sum(inner(a, b) for a, b in side) for side in reversed(sides))
    size = sum(inner(jnp.abs(a), jnp.abs(b)) for side in sides for a, b in side)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (*x1, *z1))
    return same_slopes(forward, reverse, size, eps)


def _forgiving_times(x, w):
    """x w; zero where x is, whatever w is."""
    return _where_moving(x, x * w)


def _where_moving(x, of_x):
    return jnp.where(x == 0, 0, of_x)


def _unless_nan(x):
    return jnp.where(jnp.isnan(x), 0, x)


def restricted(node, env, targets, fn=None):
    """The node, or its ``fn`` for another mode, as a function of the operands numbered ``targets`` alone."""
    fn = node.fn if fn is None else fn
    at = [env[v] for v in node.active]
    inactive = [env[v] for v in node.inactive]

    return lambda values: fn(replaced(at, targets, values), inactive)


def named_values(node, values):
    """The values of a node's operands by their variables."""
    return dict(zip((*node.active, *node.inactive), values, strict=True))
