import dataclasses
import enum
import functools
import itertools
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from grouped_newton import groups
from grouped_newton.groups import FROZEN, by_depth, by_path, per_module, per_tensor, resolve, single, weights_and_biases


class Pair(NamedTuple):
    first: Any
    second: Any


class Attention(NamedTuple):
    key: Any
    query: Any
    value: Any


def register(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))


@register
class Layer:
    weight: Any
    bias: Any


@register
class Net:
    """A model whose instances are callable, as Equinox modules are."""

    layers: list
    scale: Any

    def __call__(self, x):
        return x * self.scale


@register
class Wrapper:
    value: Any


@register
class WrapperAndName:
    value: Any
    other: Any


class Kind(enum.Enum):
    FAST = enum.auto()
    SLOW = enum.auto()


A = jnp.ones(2)


def layer():
    return {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}


def dense(count, name="Dense_{}"):
    return {name.format(i): layer() for i in range(count)}


def net():
    return Net([Layer(jnp.ones((2, 2)), A), Layer(jnp.ones((2, 2)), None)], jnp.ones(()))


def by_label(grouping, params):
    """The paths of each group."""
    p = resolve(grouping, params)
    return {name: {p.paths[i] for i in p.members(g)} for g, name in enumerate(p.names)}


def modules(grouping, params):
    """The module paths of each group."""
    return {name: {path.rpartition("/")[0] for path in paths} for name, paths in by_label(grouping, params).items()}


# Numbers and names


def test_groups_are_numbered_by_their_first_leaf():
    params = {"b": A, "a": A, "d": A, "c": A}
    partition = resolve({"a": "z", "b": "y", "c": "z", "d": "x"}, params)
    assert partition.index == (0, 1, 0, 2)
    assert partition.names == ("z", "y", "x")
    assert partition.paths == ("a", "b", "c", "d")
    assert [partition.members(g) for g in range(3)] == [(0, 2), (1,), (3,)]


def test_numbers_follow_leaf_order_where_natural_order_differs():
    params = dense(11)
    assert groups.names(per_module, params)[:4] == ("Dense_0", "Dense_1", "Dense_10", "Dense_2")
    assert groups.names(by_depth(11), params)[:3] == ("block 0", "block 1", "block 10")


@pytest.mark.parametrize(
    "labels",
    ["one", 7, Kind.FAST, frozenset({1}), 2.5, b"bytes", np.str_("one")],
    ids=lambda label: type(label).__name__,
)
def test_any_hashable_label_will_do(labels):
    assert resolve(labels, dense(3)).index == (0,) * 6
    assert groups.names(labels, dense(3)) == (str(labels),)


def test_equal_labels_of_different_types_are_distinguished_as_a_dict_does():
    partition = resolve({"a": 1, "b": "1", "c": 1.0, "d": True}, dict.fromkeys("abcd", A))
    assert partition.index == (0, 1, 0, 0)
    assert len(set(partition.names)) == 2


@pytest.mark.parametrize("grouping", [per_tensor, per_module, by_depth(2)])
def test_every_group_has_a_name_of_its_own(grouping):
    params = {"a/b": {"w": A}, "a": {"b": {"w": A}}}
    assert resolve(grouping, params).index == (0, 1)
    assert len(set(groups.names(grouping, params))) == 2


def test_empty_groups_do_not_exist():
    params = {"kernel": A, "w": A}
    assert groups.names(weights_and_biases, params) == ("weights",)
    assert groups.names(by_path(["bias", "kernel|w", "scale"]), params) == ("kernel|w",)
    assert resolve(by_depth(9), params).num_groups == 2


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}, (), {"a": {}}])
@pytest.mark.parametrize("grouping", [per_tensor, per_module, single, by_path(["a"]), by_depth(3), weights_and_biases])
def test_a_tree_without_leaves_has_no_groups(grouping, params):
    assert resolve(grouping, params) == groups.Partition((), (), ())


