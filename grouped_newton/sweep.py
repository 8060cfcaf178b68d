"""The exact summary in one sweep: one adjoint pass, then one forward pass of stacked tangents.

With psi(eta) = L(theta + sum_s eta_s u_s), for the value z of every equation z = f(x, y, ...) of the loss:

  lam_z = dL/dz                        its adjoint
  z1_s  = d z / d eta_s                its first tangents, a stack over the groups s that have reached it
  z2_s  = d2 z / d eta_s^2             its second tangents, alike

A parameter of group s starts with z1_s = u_s and no z2. By the chain rule, summed over all equations,

  gbar_s  = L1_s
  hbar_st = sum  lam_z . f''[x1_s, x1_t]
  third_s = sum  lam_z . ( f'''[x1_s, x1_s, x1_s] + 3 f''[x1_s, x2_s] )

so an affine equation adds nothing, a bilinear one only the product of its two operands, and a stack is as deep as
the number of groups upstream. ``program.py`` makes nodes of the equations; here are the three passes over them:

  primal     the value of every variable                    env
  adjoint    lam, backwards                                 lam
  tangent    z1, z2 and the sums, forwards; by kind of node:
             linear     z1 = f'[x1],  z2 = f'[x2]
             unary      f', f'', f''' are arrays, computed once
             bilinear   f(x1, y), f(x, y1) and their like
             general    jax.jvp and jax.vjp of the equation itself
             scan       the three passes, each a scan over the body

Besides variables, ``env`` holds what one pass keeps for the next under (outputs of the node, what).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_newton import placement
from grouped_newton.program import Program, build, is_half
from grouped_newton.rewrites import by_rule, evaluate, read, replaced
from grouped_newton.stacks import (
    Stack,
    add,
    gram,
    in_room,
    inner,
    map_rows,
    placed,
    select,
    spread_or_zero,
    sum_few,
    wide,
    with_room,
    within,
)

_HELD = 1 << 16  # numbers of terms that wait to be added up


def sweep(
    loss: Callable,
    theta: list,
    u: list,
    index: Sequence[int],
    num_groups: int,
    dtype: Any,
    order: int = 3,
    max_stack: int | None = None,
):
    """(loss, gbar, hbar, third) of a function of a list of leaves, along the list ``u``.

    ``index`` has the group of every leaf, -1 for none; order 2 leaves third at zero. ``max_stack`` bounds the tangents
    that are carried at once: with fewer than S, the groups go in chunks of half as many, every pair of chunks once.
    A frozen leaf may be anything.
    """
    moving = [i for i, g in enumerate(index) if g >= 0]
    at, u, index = ([x[i] for i in moving] for x in (theta, u, index))
    restricted = lambda values: loss([dict(zip(moving, values, strict=True)).get(i, x) for i, x in enumerate(theta)])
    closed = jax.make_jaxpr(restricted)(at)
    followed = by_rule(closed)
    value, gbar, hbar, third = _sweep(followed, at, u, index, num_groups, dtype, order, max_stack)
    if followed is not closed:  # the slopes of the gradient itself, also where a rule is not linear in the cotangent
        gradient = jax.grad(lambda *xs: jex.jaxpr_as_fun(closed)(*xs)[0], range(len(at)))(*at)
        sums = Sums(num_groups, dtype, placement.tracked_axes())
        for g, dx, x in zip(index, gradient, u, strict=True):
            sums.add_gbar(Stack((g,), inner(dx[None], x[None])))
        gbar, _, _ = sums.totals()
    return value, gbar, hbar, third


def _sweep(closed, at, u, index, num_groups, dtype, order, max_stack):
    program = build(closed, [True] * len(at))
    rank = _ranks_by_first_use(program, index, num_groups)
    env = primal(program, at)
    (out,) = program.jaxpr.outvars
    value = jnp.asarray(read(env, out))
    # A tangent through half precision has its rounding; the adjoints of the parameters let it average out.
    half = any(is_half(v.aval) for eqn in program.jaxpr.eqns for v in eqn.outvars)
    wanted = frozenset(program.jaxpr.invars if half else ())
    axes = placement.tracked_axes()
    seed = placement.vary(jnp.ones((), value.dtype), placement.varying_axes(jax.typeof(value)))
    lam = adjoint(program, env, [(out, seed)], wanted) if program.active_outs[0] else {}

    def one_pass(ranks, order, u):
        """The sums of the groups of these ranks, which are numbered anew: passes over as many groups look alike."""
        place = {r: k for k, r in enumerate(ranks)}
        moved = [
            (v, x, place[rank[g]]) for v, x, g in zip(program.jaxpr.invars, u, index, strict=True) if rank[g] in place
        ]
        sums = Sums(len(place), dtype, axes)
        first, _ = tangent(program, env, lam, {v: Stack((k,), x[None]) for v, x, k in moved}, {}, sums, order)
        for v, x, k in moved:
            if half and v in lam:
                sums.add_gbar(Stack((k,), inner(lam[v][None], x[None])))
        if not half and _is_active(first, out):
            sums.add_gbar(first[out])
        if len(place) == num_groups:
            return sums.totals()
        at = jnp.array([place.get(r, 0) for r in range(num_groups)], jnp.int32)
        slopes, hbar, third = sums.totals()
        return slopes[at], hbar[at][:, at], third[at]

    found = Sums(num_groups, dtype, axes).totals()
    covered: set[int] = set()
    for ranks in _passes(num_groups, max_stack):
        # The barrier keeps the tangents of two passes from living at the same time.
        u, found = lax.optimization_barrier((u, found))
        here = np.isin(np.arange(num_groups), ranks)
        new = not covered.issuperset(ranks)
        slopes, hbar, third = one_pass(ranks, order if new else 2, u)
        covered.update(ranks)
        found = (
            jnp.where(here, slopes, found[0]),
            jnp.where(here[:, None] & here[None], hbar, found[1]),
            jnp.where(here, third, found[2]) if new else found[2],
        )
    gbar, hbar, third = found
    in_order = jnp.array(rank, jnp.int32)
    hbar = hbar[in_order][:, in_order]
    hbar = jnp.tril(hbar) + jnp.tril(hbar, -1).T  # as the definition where a custom rule is no gradient of anything
    return value.astype(dtype), gbar[in_order], hbar, third[in_order]


def _passes(num_groups, max_stack):
    """The sets of ranks to carry together, so that every pair of groups is in one of them."""
    if max_stack is None or max_stack >= num_groups:
        return [range(num_groups)]
    size = max_stack // 2
    chunks = [range(k, min(k + size, num_groups)) for k in range(0, num_groups, size)]
    return [[*a, *b] for a, b in itertools.combinations(chunks, 2)]


def _ranks_by_first_use(program, index, num_groups):
    """A number for every group, in the order in which the program first reads one of its parameters."""
    group = dict(zip(program.jaxpr.invars, index, strict=True))
    seen = dict.fromkeys(group[v] for node in program.nodes for v in node.active if v in group)
    seen.update(dict.fromkeys(range(num_groups)))
    rank = [0] * num_groups
    for r, g in enumerate(seen):
        rank[g] = r
    return rank


def _is_active(stacks, v):
    return not isinstance(v, jex.Literal) and v in stacks


# --- The three passes -----------------------------------------------------------------------------------------------


def primal(program: Program, args: Sequence) -> dict:
    """The value of every variable."""
    env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))
    for k, eqn in enumerate(program.jaxpr.eqns):
        values = [read(env, v) for v in eqn.invars]
        if k in program.scans:
            outs, env[program.scans[k].outs, "saved"] = _scan_primal(program.scans[k].scan, values)
        else:
            outs = evaluate(eqn, program.jaxpr, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return env


def adjoint(program: Program, env: dict, cotangents: Sequence, wanted: frozenset = frozenset()) -> dict:
    """The adjoint of every active output of a node, and of the ``wanted`` inputs; sums are in at least float32.

    ``cotangents`` are pairs of an output and what it is seeded with.
    """
    lam: dict = {}

    def accumulate(v, value):
        value = placement.laid_out(value.astype(wide(value.dtype)), v.aval)
        lam[v] = lam[v] + value if v in lam else value

    for v, value in cotangents:
        accumulate(v, value)
    made = {v for node in program.nodes for v in node.outs} | wanted
    for node in reversed(program.nodes):
        for v in node.outs:
            lam.setdefault(v, placement.zeros(v.aval, wide(v.aval.dtype)))
        targets = [i for i, v in enumerate(node.active) if v in made]
        if node.kind == "scan":
            pulled = _scan_adjoint(node, env, lam, targets)
        elif not targets:
            continue
        elif node.kind == "unary":
            pulled = [_unary_derivatives(program, node, env, 1)[0] * lam[node.outs[0]]]
        else:
            pulled = _pulled(program, node, env, [lam[v] for v in node.outs], targets)
        for i, value in zip(targets, pulled, strict=True):
            accumulate(node.active[i], value)
    return lam


def tangent(program, env, lam, first, second, sums, order):
    """First and second tangents of every active variable; adds the local terms to ``sums``."""
    first, second = dict(first), dict(second)
    reached = {v: x.ranks for v, x in first.items()}
    for node in program.nodes:
        x1, x2 = [first.get(v) for v in node.active], [second.get(v) for v in node.active]
        if all(x is None for x in x1):
            continue
        ranks = tuple(sorted({s for v in node.active for s in reached.get(v, ())}))
        roomy = lambda v, ranks=ranks: with_room(ranks, v.aval.size, sums.num_groups)
        smallest = min(map(roomy, node.outs), key=len)
        x1, x2 = ([within(x, smallest) for x in stacks] for stacks in (x1, x2))
        if node.kind != "linear":
            x1, x2 = sums.settled(x1, x2)
            first.update((v, x) for v, x in zip(node.active, x1, strict=True) if x is not None)
            second.update((v, x) for v, x in zip(node.active, x2, strict=True) if x is not None)
        outs1, outs2 = _ruled(program, node, env, lam, x1, x2, sums, order)
        for v, z1, z2 in zip(node.outs, outs1, outs2, strict=True):
            reached[v] = ranks
            if z1 is not None:
                first[v] = in_room(z1, roomy(v))
            if z2 is not None:
                second[v] = in_room(z2, roomy(v))
    return first, second


def _pulled(program, node, env, lam, targets):
    """The adjoints of the operands numbered ``targets``, given those of the outputs."""

    def make():
        def pull(values, lam):
            inside = _named(node, values)
            moved = range(len(node.active)) if node.joint else targets
            fn = _restricted(node, inside, moved)
            _, pull = jax.vjp(lambda *xs: fn(xs), *(inside[node.active[i]] for i in moved))
            pulled = pull([x.astype(v.aval.dtype) for x, v in zip(lam, node.outs, strict=True)])
            return [pulled[moved.index(i)] for i in targets]

        return pull

    return _once(program, node, ("adjoint", *targets), make)(_values(node, env), lam)


def _ruled(program, node, env, lam, x1, x2, sums, order):
    """The tangents of a node by the rule of its kind, which sees no ranks but only their order."""
    rule = {"linear": _linear, "unary": _unary, "bilinear": _bilinear, "general": _general, "scan": _scan_tangent}[
        node.kind
    ]
    derivatives = _unary_derivatives(program, node, env, order) if node.kind == "unary" else []
    if not node.repeats:
        return rule(node, env, lam, x1, x2, sums, order)
    ranks = sorted({s for x in (*x1, *x2) if x is not None for s in x.ranks})
    place = {s: k for k, s in enumerate(ranks)}
    places = [x and tuple(place[s] for s in x.ranks) for x in (*x1, *x2)]
    what = "tangent", order, *places
    # What of the outputs is no array, kept when the rule is traced.
    found_at, terms = program.known.setdefault((node.fn, what, "places"), ([], []))

    def make():
        def ruled(values, lam, derivatives, arrays):
            inside = _named(node, values) | {(node.outs[0], "derivatives"): derivatives}
            stacks = [p and Stack(p, x) for p, x in zip(places, arrays, strict=True)]
            x1, x2 = stacks[: len(node.active)], stacks[len(node.active) :]
            local = Sums(len(ranks), sums.dtype, sums.axes)
            outs = rule(node, inside, dict(zip(node.outs, lam, strict=True)), x1, x2, local, order)
            found_at[:], terms[:] = [[z and z.ranks for z in out] for out in outs], local.terms
            return [[z and z.array for z in out] for out in outs], local.values

        return ruled

    arrays = [x and x.array for x in (*x1, *x2)]
    run = _once(program, node, what, make)
    outs, values = run(_values(node, env), [lam[v] for v in node.outs], derivatives, arrays)
    named = lambda places: tuple(ranks[k] for k in places)
    sums.terms += [(name, tuple(map(named, axes))) for name, axes in terms]
    sums.values += values
    return [[p and Stack(named(p), z) for p, z in zip(*out, strict=True)] for out in zip(found_at, outs, strict=True)]


def _once(program, node, what, make):
    """``make()``, a function of arrays, traced once for all nodes that are the same function."""
    if not node.repeats:
        return make()
    if (node.fn, what) not in program.known:
        program.known[node.fn, what] = jax.jit(make(), inline=True)
    return program.known[node.fn, what]


def _values(node, env):
    return [env[v] for v in (*node.active, *node.inactive)]


def _named(node, values):
    return dict(zip((*node.active, *node.inactive), values, strict=True))


class Sums:
    """Local terms of gbar, hbar and third, in order of rank; over ``axes`` they are to be added up.

    A term keeps the ranks that it has. Spread over all groups one by one, every term of another place would be another
    kernel to compile.
    """

    def __init__(self, num_groups, dtype, axes=()):
        self.num_groups, self.dtype, self.axes = num_groups, dtype, axes
        self.terms = []  # name of the sum, ranks along its axes
        self.values = []
        self.computed = 0  # of them, behind a barrier

    def add_gbar(self, stack):
        self._add("gbar", (stack.ranks,), stack.array)

    def add_hbar(self, rows, columns, block):
        self._add("hbar", (rows, columns), block)

    def add_third(self, ranks, values):
        self._add("third", (ranks,), values)

    def add_totals(self, hbar, third):
        everything = tuple(range(self.num_groups))
        self._add("hbar", (everything, everything), hbar)
        self._add("third", (everything,), third)

    def _add(self, name, ranks, values):
        self.terms.append((name, ranks))
        self.values.append(placement.in_parts(values.astype(self.dtype), self.axes))

    def settled(self, x1, x2):
        """The stacks of tangents that a node is about to read, not to be read before all terms so far are computed.

        A node reads its stacks several times. Left alone, XLA computes sums and slices anew for every reader, and puts
        the terms off and keeps every stack that they read: five times the memory, and slower.
        """
        if sum(v.size for v in self.values) > max(_HELD, 4 * self.num_groups**2):
            gbar, hbar, third = self.totals()
            everything = tuple(range(self.num_groups))
            self.terms, self.values, self.computed = [], [], 0
            self.add_gbar(Stack(everything, gbar))
            self.add_totals(hbar, third)
        arrays = [None if x is None else x.array for x in (*x1, *x2)]
        arrays, self.values[self.computed :] = lax.optimization_barrier((arrays, self.values[self.computed :]))
        self.computed = len(self.values)
        stacks = [None if x is None else Stack(x.ranks, a) for x, a in zip((*x1, *x2), arrays, strict=True)]
        return stacks[: len(x1)], stacks[len(x1) :]

    def totals(self):
        """gbar, hbar and third of all groups."""
        S = self.num_groups
        return [self._total(name, shape) for name, shape in (("gbar", (S,)), ("hbar", (S, S)), ("third", (S,)))]

    def _total(self, name, shape):
        alike = {}
        for (term, ranks), values in zip(self.terms, self.values, strict=True):
            if term == name:
                alike.setdefault(ranks, []).append(values)
        zero = placement.vary(jnp.zeros(shape, self.dtype), self.axes)
        return sum_few([zero, *(placed(ranks, sum_few(values), self.num_groups) for ranks, values in alike.items())])


# --- Rules: (first, second) tangents of the outputs of a node from those of its operands ----------------------------


def _linear(node, env, lam, x1, x2, sums, order):
    return _pushed(node, env, x1), _pushed(node, env, x2)


def _pushed(node, env, stacks):
    """The first tangents of the outputs, by jvps with respect to operands that are moved together."""
    outs = [None] * len(node.outs)
    for targets in _together(node, stacks):
        ranks = tuple(sorted({s for i in targets if stacks[i] is not None for s in stacks[i].ranks}))
        at = tuple(env[node.active[i]] for i in targets)
        fn = _restricted(node, env, targets)
        X = [spread_or_zero(stacks[i], ranks, node.active[i]) for i in targets]
        rows = map_rows(lambda *dx, fn=fn, at=at: jax.jvp(lambda *xs: fn(xs), at, dx)[1], *X)
        pushed = [Stack(ranks, placement.laid_out(z, v.aval)) for z, v in zip(rows, node.outs, strict=True)]
        outs = [add(z, dz) for z, dz in zip(outs, pushed, strict=True)]
    return outs


def _together(node, stacks):
    """The operands to be moved at once: those with the same ranks, or all where that takes no more than the outputs."""
    moving = [i for i, x in enumerate(stacks) if x is not None]
    if not moving:
        return []
    if node.joint:
        return [range(len(node.active))]
    alike = {}
    for i in moving:
        alike.setdefault(stacks[i].ranks, []).append(i)
    small = sum(v.aval.size for v in node.active) <= sum(v.aval.size for v in node.outs)
    return [moving] if len(alike) > 2 and small else list(alike.values())


def _unary(node, env, lam, x1, x2, sums, order):
    # z1 = f' x1,  z2 = f'' x1^2 + f' x2;  with w2 = lam f'', w3 = lam f''':
    # hbar_st += <x1_s, w2 x1_t>,  third_s += <x1_s, w3 x1_s^2 + 3 w2 x2_s>
    (x1,), (x2,), out = x1, x2, node.outs[0]
    derivatives = env[out, "derivatives"]
    f1, f2 = derivatives[:2]
    w2 = lam[out] * f2
    X = x1.array.astype(w2.dtype)
    weighted = X * w2[None]
    sums.add_hbar(x1.ranks, x1.ranks, gram(weighted, X))
    z1 = Stack(x1.ranks, (f1[None] * X).astype(out.aval.dtype))
    if order == 2:
        return [z1], [None]
    w3 = lam[out] * derivatives[2]
    local = w3[None] * X * X
    curved = f2[None] * X * X
    if x2 is not None and x2.ranks == x1.ranks:
        X2 = x2.array.astype(w2.dtype)
        local = local + 3 * w2[None] * X2
        z2 = Stack(x1.ranks, (curved + f1[None] * X2).astype(out.aval.dtype))
    else:
        z2 = Stack(x1.ranks, curved.astype(out.aval.dtype))
        if x2 is not None:
            z2 = add(z2, Stack(x2.ranks, (f1[None] * x2.array.astype(f1.dtype)).astype(out.aval.dtype)))
            sums.add_third(x2.ranks, 3 * inner(select(Stack(x1.ranks, weighted), x2.ranks), x2.array))
    sums.add_third(x1.ranks, inner(X, local))
    return [z1], [z2]


def _bilinear(node, env, lam, x1, x2, sums, order):
    # z1 = f(x1, y) + f(x, y1);  z2 = f(x2, y) + f(x, y2) + 2 f(x1, y1)
    # hbar_st += lam.f(x1_s, y1_t) + lam.f(x1_t, y1_s);  third_s += 3 lam.(f(x2_s, y1_s) + f(x1_s, y2_s))
    (z1,), (z2,) = _linear(node, env, lam, x1, x2, sums, order)
    if x1[0] is None or x1[1] is None:
        return [z1], [z2]
    out = node.outs[0]
    cotangent = lam[out].astype(out.aval.dtype)
    # Contract lam with the operand that has fewer tangents (or is larger), the rest is inner products.
    cost = [(len(x1[i].ranks), -node.active[i].aval.size) for i in (0, 1)]
    a, b = (1, 0) if cost[0] < cost[1] else (0, 1)  # pull the tangents of b onto a
    x, y = env[node.active[a]], env[node.active[b]]
    fn = _restricted(node, env, [a, b])
    f = lambda x, y: fn([x, y])[0]
    cross = lambda dx, dy: jax.jvp(lambda x: jax.jvp(lambda y: f(x, y), (y,), (dy,))[1], (x,), (dx,))[1]
    pull = lambda dy: jax.vjp(lambda x: jax.jvp(lambda y: f(x, y), (y,), (dy,))[1], x)[1](cotangent)[0]
    pulled = Stack(x1[b].ranks, map_rows(pull, x1[b].array))
    block = gram(x1[a].array, pulled.array)
    sums.add_hbar(x1[a].ranks, x1[b].ranks, block)
    sums.add_hbar(x1[b].ranks, x1[a].ranks, block.T)
    shared = tuple(s for s in x1[a].ranks if s in x1[b].ranks)
    if order == 2 or not shared:
        return [z1], [z2]
    product = map_rows(cross, select(x1[a], shared), select(x1[b], shared))
    z2 = add(z2, Stack(shared, 2 * product))
    both = lambda p, q: tuple(s for s in p if s in q)
    if x2[a] is not None and (ranks := both(x2[a].ranks, x1[b].ranks)):
        sums.add_third(ranks, 3 * inner(select(x2[a], ranks), select(pulled, ranks)))
    if x2[b] is not None and (ranks := both(x2[b].ranks, x1[a].ranks)):
        push = lambda dx, dy: inner(cotangent[None], cross(dx, dy)[None])[0]
        sums.add_third(ranks, 3 * map_rows(push, select(x1[a], ranks), select(x2[b], ranks)))
    return [z1], [z2]


def _general(node, env, lam, x1, x2, sums, order):
    # hbar_st += <x1_s, d/dt of the node's vjp at lam>; z1, z2 and third by nested jvps of the node itself.
    ranks = tuple(sorted({s for x in x1 if x is not None for s in x.ranks}))
    at = tuple(env[v] for v in node.active)
    fn = _restricted(node, env, range(len(at)))
    cotangents = [lam[v].astype(v.aval.dtype) for v in node.outs]
    X1 = tuple(spread_or_zero(x, ranks, v) for x, v in zip(x1, node.active, strict=True))
    gradient = lambda *xs: jax.vjp(lambda *xs: fn(xs), *xs)[1](cotangents)
    turned = map_rows(lambda *dx: jax.jvp(gradient, at, dx)[1], *X1)
    sums.add_hbar(ranks, ranks, sum(gram(p, q) for p, q in zip(X1, turned, strict=True)))
    d1 = lambda x, dx: jax.jvp(lambda *xs: fn(xs), x, dx)[1]
    if order == 2:
        z1 = map_rows(lambda *dx: d1(at, dx), *X1)
        return [Stack(ranks, z) for z in z1], [None] * len(node.outs)
    X2 = tuple(spread_or_zero(x, ranks, v) for x, v in zip(x2, node.active, strict=True))
    d2 = lambda x, dx, ddx: jax.jvp(d1, (x, dx), (dx, ddx))
    zero = tuple(placement.zeros(v.aval) for v in node.active)

    def derivatives(dx, ddx):
        (z1, z2), (_, z3) = jax.jvp(d2, (at, dx, ddx), (dx, ddx, zero))
        return z1, z2, sum(inner(c[None], z[None])[0] for c, z in zip(cotangents, z3, strict=True))

    z1, z2, third = map_rows(derivatives, X1, X2)
    sums.add_third(ranks, third)
    return [Stack(ranks, z) for z in z1], [Stack(ranks, z) for z in z2]


def _restricted(node, env, targets):
    """The node as a function of the operands numbered ``targets`` alone."""
    at = [env[v] for v in node.active]
    inactive = [env[v] for v in node.inactive]

    return lambda values: node.fn(replaced(at, targets, values), inactive)


def _unary_derivatives(program, node, env, order):
    """f', f'', ... of an elementwise node, arrays of the shape of its operand; computed once, not for every row."""
    found = env.setdefault((node.outs[0], "derivatives"), [])
    for k in range(len(found), order):
        found.append(_once(program, node, ("derivative", k), lambda k=k: _derivative(node, k))(_values(node, env)))
    return found[:order]


