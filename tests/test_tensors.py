"""Derivative tensors of any order, and other curvatures than the loss's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_equal, assert_same_summary

import grouped_newton as gn
from grouped_newton.groups import FROZEN, per_tensor, single

EPS64 = 2.0**-52


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def tensors(loss, params, direction, grouping, order):
    return gn.derivative_tensors(loss, params, direction, grouping, order)


# Tensors


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


@jax.custom_vjp
def sine(x):
    """Differentiable by its rule alone."""
    return jax.lax.stop_gradient(jnp.sin(x))


sine.defvjp(lambda x: (sine(x), x), lambda x, ct: (jnp.cos(x) * ct,))


def residual_problem():
    """Two groups across leaves in another order than the forward pass, a frozen leaf and a custom rule."""
    problem = models.tanh_mlp((3, 4, 2), seed=3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)))
    loss = lambda p: jnp.mean(jnp.exp(models.apply_dense(p, x, sine)))
    labels = {"Dense_0": {"bias": "y", "kernel": "x"}, "Dense_1": {"bias": FROZEN, "kernel": "y"}}
    return loss, problem.params, problem.direction, labels


def test_every_order_is_the_derivative_of_the_one_before_and_symmetric(x64):
    """T_k along the direction of group s, at theta + h u_s, against T_(k + 1)."""
    loss, params, direction, labels = residual_problem()
    index, h = gn.groups.resolve(labels, params).index, EPS64 ** (1 / 3)
    leaves, treedef = jax.tree.flatten(params)
    u = jax.tree.leaves(direction)

    @jax.jit
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
    loss, params, direction, labels = residual_problem()
    summary = jax.jit(lambda p: gn.summarize(loss, p, direction, labels, method="nested"))(params)
    gbar, hbar, third = jax.jit(lambda p: gn.derivative_tensors(loss, p, direction, labels))(params)
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


@pytest.mark.parametrize("order", [0, -1, 2.0, True, "3"])
def test_an_order_out_of_range_is_an_error(order):
    with pytest.raises(ValueError, match="order must be an integer of at least 1, got"):
        gn.derivative_tensors(jnp.sum, jnp.ones(2), jnp.ones(2), order=order)


# Gauss-Newton


def cross_entropy(outputs):
    return models.nll(outputs["logits"], outputs["labels"]) + jnp.mean(outputs["penalty"] ** 2)


def model(params):
    """Two real outputs, of which one is no array's whole, and labels; the first layer's rule is a custom one."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((6, 3)), float)
    logits = models.apply_dense(params, x, sine)
    return {"logits": logits, "labels": jnp.arange(6) % 2, "penalty": params["Dense_0"]["bias"] ** 2}


def test_gauss_newton_is_jacobians_around_the_hessian_of_the_loss(x64):
    _, params, direction, labels = residual_problem()

    @jax.jit
    def both(params):
        summary = gn.gauss_newton_summary(model, cross_entropy, params, direction, labels)
        z = model(params)
        flat = lambda logits, penalty: jnp.concatenate([logits.ravel(), penalty])
        jacobian = jax.jacrev(lambda p: flat(model(p)["logits"], model(p)["penalty"]))(params)
        index = gn.groups.resolve(labels, params).index
        tangents = [
            sum(
                jnp.tensordot(j, u, u.ndim)
                for j, u, g in zip(jax.tree.leaves(jacobian), jax.tree.leaves(direction), index, strict=True)
                if g == s
            )
            for s in range(2)
        ]
        of_outputs = lambda y: cross_entropy(z | {"logits": y[:12].reshape(6, 2), "penalty": y[12:]})
        at = flat(z["logits"], z["penalty"])
        along = jnp.stack(tangents)
        third = jax.jacfwd(jax.hessian(of_outputs))(at)
        dense = gn.Summary(
            cross_entropy(z),
            along @ jax.grad(of_outputs)(at),
            along @ jax.hessian(of_outputs)(at) @ along.T,
            jnp.einsum("ijk,si,sj,sk->s", third, along, along, along),
        )
        order_2 = gn.gauss_newton_summary(model, cross_entropy, params, direction, labels, order=2)
        return summary, dense, order_2

    summary, dense, order_2 = both(params)
    assert_same_summary(summary, dense, 256 * EPS64)
    assert_same_summary(order_2, dense._replace(third=jnp.zeros(2)), 256 * EPS64)
    assert np.all(np.linalg.eigvalsh(summary.hbar) > 0)


def some_summary(S, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((S, S))
    of = lambda x: jnp.asarray(x, jnp.float32)
    return gn.Summary(of(1.5), of(rng.uniform(1, 2, S)), of(root @ root.T), of(rng.uniform(1, 2, S)))


def test_a_diagonal_summary_has_no_curvature_between_groups():
    summary = some_summary(3)
    found = gn.diagonal(summary)
    assert np.array_equal(found.hbar, np.diag(np.diag(summary.hbar)))
    assert found._replace(hbar=None) == summary._replace(hbar=None)


# In the transform


def test_a_refresh_takes_the_callers_summary_of_what_it_would_have_summarised():
    params, direction = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.full(2, 2.0), "b": jnp.full(3, 3.0)}
    given, seen = some_summary(2), []
    tx = gn.scale_by_grouped_newton(per_tensor, rates=gn.edge_rates(1.0))

    @jax.jit
    def refreshed():
        def summary_fn(params, direction, groups):
            assert groups is per_tensor
            seen.append((params, direction))
            return given

        loss = lambda p: jnp.sum(p["a"])
        state = tx.update(direction, tx.init(params), params, value_fn=loss, summary_fn=summary_fn)[1]
        return state, gn.edge_rates(1.0)(given, 1.0).eta

    state, eta = refreshed()
    for name in ("loss", "gbar", "hbar", "third"):
        assert np.array_equal(getattr(state.summary, name), getattr(given, name))
    np.testing.assert_allclose(state.eta, eta, rtol=1e-5)
    assert np.all(eta > 0)
    assert_equal(seen, [(params, direction)])


def test_what_is_no_summary_of_these_groups_is_an_error():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = gn.scale_by_grouped_newton(per_tensor)
    update = lambda fn: tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["a"]), summary_fn=fn)
    with pytest.raises(ValueError, match=r"summary_fn must return a Summary of 2 groups, got .*\(3, 3\)"):
        update(lambda *at: some_summary(3))
    with pytest.raises(TypeError, match="summary_fn must be a function"):
        update(some_summary(2))
