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
the number of groups upstream. The loss is traced, calls in it are opened, and its equations become *nodes*:

  linear     z1 = f'[x1],  z2 = f'[x2]
  unary      chains of elementwise equations with one active root: f', f'', f''' are arrays, computed once
  bilinear   two operands, affine in each
  general    anything else, by jax.jvp and jax.vjp of the equation itself
  scan       the same three passes, each a scan over the body

Which is which is not looked up but found out: the jvp of a node with respect to one operand is traced, and it is
affine in that operand if the traced tangent doesn't depend on it. An equation that is in no list is only slower.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

JAXPRS = (jex.Jaxpr, jex.ClosedJaxpr)
REMAT = {"remat", "remat2", "checkpoint"}
# A custom_vjp hides a function that can be differentiated as it stands; forward mode would refuse the rule.
CUSTOM_VJP = {"custom_vjp_call", "custom_vjp_call_jaxpr"}
CALLS = {"jit", "pjit", "closed_call", *REMAT, *CUSTOM_VJP}
ELEMENTWISE = set(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp"  # noqa: SIM905
    " convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow"
    " is_finite le lgamma log log1p logistic lt max min mul ne neg not or pow reduce_precision rem round rsqrt select_n"
    " sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
# They would be found out too, but late: a value read only by them would get tangents, and chains would end there.
CONSTANT = {"stop_gradient", "sign", "floor", "ceil", "round"}


class Stack(NamedTuple):
    """Tangents of one value: ``array[i]`` belongs to the group of rank ``ranks[i]``; ranks ascend."""

    ranks: tuple[int, ...]
    array: jax.Array


class Node(NamedTuple):
    """A piece of the program: ``outs = fn(active values, inactive values)``."""

    kind: str
    fn: Callable
    active: tuple
    inactive: tuple
    outs: tuple
    scan: Any = None


class Program(NamedTuple):
    """A traced function: its equations for the primal pass, its nodes for the other two."""

    jaxpr: Any
    consts: Sequence
    nodes: list
    scans: dict[int, Node]  # by number of the equation
    active_outs: list[bool]


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
    try:
        return _sweep(closed, at, u, index, num_groups, dtype, order, max_stack)
    except Exception as error:
        if _has_custom_vjp(closed.jaxpr):
            error.add_note(
                "The loss has a custom_vjp: its rule gives no higher derivatives, so the summary differentiates the"
                " function that it wraps, which must have derivatives itself."
            )
        raise


def _sweep(closed, at, u, index, num_groups, dtype, order, max_stack):
    program = build(closed, [True] * len(at))
    rank = _ranks_by_first_use(program, index, num_groups)
    env = primal(program, at)
    (out,) = program.jaxpr.outvars
    value = jnp.asarray(_read(env, out))
    # A tangent through half precision has its rounding; the adjoints of the parameters let it average out.
    half = any(_is_half(v.aval) for eqn in program.jaxpr.eqns for v in eqn.outvars)
    wanted = frozenset(program.jaxpr.invars if half else ())
    lam = adjoint(program, env, [(out, jnp.ones((), value.dtype))], wanted) if program.active_outs[0] else {}

    def one_pass(ranks, order, u):
        leaves = zip(program.jaxpr.invars, u, index, strict=True)
        first = {v: Stack((rank[g],), x[None]) for v, x, g in leaves if rank[g] in ranks}
        sums = Sums(num_groups, dtype)
        first, _ = tangent(program, env, lam, first, {}, sums, order)
        for v, x, g in zip(program.jaxpr.invars, u, index, strict=True):
            if half and v in lam:
                sums.add_gbar(Stack((rank[g],), _inner(lam[v][None], x[None])))
        if not half and _is_active(first, out):
            sums.add_gbar(first[out])
        return sums.totals()

    found = Sums(num_groups, dtype).totals()
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
    hbar = (hbar + hbar.T) / 2  # symmetric but for rounding
    in_order = jnp.array(rank, jnp.int32)
    return value.astype(dtype), gbar[in_order], hbar[in_order][:, in_order], third[in_order]


def _passes(num_groups, max_stack):
    """The sets of ranks to carry together, so that every pair of groups is in one of them."""
    if max_stack is None or max_stack >= num_groups:
        return [range(num_groups)]
    size = max_stack // 2
    chunks = [range(k, min(k + size, num_groups)) for k in range(0, num_groups, size)]
    return [[*a, *b] for a, b in itertools.combinations(chunks, 2)]


# --- From a function to nodes ---------------------------------------------------------------------------------------


def build(closed: Any, active: Sequence[bool]) -> Program:
    """Opens the calls of a closed jaxpr and sorts its equations into nodes."""
    closed = _open_calls(closed, active)
    jaxpr = closed.jaxpr
    eqns = _live_equations(jaxpr)
    nodes: list[Node] = []
    scans: dict[int, Node] = {}
    root = {v: v for v, a in zip(jaxpr.invars, active, strict=True) if a}  # of every active value
    chain: dict[Any, set[int]] = {}  # equations from the root to a value
    carriers = _tangent_carriers(eqns, jaxpr.outvars)
    maker = {v: k for k, eqn in enumerate(eqns) for v in eqn.outvars}

    def materialise(v):
        """Gives a value that is an elementwise function of its root a node of its own; False if it has no tangent."""
        if root[v] is not v:
            node = _node(jaxpr, [eqns[k] for k in sorted(chain.pop(v))], [root[v]], [v], elementwise=True)
            if node is None:
                del root[v]
                return False
            nodes.append(node)
            root[v] = v
        return True

    for k, eqn in enumerate(eqns):
        operands = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal) and v in root))
        outs = [v for v in eqn.outvars if v in carriers]
        if not outs:
            continue
        elementwise = _is_elementwise(eqn, operands)
        if not elementwise or len({root[v] for v in operands}) > 1:
            operands = [v for v in operands if materialise(v)]
        if not operands:
            continue
        if elementwise and len({root[v] for v in operands}) == 1:
            root[outs[0]] = root[operands[0]]
            chain[outs[0]] = {k}.union(*(chain.get(v, ()) for v in operands))
            continue
        if eqn.primitive.name == "scan":
            node = _scan_node(eqn, [not isinstance(v, jex.Literal) and v in root for v in eqn.invars])
        else:
            group = [eqn]
            if elementwise:  # a broadcast operand stays small: the broadcast becomes a part of the node
                for i, v in enumerate(operands):
                    if v in maker and eqns[maker[v]].primitive.name == "broadcast_in_dim":
                        group.insert(0, eqns[maker[v]])
                        operands[i] = eqns[maker[v]].invars[0]
            node = _node(jaxpr, group, list(dict.fromkeys(operands)), outs)
        if node is not None:
            nodes.append(node)
            root.update((v, v) for v in node.outs)
            if node.kind == "scan":
                scans[k] = node
    active_outs = [not isinstance(v, jex.Literal) and v in root and materialise(v) for v in jaxpr.outvars]
    return Program(jaxpr.replace(eqns=eqns), closed.consts, _live_nodes(nodes, jaxpr.outvars), scans, active_outs)


