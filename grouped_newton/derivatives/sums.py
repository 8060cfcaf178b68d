"""The sums of a sweep's local terms."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from grouped_newton import sharding
from grouped_newton.derivatives.stacks import Stack, placed, sum_few

_HELD = 1 << 16  # numbers of terms that wait to be added up


class Sums:
    """Local terms of gbar, hbar and third, in order of slot; over ``axes`` they are to be added up.

    A term keeps the slots that it has. Spread over all groups one by one, every term of another place would be another
    kernel to compile.
    """

    def __init__(self, num_groups, dtype, axes=()):
        self.num_groups, self.dtype, self.axes = num_groups, dtype, axes
        self.terms = []  # name of the sum, slots along its axes
        self.values = []
        self.computed = 0  # of them, behind a barrier

    def add_gbar(self, stack):
        self._add("gbar", (stack.slots,), stack.array)

    def add_hbar(self, rows, columns, block):
        self._add("hbar", (rows, columns), block)

    def add_third(self, slots, values):
        self._add("third", (slots,), values)

    def add_totals(self, hbar, third):
        everything = tuple(range(self.num_groups))
        self._add("hbar", (everything, everything), hbar)
        self._add("third", (everything,), third)

    def _add(self, name, slots, values):
        self.terms.append((name, slots))
        self.values.append(sharding.in_parts(values.astype(self.dtype), self.axes))

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
        stacks = [None if x is None else x._replace(array=a) for x, a in zip((*x1, *x2), arrays, strict=True)]
        return stacks[: len(x1)], stacks[len(x1) :]

    def totals(self):
        """gbar, hbar and third of all groups."""
        S = self.num_groups
        return [self._total(name, shape) for name, shape in (("gbar", (S,)), ("hbar", (S, S)), ("third", (S,)))]

    def _total(self, name, shape):
        alike: dict[Any, list] = {}
        for (term, slots), values in zip(self.terms, self.values, strict=True):
            if term == name:
                alike.setdefault(slots, []).append(values)
        zero = sharding.pvary(jnp.zeros(shape, self.dtype), self.axes)
        return sum_few([zero, *(placed(slots, sum_few(values), self.num_groups) for slots, values in alike.items())])