def _derivative(node, k):
    """The function that gives derivative number k + 1."""

    def derivative(values):
        inside = _named(node, values)
        fn = _restricted(node, inside, [0])
        x = inside[node.active[0]]
        ones = placement.laid_out(jnp.ones_like(x), jax.typeof(x))
        f = lambda x: fn([x])[0]
        for _ in range(k + 1):
            f = lambda x, f=f: jax.jvp(f, (x,), (ones,))[1]
        value = f(x)
        return lax.optimization_barrier(value.astype(wide(value.dtype)))

    return derivative


# --- Scans: the same three passes, each a scan over the body ----------------------------------------------------------


def _scan_primal(scan, values):
    """The outputs; and what the other passes need of the constants and of every step."""
    consts, carry, xs = scan.split(values)

    def step(carry, x):
        env = primal(scan.body, [*consts, *carry, *x])
        outs = [read(env, v) for v in scan.body.jaxpr.outvars]
        kept = [] if scan.recompute else [env[v] for v in scan.residuals()]
        return outs[: scan.num_carry], (outs[scan.num_carry :], (carry, x, kept))

    carry, (ys, steps) = lax.scan(step, carry, xs, scan.length, scan.reverse)
    return [*carry, *ys], (consts, steps)


def _scan_values(scan, consts, carry, x, kept):
    """The values of the body in one step."""
    args = [*consts, *carry, *x]
    if scan.recompute:
        return primal(scan.body, args)
    env = dict(zip(scan.body.jaxpr.constvars, scan.body.consts, strict=True))
    env.update(zip(scan.body.jaxpr.invars, args, strict=True))
    env.update(zip(scan.residuals(), kept, strict=True))
    return env