GROUPINGS = {
    "per_tensor": per_tensor,
    "per_module": per_module,
    "per_module(2)": per_module(max_groups=2),
    "single": single,
    "weights_and_biases": weights_and_biases,
    "by_path": by_path(["0", "bias$"]),
    "by_path frozen": by_path({"bias|scale": FROZEN, "0": "zeroth"}),
    "by_depth": by_depth(3),
}
TREES = {
    "dict": dense(3),
    "linen": {"params": {**dense(11), "Block_0": {"Dense_0": layer()}, "scale": A}},
    "dataclass": net(),
    "list": [A, [A, jnp.ones(())], A],
    "tuple": (A, (A, A), [A]),
    "namedtuple": Pair(layer(), Attention(A, A, A)),
    "none": {"a": None, "b": A, "c": [None, A], "d": {}},
    "ordered": OrderedDict(z=A, a=A),
    "array": A,
    "float": {"a": 1.0, "b": [2.0, np.float32(3.0)]},
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_leaves_belong_together_as_in_optax_partition(grouping, tree):
    grouping, params = GROUPINGS[grouping], TREES[tree]
    assert_agrees_with_optax(grouping, params, resolve(grouping, params))


def assert_agrees_with_optax(grouping, params, partition):
    """Scales each label's leaves by a number of its own and reads off which leaves got the same."""
    labels = list(dict.fromkeys(jax.tree.leaves(grouping(params))))
    factors = [0.0 if label == FROZEN else 1.0 + k for k, label in enumerate(labels)]
    tx = optax.partition(dict(zip(labels, map(optax.scale, factors), strict=True)), grouping)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    seen = [float(jnp.ravel(u)[0]) for u in jax.tree.leaves(updates)]
    ours = [-1 if g < 0 else labels_of(partition, labels)[g] for g in partition.index]
    assert seen == [0.0 if k < 0 else factors[k] for k in ours]


def labels_of(partition, labels):
    return {g: k for g, name in enumerate(partition.names) for k, label in enumerate(labels) if str(label) == name}


LABEL_TREES = {
    "whole": ({"a": "x", "b": ["y", "x"]}, {"a": A, "b": [A, A]}),
    "prefix": ({"a": "x", "b": "y"}, {"a": A, "b": [A, {"c": A}]}),
    "one label": ("x", {"a": A, "b": [A, A]}),
    "one label for an array": ("x", A),
    "one frozen subtree": ({"a": "x", "b": FROZEN}, {"a": A, "b": [A, A]}),
    "tuple": (("x", "y"), (layer(), layer())),
    "namedtuple": (Pair("x", Attention("y", "y", "x")), Pair(A, Attention(A, A, A))),
    "dataclass prefix": (Net(["x", "y"], "x"), net()),
    "label where the params have None": ({"a": "x", "b": "y"}, {"a": A, "b": None}),
    "label above None": ({"a": "x", "b": "y"}, {"a": A, "b": [None, {}]}),
    "label where the params have an empty dict": ({"a": "x", "b": "y"}, {"a": A, "b": {}}),
    "one label, one None": ("x", {"a": A, "b": None}),
    "None where the params have None": ({"a": "x", "b": None}, {"a": A, "b": None}),
    "numbers": ({"a": 1, "b": 0}, {"a": A, "b": A}),
}


@pytest.mark.parametrize("case", LABEL_TREES)
def test_label_trees_and_prefixes_fit_as_in_optax_partition(case):
    labels, params = LABEL_TREES[case]
    partition = resolve(labels, params)
    assert resolve(lambda _: labels, params) == partition
    assert_agrees_with_optax(lambda _: labels, params, partition)  # optax would call a Net of labels


def test_a_callable_may_return_a_prefix():
    assert resolve(lambda params: {"a": "x", "b": "y"}, {"a": A, "b": [A, A]}).index == (0, 1, 1)


def test_a_label_tree_of_a_callable_class_is_a_label_tree():
    labels = jax.tree.map(lambda _: "x", net())
    assert callable(labels)
    assert resolve(labels, net()).names == ("x",)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_label_trees_have_the_structure_of_the_params(grouping, tree):
    params = TREES[tree]
    assert jax.tree.structure(GROUPINGS[grouping](params)) == jax.tree.structure(params)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_shapes_and_tracers_are_grouped_like_arrays(grouping):
    params = TREES["linen"]
    expected = resolve(GROUPINGS[grouping], params)
    assert resolve(GROUPINGS[grouping], jax.eval_shape(lambda: params)) == expected
    seen = []
    jax.eval_shape(lambda p: seen.append(resolve(GROUPINGS[grouping], p)), params)
    assert seen == [expected]


# Groupings


def test_per_tensor_gives_each_leaf_its_path():
    params = Pair(layer(), [A, Attention(A, A, A)])
    paths = ("first/bias", "first/kernel", "second/0", "second/1/key", "second/1/query", "second/1/value")
    partition = resolve(per_tensor, params)
    assert partition.names == partition.paths == paths
    assert partition.index == tuple(range(6))


def test_single_puts_everything_together():
    assert resolve(single, TREES["linen"]).index == (0,) * 25


def test_weights_and_biases_go_by_the_usual_names():
    weights, biases = ("kernel", "weight", "w", "embedding"), ("scale", "bias", "b")
    others = ("temperature", "weights", "bias2", "kernel_0")
    params = {"deep": [dict.fromkeys((*weights, *biases, *others), A)], "kernel": {"b": A, "x": A}}
    assert by_label(weights_and_biases, params) == {
        "weights": {f"deep/0/{name}" for name in weights},
        "biases": {f"deep/0/{name}" for name in biases} | {"kernel/b"},
        "others": {f"deep/0/{name}" for name in others} | {"kernel/x"},
    }
    assert by_label(weights_and_biases, [A]) == {"others": {"0"}}
    assert by_label(weights_and_biases, A) == {"others": {"root"}}


# per_module


def test_per_module_gives_a_group_a_layer():
    assert modules(per_module, dense(3)) == {f"Dense_{i}": {f"Dense_{i}"} for i in range(3)}
    assert modules(per_module, net()) == {"layers/0": {"layers/0"}, "layers/1": {"layers/1"}, "root": {""}}


def test_per_module_works_called_and_uncalled():
    params = dense(20)
    assert resolve(per_module, params) == resolve(per_module(), params) == resolve(per_module(max_groups=16), params)
    for n in (3, np.int64(3)):
        assert resolve(per_module(n), params) == resolve(per_module(max_groups=n), params)
    assert resolve(per_module(3), params) == resolve(lambda p: per_module(p, max_groups=3), params)
    assert resolve(per_module(3), params).num_groups == 3


@pytest.mark.parametrize(
    "params", [A, {"w": A, "b": A}, [A, A], (A,), Pair(A, A), Layer(A, A), {"params": {"w": A, "b": A}}]
)
def test_per_module_makes_one_group_of_a_tree_without_modules(params):
    assert resolve(per_module, params).num_groups == 1


def test_per_module_takes_the_deepest_cut_that_fits():
    # 2 towers of 3 blocks of 2 layers each.
    params = {
        f"tower_{t}": {f"block_{b}": {f"layer_{i}": layer() for i in range(2)} for b in range(3)} for t in range(2)
    }
    depth_of_names = lambda n: {name.count("/") + 1 for name in groups.names(per_module(n), params)}
    number = lambda n: resolve(per_module(n), params).num_groups
    for first, last, count, depth in ((2, 5, 2, 1), (6, 11, 6, 2), (12, 40, 12, 3)):
        for n in (first, last):
            assert number(n) == count
            assert depth_of_names(n) == {depth}
    assert number(1) == 1


def test_per_module_gives_a_group_a_block_of_a_deep_transformer():
    block = {"attention": {name: layer() for name in ("key", "out", "query", "value")}, "mlp": dense(2)}
    params = {"params": {**{f"Block_{i}": block for i in range(12)}, "Embed_0": {"embedding": A}}}
    names = {f"params/Block_{i}" for i in range(12)} | {"params/Embed_0"}
    assert set(groups.names(per_module, params)) == names


@pytest.mark.parametrize("wrap", [lambda p: {"params": p}, lambda p: {"params": {"net": p}}, lambda p: [p], Wrapper])
def test_per_module_does_not_count_levels_that_all_leaves_share(wrap):
    inner = {f"block_{i}": dense(2) for i in range(5)}
    for n in (1, 3, 5, 9, 10):
        assert resolve(per_module(n), wrap(inner)).index == resolve(per_module(n), inner).index


def test_per_module_counts_a_level_that_a_leaf_does_not_share():
    params = {"params": {"net": dense(3), "scale": A}}
    assert modules(per_module(2), params) == {
        "params/net": {f"params/net/Dense_{i}" for i in range(3)},
        "params": {"params"},
    }


def test_per_module_merges_neighbours_in_natural_order():
    params = {"params": dense(37)}
    merged = modules(per_module, params)
    assert len(merged) == 16
    order = {f"params/Dense_{i}": i for i in range(37)}
    blocks = sorted(sorted(order[m] for m in block) for block in merged.values())
    assert list(itertools.chain(*blocks)) == list(range(37))
    assert {len(block) for block in blocks} == {2, 3}
    assert merged["params/Dense_0..params/Dense_2"] == {f"params/Dense_{i}" for i in range(3)}
    assert len(groups.names(per_module, params)) == len(merged)


def test_per_module_merges_at_the_first_level_only():
    params = {f"block_{i}": dense(2) for i in range(5)}
    assert modules(per_module(2), params) == {
        "block_0..block_2": {f"block_{i}/Dense_{j}" for i in range(3) for j in range(2)},
        "block_3..block_4": {f"block_{i}/Dense_{j}" for i in (3, 4) for j in range(2)},
    }


def test_natural_order_is_total():
    # Equal as numbers: without a tie-break, the order of a set of strings would decide.
    params = {name: layer() for name in ("a1", "a01", "a001", "b")}
    assert set(groups.names(per_module(3), params)) == {"a001..a01", "a1", "b"}


def random_tree(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return layer()
    children = [random_tree(rng, depth - 1) for _ in range(rng.integers(1, 6))]
    return children if rng.random() < 0.3 else {f"m{i}": c for i, c in enumerate(children)}


def test_per_module_is_a_coarsening_of_modules_within_its_limit():
    rng = np.random.default_rng(0)
    for _ in range(30):
        params, n = random_tree(rng, 4), int(rng.integers(1, 20))
        partition, coarser = resolve(per_module(n), params), resolve(per_module(max(1, n // 2)), params)
        assert coarser.num_groups <= partition.num_groups <= n
        group_of = {}
        for path, g in zip(partition.paths, partition.index, strict=True):
            assert group_of.setdefault(path.rpartition("/")[0], g) == g
        if len(group_of) <= n:
            assert partition.num_groups == len(group_of)


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", True, None])
def test_per_module_refuses_a_bad_number(n):
    with pytest.raises(ValueError, match=r"max_groups must be an integer of at least 1, got " + re.escape(repr(n))):
        per_module(max_groups=n)


def test_per_module_refuses_two_positional_arguments():
    with pytest.raises(TypeError, match="takes the params alone, got 2"):
        per_module(dense(2), 3)


# by_path


def test_by_path_takes_the_first_expression_found_and_a_group_for_the_rest():
    params = {"encoder": dense(2), "head": {"kernel": A, "bias": A}, "scale": A}
    assert by_label(by_path(["encoder/.*_1", "bias$", "^enc"]), params) == {
        "bias$": {"encoder/Dense_0/bias", "head/bias"},
        "^enc": {"encoder/Dense_0/kernel"},
        "encoder/.*_1": {"encoder/Dense_1/bias", "encoder/Dense_1/kernel"},
        "rest": {"head/kernel", "scale"},
    }


def test_by_path_order_decides():
    params = {"a": {"bias": A}}
    assert groups.names(by_path(["bias", "a"]), params) == ("bias",)
    assert groups.names(by_path(("a", "bias")), params) == ("a",)
    assert groups.names(by_path({"a": 1, "bias": 2}), params) == ("1",)


def test_by_path_sees_the_path_that_keystr_shows():
    params = [Pair({"x": A}, (A,)), net()]
    seen = [k for k, _ in jax.tree_util.tree_leaves_with_path(params)]
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k in seen]
    for i, path in enumerate(paths):
        index = resolve(by_path([f"^{path}$"]), params).index
        assert [j for j, g in enumerate(index) if g == index[i]] == [i]


def test_by_path_mapping_merges_equal_labels_and_freezes():
    params = {"embed": {"w": A}, "head": {"w": A, "b": A}, "mid": A}
    grouping = by_path({"^embed": FROZEN, "w$": "weights", "mid": "weights"})
    assert by_label(grouping, params) == {"rest": {"head/b"}, "weights": {"head/w", "mid"}}
    assert resolve(grouping, params).index == (-1, 0, 1, 1)


def test_by_path_without_patterns_is_one_group():
    assert groups.names(by_path([]), dense(3)) == ("rest",)


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ("bias", TypeError, "got the string 'bias'; put it in a list"),
        (["bias", "(kernel"], ValueError, r"pattern '\(kernel' is not a regular expression: missing \)"),
        ({"[": "x"}, ValueError, r"pattern '\[' is not a regular expression"),
        (["bias", 3], TypeError, "each pattern must be a string, got 3"),
        ([re.compile("bias")], TypeError, "each pattern must be a string, got re.compile"),
        ({"bias", "kernel"}, TypeError, "a sequence or a mapping, in order, got .*; put them in a list"),
        (None, TypeError, "a sequence or a mapping, in order, got None"),
        ({"bias": None}, TypeError, "label of pattern 'bias' is None; labels are strings, numbers or other"),
        ({"bias": ["x"]}, TypeError, r"label of pattern 'bias' is \['x'\]; labels are .*, not containers"),
        ({"dense": layer()}, TypeError, "label of pattern 'dense' is .*, not containers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_by_path_refuses_bad_patterns(patterns, error, message):
    with pytest.raises(error, match=message):
        by_path(patterns)


# by_depth


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 21, 22, 23, 40])
def test_by_depth_makes_even_blocks_in_natural_order(n):
    partition = resolve(by_depth(n), dense(11))
    natural = [f"Dense_{i}/{name}" for i in range(11) for name in ("bias", "kernel")]
    block_of = dict(zip(partition.paths, (partition.names[g] for g in partition.index), strict=True))
    blocks = [list(block) for _, block in itertools.groupby(natural, block_of.get)]
    sizes = [len(block) for block in blocks]
    assert len(blocks) == partition.num_groups == min(n, 22)
    assert max(sizes) - min(sizes) <= 1
    assert [block_of[block[0]] for block in blocks] == [f"block {b}" for b in range(len(blocks))]


def test_by_depth_orders_list_positions_as_numbers():
    params = [A] * 12
    assert resolve(by_depth(12), params).index == tuple(range(12))
    assert resolve(by_depth(2), params).index == (0,) * 6 + (1,) * 6


@pytest.mark.parametrize("n", [0, -2, 2.0, "2", False, {"w": 1.0}])
def test_by_depth_refuses_a_bad_number(n):
    with pytest.raises(ValueError, match=r"n must be an integer of at least 1, got " + re.escape(repr(n))):
        by_depth(n)


# FROZEN


def test_frozen_leaves_have_no_group():
    partition = resolve({"a": FROZEN, "b": "x", "c": FROZEN, "d": "y"}, dict.fromkeys("abcd", A))
    assert partition.index == (-1, 0, -1, 1)
    assert partition.names == ("x", "y")
    assert partition.paths == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3), 3, True, jnp.ones(2, complex), jnp.ones(2, bool), np.int8(1), jnp.tanh, "name"],
    ids=lambda x: str(getattr(x, "dtype", type(x).__name__)),
)
def test_frozen_leaves_may_be_anything(leaf):
    assert resolve({"a": FROZEN, "b": "x"}, {"a": leaf, "b": A}).index == (-1, 0)


