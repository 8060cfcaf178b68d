"""The three passes of a sweep over the nodes of a program, and the same over the body of a scan: they call each other.

  primal     the value of every variable                     env
  adjoint    the cotangents of the nodes' outputs, backwards ct
  tangent    z1, z2 and the sums, forwards, by the rule of each node's kind; for a scan, a scan over its body

Besides variables, ``env`` holds what one pass keeps for the next under (outputs of the node, what).
"""

from collections.abc import Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from grouped_newton import sharding
from grouped_newton.derivatives.jaxprs import evaluate, named_in_errors, read
from grouped_newton.derivatives.layered import Steps, by_layer, fit_for, joined, pieces, reached, steps_first, steps_of
from grouped_newton.derivatives.program import Program
from grouped_newton.derivatives.rules import bilinear, general, linear, named_values, restricted, unary
from grouped_newton.derivatives.stacks import Layered, Stack, in_room, spread_or_zero, wide, with_room, within
from grouped_newton.derivatives.sums import Sums
from grouped_newton.numerics import zero_nonfinite


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
    ct: dict = {}

    def accumulate(v, value):
        value = sharding.with_sharding_of(value.astype(wide(value.dtype)), v.aval)
        ct[v] = ct[v] + value if v in ct else value

    for v, value in cotangents:
        accumulate(v, value)
    made = {v for node in program.nodes for v in node.outs} | wanted
    for node in reversed(program.nodes):
        for v in node.outs:
            ct.setdefault(v, sharding.zeros_of(v.aval, wide(v.aval.dtype)))
        targets = [i for i, v in enumerate(node.active) if v in made]
        if node.kind == "scan":
            pulled = _scan_adjoint(node, env, ct, targets)
        elif not targets:
            continue
        elif node.kind == "unary":
            pulled = [_unary_derivatives(program, node, env, 1)[0] * ct[node.outs[0]]]
        else:
            with named_in_errors(node.eqns):
                pulled = _pulled(program, node, env, [ct[v] for v in node.outs], targets)
        if node.forgiving and node.kind in ("unary", "general"):
            pulled = [zero_nonfinite(x) for x in pulled]
        for i, value in zip(targets, pulled, strict=True):
            accumulate(node.active[i], value)
    return ct


def tangent(program, env, ct, first, second, sums, order):
    """First and second tangents of every active variable; adds the local terms to ``sums``."""
    first, second = dict(first), dict(second)
    reach = {v: reached(x) for v, x in first.items()}
    for node in program.nodes:
        x1, x2 = [first.get(v) for v in node.active], [second.get(v) for v in node.active]
        if any(isinstance(x, Layered) for x in x1):
            if node.kind == "unary":
                _unary_derivatives(program, node, env, order)
            with named_in_errors(node.eqns):
                outs = by_layer(node, env, ct, x1, x2, sums, order)
            if outs is not None:
                for found, (z,) in zip((first, second), outs, strict=True):
                    if z is not None:
                        found[node.outs[0]], reach[node.outs[0]] = z, reached(z)
                continue
        x1, x2 = fit_for(node, x1, x2)
        if all(x is None for x in x1):
            continue
        slots = tuple(sorted({s for v in node.active for s in reach.get(v, ())}))
        roomy = lambda v, slots=slots: with_room(slots, v.aval.size, sums.num_groups)
        smallest = min(map(roomy, node.outs), key=len)
        x1, x2 = ([within(x, smallest) for x in stacks] for stacks in (x1, x2))
        if node.kind != "linear":
            x1, x2 = sums.settled(x1, x2)
            for stacks, settled in ((first, x1), (second, x2)):
                pairs = zip(node.active, settled, strict=True)
                stacks.update((v, x) for v, x in pairs if x is not None and not isinstance(stacks[v], Layered))
        with named_in_errors(node.eqns):
            outs1, outs2 = _ruled(program, node, env, ct, x1, x2, sums, order)
        for v, z1, z2 in zip(node.outs, outs1, outs2, strict=True):
            reach[v] = slots
            if z1 is not None:
                first[v] = in_room(z1, roomy(v))
            if z2 is not None:
                second[v] = in_room(z2, roomy(v))
    return first, second


