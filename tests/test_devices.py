"""Many devices: sharded arrays under jit, shard_map and pmap with axis_name, what is sent, several processes."""

import functools
import itertools
import math
import pathlib
import re
import socket
import subprocess
import sys

import distributed_worker
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from checks import assert_close_by_largest
from interpreter import uncompiled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_newton as gn

pytestmark = pytest.mark.slow

EPS64 = 2.0**-52
# In jax 0.8.1 a psum under check_vma can't be batched, with or without this library.
BATCHES_TRACKED_PSUM = jax.__version_info__ >= (0, 12)


@pytest.fixture(autouse=True)
def enough_devices():
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 CPU devices, see conftest.py")


def mesh_of(shape, names, axis_type=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(axis_type,) * len(names))


# --- jit with sharded arrays ---------------------------------------------------------------------

# Two scanned blocks, with attention or without: b batch, t time, d width, h heads, k of a head, f of the hidden layer.
SHAPES = {
    "embedding": (24, 16),
    "blocks": {
        "gain1": (2, 16),
        "gain2": (2, 16),
        "wq": (2, 16, 8, 2),
        "wk": (2, 16, 8, 2),
        "wv": (2, 16, 8, 2),
        "wo": (2, 8, 2, 16),
        "w1": (2, 16, 32),
        "w2": (2, 32, 16),
    },
    "out": (16, 24),
}
DATA, MODEL = "data", "model"


def specs(data, model):
    """Shardings of the params: ``data`` divides the width, ``model`` the heads and the hidden layer."""
    column, row = P(None, data, model), P(None, model, data)
    heads, from_heads = P(None, data, model, None), P(None, model, None, data)
    blocks = {"gain1": P(), "gain2": P(), "wq": heads, "wk": heads, "wv": heads, "wo": from_heads}
    return {"embedding": P(None, data), "blocks": {**blocks, "w1": column, "w2": row}, "out": P(data, None)}


LAYOUTS = {
    "fully sharded": ((8,), (DATA,), specs(DATA, None)),
    "two axes": ((4, 2), (DATA, MODEL), specs(DATA, MODEL)),
}


def network_loss(params, tokens, labels, explicit_axes=()):
    """Mean NLL; with explicit axes it says where params are gathered and what a product over a divided axis becomes."""
    data, model = (name if name in explicit_axes else None for name in (DATA, MODEL))
    batch = P(data, None, None)
    whole = {"out_sharding": batch} if explicit_axes else {}
    gathered = specs(None, model)
    at_use = lambda w, spec: jax.sharding.reshard(w, spec) if explicit_axes else w
    without_blocks = lambda spec: P(*spec[1:])

    def norm(x, gain):
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain[None, None]

    def block(x, w):
        w = {name: at_use(v, without_blocks(gathered["blocks"][name])) for name, v in w.items()}
        if "wq" in w:
            h = norm(x, w["gain1"])
            q, k, v = (jnp.einsum("btd,dhk->bthk", h, w[name]) for name in ("wq", "wk", "wv"))
            weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
            x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), w["wo"], **whole)
        h = jax.nn.gelu(jnp.einsum("btd,df->btf", norm(x, w["gain2"]), w["w1"]))
        return x + jnp.einsum("btf,fd->btd", h, w["w2"], **whole), None

    one_hot = jax.nn.one_hot(tokens, SHAPES["embedding"][0], dtype=params["out"].dtype)
    x = jnp.einsum("btv,vd->btd", one_hot, at_use(params["embedding"], gathered["embedding"]), **whole)
    x, _ = lax.scan(block, x, params["blocks"])
    logits = jnp.einsum("btd,dv->btv", x, at_use(params["out"], gathered["out"]), **whole)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 24, dtype=x.dtype), -1))


def without_attention(tree):
    return {**tree, "blocks": {name: tree["blocks"][name] for name in ("gain2", "w1", "w2")}}


def network_problem(attends):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape) / np.sqrt(16) + (1.0 if shape == (2, 16) else 0.0)
    params = jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    tokens, labels = rng.integers(24, size=(2, 2, 16, 8))
    return params if attends else without_attention(params), tokens, labels


def train(params, tokens, labels, loss, steps=3):
    """Three steps of the optimizer, refreshed at the first and the third, the curvature on another batch."""
    tx = gn.grouped_newton(0.5, gn.groups.per_tensor, refresh_every=2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params, tokens[0], labels[0])
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, tokens[1], labels[1]))
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, tx.init(params)), length=steps)[0]


