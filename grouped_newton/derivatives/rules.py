"""What a node does to tangents: the first and second ones of its outputs from those of its operands, by its kind.

  linear     z1 = f'[x1],  z2 = f'[x2]
  unary      f', f'', f''' are arrays, computed once
  bilinear   f(x1, y), f(x, y1) and their like
  general    jax.jvp and jax.vjp of the node itself

Every rule adds the local terms of hbar and third to ``sums``; ct is the cotangent of the node's output.

A *forgiving* node keeps what isn't finite from spoiling the rest: what doesn't move has no derivative along, whatever
f' and f'' are there; and a second derivative that is NaN, which JAX makes of 0 inf where the true one is finite, as of
relu(x)^1.5 at 0 and of singular values that are equal, is left out of hbar and leaves NaN in third. An infinite one of
what moves stays infinite.
"""

import jax
import jax.numpy as jnp

from grouped_newton import sharding
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
    fn = restricted(node, env, range(len(at)))
    cotangents = [ct[v].astype(v.aval.dtype) for v in node.outs]
    X1 = tuple(spread_or_zero(x, slots, v) for x, v in zip(x1, node.active, strict=True))
    gradient = lambda *xs: jax.vjp(lambda *xs: fn(xs), *xs)[1](cotangents)
    turned = map_rows(lambda *dx: jax.jvp(gradient, at, dx)[1], *X1)
    block = sum(gram(p, q) for p, q in zip(X1, turned, strict=True))
    sums.add_hbar(slots, slots, _unless_nan(block) if node.forgiving else block)
    d1 = lambda x, dx: jax.jvp(lambda *xs: fn(xs), x, dx)[1]
    if order == 2:
        z1 = map_rows(lambda *dx: d1(at, dx), *X1)
        return [Stack(slots, _unless_nan(z) if node.forgiving else z) for z in z1], [None] * len(node.outs)
    X2 = tuple(spread_or_zero(x, slots, v) for x, v in zip(x2, node.active, strict=True))
    d2 = lambda x, dx, ddx: jax.jvp(d1, (x, dx), (dx, ddx))
    zero = tuple(sharding.zeros_of(v.aval) for v in node.active)

    def derivatives(dx, ddx):
        (z1, z2), (_, z3) = jax.jvp(d2, (at, dx, ddx), (dx, ddx, zero))
        return z1, z2, sum(inner(c[None], z[None])[0] for c, z in zip(cotangents, z3, strict=True))

    z1, z2, third = map_rows(derivatives, X1, X2)
    if node.forgiving:
        third, z1 = third + 0 * jnp.diagonal(block), [_unless_nan(z) for z in z1]
    sums.add_third(slots, third)
    return [Stack(slots, z) for z in z1], [Stack(slots, z) for z in z2]


def _forgiving_times(x, w):
    """x w; zero where x is, whatever w is."""
    return _where_moving(x, x * w)


def _where_moving(x, of_x):
    return jnp.where(x == 0, 0, of_x)


def _unless_nan(x):
    return jnp.where(jnp.isnan(x), 0, x)


def finite(x):
    """The array with zeros for what isn't finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def restricted(node, env, targets):
    """The node as a function of the operands numbered ``targets`` alone."""
    at = [env[v] for v in node.active]
    inactive = [env[v] for v in node.inactive]

    return lambda values: node.fn(replaced(at, targets, values), inactive)


def named_values(node, values):
    """The values of a node's operands by their variables."""
    return dict(zip((*node.active, *node.inactive), values, strict=True))