def _pulled(program, node, env, ct, targets):
    """The adjoints of the operands numbered ``targets``, given those of the outputs."""

    def make():
        def pull(values, ct):
            inside = named_values(node, values)
            moved = range(len(node.active)) if node.joint else targets
            fn = restricted(node, inside, moved)
            _, pull = jax.vjp(lambda *xs: fn(xs), *(inside[node.active[i]] for i in moved))
            pulled = pull([x.astype(v.aval.dtype) for x, v in zip(ct, node.outs, strict=True)])
            return [pulled[moved.index(i)] for i in targets]

        return pull

    return _once(program, node, ("adjoint", *targets), make)(_values(node, env), ct)


def _ruled(program, node, env, ct, x1, x2, sums, order):
    """The tangents of a node by the rule of its kind, which sees no slots but only their order."""
    rule = {"linear": linear, "unary": unary, "bilinear": bilinear, "general": general, "scan": _scan_tangent}[
        node.kind
    ]
    derivatives = _unary_derivatives(program, node, env, order) if node.kind == "unary" else []
    if not node.repeats:
        return rule(node, env, ct, x1, x2, sums, order)
    slots = sorted({s for x in (*x1, *x2) if x is not None for s in x.slots})
    place = {s: k for k, s in enumerate(slots)}
    places = [x and tuple(place[s] for s in x.slots) for x in (*x1, *x2)]
    what = "tangent", order, *places
    # What of the outputs is no array, kept when the rule is traced.
    found_at, terms = program.cache.setdefault((node.fn, what, "places"), ([], []))

    def make():
        def ruled(values, ct, derivatives, arrays):
            inside = named_values(node, values) | {(node.outs[0], "derivatives"): derivatives}
            stacks = [p and Stack(p, x) for p, x in zip(places, arrays, strict=True)]
            x1, x2 = stacks[: len(node.active)], stacks[len(node.active) :]
            local = Sums(len(slots), sums.dtype, sums.axes)
            outs = rule(node, inside, dict(zip(node.outs, ct, strict=True)), x1, x2, local, order)
            found_at[:], terms[:] = [[z and z.slots for z in out] for out in outs], local.terms
            return [[z and z.array for z in out] for out in outs], local.values

        return ruled

    arrays = [x and x.array for x in (*x1, *x2)]
    run = _once(program, node, what, make)
    outs, values = run(_values(node, env), [ct[v] for v in node.outs], derivatives, arrays)
    named = lambda places: tuple(slots[k] for k in places)
    sums.terms += [(name, tuple(map(named, axes))) for name, axes in terms]
    sums.values += values
    return [[p and Stack(named(p), z) for p, z in zip(*out, strict=True)] for out in zip(found_at, outs, strict=True)]


def _once(program, node, what, make):
    """``make()``, a function of arrays, traced once for all nodes that are the same function."""
    if not node.repeats:
        return make()
    if (node.fn, what) not in program.cache:
        program.cache[node.fn, what] = jax.jit(make(), inline=True)
    return program.cache[node.fn, what]


def _values(node, env):
    return [env[v] for v in (*node.active, *node.inactive)]


def _unary_derivatives(program, node, env, order):
    """f', f'', ... of an elementwise node, arrays of the shape of its operand; computed once, not for every row."""
    found = env.setdefault((node.outs[0], "derivatives"), [])
    for k in range(len(found), order):
        found.append(_once(program, node, ("derivative", k), lambda k=k: _derivative(node, k))(_values(node, env)))
    return found[:order]


