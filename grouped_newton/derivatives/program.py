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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from grouped_newton.derivatives.custom_rules import followed, forward_only, keeps
from grouped_newton.derivatives.jaxprs import (
    CALLS,
    CUSTOM_JVP,
    CUSTOM_VJP,
    REMAT,
    bodies,
    evaluate,
    function_of,
    holds,
    is_float,
    kind,
    likeness,
    live_equations,
    named_in_errors,
    replaced,
    variable,
)
from grouped_newton.derivatives.rewrites import CONSTANT, max_over_windows, open_calls

ELEMENTWISE = set(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp"  # noqa: SIM905
    " convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow"
    " is_finite le lgamma log log1p logistic lt max min mul ne neg not or pow reduce_precision rem round rsqrt select_n"
    " sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
_LONGEST = 32  # equations in a chain: XLA takes ever longer over the third derivative of a longer one


class Node(NamedTuple):
    """A piece of the program: ``outs = fn(active values, inactive values)``."""

    kind: str
    fn: Callable | None  # of a scan none
    active: tuple
    inactive: tuple
    outs: tuple
    eqns: tuple  # that it was made of
    scan: Any = None
    joint: bool = False  # its operands are to be perturbed together
    repeats: bool = False  # ``fn`` is that of all nodes which are the same function
    forgiving: bool = False  # see ``rules.py``
    forward: Callable | None = None  # ``fn`` for forward mode alone, where that is another: a custom_vjp that is kept


class Program(NamedTuple):
    """A traced function: its equations for the primal pass, its nodes for the other two."""

    jaxpr: Any
    consts: Sequence
    nodes: list
    scans: dict[int, Node]  # by number of the equation
    active_outs: list[bool]
    cache: dict  # what is found out once for all nodes that are the same function


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

    def seeds(self, ct_carry, ct_y):
        outvars = self.body.jaxpr.outvars
        pairs = [(outvars[i - self.num_consts], value) for i, value in ct_carry.items()]
        pairs += [(outvars[o], value) for o, value in ct_y.items()]
        return [(v, value) for v, value in pairs if not isinstance(v, jex.Literal)]

    def slots(self, given, inside, outside):
        """The slots that reach every variable of the body, and every operand between its steps: a fixed point.

        ``given`` has those of the operands; ``inside`` and ``outside`` say what they become within a step and after it.
        """
        jaxpr, between = self.body.jaxpr, {i: set(slots) for i, slots in given.items()}
        while True:
            sets = {jaxpr.invars[i]: inside(slots) for i, slots in between.items()}
            for node in self.body.nodes:
                reached = set().union(*(sets.get(v, ()) for v in node.active))
                sets.update((v, reached) for v in node.outs)
            changed = False
            for i, out in enumerate(jaxpr.outvars[: self.num_carry], self.num_consts):
                before = between.get(i, set())
                grown = before | outside(sets.get(variable(out), set()))
                changed |= grown != before
                if grown:
                    between[i] = grown
            if not changed:
                in_order = lambda table: {v: tuple(sorted(slots)) for v, slots in table.items()}
                return in_order(sets), in_order(between)


def build(closed: Any, active: Sequence[bool], cache: dict | None = None, forgiving: bool = False) -> Program:
    """Opens the calls of a closed jaxpr and sorts its equations into nodes; of equal ones all is found out once."""
    cache = {} if cache is None else cache
    closed = open_calls(closed, active)
    jaxpr = closed.jaxpr
    eqns = live_equations(jaxpr)
    nodes: list[Node] = []
    scans: dict[int, Node] = {}
    root = {v: v for v, a in zip(jaxpr.invars, active, strict=True) if a}  # of every active value
    chain: dict[Any, set[int]] = {}  # equations from the root to a value
    carriers = _tangent_carriers(eqns, jaxpr.outvars)
    maker = {v: k for k, eqn in enumerate(eqns) for v in eqn.outvars}

    def materialise(v):
        """Gives a value that is an elementwise function of its root a node of its own; False if it has no tangent."""
        if root[v] is not v:
            node = _node(jaxpr, [eqns[k] for k in sorted(chain.pop(v))], [root[v]], [v], cache, elementwise=True)
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
        elementwise = bool(operands) and _is_elementwise(eqn, jaxpr, operands)
        if not elementwise or len({root[v] for v in operands}) > 1:
            operands = [v for v in operands if materialise(v)]
        if not operands:
            continue
        if elementwise and len({root[v] for v in operands}) == 1:
            root[outs[0]] = root[operands[0]]
            chain[outs[0]] = {k}.union(*(chain.get(v, ()) for v in operands))
            if len(chain[outs[0]]) >= _LONGEST:
                materialise(outs[0])
            continue
        if eqn.primitive.name == "scan":
            node = _scan_node(eqn, [not isinstance(v, jex.Literal) and v in root for v in eqn.invars], cache, forgiving)
        else:
            group = [eqn]
            if elementwise:  # a broadcast operand stays small: the broadcast becomes a part of the node
                for i, v in enumerate(operands):
                    if v in maker and eqns[maker[v]].primitive.name == "broadcast_in_dim":
                        group.insert(0, eqns[maker[v]])
                        operands[i] = eqns[maker[v]].invars[0]
            node = _node(jaxpr, group, list(dict.fromkeys(operands)), outs, cache)
        if node is not None:
            nodes.append(node)
            root.update((v, v) for v in node.outs)
            if node.kind == "scan":
                scans[k] = node
    active_outs = [not isinstance(v, jex.Literal) and v in root and materialise(v) for v in jaxpr.outvars]
    nodes = [node._replace(forgiving=forgiving) for node in _live_nodes(nodes, jaxpr.outvars)]
    return Program(jaxpr.replace(eqns=eqns), closed.consts, nodes, scans, active_outs, cache)


def _tangent_carriers(eqns, outvars):
    """The values whose tangents can reach an output: real or complex, and not only through a constant function."""
    carriers = {v for v in outvars if not isinstance(v, jex.Literal)}
    for eqn in reversed(eqns):
        if eqn.primitive.name not in CONSTANT and any(v in carriers for v in eqn.outvars):
            carriers.update(v for v in eqn.invars if not isinstance(v, jex.Literal) and is_float(v.aval))
    return {v for v in carriers if is_float(v.aval)}


def _live_nodes(nodes, outvars):
    needed = {v for v in outvars if not isinstance(v, jex.Literal)}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.outs):
            kept.append(node)
            needed.update(node.active)
    return kept[::-1]


