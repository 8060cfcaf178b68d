"""The default direction: Adam's, with more momentum where the loss has no noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdaptiveMomentumState(NamedTuple):
    """State of :func:`scale_by_adaptive_momentum`.

    Attributes:
      mu, nu: averages of the gradient and of its square, like the params.
      decay_products: of all decays so far, of ``mu`` and of ``nu``: the weights that the
        zeros at the start still have, (2,).
    """

    mu: Any
    nu: Any
    decay_products: jax.Array


def scale_by_adaptive_momentum(
    b1: float = 0.8, b1_noiseless: float = 0.95, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with more momentum where the loss has no noise.

    As ``optax.scale_by_adam(b1, b2, eps)``, but that b1 may change from step to step::

      mu <- b mu + (1 - b) g,   nu <- b2 nu + (1 - b2) g^2,   u = mu / (1 - prod b) / (sqrt(nu / (1 - b2^t)) + eps)

    with b = ``b1_noiseless`` where ``update`` gets ``noiseless=True`` and ``b1`` otherwise.
    :func:`grouped_newton` says which, see there; it is its direction by default. Under noise little
    momentum allows larger rates. Without it, as on the full batch, more momentum gets further.

    Args:
      b1: decay of the gradient's average, in [0, 1).
      b1_noiseless: the same where there is no noise, in [0, 1).
      b2: decay of the square's average, in [0, 1).
      eps: added to the root of the square's average, at least 0.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(scale_by_adaptive_momentum(), optax.add_decayed_weights(1e-4))
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([3.0, -0.1]), tx.init(params), params, noiseless=True)
      >>> updates.round(2).tolist()
      [1.0, -1.0]

    References:
      D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980.
    """
    for name, decay in (("b1", b1), ("b1_noiseless", b1_noiseless), ("b2", b2)):
        if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay!r}")
    if not isinstance(eps, jax.core.Tracer) and not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}")

    def init(params):
        zeros = lambda: optax.tree.zeros_like(params)
        return AdaptiveMomentumState(zeros(), zeros(), jnp.ones(2))

    def update(updates, state, params=None, *, noiseless=False, **extra_args):
        del params, extra_args
        b = jnp.where(noiseless, b1_noiseless, b1)
        mu = optax.tree.cast_like(optax.tree.update_moment(updates, state.mu, b, 1), state.mu)
        nu = optax.tree.cast_like(optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2), state.nu)
        products = state.decay_products * jnp.stack([b, b2]).astype(state.decay_products.dtype)
        mean, square = (optax.tree.bias_correction(m, p, 1) for m, p in zip((mu, nu), products, strict=True))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, AdaptiveMomentumState(mu, nu, products)

    return optax.GradientTransformationExtraArgs(init, update)