def _open_calls(closed, active=None):
    """The same function without calls, and with x / y as x * (1 / y), which is bilinear, where y may be active."""

    def evaluate(jaxpr, consts, args, active):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        reached = {v for v, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
        for eqn in jaxpr.eqns:
            values = [_read(env, v) for v in eqn.invars]
            flags = [_variable(v) in reached for v in eqn.invars]
            body = next((p for p in eqn.params.values() if isinstance(p, JAXPRS)), None)
            if eqn.primitive.name in CALLS and body is not None:
                closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
                outs, out_flags = evaluate(closed.jaxpr, closed.consts, values, flags)
            else:
                out_flags = [any(flags)] * len(eqn.outvars)
                # 1 / y leaves the range of half precision where x / y doesn't.
                if eqn.primitive.name == "div" and flags[1] and not _is_half(eqn.outvars[0].aval):
                    outs = [values[0] * lax.integer_pow(values[1], -1)]
                else:
                    outs = _evaluate(_with_open_branches(eqn), jaxpr, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            reached.update(v for v, is_active in zip(eqn.outvars, out_flags, strict=True) if is_active)
        return [_read(env, v) for v in jaxpr.outvars], [_variable(v) in reached for v in jaxpr.outvars]

    active = [False] * len(closed.in_avals) if active is None else active
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args, active)[0])(*avals)


def _with_open_branches(eqn):
    """A cond whose branches hold no custom_vjp, which forward mode refuses there too."""
    branches = eqn.params.get("branches")
    if eqn.primitive.name != "cond" or not any(_holds(b.jaxpr, CUSTOM_VJP) for b in branches):
        return eqn
    return eqn.replace(params={**eqn.params, "branches": tuple(map(_open_calls, branches))})


def _holds(jaxpr, names):
    bodies = [getattr(b, "jaxpr", b) for e in jaxpr.eqns for b in jax.tree.leaves(e.params, is_leaf=_is_jaxpr)]
    bodies = [b for b in bodies if isinstance(b, jex.Jaxpr)]
    return any(e.primitive.name in names for e in jaxpr.eqns) or any(_holds(b, names) for b in bodies)


def _is_jaxpr(x):
    return isinstance(x, JAXPRS)


def _has_custom_vjp(jaxpr):
    bodies = lambda eqn: [p for p in eqn.params.values() if isinstance(p, (jex.Jaxpr, jex.ClosedJaxpr))]
    inside = lambda eqn: any(_has_custom_vjp(getattr(body, "jaxpr", body)) for body in bodies(eqn))
    return any(eqn.primitive.name.startswith("custom_vjp_call") or inside(eqn) for eqn in jaxpr.eqns)


def _evaluate(eqn, jaxpr, values):
    """The outputs of one equation, by a jaxpr that has no other."""
    names = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
    given = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jex.Literal)}
    return _function(jaxpr, [eqn], names, eqn.outvars)(*(given[v] for v in names))