def _node(jaxpr, eqns, active, outs, cache, elementwise=False):
    """A node from equations; None if no output depends on an active operand."""
    inside = {v for eqn in eqns for v in eqn.outvars}
    operands = dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal))
    inactive = [v for v in operands if v not in inside and v not in active]
    alike = likeness(eqns, [*active, *inactive], outs)
    key = alike or object(), len(active), elementwise
    if key not in cache:
        with named_in_errors(eqns):
            cache[key] = _sorted(jaxpr, eqns, active, inactive, outs, elementwise)
    how, fn, kept, joint, forward = cache[key]
    if not kept:
        return None
    outs = tuple(outs[o] for o in kept)
    repeats = alike is not None
    return Node(how, fn, tuple(active), tuple(inactive), outs, tuple(eqns), None, joint, repeats, forward=forward)


def _sorted(jaxpr, eqns, active, inactive, outs, elementwise):
    """Kind and function of a node, which outputs move, whether operands do so together, and its function forwards."""
    evaluate = function_of(jaxpr, eqns, [*active, *inactive], outs)
    if eqns[0].primitive.name == "reduce_window_max":
        evaluate = max_over_windows(**eqns[0].params) or evaluate
    n = len(active)
    joint = n > 1 and any(map(_may_look, eqns))
    together = joint or n > 2  # one by one, n operands would be n functions of n operands
    forwards = forward_only(evaluate) if keeps(eqns) else evaluate
    traced = _traced_tangents(forwards, active, inactive, together)
    if any(keeps(jaxpr.eqns) for jaxpr in traced):  # in the rule of a custom_jvp
        evaluate = forwards = followed(evaluate)
        traced = _traced_tangents(evaluate, active, inactive, together)
    reach = [_dependence(traced[0], n, i, n) if together else _dependence(traced[i], n, 0, 1) for i in range(n)]
    kept = [o for o in range(len(outs)) if any(reach[i][o][0] for i in range(n))]
    curved = {(i, j) for i in range(n) for o in kept for j in reach[i][o][1]}

    def of_active(evaluate):
        def fn(active_values, inactive_values):
            values = evaluate(*active_values, *inactive_values)
            return [values[o] for o in kept]

        return fn

    if forwards is not evaluate:
        return "general", of_active(evaluate), kept, joint, of_active(forwards)
    if not curved:
        how = "linear"
    elif elementwise:
        how = "unary"
    elif len(kept) == 1 and n == 2 and not joint and all(i != j for i, j in curved):
        how = "bilinear"
    else:
        how = "general"
    return how, of_active(evaluate), kept, joint, None


def _may_look(eqn):
    """Whether the rule of an equation may see which operands are constant; those of JAX's own primitives don't care.

    A custom rule for symbolic zeros is another function of a tangent that is absent than of one that is zero, and
    that of ``custom_linear_solve`` fails where only what its solver starts from moves.
    """
    if sum(is_float(v.aval) for v in eqn.invars) < 2:
        return False
    name, inner = kind(eqn), bodies(eqn)
    own = name in ELEMENTWISE or any(getattr(m, f"{name}_p", None) is eqn.primitive for m in (lax, lax.linalg))
    if name in CUSTOM_JVP | CUSTOM_VJP or name == "custom_linear_solve" or not (own or inner):
        return eqn.params.get("symbolic_zeros", True)
    return any(_may_look(e) for b in inner for e in b.eqns)


