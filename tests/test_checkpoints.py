"""States that were saved: resumed to the bit, on another number of devices, and refused for another grouping."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close, assert_equal
from flax import serialization
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_newton as gn

CONFIGURATIONS = {
    "optimizer": lambda groups=gn.groups.per_module: gn.grouped_newton(groups=groups, refresh_every=4),
    "transform": lambda groups=gn.groups.per_tensor: optax.chain(
        gn.scale_by_grouped_newton(groups, refresh_every=4, rates=gn.edge_rates(), summary_memory=0.5),
        optax.scale_by_learning_rate(0.5),
    ),
}


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype) / 2
    return {"hidden": {"w": draw(3, 8), "b": draw(8)}, "out": {"w": draw(8, 2), "b": draw(2)}}


def make_batches(steps, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(steps, 16, 3)).astype(dtype)
    return x, np.stack([np.sin(x[..., 0]), x[..., 1] * x[..., 2]], -1)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return jnp.mean((hidden @ params["out"]["w"] + params["out"]["b"][None] - batch[1]) ** 2)


def train(tx, params, state, batches):
    def step(carry, batch):
        params, state = carry
        value_fn = lambda p: loss_fn(p, batch)
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, state), batches)[0]


def part(batches, start, stop):
    return jax.tree.map(lambda x: x[start:stop], batches)


def save_and_restore(path, saved, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", like)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_restored_before_a_refresh_goes_on_to_the_bit(tmp_path, name):
    """The refresh is of the last direction before the checkpoint, if they are delayed; by orbax, pickle and Flax."""
    tx, params, batches = CONFIGURATIONS[name](), make_params(), make_batches(16)
    run = jax.jit(functools.partial(train, tx))
    midway = run(params, tx.init(params), part(batches, 0, 8))
    expected = run(*midway, part(batches, 8, 16))

    # What a new process has: the shapes, from a fresh init.
    like = jax.eval_shape(lambda p: (p, tx.init(p)), params)
    restored = save_and_restore(tmp_path, midway, like)
    unpickled = pickle.loads(pickle.dumps(jax.device_get(midway)))
    of_flax = serialization.from_bytes((params, tx.init(params)), serialization.to_bytes(midway))
    for saved in (restored, unpickled, of_flax):
        assert jax.tree.structure(saved) == jax.tree.structure(midway)
        assert_equal(saved, midway)
        found = run(*saved, part(batches, 8, 16))
        assert_equal(found, expected)
        # The schedule went on where it was.
        assert [int(optax.tree.get(state, "next_refresh")) for _, state in (midway, saved, found)] == [8, 8, 16]
        refreshes = [int(optax.tree.get(state, "refreshes")) for _, state in (midway, saved, found)]
        assert refreshes[0] == refreshes[1] < refreshes[2]


@pytest.mark.slow
def test_a_state_restored_onto_other_devices_goes_on_with_equal_numbers(x64, tmp_path):
    """From eight devices to two, the params divided on both and the state on every device."""
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 CPU devices, see conftest.py")
    tx, batches = gn.grouped_newton(groups=gn.groups.per_tensor, refresh_every=4), make_batches(12, np.float64)
    specs = {"hidden": {"w": P(None, "data"), "b": P("data")}, "out": {"w": P("data"), "b": P()}}

    def on(number):
        """The shardings of params, state and batches on a mesh."""
        mesh = Mesh(np.array(jax.devices("cpu")[:number]), ("data",), axis_types=(AxisType.Auto,))
        place = functools.partial(NamedSharding, mesh)
        params = jax.tree.map(place, specs, is_leaf=lambda x: isinstance(x, P))
        state = jax.eval_shape(tx.init, make_params(np.float64))
        state = optax.tree.map_params(tx, lambda _, p: p, state, params, transform_non_params=lambda _: place(P()))
        return params, state, place(P(None, "data"))

    params, state, data = on(8)
    run = jax.jit(functools.partial(train, tx), out_shardings=(params, state))
    start = jax.device_put(make_params(np.float64), params)
    start = start, jax.device_put(tx.init(start), state)
    batches = jax.device_put(batches, data)
    midway = run(*start, part(batches, 0, 6))
    expected = run(*midway, part(batches, 6, 12))

    params, state, data = on(2)
    struct = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    restored = save_and_restore(tmp_path, midway, jax.tree.map(struct, midway, (params, state)))
    assert_equal(restored, midway)
    assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(restored))
    run = jax.jit(functools.partial(train, tx), out_shardings=(params, state))
    found = run(*restored, jax.device_put(part(jax.device_get(batches), 6, 12), data))
    assert_close(*map(jax.device_get, (found, expected)), rtol=1e7 * 2.0**-52, atol=1e5 * 2.0**-52)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_pickled_state_of_another_grouping_is_refused(name):
    make, params, (batch,) = CONFIGURATIONS[name], make_params(), [part(make_batches(1), 0, 1)]
    for groups, other in ((gn.groups.single, gn.groups.per_tensor), (gn.groups.per_tensor, gn.groups.single)):
        saved = pickle.dumps(jax.device_get(make(groups).init(params)))
        for run in (train, jax.jit(train, static_argnums=0)):
            with pytest.raises(ValueError, match=r"the state has [14] rates and the grouping makes [41] groups"):
                run(make(other), params, pickle.loads(saved), batch)
