"""Training runs and runs along given directions, shared by the tests."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import grouped_newton as gn


def sum_of_squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def train(tx, loss, params, batches, given=False, averaged=False):
    """Trains by one scan, the curvature on the same batch; the params, state and updates after every step.

    Whether the loss of every step, and the average of the params, are given to the optimizer is for the caller to say.
    """

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        extra = {"value": value} if given else {}
        extra |= {"averaged_params": gn.eval_params(state, params)} if averaged else {}
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, batch), **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, updates)

    return lax.scan(step, (params, tx.init(params)), batches)[1]


def follow(tx, loss, params, directions, batches):
    """Updates and states of a run along given directions in which the params stay where they are."""

    def step(state, direction_and_batch):
        direction, batch = direction_and_batch
        updates, state = tx.update(direction, state, params, value_fn=lambda p: loss(p, batch))
        return state, (updates, state)

    return lax.scan(step, tx.init(params), (directions, batches))[1]


def polynomial(params, batch):
    """c + g p + h p^2 / 2 + t p^3 / 6 of one number: at 0 its summary along u = 1 is the batch."""
    p = params["p"]
    return batch["c"] + batch["g"] * p + batch["h"] / 2 * p**2 + batch["t"] / 6 * p**3


def polynomial_batches(**columns):
    """Columns of up to six steps, the last value repeated."""
    columns = {"c": [0.0], "g": [1.0], "h": [2.0], "t": [0.0], **columns}
    return {k: jnp.array(v + v[-1:] * (6 - len(v)), jnp.float32) for k, v in columns.items()}


def follow_polynomial(tx, batches, directions):
    updates, state = follow(tx, polynomial, {"p": jnp.zeros(())}, {"p": directions}, batches)
    return updates["p"], state


def constant_rule(*eta):
    return lambda summary, damping: gn.CubicSolution(jnp.array(eta), jnp.zeros(()), jnp.int32(gn.CubicStatus.SOLVED))
