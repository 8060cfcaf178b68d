"""Layers kept stacked: the numbers of the model that has them in a list."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, assert_same_summary
from flax import linen, nnx
from interpreter import uncompiled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_newton as gn
from grouped_newton import groups
from grouped_newton.derivatives import layered
from grouped_newton.derivatives.jaxprs import equations

L, D = 3, 4
EPS = 2.0**-52


def normal(seed, *shape):
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape))


def params_of(seed):
    k = iter(range(10 * seed, 10 * seed + 10))
    blocks = {"w": normal(next(k), L, D, D), "b": normal(next(k), L, D)}
    return {"blocks": blocks, "embed": {"w": normal(next(k), 2, D)}, "head": {"w": normal(next(k), D, 2)}}


def layers_of(stack, axis=0):
    """The layers in a list."""
    leaves, treedef = jax.tree.flatten(stack)
    slices = ([lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])] for x in leaves)
    return [treedef.unflatten(own) for own in zip(*slices, strict=True)]


def unstacked(params):
    return {**params, "blocks": layers_of(params["blocks"])}


def layer(x, own):
    return x + jnp.tanh(x @ own["w"] + own["b"][None])


def loss_through(blocks_of):
    """A loss of params whose blocks are applied by a function of the first values and the blocks."""

    def loss(params):
        x, y = normal(90, 5, 2), normal(91, 5, 2)
        x = blocks_of(jnp.tanh(x @ params["embed"]["w"]), params["blocks"])
        return jnp.mean((x @ params["head"]["w"] - y) ** 2)

    return loss


def scanned(x, blocks, step=layer, **options):
    return lax.scan(lambda x, own: (step(x, own), None), x, blocks, **options)[0]


def looped(x, layers):
    return functools.reduce(layer, layers, x)


def twice(x, blocks):
    # Upwards and downwards, and from the scales' own: every group is there before its step.
    return scanned(scanned(x, blocks), blocks, jax.checkpoint(layer), reverse=True)


def outputs_and_penalty(x, blocks):
    def step(x, own):
        return layer(x, own), x * own["b"][None] + own["w"][:1]

    between = lax.scan(step, x, blocks)[1]
    downwards = jax.tree.map(lambda x: x[::-1], blocks)
    last = jax.tree.map(lambda x: x.T[..., -1].T, blocks)
    x = x * jnp.tanh(blocks["b"][1:2])
    return jnp.sum(between, 0) + scanned(x, downwards) + layer(x, last) + jnp.sum(blocks["w"] ** 2)


def outputs_and_penalty_looped(x, layers):
    between = sum(looped(x, layers[:i]) * own["b"][None] + own["w"][:1] for i, own in enumerate(layers))
    penalty = sum(jnp.sum(own["w"] ** 2) for own in layers)
    x = x * jnp.tanh(layers[1]["b"])[None]
    return between + looped(x, layers[::-1]) + layer(x, layers[-1]) + penalty


def kept_apart(x, blocks):
    """Weights divided by their norms before the scan, biases by a product within the layer, and a penalty."""
    norms = jnp.sqrt(jnp.sum(blocks["w"] ** 2, (1, 2)) + 1)
    biases = blocks["b"] + jax.vmap(lambda w, b: jnp.tanh(w @ b))(blocks["w"], blocks["b"])
    x = scanned(x, {"w": blocks["w"] / norms[:, None, None], "b": biases})
    met = jnp.sum(jnp.sum(blocks["b"] ** 2 * blocks["w"][:, 0], 0) ** 2)
    return x + jnp.sum(jnp.tanh(blocks["w"]) ** 2) + jnp.mean(jnp.log1p(norms**2)) + met


def kept_apart_looped(x, layers):
    norms = [jnp.sqrt(jnp.sum(own["w"] ** 2) + 1) for own in layers]
    biases = [own["b"] + jnp.tanh(own["w"] @ own["b"]) for own in layers]
    pairs = zip(layers, norms, biases, strict=True)
    x = looped(x, [{"w": own["w"] / norm, "b": b} for own, norm, b in pairs])
    met = jnp.sum(sum(own["b"] ** 2 * own["w"][0] for own in layers) ** 2)
    penalty = sum(jnp.sum(jnp.tanh(own["w"]) ** 2) for own in layers)
    return x + penalty + sum(jnp.log1p(norm**2) for norm in norms) / L + met


MODELS = {
    "scan": (scanned, looped),
    "twice": (twice, lambda x, layers: looped(looped(x, layers), layers[::-1])),
    "outputs and penalty": (outputs_and_penalty, outputs_and_penalty_looped),
    "kept apart": (kept_apart, kept_apart_looped),
}


def summary_in_order(of_list, params, direction, names, grouping=groups.per_module):
    """The summary of a model with its layers in a list, the groups in the order of these names."""
    listed = groups.names(grouping, params)
    order = np.array([listed.index(name) for name in names])
    loss, gbar, hbar, third = gn.summarize(of_list, params, direction, grouping)
    return gn.Summary(loss, gbar[order], hbar[order][:, order], third[order])


@pytest.mark.parametrize("model", MODELS)
def test_a_summary_is_that_of_the_layers_in_a_list(x64, model):
    of_stack, of_list = map(loss_through, MODELS[model])
    grouping = groups.stacked("^blocks")
    params, u = params_of(1), params_of(2)
    options = {"scan": [{}, {"method": "nested"}, {"max_stack": 2}], "outputs and penalty": [{}, {"max_stack": 2}]}
    options["kept apart"] = [{}, {"max_stack": 2}]

    @uncompiled
    def all_of(params, u):
        expected = summary_in_order(of_list, unstacked(params), unstacked(u), groups.names(grouping, params))
        return expected, [gn.summarize(of_stack, params, u, grouping, **o) for o in options.get(model, [{}])]

    expected, found = all_of(params, u)
    for summary in found:
        assert_same_summary(summary, expected, 32 * EPS)


def test_other_derivatives_are_those_of_the_layers_in_a_list(x64):
    grouping = groups.stacked("^blocks", others=groups.by_path({"embed": groups.FROZEN, "": "head"}))
    params, u = params_of(1), params_of(2)
    of_stack, of_list = map(loss_through, MODELS["scan"])
    error = lambda z: jnp.mean(jnp.cos(z))

    def outputs(blocks_of):
        return lambda p: blocks_of(normal(90, 5, 2) @ p["embed"]["w"], p["blocks"]) @ p["head"]["w"]

    @uncompiled
    def all_of(params, u):
        listed, u_listed = unstacked(params), unstacked(u)
        labels = {"blocks": [f"blocks/{i}" for i in range(L)], "embed": groups.FROZEN, "head": "head"}
        gauss_newton = [
            gn.gauss_newton_summary(outputs(scanned), error, params, u, grouping),
            gn.gauss_newton_summary(outputs(looped), error, listed, u_listed, labels),
        ]
        whole = gn.summarize(of_list, listed, u_listed, labels)
        return gauss_newton, whole, gn.derivative_tensors(of_stack, params, u, grouping)

    (stacked, listed), whole, (first, second, third) = all_of(params, u)
    assert_same_summary(stacked, listed, 64 * EPS)
    found = whole._replace(gbar=first, hbar=second, third=jnp.einsum("sss->s", third))
    assert_same_summary(found, whole, 64 * EPS)


def test_layers_may_share_a_group(x64):
    # per_module merges neighbours: a group that has come in with one layer has tangents before the next.
    of_stack = lambda blocks: jnp.mean(scanned(normal(90, 5, D), blocks) ** 2)
    of_list = lambda layers: jnp.mean(looped(normal(90, 5, D), layers) ** 2)
    stack = lambda seed: {"w": normal(seed, 4, D, D), "b": normal(seed + 1, 4, D)}
    grouping = groups.per_module(2)
    assert groups.names(grouping, stack(1)) == groups.names(grouping, layers_of(stack(1))) == ("0..1", "2..3")
    both = uncompiled(
        lambda p, u: (
            gn.summarize(of_stack, p, u, grouping),
            gn.summarize(of_list, layers_of(p), layers_of(u), grouping),
        )
    )
    assert_same_summary(*both(stack(1), stack(3)), 32 * EPS)


def test_weights_and_biases_of_layers_may_be_groups_apart(x64):
    # Two groups in every step of the scan.
    of_stack, of_list = map(loss_through, MODELS["scan"])
    grouping = groups.stacked("blocks/w", others=groups.stacked("blocks/b"))
    params, u = params_of(1), params_of(2)
    names = groups.names(grouping, params)
    assert names == (
        "blocks/b/0",
        "blocks/b/1",
        "blocks/b/2",
        "blocks/w/0",
        "blocks/w/1",
        "blocks/w/2",
        "embed",
        "head",
    )
    in_list = [f"blocks/{i}/{k}" for k in "bw" for i in range(L)] + ["embed/w", "head/w"]

    @uncompiled
    def both(params, u):
        expected = summary_in_order(of_list, unstacked(params), unstacked(u), in_list, groups.per_tensor)
        return gn.summarize(of_stack, params, u, grouping), expected

    assert_same_summary(*both(params, u), 32 * EPS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_costs_one_tangent_of_its_weights(dtype):
    # Cast, transposed and taken out, up to the scan: nowhere is there an array of L layers for each of L groups.
    def step(x, own):
        return x + jnp.tanh(x @ own["w"].astype(dtype) + own["b"].astype(dtype)[None])

    def loss(blocks):
        blocks = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), -1, 0), blocks)
        penalty = sum(jnp.sum(jnp.tanh(x.astype(jnp.float32)) ** 2) for x in blocks.values())
        norms = jnp.sqrt(1 + jnp.sum(blocks["b"] * jnp.einsum("lij,lj->li", blocks["w"], blocks["b"]), -1))
        blocks["w"] = blocks["w"] * (1 / norms)[:, None, None]
        x = scanned(jnp.ones((1, 5), dtype), jax.tree.map(lambda x: x[1:], blocks), step)
        return penalty + jnp.mean(step(x, jax.tree.map(lambda x: x[0], blocks)).astype(jnp.float32) ** 2)

    params = {"w": jnp.ones((5, 5, 7)), "b": jnp.ones((5, 7))}
    grouping = groups.stacked("", axis=-1)
    closed = jax.make_jaxpr(lambda p: gn.summarize(loss, p, p, grouping))(params)
    sizes = [v.aval.size for eqn in equations(closed.jaxpr) for v in (*eqn.invars, *eqn.outvars)]
    assert max(sizes) == params["w"].size


# A scan in pieces


def sides(n, reverse=False):
    """The same loss of n layers of two numbers, by a scan with other xs and outputs, and by a loop."""
    given = normal(92, n, 2)

    def step(x, own):
        w, c = own
        return x * (1 + c) + jnp.tanh(x * w), c * x + w**2

    def of_stack(w):
        x, ys = lax.scan(jax.checkpoint(step), jnp.ones(2), (w, given), reverse=reverse)
        return jnp.sum(jnp.sin(x)) + jnp.sum(given * ys**2)

    def of_list(layers):
        x, total = jnp.ones(2), 0.0
        for k in reversed(range(n)) if reverse else range(n):
            x, y = step(x, (layers[k], given[k]))
            total += jnp.sum(given[k] * y**2)
        return jnp.sum(jnp.sin(x)) + total

    return of_stack, of_list


@pytest.mark.parametrize(
    ("n", "reverse", "max_stack"), [(1, False, None), (2, True, None), (5, False, None), (8, False, 4), (9, True, None)]
)
def test_a_scan_in_pieces_is_the_loop(x64, monkeypatch, n, reverse, max_stack):
    # Eight groups in pairs of pairs: there are pieces without a group of the pass, before those with one and after.
    monkeypatch.setattr(layered, "_WORTH", 1)
    of_stack, of_list = sides(n, reverse)
    grouping = groups.stacked("")

    @jax.jit
    def both(w, u):
        listed = gn.summarize(of_list, list(w), list(u), groups.per_tensor)
        return gn.summarize(of_stack, w, u, grouping, max_stack=max_stack), listed

    assert_same_summary(*both(normal(1, n, 2), normal(2, n, 2)), 32 * EPS)


def test_no_piece_of_a_scan_carries_what_comes_in_after_it():
    def carried(batch, n=9):
        params = {"w": jnp.ones((n, 64, 64)), "b": jnp.ones((n, 64))}
        loss = lambda p: jnp.sum(scanned(jnp.ones((batch, 64)), p))
        closed = jax.make_jaxpr(lambda p: gn.summarize(loss, p, p, groups.stacked("")))(params)
        scans = [eqn for eqn in equations(closed.jaxpr) if eqn.primitive.name == "scan"]
        rows = lambda eqn: max(v.aval.shape[0] for v in eqn.outvars if v.aval.shape[1:] == (batch, 64))
        return [(eqn.params["length"], rows(eqn)) for eqn in scans[2:]]

    assert carried(8) == [(9, 9)]
    assert carried(512) == [(4, 4), (5, 9)]
    assert carried(1024) == [(2, 2), (2, 4), (2, 6), (3, 9)]


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.01, 0.01),))  # not linear in the cotangent


@pytest.mark.parametrize(
    ("between", "eps"),
    [(clipped, 2.0**-23), (lambda x: x.astype(jnp.bfloat16).astype(x.dtype), 2.0**-8)],
    ids=["rule", "half"],
)
def test_slopes_are_those_of_the_gradient_where_that_is_no_tangent(between, eps):
    step = lambda x, own: between(layer(x, own))
    loss = loss_through(lambda x, blocks: between(scanned(x, blocks, step)))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params_of(1))

    @uncompiled
    def both(params):
        gradient = jax.grad(loss)(params)
        found = gn.summarize(loss, params, params, groups.stacked("^blocks"), order=2).gbar
        products = jax.tree.map(lambda g, u: jnp.sum(g * u, axis=range(1, g.ndim)), gradient, params)
        return found[:L], products["blocks"]["w"] + products["blocks"]["b"]

    found, expected = both(params)
    np.testing.assert_allclose(found, expected, atol=4 * eps * np.max(np.abs(expected)), rtol=0)


def test_a_summary_on_a_mesh_is_that_on_one_device(x64):
    # The width of the layers and the batch are divided, and the mesh is a part of the types.
    mesh = jax.make_mesh((2, 2), ("data", "width"), axis_types=(AxisType.Explicit,) * 2)
    on_mesh = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def loss(blocks, x, matmul, whole):
        x = lax.scan(lambda x, own: (x + whole(jnp.tanh(matmul(x, own["w"]) + own["b"][None])), None), x, blocks)[0]
        return jnp.mean(x**2) + jnp.mean(jnp.tanh(blocks["w"]) ** 2)

    def summary(blocks, x, matmul=jnp.matmul, whole=lambda x: x):
        return gn.summarize(lambda p: loss(p, x, matmul, whole), blocks, blocks, groups.stacked(""))

    blocks, x = params_of(1)["blocks"], normal(90, 6, D)
    expected = uncompiled(summary)(blocks, x)
    with jax.set_mesh(mesh):
        matmul = functools.partial(jnp.matmul, out_sharding=P("data", "width"))
        divided = {"w": on_mesh(blocks["w"], None, None, "width"), "b": on_mesh(blocks["b"], None, "width")}
        whole = lambda x: jax.sharding.reshard(x, P("data", None))
        found = jax.jit(functools.partial(summary, matmul=matmul, whole=whole))(divided, on_mesh(x, "data", None))
    assert_same_summary(found, expected, 64 * EPS)


# Flax


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + jnp.tanh(linen.Dense(D, param_dtype=x.dtype)(x)), None


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        stack = linen.scan(LinenLayer, variable_axes={"params": 1}, split_rngs={"params": True}, length=L)
        return linen.Dense(2, param_dtype=x.dtype)(stack()(x)[0])


class NNXLayer(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(D, D, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(NNXLayer, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(L))
        self.out = nnx.Linear(D, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        through = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.out(through(x, self.layers))


def linen_model():
    model = LinenNet()
    params = model.init(jax.random.key(0), jnp.ones((1, D)))
    return params, model.apply, lambda p: p["params"]["ScanLinenLayer_0"], 1


def nnx_model():
    graph, params = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param)
    return params, lambda p, x: nnx.merge(graph, p)(x), lambda p: p["layers"], 0


@pytest.mark.parametrize("model", [linen_model, nnx_model])
def test_a_summary_of_a_flax_scan_is_that_of_its_layers_in_a_list(x64, model):
    params, apply, stack_of, axis = model()
    x, y = normal(90, 5, D), normal(91, 5, 2)
    u = jax.tree.map(lambda p: p + 0.1, params)
    pattern = "layers|Scan"
    grouping = groups.stacked(pattern, axis=axis)
    names = groups.names(grouping, params)
    own = [name for name in names if name[-1] in "012" and re.search(pattern, name)]
    (other,) = set(names).difference(own)
    assert len(own) == L

    def loss(params):
        return jnp.mean((apply(params, x) - y) ** 2)

    def of_list(params):
        layers, rest = params
        stack = iter(jax.tree.leaves(jax.tree.map(lambda *xs: jnp.stack(xs, axis), *layers)))
        leaves, treedef = jax.tree.flatten(rest)
        paths = groups.path_names(rest)
        whole = [next(stack) if re.search(pattern, path) else x for path, x in zip(paths, leaves, strict=True)]
        return loss(treedef.unflatten(whole))

    listed = lambda tree: (layers_of(stack_of(tree), axis), tree)
    labels = own, groups.by_path({pattern: groups.FROZEN, "": other})(params)

    @uncompiled
    def both(params, u):
        expected = summary_in_order(of_list, listed(params), listed(u), names, labels)
        return gn.summarize(loss, params, u, grouping), expected

    assert_same_summary(*both(params, u), 32 * EPS)


# Updates


def test_updates_are_those_of_the_layers_in_a_list(x64):
    of_stack, of_list = map(loss_through, MODELS["scan"])

    def trained(loss, params, grouping):
        tx = gn.grouped_newton(groups=grouping, internal_damping=1.0, averaging=None)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = lax.scan(step, (params, tx.init(params)), None, 6)
        return params, optax.tree.get(state, "eta"), values

    frozen = lambda others: lambda params: {**others(params), "embed": groups.FROZEN}
    whole, in_list = frozen(groups.stacked("^blocks")), frozen(groups.per_module)
    start = params_of(1)
    names, listed = groups.names(whole, start), groups.names(in_list, unstacked(start))
    assert set(names) == set(listed) == {"blocks/0", "blocks/1", "blocks/2", "head"}

    @uncompiled
    def both(params):
        return trained(of_stack, params, whole), trained(of_list, unstacked(params), in_list)

    (params, eta, values), (params_in_list, eta_in_list, values_in_list) = both(start)
    assert values[-1] < values[0]
    assert_close(values, values_in_list, 1e-9)
    assert_close(eta, eta_in_list[np.array([listed.index(name) for name in names])], 1e-9)
    assert_close(unstacked(params), params_in_list, 1e-9)
    np.testing.assert_array_equal(params["embed"]["w"], start["embed"]["w"])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_layer_is_scaled_by_its_own_factor(axis):
    along = lambda shape: jnp.moveaxis(jnp.ones((3, *shape)), 0, axis)
    params = {"w": along((4, 5)), "b": along((4,)), "other": jnp.ones(2)}
    partition = groups.resolve(groups.stacked("^.$", axis=axis), params)
    assert partition.names == ("^.$/0", "^.$/1", "^.$/2", "root")
    factors = jnp.array([1.0, 2.0, 3.0, 7.0])
    scaled = partition.scale(factors, params)
    for name in "wb":
        layers = jnp.moveaxis(scaled[name], axis, 0).reshape(3, -1)
        np.testing.assert_array_equal(layers, jnp.broadcast_to(factors[:3, None], layers.shape))
    np.testing.assert_array_equal(scaled["other"], [7, 7])
    np.testing.assert_array_equal(partition.totals(jax.tree.leaves(scaled), jnp.float32), [24, 48, 72, 14])
    np.testing.assert_array_equal(partition.sizes(jax.tree.leaves(params)), [24, 24, 24, 2])
    assert [partition.members(g) for g in range(4)] == [(0, 2)] * 3 + [(1,)]


# Which layers, which names


def test_the_other_leaves_are_grouped_alone():
    params = params_of(1)
    assert groups.names(groups.stacked("^blocks"), params) == ("blocks/0", "blocks/1", "blocks/2", "embed", "head")
    assert groups.names(groups.stacked("^blocks", others=groups.single), params)[3:] == ("all",)
    assert groups.names(groups.stacked("^blocks", others="rest"), params)[3:] == ("rest",)
    frozen = groups.stacked("^blocks", others=groups.by_path({"embed": groups.FROZEN, "": "head"}))
    assert groups.resolve(frozen, params).index == (0, 0, -1, 3)
    # max_groups counts the others alone.
    assert groups.names(groups.stacked("^blocks", others=groups.per_module(1)), params)[3:] == ("embed..head",)
    abstract = jax.eval_shape(lambda: params)
    assert groups.resolve(frozen, abstract) == groups.resolve(frozen, params)
    labels = groups.stacked("^blocks")(params)
    assert groups.resolve(labels, params) == groups.resolve(groups.stacked("^blocks"), params)


def test_per_module_takes_stacked_layers_for_those_of_a_list():
    for n in (2, 4, 5, 9, 16):
        by_module = groups.per_module(n)
        assert groups.names(by_module, params_of(1)) == groups.names(by_module, unstacked(params_of(1)))


def block(lead):
    ones = lambda *shape: jnp.ones((*lead, *shape))
    return {"attention": {"w": ones(4, 3, 2), "b": ones(3, 2)}, "norm": {"scale": ones(4)}, "out": {"w": ones(6, 4)}}


def test_per_module_takes_a_scan_over_blocks_for_those_of_a_list():
    params = {"params": {"blocks": block((12,)), "embed": {"w": jnp.ones((9, 4))}}}
    names = {f"params/blocks/{i}" for i in range(12)} | {"params/embed"}
    assert set(groups.names(groups.per_module, params)) == names
    merged = ("a/0..a/2", "a/3..a/5", "a/6..a/8", "a/9..a/11")
    assert groups.names(groups.per_module(4), {"a": block((12,))}) == merged


@pytest.mark.parametrize(
    "params",
    [
        block(()),
        {"w": jnp.ones((4, 4)), "b": jnp.ones(4)},
        {"a": {"w": jnp.ones((4, 4))}, "b": {"w": jnp.ones((4, 2))}},
        {"a": {"w": jnp.ones((3, 3, 4, 4))}, "b": {"w": jnp.ones((3, 3, 4, 8))}},
        {"w": jnp.ones((1, 4, 4)), "b": jnp.ones((1, 4))},
        {"query": jnp.ones((4, 3, 2)), "bias": jnp.ones((3, 2))},
    ],
    ids=["block", "layer", "no biases", "convolutions", "one layer", "attention"],
)
def test_per_module_sees_no_stack_in_arrays_of_one_layer(params):
    assert not any(groups.resolve(groups.per_module, params).layers)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: groups.stacked(["a"]), TypeError, r"pattern must be a string, got \['a'\]"),
        (lambda: groups.stacked("a", axis=None), TypeError, "axis must be an integer, got None"),
        (lambda: groups.stacked("("), ValueError, "is not a regular expression"),
        (
            lambda: groups.stacked("layers"),
            ValueError,
            "'layers' .* is found in no path; there are parameters",
        ),
        (
            lambda: groups.stacked("w"),
            ValueError,
            "one length .* got 3 of blocks/w, 2 of embed/w, 4 of head/w",
        ),
        (lambda: groups.stacked("blocks", axis=2), ValueError, r"blocks/b has shape \(3, 4\), without axis 2"),
        (lambda: groups.stacked("blocks", axis=-3), ValueError, r"blocks/b has shape \(3, 4\), without axis -3"),
        (lambda: groups.stacked("scalar"), ValueError, r"scalar has shape \(\), without axis 0"),
        (lambda: groups.stacked("empty"), ValueError, "one length of at least 1 along axis 0, got 0 of empty"),
        (lambda: groups.stacked("^blocks", others={"embed": "x"}), ValueError, "no label for parameter empty"),
    ],
)
def test_what_has_no_layers_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        groups.resolve(make(), params_of(1) | {"scalar": jnp.ones(()), "empty": jnp.ones((0, 2))})


def test_labels_for_other_layers_are_refused():
    labels = groups.stacked("w")({"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"parameter w are for 3 layers along axis 0, and it has shape \(4, 2\)"):
        groups.resolve(labels, {"w": jnp.ones((4, 2))})