def _function(jaxpr, eqns, invars, outvars):
    part = jaxpr.replace(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        debug_info=_debug_info(jaxpr, invars, outvars),
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))


def _debug_info(jaxpr, invars, outvars):
    info = jaxpr.debug_info
    return info._replace(arg_names=("",) * len(invars), result_paths=("",) * len(outvars))


def _live_equations(jaxpr):
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]


def _tangent_carriers(eqns, outvars):
    """The values whose tangents can reach an output: real or complex, and not only through a constant function."""
    carriers = {v for v in outvars if not isinstance(v, jex.Literal)}
    for eqn in reversed(eqns):
        if eqn.primitive.name not in CONSTANT and any(v in carriers for v in eqn.outvars):
            carriers.update(v for v in eqn.invars if not isinstance(v, jex.Literal) and _is_float(v.aval))
    return {v for v in carriers if _is_float(v.aval)}


def _live_nodes(nodes, outvars):
    needed = {v for v in outvars if not isinstance(v, jex.Literal)}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.outs):
            kept.append(node)
            needed.update(node.active)
    return kept[::-1]


def _node(jaxpr, eqns, active, outs, elementwise=False):
    """A node from equations; None if no output depends on an active operand."""
    inside = {v for eqn in eqns for v in eqn.outvars}
    operands = dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal))
    inactive = [v for v in operands if v not in inside and v not in active]
    evaluate = _function(jaxpr, eqns, [*active, *inactive], outs)
    if eqns[0].primitive.name == "reduce_window_max":
        evaluate = _max_over_windows(**eqns[0].params) or evaluate
    reach = _dependence(evaluate, active, inactive, len(outs))
    kept = [o for o in range(len(outs)) if any(reach[i][o][0] for i in range(len(active)))]
    if not kept:
        return None
    curved = {(i, j) for i in range(len(active)) for o in kept for j in reach[i][o][1]}

    def fn(active_values, inactive_values):
        values = evaluate(*active_values, *inactive_values)
        return [values[o] for o in kept]

    if not curved:
        kind = "linear"
    elif elementwise:
        kind = "unary"
    elif len(kept) == 1 and len(active) == 2 and all(i != j for i, j in curved):
        kind = "bilinear"
    else:
        kind = "general"
    return Node(kind, fn, tuple(active), tuple(inactive), tuple(outs[o] for o in kept))


def _dependence(fn, active, inactive, num_outs):
    """For operand i and output o: whether the tangent of o moves with operand i, and on which operands it depends.

    Dependence through integers and booleans has no derivative and doesn't count: relu and max-pooling are linear.
    """
    primals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in active]
    others = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inactive]
    result = []
    for i, v in enumerate(active):
        dx = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        jaxpr = _open_calls(jax.make_jaxpr(_tangents(fn, i))(primals, dx, others)).jaxpr
        sources = dict(zip(jaxpr.invars, range(len(active) + 1), strict=False))
        depends: dict[Any, frozenset] = {}
        for v_in, source in sources.items():
            depends[v_in] = frozenset([source])
        for eqn in jaxpr.eqns:
            union = frozenset().union(*(depends.get(x, ()) for x in eqn.invars if not isinstance(x, jex.Literal)))
            for out in eqn.outvars:
                if _is_float(out.aval):
                    depends[out] = union
        row = []
        for out in jaxpr.outvars[:num_outs]:
            found = frozenset() if isinstance(out, jex.Literal) else depends.get(out, frozenset())
            moved = len(active) in found
            row.append((moved, found - {len(active)} if moved else frozenset()))
        result.append(row)
    return result


def _tangents(fn, i):
    """The jvp of ``fn(*xs, *rest)`` with respect to operand i alone."""
    return lambda xs, dx, rest: jax.jvp(lambda x: fn(*xs[:i], x, *xs[i + 1 :], *rest), (xs[i],), (dx,))[1]


def _is_elementwise(eqn, operands):
    def elementwise(eqn):
        bodies = [p for p in eqn.params.values() if isinstance(p, JAXPRS)]
        if eqn.primitive.name in CALLS or eqn.primitive.name == "custom_jvp_call":
            return all(elementwise(e) for b in bodies for e in getattr(b, "jaxpr", b).eqns)
        constant = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
        return constant or eqn.primitive.name in ELEMENTWISE

    out = eqn.outvars[0].aval
    fits = all(v.aval.shape == out.shape and _is_real(v.aval) for v in operands)
    return len(eqn.outvars) == 1 and fits and _is_real(out) and elementwise(eqn)