def _derivative(node, k):
    """The function that gives derivative number k + 1."""

    def derivative(values):
        inside = named_values(node, values)
        fn = restricted(node, inside, [0])
        x = inside[node.active[0]]
        ones = sharding.with_sharding_of(jnp.ones_like(x), jax.typeof(x))
        slope = lambda f: lambda x: jax.jvp(f, (x,), (ones,))[1]
        f = lambda x: fn([x])[0]
        for _ in range(k + 1):
            f = slope(f)
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


def _scan_adjoint(node, env, ct, targets):
    """Adjoints of the operands in ``targets``; keeps for the tangents those of the body, or their seeds."""
    scan = node.scan
    consts, steps = env[node.outs, "saved"]
    positions = [scan.operands[t] for t in targets]
    carried = [i for i in scan.operands if scan.is_carry(i)]
    invars = scan.body.jaxpr.invars
    wanted = frozenset(invars[i] for i in {*positions, *carried})
    out_ct = dict(zip(scan.results, (ct[v] for v in node.outs), strict=True))
    zero = lambda i: sharding.zeros_of(invars[i].aval, wide(invars[i].aval.dtype))
    ct_carry = {i: out_ct.get(i - scan.num_consts, zero(i)) for i in carried}
    ct_consts = {i: zero(i) for i in positions if i < scan.num_consts}
    ct_ys = {o: value for o, value in out_ct.items() if o >= scan.num_carry}

    def step(state, slices):
        ct_carry, ct_consts = state
        step_values, ct_y = slices
        body_env = _scan_values(scan, consts, *step_values)
        inner = adjoint(scan.body, body_env, scan.seeds(ct_carry, ct_y), wanted)
        get = lambda i: inner.get(invars[i], zero(i))
        state = {i: get(i) for i in ct_carry}, {i: ct_consts[i] + get(i) for i in ct_consts}
        kept = (ct_carry, ct_y) if scan.recompute else _scan_kept(scan, body_env, inner)
        return state, ({i: get(i) for i in positions if scan.is_scanned(i)}, kept)

    state, (ct_xs, kept) = lax.scan(step, (ct_carry, ct_consts), (steps, ct_ys), scan.length, not scan.reverse)
    env[node.outs, "adjoints"] = kept
    found = {**state[0], **state[1], **ct_xs}
    return [found[i] for i in positions]


def _scan_kept(scan, env, ct):
    nodes = scan.body.nodes
    scans = [env[node.outs, "adjoints"] for node in nodes if node.scan]
    return [ct[v] for node in nodes for v in node.outs], scans


def _scan_values_and_adjoints(scan, consts, step_values, kept):
    """What the tangent pass needs of the body in one step."""
    env = _scan_values(scan, consts, *step_values)
    if scan.recompute:
        return env, adjoint(scan.body, env, scan.seeds(*kept))
    nodes = scan.body.nodes
    env.update(zip([(node.outs, "adjoints") for node in nodes if node.scan], kept[1], strict=True))
    return env, dict(zip([v for node in nodes for v in node.outs], kept[0], strict=True))


def _scan_tangent(node, env, ct, x1, x2, sums, order):
    """In several scans of consecutive steps, so that none carries tangents of groups that come in after it."""
    scan = node.scan
    consts, steps = env[node.outs, "saved"]
    saved = steps, env[node.outs, "adjoints"]
    state = [{i: x for i, x in zip(scan.operands, stacks, strict=True) if x is not None} for stacks in (x1, x2)]
    found = []
    for begin, end in pieces(scan, state[0].values(), sums.num_groups):
        part = lambda i, x, begin=begin, end=end: steps_of(x, begin, end) if scan.is_scanned(i) else x
        parts = ({i: part(i, x) for i, x in stacks.items()} for stacks in state)
        x1, x2 = ({i: x for i, x in stacks.items() if x is not None} for stacks in parts)
        if x1:
            here = lambda x, begin=begin, end=end: lax.slice_in_dim(x, begin, end)
            values, adjoints = jax.tree.map(here, saved)
            outs = _piece_tangent(scan, end - begin, consts, values, adjoints, x1, x2, sums, order)
            found.append((begin, outs))
            for stacks, ends in zip(state, outs, strict=True):
                stacks.update({o + scan.num_consts: z for o, z in ends.items() if o < scan.num_carry})

    def out(k, v, o):
        if o < scan.num_carry:
            return state[k].get(o + scan.num_consts)
        return joined([(begin, outs[k][o]) for begin, outs in found if o in outs[k]], v)

    return [[out(k, v, o) for v, o in zip(node.outs, scan.results, strict=True)] for k in (0, 1)]


