"""A traced loss as a list of nodes, for the sweep: what is linear, unary, bilinear, a scan, or anything else.

Calls are opened, so that a program is a flat list of equations. A value is *active* if it depends on a parameter and
the output on it; a node is one equation, or several that are one function, of its active operands:

  linear     affine in all of them
  unary      a chain of elementwise equations from one active value, its root, of the same shape
  bilinear   two operands, affine in each
  scan       a ``lax.scan``, its body a program of its own
  general    anything else

Which is which is not looked up but found out: the jvp of a node with respect to one operand is traced, and it is
affine in that operand if the traced tangent doesn't depend on it. An equation that is in no list is only slower.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
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

    def residuals(self):
        """The values of the body that its other passes read, unless they are to be computed again."""
        given = {*self.body.jaxpr.invars, *self.body.jaxpr.constvars}
        scans = [(node.outs, "saved") for node in self.body.nodes if node.scan]
        others = [node for node in self.body.nodes if not node.scan]
        read = [v for node in others for v in (*node.active, *node.inactive) if v not in given]
        return list(dict.fromkeys(read + scans))

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

    def opened(jaxpr, consts, args, active):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        reached = {v for v, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
        for eqn in jaxpr.eqns:
            values = [read(env, v) for v in eqn.invars]
            flags = [_variable(v) in reached for v in eqn.invars]
            body = next((p for p in eqn.params.values() if isinstance(p, JAXPRS)), None)
            if eqn.primitive.name in CALLS and body is not None:
                closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
                outs, out_flags = opened(closed.jaxpr, closed.consts, values, flags)
            else:
                out_flags = [any(flags)] * len(eqn.outvars)
                # 1 / y leaves the range of half precision where x / y doesn't.
                if eqn.primitive.name == "div" and flags[1] and not is_half(eqn.outvars[0].aval):
                    outs = [values[0] * lax.integer_pow(values[1], -1)]
                else:
                    outs = evaluate(_with_open_branches(eqn), jaxpr, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            reached.update(v for v, is_active in zip(eqn.outvars, out_flags, strict=True) if is_active)
        return [read(env, v) for v in jaxpr.outvars], [_variable(v) in reached for v in jaxpr.outvars]

    active = [False] * len(closed.in_avals) if active is None else active
    return jax.make_jaxpr(lambda *args: opened(closed.jaxpr, closed.consts, args, active)[0])(*closed.in_avals)


def _with_open_branches(eqn):
    """A cond whose branches hold no custom_vjp, which forward mode refuses there too."""
    branches = eqn.params.get("branches")
    if eqn.primitive.name != "cond" or not any(holds(b.jaxpr, CUSTOM_VJP) for b in branches):
        return eqn
    return eqn.replace(params={**eqn.params, "branches": tuple(map(_open_calls, branches))})


def holds(jaxpr, names):
    bodies = [getattr(b, "jaxpr", b) for e in jaxpr.eqns for b in jax.tree.leaves(e.params, is_leaf=_is_jaxpr)]
    bodies = [b for b in bodies if isinstance(b, jex.Jaxpr)]
    return any(e.primitive.name in names for e in jaxpr.eqns) or any(holds(b, names) for b in bodies)


def _is_jaxpr(x):
    return isinstance(x, JAXPRS)


def evaluate(eqn, jaxpr, values):
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
    primals, others = [v.aval for v in active], [v.aval for v in inactive]
    result = []
    for i, v in enumerate(active):
        jaxpr = _open_calls(jax.make_jaxpr(_tangents(fn, i))(primals, v.aval, others)).jaxpr
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
    recompute = holds(closed.jaxpr, REMAT)
    scan = Scan(body, num_consts, num_carry, length, reverse, operands, results, recompute)
    return Node(
        "scan",
        None,
        tuple(_variable(eqn.invars[i]) for i in operands),
        (),
        tuple(eqn.outvars[o] for o in results),
        scan,
    )


def _variable(v):
    """None for a literal, which no table of variables holds."""
    return None if isinstance(v, jex.Literal) else v


def read(env, v):
    return v.val if isinstance(v, jex.Literal) else env[v]


def _is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def is_half(aval):
    return _is_float(aval) and jnp.finfo(aval.dtype).bits < 32


def _is_real(aval):
    return not jnp.issubdtype(aval.dtype, jnp.complexfloating)