def _scan_adjoint(node, env, lam, targets):
    """Adjoints of the operands in ``targets``; keeps for the tangents those of the body, or their seeds."""
    scan = node.scan
    consts, steps = env[node.outs, "saved"]
    positions = [scan.operands[t] for t in targets]
    carried = [i for i in scan.operands if scan.is_carry(i)]
    invars = scan.body.jaxpr.invars
    wanted = frozenset(invars[i] for i in {*positions, *carried})
    out_lam = dict(zip(scan.results, (lam[v] for v in node.outs), strict=True))
    zero = lambda i: placement.zeros(invars[i].aval, wide(invars[i].aval.dtype))
    lam_carry = {i: out_lam.get(i - scan.num_consts, zero(i)) for i in carried}
    lam_consts = {i: zero(i) for i in positions if i < scan.num_consts}
    lam_ys = {o: value for o, value in out_lam.items() if o >= scan.num_carry}

    def step(state, slices):
        lam_carry, lam_consts = state
        step_values, lam_y = slices
        inner_env = _scan_values(scan, consts, *step_values)
        inner = adjoint(scan.body, inner_env, scan.seeds(lam_carry, lam_y), wanted)
        get = lambda i: inner.get(invars[i], zero(i))
        state = {i: get(i) for i in lam_carry}, {i: lam_consts[i] + get(i) for i in lam_consts}
        kept = (lam_carry, lam_y) if scan.recompute else _scan_kept(scan, inner_env, inner)
        return state, ({i: get(i) for i in positions if scan.is_scanned(i)}, kept)

    state, (lam_xs, kept) = lax.scan(step, (lam_carry, lam_consts), (steps, lam_ys), scan.length, not scan.reverse)
    env[node.outs, "adjoints"] = kept
    found = {**state[0], **state[1], **lam_xs}
    return [found[i] for i in positions]