def _piece_tangent(scan, length, consts, steps, adjoints, x1, x2, sums, order):
    """First and second tangents of the results of some steps, by their numbers, from those of operands."""
    body, invars, outvars = scan.body, scan.body.jaxpr.invars, scan.body.jaxpr.outvars
    own = Steps(x1.values(), sums.num_groups)
    slots, between = scan.slots({i: own.given(x) for i, x in x1.items()}, own.inside, own.outside)
    carried = [i for i in scan.operands if scan.is_carry(i) and invars[i] in slots]
    results = [o for o in scan.results if not isinstance(outvars[o], jex.Literal) and outvars[o] in slots]
    after = {o: tuple(sorted(own.outside(slots[outvars[o]]))) for o in results if o >= scan.num_carry}
    start = lambda stacks: {i: spread_or_zero(stacks.get(i), between[i], invars[i]) for i in carried}
    constant = lambda stacks: {invars[i]: x for i, x in stacks.items() if i < scan.num_consts}
    scanned = lambda stacks: {i: steps_first(x) for i, x in stacks.items() if scan.is_scanned(i)}

    def inputs(stacks, carry, x, k):
        found = constant(stacks) | {invars[i]: Stack(between[i], array) for i, array in carry.items()}
        found |= {invars[i]: Stack(own.given(stacks[i]), array) for i, array in x.items()}
        return {v: own.enter(stack, k) for v, stack in found.items()}

    def step(state, slices):
        carry1, carry2, hbar, third = state
        k, step_values, adjoints, slice1, slice2 = slices
        body_env, body_ct = _scan_values_and_adjoints(scan, consts, step_values, adjoints)
        inner = Sums(own.num_groups, sums.dtype, sums.axes)
        first, second = inputs(x1, carry1, slice1, k), inputs(x2, carry2, slice2, k)
        first, second = tangent(body, body_env, body_ct, first, second, inner, order)
        end = lambda stacks, o, slots: own.leave(stacks.get(outvars[o]), slots, outvars[o], k)
        out_of = lambda stacks: {i: end(stacks, i - scan.num_consts, between[i]) for i in carried}
        ys = lambda stacks: {o: end(stacks, o, slots) for o, slots in after.items()}
        _, local_hbar, local_third = inner.totals()
        local_hbar, local_third = own.totals(local_hbar, local_third, k)
        state = out_of(first), out_of(second) if order > 2 else {}, hbar + local_hbar, third + local_third
        return state, (ys(first), ys(second) if order > 2 else {})

    _, *zero = Sums(sums.num_groups, sums.dtype, sums.axes).totals()
    (carry1, carry2, hbar, third), (ys1, ys2) = lax.scan(
        step,
        (start(x1), start(x2) if order > 2 else {}, *zero),
        (own.numbers(length), steps, adjoints, scanned(x1), scanned(x2)),
        length,
        scan.reverse,
    )
    sums.add_totals(hbar, third)

    out = lambda carry, ys: (
        {i - scan.num_consts: Stack(between[i], z) for i, z in carry.items()}
        | {o: Stack(after[o], jnp.moveaxis(z, 0, 1)) for o, z in ys.items()}
    )
    return out(carry1, ys1), out(carry2, ys2)
