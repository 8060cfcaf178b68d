"""One of two processes that train together: python distributed_worker.py PORT RANK. Not a test itself."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_newton as gn

STEPS, PROCESSES = 4, 2


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"] - y) ** 2)


def numbers(mesh):
    """Params and state after some steps on a mesh of one axis, every number of them."""
    (axis,) = mesh.axis_names
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 8), "b": (8,), "c": (8, 2)}
    params = {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}
    x, y = rng.standard_normal((STEPS, 16, 3)), rng.standard_normal((STEPS, 16, 2))

    def placed(value, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    # One parameter is divided among the processes, so that their updates have to agree.
    params = {name: placed(v, P(None, axis) if name == "a" else P()) for name, v in params.items()}
    x, y = placed(x, P(None, axis)), placed(y, P(None, axis))
    tx = gn.grouped_newton(groups=gn.groups.per_tensor, refresh_every=2)

    def train(params, x, y):
        def step(carry, batch):
            params, state = carry
            value_fn = lambda p: loss(p, *batch)
            updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = lax.scan(step, (params, tx.init(params)), (x, y))
        leaves = jax.tree.leaves((params, state))
        return jnp.concatenate([jnp.ravel(v).astype(float) for v in leaves])

    found = jax.jit(train, out_shardings=NamedSharding(mesh, P()))(params, x, y)
    return np.asarray(found.addressable_data(0))


def main(port, rank):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    except (AttributeError, ValueError):
        print("NO CPU COLLECTIVES")
        return
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, rank)
    assert jax.device_count() == jax.process_count() == PROCESSES
    mesh = jax.make_mesh((PROCESSES,), ("data",), axis_types=(AxisType.Auto,))
    print("RESULT", *(float(v).hex() for v in numbers(mesh)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
