"""Groupings: which parameters share one learning rate.

A *grouping* is what :func:`optax.partition` takes as ``param_labels``: a pytree
(or a prefix) of hashable labels, or a callable from params to one. Leaves with
equal labels form a group; leaves labelled :data:`FROZEN` have no group and get
a zero update.

Groups are numbered by the first leaf, in ``jax.tree.leaves`` order, that bears
their label. A *path* is the tuple of a leaf's keys as words, without the
``value`` of a Flax NNX variable, shown at init and hidden at update, so neither
numbering nor regular expressions depend on it.

A leaf that keeps the layers of a model stacked along an axis may have a label
for each of its slices, see :func:`stacked`: it then belongs to several groups.
"""

import collections
import dataclasses
import functools
import itertools
import numbers
import re
import reprlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FROZEN = "grouped_newton.groups.FROZEN"
"""Label of the leaves that get a zero update and belong to no group."""

Grouping = Any  # a pytree (prefix) of labels, or a callable from params to one
Path = tuple[str, ...]

_WEIGHTS = frozenset({"kernel", "weight", "w", "embedding"})
_BIASES = frozenset({"scale", "bias", "b"})
_ROOT = "root"
_REST = "rest"


@dataclasses.dataclass(frozen=True)
class _Slices:
    """The label of a leaf whose slices along an axis have labels of their own."""

    labels: tuple[Hashable, ...]
    axis: int


class Layers(NamedTuple):
    """The groups of a leaf that belongs to several: one for each slice along an axis, which counts from 0."""

    axis: int
    groups: tuple[int, ...]


