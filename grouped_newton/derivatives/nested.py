"""The summary by its definition: nested ``jax.jvp``.

Row s of hbar, from its diagonal on, is one jvp along u_s of the gradient with
respect to the groups s, s+1, ... only: where the order of groups follows that of
the forward pass, nothing upstream of group s is differentiated. third_s is three
jvps, nested, along u_s alone. Nothing of S x P numbers is ever formed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grouped_newton.derivatives.custom_rules import forward_only, in_forward_mode, keeps, same_slopes
from grouped_newton.derivatives.jaxprs import replaced


def nested(loss, theta, u, partition, dtype, order):
    """The definition; ``loss`` is a function of the list of leaves."""

    def restricted_to(leaves, loss):
        """The loss as a function of some leaves alone, and where it is taken."""
        return lambda values: loss(replaced(theta, leaves, values)), [theta[i] for i in leaves]

    def by_rule(alone):
        fn, at = of_all
        run = in_forward_mode(fn, at, alone)
        return loss if run is None else lambda leaves: run([leaves[i] for i in moving])[0]

    moving = [i for i, g in enumerate(partition.index) if g >= 0]
    of_all = restricted_to(moving, loss)
    smooth = forward = by_rule(alone=False)
    kept = smooth is not loss and keeps(jax.make_jaxpr(restricted_to(moving, smooth)[0])(of_all[1]).eqns)
    if kept:
        forward = by_rule(alone=True)

    def inner_by_group(leaves, values):
        """<v, u>_t for every group t, of a v that is zero outside ``leaves``."""
        products = [jnp.zeros((), dtype)] * len(theta)
        for i, v in zip(leaves, values, strict=True):
            products[i] = jnp.sum(v.astype(dtype) * u[i].astype(dtype))  # not subject to matmul precision
        return partition.sums(products, dtype)

    value: Any = None
    gbar: Any = None
    rows, thirds, slopes = [], [], []
    for s in range(partition.num_groups):
        downstream = [i for i, g in enumerate(partition.index) if g >= s]
        u_s = [u[i] if partition.index[i] == s else jnp.zeros_like(u[i]) for i in downstream]
        f, x = restricted_to(downstream, smooth)
        derivatives = forward_only(jax.value_and_grad(f)) if kept else jax.value_and_grad(f)
        (value_s, gradient), (_, hessian_u_s) = jax.jvp(derivatives, (x,), (u_s,))
        if s == 0:
            value = value_s
            if smooth is not loss:  # of the gradient itself, also where a rule isn't linear in the cotangent
                gradient = jax.grad(restricted_to(downstream, loss)[0])(x)
            gbar = inner_by_group(downstream, gradient)
            size = inner_by_group(
                downstream, [jnp.abs(g) * jnp.sign(u[i]) for i, g in zip(downstream, gradient, strict=True)]
            )
        rows.append(inner_by_group(downstream, hessian_u_s))

        own = partition.members(s)
        (f, x), u_s = restricted_to(own, forward), [u[i] for i in own]
        thirds.append(_third_derivative(f, x, u_s) if order == 3 else jnp.zeros((), dtype))
        if kept:
            slopes.append(jax.jvp(f, (x,), (u_s,))[1])
    if value is None:
        z = lambda *shape: jnp.zeros(shape, dtype)
        return loss(theta).astype(dtype), z(0), z(0, 0), z(0)
    upper = jnp.stack(rows)
    hbar, third = upper + jnp.triu(upper, 1).T, jnp.stack(thirds).astype(dtype)
    if kept:  # a group whose slopes differ has second derivatives of neither
        eps = max(float(jnp.finfo(theta[i].dtype).eps) for i in moving)
        unknown = ~same_slopes(jnp.stack(slopes).astype(dtype), gbar, size, eps)
        hbar, third = jnp.where(unknown[:, None] | unknown[None], jnp.nan, hbar), jnp.where(unknown, jnp.nan, third)
    return value.astype(dtype), gbar, hbar, third


def _third_derivative(f, theta, u):
    """(D^3 f)[u, u, u] at theta."""

    def derivative(g):
        return lambda x: jax.jvp(g, (x,), (u,))[1]

    return derivative(derivative(derivative(f)))(theta)