def test_frozen_leaves_may_be_keys():
    params = {"a": jax.random.key(0), "b": A}
    assert resolve({"a": FROZEN, "b": "x"}, params).index == (-1, 0)
    with pytest.raises(TypeError, match=r"parameter a has dtype key.*label it groups.FROZEN"):
        resolve(single, params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_real_floating_dtype_of_at_least_16_bits_may_have_a_group(dtype):
    assert resolve(single, {"a": jnp.ones(2, dtype)}).index == (0,)


def test_eight_bits_are_too_few_to_step_in():
    params = {"a": jnp.ones(2, jnp.float8_e4m3fn), "b": A}
    assert resolve({"a": FROZEN, "b": "x"}, params).index == (-1, 0)
    with pytest.raises(TypeError, match=r"parameter a has dtype float8.*label it groups.FROZEN"):
        resolve(single, params)


# Flax


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.Linear(2, 2, rngs=rngs)
        self.value = nnx.Param(jnp.ones(2))
        self.tables = nnx.Param({"left": jnp.ones(2), "right": jnp.ones(2)})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.value = nnx.Linear(2, 2, rngs=rngs)


class Recorded(NamedTuple):
    variables: Any  # the State that init gets: a variable a leaf, whose path ends in `value`
    arrays: Any  # the State that update gets: an array a leaf
    pure: Any  # nested dicts of arrays


@pytest.fixture(scope="module")
def recorded():
    seen = []

    def init(params):
        seen.append(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen.append(params)
        return updates, state

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.GradientTransformation(init, update), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))

    def as_dicts(node):
        return {k: as_dicts(v) for k, v in node.items()} if hasattr(node, "items") else node

    return Recorded(*seen, pure=as_dicts(seen[1]))