class Partition(NamedTuple):
    """A grouping resolved on concrete params.

    Attributes:
      index: the group number of each leaf, in leaf order, -1 where frozen; of a leaf with layers, that of the first.
      names: the label of each group, as a string.
      paths: the path of each leaf, as ``a/b/c``.
      layers: the groups of each leaf that belongs to several, None for others.
    """

    index: tuple[int, ...]  # type: ignore[assignment]  # a tuple's own index() is not needed
    names: tuple[str, ...]
    paths: tuple[str, ...]
    layers: tuple[Layers | None, ...] = ()

    @property
    def num_groups(self) -> int:
        return len(self.names)

    def groups_of(self, leaf: int) -> tuple[int, ...]:
        """The groups of the leaf of a number: of each of its slices, of all of it, or none."""
        layers, group = self.layers[leaf], self.index[leaf]
        if layers is not None:
            return layers.groups
        return () if group < 0 else (group,)

    def members(self, group: int) -> tuple[int, ...]:
        """Numbers of the leaves of a group."""
        return tuple(i for i in range(len(self.index)) if group in self.groups_of(i))

    def index_in(self, tree: Any) -> tuple[int, ...]:
        """The group of each leaf of a tree like the params, from which frozen leaves may be missing."""
        return tuple(self.index[i] for i in self._numbers_in(tree))

    def _numbers_in(self, tree):
        """The number among the params of each leaf of a tree like them."""
        everything = range(len(self.index))
        moving = [i for i in everything if self.index[i] >= 0]
        count = len(jax.tree.leaves(tree))
        for numbers_in in (everything, moving):
            if count == len(numbers_in):
                return numbers_in
        self.check(tree)
        number_of = dict(zip(self.paths, everything, strict=True))
        return [number_of[path] for path in path_names(tree)]

    def check(self, direction: Any) -> None:
        """Raises a ValueError unless the direction has the leaves of the params, but for frozen ones."""
        there = path_names(direction)
        frozen = {path for path, g in zip(self.paths, self.index, strict=True) if g < 0}
        kept = lambda paths: [path for path in paths if path not in frozen or path in there]
        if kept(self.paths) == list(there):
            return
        odd = [path for path in (*self.paths, *there) if (path in self.paths) != (path in there)]
        raise ValueError(
            f"the direction has {len(there)} arrays and the params have {len(self.paths)};"
            f" {f'only one of them has {odd[0]}' if odd else 'they come in another order'}. The direction must have the"
            " structure of the params, as gradients do"
        )

    def leaves(self, tree: Any) -> list:
        """The leaves of a tree like the params, one per parameter and None where it is frozen."""
        moving = (x for x, g in zip(jax.tree.leaves(tree), self.index_in(tree), strict=True) if g >= 0)
        return [None if g < 0 else next(moving) for g in self.index]

    def map(self, fn: Callable, tree: Any, *others: Any) -> Any:
        """``fn`` of the leaves that have a group; the frozen ones of the first tree as they are."""
        leaves, treedef = jax.tree.flatten(tree)
        moving = [iter([x for x in self.leaves(other) if x is not None]) for other in others]
        new = [x if g < 0 else fn(x, *map(next, moving)) for x, g in zip(leaves, self.index_in(tree), strict=True)]
        return jax.tree.unflatten(treedef, new)

    def sums(self, values: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """Adds one number per leaf, or one per layer of it, up over each group: shape (S,)."""
        totals = [jnp.zeros((), dtype) for _ in self.names]
        for i, value in enumerate(values):
            for k, g in enumerate(self.groups_of(i)):
                totals[g] = totals[g] + (value[k] if self.layers[i] else value)
        return jnp.stack(totals) if totals else jnp.zeros((0,), dtype)

    def totals(self, leaves: Sequence, dtype: Any) -> jax.Array:
        """Adds all numbers of arrays like the leaves up over each group: shape (S,)."""

        def total(x, layers):
            kept = (layers.axis,) if layers else ()
            return None if x is None else jnp.sum(x, axis=tuple(d for d in range(jnp.ndim(x)) if d not in kept))

        return self.sums([total(x, layers) for x, layers in zip(leaves, self.layers, strict=True)], dtype)

    def sizes(self, leaves: Sequence) -> np.ndarray:
        """How many numbers of arrays like the leaves each group has: shape (S,)."""
        sizes = np.zeros(self.num_groups)
        for i, x in enumerate(leaves):
            for g in self.groups_of(i):
                sizes[g] += jnp.size(x) // len(self.groups_of(i))
        return sizes

    def without_frozen(self) -> "Partition":
        """The same groups of the leaves that have one."""
        moving = [i for i, g in enumerate(self.index) if g >= 0]
        return Partition(
            index=tuple(self.index[i] for i in moving),
            names=self.names,
            paths=tuple(self.paths[i] for i in moving),
            layers=tuple(self.layers[i] for i in moving),
        )

    def in_pieces(self) -> "Partition":
        """The same groups of leaves of which those with layers are cut into slices, see ``cut``."""
        pieces = [(path, g) for i, path in enumerate(self.paths) for g in self.groups_of(i) or (-1,)]
        return Partition(tuple(g for _, g in pieces), self.names, tuple(p for p, _ in pieces), (None,) * len(pieces))

    def cut(self, leaves: Sequence) -> list:
        """The leaves, in the place of each that has layers its slices."""
        slices = lambda x, axis, groups: [lax.index_in_dim(x, k, axis, keepdims=False) for k in range(len(groups))]
        pairs = zip(leaves, self.layers, strict=True)
        return [y for x, layers in pairs for y in ([x] if layers is None else slices(x, *layers))]

    def joined(self, pieces: Sequence) -> list:
        """The leaves that were cut."""
        rest = iter(pieces)
        join = lambda layers: jnp.stack([next(rest) for _ in layers.groups], layers.axis)
        return [next(rest) if layers is None else join(layers) for layers in self.layers]

    def scale(self, factors: jax.Array, tree: Any) -> Any:
        """Multiplies each leaf by its group's factor; a frozen one becomes zero.

        The product is taken in the wider of the two dtypes and returned in the
        leaf's own.
        """

        @functools.cache
        def factor_of_group(g):
            # The place is an operand: with a constant one XLA would compile a kernel for every group.
            return lax.dynamic_index_in_dim(factors, lax.optimization_barrier(jnp.int32(g)), keepdims=False)

        def factor(i, ndim):
            if self.layers[i] is None:
                return factor_of_group(self.index[i])
            axis, own = self.layers[i]
            return factors[np.array(own)].reshape([len(own) if d == axis else 1 for d in range(ndim)])

        def scaled(i, leaf):
            if self.index[i] < 0:
                return still(leaf)
            dtype = jnp.result_type(leaf)
            wide = wider(dtype, factors.dtype)
            return (factor(i, jnp.ndim(leaf)).astype(wide) * jnp.asarray(leaf, wide)).astype(dtype)

        leaves, treedef = jax.tree.flatten(tree)
        new = [scaled(i, x) for i, x in zip(self._numbers_in(tree), leaves, strict=True)]
        return jax.tree.unflatten(treedef, new)


def resolve(groups: Grouping, params: Any) -> Partition:
    """Numbers the groups of ``params``.

    Args:
      groups: a grouping.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The partition, with one entry per leaf of ``params``.

    Raises:
      ValueError: if the labels don't fit the params or all leaves are frozen.
      TypeError: if a label isn't hashable, or a leaf with one isn't of a real
        floating-point dtype.
    """
    leaves, paths = jax.tree.leaves(params), leaf_paths(params)
    labels = _labels_of_leaves(_label_tree_of(groups, params), params)
    number_of: dict[Hashable, int] = {}
    index: list[int] = []
    layers: list[Layers | None] = []
    for path, label, leaf in zip(paths, labels, leaves, strict=True):
        try:
            frozen = label == FROZEN if isinstance(label, str) else False
            hash(label)
        except TypeError:
            raise TypeError(
                f"the label of parameter {_show(path)} is {label!r}, which is not hashable; labels are"
                " strings, numbers or other hashable leaves"
            ) from None
        layers.append(None)
        if frozen:
            index.append(-1)
            continue
        _check_real(path, leaf)
        slices = label.labels if isinstance(label, _Slices) else (label,)
        own = tuple(number_of.setdefault(x, len(number_of)) for x in slices)
        index.append(own[0])
        if isinstance(label, _Slices):
            if jnp.shape(leaf)[label.axis : label.axis + 1] != (len(own),):
                raise ValueError(
                    f"the labels of parameter {_show(path)} are for {len(own)} layers along axis {label.axis}, and it"
                    f" has shape {jnp.shape(leaf)}; make labels from the params that they are for"
                )
            layers[-1] = Layers(label.axis, own)
    if leaves and not number_of:
        raise ValueError(
            f"all {len(leaves)} parameters are frozen, among them {_show(paths[0])}; give at least one a"
            " label other than groups.FROZEN"
        )
    return Partition(tuple(index), tuple(_distinct(map(str, number_of))), path_names(params), tuple(layers))


def names(groups: Grouping, params: Any) -> tuple[str, ...]:
    """The group names, in the order of a summary's rows.

    Args:
      groups: a grouping.
      params: the parameters that it labels.

    Returns:
      One string per group, of length S.

    Raises:
      ValueError, TypeError: if the grouping doesn't fit the params.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
      >>> names(per_tensor, params)
      ('dense/b', 'dense/w')
    """
    return resolve(groups, params).names


def leaf_paths(tree: Any) -> list[Path]:
    """The path of every leaf, without the ``value`` of NNX variables."""
    return [path for path, is_leaf in _ends(tree) if is_leaf]


def path_names(tree: Any) -> tuple[str, ...]:
    """The path of every leaf, as ``a/b/c``."""
    return tuple(map(_show, leaf_paths(tree)))


def _ends(tree):
    """The path of every leaf and of every node without children (None, an empty dict), and whether it is a leaf."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_childless)
    children = collections.defaultdict(set)
    for keys, _ in nodes:
        for k, key in enumerate(keys):
            children[keys[:k]].add(key)

    def is_variable(parent, key):
        # An attribute `value` without siblings is an nnx.Variable's; a dict's key "value" is a name.
        return key == jax.tree_util.GetAttrKey("value") and len(children[parent]) == 1

    def words(keys):
        named = (key for k, key in enumerate(keys) if not is_variable(keys[:k], key))
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in named)

    return [(words(keys), not _is_childless(node)) for keys, node in nodes]


def _is_childless(node):
    structure: Any = jax.tree.structure(node)
    return structure.num_nodes == 1 and structure.num_leaves == 0


def per_tensor(params: Any) -> Any:
    """One group per leaf, the paper's choice.

    Args:
      params: the parameters.

    Returns:
      A label tree whose labels are the leaves' paths.

    Example:
      >>> per_tensor({"w": 1.0, "b": 0.0})
      {'b': 'b', 'w': 'w'}
    """
    return _label_tree(params, _distinct(path_names(params)))


def single(params: Any) -> Any:
    """One group for everything: a line search along the direction.

    Args:
      params: the parameters.

    Returns:
      A label tree with one label.

    Example:
      >>> single({"w": 1.0, "b": 0.0})
      {'b': 'all', 'w': 'all'}
    """
    return jax.tree.map(lambda _: "all", params)


def weights_and_biases(params: Any) -> Any:
    """Weights, biases and everything else, told apart by the leaf's own name.

    ``kernel``, ``weight``, ``w`` and ``embedding`` are weights; ``scale``,
    ``bias`` and ``b`` are biases; other names form a third group.

    Args:
      params: the parameters.

    Returns:
      A label tree of ``"weights"``, ``"biases"`` and ``"others"``.

    Example:
      >>> weights_and_biases({"kernel": 1.0, "bias": 0.0, "temperature": 1.0})
      {'bias': 'biases', 'kernel': 'weights', 'temperature': 'others'}
    """

    def kind(path):
        name = path[-1] if path else ""
        return "weights" if name in _WEIGHTS else "biases" if name in _BIASES else "others"

    return _label_tree(params, [kind(path) for path in leaf_paths(params)])


def per_module(*args: Any, max_groups: int = 16) -> Any:
    """One group per module: a layer of an MLP, a block of a deep transformer.

    A leaf's module is its path without its own name. Modules are cut to their
    first k parts below what all of them share, for the largest k that leaves at
    most ``max_groups`` groups. If k = 1 has more, neighbours in natural order
    (``Dense_2`` before ``Dense_10``) are merged into ``max_groups`` blocks.

    Layers that are kept stacked, as a scan over layers wants them, count as the
    modules that they stand for: where all arrays below a module have two axes or
    more and the same length, at least 2, along the first, and some have two (biases,
    scales) and some more (kernels), each index of that axis is a module of its own.
    Params can't tell a scan over layers from other copies of a module, such as
    the experts of a mixture: these get a group each too. :func:`stacked` takes
    the layers where they are said to be.

    Args:
      *args: the params; without them a grouping is returned, so that both
        ``per_module`` and ``per_module(max_groups=8)`` are groupings.
      max_groups: the largest number of groups, at least 1.

    Returns:
      A label tree, or a callable from params to one.

    Raises:
      ValueError: if ``max_groups`` is not a positive integer.
      TypeError: if there is more than one positional argument.

    Example:
      >>> per_module({"hidden": {"w": 1.0, "b": 0.0}, "out": {"w": 1.0, "b": 0.0}})
      {'hidden': {'b': 'hidden', 'w': 'hidden'}, 'out': {'b': 'out', 'w': 'out'}}
    """
    if len(args) > 1:
        raise TypeError(f"per_module takes the params alone, got {len(args)} positional arguments")
    if args and isinstance(args[0], numbers.Integral):  # per_module(8); a Python int is no parameter
        max_groups, args = int(args[0]), ()
    _check_count("max_groups", max_groups)
    if not args:
        return functools.partial(per_module, max_groups=max_groups)
    (params,) = args
    modules = _modules(params)
    everything = [m for own in modules for m in own]
    shared = len(_common_prefix(everything))
    depth = max((len(m) for m in everything), default=0)
    cut = set(everything)
    for k in range(max(depth, shared + 1), shared, -1):
        cut = {m[:k] for m in everything}
        if len(cut) <= max_groups:
            break
    blocks = _contiguous_blocks(sorted(cut, key=_natural), max_groups)
    block_names = _distinct(map(_block_name, blocks))
    name_of = {m: name for name, block in zip(block_names, blocks, strict=True) for m in block}
    labels = [[name_of[m[:k]] for m in own] for own in modules]
    return _label_tree(params, [own[0] if len(set(own)) == 1 else _Slices(tuple(own), 0) for own in labels])


def _modules(params):
    """The module of each leaf, or those of its slices: the layers of a stack as they would be unstacked, in a list."""
    paths, shapes = leaf_paths(params), [getattr(x, "shape", ()) for x in jax.tree.leaves(params)]
    below = collections.defaultdict(list)
    for path, shape in zip(paths, shapes, strict=True):
        for k in range(len(path)):
            below[path[:k]].append((path[:-1], shape))
    roots = {
        at: _common_prefix([module for module, _ in inside])
        for at, inside in below.items()
        if _are_stacked([shape for _, shape in inside])
    }

    def modules(path, shape):
        # of the widest stack that holds the leaf
        root = next((roots[path[:k]] for k in range(len(path)) if path[:k] in roots), None)
        if root is None:
            return [path[:-1]]
        return [(*root, str(layer), *path[len(root) : -1]) for layer in range(shape[0])]

    return list(map(modules, paths, shapes))


def _are_stacked(shapes):
    """Whether arrays look like the same ones of several layers, stacked: see ``per_module``."""
    axes, lengths = [len(s) for s in shapes], {s[:1] for s in shapes}
    return min(axes) == 2 < max(axes) and len(lengths) == 1 and shapes[0][0] > 1


def by_path(patterns: Sequence[str] | Mapping[str, Hashable]) -> Callable[[Any], Any]:
    """Groups by regular expressions on the leaf's path.

    The first expression found (``re.search``) in ``a/b/c``, that is in
    ``keystr(path, simple=True, separator="/")``, decides. What none matches is
    one more group, called ``rest``.

    Args:
      patterns: expressions in order, each its own label, or a mapping from
        expression to label; a label may be :data:`FROZEN`.

    Returns:
      A callable from params to a label tree.

    Raises:
      TypeError: if ``patterns`` is one string, has no order, or holds something
        else than strings, or a label is None or a container.
      ValueError: if an expression doesn't compile.

    Example:
      >>> grouping = by_path({"encoder": FROZEN, "bias$": "biases"})
      >>> grouping({"encoder": {"w": 1.0}, "head": {"bias": 0.0, "w": 1.0}})["head"]
      {'bias': 'biases', 'w': 'rest'}
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a sequence or a mapping, got the string {patterns!r}; put it in a list")
    if not isinstance(patterns, Sequence | Mapping):
        raise TypeError(
            f"patterns must be a sequence or a mapping, in order, got {reprlib.repr(patterns)}; put them in a list"
        )
    compiled = []
    for pattern, label in patterns.items() if isinstance(patterns, Mapping) else zip(patterns, patterns, strict=True):
        if not isinstance(pattern, str):
            raise TypeError(f"each pattern must be a string, got {reprlib.repr(pattern)}")
        if not jax.tree_util.all_leaves([label]):
            raise TypeError(
                f"the label of pattern {pattern!r} is {reprlib.repr(label)}; labels are strings, numbers or other"
                " hashable leaves, not containers or None"
            )
        compiled.append((_compiled(pattern), label))

    def label_params(params):
        def label(path):
            name = "/".join(path)
            return next((lab for pattern, lab in compiled if pattern.search(name)), _REST)

        return _label_tree(params, [label(path) for path in leaf_paths(params)])

    return label_params


def _compiled(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def stacked(pattern: str, *, axis: int = 0, others: Grouping = per_module) -> Callable[[Any], Any]:
    """One group per layer of a model that keeps its layers stacked, as a scan over layers does.

    Leaves in whose path ``pattern`` is found, as in :func:`by_path`, hold all layers along an axis: what
    they have at index i of it, weights and biases together, is the group of layer i. It is called
    ``blocks/i`` where ``blocks`` is what their paths begin with in common, as if the layers were a list,
    or ``pattern/i`` where they have nothing in common. Summaries and updates are those of such a list. To
    ``optax.partition`` each of these leaves has one label.

    Args:
      pattern: a regular expression.
      axis: of these leaves, along which the layers are; 0 by default. It may be negative.
      others: the grouping of all other leaves, alone; :func:`per_module` by default. May be :func:`stacked` again.

    Returns:
      A callable from params to a label tree.

    Raises:
      TypeError: if ``pattern`` isn't a string or ``axis`` isn't an integer.
      ValueError: if ``pattern`` doesn't compile; and, on first use with params, if it is found in no
        path, or the leaves lack the axis or differ in its length.

    Example:
      >>> params = {"blocks": {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}, "head": {"w": jnp.ones((2, 1))}}
      >>> names(stacked("^blocks"), params)
      ('blocks/0', 'blocks/1', 'blocks/2', 'head')
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string, got {reprlib.repr(pattern)}")
    if not isinstance(axis, numbers.Integral) or isinstance(axis, bool):
        raise TypeError(f"axis must be an integer, got {reprlib.repr(axis)}")
    compiled = _compiled(pattern)

    def label_params(params):
        leaves, paths = jax.tree.leaves(params), leaf_paths(params)
        found = [compiled.search("/".join(path)) is not None for path in paths]
        if leaves and not any(found):
            raise ValueError(
                f"the pattern {pattern!r} of stacked layers is found in no path; there are"
                f" {_listing(paths, 'parameters')}"
            )
        own = [(path, jnp.shape(x)) for path, x, f in zip(paths, leaves, found, strict=True) if f]
        name = "/".join(_common_prefix([path for path, _ in own])) or pattern
        layers = tuple(f"{name}/{i}" for i in range(_number_of_layers(own, axis)))
        rest = jax.tree.structure(params).unflatten([None if f else x for x, f in zip(leaves, found, strict=True)])
        of_rest = iter(_labels_of_leaves(_label_tree_of(others, rest), rest) if not all(found) else ())
        labels = [
            _Slices(layers, axis % jnp.ndim(x)) if f else next(of_rest) for x, f in zip(leaves, found, strict=True)
        ]
        return _label_tree(params, labels)

    return label_params


def _number_of_layers(leaves, axis):
    """The length along an axis of leaves, pairs of path and shape, or an error that says which one doesn't fit."""
    for path, shape in leaves:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"parameter {_show(path)} has shape {shape}, without axis {axis} along which its layers would be"
                " stacked; give the axis, or a pattern that isn't found in this path"
            )
    lengths = {shape[axis]: path for path, shape in reversed(leaves)}
    if len(lengths) > 1 or 0 in lengths:
        shown = ", ".join(f"{n} of {_show(path)}" for n, path in reversed(lengths.items()))
        raise ValueError(
            f"stacked layers need one length of at least 1 along axis {axis}, got {shown}; give a pattern that is found"
            " in the layers of one stack alone"
        )
    return next(iter(lengths), 0)


def by_depth(n: int) -> Callable[[Any], Any]:
    """``n`` contiguous blocks of leaves in natural path order, as even as can be.

    Args:
      n: the number of blocks, at least 1; with fewer leaves each is a group.

    Returns:
      A callable from params to a label tree.

    Raises:
      ValueError: if ``n`` is not a positive integer.

    Example:
      >>> by_depth(2)({"a": 1.0, "b": 2.0, "c": 3.0})
      {'a': 'block 0', 'b': 'block 0', 'c': 'block 1'}
    """
    _check_count("n", n)

    def label_params(params):
        paths = leaf_paths(params)
        order = sorted(range(len(paths)), key=lambda i: _natural(paths[i]))
        block_of = {i: f"block {b}" for b, block in enumerate(_contiguous_blocks(order, n)) for i in block}
        return _label_tree(params, [block_of[i] for i in range(len(paths))])

    return label_params


def _label_tree(params, labels):
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _label_tree_of(groups, params):
    # A model class may define __call__: an instance of it that holds labels is a label tree.
    is_label_tree = lambda x: not callable(x) or type(x) is type(params)
    label_tree = groups if is_label_tree(groups) else groups(params)
    if not is_label_tree(label_tree):
        raise TypeError(
            f"the grouping {groups!r} returned the function {label_tree!r} and not a label tree; give that function"
            " as the grouping"
        )
    return label_tree


def _labels_of_leaves(label_tree, params):
    """The label of every leaf: that of the label leaf whose path begins the leaf's own."""
    ends = _ends(params)
    paths = [path for path, is_leaf in ends if is_leaf]
    table = dict(zip(leaf_paths(label_tree), jax.tree.leaves(label_tree), strict=True))
    matched = set()
    labels = []
    for path, is_leaf in ends:
        prefix = next((path[:k] for k in range(len(path), -1, -1) if path[:k] in table), None)
        matched.add(prefix)
        if not is_leaf:
            continue  # None or an empty container: may have a label, needs none
        if prefix is None:
            raise ValueError(
                f"the label tree has no label for parameter {_show(path)}; it has {_listing(table, 'labels')}. Give a"
                " pytree of labels with the structure of the params or a prefix of it, or a callable that makes one"
                " from the params"
            )
        labels.append(table[prefix])
    unused = [path for path in table if path not in matched]
    if unused:
        raise ValueError(
            f"the label tree has a label at {_show(unused[0])}, where the params have no parameter; they have"
            f" {_listing(paths, 'parameters')}. Drop that label, or give labels that fit this model"
        )
    return labels


def wider(a: Any, b: Any) -> Any:
    """The wider of two inexact dtypes, float32 for two halves; under strict promotion too."""
    a, b = jnp.dtype(a), jnp.dtype(b)
    if not jnp.issubdtype(a, jnp.inexact) or not jnp.issubdtype(b, jnp.inexact):
        return b if jnp.issubdtype(b, jnp.inexact) else a
    if a == b or a.itemsize != b.itemsize:
        return a if a.itemsize >= b.itemsize else b
    return jnp.dtype(jnp.float32)


def still(leaf: Any) -> Any:
    """The update of a frozen leaf: zero where that is a number, else what came."""
    dtype = dtype_of(leaf)
    if dtype == jax.dtypes.float0:
        return jnp.zeros(jnp.shape(leaf), jnp.int32)
    return jnp.zeros_like(leaf) if is_numeric(dtype) else leaf


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array or number, None for anything else."""
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    return jnp.result_type(leaf) if isinstance(leaf, numbers.Number) else None


def is_numeric(dtype: Any) -> bool:
    """Whether there is arithmetic in a dtype."""
    return dtype is not None and (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))


def _check_real(path, leaf):
    dtype = dtype_of(leaf)
    if dtype is None:
        raise TypeError(
            f"parameter {_show(path)} is {reprlib.repr(leaf)}, which is not an array; label it groups.FROZEN or keep"
            " it out of the params, as eqx.filter(model, eqx.is_inexact_array) does with an Equinox module"
        )
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16:
        return
    if jnp.issubdtype(dtype, jnp.complexfloating):
        fix = "hold its real and imaginary parts as two real arrays, or label it groups.FROZEN"
    elif jnp.issubdtype(dtype, jnp.floating):
        fix = "hold it in at least 16 bits and cast it in the loss, or label it groups.FROZEN"
    else:
        fix = "label it groups.FROZEN or keep it out of the params"
    raise TypeError(f"parameter {_show(path)} has dtype {dtype}, and a group needs real floating-point leaves; {fix}")


def _check_count(name, value):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {reprlib.repr(value)}")


def _common_prefix(paths):
    first, last = (min(paths), max(paths)) if paths else ((), ())
    k = 0
    while k < min(len(first), len(last)) and first[k] == last[k]:
        k += 1
    return first[:k]


def _contiguous_blocks(items, n):
    """Splits a list into at most ``n`` non-empty contiguous blocks whose sizes differ by at most one."""
    n = min(n, len(items))
    bounds = [0]
    for b in range(n):
        bounds.append(bounds[-1] + len(items) // n + (b < len(items) % n))
    return [items[i:j] for i, j in itertools.pairwise(bounds)]


def _block_name(block):
    ends = dict.fromkeys((block[0], block[-1]))
    return "..".join("/".join(path) or _ROOT for path in ends)


def _distinct(names):
    """The names, with a number behind those that came before."""
    seen: collections.Counter[str] = collections.Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _natural(path):
    """Sort key in which numbers inside words compare as numbers."""
    split = lambda word: [(0, int(s), "") if s.isdecimal() else (1, 0, s) for s in re.split(r"(\d+)", word) if s]
    return [split(word) for word in path], path  # the path itself tells `a1` from `a01`


def _show(path):
    return "/".join(path) or _ROOT


def _listing(paths, what, most=4):
    shown = [_show(path) for path in list(paths)[:most]]
    return f"{what} at {', '.join(shown)}{', …' if len(paths) > most else ''}" if shown else f"no {what}"
