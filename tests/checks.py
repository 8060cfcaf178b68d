"""Comparisons of pytrees, shared by the tests."""

import functools

import chex
import jax
import numpy as np

import grouped_newton as gn


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def each(run, *args):
    """What ``jax.vmap(run)`` gives, one after the other: conditions stay conditions, which compiles in a third."""
    args = jax.device_get(args)  # for which no index is compiled
    found = [jax.device_get(run(*at(args, i))) for i in range(len(jax.tree.leaves(args)[0]))]
    return jax.tree.map(lambda *xs: np.stack(xs), *found)


def shifted(first, after):
    """What was there before every step, of what was there first and after every step."""
    return jax.tree.map(lambda p, x: np.concatenate([np.asarray(p)[None], np.asarray(x)[:-1]]), first, after)


def assert_finite(tree):
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(tree))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol, atol=0.0):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def assert_close_by_largest(a, b, tol):
    """Every array to a tolerance relative to its own largest entry."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        atol = tol * max(np.max(np.abs(b), initial=0), 1e-30)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, a, b)


def only_grouped_newton(state):
    """Our state within another."""
    is_ours = lambda x: isinstance(x, gn.GroupedNewtonState)
    (found,) = (x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x))
    return found


def assert_same_summary(got, expected, tol):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tol * (1e-30 + np.max(np.abs(b), initial=0)), rtol=0, err_msg=name)