def test_nnx_paths_at_init_and_at_update_do_differ(recorded):
    """If this fails, Flax has changed and the rule about `value` may go."""
    keystr = lambda tree: [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert all(".value" in key for key in keystr(recorded.variables))
    assert not any(".value" in key for key in keystr(recorded.arrays))
    assert keystr(recorded.arrays) == keystr(recorded.pure)


NNX_GROUPINGS = {
    "per_tensor": per_tensor,
    "per_module": per_module,
    "per_module(40)": per_module(max_groups=40),
    "per_module(4)": per_module(max_groups=4),
    "single": single,
    "weights_and_biases": weights_and_biases,
    "by_path": by_path({"kernel$": "weights", "value$": FROZEN, "^norm/": "norm", "attention/bias$": "b"}),
    "by_depth": by_depth(5),
}


@pytest.mark.parametrize("grouping", NNX_GROUPINGS)
def test_nnx_groups_are_the_same_at_init_and_at_update(grouping, recorded):
    partitions = [resolve(NNX_GROUPINGS[grouping], tree) for tree in recorded]
    assert partitions[0] == partitions[1] == partitions[2]


@pytest.mark.parametrize("grouping", NNX_GROUPINGS)
def test_nnx_label_trees_fit_every_form_of_the_state(grouping, recorded):
    expected = resolve(NNX_GROUPINGS[grouping], recorded.pure)
    for made_from, params in itertools.product(recorded, recorded):
        assert resolve(NNX_GROUPINGS[grouping](made_from), params) == expected


def test_nnx_label_trees_mapped_with_paths_or_by_hand_fit_every_form(recorded):
    def label(path, _):
        return "norm" if "norm" in jax.tree_util.keystr(path) else "rest"

    by_hand = {"blocks": "rest", "norm": "norm", "value": {"bias": "rest", "kernel": "rest"}}
    mapped = [jax.tree_util.tree_map_with_path(label, tree) for tree in recorded]
    for labels, params in itertools.product([*mapped, by_hand], recorded):
        assert by_label(labels, params)["norm"] == {"norm/bias", "norm/scale"}


def test_nnx_names_have_no_last_value_part(recorded):
    names = groups.names(per_tensor, recorded.variables)
    assert {"blocks/10/attention/bias", "blocks/0/value", "blocks/0/tables/left", "value/kernel"} < set(names)


def test_nnx_modules_are_grouped_by_their_path(recorded):
    names = groups.names(per_module(max_groups=24), recorded.variables)
    assert len(names) == 13
    assert {"blocks", "norm", "value"} == set(groups.names(per_module(max_groups=12), recorded.arrays))


def test_linen_params_get_a_group_a_layer():
    class Perceptron(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(12):
                x = linen.Dense(2)(x)
            return linen.LayerNorm()(x)

    params = jax.eval_shape(Perceptron().init, jax.random.key(0), jnp.ones((1, 2)))
    names = {f"params/Dense_{i}" for i in range(12)} | {"params/LayerNorm_0"}
    assert set(groups.names(per_module, params)) == names
    assert set(groups.names(per_module, params["params"])) == {n.removeprefix("params/") for n in names}


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ({"attention": {"key": A, "query": A, "value": A}}, "attention/key attention/query attention/value"),
        ({"value": A}, "value"),
        ({"head": {"value": {"value": A}}}, "head/value/value"),
        (Attention(A, A, A), "key query value"),
        (WrapperAndName(A, A), "value other"),
        ([WrapperAndName(A, None)], "0/value"),
        ([WrapperAndName(None, A)], "0/other"),
        ([Wrapper({"value": A})], "0/value"),
        (Wrapper([A]), "0"),
        ([Wrapper(A)], "0"),
        (Wrapper(A), "root"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_only_an_attribute_named_value_without_siblings_is_left_out(params, paths):
    assert resolve(per_tensor, params).paths == tuple(paths.split())


def test_labels_mapped_over_an_unfiltered_model_fit_the_filtered_one():
    model = [WrapperAndName(A, jnp.tanh), Layer(A, A)]
    params = [WrapperAndName(A, None), Layer(A, None)]
    labels = jax.tree.map(lambda x: "x" if x is A else "other", model)
    assert resolve(labels, params).index == (0, 0)


# Sums and products over groups


def test_sums_add_up_each_group():
    partition = resolve({"a": "x", "b": FROZEN, "c": "y", "d": "x"}, dict.fromkeys("abcd", A))
    sums = partition.sums([jnp.float32(v) for v in (1, 10, 100, 1000)], jnp.float32)
    assert sums.tolist() == [1001, 100]
    assert groups.Partition((), (), ()).sums([], jnp.float32).shape == (0,)


def test_scale_multiplies_each_group_and_zeroes_the_frozen():
    tree = {"a": 2 * A, "b": A, "c": [3.0, 4 * A]}
    partition = resolve({"a": "x", "b": FROZEN, "c": ["y", "x"]}, tree)
    scaled = partition.scale(jnp.array([10.0, -1.0]), tree)
    assert jax.tree.map(lambda x: jnp.asarray(x).tolist(), scaled) == {"a": [20, 20], "b": [0, 0], "c": [-3, [40, 40]]}


def test_scale_keeps_dtypes_and_multiplies_in_the_wider_one(x64):
    one = jnp.ones((), jnp.bfloat16)
    partition = resolve(single, {"a": one, "b": one.astype(jnp.float32)})
    # 257 rounds to 256 in bfloat16; rounded before the product, 257 * 257 would become 65536.
    scaled = partition.scale(jnp.array([257.0]), {"a": 255 * one, "b": 257 * one.astype(jnp.float32)})
    assert (scaled["a"].dtype, scaled["b"].dtype) == (jnp.bfloat16, jnp.float32)
    assert float(scaled["a"]) == float(jnp.bfloat16(257 * 255))
    assert float(scaled["b"]) == 257 * 257


# Errors


@pytest.mark.parametrize(
    ("labels", "params", "message"),
    [
        ({"a": "x"}, {"a": A, "b": A}, r"no label for parameter b; it has labels at a\. Give a pytree of labels with"),
        ({"a": {"c": "x"}}, {"a": A}, r"no label for parameter a; it has labels at a/c\. Give"),
        ({}, {"a": A}, r"no label for parameter a; it has no labels\. Give"),
        (None, {"a": [A]}, r"no label for parameter a/0; it has no labels\. Give"),
        ({"a": None, "b": "x"}, {"a": A, "b": A}, "no label for parameter a; .*or a callable that makes one"),
        (["x"], [A, A], "no label for parameter 1; it has labels at 0"),
        ({"a": "x", "b": "x"}, {"a": A}, r"a label at b, where .* no parameter; they have parameters at a\. Drop"),
        ({"a": "x", "b": "x"}, {"a": A, "b": {"c": None}, "d": A}, "no label for parameter d"),
        ({"a": "x", "b": {"d": "y"}}, {"a": A, "b": {"c": None}}, "a label at b/d, where the params have no parameter"),
        ({"a": "x", "b": {"c": "y"}}, {"a": A, "b": {}}, "a label at b/c, where the params have no parameter"),
        (("x", "y", "z"), (A, A), "a label at 2, .* give labels that fit this model"),
        ({"a": "x"}, {"a": {}, "b": {}, "c": A}, "no label for parameter c"),
        (dict.fromkeys("abcdefg", "x"), {"h": A}, "it has labels at a, b, c, d, …"),
        (jax.tree.map(lambda _: "x", dense(3)), dense(2), "label at Dense_2/bias, where the params have no parameter"),
        (jax.tree.map(lambda _: "x", dense(2)), dense(3), "no label for parameter Dense_2/bias"),
        (jax.tree.map(lambda _: "x", dense(2)), dense(2, "Linear_{}"), "no label for parameter Linear_0/bias"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_label_tree_that_does_not_fit_is_refused_as_in_optax_partition(labels, params, message):
    with pytest.raises(ValueError, match=message):
        resolve(labels, params)
    with pytest.raises(ValueError, match=message):
        resolve(lambda _: labels, params)
    tx = optax.partition({label: optax.sgd(1.0) for label in "xyz"}, labels)
    with pytest.raises((ValueError, TypeError)):
        tx.init(params)


def test_an_unhashable_label_is_refused():
    params = {"a": A, "b": {"c": A}}
    for label in (np.array(["x", "y"]), jnp.ones(())):
        with pytest.raises(TypeError, match=r"label of parameter b/c is .*not hashable; labels are strings, numbers"):
            resolve({"a": "x", "b": {"c": label}}, params)


@pytest.mark.parametrize("grouping", [FROZEN, by_path({"": FROZEN}), {"Dense_0": FROZEN, "Dense_1": FROZEN}])
def test_all_frozen_is_refused(grouping):
    message = r"all 4 parameters are frozen, among them Dense_0/bias; give at least one a label other than .*FROZEN"
    with pytest.raises(ValueError, match=message):
        resolve(grouping, dense(2))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.arange(3), "has dtype int32, .*; label it groups.FROZEN or keep it out of the params"),
        (jax.ShapeDtypeStruct((), jnp.uint8), "has dtype uint8, .*; label it groups.FROZEN"),
        (3, "has dtype int32, .*; label it groups.FROZEN"),
        (True, "has dtype bool, .*; label it groups.FROZEN"),
        (jnp.ones(2, jnp.complex64), "has dtype complex64, .*; hold its real and imaginary parts as two real arrays"),
        (1j, "has dtype complex64, .*; hold its real and imaginary parts .*, or label it groups.FROZEN"),
        (jnp.tanh, "is .*, which is not an array; label it groups.FROZEN or keep it out of the params"),
        ("float32", "is 'float32', which is not an array; label it groups.FROZEN"),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(getattr(x, "dtype", type(x).__name__)),
)
def test_a_labelled_leaf_that_is_not_real_floating_point_is_refused(leaf, message):
    with pytest.raises(TypeError, match="parameter a/b " + message):
        resolve(per_tensor, {"a": {"b": leaf}, "c": A})


def test_a_grouping_that_returns_a_function_is_refused():
    with pytest.raises(TypeError, match=r"returned the function .* and not a label tree; give that function"):
        resolve(lambda params: per_module(max_groups=3), dense(2))
    with pytest.raises(TypeError, match="returned the function"):
        resolve(lambda params: functools.partial(single, params), dense(2))


def test_factories_passed_uncalled_are_refused():
    with pytest.raises(ValueError, match="n must be an integer"):
        resolve(by_depth, dense(2))
    with pytest.raises(TypeError, match="label of pattern 'Dense_0'"):
        resolve(by_path, dense(2))