def _scan_kept(scan, env, lam):
    nodes = scan.body.nodes
    scans = [env[node.outs, "adjoints"] for node in nodes if node.scan]
    return [lam[v] for node in nodes for v in node.outs], scans


def _scan_values_and_adjoints(scan, consts, step_values, kept):
    """What the tangent pass needs of the body in one step."""
    env = _scan_values(scan, consts, *step_values)
    if scan.recompute:
        return env, adjoint(scan.body, env, scan.seeds(*kept))
    nodes = scan.body.nodes
    env.update(zip([(node.outs, "adjoints") for node in nodes if node.scan], kept[1], strict=True))
    return env, dict(zip([v for node in nodes for v in node.outs], kept[0], strict=True))


def _scan_tangent(node, env, lam, x1, x2, sums, order):
    scan, body = node.scan, node.scan.body
    invars, outvars = body.jaxpr.invars, body.jaxpr.outvars
    consts, steps = env[node.outs, "saved"]
    x1, x2 = ({i: x for i, x in zip(scan.operands, stacks, strict=True) if x is not None} for stacks in (x1, x2))
    ranks = scan.ranks({i: x.ranks for i, x in x1.items()})
    carried = [i for i in scan.operands if scan.is_carry(i) and invars[i] in ranks]
    results = [o for o in scan.results if not isinstance(outvars[o], jex.Literal) and outvars[o] in ranks]
    start = lambda stacks: {i: spread_or_zero(stacks.get(i), ranks[invars[i]], invars[i]) for i in carried}
    scanned = lambda stacks: {i: jnp.moveaxis(x.array, 1, 0) for i, x in stacks.items() if scan.is_scanned(i)}
    constant = lambda stacks: {invars[i]: x for i, x in stacks.items() if i < scan.num_consts}
    end = lambda stacks, o, rank: spread_or_zero(within(stacks.get(outvars[o]), rank), rank, outvars[o])

    def inputs(stacks, carry, x):
        found = constant(stacks) | {invars[i]: Stack(ranks[invars[i]], array) for i, array in carry.items()}
        return found | {invars[i]: Stack(stacks[i].ranks, array) for i, array in x.items()}

    def step(state, slices):
        carry1, carry2, hbar, third = state
        step_values, adjoints, slice1, slice2 = slices
        inner_env, inner_lam = _scan_values_and_adjoints(scan, consts, step_values, adjoints)
        inner = Sums(sums.num_groups, sums.dtype, sums.axes)
        first, second = inputs(x1, carry1, slice1), inputs(x2, carry2, slice2)
        first, second = tangent(body, inner_env, inner_lam, first, second, inner, order)
        out_of = lambda stacks: {i: end(stacks, i - scan.num_consts, ranks[invars[i]]) for i in carried}
        ys = lambda stacks: {o: end(stacks, o, ranks[outvars[o]]) for o in results if o >= scan.num_carry}
        _, local_hbar, local_third = inner.totals()
        state = out_of(first), out_of(second) if order > 2 else {}, hbar + local_hbar, third + local_third
        return state, (ys(first), ys(second) if order > 2 else {})

    _, *zero = Sums(sums.num_groups, sums.dtype, sums.axes).totals()
    (carry1, carry2, hbar, third), (ys1, ys2) = lax.scan(
        step,
        (start(x1), start(x2) if order > 2 else {}, *zero),
        (steps, env[node.outs, "adjoints"], scanned(x1), scanned(x2)),
        scan.length,
        scan.reverse,
    )
    sums.add_totals(hbar, third)

    def out(carry, ys, o):
        if o < scan.num_carry:
            i = o + scan.num_consts
            return Stack(ranks[invars[i]], carry[i]) if i in carry else None
        return Stack(ranks[outvars[o]], jnp.moveaxis(ys[o], 0, 1)) if o in ys else None

    return [out(carry1, ys1, o) for o in scan.results], [out(carry2, ys2, o) for o in scan.results]