def _traced_tangents(fn, active, inactive, joint):
    """Jaxprs from all operands, tangents and the rest to the jvp: one for all operands, or one for each."""
    primals, others = [v.aval for v in active], [v.aval for v in inactive]

    def traced(moved):
        return open_calls(jax.make_jaxpr(_tangents(fn, moved))(primals, [primals[i] for i in moved], others)).jaxpr

    return [traced(range(len(active)))] if joint else [traced([i]) for i in range(len(active))]


def _tangents(fn, moved):
    """The jvp of ``fn(*xs, *rest)`` with respect to the operands numbered ``moved`` alone."""

    def tangents(xs, dxs, rest):
        of_moved = lambda *values: fn(*replaced(xs, moved, values), *rest)
        return jax.jvp(of_moved, tuple(xs[i] for i in moved), tuple(dxs))[1]

    return tangents


def _dependence(jaxpr, num_active, own, num_tangents):
    """For every output of a traced jvp: whether it moves with the tangent numbered ``own``, the others being zero, and
    on which operands it then depends.

    Dependence through integers and booleans has no derivative and doesn't count: relu and max-pooling are linear.
    """
    operands, tangents = jaxpr.invars[:num_active], jaxpr.invars[num_active : num_active + num_tangents]
    depends = {v: frozenset([i]) for i, v in enumerate(operands)}
    moves = {v: frozenset([i]) for i, v in enumerate(tangents)}  # with which tangents; it is zero if not with ``own``
    for eqn in jaxpr.eqns:
        moved, on = (frozenset().union(*(d.get(variable(x), ()) for x in eqn.invars)) for d in (moves, depends))
        for v in eqn.outvars:
            if is_float(v.aval):
                moves[v] = moved
                depends[v] = on if own in moved or not moved else frozenset()
    found = [(own in moves.get(variable(v), ()), depends.get(variable(v), frozenset())) for v in jaxpr.outvars]
    return [(moved, on if moved else frozenset()) for moved, on in found]


def _is_elementwise(eqn, jaxpr, operands):
    out = eqn.outvars[0].aval
    fits = all(v.aval.shape == out.shape and _is_real(v.aval) for v in operands)
    return len(eqn.outvars) == 1 and fits and _is_real(out) and _keeps_places(eqn, jaxpr)


def _keeps_places(eqn, jaxpr, order=3):
    """Whether every number of the output is a function of those in its place alone, and its derivatives too."""
    name = kind(eqn)
    if name in CALLS or name in CUSTOM_JVP:
        inner = [getattr(b, "jaxpr", b) for b in bodies(eqn)]
        in_body = all(_keeps_places(e, b, order if name in CALLS else 0) for b in inner for e in b.eqns)
        return in_body and (name in CALLS or order == 0 or _rule_keeps_places(eqn, jaxpr, order))
    return name in ELEMENTWISE or (name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ())


def _rule_keeps_places(eqn, jaxpr, order):
    """The same for the rule of a custom_jvp, from which its derivatives come; it may call the function itself."""
    moved = [i for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and is_float(v.aval)]

    def rule(values, along):
        fn = lambda *xs: evaluate(eqn, jaxpr, replaced(values, moved, xs))
        return jax.jvp(fn, tuple(values[i] for i in moved), tuple(along))

    avals = [v.aval for v in eqn.invars]
    traced = open_calls(jax.make_jaxpr(rule)(avals, [avals[i] for i in moved])).jaxpr
    tangent = live_equations(traced.replace(outvars=traced.outvars[len(eqn.outvars) :]))
    of_value = [e for e in live_equations(traced) if kind(e) not in CUSTOM_JVP]
    return all(_keeps_places(e, traced, order - 1) for e in (*tangent, *of_value))


def _scan_node(eqn, active, cache, forgiving):
    closed = eqn.params["jaxpr"]
    outer = lambda vs, inner: sum(a.aval.ndim > b.aval.ndim for a, b in zip(vs, inner, strict=True))
    # By shapes: what jax 0.10 has as num_consts and num_carry is hidden in ft_in and ft_out by jax 0.12.
    num_carry = len(eqn.outvars) - outer(eqn.outvars, closed.jaxpr.outvars)
    num_consts = len(eqn.invars) - outer(eqn.invars, closed.jaxpr.invars) - num_carry
    active = list(active)
    while True:  # a carry is active if it starts so or becomes so
        body = build(closed, active, cache, forgiving)
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
        tuple(variable(eqn.invars[i]) for i in operands),
        (),
        tuple(eqn.outvars[o] for o in results),
        (eqn,),
        scan,
    )


def _is_real(aval):
    return not jnp.issubdtype(aval.dtype, jnp.complexfloating)