@functools.cache
def trained_on_one_device():
    return uncompiled(functools.partial(train, loss=network_loss))(*network_problem(attends=False))


def on_a_mesh(layout, axis_type, run, attends):
    """``run(params, tokens, labels, loss)`` with everything in its place."""
    shape, names, places = LAYOUTS[layout]
    mesh = mesh_of(shape, names, axis_type)
    params, tokens, labels = network_problem(attends)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    loss = functools.partial(network_loss, explicit_axes=names if axis_type is AxisType.Explicit else ())
    with jax.set_mesh(mesh):
        batch = P(None, DATA if DATA in names else None)
        params = jax.tree.map(put, params, places if attends else without_attention(places))
        return jax.jit(functools.partial(run, loss=loss))(params, put(tokens, batch), put(labels, batch))


@pytest.mark.parametrize(
    ("layout", "axis_type"),
    [("two axes", AxisType.Explicit), ("two axes", AxisType.Auto), ("fully sharded", AxisType.Explicit)],
)
def test_training_on_a_mesh_is_training_on_one_device(x64, layout, axis_type):
    params, state = on_a_mesh(layout, axis_type, train, attends=False)
    # Adam's direction divides by gradients; rounding there is amplified, and twice by a rate.
    assert_close_by_largest((params, state), trained_on_one_device(), 1e7 * EPS64)
    ours = next(s for s in state if isinstance(s, gn.GroupedNewtonState))
    for leaf in jax.tree.leaves(ours._replace(direction=None, origin=None)):
        assert leaf.sharding.is_fully_replicated
    for copy in (ours.direction, ours.origin):
        same = jax.tree.map(lambda x, p: x.sharding.is_equivalent_to(p.sharding, x.ndim), copy, params)
        assert all(jax.tree.leaves(same))
    assert ours.summary.hbar.shape == (len(jax.tree.leaves(params)),) * 2


def test_the_summary_with_attention_on_two_explicit_axes_is_that_of_one_device(x64):
    def summary(params, tokens, labels, loss):
        direction = jax.tree.map(jnp.cos, params)
        return gn.summarize(lambda p: loss(p, tokens[0], labels[0]), params, direction, order=2)

    expected = uncompiled(functools.partial(summary, loss=network_loss))(*network_problem(attends=True))
    assert_close_by_largest(on_a_mesh("two axes", AxisType.Explicit, summary, attends=True), expected, 1e4 * EPS64)


# --- shard_map and pmap with axis_name ------------------------------------------------------------


def synced_loss(params, x, y, mean=lambda v: v):
    """Statistics of the whole batch, an equation of every kind, and a term of parameters alone."""
    h = x @ params["a"] + params["b"][None]
    center, square = mean(jnp.mean(h, 0)), mean(jnp.mean(h**2, 0))
    h = jnp.tanh((h - center[None]) * lax.rsqrt(square - center**2 + 1e-3)[None])
    h, total = lax.scan(lambda h, w: (jnp.sin(h @ w), jnp.mean(h**2)), h, params["c"])
    out = h @ jnp.tanh(params["d"])
    return jnp.mean((out - y) ** 2) + jnp.sum(total) + jnp.sum(jnp.tanh(params["d"]) ** 4)


def local_problem():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2)
    params = lambda: {"a": draw(3, 4), "b": draw(4), "c": draw(2, 4, 4), "d": draw(4, 2)}
    return params(), params(), draw(16, 3), draw(16, 2)


def on_every_device(run, kind, axis, in_specs):
    """``run(params, direction, x, y)`` on 8 devices, the batch divided; its value on each must be the same."""
    if kind == "pmap":
        parts = lambda x: x.reshape(8, -1, *x.shape[1:])
        devices = jax.devices("cpu")[:8]
        mapped = jax.pmap(run, axis_name=axis, in_axes=(None, None, 0, 0), devices=devices)
        found = lambda p, u, x, y: mapped(p, u, parts(x), parts(y))
    else:
        mesh = mesh_of((8,), (axis,))
        each = lambda *args: jax.tree.map(lambda z: z[None], run(*args))
        mapped = jax.shard_map(each, mesh=mesh, in_specs=in_specs, out_specs=P(axis), check_vma=kind == "tracked")
        found = jax.jit(mapped)

    def call(*args):
        values = jax.device_get(found(*args))
        jax.tree.map(lambda z: np.testing.assert_array_equal(z, np.broadcast_to(z[:1], z.shape)), values)
        return jax.tree.map(lambda z: z[0], values)

    return call


