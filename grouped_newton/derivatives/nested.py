"""The summary by its definition: nested ``jax.jvp``.

Row s of hbar, from its diagonal on, is one jvp along u_s of the gradient with
respect to the groups s, s+1, ... only: where the order of groups follows that of
the forward pass, nothing upstream of group s is differentiated. third_s is three
jvps, nested, along u_s alone. Nothing of S x P numbers is ever formed.
"""

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.custom_rules import in_forward_mode
from grouped_newton.derivatives.jaxprs import replaced


def nested(loss, theta, u, partition, dtype, order):
    """The definition; ``loss`` is a function of the list of leaves."""

    def restricted_to(leaves, loss):
        """The loss as a function of some leaves alone, and where it is taken."""
        return lambda values: loss(replaced(theta, leaves, values)), [theta[i] for i in leaves]

    moving = [i for i, g in enumerate(partition.index) if g >= 0]
    by_rule = in_forward_mode(*restricted_to(moving, loss))
    smooth = loss if by_rule is None else lambda leaves: by_rule([leaves[i] for i in moving])[0]

    def inner_by_group(leaves, values):
        """<v, u>_t for every group t, of a v that is zero outside ``leaves``."""
        products = [jnp.zeros((), dtype)] * len(theta)
        for i, v in zip(leaves, values, strict=True):
            products[i] = jnp.sum(v.astype(dtype) * u[i].astype(dtype))  # not subject to matmul precision
        return partition.sums(products, dtype)

    value, gbar, rows, third = None, None, [], []
    for s in range(partition.num_groups):
        downstream = [i for i, g in enumerate(partition.index) if g >= s]
        u_s = [u[i] if partition.index[i] == s else jnp.zeros_like(u[i]) for i in downstream]
        f, x = restricted_to(downstream, smooth)
        (value_s, gradient), (_, hessian_u_s) = jax.jvp(jax.value_and_grad(f), (x,), (u_s,))
        if s == 0:
            value = value_s
            if smooth is not loss:  # of the gradient itself, also where a rule isn't linear in the cotangent
                gradient = jax.grad(restricted_to(downstream, loss)[0])(x)
            gbar = inner_by_group(downstream, gradient)
        rows.append(inner_by_group(downstream, hessian_u_s))

        own = partition.members(s)
        f, x = restricted_to(own, smooth)
        third.append(_third_derivative(f, x, [u[i] for i in own]) if order == 3 else jnp.zeros((), dtype))
    if value is None:
        z = lambda *shape: jnp.zeros(shape, dtype)
        return loss(theta).astype(dtype), z(0), z(0, 0), z(0)
    upper = jnp.stack(rows)
    return value.astype(dtype), gbar, upper + jnp.triu(upper, 1).T, jnp.stack(third).astype(dtype)


def _third_derivative(f, theta, u):
    """(D^3 f)[u, u, u] at theta."""

    def derivative(g):
        return lambda x: jax.jvp(g, (x,), (u,))[1]

    return derivative(derivative(derivative(f)))(theta)