def _max_over_windows(window_dimensions, window_strides, padding, base_dilation, window_dilation):
    """Max-pooling by comparing slices, one per place in the window; None where it has too many.

    The same function with the same choice among equals, the first; a jvp of the primitive itself sorts pairs of
    numbers for every tangent.
    """
    places = list(itertools.product(*map(range, window_dimensions)))
    if len(places) > 16 or any(b != 1 for b in base_dilation):
        return None

    def pooled(x):
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(low, high, 0) for low, high in padding])
        span = [(w - 1) * r + 1 for w, r in zip(window_dimensions, window_dilation, strict=True)]
        result = None
        for place in places:
            start = [k * r for k, r in zip(place, window_dilation, strict=True)]
            limit = [k + n - m + 1 for k, n, m in zip(start, x.shape, span, strict=True)]
            part = lax.slice(x, start, limit, window_strides)
            result = part if result is None else lax.select(part > result, part, result)
        return [result]

    return pooled


# --- The three passes -----------------------------------------------------------------------------------------------


def primal(program: Program, args: Sequence) -> dict:
    """The value of every variable."""
    env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))
    for k, eqn in enumerate(program.jaxpr.eqns):
        values = [_read(env, v) for v in eqn.invars]
        if k in program.scans:
            outs, env[program.scans[k].outs, "saved"] = program.scans[k].scan.primal(values)
        else:
            outs = _evaluate(eqn, program.jaxpr, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return env


def adjoint(program: Program, env: dict, cotangents: Sequence, wanted: frozenset = frozenset()) -> dict:
    """The adjoint of every active output of a node, and of the ``wanted`` inputs; sums are in at least float32.

    ``cotangents`` are pairs of an output and what it is seeded with.
    """
    lam: dict = {}

    def add(v, value):
        value = value.astype(_wide(value.dtype))
        lam[v] = lam[v] + value if v in lam else value

    for v, value in cotangents:
        add(v, value)
    made = {v for node in program.nodes for v in node.outs} | wanted
    for node in reversed(program.nodes):
        for v in node.outs:
            lam.setdefault(v, jnp.zeros(v.aval.shape, _wide(v.aval.dtype)))
        targets = [i for i, v in enumerate(node.active) if v in made]
        if node.kind == "scan":
            pulled = node.scan.adjoint(node, env, lam, targets)
        elif not targets:
            continue
        elif node.kind == "unary":
            pulled = [_unary_derivatives(node, env, 1)[0] * lam[node.outs[0]]]
        else:
            at = [env[v] for v in node.active]
            fn = _restricted(node, env, targets)
            _, pull = jax.vjp(lambda *xs, fn=fn: fn(xs), *(at[i] for i in targets))
            pulled = pull([lam[v].astype(v.aval.dtype) for v in node.outs])
        for i, value in zip(targets, pulled, strict=True):
            add(node.active[i], value)
    return lam


def tangent(program, env, lam, first, second, sums, order):
    """First and second tangents of every active variable; adds the local terms to ``sums``."""
    first, second = dict(first), dict(second)
    rules = {"linear": _linear, "unary": _unary, "bilinear": _bilinear, "general": _general, "scan": _scan}
    for node in program.nodes:
        x1, x2 = [first.get(v) for v in node.active], [second.get(v) for v in node.active]
        if all(x is None for x in x1):
            continue
        outs1, outs2 = rules[node.kind](node, env, lam, x1, x2, sums, order)
        first.update((v, z) for v, z in zip(node.outs, outs1, strict=True) if z is not None)
        second.update((v, z) for v, z in zip(node.outs, outs2, strict=True) if z is not None)
    return first, second


class Sums:
    """Accumulates local terms of gbar, hbar and third, in order of rank."""

    def __init__(self, num_groups, dtype):
        self.num_groups, self.dtype = num_groups, dtype
        self.gbar, self.hbar, self.third = [], [], []

    def add_gbar(self, stack):
        self.gbar.append(_placed(stack, self.num_groups, self.dtype))

    def add_hbar(self, rows, columns, block):
        self.hbar.append(_placed2(rows, columns, block.astype(self.dtype), self.num_groups))

    def add_third(self, ranks, values):
        self.third.append(_placed(Stack(ranks, values), self.num_groups, self.dtype))

    def totals(self):
        zero = jnp.zeros((self.num_groups,), self.dtype)
        square = jnp.zeros((self.num_groups, self.num_groups), self.dtype)
        return sum(self.gbar, zero), sum(self.hbar, square), sum(self.third, zero)


# --- Rules: (first, second) tangents of the outputs of a node from those of its operands ----------------------------


def _linear(node, env, lam, x1, x2, sums, order):
    outs1 = outs2 = [None] * len(node.outs)
    for i in range(len(node.active)):
        push = _push(node, env, i)
        outs1 = [_add(z, dz) for z, dz in zip(outs1, _rows(push, x1[i], len(node.outs)), strict=True)]
        outs2 = [_add(z, dz) for z, dz in zip(outs2, _rows(push, x2[i], len(node.outs)), strict=True)]
    return outs1, outs2


def _unary(node, env, lam, x1, x2, sums, order):
    # z1 = f' x1,  z2 = f'' x1^2 + f' x2;  with w2 = lam f'', w3 = lam f''':
    # hbar_st += <x1_s, w2 x1_t>,  third_s += <x1_s, w3 x1_s^2 + 3 w2 x2_s>
    (x1,), (x2,), out = x1, x2, node.outs[0]
    derivatives = _unary_derivatives(node, env, order)
    f1, f2 = derivatives[:2]
    w2 = lam[out] * f2
    X = x1.array
    weighted = X * w2[None]
    sums.add_hbar(x1.ranks, x1.ranks, _gram(weighted, X))
    z1 = Stack(x1.ranks, (f1[None] * X).astype(out.aval.dtype))
    if order == 2:
        return [z1], [None]
    w3 = lam[out] * derivatives[2]
    local = w3[None] * X * X
    curved = f2[None] * X * X
    if x2 is not None and x2.ranks == x1.ranks:
        local = local + 3 * w2[None] * x2.array
        z2 = Stack(x1.ranks, (curved + f1[None] * x2.array).astype(out.aval.dtype))
    else:
        z2 = Stack(x1.ranks, curved.astype(out.aval.dtype))
        if x2 is not None:
            z2 = _add(z2, Stack(x2.ranks, (f1[None] * x2.array).astype(out.aval.dtype)))
            sums.add_third(x2.ranks, 3 * _inner(_select(Stack(x1.ranks, weighted), x2.ranks), x2.array))
    sums.add_third(x1.ranks, _inner(X, local))
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
    pulled = Stack(x1[b].ranks, _map(pull, x1[b].array))
    block = _gram(x1[a].array, pulled.array)
    sums.add_hbar(x1[a].ranks, x1[b].ranks, block)
    sums.add_hbar(x1[b].ranks, x1[a].ranks, block.T)
    shared = tuple(s for s in x1[a].ranks if s in x1[b].ranks)
    if order == 2 or not shared:
        return [z1], [z2]
    product = jax.vmap(cross)(_select(x1[a], shared), _select(x1[b], shared))
    z2 = _add(z2, Stack(shared, 2 * product))
    both = lambda p, q: tuple(s for s in p if s in q)
    if x2[a] is not None and (ranks := both(x2[a].ranks, x1[b].ranks)):
        sums.add_third(ranks, 3 * _inner(_select(x2[a], ranks), _select(pulled, ranks)))
    if x2[b] is not None and (ranks := both(x2[b].ranks, x1[a].ranks)):
        push = jax.vmap(lambda dx, dy: _inner(cotangent[None], cross(dx, dy)[None])[0])
        sums.add_third(ranks, 3 * push(_select(x1[a], ranks), _select(x2[b], ranks)))
    return [z1], [z2]


def _general(node, env, lam, x1, x2, sums, order):
    # hbar_st += <x1_s, d/dt of the node's vjp at lam>; z1, z2 and third by nested jvps of the node itself.
    ranks = tuple(sorted({s for x in x1 if x is not None for s in x.ranks}))
    at = tuple(env[v] for v in node.active)
    fn = _restricted(node, env, range(len(at)))
    cotangents = [lam[v].astype(v.aval.dtype) for v in node.outs]
    X1 = tuple(_spread_or_zero(x, ranks, v) for x, v in zip(x1, node.active, strict=True))
    gradient = lambda *xs: jax.vjp(lambda *xs: fn(xs), *xs)[1](cotangents)
    turned = jax.vmap(lambda *dx: jax.jvp(gradient, at, dx)[1])(*X1)
    sums.add_hbar(ranks, ranks, sum(_gram(p, q) for p, q in zip(X1, turned, strict=True)))
    d1 = lambda x, dx: jax.jvp(lambda *xs: fn(xs), x, dx)[1]
    if order == 2:
        z1 = jax.vmap(lambda *dx: d1(at, dx))(*X1)
        return [Stack(ranks, z) for z in z1], [None] * len(node.outs)
    X2 = tuple(_spread_or_zero(x, ranks, v) for x, v in zip(x2, node.active, strict=True))
    d2 = lambda x, dx, ddx: jax.jvp(d1, (x, dx), (dx, ddx))
    zero = jax.tree.map(jnp.zeros_like, at)

    def derivatives(dx, ddx):
        (z1, z2), (_, z3) = jax.jvp(d2, (at, dx, ddx), (dx, ddx, zero))
        return z1, z2, sum(_inner(c[None], z[None])[0] for c, z in zip(cotangents, z3, strict=True))

    z1, z2, third = jax.vmap(derivatives)(X1, X2)
    sums.add_third(ranks, third)
    return [Stack(ranks, z) for z in z1], [Stack(ranks, z) for z in z2]


def _restricted(node, env, targets):
    """The node as a function of the operands numbered ``targets`` alone."""
    at = [env[v] for v in node.active]
    inactive = [env[v] for v in node.inactive]

    def fn(values):
        moved = list(at)
        for i, x in zip(targets, values, strict=True):
            moved[i] = x
        return node.fn(moved, inactive)

    return fn


def _push(node, env, i):
    """The jvp of a node with respect to operand i, as a function of the tangent."""
    fn = _restricted(node, env, [i])
    return lambda dx: jax.jvp(lambda x: fn([x]), (env[node.active[i]],), (dx,))[1]


def _unary_derivatives(node, env, order):
    """f', f'', ... of an elementwise node, arrays of the shape of its operand; computed once."""
    found = env.setdefault((node.outs[0], "derivatives"), [])
    fn = _restricted(node, env, [0])
    derivative = lambda x: fn([x])[0]
    x = env[node.active[0]]
    ones = jnp.ones_like(x)
    for k in range(order):
        derivative = lambda x, f=derivative: jax.jvp(f, (x,), (ones,))[1]
        if k >= len(found):
            value = derivative(x)
            found.append(value.astype(_wide(value.dtype)))
    return found[:order]


# --- Scans: the same three passes, each a scan over the body ----------------------------------------------------------


class Scan(NamedTuple):
    """A scan with its body as a program; operands and outputs are numbered as in the equation."""

    body: Program
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    operands: tuple[int, ...]  # active ones
    results: tuple[int, ...]
    recompute: bool  # the body in every pass, where it uses remat, instead of keeping its values

    def split(self, values):
        k = self.num_consts + self.num_carry
        return list(values[: self.num_consts]), list(values[self.num_consts : k]), list(values[k:])

    def is_carry(self, i):
        return 0 <= i - self.num_consts < self.num_carry

    def is_scanned(self, i):
        return i >= self.num_consts + self.num_carry

    def primal(self, values):
        """The outputs; and what the other passes need of the constants and of every step."""
        consts, carry, xs = self.split(values)

        def step(carry, x):
            env = primal(self.body, [*consts, *carry, *x])
            outs = [_read(env, v) for v in self.body.jaxpr.outvars]
            kept = [] if self.recompute else [env[v] for v in self.residuals()]
            return outs[: self.num_carry], (outs[self.num_carry :], (carry, x, kept))

        carry, (ys, steps) = lax.scan(step, carry, xs, self.length, self.reverse)
        return [*carry, *ys], (consts, steps)

    def residuals(self):
        """The values of the body that its other passes read, unless they are to be computed again."""
        given = {*self.body.jaxpr.invars, *self.body.jaxpr.constvars}
        scans = [(node.outs, "saved") for node in self.body.nodes if node.scan]
        others = [node for node in self.body.nodes if not node.scan]
        read = [v for node in others for v in (*node.active, *node.inactive) if v not in given]
        return list(dict.fromkeys(read + scans))

    def values(self, consts, carry, x, kept):
        """The values of the body in one step."""
        args = [*consts, *carry, *x]
        if self.recompute:
            return primal(self.body, args)
        env = dict(zip(self.body.jaxpr.constvars, self.body.consts, strict=True))
        env.update(zip(self.body.jaxpr.invars, args, strict=True))
        env.update(zip(self.residuals(), kept, strict=True))
        return env

    def adjoint(self, node, env, lam, targets):
        """Adjoints of the operands in ``targets``; keeps for the tangents those of the body, or their seeds."""
        consts, steps = env[node.outs, "saved"]
        positions = [self.operands[t] for t in targets]
        carried = [i for i in self.operands if self.is_carry(i)]
        invars = self.body.jaxpr.invars
        wanted = frozenset(invars[i] for i in {*positions, *carried})
        out_lam = dict(zip(self.results, (lam[v] for v in node.outs), strict=True))
        zero = lambda i: jnp.zeros(invars[i].aval.shape, _wide(invars[i].aval.dtype))
        lam_carry = {i: out_lam.get(i - self.num_consts, zero(i)) for i in carried}
        lam_consts = {i: zero(i) for i in positions if i < self.num_consts}
        lam_ys = {o: value for o, value in out_lam.items() if o >= self.num_carry}

        def step(state, slices):
            lam_carry, lam_consts = state
            step_values, lam_y = slices
            inner_env = self.values(consts, *step_values)
            inner = adjoint(self.body, inner_env, self.seeds(lam_carry, lam_y), wanted)
            get = lambda i: inner.get(invars[i], zero(i))
            state = {i: get(i) for i in lam_carry}, {i: lam_consts[i] + get(i) for i in lam_consts}
            kept = (lam_carry, lam_y) if self.recompute else self.kept_adjoints(inner_env, inner)
            return state, ({i: get(i) for i in positions if self.is_scanned(i)}, kept)

        state, (lam_xs, kept) = lax.scan(step, (lam_carry, lam_consts), (steps, lam_ys), self.length, not self.reverse)
        env[node.outs, "adjoints"] = kept
        found = {**state[0], **state[1], **lam_xs}
        return [found[i] for i in positions]

    def kept_adjoints(self, env, lam):
        nodes = self.body.nodes
        scans = [env[node.outs, "adjoints"] for node in nodes if node.scan]
        return [lam[v] for node in nodes for v in node.outs], scans

    def values_and_adjoints(self, consts, step_values, kept):
        """What the tangent pass needs of the body in one step."""
        env = self.values(consts, *step_values)
        if self.recompute:
            return env, adjoint(self.body, env, self.seeds(*kept))
        nodes = self.body.nodes
        env.update(zip([(node.outs, "adjoints") for node in nodes if node.scan], kept[1], strict=True))
        return env, dict(zip([v for node in nodes for v in node.outs], kept[0], strict=True))

    def seeds(self, lam_carry, lam_y):
        outvars = self.body.jaxpr.outvars
        pairs = [(outvars[i - self.num_consts], value) for i, value in lam_carry.items()]
        pairs += [(outvars[o], value) for o, value in lam_y.items()]
        return [(v, value) for v, value in pairs if not isinstance(v, jex.Literal)]

    def ranks(self, given):
        """The ranks that reach every variable of the body, given those of its operands: a fixed point."""
        sets = {self.body.jaxpr.invars[i]: set(ranks) for i, ranks in given.items()}
        while True:
            for node in self.body.nodes:
                reached = set().union(*(sets.get(v, ()) for v in node.active))
                sets.update((v, reached) for v in node.outs)
            changed = False
            for k in range(self.num_carry):
                v, out = self.body.jaxpr.invars[self.num_consts + k], self.body.jaxpr.outvars[k]
                grown = set(sets.get(v, ())) | (set() if isinstance(out, jex.Literal) else set(sets.get(out, ())))
                changed |= grown != set(sets.get(v, ()))
                if grown:
                    sets[v] = grown
            if not changed:
                return {v: tuple(sorted(ranks)) for v, ranks in sets.items()}


def _scan_node(eqn, active):
    closed = eqn.params["jaxpr"]
    outer = lambda vs, inner: sum(a.aval.ndim > b.aval.ndim for a, b in zip(vs, inner, strict=True))
    num_carry = len(eqn.outvars) - outer(eqn.outvars, closed.jaxpr.outvars)
    num_consts = len(eqn.invars) - outer(eqn.invars, closed.jaxpr.invars) - num_carry
    active = list(active)
    while True:  # a carry is active if it starts so or becomes so
        body = build(closed, active)
        grown = list(active)
        for k in range(num_carry):
            grown[num_consts + k] |= body.active_outs[k]
        if grown == active:
            break
        active = grown
    results = tuple(
        o for o, is_active in enumerate(body.active_outs) if is_active or (o < num_carry and active[num_consts + o])
    )
    if not results:
        return None
    operands = tuple(i for i, is_active in enumerate(active) if is_active)
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    recompute = _holds(closed.jaxpr, REMAT)
    scan = Scan(body, num_consts, num_carry, length, reverse, operands, results, recompute)
    return Node(
        "scan",
        None,
        tuple(_variable(eqn.invars[i]) for i in operands),
        (),
        tuple(eqn.outvars[o] for o in results),
        scan,
    )


def _scan(node, env, lam, x1, x2, sums, order):
    scan, body = node.scan, node.scan.body
    invars, outvars = body.jaxpr.invars, body.jaxpr.outvars
    consts, steps = env[node.outs, "saved"]
    x1, x2 = ({i: x for i, x in zip(scan.operands, stacks, strict=True) if x is not None} for stacks in (x1, x2))
    ranks = scan.ranks({i: x.ranks for i, x in x1.items()})
    carried = [i for i in scan.operands if scan.is_carry(i) and invars[i] in ranks]
    results = [o for o in scan.results if not isinstance(outvars[o], jex.Literal) and outvars[o] in ranks]
    start = lambda stacks: {i: _spread_or_zero(stacks.get(i), ranks[invars[i]], invars[i]) for i in carried}
    scanned = lambda stacks: {i: jnp.moveaxis(x.array, 1, 0) for i, x in stacks.items() if scan.is_scanned(i)}
    constant = lambda stacks: {invars[i]: x for i, x in stacks.items() if i < scan.num_consts}
    end = lambda stacks, o, rank: _spread_or_zero(stacks.get(outvars[o]), rank, outvars[o])

    def inputs(stacks, carry, x):
        found = constant(stacks) | {invars[i]: Stack(ranks[invars[i]], array) for i, array in carry.items()}
        return found | {invars[i]: Stack(stacks[i].ranks, array) for i, array in x.items()}

    def step(state, slices):
        carry1, carry2, hbar, third = state
        step_values, adjoints, slice1, slice2 = slices
        inner_env, inner_lam = scan.values_and_adjoints(consts, step_values, adjoints)
        inner = Sums(sums.num_groups, sums.dtype)
        first, second = inputs(x1, carry1, slice1), inputs(x2, carry2, slice2)
        first, second = tangent(body, inner_env, inner_lam, first, second, inner, order)
        out_of = lambda stacks: {i: end(stacks, i - scan.num_consts, ranks[invars[i]]) for i in carried}
        ys = lambda stacks: {o: end(stacks, o, ranks[outvars[o]]) for o in results if o >= scan.num_carry}
        _, local_hbar, local_third = inner.totals()
        state = out_of(first), out_of(second) if order > 2 else {}, hbar + local_hbar, third + local_third
        return state, (ys(first), ys(second) if order > 2 else {})

    _, *zero = Sums(sums.num_groups, sums.dtype).totals()
    (carry1, carry2, hbar, third), (ys1, ys2) = lax.scan(
        step,
        (start(x1), start(x2) if order > 2 else {}, *zero),
        (steps, env[node.outs, "adjoints"], scanned(x1), scanned(x2)),
        scan.length,
        scan.reverse,
    )
    sums.hbar.append(hbar)
    sums.third.append(third)

    def out(carry, ys, o):
        if o < scan.num_carry:
            i = o + scan.num_consts
            return Stack(ranks[invars[i]], carry[i]) if i in carry else None
        return Stack(ranks[outvars[o]], jnp.moveaxis(ys[o], 0, 1)) if o in ys else None

    return [out(carry1, ys1, o) for o in scan.results], [out(carry2, ys2, o) for o in scan.results]


# --- Stacks ---------------------------------------------------------------------------------------------------------


def _map(fn, array):
    return jax.tree.map(lambda z: z[None], fn(array[0])) if len(array) == 1 else jax.vmap(fn)(array)


def _rows(fn, stack, num_outs):
    if stack is None:
        return [None] * num_outs
    return [Stack(stack.ranks, z) for z in _map(fn, stack.array)]


def _add(x, y):
    """The sum of two stacks, over the union of their ranks."""
    if x is None or y is None:
        return y if x is None else x
    if x.ranks == y.ranks:
        return Stack(x.ranks, x.array + y.array)
    ranks = tuple(sorted({*x.ranks, *y.ranks}))
    if len(ranks) == len(x.ranks) + len(y.ranks):
        low, high = (x, y) if x.ranks < y.ranks else (y, x)
        if low.ranks[-1] < high.ranks[0]:
            return Stack(ranks, jnp.concatenate([low.array, high.array]))
    return Stack(ranks, _spread(x, ranks) + _spread(y, ranks))


def _contiguous(ranks, among):
    start = among.index(ranks[0])
    return start if among[start : start + len(ranks)] == ranks else None


def _spread(stack, ranks):
    """The stack's array with rows of zeros for the ranks that it lacks."""
    if stack.ranks == ranks:
        return stack.array
    start = _contiguous(stack.ranks, ranks)
    if start is not None:
        pad = [(start, len(ranks) - start - len(stack.ranks), 0)] + [(0, 0, 0)] * (stack.array.ndim - 1)
        return lax.pad(stack.array, jnp.zeros((), stack.array.dtype), pad)
    where = jnp.array([ranks.index(s) for s in stack.ranks])
    return jnp.zeros((len(ranks), *stack.array.shape[1:]), stack.array.dtype).at[where].set(stack.array)


def _spread_or_zero(stack, ranks, v):
    return jnp.zeros((len(ranks), *v.aval.shape), v.aval.dtype) if stack is None else _spread(stack, ranks)


def _select(stack, ranks):
    """The rows of some of the stack's ranks."""
    if stack.ranks == ranks:
        return stack.array
    start = _contiguous(ranks, stack.ranks)
    if start is not None:
        return lax.slice_in_dim(stack.array, start, start + len(ranks))
    return stack.array[jnp.array([stack.ranks.index(s) for s in ranks])]


def _gram(x, y):
    """<x_s, y_t> for all s and t, accumulated in at least float32."""
    dtype = _wide(jnp.promote_types(x.dtype, y.dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    axes = tuple(range(1, x.ndim))
    return lax.dot_general(x, y, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST).real


def _inner(x, y):
    """<x_s, y_s> for all s, accumulated in at least float32."""
    dtype = _wide(jnp.promote_types(x.dtype, y.dtype))
    return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=tuple(range(1, x.ndim))).real


def _placed(stack, num_groups, dtype):
    return _spread(Stack(stack.ranks, stack.array.astype(dtype)), tuple(range(num_groups)))


def _placed2(rows, columns, block, num_groups):
    everything = tuple(range(num_groups))
    block = _spread(Stack(rows, block), everything)
    return _spread(Stack(columns, block.T), everything).T


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _ranks_by_first_use(program, index, num_groups):
    """A number for every group, in the order in which the program first reads one of its parameters."""
    group = dict(zip(program.jaxpr.invars, index, strict=True))
    seen = dict.fromkeys(group[v] for node in program.nodes for v in node.active if v in group)
    seen.update(dict.fromkeys(range(num_groups)))
    rank = [0] * num_groups
    for r, g in enumerate(seen):
        rank[g] = r
    return rank


def _variable(v):
    """None for a literal, which no table of variables holds."""
    return None if isinstance(v, jex.Literal) else v


def _read(env, v):
    return v.val if isinstance(v, jex.Literal) else env[v]


def _is_active(stacks, v):
    return not isinstance(v, jex.Literal) and v in stacks


def _is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _is_half(aval):
    return _is_float(aval) and jnp.finfo(aval.dtype).bits < 32


def _is_real(aval):
    return not jnp.issubdtype(aval.dtype, jnp.complexfloating)