DIVIDED = (P(), P(), P(DATA), P(DATA))


@functools.cache
def summary_of_the_whole_batch(log):
    """By the definition."""
    params, direction, x, y = local_problem()
    value_fn = lambda p: jnp.log(synced_loss(p, x, y)) if log else synced_loss(p, x, y)
    return uncompiled(lambda p, u: gn.summarize(value_fn, p, u, method="nested"))(params, direction)


@pytest.mark.parametrize(
    ("method", "kind", "averages_itself"),
    [
        ("sweep", "tracked", True),
        ("sweep", "untracked", False),
        ("sweep", "pmap", True),
        ("nested", "tracked", True),
    ],
)
def test_local_losses_give_the_summary_of_their_mean(x64, method, kind, averages_itself):
    """With check_vma, without, and in pmap; statistics are taken over all devices, the loss by the function or not."""
    if kind == "tracked" and method == "sweep" and not BATCHES_TRACKED_PSUM:
        pytest.skip("this version of jax has no batching rule for psum under check_vma")
    params, direction, x, y = local_problem()
    mean = lambda v: lax.pmean(v, DATA)

    def local(params, direction, x, y):
        if averages_itself:
            value_fn = lambda p: jnp.log(mean(synced_loss(p, x, y, mean)))
        else:
            value_fn = lambda p: synced_loss(p, x, y, mean)
        return gn.summarize(value_fn, params, direction, method=method, axis_name=DATA)

    expected = summary_of_the_whole_batch(averages_itself)
    assert_close_by_largest(on_every_device(local, kind, DATA, DIVIDED)(params, direction, x, y), expected, 1e4 * EPS64)


def test_gauss_newton_of_local_batches_is_that_of_the_whole(x64):
    params, direction, x, y = local_problem()

    def summary(params, direction, x, y, axis_name=None):
        model = lambda p: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["d"]
        loss = lambda outputs: jnp.mean((outputs - y) ** 4)
        params, direction = ({k: tree[k] for k in "abd"} for tree in (params, direction))
        return gn.gauss_newton_summary(model, loss, params, direction, axis_name=axis_name)

    expected = jax.jit(summary)(params, direction, x, y)
    for kind in ("tracked", "untracked", "pmap"):
        local = functools.partial(summary, axis_name=DATA)
        found = on_every_device(local, kind, DATA, DIVIDED)(params, direction, x, y)
        assert_close_by_largest(found, expected, 1e4 * EPS64)


def plain_loss(params, x, y):
    hidden = jnp.tanh(x @ params["a"] + params["b"][None])
    return jnp.mean((jnp.sin(hidden @ params["c"][0]) @ params["d"] - y) ** 2)


