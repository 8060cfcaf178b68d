"""What the optimizer makes of a direction: state in at least float32, and finite numbers."""

import jax
import jax.numpy as jnp
import optax

from grouped_newton import groups


def in_float32(direction):
    """A direction whose state is in at least float32: in half precision Adam's squares stand still or are zero."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(groups.wider(x.dtype, jnp.float32)), tree)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # Adam's counter is an integer exponent
            u, state = direction.update(wide(updates), state, params)
        return optax.tree.cast_like(u, updates), state

    return optax.GradientTransformation(lambda params: direction.init(wide(params)), update)


def of_finite_gradients(direction):
    """The direction of a gradient whose bad numbers are zeros; elementwise, so that it costs no pass of its own."""
    direction = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(_zero_extreme, updates)
        return direction.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(direction.init, update)


def _zero_extreme(x):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    largest = float(jnp.finfo(x.dtype).max) ** 0.5  # an adaptive direction keeps squares
    return jnp.where(jnp.abs(x) <= largest, x, jnp.zeros_like(x))
