"""Small sums, norms and exponents, without overflow and without a kernel for each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_traced(value: Any) -> bool:
    """Whether a number isn't known yet, so that its range can't be checked."""
    return isinstance(value, jax.core.Tracer)


def norm(x):
    """||x|| without overflow or underflow of the squares."""
    if x.size == 1:
        return jnp.abs(x).reshape(())
    # By a power of two: a quotient of quotients is compiled into one with a product below, which may underflow.
    k = exponent(folded(jnp.maximum, jnp.abs(x), 0))
    return ldexp(jnp.sqrt(total(ldexp(x, -k) ** 2)), k)


def folded(op, x, identity):
    """``identity`` and all numbers of x by ``op``, by halving: for the short arrays of the groups.

    On the CPU XLA pays about half a microsecond for each reduction in a program at every call, executed or not. Slices
    and elementwise operations are fused and cost nothing.
    """
    x = jnp.ravel(x)
    if x.size == 1:
        return op(x.reshape(()), jnp.asarray(identity, x.dtype))
    missing = (1 << max(x.size - 1, 0).bit_length()) - x.size
    x = jnp.concatenate([x, jnp.full(missing, identity, x.dtype)])
    while x.size > 1:
        x = op(x[: x.size // 2], x[x.size // 2 :])
    return lax.optimization_barrier(op(x.reshape(()), jnp.asarray(identity, x.dtype)))


def total(x):
    """The sum of x."""
    return folded(jnp.add, x, 0)


def all_finite(*arrays):
    """Whether every number is finite; 0 x is NaN where x isn't."""
    return total(jnp.concatenate([0 * jnp.ravel(x) for x in arrays])) == 0


def all_zero(x):
    return total(jnp.abs(x)) == 0


def computed_once(numbers):
    """The same numbers, computed here once: XLA fuses a chain of small operations into each of its readers.

    Every leaf that is scaled by a rate would compute the whole rule anew, in a kernel of its own to be compiled.
    """
    return lax.optimization_barrier(numbers)


def float_layout(dtype):
    info = jnp.finfo(dtype)
    bits_type = jnp.int32 if info.bits == 32 else jnp.int64
    return info, bits_type


def exponent(x):
    """The k with 2^(k-1) <= |x| < 2^k, as in frexp; least for zero and subnormal numbers."""
    info, bits_type = float_layout(x.dtype)
    bits = lax.bitcast_convert_type(jnp.abs(x), bits_type)
    return (bits >> info.nmant).astype(jnp.int32) + info.minexp


def ldexp(x, k):
    """x 2^k, exact in the normal range; beyond it 0 or infinity."""
    info, bits_type = float_layout(x.dtype)

    def power(k):
        return lax.bitcast_convert_type((k - (info.minexp - 1)).astype(bits_type) << info.nmant, x.dtype)

    k = jnp.asarray(k)
    for _ in range(3):
        part = jnp.clip(k, info.minexp, info.maxexp - 1)
        x, k = x * power(part), k - part
    return x


def quadratic_form(H, x):
    """x^T H x."""
    return total(H * x[:, None] * x[None])


def zero_nonfinite(x):
    """The array with zeros for what isn't finite."""
    x = jnp.asarray(x)
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