def test_a_step_with_convolutions_on_a_divided_batch_is_that_of_one_device(x64):
    """A refresh takes them in another layout, in which shardings are permuted too."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (8, 3, 6, 6))
    params = [jax.random.normal(keys[1], (4, 3, 3, 3)), jax.random.normal(keys[2], (2, 4, 3, 3))]

    def loss(params, x):
        for w in params:
            x = jnp.tanh(lax.conv(x, w, (1, 1), "SAME"))
        return jnp.mean(x**2)

    def step(params, x):
        tx = gn.scale_by_grouped_newton()
        value, grads = jax.value_and_grad(loss)(params, x)
        return tx.update(grads, tx.init(params), params, value=value, value_fn=lambda p: loss(p, x))

    expected = uncompiled(step)(params, x)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of((8,), (DATA,), axis_type)
        with jax.set_mesh(mesh):
            whole, divided = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((params, P()), (x, P(DATA))))
            assert_close_by_largest(jax.jit(step)(whole, divided), expected, 1e4 * EPS64)


def train_in_data_parallel(params, _, x, y, axis_name=None, averages_gradients=False):
    tx = gn.grouped_newton(1.0, gn.groups.per_module(max_groups=2), refresh_every=2, axis_name=axis_name)
    mean = lambda p: lax.pmean(plain_loss(p, x, y), axis_name) if axis_name else plain_loss(p, x, y)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(mean)(params)
        grads = lax.pmean(grads, axis_name) if averages_gradients else grads
        local = lambda p: plain_loss(p, x, y)
        updates, state = tx.update(grads, state, params, value_fn=local, value=local(params))
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, tx.init(params)), length=6)[0]


def test_training_on_local_batches_is_training_on_the_whole_batch(x64):
    params, _, x, y = local_problem()
    expected = uncompiled(train_in_data_parallel)(params, params, x, y)
    for kind in ("tracked", "untracked", "pmap"):
        # But for check_vma, the transpose of a sum over devices is a sum over devices.
        run = functools.partial(train_in_data_parallel, axis_name=DATA, averages_gradients=kind != "tracked")
        assert_close_by_largest(on_every_device(run, kind, DATA, DIVIDED)(params, params, x, y), expected, 1e7 * EPS64)


@pytest.mark.parametrize("check_vma", [False, True])
def test_parameters_divided_by_hand_give_the_summary_of_the_whole(x64, check_vma):
    """The batch and the rows of a parameter are divided over one axis, two tensors over another."""
    if check_vma and not BATCHES_TRACKED_PSUM:
        pytest.skip("this version of jax has no batching rule for psum under check_vma")
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2)
    make = lambda: {"in": draw(4, 3), "gain": draw(3), "up": draw(3, 6), "down": draw(6, 2)}
    params, direction, x, y = make(), make(), draw(8, 4), draw(8, 2)
    places = {"in": P(DATA), "gain": P(), "up": P(None, MODEL), "down": P(MODEL)}

    def loss(params, x, y, gather=lambda w: w, add=lambda v: v):
        h = jnp.tanh(x @ gather(jnp.sin(params["in"]))) * jnp.exp(params["gain"])[None]
        return jnp.mean((add(jnp.tanh(h @ params["up"]) @ params["down"]) - y) ** 2)

    def local(params, direction, x, y):
        gather = lambda w: lax.all_gather(w, DATA, tiled=True)
        add = lambda v: lax.psum(v, MODEL)
        return gn.summarize(lambda p: loss(p, x, y, gather, add), params, direction, axis_name=(DATA, MODEL))

    expected = uncompiled(lambda p, u: gn.summarize(lambda q: loss(q, x, y), p, u))(params, direction)
    mesh = mesh_of((4, 2), (DATA, MODEL))
    args = (places, places, P(DATA), P(DATA))
    # The summary is the same everywhere, which is what the empty specification asserts under check_vma.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=args, out_specs=P(), check_vma=check_vma)
    assert_close_by_largest(jax.jit(mapped)(params, direction, x, y), expected, 1e3 * EPS64)


def test_a_bad_number_of_the_direction_stops_its_own_step_alone():
    mesh = mesh_of((8,), (DATA,))
    tx = gn.scale_by_grouped_newton(axis_name=DATA)
    loss = lambda p: lax.psum(jnp.sum((p - 1.0) ** 2), DATA)

    def two_steps(params, first, second):
        updates, state = tx.update(first, tx.init(params), params, value_fn=loss)
        return updates, tx.update(second, state, params, value_fn=loss)[0]

    run = jax.jit(jax.shard_map(two_steps, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False))
    direction = -2 * jnp.ones(8)
    first, second = run(jnp.zeros(8), direction, direction.at[3].set(jnp.nan))
    np.testing.assert_array_equal(first, -1.0)
    np.testing.assert_array_equal(second, jnp.full(8, -1.0).at[3].set(0))


@pytest.mark.parametrize("axis_name", ["nowhere", (DATA, "nowhere")])
def test_an_axis_name_without_an_axis_is_refused(axis_name):
    params = {"p": jnp.ones(3)}
    square = lambda p: jnp.sum(p["p"] ** 2)
    with pytest.raises(ValueError, match=r"axis_name '(data|nowhere)' is no axis of a shard_map or pmap around"):
        gn.summarize(square, params, params, axis_name=axis_name)
    tx = gn.grouped_newton(axis_name=axis_name)
    with pytest.raises(ValueError, match="leave axis_name out under jit"):
        tx.update(params, tx.init(params), params, value_fn=square)


# --- what is sent between devices -----------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    r"|collective-broadcast|ragged-all-to-all)(-start)?\("
)


def collectives(compiled):
    """(kind, numbers in it) of every collective in a compiled program."""
    size = lambda result: sum(math.prod(map(int, dims.split(","))) if dims else 1 for dims in _dims(result))
    return [(m["kind"], size(m["result"])) for m in map(COLLECTIVE.search, compiled.as_text().splitlines()) if m]


def _dims(result):
    return re.findall(r"[a-z]\w*\[([\d,]*)\]", result)


WIDTHS = (32, 64, 64, 8)
P_SIZE = sum(m * n + n for m, n in itertools.pairwise(WIDTHS))
S = 2 * (len(WIDTHS) - 1)
SUMMARY_SIZE = (S + 1) ** 2


def data_parallel_problem():
    rng = np.random.default_rng(3)
    params, direction = models.dense_params(WIDTHS, seed=0), models.dense_params(WIDTHS, seed=1)
    float32 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    return float32((params, direction, rng.standard_normal((16, WIDTHS[0])), rng.standard_normal((16, WIDTHS[-1]))))


def dense_loss(params, x, y):
    return jnp.mean((models.apply_dense(params, x) - y) ** 2)


def in_half(params, x, y):
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    return jnp.mean((models.apply_dense(*half).astype(jnp.float32) - y) ** 2)


def compiled_in_data_parallel(fn):
    mesh = mesh_of((8,), (DATA,))
    params, direction, x, y = data_parallel_problem()
    put = lambda tree, spec: jax.tree.map(lambda v: jax.device_put(v, NamedSharding(mesh, spec)), tree)
    args = put(params, P()), put(direction, P()), put(x, P(DATA)), put(y, P(DATA))
    return jax.jit(fn).lower(*args).compile()


def summary_of(loss, **options):
    return lambda p, u, x, y: gn.summarize(lambda q: loss(q, x, y), p, u, **options)


def test_a_refresh_in_data_parallel_sends_no_parameters():
    """The gradient shows that the program is read rightly, and so does the nested method, which sends gradients."""
    gradient = collectives(compiled_in_data_parallel(lambda p, u, x, y: jax.value_and_grad(dense_loss)(p, x, y)))
    assert {kind for kind, _ in gradient} == {"all-reduce"}
    assert sum(size for _, size in gradient) == P_SIZE + 1
    nested = collectives(compiled_in_data_parallel(summary_of(dense_loss, method="nested")))
    assert sum(size for _, size in nested) > P_SIZE

    sweep = collectives(compiled_in_data_parallel(summary_of(dense_loss)))
    print(f"P = {P_SIZE}, S = {S}: gradient {gradient}, sweep {sweep}, nested {len(nested)}")
    # The terms of a few layers and the slopes, however they are put together.
    assert {kind for kind, _ in sweep} == {"all-reduce"}
    assert len(sweep) <= 2 * len(WIDTHS)
    assert sum(size for _, size in sweep) <= 3 * SUMMARY_SIZE


@pytest.mark.parametrize(
    ("loss", "check_vma"), [(dense_loss, False), (in_half, True)], ids=["float32", "bfloat16, check_vma"]
)
def test_a_refresh_with_an_axis_name_is_one_all_reduce_of_the_summary(loss, check_vma):
    def sharded(*args):
        local = summary_of(loss, axis_name=DATA)
        mesh = mesh_of((8,), (DATA,))
        return jax.shard_map(local, mesh=mesh, in_specs=DIVIDED, out_specs=P(), check_vma=check_vma)(*args)

    assert collectives(compiled_in_data_parallel(sharded)) == [("all-reduce", SUMMARY_SIZE)]


# --- processes ------------------------------------------------------------------------------------

WORKER = pathlib.Path(__file__).parent / "distributed_worker.py"


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_train_to_the_numbers_of_one(x64):
    def start(*args):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, str(WORKER), *map(str, args)], **pipes)

    port = free_port()
    workers = [start(port, rank) for rank in range(distributed_worker.PROCESSES)]
    try:
        expected = distributed_worker.numbers(mesh_of((distributed_worker.PROCESSES,), (DATA,)))
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any("NO CPU COLLECTIVES" in output for output in outputs):
        pytest.skip("this jaxlib has no collectives between processes on the CPU")
    found = []
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        (line,) = (line for line in output.splitlines() if line.startswith("RESULT"))
        found.append(np.array([float.fromhex(word) for word in line.split()[1:]]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], expected, 1e6 * EPS64)
