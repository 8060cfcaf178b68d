"""The default direction: Adam's, with a longer memory where the loss has no noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdaptiveMomentumState(NamedTuple):
    """State of :func:`scale_by_adaptive_momentum`.

    Attributes:
      mu, nu: averages of the gradient and of its square, like the params, in at least float32.
      decay_products: of all decays so far, of ``mu`` and of ``nu``: the weights that the
        zeros at the start still have, (2,).
    """

    mu: Any
    nu: Any
    decay_products: jax.Array


def scale_by_adaptive_momentum(
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-8,
    *,
    b1_noiseless: float = 0.95,
    b2_noiseless: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with a longer memory where the loss has no noise.

    As ``optax.scale_by_adam(b1, b2, eps)``, but that both decays may change from step to step::

      mu <- d1 mu + (1 - d1) g,   nu <- d2 nu + (1 - d2) g^2
      u = mu / (1 - prod d1) / (sqrt(nu / (1 - prod d2)) + eps)

    with d1, d2 = ``b1_noiseless``, ``b2_noiseless`` where ``update`` gets ``noiseless=True`` and
    ``b1``, ``b2`` otherwise; the products are over all steps. :func:`grouped_newton` says which, see
    there; it is its direction by default. Under noise a short memory allows larger rates. Without it,
    as on the full batch, more momentum gets further.

    Args:
      b1: decay of the gradient's average, in [0, 1).
      b2: decay of the square's average, in [0, 1).
      eps: added to the root of the square's average, positive.
      b1_noiseless: ``b1`` where there is no noise.
      b2_noiseless: ``b2`` where there is no noise.

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
    decays = {"b1": b1, "b2": b2, "b1_noiseless": b1_noiseless, "b2_noiseless": b2_noiseless}
    for name, decay in decays.items():
        if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay!r}")
    if not isinstance(eps, jax.core.Tracer) and not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps!r}")

    def init(params):
        kept = lambda x: jnp.zeros_like(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
        zeros = lambda: jax.tree.map(kept, params)
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        widest = jnp.result_type(jnp.float32, *(d for d in dtypes if jnp.issubdtype(d, jnp.floating)))
        return AdaptiveMomentumState(zeros(), zeros(), jnp.ones(2, widest))

    def update(updates, state, params=None, *, noiseless=False, **extra_args):
        del params, extra_args
        d1, d2 = jnp.where(noiseless, b1_noiseless, b1), jnp.where(noiseless, b2_noiseless, b2)
        g = optax.tree.cast_like(updates, state.mu)
        mu = optax.tree.cast_like(optax.tree.update_moment(g, state.mu, d1, 1), state.mu)
        nu = optax.tree.cast_like(optax.tree.update_moment_per_elem_norm(g, state.nu, d2, 2), state.nu)
        products = state.decay_products * jnp.stack([d1, d2]).astype(state.decay_products.dtype)
        mean, square = (optax.tree.bias_correction(m, p, 1) for m, p in zip((mu, nu), products, strict=True))
        u = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        updates = optax.tree.cast_like(u, updates)
        return updates, AdaptiveMomentumState(mu, nu, products)

    return optax.GradientTransformationExtraArgs(init, update)
