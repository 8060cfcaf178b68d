"""Derivative tensors of any order: published numbers, differences of one order for the next, the summary."""

import itertools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same_summary
from interpreter import uncompiled

import grouped_newton as gn
from grouped_newton.groups import per_tensor, single

EPS64 = 2.0**-52


def tensors(loss, params, direction, grouping, order):
    return uncompiled(lambda p, u: gn.derivative_tensors(loss, p, u, grouping, order))(params, direction)


@pytest.mark.parametrize("grouping", [per_tensor, single], ids=["canonical", "trivial"])
def test_third_derivatives_are_the_reference(grouping, x64):
    (loss, params, direction), values = models.reference("mlp", {per_tensor: "canonical", single: "trivial"}[grouping])
    gbar, hbar, third = tensors(loss, params, direction, grouping, 3)
    close = lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-9 * np.max(np.abs(e)))
    close(gbar, values["gbar"])
    close(hbar, values["hbar"])
    close(np.einsum("sss->s", third), values["third"])
    if "third_full" in values:
        close(third, values["third_full"])


def test_every_order_is_the_derivative_of_the_one_before_and_symmetric(x64):
    """T_k along the direction of group s, at theta + h u_s, against T_(k + 1)."""
    loss, params, direction, labels = models.custom_rule_problem()
    index, h = gn.groups.resolve(labels, params).index, EPS64 ** (1 / 3)
    leaves, treedef = jax.tree.flatten(params)
    u = jax.tree.leaves(direction)

    @uncompiled
    @jax.vmap
    def at(eps):
        moved = [x if g < 0 else x + eps[g] * d for x, d, g in zip(leaves, u, index, strict=True)]
        return gn.derivative_tensors(loss, treedef.unflatten(moved), direction, labels, 4)

    step = np.concatenate([np.zeros((1, 2)), h * np.eye(2), -h * np.eye(2)])
    found = list(map(np.asarray, at(jnp.asarray(step))))
    assert [x.shape[1:] for x in found] == [(2,) * k for k in (1, 2, 3, 4)]
    for k, (lower, upper) in enumerate(itertools.pairwise(found), start=2):
        upper = upper[0]
        for axis in range(1, k):
            assert np.array_equal(upper, np.swapaxes(upper, 0, axis))
        differences = (lower[1:3] - lower[3:5]) / (2 * h)
        np.testing.assert_allclose(upper, differences, rtol=0, atol=1e-7 * np.max(np.abs(upper)))
        assert np.min(np.abs(upper)) > 1e-3 * np.max(np.abs(upper))  # no entry is 0 by chance


def test_the_summary_is_a_part_of_the_tensors(x64):
    loss, params, direction, labels = models.custom_rule_problem()
    summary = uncompiled(lambda p: gn.summarize(loss, p, direction, labels, method="nested"))(params)
    gbar, hbar, third = uncompiled(lambda p: gn.derivative_tensors(loss, p, direction, labels))(params)
    found = gn.Summary(summary.loss, gbar, hbar, jnp.einsum("sss->s", third))
    assert_same_summary(found, summary, 256 * EPS64)


def test_half_precision_is_contracted_in_float32():
    # 33/32 * 17/16 needs ten bits, more than bfloat16 has.
    n = 2**10
    slope, u = jnp.full(n, 33 / 32, jnp.bfloat16), jnp.full(n, 17 / 16, jnp.bfloat16)
    wide = lambda x: x.astype(jnp.float32)
    loss = lambda p: jnp.sum(wide(slope) * wide(p) + wide(p) ** 2 / 2)
    gbar, hbar = gn.derivative_tensors(loss, jnp.zeros(n, jnp.bfloat16), u, order=2)
    assert gbar.dtype == hbar.dtype == jnp.float32
    assert (gbar.tolist(), hbar.tolist()) == ([n * 561 / 512], [[n * 289 / 256]])


def test_the_first_order_alone_of_all_that_is_not_frozen():
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0), "ids": jnp.array(4)}
    loss = lambda p: p["a"] ** 2 * p["b"] * p["ids"]
    groups = {"a": "a", "b": gn.groups.FROZEN, "ids": gn.groups.FROZEN}
    (slopes,) = gn.derivative_tensors(loss, params, params, groups, order=1)
    assert slopes.tolist() == [2 * 2 * 2 * 3 * 4]


@pytest.mark.parametrize("order", [0, -1, 2.0, True, "3"])
def test_an_order_out_of_range_is_an_error(order):
    with pytest.raises(ValueError, match="order must be an integer of at least 1, got"):
        gn.derivative_tensors(jnp.sum, jnp.ones(2), jnp.ones(2), order=order)
